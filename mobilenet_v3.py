"""MobileNetV3 for handwritten characters: a hundredth of Melnyk-Net's multiplications, at some cost in accuracy.

The trunk is Keras' own (A. Howard et al., "Searching for MobileNetV3", ICCV 2019: depthwise convolutions, squeeze and
excitation, h-swish). Its classifier is replaced by Melnyk-Net's, global weighted average pooling and one dense layer,
so that the same class activation maps explain both networks.
"""

from collections import Counter

import keras
from keras import layers

from pooling import POOLINGS, classifier

SIZES = ('small', 'large')


def mobilenet_v3(
    size='small',
    input_shape=(96, 96, 1),
    reg=0.0,
    global_average_type='GWAP',
    num_classes=3755,
    dropout=0.2,
    normalization=layers.BatchNormalization,
):
    """Build MobileNetV3 with Melnyk-Net's classifier.

    Args:
        size: `'small'` or `'large'`. Defaults to `'small'`.
        input_shape: `(height, width, channels)` of the image. Defaults to `(96, 96, 1)`.
        reg: Strength of the L2 regularisation of the kernels. Defaults to `0.0`: weight decay is what such networks
            are trained with.
        global_average_type: `'GWAP'`, `'GWOAP'` or `'GAP'`, the pooling before the classifier. Defaults to `'GWAP'`.
        num_classes: Number of classes. Defaults to 3755, the characters of GB2312-80 level 1.
        dropout: Fraction of the features dropped in training. Defaults to `0.2`.
        normalization: Class of the layer after each convolution, called with `name=` alone. Defaults to
            `keras.layers.BatchNormalization`.

    Input shape:
        `(batch, height, width, channels)`, values 0..255 with the ink bright on 0.

    Output shape:
        `(batch, num_classes)` probabilities in float32.

    Returns:
        A `keras.Model` that ends in the layers of `melnyk_net`.

    Raises:
        ValueError: If an argument is none of the above.

    Example:

    >>> mobilenet_v3('small')(np.zeros((1, 96, 96, 1))).shape
    (1, 3755)
    """
    if size not in SIZES:
        raise ValueError(f'size is one of {", ".join(SIZES)}, received {size!r}')
    if global_average_type not in POOLINGS:
        raise ValueError(f'global_average_type is one of {", ".join(POOLINGS)}, received {global_average_type!r}')
    if num_classes < 1:
        raise ValueError(f'num_classes is at least 1, received {num_classes!r}')

    regularizer = keras.regularizers.L2(reg) if reg else None
    application = {'small': keras.applications.MobileNetV3Small, 'large': keras.applications.MobileNetV3Large}[size]
    trunk = application(input_shape=tuple(input_shape), include_top=False, weights=None)
    numbers = Counter()

    def adapted(layer):
        if isinstance(layer, layers.BatchNormalization):
            return normalization(name=layer.name)
        config = layer.get_config()
        if isinstance(layer, layers.Conv2D | layers.DepthwiseConv2D):
            key = 'depthwise_regularizer' if isinstance(layer, layers.DepthwiseConv2D) else 'kernel_regularizer'
            config[key] = regularizer
        elif not layer.name.startswith('expanded'):
            # Keras numbers these layers through all networks of a process; in a file they are numbered from one.
            kind = type(layer).__name__.lower()
            numbers[kind] += 1
            config['name'] = f'{kind}_{numbers[kind]}'
        return type(layer).from_config(config)

    image = keras.Input(input_shape, name='input_1')
    trunk = keras.models.clone_model(trunk, input_tensors=image, clone_function=adapted)
    pooling_name, pooling = POOLINGS[global_average_type]
    x = pooling(name=pooling_name)(trunk.output)
    x = layers.Dropout(dropout, name='dropout_1')(x)
    x = classifier(num_classes, regularizer)(x)
    return keras.Model(image, x, name=f'mobilenet_v3_{size}')
