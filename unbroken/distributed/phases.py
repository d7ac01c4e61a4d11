"""What this process is doing: noted by the thread that trains, read by the threads that watch it."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

START, RESTORE, STEP, VALIDATION = "start", "restore", "step", "validation"
DATA, SAVE, LOG, SHUTDOWN = "data", "save", "log", "shutdown"
LEARNED_FROM = 3  # measurements; the first ones compile
REMEMBERED = 64  # measurements of each phase


class Phase(NamedTuple):
    """A phase of this process.

    `serial` counts the collectives that were entered and left. All ranks call the same ones, so the rank with the
    smallest number is behind. `what` names the file or disk that the process waits for; `waiting`: whether it waits for
    other ranks. `step`: the update being made.
    """

    serial: int = 0
    name: str = START
    step: int = 0
    what: str = ""
    waiting: bool = False

    def __str__(self) -> str:
        """Return it as the verb of a sentence about the process."""
        if self.waiting:
            return f"waiting for the other ranks ({self.name}, step {self.step})"
        doing = {
            **{START: "starting", STEP: f"computing step {self.step}", SHUTDOWN: "shutting down"},
            **{VALIDATION: f"validating before step {self.step}", DATA: f"reading {self.what}"},
        }
        return doing.get(self.name, f"waiting for {self.what}")


class Phases:
    """The present phase, and what steps and validations have taken; the methods cost about a microsecond.

    Each change replaces `current` by another object, so another thread sees no half of a change and notices each one.
    """

    def __init__(self) -> None:
        self.current = Phase()
        self._took: dict[str, deque[float]] = {name: deque(maxlen=REMEMBERED) for name in (STEP, VALIDATION)}
        self._since = time.monotonic()
        self._outside = 0.0  # seconds of this step that were no part of it

    def enter(self, name: str, what: str = "") -> None:
        """Note that a phase begins."""
        self.current = self.current._replace(name=name, what=what)

    @contextmanager
    def inside(self, name: str, what: str = "") -> Iterator[None]:
        """Note that the body is a phase of its own, after which the present phase continues."""
        before, began = self.current, time.monotonic()
        self.enter(name, what)
        try:
            yield
        finally:
            self._outside += time.monotonic() - began
            self.current = before._replace(serial=self.current.serial)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Note that the body waits for the other ranks."""
        before = self.current
        self.current = before._replace(serial=before.serial + 1, waiting=True)
        try:
            yield
        finally:
            self.current = before._replace(serial=before.serial + 2)

    def begin_step(self, step: int) -> None:
        """Note that the steps before `step` are done, and what the last of them took."""
        now = time.monotonic()
        if self.current.name == STEP:
            self._took[STEP].append(now - self._since - self._outside)
        self._since, self._outside = now, 0.0
        self.current = Phase(self.current.serial, STEP, step)

    def batch_done(self, began: float) -> None:
        """Note that a batch of a validation is done, which began at `began` on the monotonic clock."""
        self._took[VALIDATION].append(time.monotonic() - began)
        self.enter(VALIDATION)

    def forget(self) -> None:
        """Forget what steps took: the next ones are of another kind, or compile again."""
        self._took[STEP].clear()

    def typical(self, name: str) -> float | None:
        """Return the median of the seconds that a phase took; None if fewer than LEARNED_FROM were measured."""
        took = list(self._took.get(name, ()))
        return statistics.median(took) if len(took) >= LEARNED_FROM else None
