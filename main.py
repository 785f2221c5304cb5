"""Offline handwritten Chinese character recogniser: the dialogue and the command line.

python main.py                                   # asks where the images are, and answers
python main.py images more/鲍.png -n 5           # answers at once
python main.py scans --format json > answers.jsonl
python main.py scans --format csv --plot figures > answers.csv
"""

import argparse
import contextlib
import csv
import importlib.util
import json
import os
import shlex
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from command_line import make_folder, message, quiet_libraries

# Nothing heavy up here: TensorFlow takes seconds to import, and loads while the user answers.

BANNER = """\
---------- Offline Handwritten Chinese Character Recognizer ----------
Based on the convolutional neural network called Melnyk-Net.
Recognizes 3755 Chinese character classes from GB2312-80 level-1.
Copyright © 2018 Pavlo O. Melnyk
"""
FAREWELL = 'Thanks for using Melnyk-Net Offline HCCR software!'

CLASSES = 3755
DEFAULT_SOURCE = 'images'
DEFAULT_CANDIDATES = 5
# More windows than this at once help nobody; --plot FOLDER saves every figure.
MAX_WINDOWS = 10
# Bytes of a figure's name that come from its image's; file systems allow 255 with a number and a suffix.
MAX_STEM = 200

NO_WINDOWS = (
    'matplotlib finds no way to open a window (on Debian, apt install python3-tk helps); --plot FOLDER saves figures'
)
NO_MATPLOTLIB = 'figures are drawn by matplotlib, which is not installed: pip install matplotlib'

EXIT_OK, EXIT_ERROR, EXIT_INTERRUPTED = 0, 1, 130

DESCRIPTION = """\
Read handwritten Chinese characters, one in each image.

Without arguments the program asks what it needs to know. With images, folders
or patterns it answers at once:

  python main.py                            the dialogue
  python main.py 鲍.png                     the five likeliest characters
  python main.py scans -n 1 --format csv    a table of a whole folder
  python main.py scans --plot figures       and a figure of every answer
"""
EPILOG = """\
An image shows one character: dark on light or light on dark paper, scanned,
drawn or photographed. PNG, JPEG, BMP, GIF, TIFF, WebP and PNM files are read.
Answers go to stdout in the order of the files, everything else to stderr.

exit status: 0 fine, 1 something could not be read, 2 wrong usage, 130 Ctrl-C
"""


# --- Prompts ---------------------------------------------------------------------------------------------------------


class AnswerError(ValueError):
    """An answer that cannot be used. Its text says what is wrong."""


def ask(question: str, parse: Callable, default: str, read: Callable[[], str] = input):
    """Ask until the answer can be used.

    Args:
        question: Printed before the answer is read.
        parse: Turns the answer into a value, or raises an exception whose text explains.
        default: What Enter alone stands for.
        read: Returns an answer without its line end. Defaults to `input`.

    Returns:
        The value.

    Raises:
        EOFError, KeyboardInterrupt: If the user leaves.
    """
    while True:
        # Not by `input`, which writes to file descriptor 2 on a terminal: see `quiet_start`.
        print(question, end='', flush=True)
        answer = read().strip()
        try:
            return parse(answer or default)
        except AnswerError as error:
            print(error)
        except (OSError, ValueError) as error:
            print(f'Ooops... An exception occured:\n{error}')
        print('Try again')


def parse_yes(answer: str) -> bool:
    """Return whether an answer to `[Y/n]` is yes; everything but a no is."""
    return not answer.casefold().startswith('n')


def parse_count(answer: str, largest: int = CLASSES) -> int:
    """Return a number of candidates, 1 to `largest`."""
    try:
        count = int(answer)
    except ValueError:
        count = 0
    if not 1 <= count <= largest:
        raise ValueError(f'a whole number from 1 to {largest} is needed, received {answer!r}')
    return count


def parse_source(answer: str) -> tuple[bool, list[Path]]:
    """Return whether an answer names a folder, and the images there.

    Quotes and backslashes around what was pasted or dragged into the terminal are taken off.
    """
    from data_utils import find_images

    readings = [answer]
    if len(answer) > 1 and answer[0] == answer[-1] and answer[0] in '\'"':
        readings.append(answer[1:-1])
    if '\\' in answer and os.sep != '\\':
        with contextlib.suppress(ValueError):  # an unbalanced quote may be part of the name
            readings.append(' '.join(shlex.split(answer)))
    for reading in readings:
        try:
            paths = find_images([reading])
        except FileNotFoundError:
            continue
        if paths:
            return os.path.isdir(os.path.expanduser(reading)), paths
    raise AnswerError('Ooops... Image(s) not found :(')


# --- Answers ---------------------------------------------------------------------------------------------------------


def text_lines(reading, with_name: bool) -> Iterator[str]:
    """Yield the original's lines for one image, its name first where there are several."""
    from data_utils import printable
    from hccr import response_line

    if with_name:
        yield printable(reading.path)
    if reading.error:
        yield f'Ooops... {reading.error}'
    for candidate in reading.candidates:
        yield response_line(candidate)
    if not reading.error and not reading.is_sure:
        yield 'I am not sure: it is likelier another character than my first answer.'
    yield ''


def as_record(reading) -> dict:
    """Return one image's answer as it is written to JSON."""
    if reading.error:
        return {'file': str(reading.path), 'error': reading.error}
    return {'file': str(reading.path), 'candidates': [_candidate_record(candidate) for candidate in reading.candidates]}


def _candidate_record(candidate) -> dict:
    from data_utils import code_point, gb_code

    try:
        code = f'{gb_code(candidate.character):04X}'
    except ValueError:  # a model of the user's own may know characters that GB2312-80 has not
        code = None
    return {
        'character': candidate.character,
        'code_point': code_point(candidate.character),
        'gb_code': code,
        'probability': round(candidate.probability, 6),
    }


class Writer:
    """Writes answers to stdout in one of the formats."""

    def __init__(self, format: str, with_names: bool):
        self._format, self._with_names = format, with_names
        if format != 'text':
            # For programs: always UTF-8, whatever the terminal speaks, and the names of files.
            _reconfigure(sys.stdout, encoding='utf-8', errors='backslashreplace')
        if format == 'csv':
            self._table = csv.writer(sys.stdout, lineterminator='\n')
            self._table.writerow(['file', 'rank', 'character', 'code_point', 'gb_code', 'probability'])

    def write(self, reading) -> None:
        """Write the answer for one image. CSV has no row for an error, which stderr names."""
        if self._format == 'json':
            print(json.dumps(as_record(reading), ensure_ascii=False))
        elif self._format == 'csv':
            for rank, candidate in enumerate(as_record(reading).get('candidates', ()), 1):
                self._table.writerow([reading.path, rank, *candidate.values()])
        else:
            for line in text_lines(reading, self._with_names):
                print(line)
        sys.stdout.flush()


class Progress:
    """A line on stderr that says how far a long run is, where answers do not show it themselves."""

    def __init__(self, total: int):
        self._total, self._done, self._start, self._shown = total, 0, time.monotonic(), 0.0
        self._on = total > 1 and sys.stderr.isatty() and not sys.stdout.isatty()

    def step(self) -> None:
        self._done += 1
        now = time.monotonic()
        if self._on and (now - self._shown > 0.2 or self._done == self._total):
            self._shown = now
            rate = self._done / max(now - self._start, 1e-9)
            left = time.strftime('%H:%M:%S', time.gmtime((self._total - self._done) / rate))
            line = f'\r{self._done:,} of {self._total:,} images, {rate:.0f}/s, {left} left '
            print(line, end='\n' if self._done == self._total else '', file=sys.stderr, flush=True)


class Plotter:
    """Draws the figures of a run: shows them at its end, or saves them as they come.

    Args:
        plot: `'show'`, `'off'` or a folder.
    """

    def __init__(self, plot: str):
        self._plot = plot
        self._names = set()  # of a whole dialogue: a later answer replaces no earlier one

    def begin(self, paths: list[Path]) -> list[Path]:
        """Make ready for the answers to these images; return them without figures of earlier runs.

        Raises:
            OSError, ValueError: If the figures cannot lie in the folder that was asked for.
        """
        self._figures, self._pages, self._entries, self._left_out = [], [], [], 0
        if self._plot not in ('show', 'off'):
            paths = other_pictures(Path(self._plot), paths)
        self._with_overview = len(paths) > 1
        if self._with_overview and self._plot not in ('show', 'off'):
            self._first_page = self._unused_name('overview')  # before an image of that name takes it
        return paths

    @property
    def wants_images(self) -> bool:
        return self._plot != 'off'

    def add(self, reading) -> None:
        if self._plot == 'off':
            return
        import figures

        if self._with_overview:
            self._entries.append(_overview_entry(reading))
            if len(self._entries) == figures.OVERVIEW_SIZE:
                self._finish_page()
        if reading.error:
            return
        if self._plot == 'show' and len(self._figures) == MAX_WINDOWS:
            self._left_out += 1
            return
        figure = figures.answer_figure(
            reading.image, reading.network_input, reading.activation_map, reading.candidates[0].character
        )
        if self._plot == 'show':
            self._figures.append(figure)
        else:
            figures.save(figure, Path(self._plot, f'{self._unused_name(reading.path.stem)}.png'))

    def close(self) -> None:
        if self._plot == 'off':
            return
        import figures
        from data_utils import printable

        if self._entries:
            self._finish_page()
        if self._plot != 'show':
            print(f'Figures saved in {printable(self._plot)}', file=sys.stderr)
        elif self._figures or self._pages:
            if not figures.can_show():
                print(f'No figures are shown: {NO_WINDOWS}', file=sys.stderr)
                return
            if self._left_out:
                print(f'{self._left_out:,} more figures are not shown; --plot FOLDER saves all.', file=sys.stderr)
            print('Close the figures to go on.', file=sys.stderr)
            figures.show(self._pages + self._figures)

    def _finish_page(self) -> None:
        import figures

        entries, self._entries = self._entries, []
        if self._plot == 'show':
            if len(self._pages) < MAX_WINDOWS:
                self._pages.append(figures.overview_figure(entries))
            else:
                self._left_out += 1
        else:
            name, self._first_page = self._first_page or self._unused_name('overview'), None
            figures.save(figures.overview_figure(entries), Path(self._plot, f'{name}.png'))

    def _unused_name(self, stem: str) -> str:
        """Return a name that nothing has but perhaps the figure of an earlier run."""
        import figures

        while len(os.fsencode(stem)) > MAX_STEM:
            stem = stem[:-1]
        name, number = stem, 1
        while _folded(name) in self._names or not figures.may_replace(Path(self._plot, f'{name}.png')):
            number += 1
            name = f'{stem}-{number}'
        self._names.add(_folded(name))
        return name


def _folded(name: str) -> str:
    """Return what is the same for names that some file systems take for one: A and a, é in one code or in two."""
    return unicodedata.normalize('NFC', name).casefold()


def other_pictures(folder: Path, paths: list[Path]) -> list[Path]:
    """Make the folder of the figures; return the images without the figures of earlier runs that lie there.

    Raises:
        OSError: If it cannot be made.
        ValueError: If other images lie there: figures would be among them, and be taken for images in the next run.
    """
    import figures
    from data_utils import printable

    make_folder(folder, '--plot')
    where = folder.resolve()
    here = {parent for parent in {path.parent for path in paths} if parent.resolve() == where}
    others = [path for path in paths if path.parent not in here or not figures.is_figure(path)]
    if any(path.parent in here for path in others):
        raise ValueError(f'{folder}: images that are read lie here; figures need a folder of their own')
    if len(others) < len(paths):
        number = len(paths) - len(others)
        print(f'{number:,} figures of earlier runs in {printable(folder)} are not read', file=sys.stderr)
    return others


def _overview_entry(reading):
    import figures
    from data_utils import printable, thumbnail

    if reading.error:
        return None, '–', printable(reading.path.name)
    best = reading.candidates[0]
    doubt = '' if reading.is_sure else '?'
    title = f'{best.character}{doubt} {best.probability:.0%}'
    return thumbnail(reading.image, figures.THUMBNAIL), title, printable(reading.path.name)


def answer(recogniser, paths: list[Path], count: int, format: str, plotter: Plotter) -> list:
    """Recognise files, write and draw the answers, and return the readings that failed."""
    from data_utils import expect_large_pictures

    expect_large_pictures()
    failed = []
    writer, progress = Writer(format, with_names=len(paths) > 1), Progress(len(paths))
    for reading in recogniser.read(paths, count, plotter.wants_images):
        writer.write(reading)
        plotter.add(reading)
        progress.step()
        if reading.error:
            failed.append(reading)
    plotter.close()
    return failed


def name_failures(failures: Iterable[tuple[object, str]], total: int) -> None:
    """Name on stderr what could not be read."""
    from data_utils import printable

    failures = list(failures)
    if failures:
        print(f'{len(failures):,} of {total:,} could not be read:', file=sys.stderr)
    for name, reason in failures:
        print(f'  {printable(name)}: {printable(reason)}', file=sys.stderr)


# --- The program -----------------------------------------------------------------------------------------------------


class Loading:
    """Imports the network and loads its weights in the background."""

    def __init__(self, model: str | None, crop: bool, precision: str = 'auto'):
        self._recogniser, self._error = None, None
        self._arguments = {'model': model, 'crop': crop, 'precision': precision}
        # A daemon: whoever leaves at the first prompt does not wait for it.
        self._thread = threading.Thread(target=self._load, daemon=True)
        self._thread.start()

    def _load(self) -> None:
        try:
            with quiet_start():
                from hccr import HCCR

                self._recogniser = HCCR(**self._arguments)
                self._recogniser.warm_up()
        except Exception as error:  # whatever it is, it is raised again where somebody waits for the result
            self._error = error

    @property
    def unfinished(self) -> bool:
        return self._thread.is_alive()

    def result(self):
        """Return the `HCCR`, after waiting for it where it is not ready.

        Raises:
            FileNotFoundError, ValueError: If the model file is missing or not what it should be.
        """
        if self.unfinished and sys.stderr.isatty():
            print('Loading the network, a few seconds ...', file=sys.stderr, flush=True)
        while self.unfinished:
            self._thread.join(0.1)  # in slices, or Ctrl-C would wait for the import on Windows
        if self._error:
            raise self._error
        return self._recogniser


def dialogue(loading: Loading, plot: str | None, read: Callable[[], str] = input) -> int:
    """Hold the original's dialogue and return the exit status."""
    print(BANNER)
    if plot is None:
        plot = 'show' if has_display() and can_draw() else 'off'
        if not can_draw():
            print(f'No figures are shown: {NO_MATPLOTLIB}.', file=sys.stderr)
        elif plot == 'off':
            print('There is no display, so no figures are shown; --plot FOLDER saves them.', file=sys.stderr)
    if ask('Show Melnyk-Net summary? [Y/n] ', parse_yes, 'y', read):
        loading.result().print_summary()
    status, plotter = EXIT_OK, Plotter(plot)
    while True:
        source = f'Please specify data filepath: [{DEFAULT_SOURCE}] '
        is_folder, paths = ask(source, parse_source, default_source(), read)
        paths = plotter.begin(paths)
        print('Loading the data.....................................')
        if is_folder:
            print(f'Found {len(paths)} images in the specified directory')
        number = f'Please specify number of predictions per input image: [{DEFAULT_CANDIDATES}] '
        count = ask(number, parse_count, str(DEFAULT_CANDIDATES), read)
        recogniser = loading.result()
        print('Melnyk-Net response:')
        failed = answer(recogniser, paths, count, 'text', plotter)
        name_failures(((reading.path, reading.error) for reading in failed), len(paths))
        if failed:
            status = EXIT_ERROR
        if not ask('Continue? [Y/n] ', parse_yes, 'y', read):
            print(FAREWELL)
            return status


def default_source() -> str:
    """Return the folder of sample images, which lies beside the program wherever that is started from."""
    folder = Path(__file__).with_name(DEFAULT_SOURCE)
    with contextlib.suppress(ValueError):
        folder = folder.relative_to(Path.cwd())
    return str(folder)


def can_draw() -> bool:
    """Whether figures can be drawn here; a light installation cannot."""
    return importlib.util.find_spec('matplotlib') is not None


def has_display() -> bool:
    """Whether figures can be shown in a window here."""
    if os.environ.get('MPLBACKEND', '').lower() in ('agg', 'pdf', 'svg', 'ps', 'cairo', 'template'):
        return False
    if sys.platform.startswith(('win', 'darwin')):
        return True
    return bool(os.environ.get('DISPLAY') or os.environ.get('WAYLAND_DISPLAY'))


def _windows_open() -> bool:
    import figures

    return figures.can_show()


def recognise(loading: Loading, options: argparse.Namespace) -> int:
    """Answer for the sources of the command line and return the exit status."""
    from data_utils import find_images

    paths, failures = [], []
    for source in options.sources:
        if not source:  # a shell's variable that is not set, perhaps; it would stand for the current folder
            failures.append((source, 'an empty name'))
            continue
        try:
            found = find_images([source])
        except FileNotFoundError:
            found = [Path(source)]  # its answer is an error in its place
        if not found:
            failures.append((source, 'no images in this folder'))
        paths += found
    recogniser, plotter = loading.result(), Plotter(options.plot or 'off')
    paths = plotter.begin(list(dict.fromkeys(paths)))
    failed = answer(recogniser, paths, options.predictions, options.format, plotter)
    failures += [(reading.path, reading.error) for reading in failed]
    name_failures(failures, len(paths) + len(failures) - len(failed))
    return EXIT_ERROR if failures else EXIT_OK


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='main.py', description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('sources', nargs='*', metavar='IMAGE', help='image, folder or pattern such as "scans/*.png"')
    parser.add_argument(
        '-n', '--predictions', type=_count, metavar='N', help='candidates for each image, 1 to 3755 (default: 5)'
    )
    parser.add_argument('--format', choices=('text', 'json', 'csv'), help='how answers are written (default: text)')
    parser.add_argument(
        '--plot',
        metavar='show|off|FOLDER',
        help='figures of the answers with class activation maps: in windows, none, or saved as PNG files '
        '(default: show in the dialogue where there is a display, else off)',
    )
    parser.add_argument(
        '--model',
        metavar='FILE',
        help='model file: .h5 or .hdf5, or .tflite, which needs no TensorFlow (default: melnyk_net.h5, or '
        'melnyk_net.tflite where TensorFlow is not installed)',
    )
    parser.add_argument(
        '--precision',
        choices=('auto', 'float32', 'bfloat16'),
        default='auto',
        help='what .h5 networks compute in (default: auto, bfloat16 where that is faster)',
    )
    parser.add_argument(
        '--whole-page',
        action='store_true',
        help='do not cut the page down to the writing; for weights that were trained so',
    )
    parser.add_argument('--traceback', action='store_true', help='show where in the program an error arose')
    options = parser.parse_args(arguments)
    if not options.sources and (options.predictions or options.format):
        parser.error('-n and --format need an image; without one the program asks')
    options.predictions = options.predictions or DEFAULT_CANDIDATES
    options.format = options.format or 'text'
    return options


def _count(text: str) -> int:
    try:
        return parse_count(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def quiet_start():
    """Return what keeps the messages of libraries off the terminal while they start.

    That is nothing where `sys.stderr` would go as well, since `move_stderr` has not given it a descriptor of its own.
    """
    with contextlib.suppress(OSError, ValueError, AttributeError):  # no descriptor, as under pythonw or in tests
        if sys.stderr.fileno() != 2:
            return quiet_libraries()
    return contextlib.nullcontext()


def move_stderr() -> None:
    """Give `sys.stderr` a file descriptor of its own, so that `Loading` can keep libraries off the terminal."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        if sys.stderr.fileno() == 2:
            sys.stderr = open(os.dup(2), 'w', encoding=sys.stderr.encoding, errors='backslashreplace', buffering=1)  # noqa: SIM115


def _reconfigure(stream, **settings) -> None:
    if hasattr(stream, 'reconfigure'):  # a stream that somebody put in its place may not
        stream.reconfigure(**settings)


def main(arguments: list[str] | None = None) -> int:
    """Run the program and return its exit status."""
    options = parse_arguments(arguments)
    # A terminal that cannot show a character gets its code instead of ending the program.
    _reconfigure(sys.stdout, errors='backslashreplace')
    _reconfigure(sys.stderr, errors='backslashreplace')
    if options.plot not in (None, 'off') and not can_draw():
        print(f'main.py: {NO_MATPLOTLIB}', file=sys.stderr)
        return EXIT_ERROR
    if options.plot == 'show' and not has_display():
        print('main.py: there is no display to show figures on; --plot FOLDER saves them', file=sys.stderr)
        return EXIT_ERROR
    if options.plot == 'show' and not _windows_open():
        print(f'main.py: {NO_WINDOWS}', file=sys.stderr)
        return EXIT_ERROR
    if options.model:
        from model_file import check_regular

        try:
            check_regular(Path(options.model))  # before questions are asked for nothing
        except (OSError, ValueError) as error:
            return complain(error)
    loading = Loading(options.model, crop=not options.whole_page, precision=options.precision)
    try:
        status = recognise(loading, options) if options.sources else dialogue(loading, options.plot)
    except EOFError:
        print(f'\n{FAREWELL}')
        status = EXIT_OK
    except KeyboardInterrupt:
        print(f'\n{FAREWELL}' if not options.sources else '\nInterrupted.', file=sys.stderr)
        status = EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read the answers has enough, as `head` does; nothing more can be written there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = EXIT_OK
    except (OSError, ValueError) as error:
        if options.traceback:
            raise
        status = complain(error)
    return leave(status, loading)


def complain(error: Exception) -> int:
    """Say what is wrong, in one line, and return the exit status."""
    print(f'main.py: {message(error)}', file=sys.stderr)
    return EXIT_ERROR


def leave(status: int, loading: Loading) -> int:
    """Return the exit status, or end the process with it where the network is still loading."""
    if loading.unfinished:
        # The interpreter must not be taken down under a half-imported library.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


if __name__ == '__main__':
    move_stderr()
    sys.exit(main())
