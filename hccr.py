"""The recogniser: images → network input → probabilities → candidates.

Everything that recognises goes through `HCCR`: the dialogue, the command line and the evaluation.

    from data_utils import find_images
    from hccr import HCCR
    for reading in HCCR().read(find_images(['images'])):
        print(reading.path, reading.candidates)
"""

import itertools
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_utils import ImageError, network_input, open_image, printable, thumbnail
from inference import BATCH_SIZES, KerasRuntime, LiteRtRuntime, Runtime, activation_maps, enlarge, usable_cores
from model_file import TEMPERATURES, ModelFileError, ModelInfo, default_model

# Neither Keras nor LiteRT up here: which of them is needed, and whether it is there, the model decides.

# Decoding goes on this many images ahead of the network, which also bounds the memory; a thread takes up to this many
# at a time, since handing over costs as well.
_AHEAD = 2 * BATCH_SIZES[-1]
_AT_A_TIME = 8

# Seconds for which a file is waited for before another thread helps: several scans take less, a photo more.
_PATIENCE = 0.05

# So many candidates are found sooner one by one than by sorting all classes.
_FEW = 100

# Pictures are kept for figures at this size at most.
_THUMBNAIL = 512


class Candidate(NamedTuple):
    """One character that an image may show."""

    character: str
    probability: float
    """0..1, calibrated: of the answers given with 0.9, nine in ten are right."""


class Reading(NamedTuple):
    """What was read in one image file: candidates, or an error."""

    path: Path
    candidates: tuple[Candidate, ...] = ()
    """Best first; empty where there is an error."""
    error: str = ''
    """Why the file could not be read, and what to do; empty where it could."""
    image: np.ndarray | None = None
    """uint8 `(height, width, 3)`, the picture at most 512 pixels wide and high; only if asked for."""
    network_input: np.ndarray | None = None
    """uint8 `(96, 96)`, ink bright on 0; only if asked for."""
    activation_map: np.ndarray | None = None
    """float32 `(96, 96)`, the class activation map of the best candidate, relative to the mean over all classes: see
    `inference.activation_maps`; only if asked for."""

    @property
    def is_sure(self) -> bool:
        """Whether the best candidate is likelier right than wrong."""
        return bool(self.candidates) and self.candidates[0].probability >= 0.5


class HCCR:
    """Offline handwritten Chinese character recogniser.

    Args:
        model: A model file, `.h5` for Keras or `.tflite` for LiteRT; or a Keras network that is already built; or an
            `inference.Runtime`. Defaults to the file that the program ships: `model_file.default_model`.
        labels: The characters in class order. Defaults to the model file's own.
        show_summary: Whether to print the layers of the network. Defaults to `False`.
        temperature: The logits are divided by it so that confidences come true. Defaults to the model file's own.
        crop: See `data_utils.network_input`. Defaults to `True`.
        precision: See `inference.KerasRuntime`; a `.tflite` file has its own. Defaults to `'auto'`.

    Attributes:
        runtime: What runs the network, see `inference`.
        model: The Keras network; None where something else runs it.
        info: What the model file says of itself; None for a network that is not from a file.

    Raises:
        FileNotFoundError, model_file.ModelFileError: If the model file is missing or not what it should be, or what
            runs it is not installed.
        ValueError: If the labels do not fit the network, if it does not read square gray images, or if the
            temperature is not within 0.001..1000.

    Example:

    >>> characters, scores = HCCR().predict(np.zeros((2, 96, 96, 1)), num_predictions=5)
    >>> characters.shape
    (5, 2)
    """

    def __init__(self, model=None, labels=None, show_summary=False, temperature=None, crop=True, precision='auto'):
        self.runtime, self.model, self.info = _runtime(default_model() if model is None else model, precision)
        height, width, channels = self.runtime.input_shape
        if height != width or channels != 1:
            raise ValueError(f'a recogniser reads square gray images, and this network {height}×{width}×{channels}')
        if self.info:
            labels = self.info.labels if labels is None else labels
            temperature = self.info.temperature if temperature is None else temperature
        if labels is None:
            raise ValueError('a network that is not from a file needs its labels')
        self.labels = tuple(labels)
        self.temperature = 1.0 if temperature is None else float(temperature)
        self.crop = crop
        low, high = TEMPERATURES
        if not low <= self.temperature <= high:
            raise ValueError(f'temperature is a number from {low:g} to {high:g}, received {temperature!r}')
        if len(self.labels) != self.runtime.num_classes:
            raise ValueError(f'{len(self.labels)} labels do not fit a network of {self.runtime.num_classes} classes')
        self._characters = np.array(self.labels)
        if show_summary:
            self.print_summary()

    @property
    def size(self) -> int:
        """The side of the network's input in pixels."""
        return self.runtime.input_shape[0]

    def print_summary(self) -> None:
        """Print the layers of the network; of one that LiteRT runs, what its file says of it."""
        if self.model:
            self.model.summary()
            return
        height, width, _ = self.info.input_shape
        print(f'{self.info.architecture}: {height}×{width} pixels → {len(self.labels)} characters, run by LiteRT.')
        print(printable(self.info.note))

    def predict(self, data, num_predictions=5, verbose=0, plot_cam=False):
        """Recognise network inputs, as the original's method of this name does.

        Args:
            data: Array of shape `(images, 96, 96)` or `(images, 96, 96, 1)`, values 0..255, ink bright on 0:
                `data_utils.network_input` of each image.
            num_predictions: How many candidates for each image, 1 to the number of classes. Defaults to `5`.
            verbose: Whether to print the candidates. Defaults to `0`.
            plot_cam: Whether to show the class activation map of every image, relative to the mean over all classes.
                Defaults to `False`.

        Returns:
            `(characters, scores)`, arrays of shape `(num_predictions, images)`: strings, and float32 probabilities
            0..1, best first.

        Raises:
            ValueError: If an argument is none of the above.
        """
        if not 1 <= num_predictions <= len(self.labels):
            raise ValueError(f'num_predictions is 1 to {len(self.labels)}, received {num_predictions}')
        data = self._checked(data)
        probabilities, maps = self._run(data, with_maps=plot_cam)
        best = _best(probabilities, num_predictions)
        characters, scores = self._characters[best].T, np.take_along_axis(probabilities, best, axis=1).T
        if verbose:
            for column in range(len(data)):
                for row in range(num_predictions):
                    print(response_line(Candidate(characters[row, column], scores[row, column])))
                print()
        if plot_cam:
            import figures

            figures.show(
                figures.answer_figure(255 - picture, picture, activation_map, character)
                for picture, activation_map, character in zip(data, maps, characters[0], strict=True)
            )
        return characters, scores

    def warm_up(self) -> None:
        """Compile the network for single images, which the first answer would wait for otherwise."""
        self._run(np.zeros((1, *self.runtime.input_shape[:2]), np.uint8), with_maps=False)

    def probabilities(self, inputs) -> np.ndarray:
        """Return the probability of every class.

        Args:
            inputs: Array of shape `(images, 96, 96)` or `(images, 96, 96, 1)`, values 0..255, ink bright on 0.

        Returns:
            float32 array of shape `(images, classes)`; each row sums to 1.

        Raises:
            ValueError: If the inputs have another shape or other values.
        """
        return self._run(self._checked(inputs), with_maps=False)[0]

    def read(
        self,
        paths: str | os.PathLike | np.ndarray | Iterable[str | os.PathLike | np.ndarray],
        num_predictions=5,
        with_images=False,
    ) -> Iterator[Reading]:
        """Recognise image files, in their order and in bounded memory.

        Files are opened in threads while the network works. A file that cannot be read gives a `Reading` with an error
        and does not stop the others.

        Args:
            paths: Image files, or one; `data_utils.find_images` finds them in folders. A picture that is open already,
                as `data_utils.open_image` returns it, is read as its file would be; its reading has an empty path.
            num_predictions: How many candidates for each image, 1 or more; a network of fewer classes gives them all.
                Defaults to `5`.
            with_images: Whether readings carry the picture, the network input and the activation map. Defaults to
                `False`.

        Returns:
            An iterator of one `Reading` for each path.

        Raises:
            ValueError: At once if `num_predictions` is none of the above; while reading, if a picture that is open is
                not of uint8 or has another shape.
        """
        if num_predictions < 1:
            raise ValueError(f'num_predictions is 1 or more, received {num_predictions}')
        one = isinstance(paths, str | os.PathLike | np.ndarray)
        return self._read([paths] if one else paths, num_predictions, with_images)

    def _read(self, paths, num_predictions: int, with_images: bool) -> Iterator[Reading]:
        # The first answers come alone and soon, the later ones in the batches that the network is fastest with. It has
        # a thread of its own, so that it works on the next of these while the answers to the last are written.
        sizes = iter(BATCH_SIZES)
        size = next(sizes)
        batch: list[Reading] = []
        waiting: deque[Future] = deque()
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix='network') as network:
            for prepared in self._prepared(paths, with_images):
                batch.append(prepared)
                if len(batch) < size:
                    continue
                waiting.append(network.submit(self._readings, batch, num_predictions, with_images))
                if size < BATCH_SIZES[-1] or len(waiting) == 2:
                    yield from waiting.popleft().result()
                batch, size = [], next(sizes, size)
            while waiting:
                yield from waiting.popleft().result()
            if batch:
                yield from self._readings(batch, num_predictions, with_images)

    def _prepared(self, paths, with_images):
        def prepare(source):
            is_open = isinstance(source, np.ndarray)
            path = Path() if is_open else Path(source)
            try:
                picture = source if is_open else open_image(path, reduced=self.crop)
                reading = Reading(path, network_input=network_input(picture, self.crop, self.size))
                return reading._replace(image=thumbnail(picture, _THUMBNAIL)) if with_images else reading
            except ImageError as error:
                return Reading(path, error=str(error))
            except MemoryError:
                return Reading(path, error='too large for the memory that is free: crop or scale it first')

        # One thread prepares small scans faster than two, which take turns in Python's lock; photos, whose decoding
        # leaves it, are what more threads are for. So another may work where one has been waited for.
        threads = min(8, usable_cores())
        permits, kept_back = threading.Semaphore(1), threads - 1
        stopped = threading.Event()

        def prepare_all(several):
            with permits:
                return [prepare(one) for one in several if not stopped.is_set()]

        waiting: deque[Future] = deque()

        def first() -> list[Reading]:
            nonlocal kept_back
            future = waiting.popleft()
            if kept_back and not wait([future], _PATIENCE).done:
                permits.release()
                kept_back -= 1
            return future.result()

        with ThreadPoolExecutor(threads, thread_name_prefix='decoding') as pool:
            try:
                for several in _chunks(paths):
                    waiting.append(pool.submit(prepare_all, several))
                    if len(waiting) >= _AHEAD // _AT_A_TIME:
                        yield from first()
                while waiting:
                    yield from first()
            finally:
                stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)

    def _readings(self, batch, num_predictions, with_images) -> list[Reading]:
        """Return the readings with their candidates, and without what nobody asked for."""
        inputs = [reading.network_input for reading in batch if not reading.error]
        if not inputs:
            return batch
        probabilities, maps = self._run(np.stack(inputs), with_maps=with_images)
        best = _best(probabilities, num_predictions)
        readings, row = [], 0
        for reading in batch:
            if not reading.error:
                candidates = tuple(Candidate(self.labels[i], float(probabilities[row, i])) for i in best[row])
                extras = {'activation_map': maps[row]} if with_images else {'network_input': None}
                reading = reading._replace(candidates=candidates, **extras)
                row += 1
            readings.append(reading)
        return readings

    def _checked(self, inputs) -> np.ndarray:
        inputs = np.asarray(inputs)
        shape = self.runtime.input_shape[:2]
        if inputs.ndim not in (3, 4) or inputs.shape[1:3] != shape or inputs.shape[3:] not in ((), (1,)):
            expected = f'(images, {shape[0]}, {shape[1]}[, 1])'
            raise ValueError(f'network inputs have the shape {expected}, received {inputs.shape}')
        # A network answers to anything, with confidence even to what was scaled otherwise.
        low, high = (inputs.min(), inputs.max()) if inputs.size else (0, 0)
        if not 0 <= low <= high <= 255:
            raise ValueError(f'network inputs have values 0..255, received {low} to {high}')
        if 0 < high <= 1:
            raise ValueError(f'network inputs have values 0..255, received {high} at most: multiply by 255?')
        return inputs.reshape(len(inputs), *shape)

    def _run(self, inputs: np.ndarray, with_maps: bool) -> tuple[np.ndarray, np.ndarray | None]:
        """Return probabilities `(images, classes)`, and the activation maps of the best classes where wanted."""
        probabilities, maps = (
            [np.zeros((0, len(self.labels)), np.float32)],
            [np.zeros((0, *inputs.shape[1:]), np.float32)],
        )
        for start in range(0, len(inputs), BATCH_SIZES[-1]):
            outputs = self.runtime.run(inputs[start : start + BATCH_SIZES[-1]])
            probabilities.append(_softmax(outputs.logits, self.temperature))
            if with_maps:
                best = outputs.logits.argmax(axis=1)
                small = activation_maps(outputs.features, self._classifier, best, relative=True)
                maps.extend(enlarge(one, inputs.shape[1:])[None] for one in small)
        return np.concatenate(probabilities), np.concatenate(maps) if with_maps else None

    @cached_property
    def _classifier(self) -> np.ndarray:
        return self.runtime.classifier()


def _runtime(model, precision: str):
    """Return (runtime, Keras network or None, description or None) of what `HCCR` takes for a model."""
    if isinstance(model, Runtime):
        return model, None, None
    if not isinstance(model, str | os.PathLike):
        return KerasRuntime(model, precision), model, None
    if Path(model).suffix == '.tflite':
        runtime = LiteRtRuntime(model)
        return runtime, None, runtime.info
    network, info = _load_keras(model)
    return KerasRuntime(network, precision, model), network, info


def _load_keras(path) -> tuple[object, ModelInfo]:
    try:
        from melnyk_net import load_model
    except ModuleNotFoundError as error:
        reason = f'{error.name}, which it needs, is not installed'
        raise ModelFileError(path, reason, 'pip install -r requirements.txt, or give a .tflite file') from error
    return load_model(path)


def response_line(candidate: Candidate) -> str:
    """Return the original's line for one candidate."""
    return f"Dear User, I am {candidate.probability * 100:.3f} % sure it's     {candidate.character}"


def _chunks(items: Iterable) -> Iterator[list]:
    """Give items in lists of 1, 1, 2, 4 and then 8: the first answer waits for one image only."""
    items, size = iter(items), 0
    while chunk := list(itertools.islice(items, max(1, size))):
        yield chunk
        size = min(_AT_A_TIME, max(1, 2 * size))


def _best(probabilities: np.ndarray, count: int) -> np.ndarray:
    """Return the indices `(images, count)` of the largest probabilities, best first; of equals the first."""
    if count > _FEW:
        return np.argsort(-probabilities, axis=1, kind='stable')[:, :count]
    left = probabilities.copy()
    rows, best = np.arange(len(left)), np.empty((len(left), min(count, left.shape[1])), np.intp)
    for column in best.T:
        column[:] = left.argmax(axis=1)
        left[rows, column] = -1
    return best


def _softmax(logits: np.ndarray, temperature: float) -> np.ndarray:
    # The largest is taken off first: what overflows then is far below it, and its probability is 0.
    with np.errstate(over='ignore'):
        powers = np.exp((logits - logits.max(axis=1, keepdims=True)) / np.float32(temperature))
    return powers / powers.sum(axis=1, keepdims=True)
