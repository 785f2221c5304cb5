"""Reads and writes GNT, the format of the CASIA-HWDB and ICDAR-2013 handwriting samples.

    python gnt_reader.py info HWDB1.1/                     files, writers, samples, classes, sizes, damaged records
    python gnt_reader.py export Gnt1.1Test.zip png/        one PNG a sample, one folder a character, and a label map
    python gnt_reader.py sheet HWDB1.1/ sheet.png          a contact sheet to look at

A GNT file is one record after another, with no file header and no terminator:

    offset  field         type
    0       sample size   uint32 little-endian, 10 + width × height
    4       tag code      2 bytes in text order: the GB pair (啊 = B0 A1), or one ASCII byte and 00
    6       width         uint16 little-endian, columns
    8       height        uint16 little-endian, rows
    10      bitmap        width × height bytes, row by row; paper 255, ink 0..254

A source is a `.gnt` file, a `.zip` that holds some, or a folder with either. Nothing is unpacked to the disk, and the
memory in use does not grow with the source.
"""

import argparse
import array
import contextlib
import csv
import functools
import io
import json
import lzma
import os
import re
import stat
import statistics
import struct
import sys
import threading
import time
import unicodedata
import warnings
import zipfile
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from command_line import message, whole_number
from data_utils import LABEL_INDEX, LABELS, natural_key, printable, written_aside

HEADER = struct.Struct('<I2sHH')

# A sample of a character has sides of tens to some hundreds of pixels. A record that claims more than this is damaged
# or hostile, however consistent: two uint16 sides would allow 4.29 GB.
MAX_PIXELS = 1 << 26

# The bytes that are read at a time: small enough to stay in the processor's cache while the records are cut out.
_WINDOW = 1 << 20

_FETCH_AGAIN = 'fetch or unpack the file again'
_UNALZ = (
    'unpack it with `unalz` (a Debian package), or fetch the newer sets, which are plain zip files: '
    'Gnt1.0TrainPart1.zip … Gnt1.0Test.zip, Gnt1.1TrainPart1.zip … Gnt1.1Test.zip, competition-gnt.zip'
)

# What the standard library raises on files that cannot be read and on damaged, encrypted or unknown archives.
_ARCHIVE_ERRORS = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError)
_READ_ERRORS = (OSError, KeyError, ValueError, RuntimeError, *_ARCHIVE_ERRORS)

Source = str | os.PathLike


class GntError(ValueError):
    """GNT data that cannot be read. Its text names the file, the record and its offset, the reason and what to do.

    Args:
        reason: What is wrong.
        source: The file, or the archive and its member.
        record: Number of the record in its file, from 1, or `None`.
        offset: Offset of the record in its file in bytes, or `None`.
        next_step: What the user can do.
    """

    def __init__(
        self, reason: str, source: object, record: int | None = None, offset: int | None = None, next_step: str = ''
    ):
        # All of them go to the base class, so that the error passes from one process to another.
        super().__init__(reason, source, record, offset, next_step)
        self.reason = reason
        self.source = source
        self.record = record
        self.offset = offset
        self.next_step = next_step

    def __str__(self) -> str:
        where = '' if self.record is None else f', record {self.record:,} at byte {self.offset:,}'
        next_step = f'; {self.next_step}' if self.next_step else ''
        return printable(f'{self.source}{where}: {self.reason}{next_step}')


ErrorHandler = Callable[[GntError], None]
Progress = Callable[[int, float], None]


class GntRecord(NamedTuple):
    """One sample.

    Attributes:
        character: The character, or `None` where the tag code stands for none.
        tag_code: The two tag bytes as a big-endian number: 0xB0A1 for 啊, 0x4100 for A.
        image: uint8 array of shape `(height, width)`, paper 255, ink 0..254; it belongs to the caller.
        offset: Where the record begins in its file, in bytes.
    """

    character: str | None
    tag_code: int
    image: np.ndarray
    offset: int


class GntMember(NamedTuple):
    """One file of records: a file on the disk, or a member of a zip archive.

    Attributes:
        path: The file or the archive.
        name: The member's name in the archive, `''` for a file.
        size: Length in bytes, unpacked.
    """

    path: Path
    name: str
    size: int

    def __str__(self) -> str:
        return f'{self.path}/{self.name}' if self.name else str(self.path)

    @property
    def file_name(self) -> str:
        """The last part of the name: `1001-c.gnt`."""
        return _file_name(self.name or self.path)

    @property
    def writer(self) -> str:
        """Who wrote it, see `writer_id`."""
        return writer_id(self.file_name)

    @property
    def is_competition(self) -> bool:
        """Whether it belongs to the ICDAR-2013 competition set, see `is_competition_file`."""
        return is_competition_file(self.file_name) or is_competition_file(self.path)


# --- Names and codes -------------------------------------------------------------------------------------------------


def writer_id(name: Source) -> str:
    """Return the writer of a CASIA file: `'1001'` for `1001-c.gnt`, `'C001'` for `C001-f-f.gnt`.

    Args:
        name: File name, or a path of which only the last part counts.

    Returns:
        The writer's number as the name gives it; for a name of another kind the whole stem.
    """
    stem = Path(_file_name(name)).stem
    match = re.match(r'(C?\d{3,4})(?![0-9A-Za-z.])', stem, re.IGNORECASE)
    return match[1].upper() if match else stem


def is_competition_file(name: Source) -> bool:
    """Tell whether a file belongs to the ICDAR-2013 competition set, which must never train or choose a model.

    Args:
        name: Name or path of a file or archive, of which only the last part counts.

    Returns:
        True for `C001-f-f.gnt` … `C060-f-f.gnt` and `competition-gnt.zip`.
    """
    return re.match(r'(C\d{3}(?![0-9A-Za-z])|competition)', _file_name(name), re.IGNORECASE) is not None


def tag_character(tag_code: int) -> str | None:
    """Return the character of a tag code.

    Args:
        tag_code: The two tag bytes as a big-endian number, 0..0xFFFF.

    Returns:
        One character (GB18030, of which GB2312 and GBK are parts; or ASCII, for a low byte of 0), or `None` where the
        code stands for no character or a private one.
    """
    return _TAGS[tag_code.to_bytes(2, 'big')][1]


def character_tag(character: str) -> int:
    """Return the tag code of a character, the inverse of `tag_character`.

    Raises:
        ValueError: If no two bytes of GB18030 stand for it.
    """
    try:
        tag = character.encode('gb18030').ljust(2, b'\0')
    except UnicodeEncodeError:
        tag = b''
    if len(tag) != 2 or _TAGS[tag][1] != character:
        raise ValueError(f'no GNT tag code stands for {character!r}')
    return int.from_bytes(tag, 'big')


class _Tags(dict[bytes, tuple[int, str | None, bool]]):
    """Tag bytes → tag code, character, and whether it is one of the 3755; each is decoded when it is first asked for.

    At most 65,536 entries, and half the cost of a cached function, which is paid for every record.
    """

    def __missing__(self, tag: bytes) -> tuple[int, str | None, bool]:
        try:
            character = (tag[:1] if tag[1] == 0 else tag).decode('gb18030')
        except UnicodeDecodeError:
            character = ''
        # Co: private use, where gb18030 puts codes that no standard defines; Cc: control codes; Cn: not assigned.
        known = len(character) == 1 and unicodedata.category(character) not in ('Co', 'Cc', 'Cn')
        self[tag] = int.from_bytes(tag, 'big'), character if known else None, character in LABEL_INDEX
        return self[tag]


_TAGS = _Tags()


@functools.cache
def _class_of_tag() -> np.ndarray:
    classes = np.full(1 << 16, -1, np.int32)
    for character, index in LABEL_INDEX.items():
        classes[character_tag(character)] = index
    return classes


def label_folder(tag_code: int, names: str = 'character') -> str:
    """Return the name of the folder into which the samples of a tag code are exported.

    That is the character, except where it cannot name a folder on every system: punctuation such as `/`, letters with a
    case (A and a are one folder on Windows and macOS) and what a file system may normalise to something else have
    their code.

    Args:
        tag_code: The two tag bytes as a big-endian number.
        names: `'character'`, or `'code'` for the code always. Defaults to `'character'`.

    Returns:
        One character, or four hexadecimal digits: `'啊'`, or `'B0A1'`.
    """
    character = tag_character(tag_code)
    if (
        names == 'character'
        and character is not None
        and character.isalnum()
        and character.lower() == character.upper()
        and unicodedata.normalize('NFKD', character) == character
    ):
        return character
    return f'{tag_code:04X}'


def folder_character(name: str) -> str | None:
    """Return the character whose samples a folder holds, the inverse of `label_folder`.

    Args:
        name: Name of the folder: one character, or the four hexadecimal digits of a tag code.

    Returns:
        The character, or `None` if the name says none.
    """
    if len(name) == 1:
        return name
    return tag_character(int(name, 16)) if re.fullmatch('[0-9A-Fa-f]{4}', name) else None


def _file_name(name: Source) -> str:
    # Archives made on Windows may hold backslashes.
    return re.split(r'[/\\]', os.fspath(name))[-1]


# --- Where the records are -------------------------------------------------------------------------------------------


def gnt_members(
    sources: Source | Iterable[Source], strict: bool = True, on_error: ErrorHandler | None = None
) -> list[GntMember]:
    """Return the files of records that files, archives and folders hold.

    A folder gives the `.gnt` files and the `.zip` archives below it, hidden ones and linked folders left out. A member
    of an archive that the same folder also holds unpacked (the same name and size) is given once. What a file is, its
    content says, never its suffix.

    Args:
        sources: One path or several; `~` stands for the home folder.
        strict: Whether a source that cannot be used raises an error, or is reported and left out. Defaults to `True`.
        on_error: What is called with each error if `strict` is False. Defaults to a Python warning.

    Returns:
        The members, each once: the sources in the given order, the files of each in natural order.

    Raises:
        GntError: If a source does not exist or holds no GNT, or, if `strict`, cannot be read.
    """
    report = _reporter(strict, on_error)
    sources = [sources] if isinstance(sources, str | os.PathLike) else sources
    found: dict[GntMember, None] = {}
    for source in sources:
        try:
            path = Path(source).expanduser()
            is_folder = stat.S_ISDIR(path.stat().st_mode)
        except (OSError, ValueError, RuntimeError) as error:
            raise GntError(_why(error), source) from error
        found.update(dict.fromkeys(_folder_members(path, report) if is_folder else _file_members(path, report)))
    return list(found)


def _folder_members(folder: Path, report: ErrorHandler) -> list[GntMember]:
    def unreadable(error: OSError) -> None:
        report(GntError(_why(error), error.filename))

    paths = []
    archives_alz = []
    for root, folders, names in os.walk(folder, onerror=unreadable):
        folders[:] = [name for name in folders if not name.startswith('.')]
        names = [name for name in names if not name.startswith('.')]
        paths += [Path(root, name) for name in names if Path(name).suffix.lower() in ('.gnt', '.zip')]
        archives_alz += [Path(root, name) for name in names if Path(name).suffix.lower() == '.alz']
    paths.sort(key=natural_key)
    if not paths and archives_alz:
        raise GntError('is an ALZ archive', archives_alz[0], next_step=_UNALZ)
    if not paths:
        raise GntError('there is no .gnt and no .zip file in this folder', folder, next_step='name another folder')
    members = [member for path in paths for member in _file_members(path, report)]
    unpacked = {(member.file_name, member.size) for member in members if not member.name}
    return [member for member in members if not member.name or (member.file_name, member.size) not in unpacked]


def _file_members(path: Path, report: ErrorHandler) -> list[GntMember]:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise OSError('neither a file nor a folder')
        with path.open('rb') as file:
            if file.read(4) not in (b'PK\3\4', b'PK\5\6'):
                return [GntMember(path, '', status.st_size)]
        with zipfile.ZipFile(path) as archive:
            # Not by `is_dir`, which some Pythons lose on an entry without a name.
            entries = [entry for entry in archive.infolist() if not entry.filename.endswith('/')]
    except _READ_ERRORS as error:
        report(GntError(_why(error), path, next_step=_FETCH_AGAIN if isinstance(error, _ARCHIVE_ERRORS) else ''))
        return []
    # macOS adds a shadow `__MACOSX/._1001-c.gnt` of each file to an archive.
    entries = [entry for entry in entries if not _file_name(entry.filename).startswith('.')]
    members = {
        GntMember(path, entry.filename, entry.file_size) for entry in entries if entry.filename.lower().endswith('.gnt')
    }
    if not members:
        report(_nothing_inside(path, [entry.filename for entry in entries]))
    return sorted(members, key=lambda member: natural_key(member.name))


def _nothing_inside(path: Path, names: list[str]) -> GntError:
    for name in names:
        if name.lower().endswith('.alz'):
            return GntError(f'the archive holds an ALZ archive, {printable(name)}', path, next_step=_UNALZ)
        if name.lower().endswith(('.zip', '.rar', '.7z', '.gz', '.tar')):
            return GntError(f'the archive holds another one, {printable(name)}', path, next_step='unpack it first')
    inside = f'but {len(names):,} others, {printable(names[0])} the first' if names else 'it is empty'
    return GntError(f'the archive holds no .gnt file, {inside}', path, next_step='name another archive')


def _why(error: Exception) -> str:
    """Puts an error of the standard library into words."""
    if isinstance(error, FileNotFoundError):
        return 'no such file or folder'
    if isinstance(error, PermissionError):
        return 'no permission to read it'
    if isinstance(error, _ARCHIVE_ERRORS):
        return f'the archive is damaged ({printable(error) or type(error).__name__})'
    if isinstance(error, OSError):
        return f'cannot be read ({error.strerror or error})'
    # An encrypted member, a packing method that this Python lacks, a name that no path can have.
    return f'cannot be read ({printable(error)})'


def _raise(error: GntError) -> None:
    raise error


def _warn(error: GntError) -> None:
    warnings.warn(str(error), stacklevel=2)


def _reporter(strict: bool, on_error: ErrorHandler | None) -> ErrorHandler:
    return _raise if strict else on_error or _warn


# --- Records, one after another --------------------------------------------------------------------------------------


def read_gnt(
    source: Source | GntMember | Iterable[Source | GntMember],
    level1_only: bool = True,
    strict: bool = True,
    on_error: ErrorHandler | None = None,
) -> Iterator[GntRecord]:
    """Read the records of GNT files, archives and folders, one after another.

    Memory in use stays at a few MB whatever the size of the source. If `strict` is False, a damaged record is reported
    and left out, and reading goes on behind it where the next header confirms its length, else with the next file.

    Args:
        source: A path, a member of `gnt_members`, or several of them.
        level1_only: Whether to leave out all but the 3755 characters of GB2312-80 level 1. Defaults to `True`.
        strict: Whether damaged data raises an error. Defaults to `True`.
        on_error: What is called with each error if `strict` is False, for example the `append` of a list. Defaults to a
            Python warning.

    Returns:
        An iterator of `GntRecord`. An empty file has none.

    Raises:
        GntError: At once if the source does not exist or holds no GNT; while reading, if `strict`, on damaged data.

    Example:

        for character, tag_code, image, offset in read_gnt('Gnt1.1Test.zip'):
            ...                                            # image: (height, width) uint8, paper 255
    """
    members = _resolve(source, strict, on_error)
    return _records(members, level1_only, _reporter(strict, on_error))


def _resolve(
    source: Source | GntMember | Iterable[Source | GntMember], strict: bool, on_error: ErrorHandler | None
) -> list[GntMember]:
    # A member is a tuple, and so would pass for several sources.
    several = [source] if isinstance(source, str | os.PathLike | GntMember) else source
    found: dict[GntMember, None] = {}
    for one in several:
        found.update(dict.fromkeys([one] if isinstance(one, GntMember) else gnt_members(one, strict, on_error)))
    return list(found)


def _records(members: Iterable[GntMember], level1_only: bool, report: ErrorHandler) -> Iterator[GntRecord]:
    begin, gray, array, new = HEADER.size, np.dtype(np.uint8), np.ndarray, tuple.__new__
    for member in members:
        for window, start, offset, tag, width, height in _walk(member, report):
            tag_code, character, is_level1 = _TAGS[tag]
            if is_level1 or not level1_only:
                # Cut out, as the window is about to be filled anew. A slice of a bytearray is the cheapest copy there
                # is, and one that may be written to.
                first = start + begin
                pixels = window[first : first + width * height]
                # Not by calling the class, which does the same through one more call.
                yield new(GntRecord, (character, tag_code, array((height, width), gray, pixels), offset))


def _problem(size: int, width: int, height: int, left: int) -> str:
    """Says what is wrong with a header, `''` if it is sound. Python integers: none of these can overflow."""
    expected = HEADER.size + width * height
    if size != expected:
        return f'its size field says {size:,} bytes, its sides {HEADER.size} + {width:,} × {height:,} = {expected:,}'
    if size == HEADER.size:
        return f'it has no pixels ({width:,} × {height:,})'
    if size > left:
        return f'it needs {size:,} bytes, and {left:,} are left: the file is cut short'
    if size > HEADER.size + MAX_PIXELS:
        return f'{width:,} × {height:,} pixels are too many for one character'
    return ''


def _walk(member: GntMember, report: ErrorHandler) -> Iterator[tuple[bytearray, int, int, bytes, int, int]]:
    """Walks over the sound records of one file.

    Yields (window, start, offset, tag, width, height): the record begins at window[start], and there only until the
    next one is asked for, and at `offset` in the file.
    """
    with contextlib.ExitStack() as stack:
        try:
            stream = stack.enter_context(_opened(member))
        except _READ_ERRORS as error:
            report(GntError(_why(error), member))
            return
        unpack = HEADER.unpack_from
        header, largest = HEADER.size, HEADER.size + MAX_PIXELS
        window = bytearray(min(_WINDOW, member.size + 1))
        start = end = offset = 0
        number = 1
        while True:
            if end - start < HEADER.size:
                window, end, failure = _refill(stream, window, start, end, HEADER.size)
                start = 0
                if end < HEADER.size:
                    if end or failure:
                        report(_cut_short(member, number, offset, window[:end], failure))
                    return
            size, tag, width, height = unpack(window, start)
            # Nearly all are sound and in the window, which this tells without a call.
            if not (size == header + width * height and header < size <= end - start and size <= largest):
                if problem := _problem(size, width, height, member.size - offset):
                    if number == 1:
                        _report_foreign(member, window[:end], problem, report)
                    else:
                        report(GntError(problem, member, number, offset, _FETCH_AGAIN))
                    window, start, end, size = _resynchronise(stream, window, start, end, member.size - offset)
                    if not size:
                        return
                    start, offset, number = start + size, offset + size, number + 1
                    continue
                if end - start < size:
                    window, end, failure = _refill(stream, window, start, end, size)
                    start = 0
                    if end < size:
                        report(_cut_short(member, number, offset, window[:end], failure))
                        return
            yield window, start, offset, tag, width, height
            start += size
            offset += size
            number += 1


def _refill(stream: BinaryIO, window: bytearray, start: int, end: int, needed: int) -> tuple[bytearray, int, str]:
    """Moves the unread bytes to the front and reads on until `needed` are there.

    Returns the window (a larger one where it must be), how many bytes it holds (fewer than `needed` where the file
    ends) and, where reading failed, why.
    """
    kept = end - start
    larger = window if needed <= len(window) else bytearray(needed)
    larger[:kept] = window[start:end]
    view = memoryview(larger)
    while kept < needed:
        try:
            count = stream.readinto(view[kept:])
        except _READ_ERRORS as error:
            return larger, kept, _why(error)
        if not count:
            break
        kept += count
    return larger, kept, ''


def _resynchronise(
    stream: BinaryIO, window: bytearray, start: int, end: int, left: int
) -> tuple[bytearray, int, int, int]:
    """Finds how long a damaged record is, if either its size field or its sides still tell.

    They are believed only if a sound header, or the end of the file, stands where they point. Returns the window, its
    start and end, and the length, 0 if neither tells.
    """
    size, _, width, height = HEADER.unpack_from(window, start)
    for length in (size, HEADER.size + width * height):
        if not HEADER.size < length <= min(left, HEADER.size + MAX_PIXELS):
            continue
        ahead = min(left, length + HEADER.size)
        if end - start < ahead:
            window, end, _ = _refill(stream, window, start, end, ahead)
            start = 0
        if end - start < ahead:
            continue
        if length == left:
            return window, start, end, length
        if ahead == length + HEADER.size:
            following, _, columns, rows = HEADER.unpack_from(window, start + length)
            if not _problem(following, columns, rows, left - length):
                return window, start, end, length
    return window, start, end, 0


@contextlib.contextmanager
def _opened(member: GntMember) -> Iterator[BinaryIO]:
    if member.name:
        with zipfile.ZipFile(member.path) as archive, archive.open(member.name) as stream:
            yield stream
    else:
        # Unbuffered: the bytes go straight into the window.
        with member.path.open('rb', buffering=0) as stream:
            yield stream


def _cut_short(member: GntMember, number: int, offset: int, rest: bytearray, failure: str) -> GntError:
    if number == 1 and not failure and (foreign := _foreign(bytes(rest))):
        return GntError(foreign[0], member, next_step=foreign[1])
    reason = failure or f'only {len(rest):,} bytes are left for it: the file is cut short'
    return GntError(reason, member, number, offset, _FETCH_AGAIN)


def _report_foreign(member: GntMember, head: bytearray, problem: str, report: ErrorHandler) -> None:
    foreign = _foreign(bytes(head[:1024]))
    if foreign:
        report(GntError(foreign[0], member, next_step=foreign[1]))
    else:
        report(GntError(problem, member, 1, 0, 'is this a GNT file? If so, ' + _FETCH_AGAIN))


_MAGIC = {
    b'ALZ\1': ('is an ALZ archive', _UNALZ),
    b'PK\3\4': ('is a zip archive inside an archive', 'unpack the outer one first'),
    b'Rar!': ('is a RAR archive', 'unpack it first'),
    b'7z\xbc\xaf': ('is a 7-Zip archive', 'unpack it first'),
    b'\x1f\x8b': ('is a gzip archive', 'unpack it first'),
    b'\x89PNG': ('is a PNG image', 'images are read by main.py'),
    b'\xff\xd8\xff': ('is a JPEG image', 'images are read by main.py'),
    b'GIF8': ('is a GIF image', 'images are read by main.py'),
    b'\x89HDF': ('is an HDF5 file', 'model files are read by main.py --model'),
    b'%PDF': ('is a PDF document', 'name a .gnt file'),
}


def _foreign(head: bytes) -> tuple[str, str] | None:
    """Says what a file is that does not begin with a sound record, and what to do, if that can be told."""
    for magic, answer in _MAGIC.items():
        if head.startswith(magic):
            return answer
    # The end may be cut within a character.
    text = head.decode('utf-8', 'ignore')
    if text.lstrip().startswith('<') and len(text) > 0.9 * len(head):
        return 'is a web page, not GNT', 'the download brought a page in place of the file: ' + _FETCH_AGAIN
    if len(head) > 3 and all(c.isprintable() or c in '\t\r\n' for c in text) and len(text.encode()) > len(head) - 4:
        return 'is text, not GNT', 'name a .gnt file, a .zip of them or a folder'
    return None


# --- Records in any order --------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class GntIndex:
    """Where each record of a source is: 18 bytes a record, so that millions fit into memory.

    Attributes:
        members: The files.
        member: int32 array of shape `(records,)`: position in `members`.
        offset: int64 array of shape `(records,)`: offset in the file in bytes.
        width: uint16 array of shape `(records,)`: columns.
        height: uint16 array of shape `(records,)`: rows.
        tag_code: uint16 array of shape `(records,)`.
    """

    members: tuple[GntMember, ...]
    member: np.ndarray
    offset: np.ndarray
    width: np.ndarray
    height: np.ndarray
    tag_code: np.ndarray

    def __len__(self) -> int:
        return len(self.offset)

    def labels(self) -> np.ndarray:
        """Return the class index of each record, int32 of shape `(records,)`: −1 outside the 3755."""
        return _class_of_tag()[self.tag_code]

    def select(self, which: np.ndarray) -> 'GntIndex':
        """Return the index of some records only: a boolean array of shape `(records,)`, or positions."""
        return GntIndex(
            self.members,
            self.member[which],
            self.offset[which],
            self.width[which],
            self.height[which],
            self.tag_code[which],
        )

    def shuffled(self, rng: np.random.Generator, files_at_once: int = 16) -> np.ndarray:
        """Return all positions in a random order that stays within a few files at a time.

        The files are dealt at random into groups, and the records of a group are shuffled together, so that `GntReader`
        unpacks each member of an archive once and not for each record.

        Args:
            rng: Source of the randomness; the order depends on it alone.
            files_at_once: Files in a group, about 3,700 records and 20 MB each in CASIA-HWDB. Defaults to `16`.

        Returns:
            int64 array of shape `(records,)`.
        """
        group = rng.permutation(len(self.members)) // files_at_once
        return np.lexsort((rng.random(len(self)), group[self.member]))


def index_gnt(
    source: Source | GntMember | Iterable[Source | GntMember],
    level1_only: bool = True,
    strict: bool = True,
    on_error: ErrorHandler | None = None,
    progress: Progress | None = None,
) -> GntIndex:
    """Note where each record is, for reading in any order with `GntReader`.

    The arguments and errors are those of `read_gnt`, and:

    Args:
        progress: What is called after each file with the number of records so far and the share of the source, 0..1.

    Returns:
        A `GntIndex` in the order in which `read_gnt` gives the records.
    """
    members = _resolve(source, strict, on_error)
    report = _reporter(strict, on_error)
    parts = []
    total = sum(member.size for member in members) or 1
    behind = count = 0
    for member in members:
        parts.append(_index_member(member, level1_only, report))
        behind += member.size
        count += len(parts[-1][0])
        if progress:
            progress(count, behind / total)
    offset, width, height, tag_code = (
        np.concatenate([np.empty(0, dtype), *(np.asarray(part[i], dtype) for part in parts)])
        for i, dtype in enumerate((np.int64, np.uint16, np.uint16, np.uint16))
    )
    member = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part[0]) for part in parts])
    return GntIndex(tuple(members), member, offset, width, height, tag_code)


def _index_member(member: GntMember, level1_only: bool, report: ErrorHandler) -> list[array.array]:
    # Arrays of the standard library: appending to them is fast, and a merged file has a million records.
    columns = [array.array(code) for code in 'qHHH']
    add_offset, add_width, add_height, add_tag = (column.append for column in columns)
    for _, _, offset, tag, width, height in _walk(member, report):
        tag_code, _, is_level1 = _TAGS[tag]
        if is_level1 or not level1_only:
            add_offset(offset)
            add_width(width)
            add_height(height)
            add_tag(tag_code)
    return columns


class GntReader:
    """Reads the records of a `GntIndex` in any order; safe to share between threads, and to send to other processes.

    A record of a file on the disk, or of a member that is stored in an archive without compression, is read from its
    place. A compressed member is unpacked into memory whole and kept while there is room, so ask for records in the
    order of `GntIndex.shuffled`.

    Args:
        index: What `index_gnt` returned.
        cache_bytes: Room for unpacked members in bytes. Defaults to 512 MiB, some 25 writers of CASIA-HWDB.

    Example:

        index = index_gnt('Gnt1.1TrainPart1.zip')
        with GntReader(index) as reader:
            for i in index.shuffled(np.random.default_rng(0)):
                record = reader[i]
    """

    _OPEN_FILES = 128

    def __init__(self, index: GntIndex, cache_bytes: int = 1 << 29):
        self.index = index
        self._cache_bytes = cache_bytes
        self._unpacked: OrderedDict[int, bytes] = OrderedDict()
        self._files: OrderedDict[Path, io.FileIO] = OrderedDict()
        self._entries: dict[Path, dict[str, zipfile.ZipInfo]] = {}
        self._starts: dict[int, int] = {}
        self._lock = threading.Lock()

    def __reduce__(self):
        return GntReader, (self.index, self._cache_bytes)

    def __len__(self) -> int:
        return len(self.index)

    def __enter__(self) -> 'GntReader':
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files and free the memory. The reader opens them again when it is used again."""
        with self._lock:
            for file in self._files.values():
                file.close()
            self._files.clear()
            self._unpacked.clear()

    def __getitem__(self, position: int) -> GntRecord:
        """Read one record.

        Args:
            position: Position in the index, 0 … len − 1.

        Returns:
            A `GntRecord`.

        Raises:
            IndexError: If there is no such position.
            GntError: If the file cannot be read, or has changed since it was indexed.
        """
        index = self.index
        member_id = int(index.member[position])
        offset = int(index.offset[position])
        width, height = int(index.width[position]), int(index.height[position])
        size = HEADER.size + width * height
        member = index.members[member_id]
        try:
            with self._lock:
                data = self._read(member_id, member, offset, size)
        except GntError:
            raise
        except _READ_ERRORS as error:
            raise GntError(_why(error), member) from error
        tag = int(index.tag_code[position]).to_bytes(2, 'big')
        if data[: HEADER.size] != HEADER.pack(size, tag, width, height) or len(data) != size:
            raise GntError(f'the record at byte {offset:,} is not what it was', member, next_step='index it again')
        image = np.frombuffer(data, np.uint8, offset=HEADER.size).reshape(height, width).copy()
        return GntRecord(tag_character(int.from_bytes(tag, 'big')), int.from_bytes(tag, 'big'), image, offset)

    def _read(self, member_id: int, member: GntMember, offset: int, size: int) -> bytes:
        if member.name:
            entry = self._entry(member)
            if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
                return self._unpack(member_id, member)[offset : offset + size]
            if member_id not in self._starts:
                self._starts[member_id] = self._stored_start(member, entry)
            offset += self._starts[member_id]
        return self._read_at(member.path, offset, size)

    def _read_at(self, path: Path, offset: int, size: int) -> bytes:
        if path in self._files:
            self._files.move_to_end(path)
        else:
            if len(self._files) >= self._OPEN_FILES:
                self._files.popitem(last=False)[1].close()
            self._files[path] = path.open('rb', buffering=0)
        file = self._files[path]
        file.seek(offset)
        # One call gives the whole of a record of any usual size; a shorter answer shows as a changed file.
        return file.read(size)

    def _entry(self, member: GntMember) -> zipfile.ZipInfo:
        if member.path not in self._entries:
            with zipfile.ZipFile(member.path) as archive:
                self._entries[member.path] = {entry.filename: entry for entry in archive.infolist()}
        return self._entries[member.path][member.name]

    def _stored_start(self, member: GntMember, entry: zipfile.ZipInfo) -> int:
        # The local header repeats the name and has extra fields of its own, whose lengths are its last two fields.
        name_length, extra_length = struct.unpack('<HH', self._read_at(member.path, entry.header_offset + 26, 4))
        return entry.header_offset + 30 + name_length + extra_length

    def _unpack(self, member_id: int, member: GntMember) -> bytes:
        if member_id in self._unpacked:
            self._unpacked.move_to_end(member_id)
            return self._unpacked[member_id]
        if member.size > self._cache_bytes:
            raise GntError(
                f'unpacked it has {member.size:,} bytes, and {self._cache_bytes:,} may be kept',
                member,
                next_step='unpack the archive to the disk, or give the reader more cache_bytes',
            )
        while self._unpacked and sum(map(len, self._unpacked.values())) + member.size > self._cache_bytes:
            self._unpacked.popitem(last=False)
        with zipfile.ZipFile(member.path) as archive:
            self._unpacked[member_id] = archive.read(member.name)
        return self._unpacked[member_id]


# --- Writing ---------------------------------------------------------------------------------------------------------


def write_gnt(path: Source, records: Iterable[GntRecord | tuple[str, np.ndarray]]) -> int:
    """Write a GNT file; it appears whole or not at all.

    Args:
        path: The file; an existing one is replaced.
        records: Records, or pairs of a character and an image: uint8 of shape `(height, width)`, paper 255.

    Returns:
        How many records were written.

    Raises:
        ValueError: If a character has no tag code, or an image is no such array; no file is written then.
        OSError: If the file cannot be written.
    """
    count = 0
    with written_aside(path) as aside, aside.open('wb') as file:
        for record in records:
            if isinstance(record, GntRecord):
                tag_code, image = record.tag_code, record.image
            else:
                tag_code, image = character_tag(record[0]), record[1]
            file.write(_packed(tag_code, np.asarray(image)))
            count += 1
    return count


def _packed(tag_code: int, image: np.ndarray) -> bytes:
    if image.dtype != np.uint8 or image.ndim != 2:
        raise ValueError(f'a GNT image is a uint8 array (height, width), received {image.dtype} {image.shape}')
    height, width = image.shape
    if not 0 < width < 1 << 16 or not 0 < height < 1 << 16 or width * height > MAX_PIXELS:
        raise ValueError(
            f'a GNT image has 1 to 65535 rows and columns and at most 2**26 pixels, received {image.shape}'
        )
    header = HEADER.pack(HEADER.size + width * height, tag_code.to_bytes(2, 'big'), width, height)
    return header + image.tobytes()


# --- Export ----------------------------------------------------------------------------------------------------------

# What an export leaves beside the images: what was exported, by which `resume` knows its own folder, and the label map.
_EXPORT_FILE = 'export.json'
_LABEL_MAP = 'labels.csv'


def export_gnt(
    source: Source | Iterable[Source],
    folder: Source,
    level1_only: bool = True,
    limit: int | None = None,
    names: str = 'character',
    resume: bool = False,
    on_error: ErrorHandler | None = None,
    progress: Progress | None = None,
) -> Counter[int]:
    """Write each sample as a PNG file, one folder a character.

    The image of a record is `FOLDER/啊/1001-c_84020.png`: the file that it comes from and its offset there. The label
    map `FOLDER/labels.csv` (UTF-8) has one row a folder: index (class index in the published order, empty outside the
    3755), character, gb_code, folder, count. Each file is written aside and renamed, so that an interrupted export can
    be resumed at any point.

    Args:
        source: A path or several.
        folder: Where to write: a folder that does not exist, or is empty.
        level1_only: Whether to leave out all but the 3755 characters. Defaults to `True`.
        limit: Samples of a character at most, the first ones. Defaults to all.
        names: Names of the folders: `'character'` or `'code'`, see `label_folder`. Defaults to `'character'`.
        resume: Whether to go on with an interrupted export of the same files with the same options.
        on_error: What is called with each damaged record, which is left out. Defaults to a Python warning.
        progress: What is called now and then with the number of images so far and the share of the source, 0..1.

    Returns:
        How many images the folder holds for each tag code.

    Raises:
        GntError: If the source does not exist or holds no GNT.
        FileExistsError: If the folder holds something else.
        OSError: If a file cannot be written.
    """
    members = gnt_members(source, strict=False, on_error=on_error)
    folder = Path(folder).expanduser()
    contents = {
        'files': [[member.file_name, member.size] for member in members],
        'level1_only': level1_only,
        'limit': limit,
        'names': names,
    }
    counts: Counter[int] = Counter()
    present: dict[int, set[str]] = {}
    total = sum(member.size for member in members)
    behind = 0
    for member, prefix in zip(members, _prefixes(members), strict=True):
        for record in _records([member], level1_only, _reporter(False, on_error)):
            tag_code = record.tag_code
            if not counts:
                # Not before: a source without samples leaves nothing behind.
                _claim_folder(folder, resume, contents)
            if limit is not None and counts[tag_code] >= limit:
                continue
            target = folder / label_folder(tag_code, names) / f'{prefix}_{record.offset}.png'
            if tag_code not in present:
                target.parent.mkdir(exist_ok=True)
                present[tag_code] = {path.name for path in target.parent.iterdir()}
            if target.name not in present[tag_code]:
                _write_png(target, record.image)
            counts[tag_code] += 1
            if progress:
                progress(counts.total(), (behind + record.offset) / total)
        behind += member.size
    if counts:
        _write_label_map(folder / _LABEL_MAP, counts, names)
    return counts


def _claim_folder(folder: Path, resume: bool, contents: dict) -> None:
    """Makes the folder, or makes sure that it is this very export's."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f'{printable(folder)}: is a file; name a new folder')
    marker = folder / _EXPORT_FILE
    if folder.is_dir() and any(folder.iterdir()):
        if not marker.is_file():
            raise FileExistsError(f'{printable(folder)}: holds other things; name a new or an empty folder')
        if not resume:
            raise FileExistsError(
                f'{printable(folder)}: holds an export; add --resume to go on with it, or name another'
            )
        try:
            same = json.loads(marker.read_text('utf-8')) == contents
        except ValueError:
            same = False
        if not same:
            raise FileExistsError(
                f'{printable(folder)}: holds an export of other files or with other options; name another folder'
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    with written_aside(marker) as aside, aside.open('wb') as file:
        file.write(json.dumps(contents, ensure_ascii=False).encode())


def _prefixes(members: Sequence[GntMember]) -> list[str]:
    """Names each file's images after it, within what every file system takes, and no two files alike."""
    seen: Counter[str] = Counter()
    prefixes = []
    for member in members:
        stem = re.sub(r'[^\w.-]', '_', Path(member.file_name).stem).strip('.')[:80] or 'gnt'
        seen[stem.casefold()] += 1
        repeated = seen[stem.casefold()]
        prefixes.append(stem if repeated == 1 else f'{stem}~{repeated}')
    return prefixes


def _write_png(path: Path, image: np.ndarray) -> None:
    from PIL import Image

    with written_aside(path) as aside, aside.open('wb') as file:
        # Level 3 is as fast as 1 here, and 6 % smaller.
        Image.fromarray(image).save(file, 'PNG', compress_level=3)


def _write_label_map(path: Path, counts: Counter[int], names: str) -> None:
    classes = _class_of_tag()
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    writer.writerow(('index', 'character', 'gb_code', 'folder', 'count'))
    # The published order, and behind it what is outside the 3755 by its code.
    for tag_code in sorted(counts, key=lambda code: (int(classes[code]) % (1 << 16), code)):
        index = '' if classes[tag_code] < 0 else int(classes[tag_code])
        row = index, tag_character(tag_code) or '', f'{tag_code:04X}', label_folder(tag_code, names), counts[tag_code]
        writer.writerow(row)
    with written_aside(path) as aside, aside.open('wb') as file:
        file.write(text.getvalue().encode())


# --- Contact sheet and speed -----------------------------------------------------------------------------------------


def contact_sheet(
    source: Source | Iterable[Source],
    characters: str = '',
    columns: int = 20,
    rows: int = 12,
    level1_only: bool = True,
    seed: int = 0,
    font: Source | None = None,
    on_error: ErrorHandler | None = None,
) -> np.ndarray | None:
    """Draw samples of a source side by side, each above its code, to look at the data.

    Args:
        source: A path or several.
        characters: The characters to show; `''` shows all kinds.
        columns: Samples in a row. Defaults to `20`.
        rows: Rows at most. Defaults to `12`.
        level1_only: Whether to leave out all but the 3755 characters. Defaults to `True`.
        seed: Which samples are drawn by lot. Defaults to `0`.
        font: A font file that has the characters; the samples then stand above their characters.
        on_error: What is called with each damaged record, which is left out. Defaults to a Python warning.

    Returns:
        uint8 array of shape `(height, width)`, 0..255, or `None` if there is no such sample.

    Raises:
        GntError: If the source does not exist or holds no GNT.
        OSError: If the font cannot be read.
    """
    from PIL import Image, ImageDraw, ImageFont

    index = index_gnt(source, level1_only and not characters, strict=False, on_error=on_error)
    if characters:
        index = index.select(np.isin(index.tag_code, [character_tag(character) for character in characters]))
    if not len(index):
        return None
    lot = np.random.default_rng(seed).permutation(len(index))[: columns * rows]
    # Read in the order of the files, shown in the order of the codes, so that one character's samples stand together.
    with GntReader(index) as reader:
        records = sorted((reader[i] for i in np.sort(lot)), key=lambda record: record.tag_code)
    cell, caption, margin = 80, 20, 4
    face = ImageFont.truetype(os.fspath(font), 16) if font else ImageFont.load_default(12)
    columns = min(columns, len(records))
    rows = -(-len(records) // columns)
    sheet = Image.new('L', (columns * (cell + margin) + margin, rows * (cell + caption + margin) + margin), 225)
    draw = ImageDraw.Draw(sheet)
    for i, record in enumerate(records):
        left, top = margin + i % columns * (cell + margin), margin + i // columns * (cell + caption + margin)
        sheet.paste(255, (left, top, left + cell, top + cell))
        image = Image.fromarray(record.image)
        image.thumbnail((cell, cell))
        sheet.paste(image, (left + (cell - image.width) // 2, top + (cell - image.height) // 2))
        text = record.character if font and record.character else f'{record.tag_code:04X}'
        draw.text((left + cell // 2, top + cell + caption // 2), text, fill=0, font=face, anchor='mm')
    return np.asarray(sheet)


def reading_speed(path: Source, runs: int = 5) -> tuple[float, float]:
    """Measure how fast the records of a GNT file are read, beside the plain bytes of the same file.

    The two take turns, so that both see the same state of the machine; the file should have been read before.

    Args:
        path: A `.gnt` file.
        runs: Turns. Defaults to `5`.

    Returns:
        (records, plain): the median of each in MB/s, 10⁶ bytes.
    """
    seconds: tuple[list[float], list[float]] = ([], [])
    size = Path(path).stat().st_size
    window = bytearray(_WINDOW)
    for _ in range(runs):
        start = time.perf_counter()
        for _ in read_gnt(path, level1_only=False):
            pass
        middle = time.perf_counter()
        with Path(path).open('rb', buffering=0) as file:
            while file.readinto(window):
                pass
        seconds[0].append(middle - start)
        seconds[1].append(time.perf_counter() - middle)
    return size / statistics.median(seconds[0]) / 1e6, size / statistics.median(seconds[1]) / 1e6


# --- Command line ----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: What stands behind the program's name. Defaults to `sys.argv[1:]`.

    Returns:
        Exit status: 0, or 1 if something could not be read or written, or 130 on Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that cannot show 啊 shows its escape, and is no reason to stop.
            stream.reconfigure(errors='backslashreplace')
    options = _parser().parse_args(arguments)
    errors: list[Exception] = []
    try:
        options.run(options, errors)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print('\ninterrupted', file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read our output has seen enough; the interpreter must not try to flush the rest.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except (OSError, ValueError) as error:
        errors.append(error)
    for error in errors:
        print(f'gnt_reader.py: {message(error)}', file=sys.stderr)
    return 1 if errors else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='gnt_reader.py',
        description='Look into GNT files (CASIA-HWDB, ICDAR-2013) and export their samples.',
        epilog='A SOURCE is a .gnt file, a .zip of .gnt files (read as it is) or a folder with either. '
        'COMMAND --help says more. Exit status: 0, 1 if something could not be read, 2 for wrong usage, 130 on Ctrl-C.',
    )
    commands = parser.add_subparsers(metavar='COMMAND', required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument('sources', metavar='SOURCE', nargs='+', help='.gnt file, .zip of .gnt files, or folder')
    which = argparse.ArgumentParser(add_help=False)
    group = which.add_mutually_exclusive_group()
    group.add_argument('--level1', action='store_true', help='the 3755 characters of GB2312-80 level 1 (default)')
    group.add_argument('--all', action='store_true', help='every class: punctuation, letters and digits too')

    info = commands.add_parser(
        'info',
        parents=[shared],
        help='files, writers, samples, classes, sizes, damaged records',
        description='Say what sources hold. Damaged records are named at the end, and make the exit status 1.',
        epilog='example: python gnt_reader.py info Gnt1.1TrainPart1.zip Gnt1.1TrainPart2.zip',
    )
    info.add_argument(
        '--speed', action='store_true', help='also measure the reading of each .gnt file against its plain bytes'
    )
    info.set_defaults(run=_run_info)

    export = commands.add_parser(
        'export',
        parents=[shared, which],
        help='one PNG a sample, one folder a character',
        description='Write each sample as OUT/啊/1001-c_84020.png (its file and its offset there), and a label map '
        'OUT/labels.csv: index (class index of the models, empty outside the 3755), character, gb_code, folder, count. '
        'What cannot name a folder on every system (/, A beside a) has its code for a name. All of HWDB1.0 and 1.1 '
        'takes 2.7 million files: try --limit first.',
        epilog='example: python gnt_reader.py export HWDB1.1/ png/ --limit 20',
    )
    export.add_argument('out', metavar='OUT', help='a new or empty folder')
    export.add_argument(
        '--names', choices=('character', 'code'), default='character', help='names of the folders (default: character)'
    )
    export.add_argument(
        '--limit', metavar='N', type=whole_number, help='N samples of a character at most (default: all)'
    )
    export.add_argument(
        '--resume', action='store_true', help='go on with an interrupted export, same files and options'
    )
    export.set_defaults(run=_run_export)

    # A sheet of 100 × 100 samples has 84 megapixels: as much as a viewer takes.
    few = functools.partial(whole_number, most=100)
    sheet = commands.add_parser(
        'sheet',
        parents=[shared, which],
        help='a contact sheet to look at',
        description='Draw samples, chosen by lot, side by side into one image, each above its GB code.',
        epilog='example: python gnt_reader.py sheet HWDB1.1/ sheet.png --only 峻峨',
    )
    sheet.add_argument('out', metavar='OUT.png', type=_png, help='the image to write, replaced if it is there')
    sheet.add_argument('--only', metavar='CHARACTERS', default='', help='samples of these characters only')
    sheet.add_argument('--columns', metavar='N', type=few, default=20, help='samples in a row (default: 20)')
    sheet.add_argument('--rows', metavar='N', type=few, default=12, help='rows at most (default: 12)')
    sheet.add_argument('--seed', metavar='N', type=int, default=0, help='another number, other samples (default: 0)')
    sheet.add_argument('--font', metavar='FILE', help='a Chinese font: characters in place of codes')
    sheet.set_defaults(run=_run_sheet)
    return parser


def _png(text: str) -> str:
    # Without OUT.png the last source would be taken for it, and replaced.
    if Path(text).suffix.lower() != '.png':
        raise argparse.ArgumentTypeError(f'the image to write ends in .png, received {text!r}')
    return text


def _run_info(options: argparse.Namespace, errors: list[Exception]) -> None:
    with _ProgressLine() as progress:
        index = index_gnt(options.sources, level1_only=False, strict=False, on_error=errors.append, progress=progress)
    empty = [member for member in index.members if not member.size]
    errors += [GntError('it is empty', member, next_step=_FETCH_AGAIN) for member in empty]
    if errors and not len(index):
        return
    for name, value in (*_summary(index), ('damaged', f'{len(errors):,} places')):
        print(f'{name:12}{value}')
    if options.speed:
        for member in index.members:
            if not member.name and member.size:
                records, plain = reading_speed(member.path)
                print(f'{"speed":12}{printable(member)}: records {records:,.0f} MB/s, plain bytes {plain:,.0f} MB/s')


def _summary(index: GntIndex) -> Iterator[tuple[str, str]]:
    writers = sorted({member.writer for member in index.members if member.size}, key=natural_key)
    labels = index.labels()
    known = np.unique(labels[labels >= 0])
    others = np.unique(index.tag_code[labels < 0])
    yield 'files', f'{len(index.members):,}, {sum(member.size for member in index.members):,} bytes'
    yield 'writers', f'{len(writers):,}' + (f', {printable(writers[0])} … {printable(writers[-1])}' if writers else '')
    competition = sum(member.is_competition for member in index.members)
    if competition:
        yield 'test set', f'{competition:,} files of the ICDAR-2013 competition: never to train on'
    yield 'samples', f'{len(index):,}'
    yield 'level 1', f'{np.count_nonzero(labels >= 0):,} samples of {len(known):,} of {len(LABELS):,} characters'
    missing = ''.join(LABELS[i] for i in np.setdiff1d(np.arange(len(LABELS)), known))
    if 0 < len(missing) <= 20:
        yield 'missing', missing
    yield 'others', f'{np.count_nonzero(labels < 0):,} samples of {len(others):,} characters'
    if len(index):
        for name, sides in (('width', index.width), ('height', index.height)):
            low, middle, high = np.percentile(sides, (0, 50, 100))
            yield name, f'{low:.0f} to {high:.0f} pixels, median {middle:.0f}'


def _run_export(options: argparse.Namespace, errors: list[Exception]) -> None:
    with _ProgressLine() as progress:
        counts = export_gnt(
            options.sources,
            options.out,
            level1_only=not options.all,
            limit=options.limit,
            names=options.names,
            resume=options.resume,
            on_error=errors.append,
            progress=progress,
        )
    if counts:
        print(f'{counts.total():,} images of {len(counts):,} characters in {printable(options.out)}')
    elif not errors:
        raise GntError('there is no sample to export', ', '.join(options.sources), next_step='look with `info`')


class _ProgressLine:
    """One line on stderr: rewritten in place on a terminal, a new one every ten seconds in a log."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._start = self._last = time.monotonic()
        self._open = False

    def __call__(self, samples: int, share: float) -> None:
        now = time.monotonic()
        if now - self._last < (0.2 if self._terminal else 10):
            return
        self._last = now
        line = f'{share:4.0%}  {samples:,} samples, {samples / (now - self._start):,.0f} a second'
        print(
            f'\r{line}  ' if self._terminal else line, end='' if self._terminal else '\n', file=sys.stderr, flush=True
        )
        self._open = self._terminal

    def __enter__(self) -> '_ProgressLine':
        return self

    def __exit__(self, *_: object) -> None:
        if self._open:
            print(file=sys.stderr)


def _run_sheet(options: argparse.Namespace, errors: list[Exception]) -> None:
    # These of os.path raise nothing: not for the home of nobody, nor for links that lead to each other.
    out, *sources = (os.path.realpath(os.path.expanduser(path)) for path in (options.out, *options.sources))
    if out in sources:
        raise GntError('this is a source, and would be replaced', out, next_step='name another OUT.png')
    sheet = contact_sheet(
        options.sources,
        characters=options.only,
        columns=options.columns,
        rows=options.rows,
        level1_only=not options.all,
        seed=options.seed,
        font=options.font,
        on_error=errors.append,
    )
    if sheet is not None:
        _write_png(Path(out), sheet)
        print(f'{printable(options.out)}: {sheet.shape[1]} × {sheet.shape[0]} pixels')
    elif not errors:
        raise GntError('there is no such sample', ', '.join(options.sources), next_step='look with `info`')


if __name__ == '__main__':
    sys.exit(main())
