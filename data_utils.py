"""Image files → what the network reads, as pure functions, and the table of its 3755 classes.

    file → gray page → white page → tight crop → 96×96, ink bright on 0

Every image that a user gives, every GNT record and every drawn sample passes through the last two steps here, so that
the network sees one kind of picture. No function keeps state, and none changes its argument.
"""

import contextlib
import glob
import math
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

# --- The classes -----------------------------------------------------------------------------------------------------

# The published weights number the characters by their first appearance in the files of HWDB1.0, whose first writer
# begins at 扼. These 27 were missing there or came later; HWDB1.0 lacks the last 15 altogether.
_LATE = '垒寥恰峭窃死畏瑶惮董镀疙粳傈镊醛僳酞烃硒矽锗柞珐辊烩硷'


def _published_order() -> tuple[str, ...]:
    # Level 1 of GB2312-80: rows 16 to 55 of 94 characters, the last row ends five short.
    level_1 = [bytes((0xB0 + i // 94, 0xA1 + i % 94)).decode('gb2312') for i in range(3755)]
    start = level_1.index('扼')
    return (*(c for c in level_1[start:] + level_1[:start] if c not in _LATE), *_LATE)


LABELS: tuple[str, ...] = _published_order()
"""The 3755 characters of GB2312-80 level 1 in the class order of the published weights: index → character."""

LABEL_INDEX: dict[str, int] = {character: index for index, character in enumerate(LABELS)}
"""The inverse of `LABELS`: character → class index."""


def gb_code(character: str) -> int:
    """Return the GB2312-80 code of a character: its two bytes as a big-endian number.

    Args:
        character: One character, for example `'啊'`.

    Returns:
        An integer from 0xA1A1 to 0xF7FE; 啊 is 0xB0A1.

    Raises:
        ValueError: If this is not one character of GB2312-80.
    """
    try:
        code = character.encode('gb2312') if len(character) == 1 else b''
    except UnicodeEncodeError:
        code = b''
    if len(code) != 2:
        raise ValueError(f'not a character of GB2312-80: {character!r}')
    return int.from_bytes(code, 'big')


def character_of(code: int) -> str:
    """Return the character of a GB2312-80 code, the inverse of `gb_code`.

    Args:
        code: Two bytes as a big-endian number, 0xB0A1 for 啊.

    Returns:
        One character.

    Raises:
        ValueError: If GB2312-80 has no character there.
    """
    try:
        character = code.to_bytes(2, 'big').decode('gb2312')
    except (OverflowError, UnicodeDecodeError):
        character = ''
    if len(character) != 1:
        raise ValueError(f'not a code of GB2312-80: {code:#06x}')
    return character


def code_point(character: str) -> str:
    """Return the Unicode code point as it is usually written, `'U+9C8D'` for 鲍."""
    return f'U+{ord(character):04X}'


# --- Files -----------------------------------------------------------------------------------------------------------

# What Pillow may open here: nothing that starts another program (EPS) or that needs a plug-in.
FORMATS = ('PNG', 'JPEG', 'BMP', 'GIF', 'TIFF', 'WEBP', 'PPM')
SUFFIXES = frozenset(
    '.png .jpg .jpeg .jpe .jfif .bmp .dib .gif .tif .tiff .webp .pgm .ppm .pbm .pnm'.split()  # noqa: SIM905
)


class ImageError(ValueError):
    """An image that cannot be read or recognised. Its text says why and what to do next."""


class NoInkError(ImageError):
    """A page on which nothing is written."""


def printable(text) -> str:
    """Return a text with control characters escaped, so that a file name cannot steer the terminal."""
    return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in str(text))


@contextlib.contextmanager
def written_aside(path: str | os.PathLike) -> Iterator[Path]:
    """Write a file so that nobody ever sees half of it: give a path beside it, and rename that at the end.

    Whatever goes wrong meanwhile, an older file stays as it was, and nothing is left lying about. Where the process is
    killed, what lies about is written over the next time.

    Args:
        path: Where the file is to be. Its folder exists.

    Yields:
        The path to write to, with the same suffix.
    """
    path = Path(path)
    aside = path.with_name(f'.{path.stem}.part{path.suffix}')
    try:
        yield aside
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def natural_key(path) -> list:
    """Sort key that puts `9.png` before `10.png` and ignores case."""
    parts = re.split(r'(\d+)', str(path).casefold())
    return [(int(part), '') if part.isdecimal() else (math.inf, part) for part in parts]


def find_images(sources: Iterable[str | os.PathLike]) -> list[Path]:
    """Return the image files that files, folders and glob patterns name.

    A folder gives every file below it whose suffix is one of an image (in any case), hidden ones left out. A file that
    is named itself is taken whatever its suffix, since the content decides. Links to folders are not followed inside a
    folder, so that a loop of links cannot hold the program.

    Args:
        sources: Paths or patterns such as `scans/*.png`; `~` stands for the home folder.

    Returns:
        Paths, each once: the sources in the given order, the files of each in natural order.

    Raises:
        FileNotFoundError: If a source does not exist, with its name. An empty folder is no error.
    """
    found: dict[Path, None] = {}
    for source in sources:
        path = Path(source).expanduser()
        if path.is_dir():
            files = sorted(_images_below(path), key=natural_key)
        elif path.exists():
            files = [path]
        else:
            # include_hidden stays off: a pattern means the same as a folder.
            files = [Path(name) for name in sorted(glob.glob(str(path), recursive=True), key=natural_key)]
            files = [file for name in files for file in ([name] if name.is_file() else find_images([name]))]
            if not files:
                raise FileNotFoundError(f'no such file or folder: {source}')
        found.update(dict.fromkeys(files))
    return list(found)


def _images_below(folder: Path) -> Iterator[Path]:
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith('.')]
        for name in names:
            if not name.startswith('.') and Path(name).suffix.lower() in SUFFIXES:
                yield Path(root, name)


def open_image(path: str | os.PathLike) -> np.ndarray:
    """Open an image file as RGB, as it is meant to be looked at.

    The content decides on the format, never the suffix. The EXIF orientation is applied, transparent parts show white
    paper, 16 and 32 bits are scaled to 8, and of an animation the first frame is taken.

    Args:
        path: A PNG, JPEG, BMP, GIF, TIFF, WebP or PNM file.

    Returns:
        uint8 array of shape `(height, width, 3)`, values 0..255.

    Raises:
        ImageError: If the file cannot be read, is no image, is damaged, or has more than
            `PIL.Image.MAX_IMAGE_PIXELS` pixels, 89 million, as decompression bombs do.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise Image.DecompressionBombError  # Pillow itself refuses twice that, and warns meanwhile
            return _to_rgb(image)
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError('the image is too large to be one character: crop or scale it first') from error
    except FileNotFoundError as error:
        raise ImageError('no such file') from error
    except IsADirectoryError as error:
        raise ImageError('this is a folder') from error
    except PermissionError as error:
        raise ImageError('no permission to read the file') from error
    except Image.UnidentifiedImageError as error:
        raise ImageError(f'not an image in a known format ({", ".join(FORMATS)})') from error
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged data
        raise ImageError(f'damaged image: {str(error) or type(error).__name__}') from error


def _to_rgb(image: Image.Image) -> np.ndarray:
    image.seek(0)
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith('I') or image.mode == 'F':
        return np.repeat(_eight_bits(np.asarray(image))[..., None], 3, axis=2)
    if 'A' in image.mode or 'a' in image.mode or 'transparency' in image.info:
        image = image.convert('RGBA')
        page = Image.new('RGBA', image.size, 'white')
        image = Image.alpha_composite(page, image)
    return np.array(image.convert('RGB'))


def _eight_bits(values: np.ndarray) -> np.ndarray:
    if values.size == 0 or values.min() < 0:
        raise ImageError('the image is empty or has negative values')
    # The smallest usual full scale that holds the values: a picture of 0..1, of 8 or of 16 bits.
    scales = (1, 255, 65535) if values.dtype.kind == 'f' else (255, 65535)
    values = np.nan_to_num(values.astype(np.float32))
    full = next((scale for scale in scales if values.max() <= scale), values.max())
    return np.round(values * (255 / full)).astype(np.uint8)


# --- Pages -----------------------------------------------------------------------------------------------------------

# Sides, in pixels, of the copies on which a page is judged and its light is estimated, and of the writing when it is
# cleaned: four times the 88 pixels that the network gets, so that nothing is lost which it could see.
_LIGHT_SIDE = 128
_INK_SIDE = 352

# The window, as a fraction of the longer side, in which some paper is expected to show: wider than a pen stroke, and
# small enough to follow the edge of a shadow.
_PAPER_WINDOW = 0.2

# Paper above this level is white already: such a page is a clean scan, and its gray levels mean what they say.
_WHITE_PAPER = 250

# Ink stands out from its paper by at least this many of 255 levels, and by this many times the spread of the paper.
_MIN_CONTRAST = 24
_MIN_CONTRAST_SPREAD = 5

# Writing of less contrast than this is darkened to it: the faintest pencil that networks learn from.
_FAINT_CONTRAST = 110

# On a page that is no clean scan, what has less than this part of the ink's contrast counts as paper.
_SOFT_EDGE = 0.15

# Printed lines are looked for on pages of at least this many pixels; CASIA's tight crops are smaller.
_RULED_PAGE = 140

# A blot that has less than this part of all ink is dust; the smallest dot of a character has several times more.
_DUST = 0.004


def otsu_threshold(gray: np.ndarray) -> int:
    """Return the gray level that best parts an image into dark and light.

    It maximises the variance between the two classes (N. Otsu, "A threshold selection method from gray-level
    histograms", IEEE Trans. SMC 9, 1979).

    Args:
        gray: uint8 array of any shape but an empty one.

    Returns:
        `t` in 0..255; values `<= t` are the dark class. An image of a single value gives that value.
    """
    histogram = np.bincount(gray.ravel(), minlength=256).astype(np.float64)
    dark = np.cumsum(histogram)
    dark_sum = np.cumsum(histogram * np.arange(256))
    light = dark[-1] - dark
    with np.errstate(divide='ignore', invalid='ignore'):
        between = (dark_sum[-1] * dark - dark_sum * dark[-1]) ** 2 / (dark * light)
    between = np.nan_to_num(between, nan=0.0, posinf=0.0)
    if not between.any():
        return int(gray.flat[0])
    # The measure is flat between two peaks: its middle leaves the same room on both sides.
    return int(np.flatnonzero(between >= between.max() * (1 - 1e-9)).mean())


def to_gray(image: np.ndarray) -> np.ndarray:
    """Return the gray image in which the writing stands out best.

    That is the luma 0.299 R + 0.587 G + 0.114 B of ITU-R BT.601, as in the original, unless one colour channel parts
    ink from everything else clearly better: the red lines of ruled paper vanish in the red channel, blue ones in the
    blue.

    Args:
        image: uint8 array of shape `(height, width, 3)`, or `(height, width)` which is returned as it is.

    Returns:
        uint8 array of shape `(height, width)`.
    """
    if image.ndim == 2:
        return image
    luma = np.asarray(Image.fromarray(image).convert('L'))
    small = _reduced(image, 2 * _LIGHT_SIDE)
    if np.ptp(small, axis=2).max() < 40:  # no colour to speak of
        return luma
    small_luma = _reduced(luma, 2 * _LIGHT_SIDE)
    dark_paper = is_dark_paper(small_luma)
    views = [small_luma, *np.moveaxis(small, 2, 0)]
    contrasts = np.stack([255 - _flatten(view, dark_paper)[0] for view in views])
    marks = contrasts.max(axis=0) > 2 * _MIN_CONTRAST
    if not marks.any():
        return luma
    contrasts = contrasts[:, marks]
    full = np.percentile(contrasts, 95, axis=1, keepdims=True)
    # 1 where every mark is as dark as ink or as light as paper, 0 where all are in between.
    decided = np.abs(2 * np.minimum(contrasts / np.maximum(full, 1), 1) - 1).mean(axis=1)
    decided[full[:, 0] < 0.6 * full[0, 0]] = 0
    best = int(decided.argmax())
    return luma if decided[best] < decided[0] + 0.1 else image[..., best - 1]


def _reduced(image: np.ndarray, side: int) -> np.ndarray:
    """Average blocks of pixels so that the longer side has at most `side`."""
    factor = -(-max(image.shape[:2]) // side)
    if factor <= 1:
        return image
    height, width = image.shape[:2]
    return np.asarray(Image.fromarray(image).reduce((min(factor, width), min(factor, height))))


def paper_level(gray: np.ndarray) -> np.ndarray:
    """Estimate the brightness of the bare paper at every pixel of a page with dark ink.

    A gray-scale closing fills everything dark that is narrower than its window, and leaves the slope of the light and
    the edge of a shadow where they are. It works on a small copy, since light changes slowly.

    Args:
        gray: uint8 array of shape `(height, width)`, light paper.

    Returns:
        float32 array of the same shape, values 1..255.
    """
    from scipy import ndimage

    small = _reduced(gray, _LIGHT_SIDE)
    window = max(3, round(max(small.shape) * _PAPER_WINDOW))
    closed = ndimage.grey_closing(small, size=(window, window), mode='nearest')
    # Beside the edge of a shadow rather too dark than too light: that edge would look like ink.
    closed = ndimage.minimum_filter(closed, 3, mode='nearest')
    level = Image.fromarray(closed.astype(np.float32)).resize(gray.shape[::-1], Image.Resampling.BILINEAR)
    return np.maximum(np.asarray(level), 1)


def _flatten(gray: np.ndarray, dark_paper: bool) -> tuple[np.ndarray, bool]:
    """Even out the light of a page.

    Args:
        gray: uint8 array of shape `(height, width)`.
        dark_paper: See `is_dark_paper`.

    Returns:
        uint8 array of the same shape, paper near 255, ink darker; and whether the paper was white all over.
    """
    page = 255 - gray if dark_paper else gray
    paper = paper_level(page)
    # Dark ink takes the same part of any light. Light ink adds to the little that dark paper gives back, and a ratio of
    # two dark levels would be noise.
    flat = 255 - (paper - page) if dark_paper else page * (255 / paper)
    flat = np.where(paper - page < _MIN_CONTRAST / 2, np.maximum(flat, 255 - _MIN_CONTRAST), flat)
    return np.clip(flat, 0, 255).astype(np.uint8), bool(paper.min() >= _WHITE_PAPER)


def is_dark_paper(gray: np.ndarray) -> bool:
    """Tell whether a page is light ink on dark paper.

    Paper is what there is more of: the original counts the pixels on both sides of Otsu's threshold. Under uneven light
    a shadow would count as ink, so there the count is one of local differences: of what is darker than its surroundings
    against what is lighter, which is the sign of their skewness.

    Args:
        gray: uint8 array of shape `(height, width)`.
    """
    from scipy import ndimage

    small = _reduced(gray, _LIGHT_SIDE)
    white, black = np.mean(small >= _WHITE_PAPER), np.mean(small <= 255 - _WHITE_PAPER)
    if max(white, black) > 0.25:  # a clean scan or drawing: its paper is quite white or quite black
        return bool(black > white)
    values = small.astype(np.float32)
    difference = values - ndimage.gaussian_filter(values, max(small.shape) * _PAPER_WINDOW / 2, mode='nearest')
    return bool((difference**3).sum() > 0)


def whiten(gray: np.ndarray) -> np.ndarray:
    """Make the paper of a page white and leave the gray levels of the ink.

    Dark paper is inverted; uneven light, shadows and coloured paper are divided out; the grain of the paper turns
    white; faint writing is darkened; dust, printed lines and what is much fainter than the writing go. A clean scan,
    such as a CASIA sample, comes out as it went in but for its dust.

    Args:
        gray: uint8 array of shape `(height, width)`, light or dark paper.

    Returns:
        uint8 array of the same shape, paper exactly 255, ink below.

    Raises:
        NoInkError: If nothing stands out from the paper.
    """
    from scipy import ndimage

    if not gray.size:
        raise NoInkError('the image is empty')
    flat, clean_scan = _flatten(gray, is_dark_paper(gray))
    level, spread = (255, 0) if clean_scan else _paper_statistics(flat)
    if spread > 2:
        flat = ndimage.median_filter(flat, 3, mode='nearest')
        level, spread = _paper_statistics(flat)

    marks = flat <= min(otsu_threshold(flat), level - max(_MIN_CONTRAST, _MIN_CONTRAST_SPREAD * spread))
    strong = _without_lines(marks)
    if not strong.any():
        raise NoInkError('nothing is written on it, or it is too faint: use a darker pen or more light')

    # The soft edges of the strokes are lighter than the threshold: ink is what hangs together with strong ink.
    contrast = level - float(np.median(flat[strong]))
    white = _WHITE_PAPER if clean_scan else level - max(3 * spread, _SOFT_EDGE * contrast)
    ink = flat < white
    near = ndimage.binary_dilation(strong, iterations=max(1, round(max(gray.shape) / 100)))
    if np.count_nonzero(ink & ~near) > 0.3 * np.count_nonzero(strong):
        ink &= near  # something else is there that is fainter than the writing: printed lines, the other side
    if np.count_nonzero(marks) > np.count_nonzero(strong):
        ink &= strong | ~ndimage.binary_dilation(marks & ~strong)  # the lines go with their soft edges
    blots, count = ndimage.label(ink, structure=np.ones((3, 3)))
    darkness = ndimage.sum_labels(np.where(strong, 255.0 - flat, 0), blots, np.arange(count + 1))
    darkness[0] = 0
    ink = (darkness > _DUST * darkness.sum())[blots]

    gain = 255 / white * max(1.0, _FAINT_CONTRAST / contrast)
    darkened = np.clip(255 - (white - flat.astype(np.float32)) * gain, 0, 254)
    return np.where(ink, darkened, 255).astype(np.uint8)


def _paper_statistics(flat: np.ndarray) -> tuple[float, float]:
    """Return the level of the paper and its spread towards the dark, one standard deviation."""
    from scipy import ndimage

    dark = flat <= otsu_threshold(flat)
    # Two pixels away from all ink, whose soft edges are no grain of the paper; unless there is no such place.
    away = ~ndimage.binary_dilation(dark, iterations=2)
    paper = flat[away if np.count_nonzero(away) > 0.02 * flat.size else ~dark]
    if not paper.size:
        return float(flat.flat[0]), 0.0
    # A normal distribution has its 30th percentile 0.524 σ below the median; farther out there may be faint strokes.
    median, low = np.percentile(paper, (50, 30))
    return float(median), float(median - low) / 0.524


def _without_lines(ink: np.ndarray) -> np.ndarray:
    """Remove the printed lines of ruled or 田字格 paper from a mask of ink, and keep the strokes that cross them.

    A printed line is what no hand draws: along one row of pixels over more than half the page, thin, and not alone. On
    a small picture, a tight crop, every stroke would be as thin.
    """
    if max(ink.shape) < _RULED_PAGE:
        return ink
    rows, columns = _line_rows(ink), _line_rows(ink.T)
    if len(rows) + len(columns) < 2:
        return ink
    cleaned = ink.copy()
    for mask, bands in ((cleaned, rows), (cleaned.T, columns)):
        for start, stop in bands:
            above = mask[start - 1] if start else np.zeros(mask.shape[1], bool)
            below = mask[stop] if stop < len(mask) else np.zeros(mask.shape[1], bool)
            mask[start:stop] &= above & below
    # Without its lines the page still has writing on it; otherwise they were the writing.
    return cleaned if np.count_nonzero(cleaned) > 0.05 * np.count_nonzero(ink) else ink


def _line_rows(ink: np.ndarray) -> list[tuple[int, int]]:
    """Return the bands of rows `(start, stop)` that a thin straight line fills over more than half the width."""
    share = ink.mean(axis=1)
    edges = np.flatnonzero(np.diff(np.concatenate(([False], share > 0.55, [False]))))
    thin = max(1.0, 0.015 * max(ink.shape))
    # Two rows away from a line there is paper; beside the middle of a slanted stroke there is more of the stroke.
    share = np.pad(share, 2)
    bands = ((int(start), int(stop)) for start, stop in edges.reshape(-1, 2))
    return [(a, b) for a, b in bands if b - a <= thin and max(share[a], share[b + 3]) < 0.4]


def crop_to_ink(gray: np.ndarray) -> np.ndarray:
    """Cut an image down to the ink.

    Args:
        gray: uint8 array of shape `(height, width)`, paper exactly 255.

    Returns:
        A view of the smallest rectangle that holds every pixel below 255.

    Raises:
        NoInkError: If there is none.
    """
    ink = gray < 255
    if not ink.any():
        raise NoInkError('nothing is written on it')
    (top, bottom), (left, right) = _extent(ink.any(axis=1)), _extent(ink.any(axis=0))
    return gray[top:bottom, left:right]


def fit(gray: np.ndarray, size: int = 96) -> np.ndarray:
    """Fit an image into the network's square: 88/96 of the side for the image, a border of 4/96, ink bright.

    Args:
        gray: uint8 array of shape `(height, width)`, paper 255.
        size: Side of the result in pixels. Defaults to `96`.

    Returns:
        uint8 array of shape `(size, size)`, 0 for paper, up to 255 for ink.
    """
    border = round(size * 4 / 96)
    height, width = gray.shape
    side = max(height, width)
    square = np.full((side, side), 255, np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = gray
    inner = size - 2 * border
    # Pillow's bilinear filter covers all pixels when it reduces, so that thin strokes do not vanish.
    scaled = Image.fromarray(square).resize((inner, inner), Image.Resampling.BILINEAR)
    result = np.zeros((size, size), np.uint8)
    result[border : border + inner, border : border + inner] = 255 - np.asarray(scaled)
    return result


def network_input(image: np.ndarray, crop: bool = True, size: int = 96) -> np.ndarray:
    """Turn a picture of one character into what the network reads.

    Args:
        image: uint8 array of shape `(height, width)` or `(height, width, 3)`, values 0..255, light or dark paper.
        crop: Whether to find the writing and cut the page down to it, as the samples are cut that networks learn from.
            `False` is the original's way: the background is whitened by Otsu's threshold alone, and the page is kept
            whole. Defaults to `True`.
        size: Side of the result in pixels. Defaults to `96`.

    Returns:
        uint8 array of shape `(size, size)`, ink bright on 0, a border of 4/96 of the side.

    Raises:
        NoInkError: If nothing is written on the page.
    """
    if not image.size:
        raise NoInkError('the image is empty')
    if not crop:
        return fit(_whiten_by_otsu(np.asarray(Image.fromarray(image).convert('L'))), size)
    return fit(crop_to_ink(whiten(to_gray(_writing(image)))), size)


def _writing(image: np.ndarray) -> np.ndarray:
    """Cut a large picture down to the region of its writing, and reduce that to what the network can use."""
    if max(image.shape[:2]) <= _INK_SIDE:
        return image
    page = _reduced(image, _INK_SIDE)
    height, width = image.shape[:2]
    rows, columns = (_extent(whiten(to_gray(page)).min(axis=axis) < 255) for axis in (1, 0))
    vertical, horizontal = height / page.shape[0], width / page.shape[1]
    # The margin leaves paper to judge by, and room for soft edges that the reduced page does not show.
    margin = 0.15 * max((rows[1] - rows[0]) * vertical, (columns[1] - columns[0]) * horizontal) + 2 * vertical
    top, bottom = max(0, int(rows[0] * vertical - margin)), int(rows[1] * vertical + margin) + 1
    left, right = max(0, int(columns[0] * horizontal - margin)), int(columns[1] * horizontal + margin) + 1
    return _reduced(image[top:bottom, left:right], _INK_SIDE)


def _extent(marked: np.ndarray) -> tuple[int, int]:
    places = np.flatnonzero(marked)
    return int(places[0]), int(places[-1]) + 1


def _whiten_by_otsu(gray: np.ndarray) -> np.ndarray:
    """Whiten the background as the original does: what lies on the paper's side of Otsu's threshold becomes paper."""
    threshold = otsu_threshold(gray)
    if gray.min() == gray.max():
        raise NoInkError('nothing is written on it')
    light = gray > threshold
    if np.count_nonzero(light) * 2 >= light.size:
        return np.where(light, 255, gray).astype(np.uint8)
    return 255 - np.where(light, gray, 0).astype(np.uint8)
