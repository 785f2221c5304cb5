import gc
import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL_LABELS, STROKES
from PIL import Image

import draw
import main
from data_utils import network_input, open_image
from hccr import HCCR, Candidate, Reading

ROOT = Path(__file__).parents[1]
SIDE = 300


def stroke(*points, width=9.0):
    return draw.Stroke(points, width)


# 中, as it would be written on a pad of 300 pixels
CHARACTER = tuple(stroke(*((2.4 * x + 30, 2.4 * y + 30) for x, y in points)) for points in STROKES)


# --- The drawing


def test_undo_takes_back_strokes_and_clearing():
    drawing = draw.Drawing()
    drawing.undo()
    assert drawing.strokes == ()
    for one in CHARACTER:
        drawing.add(one)
    assert drawing.strokes == CHARACTER
    drawing.undo()
    assert drawing.strokes == CHARACTER[:-1]
    drawing.clear()
    drawing.clear()
    assert drawing.strokes == ()
    drawing.undo()
    assert drawing.strokes == CHARACTER[:-1]


@pytest.mark.parametrize(
    ('points', 'expected'),
    [
        ([(5, 5)], [(5, 5)]),
        ([(0, 0), (10, 0)], [(0, 0), (10, 0)]),
        ([(0, 0), (10, 0), (10, 10)], [(0, 0), (10, 5), (10, 10)]),
    ],
)
def test_a_curve_starts_and_ends_with_the_pen(points, expected):
    result = draw.curve(tuple(points), spacing=1000)
    assert result == expected


def test_a_curve_has_no_corners():
    points = np.array(draw.curve(((0, 0), (100, 0), (100, 100), (0, 100)), spacing=1))
    steps = np.diff(points, axis=0)
    directions = np.unwrap(np.arctan2(steps[:, 1], steps[:, 0]))
    assert np.abs(np.diff(directions)).max() < 0.1
    assert np.hypot(*steps[:-1].T).max() < 2


def test_a_page_is_ink_on_white():
    page = draw.Page(SIDE).render((stroke((50, 150), (250, 150), width=12.0),))
    assert page.shape == (SIDE, SIDE)
    assert page.dtype == np.uint8
    assert page.max() == 255
    assert page.min() == 0
    column = page[:, 150] < 128
    assert column.sum() == pytest.approx(12, abs=1)
    assert column[150]
    rows = np.flatnonzero((page < 128).any(axis=0))
    assert (rows[0], rows[-1]) == pytest.approx((44, 256), abs=2)  # round ends


def test_a_touch_of_the_pen_is_a_dot():
    page = draw.Page(SIDE).render((stroke((100, 200), width=10.0),))
    assert (page < 128).sum() == pytest.approx(np.pi * 25, rel=0.1)
    assert page[200, 100] == 0


def test_a_page_that_goes_on_is_the_one_drawn_anew():
    page = draw.Page(SIDE)
    for count in (1, 2, 4, 3, 0, 4, 2):
        rendered = page.render(CHARACTER[:count])
        assert np.array_equal(rendered, draw.Page(SIDE).render(CHARACTER[:count]))


def test_strokes_may_leave_the_page():
    page = draw.Page(SIDE).render((stroke((-50, 10), (400, 290)),))
    assert (page < 128).any()


# --- What the pad shows


def test_papers_differ():
    cross, star = (np.asarray(draw.paper(SIDE, grid)) for grid in draw.GRIDS)
    assert cross.shape == star.shape == (SIDE, SIDE, 3)
    assert not np.array_equal(cross, star)
    for paper in (cross, star):
        assert paper.min() > 100  # nothing of it looks like ink


def test_heat_lies_where_the_ink_is():
    page = draw.Page(SIDE).render((stroke((40, 60), (40, 160)), stroke((90, 60), (90, 160))))
    left = np.zeros((96, 96), np.float32)
    left[:, :48] = 2
    left[:, 48:] = -1
    hot = np.asarray(draw.heat(left, page))
    assert hot.shape == page.shape
    assert hot[110, 40] == 255
    assert hot[110, 90] == 0
    assert hot[110, 250] == hot[250, 40] == 0  # outside what the network saw
    assert not np.asarray(draw.heat(-np.ones((96, 96), np.float32), page)).any()


def test_the_picture_shows_ink_and_heat():
    page = draw.Page(SIDE).render(CHARACTER)
    plain = np.asarray(draw.picture(page, '田'), int)
    assert plain[page == 0].max() < 60
    assert plain[page == 255].min() > 100
    everywhere = draw.Image.new('L', (SIDE, SIDE), 255)
    warm = np.asarray(draw.picture(page, '田', everywhere), int)
    assert (warm[..., 0] - warm[..., 2]).min() > 60  # red
    assert warm[page == 0].mean() < warm[page == 255].mean()  # the ink shows through


@pytest.mark.parametrize(
    ('probability', 'text'),
    [(0, '< 0.1%'), (0.0004, '< 0.1%'), (0.0005, '0.1%'), (0.5, '50.0%'), (0.9994, '99.9%'), (1, '> 99.9%')],
)
def test_nothing_is_certain(probability, text):
    assert draw.percent(probability) == text


# --- Recognition


@pytest.fixture(scope='module')
def recogniser(small_file):
    return HCCR(small_file)


def test_the_pad_reads_what_its_file_would_give(recogniser, tmp_path):
    page = draw.Page(460).render(tuple(stroke(*((x * 1.5, y * 1.5) for x, y in s.points)) for s in CHARACTER))
    path = draw.save_drawing(page, tmp_path, '中')
    (from_file,) = recogniser.read([path], draw.CANDIDATES, with_images=True)
    from_pad = draw.recognise(recogniser, page)
    assert from_pad.candidates == from_file.candidates
    assert len(from_pad.candidates) == len(SMALL_LABELS)
    for field in ('image', 'network_input', 'activation_map'):
        assert np.array_equal(getattr(from_pad, field), getattr(from_file, field))
    assert np.array_equal(from_pad.network_input, network_input(open_image(path)))


def test_an_empty_page_is_an_error_and_no_exception(recogniser):
    assert draw.recognise(recogniser, draw.Page(SIDE).render(())).error


def wait_for(condition, between=lambda: time.sleep(0.005), limit=60):
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end, 'waited in vain'
        between()


class Gate:
    """Work that goes on only when the test says so."""

    def __init__(self, answer=lambda item: item):
        self.started, self.open, self._answer = [], threading.Semaphore(0), answer

    def __call__(self, item):
        self.started.append(item)
        assert self.open.acquire(timeout=60)
        return self._answer(item)


def polled(latest):
    """Return all results that come within a moment."""
    results = []
    for _ in range(20):
        results.append(latest.poll())
        time.sleep(0.005)
    return [result for result in results if result is not None]


def test_a_stale_result_never_comes():
    gate = Gate()
    latest = draw.Latest(gate)
    latest.submit('old')
    wait_for(lambda: gate.started == ['old'])
    for item in ('skipped', 'also skipped', 'new'):
        latest.submit(item)
    gate.open.release()
    wait_for(lambda: gate.started == ['old', 'new'])
    assert polled(latest) == []
    gate.open.release()
    assert polled(latest) == ['new']
    assert polled(latest) == []  # once
    latest.close()


def test_a_finished_result_is_dropped_for_a_newer_request():
    gate = Gate()
    latest = draw.Latest(gate)
    for submit_or_forget in (lambda: latest.submit('new'), latest.forget):
        gate.open.release()
        latest.submit('old')
        wait_for(lambda: latest._finished)
        submit_or_forget()
        assert polled(latest) == []
        gate.open.release()
    latest.close()


def test_an_error_in_the_thread_comes_to_whoever_polls_and_the_thread_goes_on():
    latest = draw.Latest(lambda item: 1 // item)
    latest.submit(0)
    with pytest.raises(ZeroDivisionError):
        wait_for(latest.poll)
    latest.submit(1)
    assert polled(latest) == [1]
    latest.close()
    assert not latest._thread.is_alive()


# --- Saving


def test_drawings_are_never_overwritten(tmp_path):
    folder = tmp_path / 'new' / 'folder'
    pages = [draw.Page(SIDE).render(CHARACTER[: i + 1]) for i in range(3)]
    names = [draw.save_drawing(page, folder, '鲍').name for page in pages]
    assert names == ['鲍.png', '鲍-2.png', '鲍-3.png']
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)  # nothing else lies about
    for name, page in zip(names, pages, strict=True):
        assert np.array_equal(np.asarray(Image.open(folder / name)), page)


@pytest.mark.parametrize('label', ['/', '.', '\0', '*'])
def test_labels_that_no_file_can_have(tmp_path, label):
    path = draw.save_drawing(draw.Page(SIDE).render(CHARACTER), tmp_path, label)
    assert path.name == f'U+{ord(label):04X}.png'
    assert path.exists()


# --- The command line


def run_program(*arguments, code='', **environment):
    """Run the program in another process, without a display unless the environment has one."""
    base = {name: value for name, value in os.environ.items() if name not in ('DISPLAY', 'WAYLAND_DISPLAY')}
    command = [sys.executable, *(['-c', code] if code else [ROOT / 'draw.py']), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env=base | environment, check=False, cwd=ROOT, timeout=120
    )


def test_without_tkinter_it_names_the_package():
    code = 'import sys; sys.modules["tkinter"] = None; import draw; sys.exit(draw.main([]))'
    done = run_program(code=code)
    assert done.returncode == 1
    assert done.stdout == ''
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith('draw.py: this Python has no tkinter')
    assert 'python3-tk' in done.stderr


@pytest.mark.skipif(draw.tkinter is None, reason='this Python has no tkinter')
@pytest.mark.skipif(sys.platform in ('win32', 'darwin'), reason='there is always a display')
def test_without_a_display_it_says_so():
    done = run_program()
    assert done.returncode == 1
    assert done.stdout == ''
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith('draw.py: no window can be opened here')


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as leaving:
        draw.main(['--help'])
    assert leaving.value.code == 0
    output = capsys.readouterr().out
    for word in ('--model', '--folder', '--size', 'Ctrl+Z', 'Esc', '1 ... 9', 'right click', 'exit status'):
        assert word in output


@pytest.mark.parametrize('arguments', [['--size', '5'], ['--size', 'large'], ['--pen', '3'], ['image.png']])
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as leaving:
        draw.main(arguments)
    assert leaving.value.code == 2
    assert 'usage: draw.py' in capsys.readouterr().err


# --- The window


@pytest.fixture(scope='module')
def display():
    """A virtual X server for this module alone."""
    if draw.tkinter is None:
        pytest.skip('this Python has no tkinter')
    if not shutil.which('Xvfb'):
        pytest.skip('Xvfb is not installed (Debian: apt-get install xvfb)')
    reading, writing = os.pipe()
    server = subprocess.Popen(
        ['Xvfb', '-displayfd', str(writing), '-screen', '0', '1280x1024x24', '-nolisten', 'tcp'],
        pass_fds=[writing],
        stderr=subprocess.DEVNULL,
    )
    os.close(writing)
    with os.fdopen(reading) as number:
        name = f':{number.readline().strip()}'
    if name == ':':
        server.wait()
        pytest.skip(f'Xvfb does not start here, exit status {server.returncode}')
    yield name
    server.terminate()
    server.wait()


@pytest.fixture
def on_display(display, monkeypatch):
    monkeypatch.setenv('DISPLAY', display)
    yield
    gc.collect()  # windows, here and not in some thread, where Tcl would end the process


class Loaded:
    """A `main.Loading` that has finished."""

    unfinished = False

    def __init__(self, recogniser):
        self._recogniser = recogniser

    def result(self):
        return self._recogniser


class Hand:
    """Uses a pad by the events that a mouse and a keyboard give."""

    def __init__(self, loading, folder='drawings'):
        self.root = draw.open_window()
        self.pad = draw.Pad(self.root, loading, SIDE, folder)
        self.root.update()
        self.root.focus_force()
        self.root.update()

    def wait_for(self, condition):
        def between():
            self.root.update()
            assert self.pad._error is None
            time.sleep(0.002)

        wait_for(condition, between)

    def wait_for_answer(self):
        self.wait_for(lambda: self.pad.is_answered)

    def write(self, *strokes):
        for points, _ in strokes:
            self._mouse('<ButtonPress-1>', points[0])
            for (x0, y0), (x1, y1) in itertools.pairwise(points):
                for i in range(1, 11):
                    self._mouse('<B1-Motion>', (x0 + (x1 - x0) * i / 10, y0 + (y1 - y0) * i / 10))
            self._mouse('<ButtonRelease-1>', points[-1])

    def _mouse(self, event, point):
        self.pad.paper.event_generate(event, x=round(point[0]), y=round(point[1]))
        self.root.update()

    def click_row(self, rank, button=1):
        y = round((rank - 0.5) * SIDE / draw.CANDIDATES)
        for event in (f'<ButtonPress-{button}>', f'<ButtonRelease-{button}>'):
            self.pad.rows.event_generate(event, x=40, y=y)
        self.root.update()

    def key(self, *sequences):
        for sequence in sequences:
            self.pad.paper.event_generate(sequence)
            self.root.update()

    @property
    def rows(self):
        """The texts of the rows: numbers, and where there are candidates these and their percentages."""
        canvas = self.pad.rows
        return [canvas.itemcget(item, 'text') for item in canvas.find_all() if canvas.type(item) == 'text']

    @property
    def strokes(self):
        return self.pad._drawing.strokes

    @property
    def shown(self):
        """The picture on the pad, uint8 `(side, side, 3)`."""
        photo = self.pad._photo
        data = self.root.tk.call(photo.name, 'data', '-format', 'ppm')
        return np.frombuffer(bytes(data, 'latin-1') if isinstance(data, str) else bytes(data), np.uint8)[
            -SIDE * SIDE * 3 :
        ].reshape(SIDE, SIDE, 3)

    def leave(self):
        self.pad.close()
        self.root.destroy()


@pytest.fixture
def hand(on_display, recogniser, tmp_path):
    hand = Hand(Loaded(recogniser), tmp_path / 'drawings')
    yield hand
    hand.leave()
    assert hand.pad._error is None


def test_candidates_appear_after_every_stroke(hand):
    assert hand.rows == [str(rank) for rank in range(1, 10)]
    for count in range(1, 5):
        hand.write(CHARACTER[count - 1])
        assert len(hand.strokes) == count
        hand.wait_for_answer()
        expected = draw.recognise(hand.pad._loading.result(), draw.Page(SIDE).render(hand.strokes))
        assert hand.pad.reading.candidates == expected.candidates
    best = expected.candidates[0]
    assert hand.rows[:2] == ['1', best.character]
    assert hand.rows[2].startswith(draw.percent(best.probability))
    assert set(SMALL_LABELS) <= set(hand.rows)


def test_strokes_are_where_the_pen_was(hand):
    hand.write(CHARACTER[1])
    (written,) = hand.strokes
    assert np.allclose([written.points[0], written.points[-1]], np.round(CHARACTER[1].points)[[0, -1]], atol=1)
    assert written.width == pytest.approx(draw.PEN_WIDTH * SIDE)
    page = draw.Page(SIDE).render(hand.strokes)
    assert np.array_equal(hand.shown, np.asarray(draw.picture(page, '田')))
    assert hand.pad.paper.find_withtag('live') == ()


def test_ink_shows_while_the_pen_is_down(hand):
    hand._mouse('<ButtonPress-1>', (50, 50))
    for x in range(60, 200, 10):
        hand._mouse('<B1-Motion>', (x, 50 + x % 3))
    assert hand.strokes == ()
    left, _, right, _ = hand.pad.paper.bbox('live')
    assert left < 50
    assert right > 190
    hand.key('<Control-z>')  # takes the stroke back that is being drawn
    hand._mouse('<B1-Motion>', (220, 50))
    hand._mouse('<ButtonRelease-1>', (220, 50))
    assert hand.strokes == ()
    assert hand.pad.paper.find_withtag('live') == ()


@pytest.mark.parametrize('keys', [('<Escape>',), ('<Delete>',), ('<Control-z>',) * 4])
def test_clear_and_undo(hand, keys):
    empty = hand.shown
    hand.write(*CHARACTER)
    hand.wait_for_answer()
    hand.key(*keys)
    assert hand.strokes == ()
    assert np.array_equal(hand.shown, empty)
    assert hand.pad.reading is None
    assert hand.rows == [str(rank) for rank in range(1, 10)]


def test_undo_answers_for_what_is_left(hand):
    hand.write(*CHARACTER[:2])
    hand.wait_for_answer()
    two = hand.pad.reading.candidates
    hand.write(*CHARACTER[2:])
    hand.wait_for_answer()
    hand.key('<Control-z>', '<Control-z>')
    assert len(hand.strokes) == 2
    hand.wait_for_answer()
    assert hand.pad.reading.candidates == two
    hand.key('<Escape>', '<Control-z>')
    assert len(hand.strokes) == 2


def test_keys_and_clicks_write_the_text(hand):
    text = ''
    for take, rank in ((hand.key, 2), (hand.click_row, 1), (hand.key, 5), (hand.click_row, 3)):
        hand.write(*CHARACTER)
        hand.wait_for_answer()
        text += hand.pad.reading.candidates[rank - 1].character
        take(f'<Key-{rank}>') if take == hand.key else take(rank)
        assert hand.pad.text.get() == text
        assert hand.strokes == ()
    hand.key('<Key-1>')  # nothing is on the pad
    hand.click_row(1)
    assert hand.pad.text.get() == text
    hand.write(*CHARACTER)
    hand.wait_for_answer()
    hand.key('<Key-9>')  # five classes have no ninth candidate
    hand.click_row(8)
    assert hand.pad.text.get() == text
    assert len(hand.strokes) == 4

    hand.key('<Control-c>')
    assert hand.root.clipboard_get() == text
    hand.key('<BackSpace>')
    assert hand.pad.text.get() == text[:-1]


def test_grid_map_and_pen(hand):
    hand.write(*CHARACTER)
    hand.wait_for_answer()
    cross = hand.shown
    hand.key('<Key-g>')
    star = hand.shown
    assert not np.array_equal(star, cross)
    hand.key('<Key-g>')
    assert np.array_equal(hand.shown, cross)

    hand.key('<Key-m>')
    hot = draw.heat(hand.pad.reading.activation_map, hand.pad._rendered)
    assert np.array_equal(hand.shown, np.asarray(draw.picture(hand.pad._rendered, '田', hot)))
    assert not np.array_equal(hand.shown, cross)
    hand.key('<Key-m>')
    assert np.array_equal(hand.shown, cross)

    hand.pad._pen.set(draw.PEN_WIDTHS[1])
    hand.write(CHARACTER[0])
    assert hand.strokes[-1].width == pytest.approx(draw.PEN_WIDTHS[1] * SIDE)
    assert hand.strokes[0].width == pytest.approx(draw.PEN_WIDTH * SIDE)


def test_save_by_the_name_of_a_candidate(hand, tmp_path):
    folder = tmp_path / 'drawings'
    hand.key('<Control-s>')
    assert 'Nothing is saved' in hand.pad._status.get()
    assert not folder.exists()
    hand.write(*CHARACTER)
    hand.wait_for_answer()
    candidates = hand.pad.reading.candidates
    hand.key('<Control-s>', '<Control-s>')
    hand.click_row(2, button=3)
    hand.click_row(9, button=3)
    names = {f'{candidates[0].character}.png', f'{candidates[0].character}-2.png', f'{candidates[1].character}.png'}
    assert {path.name for path in folder.iterdir()} == names
    for path in folder.iterdir():
        (reading,) = hand.pad._loading.result().read([path], draw.CANDIDATES)
        assert reading.candidates == candidates
    assert len(hand.strokes) == 4  # still there to go on

    hand.pad._folder = folder / f'{candidates[0].character}.png' / 'below a file'
    hand.key('<Control-s>')
    assert 'Not saved' in hand.pad._status.get()


class GatedRecogniser:
    """Answers with how much ink there is, when the test says so."""

    def __init__(self):
        self.gate = Gate(lambda page: Reading(Path(), (Candidate(str(int((page < 128).sum())), 0.9),)))

    def read(self, pages, *_, **__):
        yield self.gate(pages[0])


def test_a_stale_result_never_replaces_a_newer_one(on_display):
    recogniser = GatedRecogniser()
    gate = recogniser.gate
    hand = Hand(Loaded(recogniser))

    def rest():
        for _ in range(30):
            hand.root.update()
            time.sleep(0.005)

    hand.write(CHARACTER[0])
    hand.wait_for(lambda: len(gate.started) == 1)
    hand.write(*CHARACTER[1:])  # the pen goes on while the network works
    assert len(hand.strokes) == 4
    gate.open.release()
    hand.wait_for(lambda: len(gate.started) == 2)
    rest()
    assert hand.pad.reading is None  # the first answer was for one stroke
    gate.open.release()
    hand.wait_for_answer()
    assert hand.pad.reading.candidates[0].character == str(int((gate.started[1] < 128).sum()))

    hand.write(CHARACTER[0])
    hand.wait_for(lambda: len(gate.started) == 3)
    hand.key('<Escape>')
    gate.open.release()
    rest()
    assert hand.pad.reading is None  # a cleared pad stays empty
    assert hand.rows == [str(rank) for rank in range(1, 10)]
    hand.leave()


def test_the_window_stands_while_the_network_loads(on_display, recogniser):
    loading = Loaded(recogniser)
    loading.unfinished = True
    hand = Hand(loading)
    assert 'Loading' in hand.pad._status.get()
    hand.write(*CHARACTER)
    assert len(hand.strokes) == 4
    loading.unfinished = False
    hand.wait_for_answer()
    hand.leave()


def test_without_a_chinese_font_codes_stand_beside_the_characters(on_display, recogniser, monkeypatch):
    monkeypatch.setattr(draw, 'CJK_FONTS', [])
    hand = Hand(Loaded(recogniser))
    hand.write(*CHARACTER)
    hand.wait_for_answer()
    for candidate in hand.pad.reading.candidates:
        assert candidate.character in hand.rows
        assert any(f'U+{ord(candidate.character):04X}' in row for row in hand.rows)
    hand.leave()


def leave_by(monkeypatch, action):
    """Have the window's own loop call something once the network is there."""
    run = draw.Pad.run

    def run_and_leave(pad):
        def when_loaded():
            if pad._loading.unfinished:
                pad._root.after(50, when_loaded)
            else:
                action(pad)

        pad._root.after(50, when_loaded)
        run(pad)

    monkeypatch.setattr(draw.Pad, 'run', run_and_leave)


LEAVINGS = {
    'closed': (lambda pad: pad._root.tk.call(pad._root.protocol('WM_DELETE_WINDOW')), 0, ''),
    'interrupted': (lambda pad: os.kill(os.getpid(), signal.SIGINT), 130, '\nInterrupted.\n'),
}


@pytest.mark.parametrize('leaving', LEAVINGS)
def test_leaving(on_display, small_file, monkeypatch, capsys, leaving):
    action, status, message = LEAVINGS[leaving]
    leave_by(monkeypatch, action)
    assert draw.main(['--model', str(small_file), '--size', str(SIDE)]) == status
    assert capsys.readouterr() == ('', message)


def test_a_bad_model_is_one_line_and_status_1(on_display, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(main.os, '_exit', lambda status: None)
    assert draw.main(['--model', str(tmp_path / 'none.h5')]) == 1
    output, errors = capsys.readouterr()
    assert output == ''
    assert len(errors.splitlines()) == 1
    assert 'none.h5' in errors


def test_a_process_with_a_window_ends_by_ctrl_c(on_display, small_file):
    code = (
        'import os, signal, sys, draw\n'
        'show = draw.Pad._show_rows\n'
        'def showing(pad):\n'
        '    show(pad)\n'
        '    pad._root.after(200, os.kill, os.getpid(), signal.SIGINT)\n'
        'draw.Pad._show_rows = showing\n'
        'sys.exit(draw.main(sys.argv[1:]))\n'
    )
    done = run_program('--model', str(small_file), code=code, DISPLAY=os.environ['DISPLAY'])
    assert done.returncode == 130
    assert done.stdout == ''
    assert 'Traceback' not in done.stderr
