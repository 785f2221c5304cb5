"""Image files → what the network reads, as pure functions, and the table of its 3755 classes.

    file → gray page → white page → tight crop → 96×96, ink bright on 0

Every image that a user gives, every GNT record and every drawn sample passes through the last two steps here, so that
the network sees one kind of picture. No function keeps state, and none changes its argument.
"""

import contextlib
import errno
import glob
import math
import os
import re
import stat
import threading
import warnings
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter, ImageOps

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
# The last three, a phone's, cannot be read; but a folder's user should be told.
SUFFIXES = frozenset(
    '.png .jpg .jpeg .jpe .jfif .bmp .dib .gif .tif .tiff .webp .pgm .ppm .pbm .pnm .heic .heif .avif'.split()  # noqa: SIM905
)


# By which JPEG files can be reduced while they are decoded.
_DIVISORS = (1, 2, 4, 8)


class ImageError(ValueError):
    """An image that cannot be read or recognised. Its text says why and what to do next."""


class NoInkError(ImageError):
    """A page on which nothing is written."""


def printable(text) -> str:
    """Return a text with control characters escaped, so that a file name cannot steer the terminal."""
    return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in str(text))


# Why a file cannot be written, and what to do about it.
_NO_ROOM = 'there is no room for it; free some space on that disk, or write to another'
_NO_ENTRY = 'nothing can be written there; allow it, or write to another folder'
_WRITE_ERRORS = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _NO_ROOM),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), _NO_ENTRY),
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR), 'there is no such folder; make it first'),
    errno.ENAMETOOLONG: 'the name is too long; choose a shorter one',
}


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Say in one line why a file cannot be written and what to do, whatever the library that writes it says.

    Args:
        path: The file that the error names.

    Raises:
        OSError: In place of one whose number tells the reason.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _WRITE_ERRORS:
            raise
        # With one argument its text is what is printed, without the number.
        clear = OSError(f'{path}: {_WRITE_ERRORS[error.errno]}')
        clear.errno = error.errno
        raise clear from error


@contextlib.contextmanager
def written_aside(path: str | os.PathLike, size: int = 0, shared: bool = False) -> Iterator[Path]:
    """Write a file so that nobody ever sees half of it: give a path beside it, and rename that at the end.

    Whatever goes wrong meanwhile, an older file stays as it was, and nothing is left lying about. Where the process is
    killed, what lies about is written over the next time.

    Args:
        path: Where the file is to be. Its folder exists.
        size: Bytes that are tried before, for libraries that do not survive a full disk, as HDF5. Defaults to `0`.
        shared: Whether several processes may write this file at once. Each has a path of its own then, which a killed
            one leaves behind. Defaults to `False`.

    Yields:
        The path to write to, with the same suffix.

    Raises:
        OSError: If it cannot be written, see `writing`.
    """
    path = Path(path)
    # A name of 255 bytes is as long as names can be: such a file has a short one while it is written.
    stem = path.stem if len(os.fsencode(path.name)) < 240 else f'{zlib.crc32(os.fsencode(path.name)):08x}'
    aside = path.with_name(f'.{stem}.{os.getpid()}.part{path.suffix}' if shared else f'.{stem}.part{path.suffix}')
    with writing(path):
        try:
            if size:
                _try_room(aside, size)
            yield aside
            aside.replace(path)
        finally:
            # What went wrong is said already, and is likely to go wrong here as well.
            with contextlib.suppress(OSError):
                aside.unlink()


def _try_room(path: Path, size: int) -> None:
    with path.open('wb') as file:
        if hasattr(os, 'posix_fallocate'):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            for _ in range(-(-size // 2**20)):
                file.write(bytes(2**20))


def natural_key(path) -> list:
    """Sort key that puts `9.png` before `10.png` and ignores case."""
    # Names in archives may be thousands of digits long, which Python does not take for a number.
    parts = re.split(r'(\d{1,1000})', str(path).casefold())
    return [(int(part), '') if part.isdecimal() else (math.inf, part) for part in parts]


def find_images(sources: Iterable[str | os.PathLike]) -> list[Path]:
    """Return the image files that files, folders and glob patterns name.

    A folder gives every file below it whose suffix is one of an image (in any case), hidden ones left out, and folders
    that may not be read, for `open_image` to say so. A file that is named itself is taken whatever its suffix, since
    the content decides. Links to folders are not followed inside a folder nor by the `**` of a pattern, so that a loop
    of links cannot hold the program. A link that leads nowhere is given as a file, for `open_image` to say so.

    Args:
        sources: Paths or patterns such as `scans/*.png`; `~` stands for the home folder.

    Returns:
        Paths, each once: the sources in the given order, the files of each in natural order.

    Raises:
        FileNotFoundError: If a source does not exist, with its name. An empty folder is no error.
    """
    found: dict[Path, None] = {}
    for source in sources:
        # These of os.path raise nothing: not for the home of nobody, nor for a name that is too long or out of reach.
        path = Path(os.path.expanduser(source))
        if os.path.isdir(path):
            files = sorted(_images_below(path), key=natural_key)
        elif os.path.exists(path):
            files = [path]
        else:
            files = []
            for match in sorted(dict.fromkeys(_matches(path)), key=natural_key):
                files += sorted(_images_below(match), key=natural_key) if os.path.isdir(match) else [match]
            if not files:
                raise FileNotFoundError(f'no such file or folder: {source}')
        found.update(dict.fromkeys(files))
    return list(found)


def _matches(pattern: Path, root: Path = Path()) -> Iterator[Path]:
    """Yield what a pattern names, hidden names left out; it may yield a path twice.

    `**` stands for any folders, but not for links to folders, which glob's own follows until the path is too long.
    """
    if '**' not in pattern.parts:
        for name in glob.glob(str(pattern), root_dir=root):
            yield root / name
        return
    place = pattern.parts.index('**')
    rest = Path(*pattern.parts[place + 1 :])
    for top in _matches(Path(*pattern.parts[:place]), root):
        for folder, folders, names in os.walk(top):
            folders[:] = [name for name in folders if not name.startswith('.')]
            if rest.parts:
                yield from _matches(rest, Path(folder))
            else:
                yield from (Path(folder, name) for name in names if not name.startswith('.'))


def _images_below(folder: Path) -> Iterator[Path]:
    unreadable = []
    for root, folders, names in os.walk(folder, onerror=lambda error: unreadable.append(Path(error.filename))):
        folders[:] = [name for name in folders if not name.startswith('.')]
        for name in names:
            if not name.startswith('.') and Path(name).suffix.lower() in SUFFIXES:
                yield Path(root, name)
    yield from unreadable


# What the system says where there is no such file; the third of links that lead to each other.
_NO_SUCH_FILE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)


def open_image(path: str | os.PathLike, reduced: bool = False) -> np.ndarray:
    """Open an image file as RGB, as it is meant to be looked at.

    The content decides on the format, never the suffix. The EXIF orientation is applied, transparent parts show white
    paper, 16 and 32 bits are scaled to 8, and of an animation the first frame is taken.

    Args:
        path: A PNG, JPEG, BMP, GIF, TIFF, WebP or PNM file.
        reduced: Whether a large JPEG photo may come at a half, a quarter or an eighth of its size, as long as its
            writing keeps twice the pixels that the network gets, which takes a third of the time. It is for
            `network_input` with its crop. Defaults to `False`.

    Returns:
        uint8 array of shape `(height, width, 3)`, values 0..255; it may be read-only.

    Raises:
        ImageError: If the file cannot be read, is no image, is damaged, or has more than
            `PIL.Image.MAX_IMAGE_PIXELS` pixels, 89 million, as decompression bombs do.
    """
    try:
        # A pipe would be waited for, and a device has no end.
        mode = os.stat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise ImageError('not a regular file')
        return _opened_reduced(path) if reduced else _opened(path)
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError('the image is too large to be one character: crop or scale it first') from error
    except IsADirectoryError as error:
        raise ImageError('this is a folder' if os.access(path, os.R_OK) else 'a folder that may not be read') from error
    except PermissionError as error:
        raise ImageError('no permission to read the file') from error
    except Image.UnidentifiedImageError as error:
        raise ImageError(_why_unknown(path)) from error
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged data
        if getattr(error, 'errno', None) in _NO_SUCH_FILE:
            raise ImageError('no such file') from error
        raise ImageError(f'damaged image: {str(error) or type(error).__name__}') from error


def _why_unknown(path: str | os.PathLike) -> str:
    with contextlib.suppress(OSError), open(path, 'rb') as file:
        # The box that ISO base media files begin with, as a phone's photos do (ISO/IEC 23008-12).
        if file.read(12)[4:8] == b'ftyp':
            return 'a photo in HEIC or AVIF format: save it as JPEG'
    return f'not an image in a known format ({", ".join(FORMATS)})'


def expect_large_pictures() -> None:
    """Silence what Pillow warns of, large pictures and damaged EXIF data for example. It is for programs.

    `open_image` says in words of its own what cannot be read.
    """
    warnings.filterwarnings('ignore', module=r'PIL\.')


# Decoding takes ten bytes a pixel and more, so pictures of more pixels than this are decoded one at a time.
_LARGE_PIXELS = 2**24
_one_large = threading.Lock()


def _opened(path: str | os.PathLike, divisor: int = 1) -> np.ndarray:
    with Image.open(path, formats=FORMATS) as image:
        return _decoded(image, divisor)


def _opened_reduced(path: str | os.PathLike) -> np.ndarray:
    with Image.open(path, formats=FORMATS) as image:
        # The writing is found on a copy of `_INK_SIDE`, whatever the size of the picture: twice that will do first.
        longer = max(image.size) if image.format == 'JPEG' else 0
        divisor = max(divisor for divisor in _DIVISORS if divisor == 1 or longer >= 2 * _INK_SIDE * divisor)
        picture = _decoded(image, divisor)
    if divisor == 1:
        return picture
    try:
        white, scale = _whitened_writing(_without_channels(picture))
        side = divisor * scale * max(crop_to_ink(white).shape)
    except NoInkError:
        side = 0  # there may be some, very small
    enough = max(finer for finer in _DIVISORS if finer == 1 or (finer <= divisor and side >= _INK_SIDE / 2 * finer))
    return picture if enough == divisor else _opened(path, enough)


def _decoded(image: Image.Image, divisor: int) -> np.ndarray:
    if image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError  # Pillow itself refuses twice that, and warns meanwhile
    if divisor > 1:
        image.draft(None, (image.width // divisor, image.height // divisor))
    with _one_large if image.width * image.height > _LARGE_PIXELS else contextlib.nullcontext():
        return _to_rgb(image)


def _to_rgb(image: Image.Image) -> np.ndarray:
    image.seek(0)
    image.load()
    # The picture is there: damaged EXIF data, of which anything is raised, only means that no orientation is known.
    with contextlib.suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith('I') or image.mode == 'F':
        return _as_rgb(_eight_bits(np.asarray(image)))
    if 'A' in image.mode or 'a' in image.mode or 'transparency' in image.info:
        image = image.convert('RGBA')
        page = Image.new('RGB', image.size, 'white')
        page.paste(image, mask=image.getchannel('A'))
        image = page
    if image.mode in ('L', '1'):
        return _as_rgb(np.asarray(image.convert('L')))
    return np.asarray(image if image.mode == 'RGB' else image.convert('RGB'))


def _as_rgb(gray: np.ndarray) -> np.ndarray:
    """Return a gray image as a view with three channels, which takes neither memory nor time."""
    return np.broadcast_to(gray[..., None], (*gray.shape, 3))


def _without_channels(image: np.ndarray) -> np.ndarray:
    """Return the gray image that `_as_rgb` made a picture of; other pictures as they are."""
    return image if image.ndim == 2 or image.strides[2] else image[..., 0]


def thumbnail(image: np.ndarray, side: int) -> np.ndarray:
    """Return a picture reduced to at most `side` pixels in width and height; a smaller one as it is.

    Args:
        image: uint8 array of shape `(height, width)` or `(height, width, 3)`.
        side: In pixels.

    Returns:
        uint8 array with as many axes.
    """
    small = Image.fromarray(image)
    small.thumbnail((side, side))
    return np.asarray(small)


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

# A sheet of paper on a darker desk is looked for in pictures of at least `_PHOTO` pixels, on a copy of `_SHEET_SIDE`.
# The desk has at least these parts of the picture and of its frame, the sheet this part of the picture.
_PHOTO = 200
_SHEET_SIDE = 64
_DESK_PART = 0.25
_DESK_FRAME = 0.75
_SHEET_PART = 0.12

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

# Coloured pictures of more bytes than this are reduced row by row.
_LARGE = 1 << 20

# A longer side is reduced to this before a square of it is made, which would take terabytes for some pictures.
_LONGEST = 1 << 13

_LEVELS = np.arange(256)


def otsu_threshold(gray: np.ndarray) -> int:
    """Return the gray level that best parts an image into dark and light.

    It maximises the variance between the two classes (N. Otsu, "A threshold selection method from gray-level
    histograms", IEEE Trans. SMC 9, 1979).

    Args:
        gray: uint8 array of any shape but an empty one.

    Returns:
        `t` in 0..255; values `<= t` are the dark class. An image of a single value gives that value.
    """
    return _otsu(_histogram(gray))


def _otsu(histogram: np.ndarray) -> int:
    levels = np.flatnonzero(histogram)
    first, last = int(levels[0]), int(levels[-1])
    if first == last:
        return first
    # Thresholds that leave both classes something.
    dark = np.cumsum(histogram[first:last], dtype=np.float64)
    dark_sum = np.cumsum(histogram[first:last] * _LEVELS[first:last], dtype=np.float64)
    total, total_sum = dark[-1] + histogram[last], dark_sum[-1] + last * histogram[last]
    between = (total_sum * dark - dark_sum * total) ** 2 / (dark * (total - dark))
    # The measure is flat between two peaks: its middle leaves the same room on both sides.
    return first + int(np.flatnonzero(between >= between.max() * (1 - 1e-9)).mean())


def _histogram(values: np.ndarray) -> np.ndarray:
    """Count the gray levels of a uint8 array: int64 of shape `(256,)`."""
    return np.bincount(values.ravel(), minlength=256)


def _quantile(histogram: np.ndarray, fraction: float) -> float:
    """Return a quantile of the values that a histogram counts, between two of them by linear interpolation."""
    up_to = np.cumsum(histogram)
    place = fraction * float(up_to[-1] - 1)
    low, high = np.searchsorted(up_to, (math.floor(place), math.ceil(place)), side='right')
    return float(low + (high - low) * (place % 1))


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
    luma = _luma(image)
    if image.ndim == 2:
        return luma
    small = _reduced(image, 2 * _LIGHT_SIDE)
    red, green, blue = (small[..., channel] for channel in range(3))
    colour = np.maximum(np.maximum(red, green), blue) - np.minimum(np.minimum(red, green), blue)
    if colour.max(initial=0) < 40:  # none to speak of
        return luma
    small_luma = _reduced(luma, 2 * _LIGHT_SIDE)
    dark_paper = is_dark_paper(small_luma)
    contrasts = np.stack([255 - _flatten(view, dark_paper)[0] for view in (small_luma, red, green, blue)])
    marks = contrasts.max(axis=0) > 2 * _MIN_CONTRAST
    if not marks.any():
        return luma
    contrasts = contrasts[:, marks]
    full = np.array([[_quantile(_histogram(contrast), 0.95)] for contrast in contrasts])
    # 1 where every mark is as dark as ink or as light as paper, 0 where all are in between.
    decided = np.abs(2 * np.minimum(contrasts / np.maximum(full, 1), 1) - 1).mean(axis=1)
    decided[full[:, 0] < 0.6 * full[0, 0]] = 0
    best = int(decided.argmax())
    return luma if decided[best] < decided[0] + 0.1 else image[..., best - 1]


def _luma(image: np.ndarray) -> np.ndarray:
    """Return the luma of a picture, see `to_gray`; a gray one as it is."""
    return image if image.ndim == 2 else np.asarray(Image.fromarray(image).convert('L'))


def _reduced(image: np.ndarray, side: int) -> np.ndarray:
    """Average blocks of pixels so that the longer side has at most `side`."""
    factor = -(-max(image.shape[:2]) // side)
    if factor <= 1:
        return image
    height, width = image.shape[:2]
    across, down = min(factor, width), min(factor, height)
    if image.ndim == 3 and image.size > _LARGE:
        # Pillow would first copy all of it into pixels of four bytes, which takes longer than to add up the rows.
        image, down = _reduced_rows(image, down), 1
    return np.asarray(Image.fromarray(image).reduce((across, down)))


def _reduced_rows(image: np.ndarray, factor: int) -> np.ndarray:
    """Average every `factor` rows; the last of them may be fewer."""
    whole = len(image) // factor * factor
    blocks = image[:whole].reshape(-1, factor, *image.shape[1:])
    rows = (np.add.reduce(blocks, axis=1, dtype=np.uint32 if factor > 257 else np.uint16) + factor // 2) // factor
    rest = image[whole:]
    return np.concatenate((rows, rest.mean(axis=0, keepdims=True).round()) if len(rest) else (rows,)).astype(np.uint8)


def _running(extreme: np.ufunc, image: np.ndarray, before: int, after: int) -> np.ndarray:
    """Return the maximum or minimum around every pixel: that of the rows and columns `i - before` to `i + after`.

    The window doubles with every pass, so that the time grows with the logarithm of its size (M. van Herk, "A fast
    algorithm for local minimum and maximum filters on rectangular and octagonal kernels", Pattern Recognition Letters
    13, 1992, gives the way that has no logarithm, which pays for larger images).

    Args:
        extreme: `np.maximum` or `np.minimum`.
        image: uint8 array of shape `(height, width)`.
        before: Pixels that the window reaches up and to the left.
        after: Pixels that it reaches down and to the right.

    Returns:
        uint8 array of the same shape. At the edges the window holds what there is of it.
    """
    for _ in range(2):  # down, then across
        padded = np.full((before + len(image) + after, image.shape[1]), 0 if extreme is np.maximum else 255, np.uint8)
        padded[before : before + len(image)] = image
        span = 1
        while span <= before + after:
            step = min(span, before + after + 1 - span)
            padded = extreme(padded[:-step], padded[step:])
            span += step
        image = padded.T
    return image


def _grown(mask: np.ndarray, times: int = 1) -> np.ndarray:
    """Return a mask grown by its neighbours above, below, left and right, so many times."""
    for _ in range(times):
        grown = mask.copy()
        grown[1:] |= mask[:-1]
        grown[:-1] |= mask[1:]
        grown[:, 1:] |= mask[:, :-1]
        grown[:, :-1] |= mask[:, 1:]
        mask = grown
    return mask


def _median_of_nine(image: np.ndarray) -> np.ndarray:
    """Return the median of every pixel and its eight neighbours, the edges repeated. uint8 `(height, width)`."""
    padded = np.pad(image, 1, mode='edge')
    top, middle, bottom = padded[:-2], padded[1:-1], padded[2:]
    low, high = np.minimum(top, middle), np.maximum(top, middle)
    # Each column of three in order; the median is that of the largest low, the middle mid and the smallest high one.
    low, middle, high = np.minimum(low, bottom), np.maximum(low, np.minimum(high, bottom)), np.maximum(high, bottom)
    low = np.maximum(np.maximum(low[:, :-2], low[:, 1:-1]), low[:, 2:])
    high = np.minimum(np.minimum(high[:, :-2], high[:, 1:-1]), high[:, 2:])
    return _median_of_three(_median_of_three(middle[:, :-2], middle[:, 1:-1], middle[:, 2:]), low, high)


def _median_of_three(first: np.ndarray, second: np.ndarray, third: np.ndarray) -> np.ndarray:
    return np.maximum(np.minimum(first, second), np.minimum(np.maximum(first, second), third))


def _paper_window(small: np.ndarray) -> tuple[int, int]:
    """Return how far the window of the closing reaches to both sides of a pixel."""
    window = max(3, round(max(small.shape) * _PAPER_WINDOW))
    return (window - 1) // 2, window // 2


def paper_level(gray: np.ndarray) -> np.ndarray:
    """Estimate the brightness of the bare paper at every pixel of a page with dark ink.

    A gray-scale closing fills everything dark that is narrower than its window, and leaves the slope of the light and
    the edge of a shadow where they are. It works on a small copy, since light changes slowly.

    Args:
        gray: uint8 array of shape `(height, width)`, light paper.

    Returns:
        float32 array of the same shape, values 1..255.
    """
    small = _reduced(gray, _LIGHT_SIDE)
    before, after = _paper_window(small)
    return _enlarged_paper(_running(np.maximum, small, before, after), gray.shape)


def _enlarged_paper(brightest: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    before, after = _paper_window(brightest)
    # The second half of the closing. One pixel wider: beside the edge of a shadow rather too dark than too light, as
    # that edge would look like ink.
    closed = _running(np.minimum, brightest, after + 1, before + 1)
    level = Image.fromarray(closed.astype(np.float32)).resize(shape[::-1], Image.Resampling.BILINEAR)
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
    small = _reduced(page, _LIGHT_SIDE)
    brightest = _running(np.maximum, small, *_paper_window(small))
    if brightest.min() >= _WHITE_PAPER:  # nowhere is there a window without white paper
        return page, True
    paper = _enlarged_paper(brightest, gray.shape)
    # Dark ink takes the same part of any light. Light ink adds to the little that dark paper gives back, and a ratio of
    # two dark levels would be noise.
    flat = 255 - (paper - page) if dark_paper else page * (255 / paper)
    flat = np.where(paper - page < _MIN_CONTRAST / 2, np.maximum(flat, 255 - _MIN_CONTRAST), flat)
    return np.clip(flat, 0, 255).astype(np.uint8), False


def is_dark_paper(gray: np.ndarray) -> bool:
    """Tell whether a page is light ink on dark paper.

    Paper is what there is more of: the original counts the pixels on both sides of Otsu's threshold. Under uneven light
    a shadow would count as ink, so there the count is one of local differences: of what is darker than its surroundings
    against what is lighter, which is the sign of their skewness.

    Args:
        gray: uint8 array of shape `(height, width)`.
    """
    small = _reduced(gray, _LIGHT_SIDE)
    white, black = np.count_nonzero(small >= _WHITE_PAPER), np.count_nonzero(small <= 255 - _WHITE_PAPER)
    if max(white, black) > small.size / 4:  # a clean scan or drawing: its paper is quite white or quite black
        return black > white
    blur = ImageFilter.GaussianBlur(max(small.shape) * _PAPER_WINDOW / 2)
    difference = small - np.asarray(Image.fromarray(small).filter(blur), np.float32)
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
    if not gray.size:
        raise NoInkError('the image is empty')
    flat, clean_scan = _flatten(gray, is_dark_paper(gray))
    level, spread = (255, 0) if clean_scan else _paper_statistics(flat)
    if spread > 2:
        flat = _median_of_nine(flat)
        level, spread = _paper_statistics(flat)

    marks = flat <= min(otsu_threshold(flat), level - max(_MIN_CONTRAST, _MIN_CONTRAST_SPREAD * spread))
    strong = _without_lines(marks)
    if not strong.any():
        raise NoInkError('nothing is written on it, or it is too faint: use a darker pen or more light')

    # The soft edges of the strokes are lighter than the threshold: ink is what hangs together with strong ink.
    contrast = level - _quantile(_histogram(flat[strong]), 0.5)
    white = _WHITE_PAPER if clean_scan else level - max(3 * spread, _SOFT_EDGE * contrast)
    ink = flat < white
    near = _grown(strong, max(1, round(max(gray.shape) / 100)))
    if np.count_nonzero(ink & ~near) > 0.3 * np.count_nonzero(strong):
        ink &= near  # something else is there that is fainter than the writing: printed lines, the other side
    if strong is not marks:
        ink &= strong | ~_grown(marks & ~strong)  # the lines go with their soft edges
    ink = _without_dust(ink, np.where(strong, 255 - flat, 0))

    # Linear in the gray level, so a table of the levels is enough.
    gain = 255 / white * max(1.0, _FAINT_CONTRAST / contrast)
    darkened = np.clip(255 - (white - _LEVELS) * gain, 0, 254).astype(np.uint8)
    return np.where(ink, darkened[flat], np.uint8(255))


def _without_dust(ink: np.ndarray, darkness: np.ndarray) -> np.ndarray:
    """Remove the blots that have next to nothing of the darkness of all.

    A blot is what hangs together, corners included. It is put together from runs, the stretches of ink in a row.

    Args:
        ink: bool array of shape `(height, width)`.
        darkness: uint8 array of the same shape, 0 where it does not count.

    Returns:
        bool array of the same shape.
    """
    # All rows in one line, with paper between them: a run never goes over the edge, and what touches it in the next
    # row lies one row length ahead.
    height, row = ink.shape[0], ink.shape[1] + 2
    line, weights = np.zeros((2, height, row), np.uint8)
    line[:, 1:-1] = ink
    weights[:, 1:-1] = darkness
    edges = np.flatnonzero(np.diff(line.ravel())) + 1
    if not len(edges):
        return ink
    starts, stops = edges[::2], edges[1::2]
    of_run = np.add.reduceat(weights.ravel(), edges, dtype=np.int64)[::2]
    blot = _blots(starts, stops, row)
    of_blot = np.bincount(blot, of_run)
    is_dust = of_blot[blot] <= _DUST * of_run.sum()
    if not is_dust.any():
        return ink
    change = np.zeros(line.size, np.int8)
    change[starts[~is_dust]] = 1
    change[stops[~is_dust]] = -1
    return np.cumsum(change, dtype=np.int8).reshape(height, row)[:, 1:-1].astype(bool)


def _blots(starts: np.ndarray, stops: np.ndarray, row: int) -> np.ndarray:
    """Number runs so that those which touch have the same number: their first one's.

    Args:
        starts: int array of shape `(runs,)`: where each begins in the line of rows, rising.
        stops: int array of shape `(runs,)`: where each has ended.
        row: Length of a row.

    Returns:
        int array of shape `(runs,)`.
    """
    first = np.searchsorted(stops, starts + row, side='left')
    last = np.searchsorted(starts, stops + row, side='right')
    touching = np.maximum(last - first, 0)
    above = np.repeat(np.arange(len(starts)), touching)
    below = np.arange(len(above)) + np.repeat(first - np.cumsum(touching) + touching, touching)
    # Every run knows an earlier one of its blot, itself at first. In turn, blots that touch are joined, the later to
    # the earlier, and every run is told the first of those it knows.
    blot = np.arange(len(starts))
    while True:
        one, other = blot[above], blot[below]
        apart = one != other
        if not apart.any():
            return blot
        above, below, one, other = above[apart], below[apart], one[apart], other[apart]
        np.minimum.at(blot, np.maximum(one, other), np.minimum(one, other))
        while (blot != (known := blot[blot])).any():
            blot = known


def _paper_statistics(flat: np.ndarray) -> tuple[float, float]:
    """Return the level of the paper and its spread towards the dark, one standard deviation."""
    dark = flat <= otsu_threshold(flat)
    # Two pixels away from all ink, whose soft edges are no grain of the paper; unless there is no such place.
    away = ~_grown(dark, 2)
    paper = flat[away if np.count_nonzero(away) > 0.02 * flat.size else ~dark]
    if not paper.size:
        return float(flat.flat[0]), 0.0
    # A normal distribution has its 30th percentile 0.524 σ below the median; farther out there may be faint strokes.
    histogram = _histogram(paper)
    median, low = _quantile(histogram, 0.5), _quantile(histogram, 0.3)
    return median, (median - low) / 0.524


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
    gray = _reduced(gray, _LONGEST)
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
        ValueError: If it is no such array.
    """
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)):
        raise ValueError(f'a picture is a uint8 array (height, width[, 3]), received {image.dtype} {image.shape}')
    if not image.size:
        raise NoInkError('the image is empty')
    image = _without_channels(image)
    if not crop:
        return fit(_whiten_by_otsu(_luma(image)), size)
    return fit(crop_to_ink(_whitened_writing(image)[0]), size)


def _whitened_writing(image: np.ndarray) -> tuple[np.ndarray, float]:
    """Whiten a picture; of a large one the region of its writing, reduced to what the network can use.

    Args:
        image: uint8 array of shape `(height, width)` or `(height, width, 3)`.

    Returns:
        uint8 array of shape `(height, width)`, as `whiten` returns it, with sides of at most `_INK_SIDE`; and how many
        pixels of the picture one of its pixels stands for.
    """
    page = _reduced(image, _INK_SIDE)
    sheet = _sheet(page) if max(image.shape[:2]) >= _PHOTO else None
    if sheet is not None:
        with contextlib.suppress(NoInkError):  # an empty sheet is none: a box was drawn around the edge of the picture
            alone = _without_desk(image, sheet)
            return _looked_closer(alone, _reduced(alone, _INK_SIDE))
    return _looked_closer(image, page)


def _looked_closer(image: np.ndarray, page: np.ndarray) -> tuple[np.ndarray, float]:
    """Whiten a picture whose reduced copy is given, see `_whitened_writing`."""
    is_cut = False
    while True:
        white = whiten(to_gray(page))
        if page is image:
            return white, 1.0
        vertical, horizontal = image.shape[0] / page.shape[0], image.shape[1] / page.shape[1]
        ink = white < 255
        (top, bottom), (left, right) = _extent(ink.any(axis=1)), _extent(ink.any(axis=0))
        # Look closer, and again where the first look took something else for writing as well.
        if is_cut and 2 * max(bottom - top, right - left) >= max(page.shape[:2]):
            return white, max(vertical, horizontal)
        # The margin leaves paper to judge by, and room for soft edges that the reduced page does not show.
        margin = 0.15 * max((bottom - top) * vertical, (right - left) * horizontal) + 2 * vertical
        image = image[
            max(0, int(top * vertical - margin)) : int(bottom * vertical + margin) + 1,
            max(0, int(left * horizontal - margin)) : int(right * horizontal + margin) + 1,
        ]
        page = _reduced(image, _INK_SIDE)
        is_cut = True


def _sheet(page: np.ndarray) -> np.ndarray | None:
    """Find a sheet of paper on a darker desk.

    The desk is what is dark and reaches the frame of the picture. What it leaves is a sheet where it is bright, as
    strokes of light ink with the dark paper that they enclose are not; thick, as strokes are not; and parted from the
    desk by a sharp edge, as light from shadow seldom is. Small pictures and narrow desks are left alone: the outer
    strokes of 国 or 日, cut out tightly, look the same.

    Args:
        page: uint8 array of shape `(height, width)` or `(height, width, 3)`.

    Returns:
        bool array of shape `(rows, columns)` of at most `_SHEET_SIDE`, which covers the picture; True on the sheet, a
        little inside its edge. None where there is no such sheet.
    """
    small = _luma(_reduced(page, _SHEET_SIDE))
    edges = np.concatenate((small[0], small[-1], small[:, 0], small[:, -1]))
    if min(small.shape) < _SHEET_SIDE // 4 or edges.mean() > 0.75 * small.max():  # nearly all pictures end here
        return None
    frame = np.ones(small.shape, bool)
    frame[1:-1, 1:-1] = False
    dark = small <= otsu_threshold(small)
    if np.count_nonzero(frame & dark) < _DESK_FRAME * np.count_nonzero(frame):
        return None
    outside = frame & dark
    while np.count_nonzero(grown := _grown(outside) & dark) > np.count_nonzero(outside):
        outside = grown
    if np.count_nonzero(outside) < _DESK_PART * small.size:
        return None
    near, far = _grown(outside), _grown(outside, 2)
    sheet = ~far
    sheet[frame] = False  # so that what reaches the frame has an edge there, too
    thick = ~_grown(~sheet)
    area, bright = np.count_nonzero(thick), np.count_nonzero(thick & ~dark)
    if area < _SHEET_PART * small.size or bright < 0.7 * area:
        return None
    paper, desk = np.median(small[sheet & ~dark]), np.median(small[outside])
    # One pixel is left between the two, which has something of both.
    inner, outer = far & ~near, outside & _grown(~outside, 2) & ~_grown(~outside)
    level = np.concatenate((small[inner] - desk, paper - small[outer].astype(np.float64)))
    return sheet if np.count_nonzero(level > 0.6 * (paper - desk)) > 0.7 * level.size else None


def _without_desk(image: np.ndarray, sheet: np.ndarray) -> np.ndarray:
    """Cut a picture down to its sheet, and fill the corners that a tilted one leaves with the colour of its paper."""
    mask = np.asarray(Image.fromarray(sheet).resize(image.shape[1::-1], Image.Resampling.NEAREST))
    (top, bottom), (left, right) = _extent(mask.any(axis=1)), _extent(mask.any(axis=0))
    image, mask = image[top:bottom, left:right], mask[top:bottom, left:right]
    gray = _luma(image)
    paper = image[mask & (gray >= otsu_threshold(gray[mask]))]
    colour = np.median(paper[:: 1 + len(paper) // 10_000], axis=0).astype(np.uint8)
    return np.where(mask if image.ndim == 2 else mask[..., None], image, colour)


def _extent(marked: np.ndarray) -> tuple[int, int]:
    places = np.flatnonzero(marked)
    if not len(places):
        raise NoInkError('nothing is written on it')
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
