"""Global weighted average pooling, which ends every network of this project.

It is of P. Melnyk, Z. You and K. Li, "A high-performance CNN method for offline handwritten Chinese character
recognition and visualization", Soft Computing 24, 2020 (arXiv 1812.11489): one trainable weight for every position and
channel of the last feature map, so that the network learns where on the page a feature counts.
"""

import keras
from keras import layers, ops

from model_file import POOLING_NAMES

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


# Name and class of the pooling layer of each kind of network.
POOLINGS = {
    'GWAP': (POOLING_NAMES['GWAP'], GlobalWeightedAveragePooling2D),
    'GWOAP': (POOLING_NAMES['GWOAP'], GlobalWeightedOutputAveragePooling2D),
    'GAP': (POOLING_NAMES['GAP'], layers.GlobalAveragePooling2D),
}


class WeightedFeatures(layers.Layer):
    """A global pooling taken apart: what it adds up, and the sum. Computed in float32, whatever comes in.

    Args:
        pooling: A layer of one of `POOLINGS`, built; its weights of the moment become constants.

    Input shape:
        As the pooling's.

    Output shape:
        `(batch, height, width, channels)` and `(batch, channels)`, in either data format.
    """

    def __init__(self, pooling, **kwargs):
        super().__init__(dtype='float32', **kwargs)
        self._channels_first = pooling.data_format == 'channels_first'
        self._weight = ops.convert_to_numpy(pooling.weights[0]) if pooling.weights else None

    def call(self, inputs):
        features = ops.transpose(inputs, (0, 2, 3, 1)) if self._channels_first else inputs
        if self._weight is None:  # the mean weighs every position alike
            weighted = features * (1 / (features.shape[1] * features.shape[2]))
        else:
            weighted = features * self._weight
        return weighted, ops.sum(weighted, axis=(1, 2))


def classifier(num_classes: int, regularizer=None) -> layers.Dense:
    """Return the softmax layer that follows the pooling of every network of this project, as the paper begins it."""
    return layers.Dense(
        num_classes,
        activation='softmax',
        kernel_initializer=keras.initializers.RandomNormal(stddev=1e-3, seed=1996),
        kernel_regularizer=regularizer,
        dtype='float32',  # probabilities of 3755 classes need more digits than bfloat16 has
        name='dense_1',
    )
