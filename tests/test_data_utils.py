import contextlib
import io
import os
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import draw_character
from PIL import Image

import data_utils
from data_utils import (
    LABEL_INDEX,
    LABELS,
    ImageError,
    NoInkError,
    character_of,
    code_point,
    crop_to_ink,
    find_images,
    fit,
    gb_code,
    natural_key,
    network_input,
    open_image,
    otsu_threshold,
    printable,
    thumbnail,
    to_gray,
    whiten,
    written_aside,
)
from papers import PAPERS, grainy, lit, on_desk, on_page, ruled


def difference(first, second) -> float:
    """How far two network inputs are apart, whatever the strength of their ink: 0 the same, 2 nothing in common."""
    first, second = (image / image.mean() for image in (first.astype(float), second.astype(float)))
    return float(np.abs(first - second).mean())


# --- The classes


def test_label_table_is_the_published_one():
    assert len(LABELS) == len(set(LABELS)) == 3755
    # What is published about the order: its first character, its wrap at the end of level 1, and its last 27.
    assert LABELS[0] == '扼'
    assert LABELS[LABEL_INDEX['座'] + 1] == '啊'
    assert ''.join(LABELS[-27:]) == '垒寥恰峭窃死畏瑶惮董镀疙粳傈镊醛僳酞烃硒矽锗柞珐辊烩硷'
    assert {gb_code(character) >> 8 for character in LABELS} == set(range(0xB0, 0xD8))


@pytest.mark.parametrize(('character', 'code'), [('啊', 0xB0A1), ('座', 0xD7F9), ('扼', 46835), ('鲍', 0xB1AB)])
def test_gb_codes(character, code):
    assert gb_code(character) == code
    assert character_of(code) == character


@pytest.mark.parametrize('text', ['', '啊啊', 'A', '龥', '😀'])
def test_gb_code_refuses(text):
    with pytest.raises(ValueError, match='GB2312'):
        gb_code(text)


@pytest.mark.parametrize('code', [0xD7FA, 0x4100, 0xFFFF, 0, -1, 0x1B0A1])
def test_character_of_refuses(code):
    with pytest.raises(ValueError, match='GB2312'):
        character_of(code)


def test_code_point():
    assert code_point('鲍') == 'U+9C8D'


# --- Files


def test_natural_order():
    names = ['a10.png', 'A9.png', '鲍.png', 'a1.png', '2.png', 'b', '10.png']
    assert sorted(names, key=natural_key) == ['2.png', '10.png', 'a1.png', 'A9.png', 'a10.png', 'b', '鲍.png']


def test_natural_order_of_numbers_that_python_does_not_take():
    names = ['9' * 5000, '1' * 5000, '2']
    assert sorted(names, key=natural_key) == ['2', '1' * 5000, '9' * 5000]


def test_find_images(tmp_path):
    for name in ('10.PNG', '9.jpg', 'note.txt', '.hidden.png', 'deep/er/1.webp', '.git/x.png'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / 'deep' / 'loop').symlink_to(tmp_path)
    (tmp_path / 'broken.png').symlink_to(tmp_path / 'nowhere')

    found = [path.relative_to(tmp_path).as_posix() for path in find_images([tmp_path])]
    assert found == ['9.jpg', '10.PNG', 'broken.png', 'deep/er/1.webp']
    assert find_images([f'{tmp_path}/']) == find_images([tmp_path])
    assert [path.name for path in find_images([f'{tmp_path}/*.PNG'])] == ['10.PNG']
    # A file that is named is taken whatever its suffix, and nothing is taken twice.
    assert [path.name for path in find_images([tmp_path / 'note.txt', tmp_path / '9.jpg', tmp_path / '9.jpg'])] == [
        'note.txt',
        '9.jpg',
    ]


@pytest.mark.parametrize('target', ['nowhere', 'broken.png'])
def test_a_link_that_leads_nowhere_is_one_bad_file(tmp_path, target):
    (tmp_path / 'a.png').touch()
    link = tmp_path / 'broken.png'
    link.symlink_to(target)
    for source in (link, tmp_path / 'broken.*'):
        assert find_images([source]) == [link]
    for source in (tmp_path, tmp_path / '*.png', tmp_path / '**' / '*.png'):
        assert find_images([source]) == [tmp_path / 'a.png', link]
    with pytest.raises(ImageError, match='no such file'):
        open_image(link)


@pytest.mark.parametrize(
    ('pattern', 'found'),
    [
        ('**/*.png', ['1.png', 'deep/2.png', 'deep/er/3.png']),
        ('**/er/*.png', ['deep/er/3.png']),
        ('deep/**/*.png', ['deep/2.png', 'deep/er/3.png']),
        ('**/deep/**/3.*', ['deep/er/3.png']),
        ('d*/**', ['deep/2.png', 'deep/er/3.png', 'deep/er/note.txt']),
        ('**/deep', ['deep/2.png', 'deep/er/3.png']),
        ('**/.hidden/*.png', ['.hidden/4.png']),
    ],
)
def test_two_stars_stand_for_folders_but_not_for_links_to_them(tmp_path, monkeypatch, pattern, found):
    for name in ('1.png', 'deep/2.png', 'deep/er/3.png', 'deep/er/note.txt', '.hidden/4.png'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    # Two loops: there are more ways through them than anybody can go.
    (tmp_path / 'loop').symlink_to(tmp_path)
    (tmp_path / 'other').symlink_to(tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in find_images([tmp_path / pattern])] == found
    monkeypatch.chdir(tmp_path)
    assert [path.as_posix() for path in find_images([pattern])] == found


def test_find_images_expands_the_home_folder(tmp_path, monkeypatch):
    (tmp_path / 'a.png').touch()
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setenv('USERPROFILE', str(tmp_path))
    assert find_images(['~']) == [tmp_path / 'a.png']


def test_find_images_takes_brackets_in_names(tmp_path):
    (tmp_path / 'a[1].png').touch()
    assert find_images([tmp_path / 'a[1].png']) == [tmp_path / 'a[1].png']


def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / 'locked').mkdir()
    (tmp_path / 'a.png').touch()
    scandir = os.scandir

    def guarded(path):
        if os.fspath(path).endswith('locked'):
            raise PermissionError(13, 'Permission denied', os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, 'scandir', guarded)
    monkeypatch.setattr(os, 'access', lambda path, mode: not os.fspath(path).endswith('locked'))
    assert find_images([tmp_path]) == [tmp_path / 'a.png', tmp_path / 'locked']
    assert find_images([tmp_path / 'locked']) == [tmp_path / 'locked']
    with pytest.raises(ImageError, match=r'may not be read|no permission'):
        open_image(tmp_path / 'locked')


def test_find_images_of_nothing(tmp_path):
    assert find_images([tmp_path]) == []
    with pytest.raises(FileNotFoundError, match='nothing'):
        find_images([tmp_path / 'nothing'])
    with pytest.raises(FileNotFoundError, match='png'):
        find_images([tmp_path / '*.png'])


@pytest.mark.parametrize('source', ['~no-such-user/a.png', 'a' * 5000, 'a' * 5000 + '*', '/'.join('a' * 3000), 'a\0b'])
def test_find_images_in_places_that_cannot_be(source):
    with pytest.raises(FileNotFoundError, match='no such file or folder'):
        find_images([source])


def test_printable_escapes_what_steers_a_terminal():
    assert printable('a\x1b[31m\n鲍') == 'a\\x1b[31m\\n鲍'


def test_written_aside_keeps_the_old_file_on_failure(tmp_path):
    path = tmp_path / 'file.txt'
    path.write_text('old')

    def fail():
        with written_aside(path) as aside:
            aside.write_text('half of')
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == 'old'
    with written_aside(path) as aside:
        aside.write_text('new')
        assert path.read_text() == 'old'
    assert path.read_text() == 'new'
    assert os.listdir(tmp_path) == ['file.txt']


def test_processes_that_write_the_same_file_do_not_meet(tmp_path, monkeypatch):
    path = tmp_path / 'cache.npz'
    with written_aside(path, shared=True) as aside:
        aside.write_text('mine')
        monkeypatch.setattr('os.getpid', lambda: 1)
        with written_aside(path, shared=True) as other:
            assert other != aside
            other.write_text('theirs')
        assert path.read_text() == 'theirs'
    assert path.read_text() == 'mine'
    assert os.listdir(tmp_path) == ['cache.npz']


def test_written_aside_takes_the_longest_names(tmp_path):
    for name in ('啊' * 83 + '.txt', 'a' * 251 + '.txt'):
        with written_aside(tmp_path / name) as aside:
            aside.write_text('new')
            assert aside.suffix == '.txt'
        assert (tmp_path / name).read_text() == 'new'
    assert len(os.listdir(tmp_path)) == 2


FORMATS = ['png', 'jpg', 'bmp', 'gif', 'tif', 'webp', 'ppm']


@pytest.mark.parametrize('suffix', FORMATS)
def test_open_image_reads_every_format_whatever_its_suffix(tmp_path, character, suffix):
    right, wrong = tmp_path / f'a.{suffix.upper()}', tmp_path / 'a.txt'
    Image.fromarray(character).convert('RGB').save(right)
    wrong.write_bytes(right.read_bytes())
    for path in (right, wrong):
        image = open_image(path)
        assert image.shape == (100, 100, 3)
        assert image.dtype == np.uint8
        assert np.abs(image[..., 0].astype(int) - character).mean() < 3


MODES = ['1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'CMYK', 'I;16', 'I', 'F']


@pytest.mark.parametrize('mode', MODES)
def test_every_mode_gives_the_same_input(tmp_path, character, mode):
    path = tmp_path / 'a.tif'
    if mode in ('I;16', 'I', 'F'):
        kind = {'I;16': np.uint16, 'I': np.int32, 'F': np.float32}[mode]
        Image.fromarray((character.astype(float) * (257 if mode != 'F' else 1 / 255)).astype(kind)).save(path)
    else:
        Image.fromarray(character).convert(mode).save(path)
    assert Image.open(path).mode == mode
    assert difference(network_input(character), network_input(open_image(path))) < (0.4 if mode == '1' else 0.05)


def test_transparent_paper_is_white(tmp_path, character):
    ink = np.zeros((100, 100, 4), np.uint8)  # black ink on transparent black
    ink[..., 3] = 255 - character
    Image.fromarray(ink).save(tmp_path / 'a.png')
    assert difference(network_input(character), network_input(open_image(tmp_path / 'a.png'))) < 0.02

    palette = Image.fromarray(np.where(character < 128, 1, 0).astype(np.uint8), 'P')
    palette.putpalette([0, 0, 0, 10, 10, 10])
    palette.save(tmp_path / 'p.png', transparency=0)
    assert difference(network_input(character), network_input(open_image(tmp_path / 'p.png'))) < 0.4


@pytest.mark.parametrize('orientation', range(1, 9))
def test_exif_orientation_is_applied(tmp_path, character, orientation):
    turn = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}.get(orientation)  # what the camera did to the picture
    inverse = {0: 0, 1: 1, 2: 4, 3: 3, 4: 2, 5: 5, 6: 6}
    stored = Image.fromarray(character)
    if turn is not None:
        stored = stored.transpose(Image.Transpose(inverse[{0: 0, 3: 3, 1: 1, 5: 5, 2: 4, 6: 6, 4: 2}[turn]]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / 'a.png', exif=exif)
    assert np.array_equal(open_image(tmp_path / 'a.png')[..., 0], character)


@pytest.mark.parametrize('kind', ['PNG', 'WEBP', 'JPEG'])
@pytest.mark.parametrize('damage', ['no TIFF', 'cut in the head', 'cut in a tag', 'cut at the end'])
def test_damaged_exif_data_costs_no_picture(tmp_path, character, kind, damage):
    exif = Image.Exif()
    exif[0x010F], exif[0x829A] = 'a maker of cameras', 1.5
    whole = exif.tobytes()
    data = {
        'no TIFF': b'Exif\0\0this is no TIFF',
        'cut in the head': whole[:9],
        'cut in a tag': whole[:20],
        'cut at the end': whole[:-10],
    }[damage]
    Image.fromarray(character).convert('RGB').save(tmp_path / 'a', kind, exif=data, quality=95)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter('always')
        data_utils.expect_large_pictures()
        image = open_image(tmp_path / 'a')
    assert np.abs(image[..., 0].astype(int) - character).mean() < 3
    assert [str(warning.message) for warning in warned] == []


@pytest.mark.parametrize('suffix', ['gif', 'webp', 'tif'])
def test_the_first_frame_counts(tmp_path, character, suffix):
    frames = [Image.fromarray(character).convert('RGB'), Image.new('RGB', (100, 100), 'white')]
    frames[0].save(tmp_path / f'a.{suffix}', save_all=True, append_images=frames[1:], quality=95)
    assert difference(network_input(character), network_input(open_image(tmp_path / f'a.{suffix}'))) < 0.1


def bomb(side: int) -> bytes:
    """A PNG whose header promises side × side pixels."""
    header = struct.pack('>IIBBBBB', side, side, 8, 0, 0, 0, 0)
    chunks = ((b'IHDR', header), (b'IDAT', zlib.compress(bytes(1000))), (b'IEND', b''))
    parts = (
        struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b'\x89PNG\r\n\x1a\n' + b''.join(parts)


def header_bombs() -> dict[str, bytes]:
    """A few bytes of each format that promise gigabytes of pixels."""
    jpeg = io.BytesIO()
    Image.new('L', (8, 8)).save(jpeg, 'JPEG')
    jpeg = bytearray(jpeg.getvalue())
    sides = jpeg.index(b'\xff\xc0') + 5
    jpeg[sides : sides + 4] = struct.pack('>HH', 65000, 65000)
    tiff = io.BytesIO()
    Image.new('L', (7, 9)).save(tiff, 'TIFF')
    tiff = tiff.getvalue()
    for tag in (256, 257):  # ImageWidth, ImageLength
        found = tiff.index(struct.pack('<H', tag))
        tiff = tiff[: found + 2] + struct.pack('<HII', 4, 1, 60_000) + tiff[found + 12 :]
    return {
        'png': bomb(60_000),
        'gif': b'GIF89a' + struct.pack('<HHBBB', 65000, 65000, 0x80, 0, 0) + bytes(6) + b',' + bytes(20),
        'bmp': b'BM' + struct.pack('<IIIIiiHHIIiiII', 54, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0),
        'ppm': b'P6 60000 60000 255\n' + bytes(50),
        'jpg': bytes(jpeg),
        'tif': tiff,
    }


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='what a process takes is measured otherwise there')
def test_bombs_are_refused_before_they_take_memory(tmp_path):
    for suffix, content in header_bombs().items():
        (tmp_path / f'a.{suffix}').write_bytes(content)
    code = """if True:
        import resource, sys, data_utils
        from pathlib import Path
        data_utils.Image.init()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for path in sorted(Path(sys.argv[1]).iterdir()):
            for reduced in (False, True):
                try:
                    data_utils.open_image(path, reduced=reduced)
                except data_utils.ImageError as error:
                    print(path.name, str(error).split(':')[0])
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        print(grown * (1 if sys.platform == 'darwin' else 1024))
    """
    root = Path(data_utils.__file__).parent
    done = subprocess.run(
        [sys.executable, '-c', code, tmp_path], cwd=root, capture_output=True, text=True, check=True, timeout=60
    )
    *refused, grown = done.stdout.splitlines()
    expected = [f'a.{suffix} the image is too large to be one character' for suffix in sorted(header_bombs())]
    assert refused[::2] == refused[1::2] == expected
    assert int(grown) < 32e6


@pytest.mark.parametrize(
    ('content', 'reason'),
    [
        (b'', 'known format'),
        (b'some text', 'known format'),
        (b'\0\0\0\x18ftypheic\0\0\0\0', 'save it as JPEG'),
        (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n', 'known format'),
        (bomb(30_000), 'too large'),
        (bomb(100), 'damaged'),
        (None, 'no such file'),
        ('folder', 'folder'),
    ],
)
def test_what_is_no_image_is_named(tmp_path, content, reason):
    path = tmp_path / 'a.png'
    if content == 'folder':
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(ImageError, match=reason):
        open_image(path)


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='there are no pipes in folders')
def test_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / 'a.png')
    assert find_images([tmp_path]) == [tmp_path / 'a.png']
    for reduced in (False, True):
        with pytest.raises(ImageError, match='not a regular file'):
            open_image(tmp_path / 'a.png', reduced=reduced)


@pytest.mark.parametrize('name', ['a' * 300 + '.png', 'file/a.png'])
def test_a_name_that_no_file_can_have(tmp_path, name):
    (tmp_path / 'file').touch()
    with pytest.raises(ImageError, match='no such file'):
        open_image(tmp_path / name)


def test_a_truncated_image_is_damaged(tmp_path, character):
    whole = io.BytesIO()
    Image.fromarray(character).save(whole, 'PNG')
    (tmp_path / 'a.png').write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    with pytest.raises(ImageError, match='damaged'):
        open_image(tmp_path / 'a.png')


def photo(writing: np.ndarray, part: float) -> Image.Image:
    """A page of 3200 × 2400 pixels, lit from one side, of whose height the writing covers a part."""
    side = round(2400 * part)
    page = Image.new('L', (3200, 2400), 'white')
    page.paste(
        Image.fromarray(writing).resize((side, side), Image.Resampling.BICUBIC),
        ((3200 - side) * 3 // 5, (2400 - side) // 3),
    )
    return Image.fromarray(lit(np.asarray(page), 0.5)).convert('RGB')


@pytest.mark.parametrize(
    ('part', 'width'),
    [(0.8, 800), (0.2, 1600), (0.06, 3200), (0.03, 3200)],
)
def test_a_photo_is_opened_as_large_as_its_writing_needs(tmp_path, character, part, width):
    path = tmp_path / 'a.jpg'
    photo(character, part).save(path, quality=92)
    picture = open_image(path, reduced=True)
    assert picture.shape == (width * 3 // 4, width, 3)
    assert open_image(path).shape == (2400, 3200, 3)
    # However small it is: a second look, at the writing alone, is as fine as the file.
    assert difference(network_input(character), network_input(picture)) < 0.4


@pytest.mark.parametrize('mode', ['RGB', 'L', 'CMYK'])
def test_a_reduced_photo_is_turned_as_the_whole_one(tmp_path, character, mode):
    path = tmp_path / 'a.jpg'
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(character, 0.6).convert(mode).save(path, quality=92, exif=exif)
    whole, reduced = open_image(path), open_image(path, reduced=True)
    assert (whole.shape, reduced.shape) == ((3200, 2400, 3), (800, 600, 3))
    assert difference(network_input(whole), network_input(reduced)) < 0.15


@pytest.mark.parametrize('name', ['blank.jpg', 'small.jpg', 'large.png'])
def test_reduced_leaves_other_files_as_they_are(tmp_path, character, name):
    page = {
        'blank.jpg': Image.new('L', (3000, 2000), 'white'),
        'small.jpg': Image.fromarray(character),
        'large.png': photo(character, 0.8),
    }[name]
    page.save(tmp_path / name)
    assert np.array_equal(open_image(tmp_path / name, reduced=True), open_image(tmp_path / name))


def test_a_truncated_photo_is_damaged_reduced_too(tmp_path, character):
    whole = io.BytesIO()
    photo(character, 0.8).save(whole, 'JPEG')
    (tmp_path / 'a.jpg').write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    with pytest.raises(ImageError, match='damaged'):
        open_image(tmp_path / 'a.jpg', reduced=True)


@pytest.mark.parametrize('shape', [(30, 200), (200, 30, 3), (5, 5), (1, 1000)])
def test_a_thumbnail_is_never_larger_than_asked_for(shape):
    image = np.full(shape, 77, np.uint8)
    small = thumbnail(image, 50)
    assert small.shape[2:] == shape[2:]
    assert max(small.shape[:2]) == min(50, max(shape[:2]))
    assert (small == 77).all()


# --- Pages


def naive(image, window, reduce):
    """A filter of a window (rows and columns from, to) by its definition: the edges hold what there is of it."""
    height, width = image.shape
    (up, down), (left, right) = window, window
    return np.array(
        [
            [reduce(image[max(0, y - up) : y + down + 1, max(0, x - left) : x + right + 1]) for x in range(width)]
            for y in range(height)
        ]
    )


@pytest.mark.parametrize('shape', [(1, 1), (1, 9), (8, 3), (13, 17)])
@pytest.mark.parametrize('window', [(0, 0), (1, 1), (2, 3), (6, 5)])
def test_running_extremes_are_those_of_the_window(shape, window):
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    assert np.array_equal(data_utils._running(np.maximum, image, *window), naive(image, window, np.max))
    assert np.array_equal(data_utils._running(np.minimum, image, *window), naive(image, window, np.min))


def test_median_of_nine():
    image = np.random.default_rng(0).integers(0, 256, (11, 14), np.uint8)
    expected = naive(np.pad(image, 1, mode='edge'), (1, 1), np.median)[1:-1, 1:-1]
    assert np.array_equal(data_utils._median_of_nine(image), expected)


@pytest.mark.parametrize('fraction', [0, 0.3, 0.5, 0.95, 1])
@pytest.mark.parametrize('count', [1, 2, 10, 999])
def test_quantiles_of_a_histogram(fraction, count):
    values = np.random.default_rng(count).integers(0, 256, count, np.uint8)
    assert data_utils._quantile(data_utils._histogram(values), fraction) == pytest.approx(np.quantile(values, fraction))


def reached(mask, start):
    """The pixels that hang together with one of them, corners included, by walking."""
    found, waiting = {start}, [start]
    while waiting:
        y, x = waiting.pop()
        for place in ((y + down, x + right) for down in (-1, 0, 1) for right in (-1, 0, 1)):
            inside = 0 <= place[0] < mask.shape[0] and 0 <= place[1] < mask.shape[1]
            if inside and mask[place] and place not in found:
                found.add(place)
                waiting.append(place)
    return found


@pytest.mark.parametrize('share', [0.1, 0.4, 0.6])
def test_dust_is_what_hangs_together_and_has_next_to_nothing(share):
    rng = np.random.default_rng(1)
    ink = rng.random((24, 31)) < share
    darkness = np.where(ink, rng.integers(0, 2, ink.shape), 0).astype(np.uint8)
    darkness[3, 4] = 200 if ink[3, 4] else 0
    limit = data_utils._DUST * darkness.sum()
    expected = np.zeros_like(ink)
    left = set(zip(*np.nonzero(ink), strict=True))
    while left:
        blot = reached(ink, next(iter(left)))
        left -= blot
        rows, columns = zip(*blot, strict=True)
        expected[rows, columns] = darkness[rows, columns].sum() > limit
    assert np.array_equal(data_utils._without_dust(ink, darkness), expected)


def test_a_spiral_is_one_blot():
    spiral = np.zeros((61, 61), bool)
    for ring in range(0, 28, 4):
        spiral[ring, ring : 61 - ring] = spiral[60 - ring, ring : 61 - ring] = True
        spiral[ring : 61 - ring, ring] = spiral[ring : 61 - ring, 60 - ring] = True
        spiral[ring + 1 : ring + 4, ring] = False
        spiral[ring + 4, ring : ring + 4] = True
    darkness = np.zeros(spiral.shape, np.uint8)
    darkness[30, 30] = 1  # no part of it
    assert not data_utils._without_dust(spiral, darkness).any()
    darkness[spiral] = 1
    assert np.array_equal(data_utils._without_dust(spiral, darkness), spiral)


def test_large_colour_pictures_are_reduced_as_small_ones():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (707, 501, 3), np.uint8)
    assert image.size > data_utils._LARGE
    expected = np.asarray(Image.fromarray(image).reduce(5))
    assert np.abs(data_utils._reduced(image, 142).astype(int) - expected).max() <= 1


def test_otsu_parts_two_peaks_in_the_middle():
    assert otsu_threshold(np.array([40] * 10 + [150] * 90, np.uint8)) in (94, 95)
    assert otsu_threshold(np.full((3, 3), 7, np.uint8)) == 7


def test_a_clean_scan_is_left_as_it_is(character):
    assert np.abs(whiten(character).astype(int) - character).max() <= 5
    assert np.array_equal(whiten(character) == 255, character >= 250)


@pytest.mark.parametrize('paper', PAPERS)
def test_papers_give_the_input_of_the_plain_scan(character, paper):
    # Ink moved by half a pixel differs by 0.2; a wrong crop, a leftover line or inverted paper by 0.8 and more.
    assert difference(network_input(character), network_input(PAPERS[paper](character))) < 0.3


@pytest.mark.parametrize('turn', [0, 8, -25, 45])
@pytest.mark.parametrize('light', [lambda page: page, lit, grainy])
@pytest.mark.parametrize('scale', [1, 5])
def test_a_desk_around_the_sheet_is_left_out(character, turn, light, scale):
    page = np.asarray(Image.fromarray(on_page(character)).resize((230 * scale, 230 * scale)))
    white = np.asarray(Image.fromarray(page).rotate(turn, Image.Resampling.BICUBIC, expand=True, fillcolor=255))
    for desk in (on_desk(page, turn), on_desk(page, turn)[..., 0]):
        assert difference(network_input(white), network_input(light(desk))) < 0.4


@pytest.mark.parametrize('width', [3, 6, 10])
@pytest.mark.parametrize('side', [100, 300])
@pytest.mark.parametrize('inside', [True, False])
def test_strokes_around_paper_are_no_desk(monkeypatch, width, side, inside):
    """日 and 口, cut out tightly or with a margin, in dark ink or in light."""
    width = width * side // 100
    box = np.zeros((side, side), np.uint8)
    box[width:-width, width:-width] = 255
    if inside:
        middle = (side - width) // 2
        box[middle : middle + width] = 0
    boxes = [np.pad(box, margin, constant_values=255) for margin in (0, 1, side // 12, side // 3)]
    # Wide strokes of 日 that touch the frame cannot be told from a desk.
    boxes = boxes[inside and side == 300 and width * 100 > 6 * side :]
    pages = [page for box in boxes for page in (box, 255 - box)]
    before = [network_input(page) for page in pages]
    monkeypatch.setattr(data_utils, '_sheet', lambda page: None)
    for page, expected in zip(pages, before, strict=True):
        np.testing.assert_array_equal(network_input(page), expected)


def test_red_ink_on_blue_lines(character):
    page = on_page(character)
    red = np.stack([np.maximum(page, 200), page, page], axis=-1)
    page = np.minimum(red, ruled(np.full_like(page, 255), (150, 180, 235)))
    assert difference(network_input(character), network_input(page)) < 0.3


def test_lines_that_a_hand_draws_stay():
    three = np.full((300, 300), 255, np.uint8)
    for row in (40, 150, 270):
        three[row : row + 12, 20:280] = 30
    assert np.array_equal(whiten(three) < 255, three < 255)


@pytest.mark.parametrize('shape', [(20, 96), (96, 20), (12, 96)])
def test_tight_crops_of_one_stroke(shape):
    bar = np.full(shape, 255, np.uint8)
    bar[2:-2, 2:-2] = np.random.default_rng(0).integers(20, 90, (shape[0] - 4, shape[1] - 4))
    assert not data_utils.is_dark_paper(bar)


EMPTY = {
    'white': np.full((50, 50), 255, np.uint8),
    'black': np.zeros((50, 50), np.uint8),
    'gray': np.full((300, 200, 3), 130, np.uint8),
    'one pixel': np.full((1, 1), 77, np.uint8),
    'one row': np.full((1, 200), 255, np.uint8),
    'no pixel': np.zeros((0, 0), np.uint8),
    'grain alone': grainy(np.full((200, 200), 255, np.uint8)),
    'a slope of light alone': lit(np.full((200, 200), 255, np.uint8)),
}


@pytest.mark.parametrize('page', EMPTY)
def test_an_empty_page_is_said_to_be_empty(page):
    with pytest.raises(NoInkError):
        network_input(EMPTY[page])


@pytest.mark.parametrize('shape', [(1, 40), (40, 1), (2, 2), (3, 1000), (1000, 3)])
def test_odd_shapes_give_an_input_or_no_ink(shape):
    page = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    with contextlib.suppress(NoInkError):
        assert network_input(page).shape == (96, 96)


def test_a_tiny_glyph_on_a_huge_page():
    tiny = draw_character(40)
    page = np.full((3000, 4000), 255, np.uint8)
    page[2900:2940, 30:70] = tiny
    assert difference(network_input(tiny), network_input(page)) < 0.3


def test_dots_all_over_are_no_writing():
    dots = np.full((600, 600), 255, np.uint8)
    dots[5::20, 5::20] = 0
    with pytest.raises(NoInkError):
        network_input(dots)


@pytest.mark.parametrize('part', [0.6, 0.06, 0.025])
def test_a_dark_corner_does_not_hide_a_small_character(character, part):
    # At first sight the corner is writing too; then the picture is looked at again, closer.
    assert difference(network_input(character), network_input(np.asarray(photo(character, part)))) < 0.4


def test_scipy_is_not_needed(character):
    code = (
        'import sys; sys.modules["scipy"] = None\n'
        'import numpy as np, data_utils, papers\n'
        'ink = np.full((90, 90), 255, np.uint8); ink[20:70, 40:48] = ink[40:46, 10:80] = 30\n'
        'print([data_utils.network_input(paper(ink)).shape for paper in papers.PAPERS.values()])'
    )
    done = subprocess.run(
        [sys.executable, '-c', code], cwd=Path(data_utils.__file__).parent, capture_output=True, text=True
    )
    assert done.stdout.count('(96, 96)') == len(PAPERS), done.stderr


def test_arguments_are_not_changed(character):
    page = PAPERS['black grid'](character)
    before = page.copy()
    network_input(page)
    assert np.array_equal(page, before)


@pytest.mark.parametrize('mode', ['L', '1', 'I;16'])
def test_gray_files_cost_no_channels(tmp_path, mode):
    page = np.full((300, 260), 255, np.uint8)
    page[100:200, 120:140] = 0
    Image.fromarray(page).convert('I' if mode == 'I;16' else mode).convert(mode).save(tmp_path / 'page.png')
    picture = open_image(tmp_path / 'page.png')
    assert picture.shape == (300, 260, 3)
    assert picture.strides[2] == 0
    assert np.array_equal(picture[..., 1], page)
    for crop in (True, False):
        assert np.array_equal(network_input(picture, crop), network_input(np.ascontiguousarray(picture), crop))


def test_to_gray_is_the_luma_where_colour_says_nothing(character):
    rgb = np.repeat(character[..., None], 3, axis=2)
    assert np.array_equal(to_gray(rgb), character)
    assert to_gray(character) is character


def test_crop_to_ink():
    page = np.full((9, 7), 255, np.uint8)
    page[3, 2], page[5, 4] = 0, 254
    assert crop_to_ink(page).shape == (3, 3)
    with pytest.raises(NoInkError):
        crop_to_ink(np.full((4, 4), 255, np.uint8))


@pytest.mark.parametrize(
    ('shape', 'size'), [((10, 10), 96), ((10, 31), 96), ((300, 7), 96), ((50, 50), 48), ((9, 9), 64)]
)
def test_fit_centres_inverts_and_leaves_the_border(shape, size):
    result = fit(np.zeros(shape, np.uint8), size)
    border = round(size * 4 / 96)
    assert result.shape == (size, size)
    assert result.dtype == np.uint8
    assert not result[:border].any()
    assert not result[-border:].any()
    assert not result[:, :border].any()
    assert not result[:, -border:].any()
    assert result.max() > 200
    rows, columns = np.flatnonzero(result.any(axis=1)), np.flatnonzero(result.any(axis=0))
    for places, side in ((rows, shape[0]), (columns, shape[1])):
        assert abs(len(places) - (size - 2 * border) * side / max(shape)) <= 3
        assert abs(places[0] - (size - 1 - places[-1])) <= 3


@pytest.mark.parametrize('shape', [(1, 3_000_000), (3_000_000, 2)])
def test_fit_takes_no_square_of_the_longer_side(shape):
    result = fit(np.zeros(shape, np.uint8))  # a square would be nine terabytes
    lengthwise = result if shape[0] < shape[1] else result.T
    assert lengthwise[46:50, 4:92].any(axis=0).all()
    assert not lengthwise[:46].any()
    assert not lengthwise[50:].any()


@pytest.mark.parametrize('shape', [(900, 700), (1000, 1000), (60, 999), (801, 333)])
def test_fit_of_a_reduced_page_is_that_of_the_page(shape, character, monkeypatch):
    page = np.array(Image.fromarray(character).resize(shape[::-1]))
    whole = fit(page)
    monkeypatch.setattr(data_utils, '_LONGEST', 400)
    assert np.abs(fit(page).astype(int) - whole).mean() < 1


def test_whole_page_is_the_original_way(character):
    page = on_page(character)
    kept = network_input(page, crop=False)
    # The page is not cropped: the character covers what it covers of the page.
    rows = np.flatnonzero(kept.any(axis=1))
    assert abs(len(rows) - 88 * 91 / 240) < 4
    assert difference(kept, network_input(255 - page, crop=False)) < 0.1
    with pytest.raises(NoInkError):
        network_input(np.full((9, 9), 3, np.uint8), crop=False)
