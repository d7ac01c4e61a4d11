"""Read a run back: its metrics, its attempts, where it was interrupted and where its time went."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from unbroken.checkpoint.format.schema import dict_at
from unbroken.errors import cannot_read
from unbroken.files import bounded_lines, regular
from unbroken.metrics.append_file import MAX_LINE_BYTES
from unbroken.metrics.journal import Line, Metrics
from unbroken.metrics.logfile import events, read_log
from unbroken.metrics.metric_table import BY_NAME, MAX_EXTRA, TIMES, is_metric_name
from unbroken.paths import journal_of

STATUS_TAIL_BYTES = 1 << 16  # bytes of its end, some two hundred steps


# ---- reading the journal: untrusted, like everything in a run's folder
# ------------------------------------------------


@dataclass
class Attempt:
    """An attempt of a run, one process lifetime. Times are in seconds since 1970, durations in seconds.

    `steps`: when each step ended and how long it took. `first`: when the first step began. `last`: the last sign of
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
    """A run as it is now.

    `metrics`: step -> metrics, in order, without superseded steps. `extra`: the metrics that are not in the table.
    """

    metrics: dict[int, Metrics] = field(default_factory=dict)
    attempts: list[Attempt] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)

    def series(self, name: str) -> list[tuple[int, float]]:
        """Return one metric as (step, value) in order."""
        return [(step, known[name]) for step, known in self.metrics.items() if name in known]


def read_timeline(log: Path) -> Timeline:
    """Return journal and log of a run together. Raises UserError if there is neither.

    Losses that the journal lacks, because a kill took its last second or the run is older than journals, come from the
    log.
    """
    run = Timeline()
    try:
        for line in read_lines(journal_of(log)):
            _apply_line(run, line)
    except OSError as error:
        if not log.is_file():
            raise cannot_read(journal_of(log), error) from None
    try:
        _fill_in(run, log)
    except OSError as error:
        if not run.metrics:
            raise cannot_read(log, error) from None
    run.metrics = dict(sorted(run.metrics.items()))
    return run


@dataclass(frozen=True)
class RunStatus:
    """The state of a run from the end of its journal.

    `wall`: seconds since 1970. `end`: "" until it has ended. `tokens`: trained on so far. `num_iterations`: None if the
    attempt began further back in the journal.
    """

    step: int | None = None
    loss: float | None = None
    tok_per_s: float | None = None
    wall: float | None = None
    end: str = ""
    tokens: float | None = None
    num_iterations: int | None = None


def read_status(log: Path) -> RunStatus:
    """Return the state of a run. Reads only the end of the journal, however long it is."""
    said = RunStatus()
    try:
        for line in read_lines(journal_of(log), STATUS_TAIL_BYTES):
            wall, kind = _number(line, "wall"), line.get("event")
            said = replace(said, wall=said.wall if wall is None else wall)
            if kind in ("start", "stop", "end"):
                why = "" if kind == "start" else said.end or str(line.get("why", ""))[:200]
                said = replace(said, step=line["step"], end=why)
                if isinstance(line.get("args"), dict) and type(line["args"].get("num_iterations")) is int:
                    said = replace(said, num_iterations=line["args"]["num_iterations"])
            elif kind is None and "train_loss" in line:
                loss, rate = _number(line, "train_loss"), _number(line, "tok_per_s")
                said = replace(said, step=line["step"], loss=loss, tok_per_s=rate, tokens=_number(line, "tokens"))
    except OSError:
        pass
    return said


def tracked_metrics(log: Path, last_step: int) -> dict[int, Metrics]:
    """Return the metrics of each step up to `last_step` for trackers, with `wall` where it is known."""
    left_out = set(TIMES) - {"wall"}
    return {
        step: {name: value for name, value in known.items() if name not in left_out}
        for step, known in read_timeline(log).metrics.items()
        if step <= last_step
    }


def was_tracked(log: Path, flag: str, end: int) -> bool:
    """Return whether an attempt in the first `end` bytes of the journal had the flag of a tracker."""
    with suppress(OSError):
        for line in read_lines(journal_of(log), end=end):
            if line.get("event") == "start" and dict_at(line, "args").get(flag) is True:
                return True
    return False


def read_lines(path: Path, last: int | None = None, end: float = math.inf) -> Iterator[Line]:
    """Yield the valid lines of a journal: all, those in the `last` bytes, or those up to byte `end`."""
    with open(path, "rb", opener=regular) as file:
        file.seek(0 if last is None else max(0, os.fstat(file.fileno()).st_size - last))
        for text in bounded_lines(file, MAX_LINE_BYTES):
            if file.tell() - len(text) >= end:
                return
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                continue
            if isinstance(line, dict) and type(line.get("step")) is int and 0 <= line["step"] < 10**15:
                yield line


def _is_number(value: object) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 2**63)


def _number(line: Line, name: str) -> float | None:
    """Return a finite time or duration; None for anything else."""
    value = line.get(name)
    return float(value) if _is_number(value) and math.isfinite(value) else None  # type: ignore[arg-type]


def _apply_line(run: Timeline, line: Line) -> None:
    step, wall, kind = line["step"], _number(line, "wall"), line.get("event")
    if kind == "start" and wall is not None:
        _supersede(run, -1 if line.get("from") == "scratch" else step)
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
    for name, value in line.items():
        if name in TIMES or not _is_number(value) or not is_metric_name(name):
            continue
        if name not in BY_NAME and name not in run.extra:
            if len(run.extra) >= MAX_EXTRA:
                continue
            run.extra.append(name)
        known[name] = float(value)
    known.update({name: value for name in TIMES if (value := _number(line, name)) is not None})
    if first is not None and "train_loss" not in line:
        known["wall"] = first
    if attempt and wall is not None:
        _record_time(attempt, step, wall, _number(line, "dt"), _number(line, "val_seconds"))


def _attempt(line: Line, step: int, wall: float) -> Attempt:
    began = _number(line, "began")
    attempt = Attempt(step, wall if began is None else min(began, wall), wall, last_work=wall)
    for name, part in (("environment", attempt.environment), ("args", attempt.args)):
        part.update(line[name] if isinstance(line.get(name), dict) else {})
    attempt.about = {key: value for key, value in line.items() if isinstance(value, str)}
    return attempt


def _record_time(attempt: Attempt, step: int, wall: float, dt: float | None, val_seconds: float | None) -> None:
    attempt.last_work = max(attempt.last_work, wall)
    if val_seconds is not None:
        attempt.validations.append((step, wall, max(0.0, val_seconds)))
    if dt is not None and math.isfinite(dt):
        attempt.steps[step] = wall, max(0.0, dt)
        attempt.first = wall - max(0.0, dt) if attempt.first is None else attempt.first


def _supersede(run: Timeline, start: int) -> None:
    """Drop metrics of steps after `start`, which this attempt trains again; -1: it begins anew, with step 0."""
    run.metrics = {step: known for step, known in run.metrics.items() if step <= start}


def _fill_in(run: Timeline, log: Path) -> None:
    """Add losses that only the log has.

    These are the losses of steps before the last attempt, and those that the last attempt wrote. Later steps of earlier
    attempts are left out, because the last attempt repeats them.
    """
    names = {"trn": "train_loss", "val": "val_loss"}
    said = [(kind, step, text) for kind, step, text in events(log)]
    last_header = max((index for index, (kind, _, _) in enumerate(said) if kind == "#"), default=-1)
    start = run.attempts[-1].step if run.attempts else 10**15
    known = {(step, name) for step, metrics in run.metrics.items() for name in metrics}
    for index, (kind, step, text) in enumerate(said):
        if kind != "#" and (step <= start or index > last_header) and (step, names[kind]) not in known:
            run.metrics.setdefault(step, {})[names[kind]] = float(text.rpartition(":")[2])


FINISHED = "finished"


@dataclass(frozen=True)
class Interruption:
    """An interruption between two attempts: the step that the first reached, the step resumed from, a description."""

    reached: int
    back_to: int
    said: str


def find_interruptions(log: Path, run: Timeline) -> list[Interruption]:
    """Return one interruption for each attempt but the first. A run without journal has only its log."""
    known = [(attempt.step, max(attempt.steps, default=attempt.step), attempt.end) for attempt in run.attempts]
    logged = _logged(log) if log.is_file() else []
    attempts = known if len(known) >= len(logged) else logged
    pairs = [(reached, start, end) for (_, reached, end), (start, _, _) in pairwise(attempts)]
    return [Interruption(reached, start, _describe(reached, start, end)) for reached, start, end in pairs]


def _describe(reached: int, back_to: int, end: str) -> str:
    if reached < back_to:
        return f"resumed from {back_to}"
    if reached == back_to:
        return f"extended at step {back_to}" if end == FINISHED else f"stopped at step {back_to}, resumed"
    if end:
        return f"went back from step {reached} to {back_to}"
    return f"interrupted after step {reached}, resumed from {back_to}"


def _logged(log: Path) -> list[tuple[int, int, str]]:
    """Return for each attempt in a log the step it began at, the last step that it logged, and "" for its end."""
    began = [step for step, _ in read_log(log).attempts]
    found: list[tuple[int, int, str]] = []
    for kind, step, _ in events(log):
        if kind == "#" and began:
            found.append((began[0], began.pop(0), ""))
        elif kind == "trn" and found:
            found[-1] = found[-1][0], max(found[-1][1], step), ""
    return found


CAUSES = {
    "repeated": "steps that were done again after an interruption",
    "down": "nothing was running",
    "start-up": "from a process's start to its first step",
    "validation": "validation",
    "saves": "training waited for a save",
    "other": "the last save, and the rest",
}


@dataclass(frozen=True)
class TimeAccount:
    """An account of a run's time in seconds.

    `total`: from the first attempt's start to the last sign of life. `ideal`: the steps of the run, each counted once.
    `lost`: the rest by cause, see CAUSES.
    """

    total: float
    ideal: float
    lost: dict[str, float]

    @property
    def goodput(self) -> float:
        """The share of the time that went into training and validation, each step counted once."""
        return (self.ideal + self.lost["validation"]) / self.total if self.total > 0 else 0.0


def account_time(attempts: Sequence[Attempt]) -> TimeAccount | None:
    """Return the account; None if the journal has no attempts."""
    if not attempts:
        return None
    ideal = repeated = down = starting = validation = 0.0
    for index, attempt in enumerate(attempts):
        limit = kept_up_to(attempts, index)
        trained = [(step, seconds) for step, (_, seconds) in attempt.steps.items()]
        validated = [(step, seconds) for step, _, seconds in attempt.validations]
        ideal += sum(seconds for step, seconds in trained if step <= limit)
        validation += sum(seconds for step, seconds in validated if step <= limit)
        repeated += sum(seconds for step, seconds in trained + validated if step > limit)
        starting += startup_seconds(attempt)
        if index:
            down += max(0.0, attempt.began - max(before.last for before in attempts[:index]))
    blocked = [save.get("blocked") for attempt in attempts for save in attempt.saves]
    saves = sum(value for value in blocked if isinstance(value, float) and 0 <= value < math.inf)
    total = max(attempt.last for attempt in attempts) - attempts[0].began
    spent = {"repeated": repeated, "down": down, "start-up": starting, "validation": validation, "saves": saves}
    other = max(0.0, total - ideal - sum(spent.values()))
    return TimeAccount(total, ideal, {**spent, "other": other})


def kept_up_to(attempts: Sequence[Attempt], index: int) -> float:
    """Return the last step of an attempt that still belongs to the run, before a later attempt went back."""
    return min((later.step for later in attempts[index + 1 :]), default=math.inf)


def startup_seconds(attempt: Attempt) -> float:
    """Return the seconds from the process's start to its first step, without validations before it."""
    until = attempt.last if attempt.first is None else attempt.first
    validated = sum(seconds for _, wall, seconds in attempt.validations if wall <= until + 1e-3)
    return max(0.0, until - attempt.began - validated)
