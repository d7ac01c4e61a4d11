"""The log of a run: one line per event. It is only appended to, and a resume compares repeated steps with it.

# time=2026-11-23T18:40:40+00:00 from=scratch step=0 host=…          begins an attempt
s:257 trn:4.648776                                                   the loss of step 257, before its update
s:256 val:4.700000                                                   the validation loss after 256 updates
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unbroken.config import StepList
from unbroken.errors import UserError, cannot_read
from unbroken.files import bounded_lines, regular
from unbroken.metrics.append_file import AppendFile
from unbroken.text import printable

# All six decimals: a line that a kill has torn must not pass for one with another loss.
EVENT = re.compile(rb"s:(\d{1,15}) (trn|val):(-?(?:\d+\.\d{6}|inf|nan))\Z")
Event = tuple[str, int, str]  # kind, step, line
_UNNAMED = "other"  # the course of any attempt that left the one before it, in logs from before courses had names
MAX_LINE_BYTES = 1 << 16  # bytes read of a line; what is longer is not one of ours


def attempt_line(about: Mapping[str, str]) -> str:
    """Return the line that begins an attempt. Blanks in values are escaped, so that none can pass for another key.

    A course is a sequence of steps that have the same bits in all its attempts. `course` names the one that the attempt
    begins or continues, unless it is the run's first; a checkpoint stores it under `progress.history`.
    """
    words = (f"{key}={printable(value, 4096).replace(' ', chr(92) + 'x20')}" for key, value in about.items())
    return " ".join(["#", *words])


def event_line(kind: str, step: int, loss: float) -> str:
    """Return a line in the format that the guide's users parse; `kind` is trn or val."""
    return "s:%d %s:%f" % (step, kind, loss)  # noqa: UP031 - the format is C's, and promised


@dataclass(frozen=True)
class LogSchedule:
    """A schedule of the steps whose training loss has a line: every N-th, the first, the last, and some others.

    The others are multiples of `also` and those of a list: the steps that are validated and saved. Nothing that a kill
    changes decides this, so that the log of a run is the same with and without kills.
    """

    every: int = 1
    last: int = 0
    also: tuple[int, ...] = ()
    listed: StepList = field(default_factory=StepList)

    @classmethod
    def of(cls, flags: Mapping[str, Any]) -> LogSchedule:
        """Return the schedule of a run with these flags, which may be untrusted."""

        def number(name: str) -> int:
            value = flags.get(name)
            return value if type(value) is int and value > 0 else 0

        listed = StepList()
        with suppress(ValueError):
            listed = StepList.parse(str(flags.get("save_steps", "")))
        also = tuple(filter(None, (number("val_loss_every"), number("save_every"))))
        return cls(number("log_every") or 1, number("num_iterations"), also, listed)

    def has(self, step: int) -> bool:
        """Return whether the step has a line."""
        named = step in (1, self.last) or step in self.listed or any(step % steps == 0 for steps in self.also)
        return step % self.every == 0 or named


def events(path: Path) -> Iterator[Event]:
    """Yield (kind, step, line) of each event, and ("#", 0, text) of each attempt; other lines are skipped.

    The earlier program, whose first training loss is that of `s:0`, begins no attempt with a line; its training losses
    are given with the step that they have here.
    """
    shift, is_first = 0, True  # of the step of a training loss
    with open(path, "rb", opener=regular) as file:
        for line in bounded_lines(file, MAX_LINE_BYTES):
            whole = line.rstrip(b"\n")
            if whole.startswith(b"#"):
                shift, is_first = 0, False
                yield "#", 0, whole[1:].strip().decode("utf-8", "replace")
            elif found := EVENT.match(whole):
                kind, step = found[2].decode(), int(found[1])
                if kind == "trn":
                    shift, is_first = (1 if is_first and step == 0 else shift), False
                    step += shift
                yield kind, step, f"s:{step} {kind}:{found[3].decode()}"


@dataclass
class LoggedLosses:
    """The losses of a log by step, of each step the last one, and where attempts began (step, header)."""

    train: list[tuple[int, float]] = field(default_factory=list)
    val: list[tuple[int, float]] = field(default_factory=list)
    attempts: list[tuple[int, str]] = field(default_factory=list)


def read_log(path: Path) -> LoggedLosses:
    """Read the log of a run. Raises UserError if there is none."""
    losses: dict[str, dict[int, float]] = {"trn": {}, "val": {}}
    log = LoggedLosses()
    try:
        for kind, step, text in events(path):
            if kind == "#":
                log.attempts.append((began(text), text))
            else:
                losses[kind][step] = float(text.rpartition(":")[2])
    except OSError as error:
        raise cannot_read(path, error) from None
    log.train, log.val = sorted(losses["trn"].items()), sorted(losses["val"].items())
    return log


def _course(header: str) -> str:
    """Return the course of an attempt; "" for the run's first."""
    return next((word.removeprefix("course=") for word in header.split() if word.startswith("course=")), "")


def began(header: str) -> int:
    """Return the step that an attempt resumed from."""
    found = re.search(r"(?:^| )step=(\d{1,15})(?= |$)", header)
    return int(found[1]) if found else 0


def _is_repeated(kind: str, step: int, start_step: int) -> bool:
    """Return whether an attempt that resumes from a step writes this event: a validation comes after its step."""
    return step > start_step or (kind == "val" and step == start_step)


def _expected(said: Iterable[Event], start_step: int, course: str) -> dict[tuple[str, int], str]:
    """Return the last line of each event of a course that the attempt will repeat."""
    expected: dict[tuple[str, int], str] = {}
    ours = course == ""
    for kind, step, text in said:
        if kind == "#":
            ours = _course(text) == course
            if course == "" and _course(text) == _UNNAMED and began(text) < start_step:
                ours = True  # the checkpoint may be of that course; then the one before is abandoned
                expected = {event: line for event, line in expected.items() if event[1] <= began(text)}
        elif ours and _is_repeated(kind, step, start_step):
            expected[kind, step] = text
    return expected


class LogFile(AppendFile):
    """A run's log, with its lines about the steps that an attempt repeats."""

    def __init__(
        self,
        path: Path,
        start_step: int,
        course: str | None = None,
        schedule: LogSchedule | None = None,
        journal: Iterable[Event] = (),
    ) -> None:
        """Open the log. Raises UserError.

        Afterwards `later` has the last lines of steps that will be repeated. `expected` has those of `course`, which a
        repeated step must equal; none if `course` is None.

        Args:
            path: the log.
            start_step: the step that the attempt resumes from.
            course: that of the attempt.
            schedule: the steps that have a line.
            journal: the events of the journal, for the steps that have none.
        """
        self._schedule = schedule or LogSchedule()
        self.later: dict[tuple[str, int], str] = {}
        self.expected: dict[tuple[str, int], str] = {}
        self.begins = 0  # the step that its first attempt resumed from
        self._ranges: list[list[int]] = []  # [first, last] of steps up to `start_step` whose losses are there
        try:
            super().__init__(path)
            later = self._read(start_step)
            if course is not None:
                self.expected = {**_expected(journal, start_step, course), **_expected(later, start_step, course)}
        except OSError as error:
            raise UserError(f"cannot write the log {path}: {error.strerror}") from None

    def _read(self, start_step: int) -> list[Event]:
        """Read the log; return the starts of attempts and the losses of steps that will be repeated."""
        is_first, later = True, list[Event]()
        for kind, step, text in events(self.path):
            if kind == "#":
                self.begins, is_first = began(text) if is_first else self.begins, False
                later.append((kind, step, text))
            elif _is_repeated(kind, step, start_step):
                self.later[kind, step] = text
                later.append((kind, step, text))
            elif kind == "trn" and self._ranges and self._ranges[-1][0] <= step <= self._ranges[-1][1] + 1:
                self._ranges[-1][1] = max(self._ranges[-1][1], step)
            elif kind == "trn":
                self._ranges.append([step, step])
        return later

    def gaps(self, begin: int, end: int) -> list[tuple[int, int]]:
        """Return the steps after `begin` up to `end` that should have a line and have none, as (first, last)."""
        gaps, reached = [], begin
        for first, last in [*sorted(self._ranges), [end + 1, end + 1]]:
            if first > reached + 1:
                gaps.append((reached + 1, first - 1))
            reached = max(reached, last)
        if self._schedule.every == 1:
            return gaps
        missing = [[step for step in range(first, last + 1) if self._schedule.has(step)] for first, last in gaps]
        return [(steps[0], steps[-1]) for steps in missing if steps]

    def add_missing(self, losses: Iterable[tuple[str, int, float]]) -> int:
        """Append the losses (kind, step, loss) of which the log has none; return their number. Raises OSError."""
        there = {(kind, step) for kind, step, _ in events(self.path)}
        due = [event for event in losses if event[0] == "val" or self._schedule.has(event[1])]
        missing = [(kind, step, loss) for kind, step, loss in due if (kind, step) not in there]
        for kind, step, loss in missing:
            self.append(event_line(kind, step, loss))
            self._ranges += [[step, step]] if kind == "trn" else []
        return len(missing)
