import os
import warnings
import zlib
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

import figures


@pytest.fixture(params=['a font', 'no font'])
def font(request, monkeypatch):
    if request.param == 'no font':
        monkeypatch.setattr(figures, 'cjk_font', lambda: None)
    return request.param


def rendered(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert('RGB'))


def test_answer_figure(tmp_path, font, character):
    ink = np.zeros((96, 96), np.uint8)
    ink[40:50, 10:80] = 255
    figure = figures.answer_figure(character, ink, np.linspace(-1, 1, 96 * 96).reshape(96, 96), '鲍')
    left, right = figure.axes
    assert left.get_title() == ('prediction: U+9C8D' if figures.cjk_font() is None else 'prediction: 鲍')
    assert right.get_title() == 'class activation map'
    figures.save(figure, tmp_path / 'a.png')
    assert rendered(tmp_path / 'a.png').shape == (400, 800, 3)
    assert [path.name for path in tmp_path.iterdir()] == ['a.png']


@pytest.mark.filterwarnings('error:Glyph')
def test_no_glyph_is_missing_in_a_title(tmp_path, font):
    figure = figures.overview_figure([(None, '鲍 99%', '鲍.png')])
    figures.save(figure, tmp_path / 'a.png')
    caption = figure.axes[0].texts[0].get_text()
    assert caption == ('鲍.png' if figures.cjk_font() else 'U+9C8D.png')


@pytest.mark.parametrize('count', [1, 3, 9, figures.OVERVIEW_SIZE])
def test_overview_shows_every_entry(count):
    entries = [(np.full((5, 5, 3), 200, np.uint8), f'{i}', f'{i}.png') for i in range(count)]
    figure = figures.overview_figure(entries)
    assert [axes.get_title() for axes in figure.axes[:count]] == [str(i) for i in range(count)]
    assert {axes.get_title() for axes in figure.axes[count:]} <= {''}


@pytest.mark.parametrize('name', ['a$^$.png', '$x$', '$', r'\frac{$}{_$'])
def test_names_are_no_formulas(tmp_path, character, name):
    figures.save(figures.overview_figure([(character, name, name)]), tmp_path / 'a.png')
    figures.save(figures.answer_figure(character, character, character / 255, name), tmp_path / 'b.png')
    assert (tmp_path / 'a.png').exists()
    assert (tmp_path / 'b.png').exists()


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize(
    ('name', 'caption'),
    [
        ('a' * 28, 'a' * 28),
        ('啊' * 14, '啊' * 14),
        ('a' * 251 + '.png', 'a' * 14 + '…' + 'a' * 9 + '.png'),
        ('啊' * 83 + '.png', '啊' * 7 + '…' + '啊' * 4 + '.png'),
    ],
    ids=['letters', 'characters', 'long letters', 'long characters'],
)
def test_a_long_name_leaves_room_for_the_pictures(tmp_path, monkeypatch, character, name, caption):
    monkeypatch.setattr(figures, 'shown', lambda text: text)
    monkeypatch.setattr(figures, 'cjk_font', lambda: None)
    figure = figures.overview_figure([(character, '1', name)] * 2)
    assert figure.axes[0].texts[0].get_text() == caption
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='Glyph')
        figures.save(figure, tmp_path / 'a.png')


@pytest.mark.parametrize('shape', [(512, 300, 3), (90, 512), (20, 30, 3)])
def test_an_overview_keeps_thumbnails(shape):
    figure = figures.overview_figure([(np.full(shape, 200, np.uint8), '1', '1.png')])
    (shown,) = figure.axes[0].get_images()
    assert max(shown.get_size()) == min(figures.THUMBNAIL, max(shape[:2]))


def test_a_font_without_the_characters_is_not_taken():
    from matplotlib import font_manager

    assert not figures._has_characters(font_manager.findfont('DejaVu Sans'))
    assert not figures._has_characters(__file__)
    last_resort = Path(matplotlib.get_data_path(), 'fonts', 'ttf', 'LastResortHE-Regular.ttf')
    assert not last_resort.exists() or not figures._has_characters(str(last_resort))


def test_windows_need_a_toolkit(monkeypatch):
    pyplot = pytest.importorskip('matplotlib.pyplot')
    before = pyplot.get_backend()
    pyplot.switch_backend('agg')
    try:
        assert not figures.can_show()
        assert not pyplot.get_fignums()
    finally:
        pyplot.switch_backend(before)


def test_save_leaves_the_old_file_where_it_fails(tmp_path):
    with pytest.raises(OSError):  # noqa: PT011 (the system's own words)
        figures.save(figures.overview_figure([(None, 'a', 'b')]), tmp_path / 'missing' / 'a.png')


def figure_of_ours(path):
    figures.save(figures.overview_figure([(None, 'a', 'b')]), path)


def picture_of_the_user(path):
    Image.new('L', (9, 9)).save(path)


def larger_picture_of_the_user(path):
    picture_of_the_user(path)
    content = bytearray(path.read_bytes())
    content[16:24] = (60_000).to_bytes(4, 'big') * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, 'big')
    path.write_bytes(content)


@pytest.mark.parametrize(
    ('name', 'make', 'is_ours', 'may_be_replaced'),
    [
        ('a.png', lambda path: None, False, True),
        ('a' * 300 + '.png', lambda path: None, False, True),  # `save` says that it is too long
        ('a.png', figure_of_ours, True, True),
        ('a.png', picture_of_the_user, False, False),
        ('a.png', larger_picture_of_the_user, False, False),
        ('a.png', lambda path: path.write_text('text'), False, False),
        ('a.png', lambda path: path.symlink_to('nowhere'), False, False),
        ('a.png', lambda path: path.mkdir(), False, False),
        pytest.param(
            *('a.png', lambda path: os.mkfifo(path), False, False),
            marks=pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='there are no pipes in folders'),
        ),
    ],
)
def test_only_figures_of_ours_are_replaced(tmp_path, name, make, is_ours, may_be_replaced):
    make(tmp_path / name)
    assert figures.is_figure(tmp_path / name) is is_ours
    assert figures.may_replace(tmp_path / name) is may_be_replaced


def test_a_name_that_is_too_long_is_said_to_be(tmp_path):
    with pytest.raises(OSError, match='name is too long'):
        figure_of_ours(tmp_path / ('a' * 300 + '.png'))
