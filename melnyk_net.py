"""Melnyk-Net: the network, its pooling layers, its file format and its class activation maps.

The architecture is the one of P. Melnyk, Z. You and K. Li, "A high-performance CNN method for offline handwritten
Chinese character recognition and visualization", Soft Computing 24, 2020 (arXiv 1812.11489): 14 convolutions of 3×3 in
five groups, and one trainable weight for every position and channel of the last feature map.



Model files are HDF5 as Keras writes them, plus one attribute with the label table. Loading one never deserialises
anything: the network is built here, and the file gives numbers only, after it has been checked.
"""

import contextlib
import json
import math
import stat
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np
from keras import layers, ops

from data_utils import LABELS, written_aside

DEFAULT_MODEL = Path(__file__).with_name('melnyk_net.h5')

# Filters of the 3×3 convolutions. Average pooling halves the map between the groups: 96 → 48 → 24 → 12 → 6.
FILTER_GROUPS = ((64, 64), (96, 64, 96), (128, 96, 128), (256, 192, 256), (448, 256, 448))

_PACKAGE = 'offline_hccr'


class _WeightedPooling2D(layers.Layer):
    """What both weighted poolings share: the data format and the weight `W`, ones at the start."""

    def __init__(self, data_format=None, **kwargs):
        super().__init__(**kwargs)
        self.data_format = keras.config.image_data_format() if data_format is None else data_format
        if self.data_format not in ('channels_last', 'channels_first'):
            raise ValueError(f"data_format is 'channels_last' or 'channels_first', received {data_format!r}")
        self.input_spec = layers.InputSpec(ndim=4)

    def _weight_shape(self, height, width, channels):
        raise NotImplementedError

    def build(self, input_shape):
        _, *sides = input_shape
        if self.data_format == 'channels_first':
            sides = [*sides[1:], sides[0]]
        self.W = self.add_weight(name='W', shape=self._weight_shape(*sides), initializer='ones')

    def _channels_last(self, inputs):
        return ops.transpose(inputs, (0, 2, 3, 1)) if self.data_format == 'channels_first' else inputs

    def compute_output_shape(self, input_shape):
        return (input_shape[0], input_shape[1 if self.data_format == 'channels_first' else 3])

    def get_config(self):
        return {**super().get_config(), 'data_format': self.data_format}


@keras.saving.register_keras_serializable(_PACKAGE)
class GlobalWeightedAveragePooling2D(_WeightedPooling2D):
    """Global weighted average pooling (GWAP): every position of every channel has a weight of its own.

    `output[k] = Σ_xy W[x, y, k] · f[x, y, k]`. It is a sum, not a mean, as in the paper: the weights start at one and
    learn the scale. The network learns where on the page a feature counts.

    Args:
        data_format: `'channels_last'` or `'channels_first'`. Defaults to `keras.config.image_data_format()`.

    Input shape:
        `(batch, height, width, channels)`, or `(batch, channels, height, width)` for `'channels_first'`; height and
        width are fixed, since the weight `W` has the shape `(height, width, channels)`.

    Output shape:
        `(batch, channels)`

    Example:

    >>> GlobalWeightedAveragePooling2D()(np.ones((2, 6, 6, 448))).shape
    (2, 448)
    """

    def _weight_shape(self, height, width, channels):
        if height is None or width is None:
            raise ValueError(
                f'global weighted average pooling needs a fixed height and width, received {height, width}'
            )
        return (height, width, channels)

    def call(self, inputs):
        return ops.sum(self._channels_last(inputs) * self.W, axis=(1, 2))


@keras.saving.register_keras_serializable(_PACKAGE)
class GlobalWeightedOutputAveragePooling2D(_WeightedPooling2D):
    """Global weighted output average pooling (GWOAP): one weight a channel.

    `output[k] = W[k] · Σ_xy f[x, y, k]`, the paper's lighter variant of GWAP; any height and width.

    Args:
        data_format: `'channels_last'` or `'channels_first'`. Defaults to `keras.config.image_data_format()`.

    Input shape:
        `(batch, height, width, channels)`, or `(batch, channels, height, width)` for `'channels_first'`.

    Output shape:
        `(batch, channels)`

    Example:

    >>> GlobalWeightedOutputAveragePooling2D()(np.ones((2, 6, 6, 448))).shape
    (2, 448)
    """

    def _weight_shape(self, height, width, channels):
        return (channels,)

    def call(self, inputs):
        return ops.sum(self._channels_last(inputs), axis=(1, 2)) * self.W


# The name of the pooling layer in the file says which of the three a network has.
POOLINGS = {
    'GWAP': ('global_weighted_average_pooling2d_1', GlobalWeightedAveragePooling2D),
    'GWOAP': ('global_weighted_output_average_pooling2d_1', GlobalWeightedOutputAveragePooling2D),
    'GAP': ('global_average_pooling2d_1', layers.GlobalAveragePooling2D),
}


def melnyk_net(
    input_shape=(96, 96, 1),
    reg=1e-3,
    global_average_type='GWAP',
    use_pretrained_weights=False,
    num_classes=3755,
    include_top=True,
    dropout=0.5,
    normalization=layers.BatchNormalization,
):
    """Build Melnyk-Net.

    Args:
        input_shape: `(height, width, channels)` of the image. Defaults to `(96, 96, 1)`.
        reg: Strength of the L2 regularisation of the kernels. Defaults to `1e-3`, the paper's.
        global_average_type: `'GWAP'`, `'GWOAP'` or `'GAP'`, the pooling before the classifier. Defaults to `'GWAP'`.
        use_pretrained_weights: Whether to read the weights of the model file beside this module, which fits the
            default arguments only. Defaults to `False`.
        num_classes: Number of classes. Defaults to 3755, the characters of GB2312-80 level 1.
        include_top: Whether the softmax classifier ends the network; without it the output is the 448 features after
            the dropout. Defaults to `True`.
        dropout: Fraction of the features dropped in training. Defaults to `0.5`.
        normalization: Class of the layer after each convolution, called with `name=` alone. Defaults to
            `keras.layers.BatchNormalization`.

    Input shape:
        `(batch, height, width, channels)`, values 0..255 with the ink bright on 0; they are not divided by 255.

    Output shape:
        `(batch, num_classes)` probabilities in float32, or `(batch, 448)` features.

    Returns:
        A `keras.Model` whose layers have the names of the published file (`conv2d_1` … `dense_1`).

    Raises:
        ValueError: If an argument is none of the above.

    Example:

    >>> melnyk_net()(np.zeros((1, 96, 96, 1))).shape
    (1, 3755)
    """
    if global_average_type not in POOLINGS:
        raise ValueError(f'global_average_type is one of {", ".join(POOLINGS)}, received {global_average_type!r}')
    if len(input_shape) != 3:
        raise ValueError(f'input_shape is (height, width, channels), received {input_shape!r}')
    if num_classes < 1:
        raise ValueError(f'num_classes is at least 1, received {num_classes!r}')

    regularizer = keras.regularizers.L2(reg) if reg else None
    x = image = keras.Input(input_shape, name='input_1')
    number = 0
    for group, filters_of_group in enumerate(FILTER_GROUPS):
        if group:
            x = layers.AveragePooling2D(3, strides=2, padding='same', name=f'average_pooling2d_{group}')(x)
        for filters in filters_of_group:
            number += 1
            x = layers.Conv2D(
                filters,
                3,
                padding='same',
                use_bias=False,  # the batch normalization that follows has one
                kernel_initializer='he_normal',
                kernel_regularizer=regularizer,
                name=f'conv2d_{number}',
            )(x)
            x = normalization(name=f'batch_normalization_{number}')(x)
            x = layers.Activation('relu', name=f'activation_{number}')(x)

    pooling_name, pooling = POOLINGS[global_average_type]
    x = pooling(name=pooling_name)(x)
    x = layers.Dropout(dropout, name='dropout_1')(x)
    if include_top:
        x = layers.Dense(
            num_classes,
            activation='softmax',
            kernel_initializer=keras.initializers.RandomNormal(stddev=1e-3, seed=1996),
            kernel_regularizer=regularizer,
            dtype='float32',  # probabilities of 3755 classes need more digits than bfloat16 has
            name='dense_1',
        )(x)
    model = keras.Model(image, x, name='melnyk_net')
    if use_pretrained_weights:
        pretrained, _ = load_model(DEFAULT_MODEL)
        if [w.shape for w in pretrained.weights] != [w.shape for w in model.weights]:
            raise ValueError(f'the weights of {DEFAULT_MODEL.name} fit the default arguments only')
        model.set_weights(pretrained.get_weights())
    return model


# --- Class activation maps -------------------------------------------------------------------------------------------


class ActivationMapper:
    """Class activation maps of a network that ends in a global pooling and one dense layer.

    The layers are found by what they are, never by name: the last one that turns maps into a vector, and the last dense
    one. Everything between them must leave the features alone, as dropout does.

    Args:
        model: A network of this module with its classifier.

    Attributes:
        extractor: `keras.Model` from the input to `[features, probabilities]`, so that one pass gives both.

    Raises:
        ValueError: If the network has no such ending.
    """

    def __init__(self, model: keras.Model):
        poolings = [layer for layer in model.layers if isinstance(layer, tuple(kind for _, kind in POOLINGS.values()))]
        dense = [layer for layer in model.layers if isinstance(layer, layers.Dense)]
        if not poolings or not dense:
            raise ValueError(f'no class activation map: {model.name!r} does not end in global pooling and a classifier')
        self._pooling, self._classifier = poolings[-1], dense[-1]
        self.extractor = keras.Model(model.inputs[0], [self._pooling.input, model.output])

    def maps(self, features, classes, relative: bool = False) -> np.ndarray:
        """Return the class activation maps of a batch.

        `M_c[x, y] = Σ_k W[x, y, k] · f[x, y, k] · w[k, c]` with the pooling's `W` and the classifier's `w`: the part of
        class c's score that comes from each position (B. Zhou et al., CVPR 2016).

        Args:
            features: `(batch, height, width, channels)` array, the first output of `extractor`.
            classes: `batch` class indices.
            relative: Whether to take off the mean of the maps of all classes. A softmax does not see what all classes
                share, and in a map it hides what speaks for this one. Defaults to `False`, the paper's map.

        Returns:
            float32 array of shape `(batch, height, width)`, 6×6 for an image of 96×96; any sign, not scaled.
        """
        features = np.asarray(ops.convert_to_numpy(features), np.float32)
        if self._pooling.data_format == 'channels_first':
            features = features.transpose(0, 2, 3, 1)
        if self._pooling.weights:
            weight = ops.convert_to_numpy(self._pooling.W)
        else:  # the mean weighs every position alike
            weight = np.float32(1 / (features.shape[1] * features.shape[2]))
        kernel = ops.convert_to_numpy(self._classifier.kernel)
        if relative:
            kernel = kernel - kernel.mean(axis=1, keepdims=True)
        kernel = kernel[:, list(classes)]
        return np.einsum('bxyk,kb->bxy', features * weight, kernel)


def class_activation_map(model: keras.Model, image, class_index: int) -> np.ndarray:
    """Return where a network sees a class in an image.

    Args:
        model: Melnyk-Net with any of the three poolings.
        image: Array of shape `(height, width)`, `(height, width, 1)` or with a batch axis of 1 before; network input,
            values 0..255, ink bright on 0.
        class_index: Index of the class in the network's output.

    Returns:
        float32 array of shape `(height, width)`: the map, bilinearly enlarged to the image. What is high speaks for the
        class; any sign, not scaled.

    Raises:
        ValueError: If the model does not end in global pooling and a classifier, or there is no such class.
    """
    mapper = ActivationMapper(model)
    height, width, channels = model.input_shape[1:]
    if not 0 <= class_index < model.output_shape[-1]:
        raise ValueError(f'the network has classes 0 to {model.output_shape[-1] - 1}, received {class_index}')
    batch = np.asarray(image, np.float32).reshape(1, height, width, channels)
    features, _ = mapper.extractor(batch, training=False)
    return enlarge(mapper.maps(features, [class_index])[0], (height, width))


def enlarge(activation_map: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Enlarge a map bilinearly to `(height, width)`, float32."""
    from PIL import Image

    small = Image.fromarray(np.asarray(activation_map, np.float32))
    return np.asarray(small.resize(shape[::-1], Image.Resampling.BILINEAR))


# --- Model files -----------------------------------------------------------------------------------------------------

# The attribute of our files that says what the numbers mean, as JSON.
_ATTRIBUTE = 'offline_hccr'
_FORMAT = 1
_MAGIC = b'\x89HDF\r\n\x1a\n'
# Melnyk-Net with its optimizer's state takes 79 MB. More than this is no network of this module.
_MAX_BYTES = 512 * 2**20
_MAX_CLASSES = 30_000
_MAX_SIDE = 512


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
    """The classifier's logits are divided by this before the softmax, so that the confidences come true."""
    note: str
    """Where the weights come from: a short model card."""


def save_model(model, path, labels=LABELS, temperature=1.0, note=''):
    """Save a network as a whole-model HDF5 file that carries its label table.

    What is written is always the plain network in float32, without optimizer, whatever precision or normalization layer
    it was trained with, so that `keras.models.load_model` reads the file as well (after `import melnyk_net`). The file
    is written aside and renamed: an older one stays whole until the new one is complete.

    Args:
        model: A Melnyk-Net with its classifier.
        path: Where to, a name that ends in `.h5` or `.hdf5`.
        labels: The characters in class order, one for each output. Defaults to `LABELS`.
        temperature: See `ModelInfo`. Defaults to `1.0`.
        note: Where the weights come from. Defaults to `''`.

    Raises:
        ValueError: If the labels do not fit the network, or a weight is not finite.
        OSError: If the file cannot be written.
    """
    import h5py

    path = Path(path)
    if path.suffix not in ('.h5', '.hdf5'):
        raise ValueError(f'a model file ends in .h5 or .hdf5, received {path}')
    info = ModelInfo(tuple(model.input_shape[1:]), _global_average_type(model), tuple(labels), float(temperature), note)
    if len(info.labels) != model.output_shape[-1]:
        raise ValueError(f'{len(info.labels)} labels do not fit a network of {model.output_shape[-1]} classes')
    _check_info(info)
    weights = model.get_weights()
    if not all(np.isfinite(weight).all() for weight in weights):
        raise ValueError('the network has weights that are not finite, and is not saved')
    plain = _plain_network(info)
    plain.set_weights(weights)

    with written_aside(path) as aside:
        with _quiet_absl():  # Keras advises against HDF5, which is the format that this project is about
            plain.save(aside)
        with h5py.File(aside, 'r+') as file:
            meaning = {'format': _FORMAT, **info._asdict(), 'labels': ''.join(info.labels)}
            file.attrs[_ATTRIBUTE] = json.dumps(meaning, ensure_ascii=False)


def load_model(path) -> tuple[keras.Model, ModelInfo]:
    """Load a network from an HDF5 file without trusting the file.

    The network is built by `melnyk_net`. From the file come numbers alone, after these checks: a regular file of a sane
    size with HDF5's signature; the layers of Melnyk-Net and no others; every weight a dataset inside the file itself,
    of the expected shape, floating and finite; a label table of the published class order. What else the file holds is
    never looked at, so that nothing in it can run.

    It reads the files of `save_model`, whole-model or weights-only HDF5 files that Keras 2 or 3 wrote, and so the
    original's `Melnyk-Net.hdf5`, whose class order is the published one.

    Args:
        path: The file.

    Returns:
        The network in float32, and what the file says of it.

    Raises:
        FileNotFoundError: If there is no such file.
        ModelFileError: If a check fails.
    """
    import h5py

    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f'{path}: no such model file; give one with --model, or train one with train.py')
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ModelFileError(path, 'not a regular file')
    if status.st_size > _MAX_BYTES:
        raise ModelFileError(path, f'{status.st_size:,} bytes are more than any file of this network has')
    try:
        with open(path, 'rb') as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                raise ModelFileError(path, 'not an HDF5 file')
        with h5py.File(path, 'r') as file:
            return _read_model(path, file)
    except ModelFileError:
        raise
    except PermissionError as error:
        raise ModelFileError(path, 'no permission to read it') from error
    except Exception as error:  # the HDF5 library raises nearly anything on damaged data
        raise ModelFileError(path, f'damaged HDF5 file ({error})', 'copy or download it again') from error


def _read_model(path, file) -> tuple[keras.Model, ModelInfo]:
    # Keras 2 writes a weights-only file without the outer group.
    root = _member(path, file, 'model_weights') if 'model_weights' in file else file
    global_average_type = next((kind for kind, (name, _) in POOLINGS.items() if name in root), None)
    if global_average_type is None or 'dense_1' not in root:
        raise ModelFileError(path, 'it does not hold a Melnyk-Net with its classifier')

    num_classes = _dataset(path, root, 'dense_1', 'bias').shape[0]
    if not 1 <= num_classes <= _MAX_CLASSES:
        raise ModelFileError(path, f'a classifier of {num_classes:,} classes')
    info = _read_info(path, file, global_average_type, num_classes)
    model = _plain_network(info)

    expected = {layer.name for layer in model.layers}
    strange = sorted(set(root) - expected - {'top_level_model_weights'})
    if strange:
        raise ModelFileError(path, f'it has layers that Melnyk-Net has not: {", ".join(strange[:3])}')
    for layer in model.layers:
        if layer.weights:
            layer.set_weights([_weight(path, root, layer, variable) for variable in layer.weights])
    return model, info


def _read_info(path, file, global_average_type, num_classes) -> ModelInfo:
    if _ATTRIBUTE not in file.attrs:
        if num_classes != len(LABELS):
            raise ModelFileError(path, f'{num_classes} classes and no label table')
        return ModelInfo((96, 96, 1), global_average_type, LABELS, 1.0, '')
    try:
        meaning = json.loads(file.attrs[_ATTRIBUTE])
        if meaning.pop('format') > _FORMAT:
            raise ModelFileError(path, 'it was saved by a newer version of this program', 'update the program')
        info = ModelInfo(**meaning)
        info = info._replace(input_shape=tuple(info.input_shape), labels=tuple(info.labels))
        _check_info(info)
    except ModelFileError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelFileError(path, f'its description is damaged ({error})') from error
    if info.global_average_type != global_average_type:
        raise ModelFileError(path, f'described as {info.global_average_type}, but it is {global_average_type}')
    if len(info.labels) != num_classes:
        raise ModelFileError(path, f'{len(info.labels)} labels for {num_classes} classes')
    return info


def _check_info(info: ModelInfo) -> None:
    shape = info.input_shape
    if len(shape) != 3 or not all(type(n) is int and 0 < n <= _MAX_SIDE for n in shape):
        raise ValueError(f'input_shape is (height, width, channels), received {shape!r}')
    if not all(isinstance(label, str) and len(label) == 1 for label in info.labels):
        raise ValueError('every label is one character')
    if len(set(info.labels)) != len(info.labels):
        raise ValueError('a label occurs twice')
    if len(info.labels) == len(LABELS) and info.labels != LABELS:
        raise ValueError('3755 labels that are not the published class order')
    if not (isinstance(info.temperature, float) and math.isfinite(info.temperature) and info.temperature > 0):
        raise ValueError(f'temperature is a positive number, received {info.temperature!r}')
    if not isinstance(info.note, str):
        raise ValueError(f'note is a text, received {info.note!r}')


def _member(path, group, name):
    """Return a member of an HDF5 group that lies in the same file; links are how a file reads other files."""
    import h5py

    if not isinstance(group, h5py.Group) or not isinstance(group.get(name, getlink=True), h5py.HardLink):
        raise ModelFileError(path, f'{name!r} is missing, or a link')
    return group[name]


def _dataset(path, root, layer_name, weight_name):
    import h5py

    group = _member(path, _member(path, root, layer_name), layer_name)
    # Keras 2 wrote TensorFlow's names, `kernel:0`.
    dataset = _member(path, group, weight_name if weight_name in group else f'{weight_name}:0')
    if not isinstance(dataset, h5py.Dataset) or dataset.is_virtual or dataset.external:
        raise ModelFileError(path, f'{layer_name}/{weight_name} is not stored in the file itself')
    if dataset.dtype.kind != 'f' or not dataset.shape:
        raise ModelFileError(path, f'{layer_name}/{weight_name} is not an array of floating-point numbers')
    return dataset


def _weight(path, root, layer, variable) -> np.ndarray:
    dataset = _dataset(path, root, layer.name, variable.name)
    if dataset.shape != tuple(variable.shape):
        shapes = f'{dataset.shape} instead of {tuple(variable.shape)}'
        raise ModelFileError(path, f'{layer.name}/{variable.name} has the shape {shapes}')
    values = dataset[()].astype(np.float32)
    if not np.isfinite(values).all():
        raise ModelFileError(path, f'{layer.name}/{variable.name} has values that are not finite')
    return values


def _plain_network(info: ModelInfo) -> keras.Model:
    """Build the network that a description means, in float32 whatever the policy of the moment."""
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy('float32')
    try:
        return melnyk_net(info.input_shape, global_average_type=info.global_average_type, num_classes=len(info.labels))
    finally:
        keras.config.set_dtype_policy(policy)


def _global_average_type(model) -> str:
    for kind, (name, _) in POOLINGS.items():
        if any(layer.name == name for layer in model.layers):
            return kind
    raise ValueError(f'not a Melnyk-Net: {model.name!r}')


@contextlib.contextmanager
def _quiet_absl():
    import logging

    logger = logging.getLogger('absl')
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
