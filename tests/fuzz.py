"""Fuzzing: what nobody would think of, given to everything that reads what others wrote.

    python tests/fuzz.py gnt                       GNT files and archives of them, until Ctrl-C or a finding
    python tests/fuzz.py image --seconds 1800      image files, for half an hour of processor time
    python tests/fuzz.py model -rss_limit_mb=1024  model files; what it does not know goes to atheris
    python tests/fuzz.py prompt                    answers typed into the dialogue
    python tests/fuzz.py image crash-4f2a…         one input again

With atheris (`pip install atheris`; it has no wheels for every system) inputs are led by what they reach in the code.
Without it they are mutations of the seeds by lot, the same ones for the same --seed. The first input that breaks a
promise ends the run; it lies in the folder that the last lines name, and becomes a test.

Each `fuzz_x` takes any bytes and raises nothing but for a bug: the exceptions that a reader may raise are named in it,
and what it returns is checked. The ordinary tests run the same functions for a moment, see test_fuzz.py.
"""

import argparse
import contextlib
import functools
import io
import os
import random
import signal
import sys
import tempfile
import time
import traceback
import unittest.mock
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

atheris = None
if __name__ == '__main__':
    # Before the modules are imported, or atheris cannot see which of their branches an input takes.
    with contextlib.suppress(ImportError):
        import atheris

        with atheris.instrument_imports(include=['data_utils', 'gnt_reader', 'main', 'model_file', 'PIL', 'zipfile']):
            import data_utils
            import gnt_reader
            import main
            import model_file

            data_utils.Image.init()  # Pillow would import its decoders when they are needed

import h5py  # noqa: E402
import numpy as np  # noqa: E402
from conftest import draw_character  # noqa: E402
from PIL import Image  # noqa: E402

import data_utils  # noqa: E402
import gnt_reader  # noqa: E402
import main  # noqa: E402
import model_file  # noqa: E402


class Finding(AssertionError):
    """A promise that an input broke."""


def promise(kept: bool, what: str) -> None:
    if not kept:
        raise Finding(what)


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix='fuzz-')


def _file(data: bytes, suffix: str) -> Path:
    # One file again and again: a reader may not need its name for more than an error.
    path = Path(_folder().name, f'input{suffix}')
    path.write_bytes(data)
    return path


# --- GNT -------------------------------------------------------------------------------------------------------------


def fuzz_gnt(data: bytes) -> None:
    """Read bytes as a GNT file or an archive, in all three ways. Allowed: `GntError`."""
    path = _file(data, '.gnt')
    errors = []
    try:
        records = list(gnt_reader.read_gnt(path, level1_only=False, strict=False, on_error=errors.append))
    except gnt_reader.GntError as error:
        promise(bool(str(error)), 'an error says something')
        return
    promise(all(isinstance(error, gnt_reader.GntError) and str(path) in str(error) for error in errors), 'file named')
    if not data.startswith(b'PK'):
        promise(sum(10 + record.image.size for record in records) <= len(data), 'no pixel from nowhere')
    for record in records:
        promise(record.image.dtype == np.uint8 and record.image.ndim == 2 and record.image.size > 0, 'a gray image')
        promise(record.character is None or len(record.character) == 1, 'one character')

    try:
        strict = sum(1 for _ in gnt_reader.read_gnt(path, level1_only=False))
        promise(not errors and strict == len(records), 'strict reading finds the same')
    except gnt_reader.GntError:
        promise(bool(errors), 'tolerant reading reports what strict reading refuses')

    ignored = []
    index = gnt_reader.index_gnt(path, level1_only=False, strict=False, on_error=ignored.append)
    promise(len(index) == len(records), 'the index has every record')
    with gnt_reader.GntReader(index, cache_bytes=1 << 24) as reader:
        for position, record in enumerate(records):
            try:
                again = reader[position]
            except gnt_reader.GntError:
                # A member whose end is damaged is unpacked whole or not at all.
                promise(data.startswith(b'PK'), 'a file gives at any place what it gave in a row')
                break
            promise(np.array_equal(again.image, record.image) and again[:2] == record[:2], 'the same record')

    copy = path.with_name('copy.gnt')
    gnt_reader.write_gnt(copy, records)
    copies = list(gnt_reader.read_gnt(copy, level1_only=False))
    promise(len(copies) == len(records), 'as many records written')
    for one, other in zip(copies, records, strict=True):
        promise(one[:2] == other[:2] and np.array_equal(one.image, other.image), 'what is written is read')


def gnt_seeds() -> list[bytes]:
    small = draw_character(12)
    path = Path(_folder().name, 'seed.gnt')
    gnt_reader.write_gnt(path, [('啊', small), ('A', small[:1]), ('座', small[:, :3])])
    plain = path.read_bytes()
    seeds = [plain, plain[:154], b'']
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, 'w', method) as archive:
            archive.writestr('1001-c.gnt', plain)
            archive.writestr('sub/1002-c.gnt', plain[:154])
        seeds.append(buffer.getvalue())
    return seeds


# --- Images ----------------------------------------------------------------------------------------------------------


def fuzz_image(data: bytes) -> None:
    """Open bytes as an image and prepare it for the network. Allowed: `ImageError`, of which `NoInkError` is one."""
    path = _file(data, '.png')
    # Pages that are larger than this are not slower to refuse, and far slower to fuzz.
    with warnings.catch_warnings(), unittest.mock.patch.object(Image, 'MAX_IMAGE_PIXELS', 1 << 18):
        # Pillow warns of odd files; a warning of numpy's is arithmetic gone wrong.
        warnings.simplefilter('ignore')
        try:
            smaller = data_utils.open_image(path, reduced=True)
            image = data_utils.open_image(path)
        except data_utils.ImageError as error:
            promise(bool(str(error)), 'an error says something')
            return
        warnings.simplefilter('error', RuntimeWarning)
        promise(image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3, 'an RGB image')
        promise(smaller.dtype == np.uint8 and smaller.ndim == 3 and smaller.shape <= image.shape, 'no larger one')
        before = image.copy()
        for page, crop in ((image, True), (image, False), (smaller, True)):
            with contextlib.suppress(data_utils.NoInkError):
                result = data_utils.network_input(page, crop=crop)
                promise(result.shape == (96, 96) and result.dtype == np.uint8, 'a network input')
                promise(not result[:4].any() and not result[:, :4].any() and not result[-4:].any(), 'a border')
        promise(np.array_equal(image, before), 'the image is left as it was')


def image_seeds() -> list[bytes]:
    page = Image.fromarray(draw_character(40))
    colour = Image.merge('RGB', (page, page, page.point(lambda level: min(255, level + 20))))
    exif = Image.Exif()
    exif[0x0112] = 6
    pictures = [
        (page, 'PNG', {}),
        (page.convert('1'), 'PNG', {}),
        (page.convert('LA'), 'PNG', {'exif': exif}),
        (colour.convert('P'), 'PNG', {'transparency': 0}),
        (Image.fromarray(np.asarray(page).astype(np.uint16) * 257), 'PNG', {}),
        (colour, 'JPEG', {'exif': exif}),
        (colour.convert('CMYK'), 'JPEG', {'progressive': True}),
        (colour, 'BMP', {}),
        (page, 'GIF', {'save_all': True, 'append_images': [page.rotate(90)]}),
        (colour, 'TIFF', {'compression': 'tiff_lzw'}),
        (page.convert('F'), 'TIFF', {}),
        (page.convert('I'), 'TIFF', {'compression': 'tiff_adobe_deflate'}),
        (page.convert('1'), 'TIFF', {'compression': 'group4'}),
        (colour, 'WEBP', {'exif': exif}),
        (colour.convert('RGBA'), 'WEBP', {'lossless': True, 'save_all': True, 'append_images': [colour]}),
        (colour, 'PPM', {}),
    ]
    seeds = [b'', b'P1 3 2\n1 0 1 0 1 0\n', b'P2\n2 2 9\n1 9 9 1\n', b'Pf\n2 2\n-1.0\n' + bytes(16)]
    for picture, kind, settings in pictures:
        buffer = io.BytesIO()
        picture.save(buffer, kind, **settings)
        seeds.append(buffer.getvalue())
    return seeds


# --- Model files -----------------------------------------------------------------------------------------------------

# A Melnyk-Net of one convolution with one filter, at 8 pixels and of two classes: few bytes, all kinds of layers.
NARROW = ((1,),)
WEIGHTS: dict[tuple[str, str], tuple[int, ...]] = {
    ('conv2d_1', 'kernel'): (3, 3, 1, 1),
    ('batch_normalization_1', 'gamma'): (1,),
    ('batch_normalization_1', 'beta'): (1,),
    ('batch_normalization_1', 'moving_mean'): (1,),
    ('batch_normalization_1', 'moving_variance'): (1,),
    ('global_weighted_average_pooling2d_1', 'W'): (8, 8, 1),
    ('dense_1', 'kernel'): (1, 2),
    ('dense_1', 'bias'): (2,),
}


def fuzz_model(data: bytes) -> None:
    """Open bytes as a model file and read what is read of it before a network is built. Allowed: `ModelFileError`."""
    path = _file(data, '.h5')
    with contextlib.suppress(model_file.ModelFileError):
        content, info = model_file.read_tflite(path)
        promise(content == data and info == info.checked(), 'an exported file with its description')
    with warnings.catch_warnings():
        warnings.simplefilter('error', RuntimeWarning)
        try:
            with model_file.opened(path) as file:
                info = file.info.checked()
                file.refuse_other_layers({layer for layer, _ in WEIGHTS})
                weights = [file.weight(*place, shape) for place, shape in WEIGHTS.items()]
        except model_file.ModelFileError as error:
            promise(str(path) in str(error), 'the file is named')
            if error.reason.startswith('damaged HDF5 file') and error.__cause__:
                *_, innermost = traceback.walk_tb(error.__cause__.__traceback__)
                place = innermost[0].f_code.co_filename
                promise(place != model_file.__file__, f'a mistake of ours, {error.__cause__!r}, passes for damage')
            return
    promise(info == model_file.ModelInfo.from_json(path, info.to_json()), 'the description can be saved again')
    for values, shape in zip(weights, WEIGHTS.values(), strict=True):
        promise(values.shape == shape and values.dtype == np.float32 and bool(np.isfinite(values).all()), 'a weight')


def write_model(path: Path, name: str = '{}', dtype: str = 'f4', libver: str = 'earliest') -> None:
    """Write a model file of the network that `NARROW` means, without Keras."""
    labels = tuple('一二')
    info = model_file.ModelInfo((8, 8, 1), 'GWAP', labels, 1.0, 'a seed')
    with h5py.File(path, 'w', libver=libver) as file:
        root = file.create_group('model_weights')
        for (layer, weight), shape in WEIGHTS.items():
            values = np.ones(shape) if weight == 'moving_variance' else np.linspace(-1, 1, np.prod(shape))
            values = values.reshape(shape).astype(dtype)
            root.require_group(f'{layer}/{layer}')[name.format(weight)] = values
    model_file.describe(path, info)


def model_seeds() -> list[bytes]:
    path = Path(_folder().name, 'seed.h5')
    seeds = [b'', b'\x89HDF\r\n\x1a\n']
    for settings in ({}, {'name': '{}:0'}, {'dtype': 'f2', 'libver': 'latest'}):
        write_model(path, **settings)
        seeds.append(path.read_bytes())
    # The head of an exported file, and the archive with its description behind it.
    exported = path.with_suffix('.tflite')
    exported.write_bytes(bytes(4) + b'TFL3' + bytes(24))
    with model_file.opened(path) as file:
        model_file.describe(exported, file.info)
    return [*seeds, exported.read_bytes()]


# --- Prompts ---------------------------------------------------------------------------------------------------------


def fuzz_prompt(data: bytes) -> None:
    """Type the lines of a text into the dialogue. Allowed: `EOFError`, when there are no more lines."""
    # As a terminal's bytes reach a program, those that are no UTF-8 included.
    lines = iter(data.decode('utf-8', 'surrogateescape').split('\n'))

    def read() -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    def answer(recogniser, paths, count, *_, **__) -> list:
        promise(bool(paths) and all(isinstance(path, Path) for path in paths), 'there are images')
        promise(1 <= count <= main.CLASSES, 'a number of candidates')
        return []

    find = data_utils.find_images
    here = _images()

    def find_here(sources) -> list[Path]:
        # A user may name any folder; a fuzzer that walks the whole disk finds nothing.
        for source in sources:
            place = os.path.normpath(os.path.join(here, os.path.expanduser(source)))
            if place != str(here) and not place.startswith(f'{here}{os.sep}'):
                raise FileNotFoundError(source)
        return find(sources)

    screen = io.StringIO()
    with (
        contextlib.chdir(here),
        contextlib.redirect_stdout(screen),
        contextlib.redirect_stderr(screen),
        unittest.mock.patch.object(data_utils, 'find_images', find_here),
        unittest.mock.patch.object(main, 'answer', answer),
        contextlib.suppress(EOFError),
    ):
        # The network is not what a prompt is about.
        status = main.dialogue(unittest.mock.Mock(), 'off', read)
        promise(status == main.EXIT_OK and screen.getvalue().endswith(f'{main.FAREWELL}\n'), 'a farewell')


@functools.cache
def _images() -> Path:
    folder = Path(_folder().name, 'images').resolve()
    (folder / 'my scans' / 'images').mkdir(parents=True)
    for name in ('a.png', 'b [1].jpg', "my scans/it's.PNG", 'my scans/鲍.png', 'images'):
        (folder / name).touch()
    return folder


def prompt_seeds() -> list[bytes]:
    return [
        text.encode()
        for text in (
            '',
            'n\na.png\n5\nn\n',
            'y\n\'my scans\'\n99999\n５\ny\n"my scans/"\nfive\n1\nn\n',
            'no\nmy\\ scans\n0\n-1\n3755\n\n*.png\n2\nn',
            'n\nb [1].jpg\n\n\n**\n1\nn',
            'n\n~\n~root\n~no-one\n../x\n/etc\n\'\n\\\n"\\"\n[\n',
            'n\n\x00\n\x1b[31m\n' + 'long' * 80 + '\n' + '9' * 5000,
        )
    ]


# --- Running ---------------------------------------------------------------------------------------------------------

HARNESSES: dict[str, tuple[Callable[[bytes], None], Callable[[], list[bytes]]]] = {
    'gnt': (fuzz_gnt, gnt_seeds),
    'image': (fuzz_image, image_seeds),
    'model': (fuzz_model, model_seeds),
    'prompt': (fuzz_prompt, prompt_seeds),
}

_EDGES = (b'\0', b'\xff', b'\x7f', b'\x80', b'\0\0', b'\xff\xff', bytes(4), b'\xff' * 4, b'\0\0\0\x80', b'\xff' * 8)


def mutated(seed: bytes, number: int) -> bytes:
    """Return a seed after some changes that a number stands for: bytes set, cut out, doubled, moved."""
    rng = random.Random(number)
    data = bytearray(seed)
    for _ in range(rng.choice((1, 1, 2, 3, 5, 8, 20))):
        place = rng.randrange(len(data) + 1)
        length = min(rng.choice((1, 1, 2, 4, 8, 64, 1000)), len(data) - place)
        kind = rng.randrange(7)
        if kind == 0 and length:
            data[place] ^= 1 << rng.randrange(8)
        elif kind == 1 and length:
            data[place] = rng.randrange(256)
        elif kind == 2:
            edge = rng.choice(_EDGES)
            data[place : place + len(edge)] = edge
        elif kind == 3:
            del data[place : place + length]
        elif kind == 4:
            data[place:place] = data[place : place + length]
        elif kind == 5:
            data[place:place] = rng.randbytes(length)
        elif not rng.randrange(8):
            del data[place:]
    return bytes(data)


class Watched:
    """A harness that counts its inputs, and stops when its time is over.

    Args:
        name: Of the harness.
        seconds: Of processor time; 0 for no end.
        stop: What ends the run.
    """

    def __init__(self, name: str, seconds: float, stop: Callable[[], object]):
        self.name, self.seconds, self.stop = name, seconds, stop
        self.harness = HARNESSES[name][0]
        self.inputs = 0
        self.begin = time.process_time()

    def __call__(self, data: bytes) -> None:
        self.harness(bytes(data))
        self.inputs += 1
        if self.inputs % 10_000 == 0:
            self.tell()
        if self.seconds and time.process_time() - self.begin > self.seconds:
            self.seconds = 0
            self.tell()
            self.stop()

    def tell(self) -> None:
        """Say how many inputs there were."""
        seconds = time.process_time() - self.begin
        print(f'{self.name}: {self.inputs:,} inputs in {seconds:,.0f} s of processor time', file=sys.stderr, flush=True)


class _Over(Exception):
    pass


def _mutate_forever(watched: Watched, seeds: list[bytes], folder: Path, first: int) -> None:
    """Run a harness on mutations of its seeds; those that are read without an error would be no better seeds."""
    number = first
    data = b''
    try:
        for data in seeds:
            watched(data)
        while True:
            data = mutated(random.Random(number).choice(seeds), number)
            watched(data)
            number += 1
    except (_Over, KeyboardInterrupt):
        return
    except BaseException:
        crasher = folder / f'crash-{number}'
        crasher.write_bytes(data)
        print(f'{watched.name}: the input is {crasher}', file=sys.stderr)
        raise


def run(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(
        prog='fuzz.py', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument('harness', choices=HARNESSES)
    parser.add_argument('inputs', nargs='*', metavar='FILE', help='run these inputs alone, once each')
    parser.add_argument('--seconds', type=float, default=0, help='of processor time (default: no end)')
    parser.add_argument(
        '--folder',
        type=Path,
        metavar='DIR',
        help='where the inputs lie that reached something new, and findings (default: a folder for temporary files)',
    )
    parser.add_argument('--seed', type=int, default=1, help='another number, other mutations (default: 1)')
    options, more = parser.parse_known_args(arguments)
    if options.inputs:
        for path in options.inputs:
            HARNESSES[options.harness][0](Path(path).read_bytes())
        return 0
    folder = options.folder or Path(tempfile.gettempdir(), 'offline-hccr-fuzz', options.harness)
    corpus = folder / 'corpus'
    corpus.mkdir(parents=True, exist_ok=True)
    seeds = HARNESSES[options.harness][1]()
    print(f'{options.harness}: corpus and findings in {folder}', file=sys.stderr)
    if atheris is None:
        if more:
            parser.error(f'{" ".join(more)}: these are for atheris, which is not installed')
        print('atheris is not installed: mutations of the seeds by lot', file=sys.stderr)

        def stop() -> None:
            raise _Over

        _mutate_forever(Watched(options.harness, options.seconds, stop), seeds, folder, options.seed << 32)
        return 0
    for number, seed in enumerate(seeds):
        (corpus / f'seed-{number}').write_bytes(seed)
    watched = Watched(options.harness, options.seconds, lambda: os.kill(os.getpid(), signal.SIGINT))
    settings = [f'-seed={options.seed}', f'-artifact_prefix={folder}/', '-print_final_stats=1', '-timeout=120']
    atheris.Setup(['fuzz.py', *settings, *more, str(corpus)], watched)
    atheris.Fuzz()
    return 0


if __name__ == '__main__':
    sys.exit(run(sys.argv[1:]))
