"""Draws handwriting: any of the 3755 characters as another hand would write it, without end and without one scan.

    python handwriting.py --download material            fetch the stroke data and the handwriting fonts by package name
    python handwriting.py material --sheet sheet.png     a sheet of drawn samples to look at
    python handwriting.py material --characters 永字八法 --sheet sheet.png --seed 3
    python handwriting.py material --speed               samples/s of one core

Two kinds of material are drawn. *Strokes*: the centre lines of every stroke in writing order, which are perturbed,
joined and abbreviated as a hand in a hurry does, and drawn with a pen of changing pressure. *Fonts*: glyphs of
handwriting fonts, warped, thinned, or reduced to their skeleton and redrawn. Both then pass through the same ink,
scanner and normalisation as a user's file.

Sample `index` of `seed` is a pure function of (seed, index, options): a run can be resumed, or split over machines, at
any index. The archives are read as they are downloaded. The first load renders the glyphs and leaves one cache file
beside them.
"""

import argparse
import functools
import io
import itertools
import json
import lzma
import math
import os
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from command_line import make_folder, message, whole_number
from data_utils import LABEL_INDEX, LABELS, crop_to_ink, fit, printable, written_aside

POINTS = 16  # points a stroke is resampled to: enough for 乃's four corners, and the arrays stay small
LINK_POINTS = 3  # points between two strokes, so that the link of a joined hand can bend
GLYPH = 128  # side of a rendered glyph; one bit a pixel: drawing it at about 90 px smooths the edges again
CACHE_NAME = 'handwriting-cache.npz'
CACHE_FORMAT = 1
EXTRA_WEIGHT = 0.5  # of skeletons given by --strokes, beside 1 for hanzi-writer-data


# What the standard library raises on damaged, encrypted or unknown archives.
_ARCHIVE_ERRORS = (
    *(OSError, EOFError, ValueError, LookupError, RuntimeError),
    *(tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError),
)

# One writing: the character, its centre lines in a unit box (y down), the numbers of its radical's strokes.
Writing = tuple[str, list[np.ndarray], list[int]]


class MaterialError(Exception):
    """The material folder cannot be used; the message says why and what to do next."""


@dataclass(frozen=True)
class Package:
    """One archive of material.

    Args:
        name: package name at its registry.
        version: version to fetch (Debian fonts: whatever the system's release carries).
        registry: 'npm', 'pypi' or 'debian'.
        kind: 'strokes' or 'font'.
        members: regular expression of the members to read inside the archive.
        weight: how often it is drawn among its kind.
        licence: licence of the material.
        ease: factor on the perturbations of a font: print bears more than a running hand before it becomes unreadable.
    """

    name: str
    version: str
    registry: str
    kind: str
    members: str
    weight: float
    licence: str
    ease: float = 1.0

    def find(self, folder: Path) -> Path | None:
        """Return this package's archive in `folder`, or None."""
        if self.registry == 'npm':
            pattern = f'{self.name.removeprefix("@").replace("/", "-")}-{self.version}.tgz'
        elif self.registry == 'pypi':
            pattern = f'{self.name}-{self.version}-*.whl'
        else:
            pattern = f'{self.name}_*.deb'
        return min(folder.glob(pattern), default=None)


# Running hands weigh most: they are nearest to what people write. Japanese hands keep shapes that differ from the
# mainland's, so they are rare. Left out: Liu Jian Mao Cao, which draws traditional shapes under simplified code points.
PACKAGES = (
    Package('hanzi-writer-data', '2.0.1', 'npm', 'strokes', r'package/.\.json', 1.0, 'Arphic Public License'),
    Package('kanjivg', '20260714', 'pypi', 'strokes', r'kanji/[0-9a-f]{5}\.svg', 0.15, 'CC BY-SA 3.0'),
    Package('@expo-google-fonts/zhi-mang-xing', '0.4.1', 'npm', 'font', r'.*400Regular/.*\.ttf', 3.0, 'OFL 1.1', 0.75),
    Package('@fontsource/long-cang', '5.3.0', 'npm', 'font', r'.*-400-normal\.woff2', 3.0, 'OFL 1.1', 1.25),
    Package(
        '@excalidraw/excalidraw', '0.18.1', 'npm', 'font', r'.*/dist/prod/fonts/Xiaolai/.*\.woff2', 1.5, 'OFL 1.1', 1.3
    ),
    Package('@expo-google-fonts/ma-shan-zheng', '0.4.3', 'npm', 'font', r'.*400Regular/.*\.ttf', 1.5, 'OFL 1.1', 1.2),
    Package('@expo-google-fonts/zcool-kuaile', '0.4.2', 'npm', 'font', r'.*400Regular/.*\.ttf', 0.3, 'OFL 1.1'),
    Package('@expo-google-fonts/zcool-xiaowei', '0.4.1', 'npm', 'font', r'.*400Regular/.*\.ttf', 0.3, 'OFL 1.1'),
    Package('@fontsource/iansui', '5.3.0', 'npm', 'font', r'.*-400-normal\.woff2', 0.4, 'OFL 1.1', 1.5),
    Package('@fontsource/lxgw-marker-gothic', '5.3.0', 'npm', 'font', r'.*-400-normal\.woff2', 0.3, 'OFL 1.1', 1.1),
    Package('@fontsource/lxgw-wenkai-tc', '5.3.0', 'npm', 'font', r'.*-400-normal\.woff2', 0.3, 'OFL 1.1', 1.4),
    Package('@expo-google-fonts/zen-kurenaido', '0.4.1', 'npm', 'font', r'.*400Regular/.*\.ttf', 0.15, 'OFL 1.1', 1.4),
    Package('@expo-google-fonts/yomogi', '0.4.1', 'npm', 'font', r'.*400Regular/.*\.ttf', 0.15, 'OFL 1.1'),
    Package('@expo-google-fonts/hachi-maru-pop', '0.4.1', 'npm', 'font', r'.*400Regular/.*\.ttf', 0.1, 'OFL 1.1'),
    Package('@expo-google-fonts/yuji-mai', '0.4.1', 'npm', 'font', r'.*400Regular/.*\.ttf', 0.15, 'OFL 1.1'),
    Package('fonts-lxgw-wenkai', '', 'debian', 'font', r'.*/LXGWWenKai-Light\.ttf', 0.6, 'OFL 1.1', 1.4),
    Package('fonts-arphic-gkai00mp', '', 'debian', 'font', r'.*/gkai00mp\.ttf', 0.4, 'Arphic Public License', 1.4),
    Package('fonts-klee', '', 'debian', 'font', r'.*/KleeOne-Regular\.ttf', 0.15, 'OFL 1.1', 1.4),
    Package('fonts-seto', '', 'debian', 'font', r'.*/setofont\.ttf', 0.15, 'OFL 1.1'),
)


@dataclass(frozen=True)
class DrawingOptions:
    """What is drawn and how wildly, each with its reason. Lengths are fractions of the character's box, angles degrees.

    Probabilities lie in 0..1. `scale=0` of a perturbation switches it off.
    """

    # What is drawn
    stroke_share: float = 0.6  # share drawn from strokes; the rest from fonts, whose abbreviations are a calligrapher's
    splice: float = 0.15  # share made of halves of two characters, by which a teacher tells what a part looks like
    distort: float = 0.35  # share under a second, strong warp: their label is no longer sure, a teacher's opinion is
    redraw: float = 0.6  # share of glyphs reduced to a skeleton and redrawn, as fonts' brushes are not pens

    # The hand
    hand: tuple[float, float] = (0.4, 1.5)  # one factor a sample on all perturbations: neat and wild writers
    cursive_power: float = 0.8  # cursiveness = uniform ** power; above 1 favours the neat
    turn: float = 4.0  # σ of a stroke's rotation
    stretch: float = 0.10  # σ of a stroke's scale
    bow: float = 0.08  # σ of a stroke's bow, of its length
    shift: float = 0.014  # σ of a stroke's position
    drift: float = 0.008  # σ a stroke of the slow walk along the writing order
    radicals: float = 0.5  # share with two groups of strokes moved apart on their own
    radical_shift: float = 0.03  # σ of a group's position
    radical_scale: float = 0.09  # σ of a group's width and height
    coarse: float = 0.024  # σ of the warp of a glyph's proportions (4 × 4 control points)
    fine: float = 0.009  # σ of the warp of its strokes (8 × 8 control points)
    wave: float = 0.02  # amplitude σ of each of three slow waves: the warp of the whole
    rise: tuple[float, float] = (0.10, 0.10)  # mean and σ of the slope of horizontals: right-handers write uphill
    slant: tuple[float, float] = (0.03, 0.12)  # mean and σ of the slant of verticals
    rotate: float = 3.0  # σ of the rotation of the whole
    aspect: tuple[float, float] = (-0.17, 0.17)  # mean and σ of log(width / height): hands write narrower than print
    join: float = 0.95  # probability of a join between near strokes of a cursive hand
    reach: float = 3.5  # how fast a neat hand's joins become rare with the distance
    dot: float = 0.45  # strokes are the more like a dot the shorter they are than this
    dots: float = 0.7  # how much nearer two dots are to each other in a hand's eyes
    drop_hook: float = 0.25  # probability that a hook is left out
    rounding: float = 5.0  # most passes of smoothing of the most cursive hand
    close_back: float = 0.35  # probability that a joined closing stroke (口's bottom) is written backwards

    # The pen and the scanner
    side: tuple[float, float] = (60, 112)  # long side in pixels: 300 dpi scans of handwriting have 40 to 150
    pen: tuple[float, float] = (0.042, 0.38)  # median and σ of the log of the pen's width: from a hairline to a marker
    pen_change: float = 0.22  # σ of a stroke's pressure, and of its change along the stroke
    pressure: float = 0.95  # how much of its width and of its ink a pen without pressure loses, at most
    skip: float = 0.06  # share written with a ball pen that skips
    ink: tuple[float, float] = (95, 240)  # darkness of the ink, 0 paper .. 255 black; dark ink is commoner
    grain: float = 0.16  # σ of the ink's grain at its strongest
    blur: tuple[float, float] = (0.4, 0.9)  # σ of the scanner's blur in pixels


# ----------------------------------------------------------------------------------------------------------- material


def read_members(path: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    """Yield (name, content) of the members of a .tgz, .whl or .deb archive whose whole name matches `pattern`.

    Raises:
        MaterialError: the archive is damaged or of an unknown kind.
    """
    match = re.compile(pattern).fullmatch
    try:
        if path.suffix in ('.whl', '.zip'):
            with zipfile.ZipFile(path) as archive:
                for name in archive.namelist():
                    if match(name):
                        yield name, archive.read(name)
            return
        stream = io.BytesIO(debian_data(path)) if path.suffix == '.deb' else path.open('rb')
        with stream, tarfile.open(fileobj=stream, mode='r:*') as archive:
            for member in archive:
                if member.isfile() and match(member.name):
                    yield member.name, archive.extractfile(member).read()
    except _ARCHIVE_ERRORS as error:
        raise MaterialError(f'{path.name}: damaged archive ({error}). Delete it and download it again.') from error


def debian_data(path: Path) -> bytes:
    """Return the data.tar.* of a .deb file (Unix `ar` format: 60-byte member headers, even offsets)."""
    with path.open('rb') as file:
        if file.read(8) != b'!<arch>\n':
            raise ValueError('not an ar archive')
        while len(header := file.read(60)) == 60:
            name, size = header[:16].decode().strip(' /'), int(header[48:58])
            if name.startswith('data.tar'):
                return file.read(size)
            file.seek(size + size % 2, os.SEEK_CUR)
    raise ValueError('no data.tar inside')


def resample(line: np.ndarray, n: int = POINTS) -> np.ndarray:
    """Return `n` points at equal arc length along a polyline of shape (k, 2)."""
    line = np.asarray(line, np.float64)
    step = np.hypot(*np.diff(line, axis=0).T)
    along = np.concatenate([[0.0], np.cumsum(step)])
    at = np.linspace(0.0, along[-1], n)
    return np.stack([np.interp(at, along, line[:, 0]), np.interp(at, along, line[:, 1])], axis=1)


def hanzi_writer_strokes(name: str, content: bytes) -> Writing:
    """Return (character, centre lines in a unit box, y down, radical's stroke numbers) of a hanzi-writer-data file."""
    character = Path(name).stem
    if character not in LABEL_INDEX:  # two thirds of the archive
        return character, [], []
    data = json.loads(content)
    lines = [(np.array(median, float) * (1, -1) + (0, 900)) / 1024 for median in data['medians']]
    return character, lines, [int(i) for i in data.get('radStrokes', ())]


NUMBER = re.compile(r'[-+]?(?:\d*\.\d+|\d+\.?)(?:[eE][-+]?\d+)?')
CURVE = np.linspace(0.0, 1.0, 9)[1:, None]


def svg_path(d: str) -> np.ndarray:
    """Return the polyline (k, 2) of an SVG path of M, L, C and S commands (either case), each curve cut in eight."""
    points = [np.zeros(2)]
    control = points[0]
    for command, arguments in re.findall(r'([MmLlCcSs])([^MmLlCcSs]*)', d):
        values = np.array([float(v) for v in NUMBER.findall(arguments)]).reshape(-1, 2)
        take = {'C': 3, 'S': 2}.get(command.upper(), 1)
        for group in values.reshape(-1, take, 2):
            here = points[-1]
            group = group + here if command.islower() else group
            if command in 'Mm':
                points, control = [group[0]], group[0]
                continue
            if take == 1:
                points.append(group[0])
                control = group[0]
                continue
            first = group[0] if take == 3 else 2 * here - control
            control, end = group[-2], group[-1]
            t = CURVE
            curve = (1 - t) ** 3 * here + 3 * (1 - t) ** 2 * t * first + 3 * (1 - t) * t**2 * control + t**3 * end
            points.extend(curve)
    return np.array(points)


def kanjivg_strokes(name: str, content: bytes) -> Writing:
    """Return (character, centre lines in a unit box with y down, []) of a KanjiVG file (box of 109 units)."""
    character = chr(int(Path(name).stem, 16))
    if character not in LABEL_INDEX:
        return character, [], []
    lines = [svg_path(d) / 109 for d in re.findall(r'<path[^>]*\sd="([^"]+)"', content.decode())]
    return character, lines, []


def parse_strokes(
    parse: Callable[[str, bytes], Writing], path: Path, members: Iterable[tuple[str, bytes]]
) -> Iterator[Writing]:
    """Yield what `parse` makes of each member of an archive.

    Raises:
        MaterialError: a member is not what the package's version should hold.
    """
    for name, content in members:
        try:
            yield parse(name, content)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise MaterialError(f'{path.name}: {name} cannot be read ({error}). Download the archive again.') from error


def render_glyphs(fonts: Iterable[bytes]) -> dict[int, np.ndarray]:
    """Return {class: (GLYPH, GLYPH) bool} for the characters that a font (in one or more subset files) really has.

    A glyph counts if it has ink and differs from .notdef (what the font draws for a code point that no font has).
    """
    from PIL import Image, ImageDraw, ImageFont

    glyphs = {}
    for content in fonts:
        # basic layout: code point to glyph, nothing substituted
        font, small = (
            ImageFont.truetype(io.BytesIO(content), size, layout_engine=ImageFont.Layout.BASIC) for size in (160, 16)
        )
        voids = {(bytes(small.getmask(c)), font.getbbox(c)) for c in ('\uffff', '\U000e0fff', '\u0378')}
        void_masks = {mask for mask, _ in voids}
        for index, character in enumerate(LABELS):
            if index in glyphs:
                continue
            # a small picture sorts out what a subset file lacks quickly, the exact size tells a box from 口
            mask = bytes(small.getmask(character))
            if mask in void_masks and (mask, font.getbbox(character)) in voids:
                continue
            page = Image.new('L', (320, 320), 0)
            ImageDraw.Draw(page).text((80, 80), character, fill=255, font=font)
            box = page.getbbox()
            if box is None:
                continue
            ink = page.crop(box)
            factor = (GLYPH - 4) / max(ink.size)
            ink = ink.resize([max(1, round(side * factor)) for side in ink.size], Image.Resampling.BOX)
            square = Image.new('L', (GLYPH, GLYPH), 0)
            square.paste(ink, ((GLYPH - ink.width) // 2, (GLYPH - ink.height) // 2))
            glyphs[index] = np.asarray(square) > 127
    return glyphs


@functools.cache
def thinning_tables() -> tuple[np.ndarray, np.ndarray]:
    """Return the two 256-entry tables of Zhang & Suen's thinning (CACM 27, 1984): 1 where the pixel goes.

    Bit k of the neighbourhood code is neighbour p(k + 2), clockwise from the one above.
    """
    tables = np.zeros((2, 256), np.uint8)
    for code in range(256):
        p = [code >> k & 1 for k in range(8)]
        turns = sum(p[k] == 0 and p[(k + 1) % 8] == 1 for k in range(8))
        if 2 <= sum(p) <= 6 and turns == 1:
            tables[0, code] = p[0] * p[2] * p[4] == 0 and p[2] * p[4] * p[6] == 0
            tables[1, code] = p[0] * p[2] * p[6] == 0 and p[0] * p[4] * p[6] == 0
    return tables[0], tables[1]


def skeleton(ink: np.ndarray) -> np.ndarray:
    """Return the one-pixel skeleton of a (h, w) bool image by Zhang & Suen's thinning."""
    import cv2

    weights = np.array([[128, 1, 2], [64, 0, 4], [32, 16, 8]], np.uint8).astype(np.float32)
    image = np.pad(ink, 1).astype(np.uint8)
    while True:
        before = cv2.countNonZero(image)
        for table in thinning_tables():
            code = cv2.filter2D(image, cv2.CV_8U, weights, borderType=cv2.BORDER_CONSTANT)
            image &= 1 - cv2.LUT(code, table)
        if cv2.countNonZero(image) == before:
            return image[1:-1, 1:-1].astype(bool)


def hook_start(line: np.ndarray) -> int:
    """Return the point of a resampled stroke where its hook begins, or POINTS - 1 where it has none.

    A hook is a sharp turn (over 70°) within the last third of the stroke.
    """
    step = np.diff(line, axis=0)
    angle = np.unwrap(np.arctan2(step[:, 1], step[:, 0]))
    for i in range(POINTS - 2, POINTS * 2 // 3, -1):
        if abs(angle[-1] - angle[i - 2]) > math.radians(70):
            return i - 1
    return POINTS - 1


def read_strokes(writings: Iterable[Writing]) -> dict[str, np.ndarray]:
    """Return the arrays of one stroke source, its classes one after another in their order.

    Returns:
        `lines` (T, POINTS, 2) float32, `hooks` (T,) int16, `radical` (T,) bool and `count` (3755,) int32: the number of
        strokes of each class, 0 where the source lacks it.
    """
    found: dict[int, tuple[list[np.ndarray], list[int]]] = {}
    for character, lines, radical in writings:
        lines = [resample(line) for line in lines if len(line) > 1]
        if character in LABEL_INDEX and lines:
            found.setdefault(LABEL_INDEX[character], (lines, radical))
    lines, radical, count = [], [], np.zeros(len(LABELS), np.int32)
    for index in range(len(LABELS)):
        if index in found:
            own, numbers = found[index]
            lines += own
            radical += [i in numbers for i in range(len(own))]
            count[index] = len(own)
    array = np.array(lines, np.float32).reshape(-1, POINTS, 2)
    return {
        'lines': array,
        'hooks': np.array([hook_start(line) for line in array], np.int16),
        'radical': np.array(radical, bool),
        'count': count,
    }


@dataclass(frozen=True, eq=False)
class Material:
    """What is drawn from: stroke skeletons and glyphs, as arrays.

    Args:
        sources: name of each source, strokes first.
        n_strokes: how many of `sources` are strokes.
        lines: (T, POINTS, 2) float32 centre lines in a unit box, x right, y down, all stroke sources one after another.
        hooks: (T,) index of the point where a stroke's hook begins.
        radical: (T,) bool, the stroke belongs to the character's radical.
        entry: (3755, S) int32; the first line of strokes, the row of `glyphs` of fonts; -1 where the source lacks it.
        count: (3755, S) int32; number of strokes.
        glyphs: (G, GLYPH² / 8) uint8, packed bits.
        skeletons: the same, thinned to one pixel.
        weights: (S,) float, how often a source is drawn among its kind.
        ease: (S,) float, factor on a source's perturbations.
    """

    sources: tuple[str, ...]
    n_strokes: int
    lines: np.ndarray = field(repr=False)
    hooks: np.ndarray = field(repr=False)
    radical: np.ndarray = field(repr=False)
    entry: np.ndarray = field(repr=False)
    count: np.ndarray = field(repr=False)
    glyphs: np.ndarray = field(repr=False)
    skeletons: np.ndarray = field(repr=False)
    weights: np.ndarray = field(repr=False)
    ease: np.ndarray = field(repr=False)

    @classmethod
    def load(cls, folder: str | Path, strokes: str | Path | None = None) -> 'Material':
        """Read the archives of a folder.

        The first load renders the glyphs (a minute or two) and writes a cache beside the archives; later ones take
        a moment.

        Args:
            folder: holds archives of `PACKAGES`, as downloaded. At least hanzi-writer-data must be there.
            strokes: optional extra skeletons, a JSON file (or .json.gz)
                `{character: [[stroke [[x, y], …], …], …]}` with y down.

        Raises:
            MaterialError: no folder, no stroke data, or a damaged archive.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise MaterialError(
                f'{folder}: no such folder. Fetch the material: python handwriting.py --download {folder}'
            )
        archives = {package: path for package in PACKAGES if (path := package.find(folder))}
        if not any(package.kind == 'strokes' for package in archives):
            raise MaterialError(
                f'{folder}: no stroke data (hanzi-writer-data-*.tgz). '
                f'Fetch it: python handwriting.py --download {folder}'
            )
        key = json.dumps([CACHE_FORMAT, [[path.name, path.stat().st_size] for path in archives.values()]])
        cache = folder / CACHE_NAME
        arrays = read_cache(cache, key)
        if arrays is None:
            arrays = build_arrays(archives)
            write_cache(cache, key, arrays)
        return cls._assemble(arrays, strokes)

    @classmethod
    def _assemble(cls, arrays: dict[str, np.ndarray], extra: str | Path | None) -> 'Material':
        sources = [str(name) for name in arrays['sources']]
        n_strokes = int(arrays['n_strokes'])
        lines, hooks, radical = arrays['lines'], arrays['hooks'], arrays['radical']
        entry, count = arrays['entry'], arrays['count']
        if extra is not None:
            more = read_strokes(extra_strokes(Path(extra)))
            first = np.where(more['count'] > 0, len(lines) + np.cumsum(more['count']) - more['count'], -1)
            lines = np.concatenate([lines, more['lines']])
            hooks = np.concatenate([hooks, more['hooks']])
            radical = np.concatenate([radical, more['radical']])
            entry = np.insert(entry, n_strokes, first, axis=1)
            count = np.insert(count, n_strokes, more['count'], axis=1)
            sources.insert(n_strokes, Path(extra).name)
            n_strokes += 1
        known = {package.name: package for package in PACKAGES}
        weights = np.array([known[name].weight if name in known else EXTRA_WEIGHT for name in sources])
        ease = np.array([known[name].ease if name in known else 1.0 for name in sources])
        glyphs = arrays['glyphs'], arrays['skeletons']
        return cls(tuple(sources), n_strokes, lines, hooks, radical, entry, count, *glyphs, weights, ease)

    @functools.cached_property
    def classes(self) -> np.ndarray:
        """The classes that some source has, in ascending order."""
        return np.flatnonzero((self.entry >= 0).any(axis=1))

    @functools.lru_cache(maxsize=8)  # noqa: B019 (a handful of materials live as long as the process)
    def choices(self, stroke_share: float) -> np.ndarray:
        """Return (3755, S) cumulative probabilities of the sources of each class, 0 for what a class lacks."""
        weights = np.where(self.entry >= 0, self.weights, 0.0)
        kinds = weights[:, : self.n_strokes], weights[:, self.n_strokes :]
        totals = [kind.sum(axis=1, keepdims=True) for kind in kinds]
        # never quite 0, so that a class that lacks one kind is drawn from the other
        shares = max(stroke_share, 1e-9), max(1 - stroke_share, 1e-9)
        parts = [
            kind / np.maximum(total, 1e-9) * share for kind, total, share in zip(kinds, totals, shares, strict=True)
        ]
        cumulative = np.cumsum(np.concatenate(parts, axis=1), axis=1)
        return cumulative / np.maximum(cumulative[:, -1:], 1e-12)


def extra_strokes(path: Path) -> Iterator[Writing]:
    """Yield (character, lines in a unit box, []) of a JSON file of pen strokes, the first writing of each character."""
    import gzip

    try:
        with gzip.open(path, 'rt') if path.suffix == '.gz' else path.open(encoding='utf-8') as file:
            firsts = {character: writings[0] for character, writings in json.load(file).items()}
        for character, strokes in firsts.items():
            lines = [np.array(line, float).reshape(-1, 2) for line in strokes if len(line) > 1]
            if lines:
                points = np.concatenate(lines)
                low, side = points.min(axis=0), np.ptp(points, axis=0).max() + 1e-6
                yield character, [(line - low) / side for line in lines], []
    except (OSError, EOFError, ValueError, TypeError, AttributeError, LookupError) as error:
        raise MaterialError(f'{path}: not a JSON file of strokes ({error})') from error


def build_arrays(archives: dict[Package, Path]) -> dict[str, np.ndarray]:
    """Return the arrays of the cache from the archives."""
    parsers = {'hanzi-writer-data': hanzi_writer_strokes, 'kanjivg': kanjivg_strokes}
    strokes, fonts = {}, {}
    for package, path in archives.items():
        members = read_members(path, package.members)
        if package.kind == 'strokes':
            strokes[package.name] = read_strokes(parse_strokes(parsers[package.name], path, members))
        else:
            try:
                fonts[package.name] = render_glyphs(content for _, content in members)
            except (OSError, ValueError) as error:  # FreeType's own words, which name no file
                raise MaterialError(
                    f'{path.name}: a font in it is damaged ({error}). Delete it and download it again.'
                ) from error
    reference = strokes.get('hanzi-writer-data')
    if reference is not None and 'kanjivg' in strokes:  # another stroke count means another shape: 辶 and 艹 of Japan
        drop_other_counts(strokes['kanjivg'], reference['count'])
    n = len(LABELS)
    entry = np.full((n, len(strokes) + len(fonts)), -1, np.int32)
    count = np.zeros_like(entry)
    offset = 0
    for column, source in enumerate(strokes.values()):
        count[:, column] = source['count']
        first = offset + np.cumsum(source['count']) - source['count']
        entry[:, column] = np.where(source['count'] > 0, first, -1)
        offset += len(source['lines'])
    rows, thin = [], []
    for column, glyphs in enumerate(fonts.values(), start=len(strokes)):
        for index, glyph in glyphs.items():
            entry[index, column] = len(rows)
            rows.append(np.packbits(glyph))
            thin.append(np.packbits(skeleton(glyph)))
    return {
        'sources': np.array([*strokes, *fonts]),
        'n_strokes': np.array(len(strokes)),
        'lines': np.concatenate([source['lines'] for source in strokes.values()]),
        'hooks': np.concatenate([source['hooks'] for source in strokes.values()]),
        'radical': np.concatenate([source['radical'] for source in strokes.values()]),
        'entry': entry,
        'count': count,
        'glyphs': np.array(rows, np.uint8).reshape(-1, GLYPH * GLYPH // 8),
        'skeletons': np.array(thin, np.uint8).reshape(-1, GLYPH * GLYPH // 8),
    }


def drop_other_counts(source: dict[str, np.ndarray], reference: np.ndarray) -> None:
    """Take the classes out of a stroke source whose stroke count differs from the reference's."""
    keep = source['count'] == reference
    strokes = np.repeat(keep, source['count'])
    for name in ('lines', 'hooks', 'radical'):
        source[name] = source[name][strokes]
    source['count'] = np.where(keep, source['count'], 0)


def read_cache(path: Path, key: str) -> dict[str, np.ndarray] | None:
    """Return the cached arrays, or None where there is no cache for these archives.

    The glyphs are mapped, not read, so that all processes share one copy.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            if str(file['key']) != key:
                return None
            large = ('glyphs', 'skeletons')
            arrays = {name: file[name] for name in file.files if name not in ('key', *large)}
        return arrays | {name: map_member(path, f'{name}.npy') for name in large}
    except (*_ARCHIVE_ERRORS, TypeError, struct.error):
        return None


def map_member(path: Path, name: str) -> np.ndarray:
    """Return an uncompressed array of a .npz file, mapped read-only (`np.load` maps .npy files alone)."""
    with zipfile.ZipFile(path) as archive, path.open('rb') as file:
        start = archive.getinfo(name).header_offset
        # a zip member's own header has 30 bytes, the last four of them the lengths of its name and extra field
        file.seek(start + 26)
        file.seek(start + 30 + sum(struct.unpack('<HH', file.read(4))))
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        if 0 in shape:
            return np.zeros(shape, dtype)
        return np.memmap(path, dtype, 'r', file.tell(), shape)


def write_cache(path: Path, key: str, arrays: dict[str, np.ndarray]) -> None:
    """Write the cache aside and rename it; a folder that cannot be written to goes without one."""
    try:
        with written_aside(path, shared=True) as aside:
            np.savez(aside, key=np.array(key), **arrays)
    except OSError as error:
        text = f'{path}: no cache written ({error}); every start will take as long as this one'
        print(printable(text), file=sys.stderr)


# ----------------------------------------------------------------------------------------------- drawing from strokes


T = np.linspace(0.0, 1.0, POINTS, dtype=np.float32)
BOW = (4 * T * (1 - T))[:, None]
LIFT, LAND = T**3, (1 - T) ** 5  # where along a stroke the pen is lifted and set down
PULL, PUSH = (T * T)[:, None], ((1 - T) ** 2)[:, None]  # how far the pull on an end reaches into the stroke
LINK_T = (np.arange(1, LINK_POINTS + 1, dtype=np.float32) / (LINK_POINTS + 1))[:, None]
LINK_BOW = 4 * LINK_T * (1 - LINK_T)
ROW = POINTS + LINK_POINTS


def affine(normal: Sequence[float], hand: float, options: DrawingOptions) -> tuple[float, float, float, float]:
    """Return (a, b, c, d) of the map x' = a·x + c·y, y' = b·x + d·y of the whole character, from four normals."""
    rise = options.rise[0] + options.rise[1] * hand * normal[0]
    slant = options.slant[0] + options.slant[1] * hand * normal[1]
    angle = math.radians(options.rotate) * hand * normal[2]
    stretch = math.exp(0.5 * (options.aspect[0] + options.aspect[1] * hand * normal[3]))
    cos, sin = math.cos(angle), math.sin(angle)
    # the shear [[1, -rise], [-slant, 1]] (what goes right goes up, what goes down goes left), the rotation, the stretch
    return (
        (cos + rise * sin) * stretch,
        (sin - rise * cos) / stretch,
        (-slant * cos - sin) * stretch,
        (cos - slant * sin) / stretch,
    )


def inverse(map_: tuple[float, float, float, float], scale: float = 1.0) -> tuple[float, float, float, float]:
    """Return the inverse of `affine`'s map, times `scale`."""
    a, b, c, d = map_
    factor = scale / (a * d - b * c)
    return d * factor, -b * factor, -c * factor, a * factor


def move_strokes(
    lines: np.ndarray, radical: np.ndarray, rng: np.random.Generator, hand: float, options: DrawingOptions
) -> np.ndarray:
    """Return the strokes (S, POINTS, 2), each turned, scaled, bowed and moved, and groups of them moved together."""
    n = len(lines)
    normal = rng.standard_normal((n, 8), dtype=np.float32)
    # some strokes go astray: longer tails than a normal distribution's
    normal *= hand * np.exp(0.4 * normal[:, 7:]) * np.float32(0.9)
    centre = lines.mean(axis=1, keepdims=True)
    chord = lines[:, -1] - lines[:, 0]
    angle = math.radians(options.turn) * normal[:, 0]
    scale = 1 + options.stretch * normal[:, 1]
    a, b = scale * np.cos(angle), scale * np.sin(angle)
    delta = lines - centre
    turned = np.empty_like(lines)
    turned[..., 0] = delta[..., 0] * a[:, None] - delta[..., 1] * b[:, None]
    turned[..., 1] = delta[..., 0] * b[:, None] + delta[..., 1] * a[:, None]
    across = np.stack([-chord[:, 1], chord[:, 0]], axis=1) * (options.bow * normal[:, 2:3])
    offset = options.shift * normal[:, 3:5] + np.cumsum(options.drift * normal[:, 5:7], axis=0)
    out = turned + centre
    out += across[:, None] * BOW
    out += offset[:, None]
    if n > 2 and rng.random() < options.radicals:
        group = radical if radical.any() and not radical.all() and rng.random() < 0.6 else None
        if group is None:
            group = np.arange(n) < rng.integers(1, n)
        for part in (group, ~group):
            z = rng.standard_normal(6) * hand
            middle = centre[part].mean(axis=0)
            matrix = np.array(
                [
                    [math.exp(options.radical_scale * z[0]), 0.05 * z[4]],
                    [0.05 * z[5], math.exp(options.radical_scale * z[1])],
                ],
                np.float32,
            )
            shift = (options.radical_shift * z[2:4]).astype(np.float32)
            out[part] = (out[part] - middle) @ matrix + (middle + shift)
    return out


def join_strokes(
    lines: np.ndarray, rng: np.random.Generator, cursive: float, options: DrawingOptions
) -> tuple[np.ndarray, np.ndarray]:
    """Join strokes as a running hand does.

    Args:
        lines: (S, POINTS, 2); changed in place.

    Returns:
        (points, down): (S, ROW, 2) strokes, each followed by its link to the next one; (S,) bool, that link is drawn.
    """
    n = len(lines)
    out = np.empty((n, ROW, 2), np.float32)
    down = np.zeros(n, bool)
    if n > 1:
        u = rng.random((n - 1, 4), dtype=np.float32)
        gap = lines[1:, 0] - lines[:-1, -1]
        reach = np.sqrt((gap * gap).sum(axis=1))
        # the dots of 氵 and 灬 run together before long strokes do, and one dot glides into the next
        chord = lines[:, -1] - lines[:, 0]
        short = np.maximum(0, 1 - np.sqrt((chord * chord).sum(axis=1)) / options.dot)
        dots = np.sqrt(short[1:] * short[:-1])
        rarer = options.reach - (options.reach - 0.6) * cursive
        likely = options.join * min(1.0, 1.5 * cursive) * np.exp(-reach * rarer * (1 - options.dots * dots))
        joined = u[:, 0] < likely + 0.06 * (reach < 0.06)
        back = lines[1:, -1] - lines[:-1, -1]
        closes = joined & ((back * back).sum(axis=1) < 0.4 * reach * reach) & (u[:, 1] < options.close_back * cursive)
        if closes.any():  # an end that lies nearer than the start: the closing stroke is written backwards
            for i in np.flatnonzero(closes) + 1:
                lines[i] = lines[i, ::-1].copy()
            gap = lines[1:, 0] - lines[:-1, -1]
        merge = np.where(joined, (0.5 + 0.5 * dots) * u[:, 2] * cursive, 0.0).astype(np.float32)
        pull = (gap * merge[:, None])[:, None]
        lines[:-1] += pull * PULL
        lines[1:] -= pull * PUSH
        down[:-1] = joined
        end, start = lines[:-1, -1:], lines[1:, :1]
        gap = start - end
        across = np.stack([-gap[..., 1], gap[..., 0]], axis=-1) * ((u[:, 3] - 0.5) * 0.5)[:, None, None]
        out[:-1, POINTS:] = end + gap * LINK_T + across * LINK_BOW
    out[:, :POINTS] = lines
    out[-1, POINTS:] = lines[-1, -1]
    return out, down


def smooth(points: np.ndarray, ends: np.ndarray, passes: int) -> np.ndarray:
    """Return (N, 2) points averaged with their neighbours `passes` times; points where `ends` is set stay."""
    inner = ~ends[1:-1, None]
    for _ in range(passes):
        mean = (points[:-2] + points[1:-1] + points[2:]) * np.float32(1 / 3)
        points[1:-1] = np.where(inner, mean, points[1:-1])
    return points


def write_strokes(
    material: Material, first: int, count: int, rng: np.random.Generator, options: DrawingOptions
) -> tuple[np.ndarray, np.ndarray]:
    """Let a hand write a character.

    Returns:
        (points, pen_down): (S · ROW, 2) float32 way of the pen, y down; (S · ROW,) bool, it draws after that point.
    """
    hand = rng.uniform(*options.hand)
    cursive = rng.random() ** options.cursive_power
    lines = material.lines[first : first + count]
    hooks = material.hooks[first : first + count]
    drop = np.flatnonzero((hooks < POINTS - 1) & (rng.random(count) < options.drop_hook))
    if len(drop):
        lines = lines.copy()
        for i in drop:
            lines[i] = lines[i, (T * hooks[i]).astype(np.intp)]
    lines = move_strokes(lines, material.radical[first : first + count], rng, hand, options)
    grid, down = join_strokes(lines, rng, cursive, options)
    pen_down = np.ones((count, ROW), bool)
    pen_down[:, POINTS - 1 :] = down[:, None]
    ends = np.zeros((count, ROW), bool)
    ends[:, POINTS - 1] = ~down
    ends[1:, 0] = ~down[:-1]
    # fast hands round their corners
    passes = int(rng.random() * (1.5 + options.rounding * cursive))
    points = smooth(grid.reshape(-1, 2), ends.ravel(), passes)

    wave = rng.standard_normal((3, 5), dtype=np.float32)
    phase = points @ (wave[:, :2] * np.float32(3.0)).T + wave[:, 4] * 3
    points = points + np.sin(phase) @ (wave[:, 2:4] * np.float32(options.wave * hand))
    map_ = affine(rng.standard_normal(4).tolist(), hand, options)
    return (points - 0.5) @ np.array(map_, np.float32).reshape(2, 2), pen_down.ravel()


PRESSURES = 9  # levels of the pen's pressure


def press(count: int, rng: np.random.Generator, options: DrawingOptions) -> np.ndarray:
    """Return the pressure level (S, ROW) of each point of `count` strokes and their links, 0 .. PRESSURES - 1.

    A stroke has its own pressure, which rises or falls along it, and fast hands lift the pen before its end.
    """
    z = rng.standard_normal((2, count, 1), dtype=np.float32) * np.float32(options.pen_change)
    u = rng.random((2, count, 1), dtype=np.float32)
    lift, light = rng.random(2)
    pressure = np.empty((count, ROW), np.float32)
    pressure[:, :POINTS] = 0.8 + z[0] + z[1] * (2 * T - 1) - (0.9 * lift * u[0]) * LIFT - (0.3 * u[1]) * LAND
    pressure[:, POINTS:] = light * (0.4 + 0.6 * u[1])
    return np.clip(pressure * PRESSURES, 0, PRESSURES - 1).astype(np.intp)


def draw_strokes(
    material: Material, first: int, count: int, rng: np.random.Generator, options: DrawingOptions
) -> np.ndarray:
    """Draw a character from its strokes.

    Returns:
        (h, w) uint8 coverage, ink 255 on 0, at scan resolution with a margin.
    """
    import cv2

    points, pen_down = write_strokes(material, first, count, rng, options)
    low, high = points.min(axis=0), points.max(axis=0)
    side = 2 * rng.uniform(*options.side)  # drawn twice as large, so that the edges have gray levels
    scale = side / max(float((high - low).max()), 0.2)
    pen = options.pen[0] * math.exp(options.pen[1] * rng.standard_normal()) * side
    margin = int(pen) + 6
    width, height = ((high - low) * scale).astype(int).tolist()
    canvas = np.zeros(((height + 2 * margin) // 2 * 2, (width + 2 * margin) // 2 * 2), np.uint8)
    pixels = np.rint(((points - low) * scale + margin) * 8).astype(np.int32)  # in eighths: three bits of fraction

    level = press(count, rng, options).ravel()
    cut = np.flatnonzero((level[1:] != level[:-1]) | ~pen_down[:-1]) + 1
    levels, downs = level.tolist(), pen_down.tolist()
    runs: list[list[np.ndarray]] = [[] for _ in range(PRESSURES)]
    for a, b in itertools.pairwise([0, *cut.tolist(), len(pixels) - LINK_POINTS]):
        if b > a and downs[a]:
            runs[levels[a]].append(pixels[a : b + 1])
    ink_loss, width_loss = options.pressure * (0.3 + 0.7 * rng.random()), options.pressure * rng.random()
    for k, parts in enumerate(runs):  # light before dark: what is written twice keeps the darker ink
        if parts:
            lack = 1 - k / (PRESSURES - 1)
            thickness = max(1, round(pen * (1.12 - width_loss * lack)))
            cv2.polylines(canvas, parts, False, round(255 * (1 - ink_loss * lack)), thickness, cv2.LINE_8, 3)
    return cv2.resize(canvas, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)


# ------------------------------------------------------------------------------------------------- drawing from fonts


@functools.cache
def base_grid(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the x and y coordinates (n, n) float32 of an n × n image, -0.5 .. 0.5."""
    axis = ((np.arange(n, dtype=np.float32) + 0.5) / n - 0.5).astype(np.float32)
    return np.broadcast_to(axis, (n, n)), np.broadcast_to(axis[:, None], (n, n))


def warp(
    image: np.ndarray,
    size: int,
    map_: tuple[float, float, float, float],
    coarse: float,
    fine: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """Return the image (n, n) under an affine map about its middle and a random smooth displacement, at (size, size).

    Args:
        map_: from target to source, as `affine` writes it, both in units of their side.
        coarse: σ of the displacement of 4 × 4 control points, of the image's side: proportions.
        fine: the same for 8 × 8 points: single strokes.
    """
    import cv2

    n = image.shape[0]
    x, y = base_grid(size)
    noise = rng.standard_normal((80, 2), dtype=np.float32)
    grid = cv2.resize(noise[:16].reshape(4, 4, 2) * np.float32(coarse * n), (8, 8), interpolation=cv2.INTER_CUBIC)
    grid += noise[16:].reshape(8, 8, 2) * np.float32(fine * n)
    bend = cv2.resize(grid, (size, size), interpolation=cv2.INTER_CUBIC)
    a, b, c, d = (np.float32(v * n) for v in map_)
    middle = np.float32(n / 2 - 0.5)
    bend[..., 0] += x * a + (y * c + middle)
    bend[..., 1] += x * b + (y * d + middle)
    return cv2.remap(image, bend, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT, borderValue=0)


@functools.cache
def disc(diameter: int) -> np.ndarray:
    import cv2

    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (diameter, diameter))


def draw_glyph(
    material: Material, row: int, ease: float, rng: np.random.Generator, options: DrawingOptions
) -> np.ndarray:
    """Draw a character from a font's glyph.

    Args:
        row: the glyph's row in `material.glyphs`.
        ease: the font's own factor on all perturbations.

    Returns:
        (h, w) uint8 coverage, ink 255 on 0, at scan resolution with a margin.
    """
    import cv2

    hand = ease * rng.uniform(*options.hand)
    u = rng.random(4)
    if u[0] < options.redraw:
        line = np.unpackbits(material.skeletons[row]).reshape(GLYPH, GLYPH) * np.uint8(255)
        pen = options.pen[0] * math.exp(options.pen[1] * rng.standard_normal()) * GLYPH
        glyph = cv2.dilate(line, disc(min(max(round(pen), 2), 14)))
        if u[1] < 0.6:  # a pen pressed harder in one part than in another
            thin = cv2.dilate(line, disc(min(max(round(pen * (1 - 0.6 * u[2])), 2), 14)))
            x, y = int(rng.integers(512 - GLYPH)), int(rng.integers(512 - GLYPH))
            glyph = np.where(noise_bank()[1, y : y + GLYPH, x : x + GLYPH] > 0, glyph, thin)
    else:
        glyph = np.unpackbits(material.glyphs[row]).reshape(GLYPH, GLYPH) * np.uint8(255)
        change = int(u[1] * 5) - 2
        if change > 0:
            glyph = cv2.dilate(glyph, disc(1 + change))
        elif change < 0 and cv2.countNonZero(thin := cv2.erode(glyph, disc(1 - change))) > 0.4 * cv2.countNonZero(
            glyph
        ):
            glyph = thin
    glyph = cv2.blur(glyph, (3, 3))
    side = rng.uniform(*options.side)
    room = 1.5  # the slanted and bent glyph must fit into the target
    map_ = affine(rng.standard_normal(4).tolist(), hand, options)
    return warp(glyph, int(side * room), inverse(map_, room), options.coarse * hand, options.fine * hand, rng)


# ---------------------------------------------------------------------------------------------------- ink and scanner


@functools.cache
def noise_bank() -> np.ndarray:
    """Return (2, 512, 512) float32 fields of unit variance, fine grain and slow unevenness, to take crops of."""
    import cv2

    rng = np.random.default_rng(20180101)
    fields = []
    for sigma in (0.55, 5.0):
        noise = cv2.GaussianBlur(rng.standard_normal((512, 512)).astype(np.float32), (0, 0), sigma)
        fields.append(noise / noise.std())
    return np.stack(fields)


def scan(coverage: np.ndarray, rng: np.random.Generator, options: DrawingOptions) -> np.ndarray:
    """Return the gray scan (h, w) uint8, paper 255, of ink with this coverage: ink level, grain, skips, blur."""
    import cv2

    u = rng.random(8)
    h, w = coverage.shape
    fine, slow = noise_bank()
    y, x = int(u[0] * (512 - h)), int(u[1] * (512 - w))
    level = options.ink[1] - (options.ink[1] - options.ink[0]) * u[2] ** 2.5
    gain = fine[y : y + h, x : x + w] * np.float32(options.grain * u[3] * 1.5)
    gain += slow[y : y + h, x : x + w] * np.float32(2 * options.grain * u[4])
    gain += np.float32(1.0)
    if u[5] < options.skip:
        gain *= fine[y : y + h, x : x + w] > -1.5 - u[6]
    sigma = options.blur[0] + (options.blur[1] - options.blur[0]) * u[7]
    blurred = cv2.GaussianBlur(coverage, (5, 5), sigma)
    gain *= blurred
    ink = cv2.convertScaleAbs(cv2.max(gain, 0), alpha=level / 255)
    ink = cv2.threshold(ink, 10, 0, cv2.THRESH_TOZERO)[1]
    return 255 - (ink if cv2.countNonZero(ink) else coverage)  # a lone stroke that the pen hardly touched


# ------------------------------------------------------------------------------------------------------------ samples


@functools.lru_cache(maxsize=4)
def shuffled(seed: int, epoch: int, n: int) -> np.ndarray:
    """Return the order of `n` classes in one epoch of one seed."""
    return np.random.Generator(np.random.PCG64([seed, epoch, n])).permutation(n)


def draw(material: Material, label: int, rng: np.random.Generator, options: DrawingOptions) -> np.ndarray:
    """Draw class `label` once. Returns a gray image (h, w) uint8, paper exactly 255, ink darker, with a margin."""
    chances = material.choices(options.stroke_share)[label]
    source = int(np.searchsorted(chances, rng.random() * 0.999999, side='right'))
    first = int(material.entry[label, source])
    if source < material.n_strokes:
        coverage = draw_strokes(material, first, int(material.count[label, source]), rng, options)
    else:
        coverage = draw_glyph(material, first, float(material.ease[source]), rng, options)
    return scan(coverage, rng, options)


def splice(left: np.ndarray, right: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return a half of each of two network inputs (n, n), side by side or one above the other, as one paper image."""
    n = left.shape[0]
    cut = int(n * rng.uniform(0.35, 0.65))
    joint = left.copy()
    if rng.random() < 0.6:
        joint[:, cut:] = right[:, cut:]
    else:
        joint[cut:] = right[cut:]
    return joint


def draw_input(
    material: Material, label: int, rng: np.random.Generator, options: DrawingOptions, size: int = 96
) -> tuple[np.ndarray, bool]:
    """Draw class `label` as a network input.

    Returns:
        (image, trusted): (size, size) uint8, ink bright on 0 with a border of size · 4 / 96; False where the image was
        spliced or distorted so that only a teacher can say what it shows.
    """
    import cv2

    cv2.setNumThreads(0)  # the caller has a process a core already
    spliced, distorted = rng.random(2) < (options.splice, options.distort)
    image = fit(crop_to_ink(draw(material, label, rng, options)), size)
    if spliced:
        stranger = int(material.classes[rng.integers(len(material.classes))])
        other = fit(crop_to_ink(draw(material, stranger, rng, options)), size)
        image = splice(image, other, rng)
        image = image if image.any() else other
    if distorted:
        hand = rng.uniform(0.6, 1.6)
        map_ = inverse(affine(rng.standard_normal(4).tolist(), hand, DISTORTION), 1.3)
        bent = warp(image, int(size * 1.3), map_, DISTORTION.coarse * hand, DISTORTION.fine * hand, rng)
        if bent.any():
            image = fit(crop_to_ink(255 - bent), size)
    return image, not (spliced or distorted)


def sample(
    material: Material, seed: int, index: int, options: DrawingOptions | None = None, size: int = 96
) -> tuple[np.ndarray, int, bool]:
    """Draw sample `index` of `seed`.

    A pure function of its arguments. Every aligned run of 3755 indices (of as many as the material has classes) holds
    each class once.

    Args:
        material: what to draw from.
        seed: number of the endless set, ≥ 0.
        index: number of the sample in it, ≥ 0.
        options: how to draw. Defaults to `DrawingOptions()`.
        size: side of the network input. Defaults to 96.

    Returns:
        (image, label, trusted): (size, size) uint8 network input, ink bright on 0 with a border of size · 4 / 96; class
        index; False where the image was spliced or distorted so that only a teacher can say what it shows.
    """
    classes = material.classes
    n = len(classes)
    label = int(classes[shuffled(seed, index // n, n)[index % n]])
    rng = np.random.Generator(np.random.PCG64([seed, index]))
    image, trusted = draw_input(material, label, rng, options or DEFAULT_OPTIONS, size)
    return image, label, trusted


DEFAULT_OPTIONS = DrawingOptions()
DISTORTION = DrawingOptions(  # the second, strong warp
    rise=(0.0, 0.12), slant=(0.0, 0.15), rotate=6.0, aspect=(0.0, 0.2), coarse=0.03, fine=0.012
)


def sample_batch(
    material: Material, seed: int, indices: Iterable[int], options: DrawingOptions | None = None, size: int = 96
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw several samples: (images (n, size, size) uint8, labels (n,) int32, trusted (n,) bool); see `sample`."""
    images, labels, trusted = zip(*(sample(material, seed, int(i), options, size) for i in indices), strict=True)
    return np.stack(images), np.array(labels, np.int32), np.array(trusted, bool)


# ------------------------------------------------------------------------------------------------------- command line


def download(folder: Path) -> int:
    """Fetch the archives of `PACKAGES` that `folder` lacks, with npm, pip and apt-get. Returns how many are missing."""
    make_folder(folder, '--download')
    missing = 0
    for package in PACKAGES:
        if package.find(folder):
            print(f'{package.name}: there already')
            continue
        tool, command = {
            'npm': ('npm', ['npm', 'pack', '--silent', f'{package.name}@{package.version}']),
            'pypi': (
                sys.executable,
                [sys.executable, '-m', 'pip', 'download', '-q', '--no-deps', f'{package.name}=={package.version}'],
            ),
            'debian': ('apt-get', ['apt-get', 'download', '-q', package.name]),
        }[package.registry]
        reason = f'{tool} is not installed'
        if shutil.which(tool):
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors='replace', check=False)
            reason = (done.stderr.strip().splitlines() or [f'{tool} ended with status {done.returncode}'])[-1]
        if package.find(folder):
            print(f'{package.name}: fetched ({package.licence})')
        else:
            missing += 1
            by_hand = f'cd {folder} && {" ".join(command)}'
            print(printable(f'{package.name}: MISSING. {reason}. By hand: {by_hand}'))
    return missing


def sheet(images: np.ndarray, columns: int) -> np.ndarray:
    """Return (rows · size, columns · size) uint8, dark ink on white paper, of (n, size, size) network inputs."""
    size = images.shape[-1]
    rows = -(-len(images) // columns)
    page = np.zeros((rows * columns, size, size), np.uint8)
    page[: len(images)] = images
    return 255 - page.reshape(rows, columns, size, size).swapaxes(1, 2).reshape(rows * size, columns * size)


def write_sheet(path: Path, material: Material, args: argparse.Namespace, options: DrawingOptions) -> None:
    """Draw a sheet and write it aside, then rename it."""
    from PIL import Image

    if args.characters:
        known = {LABELS[index] for index in material.classes}
        unknown = [c for c in args.characters if c not in known]
        if unknown:
            raise MaterialError(f'not among the {len(known)} characters of the material: {"".join(unknown)}')
        rngs = (np.random.Generator(np.random.PCG64([args.seed, i])) for i in itertools.count())
        labels = [LABEL_INDEX[c] for c in args.characters for _ in range(args.columns)]
        images = np.stack(
            [draw_input(material, label, rng, options)[0] for label, rng in zip(labels, rngs, strict=False)]
        )
    else:
        images, _, _ = sample_batch(material, args.seed, range(args.columns * 12), options)
    try:
        with written_aside(path) as aside:
            Image.fromarray(sheet(images, args.columns)).save(aside, 'PNG')
    except OSError as error:
        raise MaterialError(f'{path}: cannot be written ({error})') from error


def speed(material: Material, seed: int, options: DrawingOptions, seconds: float = 3.0) -> float:
    """Return the samples that one core draws in a second."""
    sample_batch(material, seed, range(50), options)
    start, index = time.process_time(), 50
    while (used := time.process_time() - start) < seconds:
        sample_batch(material, seed, range(index, index + 50), options)
        index += 50
    return (index - 50) / used


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(
        description='Draw handwritten Chinese characters from stroke data and handwriting fonts.',
        epilog='First: python handwriting.py --download material; then: python handwriting.py material --sheet s.png',
    )
    parser.add_argument('material', type=Path, nargs='?', help='folder of downloaded archives')
    parser.add_argument(
        '--download', type=Path, metavar='DIR', help='fetch the archives into DIR by package name (npm, pip, apt-get)'
    )
    parser.add_argument('--sheet', type=Path, metavar='PNG', help='write a sheet of drawn samples')
    parser.add_argument('--speed', action='store_true', help='measure samples/s of one core')
    group = parser.add_argument_group('what to draw')
    group.add_argument('--characters', default='', help='draw these, a row each (default: a mixture)')
    group.add_argument(
        '--columns', type=whole_number, default=16, help='samples a row of the sheet (default: %(default)s)'
    )
    group.add_argument(
        '--seed', type=int, default=0, help='number of the endless set of samples (default: %(default)s)'
    )
    group.add_argument(
        '--strokes', type=Path, metavar='JSON', help='extra skeletons: {character: [[stroke [[x, y], …], …], …]}'
    )
    group.add_argument(
        '--stroke-share',
        type=float,
        default=DEFAULT_OPTIONS.stroke_share,
        help='share drawn from strokes, 0..1 (default: %(default)s)',
    )
    group.add_argument(
        '--trusted', action='store_true', help='no splices and no second warp, which are for a teacher alone'
    )
    args = parser.parse_args(arguments)
    if not args.download and not args.material:
        parser.error('give a material folder, or --download DIR to fetch one')
    if args.material and not (args.sheet or args.speed or args.download):
        parser.error('nothing to do: give --sheet PNG or --speed')
    if args.seed < 0 or not 0 <= args.stroke_share <= 1:
        parser.error('--seed must be 0 or more, --stroke-share within 0..1')
    return args


def main(arguments: list[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 0 fine, 1 error, 130 Ctrl-C."""
    args = parse_arguments(arguments)
    try:
        import cv2  # noqa: F401 (before any work: it draws, and thins the glyphs of the first load)

        if args.download:
            missing = download(args.download)
            Material.load(args.download)
            print(f'{len(PACKAGES) - missing} of {len(PACKAGES)} packages in {printable(args.download)}')
        if args.material:
            options = replace(DEFAULT_OPTIONS, stroke_share=args.stroke_share)
            if args.trusted:
                options = replace(options, splice=0.0, distort=0.0)
            material = Material.load(args.material, args.strokes)
            if args.sheet:
                write_sheet(args.sheet, material, args, options)
                print(f'wrote {printable(args.sheet)}')
            if args.speed:
                print(f'{speed(material, args.seed, options):.0f} samples/s on one core')
    except (MaterialError, OSError, ModuleNotFoundError) as error:
        print(message(error), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == '__main__':
    sys.exit(main())
