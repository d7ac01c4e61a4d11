"""Where a run goes on from, and everything that must be said about it before it does."""

from __future__ import annotations

import dataclasses
import math
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from unbroken import bring, config_file, earlier, machine, run, schedule, wanted
from unbroken import config as flags
from unbroken.checkpoint import directory
from unbroken.checkpoint.reader import CheckpointFile
from unbroken.checkpoint.schema import FINAL, checkpoint_name, is_run_id
from unbroken.config import Config
from unbroken.distributed import World, host
from unbroken.errors import UserError
from unbroken.history import History
from unbroken.optim import set_learning_rate
from unbroken.plan import StepPlan, is_elastic, plan_step, resplit
from unbroken.run import Run, RunLocks
from unbroken.state import Progress, RunState
from unbroken.tokens import Stream, batch_hash, compare_identity

# Flags that do not change what a step computes: a repeated step must still be what the log says.
HARMLESS = flags.ATTEMPT_ONLY | {
    *("init_from", "val_loss_every", "save_every", "save_minutes", "keep_last", "keep_every"),
    *("mtbf_minutes", "total_batch_size", "grace_seconds", "output_dir", "log_wandb", "log_tensorboard", "on_oom"),
}


@dataclass
class Start:
    """What an attempt begins with. `file` is open when it resumes; `notes` and `warnings` are for the console.

    `finished`: the checkpoint is the end already. A run killed before its `final.pt`, or one that is being extended and
    whose `final.pt` is of its old end, still has that to write. `named`: the checkpoint was, not the run.
    """

    config: Config
    run: Run
    file: CheckpointFile | None = None
    progress: Progress = field(default_factory=Progress)
    finished: bool = False
    same_trajectory: bool = True
    elastic_ranks_typed: bool = False
    agents: list[Any] = field(default_factory=list)
    locks: RunLocks = field(default_factory=RunLocks)
    named: bool = False
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def on_disk(self) -> Path | None:
        """The checkpoint, if it is one of the run's own folder: a fork, say, has nothing there yet."""
        file = self.file
        if file is None or not file.is_ours or file.path.parent.resolve() != self.run.folder.resolve():
            return None
        return file.path if file.path.name in (FINAL, checkpoint_name(self.progress.step)) else None

    @property
    def to_be_saved(self) -> bool:
        """Whether the run's folder lacks what it goes on from, so that a worker that dies would go on from another."""
        here = self.file is None or self.on_disk is not None
        return not here and self.progress.parent.get("step") != self.progress.step

    @property
    def saved(self) -> dict[str, Any]:
        """The checkpoint's values if it is one of ours; else nothing."""
        return self.file.values if self.file is not None and self.file.is_ours else {}

    def saved_dict(self, key: str) -> dict[str, Any]:
        """One of the checkpoint's dicts; empty for a fresh run."""
        return dict(self.saved.get(key, {}))


def decide(typed: dict[str, Any], world: World, attempt: ExitStack) -> Start:
    """Find the checkpoint to go on from, if any, merge its arguments with the typed ones, and check both.

    Rank 0 looks and all agree; each opens the file by itself, so that one that cannot stops all with its reason. The
    file is open and the run this attempt's own until `attempt` ends.
    """
    agents, locks = run.agents_of(world), attempt.enter_context(RunLocks())
    typed, url = bring.bring(typed, agents, world)
    with world.together():
        found = wanted.choose(typed, agents, locks) if world.is_main else None
    path, run_id, fork, said = world.agree(found)
    if path is not None and url:
        bring.bring_elsewhere(Path(path), url, world)
    if path is None and typed.get("init_from"):
        with world.together():
            weights = wanted.file_of(typed["init_from"], run_id) if world.is_main else ""
        typed = {**typed, "init_from": world.agree(weights)}
    with world.together():
        if path is None:
            config = flags.merge(flags.settled(typed))
            if config.init_from:
                with wanted.open_named(Path(config.init_from)) as file:
                    model = earlier.preset_of(file.values, str(file.path))
                if typed.get("model", model) != model:
                    raise UserError(
                        f"--model {config.model}: the weights of {config.init_from} are those of {model}; leave it out"
                    )
                config = dataclasses.replace(config, model=model)
            start = Start(config, Run(run_id, config.output_dir), warnings=schedule.overlap(config))
            start.notes.append(f"new run {run_id} in {start.run.folder}/")
        else:
            file = attempt.enter_context(wanted.open_named(Path(path)))
            start = _resume(typed, file, run_id if fork else None)
            if locks and not fork and not locks.holds(start.run.folder):
                raise UserError(
                    f"{file.path} is a checkpoint of run {start.run.run_id}: type its path behind --resume_from to go"
                    " on with that one, and --fork beside it for a run of its own"
                )
        start.finished = world.is_main and _is_finished(start)
    world.same(start.file and bring.identity_of(start.file.path), f"{path} is")
    start.finished = world.agree(start.finished)
    start.notes[:0] = said
    start.named = path is not None and not locks
    start.agents, start.locks, start.elastic_ranks_typed = agents, locks, "elastic_ranks" in typed
    return start


def _is_finished(start: Start) -> bool:
    step, last = start.progress.step, start.config.num_iterations
    return start.file is not None and (step > last or (step == last == directory.finished_at(start.run.folder)))


def restore(state: RunState, file: CheckpointFile) -> None:
    """Fill the live state from the checkpoint; damage that only the checksums show is found here."""
    try:
        state.restore(file)
    except UserError as error:
        raise UserError(f"{error}{wanted.newest_beside(file.path)}") from None
    # For a save before the next update: the rate is a part of the optimizer's state.
    set_learning_rate(state.optimizer, schedule.rate_at(state.progress.step, Config(**state.args), state.progress))


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
    before = flags.merge({}, saved_args)
    typed = flags.settled({name: typed[name] for name in typed if name != "init_from"}, saved_args)
    warnings += flags.mismatches(typed, saved_args)
    config = flags.merge(typed, saved_args)
    progress.split = resplit(progress.split, before.batch_size, config.batch_size)
    if "output_dir" not in typed and config.output_dir != (own := run.own_output_dir(config.output_dir, run_id)):
        config = dataclasses.replace(config, output_dir=own)
        warnings.append("the log goes into the run's folder: type --output_dir to have it outside of this one")
    if config.model != saved_args.get("model", config.model):
        config = dataclasses.replace(config, model=saved_args["model"])
        warnings.append(f"going on with model {config.model}, which the weights belong to")
    if config.optimizer != saved_args.get("optimizer", "adamw"):
        raise UserError(
            f"--optimizer {config.optimizer}: {file.path} holds the state of another optimizer; leave the flag out, or"
            f" start a new run from its weights with --init_from {file.path}"
        )
    if typed.get("run_id", run_id) != run_id and fork_id is None:
        raise UserError(f"--run_id names another run than {file.path}: type --fork to continue it under that id")
    if fork_id is not None:
        progress.parent = {"run_id": run_id, "step": progress.step, "file": str(file.path), "sha256": file.sha256()}
        notes.append(f"forked from run {run_id} at step {progress.step}")
        run_id = fork_id
    changed = [name for name in flags.FIELDS if name in saved_args and getattr(config, name) != saved_args[name]]
    start = Start(config, Run(run_id, config.output_dir), file, progress, warnings=warnings, notes=notes)
    start.same_trajectory = (
        fork_id is None and file.is_ours and HARMLESS.issuperset(_meaningful(changed, config, saved_args))
    )
    notes.append(f"resuming run {run_id} from {file.path} at step {progress.step}")
    warning, note = schedule.extend(before, config, progress, file.path.parent)
    start.warnings += [warning] if warning else []
    start.notes += [note] if note else []
    return start


def _foreign_run_id(file: CheckpointFile) -> str:
    """The earlier program's run_id where it is one, so that the log continues; else a new one."""
    run_id = file.values.get("run_id")
    return run_id if isinstance(run_id, str) and is_run_id(run_id) else run.new_run_id("")


def _meaningful(changed: list[str], config: Config, saved: dict[str, Any]) -> list[str]:
    """Without a warmdown a longer run takes the same steps first."""
    no_warmdown = config.warmdown_iters == 0 and saved.get("warmdown_iters", 0) == 0
    return [name for name in changed if not (name == "num_iterations" and no_warmdown)]


def take_over(start: Start) -> None:
    """On rank 0: make the run's folder, hold its lock, clear a killed attempt's debris.

    Before the lock was held another attempt may have been at work: what was decided must still be so.
    """
    folder, file = start.run.folder, start.file
    start.locks.take(folder)
    start.run.create()
    directory.clear_debris(folder)
    if file is not None and not file.is_in_place:
        raise UserError(f"{file.path} was removed or replaced by another process just now: start again")
    if file is None or file.values.get("run_id") != start.run.run_id:
        newest, _ = directory.newest_whole(folder)
        if newest is not None:
            raise UserError(f"run {start.run.run_id} exists already: continue it with --resume_from {start.run.run_id}")


def begin(start: Start, config: Config, plan: StepPlan, world: World, history: History) -> None:
    """The attempt is sure to train: from here on it changes what the run has, and says all that was found out."""
    elastic = start.elastic_ranks_typed or is_elastic(plan, config.elastic_ranks)
    with world.together():
        if world.is_main:
            try:
                _make_room(start)
                run.mark_attempt(start.run.folder, start.agents)
            except OSError as error:
                raise UserError(f"cannot write into the folder {start.run.folder}: {error.strerror}") from None
            start.warnings += run.write_config(start.run.folder, config_file.as_yaml(config, start.run.run_id, elastic))
    for warning in start.warnings:
        history.warn(warning)
    begins_here = not start.saved or start.progress.parent.get("step") == start.progress.step
    if history.log_reaches < start.progress.step and not begins_here:
        history.warn(
            f"{start.run.log} lacks the losses from step {history.log_reaches + 1} to {start.progress.step}: it was"
            " lost, or --output_dir was another"
        )
    for note in start.notes:
        history.note(note)


def _make_room(start: Start) -> None:
    """Set aside what this attempt overtakes. Raises OSError."""
    newer = _overtaken(start)
    if start.file is not None and (newer or start.named or not start.same_trajectory):
        directory.note_gone_back(start.run.folder, start.progress.step)
    if newer:
        names = ", ".join(path.name for path in newer)
        folder = directory.set_aside(start.run.folder, newer)
        start.warnings.append(f"going back to step {start.progress.step}: {names} overtaken, kept in {folder}")
    if start.file is not None and start.progress.step < start.config.num_iterations:
        # The run gets another end: what was final.pt must not be lost when that is written.
        directory.keep_final_as_periodic(start.run.folder, start.progress.step)


def _overtaken(start: Start) -> list[Path]:
    """The checkpoints of the run that are newer than the one resumed from: this attempt makes them anew.

    Of the same step as well, where it goes on from another file, which will be saved under that name. The earlier
    program counted from 0: what it named by a step is one step newer.
    """
    file, step = start.file, start.progress.step
    least = step - 1 if start.to_be_saved and start.saved else step
    theirs = file.path.name if file is not None and not file.is_ours else ""
    return [
        found.path
        for found in directory.checkpoints(start.run.folder)
        if (2**62 if found.step is None else found.step) + bool(theirs and not found.final) > least
        and found.path.name != theirs
    ]


def check_data(start: Start, identity: dict[str, Any], stream: Stream) -> None:
    """The data must be what the checkpoint was trained on, down to the next batch; else the run would be another."""
    saved = start.saved_dict("data")
    changes = compare_identity(saved, identity) if saved else []
    proof = start.progress.next_batch
    if not changes and proof and batch_hash(stream, start.progress.tokens, _count(start)) != proof.get("sha256"):
        changes = [f"the tokens at position {start.progress.tokens:,} are not those the checkpoint expects"]
    if not changes:
        return
    said = "; ".join(changes[:3]) + (f"; and {len(changes) - 3} more" if len(changes) > 3 else "")
    if not start.config.allow_data_change:
        raise UserError(f"the training data changed: {said}; restore it, or type --allow_data_change to go on with it")
    start.same_trajectory = False
    start.warnings.append(f"the training data changed: {said}")


def _count(start: Start) -> int:
    """Tokens of a step, as the checkpoint says twice: what a stranger made up might not fit into memory."""
    count, saved = start.progress.next_batch.get("tokens"), start.saved_dict("args")
    sizes = [saved.get(name) for name in ("batch_size", "grad_accumulation_steps", "sequence_length")]
    whole = [size for size in sizes if type(size) is int]
    if type(count) is not int or len(whole) < len(sizes) or count != math.prod(whole):
        raise UserError("the checkpoint's progress is damaged: next_batch is not as long as a step")
    return count


def compare_worlds(start: Start, plan: StepPlan, world: World) -> None:
    """Repeated steps can be compared with the log only if both world sizes add in the same order."""
    before = start.saved_dict("environment").get("world_size", world.size)
    if type(before) is not int or before < 1:  # a stranger's
        start.same_trajectory = False
    elif before != world.size:
        config, split = start.config, start.progress.split
        try:
            old = plan_step(
                config.batch_size, config.grad_accumulation_steps, before, config.elastic_ranks, min_split=split
            )
            start.same_trajectory &= old.exact and plan.exact
        except UserError:
            start.same_trajectory = False
    start.same_trajectory &= start.file is None or plan.split == start.progress.split


def check_drift(start: Start, environment: dict[str, Any], sources: dict[str, str], code: str) -> None:
    """What may change bits and is not what the checkpoint was made with: a line each."""
    if start.file is None or not start.file.is_ours:
        return
    start.warnings += machine.drift(start.saved_dict("environment"), environment)
    start.warnings += machine.sources_drift(start.saved_dict("sources"), sources, start.saved.get("code"), code)


def open_history(config: Config, start: Start, world: World, environment: dict[str, Any]) -> History:
    """The log, the journal, the console and the trackers of this attempt."""
    parent = start.progress.parent
    described = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "from": str(start.file.path) if start.file else "scratch",
        "step": str(start.progress.step),
        "host": host(),
        "processes": str(world.size),
        "git": machine.git_commit(),
        **({"parent": f"{parent['run_id']}@{parent['step']}"} if parent else {}),
    }
    with world.together():
        return History(
            config=config,
            run=start.run,
            start_step=start.progress.step,
            saved=start.progress.history,
            world=world,
            compare=start.same_trajectory,
            header=described,
            environment=environment,
        )
