"""The one order of addition: the gradient of a step is a fixed binary tree over its microbatches, for any world size.

Floating-point addition is not associative, so a sum has the same bits only if it is the same expression. A rank adds
its own subtree. The ranks then exchange slices of their partial sums (all-to-all), and each adds its slice along the
upper part of the tree. This moves as many bytes as a ring all-reduce, whose order depends on the number of ranks.
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
    """Return the sum of neighbours, then of neighbouring sums, and so on; an odd one waits. Overwrites `terms`."""
    while len(terms) > 1:
        pairs = [terms[i].add_(terms[i + 1]) for i in range(0, len(terms) - 1, 2)]
        terms = pairs + terms[len(terms) - len(terms) % 2 :]
    return terms[0]


def sum_of_slots(slots: Tensor, world: World) -> Tensor:
    """Add vectors of which each element is nonzero on at most one rank: x + 0 is exact in any order. Collective."""
    if world.size == 1:
        return slots
    on_wire = slots.cpu() if world.via_host_memory else slots
    dist.all_reduce(on_wire, group=world.group)
    return on_wire.to(slots.device)


class Gradients:
    """A sum of the gradients of a step. Their mean over the microbatches ends in this rank's slices of `.grad`.

    Level k of `_waiting` holds the sum of a finished subtree of 2^k leaves, which waits for its sibling. With the
    buffer that is being filled these are log2(leaves of this rank) + 1 gradient buffers.

    Args:
        sharded: the parameters.
        plan: the division of a step.
        world: the ranks.
        overlap: whether chunks are exchanged during the backward pass; by default on GPUs with NCCL.
    """

    def __init__(self, sharded: ShardedParameters, plan: StepPlan, world: World, overlap: bool | None = None) -> None:
        self._sharded, self._world = sharded, world
        self._waiting: list[list[Tensor]] = []
        self._exchanges = [Exchange(group, world) for group in sharded.groups] if world.size > 1 else []
        # On CPUs a background exchange only takes cores from the backward pass.
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
        """Whether the plan may change.

        Not while chunks of several groups are exchanged during the backward pass: how far other ranks came is unknown.
        """
        return not (self._overlap and self._steps > 0 and len(self._exchanges) > 1)

    def replan(self, plan: StepPlan) -> None:
        """Use another division of the step from now on, and drop what this step has added so far. Collective."""
        if self._overlap and self._steps > 0:
            for exchange in self._exchanges:  # a rank that came further waits for the chunks that this one has not sent
                exchange.finish()
        self._plan = plan
        lo, hi = plan.ranges[self._world.rank]
        self._leaf_size = plan.leaf_size if plan.exact else hi - lo
        self._range = (lo, hi)
        self._leaves_done = 0

    def microbatches(self) -> Iterator[int]:
        """Yield the numbers of this rank's microbatches, in the order of addition."""
        lo, hi = self._range
        self._leaves_done = 0
        for index in range(lo, hi):
            if (index - lo) % self._leaf_size == 0:
                self._sharded.zero_grad()
            last = index == hi - 1
            # If memory runs out, it does so in the first step; until that is done, no rank may wait for another.
            watched = last and self._overlap and self._steps > 0
            for exchange in self._exchanges:
                exchange.begin(watched)
            yield index

    def add(self, index: int) -> None:
        """Add the gradient of microbatch `index`, whose backward pass is done."""
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
        """Add a finished leaf to the waiting sums of its size, as binary counting carries, and let the result wait."""
        level, done = 0, self._leaves_done
        while done & 1:
            for group, waiting in zip(self._sharded.groups, self._waiting[level], strict=True):
                group.grad.add_(waiting)
            level, done = level + 1, done >> 1
        if level == len(self._waiting):
            self._waiting.append([torch.empty_like(group.grad) for group in self._sharded.groups])
        # The sum stays in its buffer, and the next leaf uses the buffer that has become free.
        self._waiting[level] = [
            group.use_grad(free) for group, free in zip(self._sharded.groups, self._waiting[level], strict=True)
        ]
        self._leaves_done += 1

    def _complete(self, group: FlatBuffer, chunk: tuple[int, int]) -> None:
        """Add all waiting levels, smallest first, to a chunk of the last leaf."""
        number = self._sharded.groups.index(group)
        level, done = 0, self._leaves_done
        while done:
            assert done & 1, "the leaves of a process are a power of two"
            group.grad[chunk[0] : chunk[1]].add_(self._waiting[level][number][chunk[0] : chunk[1]])
            level, done = level + 1, done >> 1

    def exchange(self) -> None:
        """Add over all ranks and divide:

        the owned slices of `.grad` become the mean over the microbatches. Collective.
        """
        for exchange in self._exchanges:
            exchange.finish()
        self._steps += 1
        for group in self._sharded.groups:
            for owned in group.owned:
                group.grad[owned.start : owned.stop].mul_(1 / self._plan.num_microbatches)

    def gather_weights(self) -> None:
        """Send the updated slices of the weights to all ranks. Collective."""
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
        """Return the losses of all microbatches of the step, fp32 [num_microbatches].

        Collective; the host does not wait.
        """
        slots = torch.zeros(self._plan.num_microbatches, device=self._world.device)
        slots[self._range[0] : self._range[1]] = torch.stack(own)
        return sum_of_slots(slots, self._world)

    def clip(self, largest: float) -> Tensor:
        """Scale the gradient so that its norm is at most `largest`. Return the norm before, 0-dim. Collective.

        The squares are added block by block with kernels of one fixed shape, and the sums of the blocks in one vector
        of fixed length, so the bits do not depend on the number of ranks.
        """
        squares = [self._squares(group) for group in self._sharded.groups]
        norm = torch.stack([part.sum() for part in squares]).sum().sqrt()
        factor = (largest / (norm + 1e-6)).clamp(max=1.0).float()
        for group in self._sharded.groups:
            for owned in group.owned:
                group.grad[owned.start : owned.stop].mul_(factor)
        return norm

    def _squares(self, group: FlatBuffer) -> Tensor:
        """Return the sum of squares of each block of a group, fp64 [blocks], complete on every rank."""
        block = group.block
        blocks = -(-group.used // block)
        sums = torch.zeros(blocks, device=group.grad.device, dtype=torch.float64)
        rows = torch.zeros(NORM_ROWS, block, device=group.grad.device)
        grad = group.grad[: blocks * block].view(blocks, block)
        owned = [(owned.start // block, min(owned.stop // block, blocks)) for owned in group.owned]
        for batch in _batches(owned, NORM_ROWS):  # slices: indices would make the host wait for the GPU
            at = list(accumulate((hi - lo for lo, hi in batch), initial=0))
            for (lo, hi), row in zip(batch, at, strict=False):
                rows[row : row + hi - lo].copy_(grad[lo:hi])
            added = rows.square().sum(1).double()
            for (lo, hi), row in zip(batch, at, strict=False):
                sums[lo:hi] = added[row : row + hi - lo]
        return sum_of_slots(sums, self._world)


def _batches(runs: list[tuple[int, int]], most: int) -> Iterator[list[tuple[int, int]]]:
    """Yield batches of ranges (start, stop), cut so that all batches but the last cover `most` numbers."""
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
    """An exchange of one group's partial sums, chunk by chunk, during the backward pass where that is faster."""

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
        """Register hooks by which the backward pass tells when a parameter's gradient is complete."""
        self._complete = complete
        for number, slot in enumerate(self._group.slots):
            hook = functools.partial(self._ready, number)
            slot.parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]

    def begin(self, watched: bool) -> None:
        """Begin a backward pass. In the last one of a step (`watched`) chunks are sent as soon as they are complete."""
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
        # Strictly in order: all ranks must issue collectives in the same order.
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
        self.launched += 1  # only now, because allocating memory for it may have failed
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
        """Send the remaining chunks, and add what has arrived along the upper part of the tree. Collective."""
        for chunk in range(self.launched):
            self._add(chunk)
        while self.launched < len(self._group.chunks):
            self._launch(background=False)
