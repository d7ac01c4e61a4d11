"""Steps that went wrong: a loss or gradient norm that is not finite, or far above those of the steps before."""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass

WINDOW, LEAST = 64, 32  # steps that a spike is compared with, and from how many on
# Spreads above the median at which a value is a spike. A spread is the median distance from it, at least 1% of it.
SPREADS, LEAST_SPREAD = {"loss": 10.0, "gradient norm": 20.0}, 0.01


@dataclass(frozen=True)
class Anomaly:
    """An anomaly of `step`: its `what` (a loss or norm) has the value. `first`: the first step whose batch may be the
    cause.

    `usual` is the median of the steps before a spike; None if the value is not finite.
    """

    step: int
    first: int
    what: str
    value: float
    usual: float | None = None

    def __str__(self) -> str:
        usual = "" if self.usual is None else f", that of the steps before {self.usual:.6g}"
        return f"the {self.what} of step {self.step} is {self.value:.6g}{usual}"


class AnomalyDetector:
    """A comparison of each step's loss and gradient norm with those of the steps before, in this attempt.

    `spikes`: whether to look for spikes as well as for values that are not finite.
    """

    def __init__(self, spikes: bool) -> None:
        self._spikes = spikes
        self._seen: dict[str, deque[float]] = {what: deque(maxlen=WINDOW) for what in SPREADS}
        self._sound = -1  # the last step whose gradient was finite

    def look(self, step: int, loss: float, norm: float | None) -> Anomaly | None:
        """Return what is wrong with a step; None if nothing is.

        A loss may be the result of the update before it. So the batch of the step before is a suspect too, unless its
        gradient norm was finite.
        """
        suspect = step if self._sound == step - 1 else max(1, step - 1)
        for what, value, first in (("loss", loss, suspect), ("gradient norm", norm, step)):
            if value is not None and not math.isfinite(value):
                return Anomaly(step, first, what, value)
        if norm is not None:
            self._sound = step
        for what, value, first in (("loss", loss, max(1, step - 1)), ("gradient norm", norm, step)):
            if self._spikes and value is not None and (spike := self._spike(step, first, what, value)):
                return spike
        return None

    def _spike(self, step: int, first: int, what: str, value: float) -> Anomaly | None:
        seen = self._seen[what]
        if len(seen) >= LEAST:
            median = statistics.median(seen)
            spread = statistics.median(abs(each - median) for each in seen)
            if value - median > SPREADS[what] * max(spread, LEAST_SPREAD * abs(median)):
                return Anomaly(step, first, what, value, median)
        seen.append(value)
        return None
