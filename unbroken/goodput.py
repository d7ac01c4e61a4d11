"""Where the time of a run went: how much of it made the model better, and what each interruption cost. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from unbroken.journal import Attempt

CAUSES = {
    "repeated": "steps that were trained again after an interruption",
    "down": "nothing was running",
    "start-up": "from a process's start to its first step",
    "validation": "validation",
    "saves": "training waited for a save",
    "other": "the last save, and the rest",
}


@dataclass(frozen=True)
class Account:
    """Seconds. `total` is the clock's, from the first attempt's start to the last sign of life; `ideal` the time of the
    steps of which the run consists, each counted once; `lost` the rest by its cause, see CAUSES."""

    total: float
    ideal: float
    lost: dict[str, float]

    @property
    def goodput(self) -> float:
        """The share of the time that made the model better; validation is not part of it."""
        return self.ideal / self.total if self.total > 0 else 0.0


def account(attempts: Sequence[Attempt]) -> Account | None:
    """None where the journal has no attempts to count."""
    if not attempts:
        return None
    ideal = repeated = down = starting = 0.0
    for index, attempt in enumerate(attempts):
        limit = kept_up_to(attempts, index)
        ideal += sum(seconds for step, (_, seconds) in attempt.steps.items() if step <= limit)
        repeated += sum(seconds for step, (_, seconds) in attempt.steps.items() if step > limit)
        starting += start_up(attempt)
        if index:
            down += max(0.0, attempt.began - max(before.last for before in attempts[:index]))
    validation = sum(seconds for attempt in attempts for _, _, seconds in attempt.validations)
    blocked = [save.get("blocked") for attempt in attempts for save in attempt.saves]
    saves = sum(value for value in blocked if isinstance(value, float) and 0 <= value < math.inf)
    total = max(attempt.last for attempt in attempts) - attempts[0].began
    spent = {"repeated": repeated, "down": down, "start-up": starting, "validation": validation, "saves": saves}
    other = max(0.0, total - ideal - sum(spent.values()))
    return Account(total, ideal, {**spent, "other": other})


def kept_up_to(attempts: Sequence[Attempt], index: int) -> float:
    """The last step of an attempt that still belongs to the run: a later attempt went back to there."""
    return min((later.step for later in attempts[index + 1 :]), default=math.inf)


def start_up(attempt: Attempt) -> float:
    """From the process's start to its first step, without what it validated before that."""
    until = attempt.last if attempt.first is None else attempt.first
    validated = sum(seconds for _, wall, seconds in attempt.validations if wall <= until + 1e-3)
    return max(0.0, until - attempt.began - validated)
