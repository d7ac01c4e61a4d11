"""Weights & Biases, beside the training and never in its way: a thread, a queue, and one warning if it fails."""

from __future__ import annotations

import importlib.util
import json
import os
import queue
import sys
import threading
from pathlib import Path
from typing import Any

from unbroken.errors import UserError
from unbroken.logfile import logged_metrics

PROJECT = "unbroken"
FINISH_SECONDS = 60.0
QUEUED_STEPS = 100_000  # a dead network may hold this many back in memory; beyond that the oldest way out is to drop

Metrics = dict[str, float]


def check_installed() -> None:
    """Raise a UserError before training starts, rather than train without what was asked for."""
    if importlib.util.find_spec("wandb") is None:
        raise UserError("--log_wandb needs the package wandb: pip install wandb, or leave the flag out")


class Journal:
    """Every metric of every step, a JSON line each, beside the log: what W&B had not stored when it was killed with us.

    `logs/<run_id>/<run_id>.metrics.jsonl`; of a step that was repeated, the last line counts.
    """

    def __init__(self, log_path: Path) -> None:
        self._log_path, path = log_path, log_path.with_suffix(".metrics.jsonl")
        try:
            self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            os.write(self._file, b"\n")  # closes a line that a kill has torn
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from None
        self._path = path

    def append(self, step: int, metrics: Metrics) -> None:
        """One event; raises OSError."""
        os.write(self._file, json.dumps({"step": step, **metrics}).encode() + b"\n")

    def sync(self) -> None:
        """On stable storage."""
        os.fsync(self._file)

    def close(self) -> None:
        """No more lines."""
        os.close(self._file)

    def up_to(self, last_step: int) -> dict[int, Metrics]:
        """What was logged of each step up to `last_step`, in order; of steps before the journal, the log's losses."""
        known = dict(logged_metrics(self._log_path, last_step))
        with open(self._path, "rb") as file:
            for line in file:
                try:
                    event = json.loads(line)
                    step = int(event.pop("step"))
                except (ValueError, KeyError, TypeError, AttributeError):
                    continue  # torn
                if step <= last_step:
                    known[step] = {**known.get(step, {}), **event}
        return dict(sorted(known.items()))


class Tracker:
    """Sends each step's metrics once, in order, into the W&B run whose id is the run_id.

    A resumed run repeats steps that W&B has already; their values are the same bits, so they are left out. What a
    killed attempt logged up to the checkpoint but could not send is sent from the journal.
    """

    def __init__(self, config: dict[str, Any], run_id: str, name: str, log_path: Path, start_step: int) -> None:
        check_installed()
        self._journal, self._start = Journal(log_path), start_step
        self._queue: queue.Queue[tuple[int, Metrics] | None] = queue.Queue(QUEUED_STEPS)
        self._config, self._run_id, self._name = config, run_id, name
        self._failed = False
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: Metrics) -> None:
        """Queue one event of `step`; the events of a step are sent together. Never waits for W&B."""
        try:
            self._journal.append(step, metrics)
        except OSError as error:
            self._fail(f"its journal cannot be written: {error.strerror}")
        if not self._failed:
            try:
                self._queue.put_nowait((step, metrics))
            except queue.Full:
                self._fail("it is too slow")

    def sync(self) -> None:
        """What was logged is on stable storage, whatever becomes of W&B."""
        self._journal.sync()

    def close(self) -> None:
        """Send the rest, within a minute."""
        try:
            self._queue.put_nowait(None)
        except queue.Full:
            return
        self._thread.join(FINISH_SECONDS)
        self._journal.close()
        if self._thread.is_alive():
            self._fail(f"it did not finish within {FINISH_SECONDS:g}s; `wandb sync` sends what it keeps on disk")

    def _fail(self, why: object) -> None:
        if not self._failed:
            self._failed = True
            print(f"WARNING: W&B is off from here, training goes on: {why}", file=sys.stderr, flush=True)

    def _work(self) -> None:
        try:
            import wandb

            run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                id=self._run_id,
                name=self._name,
                resume="allow",
                config=self._config,
            )
            self._send(run)
            run.finish()
        except Exception as error:  # a tracker may fail in any way; training must not
            self._fail(f"{type(error).__name__}: {error}".splitlines()[0][:200])

    def _send(self, run: Any) -> None:
        # Online, `run.step` is the first step that W&B lacks. Offline it is 0, because nobody knows what the file of a
        # killed attempt holds: then all is written again, and `wandb sync` drops the steps that the server has.
        first = int(run.step)
        if self._start > 0:
            for step, metrics in self._journal.up_to(self._start).items():
                if step >= first:
                    run.log(metrics, step=step)
        held_step, held = -1, Metrics()
        while (event := self._queue.get()) is not None:
            step, metrics = event
            if step != held_step:
                if held and held_step >= first:
                    run.log(held, step=held_step)
                held_step, held = step, {}
            held.update(metrics)
        if held and held_step >= first:
            run.log(held, step=held_step)
