"""The division of a step: the microbatches of each rank, and the order in which their gradients are added.

Pure arithmetic. The tokens of a step and their order do not depend on it.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass

from unbroken.errors import UserError
from unbroken.text import format_count


@dataclass(frozen=True)
class StepPlan:
    """A division of every step. Rank r computes microbatches `ranges[r][0]` to `ranges[r][1] - 1`.

    A typed microbatch is divided into `split` parts. `leaves` is the number of leaves of the tree of additions.
    `exact`: the tree is the one of a single process with the same split, so every bit is the same. `notes`: lines for
    the user.
    """

    microbatch_size: int
    num_microbatches: int
    ranges: tuple[tuple[int, int], ...]
    split: int
    leaves: int
    exact: bool
    notes: tuple[str, ...] = ()

    @property
    def leaf_size(self) -> int:
        """Number of microbatches of a leaf, which are added in sequence."""
        return self.num_microbatches // self.leaves

    @property
    def typed(self) -> tuple[int, int]:
        """The --batch_size and --grad_accumulation_steps that this plan divides."""
        return self.microbatch_size * self.split, self.num_microbatches // self.split


def num_leaves(num_microbatches: int, elastic_ranks: int) -> int:
    """Return the leaves of the tree: ranges are halved while they are even and at most `elastic_ranks` leaves exist."""
    leaves = 1
    while num_microbatches % (2 * leaves) == 0 and 2 * leaves <= elastic_ranks:
        leaves *= 2
    return leaves


def plan_step(
    batch_size: int,
    accumulation: int,
    world_size: int,
    elastic_ranks: int,
    *,
    min_split: int = 1,
    elastic_ranks_typed: bool = False,
) -> StepPlan:
    """Divide the microbatches of a step over the ranks.

    Args:
        batch_size: sequences of a typed microbatch.
        accumulation: typed microbatches of a step, over all ranks.
        world_size: number of ranks.
        elastic_ranks: the most ranks for which the bits are kept, a power of two.
        min_split: the split that the run has already; it is kept, so that a run does not change its bits twice.
        elastic_ranks_typed: whether microbatches are split at once, so that `elastic_ranks` leaves exist.

    Raises UserError if there are more ranks than sequences, or if no split gives `elastic_ranks` leaves.
    """
    if world_size > batch_size * accumulation:
        raise UserError(
            f"{world_size} processes for {format_count(batch_size * accumulation, 'sequence')} per step: use"
            " fewer processes, or a larger --batch_size or --grad_accumulation_steps"
        )
    splits = [s for s in range(1, batch_size + 1) if batch_size % s == 0 and s % min_split == 0]
    splits = splits or [s for s in range(1, batch_size + 1) if batch_size % s == 0]
    if elastic_ranks_typed:
        splits = [s for s in splits if accumulation * s % elastic_ranks == 0]
        if not splits:
            raise UserError(
                f"--elastic_ranks {elastic_ranks}: {batch_size} x {accumulation} sequences cannot be divided into"
                " so many equal parts; type a smaller power of two, or another batch size"
            )
    even = [s for s in splits if accumulation * s % world_size == 0]
    enough = [s for s in splits if accumulation * s >= world_size] or splits[-1:]
    split = (even or enough)[0]
    count = accumulation * split
    leaves = num_leaves(count, elastic_ranks)
    power_of_two = world_size & (world_size - 1) == 0
    plan = StepPlan(
        microbatch_size=batch_size // split,
        num_microbatches=count,
        ranges=contiguous_ranges(count, world_size),
        split=split,
        leaves=leaves,
        exact=power_of_two and world_size <= leaves,
    )
    return dataclasses.replace(plan, notes=_notes(plan, batch_size, world_size, min_split))


def halve_microbatch(plan: StepPlan, elastic_ranks: int) -> StepPlan:
    """Return a plan of half the microbatch and twice as many, the same that a resumed run makes of the new split."""
    return plan_step(*plan.typed, len(plan.ranges), elastic_ranks, min_split=2 * plan.split)


def is_elastic(plan: StepPlan, elastic_ranks: int) -> bool:
    """Return whether a new run with --elastic_ranks typed would be divided like this plan, on any number of ranks."""
    try:
        typed = plan_step(*plan.typed, 1, elastic_ranks, elastic_ranks_typed=True)
    except UserError:
        return False
    return (typed.split, typed.leaves) == (plan.split, plan.leaves)


def resplit(split: int, batch_size: int, new_batch_size: int) -> int:
    """Return the split after --batch_size changes: into parts of the same size as before if they divide the new one."""
    part = max(1, batch_size // split)
    return new_batch_size // part if split > 1 and new_batch_size % part == 0 else 1


def contiguous_ranges(count: int, world_size: int) -> tuple[tuple[int, int], ...]:
    """Return consecutive ranges of `count` microbatches, one for each rank; the first ones may be longer by one."""
    each, more = divmod(count, world_size)
    bounds = [rank * each + min(rank, more) for rank in range(world_size + 1)]
    return tuple(itertools.pairwise(bounds))


def _notes(plan: StepPlan, batch_size: int, world_size: int, min_split: int) -> tuple[str, ...]:
    same = "the tokens of each step and their order stay the same"
    notes = []
    if plan.split != min_split:
        notes.append(
            f"each microbatch of {format_count(batch_size, 'sequence')} is split into {plan.split} of"
            f" {plan.microbatch_size}: {same}, bits may differ from those of an unsplit run from here"
        )
    if not plan.exact:
        counts = sorted({hi - lo for lo, hi in plan.ranges}, reverse=True)
        shares = " or ".join(map(str, counts))
        notes.append(
            f"{plan.num_microbatches} microbatches over {world_size} processes, {shares} each: {same}, bits may differ"
            f" from here (they are kept on {_exact_counts(plan.leaves)})"
        )
    return tuple(notes)


def _exact_counts(leaves: int) -> str:
    """Return in words the numbers of processes that keep the bits."""
    counts = [str(2**k) for k in range(leaves.bit_length())]
    return "1 process" if len(counts) == 1 else f"{', '.join(counts[:-1])} or {counts[-1]} processes"
