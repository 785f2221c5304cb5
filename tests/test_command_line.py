import argparse
import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import command_line
from command_line import make_folder, message, quiet_libraries, whole_number

ROOT = Path(command_line.__file__).parent


@pytest.mark.parametrize(
    ('error', 'line'),
    [
        (ValueError('no ink on 鲍.png'), 'no ink on 鲍.png'),
        (ValueError('x\x1b[31m\n.h5: no such file'), r'x\x1b[31m\n.h5: no such file'),
        (OSError(errno.ENOSPC, 'No space left on device', 'a\n.csv'), r'a\n.csv: No space left on device'),
        (OSError('a.csv: there is no room for it'), 'a.csv: there is no room for it'),
        (ModuleNotFoundError("No module named 'cv2'", name='cv2'), 'pip install -r requirements-train.txt'),
        (
            ModuleNotFoundError('…', name='matplotlib.figure'),
            'matplotlib is not installed: pip install -r requirements',
        ),
        (ModuleNotFoundError('…', name='jax'), 'jax is not installed: pip install jax'),
    ],
)
def test_messages_are_one_line_that_says_what_to_do(error, line):
    assert line in message(error)
    assert message(error).isprintable()


def test_the_requirements_files_hold_what_they_are_named_for():
    distributions = {'PIL': 'pillow', 'cv2': 'opencv-python-headless', 'ai_edge_litert': 'ai-edge-litert'}
    for package, name in command_line.REQUIREMENTS.items():
        wanted = distributions.get(package, package)
        assert re.search(f'^{wanted}[>=]', (ROOT / name).read_text('utf-8'), re.MULTILINE), package


@pytest.mark.parametrize('text', ['0', '-5', '1.5', 'x', '', '²', '٣', '11', '9' * 5000])
def test_what_is_no_whole_number_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match='from 1 to 10 is expected'):
        whole_number(text, most=10)


def test_whole_numbers():
    assert [whole_number(text) for text in ('1', '007', '1000000000')] == [1, 7, 10**9]


@pytest.mark.parametrize('descriptors', [(), (1, 2)])
def test_only_what_libraries_write_meanwhile_is_kept_off_the_terminal(capfd, descriptors):
    open_before = os.listdir('/dev/fd') if os.path.isdir('/dev/fd') else None

    def start():
        os.write(2, b'a library starts')
        raise ValueError('theirs')

    with pytest.raises(ValueError, match='theirs'), quiet_libraries(*descriptors):
        start()
    os.write(2, b'after\n')
    assert capfd.readouterr().err == 'after\n'
    if open_before is not None:
        assert len(os.listdir('/dev/fd')) == len(open_before)


def test_without_a_terminal_nothing_is_missed():
    code = 'import os, command_line; os.close(2)\nwith command_line.quiet_libraries(): print("fine")'
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == 'fine'


def test_import_needs_the_standard_library_alone():
    code = 'import sys, command_line; print([m for m in ("numpy", "PIL", "keras") if m in sys.modules])'
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == '[]'


def test_a_folder_is_made_and_a_file_is_not_taken_for_one(tmp_path):
    for _ in range(2):
        make_folder(tmp_path / 'a' / 'b', '--out')
    assert (tmp_path / 'a' / 'b').is_dir()
    (tmp_path / 'file').write_text('kept')
    for path in (tmp_path / 'file', tmp_path / 'file' / 'b'):
        with pytest.raises(NotADirectoryError, match='--out takes a folder'):
            make_folder(path, '--out')
    assert (tmp_path / 'file').read_text() == 'kept'
