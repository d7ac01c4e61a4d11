"""Trackers beside the training: W&B and TensorBoard, each in a thread of its own, where it may fail or hang.

Another tracker is a class with `log(step, metrics)` and `close()`, and a line in TRACKERS; its flag is in config.py.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from unbroken import console
from unbroken.config import Config
from unbroken.errors import UserError, describe_error
from unbroken.metrics.journal import Metrics
from unbroken.metrics.logfile import LogSchedule
from unbroken.metrics.metric_table import tracked
from unbroken.metrics.timeline import tracked_metrics, was_tracked
from unbroken.paths import LOGS, Run, journal_of, logs_dir

FINISH_SECONDS = 15.0  # that the end of a run waits for a tracker to send the rest
INIT_SECONDS, INIT_TRIES = 10, 6  # W&B's own 90 seconds at a time would hold up the end of a short run
MAX_QUEUED = 100_000  # events held in memory while a network is down; beyond that the tracker is switched off
EVENT_FILE = "events.out.tfevents."  # how TensorBoard recognizes its files
UNFINISHED = ".being_written.tmp"


class Tracker(Protocol):
    """A tracker of one attempt.

    Its constructor receives the flags, the run, the metrics of earlier steps, and whether no attempt before had it.
    """

    def log(self, step: int, metrics: Metrics) -> None:
        """Record metrics of a step; the steps come in order, a step may come twice (training, then validation)."""

    def close(self) -> None:
        """Send the rest."""


class WandbTracker:
    """A tracker that logs into the W&B run whose id is the run_id, each step once.

    A resumed run repeats steps that W&B has already; their values are the same bits, so they are left out. Steps up to
    the checkpoint that a killed attempt could not send are sent from the journal.
    """

    def __init__(self, config: Config, run: Run, before: dict[int, Metrics], is_new: bool) -> None:
        import wandb

        project = os.environ.get("WANDB_PROJECT") or config.wandb_project
        # Only the first attempt names the run: it may have been renamed since. Without a name W&B reads WANDB_NAME.
        # Tags, too, may have been changed since; those of the environment W&B reads by itself, where it is given none.
        about: dict[str, Any] = {"entity": _unless_set("WANDB_ENTITY", config.wandb_entity)}
        if is_new:
            tags = _unless_set("WANDB_TAGS", config.wandb_tags)
            about["tags"] = [tag for each in tags.split(",") if (tag := each.strip())] if tags else None
            about["group"] = _unless_set("WANDB_RUN_GROUP", config.wandb_group)
        shown = config.name or f"gpt2-{config.model} {run.run_id[:8]}"
        name = None if not is_new or os.environ.get("WANDB_NAME") else shown
        os.environ.setdefault("WANDB_INIT_TIMEOUT", f"{INIT_SECONDS}")
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", f"{FINISH_SECONDS:g}")  # its exit handler waits as well
        if logs_dir() != Path(LOGS):  # W&B's own files too are on the disk that was chosen for the runs
            os.environ.setdefault("WANDB_DIR", str(logs_dir()))
        flags = dataclasses.asdict(config)
        for tried in range(1, INIT_TRIES + 1):
            try:
                self._run = wandb.init(project=project, id=run.run_id, name=name, resume="allow", config=flags, **about)
                break
            except Exception as error:
                if "created and deleted" in f"{error}":
                    raise UserError(
                        f"run {run.run_id} was deleted in the project {project}: restore it there, or set"
                        " WANDB_PROJECT to another project, which then gets all its steps"
                    ) from None
                if tried == INIT_TRIES or "imed out" not in f"{error}":
                    raise
        # Online, `step` is the first step that W&B lacks. Offline it is 0, because nobody knows what the file of a
        # killed attempt holds: all steps are written again, and `wandb sync` drops those that the server has.
        self._first = int(self._run.step)
        self._step, self._held = -1, Metrics()
        for step, metrics in before.items():
            self.log(step, metrics)

    def log(self, step: int, metrics: Metrics) -> None:
        """Hold the metrics until the next step: W&B takes nothing more of a step that it has."""
        if step != self._step:
            self._send()
            self._step = step
        self._held.update(tracked(metrics))

    def _send(self) -> None:
        if self._held and self._step >= self._first:
            self._run.log(self._held, step=self._step)
        self._held = {}

    def close(self) -> None:
        """Send the last step and wait until W&B has sent everything."""
        self._send()
        self._run.finish()


def _unless_set(variable: str, value: str) -> str | None:
    """Return the value of a flag; None if there is none or the environment has another, which W&B reads by itself."""
    return None if os.environ.get(variable) else value or None


class TensorBoardTracker:
    """A tracker that writes a TensorBoard event file in which each step occurs once, whatever the interruptions.

    Each attempt writes the file anew from the journal, beside the old one, replaces that by one rename, and appends
    from there: what a killed attempt wrote after the checkpoint, or did not write, leaves no trace.
    """

    def __init__(self, config: Config, run: Run, before: dict[int, Metrics], is_new: bool) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder, now = run.folder / "tensorboard", time.time()
        folder.mkdir(parents=True, exist_ok=True)
        self._before = before
        (folder / UNFINISHED).unlink(missing_ok=True)  # a link in a folder from somebody else is not followed
        self._file = open(folder / UNFINISHED, "xb")  # noqa: SIM115 - closed by close
        self._records: Any = RecordWriter(self._file)
        self._records.write(Event(wall_time=now, file_version="brain.Event:2").SerializeToString())
        # An open TensorBoard forgets the contents of the old file when it reads this.
        start = Event(wall_time=now, step=0, session_log=SessionLog(status=SessionLog.START))
        self._records.write(start.SerializeToString())
        for step, metrics in before.items():
            self._records.write(_as_event(step, metrics))
        self._file.flush()
        self._take_place(folder, folder / f"{EVENT_FILE}{int(now):010d}.{run.run_id}")

    def _take_place(self, folder: Path, path: Path) -> None:
        os.replace(folder / UNFINISHED, path)
        for old in folder.glob(f"{EVENT_FILE}*{path.suffix}"):  # only those of this run: others' files stay
            if old != path:
                old.unlink()

    def log(self, step: int, metrics: Metrics) -> None:
        """Append the metrics of a step, without those that the journal had before."""
        known = self._before.get(step, {})  # the validation of the step resumed from may be there already
        self._records.write(_as_event(step, {k: v for k, v in metrics.items() if k == "wall" or k not in known}))
        self._file.flush()

    def close(self) -> None:
        """Close the file; every event was flushed to it."""
        with suppress(OSError):
            self._file.close()


def _as_event(step: int, metrics: Metrics) -> bytes:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    values = [Summary.Value(tag=name, simple_value=value) for name, value in tracked(metrics).items()]
    event: Any = Event(wall_time=metrics.get("wall", 0.0), step=step, summary=Summary(value=values))
    return bytes(event.SerializeToString())


@dataclasses.dataclass(frozen=True)
class Entry:
    """One row of TRACKERS: how to make a tracker, the package that it needs, and what users know it as."""

    make: Callable[[Config, Run, dict[int, Metrics], bool], Tracker]
    package: str
    title: str
    if_late: str = ""


TRACKERS = {  # by flag
    "log_wandb": Entry(WandbTracker, "wandb", "W&B", "; `wandb sync` sends what it keeps on disk"),
    "log_tensorboard": Entry(TensorBoardTracker, "tensorboard", "TensorBoard"),
}


def start_trackers(config: Config, run: Run, start_step: int) -> list[ThreadedTracker]:
    """Start the trackers that the flags ask for. Raises UserError if the package of one is missing."""
    entries = {flag: entry for flag, entry in TRACKERS.items() if getattr(config, flag)}
    for flag, entry in entries.items():
        if importlib.util.find_spec(entry.package) is None:
            raise UserError(
                f"--{flag} needs the package {entry.package}: pip install {entry.package}, or leave the flag out"
            )
    return [ThreadedTracker(flag, entry, config, run, start_step) for flag, entry in entries.items()]


class ThreadedTracker:
    """A tracker in a thread of its own, with a queue: it may fail or hang, and costs one warning."""

    def __init__(self, flag: str, entry: Entry, config: Config, run: Run, start_step: int) -> None:
        self._flag, self._entry = flag, entry
        journal = journal_of(run.log)
        self._known = journal.stat().st_size if journal.is_file() else 0  # bytes: this attempt is about to append
        self._queue: queue.Queue[tuple[int, Metrics] | None] = queue.Queue(MAX_QUEUED)
        self._failed = False
        self._thread = threading.Thread(target=self._run, args=(config, run, start_step), name=entry.title, daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:  # a limit of processes
            self._fail(error)

    def log(self, step: int, metrics: Metrics) -> None:
        """Queue metrics of a step. Never waits."""
        if not self._failed:
            try:
                self._queue.put_nowait((step, metrics))
            except queue.Full:
                self._fail("it is too slow")

    def close(self) -> None:
        """Let the tracker send the rest, within FINISH_SECONDS."""
        if self._failed:
            return
        try:
            self._queue.put_nowait(None)
        except queue.Full:
            return
        self._thread.join(1.0)
        if self._thread.is_alive():
            console.print_line(f"waiting for {self._entry.title}, at most {FINISH_SECONDS:g}s", error=True)
        self._thread.join(FINISH_SECONDS - 1.0)
        if self._thread.is_alive():
            self._fail(f"it did not finish within {FINISH_SECONDS:g}s{self._entry.if_late}")

    def _fail(self, why: object) -> None:
        if not self._failed:
            self._failed = True
            console.print_line(f"WARNING: {self._entry.title} is off from here, training goes on: {why}", error=True)

    def _run(self, config: Config, run: Run, start_step: int) -> None:
        try:
            schedule = LogSchedule.of(dataclasses.asdict(config))
            before = {
                step: metrics
                for step, metrics in (tracked_metrics(run.log, start_step) if start_step > 0 else {}).items()
                if schedule.has(step) or "val_loss" in metrics or not math.isfinite(metrics.get("train_loss", 0))
            }
            is_new = not was_tracked(run.log, self._flag, self._known)
            tracker = self._entry.make(config, run, before, is_new)
            for step, metrics in iter(self._queue.get, None):
                tracker.log(step, metrics)
            tracker.close()
        except Exception as error:  # a tracker may fail in any way; training must not
            self._fail(describe_error(error))
