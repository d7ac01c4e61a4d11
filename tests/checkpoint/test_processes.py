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

from tests.saving import assert_is_step, bits, tensors, tree, whole_tree
from unbroken.checkpoint.format import schema
from unbroken.checkpoint.writer import RunCheckpointWriter
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
    with RunCheckpointWriter(own, world, keep_last=1) as saver:
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
    with RunCheckpointWriter(alone, World.single()) as saver:
        saver.save(whole_tree(3), 3)
    name = schema.checkpoint_name(3)
    assert (together / "final.pt").samefile(together / name)
    assert (together / name).read_bytes() == (alone / name).read_bytes()
    assert_is_step(together / name, 3)
    assert [path.name for path in together.iterdir() if path.name.startswith(".")] == []


NEARLY_A_CHUNK = ((2 << 20,), ((2 << 20) - 1024,), (1024,), (1024,))  # elements of fp32: 16 MB and two blocks


def owner_of_all(rank: int, size: int, folder: Path) -> None:
    """Rank 1, which does not see rank 0's file, holds every tensor: one write of theirs is larger than a chunk."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/.meeting", rank=rank, world_size=size)
    launch = Launch(rank=rank, local_rank=rank, size=size, local_size=size)
    world = World(launch, torch.device("cpu"), group=dist.group.WORLD, control=dist.group.WORLD)
    folder = folder / str(rank)
    folder.mkdir()
    state = [tensor.float() for tensor in tensors(1, NEARLY_A_CHUNK)]
    make = SlicedTensor.whole if rank == 1 else SlicedTensor.elsewhere
    with RunCheckpointWriter(folder, world) as saver:
        saver.save(tree(1, [make(tensor) for tensor in state]), 1)
        saver.wait()
        assert [outcome.error for outcome in saver.results()] == ([None] if rank == 0 else [])
    dist.destroy_process_group()


@pytest.mark.timeout(60)
def test_a_write_larger_than_a_chunk_reaches_the_process_with_the_file(tmp_path: Path) -> None:
    spawn(owner_of_all, (2, tmp_path), nprocs=2)  # type: ignore[no-untyped-call]
    saved = torch.load(tmp_path / "0" / schema.checkpoint_name(1), weights_only=True)["model"]
    for index, tensor in enumerate(tensors(1, NEARLY_A_CHUNK)):
        assert bits(saved[f"w{index}"]) == bits(tensor.float())


@pytest.mark.timeout(120)
@pytest.mark.parametrize("case", ["fails on 0", "fails on 1"])
def test_one_process_that_fails_fails_the_save_and_no_other(tmp_path: Path, case: str) -> None:
    run(tmp_path, 2, case)
    said = [(tmp_path / f"{step}.said").read_text() for step in (1, 2, 3)]
    assert said[0] == said[2] == "None" and os.strerror(errno.EIO) in said[1]
    kept = sorted(path.name for path in tmp_path.iterdir() if not path.name.endswith((".said", ".meeting")))
    assert kept == ["final.pt", schema.checkpoint_name(3)]
    assert_is_step(tmp_path / "final.pt", 3)
