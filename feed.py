"""Feeds a training run: sources of samples, and worker processes that prepare batches ahead of the network.

Sample `i` of a source is a pure function of the source and `i`. So a run can be resumed at any sample, the number of
workers does not change what the network sees, and several machines share the work by each taking its rows of a batch.

The workers import neither Keras nor its backend: they are small, start at once, and leave the accelerator alone.
"""

import os
import pickle
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image

from data_utils import LABELS, ImageError, NoInkError, crop_to_ink, fit, network_input, open_image, printable
from gnt_reader import GntIndex, GntMember, GntReader, gnt_members, index_gnt, is_competition_file


class FeedError(RuntimeError):
    """A worker ended before its time, or the data cannot be used for training; the text says what to do next."""


class Batch(NamedTuple):
    """Samples for one training step."""

    images: np.ndarray
    """(n, 96, 96) uint8 network input: ink bright on 0."""
    labels: np.ndarray
    """(n,) int32 class indices."""
    trusted: np.ndarray
    """(n,) bool: False where the label does not say what the image shows, and only a teacher can."""


class Source(Protocol):
    """Anything that gives samples by their numbers. It is sent to the workers, so it has to be small when pickled."""

    def batch(self, indices: Sequence[int]) -> Batch: ...


# --- Sources ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DrawnSource:
    """Drawn handwriting without end, see `handwriting`.

    Args:
        folder: the material.
        seed: number of the endless set.
        trusted_only: whether every sample is to show what its label says; without a teacher it has to.
        strokes: more stroke skeletons, see `handwriting.Material.load`.
        stroke_share: share drawn from strokes, 0..1, the rest from fonts; None for `handwriting`'s own.
    """

    folder: Path
    seed: int = 0
    trusted_only: bool = False
    strokes: str | None = None
    stroke_share: float | None = None

    def load(self) -> None:
        """Read the material, so that what has to be rendered first is rendered once and not by every worker."""
        _material(self.folder, self.strokes)

    def files(self) -> list[tuple[str, int]]:
        """Return name and size of the files that the material is read from."""
        from handwriting import PACKAGES

        found = [path for package in PACKAGES if (path := package.find(self.folder))]
        return [(path.name, path.stat().st_size) for path in (*found, *([Path(self.strokes)] if self.strokes else ()))]

    def batch(self, indices: Sequence[int]) -> Batch:
        import handwriting

        options = handwriting.DrawingOptions()
        if self.trusted_only:
            options = replace(options, splice=0, distort=0)
        if self.stroke_share is not None:
            options = replace(options, stroke_share=self.stroke_share)
        return Batch(*handwriting.sample_batch(_material(self.folder, self.strokes), self.seed, indices, options))


@lru_cache(maxsize=1)
def _material(folder: Path, strokes: str | None):
    import handwriting

    return handwriting.Material.load(folder, strokes)


class _Passes:
    """What the sources of a given set share: they go through it pass after pass, each pass in a new order."""

    # Orders are kept for one pass, and left out when a source is pickled, like whatever else is cached.
    @cached_property
    def _orders(self) -> dict[int, np.ndarray]:
        return {}

    def __getstate__(self) -> dict:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def batch(self, indices: Sequence[int]) -> Batch:
        images, labels = zip(*(self._sample(int(i)) for i in indices), strict=True)
        return Batch(np.stack(images), np.array(labels, np.int32), np.ones(len(images), bool))

    def _sample(self, number: int) -> tuple[np.ndarray, int]:
        epoch, place = divmod(number, len(self))
        if epoch not in self._orders:
            self._orders.clear()
            self._orders[epoch] = self._order(np.random.default_rng([self.seed, epoch]))
        position = int(self._orders[epoch][place])
        image = self._image(position)
        if self.augment:
            image = augmented(image, np.random.default_rng([self.seed, number]))
        return image, int(self._labels[position])

    def _order(self, rng: np.random.Generator) -> np.ndarray:
        raise NotImplementedError

    def _image(self, position: int) -> np.ndarray:
        raise NotImplementedError


@dataclass(frozen=True)
class GntSource(_Passes):
    """Scanned samples of GNT files, pass after pass, each pass in a new order.

    Args:
        index: where the samples are.
        seed: of the orders and of the augmentation.
        augment: whether to turn, slant and stretch the samples a little.
    """

    index: GntIndex
    seed: int = 0
    augment: bool = False

    # The index of 2.7 million records has 50 MB: it is read from the files of the archive once, and then pickled.
    @cached_property
    def _reader(self) -> GntReader:
        return GntReader(self.index)

    @cached_property
    def _labels(self) -> np.ndarray:
        return self.index.labels()

    def __len__(self) -> int:
        return len(self.index)

    def _order(self, rng: np.random.Generator) -> np.ndarray:
        return self.index.shuffled(rng)

    def _image(self, position: int) -> np.ndarray:
        try:
            # Scans have white paper: the last two steps of what a user's picture goes through are enough.
            return fit(crop_to_ink(self._reader[position].image))
        except NoInkError:  # a blank record keeps its place, so that the numbers of the others stay
            return np.zeros((96, 96), np.uint8)


@dataclass(frozen=True)
class ImageSource(_Passes):
    """Pictures of single characters, pass after pass, each pass in a new order.

    Each is prepared as a user's picture is (`data_utils.network_input`), by whoever asks for it: the files stay as they
    are, and nothing is written.

    Args:
        files: The pictures.
        labels: (n,) int32 class indices.
        seed: Of the orders and of the augmentation.
        augment: Whether to turn, slant and stretch the samples a little.
    """

    files: tuple[str, ...]
    labels: np.ndarray
    seed: int = 0
    augment: bool = False

    def __len__(self) -> int:
        return len(self.files)

    @property
    def _labels(self) -> np.ndarray:
        return self.labels

    def _order(self, rng: np.random.Generator) -> np.ndarray:
        return rng.permutation(len(self.files))

    def _image(self, position: int) -> np.ndarray:
        try:
            return prepared_picture(self.files[position])
        except ImageError as error:
            raise FeedError(
                f'{printable(self.files[position])}: {error}; it could be read when the run began, so put it back, '
                'or start a new run without it'
            ) from error


# 75 MB a process. A photograph takes a hundred times as long to prepare as its sample takes to augment, so that the
# passes after the first cost nothing while the set is small.
@lru_cache(maxsize=8192)
def prepared_picture(file: str) -> np.ndarray:
    """Return what the network sees of a picture: (96, 96) uint8, ink bright on 0.

    Raises:
        ImageError: If it cannot be read, or nothing is written on it.
    """
    image = network_input(open_image(file))
    image.flags.writeable = False
    return image


@dataclass(frozen=True)
class PictureCheck:
    """Says of each of some files whether it is a picture that can be learned from: the `trusted` of its batches.

    Args:
        files: The pictures. The samples past the last are left out.
    """

    files: tuple[str, ...]

    def batch(self, indices: Sequence[int]) -> Batch:
        trusted = np.array([_is_readable(self.files[i]) for i in indices if i < len(self.files)], bool)
        return Batch(np.zeros((len(trusted), 0, 0), np.uint8), np.zeros(len(trusted), np.int32), trusted)


def _is_readable(file: str) -> bool:
    try:
        prepared_picture(file)
    except ImageError:
        return False
    return True


def unreadable_pictures(
    files: Sequence[str], workers: int | None = None, progress: Callable[[int], None] | None = None
) -> dict[str, str]:
    """Return the pictures that cannot be learned from, each with the reason, after a look at all of them.

    Args:
        files: The pictures.
        workers: See `Feed`.
        progress: Called now and then with the number of files looked at.
    """
    if not files:
        return {}
    readable: list[bool] = []
    with Feed(PictureCheck(tuple(files)), batch_size=32, workers=workers) as feed:
        while len(readable) < len(files):
            readable += next(feed).trusted.tolist()
            if progress:
                progress(len(readable))
    reasons = {}
    for file in (file for file, good in zip(files, readable, strict=True) if not good):
        try:
            prepared_picture(file)
        except ImageError as error:
            reasons[file] = str(error)
    return reasons


def augmented(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return a sample turned (σ 4°), slanted (σ 0.08) and stretched (σ 6 %), and fitted into its frame again.

    Args:
        image: (96, 96) uint8 network input.
        rng: source of the randomness.

    Returns:
        (96, 96) uint8 network input.
    """
    turn, slant = np.radians(4) * rng.standard_normal(), 0.08 * rng.standard_normal()
    stretch = np.exp(0.06 * rng.standard_normal(2))
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    back = np.linalg.inv(rotation @ np.array([[1, slant], [0, 1]]) @ np.diag(stretch))
    # Pillow asks where each pixel comes from; the page grows so that no corner is lost.
    old, new = len(image), round(1.4 * len(image))
    shift = np.full(2, old / 2) - back @ np.full(2, new / 2)
    coefficients = (*back[0], shift[0], *back[1], shift[1])
    page = Image.fromarray(image).transform((new, new), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)
    return fit(crop_to_ink(255 - np.asarray(page)), old) if page.getbbox() else image


@dataclass(frozen=True)
class MixedSource:
    """Two sources, one of them with a given share, dealt evenly.

    Args:
        first: its samples 0, 1, 2, … are dealt in order.
        second: likewise.
        share: of the first, 0..1.
    """

    first: Source
    second: Source
    share: float

    def batch(self, indices: Sequence[int]) -> Batch:
        indices = np.asarray(indices, np.int64)
        # ⌊i · share⌋ samples of the first come before sample i, as Bresenham draws a line.
        before = np.floor(indices * self.share).astype(np.int64)
        is_first = np.floor((indices + 1) * self.share).astype(np.int64) > before
        parts, places = [], []
        for source, chosen, numbers in (
            (self.first, is_first, before),
            (self.second, ~is_first, indices - before),
        ):
            if chosen.any():
                parts.append(source.batch(numbers[chosen]))
                places.append(np.flatnonzero(chosen))
        back = np.argsort(np.concatenate(places))
        return Batch(*(np.concatenate(column)[back] for column in zip(*parts, strict=True)))


def writers_of(index: GntIndex) -> np.ndarray:
    """Return who wrote the samples of an index, each once; a file without a sample in it does not count."""
    of_member = np.array([member.writer for member in index.members])
    return np.unique(of_member[np.unique(index.member)])


def split_by_writer(index: GntIndex, writers: int, seed: int = 0) -> tuple[GntIndex, GntIndex]:
    """Split an index in two that share no writer, so that validation measures unknown hands.

    Args:
        index: of the training files.
        writers: how many to set aside for validation; fewer than there are.
        seed: which ones.

    Returns:
        (training, validation)

    Raises:
        FeedError: If no writer would be left to train on.
    """
    names = writers_of(index)
    if writers >= len(names):
        raise FeedError(f'{writers} writers for validation leave none of {len(names)} to train on; use more files')
    aside = np.random.default_rng(seed).choice(names, writers, replace=False)
    validation = np.isin([member.writer for member in index.members], aside)[index.member]
    return index.select(~validation), index.select(validation)


def split_by_class(
    labels: np.ndarray, share: float, seed: int = 0, limit: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Split samples whose writers are unknown, the same share of each class.

    A class with at least two samples keeps at least one to learn from, and gives at least one to measure with; a class
    with a single one learns from it.

    Args:
        labels: (n,) class indices.
        share: Of each class, to measure with, 0..1; 0 leaves all to learn from.
        seed: Which ones.
        limit: Samples to learn from at most, spread over the classes. Defaults to all.

    Returns:
        (training, validation): positions in ascending order.
    """
    labels = np.asarray(labels)
    if not len(labels):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    order = np.random.default_rng(seed).permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind='stable')]
    count = np.bincount(labels)
    first = np.cumsum(count) - count
    rank = np.empty(len(labels), np.int64)  # of each sample among those of its class
    rank[by_class] = np.arange(len(labels)) - first[labels[by_class]]
    held = np.clip(np.round(count * share).astype(np.int64), 1 if share else 0, None)
    held = np.minimum(held, np.maximum(count - 1, 0))
    turn = rank - held[labels]  # negative: to measure with
    training = order[np.argsort(turn[order], kind='stable')][np.count_nonzero(turn < 0) :]
    return np.sort(training[:limit]), np.flatnonzero(turn < 0)


def name_of(labels: Sequence[str]) -> str:
    """Return in a few words which characters these are."""
    if tuple(labels) == LABELS:
        return 'the 3755 of GB2312 level 1'
    return f'{len(labels)}: {"".join(labels[:20])}{"…" if len(labels) > 20 else ""}'


def refuse_competition(paths: Iterable[str | os.PathLike]) -> list[GntMember]:
    """Return the files of records at the paths, none of them of the ICDAR-2013 competition.

    Raises:
        FeedError: If one of them is.
        GntError: If a path holds no GNT.
    """
    members = gnt_members(paths)
    competition = [member for member in members if member.is_competition]
    if competition:
        raise FeedError(
            f'{competition[0]}: {len(competition)} file(s) of the ICDAR-2013 competition, the test set of every '
            'published result, which must not train or choose a model; leave them out (evaluate.py measures with them)'
        )
    return members


def refuse_competition_pictures(files: Iterable[str | os.PathLike]) -> None:
    """Do as `refuse_competition` does, with pictures that `gnt_reader.py export` has named after their GNT file.

    Raises:
        FeedError: If one of them is of the competition.
    """
    competition = [file for file in files if is_competition_file(file)]
    if competition:
        raise FeedError(
            f'{printable(competition[0])}: {len(competition)} picture(s) named after files of the ICDAR-2013 '
            'competition, the test set of every published result, which must not train or choose a model; leave them '
            'out, or rename them if they are none'
        )


def training_index(paths: Sequence[str | os.PathLike]) -> GntIndex:
    """Index GNT files for training: level 1 only, and never a file of the ICDAR-2013 competition.

    Args:
        paths: GNT files, zip archives and folders.

    Returns:
        A `GntIndex`.

    Raises:
        FeedError: If a competition file is among them, or no sample of the 3755 characters.
        GntError: If a file cannot be read.
    """
    members = refuse_competition(paths)
    index = index_gnt(members)
    if not len(index):
        raise FeedError(f'{len(members)} GNT file(s) hold no sample of the 3755 characters; give other files')
    return index


# --- Workers ---------------------------------------------------------------------------------------------------------


class Feed:
    """Batches in order, prepared ahead by worker processes.

    Batch `n` holds the samples `n · batch_size … (n + 1) · batch_size − 1`, whatever the number of workers. A worker
    writes its batches to a pipe and waits while it is full. When this process ends, in whatever way, the pipe breaks
    and the worker ends too.

    Args:
        source: where the samples come from.
        batch_size: samples in a batch.
        start: number of the first batch.
        workers: worker processes. Defaults to one fewer than there are processors.
        rows: (first, last + 1) of the rows of each batch to prepare, for one of several machines. Defaults to all.
        ahead: batches to hold ready.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int,
        start: int = 0,
        workers: int | None = None,
        rows: tuple[int, int] | None = None,
        ahead: int = 4,
    ):
        count = workers or max(1, (os.cpu_count() or 2) - 1)
        # A worker is one thread: numerical libraries that start more would fight with the network for the processor.
        environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'OPENBLAS_NUM_THREADS': '1', 'MKL_NUM_THREADS': '1'}
        self._workers = []
        self._ready: queue.Queue = queue.Queue(ahead)
        self._closed = False
        for worker in range(count):
            process = subprocess.Popen(
                [sys.executable, os.fspath(Path(__file__).resolve())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                start_new_session=True,  # Ctrl-C is for this process; the workers end when it does
            )
            self._workers.append(process)
            pickle.dump((source, batch_size, rows or (0, batch_size), start + worker, count), process.stdin)
            process.stdin.close()
        threading.Thread(target=self._read_ahead, daemon=True).start()

    def _read_ahead(self) -> None:
        number = 0
        while not self._closed:
            worker = self._workers[number % len(self._workers)]
            try:
                item = pickle.load(worker.stdout)
            except (EOFError, pickle.UnpicklingError, ValueError, OSError):
                item = FeedError(
                    f'a worker process ended with status {worker.wait()}; start the run again with --resume'
                )
            self._ready.put(item)
            if isinstance(item, Exception):
                return
            number += 1

    def __iter__(self) -> 'Feed':
        return self

    def __next__(self) -> Batch:
        item = self._ready.get()
        if isinstance(item, Exception):
            raise item
        return Batch(*item)

    def __enter__(self) -> 'Feed':
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers."""
        self._closed = True
        for process in self._workers:
            process.kill()
            process.wait()
        while not self._ready.empty():  # lets the reading thread go, if it waits for room
            self._ready.get_nowait()


def work() -> int:
    """Be a worker: read the job from stdin, write batches to stdout until the reader is gone."""
    # Its own descriptor, so that no library's message gets between the batches.
    out = os.fdopen(os.dup(sys.stdout.fileno()), 'wb')
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    source, batch_size, (first, last), number, stride = pickle.load(sys.stdin.buffer)
    try:
        while True:
            try:
                item = tuple(source.batch(range(number * batch_size + first, number * batch_size + last)))
            except Exception as error:
                item = error
            pickle.dump(item, out, protocol=5)
            out.flush()
            if isinstance(item, Exception):
                return 1
            number += stride
    except BrokenPipeError:
        os._exit(0)  # the run is over; nothing to flush and nobody to tell


if __name__ == '__main__':
    # What was pickled names its classes by the module `feed`, not `__main__`.
    from feed import work as _work

    sys.exit(_work())
