import csv
import io
import json
import math
import tarfile

import keras
import numpy as np
import pytest
from conftest import draw_character

import melnyk_net
import train
from data_utils import LABELS
from gnt_reader import write_gnt
from train import Plateau, Recipe, TrainingError, area_weights, carry_weights, cosine, plateau


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """Melnyk-Net with one narrow convolution in each group: the same program, in seconds."""
    monkeypatch.setattr(melnyk_net, 'FILTER_GROUPS', ((4,), (6,), (8,), (8,), (16,)))
    yield
    keras.config.set_dtype_policy('float32')


@pytest.fixture(scope='module')
def gnt(tmp_path_factory):
    """GNT files of six writers, 16 samples each, of two characters that a glance tells apart."""
    folder = tmp_path_factory.mktemp('gnt')
    rng = np.random.default_rng(0)
    pages = [draw_character(48), np.full((48, 48), 255, np.uint8)]
    pages[1][20:28, :] = 0
    for writer in range(6):
        picked = rng.integers(0, 2, 16)
        noise = rng.integers(0, 40, (16, 48, 48))
        records = [(LABELS[k], np.maximum(pages[k], n).astype(np.uint8)) for k, n in zip(picked, noise, strict=True)]
        write_gnt(folder / f'{1001 + writer}-c.gnt', records)
    return folder


@pytest.fixture(scope='module')
def material(tmp_path_factory):
    """Stroke data of three random strokes a character, in the form of the real one."""
    folder = tmp_path_factory.mktemp('material')
    rng = np.random.default_rng(0)
    with tarfile.open(folder / 'hanzi-writer-data-2.0.1.tgz', 'w:gz', compresslevel=1) as archive:
        for character in LABELS:
            medians = rng.integers(0, 900, (3, 4, 2)).tolist()
            content = json.dumps({'strokes': [], 'medians': medians}).encode()
            info = tarfile.TarInfo(f'package/{character}.json')
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return folder


SMALL = ('--size', '48', '--precision', 'float32', '--workers', '1', '--batch-size', '16', '--log-every', '2')


def options(*arguments):
    return train.parse([str(a) for a in (*arguments, *SMALL)])


def log(folder):
    with (folder / 'log.csv').open() as file:
        return list(csv.DictReader(file))


def curve(folder):
    """What a stop must not change: everything but the clock."""
    return [{k: v for k, v in row.items() if k not in ('seconds', 'images_per_second')} for row in log(folder)]


def assert_same_curve(folder, other):
    rows, others = curve(folder), curve(other)
    assert len(rows) == len(others) > 3
    for row, wanted in zip(rows, others, strict=True):
        got = [float(value or 0) for value in row.values()]
        assert got == pytest.approx([float(value or 0) for value in wanted.values()], rel=2e-3, abs=2e-4)


# --- Runs ------------------------------------------------------------------------------------------------------------


def test_a_run_on_scanned_samples_learns_and_leaves_its_files(gnt, tmp_path, capsys):
    out = tmp_path / 'run'
    arguments = ['--gnt', gnt, '--out', out, '--val-writers', 1, '--epochs', 6, '--learning-rate', 0.05, '--augment']
    assert train.main([str(a) for a in (*arguments, *SMALL)]) == 0
    rows = log(out)
    assert float(rows[-1]['loss']) < 0.5 * float(rows[0]['loss'])
    assert float(rows[-1]['accuracy']) > 0.8
    assert [row['epoch'] for row in rows if row['val_top1']] == [f'{n}.000' for n in range(1, 7)]
    assert {path.name for path in out.iterdir()} == {
        *('config.json', 'log.csv', 'curves.png', 'samples.png', 'state.npz', 'last.h5', 'best.h5'),
    }
    config = json.loads((out / 'config.json').read_text())
    assert config['recipe']['optimizer'] == 'sgd'
    assert config['options']['val_writers'] == 1
    assert 'images/s' in capsys.readouterr().err
    model, info = melnyk_net.load_model(out / 'best.h5')
    assert model.input_shape == (None, 48, 48, 1)
    assert 'scanned samples' in info.note
    probabilities = model.predict(np.zeros((1, 48, 48, 1)), verbose=0)
    assert probabilities.sum() == pytest.approx(1, abs=1e-4)  # a classifier again, not logits


def test_a_smoke_run_goes_through_everything(gnt, tmp_path):
    assert train.main(['--gnt', str(gnt), '--smoke', '--out', str(tmp_path / 'run')]) == 0
    rows = log(tmp_path / 'run')
    assert rows[-1]['val_top1']
    assert int(rows[-1]['samples']) <= 320


def test_a_run_that_is_stopped_and_resumed_gives_the_same_curve(gnt, tmp_path, monkeypatch):
    arguments = ('--gnt', gnt, '--val-writers', 1, '--epochs', 4, '--learning-rate', 0.02, '--save-minutes', 0)
    train.train(*options(*arguments, '--out', tmp_path / 'whole'))

    original, steps = train.TrainingModel.train_on_batch, iter(range(10))

    def until_stopped(self, *args, **kwargs):
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(train.TrainingModel, 'train_on_batch', until_stopped)
    with pytest.raises(KeyboardInterrupt):
        train.train(*options(*arguments, '--out', tmp_path / 'parts'))
    monkeypatch.setattr(train.TrainingModel, 'train_on_batch', original)
    assert len(log(tmp_path / 'parts')) < len(log(tmp_path / 'whole'))
    assert train.main(['--resume', str(tmp_path / 'parts')]) == 0
    assert_same_curve(tmp_path / 'parts', tmp_path / 'whole')
    # And once more, when there is nothing left to do.
    assert train.main(['--resume', str(tmp_path / 'parts')]) == 0
    assert_same_curve(tmp_path / 'parts', tmp_path / 'whole')


def test_a_teacher_teaches_drawn_samples_whatever_their_label(material, tmp_path):
    inputs = keras.Input((96, 96, 1))
    constant = keras.layers.Dense(len(LABELS), kernel_initializer='zeros')
    outputs = constant(keras.layers.GlobalAveragePooling2D()(inputs))
    bias = np.full(len(LABELS), -10.0, np.float32)
    bias[7] = 10.0  # a teacher that always says the same
    constant.set_weights([constant.get_weights()[0], bias])
    keras.Model(inputs, outputs).save(tmp_path / 'teacher.keras')

    arguments = ('--drawn', material, '--teacher', tmp_path / 'teacher.keras', '--label-weight', 0.01)
    arguments += (
        '--samples',
        640,
        '--validate-every',
        10**6,
        '--val-samples',
        20,
        '--learning-rate',
        0.02,
        '--warmup',
        3,
    )
    train.train(*options(*arguments, '--out', tmp_path / 'run'))
    rows = log(tmp_path / 'run')
    assert float(rows[0]['loss']) > 5
    assert float(rows[-1]['loss']) < 0.5
    model, info = melnyk_net.load_model(tmp_path / 'run' / 'last.h5')
    assert model.predict(np.zeros((1, 48, 48, 1)), verbose=0).argmax() == 7
    assert 'drawn handwriting, taught by teacher.keras' in info.note


def test_both_sources_mix_in_half_precision_from_other_weights(gnt, material, tmp_path):
    first = tmp_path / 'first'
    pages = np.stack([draw_character(60, width=0.04 + 0.02 * k) for k in range(5)])
    np.savez(tmp_path / 'own.npz', images=pages, chars=np.array(['中'] * 5))
    arguments = ('--gnt', gnt, '--drawn', material, '--validate', tmp_path / 'own.npz', '--samples', 64)
    arguments += ('--validate-every', 32)
    train.train(*options(*arguments, '--out', first))
    more = ('--init', first / 'last.h5', '--freeze', 2, '--size', 64, '--precision', 'bfloat16', '--pooling', 'GWOAP')
    settings, recipe = train.parse([str(a) for a in (*arguments, '--out', tmp_path / 'second', *SMALL, *more)])
    train.train(settings, recipe)
    assert [row['samples'] for row in log(first) if row['val_loss']] == ['32', '64']
    models = [melnyk_net.load_model(tmp_path / name / 'last.h5')[0] for name in ('first', 'second')]
    assert [model.input_shape[1] for model in models] == [48, 64]
    frozen, learned = ([model.get_layer(f'conv2d_{n}').get_weights()[0] for model in models] for n in (2, 3))
    np.testing.assert_array_equal(*frozen)
    assert np.abs(learned[0] - learned[1]).max() > 0


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_one(gnt, tmp_path, monkeypatch, capsys):
    out = tmp_path / 'run'
    arguments = ('--gnt', gnt, '--val-writers', 1, '--epochs', 4, '--save-minutes', 0, '--out', out, *SMALL)
    original, step = train.TrainingModel.train_on_batch, [0]

    def diverging(self, *args, **kwargs):
        step[0] += 1
        result = original(self, *args, **kwargs)
        return result | {'loss': math.nan} if step[0] == 9 else result

    monkeypatch.setattr(train.TrainingModel, 'train_on_batch', diverging)
    assert train.main([str(a) for a in arguments]) == 1
    assert 'the loss is nan at step 9' in capsys.readouterr().err
    _, counters = train.RunFolder(out).load_state()
    assert counters['step'] == 8
    melnyk_net.load_model(out / 'best.h5')


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (('--drawn', 'nowhere'), 'nowhere: no such folder'),
        (('--gnt', 'nowhere'), 'nowhere'),
        (('--resume', 'nowhere'), 'no run to go on with'),
        (('--drawn', 'nowhere', '--coordinator', 'localhost:1', '--processes', '2'), 'KERAS_BACKEND=jax'),
    ],
)
def test_what_cannot_start_says_why_in_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train.main(arguments) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith('train.py: ')
    assert message in error
    assert '\n' not in error


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ((), 'what to learn from'),
        (('--gnt', 'x', '--batch-size', '0'), 'at least 1'),
        (('--gnt', 'x', '--gnt-share', '1.5'), 'between 0 and 1'),
        (('--gnt', 'x', '--process', '1'), '--process is 0'),
        (('--gnt', 'x', '--freeze', '2'), '--init'),
        (('--gnt', 'x', '--size', '50'), 'invalid choice'),
    ],
)
def test_wrong_usage(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        train.main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_competition_files_neither_train_nor_choose(gnt, tmp_path, capsys):
    write_gnt(tmp_path / 'C001-f-f.gnt', [(LABELS[0], draw_character(40))])
    competition = str(tmp_path / 'C001-f-f.gnt')
    for arguments in (['--gnt', competition], ['--gnt', str(gnt), '--validate', competition]):
        assert train.main([*arguments, '--out', str(tmp_path / 'run')]) == 1
        assert 'competition' in capsys.readouterr().err
    assert not (tmp_path / 'run').exists()


# --- Parts -----------------------------------------------------------------------------------------------------------


def test_the_default_for_scanned_samples_is_the_papers_recipe():
    _, recipe = train.parse(['--gnt', 'x'])
    assert (recipe.batch_size, recipe.epochs, recipe.learning_rate, recipe.l2, recipe.dropout) == (
        256,
        41,
        0.1,
        1e-3,
        0.5,
    )
    _, recipe = train.parse(['--gnt', 'x', '--epochs', '3', '--l2', '0'])
    assert (recipe.epochs, recipe.l2, recipe.learning_rate) == (3, 0, 0.1)
    assert train.parse(['--drawn', 'x'])[1].optimizer == 'adamw'


def test_the_papers_learning_rate():
    state, rates = Plateau(0.1), []
    for epoch, accuracy in enumerate([0.5, 0.7, 0.8, 0.8, 0.85, 0.85005, 0.9, *[0.9] * 6], start=1):
        state = plateau(state, epoch, accuracy)
        rates.append(state.rate)
    expected = [1e-2, 1e-2, 1e-2, 1e-3, 1e-3, 1e-4, 1e-4, 1e-5, *[1e-6] * 5]
    assert rates == pytest.approx(expected)


def test_the_cosine_warms_up_and_falls():
    recipe = Recipe(batch_size=1, learning_rate=2.0, warmup=4)
    rates = [cosine(recipe, step, 100) for step in range(101)]
    assert rates[0] == pytest.approx(0.5, rel=0.01)
    assert max(rates) == pytest.approx(2, rel=0.01)
    assert rates[50] == pytest.approx(2 * (0.02 + 0.98 / 2))
    assert rates[100] == pytest.approx(0.04)


@pytest.mark.parametrize(('old', 'new'), [(96, 48), (96, 64), (3, 6), (4, 6), (5, 5)])
def test_area_weights_are_means_that_lose_nothing(old, new):
    weights = area_weights(old, new)
    assert weights.shape == (new, old)
    assert weights.min() >= 0
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose(weights.sum(0), new / old, rtol=1e-6)


@pytest.mark.parametrize(
    'kinds', [('GWAP', 'GWAP'), ('GWAP', 'GWOAP'), ('GAP', 'GWAP'), ('GWOAP', 'GWAP'), ('GAP', 'GAP')]
)
def test_weights_carry_over_to_another_size_and_pooling(kinds):
    rng = np.random.default_rng(0)
    source = melnyk_net.melnyk_net((48, 48, 1), global_average_type=kinds[0], num_classes=5)
    target = melnyk_net.melnyk_net((96, 96, 1), global_average_type=kinds[1], num_classes=5)
    source.set_weights([np.abs(rng.normal(0.5, 0.1, w.shape)) for w in source.get_weights()])
    carry_weights(source, target)
    for layer in source.layers:
        if layer.weights and 'pooling' not in layer.name:
            for mine, other in zip(layer.get_weights(), target.get_layer(layer.name).get_weights(), strict=True):
                np.testing.assert_array_equal(mine, other)
    # The same features everywhere give the same sum, whatever the number of places.
    poolings = [next(layer for layer in m.layers if layer.name.startswith('global')) for m in (source, target)]
    pooled = [np.asarray(p(np.ones((1, *p.input.shape[1:]), np.float32))) for p in poolings]
    np.testing.assert_allclose(pooled[0], pooled[1], rtol=1e-4)


def test_weights_of_another_number_of_classes_do_not_fit():
    models = [melnyk_net.melnyk_net((48, 48, 1), num_classes=n) for n in (5, 6)]
    with pytest.raises(TrainingError, match='dense_1'):
        carry_weights(*models)


@pytest.mark.skipif(keras.backend.backend() != 'tensorflow', reason='the fused operation is of TensorFlow')
def test_fused_batch_normalization_is_batch_normalization():
    rng = np.random.default_rng(0)
    images = rng.normal(3, 2, (8, 5, 5, 4)).astype(np.float32)
    layers = [keras.layers.BatchNormalization(momentum=0.9), train._fused_batch_normalization()(momentum=0.9)]
    for layer in layers:
        layer.build(images.shape)
        layer.set_weights([np.arange(1, 5), np.arange(4), np.ones(4), np.full(4, 2.0)])
    for training in (True, False):
        np.testing.assert_allclose(*(layer(images, training=training) for layer in layers), rtol=1e-3, atol=1e-3)
    for mine, other in zip(*(layer.get_weights() for layer in layers), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-4)


def test_a_teacher_that_does_not_fit_is_refused(tmp_path):
    keras.Sequential([keras.Input((96, 96, 1)), keras.layers.Flatten(), keras.layers.Dense(3)]).save(
        tmp_path / 't.keras'
    )
    with pytest.raises(TrainingError, match='gives 3755 logits; this one reads'):
        train.load_teacher(tmp_path / 't.keras', 3755, 'float32')
    (tmp_path / 'broken.keras').write_bytes(b'no model')
    with pytest.raises(TrainingError, match='not a teacher'):
        train.load_teacher(tmp_path / 'broken.keras', 3755, 'float32')


def test_our_own_model_teaches_by_its_logits(tmp_path):
    model = melnyk_net.melnyk_net((48, 48, 1), num_classes=5)
    melnyk_net.save_model(model, tmp_path / 'own.h5', labels='一二三人口')
    teacher = train.load_teacher(tmp_path / 'own.h5', 5, 'float32')
    image = np.random.default_rng(0).integers(0, 256, (1, 48, 48, 1)).astype(np.float32)
    logits = np.asarray(teacher(image))
    np.testing.assert_allclose(np.asarray(keras.ops.softmax(logits)), np.asarray(model(image)), rtol=1e-4)


def test_validation_counts_every_sample_once_whatever_the_batch(gnt):
    settings, recipe = options('--gnt', gnt)
    model = train.build(settings, recipe)
    rng = np.random.default_rng(0)
    samples = train.Batch(rng.integers(0, 256, (21, 96, 96), np.uint8), rng.integers(0, 3755, 21), np.ones(21, bool))
    logits = np.asarray(model(samples.images))
    place = (logits > logits[np.arange(21), samples.labels][:, None]).sum(1)
    log_probabilities = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    for batch_size in (16, 21, 32):
        measured = train.validate(model, samples, batch_size, (0, batch_size))
        assert measured['val_top5'] == pytest.approx((place < 5).mean(), abs=1e-6)
        assert measured['val_loss'] == pytest.approx(-log_probabilities[np.arange(21), samples.labels].mean(), rel=1e-4)
