"""Parameters as one flat buffer, and which slices of it this process updates and saves (ZeRO-1, Rajbhandari 2020).

Every parameter is a view into a flat fp32 buffer, and so is its gradient. The buffer is cut into chunks. A process owns
one slice of each chunk, keeps the optimizer's state of that slice only, and updates it; then all processes gather the
chunk. A vectorized kernel may round differently in its vector body and in its scalar tail. Slices end on multiples of
BLOCK elements, so no element changes from one to the other with the number of processes. For an optimizer
that needs whole matrices (Muon) a chunk is as many matrices of one shape as there are processes, and a slice is a
matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from unbroken.distributed.sliced_tensor import SlicedTensor, TensorSlice
from unbroken.distributed.world import World

ALIGNMENT = 64  # elements between the starts of parameters are a multiple of this: 256 bytes, for vector loads
BLOCK = 16384  # elements; slices, and the sums of a norm, are made of whole blocks
CHUNK_BLOCKS = 384  # blocks of a chunk: 25 MB, enough to fill a network and few enough to overlap


@dataclass(frozen=True)
class ParamSlot:
    """The place of a parameter in a flat buffer: elements start..stop-1."""

    start: int
    parameter: nn.Parameter

    @property
    def stop(self) -> int:
        return self.start + self.parameter.numel()


@dataclass(frozen=True)
class ParamGroup:
    """A group of parameters with one set of hyperparameters.

    `matrix` is the shape of matrices that must stay whole; a parameter may be several of them, one below the other.
    """

    parameters: list[nn.Parameter]
    decays: bool
    matrix: tuple[int, int] | None = None


def group_by_decay(parameters: list[nn.Parameter]) -> list[ParamGroup]:
    """Return the parameters in two groups: matrices, which decay, and vectors, which do not."""
    by_decay = {decays: [p for p in parameters if (p.dim() >= 2) == decays] for decays in (True, False)}
    return [ParamGroup(group, decays) for decays, group in by_decay.items() if group]


@dataclass(frozen=True)
class OwnedSlice:
    """A slice of a flat buffer that this process updates: elements start..stop-1.

    `parameter` is a view of them, 1-D or a whole matrix.
    """

    start: int
    stop: int
    parameter: nn.Parameter


class FlatBuffer:
    """A flat buffer of one group's parameters. `data` and `grad` are fp32, 1-D, padded with zeros.

    `chunks` are ranges of elements; `owned` has this rank's slice of each. `used` elements are not padding at the end.
    """

    def __init__(self, members: ParamGroup, world: World) -> None:
        self.decays, self.matrix = members.decays, members.matrix
        self.slots: list[ParamSlot] = []
        stop = 0
        for parameter in reversed(members.parameters):  # the backward pass finishes the last layers first
            self.slots.append(ParamSlot(stop, parameter))
            stop += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
        self.used = stop
        unit, units = (BLOCK, CHUNK_BLOCKS) if self.matrix is None else (self.matrix[0] * self.matrix[1], world.size)
        self.block = next(size for size in range(min(BLOCK, unit), 0, -1) if unit % size == 0)
        per_rank = -(-min(units, -(-stop // unit)) // world.size) * unit
        chunk = per_rank * world.size
        padded = -(-stop // (unit * world.size)) * unit * world.size
        self.chunks = [(lo, min(lo + chunk, padded)) for lo in range(0, padded, chunk)]
        self.data = torch.zeros(padded, device=world.device)
        self.grad = torch.zeros(padded, device=world.device)
        self._adopt()
        self.owned = [self._own_slice(lo, hi, world) for lo, hi in self.chunks]
        self.use_grad(self.grad)

    def _adopt(self) -> None:
        """Copy the parameters into `data` and make them views of it; those on the meta device become zeros."""
        for slot in self.slots:
            view = self.data[slot.start : slot.stop].view(slot.parameter.shape)
            if not slot.parameter.is_meta:
                view.copy_(slot.parameter.detach())
            # swap_tensors keeps the parameter's identity, which tied weights and modules rely on.
            torch.utils.swap_tensors(slot.parameter, nn.Parameter(view))  # type: ignore[no-untyped-call]

    def _own_slice(self, lo: int, hi: int, world: World) -> OwnedSlice:
        size = (hi - lo) // world.size
        start = lo + world.rank * size
        stop = start + size
        return OwnedSlice(start, stop, nn.Parameter(self.data[start:stop].view(self.matrix or (size,))))

    def use_grad(self, buffer: Tensor) -> Tensor:
        """Use `buffer`, fp32 like `data`, for the gradients from now on. Return the buffer used before."""
        before, self.grad = self.grad, buffer
        for slot in self.slots:
            slot.parameter.grad = buffer[slot.start : slot.stop].view(slot.parameter.shape)
        for owned in self.owned:
            # With more ranks than matrices left, a slice may be padding only, which is not updated.
            view = buffer[owned.start : owned.stop].view(owned.parameter.shape)
            owned.parameter.grad = view if owned.start < self.used else None
        return before


class OptimizerWithState(Protocol):
    """The part of `optim.Optimizers` that this module uses."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """One dict of hyperparameters for each FlatBuffer, in their order."""

    def state_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        """Return the state of the parameter of an OwnedSlice."""


class ShardedParameters:
    """The parameters of a model, moved into flat buffers on this rank's device; those on the meta device become zeros.

    Args:
        model: its parameters become views of the buffers.
        world: the ranks that share the optimizer's state.
        members: the groups of parameters; by default those of `group_by_decay`.
    """

    def __init__(self, model: nn.Module, world: World, members: list[ParamGroup] | None = None) -> None:
        self.model, self.world = model, world
        self.groups = [FlatBuffer(some, world) for some in members or group_by_decay(list(model.parameters()))]
        self._order = [(group, slot) for group in self.groups for slot in reversed(group.slots)]

    def zero_grad(self) -> None:
        """Set all gradients to zero, before the first microbatch of a leaf: the backward pass adds to them."""
        for group in self.groups:
            group.grad.zero_()

    def model_state(self) -> dict[str, SlicedTensor]:
        """Return the state dict under clean names, with the slices that this rank owns; tied weights are one object."""
        sliced = {id(slot.parameter): _sliced_tensor(group, slot, None) for group, slot in self._order}
        return {name: sliced[id(parameter)] for name, parameter in self.named_parameters()}

    def copied_model_state(self) -> dict[str, SlicedTensor]:
        """Return the state dict with the slices that other ranks own, of which this rank has a copy."""
        sliced = {id(slot.parameter): _copied_slices(group, slot) for group, slot in self._order}
        return {name: sliced[id(parameter)] for name, parameter in self.named_parameters()}

    def whole_model_state(self) -> dict[str, SlicedTensor]:
        """Return the state dict with every tensor whole on every process."""
        whole = {id(parameter): SlicedTensor.whole(parameter) for parameter in self.model.parameters()}
        return {name: whole[id(parameter)] for name, parameter in self.named_parameters()}

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield every name of every parameter, without torch.compile's prefix."""
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            yield name.replace("_orig_mod.", ""), parameter

    def name_at(self, group: FlatBuffer, element: int) -> str:
        """Return the name of the parameter at an element of a group's buffer."""
        slot = next(slot for slot in reversed(group.slots) if slot.start <= element)
        return next(name for name, parameter in self.named_parameters() if parameter is slot.parameter)

    def optimizer_state(self, optimizer: OptimizerWithState) -> dict[str, Any]:
        """Return a torch.optim state dict with sliced tensors, the same for any world size.

        Its parameters are in the order of `model.parameters()`; with Muon its matrices, grouped by shape, come last.
        The optimizer's tensors over owned slices are cut at the parameters' borders; single numbers, such as the step,
        belong to every parameter.
        """
        state = {}
        for index, (group, slot) in enumerate(self._order):
            states = [optimizer.state_of(owned.parameter) for owned in group.owned]
            state[index] = {key: self._state_value(key, states, group, slot) for key in states[0]}
        param_groups, first = [], 0
        for saved, group in zip(optimizer.param_groups, self.groups, strict=True):
            hyper = {key: list(value) if isinstance(value, tuple) else value for key, value in saved.items()}
            param_groups.append({**hyper, "params": list(range(first, first + len(group.slots)))})
            first += len(group.slots)
        return {"state": state, "param_groups": param_groups}

    def _state_value(self, key: str, states: list[dict[str, Any]], group: FlatBuffer, slot: ParamSlot) -> Any:
        """Return a value of a parameter's state, given the optimizer's states of the group's owned slices."""
        value = states[0][key]
        if not isinstance(value, Tensor):
            return value
        if value.numel() == 1:
            return SlicedTensor.whole(value) if self.world.is_main else SlicedTensor.elsewhere(value)
        return _sliced_tensor(group, slot, [state[key] for state in states])

    def after_restore(self, optimizer: OptimizerWithState, step: int) -> None:
        """Set the optimizer's step counters; its other tensors and the weights were restored in place."""
        for group in self.groups:
            for owned in group.owned:
                state = optimizer.state_of(owned.parameter)
                if isinstance(state.get("step"), Tensor):
                    state["step"].fill_(step)


def _copied_slices(group: FlatBuffer, slot: ParamSlot) -> SlicedTensor:
    """Return a parameter as the slices of it that this rank does not own."""
    starts = [slot.start, *(owned.stop for owned in group.owned)]
    stops = [*(owned.start for owned in group.owned), slot.stop]
    cut = [(max(start, slot.start), min(stop, slot.stop)) for start, stop in zip(starts, stops, strict=True)]
    slices = [TensorSlice(lo - slot.start, group.data[lo:hi]) for lo, hi in cut if lo < hi]
    return SlicedTensor(tuple(slot.parameter.shape), group.data.dtype, tuple(slices))


def _sliced_tensor(group: FlatBuffer, slot: ParamSlot, of_owned: list[Tensor] | None) -> SlicedTensor:
    """Return a parameter, or one tensor of its state (`of_owned`: one for each owned slice), as owned by this rank."""
    slices = []
    for index, owned in enumerate(group.owned):
        lo, hi = max(owned.start, slot.start), min(owned.stop, slot.stop)
        if lo < hi:
            source = (owned.parameter.detach() if of_owned is None else of_owned[index]).view(-1)
            slices.append(TensorSlice(lo - slot.start, source[lo - owned.start : hi - owned.start]))
    dtype = group.data.dtype if of_owned is None else of_owned[0].dtype
    return SlicedTensor(tuple(slot.parameter.shape), dtype, tuple(slices))
