"""The end of an attempt: the last lines that it prints, and its exit code."""

from __future__ import annotations

import statistics

from unbroken import console
from unbroken.checkpoint.format.schema import FINAL
from unbroken.config import Config
from unbroken.distributed.world import World, report_to_torchrun
from unbroken.errors import UserError
from unbroken.metrics.timeline import account_time, read_timeline
from unbroken.paths import Run, with_logs_dir
from unbroken.runtime.signals import StopSignals


def report_end(finished: bool, run: Run, config: Config, step: int, signals: StopSignals, world: World) -> int:
    """Print the results of a finished run, or how to continue a stopped one. Return the exit code.

    Args:
        finished: whether the run is at its end, with its final checkpoint.
        run: its log and journal are closed.
        config: the flags.
        step: the last step that is done.
        signals: the cause of a stop.
        world: only rank 0 prints.
    """
    if finished:
        if world.is_main:
            print_results(run, config, step)
            console.print_line(f"finished at step {step}: {run.folder / FINAL}")
        return 0
    if world.is_main:
        go_on = "continue with" if step else f"begin with --run_id {run.run_id}"
        resume_from = run.run_id if step else "auto"
        line = f"stopped by {signals.why} at step {step}; {go_on} --resume_from {resume_from}"
        _print_stop(with_logs_dir(line))
    return signals.exit_code()


def report_early_stop(signals: StopSignals, world: World) -> int:
    """Print that a signal came before the attempt changed anything. Return the exit code."""
    if world.is_main:
        _print_stop(f"stopped by {signals.why} before the first step; nothing was changed")
    return signals.exit_code()


def _print_stop(line: str) -> None:
    console.print_line(line)
    report_to_torchrun(line)  # which takes every exit code but 0 for a failure


def print_results(run: Run, config: Config, step: int) -> None:
    """Print a finished run as lines `key: value` for grep; a value that log and journal do not have is left out."""
    for key, value in results(run, config, step).items():
        console.print_line(f"{key}: {value}")


def results(run: Run, config: Config, step: int) -> dict[str, str]:
    """Return the results of a finished run by name, from its log and journal.

    Losses are in nats per token; `tokens_per_second` is that of the median step of all attempts; `goodput` is the share
    of the time since the first start that went into steps that count.
    """
    found = {"run_id": run.run_id, **({"name": config.name} if config.name else {}), "steps": f"{step}"}
    try:
        timeline = read_timeline(run.log)
    except UserError:  # removed meanwhile; the checkpoint is complete
        return found
    tokens, val = timeline.series("tokens"), [loss for _, loss in timeline.series("val_loss")]
    if tokens:
        found["tokens"] = f"{tokens[-1][1]:.0f}"
    if train := timeline.series("train_loss"):
        found["final_train_loss"] = f"{train[-1][1]:.6f}"
    if val:
        found |= {"final_val_loss": f"{val[-1]:.6f}", "best_val_loss": f"{min(val):.6f}"}
    seconds = [took for attempt in timeline.attempts for _, took in attempt.steps.values() if took > 0]
    if seconds:
        found["tokens_per_second"] = f"{config.step_tokens / statistics.median(seconds):.0f}"
    if spent := account_time(timeline.attempts):
        found["goodput"] = f"{spent.goodput:.4f}"
    return found | {"attempts": f"{len(timeline.attempts)}", "checkpoint": f"{run.folder / FINAL}"}
