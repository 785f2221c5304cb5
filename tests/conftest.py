"""What several test modules share: pages with writing on them, and a small network."""

import os
import signal

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
os.environ.setdefault('MPLBACKEND', 'Agg')

import numpy as np
import pytest
from PIL import Image, ImageDraw


def pytest_addoption(parser):
    parser.addoption('--kills', type=int, default=2, help='how often a training run is killed (default: 2)')


# A shell that runs the tests in the background has them ignore Ctrl-C, and every process that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# 中 as strokes in a box of 100: two sides, top, bottom, and the upright through them.
STROKES = (((18, 30), (22, 68)), ((18, 30), (84, 27), (80, 64)), ((22, 66), (80, 63)), ((50, 5), (51, 96)))


def draw_character(size=100, ink=40, paper=255, width=0.05) -> np.ndarray:
    """Return a uint8 `(size, size)` page with a character drawn to its edges."""
    factor = 4  # drawn large and reduced, for soft edges
    page = Image.new('L', (size * factor, size * factor), paper)
    pen = ImageDraw.Draw(page)
    for stroke in STROKES:
        points = [(x * size * factor / 100, y * size * factor / 100) for x, y in stroke]
        pen.line(points, fill=ink, width=max(1, round(width * size * factor)), joint='curve')
    return np.array(page.resize((size, size), Image.Resampling.BOX))


@pytest.fixture(scope='session')
def character():
    return draw_character()


@pytest.fixture(scope='session')
def small_model():
    """A Melnyk-Net of five classes with random weights, of which it is quite sure."""
    from melnyk_net import melnyk_net

    model = melnyk_net(num_classes=5)
    rng = np.random.default_rng(0)
    kernel, bias = model.get_layer('dense_1').get_weights()
    model.get_layer('dense_1').set_weights([rng.normal(0, 0.05, kernel.shape), bias])
    return model


SMALL_LABELS = tuple('一二三人口')


@pytest.fixture(scope='session')
def small_file(small_model, tmp_path_factory):
    from melnyk_net import save_model

    path = tmp_path_factory.mktemp('model') / 'small.h5'
    save_model(small_model, path, SMALL_LABELS, temperature=2.0, note='random weights')
    return path


@pytest.fixture(scope='session')
def small_tflite(small_model, tmp_path_factory):
    """The small network exported in float32."""
    pytest.importorskip('ai_edge_litert')
    from export import export
    from model_file import ModelInfo

    path = tmp_path_factory.mktemp('exported') / 'small.tflite'
    export(small_model, ModelInfo((96, 96, 1), 'GWAP', SMALL_LABELS, 2.0, 'random weights'), path)
    return path


def with_random_statistics(model):
    """Give the normalizations of a network what training gives them, and its classifier something to say."""
    import keras

    rng = np.random.default_rng(1)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            gamma, beta, mean, variance = layer.get_weights()
            layer.set_weights(
                [
                    rng.uniform(0.5, 1.5, gamma.shape),
                    rng.normal(0, 0.2, beta.shape),
                    rng.normal(0, 0.2, mean.shape),
                    rng.uniform(0.5, 2, variance.shape),
                ]
            )
    kernel, bias = model.layers[-1].get_weights()
    model.layers[-1].set_weights([rng.normal(0, 0.05, kernel.shape), rng.normal(0, 1, bias.shape)])
    return model
