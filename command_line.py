"""What the command lines of the programs share. Importing it costs nothing: it needs the standard library alone."""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

# Package, as it is imported → the file by which it is installed.
REQUIREMENTS = {
    **dict.fromkeys(('h5py', 'keras', 'matplotlib', 'numpy', 'PIL', 'tensorflow'), 'requirements.txt'),
    **dict.fromkeys(('onnx', 'onnxruntime', 'tf2onnx'), 'requirements-export.txt'),
    'ai_edge_litert': 'requirements-light.txt',
    'cv2': 'requirements-train.txt',
}


def message(error: BaseException) -> str:
    """Return in one line, for the terminal, what is wrong.

    Args:
        error: What was raised. Of an `OSError` of the system the file and the reason are told, of a
            `ModuleNotFoundError` what to install.
    """
    from data_utils import printable

    text = str(error)
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition('.')[0]
        wanted = f'-r {REQUIREMENTS[package]}' if package in REQUIREMENTS else package
        text = f'{package} is not installed: pip install {wanted}'
    elif isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f'{error.filename}: {error.strerror}'
    return printable(text)


def whole_number(text: str, most: int = 10**9) -> int:
    """Return the number, 1 to `most`, that an option of the command line says; for `argparse`."""
    number = int(text) if text.isascii() and text.isdecimal() and len(text) <= 10 else 0
    if not 1 <= number <= most:
        raise argparse.ArgumentTypeError(f'a whole number from 1 to {most:,} is expected, received {text!r}')
    return number


def make_folder(folder: Path, option: str) -> None:
    """Make the folder that an option of the command line names, with those above it, unless it is there.

    Raises:
        NotADirectoryError: If it is a file, or lies in one; the text names the option.
        OSError: If it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise NotADirectoryError(f'{folder}: this is a file, or lies in one; {option} takes a folder') from error


@contextlib.contextmanager
def quiet_libraries(*descriptors: int) -> Iterator[None]:
    """Keep what compiled libraries write straight to a file descriptor off the terminal, while they start.

    TensorFlow tells of every processor extension and of every GPU that is not there, whatever its log level. What goes
    wrong is an exception, and said after that.

    Args:
        descriptors: What is silenced. Defaults to 2, where the messages of this process go as well meanwhile.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    with contextlib.ExitStack() as stack:
        nowhere = stack.enter_context(open(os.devnull, 'wb'))
        for descriptor in descriptors or (2,):
            with contextlib.suppress(OSError):  # no such descriptor, as under pythonw
                copy = os.dup(descriptor)
                stack.callback(os.close, copy)
                stack.callback(os.dup2, copy, descriptor)
                os.dup2(nowhere.fileno(), descriptor)
        yield
