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
