"""Several processes write one file: the same bytes as one process writes, and no process waits for one that
failed.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from tests.saving import assert_is_step, tensors, tree, whole_tree
from unbroken.checkpoint.format import schema
from unbroken.checkpoint.writer import CheckpointWriter
from unbroken.distributed.sliced_tensor import SlicedTensor, TensorSlice
from unbroken.distributed.world import Launch, World


def pieces_of(tensor: torch.Tensor, rank: int, size: int) -> SlicedTensor:
    """Cut at odd places, so that blocks of the disk belong to two processes."""
    flat = tensor.view(-1)
    cuts = [flat.numel() * index // size for index in range(size + 1)]
    low, high = cuts[rank], cuts[rank + 1]
    held = (TensorSlice(low, flat[low:high]),) if high > low else ()
    return SlicedTensor(tuple(tensor.shape), tensor.dtype, held)


def worker(rank: int, size: int, folder: Path, case: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/.meeting", rank=rank, world_size=size)
    launch = Launch(rank=rank, local_rank=rank, size=size, local_size=size)
    world = World(launch, torch.device("cpu"), group=dist.group.WORLD, control=dist.group.WORLD)
    own = folder / "elsewhere" if case == "no shared filesystem" and rank else folder
    own.mkdir(exist_ok=True)
    with CheckpointWriter(own, world, keep_last=1) as saver:
        for step in (1, 2, 3):
            if case.startswith("fails") and step == 2 and rank == int(case[-1]):
                real, os.pwrite = os.pwrite, _broken
            state = tree(step, [pieces_of(tensor, rank, size) for tensor in tensors(step)])
            saver.save(state, step)
            saver.before_update()
            saver.wait()
            outcomes = saver.results()
            assert len(outcomes) == (rank == 0)
            for outcome in outcomes:
                (folder / f"{step}.said").write_text(str(outcome.error))
            if case.startswith("fails") and step == 2 and rank == int(case[-1]):
                os.pwrite = real
        saver.link_final(3)
    dist.destroy_process_group()


def _broken(*_: Any) -> int:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def run(folder: Path, size: int, case: str) -> None:
    spawn(worker, (size, folder, case), nprocs=size)  # type: ignore[no-untyped-call]


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("size", "case"), [(3, "shared"), (2, "no shared filesystem")])
def test_the_file_is_the_one_that_one_process_writes(tmp_path: Path, size: int, case: str) -> None:
    together, alone = tmp_path / "together", tmp_path / "alone"
    together.mkdir()
    alone.mkdir()
    run(together, size, case)
    with CheckpointWriter(alone, World.single()) as saver:
        saver.save(whole_tree(3), 3)
    name = schema.checkpoint_name(3)
    assert (together / "final.pt").samefile(together / name)
    assert (together / name).read_bytes() == (alone / name).read_bytes()
    assert_is_step(together / name, 3)
    assert [path.name for path in together.iterdir() if path.name.startswith(".")] == []


@pytest.mark.timeout(120)
@pytest.mark.parametrize("case", ["fails on 0", "fails on 1"])
def test_one_process_that_fails_fails_the_save_and_no_other(tmp_path: Path, case: str) -> None:
    run(tmp_path, 2, case)
    said = [(tmp_path / f"{step}.said").read_text() for step in (1, 2, 3)]
    assert said[0] == said[2] == "None" and os.strerror(errno.EIO) in said[1]
    kept = sorted(path.name for path in tmp_path.iterdir() if not path.name.endswith(".said"))
    assert kept == ["final.pt", schema.checkpoint_name(3)]
    assert_is_step(tmp_path / "final.pt", 3)
