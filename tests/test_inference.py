import json
import os
import struct
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import keras
import numpy as np
import pytest
from conftest import draw_character, with_random_statistics

import inference
from data_utils import network_input
from hccr import HCCR
from inference import (
    BATCH_SIZES,
    KerasRuntime,
    LiteRtRuntime,
    activation_maps,
    class_activation_map,
    enlarge,
    inference_network,
)
from melnyk_net import melnyk_net
from mobilenet_v3 import mobilenet_v3
from model_file import ModelFileError

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope='module')
def inputs():
    return np.stack([network_input(draw_character(60 + 3 * i, width=0.03 + 0.004 * i)) for i in range(10)])


def melnyk_48(**arguments):
    return with_random_statistics(melnyk_net((48, 48, 1), num_classes=3, **arguments))


NETWORKS = {
    'GWAP': lambda: melnyk_48(),
    'GWOAP': lambda: melnyk_48(global_average_type='GWOAP'),
    'GAP': lambda: melnyk_48(global_average_type='GAP'),
    'small': lambda: with_random_statistics(mobilenet_v3('small', (48, 48, 1), num_classes=3)),
    'large': lambda: with_random_statistics(mobilenet_v3('large', (48, 48, 1), num_classes=3)),
}


def logits_of(model, images):
    """Return what goes into the softmax, by the network as it is."""
    before = keras.Model(model.inputs[0], model.layers[-1].input)
    kernel, bias = model.layers[-1].get_weights()
    return before.predict_on_batch(images[..., None].astype('float32')) @ kernel + bias


# --- Keras


@pytest.mark.parametrize('name', NETWORKS)
def test_a_folded_network_computes_the_same(name):
    model = NETWORKS[name]()
    images = np.random.default_rng(0).integers(0, 256, (3, 48, 48)).astype(np.uint8)
    folded = inference_network(model)
    assert not [layer for layer in folded.layers if isinstance(layer, keras.layers.BatchNormalization)]

    runtime = KerasRuntime(model, 'float32')
    outputs = runtime.run(images)
    expected = logits_of(model, images)
    assert np.allclose(outputs.logits, expected, atol=1e-4 * np.abs(expected).max())
    # By its definition, the map of a class sums to the class's score less the bias.
    bias = model.layers[-1].get_weights()[1]
    for index in range(3):
        maps = activation_maps(outputs.features, runtime.classifier(), [index] * 3)
        assert np.allclose(maps.sum(axis=(1, 2)) + bias[index], expected[:, index], atol=1e-4 * np.abs(expected).max())


def test_what_does_not_follow_a_convolution_alone_is_not_folded():
    layers = keras.layers
    image = keras.Input((8, 8, 1))
    x = layers.Conv2D(4, 3, name='shared')(image)
    x = layers.Add()([x, layers.BatchNormalization()(x)])
    x = layers.BatchNormalization()(layers.Conv2D(4, 3, activation='relu', name='bent')(x))
    x = layers.BatchNormalization(scale=False, center=False)(layers.Conv2D(4, 3, name='plain')(x))
    x = layers.Dense(3)(layers.GlobalAveragePooling2D()(x))
    model = keras.Model(image, x)
    for layer in model.layers:
        if isinstance(layer, layers.BatchNormalization):
            values = layer.get_weights()
            layer.set_weights([*values[:-1], values[-1] * 3])
    folded = inference_network(model)
    assert sum(isinstance(layer, keras.layers.BatchNormalization) for layer in folded.layers) == 2
    images = np.random.default_rng(0).normal(size=(2, 8, 8, 1)).astype('float32')
    assert np.allclose(folded.predict_on_batch(images)[0], model.predict_on_batch(images), atol=1e-5)


def test_bfloat16_changes_little(small_model, inputs):
    exact = KerasRuntime(small_model, 'float32').run(inputs)
    rough = KerasRuntime(small_model, 'bfloat16').run(inputs)
    assert rough.logits.dtype == rough.features.dtype == np.float32
    assert 0 < np.abs(rough.logits - exact.logits).max() < 0.05 * np.abs(exact.logits).max()


@pytest.mark.parametrize(
    ('build', 'processor', 'precision'),
    [
        (melnyk_net, True, 'bfloat16'),
        (melnyk_net, False, 'float32'),
        (lambda **arguments: mobilenet_v3('small', **arguments), True, 'float32'),
    ],
)
def test_the_precision_fits_processor_and_network(monkeypatch, build, processor, precision):
    monkeypatch.setattr(inference, 'multiplies_bfloat16', lambda: processor)
    assert KerasRuntime(build(input_shape=(48, 48, 1), num_classes=2)).precision == precision


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        ('processor : 0\nflags\t\t: fpu avx2 avx512_bf16\n', True),
        ('flags : fpu amx_bf16 amx_tile', True),
        ('flags : fpu avx512f', False),
        ('', False),
        (None, False),
    ],
)
def test_the_processor_says_what_it_multiplies(tmp_path, text, expected):
    path = tmp_path / 'cpuinfo'
    if text is not None:
        path.write_text(text)
    assert inference.multiplies_bfloat16(path) is expected


def test_one_trace_serves_every_batch(small_model, inputs):
    runtime = KerasRuntime(small_model, 'float32')
    many = np.resize(inputs, (BATCH_SIZES[-1], 96, 96))
    together = runtime.run(many)
    for count in (1, 3, 8, 9):
        outputs = runtime.run(many[:count])
        assert outputs.features.shape[0] == count
        assert np.allclose(outputs.logits, together.logits[:count], atol=1e-3)
    assert runtime._call.experimental_get_tracing_count() == 1


def test_wrong_networks_and_precisions_are_refused(small_model):
    with pytest.raises(ValueError, match='global pooling'):
        KerasRuntime(keras.Sequential([keras.Input((96, 96, 1)), keras.layers.Flatten()]))
    with pytest.raises(ValueError, match="received 'int4'"):
        KerasRuntime(small_model, 'int4')


def test_answers_of_keras_that_are_not_numbers_are_an_error():
    model = melnyk_48()
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):  # finite, as a file may hold them, and too large
            gamma, beta, mean, variance = layer.get_weights()
            layer.set_weights([gamma * 1e30, beta, mean, variance])
    for name, arguments in (('melnyk_net', {}), ('a.h5', {'path': Path('a.h5')})):
        with pytest.raises(ModelFileError, match=f'{name}: its answers are not numbers'):
            KerasRuntime(model, 'float32', **arguments).run(np.full((2, 48, 48), 200, np.uint8))


# --- Class activation maps


def test_relative_maps_leave_out_what_all_classes_share():
    rng = np.random.default_rng(0)
    features, classifier = rng.normal(size=(1, 3, 3, 8)), rng.normal(size=(8, 4))
    maps = np.concatenate([activation_maps(features, classifier, [index], relative=True) for index in range(4)])
    assert np.allclose(maps.sum(axis=0), 0)
    assert np.argmax(maps.sum(axis=(1, 2))) == np.argmax(features.sum(axis=(1, 2)) @ classifier)


def test_a_map_has_the_size_of_the_image(small_model):
    image = network_input(draw_character())
    enlarged = class_activation_map(small_model, image[None, ..., None], 1)
    assert enlarged.shape == (96, 96)
    assert enlarged.dtype == np.float32
    runtime = KerasRuntime(small_model, 'float32')
    small = activation_maps(runtime.run(image[None]).features, runtime.classifier(), [1])
    assert np.allclose(enlarged, enlarge(small[0], (96, 96)), atol=1e-5 * np.abs(small).max())
    with pytest.raises(ValueError, match='classes 0 to 4'):
        class_activation_map(small_model, image, 5)


# --- LiteRT


def test_litert_gives_what_keras_gives(small_model, small_tflite, inputs):
    exported, built = LiteRtRuntime(small_tflite), KerasRuntime(small_model, 'float32')
    assert exported.input_shape == built.input_shape
    assert exported.num_classes == built.num_classes
    assert np.allclose(exported.classifier(), built.classifier(), atol=1e-6)
    found, expected = exported.run(inputs), built.run(inputs)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == np.float32
        assert np.allclose(one, other, atol=1e-3 * np.abs(other).max())


@pytest.mark.parametrize('threads', [1, 2, 3])
def test_answers_come_in_order_whatever_the_threads(small_tflite, inputs, threads):
    runtime = LiteRtRuntime(small_tflite, threads)
    together = runtime.run(inputs)
    alone = [runtime.run(one[None]).logits[0] for one in inputs]
    assert np.allclose(together.logits, alone, atol=1e-4)


@pytest.mark.parametrize(('name', 'expected'), [('melnyk_net.tflite', 3), ('mobilenet_v3.tflite', 1)])
def test_one_image_of_a_small_network_is_not_spread_over_cores(monkeypatch, name, expected):
    pytest.importorskip('ai_edge_litert')
    threads = []
    monkeypatch.setattr(inference, '_Worker', lambda path, content, info, count: threads.append(count))
    LiteRtRuntime(Path(inference.__file__).with_name(name), 3)
    assert threads == [expected]


@pytest.mark.parametrize('threads', [1, 2])
def test_one_runtime_serves_several_threads(small_tflite, inputs, threads):
    runtime = LiteRtRuntime(small_tflite, threads)
    batches = [inputs[:1], inputs[:3], inputs[3:], inputs[4:5]] * 3
    expected = [runtime.run(batch).logits for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        for outputs, logits in zip(pool.map(runtime.run, batches), expected, strict=True):
            assert np.allclose(outputs.logits, logits, atol=1e-4)


def test_a_network_that_cannot_run_is_an_error_of_its_file(small_tflite, inputs, monkeypatch):
    runtime = LiteRtRuntime(small_tflite, 1)

    def fail():
        raise RuntimeError('a node failed\nand more of it')

    monkeypatch.setattr(runtime._workers[0]._interpreter, 'invoke', fail)
    with pytest.raises(ModelFileError, match=r'small\.tflite: damaged TensorFlow Lite model \(a node failed\)'):
        runtime.run(inputs)


def test_the_recogniser_answers_from_either_file(small_file, small_tflite, tmp_path):
    from PIL import Image

    Image.fromarray(draw_character()).save(tmp_path / 'a.png')
    ((kept,), (light,)) = (
        HCCR(path, precision='float32').read([tmp_path / 'a.png'], with_images=True)
        for path in (small_file, small_tflite)
    )
    assert [c.character for c in kept.candidates] == [c.character for c in light.candidates]
    assert np.allclose([c.probability for c in kept.candidates], [c.probability for c in light.candidates], atol=1e-3)
    assert np.allclose(kept.activation_map, light.activation_map, atol=1e-3 * np.abs(kept.activation_map).max())


def test_a_tflite_file_needs_no_keras(small_tflite):
    script = (
        'import sys; import numpy as np; from hccr import HCCR\n'
        'recogniser = HCCR(sys.argv[1]); recogniser.print_summary()\n'
        'print(recogniser.predict(np.zeros((2, 96, 96)), 1)[0].shape)\n'
        'print([name for name in ("keras", "tensorflow", "h5py", "scipy", "matplotlib", "cv2") if name in sys.modules])'
    )
    done = subprocess.run(
        [sys.executable, '-c', script, small_tflite],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {'PYTHONPATH': str(ROOT)},
    )
    summary, note, shape, imported = done.stdout.splitlines()
    assert summary.startswith('melnyk_net: 96×96 pixels → 5 characters')
    assert (note, shape, imported) == ('random weights', '(1, 2)', '[]')


def described(path, small_tflite, **changes):
    """Copy an exported file with another description."""
    content = small_tflite.read_bytes()
    with zipfile.ZipFile(small_tflite) as archive:
        meaning = json.loads(archive.read('offline_hccr.json'))
        start = min(member.header_offset for member in archive.infolist())
    path.write_bytes(content[:start])
    with zipfile.ZipFile(path, 'a') as archive:
        archive.writestr('offline_hccr.json', json.dumps(meaning | changes))
    return path


@pytest.mark.parametrize(
    ('changes', 'reason'),
    [
        ({'labels': '一二'}, 'no logits of 2 classes'),
        ({'labels': '一一二三人'}, 'twice'),
        ({'input_shape': [48, 48, 1]}, 'instead of the described'),
        ({'input_shape': [10**6, 10**6, 1]}, 'input_shape'),
        ({'temperature': float('nan')}, 'temperature'),
        ({'code': 'import os'}, 'description'),
        ({'format': 2}, 'newer version'),
        ({'note': 'x' * 2**21}, 'too long'),
    ],
)
def test_descriptions_that_do_not_fit_are_refused(tmp_path, small_tflite, changes, reason):
    path = described(tmp_path / 'a.tflite', small_tflite, **changes)
    with pytest.raises(ModelFileError, match=reason) as refusal:
        LiteRtRuntime(path)
    assert str(path) in str(refusal.value)
    assert '\n' not in str(refusal.value)


@pytest.mark.parametrize(
    ('edit', 'reason'),
    [
        (lambda content: b'', 'not a TensorFlow Lite model'),
        (lambda content: b'\x89HDF\r\n\x1a\n' + content, 'not a TensorFlow Lite model'),
        (lambda content: content[:4] + b'TFL2' + content[8:], 'not a TensorFlow Lite model'),
        (lambda content: content[: len(content) // 2], 'no description'),
        (lambda content: struct.pack('<I', 2**31) + content[4:], 'damaged'),
        (lambda content: content[:8] + bytes(4000) + content[4008:], 'damaged'),
    ],
)
def test_damaged_files_are_refused(tmp_path, small_tflite, edit, reason):
    (tmp_path / 'a.tflite').write_bytes(edit(small_tflite.read_bytes()))
    with pytest.raises(ModelFileError, match=reason):
        LiteRtRuntime(tmp_path / 'a.tflite')


def test_a_file_of_another_program_is_refused(tmp_path, small_tflite):
    with zipfile.ZipFile(small_tflite) as archive:
        start = min(member.header_offset for member in archive.infolist())
    path = tmp_path / 'a.tflite'
    path.write_bytes(small_tflite.read_bytes()[:start])
    with pytest.raises(ModelFileError, match='no description'):
        LiteRtRuntime(path)
    with zipfile.ZipFile(path, 'a') as archive:
        archive.writestr('labels.txt', '一二三')
    with pytest.raises(ModelFileError, match='what its classes are'):
        LiteRtRuntime(path)
    with pytest.raises(FileNotFoundError):
        LiteRtRuntime(tmp_path / 'none.tflite')


def test_answers_that_are_not_numbers_are_an_error(small_tflite, inputs, monkeypatch):
    runtime = LiteRtRuntime(small_tflite, 1)
    broken = runtime.run(inputs[:1])
    monkeypatch.setattr(runtime, '_workers', [lambda image: (broken.logits[0] * np.nan, broken.features[0])])
    with pytest.raises(ModelFileError, match='not numbers'):
        runtime.run(inputs[:2])


def test_without_litert_the_error_says_what_to_install(small_tflite, monkeypatch):
    monkeypatch.setitem(sys.modules, 'ai_edge_litert.interpreter', None)
    with pytest.raises(ModelFileError, match=r'requirements-light\.txt'):
        LiteRtRuntime(small_tflite)


def test_without_keras_the_error_says_what_to_install(small_file, monkeypatch):
    monkeypatch.delitem(sys.modules, 'melnyk_net', raising=False)
    monkeypatch.setitem(sys.modules, 'keras', None)
    with pytest.raises(ModelFileError, match=r'requirements\.txt, or give a \.tflite'):
        HCCR(small_file)
