"""Sources: a text such as `a/*.bin=0.7,b/*.bin=0.3` as globs with weights, and the order in which windows take turns.

Weights may change at positions: `a/*.bin=0.7;0.5@4096,b/*.bin=0.3;0.5@4096`. Nothing else is recorded of a mixture.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

import numpy as np
import numpy.typing as npt

from unbroken.errors import UserError
from unbroken.text import printable

MAX_SOURCES, MAX_PHASES = 64, 1000
PERIOD = 10_000  # windows after which the order repeats, at most; weights are rounded to this share
Integers = npt.NDArray[np.int64]
_NUMBER = r"\d{1,9}(?:\.\d{1,9})?"
_SOURCE = re.compile(rf"(.+)=({_NUMBER}(?:;{_NUMBER}@\d{{1,18}})*)", re.ASCII | re.DOTALL)


@dataclass(frozen=True)
class Phase:
    """A phase of a mixture: the typed weights, one for each source, which hold from position `begins` on."""

    begins: int
    weights: tuple[str, ...]

    @property
    def shares(self) -> tuple[int, ...]:
        """Whole numbers in the ratio of the weights."""
        return shares_of(tuple(map(Fraction, self.weights)))


@dataclass(frozen=True)
class Mix:
    """A mixture: the globs of all sources, and the phases of their weights, of which the first begins at 0."""

    globs: tuple[str, ...]
    phases: tuple[Phase, ...]

    def __str__(self) -> str:
        return ",".join(f"{glob}={self.weights_of(index)}" for index, glob in enumerate(self.globs))

    def weights_of(self, source: int) -> str:
        """Return the weights of a source as in the text."""
        text = last = self.phases[0].weights[source]
        for phase in self.phases[1:]:
            if phase.weights[source] != last:
                last = phase.weights[source]
                text += f";{last}@{phase.begins}"
        return text

    @classmethod
    def of_one(cls, glob: str) -> Mix:
        """Return a single glob as a source."""
        return cls((glob,), (Phase(0, ("1",)),))

    def for_sources(self, count: int) -> tuple[Phase, ...]:
        """Return the phases for `count` sources; added sources have weight 0."""
        more = ("0",) * (count - len(self.globs))
        return tuple(Phase(phase.begins, phase.weights + more) for phase in self.phases)


def parse(text: str) -> Mix | None:
    """Return the sources in a text; None if it is a single glob. Raises UserError for a list that makes no sense."""
    found = [_SOURCE.fullmatch(item) for item in text.split(",")]
    if not any(found):
        return None
    shown = printable(text)
    if not all(found) or len(found) > MAX_SOURCES:
        raise UserError(
            f"--input_bin {shown}: a list of sources is GLOB=WEIGHT,GLOB=WEIGHT,…, of at most {MAX_SOURCES}; in a list"
            " write ? for a comma in a name, and in a single glob for the = of a name that ends in =NUMBER"
        )
    globs, changes = list[str](), list[dict[int, str]]()
    for each in filter(None, found):
        first, *later = each[2].split(";")
        pairs = [weight.split("@") for weight in later]
        globs.append(each[1])
        changes.append({0: first, **{int(begins): weight for weight, begins in pairs}})
        if len(changes[-1]) <= len(later):
            raise UserError(f"--input_bin {shown}: {each[1]} has two weights from the same position on; leave one out")
    begins = sorted(set().union(*changes))
    if len(begins) > MAX_PHASES:
        raise UserError(f"--input_bin {shown}: weights change at more than {MAX_PHASES} positions")
    phases = list[Phase]()
    for at in begins:
        before = phases[-1].weights if phases else ("",) * len(globs)
        phases.append(Phase(at, tuple(map(dict[int, str].get, changes, [at] * len(globs), before))))
    for phase in phases:
        if not phase.shares:
            raise UserError(
                f"--input_bin {shown}: at least one weight must be above 0, and each at least 1/{PERIOD:,} of their"
                " sum, or 0"
            )
    return Mix(tuple(globs), tuple(phases))


def map_globs(text: str, change: Callable[[str], str]) -> str:
    """Return a text of --input_bin with each of its globs changed."""
    mix = parse(text)
    return change(text) if mix is None else str(Mix(tuple(map(change, mix.globs)), mix.phases))


def continue_mix(typed: Mix, before: Mix, position: int, window: int) -> tuple[Mix, int | None]:
    """Return the mixture of a run that has reached `position`, and the position at which its weights change.

    That position is None if no weight changes. Weights without a position hold from the next window on. Raises
    UserError if typed positions contradict the past.

    Args:
        typed: the sources of this attempt.
        before: those of the checkpoint; `typed` may have more.
        position: that of the run.
        window: tokens of a window.
    """
    limit = -(-position // window) * window
    past = before.for_sources(len(typed.globs))
    phases = typed.phases
    if len(phases) == 1 and limit:
        phases = (*(phase for phase in past if phase.begins < limit), Phase(limit, phases[0].weights))
    differing = [at for at in sorted({phase.begins for phase in (*phases, *past)}) if _at(phases, at) != _at(past, at)]
    if not differing:
        return Mix(typed.globs, past), None
    if differing[0] < limit:
        raise UserError(
            f"--input_bin {printable(str(typed))}: up to position {limit:,} the run has read with other weights,"
            f" {printable(str(before))}; type weights without @ to change them from there on"
        )
    return Mix(typed.globs, phases), differing[0]


def _at(phases: Sequence[Phase], position: int) -> tuple[int, ...]:
    return [phase for phase in phases if phase.begins <= position][-1].shares


@cache
def shares_of(weights: tuple[Fraction, ...]) -> tuple[int, ...]:
    """Return whole numbers in the ratio of the weights, of a sum of at most PERIOD; () if rounding makes one 0."""
    total = sum(weights)
    if not total:
        return ()
    exact = [weight / total for weight in weights]
    period = math.lcm(*(share.denominator for share in exact))
    if period <= PERIOD:
        return tuple(int(share * period) for share in exact)
    whole = [math.floor(share * PERIOD) for share in exact]
    by_rest = sorted(range(len(exact)), key=lambda index: whole[index] - exact[index] * PERIOD)
    for index in by_rest[: PERIOD - sum(whole)]:
        whole[index] += 1
    return (
        tuple(whole) if all(bool(share) == bool(weight) for share, weight in zip(whole, weights, strict=True)) else ()
    )


@cache
def turns(shares: tuple[int, ...]) -> tuple[Integers, Integers]:
    """Return the source of each window of a period, and [period + 1, sources]: windows of each source before a window.

    Before every window the count of each source is less than one away from its exact share. The n-th window of a source
    with c of D windows must lie between n * D / c, rounded down, and (n + 1) * D / c, rounded up. Of the sources that
    may come, the one whose time ends first is taken (earliest deadline first), which always succeeds.
    """
    period = sum(shares)
    order, counts = np.empty(period, dtype=np.int64), np.zeros((period + 1, len(shares)), dtype=np.int64)
    done = [0] * len(shares)
    ends = [-(-period // share) if share else period + 1 for share in shares]
    for at in range(period):
        ready = [source for source, share in enumerate(shares) if share and done[source] * period // share <= at]
        source = min(ready, key=ends.__getitem__)
        order[at] = source
        done[source] += 1
        ends[source] = -(-(done[source] + 1) * period // shares[source])
        counts[at + 1] = done
    return order, counts
