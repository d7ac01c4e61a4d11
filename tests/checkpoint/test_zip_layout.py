"""The bytes of the zip: every reader in the world accepts them, whatever the sizes; and the plan covers every
byte once.
"""

from __future__ import annotations

import io
import itertools
import os
import random
import shutil
import subprocess
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unbroken.checkpoint import write_plan
from unbroken.checkpoint.format import checksum, zip_layout
from unbroken.checkpoint.format.pickle_writer import pickle_tree
from unbroken.checkpoint.format.zip_index import list_entries
from unbroken.distributed.sliced_tensor import SlicedTensor

GIB = 1 << 30
SIZES = st.lists(st.one_of(st.integers(0, 70), st.sampled_from([4095, 4096, 4097, 8192, 12289])), max_size=12)


def whole_file(pickle: bytes, payloads: list[bytes]) -> bytes:
    """A file put together from the layout and nothing else."""
    layout = zip_layout.plan_layout(len(pickle), [len(payload) for payload in payloads])
    file = bytearray(layout.size)
    covered = 0
    for offset, content in zip_layout.fixed_parts(layout, pickle, [zlib.crc32(payload) for payload in payloads]):
        file[offset : offset + len(content)] = content
        covered += len(content)
    for entry, payload in zip(layout.storages, payloads, strict=True):
        file[entry.offset : entry.end] = payload
        covered += len(payload)
    assert covered == layout.size, "the skeleton and the payloads leave a hole or overlap"
    return bytes(file)


@given(sizes=SIZES, pickle_size=st.integers(0, 9000))
def test_any_sizes_make_a_zip_that_verifies(sizes: list[int], pickle_size: int) -> None:
    draw = random.Random(0)
    payloads = [draw.randbytes(size) for size in sizes]
    pickle = draw.randbytes(pickle_size)
    data = whole_file(pickle, payloads)
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        assert file.testzip() is None
        assert file.read("archive/data.pkl") == pickle
        assert [file.read(f"archive/data/{index}") for index in range(len(sizes))] == payloads
    layout = zip_layout.plan_layout(pickle_size, sizes)
    assert all(entry.offset % 4096 == 0 for entry in layout.storages)
    listed = list_entries(lambda offset, size: data[offset : offset + size], len(data))
    assert [listed[f"data/{i}"].offset for i in range(len(sizes))] == [entry.offset for entry in layout.storages]


@pytest.mark.parametrize("payload", [b"x" * 100, b"y" * 5000])
def test_twin_a_flipped_payload_does_not_verify(payload: bytes) -> None:
    data = bytearray(whole_file(b"pickle", [b"x" * 100, b"y" * 5000]))
    data[data.index(payload)] ^= 1
    with zipfile.ZipFile(io.BytesIO(bytes(data))) as file:
        assert file.testzip() is not None


@given(sizes=st.lists(st.integers(0, 9 * GIB), min_size=1, max_size=8), pickle_size=st.integers(0, 1 << 20))
def test_zip64_fields_stand_exactly_where_they_are_needed(sizes: list[int], pickle_size: int) -> None:
    layout = zip_layout.plan_layout(pickle_size, sizes)
    end = 0
    for entry in layout.entries:
        assert entry.header == end and len(zip_layout.local_header(entry)) == entry.offset - entry.header
        assert len(zip_layout.descriptor(entry, 7)) == entry.after - entry.end
        assert entry.zip64 == (entry.size >= 2**32 - 1 or entry.header >= 2**32 - 1)
        end = entry.after
    last = list(zip_layout.fixed_parts(layout, bytes(pickle_size), [0] * len(sizes)))[-1]
    assert last[0] + len(last[1]) == layout.size


def test_a_file_of_more_than_four_gib_opens_everywhere(tmp_path: Path) -> None:
    """Sparse: one storage larger than 4 GiB and one behind it, so that sizes and offsets need 64 bits."""
    big = (1 << 32) + 8192
    tree = {"a": SlicedTensor((big,), torch.uint8, ()), "b": SlicedTensor((3,), torch.float32, ())}
    pickle, leaves = pickle_tree(tree)
    sizes = [leaf.numel * leaf.dtype.itemsize for leaf in leaves]
    tail = torch.tensor([1.0, 2.0, 3.0]).numpy().tobytes()
    unit = zlib.crc32(bytes(1 << 20))
    crc = 0
    for _ in range(big >> 20):
        crc = checksum.crc32_combine(crc, unit, 1 << 20)
    crc = checksum.crc32_combine(crc, zlib.crc32(bytes(big % (1 << 20))), big % (1 << 20))
    layout = zip_layout.plan_layout(len(pickle), sizes)
    path = tmp_path / "big.pt"
    with open(path, "wb") as file:
        for offset, content in zip_layout.fixed_parts(layout, pickle, [crc, zlib.crc32(tail)]):
            file.seek(offset)
            file.write(content)
        file.seek(layout.storages[1].offset)
        file.write(tail)
    assert os.stat(path).st_blocks * 512 < 1 << 20, "the file should be sparse"
    loaded = torch.load(path, mmap=True, weights_only=True)
    assert loaded["a"].shape == (big,) and loaded["b"].tolist() == [1.0, 2.0, 3.0]
    with zipfile.ZipFile(path) as zipped:
        assert zipped.read("archive/data/1") == tail
    with open(path, "rb") as file:
        listed = list_entries(lambda offset, size: os.pread(file.fileno(), size, offset), layout.size)
    assert (listed["data/0"].size, listed["data/0"].crc, listed["data/1"].offset) == (
        big,
        crc,
        layout.storages[1].offset,
    )
    if shutil.which("unzip") and os.environ.get("UNBROKEN_SLOW"):  # it needs half a minute for so many bytes
        tested = subprocess.run(["unzip", "-tq", path], capture_output=True, text=True)
        assert tested.returncode == 0, tested.stdout + tested.stderr


def test_torch_computes_the_same_offsets_without_reading_headers(tmp_path: Path) -> None:
    """torch can derive all offsets from the sizes (`calculate_storage_offsets`): only for files laid out like
    its own.
    """
    from torch.utils.serialization import config

    tensors = [torch.arange(size, dtype=torch.float32) for size in (3, 1024, 1, 5000, 0)]
    pickle, leaves = pickle_tree({str(index): SlicedTensor.whole(tensor) for index, tensor in enumerate(tensors)})
    path = tmp_path / "a.pt"
    path.write_bytes(whole_file(pickle, [leaf.slices[0].data.numpy().tobytes() for leaf in leaves]))
    config.load.calculate_storage_offsets = True
    try:
        loaded = torch.load(path, mmap=True, weights_only=True)
    finally:
        config.load.calculate_storage_offsets = False
    assert all(torch.equal(loaded[str(index)], tensor) for index, tensor in enumerate(tensors))


@given(first=st.binary(max_size=300), second=st.binary(max_size=300))
def test_checksums_of_parts_make_the_checksum_of_the_whole(first: bytes, second: bytes) -> None:
    assert checksum.crc32(first) == zlib.crc32(first)
    whole = checksum.crc32_combine(checksum.crc32(first), checksum.crc32(second), len(second))
    assert whole == zlib.crc32(first + second)


@st.composite
def divided(draw: st.DrawFn) -> tuple[list[int], list[list[tuple[int, int, int]]]]:
    """Storages, and for each of one to three processes the pieces (storage, start, size) it holds."""
    sizes = draw(st.lists(st.integers(0, 40000), min_size=1, max_size=8))
    processes = draw(st.integers(1, 3))
    held: list[list[tuple[int, int, int]]] = [[] for _ in range(processes)]
    for storage, size in enumerate(sizes):
        cuts = sorted(draw(st.lists(st.integers(0, size), max_size=processes - 1)))
        bounds = [0, *cuts, size]
        for start, stop in itertools.pairwise(bounds):
            held[draw(st.integers(0, processes - 1))].append((storage, start, stop - start))
    return sizes, [sorted(pieces) for pieces in held]


@settings(max_examples=300)
@given(case=divided(), pickle_size=st.integers(0, 9000), chunk=st.sampled_from([4096, 16384, 1 << 20]))
def test_the_plans_of_all_processes_write_every_byte_once(
    case: tuple[list[int], list[list[tuple[int, int, int]]]], pickle_size: int, chunk: int
) -> None:
    sizes, everyone = case
    draw = random.Random(1)
    payloads, pickle = [draw.randbytes(size) for size in sizes], draw.randbytes(pickle_size)
    layout = zip_layout.plan_layout(pickle_size, sizes)
    file = bytearray(b"\xff" * write_plan.round_up(layout.size))
    written, checked, fragments = [], [], []
    for pieces in everyone:
        parts, arena_size = write_plan.place_parts(sizes, pieces)
        arena = bytearray(arena_size)
        for part in parts:
            arena[part.place : part.place + part.size] = payloads[part.storage][part.start : part.start + part.size]
        for write in write_plan.plan_writes(layout, parts, chunk):
            assert write.offset % 4096 == write.size % 4096 == write.place % 4096 == 0 and write.size <= chunk + 8192
            for part in write.parts:
                crc = zlib.crc32(arena[part.place : part.place + part.size])
                checked.append((part.storage, part.start, part.size, crc))
                if part.storage in write.gaps:
                    gap = layout.gap(part.storage, crc)
                    arena[part.place + part.size : part.place + part.size + len(gap)] = gap
            assert write.place + write.size <= arena_size
            file[write.offset : write.offset + write.size] = arena[write.place : write.place + write.size]
            written += [(write.offset, write.size)] if write.size else []
            fragments += [(at, bytes(arena[place : place + size])) for at, size, place in write.fragments]
    crcs = write_plan.combine_crcs(sizes, checked)
    for offset, content in write_plan.unwritten_blocks(
        layout.size, written, [*zip_layout.fixed_parts(layout, pickle, crcs), *fragments]
    ):
        assert offset % 4096 == len(content) % 4096 == 0
        file[offset : offset + len(content)] = content
    assert bytes(file[: layout.size]) == whole_file(pickle, payloads)


@pytest.mark.parametrize("held", [[(0, 0, 10)], [(0, 0, 60), (0, 50, 50)]])
def test_twin_an_element_in_no_piece_or_in_two_is_an_error(held: list[tuple[int, int, int]]) -> None:
    with pytest.raises(ValueError, match="belong to no process"):
        write_plan.combine_crcs([100], [(*piece, 0) for piece in held])
