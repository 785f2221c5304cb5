import json
import os
import subprocess
import sys
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
from conftest import SMALL_LABELS
from keras import ops

from data_utils import LABELS
from melnyk_net import (
    GlobalWeightedAveragePooling2D,
    GlobalWeightedOutputAveragePooling2D,
    ModelFileError,
    class_activation_map,
    load_model,
    melnyk_net,
    save_model,
)

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


# --- Class activation maps


@pytest.mark.parametrize('global_average_type', ['GWAP', 'GWOAP', 'GAP'])
def test_class_activation_map_adds_up_to_the_score(global_average_type):
    keras.utils.set_random_seed(0)
    model = melnyk_net((48, 48, 1), global_average_type=global_average_type, num_classes=3)
    rng = np.random.default_rng(0)
    for layer in (model.layers[-3], model.layers[-1]):
        layer.set_weights([rng.normal(size=weight.shape) for weight in layer.get_weights()])
    image = rng.integers(0, 256, (48, 48)).astype(np.uint8)

    from melnyk_net import ActivationMapper

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


# --- Files that nobody should trust


def change(path, small_file, edit):
    """Copy a good file and edit it with h5py."""
    path.write_bytes(small_file.read_bytes())
    with h5py.File(path, 'r+') as file:
        edit(file)
    return path


def described(file, **changes):
    meaning = json.loads(file.attrs['offline_hccr']) | changes
    file.attrs['offline_hccr'] = json.dumps(meaning)


def replaced(file, name, **dataset):
    name = f'model_weights/{name}'
    del file[name]
    file.create_dataset(name, **dataset)


BIAS, CONV = 'dense_1/dense_1/bias', 'conv2d_2/conv2d_2/kernel'


def external_link(file):
    del file['model_weights/dense_1']
    file['model_weights/dense_1'] = h5py.ExternalLink('/etc/passwd', '/')


def soft_link(file):
    file.move(f'model_weights/{BIAS}', 'elsewhere')
    file[f'model_weights/{BIAS}'] = h5py.SoftLink('/elsewhere')


def external_storage(file):
    replaced(file, BIAS, shape=(5,), dtype='f4', external=[('/etc/passwd', 0, 20)])


def virtual_dataset(file):
    layout = h5py.VirtualLayout((5,), 'f4')
    layout[:] = h5py.VirtualSource('/etc/passwd', 'x', (5,))
    del file[f'model_weights/{BIAS}']
    file.create_virtual_dataset(f'model_weights/{BIAS}', layout)


HOSTILE = {
    'external link': (external_link, 'missing, or a link'),
    'soft link': (soft_link, 'missing, or a link'),
    'external storage': (external_storage, 'not stored in the file'),
    'virtual dataset': (virtual_dataset, 'not stored in the file'),
    'shape bomb': (lambda f: replaced(f, BIAS, shape=(2**40,), dtype='f4', chunks=(2**20,)), 'classes'),
    'kernel bomb': (lambda f: replaced(f, CONV, shape=(2**40,), dtype='f4', chunks=(2**20,)), 'shape'),
    'wrong shape': (lambda f: replaced(f, CONV, data=np.zeros((3, 3, 64, 63), 'f4')), 'shape'),
    'scalar': (lambda f: replaced(f, BIAS, data=np.float32(1)), 'not an array'),
    'text': (lambda f: replaced(f, BIAS, data=[b'abc'] * 5), 'not an array'),
    'not finite': (lambda f: replaced(f, BIAS, data=np.array([0, 1, np.nan, 0, 0], 'f4')), 'not finite'),
    'a group for a dataset': (
        lambda f: (f.__delitem__(f'model_weights/{BIAS}'), f.create_group(f'model_weights/{BIAS}')),
        'dense_1',
    ),
    'missing layer': (lambda f: f.__delitem__('model_weights/conv2d_3'), 'missing'),
    'missing classifier': (lambda f: f.__delitem__('model_weights/dense_1'), 'does not hold'),
    'another layer': (lambda f: f.create_group('model_weights/lambda_1'), 'lambda_1'),
    'no label table': (lambda f: f.attrs.__delitem__('offline_hccr'), 'no label table'),
    'pickled label table': (lambda f: f.attrs.__setitem__('offline_hccr', np.void(b'\x80\x04N.')), 'description'),
    'too few labels': (lambda f: described(f, labels='一二'), '2 labels'),
    'a label twice': (lambda f: described(f, labels='一一二三人'), 'twice'),
    'labels that are numbers': (lambda f: described(f, labels=[1, 2, 3, 4, 5]), 'one character'),
    'infinite temperature': (lambda f: described(f, temperature=float('inf')), 'temperature'),
    'huge input': (lambda f: described(f, input_shape=[10**6, 10**6, 1]), 'input_shape'),
    'another pooling': (lambda f: described(f, global_average_type='GAP'), 'described as GAP'),
    'unknown field': (lambda f: described(f, code='import os'), 'description'),
    'newer format': (lambda f: described(f, format=2), 'newer version'),
}


@pytest.mark.parametrize('case', HOSTILE)
def test_hostile_files_are_refused(tmp_path, small_file, case):
    edit, reason = HOSTILE[case]
    path = change(tmp_path / 'a.h5', small_file, edit)
    with pytest.raises(ModelFileError, match=reason) as refusal:
        load_model(path)
    assert str(path) in str(refusal.value)


def test_a_swapped_table_of_3755_labels_is_refused(tmp_path):
    def swap(file):
        described(file, labels=''.join((LABELS[1], LABELS[0], *LABELS[2:])))

    with pytest.raises(ModelFileError, match='class order'):
        load_model(change(tmp_path / 'a.h5', ROOT / 'melnyk_net.h5', swap))


@pytest.mark.parametrize(
    ('content', 'reason'),
    [(b'', 'not an HDF5'), (b'text', 'not an HDF5'), (b'\x89HDF\r\n\x1a\n' + bytes(500), 'damaged')],
)
def test_what_is_no_model_file_is_refused(tmp_path, content, reason):
    (tmp_path / 'a.h5').write_bytes(content)
    with pytest.raises(ModelFileError, match=reason):
        load_model(tmp_path / 'a.h5')


def test_truncated_missing_and_special_files_are_refused(tmp_path, small_file):
    (tmp_path / 'a.h5').write_bytes(small_file.read_bytes()[:100_000])
    with pytest.raises(ModelFileError, match='damaged'):
        load_model(tmp_path / 'a.h5')
    with pytest.raises(FileNotFoundError, match='no such model file'):
        load_model(tmp_path / 'b.h5')
    with pytest.raises(ModelFileError, match='not a regular file'):
        load_model(tmp_path)


def test_a_lambda_layer_is_refused_and_never_run(tmp_path):
    marker = tmp_path / 'marker'
    image = keras.Input((96, 96, 1), name='input_1')
    x = keras.layers.Lambda(lambda x, path=str(marker): (open(path, 'w').close(), x)[1], name='lambda_1')(image)
    x = keras.layers.GlobalAveragePooling2D(name='global_average_pooling2d_1')(x)
    x = keras.layers.Dense(5, name='dense_1')(x)
    keras.Model(image, x).save(tmp_path / 'a.h5')
    marker.unlink()
    with pytest.raises(ModelFileError):
        load_model(tmp_path / 'a.h5')
    assert not marker.exists()
