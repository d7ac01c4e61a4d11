"""The one order of addition: the gradient of a step is a fixed binary tree over its microbatches, for any world size.

Floating-point addition is not associative, so a sum has the same bits only if it is the same expression. A rank adds
its own subtree. The ranks then exchange slices of their partial sums (all-to-all), and each adds its slice along the
upper part of the tree. This moves as many bytes as a ring all-reduce, whose order depends on the number of ranks.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import accumulate, chain, repeat

import torch
import torch.distributed as dist
from torch import Tensor

from unbroken.distributed.flat_params import FlatBuffer, ShardedParameters
from unbroken.distributed.step_plan import StepPlan
from unbroken.distributed.world import World

# The older name still works in torch 2.13, with a warning at every call.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

# Blocks summed by one kernel of a fixed shape. A GPU would spend milliseconds on launching 64 of them at a time.
NORM_ROWS, NORM_ROWS_ON_GPU = 64, 2048


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
    summed = slots.cpu() if world.via_host_memory else slots
    dist.all_reduce(summed, group=world.group)
    return summed.to(slots.device)


def slice_buffer(sharded: ShardedParameters) -> Tensor:
    """Return memory for the longest slice that this rank owns, fp32; empty for a single rank."""
    longest = max((owned.stop - owned.start for group in sharded.groups for owned in group.owned), default=0)
    return sharded.groups[0].data.new_empty(longest if sharded.world.size > 1 else 0)


def gather_weights(sharded: ShardedParameters, updated: Tensor) -> None:
    """Send the slices of the weights that each rank owns to all ranks, through a `slice_buffer`. Collective."""
    world = sharded.world
    if world.size == 1:
        return
    with world.phases.waiting():
        for group in sharded.groups:
            for (lo, hi), owned in zip(group.chunks, group.owned, strict=True):
                whole = group.data[lo:hi]
                own = updated[: owned.stop - owned.start].copy_(group.data[owned.start : owned.stop])
                if world.via_host_memory:
                    gathered = whole.cpu()
                    all_gather_single(gathered, own.cpu(), group=world.group)
                    whole.copy_(gathered)
                else:
                    all_gather_single(whole, own, group=world.group)


class Gradients:
    """The sum of the gradients of a step; `exchange` leaves their mean in this rank's slices of `.grad`.

    Level k of `_waiting` holds the sum of a finished subtree of 2^k leaves until its sibling is finished. With the
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
        # Allocated now: after the update a lack of memory would cost the step.
        self._updated = slice_buffer(sharded)
        # The order in which all ranks send their chunks: each entry stands for the next chunk of that exchange. The
        # first step's backward pass shows in which order later ones complete them.
        self._order = list(chain.from_iterable(repeat(each, len(each.group.chunks)) for each in self._exchanges))
        self._completed = list[Exchange]()
        self._num_sent = 0
        if self._overlap:
            for exchange in self._exchanges:
                exchange.watch(self._note_complete)
        self.replan(plan)

    def give_up(self) -> None:
        """Send what the other ranks wait for in this step, whose gradients are lost; call before `replan`, at once.

        A rank that is ahead waits for this one: not its host but its GPU, until its host frees memory or pins some.
        """
        if self._overlap and self._steps > 0:
            self._send_rest()

    def replan(self, plan: StepPlan) -> None:
        """Use another division from now on, and drop the gradients added in this step. Collective."""
        self._world.phases.forget()
        self.give_up()
        self._begin_order()
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
            self.begin_pass(index)
            yield index

    @property
    def first(self) -> int:
        """The number of this rank's first microbatch."""
        return self._range[0]

    def begin_pass(self, index: int, is_dropped: bool = False) -> None:
        """Begin the forward and backward pass of a microbatch; the first one of a leaf may be begun again.

        Nothing is exchanged during a pass that `is_dropped`.
        """
        lo, hi = self._range
        if (index - lo) % self._leaf_size == 0:
            self._sharded.zero_grad()
        self._begin_order(watched=not is_dropped and index == hi - 1 and self._overlap)

    def add(self, index: int) -> None:
        """Add the gradient of microbatch `index`; call after its backward pass."""
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
        """Add the waiting sums of equal size to a finished leaf, like the carries of a binary counter; keep the sum."""
        level, carries = 0, self._leaves_done
        while carries & 1:
            for group, waiting in zip(self._sharded.groups, self._waiting[level], strict=True):
                group.grad.add_(waiting)
            level, carries = level + 1, carries >> 1
        if level == len(self._waiting):
            self._waiting.append([torch.empty_like(group.grad) for group in self._sharded.groups])
        # The sum stays in its buffer, and the next leaf uses the buffer that has become free.
        self._waiting[level] = [
            group.use_grad(free) for group, free in zip(self._sharded.groups, self._waiting[level], strict=True)
        ]
        self._leaves_done += 1

    def _complete(self, group: FlatBuffer, chunk: tuple[int, int]) -> None:
        """Add the waiting sums of all levels, smallest first, to a chunk of the last leaf."""
        number, (lo, hi) = self._sharded.groups.index(group), chunk
        levels = self._leaves_done.bit_length()
        assert self._leaves_done == 2**levels - 1, "the leaves of a process are a power of two"
        for level in range(levels):
            group.grad[lo:hi].add_(self._waiting[level][number][lo:hi])

    def _begin_order(self, watched: bool = False) -> None:
        """Begin with the first chunk again; `watched`: in the last backward pass of a step."""
        self._num_sent, self._completed = 0, []
        for exchange in self._exchanges:
            exchange.begin(watched)

    def _note_complete(self, exchange: Exchange) -> None:
        """Send the chunks that are complete, in the order of all ranks; `exchange` has one more.

        The first step only learns the order: a rank that runs out of memory in it must not leave another waiting.
        """
        if self._steps == 0:
            self._completed.append(exchange)
            return
        while self._num_sent < len(self._order) and self._order[self._num_sent].has_complete:
            following = self._order[self._num_sent]
            self._complete(following.group, following.group.chunks[following.launched])
            following.launch(background=True)
            self._num_sent += 1

    def _send_rest(self) -> None:
        """Send the remaining chunks, and add the received slices of all."""
        for exchange in self._exchanges:
            exchange.add_received()
        while self._num_sent < len(self._order):
            self._order[self._num_sent].launch(background=False)
            self._num_sent += 1

    def exchange(self) -> None:
        """Add over all ranks; the owned slices of `.grad` become the mean over the microbatches. Collective."""
        with self._world.phases.waiting():
            self._send_rest()
        if self._overlap and self._steps == 0:
            places = self._world.broadcast([self._exchanges.index(each) for each in self._completed])
            if len(places) == len(self._order):
                self._order = [self._exchanges[place] for place in places]
        self._begin_order()
        self._steps += 1
        for part in self._owned_parts():
            part.mul_(1 / self._plan.num_microbatches)

    def gather_weights(self) -> None:
        """Send the updated slices of the weights to all ranks. Collective."""
        gather_weights(self._sharded, self._updated)

    def losses(self, of_rank: list[Tensor]) -> Tensor:
        """Return the losses of all microbatches of the step, fp32 (num_microbatches,), given this rank's. Collective.

        The host does not wait for the GPU.
        """
        slots = torch.zeros(self._plan.num_microbatches, device=self._world.device)
        slots[self._range[0] : self._range[1]] = torch.stack(of_rank)
        return sum_of_slots(slots, self._world)

    def clip(self, largest: float) -> Tensor:
        """Scale the gradient so that its norm is at most `largest`. Return the norm before, 0-dim. Collective.

        The squares are added block by block with kernels of one shape. The sums of the blocks are added as one vector,
        whose length is always the same. So the bits do not depend on the number of ranks.
        """
        squares = [self._squares(group) for group in self._sharded.groups]
        norm = torch.stack([part.sum() for part in squares]).sum().sqrt()
        factor = (largest / (norm + 1e-6)).clamp(max=1.0).float()
        for part in self._owned_parts():
            part.mul_(factor)
        return norm

    def _owned_parts(self) -> Iterator[Tensor]:
        """Yield the parts of `.grad` that this rank owns, neighbours as one."""
        for group in self._sharded.groups:
            for lo, hi in _joined([(owned.start, owned.stop) for owned in group.owned]):
                yield group.grad[lo:hi]

    def _squares(self, group: FlatBuffer) -> Tensor:
        """Return the sum of squares of each block of a group, fp64 (blocks,), on every rank. Collective."""
        block = group.block
        blocks = -(-group.used // block)
        sums = torch.zeros(blocks, device=group.grad.device, dtype=torch.float64)
        most = min(NORM_ROWS_ON_GPU, blocks) if group.grad.is_cuda else NORM_ROWS
        rows = torch.zeros(most, block, device=group.grad.device)
        grad = group.grad[: blocks * block].view(blocks, block)
        owned = [(owned.start // block, min(owned.stop // block, blocks)) for owned in group.owned]
        # Of slices, because indices would make the host wait for the GPU.
        for batch in _batches(_joined(owned), most):
            at = list(accumulate((hi - lo for lo, hi in batch), initial=0))
            terms = grad[slice(*batch[0])]
            if len(terms) < most:
                for (lo, hi), row in zip(batch, at, strict=False):
                    rows[row : row + hi - lo].copy_(grad[lo:hi])
                terms = rows
            added = terms.square().sum(1).double()
            for (lo, hi), row in zip(batch, at, strict=False):
                sums[lo:hi] = added[row : row + hi - lo]
        return sum_of_slots(sums, self._world)


def _joined(runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the ascending ranges (start, stop) with neighbours joined."""
    joined = list[tuple[int, int]]()
    for lo, hi in runs:
        if joined and joined[-1][1] == lo:
            joined[-1] = (joined[-1][0], hi)
        else:
            joined.append((lo, hi))
    return joined


def _batches(runs: list[tuple[int, int]], most: int) -> Iterator[list[tuple[int, int]]]:
    """Yield batches of ranges (start, stop), cut so that each batch but the last covers `most` numbers."""
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
    """An exchange of one group's partial sums, chunk by chunk; after `watch`, during the last backward pass."""

    def __init__(self, group: FlatBuffer, world: World) -> None:
        self.group, self._world = group, world
        self._on_complete: Callable[[Exchange], None] = lambda exchange: None
        self._watched = False
        self.launched = self._num_complete = 0  # chunks; the first ones of the group
        self._pending: list[tuple[int, Tensor, dist.Work]] = []
        longest = max(hi - lo for lo, hi in group.chunks)
        self._received = torch.empty(longest, device="cpu" if world.via_host_memory else world.device)
        self._params_left: list[int] = []  # of each chunk: parameters whose gradient is not complete
        self._chunks_of = [
            [chunk for chunk, (lo, hi) in enumerate(group.chunks) if lo < slot.stop and slot.start < hi]
            for slot in group.slots
        ]

    def watch(self, on_complete: Callable[[Exchange], None]) -> None:
        """Register hooks of the backward pass: `on_complete` is called for each chunk whose gradients are complete."""
        self._on_complete = on_complete
        for number, slot in enumerate(self.group.slots):
            hook = functools.partial(self._gradient_complete, number)
            slot.parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]

    def begin(self, watched: bool) -> None:
        """Begin a backward pass; in the last one of a step (`watched`) complete chunks are reported."""
        self._watched, self.launched, self._num_complete = watched, 0, 0
        if watched:
            counts = Counter(chunk for chunks in self._chunks_of for chunk in chunks)
            self._params_left = [counts[chunk] for chunk in range(len(self.group.chunks))]

    @property
    def has_complete(self) -> bool:
        """Whether the next chunk to send is complete."""
        return self.launched < self._num_complete

    def _gradient_complete(self, number: int, _: Tensor) -> None:
        """Report the chunks that the gradient of parameter `number` completes, the first ones of the group first."""
        if not self._watched:
            return
        for chunk in self._chunks_of[number]:
            self._params_left[chunk] -= 1
        while self._num_complete < len(self._params_left) and self._params_left[self._num_complete] == 0:
            self._num_complete += 1
            self._on_complete(self)

    def launch(self, background: bool) -> None:
        """Exchange the next chunk; in the background, `add_received` adds what is received."""
        lo, hi = self.group.chunks[self.launched]
        sent = self.group.grad[lo:hi]
        sent = sent.cpu() if self._world.via_host_memory else sent
        # Outside of the backward pass a lack of memory would leave the other ranks waiting in the exchange.
        received = torch.empty_like(sent) if background else self._received[: len(sent)]
        work = dist.all_to_all_single(received, sent, group=self._world.group, async_op=background)
        if background:
            self._pending.append((self.launched, received, work))
        else:
            self._add(self.launched, received)
        self.launched += 1  # last, because the allocation above may fail

    def _add(self, chunk: int, received: Tensor) -> None:
        """Add the received slices of a chunk along the upper part of the tree."""
        total = tree_sum(list(received.chunk(self._world.size)))
        owned = self.group.owned[chunk]
        self.group.grad[owned.start : owned.stop].copy_(total)

    def add_received(self) -> None:
        """Add the received slices of the chunks that were sent in the background."""
        for chunk, received, work in self._pending:
            work.wait()
            self._add(chunk, received)
        self._pending = []
