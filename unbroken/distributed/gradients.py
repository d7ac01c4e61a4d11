"""The one order of addition: a step's gradient is a fixed binary tree over its microbatches, for any number of ranks.

Floating-point addition is not associative, so a sum has the same bits only if it is the same expression. A process adds
its own subtree; the processes then exchange slices of their partial sums (all-to-all), add each slice along the upper
part of the tree, and keep it: the bytes of an ordinary ring all-reduce, whose order depends on the number of processes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from unbroken.distributed.flat_params import FlatBuffer, ParamSlot, ShardedParameters
from unbroken.distributed.step_plan import StepPlan
from unbroken.distributed.world import World

Complete = Callable[[FlatBuffer, tuple[int, int]], None]  # makes a chunk of this process's partial sum whole

# The older name still works in torch 2.13, with a warning at every call.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

NORM_ROWS = 64  # blocks summed by one kernel of a fixed shape


def tree_sum(terms: list[Tensor]) -> Tensor:
    """Add neighbours, then neighbours of the sums, and so on; an odd one waits. Overwrites `terms`."""
    while len(terms) > 1:
        pairs = [terms[i].add_(terms[i + 1]) for i in range(0, len(terms) - 1, 2)]
        terms = pairs + terms[len(terms) - len(terms) % 2 :]
    return terms[0]


def sum_of_slots(slots: Tensor, world: World) -> Tensor:
    """Add vectors of which each element is nonzero on one process at most: x + 0 is exact, so any order will do."""
    if world.size == 1:
        return slots
    on_wire = slots.cpu() if world.via_host_memory else slots
    dist.all_reduce(on_wire, group=world.group)
    return on_wire.to(slots.device)


class Gradients:
    """Adds up a step's gradient. The mean over the microbatches ends in this process's slices of `.grad`.

    Within a process, level k of `_waiting` holds the sum of a finished subtree of 2^k leaves, which waits for its
    sibling: with the buffer being filled, log2(leaves of this process) + 1 gradient buffers.
    """

    def __init__(self, sharded: ShardedParameters, plan: StepPlan, world: World, overlap: bool | None = None) -> None:
        self._sharded, self._world = sharded, world
        self._waiting: list[list[Tensor]] = []
        self._exchanges = [Exchange(group, world) for group in sharded.groups] if world.size > 1 else []
        # Between CPU processes a background exchange only takes cores from the backward pass.
        self._overlap = world.size > 1 and (
            world.device.type == "cuda" and not world.via_host_memory if overlap is None else overlap
        )
        self._steps = 0
        if self._overlap:
            for exchange in self._exchanges:
                exchange.watch(self._complete)
        self.replan(plan)

    @property
    def may_replan(self) -> bool:
        """Not while chunks of several groups leave beside the backward pass: how far others came is not known."""
        return not (self._overlap and self._steps > 0 and len(self._exchanges) > 1)

    def replan(self, plan: StepPlan) -> None:
        """Use another division of the step from now on, instead of what has been done of this one. Collective."""
        if self._overlap and self._steps > 0:
            for exchange in self._exchanges:  # a process that got further waits for the chunks that did not leave here
                exchange.finish()
        self._plan = plan
        lo, hi = plan.ranges[self._world.rank]
        self._leaf_size = plan.leaf_size if plan.exact else hi - lo
        self._range = (lo, hi)
        self._leaves_done = 0

    def microbatches(self) -> Iterator[int]:
        """The numbers of this process's microbatches, in the order of addition."""
        lo, hi = self._range
        self._leaves_done = 0
        for index in range(lo, hi):
            if (index - lo) % self._leaf_size == 0:
                self._sharded.zero_grad()
            last = index == hi - 1
            # The first step runs out of memory if any does; until it is through, no process may wait for another.
            watched = last and self._overlap and self._steps > 0
            for exchange in self._exchanges:
                exchange.begin(watched)
            yield index

    def add(self, index: int) -> None:
        """The backward pass of microbatch `index` is through."""
        lo, hi = self._range
        if (index - lo + 1) % self._leaf_size:
            return
        if index < hi - 1:
            self._carry()
            return
        for number, group in enumerate(self._sharded.groups):
            done = self._exchanges[number].launched if self._exchanges else 0
            for chunk in group.chunks[done:]:
                self._complete(group, chunk)

    def _carry(self) -> None:
        """One leaf more: add the waiting sums of its size, as binary counting carries, and let the result wait."""
        level, done = 0, self._leaves_done
        while done & 1:
            for group, waiting in zip(self._sharded.groups, self._waiting[level], strict=True):
                group.grad.add_(waiting)
            level, done = level + 1, done >> 1
        if level == len(self._waiting):
            self._waiting.append([torch.empty_like(group.grad) for group in self._sharded.groups])
        # The sum stays where it is, and the next leaf is added up in the buffer that has become free.
        self._waiting[level] = [
            group.use_grad(free) for group, free in zip(self._sharded.groups, self._waiting[level], strict=True)
        ]
        self._leaves_done += 1

    def _complete(self, group: FlatBuffer, chunk: tuple[int, int]) -> None:
        """After the last leaf every level below the root waits: add them, smallest first, to this chunk."""
        number = self._sharded.groups.index(group)
        level, done = 0, self._leaves_done
        while done:
            assert done & 1, "the leaves of a process are a power of two"
            group.grad[chunk[0] : chunk[1]].add_(self._waiting[level][number][chunk[0] : chunk[1]])
            level, done = level + 1, done >> 1

    def exchange(self) -> None:
        """Add over all processes, and divide: the owned slices of `.grad` are then the mean over the microbatches."""
        for exchange in self._exchanges:
            exchange.finish()
        self._steps += 1
        for group in self._sharded.groups:
            for owned in group.owned:
                group.grad[owned.start : owned.stop].mul_(1 / self._plan.num_microbatches)

    def gather_weights(self) -> None:
        """After the update: every process gets the slices that the others own."""
        if self._world.size == 1:
            return
        for group in self._sharded.groups:
            for (lo, hi), owned in zip(group.chunks, group.owned, strict=True):
                whole, own = group.data[lo:hi], group.data[owned.start : owned.stop].clone()
                if self._world.via_host_memory:
                    on_wire = whole.cpu()
                    all_gather_single(on_wire, own.cpu(), group=self._world.group)
                    whole.copy_(on_wire)
                else:
                    all_gather_single(whole, own, group=self._world.group)

    def losses(self, own: list[Tensor]) -> Tensor:
        """The losses of all microbatches of the step, fp32 [num_microbatches], on every process; no host sync."""
        slots = torch.zeros(self._plan.num_microbatches, device=self._world.device)
        slots[self._range[0] : self._range[1]] = torch.stack(own)
        return sum_of_slots(slots, self._world)

    def clip(self, largest: float) -> Tensor:
        """Scale the gradient so that its norm is at most `largest`; returns the norm before, 0-dim.

        The squares are added block by block with kernels of one fixed shape, and the blocks' sums in one vector of
        fixed length, so the bits do not tell how many processes there were.
        """
        squares = [self._squares(group) for group in self._sharded.groups]
        norm = torch.stack([part.sum() for part in squares]).sum().sqrt()
        factor = (largest / (norm + 1e-6)).clamp(max=1.0).float()
        for group in self._sharded.groups:
            for owned in group.owned:
                group.grad[owned.start : owned.stop].mul_(factor)
        return norm

    def _squares(self, group: FlatBuffer) -> Tensor:
        """The sum of squares of each block of a group, fp64 [blocks], complete on every process."""
        block = group.block
        blocks = -(-group.used // block)
        sums = torch.zeros(blocks, device=group.grad.device, dtype=torch.float64)
        rows = torch.zeros(NORM_ROWS, block, device=group.grad.device)
        grad = group.grad[: blocks * block].view(blocks, block)
        owned = [(owned.start // block, min(owned.stop // block, blocks)) for owned in group.owned]
        for batch in _batches(owned, NORM_ROWS):  # slices, not indices: those would make the host wait for the GPU
            at = list(accumulate((hi - lo for lo, hi in batch), initial=0))
            for (lo, hi), row in zip(batch, at, strict=False):
                rows[row : row + hi - lo].copy_(grad[lo:hi])
            added = rows.square().sum(1).double()
            for (lo, hi), row in zip(batch, at, strict=False):
                sums[lo:hi] = added[row : row + hi - lo]
        return sum_of_slots(sums, self._world)


def _batches(runs: list[tuple[int, int]], most: int) -> Iterator[list[tuple[int, int]]]:
    """Ranges (start, stop), cut and put together so that all but the last batch cover `most` numbers."""
    batch, room = list[tuple[int, int]](), most
    for lo, stop in runs:
        while lo < stop:
            hi = min(stop, lo + room)
            batch.append((lo, hi))
            lo, room = hi, room - (hi - lo)
            if room == 0:
                yield batch
                batch, room = [], most
    if batch:
        yield batch


class Exchange:
    """The exchange of one group's partial sums, chunk by chunk, beside the backward pass where that pays."""

    def __init__(self, group: FlatBuffer, world: World) -> None:
        self._group, self._world = group, world
        self._complete: Complete | None = None
        self._watched = False
        self.launched = 0
        self._pending: list[tuple[Tensor, dist.Work | None]] = []
        self._left: list[int] = []
        self._in_chunk = [self._chunks_of(slot) for slot in group.slots]

    def _chunks_of(self, slot: ParamSlot) -> list[int]:
        return [i for i, (lo, hi) in enumerate(self._group.chunks) if lo < slot.stop and slot.start < hi]

    def watch(self, complete: Complete) -> None:
        """Learn from the backward pass itself when a parameter's gradient is whole."""
        self._complete = complete
        for number, slot in enumerate(self._group.slots):
            hook = functools.partial(self._ready, number)
            slot.parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]

    def begin(self, watched: bool) -> None:
        """A backward pass begins; when it is the step's last, `watched`, chunks leave as soon as they are whole."""
        self._watched, self.launched, self._pending = watched, 0, []
        if watched:
            counts = [0] * len(self._group.chunks)
            for chunks in self._in_chunk:
                for chunk in chunks:
                    counts[chunk] += 1
            self._left = counts

    def _ready(self, number: int, _: Tensor) -> None:
        if not self._watched:
            return
        for chunk in self._in_chunk[number]:
            self._left[chunk] -= 1
        # Strictly in order: collectives must be issued in the same order everywhere.
        while self.launched < len(self._left) and self._left[self.launched] == 0:
            assert self._complete is not None
            self._complete(self._group, self._group.chunks[self.launched])
            self._launch(background=True)

    def _launch(self, background: bool) -> None:
        lo, hi = self._group.chunks[self.launched]
        sent = self._group.grad[lo:hi]
        sent = sent.cpu() if self._world.via_host_memory else sent
        received = torch.empty_like(sent)
        work = dist.all_to_all_single(received, sent, group=self._world.group, async_op=background)
        self._pending.append((received, work))
        self.launched += 1  # not before: there may have been no memory for it
        if not background:
            self._add(self.launched - 1)

    def _add(self, chunk: int) -> None:
        received, work = self._pending[chunk]
        if work is not None:
            work.wait()
        total = tree_sum(list(received.chunk(self._world.size)))
        owned = self._group.owned[chunk]
        self._group.grad[owned.start : owned.stop].copy_(total)
        self._pending[chunk] = (torch.empty(0), None)

    def finish(self) -> None:
        """Exchange what has not left yet, and add what has arrived along the upper part of the tree."""
        for chunk in range(self.launched):
            self._add(chunk)
        while self.launched < len(self._group.chunks):
            self._launch(background=False)
