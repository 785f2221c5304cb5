"""The folder of a training run: what was asked for, what happened, and what is needed to go on.

    config.json    options and recipe
    log.csv        one row now and then, see FIELDS
    curves.png     loss, accuracy and macro recall, in training and in validation, over epochs or samples seen
    samples.png    the first samples that the network saw
    images.csv     what each picture was for, where pictures were learned from
    state.npz      weights, optimizer, averages and counters
    last.h5, best.h5    models

Each file is written aside and renamed: a run that is killed at any moment leaves whole files, and goes on from them.
"""

import csv
import json
import os
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_utils import writing, written_aside

FIELDS = (
    'step',
    'samples',
    'epoch',
    'loss',
    'accuracy',
    'macro_recall',
    'learning_rate',
    'val_loss',
    'val_top1',
    'val_top5',
    'val_macro_recall',
    'images_per_second',
    'seconds',
)


# What curves.png shows: one panel a row, training and validation in one.
PANELS = (
    ('loss', ('loss', 'val_loss')),
    ('accuracy', ('accuracy', 'val_top1', 'val_top5')),
    ('macro recall', ('macro_recall', 'val_macro_recall')),
)


class Picture(NamedTuple):
    """What a picture is for in a run: one row of images.csv."""

    file: str
    character: str
    """What it is named by; '' where nothing."""
    use: str
    """`'training'`, `'validation'`, or why it was left out."""


# Names of files may hold any bytes.
_FILE_NAMES = {'encoding': 'utf-8', 'errors': 'surrogateescape'}


class RunFolderError(RuntimeError):
    """A run folder that cannot be used; the text says why and what to do next."""


class RunFolder:
    """The files of one run.

    Args:
        path: The folder; it need not exist.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.rows: list[dict] = []

    @property
    def can_go_on(self) -> bool:
        """Whether there is a run, and a state to go on from."""
        return all((self.path / name).exists() for name in ('config.json', 'state.npz'))

    def refuse_existing(self) -> None:
        """Raise `RunFolderError` if the folder holds a run, which is not overwritten."""
        if self.can_go_on:
            raise RunFolderError(f'{self.path} holds a run; go on with --resume {self.path}, or name another --out')
        if (self.path / 'config.json').exists():
            raise RunFolderError(f'{self.path} holds a run without a saved state; delete it, or name another --out')

    def start(
        self, config: dict, arrays: Sequence[np.ndarray], counters: dict, pictures: Iterable[Picture] = ()
    ) -> None:
        """Make the folder, with all that is needed to go on from the first step.

        The configuration comes last: a run that is there at all can go on.

        Args:
            config: What was asked for, as JSON.
            arrays: See `save_state`.
            counters: See `save_state`.
            pictures: See `keep_pictures`.

        Raises:
            RunFolderError: If it holds a run, which is not overwritten.
        """
        self.refuse_existing()
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        if pictures:
            self.keep_pictures(pictures)
        self.save_state(arrays, counters)
        with written_aside(self.path / 'config.json') as path:
            path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')

    def config(self) -> dict:
        """Return the configuration of the run.

        Raises:
            RunFolderError: If there is none.
        """
        try:
            return json.loads((self.path / 'config.json').read_text(encoding='utf-8'))
        except (OSError, ValueError) as error:
            raise RunFolderError(f'{self.path}: no run to go on with ({error}); name the folder of one') from error

    def log(self, row: dict) -> None:
        """Add a row to the log; what it lacks of FIELDS stays empty."""
        self.rows.append(dict.fromkeys(FIELDS, '') | {name: str(value) for name, value in row.items()})
        log = self.path / 'log.csv'
        with writing(log), log.open('a', newline='', encoding='utf-8') as file:
            writer = csv.DictWriter(file, FIELDS)
            if len(self.rows) == 1:
                writer.writeheader()
            writer.writerow(self.rows[-1])

    def rewind_log(self, step: int) -> None:
        """Drop the rows after the step that a run goes on from, as it will write them again."""
        log = self.path / 'log.csv'
        if log.exists():
            with log.open(newline='', encoding='utf-8') as file:
                # A row that was cut short by the end of the run has no step, or not all of its fields.
                whole = (row for row in csv.DictReader(file) if row['seconds'])
                # A log of an older version lacks columns, which stay empty for its rows.
                self.rows = [
                    {name: row.get(name) or '' for name in FIELDS} for row in whole if int(row['step']) <= step
                ]
        with written_aside(log) as path, path.open('w', newline='', encoding='utf-8') as file:
            writer = csv.DictWriter(file, FIELDS)
            if self.rows:
                writer.writeheader()
            writer.writerows(self.rows)

    def keep_pictures(self, pictures: Iterable[Picture]) -> None:
        """Note what each picture is for, so that a resumed run has the same ones even if others have come."""
        with written_aside(self.path / 'images.csv') as path, path.open('w', newline='', **_FILE_NAMES) as file:
            writer = csv.writer(file)
            writer.writerow(Picture._fields)
            writer.writerows(pictures)

    def pictures(self) -> list[Picture]:
        """Return what `keep_pictures` has noted.

        Raises:
            RunFolderError: If there is nothing.
        """
        try:
            with (self.path / 'images.csv').open(newline='', **_FILE_NAMES) as file:
                return [Picture(**row) for row in csv.DictReader(file)]
        except (OSError, TypeError, ValueError, csv.Error) as error:
            raise RunFolderError(f'{self.path}: no list of its pictures ({error}); start a new run') from error

    def save_state(self, arrays: Sequence[np.ndarray], counters: dict) -> None:
        """Save everything that the next step depends on.

        Args:
            arrays: Weights, optimizer and averages, in an order of the caller's.
            counters: What else there is, as JSON.

        Raises:
            RunFolderError: If a number is not finite; what was saved before is kept.
        """
        if not all(np.isfinite(array).all() for array in arrays):
            raise RunFolderError(f'a weight is no longer a finite number; the last good state is kept in {self.path}')
        with written_aside(self.path / 'state.npz') as path:
            np.savez(path, counters=json.dumps(counters), **{f'array_{i}': array for i, array in enumerate(arrays)})

    def load_state(self) -> tuple[list[np.ndarray], dict]:
        """Return the arrays and counters that were saved.

        Raises:
            RunFolderError: If there are none.
        """
        try:
            with np.load(self.path / 'state.npz') as state:
                arrays = [state[f'array_{i}'] for i in range(len(state.files) - 1)]
                return arrays, json.loads(str(state['counters']))
        except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise RunFolderError(f'{self.path}: no saved state to go on from ({error}); start a new run') from error

    def draw_curves(self) -> None:
        """Draw loss, accuracy and macro recall, over the epochs where there are any, else over the samples seen."""
        from matplotlib.figure import Figure

        import figures

        over = 'epoch' if self.rows and all(row['epoch'] for row in self.rows) else 'samples'
        figure = Figure(figsize=(9, 9), layout='constrained')
        panels = figure.subplots(len(PANELS), 1, sharex=True)
        for axes, (title, names) in zip(panels, PANELS, strict=True):
            for name in names:
                points = [(float(row[over]), float(row[name])) for row in self.rows if row[name]]
                if points:
                    # Points show where it was measured: one alone has no line.
                    axes.plot(*zip(*points, strict=True), label=name, marker='.' if name.startswith('val') else '')
                    axes.legend()
            axes.set_ylabel(title)
            axes.grid(alpha=0.3)
        panels[0].set_yscale('log')
        panels[-1].set_xlabel(over)
        figures.save(figure, self.path / 'curves.png')

    def draw_samples(self, images: np.ndarray, columns: int = 16) -> None:
        """Draw a sheet of samples.

        Args:
            images: (n, height, width) uint8 network input; a last row that is not full is left out.
            columns: images in a row.
        """
        from PIL import Image

        columns = min(columns, len(images))
        rows = len(images) // columns
        height, width = images.shape[1:]
        sheet = images[: rows * columns].reshape(rows, columns, height, width).transpose(0, 2, 1, 3)
        with written_aside(self.path / 'samples.png') as path:
            Image.fromarray(255 - sheet.reshape(rows * height, columns * width)).save(path)
