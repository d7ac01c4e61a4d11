"""Where a run goes on from, and everything that must be said about it before it does."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unbroken import config as flags
from unbroken import earlier, run
from unbroken.checkpoint import directory
from unbroken.checkpoint.reader import CheckpointFile
from unbroken.checkpoint.schema import checkpoint_step, is_run_id
from unbroken.config import Config
from unbroken.distributed import World
from unbroken.errors import UserError
from unbroken.optim import learning_rate
from unbroken.run import Run
from unbroken.state import Progress

LATEST, AUTO = "latest", "auto"

# Flags that do not change what a step computes: a repeated step must still be what the log says.
HARMLESS = flags.ATTEMPT_ONLY | {
    *("val_loss_every", "val_batch_size", "val_tokens", "save_every", "save_minutes", "keep_last", "keep_every"),
    *("grace_seconds", "output_dir", "log_wandb", "on_oom"),
}


@dataclass
class Start:
    """What an attempt begins with. `file` is open when it resumes; `notes` and `warnings` are for the console."""

    config: Config
    run: Run
    file: CheckpointFile | None = None
    progress: Progress = field(default_factory=Progress)
    same_trajectory: bool = True
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def saved(self) -> dict[str, Any]:
        """The checkpoint's values if it is one of ours; else nothing."""
        return self.file.values if self.file is not None and self.file.is_ours else {}

    def saved_dict(self, key: str) -> dict[str, Any]:
        """One of the checkpoint's dicts; empty for a fresh run."""
        return dict(self.saved.get(key, {}))


def decide(typed: dict[str, Any], world: World) -> Start:
    """Find the checkpoint to go on from, if any, merge its arguments with the typed ones, and check both."""
    with world.together():
        agents = run.agents_of(world)
    with world.together():
        found = _choose(typed, agents) if world.is_main else None
    path, run_id, said = world.agree(found)
    with world.together():
        if path is None:
            config = flags.merge(typed)
            return Start(config, Run(run_id, config.output_dir), notes=list(said))
        file = open_named(Path(path))
    with world.together():
        start = _resume(typed, file, run_id if typed.get("fork") else None)
        start.notes[:0] = said
        return start


def _choose(typed: dict[str, Any], agents: list[Any]) -> tuple[str | None, str, list[str]]:
    """On rank 0: (checkpoint or None, run_id for a fresh or forked run, what to say)."""
    own = run.interrupted_run(agents)
    if own is not None:
        found, said = _newest_of(own)
        said.append(f"restarted by torchrun: continuing run {own}")
        return (str(found) if found else None), own, said
    wanted = typed.get("resume_from", "")
    run_id = run.new_run_id(typed.get("run_id", ""))
    if not wanted:
        if typed.get("run_id") and directory.checkpoints(run.LOGS / run_id):
            raise UserError(f"run {run_id} exists already: continue it with --resume_from {run_id}")
        return None, run_id, []
    if wanted == AUTO and typed.get("run_id"):
        found, said = _newest_of(run_id)
        return (str(found) if found else None), run_id, said
    if wanted in (LATEST, AUTO):
        found, said = _newest_of_all()
        if found is None and wanted == LATEST:
            raise UserError("--resume_from latest: there is no whole checkpoint under logs/; start without it, or use auto")
        return (str(found) if found else None), run_id, said
    if is_run_id(wanted):
        found, said = _newest_of(wanted)
        if found is None:
            raise UserError(f"--resume_from {wanted}: that run has no whole checkpoint under logs/{wanted}")
        return str(found), run_id, said
    return str(_named(Path(wanted))), run_id, []


def _named(path: Path) -> Path:
    if path.is_dir():
        newest, _ = directory.newest_whole(path)
        if newest is None:
            raise UserError(f"--resume_from {path}: there is no whole checkpoint in this folder")
        return newest.path
    return path


def _newest_of(run_id: str) -> tuple[Path | None, list[str]]:
    newest, damaged = directory.newest_whole(run.LOGS / run_id)
    return (newest.path if newest else None), [f"{path} is damaged ({why}): falling back" for path, why in damaged]


def _newest_of_all() -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint of the run that saved last."""
    said: list[str] = []

    def last_save(folder: Path) -> float:
        return max((found.path.stat().st_mtime for found in directory.checkpoints(folder)), default=0.0)

    for folder in sorted(directory.runs(run.LOGS), key=last_save, reverse=True):
        path, more = _newest_of(folder.name)
        said += more
        if path is not None:
            return path, said
    return None, said


def open_named(path: Path) -> CheckpointFile:
    """Open a checkpoint; where it is damaged, name the newest good one beside it."""
    try:
        return CheckpointFile(path)
    except UserError as error:
        raise UserError(f"{error}{newest_beside(path)}") from None


def newest_beside(path: Path) -> str:
    """A hint for an error about `path`."""
    folder = path.parent
    newest, _ = directory.newest_whole(folder) if is_run_id(folder.name) else (None, [])
    return f"; the newest whole checkpoint of this run is {newest.path}" if newest and newest.path != path else ""


def _resume(typed: dict[str, Any], file: CheckpointFile, fork_id: str | None) -> Start:
    notes, warnings = [], []
    if file.is_ours:
        saved_args, step = dict(file.values["args"]), int(file.values["step"])
        progress, run_id = Progress.from_checkpoint(file.values["progress"]), str(file.values["run_id"])
        if progress.step != step:
            raise UserError(f"{file.path}: damaged, `step` is {step} but its progress says {progress.step}")
    else:
        foreign = earlier.read(file)
        saved_args, progress = foreign.args, Progress(step=foreign.step, tokens=foreign.position)
        run_id = _foreign_run_id(file)
        warnings.append(foreign.assumed)
    warnings += flags.mismatches(typed, saved_args)
    config = flags.merge(typed, saved_args)
    if config.model != saved_args.get("model", config.model):
        config = dataclasses.replace(config, model=saved_args["model"])
        warnings.append(f"going on with model {config.model}, which the weights belong to")
    if fork_id is not None:
        progress.parent = {"run_id": run_id, "step": progress.step, "file": str(file.path), "sha256": file.sha256()}
        progress.history = {**progress.history}
        notes.append(f"forked from run {run_id} at step {progress.step}")
        run_id = fork_id
    changed = [name for name in flags.FIELDS if name in saved_args and getattr(config, name) != saved_args[name]]
    start = Start(config, Run(run_id, config.output_dir), file, progress, warnings=warnings, notes=notes)
    start.same_trajectory = fork_id is None and file.is_ours and HARMLESS.issuperset(_meaningful(changed, config, saved_args))
    notes.append(f"resuming run {run_id} from {file.path} at step {progress.step}")
    _say_extension(start, saved_args)
    return start


def _foreign_run_id(file: CheckpointFile) -> str:
    """The earlier program's run_id where it is one, so that the log continues; else a new one."""
    run_id = file.values.get("run_id")
    return run_id if isinstance(run_id, str) and is_run_id(run_id) else run.new_run_id("")


def _meaningful(changed: list[str], config: Config, saved: dict[str, Any]) -> list[str]:
    """Without a warmdown a longer run takes the same steps first."""
    no_warmdown = config.warmdown_iters == 0 and saved.get("warmdown_iters", 0) == 0
    return [name for name in changed if not (name == "num_iterations" and no_warmdown)]


def schedule_of(config: Config) -> dict[str, Any]:
    """What `learning_rate` needs of the arguments."""
    return {
        "peak": config.learning_rate,
        "warmup_iters": config.warmup_iters,
        "warmdown_iters": config.warmdown_iters,
        "num_iterations": config.num_iterations,
    }


def _say_extension(start: Start, saved_args: dict[str, Any]) -> None:
    """An extension after the warmdown began makes the learning rate jump: say so, and what else could be done."""
    config, progress = start.config, start.progress
    try:
        old = schedule_of(flags.merge({}, saved_args))
    except UserError:
        return
    step, warmdown_began = progress.step, old["num_iterations"] - old["warmdown_iters"]
    if config.num_iterations <= old["num_iterations"] or old["warmdown_iters"] == 0 or step <= warmdown_began:
        return
    before, after = learning_rate(step, **old), learning_rate(step + 1, **schedule_of(config))
    earlier_ones = [item for item in directory.checkpoints(start.run.folder) if not item.final]
    best = [item.path for item in earlier_ones if item.step is not None and item.step <= warmdown_began]
    advice = f"; {best[-1]} is the last checkpoint before the warmdown" if best else ""
    if config.on_extend == "rewarm":
        steps = config.warmup_iters or max(1, (config.num_iterations - step) // 100)
        progress.rewarm = {"step": step, "learning_rate": before, "steps": steps}
        start.notes.append(
            f"--on_extend rewarm: the learning rate rises from {before:.6g} to the schedule's over {steps} steps{advice}"
        )
        return
    start.warnings.append(
        f"extending after the warmdown began: the learning rate jumps from {before:.6g} at step {step}"
        f" to {after:.6g} at step {step + 1} (--on_extend rewarm raises it gradually){advice}"
    )


def rate_at(step: int, config: Config, progress: Progress) -> float:
    """The learning rate of `step`: the schedule, and after `--on_extend rewarm` a straight line up to it."""
    scheduled = learning_rate(step, **schedule_of(config))
    rewarm = progress.rewarm
    if not rewarm or step > rewarm["step"] + rewarm["steps"]:
        return scheduled
    share = (step - rewarm["step"]) / rewarm["steps"]
    return float(rewarm["learning_rate"] + (scheduled - rewarm["learning_rate"]) * share)


def overtaken(start: Start) -> list[Path]:
    """The newer checkpoints of the run that this attempt will make anew."""
    if start.file is None or start.progress.parent.get("file") == str(start.file.path):
        return []
    done = start.progress.step
    found = directory.checkpoints(start.run.folder)
    return [item.path for item in found if checkpoint_step_of(item) > done and not _same_file(item.path, start.file.path)]


def checkpoint_step_of(found: directory.Found) -> int:
    """The step of a checkpoint; a final one says it only inside, and is the newest anyway."""
    return found.step if found.step is not None else 2**62


def _same_file(a: Path, b: Path) -> bool:
    try:
        return a.samefile(b)
    except OSError:
        return False


__all__ = ["AUTO", "LATEST", "Start", "checkpoint_step", "decide", "open_named", "overtaken", "rate_at"]
