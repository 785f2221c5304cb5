import contextlib
import csv
import io
import json
import math
import shutil
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pytest
from conftest import draw_character
from PIL import Image

import handwriting
import learner
import melnyk_net
import train
from data_utils import LABELS
from feed import Batch
from gnt_reader import write_gnt
from learner import LearnerError, area_weights, carry_weights
from run_folder import FIELDS, Picture
from train import KeptSamples, Plateau, Recipe, TrainingError, cosine, plateau

ROOT = Path(__file__).parents[1]


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


@contextlib.contextmanager
def stopped_after(steps, monkeypatch):
    """Let a run end by Ctrl-C when it begins the step after so many."""
    original, left = learner.TrainingModel.train_on_batch, iter(range(steps))

    def until_stopped(self, *args, **kwargs):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(learner.TrainingModel, 'train_on_batch', until_stopped)
        yield


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
    said = capsys.readouterr().err
    assert 'images/s' in said
    best = max(float(row['val_top1']) for row in rows if row['val_top1'])
    assert said.splitlines()[-1] == f'best model: {out / "best.h5"}, right on {best:.2%} of the samples to measure with'
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

    with stopped_after(10, monkeypatch), pytest.raises(KeyboardInterrupt):
        train.train(*options(*arguments, '--out', tmp_path / 'parts'))
    assert len(log(tmp_path / 'parts')) < len(log(tmp_path / 'whole'))
    assert train.main(['--resume', str(tmp_path / 'parts')]) == 0
    assert_same_curve(tmp_path / 'parts', tmp_path / 'whole')
    assert all(0 < float(row['macro_recall']) <= 1 for row in log(tmp_path / 'parts'))
    # And once more, when there is nothing left to do.
    assert train.main(['--resume', str(tmp_path / 'parts')]) == 0
    assert_same_curve(tmp_path / 'parts', tmp_path / 'whole')


def test_a_run_that_is_stopped_before_its_first_step_goes_on(gnt, tmp_path, monkeypatch, capsys):
    arguments = ('--gnt', gnt, '--val-writers', 1, '--epochs', 2, '--learning-rate', 0.02)
    train.train(*options(*arguments, '--out', tmp_path / 'whole'))
    capsys.readouterr()
    parts = tmp_path / 'parts'
    command = [str(a) for a in (*arguments, *SMALL, '--out', parts)]
    with monkeypatch.context() as patch:
        patch.setattr(train, 'prepare_data', interrupted)
        assert train.main(command) == 130
    assert capsys.readouterr().err.strip() == 'train.py: stopped'  # nothing to go on from is promised
    assert not parts.exists()
    with stopped_after(0, monkeypatch):
        assert train.main(command) == 130
    assert f'stopped; --resume {parts} goes on' in capsys.readouterr().err
    assert train.main(command) == 1
    assert f'go on with --resume {parts}' in capsys.readouterr().err
    assert train.main(['--resume', str(parts)]) == 0
    assert_same_curve(parts, tmp_path / 'whole')


def interrupted(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize('change', ['come', 'gone', 'changed'])
def test_a_run_whose_files_have_changed_does_not_go_on(change, gnt, tmp_path, monkeypatch, capsys):
    scans = shutil.copytree(gnt, tmp_path / 'scans')
    with stopped_after(1, monkeypatch), pytest.raises(KeyboardInterrupt):
        train.train(*options('--gnt', scans, '--val-writers', 1, '--epochs', 1, '--out', tmp_path / 'run'))
    moved = scans.rename(tmp_path / 'moved')  # the files count, and not where they are
    file = tmp_path / 'run' / 'config.json'
    file.write_text(file.read_text().replace(str(scans), str(moved)))
    if change == 'gone':
        (moved / '1001-c.gnt').unlink()
    else:
        write_gnt(moved / ('1007-c.gnt' if change == 'come' else '1001-c.gnt'), [(LABELS[0], draw_character(40))])
    capsys.readouterr()
    assert train.main(['--resume', str(tmp_path / 'run')]) == 1
    error = capsys.readouterr().err.strip()
    assert 'files of --gnt have come, gone or changed since the run began' in error
    assert '\n' not in error
    shutil.rmtree(moved)
    shutil.copytree(gnt, moved)
    assert train.main(['--resume', str(tmp_path / 'run')]) == 0


def test_material_is_rendered_before_the_workers_start_and_noticed_if_it_changes(material, tmp_path):
    folder = shutil.copytree(material, tmp_path / 'material', ignore=shutil.ignore_patterns('*.npz'))
    np.savez(tmp_path / 'own.npz', images=draw_character(60)[None], chars=np.array(['中']))
    arguments = ('--drawn', folder, '--validate', tmp_path / 'own.npz')
    before = train.prepare_data(options(*arguments)[0])
    assert (folder / handwriting.CACHE_NAME).exists()
    (tmp_path / 'strokes.json').write_text(json.dumps({'中': [[[[0, 0], [1, 1]], [[1, 0], [0, 1]]]]}))
    after = train.prepare_data(options(*arguments, '--strokes', tmp_path / 'strokes.json')[0])
    assert set(before.digests) == set(after.digests) == {'drawn'}
    assert before.digests != after.digests


def test_a_run_of_an_older_version_goes_on(gnt, tmp_path, monkeypatch):
    arguments = ('--gnt', gnt, '--val-writers', 1, '--epochs', 3, '--learning-rate', 0.02, '--save-minutes', 0)
    train.train(*options(*arguments, '--out', tmp_path / 'whole'))
    with stopped_after(8, monkeypatch), pytest.raises(KeyboardInterrupt):
        train.train(*options(*arguments, '--out', tmp_path / 'parts'))
    file = tmp_path / 'parts' / 'config.json'
    config = json.loads(file.read_text())
    for newer in ('images', 'images_share', 'classes', 'keep', 'strokes'):
        del config['options'][newer]
    del config['recipe']['schedule'], config['digests']
    config['options']['augment'] = False
    file.write_text(json.dumps(config))
    file = tmp_path / 'parts' / 'log.csv'
    rows = log(tmp_path / 'parts')
    older = [name for name in FIELDS if 'macro' not in name]
    with file.open('w') as stream:
        writer = csv.DictWriter(stream, older, extrasaction='ignore')
        writer.writeheader()
        writer.writerows(rows)
    assert train.main(['--resume', str(tmp_path / 'parts')]) == 0
    for row in log(tmp_path / 'parts')[: len(rows)]:
        assert row['macro_recall'] == row['val_macro_recall'] == ''
    strip = [name for name in older if name not in ('seconds', 'images_per_second')]
    got, wanted = ([[row[name] for name in strip] for row in log(tmp_path / run)] for run in ('parts', 'whole'))
    assert [[float(v or 0) for v in row] for row in got] == [
        pytest.approx([float(v or 0) for v in row], rel=2e-3, abs=2e-4) for row in wanted
    ]


@pytest.mark.parametrize('content', ['{}', '[]', '{"options": {}, "recipe": {"epochs": 1, "batch_size": 2, "new": 3}}'])
def test_a_run_of_another_kind_is_not_gone_on_with(content, tmp_path, capsys):
    (tmp_path / 'config.json').write_text(content)
    assert train.main(['--resume', str(tmp_path)]) == 1
    assert 'config.json is damaged, or of a newer version' in capsys.readouterr().err


def test_a_run_is_refused_at_once_where_another_lies(tmp_path, capsys):
    (tmp_path / 'config.json').write_text('{}')
    assert train.main(['--gnt', 'nowhere', '--out', str(tmp_path)]) == 1
    assert f'{tmp_path} holds a run' in capsys.readouterr().err


@pytest.mark.parametrize('architecture', ['mobilenet_v3_small', 'mobilenet_v3_large'])
def test_the_other_architectures_train_and_say_what_they_are(architecture, gnt, tmp_path):
    arguments = ['--gnt', gnt, '--architecture', architecture, '--smoke', '--epochs', 1, '--limit', 32]
    assert train.main([str(a) for a in (*arguments, '--out', tmp_path / 'run')]) == 0
    rows = log(tmp_path / 'run')
    assert math.isfinite(float(rows[-1]['val_loss']))
    model, info = melnyk_net.load_model(tmp_path / 'run' / 'last.h5')
    assert info.architecture == model.name == architecture
    assert info.labels == LABELS
    assert model.input_shape == (None, 48, 48, 1)


def test_weights_of_another_architecture_are_refused_in_one_line(gnt, tmp_path, capsys):
    melnyk_net.save_model(melnyk_net.melnyk_net((48, 48, 1)), tmp_path / 'melnyk.h5')
    arguments = ['--gnt', gnt, '--architecture', 'mobilenet_v3_small', '--init', tmp_path / 'melnyk.h5']
    for more, message in ((), 'add --architecture melnyk_net'), (('--freeze', 2), '--freeze counts the convolutions'):
        assert train.main([str(a) for a in (*arguments, *more, '--out', tmp_path / 'run', *SMALL)]) == 1
        error = capsys.readouterr().err.strip()
        assert message in error
        assert '\n' not in error
    arguments = ['--gnt', gnt, '--init', tmp_path / 'melnyk.h5', '--freeze', 6, '--out', tmp_path / 'run', *SMALL]
    assert train.main([str(a) for a in arguments]) == 1
    assert '--freeze is at most 5, received 6' in capsys.readouterr().err
    assert not (tmp_path / 'run').exists()


# --- Samples that are kept -------------------------------------------------------------------------------------------


def kept_batch(step):
    """A batch of four whose numbers tell which sample is which."""
    numbers = np.arange(4 * step, 4 * step + 4)
    images = np.zeros((4, 96, 96), np.uint8) + numbers[:, None, None].astype(np.uint8)
    return Batch(images, numbers.astype(np.int32), numbers % 3 > 0), numbers[:, None] + np.array([[0.0, 0.5, -1e6]])


def test_kept_samples_come_once_a_pass_with_their_answers(tmp_path):
    kept = KeptSamples(tmp_path, 22, 4, 3, seed=1, exists=False)
    assert kept.steps == 5  # whole batches
    for step in range(5):
        kept.write(step, *kept_batch(step))
    again = KeptSamples(tmp_path, 22, 4, 3, seed=1, exists=True)
    orders = []
    for number in (1, 2, 3):
        labels = []
        for step in range(5 * number, 5 * number + 5):
            (images, numbers, trusted), logits = again.read(step)
            assert images.shape == (4, 96, 96)
            assert (images[:, 5, 5] == numbers).all()
            assert (trusted == (numbers % 3 > 0)).all()
            np.testing.assert_array_equal(logits[:, :2], numbers[:, None] + np.array([[0.0, 0.5]]))
            assert (logits[:, 2] == np.float16(-6e4)).all()  # a finite number
            np.testing.assert_array_equal(kept.read(step)[0].labels, numbers)
            labels += numbers.tolist()
        assert sorted(labels) == list(range(20))
        orders.append(labels)
    assert orders[0] != orders[1] != orders[2]


@pytest.mark.parametrize('name', ['images', 'labels', 'trusted', 'logits'])
def test_kept_samples_that_are_gone_are_missed(name, tmp_path):
    KeptSamples(tmp_path, 8, 4, 3, seed=1, exists=False)
    file = tmp_path / f'kept_{name}.npy'
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])  # cut short
    with pytest.raises(TrainingError, match=r'are gone .*; start a new run'):
        KeptSamples(tmp_path, 8, 4, 3, seed=1, exists=True)
    file.unlink()
    with pytest.raises(TrainingError, match=r'are gone .*; start a new run'):
        KeptSamples(tmp_path, 8, 4, 3, seed=1, exists=True)
    np.save(file, np.zeros(3))  # another run's
    with pytest.raises(TrainingError, match='of another run'):
        KeptSamples(tmp_path, 8, 4, 3, seed=1, exists=True)


def test_samples_are_not_kept_where_there_is_no_room(tmp_path, monkeypatch):
    monkeypatch.setattr(train.shutil, 'disk_usage', lambda path: type('Usage', (), {'free': 10**6}))
    with pytest.raises(TrainingError, match=r'--keep 200 takes 0\.0 GB, and 0\.0 are free'):
        KeptSamples(tmp_path / 'run', 200, 4, 3, seed=1, exists=False)
    with pytest.raises(TrainingError, match='--keep 3 is less than a batch of 4'):
        KeptSamples(tmp_path / 'run', 3, 4, 3, seed=1, exists=False)
    assert not (tmp_path / 'run').exists()


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    """A teacher whose answer depends on where the ink is."""
    keras.utils.set_random_seed(1)
    inputs = keras.Input((96, 96, 1))
    x = keras.layers.Flatten()(keras.layers.AveragePooling2D(24)(inputs))
    outputs = keras.layers.Dense(len(LABELS), kernel_initializer=keras.initializers.RandomNormal(stddev=0.1))(x)
    path = tmp_path_factory.mktemp('teacher') / 'teacher.keras'
    keras.Model(inputs, outputs).save(path)
    return path


def test_a_run_asks_once_and_goes_on_wherever_it_stopped(material, teacher, tmp_path, monkeypatch, capsys):
    arguments = ['--drawn', material, '--teacher', teacher, '--keep', 70, '--samples', 144, '--save-minutes', 0]
    arguments += ['--val-samples', 16, '--validate-every', 96, '--learning-rate', 0.01, '--warmup', 2]
    asked, ask = [], learner.ask
    monkeypatch.setattr(learner, 'ask', lambda *args: asked.append(1) or ask(*args))
    train.train(*options(*arguments, '--out', tmp_path / 'whole'))
    assert len(asked) == 4  # of nine steps: 64 samples are kept
    with stopped_after(3, monkeypatch), pytest.raises(KeyboardInterrupt):  # in the first pass
        train.train(*options(*arguments, '--out', tmp_path / 'parts'))
    with stopped_after(5, monkeypatch), pytest.raises(KeyboardInterrupt):  # in the second one
        train.train(*train.parse(['--resume', str(tmp_path / 'parts')]))
    assert train.RunFolder(tmp_path / 'parts').load_state()[1]['step'] == 6
    assert train.main(['--resume', str(tmp_path / 'parts')]) == 0
    assert_same_curve(tmp_path / 'parts', tmp_path / 'whole')

    capsys.readouterr()
    (tmp_path / 'parts' / 'kept_logits.npy').unlink()
    assert train.main(['--resume', str(tmp_path / 'parts')]) == 1
    error = capsys.readouterr().err.strip()
    assert 'the samples that the run kept are gone' in error
    assert '\n' not in error


# --- Pictures of one's own -------------------------------------------------------------------------------------------


def write_pictures(folder, counts):
    """Write so many pictures of each character, with a hand of their own."""
    for k, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            page = np.rot90(draw_character(40 + i, width=0.04 + 0.01 * i), k)
            Image.fromarray(page).save(folder / name / f'{i}.png')
    return folder


@pytest.fixture
def pictures(tmp_path):
    folder = write_pictures(tmp_path / 'mine', {'中': 8, '龘': 8, 'A': 1})
    (folder / '中' / 'broken.png').write_bytes(b'no picture')
    Image.new('L', (30, 30), 255).save(folder / '中' / 'blank.png')
    Image.fromarray(draw_character(30)).save(folder / 'scan.png')
    return folder


def test_a_few_characters_of_ones_own_make_a_network_of_exactly_these(pictures, tmp_path, capsys, monkeypatch):
    out = tmp_path / 'run'
    melnyk_net.save_model(melnyk_net.melnyk_net((96, 96, 1)), tmp_path / 'all.h5')
    arguments = ['--images', pictures, '--init', tmp_path / 'all.h5', '--epochs', 4, '--out', out]
    assert train.main([str(a) for a in (*arguments, *SMALL)]) == 0
    said = capsys.readouterr().err
    assert '17 pictures of 3: 中A龘; 13 to learn from, 4 to measure with' in said
    for name in ('broken.png: not an image', 'blank.png: nothing is written', 'scan.png: neither its folder'):
        assert f'{name}' in said
    table = train.RunFolder(out).pictures()
    assert sorted(row.use for row in table if row.character)[-17:].count('training') == 13
    assert {Path(row.file).name for row in table if row.use not in ('training', 'validation')} == {
        *('broken.png', 'blank.png', 'scan.png'),
    }
    for character in '中龘':
        assert sum(row == Picture(row.file, character, 'validation') for row in table) == 2
    config = json.loads((out / 'config.json').read_text())
    assert config['recipe']['learning_rate'] == train.OWN.learning_rate
    rows = log(out)
    assert [row['epoch'] for row in rows if row['val_macro_recall']] == ['1.000', '2.000', '3.000', '4.000']
    assert all(float(row['macro_recall']) >= 0 for row in rows)

    model, info = melnyk_net.load_model(out / 'best.h5')
    assert info.labels == ('中', 'A', '龘')
    assert model.output_shape == (None, 3)
    assert "pictures of the user's own" in info.note

    # The other programs take it as it is.
    import evaluate
    import main as program

    monkeypatch.chdir(tmp_path)
    assert evaluate.main([str(pictures), '--model', str(out / 'best.h5')]) == 0
    assert 'samples 17' in capsys.readouterr().out
    picture = str(pictures / '龘' / '0.png')
    assert program.main([picture, '--model', str(out / 'best.h5'), '--format', 'json', '-n', '5']) == 0
    candidates = json.loads(capsys.readouterr().out)['candidates']
    assert {candidate['character'] for candidate in candidates} == set('中A龘')


def test_a_run_on_pictures_goes_on_with_the_same_ones(tmp_path, monkeypatch):
    folder = write_pictures(tmp_path / 'mine', {'中': 12, '国': 12})
    arguments = ('--images', folder, '--epochs', 5, '--save-minutes', 0, '--learning-rate', 0.001)
    train.train(*options(*arguments, '--out', tmp_path / 'whole'))
    with stopped_after(3, monkeypatch), pytest.raises(KeyboardInterrupt):
        train.train(*options(*arguments, '--out', tmp_path / 'parts'))
    write_pictures(tmp_path / 'mine' / 'more', {'永': 3})
    Image.fromarray(draw_character(70)).save(folder / '中' / '0a.png')
    assert train.main(['--resume', str(tmp_path / 'parts')]) == 0
    assert_same_curve(tmp_path / 'parts', tmp_path / 'whole')
    assert melnyk_net.load_model(tmp_path / 'parts' / 'last.h5')[1].labels == ('国', '中')


def test_pictures_beside_other_sources_or_on_demand_keep_all_characters(gnt, material, tmp_path, capsys):
    folder = write_pictures(tmp_path / 'mine', {'中': 6, '龘': 2})
    for arguments in (('--classes', 'all'), ('--gnt', gnt), ('--drawn', material), ('--gnt', gnt, '--drawn', material)):
        settings, recipe = options('--images', folder, *arguments, '--seed', 1)
        data = train.prepare_data(settings)
        assert data.labels == LABELS
        assert 'not one of the 3755 characters' in capsys.readouterr().err
        assert bool(data.epoch_samples) == bool(recipe.epochs) or '--drawn' in arguments
        labels = data.source.batch(range(16)).labels
        own = (labels == LABELS.index('中')).sum()
        assert own == (16 if '--classes' in arguments else 8)
        assert LABELS.index('中') in data.validation.labels
    shares = ('--gnt', gnt, '--val-writers', 1, '--images-share', 0.2)
    data = train.prepare_data(options('--images', folder, *shares)[0])
    assert data.epoch_samples == 100  # a pass over 80 scans


def test_other_pictures_can_be_measured_with(tmp_path, capsys):
    mine = write_pictures(tmp_path / 'mine', {'中': 4, '国': 4})
    test = write_pictures(tmp_path / 'test', {'中': 2, '国': 2, '永': 2})
    data = train.prepare_data(options('--images', mine, '--validate', test)[0])
    assert len(data.source) == 8
    assert data.validation.labels.tolist() == [1, 1, 0, 0]
    assert data.labels == ('国', '中')
    few = train.prepare_data(options('--images', mine, '--validate', test, '--limit', 2)[0])
    assert sorted(few.source.labels) == [0, 1]
    shutil.copy(test / '中' / '0.png', test / '中' / 'C001-f-f_0.png')
    capsys.readouterr()
    assert train.main(['--images', str(mine), '--validate', str(test), '--out', str(tmp_path / 'run')]) == 1
    assert 'competition' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('counts', 'message'),
    [
        ({'中': 5}, '5 picture(s) of 1 character(s) among 5 found'),
        ({'scans': 2}, '0 picture(s) of 0 character(s) among 2 found'),
        ({'中': 1, '国': 1}, 'no character has two pictures'),
    ],
)
def test_too_few_pictures_are_refused_in_one_line(counts, message, tmp_path, capsys):
    folder = write_pictures(tmp_path / 'mine', counts)
    assert train.main(['--images', str(folder), '--out', str(tmp_path / 'run'), '--workers', '1']) == 1
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / 'run').exists()


def test_the_recipe_for_pictures_depends_on_where_it_starts():
    assert train.parse(['--images', 'x', '--init', 'y.h5'])[1] == train.OWN
    assert train.parse(['--images', 'x'])[1] == train.OWN_FROM_NOTHING
    assert train.parse(['--images', 'x', '--drawn', 'y'])[1] == train.DRAWN
    assert train.parse(['--images', 'x', '--gnt', 'y'])[1] == train.PAPER


def test_what_both_networks_know_is_carried_over():
    rng = np.random.default_rng(0)
    source = melnyk_net.melnyk_net((48, 48, 1), num_classes=5)
    target = melnyk_net.melnyk_net((48, 48, 1), num_classes=3)
    source.set_weights([rng.normal(size=w.shape) for w in source.get_weights()])
    fresh = target.get_layer('dense_1').get_weights()
    carry_weights(source, target, learner.shared_classes('一二三人口', '口龘二'))
    old, new = (model.get_layer('dense_1').get_weights() for model in (source, target))
    for theirs, ours, before in zip(old, new, fresh, strict=True):
        np.testing.assert_array_equal(ours[..., [0, 2]], theirs[..., [4, 1]].astype(np.float32))
        np.testing.assert_array_equal(ours[..., 1], before[..., 1])
    for layer in ('conv2d_3', 'batch_normalization_2', 'global_weighted_average_pooling2d_1'):
        for theirs, ours in zip(*(model.get_layer(layer).get_weights() for model in (source, target)), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    assert learner.shared_classes(LABELS, tuple(LABELS)) is None


# --- What is refused -------------------------------------------------------------------------------------------------


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


def test_drawings_come_from_strokes_and_fonts_as_asked(material, monkeypatch):
    asked = []

    def sample_batch(material, seed, indices, options):
        asked.append(options)
        return np.zeros((len(indices), 96, 96), np.uint8), np.zeros(len(indices), np.int32), np.ones(len(indices), bool)

    monkeypatch.setattr(handwriting, 'sample_batch', sample_batch)
    for share in ((), ('--stroke-share', 0.25), ('--stroke-share', 1), ('--stroke-share', 0)):
        asked.clear()
        settings, _ = options('--drawn', material, *share)
        train.prepare_data(settings).source.batch([0])
        assert len(asked) == 2  # samples to measure with, and the one
        assert all(
            one.stroke_share == (share[1] if share else handwriting.DEFAULT_OPTIONS.stroke_share) for one in asked
        )


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


@pytest.mark.parametrize(
    ('bad', 'advice'), [(1, 'again with a lower'), (9, 'again with --init {out}/best.h5, a lower')]
)
def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_one(
    bad, advice, gnt, tmp_path, monkeypatch, capsys
):
    out = tmp_path / 'run'
    arguments = ('--gnt', gnt, '--val-writers', 1, '--epochs', 4, '--save-minutes', 0, '--out', out, *SMALL)
    original, step = learner.TrainingModel.train_on_batch, [0]

    def diverging(self, *args, **kwargs):
        step[0] += 1
        result = original(self, *args, **kwargs)
        return result | {'loss': math.nan} if step[0] == bad else result

    monkeypatch.setattr(learner.TrainingModel, 'train_on_batch', diverging)
    assert train.main([str(a) for a in arguments]) == 1
    error = capsys.readouterr().err
    assert f'the loss is nan at step {bad}; start {advice.format(out=out)} --learning-rate and another --out' in error
    _, counters = train.RunFolder(out).load_state()
    assert counters['step'] == bad - 1
    assert (out / 'best.h5').exists() == (bad > 1)
    if bad > 1:
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
        (('--gnt', 'x', '--batch-size', '0'), 'from 1 to'),
        (('--drawn', 'x', '--learning-rate', '-1'), 'a number above 0'),
        (('--drawn', 'x', '--learning-rate', '0'), 'a number above 0'),
        (('--drawn', 'x', '--learning-rate', 'nan'), 'a number above 0'),
        (('--drawn', 'x', '--teacher', 'y', '--temperature', '0'), 'a number above 0'),
        (('--drawn', 'x', '--teacher', 'y', '--label-weight', '-0.1'), 'a number of at least 0'),
        (('--drawn', 'x', '--warmup', '-5'), 'a whole number of at least 0'),
        (('--drawn', 'x', '--weight-decay', 'inf'), 'a number of at least 0'),
        (('--drawn', 'x', '--dropout', '1.5'), 'from 0 to below 1'),
        (('--drawn', 'x', '--dropout', '1'), 'from 0 to below 1'),
        (('--drawn', 'x', '--l2', '-1'), 'a number of at least 0'),
        (('--drawn', 'x', '--seed', '-1'), 'a whole number of at least 0'),
        (('--drawn', 'x', '--save-minutes', '-1'), 'a number of at least 0'),
        (('--drawn', 'x', '--init', 'y', '--freeze', '-1'), 'a whole number of at least 0'),
        (('--gnt', 'x', '--samples', '1000'), '--samples counts drawn samples'),
        (('--gnt', 'x', '--drawn', 'y', '--epochs', '2', '--samples', '9'), '--samples counts drawn samples'),
        (('--drawn', 'x', '--epochs', '3'), '--epochs counts passes'),
        (('--images', 'x', '--drawn', 'y', '--epochs', '3'), '--epochs counts passes'),
        (('--gnt', 'x', '--weight-decay', '0.1'), "--weight-decay is not in the paper's recipe"),
        (('--gnt', 'x', '--warmup', '5'), "--warmup is not in the paper's recipe"),
        (('--gnt', 'x', '--validate-every', '5'), '--validate-every counts drawn samples'),
        (('--gnt', 'x', '--strokes', 's.json'), '--strokes is for --drawn'),
        (('--gnt', 'x', '--stroke-share', '0.6'), '--stroke-share is for --drawn'),
        (('--gnt', 'x', '--temperature', '2'), '--temperature is for --teacher'),
        (('--drawn', 'x', '--label-weight', '0.1'), '--label-weight is for --teacher'),
        (('--images', 'x', '--gnt-share', '.1'), '--gnt-share is for --gnt beside --drawn'),
        (('--gnt', 'x', '--gnt-share', '0.5'), '--gnt-share is for --gnt beside --drawn'),
        (('--images', 'x', '--images-share', '.1'), '--images-share is for --images beside'),
        (('--drawn', 'x', '--no-augment'), '--augment is for --gnt and --images'),
        (('--drawn', 'x', '--limit', '5'), '--limit is for --gnt and --images'),
        (('--drawn', 'x', '--val-writers', '5'), '--val-writers is for --gnt'),
        (('--drawn', 'x', '--validate', 'y', '--val-samples', '5'), '--val-samples is for samples that are set aside'),
        (('--gnt', 'x', '--processes', '2', '--process', '1'), 'give --coordinator'),
        (('--resume', 'x', '--processes', '2'), 'give --coordinator'),
        (('--resume', 'x', '--learning-rate', '1e-5', '--workers', '2'), 'leave --learning-rate out'),
        (('--resume', 'x', '--seed', '0', '--out', 'y'), 'leave --out, --seed out'),
        (('--resume', 'x', '--smoke'), 'leave --smoke out'),
        (('--gnt', 'x', '--gnt-share', '1.5'), 'between 0 and 1'),
        (('--gnt', 'x', '--gnt-share', '1'), 'between 0 and 1'),
        (('--drawn', 'x', '--stroke-share', 'all'), 'from 0 to 1'),
        (('--gnt', 'x', '--process', '1'), '--process is 0'),
        (('--gnt', 'x', '--freeze', '2'), '--init'),
        (('--gnt', 'x', '--size', '50'), 'invalid choice'),
        (('--gnt', 'x', '--classes', 'own'), '--images alone'),
        (('--images', 'x', '--drawn', 'y', '--classes', 'own'), '--images alone'),
        (('--gnt', 'x', '--keep', '100'), '--keep is for drawn samples'),
        (('--drawn', 'x', '--keep', '100'), '--keep is for drawn samples'),
        (('--drawn', 'x', '--teacher', 'y', '--gnt', 'z', '--keep', '100'), '--keep is for drawn samples'),
        (('--drawn', 'x', '--teacher', 'y', '--images', 'z', '--keep', '100'), '--keep is for drawn samples'),
        (('--drawn', 'x', '--teacher', 'y', '--coordinator', 'z:1', '--keep', '100'), 'on one machine'),
    ],
)
def test_wrong_usage(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        train.main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_what_is_given_goes_before_what_a_smoke_run_sets():
    settings, recipe = train.parse(['--gnt', 'x', '--smoke', '--size', '96', '--val-samples', '15000'])
    assert (settings.size, settings.val_samples, settings.limit, recipe.epochs) == (96, 15000, 160, 2)


def test_the_command_line_answers_without_keras(monkeypatch):
    script = 'import sys, train\ntry: train.main(["--help"])\nfinally: print(sorted(sys.modules))'
    done = subprocess.run([sys.executable, '-c', script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 'run folder (default: runs/train)' in done.stdout
    modules = done.stdout.splitlines()[-1]
    assert not [name for name in ('keras', 'tensorflow', 'matplotlib', 'cv2', 'scipy') if f"'{name}'" in modules]
    assert done.stderr == ''
    assert tuple(train.PRECISIONS) == tuple(melnyk_net.ARCHITECTURES)
    # The programs that a small installation has are enough.
    for package in ('keras', 'tensorflow', 'h5py', 'matplotlib', 'cv2'):
        monkeypatch.setitem(sys.modules, package, None)
    assert train.parse(['--gnt', 'x'])[1] == train.PAPER


@pytest.mark.parametrize('package', ['keras', 'matplotlib', 'cv2'])
def test_a_missing_package_is_named_before_any_work(package, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    assert train.main(['--drawn', 'nowhere', '--out', str(tmp_path / 'run')]) == 1
    error = capsys.readouterr().err.strip()
    assert error == f'train.py: {package} is not installed: pip install -r requirements-train.txt'
    assert not (tmp_path / 'run').exists()


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


def tiny_classifier(seed, regularizer=None):
    """A network of three classes for images of 4×4."""
    keras.utils.set_random_seed(seed)
    layers = [keras.Input((4, 4, 1)), keras.layers.Rescaling(1 / 255), keras.layers.Flatten()]
    return keras.Sequential([*layers, keras.layers.Dense(3, kernel_regularizer=regularizer, bias_initializer='normal')])


def log_softmax(logits):
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


@pytest.mark.parametrize('taught', ['by nobody', 'by a teacher', 'by answers that were kept'])
def test_the_loss_is_made_of_label_teacher_and_l2(taught):
    rng = np.random.default_rng(0)
    student, teacher = tiny_classifier(1, keras.regularizers.L2(0.3)), tiny_classifier(2)
    asked = teacher if taught == 'by a teacher' else None
    model = learner.TrainingModel(student, asked, label_weight=0.2, temperature=3.0)
    images = rng.integers(0, 256, (5, 4, 4)).astype(np.uint8)
    labels, trusted = rng.integers(0, 3, 5).astype(np.int32), np.array([1, 1, 0, 1, 1], np.float32)
    logits, opinion = (np.asarray(net(images[..., None].astype(np.float32))) for net in (student, teacher))
    inputs = (images, opinion.astype(np.float16)) if taught == 'by answers that were kept' else images

    cross_entropy = np.mean(-trusted * log_softmax(logits)[np.arange(5), labels])
    l2 = 0.3 * np.sum(np.square(student.layers[-1].get_weights()[0]))
    target, answer = log_softmax(opinion / 3), log_softmax(logits / 3)
    divergence = np.mean(np.sum(np.exp(target) * (target - answer), axis=1))
    expected = l2 + (cross_entropy if taught == 'by nobody' else 3**2 * divergence + 0.2 * cross_entropy)
    answers = model(inputs, training=True)
    assert float(model.compute_loss(inputs, labels, answers, trusted)) == pytest.approx(expected, rel=1e-3)
    # What it is measured by is the label alone.
    measured = model.compute_loss(inputs, labels, answers, trusted, training=False)
    assert float(measured) == pytest.approx(cross_entropy, rel=1e-4)


def test_the_recipe_reaches_optimizer_and_layers():
    settings, recipe = train.parse(['--drawn', 'x', '--size', '48', '--weight-decay', '0.07', '--dropout', '0.3'])
    model, teacher = train.build(settings, replace(recipe, bn_momentum=0.8, l2=0.01))
    assert teacher is None
    decayed = {variable.name for variable in model.trainable_variables if model.optimizer._use_weight_decay(variable)}
    spared = {variable.name for variable in model.trainable_variables} - decayed
    assert (decayed, spared) == ({'kernel'}, {'gamma', 'beta', 'bias', 'W'})
    assert model.optimizer.weight_decay == 0.07
    layers = {layer.name: layer for layer in model.student.layers}
    assert layers['dropout_1'].rate == 0.3
    assert {layer.momentum for name, layer in layers.items() if 'normalization' in name} == {0.8}
    for name, layer in layers.items():
        if name.startswith(('conv', 'dense')):
            assert layer.kernel_regularizer.l2 == pytest.approx(0.01)


def test_weights_are_averaged_and_come_back():
    model = tiny_classifier(1)
    average = learner.WeightAverage(model, 0.9)
    expected = model.get_weights()
    rng = np.random.default_rng(0)
    # At first it forgets fast what it began with; later it looks up every ten steps.
    for step, keep in ((1, 1 / 11), (2, 2 / 12), (99, 99 / 109), (105, 1), (110, 0.9**10), (200, 0.9**10)):
        keep = min(keep, 0.9) if step < 100 else keep
        model.set_weights([rng.normal(size=weight.shape) for weight in expected])
        average.update(step)
        expected = [keep * old + (1 - keep) * new for old, new in zip(expected, model.get_weights(), strict=True)]
    last = model.get_weights()
    with average.in_place():
        for mine, wanted, weight in zip(model.get_weights(), expected, last, strict=True):
            np.testing.assert_allclose(mine, wanted, rtol=1e-5, atol=1e-6)
            assert np.abs(mine - weight).max() > 0.01
    for mine, weight in zip(model.get_weights(), last, strict=True):
        np.testing.assert_array_equal(mine, weight)


def test_without_momentum_nothing_is_averaged():
    model = tiny_classifier(1)
    average = learner.WeightAverage(model, 0.0)
    before = model.get_weights()
    average.update(1)
    with average.in_place():
        np.testing.assert_array_equal(model.get_weights()[0], before[0])
    assert average.values == []


def test_scans_and_pictures_are_augmented_as_asked(gnt, tmp_path):
    folder = write_pictures(tmp_path / 'mine', {'中': 3, '国': 3})
    for source, default in (('--gnt', False), ('--images', True)):
        for flags, expected in (((), default), (('--augment',), True), (('--no-augment',), False)):
            settings, _ = options(source, gnt if source == '--gnt' else folder, *flags)
            data = train.prepare_data(settings)
            plain = replace(data.source, augment=False).batch(range(8)).images
            assert data.source.augment is expected
            assert (data.source.batch(range(8)).images != plain).any() == expected


@pytest.mark.parametrize(
    ('processor', 'asked', 'student', 'teacher'),
    [
        (True, (), 'bfloat16', 'bfloat16'),
        (False, (), 'float32', 'float32'),
        (False, ('--precision', 'bfloat16'), 'bfloat16', 'bfloat16'),
        (True, ('--precision', 'float32'), 'float32', 'float32'),
        (True, ('--architecture', 'mobilenet_v3_small'), 'float32', 'bfloat16'),
    ],
)
@pytest.mark.skipif(keras.backend.backend() != 'tensorflow', reason='the choice is for TensorFlow')
def test_the_precision_fits_the_processor(processor, asked, student, teacher, monkeypatch):
    monkeypatch.setattr(learner, 'multiplies_bfloat16', lambda: processor)
    monkeypatch.setattr(learner, '_on_tensorflow_processor', lambda: True)
    wanted = []
    monkeypatch.setattr(learner, 'load_teacher', lambda path, labels, precision: wanted.append(precision))
    settings, recipe = train.parse(['--drawn', 'x', '--teacher', 'y', '--size', '48', *asked])
    model, _ = train.build(settings, recipe)
    assert next(layer for layer in model.student.layers if layer.name.startswith('conv')).compute_dtype == student
    assert wanted == [teacher]


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


def test_weights_of_another_number_of_classes_do_not_fit_without_labels():
    models = [melnyk_net.melnyk_net((48, 48, 1), num_classes=n) for n in (5, 6)]
    with pytest.raises(LearnerError, match='dense_1'):
        carry_weights(*models)


@pytest.mark.skipif(keras.backend.backend() != 'tensorflow', reason='the fused operation is of TensorFlow')
def test_fused_batch_normalization_is_batch_normalization():
    rng = np.random.default_rng(0)
    images = rng.normal(3, 2, (8, 5, 5, 4)).astype(np.float32)
    layers = [keras.layers.BatchNormalization(momentum=0.9), learner._fused_batch_normalization()(momentum=0.9)]
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
    with pytest.raises(LearnerError, match='gives 3755 logits; this one reads'):
        learner.load_teacher(tmp_path / 't.keras', LABELS, 'float32')
    (tmp_path / 'broken.keras').write_bytes(b'no model')
    with pytest.raises(LearnerError, match='not a teacher'):
        learner.load_teacher(tmp_path / 'broken.keras', LABELS, 'float32')


@pytest.mark.parametrize('end', ['logits', 'activation', 'activation layer', 'softmax layer', 'operation', 'nested'])
def test_a_teacher_teaches_by_its_logits_or_is_refused(end, tmp_path):
    keras.utils.set_random_seed(1)
    inputs = keras.Input((48, 48, 1))
    x = keras.layers.Flatten()(keras.layers.AveragePooling2D(24)(inputs))
    dense = keras.layers.Dense(5, activation='softmax' if end == 'activation' else None)
    outputs = keras.Model(inputs, dense(x))(inputs) if end == 'nested' else dense(x)
    if end in ('activation layer', 'softmax layer', 'operation', 'nested'):
        outputs = {
            'activation layer': keras.layers.Activation('softmax'),
            'operation': keras.ops.softmax,
        }.get(end, keras.layers.Softmax())(outputs)
    if end == 'nested':
        model = keras.Sequential([keras.Input((48, 48, 1)), keras.Model(inputs, outputs)])
    else:
        model = keras.Model(inputs, outputs)
    model.save(tmp_path / 't.keras')
    if end in ('operation', 'nested'):
        with pytest.raises(LearnerError, match='this one gives probabilities; save it without the softmax'):
            learner.load_teacher(tmp_path / 't.keras', '一二三人口', 'float32')
        return
    image = np.random.default_rng(0).integers(0, 256, (3, 48, 48, 1)).astype(np.float32)
    kernel, bias = dense.get_weights()
    expected = image.reshape(3, 2, 24, 2, 24).mean((2, 4)).reshape(3, 4) @ kernel + bias
    teacher = learner.load_teacher(tmp_path / 't.keras', '一二三人口', 'float32')
    np.testing.assert_allclose(np.asarray(teacher(image)), expected, rtol=1e-3)


def test_our_own_model_teaches_by_its_logits(tmp_path):
    model = melnyk_net.melnyk_net((48, 48, 1), num_classes=5)
    melnyk_net.save_model(model, tmp_path / 'own.h5', labels='一二三人口')
    with pytest.raises(
        LearnerError, match=r'^\S+own\.h5: a teacher knows the same characters; this one knows 5: 一二三人口'
    ):
        learner.load_teacher(tmp_path / 'own.h5', '一二三人中', 'float32')
    teacher = learner.load_teacher(tmp_path / 'own.h5', '一二三人口', 'float32')
    image = np.random.default_rng(0).integers(0, 256, (1, 48, 48, 1)).astype(np.float32)
    logits = np.asarray(teacher(image))
    np.testing.assert_allclose(np.asarray(keras.ops.softmax(logits)), np.asarray(model(image)), rtol=1e-4)


def test_validation_counts_every_sample_once_whatever_the_batch(gnt):
    settings, recipe = options('--gnt', gnt)
    model, _ = train.build(settings, recipe)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (21, 96, 96), np.uint8)
    logits = np.asarray(model(images))
    labels = rng.integers(0, 6, 21)
    labels[:7] = logits[:7].argmax(1)  # some are right
    samples = Batch(images, labels, np.ones(21, bool))
    right = logits.argmax(1) == labels
    recall = np.mean([right[labels == c].mean() for c in np.unique(labels)])
    place = (logits > logits[np.arange(21), samples.labels][:, None]).sum(1)
    log_probabilities = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    for batch_size in (16, 21, 32):
        measured = learner.validate(model, samples, batch_size, (0, batch_size))
        assert measured['val_top5'] == pytest.approx((place < 5).mean(), abs=1e-6)
        assert measured['val_loss'] == pytest.approx(-log_probabilities[np.arange(21), samples.labels].mean(), rel=1e-4)
        assert measured['val_macro_recall'] == pytest.approx(recall, abs=1e-6)
