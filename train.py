"""Trains a network on scanned samples (GNT files), on drawn handwriting, on pictures of one's own, or on several.

    python train.py --gnt HWDB1.0/ HWDB1.1/ --out runs/paper                  the paper's recipe on CASIA-HWDB
    python train.py --gnt HWDB1.1/ --init melnyk_net.h5 --learning-rate 0.01      start from our weights
    python train.py --drawn material --teacher teacher.keras --init first.h5 --freeze 2     how our weights were made
    python train.py --drawn material --size 48 --samples 600000               from nothing: small images first …
    python train.py --drawn material --init runs/train/best.h5                … and 96 pixels to finish
    python train.py --images mine/ --init melnyk_net.h5 --out runs/mine       on one's own handwriting, in minutes
    python train.py --images mine/ --drawn material --init melnyk_net.h5 --samples 100000 --learning-rate 2e-4
                                                                              … without forgetting the other characters
    python train.py --resume runs/paper                                       go on after a stop of any kind
    python train.py --gnt HWDB1.1/ --smoke                                    everything once, in seconds

    KERAS_BACKEND=jax python train.py … --coordinator HOST:PORT --processes 2 --process 0     several machines

Pictures are named by their character: `鲍/0017.png` as `gnt_reader.py export` writes them, or `鲍_2.png`. A few
characters give a network of exactly these, any characters; --classes all keeps the 3755. A fifth of each character's
pictures is set aside to measure with, unless --validate gives others.

A run folder holds config.json (what was asked for), log.csv and curves.png (what happened), samples.png (what the
network saw), images.csv (what each picture was for), state.npz (everything needed to go on), last.h5 and best.h5
(models for main.py and evaluate.py).

The network sees sample number i of its source in step i ÷ batch size, whatever the number of workers, machines and
interruptions: a run that is stopped and resumed gives the same curve.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import json
import math
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from command_line import message, quiet_libraries, whole_number
from data_utils import LABEL_INDEX, LABELS, find_images, printable
from feed import (
    Batch,
    DrawnSource,
    Feed,
    FeedError,
    GntSource,
    ImageSource,
    MixedSource,
    Source,
    name_of,
    refuse_competition,
    refuse_competition_pictures,
    split_by_class,
    split_by_writer,
    training_index,
    unreadable_pictures,
    writers_of,
)
from handwriting import MaterialError
from model_file import POOLING_NAMES
from run_folder import Picture, RunFolder, RunFolderError

# Keras takes seconds to import, and is not needed to answer --help or a typing error: what needs it is in `learner`.


@dataclass(frozen=True)
class Recipe:
    """The hyper-parameters of a run; a field of the same name on the command line changes one of them."""

    # How long. Epochs count passes over scans or pictures; samples count drawn ones, which never end.
    batch_size: int
    epochs: int = 0
    samples: int = 0

    # The optimizer
    optimizer: str = 'adamw'
    learning_rate: float = 1e-3
    schedule: str = 'cosine'  # of the learning rate, see `cosine`; or the paper's, see `plateau`
    warmup: int = 0  # steps from 0 to the learning rate
    weight_decay: float = 0.0  # of kernels only, decoupled; the paper has L2 in the loss instead

    # Against overfitting
    l2: float = 0.0
    dropout: float = 0.5

    # Averages
    bn_momentum: float = 0.99  # of the batch normalization's statistics
    average: float = 0.0  # momentum a step of the average of all weights, which is validated and saved; 0: none

    # The teacher
    label_weight: float = 0.1  # of the label's cross-entropy beside the teacher's
    temperature: float = 2.0  # divides the logits of both: at 2 the teacher's second thoughts count, too


# The paper's recipe (section 4.1), for scanned samples. The learning rate falls to a tenth after the first epoch, and
# again whenever the training accuracy has not risen by 1e-4 in an epoch: see `plateau`.
PAPER = Recipe(
    batch_size=256,
    epochs=41,
    optimizer='sgd',  # momentum 0.9
    learning_rate=0.1,
    schedule='plateau',
    l2=1e-3,
    dropout=0.5,
)

# For drawn samples, with or without a teacher. No sample comes twice, so nothing is memorised: little dropout, no L2.
DRAWN = Recipe(
    batch_size=128,  # small batches learn more a sample, and 128 keep two processor cores busy
    samples=3_000_000,
    optimizer='adamw',  # β₂ 0.99: the gradients of the first thousand steps are soon out of date
    learning_rate=1e-3,  # cosine to a fiftieth
    warmup=50,
    weight_decay=0.03,
    dropout=0.05,
    bn_momentum=0.97,  # statistics follow the weights within some ten thousand samples
    average=0.99,
)

# For pictures of one's own, some hundreds perhaps, from weights that read handwriting already: a few hundred small
# steps that end before the pictures are known by heart.
OWN = Recipe(
    batch_size=32,  # a pass over a small set has more than a step or two then
    epochs=20,
    optimizer='adamw',
    learning_rate=2e-4,  # a fifth of DRAWN's: strokes are known, and only a hand and perhaps some characters are new
    warmup=20,  # the first steps know nothing of the size of the gradients, and could undo what was learned
    weight_decay=0.03,
    dropout=0.2,  # each picture comes twenty times, with augmentation in another form each time
    bn_momentum=0.97,  # statistics of a thousand samples: they follow the new hand within the run
    average=0.95,  # of the last passes
)

# The same from nothing: everything has to be learned from these pictures alone.
OWN_FROM_NOTHING = replace(OWN, epochs=100, learning_rate=1e-3, warmup=50, average=0.98)

# Of the pictures of a character, to measure with: writers are unknown, so that this measures known hands.
VALIDATION_SHARE = 0.2
MOST_VALIDATIONS = 20  # of a run on pictures: a pass may be a few steps, and a model takes a second to save

# What each network is computed in, unless --precision says otherwise or the processor cannot, see `fast_precision`.
PRECISIONS = {
    'melnyk_net': 'bfloat16',  # twice as fast as float32, and no worse
    'mobilenet_v3_small': 'float32',  # processors have no fast depthwise convolution in bfloat16
    'mobilenet_v3_large': 'float32',
}

LOWEST_RATE = 1e-6  # of `plateau`
COSINE_FLOOR = 0.02  # share of the learning rate at the end of the cosine


class TrainingError(RuntimeError):
    """A run that cannot start or go on; the text says why and what to do next."""


# --- The learning rate -----------------------------------------------------------------------------------------------


def cosine(recipe: Recipe, step: int, steps: int) -> float:
    """Return the learning rate of a step: a linear warm-up, then half a cosine to a fiftieth."""
    warm = min(1.0, (step + 1) / recipe.warmup) if recipe.warmup else 1.0
    fall = 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))
    return recipe.learning_rate * warm * (COSINE_FLOOR + (1 - COSINE_FLOOR) * fall)


class Plateau(NamedTuple):
    """The state of the paper's schedule, changed at the end of each epoch."""

    rate: float
    best: float = 0.0


def plateau(state: Plateau, epoch: int, accuracy: float) -> Plateau:
    """Return the paper's learning rate after an epoch.

    A tenth after the first epoch; later a tenth whenever the training accuracy is not 1e-4 above its best (Keras'
    ReduceLROnPlateau with patience 0), down to 1e-6.

    Args:
        state: Before the end of the epoch.
        epoch: Number of the epoch that has ended, from 1.
        accuracy: Training accuracy in that epoch, 0..1.
    """
    risen = accuracy > state.best + 1e-4
    rate = state.rate if risen and epoch > 1 else max(LOWEST_RATE, state.rate * 0.1)
    return Plateau(rate, max(state.best, accuracy))


# --- What a run learns from ------------------------------------------------------------------------------------------


class Data(NamedTuple):
    """What a run learns from and is measured with."""

    source: Source
    validation: Batch
    epoch_samples: int
    """Samples in a pass over the scans or pictures; 0 where there is no such pass."""
    digests: dict[str, str]
    """What tells by option whether the files are still those that a run began with, see `digest`."""
    labels: tuple[str, ...] = LABELS
    """The characters of the classes."""
    pictures: tuple[Picture, ...] = ()
    """What each picture is for, where pictures are learned from."""


def prepare_data(options: argparse.Namespace) -> Data:
    """Open the sources that were asked for, and set validation samples aside that the network never learns from."""
    sources, held_out, labels, pictures, digests = [], [], LABELS, [], {}
    passes = 0.0  # samples of the run in a pass over the scans, or over the pictures where there are none
    if options.gnt:
        index = training_index(options.gnt)
        digests['gnt'] = digest((member.name or member.path.name, member.size) for member in index.members)
        # One writer in fifty: 15 of the 756 of HWDB1.0 and 1.1, enough for ± 0.1 %.
        aside = options.val_writers or max(1, round(len(writers_of(index)) / 50))
        index, others = split_by_writer(index, aside, options.seed)
        if options.limit:
            index = index.select(np.random.default_rng(options.seed).permutation(len(index))[: options.limit])
        sources.append(GntSource(index, options.seed, bool(options.augment)))
        passes = len(index)
        if not options.validate:
            chosen = np.random.default_rng(options.seed).permutation(len(others))[: options.val_samples]
            held_out.append(GntSource(others.select(np.sort(chosen))).batch(range(len(chosen))))
    if options.drawn:
        # Without a teacher, only samples that their label describes.
        drawn = DrawnSource(
            Path(options.drawn), options.seed, not options.teacher, options.strokes, options.stroke_share
        )
        drawn.load()
        digests['drawn'] = digest(drawn.files())
        sources = [MixedSource(*sources, drawn, share=options.gnt_share)] if sources else [drawn]
        passes /= options.gnt_share
    if options.images:
        pictures = RunFolder(options.resume).pictures() if options.resume else choose_pictures(options)
        labels = LABELS if knows_all(options) else labels_of(pictures)
        own = picture_source(pictures, 'training', labels, options.seed, options.augment is not False)
        passes = passes / (1 - options.images_share) if sources else len(own)
        sources = [MixedSource(own, *sources, share=options.images_share)] if sources else [own]
        measured = picture_source(pictures, 'validation', labels)
        if len(measured):
            held_out.append(measured.batch(range(len(measured))))
    if options.validate:
        from evaluate import holds_gnt, read_samples

        paths = [Path(path).expanduser() for path in options.validate]
        refuse_competition(path for path in paths if holds_gnt(path))
        refuse_competition_pictures(
            find_images(path for path in paths if path.suffix != '.npz' and not holds_gnt(path))
        )
        samples = read_samples(paths, labels=labels)
        held_out = [Batch(samples.images, samples.labels, np.ones(len(samples.labels), bool))]
    if not held_out and options.drawn:
        # Another seed is another endless set.
        unseen = replace(drawn, seed=options.seed + 1_000_003, trusted_only=True)
        held_out = [unseen.batch(range(min(options.val_samples, len(LABELS))))]
    if not held_out:
        raise TrainingError('no character has two pictures, one to learn from and one to measure with; add --validate')
    validation = Batch(*(np.concatenate(column) for column in zip(*held_out, strict=True)))
    epoch_samples = round(passes) if has_passes(options) else 0
    return Data(sources[0], validation, epoch_samples, digests, labels, tuple(pictures))


def has_passes(options: argparse.Namespace) -> bool:
    """Whether there are passes to count, over scans or pictures: drawn handwriting alone never ends."""
    return bool(options.gnt or not options.drawn)


def digest(files: Iterable[tuple[str, int]]) -> str:
    """Return what is another text if one of some files, each its name and size, has come, gone or changed."""
    return hashlib.sha256(json.dumps(list(files)).encode()).hexdigest()


def knows_all(options: argparse.Namespace) -> bool:
    """Whether a network is to know the 3755 characters, whatever the pictures show."""
    return bool(options.classes == 'all' or options.gnt or options.drawn or not options.images)


def choose_pictures(options: argparse.Namespace) -> list[Picture]:
    """Look at the pictures that were asked for, and say of each what it is for.

    Raises:
        TrainingError: If they are too few.
        FeedError: If one is of the ICDAR-2013 competition.
        FileNotFoundError: If a path does not exist.
    """
    from evaluate import labelled_pictures

    found = labelled_pictures(options.images)
    refuse_competition_pictures(file for file, _ in found)
    uses: dict[str, str] = {}
    characters = {str(file): character or '' for file, character in found}
    for file, character in characters.items():
        if not character:
            uses[file] = 'neither its folder nor its name is a character'
        elif knows_all(options) and character not in LABEL_INDEX:
            uses[file] = 'not one of the 3755 characters'
    named = [file for file in characters if file not in uses]
    uses |= unreadable_pictures(named, options.workers, looking_at(len(named)))
    good = [file for file in named if file not in uses]
    labels = sorted({characters[file] for file in good})
    if not good or (len(labels) < 2 and not knows_all(options)):
        raise TrainingError(
            f'{", ".join(map(str, options.images))}: {len(good)} picture(s) of {len(labels)} character(s) among '
            f'{len(found)} found, and two characters are the fewest to tell apart; name folders or files after their '
            'character (GNT files are for --gnt)'
        )
    index = {character: i for i, character in enumerate(labels)}
    share = 0.0 if options.validate else min(VALIDATION_SHARE, options.val_samples / len(good))
    classes = np.array([index[characters[file]] for file in good])
    training, validation = split_by_class(classes, share, options.seed, options.limit)
    for positions, use in ((training, 'training'), (validation, 'validation')):
        uses |= {good[position]: use for position in positions}
    pictures = [Picture(file, character, uses.get(file, PAST_LIMIT)) for file, character in characters.items()]
    report_pictures(pictures)
    if not options.init:
        print('from nothing; --init melnyk_net.h5 would start with what it knows of handwriting', file=sys.stderr)
    return pictures


def looking_at(total: int) -> Callable[[int], None]:
    """Return what shows how many of the pictures have been looked at: on a terminal only."""

    def show(count: int) -> None:
        if sys.stderr.isatty():
            end = '\n' if count >= total else ''
            print(f'\rlooking at the pictures: {count:,} of {total:,}', end=end, file=sys.stderr, flush=True)

    return show


def report_pictures(pictures: Sequence[Picture], most: int = 20) -> None:
    """Say on stderr what pictures are for, and name those that were left out."""
    count = Counter(picture.use for picture in pictures)
    used = count['training'] + count['validation']
    print(
        f'{used:,} pictures of {name_of(labels_of(pictures))}; {count["training"]:,} to learn from, '
        f'{count["validation"]:,} to measure with',
        file=sys.stderr,
    )
    left_out = [picture for picture in pictures if picture.use not in ('training', 'validation', PAST_LIMIT)]
    for picture in left_out[:most]:
        print(f'left out: {printable(picture.file)}: {printable(picture.use)}', file=sys.stderr)
    if len(left_out) > most:
        print(f'left out: {len(left_out) - most:,} more; images.csv in the run folder names them all', file=sys.stderr)


PAST_LIMIT = 'past the --limit'  # the use of a picture that has none


def labels_of(pictures: Sequence[Picture]) -> tuple[str, ...]:
    """Return the characters that pictures are used for: in the published order, then others by their code point."""
    used = {picture.character for picture in pictures if picture.use in ('training', 'validation')}
    return LABELS if used == set(LABELS) else tuple(sorted(used, key=lambda c: (LABEL_INDEX.get(c, len(LABELS)), c)))


def picture_source(
    pictures: Sequence[Picture], use: str, labels: Sequence[str], seed: int = 0, augment: bool = False
) -> ImageSource:
    """Return the source of the pictures that are for one use."""
    index = {character: i for i, character in enumerate(labels)}
    chosen = [picture for picture in pictures if picture.use == use]
    classes = np.array([index[picture.character] for picture in chosen], np.int32)
    return ImageSource(tuple(picture.file for picture in chosen), classes, seed, augment)


class KeptSamples:
    """Drawn samples that are gone through more than once, with the teacher's answers, in files of the run folder.

    A small student learns faster than a teacher answers. The first pass draws and asks, the later ones read: step `i`
    of the first pass writes batch `i`, and each later pass has an order of its own.

    Args:
        folder: Where the files are, or will be.
        count: How many samples at most; whole batches of them are kept.
        batch_size: Samples a step.
        num_classes: Logits of a sample.
        seed: Of the orders.
        exists: Whether the files have to be there, since the run goes on.

    Raises:
        TrainingError: If they are not, or if there is no room for them.
    """

    def __init__(self, folder: Path, count: int, batch_size: int, num_classes: int, seed: int, exists: bool):
        self.steps, self.batch_size, self.seed = count // batch_size, batch_size, seed
        if not self.steps:
            raise TrainingError(f'--keep {count} is less than a batch of {batch_size}; keep more')
        rows = self.steps * batch_size
        columns = {
            'images': ((rows, 96, 96), np.dtype('u1')),
            'labels': ((rows,), np.dtype('i4')),
            'trusted': ((rows,), np.dtype('?')),
            'logits': ((rows, num_classes), np.dtype('f2')),
        }
        if not exists:
            # Files of holes: a disk that fills up later would end the process without a word.
            needed = sum(math.prod(shape) * dtype.itemsize for shape, dtype in columns.values())
            free = shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free
            if needed > free:
                raise TrainingError(
                    f'{folder}: --keep {count} takes {needed / 1e9:.1f} GB, and {free / 1e9:.1f} are free; keep fewer'
                )
        try:
            self.arrays = {}
            for name, (shape, dtype) in columns.items():
                path = folder / f'kept_{name}.npy'
                if exists:
                    there = np.load(
                        path, mmap_mode='r'
                    )  # opened to write, a file that was cut short would be filled up
                    if (there.shape, there.dtype) != (shape, dtype):
                        raise ValueError(f'{path.name} is of another run')
                mode = 'r+' if exists else 'w+'
                self.arrays[name] = np.lib.format.open_memmap(path, mode, dtype, shape)
        except (FileNotFoundError, ValueError, EOFError) as error:
            raise TrainingError(
                f'{folder}: the samples that the run kept are gone ({error}); start a new run'
            ) from error
        self._order: tuple[int, np.ndarray] = 0, np.zeros(0, np.int64)  # the last pass that was asked for

    def write(self, step: int, batch: Batch, logits: np.ndarray) -> None:
        """Keep a batch of the first pass."""
        rows = slice(step * self.batch_size, (step + 1) * self.batch_size)
        # Sixteen bits are more digits than a teacher means; beyond their range a softmax is 0 or 1 anyway.
        values = (*batch, np.clip(logits, -6e4, 6e4))
        for array, value in zip(self.arrays.values(), values, strict=True):
            array[rows] = value

    def read(self, step: int) -> tuple[Batch, np.ndarray]:
        """Return the batch of a step of a later pass, and the teacher's answers."""
        number, place = divmod(step, self.steps)
        if self._order[0] != number:
            rng = np.random.default_rng([self.seed, number])
            self._order = number, rng.permutation(self.steps * self.batch_size)
        rows = np.sort(self._order[1][place * self.batch_size : (place + 1) * self.batch_size])
        *columns, logits = (array[rows] for array in self.arrays.values())
        return Batch(*columns), logits


def batches(
    source: Source,
    batch_size: int,
    first: int,
    workers: int | None,
    rows: tuple[int, int],
    teacher=None,
    kept: KeptSamples | None = None,
) -> Iterator[tuple[Batch, np.ndarray | None]]:
    """Give the batch of each step from the first on, and the teacher's logits where samples are kept."""
    from learner import ask

    step = first
    if kept is None or step < kept.steps:
        with Feed(source, batch_size, step, workers, rows) as feed:
            for batch in feed:
                logits = None
                if kept:
                    logits = ask(teacher, batch.images)
                    kept.write(step, batch, logits)
                yield batch, logits
                step += 1
                if kept and step == kept.steps:
                    break
    while True:
        yield kept.read(step)
        step += 1


# --- The run ---------------------------------------------------------------------------------------------------------


@dataclass
class Counters:
    """Where a run stands, beside its weights."""

    step: int = 0
    rate: float = 0.0  # learning rate of `plateau`
    rate_best: float = 0.0  # the best training accuracy of an epoch that it has seen
    epoch_accuracy: float = 0.0  # sum over the steps of this epoch
    best: float = -1.0  # the best top-1 so far
    best_loss: float = math.inf  # and the loss at that, which decides between equals
    seconds: float = 0.0  # of the run, over all its parts


def build(options: argparse.Namespace, recipe: Recipe, labels: Sequence[str] = LABELS):
    """Build student and teacher, with the weights to start from and the optimizer.

    Args:
        options: See `parser`.
        recipe: The hyper-parameters.
        labels: The characters of the classes. Defaults to the 3755.

    Returns:
        The `learner.TrainingModel` to train, and the teacher or None, which is a part of it unless its answers are
        kept.

    Raises:
        TrainingError, ValueError: If the weights to start from, or the teacher, do not fit.
    """
    import keras

    from learner import (
        ClassCounts,
        TrainingModel,
        as_logits,
        batch_normalization,
        carry_weights,
        fast_precision,
        load_teacher,
        shared_classes,
    )
    from melnyk_net import ARCHITECTURES, load_model

    if options.freeze and options.architecture != 'melnyk_net':
        raise TrainingError(f'--freeze counts the convolutions of melnyk_net, received {options.architecture}')
    keras.utils.set_random_seed(options.seed)
    precision = options.precision or fast_precision(PRECISIONS[options.architecture])
    keras.config.set_dtype_policy('mixed_bfloat16' if precision == 'bfloat16' else 'float32')
    student = ARCHITECTURES[options.architecture](
        input_shape=(options.size, options.size, 1),
        reg=recipe.l2,
        global_average_type=options.pooling,
        num_classes=len(labels),
        dropout=recipe.dropout,
        normalization=batch_normalization(recipe.bn_momentum),
    )
    if options.init and not options.resume:  # a run that goes on has weights of its own
        source, info = load_model(options.init)
        carry_weights(source, student, shared_classes(info.labels, labels))
    convolutions = sum(isinstance(layer, keras.layers.Conv2D) for layer in student.layers)
    if options.freeze > convolutions:
        raise TrainingError(f'--freeze is at most {convolutions}, received {options.freeze}')
    # The first two do a third of a step's work at 96 pixels, and edges of strokes are the same in every run.
    for number in range(1, options.freeze + 1):
        for kind in ('conv2d', 'batch_normalization'):
            student.get_layer(f'{kind}_{number}').trainable = False
    teacher = None
    if options.teacher:
        teacher = load_teacher(options.teacher, labels, options.precision or fast_precision('bfloat16'))
    model = TrainingModel(
        as_logits(student), None if options.keep else teacher, recipe.label_weight, recipe.temperature
    )
    if recipe.optimizer == 'sgd':
        optimizer = keras.optimizers.SGD(recipe.learning_rate, momentum=0.9)
    else:
        optimizer = keras.optimizers.AdamW(recipe.learning_rate, beta_2=0.99, weight_decay=recipe.weight_decay)
        # Decay is for kernels: what follows a normalization, a bias and the pooling weights set a scale.
        optimizer.exclude_from_weight_decay(var_names=['gamma', 'beta', 'bias', '^W$'])
    model.compile(
        optimizer,
        weighted_metrics=[
            keras.metrics.SparseCategoricalAccuracy(name='top1'),
            keras.metrics.SparseTopKCategoricalAccuracy(min(5, len(labels)), name='top5'),
            ClassCounts(len(labels)),
        ],
    )
    model.build((None, 96, 96))
    optimizer.build(model.trainable_variables)
    return model, teacher


class Best(NamedTuple):
    """The best model of a run."""

    path: Path
    top1: float
    """Share of the validation samples that it answers rightly, 0..1."""


def train(options: argparse.Namespace, recipe: Recipe) -> Best:
    """Train, from the start or from where a run was stopped.

    Args:
        options: See `parser`.
        recipe: The hyper-parameters.

    Returns:
        The best model.

    Raises:
        TrainingError: If the run cannot start, or the loss is no longer a finite number.
        FeedError, MaterialError, RunFolderError, ValueError, OSError: If a file cannot be used.
        ModuleNotFoundError: If a package is missing.
    """
    refuse_missing_packages(options)
    with quiet_libraries():
        import keras

        from learner import WeightAverage, macro_recall, on_this_machine, to_numpy, validate
        from melnyk_net import save_model

    processes, process = join_processes(options)
    if recipe.batch_size % processes:
        raise TrainingError(f'{processes} processes cannot share a batch of {recipe.batch_size}; change --batch-size')
    share = recipe.batch_size // processes
    rows = (process * share, (process + 1) * share)

    folder = RunFolder(options.resume or options.out)
    if not options.resume:
        folder.refuse_existing()  # at once, and not after the data were read

    # How long, and how often to look up.
    data = prepare_data(options)
    if options.resume:
        refuse_other_files(folder, data.digests)
    # Steps a pass; 0 where there is none. A set that is smaller than a batch comes more than once in it.
    epoch = max(1, round(data.epoch_samples / recipe.batch_size)) if data.epoch_samples else 0
    by_epochs = bool(epoch and recipe.epochs)
    by_plateau = by_epochs and recipe.schedule == 'plateau'
    if by_epochs:
        steps = epoch * recipe.epochs
        validate_every = epoch if by_plateau else epoch * math.ceil(recipe.epochs / MOST_VALIDATIONS)
    else:
        steps = max(1, recipe.samples // recipe.batch_size)
        validate_every = max(1, options.validate_every // recipe.batch_size)

    # The model, new or as it was left.
    model, teacher = build(options, recipe, data.labels)
    student = model.student
    average = WeightAverage(student, recipe.average)
    variables = [*student.variables, *model.optimizer.variables]
    counters = Counters(rate=recipe.learning_rate)
    if options.resume:
        arrays, saved = folder.load_state()
        if len(arrays) != len(variables) + len(average.values):
            raise TrainingError(f'{folder.path}: the saved state is of another network; start a new run')
        for variable, array in zip(variables, arrays, strict=False):
            variable.assign(array)
        average.values = arrays[len(variables) :]
        counters = Counters(**saved)

    def snapshot() -> tuple[list[np.ndarray], dict]:
        return [*map(to_numpy, variables), *average.values], asdict(counters)

    kept = None
    if options.keep:
        if processes > 1:
            raise TrainingError('--keep is for one machine; leave --coordinator out')
        exists = bool(options.resume)
        if not exists:
            folder.path.mkdir(parents=True, exist_ok=True)
        kept = KeptSamples(folder.path, options.keep, recipe.batch_size, len(data.labels), options.seed, exists)

    # Only the first of several processes writes.
    writes = process == 0
    if writes and options.resume:
        folder.rewind_log(counters.step)
    elif writes:
        config = {'options': vars(options), 'recipe': asdict(recipe), 'digests': data.digests}
        config |= {'backend': keras.backend.backend(), 'keras': keras.__version__}
        folder.start(config | {'command': ['train.py', *sys.argv[1:]]}, *snapshot(), data.pictures)

    progress = Progress(steps)
    window: list[tuple[float, float]] = []  # (loss, accuracy) of each step since the last row of the log
    seen = np.zeros((2, len(data.labels)))  # and of each class, the samples that were right, and all
    seconds_before, begin = counters.seconds, time.monotonic()
    window_begin = last_saved = begin
    lessons = batches(data.source, recipe.batch_size, counters.step, options.workers, rows, teacher, kept)
    with contextlib.closing(lessons):
        while counters.step < steps:
            # One step.
            batch, logits = next(lessons)
            if writes and counters.step == 0:
                folder.draw_samples(batch.images)
            model.optimizer.learning_rate = counters.rate if by_plateau else cosine(recipe, counters.step, steps)
            trusted = batch.trusted.astype(np.float32)
            inputs = batch.images if logits is None else (batch.images, logits)
            result = model.train_on_batch(inputs, batch.labels, trusted, return_dict=True)
            loss, accuracy = float(result['loss']), float(result['top1'])
            counters.step += 1
            if not math.isfinite(loss):
                raise TrainingError(f'the loss is {loss} at step {counters.step}; {start_again(folder)}')
            average.update(counters.step)
            counters.epoch_accuracy += accuracy
            window.append((loss, accuracy))
            seen += result['classes']

            # Where it stands.
            now = time.monotonic()
            counters.seconds = seconds_before + now - begin
            mean_loss, mean_accuracy = np.mean(window, axis=0)
            speed = len(window) * recipe.batch_size / (now - window_begin)
            progress.show(
                counters.step,
                f'loss {mean_loss:.4f}  accuracy {mean_accuracy:.4f}  {speed:,.0f} images/s',
                (steps - counters.step) * recipe.batch_size / speed,
            )
            validating = counters.step % validate_every == 0 or counters.step == steps
            if not validating and counters.step % options.log_every:
                continue
            row = {
                'step': counters.step,
                'samples': counters.step * recipe.batch_size,
                'epoch': f'{counters.step / epoch:.3f}' if epoch else '',
                'loss': f'{mean_loss:.6f}',
                'accuracy': f'{mean_accuracy:.6f}',
                'macro_recall': f'{macro_recall(seen):.6f}',
                'learning_rate': f'{float(model.optimizer.learning_rate):.3e}',
                'images_per_second': f'{speed:.1f}',
                'seconds': f'{counters.seconds:.0f}',
            }

            # How good it is.
            if by_plateau and counters.step % epoch == 0:
                state = Plateau(counters.rate, counters.rate_best)
                state = plateau(state, counters.step // epoch, counters.epoch_accuracy / epoch)
                counters.rate, counters.rate_best, counters.epoch_accuracy = state.rate, state.best, 0.0
            if validating:
                with average.in_place():
                    measured = validate(model, data.validation, recipe.batch_size, rows)
                    row |= {name: f'{value:.6f}' for name, value in measured.items()}
                    if not math.isfinite(measured['val_loss']):
                        raise TrainingError(f'the validation loss is {measured["val_loss"]}; {start_again(folder)}')
                    figure = measured['val_top1'], -measured['val_loss']
                    is_best = figure > (counters.best, -counters.best_loss)
                    if writes:
                        names = ['last.h5', 'best.h5'] if is_best else ['last.h5']
                        note = f'{counters.step * recipe.batch_size:,} samples: {describe(options)}'
                        with on_this_machine():
                            for name in names:
                                save_model(student, folder.path / name, data.labels, note=note)
                if is_best:
                    counters.best, counters.best_loss = measured['val_top1'], measured['val_loss']

            # What is needed to go on.
            if writes:
                folder.log(row)
                if validating:
                    folder.draw_curves()
                if validating or now - last_saved > 60 * options.save_minutes:
                    folder.save_state(*snapshot())
                    last_saved = time.monotonic()
            window, window_begin = [], time.monotonic()
            seen[:] = 0
    progress.end()
    return Best(folder.path / 'best.h5', counters.best)


def refuse_missing_packages(options: argparse.Namespace) -> None:
    """Raise `TrainingError` if a package is missing that would be missed in the middle of the run."""
    for package in ('keras', 'matplotlib', *(['cv2'] if options.drawn else [])):
        if importlib.util.find_spec(package) is None:
            raise TrainingError(f'{package} is not installed: pip install -r requirements-train.txt')


def refuse_other_files(folder: RunFolder, digests: dict[str, str]) -> None:
    """Raise `TrainingError` if the files to learn from are not those that the run in this folder began with.

    Others would be set aside to measure with, and what the network has learned from would be among them.
    """
    before = folder.config().get('digests', {})  # runs of older versions have none
    for name, now in digests.items():
        if before.get(name, now) != now:
            raise TrainingError(
                f'{folder.path}: files of --{name} have come, gone or changed since the run began; put them back as '
                'they were, or start a new run'
            )


def start_again(folder: RunFolder) -> str:
    """Return what to do where the loss is no longer a finite number."""
    best = folder.path / 'best.h5'
    return f'start again with {f"--init {best}, " if best.exists() else ""}a lower --learning-rate and another --out'


class Progress:
    """One line on stderr that is rewritten, or a line now and then where stderr is a file.

    Args:
        steps: Of the whole run.
        every: Seconds between two lines in a file.
    """

    def __init__(self, steps: int, every: float = 30.0):
        self.steps, self.every = steps, every
        self.terminal = sys.stderr.isatty()
        self.shown = -math.inf

    def show(self, step: int, text: str, seconds_left: float) -> None:
        """Show how far the run is, unless it was shown a moment ago."""
        now = time.monotonic()
        if now - self.shown < (0.2 if self.terminal else self.every) and step < self.steps:
            return
        self.shown = now
        minutes, seconds = divmod(round(seconds_left), 60)
        line = f'step {step:,}/{self.steps:,}  {text}  left {minutes // 60}:{minutes % 60:02}:{seconds:02}'
        if self.terminal:
            print(f'\r{line}\033[K', end='', file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def end(self) -> None:
        """Leave the line."""
        if self.terminal:
            print(file=sys.stderr)


def describe(options: argparse.Namespace) -> str:
    """Return in a few words what a model was trained on, for its model card."""
    parts = ['scanned samples (GNT)'] if options.gnt else []
    parts += ['drawn handwriting'] if options.drawn else []
    parts += ["pictures of the user's own"] if options.images else []
    parts += [f'taught by {Path(options.teacher).name}'] if options.teacher else []
    parts += [f'started from {Path(options.init).name}'] if options.init else []
    return ', '.join(parts)


def join_processes(options: argparse.Namespace) -> tuple[int, int]:
    """Join the other machines of a run, share batches among all devices; return (processes, this one's number)."""
    import keras

    if keras.backend.backend() != 'jax':
        if options.coordinator:
            raise TrainingError('several machines run on JAX alone; set KERAS_BACKEND=jax')
        return 1, 0
    if options.coordinator:
        keras.distribution.initialize(options.coordinator, options.processes, options.process)
    if options.coordinator or len(keras.distribution.list_devices()) > 1:
        keras.distribution.set_distribution(keras.distribution.DataParallel(auto_shard_dataset=False))
    return (options.processes, options.process) if options.coordinator else (1, 0)


# --- The command line ------------------------------------------------------------------------------------------------


def number(words: str, fits: Callable[[float], bool]) -> Callable[[str], float]:
    """Return what reads a number of the command line; for `argparse`.

    Args:
        words: Which numbers there may be, to be said where another one was received.
        fits: Whether a number is one of them.
    """

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and fits(value)):
            raise argparse.ArgumentTypeError(f'a number {words} is expected, received {text!r}')
        return value

    return read


POSITIVE = number('above 0', lambda value: value > 0)
NOT_NEGATIVE = number('of at least 0', lambda value: value >= 0)
SHARE = number('from 0 to 1', lambda value: 0 <= value <= 1)
PART = number('between 0 and 1', lambda value: 0 < value < 1)
DROPOUT = number('from 0 to below 1', lambda value: 0 <= value < 1)


def count_from_zero(text: str) -> int:
    """Return the whole number that an option of the command line says; for `argparse`."""
    if not (text.isascii() and text.isdecimal()):
        raise argparse.ArgumentTypeError(f'a whole number of at least 0 is expected, received {text!r}')
    return int(text)


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    g = p.add_argument_group('what to learn from')
    g.add_argument('--gnt', nargs='+', metavar='DIR_OR_ZIP', help='GNT files, folders or zip archives of them')
    g.add_argument('--drawn', metavar='MATERIAL_DIR', help='draw handwriting from this material, see handwriting.py')
    g.add_argument(
        '--images',
        nargs='+',
        metavar='DIR',
        help='pictures whose folder (鲍/0017.png) or name (鲍_2.png) is a character',
    )
    g.add_argument(
        '--classes',
        choices=('own', 'all'),
        help="a network of the pictures' characters only, or of all 3755 (default: own for --images alone, else all)",
    )
    g.add_argument('--strokes', metavar='FILE', help="a running hand's strokes beside the material, see handwriting.py")
    g.add_argument(
        '--stroke-share',
        type=SHARE,
        metavar='SHARE',
        help='share of drawn samples that come from strokes, the rest from fonts (0..1; default: 0.6)',
    )
    g.add_argument('--gnt-share', type=PART, default=0.5, help='share of scanned samples beside --drawn (default: 0.5)')
    g.add_argument(
        '--images-share',
        type=PART,
        default=0.5,
        help='share of pictures beside --gnt or --drawn (default: 0.5)',
    )
    g.add_argument(
        '--teacher', metavar='FILE', help='a model whose opinion of each sample is learned (.keras, or .h5 of ours)'
    )
    g.add_argument(
        '--keep',
        type=whole_number,
        metavar='N',
        help="draw N samples only, keep them and the teacher's answers on disk (17 KB each), and go through them again "
        'and again: for small networks, which learn faster than a teacher answers',
    )
    g.add_argument(
        '--augment',
        action=argparse.BooleanOptionalAction,
        help='turn, slant and stretch samples a little (default: pictures, but not scanned samples)',
    )
    g.add_argument('--limit', type=whole_number, help='learn from this many scanned samples, or pictures, only')
    g = p.add_argument_group('what to measure with')
    g.add_argument('--val-writers', type=whole_number, help='writers set aside for validation (default: one in fifty)')
    g.add_argument(
        '--val-samples', type=whole_number, default=15_000, help='validation samples at most (default: 15000)'
    )
    g.add_argument('--validate', nargs='+', metavar='DATA', help='measure with these instead: npz, GNT or folders')
    g.add_argument(
        '--validate-every', type=whole_number, default=50_000, help='drawn samples between two (default: 50000)'
    )
    g = p.add_argument_group('the network')
    g.add_argument('--architecture', choices=tuple(PRECISIONS), default='melnyk_net', help='default: melnyk_net')
    g.add_argument('--size', type=int, choices=(48, 64, 96), default=96, help='side of its input (default: 96)')
    g.add_argument('--pooling', choices=tuple(POOLING_NAMES), default='GWAP', help='its global pooling (default: GWAP)')
    g.add_argument('--init', metavar='FILE.h5', help='weights to start from, of any size, pooling and classes')
    g.add_argument(
        '--freeze',
        type=count_from_zero,
        default=0,
        metavar='N',
        help='leave the first N convolutions as --init has them (default: 0)',
    )
    g.add_argument(
        '--precision',
        choices=('bfloat16', 'float32'),
        help='of the computation; weights are always float32 (default: bfloat16, but float32 for MobileNetV3, and '
        'where TensorFlow runs on a processor that does not multiply bfloat16)',
    )
    g = p.add_argument_group("the recipe (defaults: the paper's for --gnt, our own for --drawn and for --images)")
    for name, kind, text in (
        ('batch-size', whole_number, 'samples a step'),
        ('epochs', whole_number, 'passes over the scanned samples or pictures'),
        ('samples', whole_number, 'drawn samples in all'),
        ('learning-rate', POSITIVE, 'at its highest'),
        ('warmup', count_from_zero, "steps to get there; not in the paper's recipe"),
        ('weight-decay', NOT_NEGATIVE, "of the kernels; not in the paper's recipe, which has L2"),
        ('l2', NOT_NEGATIVE, 'L2 regularisation in the loss'),
        ('dropout', DROPOUT, 'share of the features dropped (0..1)'),
        ('label-weight', NOT_NEGATIVE, 'of the label beside the teacher'),
        ('temperature', POSITIVE, 'at which student and teacher are compared'),
    ):
        g.add_argument(f'--{name}', type=kind, help=text)
    g = p.add_argument_group('the run')
    g.add_argument('--out', default='runs/train', metavar='DIR', help='run folder (default: runs/train)')
    g.add_argument(
        '--resume', metavar='DIR', help='go on with the run in this folder, with the options it was started with'
    )
    g.add_argument('--seed', type=count_from_zero, default=0, help='of samples, splits and weights (default: 0)')
    g.add_argument(
        '--workers', type=whole_number, help='processes that prepare samples (default: one fewer than processors)'
    )
    g.add_argument('--log-every', type=whole_number, default=50, help='steps between two rows of log.csv (default: 50)')
    g.add_argument('--save-minutes', type=NOT_NEGATIVE, default=5.0, help='between two saved states (default: 5)')
    g.add_argument('--smoke', action='store_true', help='a run of seconds, to see that everything works')
    g = p.add_argument_group('several machines (JAX)')
    g.add_argument('--coordinator', metavar='HOST:PORT', help='address of process 0, the same on each machine')
    g.add_argument('--processes', type=whole_number, default=1, help='how many there are (default: 1)')
    g.add_argument('--process', type=count_from_zero, default=0, help='which this one is, from 0 (default: 0)')
    return p


# What may differ from one part of a run to the next without changing its curve.
MAY_DIFFER = ('resume', 'workers', 'coordinator', 'processes', 'process')

# What --smoke sets, unless it is given.
SMOKE = {'size': 48, 'limit': 160, 'val_samples': 64, 'log_every': 5, 'workers': 1}


def parse(arguments: Sequence[str] | None = None) -> tuple[argparse.Namespace, Recipe]:
    """Read the command line, or the options of the run to resume; return options and recipe."""
    p = parser()
    options = p.parse_args(arguments)
    given = given_options(arguments)
    if not 0 <= options.process < options.processes:
        p.error(f'--process is 0 … {options.processes - 1}, received {options.process}')
    if given & {'process', 'processes'} and not options.coordinator:
        p.error('--processes and --process are for several machines: give --coordinator HOST:PORT, too')
    if options.resume:
        if changed := [flag(name) for name in vars(options) if name in given and name not in MAY_DIFFER]:
            p.error(
                f'--resume goes on with the options that the run was started with: leave {", ".join(changed)} out, or '
                'start a new run'
            )
        return resumed(options)
    if not (options.gnt or options.drawn or options.images):
        p.error(
            'what to learn from? give --gnt DIR_OR_ZIP …, --images DIR … or --drawn MATERIAL_DIR (handwriting.py '
            'fetches the material)'
        )
    if options.classes == 'own' and not (options.images and not options.gnt and not options.drawn):
        p.error('--classes own is for --images alone: the other sources have all 3755 characters')
    if options.freeze and not options.init:
        p.error('--freeze is for weights that have learned: give --init FILE.h5, too')
    alone = options.drawn and not (options.gnt or options.images or options.coordinator)
    if options.keep and not (alone and options.teacher):
        p.error("--keep is for drawn samples and a teacher's answers, on one machine: give --drawn and --teacher alone")
    if options.images and not options.gnt and not options.drawn:
        recipe = OWN if options.init else OWN_FROM_NOTHING
    else:
        recipe = PAPER if options.gnt and not options.drawn and not options.teacher else DRAWN
    for name, (is_used, purpose) in purposes(options, recipe).items():
        if name in given and not is_used:
            p.error(f'{flag(name)} {purpose}')
    if options.smoke:
        recipe = replace(recipe, batch_size=16, epochs=recipe.epochs and 2, samples=recipe.samples and 320, warmup=5)
        vars(options).update({name: value for name, value in SMOKE.items() if name not in given})
    changed = {name: getattr(options, name) for name in asdict(recipe) if getattr(options, name, None) is not None}
    return options, replace(recipe, **changed)


def given_options(arguments: Sequence[str] | None) -> set[str]:
    """Return the names of the options that stand on the command line, even with their default."""
    p, absent = parser(), object()
    p.set_defaults(**dict.fromkeys(vars(p.parse_args([])), absent))
    return {name for name, value in vars(p.parse_args(arguments)).items() if value is not absent}


def flag(name: str) -> str:
    """Return an option as it is written on the command line."""
    return '--' + name.replace('_', '-')


def purposes(options: argparse.Namespace, recipe: Recipe) -> dict[str, tuple[bool, str]]:
    """Return of each option that only some runs can use whether this one can, and what it is for.

    Args:
        options: As they were given.
        recipe: What is changed by them.
    """
    scans_or_pictures = bool(options.gnt or options.images)
    by_epochs = bool(options.epochs or recipe.epochs) and has_passes(options)
    return {
        'strokes': (bool(options.drawn), 'is for --drawn'),
        'stroke_share': (bool(options.drawn), 'is for --drawn'),
        'gnt_share': (bool(options.gnt and options.drawn), 'is for --gnt beside --drawn'),
        'images_share': (
            bool(options.images and (options.gnt or options.drawn)),
            'is for --images beside --gnt or --drawn',
        ),
        'augment': (scans_or_pictures, 'is for --gnt and --images; drawn samples are all different anyway'),
        'limit': (scans_or_pictures, 'is for --gnt and --images; --samples says how many are drawn'),
        'val_writers': (bool(options.gnt), 'is for --gnt'),
        'val_samples': (not options.validate, 'is for samples that are set aside; --validate is measured with whole'),
        'validate_every': (not by_epochs, 'counts drawn samples; this run is measured after its epochs'),
        'epochs': (has_passes(options), 'counts passes over --gnt or --images; drawn samples are counted by --samples'),
        'samples': (not by_epochs, 'counts drawn samples; the length of this run is counted by --epochs'),
        'warmup': (recipe.schedule == 'cosine', "is not in the paper's recipe, whose learning rate only falls"),
        'weight_decay': (recipe.optimizer == 'adamw', "is not in the paper's recipe, which has --l2"),
        'label_weight': (bool(options.teacher), 'is for --teacher'),
        'temperature': (bool(options.teacher), 'is for --teacher'),
    }


def resumed(options: argparse.Namespace) -> tuple[argparse.Namespace, Recipe]:
    """Return options and recipe of the run to go on with.

    Raises:
        RunFolderError: If there is none, or one that this version cannot go on with.
    """
    config = RunFolder(options.resume).config()
    kept = {name: getattr(options, name) for name in MAY_DIFFER}
    try:
        # Runs of older versions lack the newer options, and have the schedule that went with epochs.
        known = vars(parser().parse_args([])) | config['options']
        recipe = {'schedule': 'plateau' if config['recipe']['epochs'] else 'cosine'} | config['recipe']
        return argparse.Namespace(**(known | kept)), Recipe(**recipe)
    except (KeyError, TypeError) as error:
        raise RunFolderError(
            f'{options.resume}: config.json is damaged, or of a newer version ({error}); start a new run'
        ) from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options, advice = None, ''
    try:
        options, recipe = parse(arguments)
        best = train(options, recipe)
    except (TrainingError, FeedError, RunFolderError, MaterialError, ValueError, OSError, ModuleNotFoundError) as error:
        print(f'\ntrain.py: {message(error)}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        folder = RunFolder(options.resume or options.out) if options else None
        if folder and folder.can_go_on:
            advice = f'; --resume {printable(folder.path)} goes on from the last saved state'
        print(f'\ntrain.py: stopped{advice}', file=sys.stderr)
        return 130
    right = f'right on {best.top1:.2%} of the samples to measure with'
    print(f'best model: {printable(best.path)}, {right}', file=sys.stderr)
    return 0


if __name__ == '__main__':
    sys.exit(main())
