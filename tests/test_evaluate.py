import csv
import gzip
import io
import json
import struct
import sys
import zipfile

import numpy as np
import pytest
from conftest import SMALL_LABELS, draw_character
from PIL import Image

import evaluate
from data_utils import LABEL_INDEX, LABELS, crop_to_ink, fit
from evaluate import (
    Answers,
    ClassRanking,
    DataError,
    Gallery,
    fit_temperature,
    labelled_pictures,
    named_character,
    read_samples,
    reliability,
)
from gnt_reader import GntError, export_gnt, write_gnt


@pytest.fixture
def answers():
    """Six answers to four classes, small enough to count by hand."""
    probabilities = np.array(
        [
            [0.7, 0.1, 0.1, 0.1],  # 0, right
            [0.4, 0.5, 0.1, 0.0],  # 0, second
            [0.1, 0.8, 0.0, 0.1],  # 1, right
            [0.1, 0.6, 0.1, 0.2],  # 3, second
            [0.4, 0.3, 0.2, 0.1],  # 3, last
            [0.0, 0.9, 0.1, 0.0],  # 1, right
        ],
        np.float32,
    )
    return Answers.of(probabilities, np.array([0, 0, 1, 3, 3, 1], np.int32), np.array(['a', 'a', 'a', 'b', 'b', 'b']))


def test_ranks_and_accuracies(answers):
    assert answers.ranks.tolist() == [0, 1, 0, 1, 3, 0]
    assert answers.best.tolist() == [0, 1, 1, 1, 0, 1]
    assert [answers.top(k) for k in (1, 2, 3, 4)] == pytest.approx([3 / 6, 5 / 6, 5 / 6, 1])


def test_a_constant_output_is_no_answer():
    answers = Answers.of(np.full((4, 4), 0.25, np.float32), np.arange(4), np.array([''] * 4))
    assert answers.top(1) == 0


@pytest.mark.parametrize(
    ('probabilities', 'best'),
    [([0.4, 0.4, 0.2], 1), ([0.2, 0.4, 0.4], 1), ([0.4, 0.2, 0.4], 2), ([0.3, 0.3, 0.4], 2), ([0.4, 0.3, 0.3], 0)],
)
def test_the_answer_of_a_tie_is_another_than_the_true_one(probabilities, best):
    answers = Answers.of(np.array([probabilities], np.float32), np.array([0], np.int32), np.array(['']))
    assert answers.best.tolist() == [best]
    assert answers.is_right.tolist() == [best == 0]
    assert answers.confidence.tolist() == np.float32([max(probabilities)]).tolist()
    assert evaluate.confused_pairs(answers, '甲乙丙') == ([] if best == 0 else [('甲', '甲乙丙'[best], 1)])


def test_rows_by_writer_and_class(answers):
    assert [(row['writer'], row['samples'], row['top1']) for row in evaluate.by_writer(answers)] == [
        ('a', 3, pytest.approx(2 / 3, abs=1e-4)),
        ('b', 3, pytest.approx(1 / 3, abs=1e-4)),
    ]
    rows = {row['character']: row for row in evaluate.by_class(answers, '甲乙丙丁', np.array([1, 0.5, np.nan, 0.25]))}
    assert set(rows) == set('甲乙丁')  # no sample of 丙
    assert rows['乙'] == {
        'character': '乙', 'samples': 2, 'right': 2, 'answered': 4, 'recall': '1.0000', 'precision': '0.5000',
        'f1': '0.6667', 'average_precision': '0.5000', 'mean_probability': '0.8500',
    }  # fmt: skip
    assert rows['丁']['precision'] == ''
    assert evaluate.confused_pairs(answers, '甲乙丙丁') == [('甲', '乙', 1), ('丁', '乙', 1), ('丁', '甲', 1)]


def test_macro_averages_by_hand(answers):
    row = evaluate.summary(answers, np.array([1, 0.5, np.nan, 0.25]))
    # Recalls 1/2, 2/2 and 0/2 of 甲, 乙 and 丁; answered 2, 4 and 0 times; 丙 has no samples.
    assert row['macro_recall'] == pytest.approx((1 / 2 + 1 + 0) / 3, abs=1e-5)
    assert row['macro_f1'] == pytest.approx((2 / 4 + 4 / 6 + 0) / 3, abs=1e-5)
    assert row['mean_average_precision'] == pytest.approx((1 + 0.5 + 0.25) / 3, abs=1e-5)
    assert 'mean_average_precision' not in evaluate.summary(answers)


def average_precision(scores, is_true) -> float:
    """The definition, sample by sample: Σ (Rₙ − Rₙ₋₁) Pₙ over the thresholds from the highest score down."""
    total, before = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        chosen = scores >= threshold
        recall = (is_true & chosen).sum() / is_true.sum()
        total += (recall - before) * (is_true & chosen).sum() / chosen.sum()
        before = recall
    return total


@pytest.mark.parametrize(('step', 'tolerance'), [(0.5, 1e-9), (0.0, 5e-3)])
def test_average_precision_is_that_of_the_definition(step, tolerance):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 6, 500)  # the seventh class has no sample
    logits = rng.normal(0, 3, (500, 7))
    logits[np.arange(500), labels] += 2
    if step:
        logits = np.round(logits / step) * step + 1e-3  # many equal scores, none at the edge of a bin
    scores = (1 / (1 + np.exp(-logits))).astype(np.float32)
    ranking = ClassRanking(7)
    for start in range(0, 500, 64):
        ranking.add(scores[start : start + 64], labels[start : start + 64])
    precisions = ranking.average_precisions()
    wanted = [average_precision(scores[:, c], labels == c) for c in range(6)]
    assert precisions[:6] == pytest.approx(wanted, abs=tolerance)
    assert np.mean(precisions[:6]) == pytest.approx(np.mean(wanted), abs=1e-3)
    assert np.isnan(precisions[6])


def test_average_precision_of_the_surest_and_of_the_emptiest_answers():
    labels = np.array([0, 1, 0, 1])
    perfect, constant = ClassRanking(2), ClassRanking(2)
    perfect.add(np.eye(2, dtype=np.float32)[labels], labels)
    constant.add(np.full((4, 2), 0.5, np.float32), labels)
    never = ClassRanking(2)
    never.add(np.eye(2, dtype=np.float32)[1 - labels], labels)
    assert perfect.average_precisions().tolist() == [1, 1]
    assert constant.average_precisions().tolist() == [0.5, 0.5]
    assert never.average_precisions().tolist() == [0.5, 0.5]  # found last, when half of all samples are of the class


def test_reliability_by_hand():
    curve = reliability(np.array([0.1, 0.5, 0.45, 0.95, 1.0]), np.array([False, True, False, True, False]), bins=2)
    assert curve.count.tolist() == [3, 2]
    assert curve.confidence == pytest.approx([1.05 / 3, 1.95 / 2])
    assert curve.accuracy == pytest.approx([1 / 3, 1 / 2])
    assert curve.expected_error == pytest.approx((abs(1.05 - 1) + abs(1.95 - 1)) / 5)
    assert reliability(np.zeros(0), np.zeros(0, bool)).expected_error == 0


@pytest.mark.parametrize('temperature', [0.5, 1.0, 3.0])
def test_the_temperature_that_made_the_labels_is_found(temperature):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (20_000, 6)).astype(np.float32)
    powers = np.exp(logits / temperature)
    labels = (rng.random((20_000, 1)) < np.cumsum(powers / powers.sum(1, keepdims=True), 1)).argmax(1)
    assert fit_temperature(logits, labels) == pytest.approx(temperature, rel=0.05)


@pytest.mark.parametrize('count', [100, 1000, 5000])
def test_samples_drawn_by_lot_are_from_everywhere(count):
    numbers = np.arange(1000)
    images = np.repeat(numbers[:, None, None] % 256, 2, 1).astype(np.uint8)
    chunks = [
        evaluate.Samples(images[at : at + 300], numbers[at : at + 300], numbers[at : at + 300].astype(str))
        for at in range(0, 1000, 300)
    ]
    chosen = evaluate.drawn_by_lot(chunks, count)
    assert len(set(chosen.labels)) == len(chosen.labels) == len(chosen.images) == min(count, 1000)
    assert (chosen.images[:, 0, 0] == chosen.labels % 256).all()
    assert (chosen.writers == chosen.labels.astype(str)).all()
    quarters = np.bincount(chosen.labels // 250, minlength=4) / len(chosen.labels)
    assert (abs(quarters - 0.25) < 0.1).all()


def test_the_gallery_keeps_the_surest_mistakes(answers):
    gallery = Gallery(size=2)
    images = np.arange(6)[:, None, None] * np.ones((1, 2, 2), np.uint8)
    gallery.add(answers.select(np.array([0, 1, 2])), images[:3])
    gallery.add(answers.select(np.array([3, 4, 5])), images[3:])
    assert [(round(c, 2), t, a, int(image[0, 0])) for c, t, a, image in gallery.items()] == [
        (0.6, 3, 1, 3),
        (0.5, 0, 1, 1),
    ]


@pytest.mark.parametrize(
    ('path', 'character'),
    [
        ('鲍/0001.png', '鲍'),
        ('B1AB/0001.png', '鲍'),
        ('images/鲍.png', '鲍'),
        ('images/鲍_2.JPG', '鲍'),
        ('images/鲍 (1).png', '鲍'),
        ('images/鲍鱼.png', None),
        ('images/scan.png', None),
        ('images/0.png', None),
        ('龘/1.png', None),
    ],
)
def test_what_a_picture_is_named_by(tmp_path, path, character):
    assert named_character(tmp_path / path) == character


@pytest.mark.parametrize(
    ('path', 'character'),
    [
        ('鲍/0001.png', '鲍'),
        ('B1AB/0001.png', '鲍'),
        ('龘/0001.png', '龘'),
        ('7/0001.png', '7'),
        ('a/0001.png', 'a'),
        ('3000/0001.png', '0'),  # the code of an export
        ('2024/0001.png', None),
        ('cafe/0001.png', None),
        ('1/鲍_2.png', '鲍'),  # folders that number the writers
        ('images/𠮷.png', '𠮷'),
        ('images/ア_1.png', 'ア'),
        ('images/7.png', None),
        ('images/A.png', None),
        ('鲍/永.png', '鲍'),
    ],
)
def test_what_a_picture_of_any_character_is_named_by(tmp_path, path, character):
    file = tmp_path / path
    assert named_character(file, None) == character
    file.parent.mkdir(parents=True)
    file.write_bytes(b'')
    assert labelled_pictures([tmp_path]) == [(file, character)]


def page(k):
    return draw_character(40 + 3 * k, width=0.04 + 0.02 * k)


def test_all_kinds_of_data_give_the_same_samples(tmp_path):
    characters = '啊鲍座'
    pages = [page(k) for k in (1, 2, 3)]
    (tmp_path / 'pictures').mkdir()
    for character, picture in zip(characters, pages, strict=True):
        Image.fromarray(picture).save(tmp_path / 'pictures' / f'{character}.png')
    (tmp_path / 'gnt').mkdir()
    write_gnt(tmp_path / 'gnt' / '1001-c.gnt', [*zip(characters, pages, strict=True), ('A', pages[0])])
    square = np.stack([255 - fit(crop_to_ink(picture)) for picture in pages])
    np.savez(tmp_path / 'scans.npz', images=square, chars=np.array(list(characters)), writers=np.array(['w'] * 3))

    scans, gnt = read_samples([tmp_path / 'scans.npz']), read_samples([tmp_path / 'gnt'])
    pictures = read_samples([tmp_path / 'pictures'])
    wanted = sorted(LABEL_INDEX[character] for character in characters)
    for samples in (scans, gnt, pictures):
        assert samples.images.shape == (3, 96, 96)
        assert samples.images.dtype == np.uint8
        assert sorted(samples.labels) == wanted
    assert set(scans.writers) == {'w'}
    assert set(gnt.writers) == {'1001'}
    for label in wanted:
        one, other, third = (s.images[s.labels == label][0].astype(int) for s in (scans, gnt, pictures))
        assert np.abs(one - other).mean() < 8
        assert np.abs(other - third).mean() < 8
    both = read_samples([tmp_path / 'scans.npz', tmp_path / 'gnt'], size=48)
    assert both.images.shape == (6, 48, 48)


@pytest.mark.parametrize('names', ['character', 'code'])
def test_an_export_is_read_as_its_gnt_file(tmp_path, names):
    rng = np.random.default_rng(0)
    records = []
    for k, character in enumerate('啊鲍座啊' * 4):
        scan = draw_character(40 + 4 * k, width=0.04 + 0.01 * (k % 5), ink=int(rng.integers(0, 120)))
        records.append((character, scan[: 30 + 3 * k]))
    write_gnt(tmp_path / '1001-c.gnt', [*records, ('A', records[0][1])])
    export_gnt(tmp_path / '1001-c.gnt', tmp_path / 'png', names=names)
    there, back = read_samples([tmp_path / '1001-c.gnt']), read_samples([tmp_path / 'png'])
    assert len(there.labels) == len(back.labels) == 16
    assert sorted(there.labels) == sorted(back.labels)
    left = list(zip(back.labels, back.images.astype(int), strict=True))
    for label, image in zip(there.labels, there.images, strict=True):
        # Each finds its own again. What a picture goes through darkens ink by a fiftieth.
        distances = [np.abs(image - other).max() for _, other in left]
        assert min(distances) <= 5
        assert left.pop(int(np.argmin(distances)))[0] == label


def test_samples_of_a_models_own_characters(tmp_path):
    write_gnt(tmp_path / '1001-c.gnt', [('A', page(1)), ('啊', page(2)), ('座', page(3))])
    samples = read_samples([tmp_path / '1001-c.gnt'], labels='座A')
    assert samples.labels.tolist() == [1, 0]
    with pytest.raises(DataError, match='no sample of the 2 characters'):
        read_samples([tmp_path / '1001-c.gnt'], labels='永字')


def test_what_is_left_out_is_said(tmp_path):
    blank = np.full((1, 30, 30), 255, np.uint8)
    images = np.concatenate([blank, blank - 255, blank - 200])
    np.savez(tmp_path / 'data.npz', images=images, chars=np.array(['啊', 'A', '座']))
    said = []
    chunks = list(evaluate.iterate_samples([tmp_path / 'data.npz'], report=said.append))
    assert sum(len(chunk.labels) for chunk in chunks) == 1
    assert said == [f'{tmp_path / "data.npz"}: left out 1 blank, 1 of other characters']


def test_pictures_that_are_left_out_are_said(tmp_path):
    for path in ('啊/1.png', '龘/1.png', 'scans/1.png'):
        (tmp_path / path).parent.mkdir()
        Image.fromarray(page(1)).save(tmp_path / path)
    (tmp_path / '啊' / '2.png').write_bytes(b'no picture')
    said = []
    assert [len(chunk.labels) for chunk in evaluate.iterate_samples([tmp_path], report=said.append)] == [1]
    for part in ('1 unreadable', '1 of other characters', '1 without a character in their name'):
        assert part in said[0]


@pytest.mark.parametrize(
    'arrays',
    [
        {'pictures': np.zeros(3)},
        {'images': np.full((1, 8, 8), 255, np.uint8), 'chars': np.array('啊')},
        {'images': np.full((1, 8, 8), 255, np.uint8), 'chars': np.array(['啊']), 'writers': np.array('w')},
        {'images': np.zeros((1, 0, 8), np.uint8), 'chars': np.array(['啊'])},
        {'images': np.zeros((2, 8, 8)), 'chars': np.array(['啊', '座'])},
        {'images': np.zeros((2, 8, 8), np.uint8), 'chars': np.array(['啊'])},
        {'images': np.zeros((1, 8, 8), np.uint8), 'chars': np.array(['A'])},
    ],
)
def test_data_that_cannot_be_used_is_refused(tmp_path, arrays):
    np.savez(tmp_path / 'data.npz', **arrays)
    with pytest.raises(DataError, match=r'data\.npz'):
        read_samples([tmp_path / 'data.npz'])


def npz_bytes(folder, **arrays) -> bytes:
    np.savez_compressed(folder / 'whole.npz', **arrays)
    return (folder / 'whole.npz').read_bytes()


def cut(whole):
    return whole[: len(whole) // 2]


def garbled(whole):
    """The values of the first array damaged: the archive's directory is whole, zlib fails."""
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        size = archive.infolist()[0].compress_size
    start = whole.index(b'.npy') + 30
    return whole[:start] + bytes(255 - b for b in whole[start : start + size // 2]) + whole[start + size // 2 :]


def plain_array(whole):
    stream = io.BytesIO()
    np.save(stream, np.zeros(3))
    return stream.getvalue()


def claims_terabytes(whole):
    header = np.lib.format.magic(1, 0) + struct.pack('<H', 118)
    text = "{'descr': '|u1', 'fortran_order': False, 'shape': (9999999999999,), }"
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, 'w') as archive:
        for name in ('images', 'chars', 'x_train'):
            archive.writestr(f'{name}.npy', header + text.ljust(117).encode() + b'\n')
    return stream.getvalue()


DAMAGE = {
    'empty': lambda whole: b'',
    'cut': cut,
    'garbled': garbled,
    'npy': plain_array,
    'text': lambda whole: b'no archive\n' * 9,
    'terabytes': claims_terabytes,
}


@pytest.mark.parametrize('damage', DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_npz_is_named(tmp_path, damage):
    scans = np.stack([page(k) for k in (1, 1, 1)])
    path = tmp_path / 'data.npz'
    path.write_bytes(damage(npz_bytes(tmp_path, images=scans, chars=np.array(list('啊鲍座')))))
    with pytest.raises(DataError, match=r'data\.npz: arrays `images` and `chars` are expected \(.+\)'):
        read_samples([path])
    path.write_bytes(damage(npz_bytes(tmp_path, **dict(zip(MNIST, mnist(), strict=True)))))
    with pytest.raises(DataError, match=r'data\.npz: neither mnist\.npz nor a folder .* \(.+\)'):
        evaluate.read_mnist(path)


@pytest.mark.parametrize('function', [evaluate.read_mnist, lambda path: read_samples([path])])
def test_an_npz_that_is_not_there_is_said(tmp_path, function):
    with pytest.raises(DataError, match=r'none\.npz: No such file'):
        function(tmp_path / 'none.npz')


@pytest.mark.parametrize(('of_three', 'refused'), [(1, False), (2, True), (3, True)])
def test_ink_that_is_bright_on_black_is_refused(tmp_path, of_three, refused):
    scans = np.stack([page(2)] * 3)
    scans[:of_three] = 255 - scans[:of_three]
    np.savez(tmp_path / 'data.npz', images=scans, chars=np.array(['啊'] * 3))
    if refused:
        with pytest.raises(DataError, match=r'data\.npz: the ink is bright on black.*give 255 - images'):
            read_samples([tmp_path / 'data.npz'])
    else:
        assert len(read_samples([tmp_path / 'data.npz']).labels) == 3


def test_an_archive_among_pictures_is_no_gnt(tmp_path):
    (tmp_path / 'pictures').mkdir()
    Image.fromarray(page(1)).save(tmp_path / 'pictures' / '啊.png')
    strays = {'stray.zip': {'readme.txt': b'', '._1.gnt': b''}, 'empty.zip': {}}
    for name, files in strays.items():
        with zipfile.ZipFile(tmp_path / 'pictures' / name, 'w') as archive:
            for member, content in files.items():
                archive.writestr(member, content)
    (tmp_path / 'pictures' / 'broken.zip').write_bytes(b'PK\3\4')
    assert not evaluate.holds_gnt(tmp_path / 'pictures')
    assert len(read_samples([tmp_path / 'pictures']).labels) == 1
    # Alone, or named, they are read as what they should be, and the reader says what is wrong.
    (tmp_path / 'pictures' / '啊.png').unlink()
    for source in (tmp_path / 'pictures', *(tmp_path / 'pictures').iterdir()):
        assert evaluate.holds_gnt(source)
        with pytest.raises(GntError):
            read_samples([source])
    write_gnt(tmp_path / '1001-c.gnt', [('啊', page(1))])
    with zipfile.ZipFile(tmp_path / 'pictures' / 'gnt.zip', 'w') as archive:
        archive.write(tmp_path / '1001-c.gnt', 'set/1001-c.gnt')
    Image.fromarray(page(1)).save(tmp_path / 'pictures' / '啊.png')
    assert evaluate.holds_gnt(tmp_path / 'pictures')


# --- The command line ------------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path):
    for k, character in enumerate(SMALL_LABELS * 2):
        folder = tmp_path / 'data' / character
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(page(k)).save(folder / f'{k}.png')
    return tmp_path / 'data'


def test_a_report(small_file, pictures, tmp_path, capsys):
    out, calibrated = tmp_path / 'report', tmp_path / 'calibrated.h5'
    arguments = [str(pictures), '--model', str(small_file), '--out', str(out), '--fit-temperature', str(calibrated)]
    assert evaluate.main(arguments) == 0
    text = capsys.readouterr().out
    assert 'samples 10' in text
    assert 'temperature ' in text
    summary = json.loads((out / 'summary.json').read_text())
    assert summary['samples'] == 10
    assert summary['top5'] == 1.0  # of five classes
    assert summary['macro_recall'] == summary['top1']  # as many samples of each
    assert 0 < summary['mean_average_precision'] <= 1
    assert f'mean_average_precision {summary["mean_average_precision"]}' in text
    with (out / 'classes.csv').open() as file:
        rows = list(csv.DictReader(file))
    assert [row['character'] for row in rows] == list(SMALL_LABELS)
    assert sum(int(row['right']) for row in rows) == round(10 * summary['top1'])
    assert np.mean([float(row['f1']) for row in rows]) == pytest.approx(summary['macro_f1'], abs=1e-4)
    precisions = [float(row['average_precision']) for row in rows]
    assert np.mean(precisions) == pytest.approx(summary['mean_average_precision'], abs=1e-4)
    for picture in ('reliability.png', 'mistakes.png'):
        assert Image.open(out / picture).size[0] > 100

    from melnyk_net import load_model

    info = load_model(calibrated)[1]
    assert f'temperature {info.temperature:.3f} (the file has 2.000)' in text
    assert info.note == 'random weights'


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (('nowhere.npz',), 'nowhere.npz: no such file or folder'),
        (('~nobody-of-this-name/x.npz',), 'no such file or folder'),
        (('x\x1b[31m\n.npz',), r'x\x1b[31m\n.npz: no such'),
        (('--benchmark', 'nowhere'), 'nowhere'),
        (('.', '--fit-temperature', 'nowhere/new.h5'), 'nowhere/new.h5: there is no such folder'),
        (('.',), 'no sample of the 5 characters'),
        (('.', '--fit-temperature'), 'no sample of the'),
        (('.', '--out', 'afile'), 'afile: this is a file'),
        (('.', '--out', 'afile/out'), '--out takes a folder'),
        (('.', '--papers'), 'pictures have a paper of their own'),
        (('blank.npz', '--papers'), 'no scan of the 5 characters'),
        (('others.npz', '--papers', '5'), 'no scan of the 5 characters'),
    ],
)
def test_errors_in_one_line(small_file, arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'afile').touch()
    scans = np.full((2, 30, 30), 255, np.uint8)
    np.savez(tmp_path / 'blank.npz', images=scans, chars=np.array(['一', '人']))
    np.savez(tmp_path / 'others.npz', images=np.stack([page(0)] * 2), chars=np.array(['永', '字']))
    assert evaluate.main([*arguments, '--model', str(small_file)]) == 1
    error = capsys.readouterr().err.strip()
    assert error.splitlines()[-1].startswith('evaluate.py: ')
    assert message in error
    assert '\x1b' not in error


@pytest.mark.parametrize(
    'arguments',
    [
        (),
        ('data.npz', '--benchmark', 'mnist.npz'),
        ('data.npz', '--papers', '0'),
        ('data.npz', '--papers', '-5'),
        ('--benchmark', 'mnist.npz', '--epochs', '0'),
        ('data.npz', '--fit-temperature', 'new.keras'),
        ('--fit-temperature', 'samples.npz', 'more.npz'),
        ('data.npz', '--half'),
        ('data.npz', '--half', '--fit-temperature'),
        ('data.npz', '--papers', '--fit-temperature'),
        ('--benchmark', 'mnist.npz', '--papers'),
    ],
)
def test_wrong_usage(arguments):
    with pytest.raises(SystemExit) as exit_:
        evaluate.main(arguments)
    assert exit_.value.code == 2


def test_the_report_is_there_though_the_model_cannot_be_saved(small_file, pictures, tmp_path, monkeypatch, capsys):
    import melnyk_net

    def full(path, *_):
        raise OSError(f'{path}: there is no room for it')

    monkeypatch.setattr(melnyk_net, 'save_model', lambda model, path, *_: full(path))
    out, target = tmp_path / 'report', tmp_path / 'new.h5'
    arguments = [str(pictures), '--model', str(small_file), '--out', str(out), '--fit-temperature', str(target)]
    assert evaluate.main(arguments) == 1
    assert 'no room' in capsys.readouterr().err
    assert {'summary.json', 'classes.csv', 'reliability.png'} <= {path.name for path in out.iterdir()}


def test_the_temperature_is_fitted_to_some_and_the_rest_is_measured(
    small_file, pictures, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(evaluate, 'FITTED', 4)
    out = str(tmp_path / 'report')
    assert evaluate.main([str(pictures), '--model', str(small_file), '--out', out, '--fit-temperature']) == 0
    text = capsys.readouterr().out
    assert 'fitted to 4 samples' in text
    assert 'samples 10 ' in text


def test_without_matplotlib_there_are_no_figures(small_file, pictures, tmp_path, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.partition('.')[0] == 'matplotlib']:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    out = tmp_path / 'report'
    assert evaluate.main([str(pictures), '--model', str(small_file), '--out', str(out)]) == 0
    captured = capsys.readouterr()
    assert 'no figures: matplotlib is not installed: pip install -r requirements.txt' in captured.err
    assert f'details: {out}' in captured.out
    assert sorted(path.suffix for path in out.iterdir()) == ['.csv', '.csv', '.csv', '.json']


def test_blank_scans_have_no_paper(small_file, tmp_path, monkeypatch, capsys):
    import papers

    monkeypatch.setattr(papers, 'PAPERS', {'tight crop': papers.PAPERS['tight crop']})
    scans = np.stack([page(1), np.full_like(page(1), 255), page(1)])
    np.savez(tmp_path / 'scans.npz', images=scans, chars=np.array(['一', '人', '人']))
    assert evaluate.main([str(tmp_path / 'scans.npz'), '--model', str(small_file), '--papers']) == 0
    captured = capsys.readouterr()
    assert '2 samples of each paper' in captured.out
    assert 'tight crop' in captured.out
    assert 'left out 1 blank' in captured.err


# --- MNIST -----------------------------------------------------------------------------------------------------------


MNIST = ('x_train', 'y_train', 'x_test', 'y_test')


def mnist():
    rng = np.random.default_rng(0)
    y_train, y_test = np.arange(64, dtype=np.uint8) % 2, np.arange(20, dtype=np.uint8) % 2
    images = []
    for labels in (y_train, y_test):
        pictures = rng.integers(0, 30, (len(labels), 28, 28), np.uint8)
        pictures[labels == 1, 8:20, 12:16] = 255
        pictures[labels == 0, 12:16, 4:24] = 255
        images.append(pictures)
    return images[0], y_train, images[1], y_test


def test_mnist_is_read_from_idx_files_and_npz(tmp_path):
    arrays = mnist()
    names = ('train-images-idx3-ubyte', 'train-labels-idx1-ubyte', 't10k-images-idx3-ubyte', 't10k-labels-idx1-ubyte')
    for number, (name, array) in enumerate(zip(names, arrays, strict=True)):
        header = bytes((0, 0, 8, array.ndim)) + struct.pack(f'>{array.ndim}I', *array.shape)
        data = header + array.tobytes()
        if number % 2:
            (tmp_path / f'{name}.gz').write_bytes(gzip.compress(data))
        else:
            (tmp_path / name).write_bytes(data)
    np.savez(tmp_path / 'mnist.npz', **dict(zip(MNIST, arrays, strict=True)))
    for path in (tmp_path, tmp_path / 'mnist.npz'):
        for got, wanted in zip(evaluate.read_mnist(path), arrays, strict=True):
            np.testing.assert_array_equal(got, wanted)
    packed = gzip.compress(b'\0\0\x08\1' + bytes(999))
    for content in (b'no idx', b'', b'\0\0\x08', b'\0\0\x08\3\0', packed[:-9], packed[:12] + b'\xff' * 9, packed[:2]):
        (tmp_path / names[0]).write_bytes(content)
        with pytest.raises(DataError, match='four IDX files'):
            evaluate.read_mnist(tmp_path)


def test_the_benchmark_trains_the_architecture(tmp_path, monkeypatch, capsys):
    import melnyk_net

    monkeypatch.setattr(melnyk_net, 'FILTER_GROUPS', ((4,), (4,), (8,), (8,), (8,)))
    np.savez(tmp_path / 'm.npz', **dict(zip(MNIST, mnist(), strict=True)))
    assert evaluate.main(['--benchmark', str(tmp_path / 'm.npz'), '--epochs', '1']) == 0
    assert 'of 20 after 1 epochs' in capsys.readouterr().out


def test_every_label_is_a_character_that_a_picture_can_be_named_by(tmp_path):
    assert [c for c in LABELS if named_character(tmp_path / f'{c}.png') != c] == []
