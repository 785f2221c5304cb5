import itertools
import threading
import time

import numpy as np
import pytest
from conftest import SMALL_LABELS, draw_character
from PIL import Image

import hccr
import melnyk_net
from data_utils import network_input, open_image
from hccr import BATCH_SIZES, HCCR, Candidate, response_line
from inference import Outputs, activation_maps, enlarge
from model_file import DEFAULT_MODEL, LIGHT_MODEL, default_model


@pytest.fixture(scope='module')
def recogniser(small_file):
    # Exact to many digits, so that batches of different sizes can be compared.
    return HCCR(small_file, precision='float32')


@pytest.fixture(scope='module')
def inputs():
    return np.stack([network_input(draw_character(60 + 3 * i, width=0.03 + 0.004 * i)) for i in range(12)])


def test_predict_has_the_shape_of_the_original(recogniser, inputs):
    characters, scores = recogniser.predict(inputs[..., None], num_predictions=3)
    assert characters.shape == scores.shape == (3, 12)
    assert set(characters.ravel()) <= set(SMALL_LABELS)
    assert (np.diff(scores, axis=0) <= 0).all()
    assert (scores >= 0).all()
    assert (scores <= 1).all()


def test_predict_prints_what_it_returns(recogniser, inputs, capsys):
    characters, scores = recogniser.predict(inputs[:1], num_predictions=2, verbose=1)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [*(response_line(Candidate(c, s)) for c, s in zip(characters[:, 0], scores[:, 0], strict=True)), '']


def test_response_line_is_the_original_line():
    assert response_line(Candidate('鲍', 0.99986)) == "Dear User, I am 99.986 % sure it's     鲍"


def test_probabilities_sum_to_one_and_do_not_depend_on_the_batch(recogniser, inputs):
    many = np.resize(inputs, (BATCH_SIZES[-1] + 5, 96, 96))
    together = recogniser.probabilities(many)
    assert together.shape == (len(many), 5)
    assert together.dtype == np.float32
    assert np.allclose(together.sum(axis=1), 1, atol=1e-5)
    alone = np.concatenate([recogniser.probabilities(one[None]) for one in inputs])
    assert np.allclose(together[:12], alone, atol=1e-5)
    assert recogniser.probabilities(inputs[:0]).shape == (0, 5)


def test_the_temperature_of_the_file_is_applied(small_file, small_model, inputs):
    cold = HCCR(small_model, SMALL_LABELS, precision='float32').probabilities(inputs)
    warm = HCCR(small_file, precision='float32').probabilities(inputs)
    expected = cold**0.5 / (cold**0.5).sum(axis=1, keepdims=True)  # softmax(logits / 2)
    assert np.allclose(warm, expected, atol=1e-5)
    assert np.array_equal(cold.argmax(axis=1), warm.argmax(axis=1))


@pytest.mark.parametrize('count', [0, -1, 6])
def test_predict_refuses_counts(recogniser, inputs, count):
    with pytest.raises(ValueError, match='1 to 5'):
        recogniser.predict(inputs, num_predictions=count)


@pytest.mark.parametrize('shape', [(96, 96), (1, 96, 95), (1, 96, 96, 3), (1, 1, 96, 96, 1)])
def test_predict_refuses_shapes(recogniser, shape):
    with pytest.raises(ValueError, match='received'):
        recogniser.predict(np.zeros(shape))


@pytest.mark.parametrize('change', [lambda x: x / 255.0, lambda x: x * 2.0, lambda x: x - 1.0, lambda x: x * np.nan])
def test_predict_refuses_values(recogniser, inputs, change):
    with pytest.raises(ValueError, match=r'0\.\.255'):
        recogniser.predict(change(inputs.astype(np.float32)))
    with pytest.raises(ValueError, match=r'0\.\.255'):
        recogniser.probabilities(change(inputs.astype(np.float32)))


@pytest.mark.parametrize('temperature', [0, -1, 1e-50, 1e4, float('nan')])
def test_temperatures_have_bounds(small_file, temperature):
    with pytest.raises(ValueError, match='temperature is a number from'):
        HCCR(small_file, temperature=temperature)


def test_the_largest_logits_give_probabilities(inputs):
    class Loud(Counting):
        def run(self, inputs):
            return super().run(inputs)._replace(logits=np.array([[1e37, 0, -1e37, 1e37, 1]] * len(inputs), np.float32))

    probabilities = HCCR(Loud(), SMALL_LABELS, temperature=1e-3).probabilities(inputs)
    assert np.allclose(probabilities, [[0.5, 0, 0, 0.5, 0]])


def test_read_takes_one_file_or_picture_as_well(recogniser, tmp_path):
    path = tmp_path / 'a.png'
    Image.fromarray(draw_character()).save(path)
    (expected,) = recogniser.read([path])
    for source in (path, str(path), open_image(path), open_image(path)[..., 0]):
        (reading,) = recogniser.read(source)
        assert [candidate.character for candidate in reading.candidates] == [
            candidate.character for candidate in expected.candidates
        ]


@pytest.mark.parametrize('count', [0, -1])
def test_read_refuses_counts_at_once(recogniser, count):
    with pytest.raises(ValueError, match='num_predictions'):
        recogniser.read([], count)


def test_read_refuses_other_arrays_than_pictures(recogniser):
    with pytest.raises(ValueError, match='uint8'):
        list(recogniser.read([draw_character() / 255]))


def test_labels_must_fit(small_model):
    with pytest.raises(ValueError, match='2 labels'):
        HCCR(small_model, '一二')
    with pytest.raises(ValueError, match='needs its labels'):
        HCCR(small_model)


@pytest.mark.parametrize('shape', [(48, 32, 1), (48, 48, 3)])
def test_other_images_than_square_gray_ones_are_refused(tmp_path, monkeypatch, shape):
    monkeypatch.setattr(melnyk_net, 'FILTER_GROUPS', ((2,),))
    melnyk_net.save_model(melnyk_net.melnyk_net(shape, num_classes=1), tmp_path / 'a.h5', '一')
    with pytest.raises(ValueError, match='×'.join(map(str, shape))):
        HCCR(tmp_path / 'a.h5')


def test_show_summary(small_file, capsys):
    HCCR(small_file, show_summary=True)
    assert 'conv2d_14' in capsys.readouterr().out


def test_read_answers_every_file_in_order(recogniser, tmp_path):
    paths = []
    for i in range(BATCH_SIZES[1] + 4):
        paths.append(tmp_path / f'{i}.png')
        Image.fromarray(draw_character(50 + i)).save(paths[-1])
    paths[3].write_bytes(b'no image')
    Image.new('L', (50, 50), 'white').save(paths[5])
    paths.insert(7, tmp_path / 'missing.png')

    readings = list(recogniser.read(paths, num_predictions=2))
    assert [reading.path for reading in readings] == paths
    assert [i for i, reading in enumerate(readings) if reading.error] == [3, 5, 7]
    for i, reading in enumerate(readings):
        assert len(reading.candidates) == (0 if reading.error else 2)
        assert reading.image is reading.network_input is reading.activation_map is None
        if not reading.error:
            expected = recogniser.predict(network_input(draw_character(50 + int(paths[i].stem)))[None], 2)
            assert [c.character for c in reading.candidates] == list(expected[0][:, 0])
            assert np.allclose([c.probability for c in reading.candidates], expected[1][:, 0], atol=1e-5)
    assert list(recogniser.read([])) == []


def test_read_gives_what_figures_need(recogniser, tmp_path):
    Image.fromarray(draw_character(1000)).save(tmp_path / 'a.png')
    (reading,) = recogniser.read([tmp_path / 'a.png'], with_images=True)
    assert reading.image.shape == (512, 512, 3)
    assert np.array_equal(reading.network_input, network_input(open_image(tmp_path / 'a.png')))
    assert reading.activation_map.shape == (96, 96)


def test_read_starts_before_it_knows_all_files(recogniser, tmp_path):
    Image.fromarray(draw_character()).save(tmp_path / 'a.png')

    def endless():
        while True:
            yield tmp_path / 'a.png'

    readings = recogniser.read(endless())
    for _ in range(20):
        assert next(readings).candidates
    readings.close()


class Counting:
    """A runtime that says how often it was asked."""

    input_shape, num_classes = (96, 96, 1), 5

    def __init__(self):
        self.asked = threading.Semaphore(0)

    def run(self, inputs):
        self.asked.release()
        return Outputs(np.zeros((len(inputs), 5), np.float32), np.zeros((len(inputs), 1, 1, 1), np.float32))

    def classifier(self):
        return np.zeros((1, 5), np.float32)


def test_the_network_works_while_answers_are_taken(monkeypatch):
    threads = set()
    prepare = hccr.network_input
    monkeypatch.setattr(
        hccr, 'network_input', lambda *arguments: threads.add(threading.current_thread()) or prepare(*arguments)
    )
    runtime = Counting()
    readings = HCCR(runtime, SMALL_LABELS).read([draw_character()] * (sum(BATCH_SIZES) + 3 * BATCH_SIZES[-1]))
    for _ in range(sum(BATCH_SIZES) + 1):  # to the first answer of the second full batch
        assert next(readings).candidates
    # The third is under way by now, or soon, without being asked for.
    for _ in range(len(BATCH_SIZES) + 2):
        assert runtime.asked.acquire(timeout=30)
    readings.close()
    assert threading.main_thread() not in threads


def test_activation_maps_are_relative(recogniser, inputs, monkeypatch):
    shown = []
    monkeypatch.setattr('figures.show', lambda windows: shown.extend(windows))
    recogniser.predict(inputs[:2], num_predictions=1, plot_cam=True)
    assert len(shown) == 2
    (reading,) = recogniser.read(draw_character(60, width=0.03), with_images=True)
    outputs = recogniser.runtime.run(reading.network_input[None])
    best = outputs.logits.argmax(axis=1)
    maps = {
        relative: enlarge(
            activation_maps(outputs.features, recogniser.runtime.classifier(), best, relative)[0], (96, 96)
        )
        for relative in (True, False)
    }
    assert np.allclose(reading.activation_map, maps[True], atol=1e-5)
    assert not np.allclose(maps[True], maps[False], atol=1e-5)


def test_all_answers_come_in_order(recogniser, tmp_path):
    Image.fromarray(draw_character()).save(tmp_path / 'a.png')
    missing = [tmp_path / f'{i}.png' for i in range(300)]
    paths = [path for pair in zip([tmp_path / 'a.png'] * 300, missing, strict=True) for path in pair]
    readings = list(recogniser.read(paths, num_predictions=1))
    assert [reading.path for reading in readings] == paths
    assert [bool(reading.error) for reading in readings] == [False, True] * 300


@pytest.mark.parametrize(
    ('backend', 'installed', 'expected'),
    [
        (None, 'tensorflow', DEFAULT_MODEL),
        (None, None, LIGHT_MODEL),
        ('jax', 'jax', DEFAULT_MODEL),
        ('jax', 'tensorflow', LIGHT_MODEL),
    ],
)
def test_the_default_is_what_can_be_run(monkeypatch, backend, installed, expected):
    monkeypatch.delenv('KERAS_BACKEND', raising=False)
    if backend:
        monkeypatch.setenv('KERAS_BACKEND', backend)
    monkeypatch.setattr('importlib.util.find_spec', lambda name: name if name == installed else None)
    assert default_model() == expected


def test_a_second_thread_helps_where_one_is_waited_for(monkeypatch):
    threads = set()

    def slow(*_):
        threads.add(threading.current_thread())
        time.sleep(0.02 + hccr._PATIENCE)
        return np.zeros((96, 96), np.uint8)

    monkeypatch.setattr(hccr, 'network_input', slow)
    monkeypatch.setattr(hccr, 'usable_cores', lambda: 3)
    assert len(list(HCCR(Counting(), SMALL_LABELS).read([draw_character()] * 24))) == 24
    assert len(threads) == 3


def test_one_thread_is_enough_where_nothing_is_waited_for(monkeypatch):
    at_once, most = [], []

    def prepare(*_):
        at_once.append(0)
        most.append(len(at_once))
        at_once.pop()
        return np.zeros((96, 96), np.uint8)

    monkeypatch.setattr(hccr, 'network_input', prepare)
    monkeypatch.setattr(hccr, 'usable_cores', lambda: 8)
    monkeypatch.setattr(hccr, '_PATIENCE', 30)
    assert len(list(HCCR(Counting(), SMALL_LABELS).read([draw_character()] * 500))) == 500
    assert max(most) == 1


def test_closing_leaves_the_files_that_are_left(monkeypatch):
    prepared = []
    monkeypatch.setattr(hccr, 'network_input', lambda *_: prepared.append(0) or np.zeros((96, 96), np.uint8))
    readings = HCCR(Counting(), SMALL_LABELS).read(itertools.repeat(draw_character()))
    next(readings)
    readings.close()
    count = len(prepared)
    time.sleep(0.2)
    assert len(prepared) == count <= hccr._AHEAD + hccr._AT_A_TIME


@pytest.mark.parametrize('count', [1, 5, 100, 101, 400])
def test_candidates_are_the_best_in_order(count):
    probabilities = np.random.default_rng(count).random((7, 300), np.float32)
    probabilities[:, 200:210] = probabilities[:, 10:20]  # equals
    best = hccr._best(probabilities, count)
    assert np.array_equal(best, np.argsort(-probabilities, axis=1, kind='stable')[:, :count])
