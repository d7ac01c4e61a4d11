"""Where a run goes on from, and everything that must be said about it before it does."""

from __future__ import annotations

import dataclasses
import math
from contextlib import ExitStack
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from unbroken import config as flags
from unbroken import paths, schedule
from unbroken.checkpoint import directory, disk, rewind
from unbroken.checkpoint.reader import CheckpointFile
from unbroken.config import Config, dump_yaml
from unbroken.data.stream import Stream, batch_hash, compare_identity
from unbroken.distributed.step_plan import StepPlan, is_elastic, plan_step, resplit
from unbroken.distributed.world import World
from unbroken.errors import UserError
from unbroken.host import hostname
from unbroken.metrics.logger import RunLogger
from unbroken.mirror import download
from unbroken.optim import set_learning_rate
from unbroken.paths import Run, is_run_id
from unbroken.run import legacy, locate, restarts
from unbroken.run.lock import RunLocks
from unbroken.run.resume_point import ResumePoint
from unbroken.run.state import Progress, RunState
from unbroken.runtime.environment import environment_drift, git_commit, sources_drift


def save_config(folder: Path, text: str) -> list[str]:
    """Put `config.yaml` into a run's folder, whole or not at all; returns what went wrong, a run can do without it."""
    try:
        disk.replace(folder / ".config.yaml.tmp", folder / "config.yaml", text.encode())
    except OSError as error:
        return [f"{folder / 'config.yaml'} could not be written: {error.strerror}"]
    return []


# Flags that do not change what a step computes: a repeated step must still be what the log says.
SAME_TRAJECTORY_FLAGS = flags.ATTEMPT_ONLY | {
    *("init_from", "val_loss_every", "save_every", "save_minutes", "keep_last", "keep_every"),
    *("mtbf_minutes", "total_batch_size", "grace_seconds", "output_dir", "log_wandb", "log_tensorboard", "on_oom"),
}


def plan_attempt(typed: dict[str, Any], world: World, attempt: ExitStack) -> ResumePoint:
    """Find the checkpoint to go on from, if any, merge its arguments with the typed ones, and check both.

    Rank 0 looks and all agree; each opens the file by itself, so that one that cannot stops all with its reason. The
    file is open and the run this attempt's own until `attempt` ends.
    """
    agents, locks = restarts.gather_agents(world), attempt.enter_context(RunLocks())
    typed, url = download.fetch_if_newer(typed, agents, world)
    with world.raise_together():
        found = locate.resolve_resume_from(typed, agents, locks) if world.is_main else None
    path, run_id, fork, said = world.broadcast(found)
    if path is not None and url:
        download.fetch_on_other_nodes(Path(path), url, world)
    if path is None and typed.get("init_from"):
        with world.raise_together():
            weights = locate.resolve_init_from(typed["init_from"], run_id) if world.is_main else ""
        typed = {**typed, "init_from": world.broadcast(weights)}
    with world.raise_together():
        if path is None:
            config = flags.merge(flags.resolve_batch_sizes(typed))
            if config.init_from:
                with locate.open_checkpoint(Path(config.init_from)) as file:
                    model = legacy.identify_model(file.values, str(file.path))
                if typed.get("model", model) != model:
                    raise UserError(
                        f"--model {config.model}: the weights of {config.init_from} are those of {model}; leave it out"
                    )
                config = dataclasses.replace(config, model=model)
            point = ResumePoint(config, Run(run_id, config.output_dir), warnings=schedule.check_overlap(config))
            point.notes.append(f"new run {run_id} in {point.run.folder}/")
        else:
            file = attempt.enter_context(locate.open_checkpoint(Path(path)))
            point = _resume(typed, file, run_id if fork else None)
            if locks and not fork and not locks.holds(point.run.folder):
                raise UserError(
                    f"{file.path} is a checkpoint of run {point.run.run_id}: type its path behind --resume_from to go"
                    " on with that one, and --fork beside it for a run of its own"
                )
        point.finished = world.is_main and _is_finished(point)
    world.require_equal(point.file and directory.fingerprint_of(point.file.path), f"{path} is")
    point.finished = world.broadcast(point.finished)
    point.notes[:0] = said
    point.named = path is not None and not locks
    point.agents, point.locks, point.elastic_ranks_typed = agents, locks, "elastic_ranks" in typed
    return point


def _is_finished(point: ResumePoint) -> bool:
    step, last = point.progress.step, point.config.num_iterations
    return point.file is not None and (step > last or (step == last == directory.finished_step(point.run.folder)))


def restore(state: RunState, file: CheckpointFile) -> None:
    """Fill the live state from the checkpoint; damage that only the checksums show is found here."""
    try:
        state.restore(file)
    except UserError as error:
        raise UserError(f"{error}{locate.newest_beside(file.path)}") from None
    # For a save before the next update: the rate is a part of the optimizer's state.
    set_learning_rate(state.optimizer, schedule.rate_at(state.progress.step, Config(**state.args), state.progress))


def _resume(typed: dict[str, Any], file: CheckpointFile, fork_id: str | None) -> ResumePoint:
    notes, warnings = [], []
    if file.is_ours:
        saved_args, step = dict(file.values["args"]), int(file.values["step"])
        progress, run_id = Progress.from_checkpoint(file.values["progress"]), str(file.values["run_id"])
        if progress.step != step:
            raise UserError(f"{file.path}: damaged, `step` is {step} but its progress says {progress.step}")
    else:
        foreign = legacy.read_legacy(file)
        saved_args, progress = foreign.args, Progress(step=foreign.step, tokens=foreign.position)
        run_id = _foreign_run_id(file)
        warnings.append(foreign.assumed)
    before = flags.merge({}, saved_args)
    typed = flags.resolve_batch_sizes({name: typed[name] for name in typed if name != "init_from"}, saved_args)
    warnings += flags.mismatches(typed, saved_args)
    config = flags.merge(typed, saved_args)
    progress.split = resplit(progress.split, before.batch_size, config.batch_size)
    if "output_dir" not in typed and config.output_dir != (own := paths.trusted_output_dir(config.output_dir, run_id)):
        config = dataclasses.replace(config, output_dir=own)
        warnings.append("the log goes into the run's folder: type --output_dir to have it outside of this one")
    if config.model != saved_args.get("model", config.model):
        config = dataclasses.replace(config, model=saved_args["model"])
        warnings.append(f"going on with model {config.model}, which the weights belong to")
    if config.optimizer != saved_args.get("optimizer", "adamw"):
        raise UserError(
            f"--optimizer {config.optimizer}: {file.path} holds the state of another optimizer; leave the flag out, or"
            f" point a new run from its weights with --init_from {file.path}"
        )
    if typed.get("run_id", run_id) != run_id and fork_id is None:
        raise UserError(f"--run_id names another run than {file.path}: type --fork to continue it under that id")
    if fork_id is not None:
        progress.parent = {"run_id": run_id, "step": progress.step, "file": str(file.path), "sha256": file.sha256()}
        notes.append(f"forked from run {run_id} at step {progress.step}")
        run_id = fork_id
    changed = [name for name in flags.FIELDS if name in saved_args and getattr(config, name) != saved_args[name]]
    point = ResumePoint(config, Run(run_id, config.output_dir), file, progress, warnings=warnings, notes=notes)
    point.same_trajectory = (
        fork_id is None
        and file.is_ours
        and SAME_TRAJECTORY_FLAGS.issuperset(_trajectory_flags(changed, config, saved_args))
    )
    notes.append(f"resuming run {run_id} from {file.path} at step {progress.step}")
    warning, note = schedule.extend_schedule(before, config, progress, file.path.parent)
    point.warnings += [warning] if warning else []
    point.notes += [note] if note else []
    return point


def _foreign_run_id(file: CheckpointFile) -> str:
    """The earlier program's run_id where it is one, so that the log continues; else a new one."""
    run_id = file.values.get("run_id")
    return run_id if isinstance(run_id, str) and is_run_id(run_id) else paths.new_run_id("")


def _trajectory_flags(changed: list[str], config: Config, saved: dict[str, Any]) -> list[str]:
    """Without a warmdown a longer run takes the same steps first."""
    no_warmdown = config.warmdown_iters == 0 and saved.get("warmdown_iters", 0) == 0
    return [name for name in changed if not (name == "num_iterations" and no_warmdown)]


def claim_run(point: ResumePoint) -> None:
    """On rank 0: make the run's folder, hold its lock, clear a killed attempt's debris.

    Before the lock was held another attempt may have been at work: what was decided must still be so.
    """
    folder, file = point.run.folder, point.file
    point.locks.take(folder)
    point.run.create()
    directory.clear_debris(folder)
    if file is not None and not file.is_in_place:
        raise UserError(f"{file.path} was removed or replaced by another process just now: point again")
    if file is None or file.values.get("run_id") != point.run.run_id:
        newest, _ = directory.newest_whole(folder)
        if newest is not None:
            raise UserError(f"run {point.run.run_id} exists already: continue it with --resume_from {point.run.run_id}")


def start_attempt(point: ResumePoint, config: Config, plan: StepPlan, world: World, history: RunLogger) -> None:
    """The attempt is sure to train: from here on it changes what the run has, and says all that was found out."""
    elastic = point.elastic_ranks_typed or is_elastic(plan, config.elastic_ranks)
    with world.raise_together():
        if world.is_main:
            try:
                set_aside_newer(point)
                restarts.record_agents(point.run.folder, point.agents)
            except OSError as error:
                raise UserError(f"cannot write into the folder {point.run.folder}: {error.strerror}") from None
            point.warnings += save_config(point.run.folder, dump_yaml(config, point.run.run_id, elastic))
    for warning in point.warnings:
        history.warn(warning)
    begins_here = not point.saved or point.progress.parent.get("step") == point.progress.step
    if history.log_reaches < point.progress.step and not begins_here:
        history.warn(
            f"{point.run.log} lacks the losses from step {history.log_reaches + 1} to {point.progress.step}: it was"
            " lost, or --output_dir was another"
        )
    for note in point.notes:
        history.note(note)


def set_aside_newer(point: ResumePoint) -> None:
    """Set aside what this attempt overtakes. Raises OSError."""
    newer = _overtaken(point)
    if point.file is not None and (newer or point.named or not point.same_trajectory):
        rewind.write_rewind_marker(point.run.folder, point.progress.step)
    if newer:
        names = ", ".join(path.name for path in newer)
        folder = rewind.set_aside(point.run.folder, newer)
        point.warnings.append(f"going back to step {point.progress.step}: {names} overtaken, kept in {folder}")
    if point.file is not None and point.progress.step < point.config.num_iterations:
        # The run gets another end: what was final.pt must not be lost when that is written.
        rewind.keep_final_as_periodic(point.run.folder, point.progress.step)


def _overtaken(point: ResumePoint) -> list[Path]:
    """The checkpoints of the run that are newer than the one resumed from: this attempt makes them anew.

    Of the same step as well, where it goes on from another file, which will be saved under that name. The earlier
    program counted from 0: what it named by a step is one step newer.
    """
    file, step = point.file, point.progress.step
    least = step - 1 if point.to_be_saved and point.saved else step
    theirs = file.path.name if file is not None and not file.is_ours else ""
    return [
        found.path
        for found in directory.list_checkpoints(point.run.folder)
        if (2**62 if found.step is None else found.step) + bool(theirs and not found.final) > least
        and found.path.name != theirs
    ]


def check_data(point: ResumePoint, identity: dict[str, Any], stream: Stream) -> None:
    """The data must be what the checkpoint was trained on, down to the next batch; else the run would be another."""
    saved = point.saved_dict("data")
    changes = compare_identity(saved, identity) if saved else []
    proof = point.progress.next_batch
    if not changes and proof and batch_hash(stream, point.progress.tokens, _count(point)) != proof.get("sha256"):
        changes = [f"the tokens at position {point.progress.tokens:,} are not those the checkpoint expects"]
    if not changes:
        return
    said = "; ".join(changes[:3]) + (f"; and {len(changes) - 3} more" if len(changes) > 3 else "")
    if not point.config.allow_data_change:
        raise UserError(f"the training data changed: {said}; restore it, or type --allow_data_change to go on with it")
    point.same_trajectory = False
    point.warnings.append(f"the training data changed: {said}")


def _count(point: ResumePoint) -> int:
    """Tokens of a step, as the checkpoint says twice: what a stranger made up might not fit into memory."""
    count, saved = point.progress.next_batch.get("tokens"), point.saved_dict("args")
    sizes = [saved.get(name) for name in ("batch_size", "grad_accumulation_steps", "sequence_length")]
    whole = [size for size in sizes if type(size) is int]
    if type(count) is not int or len(whole) < len(sizes) or count != math.prod(whole):
        raise UserError("the checkpoint's progress is damaged: next_batch is not as long as a step")
    return count


def compare_worlds(point: ResumePoint, plan: StepPlan, world: World) -> None:
    """Repeated steps can be compared with the log only if both world sizes add in the same order."""
    before = point.saved_dict("environment").get("world_size", world.size)
    if type(before) is not int or before < 1:  # a stranger's
        point.same_trajectory = False
    elif before != world.size:
        config, split = point.config, point.progress.split
        try:
            old = plan_step(
                config.batch_size, config.grad_accumulation_steps, before, config.elastic_ranks, min_split=split
            )
            point.same_trajectory &= old.exact and plan.exact
        except UserError:
            point.same_trajectory = False
    point.same_trajectory &= point.file is None or plan.split == point.progress.split


def check_drift(point: ResumePoint, environment: dict[str, Any], sources: dict[str, str], code: str) -> None:
    """What may change bits and is not what the checkpoint was made with: a line each."""
    if point.file is None or not point.file.is_ours:
        return
    point.warnings += environment_drift(point.saved_dict("environment"), environment)
    point.warnings += sources_drift(point.saved_dict("sources"), sources, point.saved.get("code"), code)


def open_logger(config: Config, point: ResumePoint, world: World, environment: dict[str, Any]) -> RunLogger:
    """The log, the journal, the console and the trackers of this attempt."""
    parent = point.progress.parent
    described = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "from": str(point.file.path) if point.file else "scratch",
        "step": str(point.progress.step),
        "host": hostname(),
        "processes": str(world.size),
        "git": git_commit(),
        **({"parent": f"{parent['run_id']}@{parent['step']}"} if parent else {}),
    }
    with world.raise_together():
        return RunLogger(
            config=config,
            run=point.run,
            start_step=point.progress.step,
            saved=point.progress.history,
            world=world,
            compare=point.same_trajectory,
            header=described,
            environment=environment,
        )
