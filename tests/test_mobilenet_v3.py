from functools import partial

import h5py
import keras
import numpy as np
import pytest
from keras import layers

from melnyk_net import load_model, save_model
from mobilenet_v3 import SIZES, mobilenet_v3

LABELS = '一二三人口'


@pytest.fixture(scope='module')
def images():
    return np.random.default_rng(0).integers(0, 256, (4, 96, 96, 1)).astype(np.float32)


@pytest.fixture(scope='module', params=SIZES)
def model(request, images):
    """A network of five classes whose layers have the scale that training gives them."""
    keras.utils.set_random_seed(1)
    model = mobilenet_v3(request.param, num_classes=5, normalization=partial(layers.BatchNormalization, momentum=0))
    model(images, training=True)
    rng = np.random.default_rng(1)
    model.layers[-1].set_weights([rng.normal(0, 0.05, model.layers[-1].kernel.shape), np.zeros(5)])
    return model


def test_shapes(model):
    assert model.input_shape == (None, 96, 96, 1)
    assert model.output_shape == (None, 5)
    # The published trunks have 0.93 and 3.0 million parameters; the classifier's come on top.
    trunk = model.count_params() - model.layers[-1].count_params()
    assert trunk == pytest.approx({'mobilenet_v3_small': 0.94e6, 'mobilenet_v3_large': 3.0e6}[model.name], rel=0.02)


@pytest.mark.parametrize('half', [False, True])
def test_it_comes_back_from_a_file_and_answers_the_same(model, images, half, tmp_path):
    save_model(model, tmp_path / 'a.h5', LABELS, 2.0, 'a note', half=half)
    loaded, info = load_model(tmp_path / 'a.h5')
    assert info.architecture == loaded.name == model.name
    assert (info.labels, info.temperature, info.note) == (tuple(LABELS), 2.0, 'a note')
    expected = model.predict_on_batch(images)
    assert np.ptp(expected, axis=1).min() > 0.01
    assert np.allclose(loaded.predict_on_batch(images), expected, atol=0.02 if half else 1e-6)


def test_half_kernels_take_half_the_space(model, tmp_path):
    for half in (False, True):
        save_model(model, tmp_path / f'{half}.h5', LABELS, half=half)
    assert (tmp_path / 'True.h5').stat().st_size < 0.65 * (tmp_path / 'False.h5').stat().st_size
    with h5py.File(tmp_path / 'True.h5') as file:
        assert file['model_weights/conv/conv/kernel'].dtype == np.float16
        assert file['model_weights/conv_bn/conv_bn/moving_variance'].dtype == np.float32


def test_layers_have_the_same_names_in_every_process_and_network():
    first, second = mobilenet_v3(num_classes=2), mobilenet_v3(num_classes=2)
    assert [layer.name for layer in first.layers] == [layer.name for layer in second.layers]
    assert first.layers[0].name == 'input_1'


def test_regularisation_and_normalization_reach_every_layer():
    class Normalization(keras.layers.BatchNormalization):
        pass

    model = mobilenet_v3(num_classes=2, reg=1e-3, normalization=Normalization)
    plain = mobilenet_v3(num_classes=2)
    kernels = [weight for weight in model.trainable_weights if weight.path.endswith('kernel')]
    assert len(model.losses) == len(kernels)
    assert not plain.losses
    normalizations = [layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)]
    assert {type(layer) for layer in normalizations} == {Normalization}


@pytest.mark.parametrize(
    'arguments', [{'size': 'medium'}, {'global_average_type': 'MAX'}, {'num_classes': 0}], ids=lambda a: next(iter(a))
)
def test_wrong_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match='received'):
        mobilenet_v3(**arguments)
