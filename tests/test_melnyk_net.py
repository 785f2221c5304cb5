import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from conftest import SMALL_LABELS

from data_utils import LABELS
from melnyk_net import load_model, melnyk_net, save_model

ROOT = Path(__file__).parents[1]


# --- The network


@pytest.mark.parametrize(
    ('global_average_type', 'parameters'), [('GWAP', 6_523_819), ('GWOAP', 6_508_139), ('GAP', 6_507_691)]
)
def test_parameter_counts_are_the_published_ones(global_average_type, parameters):
    model = melnyk_net(global_average_type=global_average_type)
    assert model.count_params() == parameters
    assert model.input_shape == (None, 96, 96, 1)
    assert model.output_shape == (None, 3755)


def test_layer_names_are_the_published_ones():
    names = [layer.name for layer in melnyk_net(num_classes=2).layers]
    assert names[0] == 'input_1'
    assert [name for name in names if name.startswith('conv2d')] == [f'conv2d_{i}' for i in range(1, 15)]
    assert [name for name in names if name.startswith('batch')] == [f'batch_normalization_{i}' for i in range(1, 15)]
    assert [name for name in names if name.startswith('activ')] == [f'activation_{i}' for i in range(1, 15)]
    assert [name for name in names if name.startswith('average')] == [f'average_pooling2d_{i}' for i in range(1, 5)]
    assert names[-3:] == ['global_weighted_average_pooling2d_1', 'dropout_1', 'dense_1']


def test_without_its_top_the_network_gives_features():
    assert melnyk_net(include_top=False).output_shape == (None, 448)


@pytest.mark.parametrize('arguments', [{'global_average_type': 'MAX'}, {'input_shape': (96, 96)}, {'num_classes': 0}])
def test_wrong_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match='received'):
        melnyk_net(**arguments)


# --- Model files


def same_weights(first, second) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(first.get_weights(), second.get_weights(), strict=True))


def test_save_and_load(small_model, small_file):
    model, info = load_model(small_file)
    assert same_weights(model, small_model)
    assert info.labels == SMALL_LABELS
    assert info.temperature == 2
    assert info.note == 'random weights'
    assert info.input_shape == (96, 96, 1)


@pytest.mark.parametrize('global_average_type', ['GWAP', 'GWOAP', 'GAP'])
def test_every_variant_and_size_comes_back(tmp_path, global_average_type):
    model = melnyk_net((48, 48, 1), global_average_type=global_average_type, num_classes=3)
    save_model(model, tmp_path / 'a.hdf5', '一二三')
    loaded, info = load_model(tmp_path / 'a.hdf5')
    assert same_weights(model, loaded)
    assert info.global_average_type == global_average_type
    assert loaded.input_shape == (None, 48, 48, 1)


def test_a_file_is_also_plain_keras(small_model, small_file):
    assert same_weights(keras.models.load_model(small_file, compile=False), small_model)


def test_what_is_saved_is_float32_whatever_it_was_trained_in(tmp_path):
    keras.config.set_dtype_policy('mixed_bfloat16')
    try:
        model = melnyk_net(num_classes=2)
        save_model(model, tmp_path / 'a.h5', '一二')
        assert keras.config.dtype_policy().name == 'mixed_bfloat16'
    finally:
        keras.config.set_dtype_policy('float32')
    assert {layer.compute_dtype for layer in keras.models.load_model(tmp_path / 'a.h5').layers} == {'float32'}


def test_saving_fails_whole(tmp_path, small_model, monkeypatch):
    path = tmp_path / 'a.h5'
    path.write_bytes(b'old')
    with pytest.raises(ValueError, match='2 labels'):
        save_model(small_model, path, '一二')
    with pytest.raises(ValueError, match='twice'):
        save_model(small_model, path, '一一二三四')
    with pytest.raises(ValueError, match=r'\.h5'):
        save_model(small_model, tmp_path / 'a.txt', SMALL_LABELS)
    monkeypatch.setattr(keras.Model, 'save', lambda self, path: Path(path).write_bytes(b'half'))
    with pytest.raises(OSError):  # noqa: PT011 (h5py's own words)
        save_model(small_model, path, SMALL_LABELS)
    assert path.read_bytes() == b'old'
    assert os.listdir(tmp_path) == ['a.h5']


def test_the_shipped_model_loads():
    model, info = load_model(ROOT / 'melnyk_net.h5')
    assert info.labels == LABELS
    assert info.note
    assert 0 < info.temperature < 10
    assert same_weights(melnyk_net(use_pretrained_weights=True), model)


KERAS_2 = """
import sys
import tf_keras as keras
sys.path.insert(0, {root!r})
from melnyk_net import FILTER_GROUPS

class GlobalWeightedAveragePooling2D(keras.layers.Layer):
    def build(self, shape):
        self.W = self.add_weight(name='W', shape=shape[1:], initializer='random_normal')
    def call(self, x):
        return keras.backend.sum(x * self.W, axis=(1, 2))

keras.utils.set_random_seed(1)
L = keras.layers
x = image = keras.Input((96, 96, 1), name='input_1')
n = 0
for group, filters_of_group in enumerate(FILTER_GROUPS):
    if group:
        x = L.AveragePooling2D(3, 2, 'same', name=f'average_pooling2d_{{group}}')(x)
    for filters in filters_of_group:
        n += 1
        x = L.Conv2D(filters, 3, padding='same', use_bias=False, name=f'conv2d_{{n}}')(x)
        x = L.BatchNormalization(name=f'batch_normalization_{{n}}')(x)
        x = L.Activation('relu', name=f'activation_{{n}}')(x)
x = GlobalWeightedAveragePooling2D(name='global_weighted_average_pooling2d_1')(x)
x = L.Dropout(0.5, name='dropout_1')(x)
x = L.Dense(3755, activation='softmax', name='dense_1')(x)
model = keras.Model(image, x)
import numpy as np
data = np.random.default_rng(0).integers(0, 256, (2, 96, 96, 1)).astype('float32')
np.save({answers!r}, model.predict(data, verbose=0))
model.save({whole!r})
model.save_weights({weights!r})
"""


def test_the_original_file_of_keras_2_is_read(tmp_path):
    pytest.importorskip('tf_keras')
    whole, weights, answers = (str(tmp_path / name) for name in ('Melnyk-Net.hdf5', 'weights.h5', 'answers.npy'))
    script = KERAS_2.format(root=str(ROOT), whole=whole, weights=weights, answers=answers)
    environment = os.environ | {'TF_USE_LEGACY_KERAS': '1'}
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr

    data = np.random.default_rng(0).integers(0, 256, (2, 96, 96, 1)).astype('float32')
    for path in (whole, weights):
        model, info = load_model(path)
        assert info.labels == LABELS
        assert np.allclose(model.predict(data, verbose=0), np.load(answers), atol=1e-5)
