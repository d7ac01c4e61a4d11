"""The journal of a run: every metric of every step, and what happened when, a JSON line each, beside the log.

{"event": "start", "step": 256, "wall": …, "began": …, "environment": {…}, "args": {…}}   an attempt begins
{"step": 257, "wall": …, "dt": …, "train_loss": …, "lr": …, "tok_per_s": …, …}            a step; `dt` in seconds
{"step": 256, "wall": …, "val_loss": …, "val_seconds": …}                                 a validation
{"event": "saved", "step": 256, "wall": …, "file": …, "blocked": …, "durable": …}         a save, in seconds
{"event": "end", "step": 512, "wall": …, "why": "finished"}                               nothing more of this attempt

`<run_id>.metrics.jsonl`. `wall` is the clock's time in seconds since 1970, `began` that of the process's start. An
attempt that starts at step S supersedes what earlier ones said of the steps after S. The journal holds times, so it is
no part of the promise of bits; the log is.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from unbroken import console
from unbroken.errors import UserError
from unbroken.logfile import MOST_UNWRITTEN, events, open_to_append

Metrics = dict[str, float]
Line = dict[str, Any]

# For W&B and TensorBoard too.
TRACKED = ("train_loss", "val_loss", "lr", "grad_norm", "tok_per_s", "mfu", "tokens", "time")
TIMES = ("dt", "val_seconds", "wall")
COLUMNS = (*TRACKED, *TIMES)
TAIL = 1 << 16  # bytes of its end, some two hundred steps
MOST_LINE = 1 << 20  # bytes; a start with its arguments has about 2,000


JOURNAL = ".metrics.jsonl"  # the end of its name


def journal_of(log: Path) -> Path:
    """The journal beside a log."""
    return log.with_suffix(JOURNAL)


class Journal:
    """Appends lines, each written at once: a kill takes none of them.

    A journal that cannot be written costs one warning and no step. For one thread at a time.
    """

    def __init__(self, log: Path) -> None:
        path = journal_of(log)
        try:
            self._file = open_to_append(path)
        except OSError as error:
            raise UserError(f"cannot write the journal {path}: {error.strerror}") from None
        self._path, self._unwritten, self._warned = path, b"", False

    def append(self, line: Line) -> None:
        """One line, behind those that are still to be written."""
        self._unwritten += f"{json.dumps(line)}\n".encode()
        self._write()

    def sync(self) -> None:
        """What was appended is on stable storage."""
        self._write()
        try:
            os.fsync(self._file)
        except OSError as error:
            self._warn(error)

    def close(self) -> None:
        """No more lines."""
        self._write()
        os.close(self._file)

    def _write(self) -> None:
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[os.write(self._file, self._unwritten) :]
        except OSError as error:
            self._warn(error)
            if len(self._unwritten) > MOST_UNWRITTEN:
                self._unwritten = b"\n"  # closes the line that is torn now

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            console.say(f"WARNING: {self._path} could not be written ({error.strerror}); training goes on", error=True)


# ---- reading it: a stranger's file, like everything in a run's folder ------------------------------------------------


@dataclass
class Attempt:
    """One process lifetime of a run, as the journal saw it. Times in seconds since 1970, durations in seconds.

    `steps`: when each step ended and how long it took; `first`: when the first one began; `last`: the last sign of
    life; `last_work`: the same without saves and the end.
    """

    step: int
    began: float
    last: float
    environment: dict[str, Any] = field(default_factory=dict)
    args: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    first: float | None = None
    last_work: float = 0.0
    steps: dict[int, tuple[float, float]] = field(default_factory=dict)
    validations: list[tuple[int, float, float]] = field(default_factory=list)  # step, wall, seconds
    saves: list[Line] = field(default_factory=list)
    end: str = ""


@dataclass
class Timeline:
    """A run as it is now. `metrics`: step -> what is known of it, in order, superseded ones left out."""

    metrics: dict[int, Metrics] = field(default_factory=dict)
    attempts: list[Attempt] = field(default_factory=list)

    def series(self, name: str) -> list[tuple[int, float]]:
        """One metric: (step, value) in order."""
        return [(step, known[name]) for step, known in self.metrics.items() if name in known]


def read_run(log: Path) -> Timeline:
    """Journal and log of a run together; raises UserError if there is neither.

    What the journal lacks, because a kill took its last second or because the run is older than journals are, is
    filled in from the log: the losses.
    """
    run = Timeline()
    try:
        for line in _lines(journal_of(log)):
            _take(run, line)
    except OSError as error:
        if not log.is_file():
            raise UserError(f"cannot read {journal_of(log)}: {error.strerror}") from None
    try:
        _fill_in(run, log)
    except OSError as error:
        if not run.metrics:
            raise UserError(f"cannot read the log {log}: {error.strerror}") from None
    run.metrics = dict(sorted(run.metrics.items()))
    return run


@dataclass(frozen=True)
class LastWords:
    """How a run is doing, from the end of its journal. `wall`: seconds since 1970; `end`: "" until it has ended."""

    step: int | None = None
    loss: float | None = None
    tok_per_s: float | None = None
    wall: float | None = None
    end: str = ""


def last_words(log: Path) -> LastWords:
    """Read only the end of a journal, however long it is; nothing is known where there is none."""
    said = LastWords()
    try:
        for line in _lines(journal_of(log), TAIL):
            wall, kind = _number(line, "wall"), line.get("event")
            said = replace(said, wall=said.wall if wall is None else wall)
            if kind in ("start", "stop", "end"):
                why = "" if kind == "start" else said.end or str(line.get("why", ""))[:200]
                said = replace(said, step=line["step"], end=why)
            elif kind is None and "train_loss" in line:
                loss, rate = _number(line, "train_loss"), _number(line, "tok_per_s")
                said = replace(said, step=line["step"], loss=loss, tok_per_s=rate)
    except OSError:
        pass
    return said


def tracked_up_to(log: Path, last_step: int) -> dict[int, Metrics]:
    """What trackers must have of each step up to `last_step`, in order, with `wall` where that is known."""
    wanted = {*TRACKED, "wall"}
    return {
        step: {name: value for name, value in known.items() if name in wanted}
        for step, known in read_run(log).metrics.items()
        if step <= last_step
    }


def _lines(path: Path, last: int | None = None) -> Iterator[Line]:
    """The lines that make sense, or those in the `last` bytes; torn and foreign ones are passed over."""
    with open(path, "rb") as file:
        file.seek(0 if last is None else max(0, os.fstat(file.fileno()).st_size - last))
        while text := file.readline(MOST_LINE):
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                continue
            if isinstance(line, dict) and type(line.get("step")) is int and 0 <= line["step"] < 10**15:
                yield line


def _is_number(value: object) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 2**63)


def _number(line: Line, name: str) -> float | None:
    """A finite one, of what is a time or a duration."""
    value = line.get(name)
    return float(value) if _is_number(value) and math.isfinite(value) else None  # type: ignore[arg-type]


def _take(run: Timeline, line: Line) -> None:
    step, wall, kind = line["step"], _number(line, "wall"), line.get("event")
    if kind == "start" and wall is not None:
        _supersede(run, step)
        run.attempts.append(_attempt(line, step, wall))
        return
    attempt = run.attempts[-1] if run.attempts else None
    if attempt and wall is not None:
        attempt.last = max(attempt.last, wall)
    if kind is not None:
        if attempt and kind in ("saved", "unsaved"):
            attempt.saves.append(line)
        elif attempt and kind in ("stop", "end"):
            attempt.end = attempt.end if kind == "end" and attempt.end else str(line.get("why", ""))[:200]
        return
    known = run.metrics.setdefault(step, {})
    first = known.get("wall", wall)  # of the step, not of its validation
    known.update({name: float(line[name]) for name in TRACKED if _is_number(line.get(name))})
    known.update({name: value for name in TIMES if (value := _number(line, name)) is not None})
    if first is not None and "train_loss" not in line:
        known["wall"] = first
    if attempt and wall is not None:
        _spend(attempt, step, wall, _number(line, "dt"), _number(line, "val_seconds"))


def _attempt(line: Line, step: int, wall: float) -> Attempt:
    began = _number(line, "began")
    attempt = Attempt(step, wall if began is None else min(began, wall), wall, last_work=wall)
    for name, part in (("environment", attempt.environment), ("args", attempt.args)):
        part.update(line[name] if isinstance(line.get(name), dict) else {})
    attempt.about = {key: value for key, value in line.items() if isinstance(value, str)}
    return attempt


def _spend(attempt: Attempt, step: int, wall: float, dt: float | None, val_seconds: float | None) -> None:
    attempt.last_work = max(attempt.last_work, wall)
    if val_seconds is not None:
        attempt.validations.append((step, wall, max(0.0, val_seconds)))
    if dt is not None and math.isfinite(dt):
        attempt.steps[step] = wall, max(0.0, dt)
        attempt.first = wall - max(0.0, dt) if attempt.first is None else attempt.first


def _supersede(run: Timeline, start: int) -> None:
    """What was said of later steps is of another timeline; a run begun from scratch supersedes all."""
    run.metrics = {step: known for step, known in run.metrics.items() if 0 < step <= start or (start and step == 0)}


def _fill_in(run: Timeline, log: Path) -> None:
    """Losses that only the log has: of any step before the last attempt's, and of what the last attempt wrote itself.

    Later steps of earlier attempts are left out: the last one went back behind them.
    """
    names = {"trn": "train_loss", "val": "val_loss"}
    said = [(kind, step, text) for kind, step, text in events(log)]
    last_header = max((index for index, (kind, _, _) in enumerate(said) if kind == "#"), default=-1)
    start = run.attempts[-1].step if run.attempts else 10**15
    known = {(step, name) for step, metrics in run.metrics.items() for name in metrics}
    for index, (kind, step, text) in enumerate(said):
        if kind != "#" and (step <= start or index > last_header) and (step, names[kind]) not in known:
            run.metrics.setdefault(step, {})[names[kind]] = float(text.rpartition(":")[2])
