"""Small states to save, whose every bit follows from the step, and what must be true of a folder after
anything.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from unbroken.checkpoint import directory
from unbroken.checkpoint.directory import CheckpointEntry
from unbroken.checkpoint.format import schema
from unbroken.checkpoint.reader import CheckpointFile
from unbroken.distributed.sliced_tensor import SlicedTensor

RUN_ID = "691bd736-d91a-48bf-a7a9-4b17d3ec0733"
SHAPES = ((100, 57), (), (0, 3), (1024,), (4096,), (3, 5, 7), (70001,))


def tensors(step: int, shapes: tuple[tuple[int, ...], ...] = SHAPES) -> list[torch.Tensor]:
    """fp32 and bf16 by turns; equal for equal steps, different for different ones."""
    made = []
    for index, shape in enumerate(shapes):
        tensor = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).add_(1000 * step + index).reshape(shape)
        made.append(tensor if index % 2 == 0 else tensor.bfloat16())
    return made


def tree(step: int, leaves: list[SlicedTensor]) -> dict[str, Any]:
    """A checkpoint around these leaves, the first of them tied."""
    model = {f"w{index}": leaf for index, leaf in enumerate(leaves)}
    return {
        "model": {**model, "tied": leaves[0]},
        "optimizer": {
            "state": {0: {"exp_avg": leaves[-1]}},
            "param_groups": [{"betas": (0.9, 0.95), "lr": 1e-3}],
        },
        "step": step,
        "code": "pass\n",
        "args": {"seed": 1, "wandb": None},
        "run_id": RUN_ID,
        "format": 1,
        "progress": {"tokens": 2**40 + step, "history": {"losses": [0.1 * step, float("inf")]}},
        "data": {},
        "rng": {"seed": 1, "state": b"\x00\xff"},
        "environment": {"host": "ü"},
        "sources": {"a.py": "x = 1\n"},
    }


def whole_tree(step: int) -> dict[str, Any]:
    return tree(step, [SlicedTensor.whole(tensor) for tensor in tensors(step)])


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def assert_is_step(path: Path, step: int) -> None:
    """The file holds exactly the state of this step, by torch's reader and by ours."""
    loaded, expected = torch.load(path, weights_only=True), tensors(step)
    assert loaded["step"] == step and loaded["progress"]["history"]["losses"] == [0.1 * step, float("inf")]
    for index, tensor in enumerate(expected):
        found = loaded["model"][f"w{index}"]
        assert found.dtype == tensor.dtype and found.shape == tensor.shape and bits(found) == bits(tensor)
    live = [torch.full_like(tensor, -7) for tensor in expected]
    with CheckpointFile(path) as file:
        file.restore({"model": tree(step, [SlicedTensor.whole(tensor) for tensor in live])["model"]})
    assert [bits(tensor) for tensor in live] == [bits(tensor) for tensor in expected]


def newest_whole(folder: Path) -> tuple[CheckpointEntry | None, list[tuple[Path, str]]]:
    """The newest checkpoint whose every checksum holds, and the newer damaged ones, each with the reason."""
    file, damaged = directory.open_newest_whole(directory.list_checkpoints(folder))
    if file is None:
        return None, damaged
    file.close()
    step = file.values.get("step")  # of the earlier program's checkpoints it may be anything
    return CheckpointEntry(file.path, step if type(step) is int else None, file.path.name == schema.FINAL), damaged


def assert_whole(folder: Path, at_least: int) -> int:
    """After a start's clearing: no debris, and every checkpoint there is whole; the newest is of step
    `at_least` or later.
    """
    directory.clear_debris(folder)
    names = [path.name for path in folder.iterdir()]
    assert not [name for name in names if name.startswith(".")], names
    newest, damaged = newest_whole(folder)
    assert damaged == []
    newest_step = newest.step if newest is not None and newest.step is not None else 0
    assert newest_step >= at_least, (newest, at_least)
    for found in directory.list_checkpoints(folder):
        assert found.step is not None
        assert_is_step(found.path, found.step)
        assert found.final or found.path.name == schema.checkpoint_name(found.step)
    return newest_step
