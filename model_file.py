"""Model files: what they say of themselves, and how they are read without being trusted.

A model file is HDF5 as Keras writes it, plus one attribute with the label table. Reading one never deserialises
anything: the network is built by the program, and the file gives numbers only, after they have been checked.

An exported file, `.tflite` or `.onnx`, holds the network itself and the same description: in a `.tflite` as an
associated file, which TensorFlow Lite's metadata format appends to the model as a zip archive (`unzip -p FILE
offline_hccr.json`), in an `.onnx` as one of its metadata properties. Nothing here needs Keras.
"""

import contextlib
import importlib.util
import io
import json
import mmap
import os
import re
import stat
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from data_utils import LABELS

if TYPE_CHECKING:  # it is not there in a light installation
    import h5py

DEFAULT_MODEL = Path(__file__).with_name('melnyk_net.h5')
LIGHT_MODEL = Path(__file__).with_name('melnyk_net.tflite')

# The attribute, property or associated file of our files that says what the numbers mean, as JSON.
_ATTRIBUTE = 'offline_hccr'
_ASSOCIATED_FILE = f'{_ATTRIBUTE}.json'
_FORMAT = 1
_MAGIC = b'\x89HDF\r\n\x1a\n'
_TFLITE_MAGIC = b'TFL3'  # at offset 4, as in every flatbuffer that names its schema
# The description of 30,000 labels takes 90 KB.
_MAX_DESCRIPTION = 2**20
# Melnyk-Net with its optimizer's state takes 79 MB. More than this is no network of this project.
_MAX_BYTES = 512 * 2**20
_MAX_CLASSES = 30_000
_MAX_SIDE = 512
# Those of real networks are near 1; beyond these the probabilities are no numbers, or all the same.
TEMPERATURES = (1e-3, 1e3)

# The name of the pooling layer in the file says which of the three a network has.
POOLING_NAMES = {
    'GWAP': 'global_weighted_average_pooling2d_1',
    'GWOAP': 'global_weighted_output_average_pooling2d_1',
    'GAP': 'global_average_pooling2d_1',
}


class ModelFileError(ValueError):
    """A model file that is not what it should be. Its text names the file, the reason and the next step."""

    def __init__(self, path, reason, advice='use a model file that this program or the original has saved'):
        super().__init__(f'{path}: {reason}; {advice}')
        self.path, self.reason, self.advice = path, reason, advice


class ModelInfo(NamedTuple):
    """What a model file says of itself."""

    input_shape: tuple[int, int, int]
    global_average_type: str
    labels: tuple[str, ...]
    temperature: float
    """The classifier's logits are divided by this, 0.001 to 1000, before the softmax, so that the confidences come
    true."""
    note: str
    """Where the weights come from: a short model card."""
    architecture: str = 'melnyk_net'
    """`'melnyk_net'`, `'mobilenet_v3_small'` or `'mobilenet_v3_large'`."""

    def checked(self) -> 'ModelInfo':
        """Return it, with tuples where JSON has lists.

        Raises:
            ValueError: If a field is not what it should be.
        """
        info = self._replace(input_shape=tuple(self.input_shape), labels=tuple(self.labels))
        shape = info.input_shape
        if len(shape) != 3 or not all(type(n) is int and 0 < n <= _MAX_SIDE for n in shape):
            raise ValueError(f'input_shape is (height, width, channels), received {shape!r}')
        if info.global_average_type not in POOLING_NAMES:
            raise ValueError(f'the pooling is one of {", ".join(POOLING_NAMES)}, received {info.global_average_type!r}')
        if not all(isinstance(label, str) and len(label) == 1 for label in info.labels):
            raise ValueError('every label is one character')
        if len(set(info.labels)) != len(info.labels):
            raise ValueError('a label occurs twice')
        if len(info.labels) == len(LABELS) and info.labels != LABELS:
            raise ValueError('3755 labels that are not the published class order')
        low, high = TEMPERATURES
        if not (isinstance(info.temperature, float) and low <= info.temperature <= high):
            raise ValueError(f'temperature is a number from {low:g} to {high:g}, received {info.temperature!r}')
        if not isinstance(info.note, str) or not isinstance(info.architecture, str):
            raise ValueError(f'note and architecture are texts, received {info.note!r} and {info.architecture!r}')
        return info

    def to_json(self) -> str:
        """Return the description that is stored in a file."""
        meaning = {'format': _FORMAT, **self._asdict(), 'labels': ''.join(self.labels)}
        return json.dumps(meaning, ensure_ascii=False)

    @classmethod
    def from_json(cls, path, text) -> 'ModelInfo':
        """Return what a description says.

        Raises:
            ModelFileError: If it is damaged, or of a later format; `path` is the file that the error names.
        """
        try:
            meaning = json.loads(text)
            if meaning.pop('format') > _FORMAT:
                raise ModelFileError(path, 'it was saved by a newer version of this program', 'update the program')
            return cls(**meaning).checked()
        except ModelFileError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ModelFileError(path, f'its description is damaged ({error})') from error


def describe(path, info: ModelInfo) -> None:
    """Write the description into a file that holds the network already: HDF5, `.tflite` or `.onnx`."""
    match Path(path).suffix:
        case '.tflite':
            import zipfile

            with zipfile.ZipFile(path, 'a') as archive:
                # A fixed date, so that the same network gives the same file.
                archive.writestr(zipfile.ZipInfo(_ASSOCIATED_FILE), info.to_json())
        case '.onnx':
            import onnx

            model = onnx.load(path)
            onnx.helper.set_model_props(model, {_ATTRIBUTE: info.to_json()})
            onnx.save(model, path)
        case _:
            import h5py

            with h5py.File(path, 'r+') as file:
                file.attrs[_ATTRIBUTE] = info.to_json()


def default_model() -> Path:
    """Return the shipped model file that can be run here: the one for Keras, or without its backend the light one."""
    backend = os.environ.get('KERAS_BACKEND') or 'tensorflow'
    return DEFAULT_MODEL if importlib.util.find_spec(backend) else LIGHT_MODEL


def read_tflite(path) -> tuple[bytes, ModelInfo]:
    """Read a `.tflite` file that nobody should trust.

    Args:
        path: A file that `export.py` wrote.

    Returns:
        The content of the file, whose network is not looked at, and what the file says of it.

    Raises:
        FileNotFoundError: If there is no such file.
        ModelFileError: If it is too large, no TensorFlow Lite model, or not described.
    """
    import zipfile

    path = Path(path)
    check_regular(path)
    try:
        content = path.read_bytes()
    except PermissionError as error:
        raise ModelFileError(path, 'no permission to read it') from error
    if content[4:8] != _TFLITE_MAGIC:
        raise ModelFileError(path, 'not a TensorFlow Lite model')
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive, archive.open(_ASSOCIATED_FILE) as file:
            text = file.read(_MAX_DESCRIPTION + 1)
    except Exception as error:  # zipfile and its decoders raise a dozen kinds on damaged data
        reason = 'it does not say what its classes are' if isinstance(error, KeyError) else f'no description ({error})'
        raise ModelFileError(path, reason, 'use a file that "melnyk_net.py export" has written') from error
    if len(text) > _MAX_DESCRIPTION:
        raise ModelFileError(path, 'a description that is too long')
    return content, ModelInfo.from_json(path, text)


def check_regular(path: Path) -> None:
    """Raise what is to be said of a path that cannot be a model file.

    Raises:
        FileNotFoundError: If there is no such file.
        ModelFileError: If it is a folder or device, or too large.
    """
    if not path.exists():
        raise FileNotFoundError(f'{path}: no such model file; give one with --model, or train one with train.py')
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ModelFileError(path, 'not a regular file')
    if status.st_size > _MAX_BYTES:
        raise ModelFileError(path, f'{status.st_size:,} bytes are more than any file of this network has')


@contextlib.contextmanager
def opened(path) -> Iterator['ModelFile']:
    """Open an HDF5 model file that nobody should trust.

    Args:
        path: A whole-model or weights-only HDF5 file that Keras 2 or 3 wrote.

    Yields:
        A `ModelFile`.

    Raises:
        FileNotFoundError: If there is no such file.
        ModelFileError: If a check fails, here or in the methods of the `ModelFile`.
    """
    import h5py

    path = Path(path)
    check_regular(path)
    try:
        with open(path, 'rb') as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                if path.suffix == '.onnx':
                    raise ModelFileError(path, 'ONNX files are for other programs', 'use the .h5 or .tflite file')
                raise ModelFileError(path, 'not an HDF5 file')
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                if not _has_sound_heaps(content):
                    raise ModelFileError(path, 'damaged HDF5 file (a heap of texts)', 'copy or download it again')
                if not _has_short_description(content):
                    raise ModelFileError(path, 'a description that is too long')
        with h5py.File(path, 'r') as file:
            yield ModelFile(path, file)
    except ModelFileError:
        raise
    except PermissionError as error:
        raise ModelFileError(path, 'no permission to read it') from error
    except Exception as error:  # the HDF5 library raises nearly anything on damaged data
        raise ModelFileError(path, f'damaged HDF5 file ({error})', 'copy or download it again') from error


# Section III.E of the HDF5 file format: signature and version 1; then 3 bytes, the length of the whole, and objects:
# number, references, 4 bytes, length of the text, which is padded to 8 bytes.
_HEAP = re.compile(b'GCOL\x01')
_HEAP_LENGTH = struct.Struct('<8xQ')
_HEAP_OBJECT = struct.Struct('<H6xQ')
_MIN_HEAP = 4096  # of fewer bytes none is


def _has_sound_heaps(content: mmap.mmap) -> bool:
    """Return whether each global heap of an HDF5 file comes to an end.

    The HDF5 library, 1.14.6 for one, goes round for ever in a heap with an object that takes no room.
    """
    # Addresses and lengths of 8 bytes, as everybody writes them; where that is said depends on the version.
    sizes = content[13:15] if content[8:9] < b'\x02' else content[9:11]
    if sizes != b'\x08\x08':
        return False
    for match in _HEAP.finditer(content):
        place = match.start()
        if place + _HEAP_LENGTH.size > len(content):
            continue
        (length,) = _HEAP_LENGTH.unpack_from(content, place)
        if not _MIN_HEAP <= length <= len(content) - place:
            continue  # the library refuses it, too; or it is no heap but the numbers of a weight
        end = place + length
        place += _HEAP_LENGTH.size
        while end - place >= _HEAP_OBJECT.size:
            number, size = _HEAP_OBJECT.unpack_from(content, place)
            # Object 0 is the room that is left, its own head included.
            taken = _HEAP_OBJECT.size + -(-size // 8) * 8 if number else size
            if not _HEAP_OBJECT.size <= taken <= end - place:
                return False
            place += taken
    return True


# Section IV.A.2.m: version, 1 byte, sizes of name, type and space; in version 3 one byte more. In version 1 each of the
# three is padded to 8 bytes. A text of variable length is said to be that long before it is looked for in a heap.
_NAME_OF_DESCRIPTION = re.compile(re.escape(_ATTRIBUTE.encode()) + b'\x00')
_MESSAGE = struct.Struct('<BxHHH')
_VARIABLE_LENGTH = 9  # class of a type


def _has_short_description(content: mmap.mmap) -> bool:
    """Return whether no description of an HDF5 file is said to be longer than any is.

    The HDF5 library takes as much memory as the file says, up to 4 GB, before it looks whether there is such a text.
    """
    for match in _NAME_OF_DESCRIPTION.finditer(content):
        name = match.start()
        for version, start in ((1, name - 8), (2, name - 8), (3, name - 9)):
            if start < 0 or content[start] != version:
                continue
            _, *sizes = _MESSAGE.unpack_from(content, start)
            if version == 1:
                sizes = [-(-size // 8) * 8 for size in sizes]
            kind, data = name + sizes[0], name + sum(sizes)
            if data + 4 > len(content) or content[kind] & 15 != _VARIABLE_LENGTH:
                continue
            if int.from_bytes(content[data : data + 4], 'little') > _MAX_DESCRIPTION:
                return False
    return True


class ModelFile:
    """An open model file.

    Attributes:
        info: What it says of itself. A file without a label table is the original's, in the published class order.
    """

    def __init__(self, path: Path, file: 'h5py.File'):
        import h5py

        self._path = path
        # Keras 2 writes a weights-only file without the outer group.
        self._root = self._member(file, 'model_weights') if 'model_weights' in file else file
        if not isinstance(self._root, h5py.Group):
            raise ModelFileError(path, 'its weights are not in layers')
        pooling = next((kind for kind, name in POOLING_NAMES.items() if name in self._root), None)
        if pooling is None or 'dense_1' not in self._root:
            raise ModelFileError(path, 'it does not hold a network of this project with its classifier')
        num_classes = self._dataset('dense_1', 'bias').shape[0]
        if not 1 <= num_classes <= _MAX_CLASSES:
            raise ModelFileError(path, f'a classifier of {num_classes:,} classes')

        if _ATTRIBUTE in file.attrs:
            # An array may say the same megabyte many times over, in a small file; and of a list that is no text, the
            # HDF5 library believes whatever length and type the file gives it, and crashes.
            description = file.attrs.get_id(_ATTRIBUTE)
            kind = description.get_type()
            if description.shape != () or not isinstance(kind, h5py.h5t.TypeStringID):
                raise ModelFileError(path, 'its description is damaged (not a text)')
            if kind.get_size() > _MAX_DESCRIPTION:
                raise ModelFileError(path, 'a description that is too long')
            text = file.attrs[_ATTRIBUTE]
            if isinstance(text, str) and len(text) > _MAX_DESCRIPTION:
                raise ModelFileError(path, 'a description that is too long')
            self.info = ModelInfo.from_json(path, text)
        elif num_classes == len(LABELS):
            self.info = ModelInfo((96, 96, 1), pooling, LABELS, 1.0, '')
        else:
            raise ModelFileError(path, f'{num_classes} classes and no label table')
        if self.info.global_average_type != pooling:
            raise ModelFileError(path, f'described as {self.info.global_average_type}, but it is {pooling}')
        if len(self.info.labels) != num_classes:
            raise ModelFileError(path, f'{len(self.info.labels)} labels for {num_classes} classes')

    def refuse_other_layers(self, expected: Iterable[str]) -> None:
        """Raise `ModelFileError` if the file holds a layer that the network has not."""
        # A name that is no text is given as bytes.
        strange = sorted(map(str, set(self._root) - set(expected) - {'top_level_model_weights'}))
        if strange:
            raise ModelFileError(self._path, f'it has layers that the network has not: {", ".join(strange[:3])}')

    def weight(self, layer: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Return the float32 weight of a layer.

        Args:
            layer: Name of the layer.
            name: Name of the weight in it, such as `'kernel'`.
            shape: What it has to have.

        Raises:
            ModelFileError: If it is missing, not stored in the file itself, of another shape, or not finite, or if it
                is a variance below 0.
        """
        dataset = self._dataset(layer, name)
        if dataset.shape != shape:
            raise ModelFileError(self._path, f'{layer}/{name} has the shape {dataset.shape} instead of {shape}')
        values = dataset[()].astype(np.float32)
        if not np.isfinite(values).all():
            raise ModelFileError(self._path, f'{layer}/{name} has values that are not finite')
        if name == 'moving_variance' and (values < 0).any():
            raise ModelFileError(self._path, f'{layer}/{name} has values below 0')
        return values

    def _member(self, group, name):
        """Return a member of an HDF5 group that lies in the same file; links are how a file reads other files."""
        import h5py

        if not isinstance(group, h5py.Group) or not isinstance(group.get(name, getlink=True), h5py.HardLink):
            raise ModelFileError(self._path, f'{name!r} is missing, or a link')
        return group[name]

    def _dataset(self, layer, name):
        import h5py

        group = self._member(self._member(self._root, layer), layer)
        if not isinstance(group, h5py.Group):
            raise ModelFileError(self._path, f'{layer} is not a layer')
        # Keras 2 wrote TensorFlow's names, `kernel:0`.
        dataset = self._member(group, name if name in group else f'{name}:0')
        if not isinstance(dataset, h5py.Dataset) or dataset.is_virtual or dataset.external:
            raise ModelFileError(self._path, f'{layer}/{name} is not stored in the file itself')
        if dataset.dtype.kind != 'f' or not dataset.shape:
            raise ModelFileError(self._path, f'{layer}/{name} is not an array of floating-point numbers')
        # A chunk is unpacked whole: one that is larger than its dataset would be up to 4 GB of nothing.
        if dataset.chunks and any(chunk > side for chunk, side in zip(dataset.chunks, dataset.shape, strict=True)):
            raise ModelFileError(self._path, f'{layer}/{name} is stored in chunks larger than itself')
        return dataset
