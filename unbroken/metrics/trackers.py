"""Trackers such as W&B and TensorBoard, each in a thread of its own, where it may fail or hang.

Another tracker is a class with `log(step, metrics)` and `close()`, and a line in TRACKERS; its flag is in config.py.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import math
import os
import queue
import re
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

PROJECT = "unbroken"  # in Trackio and MLflow
RUN_TAG = "unbroken.run_id"  # of a run in MLflow
MLFLOW_PARAMS, MLFLOW_METRICS = 100, 1000  # that it takes at once
FINISH_SECONDS = 15.0  # that the end of a run waits for a tracker to send the rest
INIT_SECONDS, INIT_TRIES = 10, 6  # W&B's own 90 seconds at a time would hold up the end of a short run
MAX_QUEUED = 100_000  # events held in memory while a network is down; beyond that the tracker is switched off
EVENT_FILE = "events.out.tfevents."  # how TensorBoard recognizes its files
UNFINISHED = ".being_written.tmp"


class Tracker(Protocol):
    """A tracker of one attempt.

    Its constructor gets `config`, the flags; `run`; `before`, the metrics of earlier steps by step; and `is_new`,
    whether no earlier attempt used this tracker.
    """

    def log(self, step: int, metrics: Metrics) -> None:
        """Record metrics of a step; the steps come in order, a step may come twice (training, then validation)."""

    def close(self) -> None:
        """Send the rest."""


class StepsOnce:
    """A part of a tracker that sends each step once and whole, beginning with the first that the service lacks.

    A step is held until the next one, because its validation comes later and the service takes nothing more of a step
    that it has.
    """

    def __init__(self, send: Callable[[int, Metrics], object], first: int, before: dict[int, Metrics]) -> None:
        self._send, self._first = send, first
        self._step, self._held = -1, Metrics()
        for step, metrics in before.items():
            self.log(step, metrics)

    def log(self, step: int, metrics: Metrics) -> None:
        """Hold the metrics, and send those of the step before."""
        if step != self._step:
            self.flush()
            self._step = step
        self._held.update(tracked(metrics))

    def flush(self) -> None:
        """Send what is held."""
        if self._held and self._step >= self._first:
            self._send(self._step, self._held)
        self._held = {}


def _shown_name(config: Config, run: Run) -> str:
    """Return the name to display of a run."""
    return config.name or f"gpt2-{config.model} {run.run_id[:8]}"


class WandbTracker:
    """A tracker that logs into the W&B run whose id is the run_id, each step once.

    A resumed run repeats steps that W&B has already; their values are the same bits, so they are left out. Steps up to
    the checkpoint that a killed attempt could not send are sent from the journal.
    """

    def __init__(self, config: Config, run: Run, before: dict[int, Metrics], is_new: bool) -> None:
        import wandb

        project = os.environ.get("WANDB_PROJECT") or config.wandb_project
        # Only the first attempt names the run: it may have been renamed since. Without a name W&B reads WANDB_NAME.
        # Tags may have been changed since, too. W&B reads those of the environment by itself if it is given none.
        about: dict[str, Any] = {"entity": _unless_set("WANDB_ENTITY", config.wandb_entity)}
        if is_new:
            tags = _unless_set("WANDB_TAGS", config.wandb_tags)
            about["tags"] = [tag for each in tags.split(",") if (tag := each.strip())] if tags else None
            about["group"] = _unless_set("WANDB_RUN_GROUP", config.wandb_group)
        name = None if not is_new or os.environ.get("WANDB_NAME") else _shown_name(config, run)
        os.environ.setdefault("WANDB_INIT_TIMEOUT", f"{INIT_SECONDS}")
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", f"{FINISH_SECONDS:g}")  # its exit handler waits as well
        if logs_dir() != Path(LOGS):  # W&B's own files too are on the disk that was chosen for the runs
            os.environ.setdefault("WANDB_DIR", str(logs_dir()))
        flags = dataclasses.asdict(config)
        failed = wandb.run  # of this process, perhaps because W&B's own process is gone
        if failed is not None:
            with suppress(Exception):
                wandb.teardown()
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
        if failed is not None and self._run is failed:  # it says that it has steps which it may have lost
            raise RuntimeError("W&B does not start a second time in this process")
        # Online, `step` is the first step that W&B lacks. Offline it is 0, because the content of a killed attempt's
        # file is not known: all steps are written again, and `wandb sync` drops those that the server has.
        self._steps = StepsOnce(lambda step, held: self._run.log(held, step=step), int(self._run.step), before)

    def log(self, step: int, metrics: Metrics) -> None:
        """Send the step before."""
        self._steps.log(step, metrics)

    def close(self) -> None:
        """Send the last step and wait until W&B has sent everything."""
        self._steps.flush()
        self._run.finish()


def _unless_set(variable: str, value: str) -> str | None:
    """Return the value of a flag; None if there is none or the environment has another, which W&B reads by itself."""
    return None if os.environ.get(variable) else value or None


class TensorBoardTracker:
    """A tracker that writes a TensorBoard event file in which each step occurs once, whatever the interruptions.

    Each attempt writes a new file from the journal, replaces the old one by one rename, and appends to it. So it makes
    no difference what a killed attempt wrote after the checkpoint.
    """

    def __init__(self, config: Config, run: Run, before: dict[int, Metrics], is_new: bool) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder, now = run.folder / "tensorboard", time.time()
        folder.mkdir(parents=True, exist_ok=True)
        self._before = before
        (folder / UNFINISHED).unlink(missing_ok=True)  # a link in an untrusted folder is not followed
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


class TrackioTracker:
    """A tracker that logs into one Trackio run, each step once; without TRACKIO_SPACE_ID into files of this machine.

    Trackio knows a run by its name, which may be changed there, so the run is found by the run_id in its configuration.
    """

    def __init__(self, config: Config, run: Run, before: dict[int, Metrics], is_new: bool) -> None:
        import trackio

        project, name = os.environ.get("TRACKIO_PROJECT") or PROJECT, _shown_name(config, run)
        if config.name:  # another folder of runs may have one of this name
            name = f"{name} {run.run_id[:8]}"
        with suppress(ValueError):  # there is no such project yet
            known = (each for each in trackio.Api().runs(project) if (each.config or {}).get("run_id") == run.run_id)
            name = next((str(each.name) for each in known), name)
        flags = {**dataclasses.asdict(config), "run_id": run.run_id}
        self._run = trackio.init(project=project, name=name, config=flags, resume="allow")
        # Each step is one row, and rows are committed in their order.
        first = int(self._run._next_step)
        self._steps = StepsOnce(self._send, first, before)

    def _send(self, step: int, held: Metrics) -> None:
        # Trackio has a `time` of its own, and would warn at each step.
        self._run.log({"train_time" if name == "time" else name: value for name, value in held.items()}, step=step)

    def log(self, step: int, metrics: Metrics) -> None:
        """Queue the step before."""
        self._steps.log(step, metrics)

    def close(self) -> None:
        """Write the rest."""
        self._steps.flush()
        self._run.finish()


class MlflowTracker:
    """A tracker that logs into one MLflow run, each metric of a step once; without MLFLOW_TRACKING_URI into a database.

    The database is logs/mlflow.db. The run is found by its tag, the run_id, so it may be renamed. MLflow would keep a
    value that is logged twice, so steps that it has of a metric are left out.
    """

    def __init__(self, config: Config, run: Run, before: dict[int, Metrics], is_new: bool) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # nothing leaves this machine unasked
        from mlflow import MlflowClient
        from mlflow.entities import Param

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        self._last_step = config.num_iterations
        self._client: Any = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or _own_database(MlflowClient))
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        if self._client.get_experiment_by_name(name) is None:
            with suppress(Exception):  # another run may be faster
                self._client.create_experiment(name)
        experiment = self._client.get_experiment_by_name(name).experiment_id
        found = self._client.search_runs([experiment], f"tags.`{RUN_TAG}` = '{run.run_id}'", max_results=1)
        there = found[0] if found else None
        if there is None:  # only then is it named
            there = self._client.create_run(experiment, run_name=_shown_name(config, run), tags={RUN_TAG: run.run_id})
        self._id = there.info.run_id
        self._client.update_run(self._id, status="RUNNING")
        flags = {key: str(value)[:500] for key, value in dataclasses.asdict(config).items()}
        params = [Param(key, value) for key, value in flags.items() if key not in there.data.params]  # cannot change
        for start in range(0, len(params), MLFLOW_PARAMS):
            self._client.log_batch(self._id, params=params[start : start + MLFLOW_PARAMS])
        histories = {key: self._client.get_metric_history(self._id, key) for key in there.data.metrics}
        self._last = {key: max(each.step for each in history) for key, history in histories.items()}
        self._step, self._held, self._sent = 0, list[Any](), time.monotonic()
        for step, metrics in before.items():
            self.log(step, metrics)

    def log(self, step: int, metrics: Metrics) -> None:
        """Hold the metrics for at most a second, and send all that are held together."""
        from mlflow.entities import Metric

        self._step, wall = step, int(1000 * metrics.get("wall", time.time()))
        for name, value in tracked(metrics).items():
            key = re.sub(r"[^\w\-. /]", "_", name)
            if step > self._last.get(key, -1):
                self._last[key] = step
                self._held.append(Metric(key, value, wall, step))
        if len(self._held) >= MLFLOW_METRICS or time.monotonic() > self._sent + 1.0:
            self._send()

    def _send(self) -> None:
        for start in range(0, len(self._held), MLFLOW_METRICS):
            self._client.log_batch(self._id, metrics=self._held[start : start + MLFLOW_METRICS])
        self._held, self._sent = [], time.monotonic()

    def close(self) -> None:
        """Send the rest, and set the run's status."""
        self._send()
        self._client.set_terminated(self._id, "FINISHED" if self._step >= self._last_step else "KILLED")


def _own_database(client: Callable[[str], Any]) -> str:
    """Return the URI of logs/mlflow.db, which is made under another name first: a kill leaves no half of its tables."""
    path = (logs_dir() / "mlflow.db").absolute()
    if not path.exists():
        made = path.with_name(f".mlflow.{os.getpid()}.tmp")
        made.unlink(missing_ok=True)  # in a container all attempts have the same number
        client(f"sqlite:///{made}").search_experiments()
        with suppress(FileExistsError):  # another run was faster
            os.link(made, path)
        made.unlink()
    return f"sqlite:///{path}"


@dataclasses.dataclass(frozen=True)
class Entry:
    """A row of TRACKERS: the class of a tracker, the package that it needs, and its name for users."""

    make: Callable[[Config, Run, dict[int, Metrics], bool], Tracker]
    package: str
    title: str
    if_late: str = ""


TRACKERS = {  # by flag
    "log_wandb": Entry(WandbTracker, "wandb", "W&B", "; `wandb sync` sends what it keeps on disk"),
    "log_trackio": Entry(TrackioTracker, "trackio", "Trackio"),
    "log_mlflow": Entry(MlflowTracker, "mlflow", "MLflow"),
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
    """A tracker in a thread of its own, with a queue: it may fail or hang, and causes one warning.

    Args:
        flag: the flag that asks for the tracker.
        entry: its row of TRACKERS.
        config: the flags.
        run: whose journal has the earlier steps.
        start_step: the step resumed from.
    """

    def __init__(self, flag: str, entry: Entry, config: Config, run: Run, start_step: int) -> None:
        self._flag, self._entry, self._config, self._run = flag, entry, config, run
        journal = journal_of(run.log)
        self._known = journal.stat().st_size if journal.is_file() else 0  # bytes: this attempt is about to append
        self._was_made, self._failure = False, "is switched off, training goes on: "
        self._start(start_step)

    def _start(self, last_step: int) -> None:
        """Start the thread, which begins with the steps of the journal up to `last_step`."""
        self._queue: queue.Queue[tuple[int, Metrics] | None] = queue.Queue(MAX_QUEUED)
        self._failed = False
        self._thread = threading.Thread(target=self._work, args=(last_step,), name=self._entry.title, daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:  # a limit of processes
            self._fail(describe_error(error))

    def log(self, step: int, metrics: Metrics) -> None:
        """Queue metrics of a step. Never waits."""
        if not self._failed:
            try:
                self._queue.put_nowait((step, metrics))
            except queue.Full:
                self._fail("it is too slow")

    def close(self, last_step: int) -> None:
        """Let the tracker send the rest, within FINISH_SECONDS.

        A tracker that has failed is started once more, and gets what it lacks of the steps up to `last_step` from the
        journal, which must have them.
        """
        deadline = time.monotonic() + FINISH_SECONDS
        self._end(deadline)
        if self._failed and not self._thread.is_alive():
            self._failure = "lacks steps that the journal has, the next attempt sends them: "
            self._start(last_step)
            self._end(deadline)
            if not self._failed:
                console.print_line(f"{self._entry.title} has every step now: those that it lacked are sent", error=True)

    def _end(self, deadline: float) -> None:
        """Let the thread end, until `deadline` on the monotonic clock."""
        if self._thread.is_alive():
            try:
                self._queue.put_nowait(None)
            except queue.Full:
                self._fail("it is too slow")
                return
            self._thread.join(1.0)
        if self._thread.is_alive():
            console.print_line(f"waiting for {self._entry.title}, at most {FINISH_SECONDS:g}s", error=True)
            self._thread.join(deadline - time.monotonic())
        if self._thread.is_alive():
            self._fail(f"it did not finish within {FINISH_SECONDS:g}s{self._entry.if_late}")

    def _fail(self, why: str) -> None:
        if not self._failed:
            self._failed = True
            console.print_line(f"WARNING: {self._entry.title} {self._failure}{why}", error=True)

    def _work(self, last_step: int) -> None:
        try:
            schedule = LogSchedule.of(dataclasses.asdict(self._config))
            before = {
                step: metrics
                for step, metrics in (tracked_metrics(self._run.log, last_step) if last_step > 0 else {}).items()
                if schedule.has(step) or "val_loss" in metrics or not math.isfinite(metrics.get("train_loss", 0))
            }
            is_new = not self._was_made and not was_tracked(self._run.log, self._flag, self._known)
            tracker = self._entry.make(self._config, self._run, before, is_new)
            self._was_made = True
            for step, metrics in iter(self._queue.get, None):
                tracker.log(step, metrics)
            tracker.close()
        except Exception as error:  # a tracker may fail in any way; training must not
            self._fail(describe_error(error))
