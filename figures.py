"""Figures of answers: an image beside its class activation map, and the overview of a folder.

matplotlib takes a second to import, so it waits until the first figure is asked for.
"""

import functools
import os
import unicodedata
from bisect import bisect
from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path

import numpy as np
from PIL import Image

from data_utils import code_point, thumbnail, written_aside

# Fonts with all 3755 characters, commonest first; any other font that has them is found after these.
CJK_FONTS = [
    *('Noto Sans CJK SC', 'Noto Sans SC', 'Source Han Sans SC', 'Microsoft YaHei', 'SimHei', 'SimSun'),
    *('PingFang SC', 'Hiragino Sans GB', 'STHeiti', 'Songti SC', 'WenQuanYi Zen Hei', 'WenQuanYi Micro Hei'),
    *('Noto Sans CJK JP', 'Noto Serif CJK SC', 'Arial Unicode MS', 'LXGW WenKai', 'AR PL UMing CN', 'AR PL UKai CN'),
]

_OVERVIEW_COLUMNS = 8
OVERVIEW_SIZE = 12 * _OVERVIEW_COLUMNS
# No picture is larger in an overview, whose columns have 160 pixels.
THUMBNAIL = 128
# Letters in a caption; Chinese characters are as wide as two.
_CAPTION = 28

# Written into every figure, so that a later run knows which pictures it may replace.
_SOFTWARE = 'offline-hccr'


@functools.cache
def cjk_font():
    """Return a `matplotlib.font_manager.FontProperties` of a font with simplified Chinese, or None.

    Fonts known by name are tried first, then every font on the system.
    """
    from matplotlib import font_manager

    def rank(font) -> tuple[int, int]:
        known = CJK_FONTS.index(font.name) if font.name in CJK_FONTS else len(CJK_FONTS)
        # A family comes in weights from thin to black; the regular one is 400.
        return known, abs(font.weight - 400) if isinstance(font.weight, int) else 0

    fonts = sorted(font_manager.fontManager.ttflist, key=rank)
    tried = set()
    for font in fonts:
        if font.fname not in tried and _has_characters(font.fname):
            return font_manager.FontProperties(fname=font.fname)
        tried.add(font.fname)
    return None


def _has_characters(path: str, sample: str = '啊鲍龟座镊') -> bool:
    from matplotlib.ft2font import FT2Font

    try:
        glyphs = FT2Font(path).get_charmap()
    except (OSError, RuntimeError):  # an unreadable or broken font file
        return False
    # A font of last resort has one box for all of them.
    return len({glyphs.get(ord(character)) for character in sample} - {None}) == len(sample)


def shown(text: str) -> str:
    """Return a text as a figure can show it: itself, or with `U+9C8D` for a character that no font here has."""
    if cjk_font():
        return text
    return ''.join(character if character.isascii() else code_point(character) for character in text)


def answer_figure(image: np.ndarray, network_input: np.ndarray, activation_map: np.ndarray, character: str):
    """Draw the original's figure of one answer: the image, and what the network saw where.

    Args:
        image: uint8 array of shape `(height, width)` or `(height, width, 3)`.
        network_input: uint8 array of shape `(96, 96)`, ink bright on 0.
        activation_map: float array of shape `(96, 96)`.
        character: The answer.

    Returns:
        A `matplotlib.figure.Figure`, for `save` or `show`.
    """
    figure = _new_figure((8, 4))
    left, right = figure.subplots(1, 2)
    left.imshow(image, cmap='gray', vmin=0, vmax=255)
    # A name, a label may hold any character: what looks like TeX is none.
    left.set_title(f'prediction: {shown(character)}', font=cjk_font(), parse_math=False)
    right.imshow(network_input, cmap='gray', alpha=0.7)
    right.imshow(activation_map, cmap='jet', alpha=0.6)
    right.set_title('class activation map')
    for axes in (left, right):
        axes.set_axis_off()
    return figure


def overview_figure(entries: list[tuple[np.ndarray | None, str, str]]):
    """Draw the overview of a folder: thumbnail, character with confidence, and file name of each image.

    Args:
        entries: `(image, title, caption)` of at most `OVERVIEW_SIZE` images; the image is None where it could not be
            read.

    Returns:
        A `matplotlib.figure.Figure`, for `save` or `show`.
    """
    columns = min(_OVERVIEW_COLUMNS, len(entries))
    rows = -(-len(entries) // columns)
    figure = _new_figure((1.6 * columns, 2.0 * rows))
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, (image, title, caption) in zip(grid.flat, entries, strict=False):
        if image is not None:
            axes.imshow(thumbnail(image, THUMBNAIL), cmap='gray', vmin=0, vmax=255)
        axes.set_title(shown(title), font=cjk_font(), fontsize=12, parse_math=False)
        axes.text(
            *(0.5, -0.04, _shortened(shown(caption))),
            font=cjk_font(),
            fontsize=6,
            ha='center',
            va='top',
            transform=axes.transAxes,
            parse_math=False,
        )
    return figure


def _shortened(text: str) -> str:
    """Return a caption that fits below its picture: a long one without its middle."""
    widths = [2 if unicodedata.east_asian_width(character) in 'WF' else 1 for character in text]
    if sum(widths) <= _CAPTION:
        return text
    head = bisect(list(accumulate(widths)), _CAPTION / 2)
    tail = bisect(list(accumulate(reversed(widths))), _CAPTION / 2 - 1)
    return f'{text[:head]}…{text[-tail:]}'


def save(figure, path: Path) -> None:
    """Save a figure as PNG, written aside and renamed.

    Raises:
        OSError: If it cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    with written_aside(path) as aside:
        figure.savefig(aside, format='png', dpi=100, metadata={'Software': _SOFTWARE})


def is_figure(path: Path) -> bool:
    """Return whether this file is a figure that `save` wrote."""
    if not os.path.isfile(path):  # a pipe would be waited for
        return False
    try:
        with Image.open(path, formats=['PNG']) as picture:
            return picture.info.get('Software') == _SOFTWARE
    except Exception:  # no PNG, or a damaged one, of which Pillow raises nearly anything
        return False


def may_replace(path: Path) -> bool:
    """Return whether a figure may be saved here: where nothing is, or a figure that `save` wrote.

    Where nothing can be, because the name is too long for example, `save` says so.
    """
    return not os.path.lexists(path) or is_figure(path)


def can_show() -> bool:
    """Return whether matplotlib can open windows here, for which it needs a display and a toolkit, Tk for example."""
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(1, 1))
    try:
        return figure.canvas.required_interactive_framework is not None
    finally:
        pyplot.close(figure)


def show(figures: Iterable) -> None:
    """Show figures in windows, and return when the user has closed them."""
    from matplotlib import pyplot

    for figure in figures:
        # A figure made without pyplot gets its window from pyplot's manager.
        window = pyplot.figure(figsize=figure.get_size_inches())
        manager = window.canvas.manager
        manager.canvas.figure = figure
        figure.set_canvas(manager.canvas)
    pyplot.show()
    pyplot.close('all')


def _new_figure(inches: tuple[float, float]):
    from matplotlib.figure import Figure

    return Figure(figsize=inches, layout='constrained')
