"""Where a run was broken off and went on, for those who look at it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from unbroken.journal import Timeline
from unbroken.logfile import events, read_log

FINISHED = "finished"


@dataclass(frozen=True)
class Break:
    """Between two attempts: the step that the first had reached, that which the second went on from, and in words."""

    reached: int
    back_to: int
    said: str


def breaks(log: Path, run: Timeline) -> list[Break]:
    """One for each attempt but the first. The journal knows how each ended; an older run has only its log."""
    known = [(attempt.step, max(attempt.steps, default=attempt.step), attempt.end) for attempt in run.attempts]
    logged = _logged(log) if log.is_file() else []
    attempts = known if len(known) >= len(logged) else logged
    pairs = [(reached, start, end) for (_, reached, end), (start, _, _) in pairwise(attempts)]
    return [Break(reached, start, _said(reached, start, end)) for reached, start, end in pairs]


def _said(reached: int, back_to: int, end: str) -> str:
    if reached < back_to:
        return f"resumed from {back_to}"
    if reached == back_to:
        return f"extended at step {back_to}" if end == FINISHED else f"stopped at step {back_to}, resumed"
    if end:
        return f"went back from step {reached} to {back_to}"
    return f"interrupted after step {reached}, resumed from {back_to}"


def _logged(log: Path) -> list[tuple[int, int, str]]:
    """Of each attempt: the step it began at, the last one that it logged, and nothing of its end."""
    began = [step for step, _ in read_log(log).attempts]
    found: list[tuple[int, int, str]] = []
    for kind, step, _ in events(log):
        if kind == "#" and began:
            found.append((began[0], began.pop(0), ""))
        elif kind == "trn" and found:
            found[-1] = found[-1][0], max(found[-1][1], step), ""
    return found
