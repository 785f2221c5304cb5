import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import draw_character
from PIL import Image

from data_utils import LABELS, ImageError, network_input, open_image
from feed import (
    Feed,
    FeedError,
    GntSource,
    ImageSource,
    MixedSource,
    augmented,
    prepared_picture,
    refuse_competition_pictures,
    split_by_class,
    split_by_writer,
    training_index,
    unreadable_pictures,
    writers_of,
)
from gnt_reader import GntError, export_gnt, write_gnt

ROOT = Path(__file__).parents[1]
CHARACTERS = LABELS[:4]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """GNT files of five writers, one sample of four characters each: the ink tells the writer, the pen the class."""
    path = tmp_path_factory.mktemp('gnt')
    for writer in range(5):
        pages = [draw_character(40 + 4 * k, ink=20 * writer, width=0.04 + 0.03 * k) for k in range(4)]
        write_gnt(path / f'{1001 + writer}-c.gnt', list(zip(CHARACTERS, pages, strict=True)))
    return path


@pytest.fixture(scope='module')
def source(folder):
    return GntSource(training_index([folder]), seed=3)


def test_a_pass_gives_every_sample_once_and_each_pass_has_an_order_of_its_own(source):
    passes = [source.batch(range(20 * i, 20 * (i + 1))) for i in range(2)]
    for images, labels, trusted in passes:
        assert images.shape == (20, 96, 96)
        assert images.dtype == np.uint8
        assert np.bincount(labels).tolist() == [5, 5, 5, 5]
        assert len({image.tobytes() for image in images}) == 20
        assert trusted.all()
    assert passes[0].labels.tolist() != passes[1].labels.tolist()


def test_a_sample_is_a_function_of_its_number(source):
    there = source.batch([37, 2, 5])
    again = GntSource(source.index, seed=3).batch([2, 5, 37])
    np.testing.assert_array_equal(there.images, again.images[[2, 0, 1]])
    np.testing.assert_array_equal(there.labels, again.labels[[2, 0, 1]])


def test_augmentation_changes_the_picture_within_its_frame(source):
    image = source.batch([0]).images[0]
    others = [augmented(image, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(others[0], others[1])
    assert (others[0] != others[2]).any()
    for other in others:
        assert other.shape == (96, 96)
        assert other[4:-4, 4:-4].any()
        assert not other[:4].any()
        correlation = np.corrcoef(image.ravel(), other.ravel())[0, 1]
        assert correlation > 0.3


@pytest.mark.parametrize('workers', [1, 3])
@pytest.mark.parametrize('start', [0, 4])
def test_batches_come_in_order_whatever_the_number_of_workers(source, workers, start):
    with Feed(source, batch_size=6, start=start, workers=workers) as feed:
        for number in range(start, start + 5):
            batch, expected = next(feed), source.batch(range(6 * number, 6 * number + 6))
            for got, wanted in zip(batch, expected, strict=True):
                np.testing.assert_array_equal(got, wanted)


def test_machines_share_a_batch(source):
    whole = source.batch(range(8, 16))
    for rows in ((0, 4), (4, 8)):
        with Feed(source, batch_size=8, start=1, workers=1, rows=rows) as feed:
            np.testing.assert_array_equal(next(feed).images, whole.images[slice(*rows)])


class Numbers:
    """A source whose images tell which sample they are."""

    def __init__(self, offset):
        self.offset = offset

    def batch(self, indices):
        numbers = np.array(indices, np.int32) + self.offset
        return numbers[:, None, None], numbers, numbers >= 0


@pytest.mark.parametrize('share', [0.25, 0.5, 0.9])
def test_a_mixture_deals_both_sources_in_order(share):
    mixed = MixedSource(Numbers(0), Numbers(1000), share)
    _, labels, _ = mixed.batch(range(400))
    first, second = labels[labels < 1000], labels[labels >= 1000] - 1000
    assert len(first) == pytest.approx(400 * share, abs=1)
    assert first.tolist() == list(range(len(first)))
    assert second.tolist() == list(range(len(second)))
    np.testing.assert_array_equal(mixed.batch([399, 7, 8]).labels, labels[[399, 7, 8]])


def test_validation_writers_are_not_trained_on(folder):
    index = training_index([folder])
    training, validation = split_by_writer(index, 2, seed=1)
    writers = [{part.members[i].writer for i in part.member} for part in (training, validation)]
    assert len(training) + len(validation) == len(index) == 20
    assert len(writers[1]) == 2
    assert not writers[0] & writers[1]
    with pytest.raises(FeedError, match='5 writers for validation leave none of 5'):
        split_by_writer(index, 5)


def test_writers_without_a_sample_are_not_set_aside(folder, tmp_path):
    """HWDB1.2 has characters of level 2 alone."""
    for writer in range(8):
        characters = CHARACTERS if writer < 2 else ('丌', '亍')
        write_gnt(tmp_path / f'{1201 + writer}-c.gnt', [(c, draw_character(40)) for c in characters])
    index = training_index([tmp_path])
    assert writers_of(index).tolist() == ['1201', '1202']
    for seed in range(8):
        training, validation = split_by_writer(index, 1, seed)
        assert len(training) == len(validation) == 4
    with pytest.raises(FeedError, match='7 writers for validation leave none of 2 to train on'):
        split_by_writer(index, 7)


def test_competition_files_are_refused(folder, tmp_path):
    write_gnt(tmp_path / 'C001-f-f.gnt', [(LABELS[0], draw_character(40))])
    with pytest.raises(FeedError, match=r'C001-f-f.gnt: 1 file\(s\) of the ICDAR-2013 competition'):
        training_index([folder, tmp_path])


def test_files_without_a_character_of_the_table_are_refused(tmp_path):
    write_gnt(tmp_path / '1001-c.gnt', [('A', draw_character(40))])
    with pytest.raises(FeedError, match='no sample of the 3755 characters'):
        training_index([tmp_path])


# --- Pictures --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def exported(folder, tmp_path_factory):
    """The same samples as pictures, and their class indices."""
    out = tmp_path_factory.mktemp('png') / 'png'
    export_gnt(folder, out)
    files = sorted(map(str, out.rglob('*.png')))
    return tuple(files), np.array([CHARACTERS.index(Path(file).parent.name) for file in files], np.int32)


def test_an_export_gives_the_samples_of_its_gnt_files(source, exported):
    there, back = source.batch(range(20)), ImageSource(*exported).batch(range(20))
    assert back.images.dtype == np.uint8
    assert back.trusted.all()
    # Ink and pen tell the samples apart. What a picture goes through darkens ink by a fiftieth.
    order, same = (np.argsort(batch.images.astype(int).sum((1, 2))) for batch in (there, back))
    assert there.labels[order].tolist() == back.labels[same].tolist()
    assert np.abs(there.images[order].astype(int) - back.images[same]).max() <= 5


def test_a_picture_is_a_function_of_its_number(exported):
    pictures = ImageSource(*exported, seed=3, augment=True)
    passes = [pictures.batch(range(20 * i, 20 * (i + 1))) for i in range(2)]
    for batch in passes:
        assert np.bincount(batch.labels).tolist() == [5, 5, 5, 5]
    assert passes[0].labels.tolist() != passes[1].labels.tolist()
    again = ImageSource(*exported, seed=3, augment=True).batch([2, 25])
    np.testing.assert_array_equal(again.images, np.stack([passes[0].images[2], passes[1].images[5]]))
    plain = ImageSource(*exported, seed=3).batch([2])
    assert (plain.images[0] != again.images[0]).any()
    assert plain.labels[0] == again.labels[0]
    with Feed(pictures, batch_size=6, start=3, workers=2) as feed:
        for number in (3, 4):  # in the second pass, too
            np.testing.assert_array_equal(next(feed).images, pictures.batch(range(6 * number, 6 * number + 6)).images)


def test_pictures_are_prepared_as_a_users(exported):
    image = prepared_picture(exported[0][0])
    np.testing.assert_array_equal(image, network_input(open_image(exported[0][0])))
    assert not image.flags.writeable  # it is kept for the next pass


def test_pictures_that_cannot_be_learned_from_are_named(exported, tmp_path):
    (tmp_path / 'broken.png').write_bytes(b'nothing')
    Image.new('L', (40, 40), 255).save(tmp_path / 'blank.png')
    bad = [str(tmp_path / name) for name in ('broken.png', 'blank.png', 'gone.png')]
    seen = []
    reasons = unreadable_pictures([bad[0], *exported[0] * 2, *bad[1:]], workers=2, progress=seen.append)
    assert list(reasons) == bad
    assert 'not an image' in reasons[bad[0]]
    assert 'nothing is written' in reasons[bad[1]]
    assert seen[-1] == 43
    assert unreadable_pictures([]) == {}


def test_a_picture_that_vanishes_meanwhile_stops_the_run(exported, tmp_path):
    source = ImageSource((str(tmp_path / 'gone.png'),), np.zeros(1, np.int32))
    with (
        Feed(source, 2, workers=1) as feed,
        pytest.raises(FeedError, match=r'gone\.png: no such file; .* new run'),
    ):
        next(feed)
    with pytest.raises(ImageError):
        prepared_picture(str(tmp_path / 'gone.png'))


@pytest.mark.parametrize('share', [0.0, 0.01, 0.2, 0.5, 1.0])
def test_each_class_keeps_samples_to_learn_from(share):
    labels = np.repeat(np.arange(6), [1, 2, 3, 10, 40, 100])
    labels = np.random.default_rng(0).permutation(labels)
    training, validation = split_by_class(labels, share, seed=1)
    assert sorted([*training, *validation]) == list(range(len(labels)))
    learned, measured = (np.bincount(labels[part], minlength=6) for part in (training, validation))
    assert (learned >= 1).all()
    assert measured[0] == 0
    if share:
        assert (measured[1:] >= 1).all()
        wanted = np.clip(np.round(share * np.array([2, 3, 10, 40, 100])), 1, [1, 2, 9, 39, 99])
        assert measured[1:].tolist() == wanted.tolist()
    else:
        assert not len(validation)
    for mine, again in zip((training, validation), split_by_class(labels, share, seed=1), strict=True):
        np.testing.assert_array_equal(mine, again)
    if 0.1 < share < 1:
        assert split_by_class(labels, share, seed=2)[1].tolist() != validation.tolist()
    few, same = split_by_class(labels, share, seed=1, limit=6)
    assert sorted(labels[few]) == [0, 1, 2, 3, 4, 5]  # one of each before a second of any
    np.testing.assert_array_equal(same, validation)


def test_nothing_can_be_split():
    assert [len(part) for part in split_by_class(np.zeros(0, np.int32), 0.2)] == [0, 0]


def test_pictures_of_the_competition_are_refused():
    refuse_competition_pictures(['鲍/1001-c_0.png', 'IMG_0001.jpg'])
    with pytest.raises(FeedError, match=r'C001-f-f_123\.png: 1 picture\(s\) .*competition'):
        refuse_competition_pictures(['鲍/1001-c_0.png', '鲍/C001-f-f_123.png'])


# --- Workers ---------------------------------------------------------------------------------------------------------


def test_an_error_in_a_worker_reaches_the_run(source, tmp_path):
    write_gnt(tmp_path / '1001-c.gnt', [(LABELS[0], draw_character(40))] * 3)
    index = training_index([tmp_path])
    (tmp_path / '1001-c.gnt').unlink()
    with Feed(GntSource(index), batch_size=2, workers=1) as feed, pytest.raises(GntError, match=r'1001-c\.gnt'):
        next(feed)


def test_a_worker_that_is_killed_is_reported(source):
    with Feed(source, batch_size=2, workers=1, ahead=1) as feed:
        next(feed)
        feed._workers[0].kill()
        with pytest.raises(FeedError, match=r'a worker process ended .*--resume'):
            list(feed)


@pytest.mark.skipif(os.name != 'posix', reason='SIGKILL')
def test_workers_end_with_a_run_that_is_killed(folder):
    script = (
        'import sys, time\n'
        'from feed import *\n'
        'feed = Feed(GntSource(training_index(sys.argv[1:])), 64, workers=2)\n'
        'next(feed)\n'
        'print(*(w.pid for w in feed._workers), "tensorflow" in sys.modules, flush=True)\n'
        'time.sleep(60)\n'
    )
    run = subprocess.Popen([sys.executable, '-c', script, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    *workers, heavy = run.stdout.readline().split()
    assert heavy == 'False'
    assert all(alive(int(pid)) for pid in workers)
    run.send_signal(signal.SIGKILL)
    run.wait()
    run.stdout.close()
    end = time.monotonic() + 20
    while any(alive(int(pid)) for pid in workers) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(alive(int(pid)) for pid in workers)


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended but is not yet collected does not."""
    try:
        return Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()[0] != 'Z'
    except FileNotFoundError:
        if Path('/proc/self').exists():
            return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
