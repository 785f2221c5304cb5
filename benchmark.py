"""Measures how fast everything is on this machine, each beside a limit that is measured in the same run.

    python benchmark.py                                    all sections, a few minutes
    python benchmark.py --only network start               some of them
    python benchmark.py --model mine.h5 mine.tflite --json figures.json
    python benchmark.py --only training --drawn material   the drawing of handwriting too

    network      the network alone, one image and 64 at a time, on one core and on all; limit: the multiplications of a
                 large matrix product in the same process and precision
    preparation  page → network input on one core; limit: Pillow's decoding of the same file
    folder       a folder of PNG files, from the names to the answers; limit: the network alone on the same inputs
    start        from the command to the answer, and to the first question; limit: Python itself
    reader       GNT records; limit: plain reading of the same file
    training     a step fed with samples; limit: the same step on numbers that are there already
    peers        other recognisers, where they are installed, on the same pictures; limit: this program

The last column is the share of the limit that is reached: 100 % is as fast as the limit. The figures are medians of
repeats that take turns with their limit, so that a busy machine spoils both alike.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from data_utils import LABELS, crop_to_ink, find_images, network_input, open_image, printable, written_aside
from model_file import default_model

SECTIONS = ('network', 'preparation', 'folder', 'start', 'reader', 'training', 'peers')

# Multiplications of one image, at the size that each network is shipped for and with all 3755 classes. Beside those of
# the convolutions and the classifier there are next to none.
MULTIPLICATIONS = {
    'melnyk_net': 1_201_384_256,
    'mobilenet_v3_small': 11_956_864,
    'mobilenet_v3_large': 43_492_608,
}

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        section: One of `SECTIONS`.
        what: What was measured.
        value: The figure, `None` where it could not be measured.
        unit: `'ms'`, or what is counted in a second, such as `'MB/s'`.
        limit: The limit in the same unit, or `None`.
        limit_is: What the limit is; where there is no figure, why.
    """

    section: str
    what: str
    value: float | None
    unit: str = ''
    limit: float | None = None
    limit_is: str = ''

    @property
    def share(self) -> float | None:
        """The share of the limit that is reached, 1 for all of it."""
        if not self.value or not self.limit:
            return None
        return self.limit / self.value if self.unit == 'ms' else self.value / self.limit


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        repeats: Turns of which the median counts.
        files: PNG files of the folder.
        side: Longer side of the photo in pixels; 4000 make 12 megapixels.
        records: Records of the GNT file.
        steps: Training steps of each turn.
        batch_size: Samples of a training step.
        size: Side of the images that training sees.
        product: Side of the matrices of the product.
    """

    repeats: int = 7
    files: int = 1000
    side: int = 4000
    records: int = 20_000
    steps: int = 4
    batch_size: int = 128
    size: int = 96
    product: int = 2048


FULL = Effort()
QUICK = Effort(repeats=2, files=16, side=1200, records=300, steps=2, batch_size=8, size=48, product=256)


class BenchmarkError(RuntimeError):
    """A measurement that is not possible here; the text says why."""


# --- Taking turns ----------------------------------------------------------------------------------------------------


# Seconds between two measurements: the threads of a matrix product keep their cores for a while after it, waiting for
# the next, which made a small network look many times slower.
_REST = 0.1


def medians(repeats: int, *tasks: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> list[float]:
    """Measure tasks in turn.

    Args:
        repeats: Turns. Each task runs once before, unmeasured.
        *tasks: Functions without arguments.
        clock: What gives the seconds. `time.process_time` leaves out what other processes take. Defaults to
            `time.perf_counter`.

    Returns:
        The median seconds of each.
    """
    for task in tasks:
        task()
    seconds: list[list[float]] = [[] for _ in tasks]
    for _ in range(repeats):
        for task, taken in zip(tasks, seconds, strict=True):
            time.sleep(_REST)
            start = clock()
            task()
            taken.append(clock() - start)
    return [statistics.median(taken) for taken in seconds]


def often(task: Callable[[], object], times: int) -> Callable[[], None]:
    """Return a function that does a task so many times, for tasks that are too short for the clock."""

    def repeated() -> None:
        for _ in range(times):
            task()

    return repeated


def core_counts() -> list[int]:
    """Return the numbers of cores to measure with: one where a process can be kept to it, and all."""
    if not hasattr(os, 'sched_setaffinity'):
        return [os.cpu_count() or 1]
    return sorted({1, len(os.sched_getaffinity(0))})


def in_process(task: str, cores: int, **arguments) -> dict:
    """Run a task of `TASKS` in a process of its own, on some of the cores.

    Args:
        task: Its name.
        cores: How many cores it may use.
        **arguments: The task's own, as JSON can hold them.

    Returns:
        What the task returns.

    Raises:
        BenchmarkError: If it fails, with its reason.
    """
    # Libraries start as many threads as there are cores, unless these say otherwise.
    threads = dict.fromkeys(('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS'), str(cores))

    def keep_to_cores() -> None:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])

    done = subprocess.run(
        [sys.executable, os.fspath(HERE / 'benchmark.py'), '--task', json.dumps([task, arguments])],
        capture_output=True,
        text=True,
        encoding='utf-8',
        errors='replace',
        env={**os.environ, **threads, 'TF_CPP_MIN_LOG_LEVEL': '3', 'PYTHONIOENCODING': 'utf-8'},
        preexec_fn=keep_to_cores if hasattr(os, 'sched_setaffinity') else None,
    )
    last = (done.stdout.strip().splitlines() or [''])[-1]
    try:
        answer = json.loads(last)
    except ValueError:
        why = (done.stderr.strip().splitlines() or [''])[-1]
        raise BenchmarkError(why or f'{task} ended with status {done.returncode}') from None
    if 'error' in answer:
        raise BenchmarkError(answer['error'])
    return answer


# --- Pictures --------------------------------------------------------------------------------------------------------


def characters() -> list[tuple[str, np.ndarray]]:
    """Return the pictures that come with the program: (character, tight gray crop with white paper)."""
    return [
        (path.stem[0], crop_to_ink(255 - network_input(open_image(path)))) for path in find_images([HERE / 'images'])
    ]


def scans(count: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Give tight crops of the size of CASIA's samples: uint8 `(height, width)`, the longer side 60 to 120 pixels."""
    rng, crops = np.random.default_rng(seed), [crop for _, crop in characters()]
    for number in range(count):
        yield crop_to_ink(enlarged(crops[number % len(crops)], int(rng.integers(60, 121))))


def enlarged(crop: np.ndarray, side: int) -> np.ndarray:
    """Scale a crop so that its longer side has `side` pixels."""
    height, width = (max(1, round(length * side / max(crop.shape))) for length in crop.shape)
    return np.asarray(Image.fromarray(crop).resize((width, height), Image.Resampling.BICUBIC))


def page(crop: np.ndarray, height: int, width: int, part: float) -> np.ndarray:
    """Lay a crop into the middle of a white page `(height, width)`, of whose height it covers a part."""
    ink = enlarged(crop, round(height * part))
    paper = np.full((height, width), 255, np.uint8)
    top, left = (height - ink.shape[0]) // 2, (width - ink.shape[1]) // 2
    paper[top : top + ink.shape[0], left : left + ink.shape[1]] = ink
    return paper


def photo(crop: np.ndarray, side: int, seed: int = 0) -> np.ndarray:
    """Make the photo of a page: yellowish paper, light from one side, grain. uint8 `(height, width, 3)`, 4 : 3."""
    height, width = side * 3 // 4, side
    light = np.linspace(1, 0.55, width, dtype=np.float32) * np.linspace(1, 0.8, height, dtype=np.float32)[:, None]
    gray = page(crop, height, width, 0.45) * light
    gray += np.random.default_rng(seed).normal(0, 4, gray.shape).astype(np.float32)
    return np.stack([np.clip(gray * tint, 0, 255).astype(np.uint8) for tint in (0.97, 0.94, 0.86)], axis=-1)


def write_gnt(path: Path, records: int) -> None:
    """Write a GNT file of scans, all characters in turn."""
    from gnt_reader import HEADER, character_tag

    crops = list(scans(min(records, 400)))
    with path.open('wb') as file:
        for number in range(records):
            crop = crops[number % len(crops)]
            tag = character_tag(LABELS[number % len(LABELS)]).to_bytes(2, 'big')
            file.write(HEADER.pack(HEADER.size + crop.size, tag, crop.shape[1], crop.shape[0]) + crop.tobytes())


# --- What is measured in a process of its own ------------------------------------------------------------------------


def measure_network(model: str, precision: str, batch_sizes: Sequence[int], repeats: int, product: int) -> dict:
    """Measure a network against the matrix product.

    Returns:
        `precision` and `architecture` as they are, `product` (what was multiplied), `flops` a second of it, and `ms`:
        milliseconds an image for each batch size.
    """
    from hccr import HCCR

    recogniser = HCCR(model, precision=precision)
    inputs = np.stack([network_input(scan, size=recogniser.size) for scan in scans(max(batch_sizes))])
    is_light = recogniser.model is None
    multiply, name = _numpy_product(product) if is_light else _product(recogniser.runtime.precision, product)
    tasks = [
        often(lambda size=size: recogniser.probabilities(inputs[:size]), max(1, 8 // size)) for size in batch_sizes
    ]
    multiplying, *running = medians(repeats, multiply, *tasks)
    return {
        'architecture': recogniser.info.architecture,
        # The name of an exported file says what it holds.
        'precision': '' if is_light else recogniser.runtime.precision,
        'product': name,
        'flops': 2 * product**3 / multiplying,
        'ms': [1000 * seconds / size / max(1, 8 // size) for seconds, size in zip(running, batch_sizes, strict=True)],
    }


def _numpy_product(side: int) -> tuple[Callable[[], object], str]:
    left, right = np.random.default_rng(0).standard_normal((2, side, side), np.float32)
    return lambda: left @ right, 'float32 (numpy)'


def _product(precision: str, side: int) -> tuple[Callable[[], object], str]:
    from keras import ops

    left, right = np.random.default_rng(0).standard_normal((2, side, side), np.float32)
    left, right = (ops.convert_to_tensor(matrix, precision) for matrix in (left, right))
    # A single number comes back, so that one waits for the product and not for its way out.
    return lambda: float(ops.matmul(left, right)[0, 0]), precision


def measure_preparation(side: int, repeats: int) -> list[dict]:
    """Measure what comes before the network: `what`, `ms`, and `limit`, Pillow's decoding of the file, in ms."""
    crop = characters()[0][1]
    many = list(scans(40))
    large = photo(crop, side)
    cases = (
        ('a scan of 60 to 120 pixels', many, 'PNG'),
        ('a page of 512 pixels', [page(crop, 512, 512, 0.4)], 'PNG'),
        (f'a photo of {large.shape[0] * large.shape[1] / 1e6:.0f} megapixels', [large], 'JPEG'),
    )
    rows = []
    for what, pictures, kind in cases:
        times = max(1, 40 // len(pictures)) if kind == 'PNG' else 1
        count = times * len(pictures)
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder, str(number)) for number in range(len(pictures))]
            for file, picture in zip(files, pictures, strict=True):
                Image.fromarray(picture).save(file, kind)

            def decode(files=files):
                for file in files:
                    Image.open(file).load()

            def prepare(pictures=pictures):
                for picture in pictures:
                    network_input(picture)

            def read(files=files):
                for file in files:
                    network_input(open_image(file, reduced=True))

            tasks = (often(task, times) for task in (decode, prepare, read))
            decoding, preparing, reading = medians(repeats, *tasks, clock=time.process_time)
        for name, seconds in (('from its pixels', preparing), ('from its file', reading)):
            rows.append({'what': f'{what}, {name}', 'ms': 1e3 * seconds / count, 'limit': 1e3 * decoding / count})
    return rows


def measure_folder(model: str, files: int, repeats: int) -> dict:
    """Measure a folder of PNG files: `ms` an image from file to answer, and `limit`, of the network alone."""
    from hccr import HCCR

    recogniser = HCCR(model)
    with tempfile.TemporaryDirectory() as folder:
        inputs = []
        for number, scan in enumerate(scans(files)):
            Image.fromarray(scan).save(Path(folder, f'{number}.png'))
            inputs.append(network_input(scan, size=recogniser.size))
        inputs = np.stack(inputs)
        paths = find_images([folder])

        def read():
            for reading in recogniser.read(paths):
                if reading.error:
                    raise BenchmarkError(reading.error)

        reading, running = medians(repeats, read, lambda: recogniser.probabilities(inputs))
    return {'ms': 1000 * reading / files, 'limit': 1000 * running / files}


def measure_training(effort: dict, architecture: str, drawn: str | None) -> list[dict]:
    """Measure training steps on samples that are there already, on GNT samples, and on drawn ones where possible.

    Returns:
        `what`, `value`, `unit`, `limit`, `limit_is` of each row.
    """
    import train
    from feed import DrawnSource, Feed, GntSource, training_index

    effort = Effort(**effort)
    size, count, steps = effort.size, effort.batch_size, effort.steps
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, '1001-t.gnt')
        write_gnt(path, effort.records)
        command = ['--gnt', str(path), '--architecture', architecture, '--size', str(size), '--batch-size', str(count)]
        options, recipe = train.parse([*command, '--out', str(Path(folder, 'run'))])
        model, _ = train.build(options, recipe)
        sources = {'GNT': GntSource(training_index([path]))}
        if drawn:
            sources['drawn'] = DrawnSource(Path(drawn))

        def learn(batch) -> None:
            trusted = batch.trusted.astype(np.float32)
            float(model.train_on_batch(batch.images, batch.labels, trusted, return_dict=True)['loss'])

        ready = sources['GNT'].batch(range(count))
        learn(ready)  # compiles
        bare: list[float] = []
        for name, source in sources.items():
            fed = []
            for _ in range(2):
                bare += _seconds_of_steps(steps, learn, lambda: ready)
                with Feed(source, count) as feed:
                    # The first batches wait for the workers to start; then the queue is as full as it will be.
                    for _ in range(2):
                        learn(next(feed))
                    fed += _seconds_of_steps(steps, learn, lambda feed=feed: next(feed))
            rows.append(
                {
                    'what': f'a step of {count} {name} samples of {size} pixels',
                    'value': 1000 * statistics.median(fed),
                    'unit': 'ms',
                    'limit': 1000 * statistics.median(bare),
                    'limit_is': 'the step alone',
                }
            )
        wanted = count / statistics.median(bare)
        for name, source in sources.items():
            (seconds,) = medians(2, lambda source=source: source.batch(range(count)))
            rows.append(
                {
                    'what': f'preparing {name} samples, one process',
                    'value': count / seconds,
                    'unit': 'samples/s',
                    'limit': wanted,
                    'limit_is': 'what the step alone would use up',
                }
            )
    return rows


def _seconds_of_steps(steps: int, learn: Callable, following: Callable) -> list[float]:
    taken = []
    for _ in range(steps):
        start = time.perf_counter()
        learn(following())
        taken.append(time.perf_counter() - start)
    return taken


def measure_peers(model: str, repeats: int) -> list[dict]:
    """Measure other recognisers on the pictures that come along: `what`, `ms` an image, `right` and `of`."""
    from hccr import HCCR

    recogniser = HCCR(model)
    pictures = [
        (character, np.repeat(page(crop, 160, 160, 0.75)[..., None], 3, axis=2)) for character, crop in characters()
    ]

    def ours(picture: np.ndarray) -> str:
        (reading,) = recogniser.read([picture], num_predictions=1)
        return reading.candidates[0].character

    recognisers = {'this program': ours}
    for name, make in PEERS.items():
        with contextlib.suppress(ImportError):
            recognisers[name] = make()
    rows = []
    for name, recognise in recognisers.items():
        try:
            right = sum(recognise(picture).strip() == character for character, picture in pictures)
        except Exception as error:  # a program or a language that is not installed, each says it in its own way
            rows.append({'what': name, 'error': f'{name}: {str(error).strip().splitlines()[0]}'})
            continue
        (seconds,) = medians(repeats, lambda recognise=recognise: [recognise(picture) for _, picture in pictures])
        rows.append({'what': name, 'ms': 1000 * seconds / len(pictures), 'right': right, 'of': len(pictures)})
    return rows


def _rapidocr() -> Callable[[np.ndarray], str]:
    from rapidocr import RapidOCR

    engine = RapidOCR()

    def recognise(picture: np.ndarray) -> str:
        texts = engine(picture, use_det=False, use_cls=False, use_rec=True).txts
        return texts[0] if texts else ''

    return recognise


def _rapidocr_onnxruntime() -> Callable[[np.ndarray], str]:
    from rapidocr_onnxruntime import RapidOCR

    engine = RapidOCR()

    def recognise(picture: np.ndarray) -> str:
        found, _ = engine(picture, use_det=False, use_cls=False, use_rec=True)
        return found[0][0] if found else ''

    return recognise


def _tesseract() -> Callable[[np.ndarray], str]:
    import pytesseract

    return lambda picture: pytesseract.image_to_string(Image.fromarray(picture), lang='chi_sim', config='--psm 10')


PEERS: dict[str, Callable[[], Callable[[np.ndarray], str]]] = {
    'RapidOCR, recognition only': _rapidocr,
    'RapidOCR (rapidocr_onnxruntime), recognition only': _rapidocr_onnxruntime,
    'Tesseract, one character': _tesseract,
}
"""Name → function that returns a recogniser, or raises ImportError where it is not installed."""

TASKS: dict[str, Callable] = {
    'network': measure_network,
    'preparation': measure_preparation,
    'folder': measure_folder,
    'training': measure_training,
    'peers': measure_peers,
}


# --- Sections --------------------------------------------------------------------------------------------------------


def network_rows(options: argparse.Namespace, effort: Effort) -> Iterator[Row]:
    """Every model file in every precision."""
    batch_sizes = (1, 64)
    for model in options.model:
        # What the program chooses, and float32 where that is something else.
        for precision in ('auto', 'float32') if Path(model).suffix != '.tflite' else ('auto',):
            done = False
            for cores in core_counts():
                name = f'{Path(model).name}, {_cores(cores)}'
                try:
                    found = in_process(
                        'network',
                        cores,
                        model=model,
                        precision=precision,
                        batch_sizes=batch_sizes,
                        repeats=effort.repeats,
                        product=effort.product,
                    )
                except BenchmarkError as error:
                    yield Row('network', name, None, limit_is=str(error))
                    done = True
                    break
                multiplications = MULTIPLICATIONS.get(found['architecture'])
                for size, ms in zip(batch_sizes, found['ms'], strict=True):
                    yield Row(
                        'network',
                        ', '.join(filter(None, (name, found['precision'], f'batch {size}'))),
                        ms,
                        'ms',
                        2e3 * multiplications / found['flops'] if multiplications else None,
                        f'matrix product, {found["product"]}: {found["flops"] / 1e9:,.0f} GFLOP/s',
                    )
                done = found['precision'] == 'float32'
            if done:
                break


def preparation_rows(_: argparse.Namespace, effort: Effort) -> Iterator[Row]:
    """Pages of several sizes, one core."""
    for row in in_process('preparation', 1, side=effort.side, repeats=effort.repeats)['rows']:
        yield Row('preparation', row['what'], row['ms'], 'ms', row['limit'], 'decoding alone')


def folder_rows(options: argparse.Namespace, effort: Effort) -> Iterator[Row]:
    """A folder, with every model file, on all cores."""
    cores = core_counts()[-1]
    for model in options.model:
        what = f'{effort.files:,} PNG files, {Path(model).name}, {_cores(cores)}'
        try:
            found = in_process('folder', cores, model=model, files=effort.files, repeats=min(3, effort.repeats))
        except BenchmarkError as error:
            yield Row('folder', what, None, limit_is=str(error))
        else:
            yield Row('folder', f'{what}, an image', found['ms'], 'ms', found['limit'], 'the network alone')


def start_rows(options: argparse.Namespace, effort: Effort) -> Iterator[Row]:
    """main.py from the command on, all files in the system's cache."""
    picture = next(path for path in find_images([HERE / 'images']))
    python, main = [sys.executable, '-c', 'pass'], [sys.executable, os.fspath(HERE / 'main.py')]

    def started(command: list[str]) -> Callable[[], None]:
        def start() -> None:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors='replace')
            if done.returncode:
                raise BenchmarkError((done.stderr.strip().splitlines() or ['it failed'])[-1])

        return start

    commands = {'the first question of the dialogue': main}
    for model in options.model:
        commands[f'the answer for one image, {Path(model).name}'] = [*main, os.fspath(picture), '--model', model]
    for what, command in commands.items():
        try:
            seconds, limit = medians(min(3, effort.repeats), started(command), started(python))
        except BenchmarkError as error:
            yield Row('start', what, None, limit_is=str(error))
        else:
            yield Row('start', what, 1000 * seconds, 'ms', 1000 * limit, 'Python doing nothing')


def reader_rows(_: argparse.Namespace, effort: Effort) -> Iterator[Row]:
    """GNT records, and their headers alone."""
    from gnt_reader import index_gnt, reading_speed

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, 'all.gnt')
        write_gnt(path, effort.records)
        records, plain = reading_speed(path, effort.repeats)
        yield Row('reader', 'GNT records with their images', records, 'MB/s', plain, 'plain reading')
        (seconds,) = medians(effort.repeats, lambda: index_gnt(path))
        speed = path.stat().st_size / seconds / 1e6
        yield Row('reader', 'GNT records, where each is', speed, 'MB/s', plain, 'plain reading')


def training_rows(options: argparse.Namespace, effort: Effort) -> Iterator[Row]:
    """Fed steps against bare ones, on all cores."""
    found = in_process(
        'training', core_counts()[-1], effort=asdict(effort), architecture=options.architecture, drawn=options.drawn
    )
    for row in found['rows']:
        yield Row('training', **row)


def peers_rows(options: argparse.Namespace, effort: Effort) -> Iterator[Row]:
    """Whoever is installed, on one core."""
    rows = in_process('peers', 1, model=options.model[0], repeats=min(3, effort.repeats))['rows']
    for row in rows:
        if 'error' in row:
            yield Row('peers', row['what'], None, limit_is=row['error'])
        else:
            what = f'{row["what"]}, one core, {row["right"]} of {row["of"]} right'
            yield Row('peers', what, row['ms'], 'ms', rows[0].get('ms'), Path(options.model[0]).name)
    if len(rows) == 1:
        yield Row('peers', 'others', None, limit_is='none is installed (rapidocr, pytesseract)')


ROWS: dict[str, Callable[[argparse.Namespace, Effort], Iterator[Row]]] = {
    'network': network_rows,
    'preparation': preparation_rows,
    'folder': folder_rows,
    'start': start_rows,
    'reader': reader_rows,
    'training': training_rows,
    'peers': peers_rows,
}


def _cores(count: int) -> str:
    return '1 core' if count == 1 else f'{count} cores'


# --- The table -------------------------------------------------------------------------------------------------------


def machine() -> dict[str, object]:
    """Return what the figures depend on: processor, cores, system, and versions of what is installed."""
    versions = {}
    for name in ('tensorflow', 'keras', 'ai-edge-litert', 'jax', 'torch', 'numpy', 'pillow', 'rapidocr', 'pytesseract'):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        'processor': _processor(),
        'cores': core_counts()[-1],
        'system': platform.platform(terse=True),
        'python': platform.python_version(),
        'versions': versions,
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path('/proc/cpuinfo').read_text(encoding='utf-8', errors='replace').splitlines():
            if line.startswith('model name'):
                return line.partition(':')[2].strip()
    return platform.processor() or platform.machine()


def number(value: float) -> str:
    """Return a figure with three digits that mean something."""
    return f'{value:,.0f}' if value >= 100 else f'{value:.3g}'


def table_line(row: Row) -> str:
    """Return the line of a row."""
    if row.value is None:
        return f'{row.section:12}{row.what:64}  not measured: {printable(row.limit_is)}'
    share = (
        '' if row.share is None else f'{number(100 * row.share):>6} % of {number(row.limit)} {row.unit}, {row.limit_is}'
    )
    return f'{row.section:12}{row.what:64}{number(row.value):>9} {row.unit:9} {share}'.rstrip()


# --- Command line ----------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument(
        '--only', nargs='+', choices=SECTIONS, metavar='SECTION', help=f'some of {", ".join(SECTIONS)} (default: all)'
    )
    p.add_argument('--model', nargs='+', metavar='FILE', help='model files (default: those beside this program)')
    p.add_argument('--json', metavar='FILE', help='also write the figures to a file (default: none)')
    p.add_argument('--quick', action='store_true', help='as little as shows that it works; the figures mean nothing')
    p.add_argument('--drawn', metavar='DIR', help='material of handwriting.py, to measure drawing too (default: none)')
    p.add_argument('--architecture', default='melnyk_net', metavar='NAME', help='what is trained (default: melnyk_net)')
    p.add_argument('--task', help=argparse.SUPPRESS)  # what `in_process` asks its process for
    return p


def shipped_models() -> list[str]:
    """Return the model files beside this program, the one that main.py would take before the others."""
    first = default_model()
    found = (path for path in HERE.glob('[!.]*') if path.suffix in ('.h5', '.tflite'))
    return [os.fspath(path) for path in sorted(found, key=lambda path: (path.name != first.name, path.name))]


def run_task(text: str) -> int:
    """Do a task that another process asks for; its result or its error is the last line of the output."""
    task, arguments = json.loads(text)
    try:
        result = TASKS[task](**arguments)
        print(json.dumps(result if isinstance(result, dict) else {'rows': result}))
    except Exception as error:  # whatever it is, the other process shows it in its table
        print(json.dumps({'error': ' '.join(str(error).split()) or type(error).__name__}))
        return 1
    return 0


def benchmark(options: argparse.Namespace) -> list[Row]:
    """Measure, print the table row by row, and return it."""
    about = machine()
    versions = ', '.join(f'{name} {version}' for name, version in about['versions'].items())
    print(f'{about["processor"]}, {_cores(about["cores"])}, {about["system"]}, Python {about["python"]}, {versions}')
    rows = []
    for section in options.only or SECTIONS:
        try:
            for row in ROWS[section](options, QUICK if options.quick else FULL):
                rows.append(row)
                print(table_line(row), flush=True)
        except BenchmarkError as error:
            rows.append(Row(section, 'all', None, limit_is=str(error)))
            print(table_line(rows[-1]), flush=True)
    if options.json:
        content = {
            'machine': about,
            'quick': options.quick,
            'rows': [asdict(row) | {'share': row.share} for row in rows],
        }
        with written_aside(options.json) as path:
            path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: What stands behind the program's name. Defaults to `sys.argv[1:]`.

    Returns:
        Exit status: 0; 1 if nothing could be measured or written; 130 on Ctrl-C.
    """
    options = parser().parse_args(arguments)
    if options.task:
        return run_task(options.task)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors='backslashreplace')
    options.model = options.model or shipped_models()
    if not options.model:
        print('benchmark.py: there is no model file beside this program; name one with --model', file=sys.stderr)
        return 1
    try:
        rows = benchmark(options)
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        print(f'benchmark.py: {printable(error)}', file=sys.stderr)
        return 1
    return 0 if any(row.value is not None for row in rows) else 1


if __name__ == '__main__':
    sys.exit(main())
