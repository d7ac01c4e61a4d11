"""No part of a step makes the host wait for the device: what reads a value of a tensor is an error here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from unbroken.distributed.flat_params import ShardedParameters
from unbroken.distributed.gradients import Gradients
from unbroken.distributed.step_plan import plan_step
from unbroken.distributed.world import Launch, World
from unbroken.model import families
from unbroken.optim import build_optimizer, param_groups, set_learning_rate


class ForbidReading(TorchDispatchMode):
    """A mode in which an operation raises if its result needs a value on the host: item(), nonzero(), a bool mask."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        reads = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags)
        masks = func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put_) and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        # The tag of `index` stands for a mask only.
        if masks or (reads and func.overloadpacket is not torch.ops.aten.index):
            raise RuntimeError(f"{func} reads a value")
        return func(*args, **(kwargs or {}))


READS = {
    "item": lambda loss: loss.item(),
    "bool": lambda loss: bool(loss > 0),
    "mask": lambda loss: torch.zeros(3)[torch.ones(3, dtype=torch.bool)],
    "nonzero": lambda loss: loss.nonzero(),
}


@pytest.mark.parametrize(
    ("optimizer_name", "read"), [("adamw", None), ("muon", None), *[("adamw", name) for name in READS]]
)
def test_a_step_never_reads_a_value(optimizer_name: str, read: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, without the in-place gradients of a CPU. A step that reads a value is found out (`read`)."""
    world = World(Launch(rank=0, size=1), torch.device("cpu"))
    model = families.build("tiny")
    sharded = ShardedParameters(model, world, param_groups(model, optimizer_name))
    model.initialize(0)
    optimizer = build_optimizer(sharded, learning_rate=0.1, weight_decay=0.1)
    gradients = Gradients(sharded, plan_step(2, 4, 1, 8), world)
    tokens = torch.zeros(2, 16, dtype=torch.int64)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)  # our code takes the way of a GPU
    for name in ("tolist", "numpy", "cpu"):  # these do not pass by the mode
        monkeypatch.setattr(torch.Tensor, name, lambda *_: pytest.fail("reads a value"))

    def step() -> None:
        losses = []
        for index in gradients.microbatches():
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(tokens, tokens)
            loss.backward()
            gradients.add(index)
            losses.append(loss.detach())
        if read:
            READS[read](loss)
        gradients.exchange()
        gradients.clip(1.0)
        gradients.losses(losses)
        set_learning_rate(optimizer, 0.2)
        optimizer.step()
        gradients.gather_weights()

    with ForbidReading():
        if read is None:
            step()
        else:
            with pytest.raises(RuntimeError, match="reads a value"):
                step()
