import csv
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

import gnt_reader
from data_utils import LABEL_INDEX, LABELS
from gnt_reader import (
    GntError,
    GntReader,
    GntRecord,
    character_tag,
    export_gnt,
    folder_character,
    gnt_members,
    index_gnt,
    is_competition_file,
    label_folder,
    main,
    read_gnt,
    tag_character,
    write_gnt,
    writer_id,
)


def image_of(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width)).astype(np.uint8)


def record_bytes(width=2, height=3, tag=b'\xb0\xa1', size=None, pixels=None):
    """One record as the format's description says it, by other means than the module's own writer."""
    size = 10 + width * height if size is None else size
    pixels = bytes(range(width * height)) if pixels is None else pixels
    return size.to_bytes(4, 'little') + tag + width.to_bytes(2, 'little') + height.to_bytes(2, 'little') + pixels


GOOD = record_bytes()
OTHER = record_bytes(3, 2, 'у'.encode('gb18030'))  # outside level 1
SECOND = record_bytes(4, 5, '座'.encode('gb2312'))


def write(path, data):
    path.write_bytes(data)
    return path


def read_all(path, **options):
    return list(read_gnt(path, **{'level1_only': False, **options}))


def tolerant(path):
    errors = []
    records = read_all(path, strict=False, on_error=errors.append)
    return records, errors


def same(records, others):
    return [(r.character, r.tag_code, r.image.tolist()) for r in records] == [
        (r.character, r.tag_code, r.image.tolist()) for r in others
    ]


@pytest.fixture
def casia(tmp_path):
    """Two writers' files of three characters and a letter each, in a folder."""
    folder = tmp_path / 'HWDB'
    folder.mkdir()
    for k, name in enumerate(('1001-c.gnt', '1002-c.gnt')):
        samples = [(c, image_of(5 + i, 7 + k, 10 * k + i)) for i, c in enumerate('鲍啊座A')]
        write_gnt(folder / name, samples)
    return folder


def zip_of(path, files, **options):
    with zipfile.ZipFile(path, 'w', **options) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


# --- The format ------------------------------------------------------------------------------------------------------


def test_record_as_the_format_describes_it(tmp_path):
    path = write(tmp_path / '001-f.gnt', GOOD + SECOND)
    first, second = read_gnt(path)
    assert first[:2] == ('啊', 0xB0A1)
    assert first.offset == 0
    assert first.image.tolist() == [[0, 1], [2, 3], [4, 5]]  # 3 rows of 2 columns
    assert first.image.dtype == np.uint8
    assert (second.character, second.image.shape, second.offset) == ('座', (5, 4), len(GOOD))


@pytest.mark.parametrize(
    'samples',
    [
        [],
        [('啊', (1, 1))],
        [('扼', (1, 65535))],
        [('扼', (65535, 1))],
        [('啊', (1100, 1200)), ('阿', (3, 3)), ('埃', (1025, 1024)), ('A', (1, 1))],  # larger than the window
        [(LABELS[i], (1 + i % 150, 1 + i % 97)) for i in range(1000)],
        [('A', (2, 2)), ('。', (2, 3)), ('Ａ', (3, 2)), ('亍', (1, 1)), ('镕', (2, 2)), ('~', (1, 2))],
    ],
    ids=['empty', 'smallest', 'widest', 'tallest', 'large', 'many', 'symbols'],
)
def test_round_trip(tmp_path, samples):
    pairs = [(character, image_of(*shape, seed)) for seed, (character, shape) in enumerate(samples)]
    path = tmp_path / 'x.gnt'
    assert write_gnt(path, pairs) == len(pairs)
    records = read_all(path)
    assert [record.character for record in records] == [character for character, _ in samples]
    assert all(np.array_equal(record.image, image) for record, (_, image) in zip(records, pairs, strict=True))
    write_gnt(tmp_path / 'y.gnt', records)
    assert (tmp_path / 'y.gnt').read_bytes() == path.read_bytes()


def test_image_belongs_to_the_caller(tmp_path):
    path = write(tmp_path / 'x.gnt', GOOD + GOOD)
    first, second = read_gnt(path)
    first.image[:] = 255
    assert second.image[0, 1] == 1
    base = first.image.base
    assert base is None or memoryview(base).nbytes == first.image.nbytes  # a kept image keeps no window


@pytest.mark.parametrize(
    ('tag', 'character', 'level1'),
    [
        ('4100', 'A', False),
        ('2F00', '/', False),
        ('A1A3', '。', False),
        ('B0A1', '啊', True),
        ('D7F9', '座', True),
        ('D8A1', '亍', False),
        ('D7FA', None, False),
        ('FFFF', None, False),
        ('0000', None, False),
        ('8000', None, False),
        ('0041', None, False),
        ('4141', None, False),
        ('E946', '镕', False),
    ],
)
def test_tags(tmp_path, tag, character, level1):
    path = write(tmp_path / 'x.gnt', record_bytes(tag=bytes.fromhex(tag)))
    (record,) = read_all(path)
    assert (record.character, record.tag_code) == (character, int(tag, 16))
    assert len(list(read_gnt(path))) == level1
    assert index_gnt(path, level1_only=False).labels().tolist() == [LABEL_INDEX.get(character, -1)]
    assert tag_character(int(tag, 16)) == character
    if character:
        assert character_tag(character) == int(tag, 16)


def test_every_label_has_its_own_tag_and_folder():
    tags = [character_tag(character) for character in LABELS]
    assert [tag_character(tag) for tag in tags] == list(LABELS)
    assert (min(tags), max(tags)) == (0xB0A1, 0xD7F9)
    assert [label_folder(tag) for tag in tags] == list(LABELS)


@pytest.mark.parametrize('character', ['', '啊啊', '😀', 'ø', '\0', None])
def test_no_tag_for(tmp_path, character):
    with pytest.raises((ValueError, AttributeError)):
        write_gnt(tmp_path / 'x.gnt', [('啊', image_of(2, 2)), (character, image_of(2, 2))])
    assert list(tmp_path.iterdir()) == []  # nothing half written


@pytest.mark.parametrize(
    'image',
    [np.zeros((2, 2)), np.zeros((2, 2, 1), np.uint8), np.zeros((0, 2), np.uint8), np.zeros((1, 65536), np.uint8)],
)
def test_no_gnt_image(tmp_path, image):
    with pytest.raises(ValueError, match='GNT image'):
        write_gnt(tmp_path / 'x.gnt', [('啊', image)])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ('name', 'writer', 'competition'),
    [
        ('1001-c.gnt', '1001', False),
        ('a/b/001-f.gnt', '001', False),
        ('C001-f-f.gnt', 'C001', True),
        ('x\\c060-f-f.GNT', 'C060', True),
        ('competition-gnt.zip', 'competition-gnt', True),
        ('competition/1001-c.gnt', '1001', False),
        ('1.0train-gb1.gnt', '1.0train-gb1', False),
        ('mine.gnt', 'mine', False),
    ],
)
def test_names(name, writer, competition):
    assert writer_id(name) == writer
    assert is_competition_file(name) == competition


# --- Damage ----------------------------------------------------------------------------------------------------------


def test_cut_anywhere(tmp_path):
    whole = GOOD + SECOND
    for length in range(len(whole)):
        path = write(tmp_path / 'x.gnt', whole[:length])
        complete = [0] * (length >= len(GOOD))
        records, errors = tolerant(path)
        assert [record.offset for record in records] == complete
        if length in (0, len(GOOD)):
            assert errors == []
        else:
            assert len(errors) == 1
            assert str(path) in str(errors[0])
            with pytest.raises(GntError):
                read_all(path)


SIZE_FIELDS = [0, 9, 10, 15, 17, 0xFFFFFFFF]


@pytest.mark.parametrize(
    'damaged',
    [
        *(record_bytes(size=size) for size in SIZE_FIELDS),
        record_bytes(width=0, pixels=b''),
        record_bytes(height=0, pixels=b''),
        record_bytes(width=0, size=16, pixels=bytes(6)),
        record_bytes(65535, 65535, pixels=b''),
        record_bytes(65535, 65535, size=0xFFFFFFFF, pixels=b''),
        record_bytes(9000, 9000, pixels=b''),
    ],
)
@pytest.mark.parametrize('before', [b'', GOOD + OTHER])
def test_damaged_header(tmp_path, damaged, before):
    path = write(tmp_path / '1001-c.gnt', before + damaged)
    records, errors = tolerant(path)
    assert len(records) == (2 if before else 0)
    assert len(errors) == 1
    with pytest.raises(GntError) as caught:
        read_all(path)
    error = caught.value
    assert (error.record, error.offset) == ((3, len(before)) if before else (1, 0))
    assert '1001-c.gnt' in str(error)
    assert error.next_step
    assert str(pickle.loads(pickle.dumps(error))) == str(error)  # it crosses processes


@pytest.mark.parametrize(
    ('damaged', 'recovered'),
    [
        (record_bytes(size=99), True),  # the sides tell the length
        (record_bytes()[:6] + b'\x09\x00' + record_bytes()[8:], True),  # the size field tells it
        (b'\xff' * 16, False),
        (record_bytes(width=0, pixels=b'', size=10), False),
    ],
)
def test_reading_goes_on_behind_damage(tmp_path, damaged, recovered):
    write(tmp_path / '1.gnt', GOOD + damaged + SECOND + SECOND)
    write(tmp_path / '2.gnt', OTHER)
    records, errors = tolerant(tmp_path)
    assert [record.character for record in records] == ['啊'] + ['座', '座'] * recovered + ['у']
    assert [(error.record, error.offset) for error in errors] == [(2, 16)]


def test_damage_warns_where_nobody_listens(tmp_path):
    path = write(tmp_path / 'x.gnt', GOOD + b'rest')
    with pytest.warns(UserWarning, match='record 2 at byte 16'):
        assert len(read_all(path, strict=False)) == 1


def test_huge_claims_allocate_nothing(tmp_path):
    header = record_bytes(65535, 65535, pixels=b'')
    assert len(header) == 10
    path = write(tmp_path / 'x.gnt', header)
    # An archive whose directory lies about the length, too.
    lying = bytearray(zip_of(tmp_path / 'x.zip', {'x.gnt': header}).read_bytes())
    central = lying.index(b'PK\1\2')
    lying[central + 24 : central + 28] = struct.pack('<I', 0xFFFFFFF0)
    archive = write(tmp_path / 'lying.zip', bytes(lying))
    tracemalloc.start()
    try:
        for source in (path, archive):
            with pytest.raises(GntError):
                read_all(source)
        assert tracemalloc.get_traced_memory()[1] < 8e6
    finally:
        tracemalloc.stop()


ALIEN = {
    'ALZ': (b'ALZ\x01\x0a\0\0\0BLZ\x01' + bytes(40), 'unalz.*Gnt1.0TrainPart1.zip'),
    'empty ZIP': (b'PK\5\6' + bytes(18), 'no .gnt file, it is empty'),
    'broken ZIP': (b'PK\3\4' + bytes(40), 'damaged'),
    'PNG': (b'\x89PNG\r\n\x1a\n' + bytes(40), 'PNG image'),
    'text': ('一个文本文件\n'.encode() * 9, 'text, not GNT'),
    'short text': (b'hello\n', 'text, not GNT'),
    'page': (b'<!DOCTYPE html><title>404</title>' + bytes(1), 'web page'),
    'bytes': (bytes(range(128, 168)), 'is this a GNT file'),
}


@pytest.mark.parametrize('suffix', ['.gnt', '.zip', '.GNT', ''])
@pytest.mark.parametrize(('data', 'message'), ALIEN.values(), ids=ALIEN)
def test_alien_file(tmp_path, data, message, suffix):
    path = write(tmp_path / f'x{suffix}', data)
    with pytest.raises(GntError, match=message):
        read_all(path)
    records, errors = tolerant(path)
    assert (records, len(errors)) == ([], 1)


@pytest.mark.parametrize(
    ('files', 'message'),
    [
        ({'HWDB1.1trn_gnt.alz': b'ALZ\1'}, 'unalz'),
        ({'inner.zip': b'PK'}, 'unpack it first'),
        ({'readme.txt': b'', 'b.txt': b''}, '2 others, readme.txt the first'),
        ({'1.gnt': b'ALZ\1' + bytes(20)}, 'unalz'),
        ({'1.gnt': b'PK\3\4' + bytes(20)}, 'zip archive inside'),
    ],
)
def test_zip_without_records(tmp_path, files, message):
    with pytest.raises(GntError, match=message):
        read_all(zip_of(tmp_path / 'x.zip', files))


@pytest.mark.parametrize('name', ['', '9' * 5000 + '.gnt'], ids=['none', 'thousands of digits'])
def test_odd_names_in_an_archive(tmp_path, name):
    data = bytearray(zip_of(tmp_path / 'x.zip', {name or 'x.gnt': GOOD, '2.gnt': SECOND}).read_bytes())
    if not name:
        # The directory says of its first entry that it has no name, and that the letters there are a comment.
        place = data.index(b'PK\1\2')
        data[place + 28 : place + 34] = struct.pack('<HHH', 0, 0, len('x.gnt'))
    records, errors = tolerant(write(tmp_path / 'x.zip', bytes(data)))
    assert [record.character for record in records] == (['座', '啊'] if name else ['座'])
    assert errors == []


def test_sources_that_are_none(tmp_path):
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'alz').mkdir()
    write(tmp_path / 'alz' / 'HWDB1.1trn_gnt.alz', b'ALZ\1')
    (tmp_path / 'link').symlink_to('nowhere')
    (tmp_path / 'loop').symlink_to('loop')
    for name, message in {
        'missing': 'no such file',
        'empty': 'no .gnt',
        'alz': 'unalz',
        'link': 'no such file',
        'loop': 'cannot be read',
        'nul\0': 'cannot be read',
    }.items():
        with pytest.raises(GntError, match=message):
            read_gnt(tmp_path / name)  # at once, not when the first record is asked for
    with pytest.raises(GntError):
        read_gnt('~nobody-of-this-name/x.gnt')


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='needs pipes')
def test_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / 'x.gnt')
    with pytest.raises(GntError, match='neither a file'):
        read_gnt(tmp_path / 'x.gnt')


def test_unreadable_file_stops_no_folder(tmp_path, monkeypatch):
    write(tmp_path / '1.gnt', GOOD)
    write(tmp_path / '2.gnt', SECOND)
    opened = Path.open

    def guarded(self, *args, **options):
        if self.name == '1.gnt':
            raise PermissionError(13, 'Permission denied', str(self))
        return opened(self, *args, **options)

    monkeypatch.setattr(Path, 'open', guarded)
    records, errors = tolerant(tmp_path)
    assert [record.character for record in records] == ['座']
    assert [str(error) for error in errors] == [f'{tmp_path / "1.gnt"}: no permission to read it']


@settings(deadline=None, max_examples=300)
@given(
    st.lists(
        st.one_of(
            st.binary(max_size=40),
            st.sampled_from([GOOD, OTHER, SECOND, b'PK\3\4', b'ALZ\1', b'PK\5\6' + bytes(18)]),
            st.builds(
                record_bytes,
                st.integers(0, 3),
                st.integers(0, 3),
                st.binary(min_size=2, max_size=2),
                st.none() | st.integers(0, 0xFFFFFFFF),
            ),
        ),
        max_size=6,
    ).map(b''.join)
)
@example(b'')
def test_arbitrary_bytes_give_records_or_gnt_errors(tmp_path_factory, data):
    path = write(tmp_path_factory.getbasetemp() / 'fuzz.gnt', data)
    records, errors = tolerant(path)
    assert all(isinstance(error, GntError) and str(error) for error in errors)
    assert sum(10 + record.image.size for record in records) <= len(data)
    if errors:
        with pytest.raises(GntError):
            read_all(path)
    else:
        assert same(read_all(path), records)


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_damaged_archives_give_records_or_gnt_errors(tmp_path_factory, data):
    method = data.draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2]))
    buffer = io.BytesIO()
    zip_of(buffer, {'1.gnt': GOOD * 20, '2.gnt': SECOND}, compression=method)
    broken = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        broken[data.draw(st.integers(0, len(broken) - 1))] = data.draw(st.integers(0, 255))
    path = write(tmp_path_factory.getbasetemp() / 'fuzz.zip', bytes(broken[: data.draw(st.integers(0, len(broken)))]))
    _, errors = tolerant(path)
    assert all(isinstance(error, GntError) and str(error) for error in errors)


# --- Archives and folders --------------------------------------------------------------------------------------------


@pytest.mark.parametrize('compression', [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_zip_members_are_streamed(tmp_path, casia, compression):
    archive = zip_of(
        tmp_path / 'Gnt1.1Test.zip',
        {
            'set/10-c.gnt': (casia / '1002-c.gnt').read_bytes(),
            'set/9-c.GNT': (casia / '1001-c.gnt').read_bytes(),
            'set/readme.txt': b'no records',
            '__MACOSX/set/._9-c.gnt': b'shadow',
        },
        compression=compression,
    )
    before = sorted(tmp_path.rglob('*'))
    assert same(read_all(archive), read_all(casia))  # natural order: 9 before 10
    assert sorted(tmp_path.rglob('*')) == before
    assert [str(member) for member in gnt_members(archive)] == [f'{archive}/set/9-c.GNT', f'{archive}/set/10-c.gnt']


def test_large_member_in_little_memory(tmp_path):
    record = record_bytes(100, 100, pixels=bytes(10000))
    archive = zip_of(tmp_path / 'x.zip', {'1.gnt': record * 2000}, compression=zipfile.ZIP_DEFLATED)
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_gnt(archive)) == 2000
        assert tracemalloc.get_traced_memory()[1] < 8e6
    finally:
        tracemalloc.stop()


def test_encrypted_member(tmp_path):
    data = bytearray(zip_of(tmp_path / 'x.zip', {'1.gnt': GOOD}).read_bytes())
    for magic, flags in ((b'PK\3\4', 6), (b'PK\1\2', 8)):
        data[data.index(magic) + flags] |= 1
    path = write(tmp_path / 'x.zip', bytes(data))
    with pytest.raises(GntError, match='encrypted'):
        read_all(path)


def test_folder_in_natural_order_without_hidden_and_copies(tmp_path):
    for name in ('10.gnt', '9.GNT', 'sub/1.gnt', '.hidden.gnt', '.git/2.gnt', 'notes.txt'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, GOOD if name != '10.gnt' else SECOND)
    (tmp_path / 'sub' / 'up').symlink_to(tmp_path)
    zip_of(tmp_path / 'a.zip', {'10.gnt': SECOND, '11.gnt': SECOND})
    names = [str(member)[len(str(tmp_path)) + 1 :] for member in gnt_members(tmp_path)]
    assert names == ['9.GNT', '10.gnt', 'a.zip/11.gnt', 'sub/1.gnt']  # 10.gnt is there unpacked
    assert gnt_members([tmp_path, f'{tmp_path}/', tmp_path / '10.gnt']) == gnt_members(tmp_path)


# --- Index and reader ------------------------------------------------------------------------------------------------


@pytest.fixture(params=['folder', 'stored', 'deflated'])
def indexed(request, tmp_path, casia):
    if request.param == 'folder':
        return casia
    files = {file.name: file.read_bytes() for file in sorted(casia.iterdir())}
    method = zipfile.ZIP_STORED if request.param == 'stored' else zipfile.ZIP_DEFLATED
    return zip_of(tmp_path / 'x.zip', files, compression=method)


def test_reader_gives_what_read_gnt_gives(indexed):
    for level1_only in (True, False):
        index = index_gnt(indexed, level1_only)
        expected = list(read_gnt(indexed, level1_only))
        with GntReader(index) as reader:
            assert len(reader) == len(index) == len(expected)
            assert same(reader, expected)
            assert [record.offset for record in reader] == [record.offset for record in expected]
            order = index.shuffled(np.random.default_rng(0))
            assert same([reader[i] for i in order], [expected[i] for i in order])
            copy = pickle.loads(pickle.dumps(reader))
        with copy:
            assert same([copy[-1]], expected[-1:])
            with pytest.raises(IndexError):
                copy[len(expected)]


def test_reader_with_a_cache_of_one_file(indexed):
    index = index_gnt(indexed)
    size = max(member.size for member in index.members)
    with GntReader(index, cache_bytes=size) as reader:
        assert same([reader[i] for i in (0, 3, 0, 5, 1)], [list(read_gnt(indexed))[i] for i in (0, 3, 0, 5, 1)])


def test_reader_refuses_a_member_larger_than_its_cache(tmp_path):
    archive = zip_of(tmp_path / 'x.zip', {'1.gnt': GOOD}, compression=zipfile.ZIP_DEFLATED)
    with GntReader(index_gnt(archive), cache_bytes=15) as reader, pytest.raises(GntError, match='cache_bytes'):
        reader[0]


@pytest.mark.parametrize('change', [b'', GOOD[:12], SECOND])
def test_reader_notices_a_changed_file(tmp_path, change):
    path = write(tmp_path / 'x.gnt', GOOD)
    index = index_gnt(path)
    write(path, change)
    with GntReader(index) as reader, pytest.raises(GntError, match='index it again'):
        reader[0]
    path.unlink()
    with GntReader(index) as reader, pytest.raises(GntError, match='no such file'):
        reader[0]


def test_shuffled_order(tmp_path):
    for name in range(10):
        write(tmp_path / f'{name}.gnt', GOOD * 5)
    index = index_gnt(tmp_path)
    order = index.shuffled(np.random.default_rng(3), files_at_once=2)
    assert sorted(order) == list(range(50))
    groups = index.member[order].reshape(5, 10)
    assert [len(set(group)) for group in groups.tolist()] == [2] * 5
    assert np.array_equal(order, index.shuffled(np.random.default_rng(3), files_at_once=2))
    assert not np.array_equal(order, index.shuffled(np.random.default_rng(4), files_at_once=2))


def test_select(casia):
    index = index_gnt(casia, level1_only=False)
    chosen = index.select(index.labels() == LABEL_INDEX['座'])
    with GntReader(chosen) as reader:
        assert [record.character for record in reader] == ['座', '座']
    assert len(index.select(np.array([], int))) == 0


def test_empty_source(tmp_path):
    path = write(tmp_path / 'x.gnt', b'')
    index = index_gnt(path)
    assert (len(index), index.labels().tolist(), index.shuffled(np.random.default_rng(0)).tolist()) == (0, [], [])


# --- Export ----------------------------------------------------------------------------------------------------------


def exported(folder):
    """Every image of an export as (character, pixels), read back by folder names."""
    return sorted(
        (folder_character(path.parent.name), np.asarray(Image.open(path)).tolist())
        for path in folder.rglob('[!.]*.png')
    )


def label_map(folder):
    with (folder / 'labels.csv').open(encoding='utf-8', newline='') as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize('names', ['character', 'code'])
def test_export_and_back(tmp_path, casia, names):
    out = tmp_path / 'out'
    counts = export_gnt(casia, out, level1_only=False, names=names)
    assert exported(out) == sorted((r.character, r.image.tolist()) for r in read_all(casia))
    rows = label_map(out)
    assert [row['character'] for row in rows] == [*sorted('鲍啊座', key=LABELS.index), 'A']
    assert [row['index'] for row in rows] == [*(str(LABEL_INDEX[row['character']]) for row in rows[:3]), '']
    assert {int(row['gb_code'], 16): int(row['count']) for row in rows} == counts
    assert {row['folder'] for row in rows} == {path.name for path in out.iterdir() if path.is_dir()}
    assert ('啊' in {row['folder'] for row in rows}) == (names == 'character')


def test_export_limit_and_level1(tmp_path, casia):
    counts = export_gnt(casia, tmp_path / 'out', limit=1)
    assert counts == {0xB1AB: 1, 0xB0A1: 1, 0xD7F9: 1}
    assert exported(tmp_path / 'out') == sorted((r.character, r.image.tolist()) for r in read_gnt(casia / '1001-c.gnt'))


def test_export_resumes_where_it_was_killed(tmp_path, casia, monkeypatch):
    written = gnt_reader._write_png
    left = [3]

    def killed(path, image):
        if not left[0]:
            path.with_name(f'.{path.stem}.part{path.suffix}').write_bytes(b'half an image')
            raise KeyboardInterrupt
        left[0] -= 1
        written(path, image)

    out = tmp_path / 'out'
    monkeypatch.setattr(gnt_reader, '_write_png', killed)
    with pytest.raises(KeyboardInterrupt):
        export_gnt(casia, out)
    assert len(exported(out)) == 3
    again = []
    monkeypatch.setattr(gnt_reader, '_write_png', lambda path, image: (again.append(path), written(path, image)))
    with pytest.raises(FileExistsError, match='--resume'):
        export_gnt(casia, out)
    assert export_gnt(casia, out, resume=True).total() == 6
    assert len(again) == 3
    assert exported(out) == sorted((r.character, r.image.tolist()) for r in read_gnt(casia))
    assert export_gnt(casia, out, resume=True).total() == 6
    assert len(again) == 3
    assert not list(out.rglob('.*'))
    for options in ({'level1_only': False}, {'limit': 2}, {'names': 'code'}):
        with pytest.raises(FileExistsError, match='other options'):
            export_gnt(casia, out, resume=True, **options)
    with pytest.raises(FileExistsError, match='other files'):
        export_gnt(casia / '1001-c.gnt', out, resume=True)


@pytest.mark.parametrize('resume', [False, True])
def test_export_spares_a_foreign_folder(tmp_path, casia, resume):
    mine = write(tmp_path / 'thesis.txt', b'mine')
    for out in (tmp_path, mine):
        with pytest.raises(FileExistsError):
            export_gnt(casia, out, resume=resume)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['HWDB', 'thesis.txt']


def test_export_of_files_with_one_name(tmp_path):
    for name in ('a/x.gnt', 'b/x.gnt', 'c/X.gnt', 'c/~.. \n.gnt'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, GOOD)
    archive = zip_of(tmp_path / 'z.zip', {'../../x.gnt': GOOD})
    assert export_gnt([tmp_path / 'a', tmp_path / 'b', tmp_path / 'c', archive], tmp_path / 'out').total() == 5
    assert len(exported(tmp_path / 'out')) == 5
    assert {path.parent for path in tmp_path.rglob('*.png')} == {tmp_path / 'out' / '啊'}


@pytest.mark.parametrize(
    ('tag', 'folder'),
    [(0xB0A1, '啊'), (0x3500, '5'), (0x4100, '4100'), (0x2F00, '2F00'), (0xA3C1, 'A3C1'), (0xFFFF, 'FFFF')],
)
def test_label_folder(tag, folder):
    assert label_folder(tag) == folder
    assert folder_character(folder) == tag_character(tag)
    assert folder_character(label_folder(tag, 'code')) == tag_character(tag)


def test_folders_of_all_tags_differ_on_every_file_system():
    names = [label_folder(tag) for tag in range(1 << 16)]
    assert len({name.casefold() for name in names}) == len(names)
    assert all(folder_character(name) == tag_character(tag) for tag, name in enumerate(names))
    assert folder_character('cats') is None


# --- Command line ----------------------------------------------------------------------------------------------------


def test_info(casia, capsys):
    write(casia / 'C001-f-f.gnt', GOOD + OTHER)
    assert main(['info', str(casia)]) == 0
    out, err = capsys.readouterr()
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert err == ''
    assert lines['files'].startswith('3, ')
    assert lines['writers'] == '3, 1001 … C001'
    assert lines['samples'] == '10'
    assert 'level 1     7 samples of 3 of 3,755' in out
    assert lines['others'] == '3 samples of 2 characters'
    assert lines['width'] == '2 to 8 pixels, median 7'
    assert lines['damaged'] == '0 places'
    assert 'never to train on' in out


def test_info_names_what_is_missing(tmp_path, capsys):
    write_gnt(tmp_path / 'x.gnt', [(character, image_of(2, 2)) for character in LABELS[15:]])
    assert main(['info', '--speed', str(tmp_path / 'x.gnt')]) == 0
    out = capsys.readouterr().out
    assert ''.join(LABELS[:15]) in out
    assert 'MB/s' in out


def test_info_of_damaged_files(casia, capsys):
    write(casia / '1003-c.gnt', GOOD + b'\0' * 30)
    assert main(['info', str(casia)]) == 1
    out, err = capsys.readouterr()
    assert 'samples     9' in out
    assert '1003-c.gnt, record 2 at byte 16' in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize('rest', [False, True])
def test_info_names_empty_files(casia, tmp_path, capsys, rest):
    write(tmp_path / '1003-c.gnt', b'')  # what a failed unpack leaves behind
    assert main(['info', str(tmp_path / '1003-c.gnt'), *([str(casia)] if rest else [])]) == 1
    out, err = capsys.readouterr()
    assert err.splitlines() == [
        f'gnt_reader.py: {tmp_path / "1003-c.gnt"}: it is empty; fetch or unpack the file again'
    ]
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert lines.get('writers') == ('2, 1001 … 1002' if rest else None)
    assert lines.get('damaged') == ('1 places' if rest else None)


@pytest.mark.parametrize('command', ['info', 'export', 'sheet'])
@pytest.mark.parametrize('source', ['missing', 'x.png', 'empty', 'b\x1b[31m\n.gnt'])
def test_bad_source_is_one_line(tmp_path, capsys, command, source):
    (tmp_path / 'empty').mkdir()
    for name in ('x.png', 'b\x1b[31m\n.gnt'):
        Image.new('L', (3, 3)).save(tmp_path / name, 'PNG')
    out = tmp_path / 'out.png'
    assert main([command, str(tmp_path / source), *([] if command == 'info' else [str(out)])]) == 1
    stdout, err = capsys.readouterr()
    assert stdout == ''
    assert len(err.splitlines()) == 1
    assert '\x1b' not in err
    assert not out.exists()


@pytest.mark.parametrize(
    'arguments',
    [
        [],
        ['info'],
        ['export', 'x'],
        ['export', 'x', 'y', '--limit', '0'],
        ['sheet', 'x', 'y.png', '--rows', '101'],
        ['sheet', 'x', 'y.txt'],
    ],
)
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert 'Traceback' not in capsys.readouterr().err


def test_export_command(casia, tmp_path, capsys):
    write(casia / '1003-c.gnt', GOOD + b'\0' * 30)
    out = str(tmp_path / 'out')
    assert main(['export', str(casia), out, '--all', '--limit', '2']) == 1  # one damaged record
    stdout, err = capsys.readouterr()
    assert stdout == f'8 images of 4 characters in {out}\n'
    assert 'record 2 at byte 16' in err
    assert main(['export', str(casia), out, '--all', '--limit', '2']) == 1
    assert '--resume' in capsys.readouterr().err
    assert main(['export', str(casia / '1001-c.gnt'), str(tmp_path / 'one'), '--names', 'code']) == 0
    assert json.loads((tmp_path / 'one' / 'export.json').read_text('utf-8'))['names'] == 'code'


@pytest.mark.parametrize('terminal', [True, False])
@pytest.mark.parametrize('command', ['info', 'export'])
def test_progress_goes_to_stderr(casia, tmp_path, capsys, monkeypatch, terminal, command):
    screen = io.StringIO()
    screen.isatty = lambda: terminal
    monkeypatch.setattr(sys, 'stderr', screen)
    clock = iter(range(0, 10**6, 11))
    monkeypatch.setattr(gnt_reader.time, 'monotonic', lambda: next(clock))
    assert main([command, str(casia), *([str(tmp_path / 'out')] if command == 'export' else [])]) == 0
    assert 'samples,' in screen.getvalue()
    assert screen.getvalue().endswith('\n')
    assert screen.getvalue().startswith('\r') == terminal
    assert 'a second' not in capsys.readouterr().out


def test_disk_full_is_one_line(casia, tmp_path, capsys, monkeypatch):
    def full(path, image):
        raise OSError(28, 'No space left on device', str(path))

    monkeypatch.setattr(gnt_reader, '_write_png', full)
    assert main(['export', str(casia), str(tmp_path / 'out')]) == 1
    assert capsys.readouterr().err.endswith('.png: No space left on device\n')


def test_sheet_command(casia, tmp_path, capsys):
    out = tmp_path / 'sheet.png'
    assert main(['sheet', str(casia), str(out), '--columns', '4', '--only', '鲍A']) == 0
    with Image.open(out) as image:
        assert image.size == (340, 108)  # four samples in one row
        assert len(set(image.tobytes())) > 10
    assert main(['sheet', str(casia), str(out), '--only', '扼']) == 1
    assert 'no such sample' in capsys.readouterr().err
    assert main(['sheet', str(casia), str(out), '--font', str(tmp_path / 'no.ttf')]) == 1
    assert main(['sheet', str(casia), str(out), '--only', '😀']) == 1
    assert 'no GNT tag code' in capsys.readouterr().err


def test_a_sheet_replaces_no_source(casia, capsys):
    sources = sorted(casia.iterdir())
    picture = casia / 'samples.png'
    write_gnt(picture, [('啊', image_of(5, 5))])  # content decides what a file is
    before = [path.read_bytes() for path in (*sources, picture)]
    with pytest.raises(SystemExit) as caught:
        main(['sheet', *map(str, sources)])  # without an OUT.png
    assert caught.value.code == 2
    assert "ends in .png, received '" in capsys.readouterr().err
    assert main(['sheet', str(sources[0]), str(picture), f'{casia}/../{casia.name}/{picture.name}']) == 1
    assert 'would be replaced' in capsys.readouterr().err
    assert [path.read_bytes() for path in (*sources, picture)] == before


def test_ctrl_c(casia, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(gnt_reader, 'index_gnt', interrupted)
    assert main(['info', str(casia)]) == 130
    assert 'Traceback' not in capsys.readouterr().err


def test_as_a_program_in_a_poor_terminal(casia):
    program = [sys.executable, gnt_reader.__file__, 'info', str(casia)]
    environment = {**os.environ, 'LANG': 'C', 'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONIOENCODING': 'ascii'}
    done = subprocess.run(program, env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b'')
    assert rb'1001 \u2026 1002' in done.stdout


def test_import_is_light():
    heavy = (
        'import sys, gnt_reader; print([m for m in ("tensorflow", "keras", "scipy", "matplotlib") if m in sys.modules])'
    )
    done = subprocess.run(
        [sys.executable, '-c', heavy], cwd=Path(gnt_reader.__file__).parent, capture_output=True, check=True
    )
    assert done.stdout.strip() == b'[]'


def test_record_is_a_tuple_in_the_published_order():
    assert GntRecord._fields == ('character', 'tag_code', 'image', 'offset')
