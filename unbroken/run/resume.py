"""The start of an attempt, and the checks before it changes anything: from `plan_attempt` to `start_attempt`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from unbroken import config as flags
from unbroken import console, schedule
from unbroken.checkpoint import directory, disk, rewind
from unbroken.checkpoint.directory import CheckpointEntry
from unbroken.checkpoint.format.schema import FINAL, checkpoint_name
from unbroken.checkpoint.reader import CheckpointFile
from unbroken.config import Config
from unbroken.data import left_out, prepare, sources
from unbroken.data.mixture import Mixture, TokenStream, batch_hash, continue_tokens, open_tokens, sources_of
from unbroken.data.stream import Stream, compare_identity, has_all
from unbroken.distributed.phases import RESTORE
from unbroken.distributed.step_plan import StepPlan, is_elastic, num_leaves, plan_step, resplit
from unbroken.distributed.world import World
from unbroken.errors import UserError
from unbroken.findings import Findings, note, warn
from unbroken.host import hostname
from unbroken.metrics.append_file import AppendFile
from unbroken.metrics.logger import RunLogger
from unbroken.model import families
from unbroken.model.language_model import LanguageModel
from unbroken.optim import set_learning_rate
from unbroken.paths import BY_NAME, Run, give_name, journal_of, logs_dir, trusted_output_dir
from unbroken.run import ending, legacy, restarts
from unbroken.run.anomalies import Rewound
from unbroken.run.best import link_best
from unbroken.run.experiment import begun_with, same_weights
from unbroken.run.imported import ImportedModel, is_folder, read_folder
from unbroken.run.legacy import LegacyCheckpoint
from unbroken.run.length import describe_length, epoch_tokens, resolve_length, step_tokens
from unbroken.run.locate import Resolved, newest_beside, open_checkpoint
from unbroken.run.state import Progress, RunState
from unbroken.runtime.environment import environment_drift, git_commit, missing_gpu, sources_drift
from unbroken.text import format_count

# Flags that do not change what a step computes: with other values a repeated step still has the logged loss.
SAME_TRAJECTORY_FLAGS = flags.ATTEMPT_ONLY | {
    *("init_from", "val_loss_every", "save_every", "save_minutes", "keep_last", "keep_every", "keep_best"),
    *("save_steps", "save_weights_every", "save_weights_dtype"),
    *("mtbf_minutes", "total_batch_size", "grace_seconds", "on_oom", *flags.LOGGING),
    *("hang", "on_nan", "on_spike", "skip_batches", "replay", "name"),  # batches left out are compared by positions
}


# Flags that keep the value with which the run began, with the reason.
SETTLED_FLAGS = {
    "seed": "the weights are the checkpoint's",
    "bias": "the weights are the checkpoint's",
    "shuffle": "the order of the data is the run's",
    "window_tokens": "the order of the data is the run's",
}

# Flags whose default, if typed, means the value of the run.
KEPT_FLAGS = ("dtype", "compile", "threads")


@dataclass(frozen=True)
class ResumePoint:
    """The point from which an attempt starts: a checkpoint, or the beginning of a new run.

    Attributes:
        config: the flags, merged with those of the checkpoint.
        run: the run's folder and files.
        file: the checkpoint, open as long as the attempt lives; None for a new run.
        weights: for a new run the open file, or the content of the folder, of --init_from.
        entries: the checkpoints in the run's folder.
        progress: the live progress, which the training continues.
        legacy: what `file` says if the earlier program or nanoGPT made it.
        findings: those of planning.
        finished: whether there is nothing left to train or to write.
        was_named: whether the user named the checkpoint itself, not its run.
        elastic_ranks_typed: whether the user typed --elastic_ranks.
        rewound: whether the attempt before went back to the checkpoint. It is saved again, with the batches that are
            left out from now on.
    """

    config: Config
    run: Run
    file: CheckpointFile | None = None
    weights: CheckpointFile | ImportedModel | None = None
    entries: tuple[CheckpointEntry, ...] = ()
    progress: Progress = field(default_factory=Progress)
    legacy: LegacyCheckpoint | None = None
    findings: Findings = field(default_factory=Findings)
    finished: bool = False
    was_named: bool = False
    elastic_ranks_typed: bool = False
    rewound: bool = False

    @property
    def saved(self) -> dict[str, Any]:
        """The values of a checkpoint of ours; empty for a new run or a checkpoint of another program."""
        return self.file.values if self.file is not None and self.file.is_ours else {}

    def saved_dict(self, key: str) -> dict[str, Any]:
        """Return one of the checkpoint's dicts; empty for a new run."""
        return dict(self.saved.get(key, {}))

    @property
    def on_disk(self) -> Path | None:
        """The checkpoint if it is in the run's own folder: that of a fork, for example, is not."""
        file = self.file
        if self.rewound or file is None or not file.is_ours or file.path.parent.resolve() != self.run.folder.resolve():
            return None
        return file.path if file.path.name in (FINAL, checkpoint_name(self.progress.step)) else None

    @property
    def must_save_first(self) -> bool:
        """Whether the run's folder lacks this checkpoint, so that a restarted worker would resume from another one."""
        in_folder = self.file is None or self.on_disk is not None
        return not in_folder and self.progress.parent.get("step") != self.progress.step


# ---- 1. before anything is changed: read the checkpoint, merge the flags ---------------------------------------------


def plan_attempt(
    typed: dict[str, Any], resolved: Resolved, world: World, attempt: ExitStack, rewound: Rewound | None = None
) -> ResumePoint:
    """Open the checkpoint, merge its flags with the typed ones, and check both. Collective; changes nothing on disk.

    Every rank opens the file by itself; an error of one rank is raised on all. Raises UserError.

    Args:
        typed: the typed flags.
        resolved: the checkpoint or the new run, from `locate.resolve`.
        world: the ranks.
        attempt: closes the file at the end of the attempt.
        rewound: set if the attempt before in this process went back.
    """
    finished, folder = False, None
    with world.raise_together():
        typed = {**typed, "name": resolved.name}
        path = resolved.path or (Path(resolved.init_from) if resolved.init_from else None)
        folder = read_folder(path) if path and not resolved.path and is_folder(path) else None
        file = resolved.file or (attempt.enter_context(open_checkpoint(path)) if path and not folder else None)
        if resolved.path is None or file is None:
            point = _new_run(typed, resolved, folder or file)
        else:
            point = _resume(typed, file, resolved)
        point = _leave_out(point, typed, rewound)
        sizes = families.config_of(point.config.model, point.config.model_flags)
        sizes.require_length(point.config.sequence_length)
        finished = world.is_main and _is_finished(point)
    world.require_equal(families.declared_sources(), "the file of --model")
    if folder is not None:
        world.require_equal(folder.digest(), f"{folder.path}")
    if file is not None:
        _trust_verified(file, world)
    return dataclasses.replace(
        point,
        finished=world.broadcast(finished),
        was_named=resolved.named,
        elastic_ranks_typed="elastic_ranks" in typed,
        findings=note(*resolved.notes) + point.findings,
    )


def _leave_out(point: ResumePoint, typed: dict[str, Any], rewound: Rewound | None) -> ResumePoint:
    """Return the point with all batches that are left out: those of the run, of --skip_batches and of a rewind."""
    config, progress, findings = point.config, point.progress, point.findings
    size = step_tokens(config)
    before = progress.left_out
    skipped = rewound.skipped if rewound else before
    for start, stop in left_out.parse(typed.get("skip_batches", ""), size):
        joined = left_out.union((*skipped, (start, stop)))
        if joined == skipped:
            continue
        if start < progress.tokens:
            names = left_out.describe(((start, stop),), size)
            findings += warn(f"--skip_batches {names} has no effect: the run has trained on them; resume from before")
            continue
        skipped = joined
    progress.skipped = [list(pair) for pair in skipped]
    if rewound:
        progress.rewinds = [list(pair) for pair in rewound.rewinds]
    names = left_out.describe(skipped, size)
    findings += note(f"leaving out batches {names}" if skipped else "") + Findings(same_trajectory=skipped == before)
    config = dataclasses.replace(config, skip_batches=names)
    return dataclasses.replace(point, config=config, findings=findings, rewound=rewound is not None)


def _trust_verified(file: CheckpointFile, world: World) -> None:
    """Require that all ranks opened the same bytes. Those that opened the file that rank 0 has verified trust it."""
    world.require_equal(directory.fingerprint_of(file.path), f"{file.path}")
    file.trust(world.broadcast(file.identity if file.is_verified else None))


def _new_run(typed: dict[str, Any], resolved: Resolved, weights: CheckpointFile | ImportedModel | None) -> ResumePoint:
    if weights is not None:
        if isinstance(weights, ImportedModel):
            model, model_flags = weights.model, weights.flags
        else:
            model, model_flags = legacy.identify_model(weights.values, str(weights.path))
        for name, value in {"model": model, **model_flags}.items():
            if typed.get(name, value) != value:
                shown = value if name == "model" else f"--{name} {value}"
                raise UserError(
                    f"--{name} {typed[name]}: the weights of {resolved.init_from} are those of {shown}; leave it out"
                )
        typed = {**typed, "model": model, **model_flags}
    config = flags.merge(flags.resolve_batch_sizes({**typed, "init_from": resolved.init_from}))
    config = resolve_length(_with_window(config), 0, Progress())
    run = Run(resolved.run_id, config.output_dir)
    findings = warn(*flags.idle_flags(typed, config))
    findings += note(f"new run {run.run_id} in {run.folder}/{_name_suffix(config)}")
    progress = Progress(begun=begun_with(typed))
    entries = resolved.entries
    return ResumePoint(config, run, weights=weights, entries=entries, progress=progress, findings=findings)


def _name_suffix(config: Config) -> str:
    """Return the run's name for the end of a line, if it has one."""
    return f", name {config.name}" if config.name else ""


def _resume(typed: dict[str, Any], file: CheckpointFile, resolved: Resolved) -> ResumePoint:
    saved_args, progress, earlier = _read(file, typed)
    before, run_id = flags.merge({}, saved_args), resolved.run_id
    findings = warn(*_without_effect(typed, saved_args, progress.step))
    typed = flags.resolve_batch_sizes({name: typed[name] for name in typed if name != "init_from"}, saved_args)
    findings += warn(*flags.critical_mismatches(typed, saved_args))
    findings += note(*flags.optimization_changes(typed, before, progress.step))
    run = Run(run_id, "", resolved.folder)
    config, more = _merge_flags(typed, saved_args, run, file)
    config, mixed = _continue_sources(_with_window(config), saved_args, progress)
    config = resolve_length(config, epoch_tokens(file), progress)
    findings += mixed
    findings += more + warn(*flags.idle_flags(typed, config))
    if typed.get("run_id", run_id) != run_id:
        raise UserError(f"--run_id names another run than {file.path}; type --fork to continue it under that id")
    progress.split = resplit(progress.split, before.batch_size, config.batch_size)
    progress.rewarm, extension = schedule.extend_schedule(
        before, config, progress.step, progress.rewarm, _before_warmdown(before, resolved.entries)
    )
    progress.begun = progress.begun or begun_with(saved_args)
    if resolved.fork:
        parent = file.values.get("run_id")
        progress.parent = {"run_id": parent, "step": progress.step, "file": str(file.path), "sha256": resolved.sha256}
        progress.begun = begun_with(dataclasses.asdict(config))
        progress.best = []  # those checkpoints are the parent's
        findings += note(f"forked from run {parent} at step {progress.step}")
    changed = [name for name in flags.FIELDS if name in saved_args and getattr(config, name) != saved_args[name]]
    keeps = SAME_TRAJECTORY_FLAGS.issuperset(_trajectory_flags(changed, config, saved_args))
    findings += (
        note(f"resuming run {run_id} from {file.path} at step {progress.step}{_name_suffix(config)}") + extension
    )
    findings += Findings(same_trajectory=keeps and file.is_ours and not resolved.fork)
    entries = () if resolved.fork else resolved.entries  # its own folder has none yet
    run = dataclasses.replace(run, output_dir=config.output_dir)
    return ResumePoint(config, run, file, None, entries, progress, earlier, findings)


def _with_window(config: Config) -> Config:
    """Return the flags with the length of a window, which a run keeps from the first time that it needs windows."""
    needed = config.shuffle != "off" or sources.parse(config.input_bin) is not None
    return dataclasses.replace(config, window_tokens=needed * (config.window_tokens or config.sequence_length))


def _continue_sources(config: Config, saved_args: dict[str, Any], progress: Progress) -> tuple[Config, Findings]:
    """Return the flags with the past and present weights of the run's sources, and a line if they change."""
    now, text = sources.parse(config.input_bin), str(saved_args.get("input_bin", ""))
    before = sources.parse(text) or sources.Mix.of_one(text)
    if now is None or len(now.globs) < len(before.globs):  # other data: another check reports it
        return config, Findings()
    mix, changes = sources.continue_mix(now, before, progress.tokens, config.window_tokens)
    line = "" if changes is None else f"from position {changes:,} on the sources have other weights: {mix}"
    return dataclasses.replace(config, input_bin=str(mix)), note(line)


def _read(file: CheckpointFile, typed: dict[str, Any]) -> tuple[dict[str, Any], Progress, LegacyCheckpoint | None]:
    """Return the flags and progress in a checkpoint, and the LegacyCheckpoint if another program made it."""
    if not file.is_ours:
        earlier = legacy.read_legacy(file, typed.get("resume_processes", 1))
        history = {} if earlier.best_loss is None else {"best_val_loss": earlier.best_loss}
        progress = Progress(step=earlier.step, history=history)  # open_data works out the place in the data
        return earlier.args, progress, earlier
    step, progress = int(file.values["step"]), Progress.from_checkpoint(file.values["progress"])
    if progress.step != step:
        raise UserError(f"{file.path}: damaged, `step` is {step} but its progress says {progress.step}")
    return dict(file.values["args"]), progress, None


def _merge_flags(
    typed: dict[str, Any], saved_args: dict[str, Any], run: Run, file: CheckpointFile
) -> tuple[Config, Findings]:
    """Return the flags of the attempt: typed, else saved; model and optimizer are always those of the checkpoint."""
    kept = {name for name in KEPT_FLAGS if typed.get(name) == flags.FIELDS[name].default} | {"model", *SETTLED_FLAGS}
    config = flags.merge({name: value for name, value in typed.items() if name not in kept}, saved_args)
    findings = Findings()
    if typed.get("model", config.model) != config.model:
        findings += warn(f"going on with model {config.model}, which the weights belong to")
    if "output_dir" not in typed and config.output_dir:
        has_log = run.log.is_file()  # beside its checkpoints, also where the folder was copied to
        own = "" if has_log else trusted_output_dir(config.output_dir, run.run_id)
        if own != config.output_dir and not has_log:
            findings += warn("the log goes into the run's folder; type --output_dir to write it to another one")
        config = dataclasses.replace(config, output_dir=own)
    if config.optimizer != saved_args.get("optimizer", "adamw"):
        raise UserError(
            f"--optimizer {config.optimizer}: {file.path} holds the state of another optimizer; leave the flag out, or"
            f" start a new run from its weights with --init_from {file.path}"
        )
    return config, findings


def _without_effect(typed: dict[str, Any], saved_args: dict[str, Any], step: int) -> list[str]:
    """Return a warning for each typed flag that cannot change a run that has begun."""
    lines = []
    for name, why in {**SETTLED_FLAGS, "init_from": SETTLED_FLAGS["seed"]}.items():
        saved = saved_args.get(name, flags.FIELDS[name].default)
        value = typed.get(name, saved)
        if value != saved and not (name == "init_from" and same_weights(str(value), str(saved))):
            lines.append(f"--{name} {value} has no effect: {why}; {name} stays {saved or 'empty'}")
    for name in KEPT_FLAGS:
        default = flags.FIELDS[name].default
        if typed.get(name) == default != saved_args.get(name, default):
            lines.append(f"--{name} {default} has no effect: the run keeps {saved_args[name]}")
    if 0 < typed.get("trace_steps", 0) <= step:
        lines.append(f"--trace_steps {typed['trace_steps']} has no effect: the run is at step {step} already")
    return lines


def _before_warmdown(config: Config, entries: Sequence[CheckpointEntry]) -> str:
    """Return the newest periodic checkpoint from before the warmdown; "" if there is none."""
    last = schedule.warmdown_start(config)
    kept = [entry.path for entry in entries if not entry.final and (entry.step or 0) <= last]
    return str(kept[-1]) if kept else ""


def _trajectory_flags(changed: list[str], config: Config, saved: dict[str, Any]) -> list[str]:
    """Return the changed flags that change what a step computes. Without a warmdown num_iterations does not."""
    no_warmdown = config.warmdown_iters == 0 and saved.get("warmdown_iters", 0) == 0
    return [name for name in changed if not (name == "num_iterations" and no_warmdown)]


def _is_finished(point: ResumePoint) -> bool:
    """Return whether the run has ended at its last step, with a whole `final.pt`."""
    step = point.progress.step
    if point.file is None or step < point.config.num_iterations:
        return False
    return step == directory.finished_step(point.entries, point.file)


def say_finished(point: ResumePoint, notes: Sequence[str], world: World) -> int:
    """Print that the checkpoint is already at the last step, after the `notes` of the search. Return the exit code."""
    if world.is_main:
        with suppress(OSError, UserError):  # the attempt that wrote `final.pt` may have been killed before it did this
            rewind.sync_names(point.run.folder)
            directory.clear_debris(point.run.folder)
            for text in (point.run.log, journal_of(point.run.log)):
                if text.is_file():
                    AppendFile(text).close()  # closes a torn line
        for line in (*(f"WARNING: {line}" for line in point.findings.warnings), *notes):
            console.print_line(line)
        unnamed = _link_name(point)
        if unnamed:
            console.print_line(f"WARNING: {unnamed}")
        ending.print_results(point.run, point.config, point.progress.step)
        console.print_line(
            f"nothing to do: run {point.run.run_id} is at step {point.progress.step} of --num_iterations"
            f" {point.config.num_iterations}{_name_suffix(point.config)}; type a larger --num_iterations to train on"
        )
    return 0


# ---- 2. checks of what the attempt needs -----------------------------------------------------------------------------


def prepare_folder(point: ResumePoint, world: World) -> None:
    """Make the run's folders, and remove what a killed attempt left unfinished. Collective; the run is locked."""
    with world.raise_together():
        if world.is_main:
            point.run.create()
            directory.clear_debris(point.run.folder)


def open_data(
    point: ResumePoint, config: Config, world: World
) -> tuple[Config, TokenStream, Stream | None, dict[str, Any], Findings]:
    """Open the training and validation data; those of a resumed run must be unchanged. Collective.

    Args:
        point: what the attempt starts from.
        config: the flags.
        world: the ranks.

    Returns:
        The flags with the globs resolved, the training and the validation stream, the identity of the data, and
        findings about changes.
    """
    with world.raise_together():
        patterns = prepare.resolve_patterns(config.input_bin, config.input_val_bin) if world.is_main else None
    train_bin, val_bin = world.broadcast(patterns)
    config = dataclasses.replace(config, input_bin=train_bin, input_val_bin=val_bin)
    with world.raise_together():
        if config.val_loss_every and not config.input_val_bin:
            raise UserError(f"--val_loss_every needs --input_val_bin beside --input_bin {config.input_bin}")
        vocab_size = families.config_of(config.model).vocab_size
        seed, window = None if config.shuffle == "off" else int(config.shuffle), config.window_tokens
        stream = open_tokens(config.input_bin, vocab_size=vocab_size, seed=seed, window=window)
        val_stream = None
        if config.val_loss_every:
            val_stream = Stream.open(config.input_val_bin, vocab_size=vocab_size, flag="--input_val_bin")
        stream, changes = _check_data(point, stream)
        for source in sources_of(stream):
            if seed is not None and source.num_tokens < 2 * window:
                changes += warn(
                    f"--shuffle {seed} has no effect: {source.num_tokens:,} tokens are less than two windows of"
                    f" {window:,} (--window_tokens)"
                )
        stream = dataclasses.replace(stream, skipped=point.progress.left_out)
        if point.legacy is not None:
            if not isinstance(stream, Stream):
                raise UserError(
                    f"{point.legacy.path} is a checkpoint of the earlier program, which read one glob: resume it with"
                    " that first, and type several sources when it has saved"
                )
            point.progress.tokens, assumed = legacy.data_position(point.legacy, stream)
            changes += warn(assumed)
        if not point.saved:
            config = resolve_length(config, stream.num_tokens, point.progress)
        if point.file is None:
            changes += schedule.check_overlap(config)
        identity, saved_val = stream.identity(), point.saved_dict("data").get("validation")
        if val_stream is not None:
            identity["validation"] = val_stream.identity()
            changes += _check_validation(point, saved_val, identity["validation"])
        elif saved_val is not None:
            identity["validation"] = saved_val
    world.require_equal(identity, "the data")
    return config, stream, val_stream, identity, changes


def _check_data(point: ResumePoint, stream: TokenStream) -> tuple[TokenStream, Findings]:
    """Compare the data with those of the checkpoint, down to the next batch; return the stream that the run reads.

    Raises UserError if they differ, unless `--allow_data_change` is typed. Shards that were added are no difference.
    """
    saved, position, proof = point.saved_dict("data"), point.progress.tokens, point.progress.next_batch
    if not saved:
        return stream, Findings()
    identity = stream.identity()
    if has_all(saved, identity):
        before = str(point.saved_dict("args").get("input_bin", ""))
        continued, known, joins = continue_tokens(stream, saved, position, before)
        if not proof or batch_hash(known, position, _step_tokens(point)) == proof.get("sha256"):
            return continued, _describe_new(joins, several=isinstance(stream, Mixture))
        changes = [f"the tokens at position {position:,} are not those the checkpoint expects"]
    else:
        changes = compare_identity(saved, identity)
    line = _describe_changes(point, "training", changes)
    shard, offset = stream.locate(position)
    going_on = f"position {position:,} goes on at token {offset:,} of {shard.path.name}, tokens may come twice or never"
    return stream, Findings((f"{line}; {going_on}",), same_trajectory=False)


def _describe_new(joins: dict[str, int], several: bool) -> Findings:
    """Return the line about new shards; `joins` has the position in its source at which each of them joins."""
    if not joins:
        return Findings()
    new, at = list(joins), sorted(set(joins.values()))
    shown = ", ".join(repr(name) for name in new[:3]) + (f" and {len(new) - 3} more" if len(new) > 3 else "")
    line = (
        f"new shards of training data: {shown}; they join at the end of the epoch{' of their source' * several}, at"
        f" position {', '.join(f'{each:,}' for each in at)}: no token is repeated or skipped"
    )
    return Findings((line,), same_trajectory=False)


def _check_validation(point: ResumePoint, saved: object, identity: dict[str, Any]) -> Findings:
    """Compare the validation data with those of the checkpoint; older checkpoints have no record. Raises UserError."""
    changes = compare_identity(saved, identity) if isinstance(saved, dict) else []
    if not isinstance(saved, dict) or not changes:
        return Findings()
    line = _describe_changes(point, "validation", changes, allowed=has_all(saved, identity))
    return Findings((f"{line}; its losses are not those of before",), same_trajectory=False)


def _describe_changes(point: ResumePoint, kind: str, changes: list[str], allowed: bool = False) -> str:
    """Return a line about changes of the data. Raises UserError unless they are allowed, here or by the flag."""
    shown = "; ".join(changes[:3]) + (f"; and {len(changes) - 3} more" if len(changes) > 3 else "")
    if not allowed and not point.config.allow_data_change:
        raise UserError(f"the {kind} data changed: {shown}; restore it, or type --allow_data_change to go on with it")
    return f"the {kind} data changed: {shown}"


def _step_tokens(point: ResumePoint) -> int:
    """Return the tokens of a step, which the checkpoint holds twice. Raises UserError if the two differ."""
    count, saved = point.progress.next_batch.get("tokens"), point.saved_dict("args")
    sizes = [saved.get(name) for name in ("batch_size", "grad_accumulation_steps", "sequence_length")]
    whole = [size for size in sizes if type(size) is int]
    if type(count) is not int or len(whole) < len(sizes) or count != math.prod(whole):
        raise UserError("the checkpoint's progress is damaged: next_batch is not as long as a step")
    return count


def divide_step(point: ResumePoint, config: Config, world: World) -> StepPlan:
    """Return which rank computes which microbatches of a step; a resumed run keeps its split."""
    sizes = (config.batch_size, config.grad_accumulation_steps, world.size, config.elastic_ranks)
    return plan_step(*sizes, min_split=point.progress.split, elastic_ranks_typed=point.elastic_ranks_typed)


def check_plan(point: ResumePoint, plan: StepPlan, world: World) -> Findings:
    """Return whether this division of a step adds in the same order as that of the checkpoint."""
    before = point.saved_dict("environment").get("world_size", world.size)
    config, split, same = point.config, point.progress.split, True
    if type(before) is not int or before < 1:  # untrusted
        same = False
    elif before != world.size:
        sizes = (config.batch_size, config.grad_accumulation_steps, before, config.elastic_ranks)
        try:
            same = plan_step(*sizes, min_split=split).exact and plan.exact
        except UserError:
            same = False
    ranks, order = point.saved_dict("args").get("elastic_ranks"), ""
    if type(ranks) is int and ranks > 0 and num_leaves(plan.num_microbatches, ranks) != plan.leaves:
        order = f"--elastic_ranks {config.elastic_ranks}, it was {ranks}: bits may differ from here"
    same = same and not order and (point.file is None or plan.split == split)
    return warn(order) + note(*plan.notes) + Findings(same_trajectory=same)


def check_drift(point: ResumePoint, state: RunState) -> Findings:
    """Return a warning for each difference of machine or source code that may change bits."""
    if not point.saved:
        return Findings()
    environment = environment_drift(point.saved_dict("environment"), state.environment)
    return warn(
        *environment, *sources_drift(point.saved_dict("sources"), state.sources, point.saved.get("code"), state.code)
    )


def restore(state: RunState, point: ResumePoint, world: World) -> None:
    """Fill the live state from the checkpoint, or the weights of a new run from --init_from. Collective.

    Raises UserError for damage, which only checksums show.
    """
    with world.raise_together():
        if point.weights is not None:
            state.restore_weights(point.weights)
        if point.file is None:
            return
        try:
            with world.phases.inside(RESTORE, str(point.file.path)):
                state.restore(point.file)
        except UserError as error:  # on all ranks
            raise UserError(f"{error}{newest_beside(point.file.path) if world.is_main else ''}") from None
    # A save may come before the next update: the rate is part of the optimizer's state. Step 0 has none yet.
    if state.progress.step:
        rate = schedule.rate_at(state.progress.step, Config(**state.args), state.progress.rewarm)
        set_learning_rate(state.optimizer, rate)


def describe_attempt(
    point: ResumePoint,
    config: Config,
    model: LanguageModel,
    stream: TokenStream,
    environment: dict[str, Any],
    world: World,
) -> Findings:
    """Return the lines at the start: which run, what is trained on how much data, and on what machine.

    Args:
        point: what the attempt starts from.
        config: the flags, with all values resolved.
        model: the model.
        stream: the training data.
        environment: that of the attempt's checkpoints.
        world: the ranks.
    """
    sizes = f"{config.batch_size} x {config.grad_accumulation_steps} x {config.sequence_length}"
    compiled = "compiled" if environment["compile"] else "not compiled"
    return warn(missing_gpu(config.device, world.device)) + note(
        f"run {point.run.run_id}, folder {point.run.folder.absolute()}{_name_suffix(config)}",
        f"model {config.model}: {model.num_parameters():,} parameters; {config.step_tokens:,} tokens a step ({sizes}),"
        f" {format_count(config.num_iterations, 'step')}",
        _describe_data(config, stream),
        describe_length(config, stream.num_tokens, point.progress, point.saved_dict("args").get("num_iterations")),
        f"device {environment['device']}: {environment['dtype']}, {compiled}; processes: {world.size},"
        f" threads of each: {environment['threads']}",
    )


def _describe_data(config: Config, stream: TokenStream) -> str:
    """Return the line about the data: tokens, weights, order, and the epochs of each source in the whole run."""
    total = config.num_iterations * config.step_tokens
    if isinstance(stream, Stream):
        line = f"data {config.input_bin}: {_describe_source(stream, total)}"
    else:
        each = zip(stream.mix.globs, stream.sources, stream.consumed(total), strict=True)
        line = "data " + "; ".join(
            f"{glob}, weight {stream.mix.weights_of(index)}: {_describe_source(source, taken)}"
            for index, (glob, source, taken) in enumerate(each)
        )
    if not config.window_tokens:
        return line
    order = "in turns" if config.shuffle == "off" else f"in the order of seed {config.shuffle}"
    return f"{line}; windows of {config.window_tokens:,} tokens {order}"


def _describe_source(stream: Stream, taken: int) -> str:
    shards = format_count(len(stream.shards), "shard")
    return f"{stream.num_tokens:,} tokens in {shards}; {format_count(taken / stream.num_tokens, 'epoch')}"


# ---- 3. the attempt will train ---------------------------------------------------------------------------------------


def open_logger(point: ResumePoint, state: RunState, findings: Findings, world: World) -> RunLogger:
    """Open the log, the journal, the console and the trackers of this attempt. Collective.

    Args:
        point: what the attempt starts from.
        state: the restored state.
        findings: those of all checks: whether repeated steps are compared.
        world: the ranks.
    """
    progress, config = point.progress, Config(**state.args)
    begins_here = not point.saved or progress.parent.get("step") == progress.step
    header = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "from": str(point.file.path) if point.file else "scratch",
        "step": str(progress.step),
        "host": hostname(),
        "processes": str(world.size),
        "git": git_commit(),
        **({"skipped": config.skip_batches} if config.skip_batches else {}),
        **({"sources": config.input_bin} if sources.parse(config.input_bin) else {}),
        **({"parent": f"{progress.parent['run_id']}@{progress.parent['step']}"} if progress.parent else {}),
    }
    with world.raise_together():
        unnamed = _link_name(point) if world.is_main else ""
        logger = RunLogger(
            config=config,
            run=point.run,
            start_step=progress.step,
            saved=progress.history,
            world=world,
            compare=findings.same_trajectory,
            header=header,
            environment=state.environment,
            begins_here=begins_here,
        )
    if unnamed:
        logger.warn(unnamed)
    return logger


def _link_name(point: ResumePoint) -> str:
    """Make the link of the run's name. Return a warning if that fails. Raises UserError if another run has the name."""
    try:
        if point.config.name:  # also if it has its link: the attempt that made it may not have synced it
            give_name(point.config.name, point.run.folder)
    except OSError as error:
        where = error.filename or logs_dir() / BY_NAME
        return f"--name {point.config.name} has no link in by-name: cannot write {where}: {error.strerror}"
    return ""


def start_attempt(
    point: ResumePoint,
    config: Config,
    plan: StepPlan,
    agents: list[Any],
    findings: Findings,
    logger: RunLogger,
    world: World,
) -> None:
    """Set newer checkpoints aside, write the run's files, and print all findings. Collective.

    Every check has passed: this is the first change to what the run has.

    Args:
        point: what the attempt starts from.
        config: the flags, with all values resolved.
        plan: the division of a step.
        agents: the torchrun agents of all ranks.
        findings: those of all checks.
        logger: prints them.
        world: the ranks.
    """
    with world.raise_together():
        if world.is_main:
            try:
                findings += _set_aside_newer(point, findings)
                saves_anew = point.progress.step if point.must_save_first else None
                findings += warn(link_best(point.run.folder, point.progress, config.keep_best, saves_anew))
                restarts.record_agents(point.run.folder, agents)
                rewind.sync_names(point.run.folder)
            except OSError as error:
                raise UserError(f"cannot write into the folder {point.run.folder}: {error.strerror}") from None
            elastic = point.elastic_ranks_typed or is_elastic(plan, config.elastic_ranks)
            findings += _save_config(point.run.folder, flags.dump_yaml(config, point.run.folder, elastic))
    point.progress.best = world.broadcast(point.progress.best)
    for line in findings.warnings:
        logger.warn(line)
    if logger.log_lacks:
        logger.warn(
            f"{point.run.log} lacks the losses from step {logger.log_lacks}: the log was lost, or --output_dir was"
            " different"
        )
    for line in findings.notes:
        logger.note(line)


def _set_aside_newer(point: ResumePoint, findings: Findings) -> Findings:
    """Set aside the checkpoints that this attempt will write again, and remember the rewind. Raises OSError."""
    newer, warnings, step = _newer_checkpoints(point), Findings(), point.progress.step
    if newer or point.rewound or not findings.same_trajectory:  # else the same weights are written again
        weights = directory.list_weights(point.run.folder)
        newer += [entry.path for entry in weights if entry.step is not None and entry.step > step]
    if newer:
        names = ", ".join(path.name for path in newer)
        folder = rewind.set_aside(point.run.folder, newer)
        warnings = warn(f"going back to step {step}: {names} overtaken, kept in {folder}")
    if point.file is not None and (newer or point.was_named or not findings.same_trajectory):
        # After the moves: a kill between them must leave no record that withdraws the storage's copies.
        rewind.record_rewind(point.run.folder, max(0, _last_kept(point) - point.rewound))
    if point.file is not None and step < point.config.num_iterations:
        # The run gets another end: the present final.pt must not be lost when that is written.
        rewind.keep_final_as_periodic(point.run.folder, step)
    return warnings


def _last_kept(point: ResumePoint) -> int:
    """Return the step up to which checkpoints stay; that of `file` itself goes if the attempt saves it again."""
    saves_anew = point.must_save_first and point.saved and not point.rewound  # then it is replaced by one rename
    return point.progress.step - 1 if saves_anew else point.progress.step


def _newer_checkpoints(point: ResumePoint) -> list[Path]:
    """Return the run's checkpoints that are newer than the one resumed from.

    The earlier program counted steps from 0: the step of a file that it named is one higher.
    """
    file = point.file
    theirs = file.path.name if file is not None and not file.is_ours else ""
    return [
        entry.path
        for entry in point.entries
        if (2**62 if entry.step is None else entry.step) + bool(theirs and not entry.final) > _last_kept(point)
        and entry.path.name != theirs
    ]


def _save_config(folder: Path, text: str) -> Findings:
    """Write `config.yaml`, whole or not at all; a run can do without it."""
    try:
        disk.replace(folder / ".config.yaml.tmp", folder / "config.yaml", text.encode())
    except OSError as error:
        return warn(f"{folder / 'config.yaml'} could not be written: {error.strerror}")
    return Findings()
