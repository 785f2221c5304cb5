import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import draw_character

from data_utils import LABELS
from feed import Feed, FeedError, GntSource, MixedSource, augmented, split_by_writer, training_index
from gnt_reader import GntError, write_gnt

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


def test_competition_files_are_refused(folder, tmp_path):
    write_gnt(tmp_path / 'C001-f-f.gnt', [(LABELS[0], draw_character(40))])
    with pytest.raises(FeedError, match=r'C001-f-f.gnt: 1 file\(s\) of the ICDAR-2013 competition'):
        training_index([folder, tmp_path])


def test_files_without_a_character_of_the_table_are_refused(tmp_path):
    write_gnt(tmp_path / '1001-c.gnt', [('A', draw_character(40))])
    with pytest.raises(FeedError, match='no sample of the 3755 characters'):
        training_index([tmp_path])


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
