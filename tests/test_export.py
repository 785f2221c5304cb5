import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL_LABELS, draw_character, with_random_statistics

import export
from data_utils import LABELS, network_input
from hccr import HCCR
from inference import KerasRuntime, LiteRtRuntime, activation_maps, inference_network
from melnyk_net import load_model, save_model
from melnyk_net import melnyk_net as build
from mobilenet_v3 import mobilenet_v3
from model_file import ModelInfo, read_tflite

pytest.importorskip('ai_edge_litert')


@pytest.fixture(scope='module')
def images():
    return np.stack([network_input(draw_character(60 + 3 * i, width=0.03 + 0.004 * i)) for i in range(10)])


INFO = ModelInfo((96, 96, 1), 'GWAP', SMALL_LABELS, 2.0, 'random weights')


# --- Quantisation


def test_equalisation_changes_nothing_but_the_ranges(small_model, images):
    network = inference_network(small_model)
    before = network.predict_on_batch(images[..., None].astype('float32'))
    kernels = [layer.get_weights()[0] for layer in network.layers if layer.name.startswith('conv2d')]
    export.equalise(network, images)
    after = network.predict_on_batch(images[..., None].astype('float32'))
    for one, other in zip(after, before, strict=True):
        assert np.allclose(one, other, atol=1e-4 * np.abs(other).max())
    changed = [layer.get_weights()[0] for layer in network.layers if layer.name.startswith('conv2d')]
    assert not any(np.allclose(one, other) for one, other in zip(kernels, changed, strict=True))


def test_equalised_are_the_convolutions_with_nothing_but_relu_between():
    pairs = [(a.name, b.name) for a, b in export._pairs(inference_network(build((48, 48, 1), num_classes=2)))]
    assert pairs == [(f'conv2d_{i}', f'conv2d_{i + 1}') for i in range(1, 14)]
    # h-swish bends what is scaled; between the two of a squeeze-and-excitation there is only ReLU.
    pairs = [
        (a.name, b.name) for a, b in export._pairs(inference_network(mobilenet_v3('small', (48, 48, 1), num_classes=2)))
    ]
    assert pairs
    assert all('squeeze_excite' in a and 'squeeze_excite' in b for a, b in pairs)


def test_int8_is_small_and_close(small_model, images, tmp_path, small_tflite):
    path = tmp_path / 'small8.tflite'
    kernel, bias = small_model.layers[-1].get_weights()
    small_model.layers[-1].set_weights([kernel, bias + np.arange(5) / 10])
    export.export(small_model, INFO, path, True, images)
    assert path.stat().st_size < small_tflite.stat().st_size / 3.5
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert read_tflite(path)[1] == INFO

    exact, quantised = KerasRuntime(small_model, 'float32'), LiteRtRuntime(path)
    small_model.layers[-1].set_weights([kernel, bias])
    expected, found = exact.run(images), quantised.run(images)
    assert np.abs(found.logits - expected.logits).max() < 0.1 * np.ptp(expected.logits)
    best = expected.logits.argmax(axis=1)
    maps = activation_maps(expected.features, exact.classifier(), best, relative=True)
    found = activation_maps(found.features, quantised.classifier(), best, relative=True)
    assert np.abs(found - maps).max() < 0.15 * np.abs(maps).max()


# --- Files


@pytest.mark.parametrize(('int8', 'likeness'), [(False, 0.99999), (True, 0.98)])
def test_a_mobilenet_is_exported_too(tmp_path, int8, likeness):
    model = with_random_statistics(mobilenet_v3('small', (48, 48, 1), num_classes=5))
    info = INFO._replace(input_shape=(48, 48, 1), architecture='mobilenet_v3_small')
    inputs = np.random.default_rng(0).integers(0, 256, (16, 48, 48)).astype(np.uint8)
    export.export(model, info, tmp_path / 'a.tflite', int8)
    exported, original = LiteRtRuntime(tmp_path / 'a.tflite'), KerasRuntime(model, 'float32')
    found, expected = exported.run(inputs), original.run(inputs)
    assert np.corrcoef(exported.classifier().ravel(), original.classifier().ravel())[0, 1] > likeness
    for one, other in zip(found, expected, strict=True):
        assert np.corrcoef(one.ravel(), other.ravel())[0, 1] > likeness


def test_onnx(small_model, images, tmp_path):
    pytest.importorskip('tf2onnx')
    onnxruntime = pytest.importorskip('onnxruntime')
    path = tmp_path / 'small.onnx'
    export.export(small_model, INFO, path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    description = session.get_modelmeta().custom_metadata_map['offline_hccr']
    assert ModelInfo.from_json(path, description) == INFO
    found = export.OnnxRuntime(path).run(images)
    expected = KerasRuntime(small_model, 'float32').run(images)
    for one, other in zip(found, expected, strict=True):
        assert np.allclose(one, other, atol=1e-3 * np.abs(other).max())
    answers = [HCCR(model, SMALL_LABELS).predict(images, 1)[0] for model in (export.OnnxRuntime(path), small_model)]
    assert np.array_equal(*answers)


@pytest.mark.parametrize(
    ('name', 'int8', 'reason'),
    [
        ('a.h5', False, r'\.tflite or \.onnx'),
        ('a.onnx', True, r'to \.tflite only'),
        ('a.tflite', True, 'melnyk_net in 8 bits needs images'),
    ],
)
def test_what_cannot_be_exported_is_refused(small_model, tmp_path, name, int8, reason):
    with pytest.raises(export.ExportError, match=reason):
        export.export(small_model, INFO, tmp_path / name, int8)
    assert not list(tmp_path.iterdir())


# --- The command line


@pytest.fixture
def scans(tmp_path):
    """Ten labelled scans of 中, as an npz file."""
    scans = np.stack([draw_character(80, width=0.03 + 0.004 * i) for i in range(10)])
    np.savez(tmp_path / 'scans.npz', images=scans, chars=np.array(['中'] * 10))
    return tmp_path / 'scans.npz'


def test_calibration_takes_evenly_from_labelled_samples(scans):
    images = export.calibration_images([str(scans)], 5, 96)
    assert images.shape == (5, 96, 96)
    assert images.dtype == np.uint8
    assert len(export.calibration_images([str(scans)], 99, 96)) == 10


def test_accuracy_is_counted(scans):
    class Recogniser:
        size, labels = 96, LABELS

        def probabilities(self, images):
            rows = np.zeros((len(images), len(LABELS)), np.float32)
            rows[:, LABELS.index('口')] = 0.6
            rows[:, LABELS.index('中')] = 0.4
            rows[:4, LABELS.index('中')] = 0.7
            return rows

    assert export.accuracies(Recogniser(), [str(scans)]) == (0.4, 1.0, 10)


def test_a_mobilenet_in_8_bits_needs_no_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_model(mobilenet_v3('small', (48, 48, 1), num_classes=5), 'mobile.h5', SMALL_LABELS)
    sizes = []
    for arguments in (['a.tflite'], ['b.tflite', '--int8']):
        assert export.main(['export', 'mobile.h5', *arguments]) == 0
        sizes.append(Path(arguments[0]).stat().st_size)
    assert sizes[1] < sizes[0] / 3


def test_the_command_line(small_file, tmp_path, capfd):
    target = tmp_path / 'out.tflite'
    assert export.main(['export', str(small_file), str(target)]) == 0
    output, errors = capfd.readouterr()
    assert output.startswith(f'{target}: ')
    assert len(output.splitlines()) == 1
    assert errors == ''
    assert read_tflite(target)[1] == load_model(small_file)[1]


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['none.h5', 'out.tflite'], 'no such model file'),
        (['x\x1b[31m\n.h5', 'out.tflite'], r'x\x1b[31m\n.h5: no such model file'),
        (['{model}', 'out.txt'], 'ends in'),
        (['{model}', 'out.tflite', '--int8', '--calibrate', 'nowhere'], 'nowhere'),
        (['{model}', 'out.tflite', '--int8', '--samples', '0'], 'received 0'),
    ],
)
def test_errors_are_one_line(small_file, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert export.main(['export', *(argument.format(model=small_file) for argument in arguments)]) == 1
    errors = capsys.readouterr().err
    assert len(errors.splitlines()) == 1
    assert message in errors


@pytest.mark.parametrize(
    ('program', 'arguments', 'status', 'line'),
    [
        (
            'melnyk_net.py',
            ['export', 'model.h5', 'out.tflite'],
            1,
            'h5py is not installed: pip install -r requirements.txt',
        ),
        ('melnyk_net.py', ['export', 'model.h5'], 2, 'OUT.tflite|OUT.onnx'),
        ('export.py', [], 2, 'python melnyk_net.py export'),
    ],
)
def test_the_program_says_what_to_do_before_keras_is_imported(tmp_path, program, arguments, status, line):
    (tmp_path / 'h5py.py').write_text("raise ModuleNotFoundError('no h5py', name='h5py')")
    (tmp_path / 'keras.py').write_text("raise ModuleNotFoundError('no keras', name='keras')")
    environment = os.environ | {'PYTHONPATH': str(tmp_path)}
    command = [sys.executable, '-P', Path(export.__file__).with_name(program), *arguments]
    environment['PYTHONPATH'] += os.pathsep + str(Path(export.__file__).parent)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == status
    assert line in done.stderr.splitlines()[-1]
    assert done.stdout == ''


def test_the_program_says_nothing_of_its_libraries(small_file, tmp_path):
    program = Path(export.__file__).with_name('melnyk_net.py')
    command = [sys.executable, program, 'export', small_file, tmp_path / 'out.tflite']
    environment = {name: value for name, value in os.environ.items() if name != 'TF_CPP_MIN_LOG_LEVEL'}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == ''
    assert len(done.stdout.splitlines()) == 1


def test_the_description_can_be_read_with_nothing_but_zip(small_tflite):
    import zipfile

    with zipfile.ZipFile(small_tflite) as archive:
        assert json.loads(archive.read('offline_hccr.json'))['labels'] == ''.join(SMALL_LABELS)
