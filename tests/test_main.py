import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL_LABELS, draw_character
from PIL import Image

import main
from hccr import HCCR, Candidate, Reading

ROOT = Path(__file__).parents[1]


@pytest.fixture
def folder(tmp_path):
    """Three images, the second of which is none."""
    folder = tmp_path / 'scans'
    folder.mkdir()
    for name in ('1.png', '10.PNG'):
        Image.fromarray(draw_character()).save(folder / name)
    (folder / '2.png').write_bytes(b'no image')
    return folder


@pytest.fixture
def run(small_file, capsys):
    """Run the program in this process with a small model."""

    def run(*arguments):
        status = main.main([*map(str, arguments), '--model', str(small_file)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def reader(*answers):
    """Stand in for `input`: give these answers, then the end of input."""
    left = list(answers)

    def read():
        if not left:
            raise EOFError
        if isinstance(left[0], BaseException):
            raise left.pop(0)
        print(left[0])
        return left.pop(0)

    return read


# --- Prompts


@pytest.mark.parametrize(
    ('answer', 'yes'),
    [('', True), ('y', True), ('Y', True), ('yes', True), ('n', False), ('N', False), (' no ', False)],
)
def test_yes_is_the_default(answer, yes):
    assert main.ask('Continue? [Y/n] ', main.parse_yes, 'y', reader(answer)) is yes


@pytest.mark.parametrize(('answer', 'count'), [('1', 1), ('3755', 3755), (' 7 ', 7), ('５', 5), ('', 5)])
def test_counts(answer, count):
    assert main.ask('How many? ', main.parse_count, '5', reader(answer)) == count


@pytest.mark.parametrize('answer', ['0', '-1', '3756', '99999', 'five', '2.5', '--'])
def test_wrong_counts_are_explained_and_asked_again(answer, capsys):
    assert main.ask('How many? ', main.parse_count, '5', reader(answer, '2')) == 2
    output = capsys.readouterr().out
    assert 'Ooops... An exception occured:' in output
    assert '1 to 3755' in output
    assert 'Try again' in output


@pytest.mark.parametrize('pasted', ['{}', '{}/', '"{}"', "'{}'", '  {}  ', '{escaped}', '{}/*.png'])
def test_pasted_paths(tmp_path, pasted):
    folder = tmp_path / 'my scans'
    folder.mkdir()
    (folder / 'a.png').touch()
    answer = pasted.format(folder, escaped=str(folder).replace(' ', '\\ '))
    assert main.ask('Where? ', main.parse_source, 'images', reader(answer))[1] == [folder / 'a.png']


def test_a_path_with_nothing_is_asked_again(tmp_path, folder, capsys):
    assert main.ask('Where? ', main.parse_source, '', reader(str(tmp_path / 'none'), str(folder)))[0]
    assert 'Ooops... Image(s) not found :(\nTry again' in capsys.readouterr().out


# --- The dialogue


def test_the_dialogue_is_the_original_one(folder, small_file, capsys):
    loading = main.Loading(str(small_file), crop=True)
    image = folder / '1.png'
    status = main.dialogue(loading, 'off', reader('y', str(image), '2', 'y', str(folder), 'five', '1', 'n'))
    assert status == main.EXIT_ERROR  # one file could not be read

    output = capsys.readouterr().out
    expected = [
        '---------- Offline Handwritten Chinese Character Recognizer ----------',
        'Based on the convolutional neural network called Melnyk-Net.',
        'Recognizes 3755 Chinese character classes from GB2312-80 level-1.',
        'Copyright © 2018 Pavlo O. Melnyk',
        'Show Melnyk-Net summary? [Y/n] ',
        'conv2d_14',
        'Please specify data filepath: ',
        'Loading the data.....................................',
        'Please specify number of predictions per input image: ',
        'Melnyk-Net response:',
        "% sure it's     ",
        'Continue? [Y/n] ',
        'Please specify data filepath: ',
        'Loading the data.....................................',
        'Found 3 images in the specified directory',
        'Please specify number of predictions per input image: ',
        'Ooops... An exception occured:',
        'Try again',
        'Melnyk-Net response:',
        '1.png',
        "% sure it's     ",
        '2.png',
        '10.PNG',
        'Continue? [Y/n] ',
        'Thanks for using Melnyk-Net Offline HCCR software!',
    ]
    position = 0
    for text in expected:
        position = output.index(text, position) + len(text)


def test_the_dialogue_of_a_light_installation(folder, small_tflite, capsys, monkeypatch):
    monkeypatch.setattr(main, 'can_draw', lambda: False)
    loading = main.Loading(str(small_tflite), crop=True)
    assert main.dialogue(loading, None, reader('y', str(folder / '1.png'), '1', 'n')) == 0
    output, errors = capsys.readouterr()
    assert 'melnyk_net: 96×96 pixels → 5 characters' in output
    assert output.count('Dear User') == 1
    assert 'pip install matplotlib' in errors


LEAVINGS = [(EOFError(), 0), (KeyboardInterrupt(), 130)]


@pytest.mark.parametrize('prompt', range(4))
@pytest.mark.parametrize(('leaving', 'expected'), LEAVINGS)
def test_leaving_at_any_prompt_is_polite(folder, run, monkeypatch, prompt, leaving, expected):
    answers = ['n', str(folder / '1.png'), '1', 'n'][:prompt]
    monkeypatch.setattr(main.os, '_exit', lambda status: None)
    monkeypatch.setattr(main.dialogue, '__defaults__', (reader(*answers, leaving),))
    status, output, errors = run('--plot', 'off')
    assert status == expected
    assert main.FAREWELL in output + errors
    assert 'Traceback' not in errors


def test_end_of_input_in_a_real_process(small_file):
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, ROOT / 'main.py', '--model', small_file], input='', capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert done.stdout.endswith(f'{main.FAREWELL}\n')
    assert 'Traceback' not in done.stderr
    assert time.monotonic() - start < 60


@pytest.mark.skipif(os.name == 'nt', reason='signals are sent otherwise there')
def test_ctrl_c_in_a_real_process(small_file):
    command = [sys.executable, ROOT / 'main.py', '--model', small_file]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        shown = b''
        while b'summary?' not in shown:
            shown += (part := os.read(process.stdout.fileno(), 4096))
            assert part
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b'Traceback' not in output + errors


# --- The command line


def test_text(folder, run):
    status, output, errors = run(folder / '1.png', '-n', 2)
    assert status == 0
    lines = output.splitlines()
    assert [line.startswith('Dear User, I am ') for line in lines[:2]] == [True, True]
    assert lines[0].endswith(tuple(f"% sure it's     {label}" for label in SMALL_LABELS))
    assert errors == ''


def test_json_is_one_object_a_line_in_the_order_of_the_files(folder, run):
    status, output, errors = run(folder, '-n', 3, '--format', 'json')
    assert status == 1
    records = [json.loads(line) for line in output.splitlines()]
    assert [Path(record['file']).name for record in records] == ['1.png', '2.png', '10.PNG']
    assert records[1] == {'file': str(folder / '2.png'), 'error': records[1]['error']}
    for record in (records[0], records[2]):
        assert list(record) == ['file', 'candidates']
        assert [list(c) for c in record['candidates']] == [['character', 'code_point', 'gb_code', 'probability']] * 3
        probabilities = [candidate['probability'] for candidate in record['candidates']]
        assert probabilities == sorted(probabilities, reverse=True)
        assert {c['character']: c['gb_code'] for c in record['candidates']}.items() <= {
            '一': 'D2BB',
            '二': 'B6FE',
            '三': 'C8FD',
            '人': 'C8CB',
            '口': 'BFDA',
        }.items()
    assert '1 of 3 could not be read:' in errors
    assert '2.png' in errors


@pytest.mark.skipif(sys.platform != 'linux', reason='other systems have no such names')
@pytest.mark.parametrize('format', ['text', 'json', 'csv'])
def test_names_that_are_no_text_are_answered_for(folder, run, tmp_path, format):
    odd = os.fsdecode(os.fsencode(folder) + b'/\xff\n\x1b[31m.png')
    os.rename(folder / '1.png', odd)
    status, output, errors = run(odd, folder / '10.PNG', '-n', 1, '--format', format, '--plot', tmp_path / 'figures')
    assert status == 0, errors
    if format == 'json':
        assert [json.loads(line)['file'] for line in output.splitlines()] == [odd, str(folder / '10.PNG')]
    elif format == 'csv':
        assert len(list(csv.reader(io.StringIO(output)))) == 3
    else:
        assert '\x1b' not in output
    assert len(os.listdir(tmp_path / 'figures')) == 3


def test_csv_has_a_row_for_each_candidate(folder, run):
    status, output, _ = run(folder / '1.png', folder / '10.PNG', '-n', 2, '--format', 'csv')
    assert status == 0
    rows = list(csv.reader(io.StringIO(output)))
    assert rows[0] == ['file', 'rank', 'character', 'code_point', 'gb_code', 'probability']
    assert [row[:2] for row in rows[1:]] == [
        [str(folder / name), rank] for name in ('1.png', '10.PNG') for rank in ('1', '2')
    ]
    assert rows[1][3] == f'U+{ord(rows[1][2]):04X}'


def test_what_is_missing_is_named_and_the_rest_answered(folder, run, tmp_path):
    (tmp_path / 'empty').mkdir()
    status, output, errors = run(tmp_path / 'none.png', tmp_path / 'empty', folder / '1.png', '-n', 1)
    assert status == 1
    assert output.count('Dear User') == 1
    assert 'none.png: no such file' in errors
    assert 'empty: no images in this folder' in errors
    assert '2 of 3 could not be read:' in errors
    status, output, errors = run('')
    assert (status, output) == (1, '')
    assert 'an empty name' in errors


def test_a_network_of_few_characters_gives_them_all(folder, run):
    status, output, _ = run(folder / '1.png', '-n', 50)
    assert status == 0
    assert output.count('Dear User') == len(SMALL_LABELS)


def test_each_image_is_answered_once(folder, run):
    status, output, _ = run(folder / '1.png', folder / '1.png', folder / '1*.png', '-n', 1)
    assert status == 0
    assert output.count('Dear User') == 1


def test_figures_are_saved(folder, run, tmp_path):
    figures = tmp_path / 'new' / 'figures'
    status, _, errors = run(folder, '--plot', figures)
    assert status == 1
    assert sorted(path.name for path in figures.iterdir()) == ['1.png', '10.png', 'overview.png']
    assert Image.open(figures / '1.png').size == (800, 400)
    assert f'Figures saved in {figures}' in errors


@pytest.mark.parametrize('plot', ['show', 'figures'])
def test_figures_need_matplotlib(folder, run, monkeypatch, plot):
    monkeypatch.setattr(main, 'can_draw', lambda: False)
    status, output, errors = run(folder / '1.png', '--plot', plot)
    assert status == 1
    assert output == ''
    assert len(errors.splitlines()) == 1
    assert 'pip install matplotlib' in errors
    assert run(folder / '1.png', '--plot', 'off')[0] == 0


def test_figures_cannot_be_shown_without_a_display(folder, run, monkeypatch):
    monkeypatch.setattr(main, 'has_display', lambda: False)
    status, output, errors = run(folder, '--plot', 'show')
    assert status == 1
    assert output == ''
    assert '--plot FOLDER' in errors


def test_figures_replace_those_of_an_earlier_run_and_nothing_else(folder, run, tmp_path):
    figures = tmp_path / 'figures'
    figures.mkdir()
    (figures / '1.png').write_bytes((folder / '1.png').read_bytes())  # a picture of the user's
    (figures / 'overview.png').write_bytes(b'notes')
    for _ in range(2):
        run(folder, '--plot', figures)
        assert sorted(path.name for path in figures.iterdir()) == [
            '1-2.png', '1.png', '10.png', 'overview-2.png', 'overview.png'
        ]  # fmt: skip
        assert (figures / '1.png').read_bytes() == (folder / '1.png').read_bytes()
        assert (figures / 'overview.png').read_bytes() == b'notes'


def test_figures_of_an_earlier_run_are_not_read(folder, run):
    for _ in range(2):
        _, output, errors = run(folder, '--plot', folder / 'figures', '-n', 1)
        assert output.count('Dear User') == 2
        assert sorted(os.listdir(folder / 'figures')) == ['1.png', '10.png', 'overview.png']
    assert '3 figures of earlier runs' in errors


def test_figures_of_a_dialogue_replace_none_of_its_own(folder, run, small_file, tmp_path):
    other = tmp_path / 'other'
    other.mkdir()
    Image.fromarray(draw_character()).save(other / '1.png')
    plotter = main.Plotter(str(tmp_path / 'figures'))
    for source in (folder / '1.png', other / '1.png'):
        main.answer(HCCR(small_file), plotter.begin([source]), 1, 'text', plotter)
    assert sorted(os.listdir(tmp_path / 'figures')) == ['1-2.png', '1.png']


def test_names_that_are_too_long_for_a_figure_are_cut(folder, run, tmp_path):
    (folder / '1.png').rename(folder / ('鲍' * 84))
    status, _, errors = run(folder / ('鲍' * 84), '--plot', tmp_path / 'figures')
    assert status == 0, errors
    assert len(os.listdir(tmp_path / 'figures')) == 1


@pytest.mark.parametrize('sources', [['.'], ['1.png'], ['../scans/10.PNG']])
def test_figures_do_not_lie_among_the_images(folder, run, monkeypatch, sources):
    monkeypatch.chdir(folder)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    status, output, errors = run(*sources, '--plot', folder)
    assert status == 1
    assert output == ''
    assert 'a folder of their own' in errors
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_figures_need_a_folder(folder, run, tmp_path):
    (tmp_path / 'file').write_bytes(b'')
    status, _, errors = run(folder, '--plot', tmp_path / 'file')
    assert status == 1
    assert 'this is a file' in errors


def test_figures_cannot_be_shown_without_a_toolkit_for_windows(folder, run, small_file, monkeypatch, capsys):
    import figures

    monkeypatch.setattr(main, 'has_display', lambda: True)
    monkeypatch.setattr(figures, 'can_show', lambda: False)
    status, output, errors = run(folder, '--plot', 'show')
    assert status == 1
    assert output == ''
    assert '--plot FOLDER' in errors
    plotter = main.Plotter('show')  # as in the dialogue, where nobody asked for windows
    main.answer(HCCR(small_file), plotter.begin([folder / '1.png']), 1, 'text', plotter)
    assert '--plot FOLDER' in capsys.readouterr().err


def test_figures_are_shown_and_never_too_many(folder, small_file, monkeypatch, capsys):
    import figures

    shown = []
    monkeypatch.setattr(figures, 'can_show', lambda: True)
    monkeypatch.setattr(figures, 'show', lambda windows: shown.append(list(windows)))
    monkeypatch.setattr(figures, 'OVERVIEW_SIZE', 2)
    monkeypatch.setattr(main, 'MAX_WINDOWS', 1)
    recogniser, plotter = HCCR(small_file), main.Plotter('show')
    paths = plotter.begin([folder / '1.png', folder / '2.png', folder / '10.PNG'])
    main.answer(recogniser, paths, 1, 'text', plotter)
    ((page, figure),) = shown
    assert len(page.axes) >= 2
    assert len(figure.axes) == 2
    assert '2 more figures are not shown' in capsys.readouterr().err


def test_files_of_one_name_get_figures_of_their_own(folder, run, tmp_path):
    other = tmp_path / 'other'
    other.mkdir()
    for name in ('1.png', 'overview.png'):
        Image.fromarray(draw_character()).save(other / name)
    run(folder / '1.png', other, '--plot', tmp_path / 'figures')
    assert sorted(path.name for path in (tmp_path / 'figures').iterdir()) == [
        '1-2.png', '1.png', 'overview-2.png', 'overview.png'
    ]  # fmt: skip


def test_pages_of_the_overview_take_no_name_of_an_image(tmp_path, monkeypatch):
    import figures

    saved = []
    monkeypatch.setattr(figures, 'OVERVIEW_SIZE', 1)
    monkeypatch.setattr(figures, 'overview_figure', lambda entries: 'page')
    monkeypatch.setattr(figures, 'answer_figure', lambda *parts: 'answer')
    monkeypatch.setattr(figures, 'save', lambda figure, path: saved.append((figure, path.name)))
    plotter = main.Plotter(str(tmp_path))
    plotter.begin([Path('overview.png'), Path('a.png')])
    for stem in ('overview', 'a'):
        plotter.add(Reading(Path(f'{stem}.png'), (Candidate('一', 0.9),), image=np.zeros((9, 9, 3), np.uint8)))
    assert saved == [
        ('page', 'overview.png'),
        ('answer', 'overview-2.png'),
        ('page', 'overview-3.png'),
        ('answer', 'a.png'),
    ]


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['a.png', '-n', '0'], '1 to 3755'),
        (['a.png', '-n', 'five'], '1 to 3755'),
        (['a.png', '--format', 'xml'], 'invalid choice'),
        (['--format', 'json'], 'need an image'),
    ],
)
def test_wrong_usage(arguments, message, capsys):
    with pytest.raises(SystemExit) as leaving:
        main.main(arguments)
    assert leaving.value.code == 2
    assert message in capsys.readouterr().err


def test_either_kind_of_model_answers_alike(folder, small_file, small_tflite, capsys):
    answers = []
    for model in (small_file, small_tflite):
        arguments = [str(folder / '1.png'), '--format', 'json', '--model', str(model), '--precision', 'float32']
        assert main.main(arguments) == 0
        answers.append(json.loads(capsys.readouterr().out)['candidates'])
    assert [c['character'] for c in answers[0]] == [c['character'] for c in answers[1]]


@pytest.mark.parametrize('name', ['model.h5', 'model.tflite'])
@pytest.mark.parametrize('content', [None, b'', b'text'])
def test_a_bad_model_is_one_line_and_status_1(tmp_path, folder, name, content, capsys):
    model = tmp_path / name
    if content is not None:
        model.write_bytes(content)
    assert main.main([str(folder / '1.png'), '--model', str(model)]) == 1
    output, errors = capsys.readouterr()
    assert output == ''
    assert len(errors.splitlines()) == 1
    assert str(model) in errors


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as leaving:
        main.main(['--help'])
    assert leaving.value.code == 0
    output = capsys.readouterr().out
    for word in ('dialogue', '--format', '--plot', '--model', 'exit status', 'TIFF'):
        assert word in output


def test_a_doubtful_answer_says_so():
    lines = list(main.text_lines(Reading(Path('a.png'), (Candidate('一', 0.4), Candidate('二', 0.3))), with_name=False))
    assert any('not sure' in line for line in lines)
    lines = list(main.text_lines(Reading(Path('a.png'), (Candidate('一', 0.6),)), with_name=False))
    assert not any('not sure' in line for line in lines)


def test_file_names_cannot_steer_the_terminal():
    (name, *_) = main.text_lines(Reading(Path('a\x1b[2J\nb.png'), error='x'), with_name=True)
    assert name == 'a\\x1b[2J\\nb.png'


def test_another_process_with_a_bare_environment(small_file, folder):
    """Without UTF-8 and without a home folder, answers are still clean."""
    environment = {'PATH': os.environ['PATH'], 'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0'}
    command = [sys.executable, ROOT / 'main.py', folder / '1.png', '-n', '1', '--model', small_file]
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert done.returncode == 0
    assert done.stdout.decode('ascii').startswith('Dear User')
    assert done.stderr == b''

    done = subprocess.run([*command, '--format', 'json'], capture_output=True, env=environment, check=False)
    assert json.loads(done.stdout.decode('utf-8'))['candidates'][0]['character'] in SMALL_LABELS


def test_whoever_has_read_enough_may_close_the_pipe(small_file, folder):
    for number in range(200):
        Image.fromarray(draw_character()).save(folder / f'{number}-x.png')
    command = [sys.executable, ROOT / 'main.py', folder, '-n', '1', '--format', 'json', '--model', small_file]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline().startswith(b'{')
    process.stdout.close()
    assert process.stderr.read() == b''
    assert process.wait(timeout=60) == 0


# --- What the repository ships


def test_every_sample_image_is_read_right(capsys):
    status = main.main([str(ROOT / 'images'), '-n', '1', '--format', 'json'])
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert status == 0
    assert len(records) >= 14
    answers = {Path(record['file']).stem: record['candidates'][0]['character'] for record in records}
    assert '鲍' in answers
    assert answers == {name: name for name in answers}
