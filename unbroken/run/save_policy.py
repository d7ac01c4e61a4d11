"""The decision when a run saves, and the report about each save. `checkpoint/writer.py` carries the saves out."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch

from unbroken.checkpoint.directory import FOR_BEST, FOR_STEPS
from unbroken.checkpoint.format.schema import FINAL, checkpoint_name, weights_step
from unbroken.checkpoint.writer import RunCheckpointWriter, SaveResult
from unbroken.config import AUTO, Config, StepList
from unbroken.data.mixture import TokenStream, batch_hash
from unbroken.distributed.memory import kind_of_shortage, out_of_memory_as_user_error, require_out_of_memory
from unbroken.distributed.phases import SAVE, STEP
from unbroken.distributed.world import World
from unbroken.errors import UserError
from unbroken.host import process_age
from unbroken.metrics.logger import RunLogger
from unbroken.run.best import BestCheckpoints, unlinked
from unbroken.run.corruption import require_equal_replicas
from unbroken.run.resume import ResumePoint
from unbroken.run.save_requests import SaveRequests
from unbroken.run.state import RunState
from unbroken.runtime import environment
from unbroken.runtime.signals import StopSignals
from unbroken.text import format_count, format_size

FINAL_TRIES = 3
SECONDS_BETWEEN_TRIES = 2.0
UNMEASURED_RATE = 50e6  # bytes per second of a save that was not measured
LEAVING_SECONDS = 5.0  # from the last save to the end of the process


class SavePolicy:
    """A policy that decides at every step boundary whether to save, and reports each save.

    A failed periodic save causes a warning; only a failed final one changes the exit code.

    Args:
        config: the flags.
        writer: writes the checkpoints.
        state: the state of the run.
        logger: prints the reports.
        world: the ranks.
        stream: the training data, whose next batch a checkpoint proves.
        signals: is told when --max_hours are over.
        point: what the attempt starts from.
    """

    def __init__(
        self,
        config: Config,
        writer: RunCheckpointWriter,
        state: RunState,
        logger: RunLogger,
        world: World,
        stream: TokenStream,
        signals: StopSignals,
        point: ResumePoint,
    ) -> None:
        self._config, self._writer, self._state, self._logger = config, writer, state, logger
        self._world, self._stream = world, stream
        self._budget, self._requests = TimeBudget(config, signals), SaveRequests(writer.folder)
        self._steps = StepList.parse(config.save_steps)
        self._best = BestCheckpoints(config.keep_best, state.progress)
        self._saved_step = state.progress.step if point.on_disk is not None else -1
        self._weights_step = state.progress.step  # those of the step resumed from were written before its checkpoint
        self._saved_validated = state.progress.validated
        self._must_save_first = point.must_save_first
        self._periodic = point.on_disk is not None and point.on_disk.name == checkpoint_name(state.progress.step)
        if not self._is_sound():
            writer.protect_all()
        self._last_save, self._size = time.monotonic(), 0
        self._interval = (
            SaveIntervalTuner(60 * config.mtbf_minutes, self._last_save) if config.save_every == AUTO else None
        )
        self._last_failure = ""
        self._warned_of_grace = self._warned_of_disk = self._warned_of_link = self._prepared = False

    def time_has_come(self) -> bool:
        """Return whether the clock or a request asks for a save. Clocks differ, so the ranks must combine answers."""
        now, minutes = time.monotonic(), self._config.save_minutes
        if self._world.is_main and self._requests.arrived(self._state.progress.step + 1):
            return True
        if self._interval and self._world.is_main and self._interval.due(now):
            return True
        return minutes > 0 and now - self._last_save >= 60 * minutes

    def step_done(self) -> None:
        """Note that a step is finished; a GPU may still be computing it."""
        self._count_steps()
        if self._world.is_main and self._config.max_hours:
            self._size = self._size or self._writer.size_of(self._state.tree())
            self._budget.plan(self._world.phases.typical(STEP) or 0.0, self._size)
        if not self._prepared:
            self._prepared = True
            self._warn_of_space()
            self._prepare()

    def _count_steps(self) -> None:
        for seconds in self._logger.new_steps():
            if self._interval:
                self._interval.step_done(seconds)

    def due(self, step: int, asked: bool) -> bool:
        """Return whether to save at this step: a checkpoint, the weights alone, or both."""
        return self._weights_due(step) or self._checkpoint_due(step, asked)

    def _weights_due(self, step: int) -> bool:
        every = self._config.save_weights_every
        return every > 0 and step % every == 0 and step != self._weights_step

    def _checkpoint_due(self, step: int, asked: bool) -> bool:
        """Return whether to write `model_step*.pt` at this step; at step 0 only --save_steps has anything to keep."""
        if step != self._saved_step:
            wanted = self._is_periodic(step) or self._is_best(step) or asked or self._must_save_first
            return step in self._steps or (step > 0 and wanted)
        # A checkpoint that a signal saved during the validation does not record that it is among the best.
        return self._is_best(step) and self._saved_validated != step

    def _is_periodic(self, step: int) -> bool:
        return self._config.save_every > 0 and step % self._config.save_every == 0

    def _reason(self, step: int) -> str:
        """Return why this step is saved, if retention treats it differently from others."""
        if step in self._steps:
            return FOR_STEPS
        return FOR_BEST if self._is_best(step) and not self._is_periodic(step) else ""

    def _is_best(self, step: int) -> bool:
        """Return whether the validation of this step is over, and its loss among the lowest."""
        return self._state.progress.validated == step and step in self._best.steps

    def validated(self, step: int, loss: float) -> None:
        """Note that a step is validated, with its loss in nats per token. Collective."""
        self._state.progress.validated = step
        self._best.add(step, loss)

    def _prepare(self) -> None:
        """Allocate the host memory for snapshots in the background, after the first step."""
        config = self._config
        if config.save_every or config.save_minutes or config.keep_best or config.save_steps:
            self._writer.prepare(self._state.tree())

    def _warn_of_space(self) -> None:
        """Compare the space that the checkpoints to come need with what is free."""
        step, tree = self._state.progress.step, self._state.tree()
        count, size = checkpoints_to_come(self._config, step), self._writer.size_of(tree)
        weights = self._writer.size_of({"model": tree["model"]}) if self._config.save_weights_every else 0
        weights = weights // 2 if self._config.save_weights_dtype == "bfloat16" else weights
        every = self._config.save_weights_every or 1
        weights *= self._config.num_iterations // every - step // every
        with suppress(OSError):
            found = os.statvfs(self._writer.folder)
            free = found.f_bavail * found.f_frsize
            more = f" and {format_size(weights)} of weights" if weights else ""
            if count * size + weights > free:
                self._logger.warn(
                    f"{format_count(count, 'checkpoint')} of {format_size(size)}{more} will be written, and"
                    f" {self._writer.folder} has"
                    f" {format_size(free)} free: --keep_last 2 keeps fewer, a larger --save_every writes fewer"
                )

    def save(self, step: int, asked: bool = True) -> None:
        """Take a snapshot of what is due; writing happens in the background. Collective."""
        with self._world.phases.inside(SAVE, f"the disk, the checkpoint before that of step {step}"):
            tree = self._tree()
            self._count_steps()
            began = time.monotonic()
            if self._weights_due(step):
                dtype = getattr(torch, self._config.save_weights_dtype)
                self._writer.save_weights(tree, step, dtype, lambda: self._warn_of_disk(step))
                self._weights_step = step
            if not self._checkpoint_due(step, asked):
                return
            self._writer.save(
                tree,
                step,
                sound=self._is_sound(),
                held_up=lambda: self._warn_of_disk(step),
                best=lambda failed: self._best.settle(step, failed),
            )
        self._saved_step, self._periodic, self._last_save = step, True, began
        self._must_save_first = False
        self._saved_validated = self._state.progress.validated
        if self._interval:
            self._interval.save_begins(began, blocked=time.monotonic() - began)

    def _warn_of_disk(self, step: int) -> None:
        if not self._warned_of_disk:
            self._warned_of_disk = True
            self._logger.warn(
                f"the checkpoint before that of step {step} is still being written: training waits for the disk;"
                " save less often, or onto a faster one"
            )

    def _is_sound(self) -> bool:
        """Return whether the loss is finite: retention must not remove earlier checkpoints for diverged weights."""
        loss = self._state.progress.history.get("loss")
        return not isinstance(loss, float) or math.isfinite(loss)

    def _tree(self) -> dict[str, Any]:
        """Return the state, completed with the losses so far and the hash of the next step's tokens."""
        progress, count = self._state.progress, self._config.step_tokens
        require_equal_replicas(self._config, self._state.sharded, progress.step, self._world)
        progress.epoch = self._stream.epoch(progress.tokens)
        try:
            progress.next_batch = {"tokens": count, "sha256": batch_hash(self._stream, progress.tokens, count)}
        except UserError:  # the next step reports the unreadable data; the trained state is saved
            progress.next_batch = {}
        progress.saved_at = time.time()
        progress.saved_for = self._reason(progress.step)
        tree = self._state.tree()
        progress.history = tree["progress"]["history"] = self._logger.progress()  # last: a GPU is waited for
        return tree

    def report(self) -> list[SaveResult]:
        """Print and log the results of the saves that have ended since the last call, and return them."""
        results = self._writer.results()
        for result in results:
            if weights_step(result.path.name) is not None:
                self._report_weights(result)
                continue
            chosen = self._interval.save_ended(result.seconds) if self._interval else ""
            self._requests.answer(result.step, result.path.name, result.error)
            if result.error is not None:
                self._logger.event("unsaved", result.step, file=result.path.name, error=result.error[:200])
                line = f"checkpoint of step {result.step} was not saved: {result.error}; training goes on"
                if line != self._last_failure:  # the same if a save is tried again at the end
                    self._logger.warn(line)
                self._last_failure = line
                continue
            self._logger.note(
                f"saved {result.path} (blocked {result.blocked_seconds:.3f}s, durable {result.seconds:.2f}s)"
            )
            if result.unlinked and not self._warned_of_link:
                self._warned_of_link = True
                self._logger.warn(unlinked(self._writer.folder, result.unlinked))
            if chosen:
                self._logger.note(chosen)
            took = {"blocked": round(result.blocked_seconds, 6), "durable": round(result.seconds, 6)}
            self._logger.event("saved", result.step, file=result.path.name, **took)
            self._check_grace(result.seconds)
            self._budget.longest_save = max(self._budget.longest_save, result.seconds)
        return results

    def _report_weights(self, result: SaveResult) -> None:
        if result.error is None:
            self._logger.note(f"saved {result.path} (durable {result.seconds:.2f}s)")
        else:
            self._logger.warn(f"weights of step {result.step} were not saved: {result.error}; training goes on")

    def _check_grace(self, seconds: float) -> None:
        grace = self._config.grace_seconds
        if grace and seconds > grace / 2 and not self._warned_of_grace:
            self._warned_of_grace = True
            self._logger.warn(
                f"a save takes {seconds:.1f}s of the {grace:g}s between a signal and the kill (--grace_seconds);"
                " a preemption may lose the steps since the last save: save more often or ask for more time"
            )

    def finish(self, step: int) -> bool:
        """Write `final.pt`, as a link if the periodic checkpoint of the same step exists. Collective; return True."""
        self._wait(step)  # the periodic save of this step may have failed
        self._until_durable(step, self._final, FINAL)
        self._answer_late(step, FINAL)
        self._logger.note(environment.peak_memory(self._world.device))
        return True

    def stop(self, step: int, signals: StopSignals) -> bool:
        """Save the current step before a stop that a signal asked for. Collective; return False: not finished."""
        self._complete(step)
        self._answer_late(step, checkpoint_name(step))
        signals.out_of_time = any(self._world.any_rank(signals.out_of_time))
        self._logger.event("stop", step, why=f"stopped by {signals.why}")
        return False

    @contextmanager
    def save_before_raising(self, step: int) -> Iterator[None]:
        """If any rank raises UserError in the body, save this step on all ranks, then raise it on all. Collective.

        For work between two steps, when nothing of the next step has reached the weights.
        """
        caught: UserError | None = None
        try:
            yield
        except UserError as error:
            caught = error
        except (MemoryError, RuntimeError) as error:
            kind = kind_of_shortage(require_out_of_memory(error))
            caught = kind(f"out of memory after step {step}: end other programs, or use a smaller --batch_size")
        if not any(self._world.any_rank(caught is not None)):
            return
        try:
            self._complete(step)
        except UserError as unsaved:
            self._logger.warn(f"{unsaved}")
        self._world.raise_on_all_ranks(caught)

    @contextmanager
    def save_if_out_of_memory(self, step: int) -> Iterator[None]:
        """If GPU memory runs out in the body, after the backward passes and before the update, raise UserError.

        One process saves this step first. Of several, the others wait for this one in the middle of an exchange: they
        cannot save any more and end when this one has ended.
        """
        line = f"CUDA out of memory after the backward passes of step {step + 1}: use a smaller --batch_size or --model"
        with self.save_before_raising(step) if self._world.size == 1 else nullcontext():
            with out_of_memory_as_user_error(line):
                yield

    def _answer_late(self, step: int, name: str) -> None:
        """Answer a request that came at the end, with what has been saved."""
        if self._world.is_main:
            self._requests.arrived(step, at_once=True)
            self._requests.answer(step, name, None if step else "no step is done yet")

    def _complete(self, step: int) -> None:
        """Wait until this step is on disk, by the save in progress or by another one. Collective."""
        self._wait(step)
        if self.due(step, asked=True):
            self._until_durable(step, self.save, checkpoint_name(step))

    def _wait(self, step: int) -> str | None:
        """Wait until no save is in progress; return on all ranks why one of this step failed. Collective."""
        with self._world.phases.inside(SAVE, f"the disk, the checkpoint of step {step}"):
            self._writer.wait()
        mine = [result for result in self.report() if result.step == step and weights_step(result.path.name) is None]
        failed = [result.error for result in mine if result.error is not None]
        error: str | None = self._world.broadcast(failed[0] if failed else None)
        if error is not None:
            self._saved_step = -1  # it is not on disk, though it was begun
        return error

    def _final(self, step: int) -> str | None:
        """Begin to write `final.pt`; return why it cannot be written, if that is known at once."""
        if self.due(step, asked=False):
            self.save(step, asked=False)
            if (error := self._wait(step)) is not None:
                return error
        # A checkpoint that a signal saved during the last validation lacks the validation loss.
        lacks_validation = self._saved_validated != self._state.progress.validated
        if self._saved_step == step and self._periodic and not lacks_validation:
            self._writer.link_final(step, self._state.run_id, self._best.steps)
        else:
            tree = self._tree()
            best = self._best
            self._writer.save(
                tree, step, final=True, sound=self._is_sound(), best=lambda failed: best.settle(step, failed)
            )
        return None

    def _until_durable(self, step: int, attempt: Callable[[int], str | None], name: str) -> None:
        error = None
        for tried in range(FINAL_TRIES):
            if tried:
                time.sleep(SECONDS_BETWEEN_TRIES)
            error = attempt(step) or self._wait(step)
            if error is None:
                return
        raise UserError(f"{name} could not be written: {error}; resume from the newest checkpoint on disk")


class TimeBudget:
    """A plan to save and stop before --max_hours are over, from what steps and saves took."""

    def __init__(self, config: Config, signals: StopSignals) -> None:
        self._seconds, self._name, self._signals = 3600 * config.max_hours, f"--max_hours {config.max_hours:g}", signals
        self._end = time.monotonic() - process_age() + self._seconds
        self.longest_save = 0.0

    def plan(self, step: float, size: int) -> None:
        """Set when to stop.

        Two steps and two saves must still fit: one save may be in progress then. `step`: seconds of a step; `size` of a
        checkpoint in bytes, by which a save is estimated until one is measured.
        """
        save = self.longest_save or size / UNMEASURED_RATE
        reserve = min(2 * step + 2 * save + LEAVING_SECONDS, self._seconds / 2)
        self._signals.stop_at(self._end - reserve, self._name)


def checkpoints_to_come(config: Config, step: int) -> int:
    """Return how many more checkpoints the disk will hold at most, as far as the flags tell, the final one included."""
    last, kept = config.num_iterations, config.checkpoints_to_keep
    more = StepList.parse(config.save_steps).count(step, last) + (config.keep_best if config.val_loss_every else 0)
    if config.save_every == AUTO or config.save_every <= 0:
        return 1 + more + (kept + 1 if config.save_every == AUTO or config.save_minutes else 0)
    periodic = last // config.save_every - step // config.save_every
    also = last // config.keep_every - step // config.keep_every if kept and config.keep_every else 0
    # At the moment of a save there is one more than is kept. The last one is final.pt too, if it is of the last step.
    return (min(periodic, kept + also + 1) if kept else periodic) + (last % config.save_every != 0) + more


INITIAL_COST = 0.5  # seconds, until a save has been measured
MIN_COST = 0.002  # seconds; what cannot be told from noise
MEDIAN_STEPS = 32  # steps whose median is a quiet step


def optimal_interval(cost: float, durable: float, mtbf: float) -> float:
    """Return the seconds between saves that lose least.

    `cost`: what a save costs the training loop; `durable`: until a save is on disk; `mtbf`: mean time between
    interruptions; all in seconds.
    """
    return max(math.sqrt(2 * max(cost, MIN_COST) * mtbf), 2 * durable)


class SaveIntervalTuner:
    """A clock that measures steps and saves, in seconds, and decides when the next save is due."""

    def __init__(self, mtbf: float, now: float) -> None:
        self._mtbf, self._last_save = mtbf, now
        self._quiet: deque[float] = deque(maxlen=MEDIAN_STEPS)
        self._excess = 0.0
        self._saving = False
        self.cost, self.interval = INITIAL_COST, optimal_interval(INITIAL_COST, 0.0, mtbf)

    def step_done(self, seconds: float) -> None:
        """Count a finished step. While a save is in progress, its time beyond a quiet step is the cost of the save."""
        if not self._saving:
            self._quiet.append(seconds)
        elif self._quiet:
            self._excess += max(0.0, seconds - statistics.median(self._quiet))

    def due(self, now: float) -> bool:
        """Return whether it is time to save."""
        return bool(self._quiet) and not self._saving and now - self._last_save >= self.interval

    def save_begins(self, now: float, blocked: float) -> None:
        """Note that a save begins, for which the loop was blocked between two steps."""
        self._last_save, self._saving, self._excess = now, True, blocked

    def save_ended(self, durable: float) -> str:
        """Note that a save is durable after `durable` seconds; return a line if the interval changed much."""
        saving, self._saving = self._saving, False
        if not saving or not self._quiet:  # the final one, or one before any step: nothing was measured
            return ""
        before, first = self.interval, self.cost == INITIAL_COST
        self.cost = self._excess if first else (self.cost + self._excess) / 2
        self.interval = optimal_interval(self.cost, durable, self._mtbf)
        if not first and 0.67 < self.interval / before < 1.5:
            return ""
        step = statistics.median(self._quiet)
        lost = self.cost / self.interval + self.interval / (2 * self._mtbf)
        steps = format_count(max(1, round(self.interval / step)), "step")
        return (
            f"saving every {self.interval:.0f}s, about {steps}: a save costs"
            f" {self.cost:.2f}s, an interruption every {self._mtbf / 60:g} minutes (--mtbf_minutes); expected loss"
            f" {lost:.1%}"
        )
