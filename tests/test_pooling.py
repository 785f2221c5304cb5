import keras
import numpy as np
import pytest

from pooling import GlobalWeightedAveragePooling2D, GlobalWeightedOutputAveragePooling2D


def expected_pooling(kind, features, weight):
    if kind is GlobalWeightedAveragePooling2D:
        return np.einsum('bxyk,xyk->bk', features, weight)
    return np.einsum('bxyk,k->bk', features, weight)


@pytest.mark.parametrize('data_format', ['channels_last', 'channels_first'])
@pytest.mark.parametrize(
    ('kind', 'shape'), [(GlobalWeightedAveragePooling2D, (3, 4, 5)), (GlobalWeightedOutputAveragePooling2D, (5,))]
)
def test_weighted_poolings(kind, shape, data_format):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(2, 3, 4, 5)).astype(np.float32)
    inputs = features if data_format == 'channels_last' else features.transpose(0, 3, 1, 2)
    layer = kind(data_format=data_format)
    assert layer.compute_output_shape(inputs.shape) == (2, 5)

    # The weights start at one: a plain sum.
    assert np.allclose(layer(inputs), features.sum(axis=(1, 2)), atol=1e-4)
    weight = rng.normal(size=shape).astype(np.float32)
    layer.set_weights([weight])
    assert np.allclose(layer(inputs), expected_pooling(kind, features, weight), atol=1e-4)

    copy = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(layer))
    assert type(copy) is kind
    assert copy.data_format == data_format


def test_gwap_needs_a_fixed_size():
    with pytest.raises(ValueError, match='fixed'):
        GlobalWeightedAveragePooling2D()(keras.Input((None, None, 4)))
    with pytest.raises(ValueError, match='data_format'):
        GlobalWeightedAveragePooling2D(data_format='last')
