"""The learning rate of every step, and how extending a run changes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from unbroken.checkpoint import directory
from unbroken.config import Config
from unbroken.run.state import Progress


def learning_rate(step: int, *, peak: float, warmup_iters: int, warmdown_iters: int, num_iterations: int) -> float:
    """The rate of update `step`, counted from 1: linear warmup, constant, linear warmdown to one step above zero."""
    done = step - 1
    if done < warmup_iters:
        return peak * (done + 1) / warmup_iters
    if done < num_iterations - warmdown_iters:
        return peak
    return peak * (num_iterations - done) / warmdown_iters if warmdown_iters else peak


def rate_at(step: int, config: Config, progress: Progress) -> float:
    """The learning rate of `step`: the schedule, and after `--on_extend rewarm` a straight line up to it."""
    scheduled = learning_rate(step, **_arguments(config))
    rewarm = progress.rewarm
    if not rewarm or step > rewarm["step"] + rewarm["steps"]:
        return scheduled
    share = (step - rewarm["step"]) / rewarm["steps"]
    return float(rewarm["learning_rate"] + (scheduled - rewarm["learning_rate"]) * share)


def extend_schedule(old: Config, new: Config, progress: Progress, folder: Path) -> tuple[str, str]:
    """What an extension does to the learning rate: (warning, note), either may be empty.

    Only one that comes after the warmdown began makes the rate jump. `--on_extend rewarm` is written into `progress`.
    """
    step, warmdown_began = progress.step, old.num_iterations - old.warmdown_iters
    if new.num_iterations <= old.num_iterations or old.warmdown_iters == 0 or step <= warmdown_began:
        return "", ""
    before, after = rate_at(step, old, progress), rate_at(step + 1, new, progress)
    kept = [
        found.path for found in directory.list_checkpoints(folder) if not found.final and _step(found) <= warmdown_began
    ]
    advice = f"; {kept[-1]} is the last checkpoint before the warmdown" if kept else ""
    if new.on_extend == "keep":
        return (
            f"extending after the warmdown began: the learning rate jumps from {before:.6g} at step {step}"
            f" to {after:.6g} at step {step + 1} (--on_extend rewarm gets there gradually){advice}"
        ), ""
    steps = new.warmup_iters or max(1, (new.num_iterations - step) // 100)
    progress.rewarm = {"step": step, "learning_rate": float(before), "steps": steps}
    return (
        "",
        f"--on_extend rewarm: the learning rate goes from {before:.6g} to the schedule's in {steps} steps{advice}",
    )


def check_overlap(config: Config) -> list[str]:
    """What is to be said of a schedule that never has its peak rate."""
    if config.warmup_iters + config.warmdown_iters <= max(config.num_iterations, 1):
        return []
    return [
        f"warmup_iters {config.warmup_iters} + warmdown_iters {config.warmdown_iters} exceed num_iterations"
        f" {config.num_iterations}"
    ]


def _step(found: directory.CheckpointEntry) -> int:
    return found.step if found.step is not None else 0


def _arguments(config: Config) -> dict[str, Any]:
    return {
        "peak": config.learning_rate,
        "warmup_iters": config.warmup_iters,
        "warmdown_iters": config.warmdown_iters,
        "num_iterations": config.num_iterations,
    }
