"""The logger of a run: one call per event, which reaches log, journal, console and trackers; each line once."""

from __future__ import annotations

import hashlib
import math
import re
import struct
import time
import uuid
from collections import deque
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from unbroken.checkpoint.format.digest import StateDigest
from unbroken.config import Config
from unbroken.console import Console
from unbroken.distributed.phases import LOG
from unbroken.distributed.world import World
from unbroken.errors import UserError, describe_error
from unbroken.host import process_start_time
from unbroken.metrics import trackers
from unbroken.metrics.anomaly import Anomaly, AnomalyDetector
from unbroken.metrics.journal import Journal, Line
from unbroken.metrics.logfile import LogFile, LogSchedule, attempt_line, event_line
from unbroken.metrics.record import journal_events
from unbroken.metrics.timeline import tracked_metrics
from unbroken.model import families
from unbroken.paths import Run, journal_of
from unbroken.runtime.environment import peak_flops
from unbroken.threads import WorkerThreads

RECENT_STEPS = 20  # of which the tokens per second are the average


@dataclass
class _PendingStep:
    """A step whose losses are still being copied from the GPU."""

    step: int
    losses: Tensor
    metrics: dict[str, float | Tensor]
    arrived: torch.cuda.Event | None
    tokens: int
    lr: float


class ReplayCheck:
    """A check of each repeated step against the lines that the log has of it."""

    def __init__(self, log: LogFile) -> None:
        self._later, self._expected = log.later, log.expected
        self._identical: list[int] = []
        self._rewrites = False  # from the first line that is another, all are written
        self.differs = ""

    def seen(self, kind: str, step: int, line: str) -> bool:
        """Return whether this line is the last one of the step in the log, so that it need not be written again.

        A difference is reported only against a line of the same course: with other flags it is no fault.
        """
        before, expected = self._later.pop((kind, step), None), self._expected.pop((kind, step), None)
        if expected == line and not self.differs:
            self._identical += [step] if kind == "trn" else []
        elif expected is not None and not self.differs:
            old, new = (text.rpartition(":")[2] for text in (expected, line))
            gap = abs(float(old) - float(new))
            self.differs = f"step {step} repeated: DIFFERS, log has {old}, now {new} ({gap:.0e} apart)"
        self._rewrites |= before not in (None, line)
        return before == line and not self._rewrites

    def verdict(self, at_end: bool = False) -> str:
        """Return a line once the repeated steps are over, else ""."""
        steps_to_come = any(kind == "trn" for kind, _ in self._expected)  # a validation may have been saved as done
        if not self._identical or (steps_to_come and not at_end):
            return ""
        first, last = self._identical[0], self._identical[-1]
        self._identical = []
        return f"step {first} repeated: identical" if first == last else f"steps {first}-{last} repeated: identical"


class RunLogger:
    """A logger of one attempt. Ranks other than 0 make the same calls, which do nothing there.

    Args:
        config: the flags.
        run: where log and journal are.
        start_step: the step resumed from, 0 for a new run.
        saved: the `history` of the checkpoint, untrusted.
        world: the ranks.
        compare: whether repeated steps must be those of the log.
        header: what the log says of this attempt.
        environment: the machine, for the journal.
        begins_here: whether the log has no earlier steps: of a new run, a fork, or a run of another program.

    `log_lacks`: the steps whose losses neither log nor journal has, for a warning; "" if there are none.
    """

    def __init__(
        self,
        *,
        config: Config,
        run: Run,
        start_step: int,
        saved: dict[str, Any],
        world: World,
        compare: bool,
        header: dict[str, str],
        environment: dict[str, Any],
        begins_here: bool = False,
    ) -> None:
        self._phases = world.phases
        self._is_main, self._cuda = world.is_main, world.device.type == "cuda"
        model = families.build(config.model, config.model_flags)
        self._flops = model.flops_per_token(config.sequence_length)
        self._peak = peak_flops(environment, world.num_gpus)
        self._step_tokens = config.step_tokens
        self._num_iterations, self._stop_on_divergence = config.num_iterations, config.on_divergence == "stop"
        self._digest, self._seconds, self._last, course = _restored(saved)
        self._course = course if compare else uuid.uuid4().hex[:8]
        self._step, self._since = start_step, time.perf_counter()
        self._recent: deque[float] = deque(maxlen=RECENT_STEPS)
        self._new_steps: list[float] = []
        self._pending: _PendingStep | None = None
        self._warned_of_nan = self._warned_of_log = False
        self._on_nan, self._on_spike = config.on_nan, config.on_spike
        self._detector = AnomalyDetector(spikes=config.on_spike != "off")
        self.anomaly: Anomaly | None = None  # that the run responds to; on rank 0
        self.log_lacks, self._logged_from = "", start_step
        # A run that stops at a difference stops on every process; asking them all costs a round at each step.
        self._together = world.raise_together if self._stop_on_divergence else nullcontext
        if not self._is_main:
            return
        self._schedule, self._first_step = LogSchedule.of(asdict(config)), start_step + 1
        self._trackers = trackers.start_trackers(config, run, start_step)
        self._console = Console(config.num_iterations, start_step)
        journal = journal_events(journal_of(run.log)) if config.log_every > 1 else ()
        self._log = LogFile(run.log, start_step, self._course if compare else None, self._schedule, journal)
        self._journal = Journal(run.log)
        self._files = WorkerThreads(1, "history")  # writes both: a disk that stands still costs training nothing
        self._repeats = ReplayCheck(self._log)
        self._header = attempt_line(header | ({"course": self._course} if self._course else {}))
        self._write(self._header)
        if not begins_here:
            self._close_gaps(saved.get("logged_from"), start_step)
        about = {key: value for key, value in header.items() if key != "step"}
        began = round(process_start_time(), 3)
        self.event(
            "start", start_step, **about, course=self._course, began=began, environment=environment, args=asdict(config)
        )

    def __enter__(self) -> RunLogger:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if not self._is_main:
            return
        if kind is None:
            self.flush()
        self._print_verdict(at_end=True)
        ended = "finished" if self._step >= self._num_iterations else "stopped"
        self.event("end", self._step, why=ended if kind is None else kind.__name__)
        self._files.submit(self._restore_files).result()  # the journal is complete, for a tracker that has failed
        for tracker in self._trackers:
            tracker.close(self._step)
        self._files.close()
        self._journal.close()
        lost = self._log.close()
        if lost:
            self.warn(lost)
        self._console.close()

    def step_begins(self) -> None:
        """Leave out of the training time what was done since the last step ended: validation and saves.

        A step lasts from the end of the one before to its own end. While a GPU is still computing the one before,
        nothing is left out.
        """
        if self._pending is None:
            self._since = time.perf_counter()

    def new_steps(self) -> list[float]:
        """Return the seconds of each step that has ended since the last call."""
        seconds, self._new_steps = self._new_steps, []
        return seconds

    def train(
        self,
        step: int,
        losses: Tensor,
        *,
        tokens: int,
        lr: float,
        grad_norm: Tensor | None = None,
        **metrics: float | Tensor,
    ) -> None:
        """Log a finished step. Every rank must call it; it does not wait for a GPU.

        Args:
            step: the update, counted from 1.
            losses: fp32 [microbatches] in nats per token, in any order.
            tokens: tokens that the run has trained on.
            lr: the learning rate of this step.
            grad_norm: 0-dim, before clipping.
            metrics: further numbers or 0-dim tensors by name; they reach the journal, the trackers, plots and tables.
        """
        self.flush()
        arrived = None
        metrics |= {} if grad_norm is None else {"grad_norm": grad_norm}
        if self._cuda and self._is_main:
            losses = _to_host(losses)
            metrics = {name: _to_host(value) if isinstance(value, Tensor) else value for name, value in metrics.items()}
            arrived = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            arrived.record()
        self._pending = _PendingStep(step, losses, metrics, arrived, tokens, lr)
        if not self._cuda:
            self.flush()

    def flush(self) -> None:
        """Wait until a GPU has computed the pending step, and log it."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        if pending.arrived is not None:
            pending.arrived.synchronize()
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        self._seconds += seconds
        self._recent.append(seconds)
        self._new_steps.append(seconds)
        self._step = pending.step
        with self._together():
            if self._is_main:
                with self._phases.inside(LOG, "the console or a tracker"):  # a terminal may be stopped, by Ctrl-S
                    self._log_step(pending)

    def _log_step(self, pending: _PendingStep) -> None:
        loss = math.fsum(pending.losses.tolist()) / pending.losses.numel()  # exactly rounded, so in any order
        self._digest = _chain_digest(self._digest, pending.step, loss)
        self._last["loss"] = loss
        norm = pending.metrics.get("grad_norm")
        self._keep_anomaly(self._detector.look(pending.step, loss, None if norm is None else float(norm)))
        rate = self._step_tokens * len(self._recent) / max(sum(self._recent), 1e-9)
        average = 1000 * self._seconds / max(pending.step, 1)
        self._event("trn", pending.step, loss)
        mfu = {"mfu": self._flops * rate / self._peak} if self._peak else {}
        share = f" | {mfu['mfu']:.1%} MFU" if mfu else ""
        has_line = self._has_line(pending.step, loss)
        shown = (
            f"step:{pending.step}/{self._num_iterations} | loss {loss:.6f} | train_time:{self._seconds:.2f}s"
            f" | step_avg:{average:.2f}ms | {rate:,.0f} tok/s{share}"
        )
        self._console.step(pending.step, shown if has_line or pending.step == self._first_step else "")
        metrics: Line = {"train_loss": loss, "lr": pending.lr, "time": 1000 * self._seconds, "tok_per_s": rate, **mfu}
        metrics["tokens"] = pending.tokens
        metrics |= {name: float(value) for name, value in pending.metrics.items()}
        self._log_metrics(pending.step, metrics, has_line, dt=self._recent[-1])

    def _has_line(self, step: int, loss: float) -> bool:
        """Return whether log, console and trackers get the training loss of a step."""
        return self._schedule.has(step) or not math.isfinite(loss)

    def val(self, step: int, loss: float) -> None:
        """Log the validation loss after `step` updates, in nats per token. Every rank must call it.

        `flush` must have been called before the validation, which would otherwise count as a part of the step.
        """
        self._last["val_loss"] = loss
        self._last["best_val_loss"] = min(loss, self._last.get("best_val_loss", math.inf))
        with self._together():
            if self._is_main:
                if not math.isfinite(loss):
                    self._keep_anomaly(Anomaly(step, step, "validation loss", loss))
                self._event("val", step, loss)
        if self._is_main:
            self._console.line(f"step:{step}/{self._num_iterations} | val loss {loss:.6f}")
            self._log_metrics(step, {"val_loss": loss}, True, val_seconds=time.perf_counter() - self._since)
        self._since = time.perf_counter()

    def _keep_anomaly(self, anomaly: Anomaly | None) -> None:
        """Keep the first anomaly that the run responds to; warn of a spike if it is told to."""
        if anomaly is None or self.anomaly is not None:
            return
        spike = anomaly.usual is not None
        if (self._on_spike == "rewind") if spike else (self._on_nan != "go_on"):
            self.anomaly = anomaly
        elif spike and self._on_spike == "warn":
            self.warn(f"{anomaly}: a spike; --on_spike rewind leaves its batches out")

    def note(self, text: str) -> None:
        """Print a line for the user."""
        if self._is_main:
            self._console.line(text)

    def warn(self, text: str) -> None:
        """Print a line that the user must not miss."""
        self.note(f"WARNING: {text}")

    def event(self, kind: str, step: int, **about: Any) -> None:
        """Write another event to the journal: a save, a stop."""
        if self._is_main:
            line = {"event": kind, "step": step, "wall": round(time.time(), 3), **about}
            self._files.submit(self._journal.add, line)

    def record_save(self, step: int, name: str, digest: StateDigest) -> None:
        """Write the digest of a checkpoint to the journal, and sync; see `make_durable`."""
        self.event("digest", step, file=name, **asdict(digest))
        self.make_durable()

    def make_durable(self) -> None:
        """Sync log and journal. The checkpoint writer's thread calls it before a checkpoint gets its name."""
        if self._is_main:
            for work in (self._restore_files, self._journal.sync, self._log.sync):
                self._files.submit(work).result()

    def _restore_files(self) -> None:
        """Write again what another process has removed, renamed or cut (rotation); say so."""
        for file in (self._journal, self._log):
            try:
                done = file.restore()
                if done and file is self._log:
                    if done == "cut":
                        self._log.append(self._header)
                    self._fill_log(self._step + 1)
                if done == "moved":
                    self.warn(f"{file.path} was removed or renamed by another process: all its lines are written again")
                elif done == "cut":
                    self.warn(f"{file.path} was cut by another process: losses come back from the file beside it")
            except (OSError, UserError) as error:
                self.warn(f"{file.path} is not what was written and cannot be restored: {describe_error(error)}")

    def _close_gaps(self, logged_from: object, start_step: int) -> None:
        """Write the losses of earlier steps that the log lacks and the journal has; note the others.

        `logged_from`: the step after which the log has lines, from the checkpoint; older ones do not say.
        """
        known = type(logged_from) is int and 0 <= logged_from <= start_step
        begin = self._logged_from = logged_from if known and isinstance(logged_from, int) else self._log.begins
        if not self._log.gaps(begin, start_step):
            return
        with suppress(OSError, UserError):
            self._files.submit(self._fill_log, start_step).result()
        gaps = self._log.gaps(begin, start_step)
        if gaps and not any(map(self._schedule.has, range(begin + 1, gaps[0][0]))):
            self._logged_from = gaps[0][1]  # said now; the next attempt need not say it again
        shown = [f"{first} to {last}" if first < last else f"{first}" for first, last in gaps]
        self.log_lacks = ", ".join(shown[:3]) + (f" and {len(shown) - 3} more" if len(shown) > 3 else "")

    def _fill_log(self, last_step: int) -> None:
        """Write losses that the log lacks from the journal: of steps up to `last_step`, validations before it."""
        self._log.add_missing(
            (kind, step, metrics[name])
            for step, metrics in tracked_metrics(self._log.path, last_step).items()
            for kind, name in (("trn", "train_loss"), ("val", "val_loss"))
            if name in metrics and (kind == "trn" or step < last_step)
        )

    def progress(self) -> dict[str, Any]:
        """Return what a checkpoint stores of the log, up to the last step: plain values."""
        self.flush()
        course = {"course": self._course} if self._course else {}
        log = {"logged_from": self._logged_from, **course}
        return {"digest": self._digest, "training_seconds": self._seconds, **log, **self._last}

    def _log_metrics(self, step: int, metrics: Line, is_tracked: bool, **took: float) -> None:
        line = {
            "step": step,
            "wall": round(time.time(), 3),
            **{key: round(value, 6) for key, value in took.items()},
            **metrics,
        }
        self._files.submit(self._journal.add, line)
        for tracker in self._trackers if is_tracked else []:
            tracker.log(step, line)

    def _event(self, kind: str, step: int, loss: float) -> None:
        line = event_line(kind, step, loss)
        if not math.isfinite(loss) and not self._warned_of_nan and self._on_nan == "go_on":
            self._warned_of_nan = True
            self.warn(f"the loss of step {step} is {loss}: the run has diverged; a smaller --learning_rate may help")
        differed = self._repeats.differs
        seen = self._repeats.seen(kind, step, line)
        if self._repeats.differs and not differed:
            if self._stop_on_divergence:  # the log keeps its line, or the next attempt would be held against this one
                raise UserError(f"{self._repeats.differs}; type --on_divergence warn to continue")
            self.warn(self._repeats.differs)
        if not seen and (kind == "val" or self._has_line(step, loss)):
            self._write(line)
        self._print_verdict()

    def _print_verdict(self, at_end: bool = False) -> None:
        verdict = self._repeats.verdict(at_end)
        if verdict:
            self.note(verdict)

    def _write(self, line: str) -> None:
        self._files.submit(self._append, line)

    def _append(self, line: str) -> None:
        try:
            self._log.append(line)
        except OSError as error:
            if not self._warned_of_log:
                self.warn(f"the log could not be written ({error.strerror}); its lines are kept and tried again")
            self._warned_of_log = True
        else:
            self._warned_of_log = False


def _restored(saved: dict[str, Any]) -> tuple[str, float, dict[str, float], str]:
    """Return digest, training seconds, last losses and course of an untrusted checkpoint, or those of a new run."""
    digest = saved.get("digest")
    digest = digest if isinstance(digest, str) and digest.isascii() else ""
    seconds = saved.get("training_seconds")
    last = {key: saved[key] for key in ("loss", "val_loss", "best_val_loss") if type(saved.get(key)) is float}
    fits = isinstance(seconds, float) and math.isfinite(seconds) and seconds >= 0
    course = saved.get("course")
    course = course if isinstance(course, str) and re.fullmatch("[0-9a-f]{8}", course) else ""
    return digest, seconds if isinstance(seconds, float) and fits else 0.0, last, course


def _chain_digest(digest: str, step: int, loss: float) -> str:
    """Return a hash over the bits of every loss so far: two runs with the same hash agree in all losses."""
    return hashlib.sha256(digest.encode() + struct.pack("<qd", step, loss)).hexdigest()


def _to_host(tensor: Tensor) -> Tensor:
    """Return a copy that is on its way into pinned memory; an event recorded after it tells when it is there."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor.detach(), non_blocking=True)
