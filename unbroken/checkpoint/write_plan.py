"""The plan of a save: the bytes of the file that each rank writes, and their places in memory. Pure.

Each rank holds slices of the storages in its own host buffer. Modulo 4096, their addresses equal their offsets in the
file, so whole blocks are written without being copied. At the end rank 0 writes what does not fill a block:
the ends of slices, and the headers of the zip between them. On one rank the buffer is an image of the file, and nearly
every header is written together with its neighbours.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from unbroken.checkpoint.format.checksum import crc32_combine
from unbroken.checkpoint.format.zip_layout import BLOCK, Layout, plan_layout

CHUNK = 16 << 20  # bytes per write: large for the disk, small enough for every thread to get its share


@dataclass(frozen=True)
class Part:
    """A part of a storage, bytes [start, start + size), at `place` in this rank's host buffer."""

    storage: int
    start: int
    size: int
    place: int


@dataclass(frozen=True)
class Write:
    """A unit of work of a writing thread, in bytes; `offset`, `size` and `place` are whole blocks.

    First the parts are checksummed, then `gaps` (storages followed by their descriptor and the next header) are filled
    in, then the blocks are written. `fragments` (offset, size, place) lie outside of the blocks.
    """

    offset: int
    size: int
    place: int
    parts: tuple[Part, ...]
    gaps: tuple[int, ...] = ()
    fragments: tuple[tuple[int, int, int], ...] = ()


def round_down(value: int) -> int:
    return value // BLOCK * BLOCK


def round_up(value: int) -> int:
    return -(-value // BLOCK) * BLOCK


def place_parts(storage_sizes: Sequence[int], slices: Sequence[tuple[int, int, int]]) -> tuple[list[Part], int]:
    """Return the places of the sorted slices (storage, start, size) in the host buffer, and the buffer's size.

    Slices that are neighbours in the file keep their distance; larger holes are closed.
    """
    nominal = plan_layout(0, storage_sizes).storages
    parts: list[Part] = []
    shift = 0  # file offset minus place, a whole number of blocks
    end = 0  # of the last part in the buffer
    for storage, start, size in slices:
        if size == 0:
            continue
        offset = nominal[storage].offset + start
        if not parts or offset - shift - end > 2 * BLOCK:
            shift = round_down(offset) - round_up(end)
        parts.append(Part(storage, start, size, offset - shift))
        end = offset - shift + size
    return parts, round_up(end)


def plan_writes(layout: Layout, parts: Sequence[Part], chunk: int = CHUNK) -> list[Write]:
    """Return the units of work for the parts of this rank: `chunk` bytes each at most, and headers between parts."""
    writes: list[Write] = []
    run: list[Part] = []
    sealed = False  # whether the gap after the last part of the run is written with it
    for index, part in enumerate(parts):
        entry = layout.storages[part.storage]
        small = part.size == entry.size <= chunk
        if run and (not small or run[-1].place + run[-1].size - run[0].place + part.size > chunk):
            writes.append(_write(layout, run, sealed))
            run, sealed = [], False
        if not small:
            writes += [_write(layout, [cut], False) for cut in _split(layout, part, chunk)]
            continue
        run.append(part)
        sealed = index + 1 < len(parts) and _adjacent(layout, part, parts[index + 1])
        if not sealed:
            writes.append(_write(layout, run, False))
            run = []
    assert not run, "the gap after the last part is not in the buffer"
    return writes


def _adjacent(layout: Layout, part: Part, following: Part) -> bool:
    """Return whether the next part follows in the host buffer exactly as it does in the file."""
    if following.storage != part.storage + 1 or following.start != 0:
        return False
    distance = layout.storages[following.storage].offset - layout.storages[part.storage].offset
    return following.place - part.place == distance


def _split(layout: Layout, part: Part, chunk: int) -> Iterator[Part]:
    """Yield a large part cut on block boundaries of the file."""
    base = layout.storages[part.storage].offset
    start, stop = part.start, part.start + part.size
    while start < stop:
        cut = min(stop, round_down(base + start) + chunk - base)
        yield Part(part.storage, start, cut - start, part.place + start - part.start)
        start = cut


def _write(layout: Layout, run: Sequence[Part], sealed: bool) -> Write:
    """Return the write of parts that follow each other in the file; if `sealed`, with the gap after the last one."""
    first, last = run[0], run[-1]
    begin = layout.storages[first.storage].offset + first.start
    end = layout.storages[last.storage].offset + last.start + last.size
    gaps = tuple(part.storage for part in (run if sealed else run[:-1]))
    if sealed:
        end = layout.storages[last.storage + 1].offset
    shift = begin - first.place
    low, high = round_up(begin), max(round_up(begin), round_down(end))
    fragments = [(begin, min(low, end) - begin), (high, end - high)]
    kept = tuple((offset, size, offset - shift) for offset, size in fragments if size > 0)
    return Write(low, high - low, low - shift, tuple(run), gaps, kept)


def combine_crcs(sizes: Sequence[int], part_crcs: Sequence[tuple[int, int, int, int]]) -> list[int]:
    """Return the CRC of every storage from those of its parts (storage, start, size, crc).

    Raises ValueError unless the parts cover each storage exactly once.
    """
    crcs, reached = [0] * len(sizes), [0] * len(sizes)
    for storage, start, size, crc in sorted(part_crcs):
        if start != reached[storage]:
            raise ValueError(f"bytes {reached[storage]} to {start} of storage {storage} belong to no process or to two")
        crcs[storage] = crc32_combine(crcs[storage], crc, size)
        reached[storage] += size
    for storage, size in enumerate(sizes):
        if reached[storage] != size:
            raise ValueError(f"bytes {reached[storage]} to {size} of storage {storage} belong to no process")
    return crcs


def unwritten_blocks(
    size: int, written: Sequence[tuple[int, int]], known: Sequence[tuple[int, bytes]]
) -> Iterator[tuple[int, bytes]]:
    """Yield the blocks (offset, bytes) of the file that no rank has written.

    Args:
        size: the size of the file, whose last block is filled with zeros.
        written: (offset, size) in whole blocks.
        known: (offset, bytes), from which the blocks are made.

    Raises ValueError if a block is written twice, or has bytes that are not known.
    """
    ordered = sorted(known)
    starts = [offset for offset, _ in ordered]
    position = 0
    for offset, length in [*sorted(written), (round_up(size), 0)]:
        if offset < position:
            raise ValueError(f"bytes {offset} to {position} of the file belong to two processes")
        if offset > position:
            first = max(0, bisect_left(starts, position) - 1)
            yield position, _join(position, offset, size, ordered[first : bisect_left(starts, offset)])
        position = offset + length


def _join(begin: int, end: int, size: int, known: Sequence[tuple[int, bytes]]) -> bytes:
    """Return bytes [begin, end) of a file of `size` bytes from sorted (offset, bytes)."""
    block = bytearray(end - begin)
    reached = begin
    for offset, content in known:
        low, high = max(offset, begin), min(offset + len(content), end)
        if low < high:
            if low != reached:
                break
            block[low - begin : high - begin] = memoryview(content)[low - offset : high - offset]
            reached = high
    if reached != min(end, size):
        raise ValueError(f"the bytes from {reached} of the file belong to no process")
    return bytes(block)
