"""The learning rate of every step, and how extending a run changes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unbroken.config import Config
from unbroken.findings import Findings, note, warn
from unbroken.text import format_count


def learning_rate(step: int, config: Config) -> float:
    """Return the rate of update `step`, counted from 1: linear warmup, constant, linear warmdown to a step above 0."""
    done, peak, warmdown = step - 1, config.learning_rate, config.warmdown_iters
    if config.warmup_iters > max(done, 0):  # of a checkpoint of step 0, done is -1
        return peak * (done + 1) / config.warmup_iters
    if done < config.num_iterations - warmdown:
        return peak
    return peak * max(0, config.num_iterations - done) / warmdown if warmdown else peak


def rate_at(step: int, config: Config, rewarm: Mapping[str, Any]) -> float:
    """Return the learning rate of `step` for a run with these flags.

    `rewarm` is empty, or {step, learning_rate, steps} of an extension with `--on_extend rewarm`: the rate then goes in
    a straight line from that of the checkpoint to that of the schedule.
    """
    scheduled = learning_rate(step, config)
    if not rewarm or step > rewarm["step"] + rewarm["steps"]:
        return scheduled
    share = (step - rewarm["step"]) / rewarm["steps"]
    return float(rewarm["learning_rate"] + (scheduled - rewarm["learning_rate"]) * share)


def extend_schedule(
    old: Config, new: Config, step: int, rewarm: Mapping[str, Any], before_warmdown: str
) -> tuple[dict[str, Any], Findings]:
    """Return the `rewarm` of a run that is resumed at `step` with other flags, and what to tell the user.

    The rate jumps only if the run is extended after its warmdown began.

    Args:
        old: the flags of the checkpoint.
        new: the flags of this attempt.
        step: the updates that the checkpoint has.
        rewarm: that of the checkpoint.
        before_warmdown: the newest checkpoint from before the warmdown, for the advice; "" if there is none.
    """
    if new.num_iterations <= old.num_iterations or step <= warmdown_start(old) or old.warmdown_iters == 0:
        return dict(rewarm), Findings()
    before, after = rate_at(step, old, rewarm), rate_at(step + 1, new, rewarm)
    advice = f"; {before_warmdown} is the last checkpoint before the warmdown" if before_warmdown else ""
    if new.on_extend == "keep":
        return dict(rewarm), warn(
            f"extending after the warmdown began: the learning rate jumps from {before:.6g} at step {step}"
            f" to {after:.6g} at step {step + 1} (--on_extend rewarm gets there gradually){advice}"
        )
    steps = new.warmup_iters or max(1, (new.num_iterations - step) // 100)
    return {"step": step, "learning_rate": float(before), "steps": steps}, note(
        f"--on_extend rewarm: the learning rate goes from {before:.6g} to the schedule's in"
        f" {format_count(steps, 'step')}{advice}"
    )


def warmdown_start(config: Config) -> int:
    """Return the last step before the warmdown."""
    return config.num_iterations - config.warmdown_iters


def check_overlap(config: Config) -> Findings:
    """Return a warning if warmup and warmdown leave no step at the peak rate."""
    if config.warmup_iters + config.warmdown_iters <= max(config.num_iterations, 1):
        return Findings()
    return warn(
        f"warmup_iters {config.warmup_iters} + warmdown_iters {config.warmdown_iters} exceed num_iterations"
        f" {config.num_iterations}"
    )
