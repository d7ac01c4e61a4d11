"""Trackers (Weights & Biases, TensorBoard), each in a thread of its own: a tracker that fails costs one warning."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from unbroken import console
from unbroken.config import Config
from unbroken.errors import UserError, describe_error
from unbroken.metrics.journal import TRACKED, Metrics
from unbroken.metrics.timeline import tracked_metrics
from unbroken.paths import Run

PROJECT = "unbroken"
FINISH_SECONDS = 60.0
QUEUED_STEPS = 100_000  # a dead network may hold this many back in memory; beyond that the oldest way out is to drop

Event = tuple[int, Metrics]
Before = Callable[[], dict[int, Metrics]]
Work = Callable[[Iterator[Event]], None]


def start_trackers(config: Config, run: Run, start_step: int) -> list[Tracker]:
    """The trackers that were asked for. Raises a UserError rather than train without one of them."""

    def before() -> dict[int, Metrics]:
        return tracked_metrics(run.log, start_step) if start_step > 0 else {}

    trackers = []
    for flag, package in (("log_wandb", "wandb"), ("log_tensorboard", "tensorboard")):
        if getattr(config, flag) and importlib.util.find_spec(package) is None:
            raise UserError(f"--{flag} needs the package {package}: pip install {package}, or leave the flag out")
    if config.log_wandb:
        work = _to_wandb(dataclasses.asdict(config), run.run_id, f"gpt2-{config.model} {run.run_id[:8]}", before)
        trackers.append(Tracker("W&B", work, "; `wandb sync` sends what it keeps on disk"))
    if config.log_tensorboard:
        folder = run.folder / "tensorboard"
        trackers.append(Tracker("TensorBoard", lambda events: write_events(folder, run.run_id, before(), events)))
    return trackers


class Tracker:
    """A thread in which `work` is given every event of this attempt, in order, and may fail or hang as it likes."""

    def __init__(self, name: str, work: Work, when_late: str = "") -> None:
        self._name, self._work, self._when_late = name, work, when_late
        self._queue: queue.Queue[Event | None] = queue.Queue(QUEUED_STEPS)
        self._failed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: Metrics) -> None:
        """Queue one event of `step`. Never waits."""
        if not self._failed:
            try:
                self._queue.put_nowait((step, metrics))
            except queue.Full:
                self._fail("it is too slow")

    def close(self) -> None:
        """Send the rest, within a minute."""
        try:
            self._queue.put_nowait(None)
        except queue.Full:
            return
        self._thread.join(FINISH_SECONDS)
        if self._thread.is_alive():
            self._fail(f"it did not finish within {FINISH_SECONDS:g}s{self._when_late}")

    def _fail(self, why: object) -> None:
        if not self._failed:
            self._failed = True
            console.print_line(f"WARNING: {self._name} is off from here, training goes on: {why}", error=True)

    def _run(self) -> None:
        try:
            self._work(iter(self._queue.get, None))
        except Exception as error:  # a tracker may fail in any way; training must not
            self._fail(describe_error(error))


def _to_wandb(config: dict[str, Any], run_id: str, name: str, before: Before) -> Work:
    """Into the W&B run whose id is the run_id, each step's metrics once.

    A resumed run repeats steps that W&B has already; their values are the same bits, so they are left out. What a
    killed attempt logged up to the checkpoint but could not send is sent from the journal.
    """

    def work(events: Iterator[Event]) -> None:
        import wandb

        project = os.environ.get("WANDB_PROJECT", PROJECT)
        run = wandb.init(project=project, id=run_id, name=name, resume="allow", config=config)
        # Online, `run.step` is the first step that W&B lacks. Offline it is 0, because nobody knows what the file of a
        # killed attempt holds: then all is written again, and `wandb sync` drops the steps that the server has.
        first = int(run.step)
        for step, metrics in before().items():
            if step >= first:
                run.log(_tracked(metrics), step=step)
        for step, metrics in _whole_steps(events):
            if step >= first:
                run.log(metrics, step=step)
        run.finish()

    return work


def _whole_steps(events: Iterator[Event]) -> Iterator[Event]:
    """The events of a step together: W&B takes nothing more of a step that it has."""
    held_step, held = -1, Metrics()
    for step, metrics in events:
        if step != held_step:
            if held:
                yield held_step, held
            held_step, held = step, {}
        held.update(_tracked(metrics))
    if held:
        yield held_step, held


def _tracked(metrics: Metrics) -> Metrics:
    return {name: value for name, value in metrics.items() if name in TRACKED}


PREFIX = "events.out.tfevents."  # by which TensorBoard knows its files
UNFINISHED = ".being_written.tmp"


def write_events(folder: Path, run_id: str, before: dict[int, Metrics], events: Iterator[tuple[int, Metrics]]) -> None:
    """Write the steps `before` this attempt, then each event as it comes. Raises OSError."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.summary.writer.record_writer import RecordWriter

    folder.mkdir(parents=True, exist_ok=True)
    now = time.time()
    path = folder / f"{PREFIX}{int(now):010d}.{run_id}"
    with open(folder / UNFINISHED, "wb") as file:
        records = RecordWriter(file)
        records.write(Event(wall_time=now, file_version="brain.Event:2").SerializeToString())
        # An open TensorBoard forgets by this what the old file told it.
        begins = Event(wall_time=now, step=0, session_log=SessionLog(status=SessionLog.START))
        records.write(begins.SerializeToString())
        for step, metrics in before.items():
            records.write(_event(step, metrics))
        file.flush()
        os.replace(folder / UNFINISHED, path)
        for old in folder.glob(f"{PREFIX}*"):
            if old != path:
                old.unlink()
        for step, metrics in events:
            known = before.get(step, {})  # of the step resumed from, the validation may be there already
            new = {name: value for name, value in metrics.items() if name == "wall" or name not in known}
            records.write(_event(step, new))
            file.flush()


def _event(step: int, metrics: Metrics) -> bytes:
    """All scalars of one step."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    values = [Summary.Value(tag=name, simple_value=metrics[name]) for name in TRACKED if name in metrics]
    event: Any = Event(wall_time=metrics.get("wall", 0.0), step=step, summary=Summary(value=values))
    return bytes(event.SerializeToString())
