"""The entries of a zip, each checked against the size of the file. Pure: the caller's `read` returns the bytes.

Everything that torch.save does not write is refused: compression, encryption, comments, several disks, overlapping
entries, names that are not part of a checkpoint. So two readers cannot see different files in the same bytes.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from unbroken.checkpoint.format import zip_layout
from unbroken.text import printable

MAX_ENTRIES = 100_000
MAX_DIRECTORY = 32 << 20  # bytes; an entry of ours takes about 100
MAX_ENTRY = 1024  # of its bytes in the directory
_NAME = re.compile(
    r"([^/\\\x00-\x1f\x7f]{1,200})/(data\.pkl|byteorder|version|\.format_version|\.storage_alignment"
    r"|\.data/serialization_id|data/(?:0|[1-9][0-9]{0,8}))",
    re.ASCII,
)

Read = Callable[[int, int], bytes]  # (offset, size) -> exactly that many bytes, or ValueError


@dataclass(frozen=True)
class ZipEntry:
    """An entry of a checkpoint's zip: its name below the root, the place of its payload, and its CRC-32."""

    name: str
    offset: int
    size: int
    crc: int


@dataclass(frozen=True)
class _DirectoryEntry:
    name: bytes
    flags: int
    crc: int
    size: int
    header: int


def list_entries(read: Read, file_size: int) -> dict[str, ZipEntry]:
    """Return the entries by name. Raises ValueError with the reason."""
    start, size, count = _find_directory(read, file_size)
    directory = read(start, size)
    listed = list(_parse_directory(directory, count))
    items: dict[str, ZipEntry] = {}
    roots = set()
    reached = 0
    for entry in sorted(listed, key=lambda entry: entry.header):
        if entry.header < reached:
            raise ValueError("entries of the zip overlap")
        root, name = _checked_name(entry.name)
        roots.add(root)
        if name in items:
            raise ValueError(f"the zip has two entries {printable(name)}")
        offset = _payload(read, entry, start)
        reached = offset + entry.size
        items[name] = ZipEntry(name, offset, entry.size, entry.crc)
    if len(roots) > 1:
        raise ValueError("the zip's entries do not share one folder")
    return items


def _find_directory(read: Read, file_size: int) -> tuple[int, int, int]:
    """Return (offset, size, entries) of the central directory, which must fill the file up to its end records."""
    if file_size < zip_layout.END.size:
        raise ValueError(f"it has {file_size} bytes, which is no checkpoint")
    end = file_size - zip_layout.END.size
    mark, disk, first, here, count, size, start, comment = zip_layout.END.unpack(read(end, zip_layout.END.size))
    if mark != zip_layout.END_MARK or comment:
        raise ValueError("it does not end like a checkpoint: it is cut off, or another kind of file")
    if disk or first or here != count:
        raise ValueError("the zip claims to have several parts")
    locator_at = end - zip_layout.LOCATOR.size
    end64 = locator_at - zip_layout.END64.size
    if end64 >= 0:
        locator = zip_layout.LOCATOR.unpack(read(locator_at, zip_layout.LOCATOR.size))
        if locator[0] == zip_layout.LOCATOR_MARK:
            if locator[1:] != (0, end64, 1):
                raise ValueError("the zip's end records contradict each other")
            fields = zip_layout.END64.unpack(read(end64, zip_layout.END64.size))
            short, end = (count, size, start), end64
            count, size, start = _end64(fields)
            for small, large, limit in zip(
                short, (count, size, start), (0xFFFF, zip_layout.LIMIT, zip_layout.LIMIT), strict=True
            ):
                if small != limit and small != large:
                    raise ValueError("the zip's end records contradict each other")
    fits = count <= MAX_ENTRIES and count * zip_layout.CENTRAL.size <= size <= min(count * MAX_ENTRY, MAX_DIRECTORY)
    if not fits or start + size != end:
        raise ValueError("the zip's directory does not fit into the file")
    return start, size, count


def _end64(fields: tuple[Any, ...]) -> tuple[int, int, int]:
    mark, length, _, _, disk, first, here, count, size, start = fields
    if mark != zip_layout.END64_MARK or length != zip_layout.END64.size - 12 or disk or first or here != count:
        raise ValueError("the zip's end records make no sense")
    return count, size, start


def _parse_directory(directory: bytes, count: int) -> Iterator[_DirectoryEntry]:
    position = 0
    for _ in range(count):
        if position + zip_layout.CENTRAL.size > len(directory):
            raise ValueError("the zip's directory is cut off")
        fields = zip_layout.CENTRAL.unpack_from(directory, position)
        mark, _, _, flags, method, _, _, crc, packed, size, named, extra, comment, disk, _, _, header = fields
        begin = position + zip_layout.CENTRAL.size
        position = begin + named + extra + comment
        if mark != zip_layout.CENTRAL_MARK or position > len(directory):
            raise ValueError("the zip's directory is damaged")
        if method != 0 or flags & ~zip_layout.FLAGS or comment or disk:
            raise ValueError("the zip has compressed, encrypted or commented entries, which no checkpoint has")
        name = directory[begin : begin + named]
        size, packed, header = _zip64(directory[begin + named : begin + named + extra], size, packed, header)
        if packed != size:
            raise ValueError("the zip has an entry whose sizes contradict each other")
        yield _DirectoryEntry(name, flags, crc, size, header)
    if position != len(directory):
        raise ValueError("the zip's directory is longer than its entries")


def _zip64(extra: bytes, size: int, packed: int, header: int) -> tuple[int, int, int]:
    """Return the 64-bit values of numbers that do not fit into their fields (APPNOTE 4.5.3)."""
    numbers = (size, packed, header)
    is_large = [number == zip_layout.LIMIT for number in numbers]
    count = sum(is_large)
    if count == 0:
        return numbers
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, position)
        if kind == zip_layout.ZIP64_FIELD and length >= 8 * count and position + 4 + length <= len(extra):
            large = iter(struct.unpack_from(f"<{count}Q", extra, position + 4))
            size, packed, header = (next(large) if is_large[i] else numbers[i] for i in range(3))
            return size, packed, header
        position += 4 + length
    raise ValueError("the zip has a large entry without its size")


def _checked_name(encoded: bytes) -> tuple[str, str]:
    """Return (root, name below it) of an entry. Raises ValueError for a name that no checkpoint has."""
    try:
        text = encoded.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError("the zip has an entry whose name is no text") from None
    match = _NAME.fullmatch(text)
    if match is None or match[1] in (".", ".."):
        raise ValueError(f"the zip has an entry {printable(text)!r}, which no checkpoint has")
    return match[1], match[2]


def _payload(read: Read, entry: _DirectoryEntry, limit: int) -> int:
    """Return the offset of the payload. The local header must exist and agree with the directory."""
    least = zip_layout.LOCAL.size + len(entry.name)
    if entry.header + least + entry.size > limit:
        raise ValueError(f"{printable(entry.name.decode())} reaches beyond the end of the file")
    start = read(entry.header, least)
    mark, _, flags, method, _, _, crc, packed, size, named, extra = zip_layout.LOCAL.unpack_from(start)
    if mark != zip_layout.LOCAL_MARK or named != len(entry.name) or start[zip_layout.LOCAL.size :] != entry.name:
        raise ValueError(f"{printable(entry.name.decode())} is not where the zip's directory says")
    if method != 0 or flags != entry.flags or crc not in (0, entry.crc):
        raise ValueError(f"{printable(entry.name.decode())} contradicts the zip's directory")
    if not flags & 0x0008 and entry.size < zip_layout.LIMIT and (size, packed) != (entry.size, entry.size):
        raise ValueError(f"{printable(entry.name.decode())} contradicts the zip's directory")
    offset = int(entry.header + least + extra)
    if offset + entry.size > limit:
        raise ValueError(f"{printable(entry.name.decode())} reaches beyond the end of the file")
    return offset
