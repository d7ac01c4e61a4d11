"""Weights & Biases, beside the training and never in its way: a thread, a queue, and one warning if it fails."""

from __future__ import annotations

import importlib.util
import os
import queue
import sys
import threading
from collections.abc import Iterable
from typing import Any

from unbroken.errors import UserError

PROJECT = "unbroken"
FINISH_SECONDS = 60.0
QUEUED_STEPS = 100_000  # a dead network may hold this many back in memory; beyond that the oldest way out is to drop

Metrics = dict[str, float]


def check_installed() -> None:
    """Raise a UserError before training starts, rather than train without what was asked for."""
    if importlib.util.find_spec("wandb") is None:
        raise UserError("--log_wandb needs the package wandb: pip install wandb, or leave the flag out")


class Tracker:
    """Sends each step's metrics once, in order, into the W&B run whose id is the run_id.

    A resumed run repeats steps that W&B has already; their values are the same bits, so they are left out. `known`:
    the (step, metrics) of the log up to the checkpoint; what a killed attempt could not send is sent from there.
    """

    def __init__(self, config: dict[str, Any], run_id: str, name: str, known: Iterable[tuple[int, Metrics]]) -> None:
        check_installed()
        self._queue: queue.Queue[tuple[int, Metrics] | None] = queue.Queue(QUEUED_STEPS)
        self._config, self._run_id, self._name, self._known = config, run_id, name, known
        self._failed = False
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: Metrics) -> None:
        """Queue one event of `step`; the events of a step are sent together. Never blocks."""
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
        # Offline a run does not know what an earlier attempt wrote and counts from 0. That attempt's file holds all up
        # to its last moment, and `wandb sync` drops what it has: so only what comes after the checkpoint is sent.
        offline = bool(getattr(run, "offline", False) or run.settings._offline)
        first = 0 if offline else int(run.step)
        if not offline and first > 0:
            for step, metrics in self._known:
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
