"""The optimizer of a run. Another elementwise optimizer is an edit of `build_optimizer`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from unbroken.distributed.flat_params import ParamGroup, ShardedParameters, group_by_decay
from unbroken.model.language_model import LanguageModel

BETAS = (0.9, 0.95)


class AdamW(torch.optim.AdamW):
    """A torch.optim.AdamW without its decorators, whose first use imports the whole compiler: 2 s of each resume."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, as inherited."""
        inspect.unwrap(torch.optim.Optimizer.add_param_group)(self, param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update the parameters, as inherited."""
        loss: float | None = inspect.unwrap(torch.optim.AdamW.step)(self, closure)
        return loss


class Optimizers:
    """A set of optimizers, each for some of the parameter groups, used as one."""

    def __init__(self, parts: list[torch.optim.Optimizer], param_groups: list[dict[str, Any]]) -> None:
        self.parts = parts
        self.param_groups = param_groups
        self._of = {parameter: part for part in parts for group in part.param_groups for parameter in group["params"]}

    def step(self) -> None:
        """Update the owned slices from their gradients."""
        for part in self.parts:
            part.step()

    def state_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        """Return what the optimizer keeps for the parameter of an owned slice."""
        state: dict[str, Any] = self._of[parameter].state[parameter]
        return state


def param_groups(model: LanguageModel, optimizer: str) -> list[ParamGroup]:
    """Return the parameters in groups as `optimizer` needs them: Muon gets hidden matrices whole, grouped by shape."""
    parameters = list(model.parameters())
    if optimizer == "adamw":
        return group_by_decay(parameters)
    matrices: dict[tuple[int, int], list[nn.Parameter]] = {}
    for parameter, shape in model.hidden_matrices():
        matrices.setdefault(shape, []).append(parameter)
    hidden = {parameter for some in matrices.values() for parameter in some}
    rest = group_by_decay([parameter for parameter in parameters if parameter not in hidden])
    return rest + [ParamGroup(some, True, shape) for shape, some in matrices.items()]


def build_optimizer(sharded: ShardedParameters, *, learning_rate: float, weight_decay: float) -> Optimizers:
    """Return AdamW (Loshchilov & Hutter 2019) for the slices that this process owns; matrices decay, vectors do not.

    Groups of whole matrices get Muon (Jordan 2024). Its updates are scaled to the size of AdamW's (Liu et al. 2025), so
    that both have the same learning rate and weight decay.
    """
    groups = [
        {"params": [owned.parameter for owned in group.owned], "weight_decay": weight_decay if group.decays else 0.0}
        for group in sharded.groups
    ]
    flat = [own for own, group in zip(groups, sharded.groups, strict=True) if group.matrix is None]
    whole = [own for own, group in zip(groups, sharded.groups, strict=True) if group.matrix is not None]
    # fused on every machine: fused and unfused updates round differently.
    parts: list[torch.optim.Optimizer] = [AdamW(flat, lr=learning_rate, betas=BETAS, fused=True)]
    if whole:
        parts.append(torch.optim.Muon(whole, lr=learning_rate, adjust_lr_fn="match_rms_adamw"))
    for part in parts:
        init_state(part)
    return Optimizers(parts, [group for part in parts for group in part.param_groups])


def init_state(optimizer: torch.optim.Optimizer) -> None:
    """Create the optimizer's state, all zeros, so that a checkpoint can be restored before the first update.

    Updating a tiny parameter shows what the optimizer keeps: values of the parameter's shape are kept for each element,
    others (the step) once.
    """
    first: nn.Parameter = optimizer.param_groups[0]["params"][0]
    probe = torch.zeros([2] * first.dim(), requires_grad=True, device=first.device)
    probe.grad = torch.zeros_like(probe)
    accepted = inspect.signature(type(optimizer)).parameters
    trial = type(optimizer)([probe], **{key: value for key, value in optimizer.defaults.items() if key in accepted})
    trial.step()
    for owned in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        for key, value in trial.state[probe].items():
            like = owned.detach() if isinstance(value, torch.Tensor) and value.shape == probe.shape else value
            optimizer.state[owned][key] = torch.zeros_like(like) if isinstance(like, torch.Tensor) else like


def set_learning_rate(optimizer: Optimizers, rate: float) -> None:
    """Set the learning rate of the next update."""
    for group in optimizer.param_groups:
        group["lr"] = rate
