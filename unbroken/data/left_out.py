"""Batches that a run leaves out, as ranges [start, stop) of token positions: sorted, apart from each other."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from unbroken.errors import UserError
from unbroken.text import printable

Ranges = tuple[tuple[int, int], ...]
MAX_RANGES = 10_000
_BATCHES = re.compile(r"\d{1,15}(-\d{1,15})?(,\d{1,15}(-\d{1,15})?)*", re.ASCII)


def parse(text: str, step_tokens: int) -> Ranges:
    """Return the ranges of `A-B,C,…`: batches of `step_tokens` tokens, numbered from 1. Raises UserError."""
    wrong = UserError(f"--skip_batches {printable(text)}: it must be numbers of batches such as 101-103,250")
    if text and not _BATCHES.fullmatch(text):
        raise wrong
    pairs = [item.split("-") for item in text.split(",")] if text else []
    ranges = [((int(pair[0]) - 1) * step_tokens, int(pair[-1]) * step_tokens) for pair in pairs]
    if len(ranges) > MAX_RANGES or any(start < 0 or start >= stop for start, stop in ranges):
        raise wrong
    return union(ranges)


def describe(ranges: Ranges, step_tokens: int) -> str:
    """Return the ranges as `parse` reads them, rounded to the whole batches that they touch."""
    batches = [(start // step_tokens + 1, -(-stop // step_tokens)) for start, stop in ranges]
    return ",".join(f"{first}-{last}" if first < last else f"{first}" for first, last in batches)


def union(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """Return all ranges, those that touch joined."""
    joined = list[tuple[int, int]]()
    for start, stop in sorted(ranges):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return tuple(joined)


def next_start(ranges: Ranges, position: int, count: int) -> int:
    """Return the first position from `position` on at which `count` tokens touch no range."""
    for start, stop in ranges:
        if start < position + count and position < stop:
            position = stop
    return position


def count_before(ranges: Ranges, position: int) -> int:
    """Return how many positions before `position` are in the ranges."""
    return sum(min(stop, position) - start for start, stop in ranges if start < position)


def are_ranges(value: Any) -> bool:
    """Return whether an untrusted list is what a checkpoint stores: [[start, stop], …], sorted and apart."""
    if not isinstance(value, list) or len(value) > MAX_RANGES:
        return False
    pairs = [pair for pair in value if isinstance(pair, list) and len(pair) == 2 and {*map(type, pair)} == {int}]
    whole = len(pairs) == len(value) and all(0 <= start < stop < 2**62 for start, stop in pairs)
    return whole and list(map(list, union((start, stop) for start, stop in pairs))) == value
