"""The optimizer, and the learning rate as a function of the step. To try another elementwise optimizer, edit here."""

from __future__ import annotations

import torch

from unbroken.sharding import ShardedParameters

BETAS = (0.9, 0.95)


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
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=BETAS, fused=True)
    make_state(optimizer)
    return optimizer


def make_state(optimizer: torch.optim.Optimizer) -> None:
    """Have the optimizer make its state now, all zeros, so that it can be restored before the first update.

    An update without gradient and at learning rate 0 does that for any elementwise optimizer and moves no weight.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    set_learning_rate(optimizer, 0.0)
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, torch.Tensor):
                value.zero_()


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
