"""How a step is divided: the same expression on any number of processes, and never another token."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from unbroken.distributed.step_plan import (
    StepPlan,
    contiguous_ranges,
    halve_microbatch,
    is_elastic,
    num_leaves,
    plan_step,
    resplit,
)
from unbroken.errors import UserError
from unbroken.text import format_count

ELASTIC = st.sampled_from([1, 2, 4, 8, 16])


def leaf(lo: int, hi: int) -> object:
    """Microbatches added in sequence."""
    total: object = lo
    for index in range(lo + 1, hi):
        total = (total, index)
    return total


def expression_on_one(plan: StepPlan) -> object:
    """The definition: halve the range while it is even and leaves are left, then add in sequence."""

    def tree(lo: int, hi: int, leaves: int) -> object:
        if leaves == 1:
            return leaf(lo, hi)
        middle = (lo + hi) // 2
        return (tree(lo, middle, leaves // 2), tree(middle, hi, leaves // 2))

    return tree(0, plan.num_microbatches, plan.leaves)


def expression_of(plan: StepPlan) -> object:
    """What the processes do: each carries its leaves as binary counting does, then neighbours are added."""
    partial = []
    for lo, hi in plan.ranges:
        waiting: list[tuple[int, object]] = []
        for start in range(lo, hi, plan.leaf_size):
            level, total = 0, leaf(start, start + plan.leaf_size)
            while waiting and waiting[-1][0] == level:
                total, level = (waiting.pop()[1], total), level + 1
            waiting.append((level, total))
        assert len(waiting) == 1
        partial.append(waiting[0][1])
    while len(partial) > 1:
        partial = [(partial[i], partial[i + 1]) for i in range(0, len(partial), 2)]
    return partial[0]


@given(batch=st.integers(1, 24), accumulation=st.integers(1, 48), processes=st.integers(1, 16), elastic=ELASTIC)
def test_an_exact_plan_is_the_same_expression(batch: int, accumulation: int, processes: int, elastic: int) -> None:
    if processes > batch * accumulation:
        sequences = format_count(batch * accumulation, "sequence")
        with pytest.raises(UserError, match=f"{processes} processes for {sequences} per step"):
            plan_step(batch, accumulation, processes, elastic)
        return
    plan = plan_step(batch, accumulation, processes, elastic)
    assert plan.microbatch_size * plan.split == batch and plan.num_microbatches == accumulation * plan.split
    assert [index for lo, hi in plan.ranges for index in range(lo, hi)] == list(range(plan.num_microbatches))
    assert all(hi > lo for lo, hi in plan.ranges)
    if plan.exact:
        alone = plan_step(batch, accumulation, 1, elastic, min_split=plan.split)
        assert alone.split == plan.split and expression_of(plan) == expression_on_one(alone)
    else:
        assert any("bits may differ" in note for note in plan.notes)


@given(power=st.integers(0, 3), more=st.integers(1, 6))
def test_powers_of_two_that_divide_the_accumulation_are_exact_without_a_word(power: int, more: int) -> None:
    plan = plan_step(4, 2**power * more, 2**power, 8)
    assert plan.exact and plan.split == 1 and plan.notes == ()


def test_twin_a_wrong_order_is_seen() -> None:
    """Ring order, which plain all-reduce uses, is another expression."""
    plan = plan_step(1, 8, 4, 8)
    ring = [(lo, hi) for lo, hi in plan.ranges[1:] + plan.ranges[:1]]
    broken = StepPlan(plan.microbatch_size, plan.num_microbatches, tuple(ring), 1, plan.leaves, True)
    assert expression_of(broken) != expression_on_one(plan)


@pytest.mark.parametrize(
    ("given_as", "ranges", "size", "split"),
    [
        ((12, 1, 2, 8), ((0, 1), (1, 2)), 6, 2),  # the guide's Example 3: 12 sequences become 2 x 6
        ((1, 4, 3, 8), ((0, 2), (2, 3), (3, 4)), 1, 1),  # nothing to split: dealt out unevenly
        ((4, 6, 3, 8), ((0, 2), (2, 4), (4, 6)), 4, 1),
        ((4, 1, 3, 8), ((0, 2), (2, 3), (3, 4)), 1, 4),
        ((4, 2, 8, 8), tuple((i, i + 1) for i in range(8)), 1, 4),
    ],
)
def test_examples(given_as: tuple[int, int, int, int], ranges: object, size: int, split: int) -> None:
    plan = plan_step(*given_as)
    assert (plan.ranges, plan.microbatch_size, plan.split) == (ranges, size, split)


def test_typed_elastic_ranks_split_from_the_start() -> None:
    plans = [plan_step(4, 1, processes, 4, elastic_ranks_typed=True) for processes in (1, 2, 4)]
    assert all(plan.exact and plan.split == 4 and plan.leaves == 4 for plan in plans)
    with pytest.raises(UserError, match="--elastic_ranks 8: 4 x 1 sequences cannot be divided"):
        plan_step(4, 1, 1, 8, elastic_ranks_typed=True)


def test_a_split_is_kept() -> None:
    """A run that was split for two processes stays split on one, so that its bits do not change again."""
    assert plan_step(12, 1, 1, 8, min_split=2).microbatch_size == 6
    assert plan_step(12, 1, 1, 8, min_split=2).notes == ()


@given(count=st.integers(1, 200), processes=st.integers(1, 16))
def test_dealing(count: int, processes: int) -> None:
    ranges = contiguous_ranges(count, processes)
    sizes = [hi - lo for lo, hi in ranges]
    assert sum(sizes) == count and max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)


@given(count=st.integers(1, 1000), elastic=ELASTIC)
def test_leaves(count: int, elastic: int) -> None:
    leaves = num_leaves(count, elastic)
    assert count % leaves == 0 and leaves <= elastic
    assert leaves == elastic or (count // leaves) % 2 == 1


@settings(deadline=None)
@given(batch=st.integers(1, 24), accumulation=st.integers(1, 12), processes=st.integers(1, 8), elastic=ELASTIC)
def test_a_microbatch_can_always_be_halved(batch: int, accumulation: int, processes: int, elastic: int) -> None:
    """Out of memory: half as large at most, and what a run that is resumed with this split gets is the same."""
    assume(processes <= batch * accumulation)
    plan = plan_step(batch, accumulation, processes, elastic)
    assume(plan.microbatch_size % 2 == 0)
    smaller = halve_microbatch(plan, elastic)
    assert smaller.microbatch_size <= plan.microbatch_size // 2
    resumed = plan_step(batch, accumulation, processes, elastic, min_split=smaller.split)
    assert dataclasses.replace(smaller, notes=()) == dataclasses.replace(resumed, notes=())


@pytest.mark.parametrize(
    ("division", "elastic", "is_it"),
    [
        ((12, 1, 2), 8, False),  # two halves, which no --elastic_ranks 8 makes of 12 sequences
        ((12, 1, 2), 2, True),
        ((2, 4, 1), 8, False),
        ((2, 8, 1), 8, True),
        ((2, 8, 1), 16, False),
    ],
)
def test_which_runs_a_typed_elastic_ranks_repeats(division: tuple[int, int, int], elastic: int, is_it: bool) -> None:
    plan = plan_step(*division, elastic)
    assert is_elastic(plan, elastic) == is_it


@pytest.mark.parametrize(
    ("split", "old", "new", "becomes"),
    [(1, 4, 8, 1), (2, 12, 6, 1), (2, 12, 24, 4), (4, 4, 2, 2), (2, 8, 6, 1), (3, 2, 2, 2)],
)
def test_another_batch_size_keeps_the_parts(split: int, old: int, new: int, becomes: int) -> None:
    assert resplit(split, old, new) == becomes
