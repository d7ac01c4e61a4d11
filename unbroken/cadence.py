"""How often to save, where `--save_every auto` leaves that to us: the rule of Young (1974) and Daly (2006).

A save costs the training loop C seconds; an interruption, of which there is one every M seconds on average, costs the
work since the last durable checkpoint. With an interval of T seconds the share lost is C/T + T/(2M), which is least at
T = sqrt(2 C M). Our saves cost little, so T is short; it is never shorter than twice what a save takes to be durable,
because one is under way at a time.
"""

from __future__ import annotations

import math
import statistics
from collections import deque

FIRST_COST = 0.5  # seconds, until a save has been measured
LEAST_COST = 0.002  # seconds; what cannot be told from noise
REMEMBERED = 32  # steps whose median is a quiet step


def best_interval(cost: float, durable: float, mtbf: float) -> float:
    """Seconds between saves. `cost` of a save to the loop, `durable` until it is on disk, `mtbf`: seconds as well."""
    return max(math.sqrt(2 * max(cost, LEAST_COST) * mtbf), 2 * durable)


class Cadence:
    """Measures steps and saves, in seconds, and says when the next save is due."""

    def __init__(self, mtbf: float, now: float) -> None:
        self._mtbf, self._last_save, self._last_step = mtbf, now, now
        self._quiet: deque[float] = deque(maxlen=REMEMBERED)
        self._excess = 0.0
        self._saving = False
        self.cost, self.interval = FIRST_COST, best_interval(FIRST_COST, 0.0, mtbf)

    def step_done(self, now: float) -> None:
        """A step is through; what it took longer than a quiet one while a save was under way is the save's cost."""
        seconds, self._last_step = now - self._last_step, now
        if not self._saving:
            self._quiet.append(seconds)
        elif self._quiet:
            self._excess += max(0.0, seconds - statistics.median(self._quiet))

    def due(self, now: float) -> bool:
        """Whether it is time to save."""
        return bool(self._quiet) and not self._saving and now - self._last_save >= self.interval

    def save_begins(self, now: float) -> None:
        """A save begins."""
        self._last_save, self._saving, self._excess = now, True, 0.0

    def save_ended(self, durable: float) -> str:
        """It is durable after so many seconds; returns what is now chosen, when that is worth a line."""
        saving, self._saving = self._saving, False
        if not saving or not self._quiet:  # the final one, or one before any step: nothing was measured
            return ""
        before, first = self.interval, self.cost == FIRST_COST
        self.cost = self._excess if first else (self.cost + self._excess) / 2
        self.interval = best_interval(self.cost, durable, self._mtbf)
        if not first and 0.67 < self.interval / before < 1.5:
            return ""
        step = statistics.median(self._quiet)
        lost = self.cost / self.interval + self.interval / (2 * self._mtbf)
        return (
            f"saving every {self.interval:.0f}s, about {max(1, round(self.interval / step)):,} steps: a save costs"
            f" {self.cost:.2f}s, an interruption every {self._mtbf / 60:g} minutes (--mtbf_minutes); expected loss"
            f" {lost:.1%}"
        )
