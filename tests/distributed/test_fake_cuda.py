"""The parts of a step on a device `cuda` that has no memory: FakeTensorMode, which only a CUDA build of torch has.

It needs no GPU. It raises where tensors of two devices meet, and where a value is read. The backward pass itself is
left out: autograd asks the driver for the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from unbroken.distributed import flat_params
from unbroken.distributed.flat_params import FlatBuffer, ShardedParameters
from unbroken.distributed.gradients import Gradients
from unbroken.distributed.step_plan import plan_step
from unbroken.distributed.world import Launch, World
from unbroken.model import families
from unbroken.model.language_model import LanguageModel
from unbroken.optim import build_optimizer, param_groups

pytestmark = pytest.mark.skipif(torch.version.cuda is None, reason="a CPU build of torch")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """A device, and autocast as if it were there."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    torch.use_deterministic_algorithms(True)
    with FakeTensorMode():
        yield torch.device("cuda", 0)
    torch.use_deterministic_algorithms(False)


def adopt_into(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the parameters of the flat buffers into the model: fake tensors cannot be swapped."""

    def adopt(buffer: FlatBuffer) -> None:
        for slot in buffer.slots:
            own = nn.Parameter(buffer.data[slot.start : slot.stop].view(slot.parameter.shape))
            for module in model.modules():
                for name, parameter in module._parameters.items():
                    if parameter is slot.parameter:
                        module._parameters[name] = own
            object.__setattr__(slot, "parameter", own)

    monkeypatch.setattr(flat_params.FlatBuffer, "_adopt", adopt)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(
    ("name", "optimizer_name", "flags"),
    [("d2", "adamw", {}), ("d2", "muon", {}), ("gpt2-tiny", "muon", {"dropout": 0.1})],
)
def test_no_device_is_mixed_and_no_value_read(
    gpu: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    optimizer_name: str,
    flags: dict[str, Any],
    dtype: str,
) -> None:
    model = families.build(name, flags)
    adopt_into(model, monkeypatch)
    sharded = ShardedParameters(model, World(Launch(), gpu), param_groups(model, optimizer_name))
    optimizer = build_optimizer(sharded, learning_rate=0.1, weight_decay=0.1)
    model.initialize(0)
    gradients = Gradients(sharded, plan_step(2, 4, 1, 8), World(Launch(), gpu))
    tokens, losses = torch.zeros(2, 32, dtype=torch.int64, device=gpu), []
    for index in gradients.microbatches():
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == "bf16"):
            losses.append(model(tokens, tokens).detach())
        gradients.add(index)
    gradients.exchange()
    norm, all_losses = gradients.clip(1.0), gradients.losses(losses)
    optimizer.step()
    gradients.gather_weights()
    with torch.no_grad():
        total = model.eval()(tokens, tokens, reduction="sum")
    assert {each.device for each in (norm, all_losses, total, sharded.groups[0].grad)} == {gpu}
    with pytest.raises(DataDependentOutputException):
        norm.item()
