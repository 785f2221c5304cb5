"""Global weighted average pooling, and the class activation maps that it allows.

Both are of P. Melnyk, Z. You and K. Li, "A high-performance CNN method for offline handwritten Chinese character
recognition and visualization", Soft Computing 24, 2020 (arXiv 1812.11489): one trainable weight for every position and
channel of the last feature map, so that the network learns where on the page a feature counts.
"""

import keras
import numpy as np
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


# --- Class activation maps -------------------------------------------------------------------------------------------


class ActivationMapper:
    """Class activation maps of a network that ends in a global pooling and one dense layer.

    The layers are found by what they are, never by name: the last one that turns maps into a vector, and the last dense
    one. Everything between them must leave the features alone, as dropout does.

    Args:
        model: A network of this project with its classifier.

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
        model: A network of this project with its classifier.
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
