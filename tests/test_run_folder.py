import csv
import json

import numpy as np
import pytest
from PIL import Image

from run_folder import FIELDS, Picture, RunFolder, RunFolderError


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path / 'run')
    folder.start({'seed': 1, 'data': '汉字'}, [np.zeros(2)], {'step': 0})
    return folder


def row(step):
    return {'step': step, 'samples': 8 * step, 'loss': f'{1 / step:.4f}', 'accuracy': '0.5', 'seconds': step}


def test_a_run_is_not_overwritten(folder):
    assert folder.config() == {'seed': 1, 'data': '汉字'}
    with pytest.raises(RunFolderError, match='--resume'):
        RunFolder(folder.path).start({}, [], {})
    with pytest.raises(RunFolderError, match='no run to go on with'):
        RunFolder(folder.path / 'other').config()


def test_a_run_that_is_there_can_go_on(folder, tmp_path, monkeypatch):
    assert folder.can_go_on
    arrays, counters = folder.load_state()
    assert (len(arrays), counters) == (1, {'step': 0})
    # Whatever it is stopped at, there is no run, or one that can go on.
    other = RunFolder(tmp_path / 'other')
    monkeypatch.setattr(RunFolder, 'save_state', lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        other.start({}, [], {})
    assert not other.can_go_on
    other.refuse_existing()
    # A run of an older version may have been stopped before its first state.
    (folder.path / 'state.npz').unlink()
    with pytest.raises(RunFolderError, match='holds a run without a saved state; delete it'):
        folder.refuse_existing()


def test_the_log_goes_on_where_the_state_was_saved(folder):
    for step in (10, 20, 30):
        folder.log(row(step))
    with (folder.path / 'log.csv').open('a') as file:
        file.write('40,320')  # the run was killed while it wrote
    later = RunFolder(folder.path)
    later.rewind_log(20)
    later.log(row(30))
    lines = (folder.path / 'log.csv').read_text().splitlines()
    assert lines[0] == ','.join(FIELDS)
    assert [line.split(',')[0] for line in lines[1:]] == ['10', '20', '30']
    assert len(later.rows) == 3


def test_a_log_of_an_older_version_goes_on(folder):
    older = [name for name in FIELDS if 'macro' not in name]
    with (folder.path / 'log.csv').open('w') as file:
        file.write(','.join(older) + '\n')
        for step in (10, 20):
            file.write(','.join(str(row(step).get(name, '')) for name in older) + '\n')
    folder.rewind_log(20)
    folder.log(row(30) | {'val_macro_recall': 0.5})
    with (folder.path / 'log.csv').open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(FIELDS)
    assert [r['step'] for r in rows] == ['10', '20', '30']
    assert [r['val_macro_recall'] for r in rows] == ['', '', '0.5']
    assert all(None not in r.values() for r in rows)
    folder.draw_curves()


def test_what_pictures_are_for_comes_back(folder):
    pictures = [
        Picture('鲍/1.png', '鲍', 'training'),
        Picture('odd, "name"\n\udcff.png', 'A', 'validation'),
        Picture('x.png', '', 'damaged image: why, ever'),
    ]
    folder.keep_pictures(pictures)
    assert folder.pictures() == pictures


@pytest.mark.parametrize('content', [None, 'file,character\na.png,b\n', 'a,b,c,d\n1,2,3,4\n'])
def test_a_missing_or_damaged_list_of_pictures_is_said_so(folder, content):
    if content:
        (folder.path / 'images.csv').write_text(content)
    with pytest.raises(RunFolderError, match='no list of its pictures'):
        folder.pictures()


def test_a_log_that_never_began_can_be_rewound(folder):
    folder.rewind_log(0)
    folder.log(row(1))
    assert (folder.path / 'log.csv').read_text().startswith('step,')


def test_the_state_comes_back(folder):
    arrays = [np.arange(6, dtype=np.float32).reshape(2, 3), np.int64(7), np.array([1, 2], np.uint32)]
    folder.save_state(arrays, {'step': 5, 'best': 0.25})
    loaded, counters = RunFolder(folder.path).load_state()
    assert counters == {'step': 5, 'best': 0.25}
    for got, wanted in zip(loaded, arrays, strict=True):
        np.testing.assert_array_equal(got, wanted)
        assert got.dtype == wanted.dtype


def test_a_state_that_is_not_finite_does_not_replace_a_good_one(folder):
    folder.save_state([np.ones(3)], {'step': 1})
    with pytest.raises(RunFolderError, match='last good state is kept'):
        folder.save_state([np.array([1.0, np.nan])], {'step': 2})
    assert folder.load_state()[1] == {'step': 1}
    assert [path.name for path in folder.path.glob('.*')] == []


@pytest.mark.parametrize('content', [None, b'', b'not an archive'])
def test_a_missing_or_damaged_state_is_said_so(folder, content):
    (folder.path / 'state.npz').unlink()
    if content is not None:
        (folder.path / 'state.npz').write_bytes(content)
    with pytest.raises(RunFolderError, match='no saved state to go on from'):
        folder.load_state()


@pytest.mark.parametrize(('more', 'over'), [({}, 'samples'), ({'epoch': '0.5'}, 'epoch')])
def test_the_curves_show_training_and_validation(folder, more, over, monkeypatch):
    drawn = []
    monkeypatch.setattr('figures.save', lambda figure, path: drawn.append(figure))
    for step in (1, 2):
        folder.log(row(step) | more | {'macro_recall': 0.25})
    folder.log(row(3) | more | {'val_loss': 0.5, 'val_top1': 0.5, 'val_top5': 0.75, 'val_macro_recall': 0.4})
    folder.draw_curves()
    panels = drawn[0].axes
    shown = {line.get_label(): line.get_ydata()[-1] for axes in panels for line in axes.lines}
    assert shown == {
        'loss': pytest.approx(1 / 3, abs=1e-4), 'val_loss': 0.5, 'accuracy': 0.5, 'val_top1': 0.5, 'val_top5': 0.75,
        'macro_recall': 0.25, 'val_macro_recall': 0.4,
    }  # fmt: skip
    assert [axes.get_ylabel() for axes in panels] == ['loss', 'accuracy', 'macro recall']
    assert panels[-1].get_xlabel() == over


def test_curves_and_samples_are_pictures(folder):
    for step in (1, 2, 3):
        folder.log(row(step))
    folder.log(row(4) | {'val_loss': 0.5, 'val_top1': 0.5, 'val_top5': 0.75})
    folder.draw_curves()
    images = np.zeros((20, 96, 96), np.uint8)
    images[17, :, 40:50] = 255
    folder.draw_samples(images, columns=8)
    assert Image.open(folder.path / 'curves.png').size[0] > 400
    sheet = np.asarray(Image.open(folder.path / 'samples.png'))
    assert sheet.shape == (2 * 96, 8 * 96)
    assert (sheet == 255).all()  # ink is dark, and the third row is not full
    assert json.loads((folder.path / 'config.json').read_text())
