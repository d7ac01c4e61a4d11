"""The earlier program's checkpoints: where its loader was in the data, on any number of processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness import write_shard
from unbroken.data.stream import Stream
from unbroken.run.legacy import LegacyCheckpoint, data_position


def simulate(counts: list[int], batch: int, batches: int) -> tuple[int, int]:
    """Return (shard, offset) of the next batch, as its DistributedDataLoader has them after `batches` batches."""
    shard = offset = 0
    for _ in range(batches):
        offset += batch
        if offset + batch + 1 > counts[shard]:
            shard, offset = (shard + 1) % len(counts), 0
    return shard, offset


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("counts", [[1000], [700, 129, 1000], [129, 129], [513, 512]])
def test_the_rest_of_a_shard_is_dropped(tmp_path: Path, processes: int, counts: list[int]) -> None:
    """Batches of 2 x 16 tokens on each process, 2 of them in a step."""
    for index, count in enumerate(counts):
        write_shard(tmp_path / f"{index}.bin", [1] * count)
    stream = Stream.open(str(tmp_path / "*.bin"))
    args = {"batch_size": 2, "sequence_length": 16, "grad_accumulation_steps": 2 * processes}
    for step in range(40):
        position, line = data_position(LegacyCheckpoint(step, args, processes), "a.pt", stream)
        shard, offset = simulate(counts, 32 * processes, 2 * step)
        assert stream.locate(position) == (stream.shards[shard], offset), (step, line)
        assert f"after {step} updates" in line and ("1 process" in line) == (processes == 1)
