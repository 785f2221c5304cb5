"""Melnyk-Net, and the files that it and its sister networks are saved in.

The architecture is the one of P. Melnyk, Z. You and K. Li, "A high-performance CNN method for offline handwritten
Chinese character recognition and visualization", Soft Computing 24, 2020 (arXiv 1812.11489): 14 convolutions of 3×3 in
five groups, then global weighted average pooling (`pooling`) and one dense layer.

    python melnyk_net.py export melnyk_net.h5 melnyk_net.tflite --int8     for other programs, see `export`
"""

import contextlib
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

if __name__ == '__main__':
    # Before Keras is imported, which takes seconds and may not be installed.
    from export import main

    sys.exit(main())

import h5py
import keras
import numpy as np
from keras import layers

from data_utils import LABELS, written_aside
from mobilenet_v3 import mobilenet_v3
from model_file import DEFAULT_MODEL, ModelFileError, ModelInfo, describe, opened
from pooling import POOLINGS, classifier

# Filters of the 3×3 convolutions. Average pooling halves the map between the groups: 96 → 48 → 24 → 12 → 6.
FILTER_GROUPS = ((64, 64), (96, 64, 96), (128, 96, 128), (256, 192, 256), (448, 256, 448))


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
        x = classifier(num_classes, regularizer)(x)
    model = keras.Model(image, x, name='melnyk_net')
    if use_pretrained_weights:
        pretrained, _ = load_model(DEFAULT_MODEL)
        if [w.shape for w in pretrained.weights] != [w.shape for w in model.weights]:
            raise ValueError(f'the weights of {DEFAULT_MODEL.name} fit the default arguments only')
        model.set_weights(pretrained.get_weights())
    return model


# --- Model files -----------------------------------------------------------------------------------------------------

# What a model file can hold. Each is called with input_shape, reg, global_average_type, num_classes, dropout and
# normalization.
ARCHITECTURES = {
    'melnyk_net': melnyk_net,
    'mobilenet_v3_small': partial(mobilenet_v3, 'small'),
    'mobilenet_v3_large': partial(mobilenet_v3, 'large'),
}


def save_model(model, path, labels=LABELS, temperature=1.0, note='', half=False):
    """Save a network as a whole-model HDF5 file that carries its label table.

    What is written is always the plain network for float32, without optimizer, whatever precision or normalization
    layer it was trained with, so that `keras.models.load_model` reads a Melnyk-Net as well (after `import melnyk_net`;
    Keras 3.15 cannot read a MobileNetV3 from HDF5 by itself, not even its own). The file is written aside and renamed:
    an older one stays whole until the new one is complete.

    Args:
        model: A network of `ARCHITECTURES` with its classifier.
        path: Where to, a name that ends in `.h5` or `.hdf5`.
        labels: The characters in class order, one for each output. Defaults to `LABELS`.
        temperature: See `ModelInfo`. Defaults to `1.0`.
        note: Where the weights come from. Defaults to `''`.
        half: Whether to store kernels in float16, in half of the space. Defaults to `False`.

    Raises:
        ValueError: If the labels do not fit the network, or a weight is not finite.
        OSError: If the file cannot be written.
    """
    path = Path(path)
    if path.suffix not in ('.h5', '.hdf5'):
        raise ValueError(f'a model file ends in .h5 or .hdf5, received {path}')
    if model.name not in ARCHITECTURES:
        raise ValueError(f'a network of this project is one of {", ".join(ARCHITECTURES)}, received {model.name!r}')
    pooling = next(kind for kind, (name, _) in POOLINGS.items() if any(layer.name == name for layer in model.layers))
    shape = tuple(model.input_shape[1:])
    info = ModelInfo(shape, pooling, tuple(labels), float(temperature), note, model.name).checked()
    if len(info.labels) != model.output_shape[-1]:
        raise ValueError(f'{len(info.labels)} labels do not fit a network of {model.output_shape[-1]} classes')
    weights = model.get_weights()
    if not all(np.isfinite(weight).all() for weight in weights):
        raise ValueError('the network has weights that are not finite, and is not saved')
    plain = _plain_network(info)
    plain.set_weights(weights)

    # HDF5 takes the whole process down where a disk is full; its own structures and the labels take well below 1 MB.
    with written_aside(path, sum(weight.nbytes for weight in weights) + 2**20) as aside:
        with _quiet_absl():  # Keras advises against HDF5, which is the format that this project is about
            plain.save(aside)
        if half:
            _halve_kernels(aside)
        describe(aside, info)


def load_model(path) -> tuple[keras.Model, ModelInfo]:
    """Load a network from an HDF5 file without trusting the file.

    The network is built by the program. From the file come numbers alone, after these checks: a regular file of a sane
    size with HDF5's signature; the layers of the network and no others; every weight a dataset inside the file itself,
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
    with opened(path) as file:
        if file.info.architecture not in ARCHITECTURES:
            raise ModelFileError(path, f'a network of an unknown kind, {file.info.architecture!r}')
        model = _plain_network(file.info)
        file.refuse_other_layers(layer.name for layer in model.layers)
        for layer in model.layers:
            if layer.weights:
                shapes = {variable.name: tuple(variable.shape) for variable in layer.weights}
                layer.set_weights([file.weight(layer.name, name, shape) for name, shape in shapes.items()])
    return model, file.info


def _plain_network(info: ModelInfo) -> keras.Model:
    """Build the network that a description means, in float32 whatever the policy of the moment."""
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy('float32')
    try:
        return ARCHITECTURES[info.architecture](
            input_shape=info.input_shape,
            global_average_type=info.global_average_type,
            num_classes=len(info.labels),
        )
    finally:
        keras.config.set_dtype_policy(policy)


def _halve_kernels(path: Path) -> None:
    """Store the kernels of a file that Keras has saved in float16; scales and statistics keep their range."""
    with h5py.File(path, 'r') as file:
        arrays, attributes = {}, {}
        file.visititems(lambda name, item: attributes.update({name: dict(item.attrs)}))
        file.visititems(lambda name, item: arrays.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None)
        attributes['/'] = dict(file.attrs)
    with h5py.File(path, 'w') as file:
        for name, array in arrays.items():
            file[name] = array.astype(np.float16) if name.endswith('kernel') else array
        for name, values in attributes.items():
            item = file[name] if name in file else file.create_group(name)
            item.attrs.update(values)


@contextlib.contextmanager
def _quiet_absl() -> Iterator[None]:
    import logging

    logger = logging.getLogger('absl')
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
