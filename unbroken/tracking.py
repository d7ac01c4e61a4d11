"""Trackers, beside the training and never in its way: a thread and a queue each, and one warning if it fails."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

from unbroken import console
from unbroken.config import Config
from unbroken.errors import UserError, told
from unbroken.eventfile import write_events
from unbroken.journal import TRACKED, Metrics, tracked_up_to
from unbroken.run import Run

PROJECT = "unbroken"
FINISH_SECONDS = 60.0
QUEUED_STEPS = 100_000  # a dead network may hold this many back in memory; beyond that the oldest way out is to drop

Event = tuple[int, Metrics]
Before = Callable[[], dict[int, Metrics]]
Work = Callable[[Iterator[Event]], None]


def start(config: Config, run: Run, start_step: int) -> list[Tracker]:
    """The trackers that were asked for. Raises a UserError rather than train without one of them."""

    def before() -> dict[int, Metrics]:
        return tracked_up_to(run.log, start_step) if start_step > 0 else {}

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
            console.say(f"WARNING: {self._name} is off from here, training goes on: {why}", error=True)

    def _run(self) -> None:
        try:
            self._work(iter(self._queue.get, None))
        except Exception as error:  # a tracker may fail in any way; training must not
            self._fail(told(error))


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
