"""What is not the program's fault and must not become it: full and read-only disks, files cut short, killed runs."""

import contextlib
import csv
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL_LABELS, draw_character
from PIL import Image

from data_utils import LABELS, writing, written_aside
from gnt_reader import GntError, GntReader, index_gnt, read_gnt, write_gnt

ROOT = Path(__file__).parents[1]

# --- No room, no permission ------------------------------------------------------------------------------------------

# What the program leaves on a disk: a file, and how it is written to a folder.
NOISE = np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)


def save_state(folder):
    from run_folder import RunFolder

    RunFolder(folder).save_state([NOISE.astype(np.float32)], {'step': 1})


def draw_curves(folder):
    from run_folder import RunFolder

    RunFolder(folder).draw_curves()


def log(folder):
    from run_folder import RunFolder

    # Many rows: a small one may find room in a block that the file has already.
    for step in range(2000):
        RunFolder(folder).log({'step': step, 'samples': step, 'loss': 'x' * 100, 'seconds': step})


def save_model(folder):
    import melnyk_net

    groups, melnyk_net.FILTER_GROUPS = melnyk_net.FILTER_GROUPS, ((2,),)
    try:
        model = melnyk_net.melnyk_net((96, 96, 1), num_classes=5)
        melnyk_net.save_model(model, folder / 'best.h5', SMALL_LABELS)
    finally:
        melnyk_net.FILTER_GROUPS = groups


def export_gnt(folder):
    import gnt_reader

    gnt_reader._write_png(folder / '1001-c_0.png', NOISE[..., 0])


def save_gnt(folder):
    write_gnt(folder / '1001-c.gnt', [('啊', NOISE[..., 0])])


def save_figure(folder):
    import figures

    image = NOISE[:96, :96]
    figures.save(figures.answer_figure(image, image[..., 0], image[..., 0] / 255, 'A'), folder / '鲍.png')


WRITERS = {
    'state.npz': save_state,
    'curves.png': draw_curves,
    'log.csv': log,
    'best.h5': save_model,
    '1001-c_0.png': export_gnt,
    '1001-c.gnt': save_gnt,
    '鲍.png': save_figure,
}


def attempt(folder: Path) -> dict[str, tuple[str, bool]]:
    """Let each write where it cannot: what it says, and whether the old file stands."""
    results = {}
    for name, write in WRITERS.items():
        try:
            write(folder)
            said = 'written'
        except OSError as error:
            said = str(error)
        results[name] = said, (folder / name).read_bytes().startswith(b'old')
    return results


def put_old_files(folder: Path) -> None:
    for name in WRITERS:
        (folder / name).write_bytes(b'old')


def check(results: dict, folder: Path, advice: str) -> None:
    for name, (said, stands) in results.items():
        assert said.startswith(f'{folder / name}: '), (name, said)
        assert advice in said
        assert '\n' not in said
        assert stands, name


@contextlib.contextmanager
def files_at_most(size: int):
    """As on a disk that is full: no file of this process can be larger."""
    resource = pytest.importorskip('resource')
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_where_files_cannot_grow_the_old_ones_stand(tmp_path):
    put_old_files(tmp_path)
    with files_at_most(500):
        results = attempt(tmp_path)
    check(results, tmp_path, 'free some space')
    assert {path.name for path in tmp_path.iterdir()} == set(WRITERS)


NAMESPACE = ['unshare', '--map-root-user', '--mount']


def can_mount() -> bool:
    if not shutil.which('unshare'):
        return False
    return subprocess.run([*NAMESPACE, 'mount', '-t', 'tmpfs', 'x', '/mnt'], capture_output=True).returncode == 0


@pytest.mark.skipif(not can_mount(), reason='needs a namespace to mount a small disk in')
def test_on_a_real_disk_that_takes_nothing_the_old_files_stand(tmp_path):
    script = (
        f'mount -t tmpfs -o size=200k tmpfs {tmp_path} && exec "$0" -c "import test_faults as t; t.on_a_small_disk()"'
    )
    done = subprocess.run(
        [*NAMESPACE, 'sh', '-c', script, sys.executable],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT / 'tests',
        env={**os.environ, 'PYTHONPATH': str(ROOT), 'DISK': str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr  # HDF5 would end it with a segmentation fault
    full, read_only, left = json.loads(done.stdout.splitlines()[-1])
    check(full, tmp_path, 'free some space')
    check(read_only, tmp_path, 'write to another folder')
    assert set(left) == set(WRITERS) | {'filler'}


def on_a_small_disk() -> None:
    folder = Path(os.environ['DISK'])
    put_old_files(folder)
    with contextlib.suppress(OSError), (folder / 'filler').open('wb', buffering=0) as file:
        while True:
            file.write(bytes(4096))
    full = attempt(folder)
    subprocess.run(['mount', '-o', 'remount,ro', folder], check=True)
    print(json.dumps((full, attempt(folder), os.listdir(folder))))


@pytest.mark.parametrize(
    ('number', 'advice'),
    [(errno.ENOSPC, 'free some space'), (errno.EROFS, 'another folder'), (errno.EACCES, 'another folder')],
)
def test_errors_of_other_libraries_are_put_into_words(number, advice):
    with pytest.raises(OSError, match=advice) as caught, writing('a.png'):
        raise OSError(number, "Can't write data (errno =\n28, buf = 0x7fb3)")
    assert caught.value.errno == number
    with pytest.raises(OSError, match='something else'), writing('a.png'):
        raise OSError(errno.EIO, 'something else')


def test_a_folder_that_is_missing_is_named(tmp_path):
    with pytest.raises(OSError, match='no such folder'), written_aside(tmp_path / 'missing' / 'a.txt') as path:
        path.write_text('')


@pytest.mark.skipif(not Path('/dev/full').exists(), reason='needs the device that is always full')
@pytest.mark.parametrize('command', [['main.py', '--format', 'json'], ['gnt_reader.py', 'info']])
def test_answers_that_cannot_be_written_are_one_line(command, tmp_path, small_file):
    Image.fromarray(draw_character()).save(tmp_path / 'a.png')
    write_gnt(tmp_path / 'a.gnt', [('啊', draw_character(20))])
    program, *options = command
    source = [tmp_path / 'a.png', '--model', small_file] if program == 'main.py' else [tmp_path / 'a.gnt']
    with open('/dev/full', 'w') as full:
        done = subprocess.run(
            [sys.executable, ROOT / program, *options, *source],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert 'space' in done.stderr


# --- Files that change while they are read ---------------------------------------------------------------------------


def test_a_gnt_file_that_is_cut_while_it_is_read(tmp_path):
    path = tmp_path / '1001-c.gnt'
    pages = [('啊', np.full((400, 400), 200, np.uint8))] * 20  # three times what is read at once
    write_gnt(path, pages)
    index = index_gnt(path)
    errors = []
    records = read_gnt(path, strict=False, on_error=errors.append)
    next(records)
    os.truncate(path, 2_000_000)
    assert 5 < 1 + len(list(records)) < 20
    (error,) = errors
    assert '1001-c.gnt' in str(error)
    assert 'cut short' in str(error)
    with GntReader(index) as reader, pytest.raises(GntError, match='not what it was'):
        list(reader)


def test_a_model_file_that_is_cut_while_it_is_read(tmp_path, small_file):
    import model_file

    path = tmp_path / 'a.h5'
    path.write_bytes(small_file.read_bytes())

    def read():
        with model_file.opened(path) as file:
            os.truncate(path, 300_000)
            for number in range(1, 15):
                width = (1, 64, 64, 96, 64, 96, 128, 96, 128, 256, 192, 256, 448, 256, 448)
                file.weight(f'conv2d_{number}', 'kernel', (3, 3, width[number - 1], width[number]))

    with pytest.raises(model_file.ModelFileError, match='damaged'):
        read()


# --- Folders with bad files ------------------------------------------------------------------------------------------


def make_folder(folder: Path, count: int, bad: int) -> set[str]:
    """Write images of which some cannot be read, for as many reasons as there are; return the names of those."""
    good = draw_character(60)
    whole = folder / 'whole.png'
    Image.fromarray(good).save(whole)
    content = whole.read_bytes()
    whole.unlink()
    blank = folder / 'blank.png'
    Image.new('L', (60, 60), 'white').save(blank)
    empty = blank.read_bytes()
    blank.unlink()
    wrong = [b'', b'no image', content[: len(content) // 2], content[:16] + b'\x7f\xff' + content[18:], empty]
    every = count // bad
    names = set()
    for number in range(count):
        path = folder / f'{number}.png'
        path.write_bytes(wrong[number // every % len(wrong)] if number % every == every // 2 else content)
        if number % every == every // 2:
            names.add(path.name)
    return names


def test_a_folder_with_bad_files_is_answered_for_the_others(tmp_path, monkeypatch, capsys):
    import main
    import melnyk_net

    monkeypatch.setattr(melnyk_net, 'FILTER_GROUPS', ((2,),))
    model = tmp_path / 'tiny.h5'
    melnyk_net.save_model(melnyk_net.melnyk_net((96, 96, 1), num_classes=5), model, SMALL_LABELS)
    folder = tmp_path / 'scans'
    folder.mkdir()
    bad = make_folder(folder, 300, 30)
    assert main.main([str(folder), '-n', '1', '--format', 'csv', '--model', str(model)]) == main.EXIT_ERROR
    output, errors = capsys.readouterr()
    answered = [Path(row[0]).name for row in csv.reader(output.splitlines()[1:])]
    assert answered == [f'{n}.png' for n in range(300) if f'{n}.png' not in bad]
    assert '30 of 300 could not be read:' in errors
    named = {Path(line.strip().split(':')[0]).name for line in errors.splitlines() if line.startswith('  ')}
    assert named == bad


# --- Poor environments -----------------------------------------------------------------------------------------------


def test_warnings_are_errors_and_there_is_no_home_no_display_and_no_utf8(tmp_path, small_file):
    """Figures of a folder with a bad file, in the poorest terminal; only the libraries may warn."""
    Image.fromarray(draw_character()).save(tmp_path / 'é 鲍.png')
    (tmp_path / 'bad.png').write_bytes(b'')
    environment = {
        **{
            name: value for name, value in os.environ.items() if name in ('PATH', 'SYSTEMROOT', 'TEMP', 'KERAS_BACKEND')
        },
        **dict.fromkeys(('HOME', 'USERPROFILE', 'MPLCONFIGDIR', 'XDG_CACHE_HOME', 'XDG_CONFIG_HOME'), os.devnull),
        **dict.fromkeys(('LANG', 'LC_ALL'), 'C'),
        'PYTHONUTF8': '0',
        'PYTHONCOERCECLOCALE': '0',
        'PYTHONIOENCODING': 'ascii',
    }
    ours = [option for path in ROOT.glob('*.py') for option in ('-W', f'error:::{path.stem}')]
    arguments = [tmp_path, '-n', '2', '--plot', tmp_path / 'figures', '--model', small_file]
    done = subprocess.run(
        [sys.executable, *ours, ROOT / 'main.py', *arguments], env=environment, capture_output=True, check=False
    )
    errors = done.stderr.decode('ascii')
    assert done.returncode == 1, errors
    assert 'Traceback' not in errors
    assert '1 of 2 could not be read:' in errors
    assert 'Dear User' in done.stdout.decode('ascii')
    assert {path.name for path in (tmp_path / 'figures').iterdir()} == {'é 鲍.png', 'overview.png'}


# --- A run that is killed --------------------------------------------------------------------------------------------

TRAIN = """if True:
    import sys, melnyk_net
    melnyk_net.FILTER_GROUPS = ((4,), (6,), (8,), (8,), (16,))
    import train
    sys.exit(train.main(sys.argv[1:]))
"""


def start_training(*arguments) -> subprocess.Popen:
    command = [sys.executable, '-c', TRAIN, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> None:
    errors = process.communicate()[1]
    assert process.returncode == 0, errors


def curve(folder: Path) -> list[list[float]]:
    with (folder / 'log.csv').open() as file:
        rows = [
            {k: v for k, v in row.items() if k not in ('seconds', 'images_per_second')} for row in csv.DictReader(file)
        ]
    return [[float(value or 0) for value in row.values()] for row in rows]


def changed(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


@pytest.mark.skipif(not hasattr(signal, 'SIGKILL'), reason='processes end otherwise there')
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_curve(tmp_path, request):
    """Twice here; twenty times by `pytest tests/test_faults.py -k killed --kills 20`, in a quarter of an hour."""
    kills = request.config.getoption('--kills')
    rng = np.random.default_rng(0)
    pages = [draw_character(48), np.full((48, 48), 255, np.uint8)]
    pages[1][20:28] = 0
    for writer in range(3):
        records = [
            (LABELS[k], np.maximum(pages[k], rng.integers(0, 40, (48, 48))).astype(np.uint8)) for k in [0, 1] * 8
        ]
        write_gnt(tmp_path / f'{1001 + writer}-c.gnt', records)
    arguments = ['--gnt', tmp_path, '--val-writers', 1, '--epochs', 4 + 2 * kills, '--learning-rate', 0.02]
    arguments += ['--save-minutes', 0, '--size', 48, '--precision', 'float32', '--workers', 1, '--batch-size', 16]
    arguments += ['--log-every', 1]
    whole = start_training(*arguments, '--out', tmp_path / 'whole')

    parts = tmp_path / 'parts'
    lot = random.Random(0)
    for _ in range(kills):
        process = start_training(
            *(['--resume', parts] if (parts / 'config.json').exists() else [*arguments, '--out', parts])
        )
        before = changed(parts / 'state.npz')
        while process.poll() is None and changed(parts / 'state.npz') == before:
            time.sleep(0.01)
        # In the middle of whatever it does now: a step, a validation, the writing of a file.
        time.sleep(lot.uniform(0, 0.5))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, 'the run ended before it was killed'
    finish(start_training('--resume', parts))
    finish(whole)
    assert np.allclose(curve(parts), curve(tmp_path / 'whole'), rtol=2e-3, atol=2e-4)
    assert {path.name for path in parts.iterdir()} == {path.name for path in (tmp_path / 'whole').iterdir()}
