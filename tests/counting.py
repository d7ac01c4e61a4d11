"""Test corpora whose tokens count up, so that a batch says by itself where it comes from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from unbroken.data.shards import MAGIC, header


def make_counting(folder: Path, sizes: Sequence[int], first: int = 0) -> str:
    """Shards of the given sizes whose tokens count up from `first`; returns their glob."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, size in enumerate(sizes):
        tokens = np.arange(first, first + size, dtype="<u2")
        (folder / f"part_{index:06d}.bin").write_bytes(header(size) + tokens.tobytes())
        first += size
    return f"{folder}/part_*.bin"


def make_bad(
    path: Path,
    *,
    magic: int = MAGIC,
    version: int = 1,
    count: int | None = None,
    tokens: Sequence[int] = (1, 2, 3),
) -> None:
    """A shard that may be wrong in its header."""
    fields = np.zeros(256, dtype="<i4")
    fields[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(fields.tobytes() + np.array(tokens, dtype="<u2").tobytes())
