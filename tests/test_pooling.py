import keras
import numpy as np
import pytest
from keras import ops

from melnyk_net import melnyk_net
from pooling import (
    ActivationMapper,
    GlobalWeightedAveragePooling2D,
    GlobalWeightedOutputAveragePooling2D,
    class_activation_map,
)


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


@pytest.mark.parametrize('global_average_type', ['GWAP', 'GWOAP', 'GAP'])
def test_class_activation_map_adds_up_to_the_score(global_average_type):
    keras.utils.set_random_seed(0)
    model = melnyk_net((48, 48, 1), global_average_type=global_average_type, num_classes=3)
    rng = np.random.default_rng(0)
    for layer in (model.layers[-3], model.layers[-1]):
        layer.set_weights([rng.normal(size=weight.shape) for weight in layer.get_weights()])
    image = rng.integers(0, 256, (48, 48)).astype(np.uint8)

    mapper = ActivationMapper(model)
    features, _ = mapper.extractor(image[None, ..., None].astype(np.float32), training=False)
    pooled = model.layers[-3](features)
    kernel, _ = model.layers[-1].get_weights()
    scores = ops.convert_to_numpy(pooled)[0] @ kernel
    for index in range(3):
        # By its definition, the map of a class sums to the class's score less the bias.
        assert mapper.maps(features, [index]).sum() == pytest.approx(scores[index], rel=1e-3)
    relative = np.stack([mapper.maps(features, [index], relative=True)[0] for index in range(3)])
    assert np.abs(relative.sum(axis=0)).max() < 1e-3 * np.abs(relative).max()
    assert np.argmax(relative.sum(axis=(1, 2))) == np.argmax(scores)
    enlarged = class_activation_map(model, image, 1)
    assert enlarged.shape == (48, 48)
    assert enlarged.dtype == np.float32


def test_class_activation_map_refuses(small_model):
    image = np.zeros((96, 96))
    with pytest.raises(ValueError, match='classes 0 to 4'):
        class_activation_map(small_model, image, 5)
    with pytest.raises(ValueError, match='global pooling'):
        class_activation_map(keras.Sequential([keras.Input((96, 96, 1)), keras.layers.Flatten()]), image, 0)
