"""Thousands of damaged checkpoints: each is refused with one line, or reads exactly as the original does."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import checkpoints as make
from unbroken.checkpoint.reader import CheckpointFile
from unbroken.distributed.sliced_tensor import SlicedTensor
from unbroken.errors import UserError


def mutated(content: bytes, chance: random.Random) -> bytes:
    """Bit flips, truncations, splices, runs of zeros, interesting numbers; most often where the structure is."""
    data = bytearray(content)
    structure = [
        at
        for mark in (b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06", b"PK\x06\x06", b"\x80\x02")
        for at in finds(content, mark)
    ]

    def place() -> int:
        if chance.random() < 0.6:
            return min(len(data) - 1, chance.choice(structure) + chance.randrange(60))
        return chance.randrange(len(data))

    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        kind, at = chance.randrange(7), place()
        size = min(chance.choice((1, 2, 4, 8, 64, 500)), len(data) - at)
        if kind <= 2:
            data[at] ^= 1 << chance.randrange(8)
        elif kind == 3:
            data[at : at + size] = chance.choice((b"\0", b"\xff")) * size
        elif kind == 4:
            number = struct.pack("<Q", chance.choice((0, 1, 2**16 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, len(data))))
            data[at : at + min(size, 8)] = number[: min(size, 8)]
        elif kind == 5:
            source = place()
            piece = data[source : source + size]
            data[at : at + (len(piece) if chance.random() < 0.5 else 0)] = piece
        else:
            del data[at : at + size if chance.random() < 0.7 else len(data)]
        if not data:
            break
    return bytes(data)


def finds(content: bytes, mark: bytes) -> list[int]:
    found, at = [], content.find(mark)
    while at >= 0:
        found.append(at)
        at = content.find(mark, at + 1)
    return found


def outcome(path: Path, tree: dict[str, Any]) -> tuple[str, str, Any] | None:
    """What reading gives: all values, and all tensors after a verified restore; None if it is refused."""
    try:
        with CheckpointFile(path) as file:
            live = make.blank(tree)
            file.restore(make.leaves(live))
            return repr(file.values), "ours" if file.is_ours else "foreign", live
    except UserError as error:
        assert str(error).isprintable()
        return None


@pytest.mark.parametrize("count", [1_000, pytest.param(4_500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("origin", ["ours", "torch"])
def test_mutations_are_refused_or_change_nothing(tmp_path: Path, origin: str, count: int) -> None:
    """5,500 of each: a line, or exactly the original; never another exception, never other values or bits."""
    tree = make.state()
    content = make.save_ours(tmp_path, tree).read_bytes() if origin == "ours" else make.torch_bytes(tree)
    path = tmp_path / "mutated.pt"
    path.write_bytes(content)
    original = outcome(path, tree)
    assert original is not None
    chance, harmless = random.Random(20261123 + count), 0
    for number in range(count):
        path.write_bytes(mutated(content, chance))
        got = outcome(path, tree)
        if got is not None:
            harmless += 1
            assert got[:2] == original[:2] and make.same_bits(got[2], original[2]), number
    assert count / 90 < harmless < 0.9 * count, "too few or too many mutations changed something that is looked at"


def test_mutated_pickles_behind_a_right_checksum(tmp_path: Path) -> None:
    """An attacker can make checksums right: 4,000 pickles, each refused or read without any other exception."""
    tree = {
        "model": {"w": torch.arange(6.0), "v": torch.ones(2, 3).t()},
        "n": [1, 2.5, "x", (None, True)],
        "b": b"\xff",
    }
    saved = make.torch_bytes(tree)
    start, size = make.payload(saved, "data.pkl")
    pickled = saved[start : start + size]
    opcodes = [bytes([code]) for code in range(256)] + [
        make.tensor_opcodes((2, 3), (3, 1)),
        make.integer(-(2**70)),
        b"h\x01",
    ]
    path, chance = tmp_path / "mutated.pt", random.Random(7)
    storages = {"0": bytes(24), "1": bytes(24)}
    read = 0
    for _ in range(4_000):
        data = bytearray(pickled)
        for _ in range(chance.choice((1, 1, 2, 5))):
            at = chance.randrange(2, len(data))
            data[at : at + chance.randrange(3)] = chance.choice(opcodes)
        path.write_bytes(make.pickle_file(bytes(data), storages))
        try:
            with CheckpointFile(path) as file:
                read += 1
                for _, stored in file.stored():
                    assert file.tensor(stored).nbytes <= 24
        except UserError as error:
            assert str(error).isprintable()
    assert read > 20, "too many mutations are refused before tensors are looked at"


def test_tensors_beside_damage_are_never_restored_wrong(tmp_path: Path) -> None:
    """Every single bit of every tensor's bytes."""
    tree = {"w": torch.arange(5, dtype=torch.int16)}
    content = make.torch_bytes(tree)
    start, size = make.payload(content, "data/0")
    path = tmp_path / "a.pt"
    for bit in range(8 * size):
        damaged = bytearray(content)
        damaged[start + bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with CheckpointFile(path) as file:
            assert len(file.verify()) == 1
            with pytest.raises(UserError, match="damaged"):
                file.restore({"w": SlicedTensor.whole(torch.zeros(5, dtype=torch.int16))})
