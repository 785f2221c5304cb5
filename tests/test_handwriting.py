"""What a training run relies on: samples of (seed, index) alone, honest labels, archives read as they come."""

import io
import json
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import handwriting
from data_utils import LABEL_INDEX, LABELS
from handwriting import DrawingOptions, Material, MaterialError, draw_input, sample, sample_batch

TRUSTED = DrawingOptions(splice=0.0, distort=0.0)
MEDIANS = {  # in hanzi-writer-data's box: y up, 900 at the top
    '一': [[[110, 400], [500, 420], [900, 400]]],
    '十': [[[110, 430], [900, 450]], [[500, 800], [500, 400], [500, 0]]],
    '口': [
        [[230, 584], [287, 517], [348, 152]],
        [[304, 569], [663, 608], [759, 559], [661, 273]],
        [[369, 185], [651, 238], [744, 224]],
    ],
}


def write_archive(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, 'w:gz') as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def hanzi_writer_data(folder: Path, characters: str = '一十口') -> Path:
    members = {
        f'package/{c}.json': json.dumps({'strokes': [], 'medians': MEDIANS[c], 'radStrokes': [0]}).encode()
        for c in characters
    }
    return write_archive(folder / 'hanzi-writer-data-2.0.1.tgz', members | {'package/package.json': b'{}'})


@pytest.fixture(scope='module')
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp('material')
    hanzi_writer_data(folder)
    return Material.load(folder)


@pytest.fixture
def glyph_material(material):
    """The same with one font: a cross for every class."""
    glyph = np.zeros((handwriting.GLYPH, handwriting.GLYPH), bool)
    glyph[10:118, 58:70] = glyph[58:70, 10:118] = True
    rows = np.full((len(LABELS), 1), 0, np.int32)
    return replace(
        material,
        sources=(*material.sources, 'a font'),
        entry=np.hstack([material.entry, rows]),
        count=np.hstack([material.count, rows]),
        glyphs=np.packbits(glyph)[None],
        skeletons=np.packbits(handwriting.skeleton(glyph))[None],
        weights=np.ones(2),
        ease=np.ones(2),
    )


@pytest.mark.parametrize('share', [1.0, 0.0, 0.5])
@pytest.mark.parametrize('size', [96, 48])
def test_samples_are_network_inputs(glyph_material, share, size):
    options = replace(TRUSTED, stroke_share=share)
    images, labels, trusted = sample_batch(glyph_material, 3, range(40), options, size)
    assert images.shape == (40, size, size)
    assert (images.dtype, labels.dtype, trusted.dtype) == (np.uint8, np.int32, bool)
    border = size * 4 // 96
    frame = np.ones((size, size), bool)
    frame[border:-border, border:-border] = False
    assert not images[:, frame].any()  # nothing is drawn on the border, and the paper is exactly 0
    ink = images.reshape(40, -1)
    assert (ink.max(axis=1) > 60).all()
    assert ((ink > 0).mean(axis=1) < 0.8).all()


def test_a_sample_depends_on_seed_and_index_alone(glyph_material):
    images, labels, trusted = sample_batch(glyph_material, 7, [5, 900, 123456])
    for k, index in reversed(list(enumerate([5, 900, 123456]))):
        image, label, trust = sample(glyph_material, 7, index)
        np.testing.assert_array_equal(image, images[k])
        assert (label, trust) == (labels[k], trusted[k])
    assert not np.array_equal(images[0], sample(glyph_material, 8, 5)[0])


def test_every_aligned_run_holds_each_class_once(material, glyph_material):
    assert {LABELS[index] for index in material.classes} == set(MEDIANS)
    runs = [sample_batch(material, 4, range(start, start + 3), TRUSTED)[1].tolist() for start in range(0, 30, 3)]
    assert all(set(run) == set(material.classes) for run in runs)
    assert len({tuple(run) for run in runs}) > 1
    assert len(glyph_material.classes) == len(LABELS)


@pytest.mark.parametrize(
    ('splice', 'distort', 'trusted'), [(0.0, 0.0, True), (1.0, 0.0, False), (0.0, 1.0, False), (1.0, 1.0, False)]
)
def test_what_only_a_teacher_can_read_is_not_trusted(glyph_material, splice, distort, trusted):
    options = DrawingOptions(splice=splice, distort=distort)
    images, _, trust = sample_batch(glyph_material, 1, range(20), options)
    assert set(trust.tolist()) == {trusted}
    assert images.reshape(20, -1).any(axis=1).all()


def test_splice_takes_a_part_of_each():
    joint = handwriting.splice(
        np.full((96, 96), 10, np.uint8), np.full((96, 96), 20, np.uint8), np.random.default_rng(0)
    )
    assert set(np.unique(joint)) == {10, 20}


def test_wilder_hands_vary_more(material):
    """The factor of the hand is what makes two writings of a character differ."""

    def spread(hand):
        options = replace(TRUSTED, hand=(hand, hand), side=(80, 80), ink=(250, 250), grain=0.0, skip=0.0)
        rngs = [np.random.default_rng(i) for i in range(30)]
        images = [draw_input(material, LABEL_INDEX['口'], rng, options)[0].astype(float) for rng in rngs]
        return np.std(images, axis=0).mean()

    assert spread(1.5) > 1.2 * spread(0.2)


def test_strokes_are_read_in_their_order(tmp_path):
    hanzi_writer_data(tmp_path)
    material = Material.load(tmp_path)
    row = LABEL_INDEX['十']
    assert material.count[row, 0] == 2
    first = material.lines[material.entry[row, 0]]
    assert first.shape == (handwriting.POINTS, 2)
    np.testing.assert_allclose(first[[0, -1]], [[110 / 1024, 470 / 1024], [900 / 1024, 450 / 1024]], atol=1e-6)
    assert material.entry[LABEL_INDEX['啊'], 0] == -1


def test_second_load_comes_from_the_cache(tmp_path, monkeypatch):
    hanzi_writer_data(tmp_path)
    before = Material.load(tmp_path)
    monkeypatch.setattr(handwriting, 'build_arrays', None)
    after = Material.load(tmp_path)
    for name in ('lines', 'hooks', 'radical', 'entry', 'count', 'glyphs', 'skeletons'):
        np.testing.assert_array_equal(getattr(before, name), getattr(after, name))
    assert sorted(p.name for p in tmp_path.iterdir()) == [handwriting.CACHE_NAME, 'hanzi-writer-data-2.0.1.tgz']


@pytest.mark.parametrize('damage', ['other archive', 'truncated', 'text', 'empty', 'npy'])
def test_a_stale_or_damaged_cache_is_built_anew(tmp_path, damage):
    archive = hanzi_writer_data(tmp_path, '一十')
    Material.load(tmp_path)
    cache = tmp_path / handwriting.CACHE_NAME
    content = cache.read_bytes()
    if damage == 'other archive':
        archive.unlink()
        hanzi_writer_data(tmp_path, '一十口')
    else:
        npy = io.BytesIO()
        np.save(npy, np.zeros(3))
        damaged = {'truncated': content[: len(content) // 2], 'text': b'not a zip', 'empty': b'', 'npy': npy.getvalue()}
        cache.write_bytes(damaged[damage])
    material = Material.load(tmp_path)
    assert (material.entry[LABEL_INDEX['口'], 0] >= 0) == (damage == 'other archive')
    assert material.count[LABEL_INDEX['十'], 0] == 2


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (None, 'no stroke data'),
        (b'', 'damaged'),
        (b'not an archive', 'damaged'),
        ('half', 'damaged'),
        ('json', 'package/一.json'),
    ],
)
def test_unusable_material_is_named(tmp_path, content, message):
    path = tmp_path / 'hanzi-writer-data-2.0.1.tgz'
    if content == 'half':
        whole = hanzi_writer_data(tmp_path).read_bytes()
        content = whole[: len(whole) // 2]
    if content == 'json':
        write_archive(path, {'package/一.json': b'{"medians": [[['})
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(MaterialError, match=message):
        Material.load(tmp_path)


@pytest.mark.parametrize('name', ['@fontsource/long-cang', 'fonts-seto'])
def test_a_damaged_font_is_named(tmp_path, name):
    hanzi_writer_data(tmp_path)
    package = next(package for package in handwriting.PACKAGES if package.name == name)
    data = write_archive(tmp_path / 'data.tar.gz', {'a/long-cang-400-normal.woff2': b'no font', 'a/setofont.ttf': b''})
    if package.registry == 'npm':
        path = data.rename(tmp_path / 'fontsource-long-cang-5.3.0.tgz')
    else:
        path = tmp_path / 'fonts-seto_1_all.deb'
        body = data.read_bytes()
        path.write_bytes(b'!<arch>\n' + b'data.tar.gz'.ljust(48) + str(len(body)).encode().ljust(10) + b'`\n' + body)
    with pytest.raises(MaterialError, match=rf'{path.name}: a font in it is damaged \(.+\). Delete it'):
        Material.load(tmp_path)


@pytest.mark.parametrize('suffix', ['.whl', '.tgz', '.tar.xz'])
def test_values_damaged_in_an_archive_are_named(tmp_path, suffix):
    content = np.random.default_rng(0).integers(0, 4, 300_000).astype(np.uint8).tobytes()
    path = tmp_path / f'some{suffix}'
    if suffix == '.whl':
        with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
            archive.writestr('a.json', content)
    else:
        with tarfile.open(path, 'w:gz' if suffix == '.tgz' else 'w:xz') as archive:
            info = tarfile.TarInfo('a.json')
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    whole = bytearray(path.read_bytes())
    middle = len(whole) // 2
    whole[middle : middle + 20_000] = bytes(255 - byte for byte in whole[middle : middle + 20_000])
    path.write_bytes(whole)
    with pytest.raises(MaterialError, match=rf'{path.name}: damaged archive'):
        list(handwriting.read_members(path, r'.*\.json'))


def test_missing_folder_says_what_to_do(tmp_path):
    with pytest.raises(MaterialError, match='--download'):
        Material.load(tmp_path / 'nowhere')


def test_extra_strokes_are_a_source_of_their_own(tmp_path):
    hanzi_writer_data(tmp_path)
    extra = tmp_path / 'mine.json'
    extra.write_text(json.dumps({'一': [[[[0, 50], [100, 40]]]], 'A': [[[[0, 0], [1, 1]]]]}), encoding='utf-8')
    material = Material.load(tmp_path, extra)
    assert material.sources == ('hanzi-writer-data', 'mine.json')
    assert material.entry[LABEL_INDEX['一']].tolist() == [material.entry[LABEL_INDEX['一'], 0], 6]
    assert material.entry[LABEL_INDEX['十'], 1] == -1
    extra.write_text('{"一": 3')
    with pytest.raises(MaterialError, match=r'mine\.json'):
        Material.load(tmp_path, extra)


def test_svg_paths():
    line = handwriting.svg_path('M10,20c0,10,10,10,20,10S50,40,60,30L70-5.5')
    np.testing.assert_allclose(line[[0, 8, 16, 17]], [[10, 20], [30, 30], [60, 30], [70, -5.5]])
    np.testing.assert_allclose(handwriting.svg_path('m1 2l3 4'), [[1, 2], [4, 6]])


def test_skeleton_is_one_pixel_wide_and_keeps_the_shape():
    glyph = np.zeros((40, 60), bool)
    glyph[15:24, 5:55] = True
    thin = handwriting.skeleton(glyph)
    assert thin.any(axis=0).sum() > 38
    assert thin.sum(axis=0).max() == 1
    assert not (thin & ~glyph).any()


def test_debian_archive_is_read(tmp_path):
    data = write_archive(tmp_path / 'data.tar.gz', {'./usr/share/fonts/some.ttf': b'font'}).read_bytes()
    parts = [(b'debian-binary', b'2.0\n'), (b'control.tar.gz', b'odd'), (b'data.tar.gz', data)]
    content = b'!<arch>\n'
    for name, body in parts:
        header = name.ljust(16) + b'0'.ljust(32) + str(len(body)).encode().ljust(10) + b'`\n'
        content += header + body + b'\n' * (len(body) % 2)
    path = tmp_path / 'fonts-some_1_all.deb'
    path.write_bytes(content)
    assert list(handwriting.read_members(path, r'.*\.ttf')) == [('./usr/share/fonts/some.ttf', b'font')]


def test_sheet_is_written(tmp_path, capsys):
    hanzi_writer_data(tmp_path)
    out = tmp_path / 'sheet.png'
    assert (
        handwriting.main([str(tmp_path), '--sheet', str(out), '--characters', '一口', '--columns', '5', '--seed', '2'])
        == 0
    )
    page = np.asarray(Image.open(out))
    assert page.shape == (2 * 96, 5 * 96)
    assert page[0, 0] == 255
    assert page.min() < 150
    assert str(out) in capsys.readouterr().out
    first = out.read_bytes()
    handwriting.main([str(tmp_path), '--sheet', str(out), '--characters', '一口', '--columns', '5', '--seed', '2'])
    assert out.read_bytes() == first


@pytest.mark.parametrize(
    ('arguments', 'status', 'message'),
    [
        (['nowhere', '--speed'], 1, 'no such folder'),
        (['.', '--sheet', 's.png', '--characters', 'A'], 1, 'not among'),
        (['.', '--sheet', 'nowhere/s.png', '--characters', '一'], 1, 'cannot be written'),
        (['.'], 2, 'nothing to do'),
        ([], 2, '--download'),
        (['.', '--speed', '--columns', '0'], 2, '--columns'),
        (['--download', 'afile'], 1, '--download takes a folder'),
        (['--download', 'afile/material'], 1, '--download takes a folder'),
        (['x\x1b[31m\n', '--sheet', 's.png'], 1, r'x\x1b[31m\n: no such folder'),
    ],
)
def test_command_line_errors_are_one_line(tmp_path, monkeypatch, capsys, arguments, status, message):
    hanzi_writer_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'afile').touch()
    try:
        result = handwriting.main(arguments)
    except SystemExit as stop:
        result = stop.code
    error = capsys.readouterr().err
    assert result == status
    assert message in error
    assert 'Traceback' not in error
    assert '\x1b' not in error


@pytest.mark.parametrize('arguments', [['.', '--sheet', 's.png'], ['--download', 'new']])
def test_without_opencv_nothing_is_begun(tmp_path, monkeypatch, capsys, arguments):
    hanzi_writer_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, 'cv2', None)
    assert handwriting.main(arguments) == 1
    assert capsys.readouterr().err == 'cv2 is not installed: pip install -r requirements-train.txt\n'
    assert [path.name for path in tmp_path.iterdir()] == ['hanzi-writer-data-2.0.1.tgz']


def test_download_says_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(handwriting.shutil, 'which', lambda _: None)
    assert handwriting.main(['--download', str(tmp_path / 'new')]) == 1
    captured = capsys.readouterr()
    assert 'npm is not installed' in captured.out
    assert 'no stroke data' in captured.err


def test_import_is_cheap():
    heavy = ('cv2', 'scipy', 'tensorflow', 'keras', 'matplotlib')
    code = f'import sys, handwriting; print([m for m in {heavy} if m in sys.modules])'
    root = Path(handwriting.__file__).parent
    done = subprocess.run([sys.executable, '-c', code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == '[]'
