"""The bytes of the zip that `torch.load` reads, as a function of names and sizes. Pure: opens no file.

The form is torch.save's own (PyTorchStreamWriter): stored entries, each followed by a data descriptor with its CRC-32,
so that a file can be written front to back. An extra field "FB" pads each payload to its alignment: 4096 bytes for
storages, which O_DIRECT needs. Source: PKWARE APPNOTE 6.3.10, sections 4.3.7 to 4.5.3; getPadding in torch's
caffe2/serialize/inline_container.cc.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from unbroken.checkpoint.format.checksum import crc32

ROOT = "archive"  # torch takes any name before the first slash; a constant makes equal states equal files
BLOCK = 4096  # O_DIRECT needs offsets, sizes and addresses that are multiples of this
LIMIT = 0xFFFFFFFF  # sizes and offsets from here on need zip64 fields
FLAGS = 0x0808  # a data descriptor follows; the name is UTF-8
_DATE = 0x0021  # 1980-01-01: equal states make equal files

LOCAL = struct.Struct("<4sHHHHHIIIHH")
CENTRAL = struct.Struct("<4sHHHHHHIIIHHHHHII")
END64 = struct.Struct("<4sQHHIIQQQQ")
LOCATOR = struct.Struct("<4sIQI")
END = struct.Struct("<4sHHHHIIH")
LOCAL_MARK, CENTRAL_MARK, DESCRIPTOR_MARK = b"PK\x03\x04", b"PK\x01\x02", b"PK\x07\x08"
END64_MARK, LOCATOR_MARK, END_MARK = b"PK\x06\x06", b"PK\x06\x07", b"PK\x05\x06"
ZIP64_FIELD, PADDING_FIELD = 0x0001, 0x4246  # "FB"


@dataclass(frozen=True)
class Entry:
    """An entry of the zip: its local header is at `header`, its payload at `offset`; all in bytes."""

    name: bytes
    size: int
    header: int
    offset: int

    @property
    def end(self) -> int:
        return self.offset + self.size

    @property
    def zip64(self) -> bool:
        return self.size >= LIMIT or self.header >= LIMIT

    @property
    def after(self) -> int:
        """Offset of the next local header. As in torch's files, no descriptor follows an empty payload."""
        return self.end + (0 if self.size == 0 else 24 if self.zip64 else 16)


def place_entry(name: str, size: int, header: int, alignment: int) -> Entry:
    """Return an entry of the zip.

    Args:
        name: Its name below ROOT.
        size: Bytes of its payload.
        header: Offset of its local header.
        alignment: The offset of its payload is a multiple of this.
    """
    encoded = f"{ROOT}/{name}".encode()
    bare = Entry(encoded, size, header, 0)
    least = header + LOCAL.size + len(encoded) + len(_zip64_field(bare)) + 4  # the padding field has 4 bytes of its own
    return Entry(encoded, size, header, -(-least // alignment) * alignment)


def _zip64_field(entry: Entry) -> bytes:
    values = [entry.size, entry.size] if entry.size >= LIMIT else []
    values += [entry.header] if entry.header >= LIMIT else []
    return struct.pack(f"<HH{len(values)}Q", ZIP64_FIELD, 8 * len(values), *values) if values else b""


def local_header(entry: Entry) -> bytes:
    """Return the bytes from `entry.header` to `entry.offset`. Its CRC field is 0: the descriptor holds it."""
    known = LOCAL.size + len(entry.name) + len(_zip64_field(entry)) + 4
    padding = entry.offset - entry.header - known
    extra = _zip64_field(entry) + struct.pack("<HH", PADDING_FIELD, padding) + b"Z" * padding
    large = LIMIT if entry.size >= LIMIT else 0
    version, crc = _version(entry), 0
    fields = (version, _flags(entry), 0, 0, _DATE, crc, large, large, len(entry.name), len(extra))
    return LOCAL.pack(LOCAL_MARK, *fields) + entry.name + extra


def _version(entry: Entry) -> int:
    return 45 if entry.zip64 else 20


def _flags(entry: Entry) -> int:
    return FLAGS if entry.size else FLAGS & ~0x0008


def descriptor(entry: Entry, crc: int) -> bytes:
    """Return the bytes from `entry.end` to `entry.after`."""
    if entry.size == 0:
        return b""
    return struct.pack("<4sIQQ" if entry.zip64 else "<4sIII", DESCRIPTOR_MARK, crc, entry.size, entry.size)


def _central(entry: Entry, crc: int) -> bytes:
    extra = _zip64_field(entry)
    size, header = min(entry.size, LIMIT), min(entry.header, LIMIT)
    version = _version(entry)
    fields = (version, version, _flags(entry), 0, 0, _DATE, crc, size, size, len(entry.name), len(extra))
    return CENTRAL.pack(CENTRAL_MARK, *fields, 0, 0, 0, 0, header) + entry.name + extra


@dataclass(frozen=True)
class Layout:
    """A layout of a whole file: small entries, storages, central directory. The sizes determine everything."""

    small: tuple[Entry, ...]
    storages: tuple[Entry, ...]

    @property
    def entries(self) -> tuple[Entry, ...]:
        return self.small + self.storages

    @property
    def directory(self) -> int:
        """Offset of the central directory."""
        return self.entries[-1].after

    @property
    def size(self) -> int:
        """Size of the whole file in bytes."""
        listed = sum(CENTRAL.size + len(entry.name) + len(_zip64_field(entry)) for entry in self.entries)
        return self.directory + listed + END64.size + LOCATOR.size + END.size

    def gap(self, index: int, crc: int) -> bytes:
        """Return the bytes between storage `index`, whose checksum is `crc`, and the next storage."""
        return descriptor(self.storages[index], crc) + local_header(self.storages[index + 1])


def small_contents(pickled: bytes) -> dict[str, bytes]:
    """Return the entries that are not storages, in the order of the file."""
    return {
        "data.pkl": pickled,
        ".format_version": b"1",
        ".storage_alignment": str(BLOCK).encode(),
        "byteorder": b"little",
        "version": b"3\n",
    }


def plan_layout(pickle_size: int, storage_sizes: Sequence[int]) -> Layout:
    """Return the layout of a checkpoint whose pickle and storages have these sizes in bytes."""
    small: list[Entry] = []
    storages: list[Entry] = []
    header = 0
    for name, content in small_contents(b"").items():
        small.append(place_entry(name, pickle_size if name == "data.pkl" else len(content), header, 64))
        header = small[-1].after
    for index, size in enumerate(storage_sizes):
        storages.append(place_entry(f"data/{index}", size, header, BLOCK))
        header = storages[-1].after
    return Layout(tuple(small), tuple(storages))


def fixed_parts(layout: Layout, pickled: bytes, crcs: Sequence[int]) -> Iterator[tuple[int, bytes]]:
    """Yield everything but the payloads of the storages, as (offset, bytes) in the order of the file."""
    contents = list(small_contents(pickled).values())
    small_crcs = [crc32(content) for content in contents]
    front = b"".join(
        local_header(entry) + content + descriptor(entry, crc)
        for entry, content, crc in zip(layout.small, contents, small_crcs, strict=True)
    )
    count = len(layout.storages)
    if count == 0:
        yield 0, front + _directory(layout, small_crcs)
        return
    yield 0, front + local_header(layout.storages[0])
    for index in range(count - 1):
        yield layout.storages[index].end, layout.gap(index, crcs[index])
    last = layout.storages[-1]
    yield last.end, descriptor(last, crcs[-1]) + _directory(layout, [*small_crcs, *crcs])


def _directory(layout: Layout, crcs: Sequence[int]) -> bytes:
    listed = b"".join(_central(entry, crc) for entry, crc in zip(layout.entries, crcs, strict=True))
    start, count = layout.directory, len(layout.entries)
    end64 = END64.pack(END64_MARK, END64.size - 12, 45, 45, 0, 0, count, count, len(listed), start)
    locator = LOCATOR.pack(LOCATOR_MARK, 0, start + len(listed), 1)
    short = min(count, 0xFFFF)
    end = END.pack(END_MARK, 0, 0, short, short, min(len(listed), LIMIT), min(start, LIMIT), 0)
    return listed + end64 + locator + end
