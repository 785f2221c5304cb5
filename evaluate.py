"""Measures a model on labelled samples: how often it is right, how well it knows that, and where it goes wrong.

    python evaluate.py --model melnyk_net.h5 samples.npz              arrays, see below
    python evaluate.py --model melnyk_net.h5 competition-gnt.zip      GNT files, folders or archives
    python evaluate.py --model melnyk_net.h5 images/                  pictures named by their character, or in folders
    python evaluate.py --model melnyk_net.h5 samples.npz --fit-temperature calibrated.h5
    python evaluate.py --model melnyk_net.h5 samples.npz --papers     the same scans on coloured, ruled, shaded … paper
    python evaluate.py --benchmark mnist.npz --epochs 5               the architecture on MNIST or Fashion-MNIST

An npz file has `images`, (n, height, width) uint8, scans with the ink dark on white paper, 255; `chars`, (n,) texts,
the character of each; and it may have `writers`, (n,) texts.

The figures go to stdout. The folder of --out receives summary.json, writers.csv, classes.csv, confused.csv,
reliability.png and mistakes.png (the worst ones: wrong, and sure of it).

Three figures count every class alike, however many samples it has; they are means over the classes with samples:
    macro_recall              the share of a class's samples that is answered rightly
    macro_f1                  2 · right / (samples + times answered), the harmonic mean of a class's recall and
                              precision (the mean of the F1 scores, not the F1 score of two means: J. Opitz and
                              S. Burst, "Macro F1 and Macro F1", arXiv 1911.03347)
    mean_average_precision    one class against the rest: all samples are ranked by the probability of that class, and
                              average precision is Σ (Rₙ − Rₙ₋₁) Pₙ over the recalls R and precisions P of the ranking
                              as it grows, not interpolated (C. Manning, P. Raghavan and H. Schütze, "Introduction to
                              Information Retrieval", 2008, section 8.4); equal samples enter together
"""

import argparse
import contextlib
import csv
import gzip
import heapq
import json
import os
import re
import sys
import unicodedata
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from command_line import make_folder, message, quiet_libraries, whole_number
from data_utils import (
    LABEL_INDEX,
    LABELS,
    ImageError,
    NoInkError,
    crop_to_ink,
    find_images,
    fit,
    network_input,
    open_image,
    printable,
    written_aside,
)
from gnt_reader import GntError, folder_character, gnt_members, read_gnt

BINS = 15  # of the calibration: Guo et al., "On calibration of modern neural networks", ICML 2017
TOP = 10  # candidates that are kept of each sample
CHUNK = 1024  # samples in memory at a time
GALLERY = 96  # mistakes in the picture
FITTED = 20_000  # samples that the temperature is fitted to, of which all log-probabilities are kept: 15 KB each


class DataError(ValueError):
    """Samples that cannot be measured with; the text says which and what to do next."""


class Samples(NamedTuple):
    """Labelled samples."""

    images: np.ndarray
    """(n, size, size) uint8 network input: ink bright on 0."""
    labels: np.ndarray
    """(n,) int32 class indices."""
    writers: np.ndarray
    """(n,) str: who wrote it, '' where unknown."""


# --- Reading labelled samples ----------------------------------------------------------------------------------------


def iterate_samples(
    paths: Iterable[str | Path],
    size: int = 96,
    report: Callable[[str], None] | None = None,
    labels: Sequence[str] = LABELS,
) -> Iterator[Samples]:
    """Read labelled samples of any kind, some at a time, so that memory stays bounded.

    Args:
        paths: `.npz` files; `.gnt` files, `.zip` archives of them and folders that hold some; folders and files of
            pictures, whose character is the name of their folder or begins their own name (`鲍.png`, `鲍_2.png`).
        size: Side of the network input.
        report: Called with a text about each source of which something was left out. Defaults to silence.
        labels: The characters of the classes; samples of others are left out. Defaults to the 3755.

    Yields:
        `Samples`, at most 1024 at a time.

    Raises:
        DataError, GntError, FileNotFoundError: If a source cannot be used.
    """
    index = _class_index(labels)
    for path in map(Path, paths):
        left_out, images, classes, writers = Counter(), [], [], []
        for image, character, writer in _read(path.expanduser(), size, left_out, index):
            images.append(image)
            classes.append(index[character])
            writers.append(writer)
            if len(images) == CHUNK:
                yield _samples(images, classes, writers)
                images, classes, writers = [], [], []
        if images:
            yield _samples(images, classes, writers)
        if left_out and report:
            report(f'{path}: left out {", ".join(f"{count} {why}" for why, count in left_out.items())}')


def _class_index(labels: Sequence[str]) -> dict[str, int]:
    return LABEL_INDEX if tuple(labels) == LABELS else {character: i for i, character in enumerate(labels)}


def _samples(images, classes, writers) -> Samples:
    return Samples(np.stack(images), np.array(classes, np.int32), np.array(writers))


def read_samples(paths: Iterable[str | Path], size: int = 96, labels: Sequence[str] = LABELS) -> Samples:
    """Read labelled samples of any kind at once; see `iterate_samples`.

    Raises:
        DataError: Also if there are none.
    """
    paths = list(paths)
    chunks = list(iterate_samples(paths, size, labels=labels))
    if not chunks:
        raise DataError(f'{", ".join(map(str, paths))}: no sample of the {len(labels)} characters; give other data')
    return Samples(*(np.concatenate(column) for column in zip(*chunks, strict=True)))


def _read(path: Path, size: int, left_out: Counter, known: Container[str]) -> Iterator[tuple[np.ndarray, str, str]]:
    """Give (network input, character, writer) of each sample of one source whose character is known."""
    if path.suffix.lower() != '.npz' and not holds_gnt(path):
        yield from _pictures(path, size, left_out, known)
        return
    # Scans have white paper: only the last two steps of what a picture goes through.
    for image, character, writer in _scans(path, known):
        if character not in known:
            left_out['of other characters'] += 1
            continue
        try:
            yield fit(crop_to_ink(image), size), character, writer
        except NoInkError:
            left_out['blank'] += 1


def _scans(path: Path, known: Container[str]) -> Iterator[tuple[np.ndarray, str | None, str]]:
    """Give (gray scan, character, writer) of each sample of an npz or GNT source."""
    if path.suffix.lower() == '.npz':
        yield from _npz(path)
        return
    if not holds_gnt(path):
        raise DataError(f'{path}: pictures have a paper of their own; give scans, as npz or GNT data')
    level1_only = known is LABEL_INDEX  # the reader skips the others faster
    for member in gnt_members(path):
        for record in read_gnt(member, level1_only):
            yield record.image, record.character, member.writer


def _npz(path: Path) -> Iterator[tuple[np.ndarray, str, str]]:
    with _readable(path, 'arrays `images` and `chars` are expected'), np.load(path) as data:
        images, characters = data['images'], data['chars']
        writers = data['writers'] if 'writers' in data else np.full(characters.shape, '')
    if images.ndim != 3 or images.dtype != np.uint8 or not images.shape[:1] == characters.shape == writers.shape:
        raise DataError(
            f'{path}: `images` is (n, height, width) uint8 on white paper, and `chars` and `writers` are as long; '
            f'received {images.dtype} {images.shape}, {characters.shape} and {writers.shape}'
        )
    if _on_black(images):
        raise DataError(
            f'{path}: the ink is bright on black, as in network inputs; `images` are scans, the ink dark on white '
            'paper, 255: give 255 - images'
        )
    return zip(images, map(str, characters), map(str, writers), strict=True)


@contextlib.contextmanager
def _readable(path: Path, expected: str) -> Iterator[None]:
    """Say in one line that a file is missing, damaged or another than expected, whatever NumPy says of it."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f'{path}: {error.strerror or error}') from error
    except (
        *(OSError, EOFError, ValueError, TypeError, LookupError, MemoryError, NotImplementedError),
        *(zipfile.BadZipFile, zlib.error),
    ) as error:
        raise DataError(f'{path}: {expected} ({str(error) or type(error).__name__})') from error


def _on_black(images: np.ndarray) -> bool:
    """Whether most images (n, height, width) have a border of which most is 0."""
    if not images.size:
        return False
    edges = np.concatenate((images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]), axis=1)
    return np.mean((edges == 0).mean(axis=1) > 0.5) > 0.5


def holds_gnt(path: Path) -> bool:
    """Whether a path is read as GNT: a `.gnt` or `.zip` file, or a folder that holds GNT, unpacked or in an archive.

    So is a folder that has archives without GNT and no pictures: the reader says what is wrong with them.
    """
    if not path.is_dir():
        return path.suffix.lower() in ('.gnt', '.zip')
    try:
        members = gnt_members(path, strict=False, on_error=lambda error: None)
    except GntError:
        return False
    return bool(members or not find_images([path]))


def _pictures(path: Path, size: int, left_out: Counter, known: Container[str]) -> Iterator[tuple[np.ndarray, str, str]]:
    for file in find_images([path]):
        character = named_character(file, known)
        if character is None:
            other = named_character(file, None) is not None
            left_out['of other characters' if other else 'without a character in their name'] += 1
            continue
        try:
            yield network_input(open_image(file), size=size), character, ''
        except ImageError:
            left_out['unreadable'] += 1


def named_character(file: Path, known: Container[str] | None = LABEL_INDEX) -> str | None:
    """Return the character that a picture is named by: its folder's, else the first of its own name, or None.

    `鲍/0017.png` and `B1AB/0017.png` (as `gnt_reader.py export` names them), `鲍.png`, `鲍_2.png`. A digit, or a letter
    with a case, names a folder only (`7/0017.png`): the numbers of scans are no labels.

    Args:
        file: Its path.
        known: The characters that count. Defaults to the 3755. `None` takes any that a folder or a file is named by.
    """
    name = file.parent.name
    # An export writes codes with capital letters; `face` and `cafe` are words.
    folder = folder_character(name) if len(name) == 1 or name == name.upper() else None
    first = re.match(r'(.)(?![^\W\d_])', file.stem)  # not the first letter of a longer word
    own = first[1] if first and _is_ideograph(first[1]) else None
    if known is not None:
        return next((c for c in (folder, own) if c is not None and c in known), None)
    return folder if own is None or (folder and _is_ideograph(folder)) else own


def _is_ideograph(character: str) -> bool:
    return unicodedata.category(character) == 'Lo'  # letters without a case: kana and other scripts, too


def labelled_pictures(paths: Iterable[str | Path]) -> list[tuple[Path, str | None]]:
    """Return the pictures at some paths, each with the character that it is named by, of any kind, or None.

    Raises:
        FileNotFoundError: If there is no such path.
    """
    return [(file, named_character(file, None)) for file in find_images(paths)]


# --- Measures --------------------------------------------------------------------------------------------------------


@dataclass
class Answers:
    """What a model answered to n labelled samples.

    Attributes:
        labels: (n,) int32 class indices.
        writers: (n,) str.
        ranks: (n,) int32: how many classes were likelier than the true one; 0 is a right answer.
        best: (n,) int32: the class of the first answer; the true one only if no other is as likely.
        confidence: (n,) float32: its probability.
        true_probability: (n,) float32: the probability of the true class.
    """

    labels: np.ndarray
    writers: np.ndarray
    ranks: np.ndarray
    best: np.ndarray
    confidence: np.ndarray
    true_probability: np.ndarray

    @classmethod
    def of(cls, probabilities: np.ndarray, labels: np.ndarray, writers: np.ndarray) -> 'Answers':
        """Reduce (n, classes) probabilities to what is measured."""
        rows = np.arange(len(labels))
        true = probabilities[rows, labels]
        best = probabilities.argmax(axis=1).astype(np.int32)
        # A class as likely as the true one counts before it, unless it is the true one: no credit for constant output.
        ranks = (probabilities >= true[:, None]).sum(axis=1).astype(np.int32) - 1
        tied = np.flatnonzero((best == labels) & (ranks > 0))
        others = probabilities[tied]
        others[np.arange(len(tied)), labels[tied]] = -np.inf
        best[tied] = others.argmax(axis=1)
        return cls(labels, writers, ranks, best, probabilities[rows, best], true)

    @classmethod
    def joined(cls, parts: Sequence['Answers']) -> 'Answers':
        """Join the answers to several batches."""
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in cls.__dataclass_fields__))

    def select(self, which: np.ndarray) -> 'Answers':
        """Return the answers to some of the samples."""
        return Answers(*(getattr(self, name)[which] for name in self.__dataclass_fields__))

    def top(self, k: int) -> float:
        """Return the share of samples whose true class is among the first k, 0..1."""
        return float((self.ranks < k).mean())

    @property
    def is_right(self) -> np.ndarray:
        return self.ranks == 0


@dataclass(frozen=True)
class Reliability:
    """How confidence and accuracy go together, in bins of equal width of the confidence."""

    count: np.ndarray
    """(bins,) int: samples in a bin."""
    confidence: np.ndarray
    """(bins,) mean confidence; 0 where the bin is empty."""
    accuracy: np.ndarray
    """(bins,) share that is right; 0 where the bin is empty."""

    @property
    def expected_error(self) -> float:
        """The expected calibration error: the mean distance of the two over all samples, 0..1."""
        return float(np.sum(self.count * np.abs(self.confidence - self.accuracy)) / max(1, self.count.sum()))


def reliability(confidence: np.ndarray, is_right: np.ndarray, bins: int = BINS) -> Reliability:
    """Bin answers by their confidence.

    Args:
        confidence: (n,) 0..1.
        is_right: (n,) bool.
        bins: number of bins of equal width; a bin holds its upper edge.
    """
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    count = np.bincount(place, minlength=bins)
    full = np.maximum(count, 1)
    return Reliability(
        count,
        np.bincount(place, confidence, bins) / full,
        np.bincount(place, is_right.astype(float), bins) / full,
    )


def fit_temperature(log_probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Return the temperature that makes the labels likeliest: logits divided by it, before the softmax.

    The likelihood has one maximum in the temperature, so a golden-section search finds it.

    Args:
        log_probabilities: (n, classes) float32 at temperature 1, each row up to a constant.
        labels: (n,) class indices.

    Returns:
        A number from 0.05 to 20, to 0.1 %.
    """
    shifted = log_probabilities - log_probabilities.max(axis=1, keepdims=True)
    true = shifted[np.arange(len(labels)), labels]

    def loss(log_temperature: float) -> float:
        inverse = np.exp(-log_temperature)
        return float(np.mean(np.log(np.exp(shifted * np.float32(inverse)).sum(axis=1)) - true * inverse))

    low, high = np.log(0.05), np.log(20.0)
    golden = (np.sqrt(5) - 1) / 2
    while high - low > 1e-3:
        left, right = high - golden * (high - low), low + golden * (high - low)
        if loss(left) < loss(right):
            high = right
        else:
            low = left
    return float(np.exp((low + high) / 2))


def confused_pairs(answers: Answers, labels: Sequence[str]) -> list[tuple[str, str, int]]:
    """Return (true character, answer, how often) of the mistakes, commonest first."""
    wrong = ~answers.is_right
    pairs = Counter(zip(answers.labels[wrong].tolist(), answers.best[wrong].tolist(), strict=True))
    return [(labels[true], labels[answer], count) for (true, answer), count in pairs.most_common()]


def by_writer(answers: Answers) -> list[dict]:
    """Return one row a writer: samples and top-1, top-5, top-10 accuracy."""
    rows = []
    for writer in np.unique(answers.writers):
        mine = answers.select(answers.writers == writer)
        rows.append({'writer': str(writer), 'samples': len(mine.labels), **accuracies(mine)})
    return rows


class ClassCounts(NamedTuple):
    """How the answers spread over the classes."""

    samples: np.ndarray
    """(classes,) int: samples of the class."""
    right: np.ndarray
    """(classes,) int: those that were answered rightly."""
    answered: np.ndarray
    """(classes,) int: how often it was the answer."""

    @classmethod
    def of(cls, answers: Answers, num_classes: int = 0) -> 'ClassCounts':
        """Count; there may be more classes than the answers name."""
        classes = max(num_classes, 1 + max(answers.labels.max(initial=-1), answers.best.max(initial=-1)))
        return cls(
            np.bincount(answers.labels, minlength=classes),
            np.bincount(answers.labels, answers.is_right, classes).astype(int),
            np.bincount(answers.best, minlength=classes),
        )

    @property
    def recall(self) -> np.ndarray:
        """(classes,) 0..1; 0 where there are no samples."""
        return self.right / np.maximum(self.samples, 1)

    @property
    def f1(self) -> np.ndarray:
        """(classes,) 0..1: 2 · right / (samples + answered)."""
        return 2 * self.right / np.maximum(self.samples + self.answered, 1)


class ClassRanking:
    """Average precision of each class, one against the rest, over any number of samples in bounded memory.

    It needs the probability of every class for every sample: 1.7 GB in float16 for the 224,419 samples of ICDAR-2013.
    Here, each class has a histogram instead, 4 bytes a bin: 31 MB for 3755 classes, whatever the number of samples.
    Scores are told apart where their odds p / (1 − p) differ by 1.6 %, from 1e-7 to 1e7; closer ones rank as equal.

    Args:
        num_classes: Of the model.
    """

    BINS = 2048
    LIMIT = 16.0  # of the logit, either way: beyond, float32 has no digits left for 1 − p

    def __init__(self, num_classes: int):
        self._counts = np.zeros((num_classes, self.BINS), np.uint32)  # of all samples, without those in bin 0
        self._true: list[tuple[np.ndarray, np.ndarray]] = []  # (labels, bins of the true class)

    def add(self, probabilities: np.ndarray, labels: np.ndarray) -> None:
        """Take samples into account: probabilities (n, classes) float32, and (n,) class indices."""
        # Nearly all probabilities lie in the lowest bin, which nobody ranks below: they need no counting.
        rows, classes = np.nonzero(probabilities > 1 / (1 + np.exp(self.LIMIT)))
        np.add.at(self._counts, (classes, self._bins(probabilities[rows, classes])), 1)
        self._true.append((np.array(labels), self._bins(probabilities[np.arange(len(labels)), labels])))

    def _bins(self, scores: np.ndarray) -> np.ndarray:
        scores = scores.astype(np.float64)
        with np.errstate(divide='ignore'):
            logits = np.log(scores) - np.log1p(-np.minimum(scores, 1))
        places = (np.clip(logits, -self.LIMIT, self.LIMIT) + self.LIMIT) * (self.BINS / (2 * self.LIMIT))
        return np.minimum(places.astype(np.int32), self.BINS - 1)

    def average_precisions(self) -> np.ndarray:
        """Return (classes,) float64, 0..1; NaN where a class has no samples."""
        labels, bins = (np.concatenate(column) for column in zip(*self._true, strict=True))
        result = np.full(len(self._counts), np.nan)
        order = np.argsort(labels, kind='stable')
        classes, starts = np.unique(labels[order], return_index=True)
        for number, mine in zip(classes, np.split(bins[order], starts[1:]), strict=True):
            positives = np.bincount(mine, minlength=self.BINS)[::-1]
            everything = self._counts[number, ::-1].astype(np.int64)
            everything[-1] = len(labels) - everything[:-1].sum()
            precision = np.cumsum(positives) / np.maximum(np.cumsum(everything), 1)
            result[number] = np.sum(positives * precision) / len(mine)
        return result


def by_class(answers: Answers, labels: Sequence[str], average_precisions: np.ndarray | None = None) -> list[dict]:
    """Return one row a class: how many samples were right, how often it was answered, and with what confidence."""
    counts = ClassCounts.of(answers, len(labels))
    samples, right, answered = counts
    probability = np.bincount(answers.labels, answers.true_probability, len(labels))
    return [
        {
            'character': labels[i],
            'samples': int(samples[i]),
            'right': int(right[i]),
            'answered': int(answered[i]),
            'recall': f'{counts.recall[i]:.4f}',
            'precision': f'{right[i] / answered[i]:.4f}' if answered[i] else '',
            'f1': f'{counts.f1[i]:.4f}',
            'average_precision': '' if average_precisions is None else f'{average_precisions[i]:.4f}',
            'mean_probability': f'{probability[i] / samples[i]:.4f}',
        }
        for i in np.flatnonzero(samples)
    ]


def accuracies(answers: Answers) -> dict[str, float]:
    """Return top-1, top-5 and top-10 accuracy, 0..1."""
    return {f'top{k}': round(answers.top(k), 5) for k in (1, 5, TOP)}


def summary(answers: Answers, average_precisions: np.ndarray | None = None) -> dict[str, float]:
    """Return the figures of a model in one row; those that count every class alike are defined at the top."""
    counts = ClassCounts.of(answers)
    has_samples = counts.samples > 0
    macro = {
        'macro_recall': round(float(counts.recall[has_samples].mean()), 5),
        'macro_f1': round(float(counts.f1[has_samples].mean()), 5),
    }
    if average_precisions is not None:
        macro['mean_average_precision'] = round(float(np.nanmean(average_precisions)), 5)
    return {
        'samples': len(answers.labels),
        **accuracies(answers),
        **macro,
        'mean_confidence': round(float(answers.confidence.mean()), 5),
        'expected_calibration_error': round(reliability(answers.confidence, answers.is_right).expected_error, 5),
        'log_loss': round(float(-np.log(np.maximum(answers.true_probability, 1e-12)).mean()), 5),
    }


# --- Measuring a model -----------------------------------------------------------------------------------------------


@dataclass
class Gallery:
    """The worst mistakes so far: those that the model was surest of."""

    size: int = GALLERY
    _heap: list = field(default_factory=list)
    _seen: int = 0

    def add(self, answers: Answers, images: np.ndarray) -> None:
        for i in np.flatnonzero(~answers.is_right):
            self._seen += 1  # decides between equals, as images cannot be compared
            item = (float(answers.confidence[i]), -self._seen, int(answers.labels[i]), int(answers.best[i]), images[i])
            heapq.heappush(self._heap, item)
            if len(self._heap) > self.size:
                heapq.heappop(self._heap)

    def items(self) -> list[tuple[float, int, int, np.ndarray]]:
        """Return (confidence, true class, answer, image), the surest first."""
        return [(item[0], *item[2:]) for item in sorted(self._heap, key=lambda item: item[:2], reverse=True)]


def measure(recogniser, chunks: Iterable[Samples], ranking: ClassRanking | None = None) -> tuple[Answers, Gallery]:
    """Let a model answer.

    Args:
        recogniser: An `hccr.HCCR`.
        chunks: The samples.
        ranking: Given all samples, where average precisions are wanted.

    Returns:
        The answers, and the worst mistakes.

    Raises:
        DataError: If there are no samples.
    """
    parts, gallery = [], Gallery()
    for chunk in chunks:
        probabilities = recogniser.probabilities(chunk.images)
        part = Answers.of(probabilities, chunk.labels, chunk.writers)
        gallery.add(part, chunk.images)
        parts.append(part)
        if ranking is not None:
            ranking.add(probabilities, chunk.labels)
    if not parts:
        raise DataError(f'no sample of the {len(recogniser.labels)} characters; give other data')
    return Answers.joined(parts), gallery


def drawn_by_lot(chunks: Iterable[Samples], count: int, seed: int = 0) -> Samples:
    """Return `count` of the samples, or all if they are fewer, each as likely as any other.

    Sources come by writer or by character, so the first ones would not stand for all. The samples are read once, and
    no more than `count` are in memory (J. S. Vitter, "Random sampling with a reservoir", 1985, algorithm R).

    Raises:
        DataError: If there are no samples.
    """
    rng = np.random.default_rng(seed)
    kept, seen = [], 0
    for chunk in chunks:
        for image, label, writer in zip(*chunk, strict=True):
            place = seen if seen < count else int(rng.integers(seen + 1))
            seen += 1
            if place < count:
                kept[place : place + 1] = [(image.copy(), label, writer)]  # else it would keep its chunk in memory
    if not kept:
        raise DataError('no sample of the characters of the model; give other data')
    return _samples(*zip(*kept, strict=True))


def fitted_temperature(recogniser, samples: Samples) -> float:
    """Return the temperature that calibrates a model on some samples, see `fit_temperature`."""
    shipped, recogniser.temperature = recogniser.temperature, 1.0
    try:
        logs = [
            np.log(np.maximum(recogniser.probabilities(samples.images[at : at + CHUNK]), np.finfo(np.float32).tiny))
            for at in range(0, len(samples.images), CHUNK)
        ]
    finally:
        recogniser.temperature = shipped
    return fit_temperature(np.concatenate(logs), samples.labels)


def load(options: argparse.Namespace):
    """Return the `hccr.HCCR` that the command line asks for."""
    with quiet_libraries():
        from hccr import HCCR

        recogniser = HCCR(options.model, precision=options.precision)
        recogniser.warm_up()
    return recogniser


def evaluate(options: argparse.Namespace) -> None:
    """Measure a model file on data, print the figures and write the folder of files."""
    out, target = Path(options.out), options.fit_temperature
    recogniser = load(options)
    labels = recogniser.labels
    if target and recogniser.model is None:
        raise DataError(f'{options.model}: only .h5 files are saved with another temperature; export that again')
    make_folder(out, '--out')  # before anything is measured for nothing

    def chunks() -> Iterator[Samples]:
        count = 0
        for chunk in iterate_samples(
            options.data, recogniser.size, lambda text: print(f'\r{printable(text)}', file=sys.stderr), labels
        ):
            yield chunk
            count += len(chunk.labels)
            print(f'\r{count:,} samples', end='', file=sys.stderr, flush=True)
        print(file=sys.stderr)

    if target is not None:
        chosen = drawn_by_lot(chunks(), FITTED)
        shipped, recogniser.temperature = recogniser.temperature, fitted_temperature(recogniser, chosen)
        count = len(chosen.labels)
        print(f'temperature {recogniser.temperature:.3f} (the file has {shipped:.3f}), fitted to {count:,} samples')
    ranking = ClassRanking(len(labels))
    answers, gallery = measure(recogniser, chunks(), ranking)
    precisions = ranking.average_precisions()

    print('  '.join(f'{name} {value}' for name, value in summary(answers, precisions).items()))
    for row in by_writer(answers):
        if row['writer']:
            print('  '.join(f'{name} {printable(value)}' for name, value in row.items()))
    pairs = confused_pairs(answers, labels)
    print('most confused:', '  '.join(f'{true}→{answer} ×{count}' for true, answer, count in pairs[:20]))

    about = {'model': str(options.model), 'data': options.data}
    write_report(out, answers, gallery, labels, about, precisions)
    print(f'details: {printable(out)}')
    if target:
        from melnyk_net import save_model

        save_model(recogniser.model, target, labels, recogniser.temperature, recogniser.info.note, options.half)
        print(f'saved with this temperature: {printable(target)}')


def measure_on_papers(options: argparse.Namespace) -> None:
    """Measure and print how well a model reads the same scans on other papers, prepared as a user's pictures are."""
    from papers import PAPERS

    recogniser = load(options)
    index = _class_index(recogniser.labels)
    scans, blank = [], 0
    for source in map(Path, options.data):
        for image, character, _ in _scans(source.expanduser(), index):
            if character not in index:
                continue
            try:
                scans.append((crop_to_ink(image), index[character]))
            except NoInkError:
                blank += 1
    if blank:
        print(f'left out {blank:,} blank', file=sys.stderr)
    if not scans:
        raise DataError(f'no scan of the {len(index)} characters; give npz or GNT data')
    # Evenly over all of them, since sources are in the order of the characters.
    scans = scans[:: -(-len(scans) // options.papers)]
    labels = np.array([label for _, label in scans])
    print(f'{len(scans):,} samples of each paper\ntop-1    top-5    paper')
    for name, paper in PAPERS.items():
        right = np.zeros(2)
        for start in range(0, len(scans), CHUNK):
            images = [_prepared(paper(ink), recogniser.size) for ink, _ in scans[start : start + CHUNK]]
            probabilities = recogniser.probabilities(np.stack(images))
            answers = Answers.of(probabilities, labels[start : start + CHUNK], np.full(len(images), ''))
            right += len(images) * answers.top(1), len(images) * answers.top(5)
        top_1, top_5 = 100 * right / len(scans)
        print(f'{top_1:5.2f} %  {top_5:5.2f} %  {name}', flush=True)


def _prepared(picture: np.ndarray, size: int) -> np.ndarray:
    try:
        return network_input(picture, size=size)
    except NoInkError:
        return np.zeros((size, size), np.uint8)  # nothing found: counts as read wrong


# --- The report ------------------------------------------------------------------------------------------------------


def write_report(
    folder: Path,
    answers: Answers,
    gallery: Gallery,
    labels: Sequence[str],
    about: dict,
    average_precisions: np.ndarray | None = None,
) -> None:
    """Write the tables and figures of an evaluation into a folder that is there; see the module's text."""
    import figures

    row = about | summary(answers, average_precisions)
    with written_aside(folder / 'summary.json') as path:
        path.write_text(json.dumps(row, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')
    _write_table(folder / 'writers.csv', by_writer(answers))
    _write_table(folder / 'classes.csv', by_class(answers, labels, average_precisions))
    pairs = confused_pairs(answers, labels)
    _write_table(folder / 'confused.csv', [dict(zip(('true', 'answer', 'count'), pair, strict=True)) for pair in pairs])
    try:
        figures.save(reliability_figure(answers), folder / 'reliability.png')
        if worst := gallery.items():
            figures.save(mistakes_figure(worst, labels), folder / 'mistakes.png')
    except ModuleNotFoundError as error:  # a light installation has no matplotlib
        print(f'no figures: {message(error)}', file=sys.stderr)


def _write_table(path: Path, rows: list[dict]) -> None:
    with written_aside(path) as aside, aside.open('w', newline='', encoding='utf-8') as file:
        if rows:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def reliability_figure(answers: Answers):
    """Draw accuracy against confidence, and how many answers have which confidence."""
    from matplotlib.figure import Figure

    curve = reliability(answers.confidence, answers.is_right)
    middle = (np.arange(len(curve.count)) + 0.5) / len(curve.count)
    figure = Figure(figsize=(5, 6), layout='constrained')
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    top.plot((0, 1), (0, 1), color='gray', linestyle='--', label='perfect')
    full = curve.count > 0
    top.plot(curve.confidence[full], curve.accuracy[full], marker='o', label='model')
    top.set_ylabel('share that is right')
    top.set_title(f'expected calibration error {100 * curve.expected_error:.2f} %')
    top.legend()
    bottom.bar(middle, curve.count / curve.count.sum(), width=1 / len(curve.count))
    bottom.set_xlabel('confidence')
    bottom.set_ylabel('share of answers')
    return figure


def mistakes_figure(worst: list[tuple[float, int, int, np.ndarray]], labels: Sequence[str]):
    """Draw mistakes, each titled with its true character / the answer, and with the answer's confidence."""
    import figures

    return figures.overview_figure(
        [
            (
                255 - image,
                f'{labels[true]} / {labels[answer]}',
                f'{100 * confidence:.1f} %',
            )
            for confidence, true, answer, image in worst
        ]
    )


# --- The architecture on MNIST ---------------------------------------------------------------------------------------


def read_mnist(path: str | Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Read MNIST, or a data set of its form such as Fashion-MNIST.

    Args:
        path: `mnist.npz` as Keras has it, or a folder with the four IDX files, packed (.gz) or not.

    Returns:
        (training images, training labels, test images, test labels): (n, 28, 28) uint8, ink bright, and (n,) uint8.

    Raises:
        DataError: If it is neither.
    """
    path = Path(path)
    with _readable(path, 'neither mnist.npz nor a folder with the four IDX files'):
        if path.is_dir():
            parts = [_find_idx(path, f'{part}-{kind}') for part in ('train', 't10k') for kind in ('images', 'labels')]
            return tuple(map(read_idx, parts))
        with np.load(path) as data:
            return tuple(data[name] for name in ('x_train', 'y_train', 'x_test', 'y_test'))


def _find_idx(folder: Path, prefix: str) -> Path:
    found = sorted(folder.glob(f'{prefix}*'))
    if not found:
        raise FileNotFoundError(f'no {prefix}-idx?-ubyte[.gz]')
    return found[0]


def read_idx(path: Path) -> np.ndarray:
    """Read an IDX file of bytes (Y. LeCun's format): two zeros, type 8, rank, big-endian lengths, the values."""
    data = path.read_bytes()
    if data[:2] == b'\x1f\x8b':
        data = gzip.decompress(data)
    if data[:3] != b'\0\0\x08':
        raise ValueError(f'{path.name} is no IDX file of bytes')
    rank = data[3]
    shape = np.frombuffer(data, '>u4', rank, 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)


def benchmark(options: argparse.Namespace) -> float:
    """Train the architecture on MNIST as the original does: SGD 0.01, momentum 0.9, batches of 64; return top-1."""
    x_train, y_train, x_test, y_test = read_mnist(options.benchmark)
    with quiet_libraries():
        import keras

        from melnyk_net import melnyk_net

    keras.utils.set_random_seed(options.seed)
    model = melnyk_net((*x_train.shape[1:], 1), global_average_type=options.pooling, num_classes=int(y_train.max()) + 1)
    model.compile(keras.optimizers.SGD(0.01, momentum=0.9), 'sparse_categorical_crossentropy', metrics=['accuracy'])
    history = model.fit(
        x_train[..., None],
        y_train,
        batch_size=64,
        epochs=options.epochs,
        validation_data=(x_test[..., None], y_test),
        verbose=2,
    )
    accuracy = history.history['val_accuracy'][-1]
    name = printable(Path(options.benchmark).name)
    print(f'{name}: top-1 {100 * accuracy:.2f} % of {len(y_test):,} after {options.epochs} epochs')
    return accuracy


# --- The command line ------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument(
        'data',
        nargs='*',
        help='npz files as described above, GNT files or archives, folders of pictures named by their character',
    )
    p.add_argument(
        '--model',
        default=Path(__file__).with_name('melnyk_net.h5'),
        metavar='FILE',
        help='the model file (default: melnyk_net.h5 beside this program)',
    )
    p.add_argument(
        '--precision',
        choices=('auto', 'float32', 'bfloat16'),
        default='auto',
        help='what .h5 networks compute in (default: auto, bfloat16 where that is faster)',
    )
    p.add_argument('--out', default='answers/evaluation', metavar='DIR', help='where to (default: answers/evaluation)')
    p.add_argument(
        '--fit-temperature',
        nargs='?',
        const='',
        metavar='FILE.h5',
        help='find the temperature that calibrates the model on this data, and save the model with it',
    )
    p.add_argument(
        '--half', action='store_true', help='with --fit-temperature FILE.h5: kernels in float16, half the size'
    )
    p.add_argument(
        '--papers',
        type=whole_number,
        nargs='?',
        const=3000,
        metavar='N',
        help='read N of the scans again from coloured, dark, ruled, shaded … paper (default of N: 3000)',
    )
    g = p.add_argument_group('the architecture on MNIST or Fashion-MNIST')
    g.add_argument('--benchmark', metavar='PATH', help='mnist.npz, or a folder with the IDX files')
    g.add_argument('--epochs', type=whole_number, default=10, help='passes over the training images (default: 10)')
    g.add_argument('--pooling', choices=('GWAP', 'GWOAP', 'GAP'), default='GWAP', help='global pooling (default: GWAP)')
    g.add_argument('--seed', type=int, default=0, help='of weights and order (default: 0)')
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    p = parser()
    options = p.parse_args(arguments)
    target = options.fit_temperature
    if target and Path(target).suffix not in ('.h5', '.hdf5'):
        p.error(f'--fit-temperature saves a file that ends in .h5 or .hdf5, received {target!r}; data stand before it')
    if bool(options.data) == bool(options.benchmark):
        p.error('give labelled data to measure a model with, or --benchmark PATH')
    if options.half and not target:
        p.error('--half is for the file that --fit-temperature FILE.h5 saves')
    if sum((options.papers is not None, target is not None, options.benchmark is not None)) > 1:
        p.error('--papers, --fit-temperature and --benchmark are asked for one at a time')
    try:
        if target and not Path(target).parent.is_dir():
            raise DataError(f'{target}: there is no such folder; make it first')
        for path in options.data:
            if not os.path.exists(os.path.expanduser(path)):
                raise DataError(f'{path}: no such file or folder')
        if options.benchmark:
            benchmark(options)
        elif options.papers is not None:
            measure_on_papers(options)
        else:
            evaluate(options)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f'evaluate.py: {message(error)}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == '__main__':
    sys.exit(main())
