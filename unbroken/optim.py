"""The optimizer, and the learning rate as a function of the step. To try another elementwise optimizer, edit here."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from unbroken.sharding import ShardedParameters

BETAS = (0.9, 0.95)


class AdamW(torch.optim.AdamW):
    """torch's own, without its imports: it loads the whole compiler at its first use, 2 seconds of every way back."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As inherited."""
        inspect.unwrap(torch.optim.Optimizer.add_param_group)(self, param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """As inherited."""
        loss: float | None = inspect.unwrap(torch.optim.AdamW.step)(self, closure)
        return loss


def build_optimizer(sharded: ShardedParameters, *, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019) over the slices that this process owns; matrices decay, vectors do not."""
    groups = [
        {
            "params": [shard.parameter for shard in group.shards],
            "weight_decay": weight_decay if group.decays else 0.0,
        }
        for group in sharded.groups
    ]
    # One implementation on every machine: fused and unfused updates round differently.
    optimizer = AdamW(groups, lr=learning_rate, betas=BETAS, fused=True)
    make_state(optimizer)
    return optimizer


def make_state(optimizer: torch.optim.Optimizer) -> None:
    """Have the optimizer's state now, all zeros, so that it can be restored before the first update.

    What an elementwise optimizer keeps of a parameter is told by updating one of two elements: what has two elements
    then is kept for each element, the rest (the step) once. The large ones come as pages that nobody has touched.
    """
    probe = torch.zeros(2, requires_grad=True, device=optimizer.param_groups[0]["params"][0].device)
    probe.grad = torch.zeros_like(probe)
    accepted = inspect.signature(type(optimizer)).parameters
    trial = type(optimizer)([probe], **{key: value for key, value in optimizer.defaults.items() if key in accepted})
    trial.step()
    for owned in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        for key, value in trial.state[probe].items():
            like = owned.detach() if isinstance(value, torch.Tensor) and value.shape == probe.shape else value
            optimizer.state[owned][key] = torch.zeros_like(like) if isinstance(like, torch.Tensor) else like


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The rate of the next update."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def learning_rate(step: int, *, peak: float, warmup_iters: int, warmdown_iters: int, num_iterations: int) -> float:
    """The rate of update `step`, counted from 1: linear warmup, constant, linear warmdown to one step above zero."""
    done = step - 1
    if done < warmup_iters:
        return peak * (done + 1) / warmup_iters
    if done < num_iterations - warmdown_iters:
        return peak
    return peak * (num_iterations - done) / warmdown_iters if warmdown_iters else peak
