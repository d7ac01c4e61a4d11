"""Find what the user names: a checkpoint file, a run, a folder, `latest`, `best`, `auto`, or one in object storage.

Only `parse` interprets what the user types. Training calls `resolve`, the mirror `parse`, the tools `find_run_folder`,
`open_newest` and `find_logs`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unbroken.checkpoint import directory, rewind
from unbroken.checkpoint.format.schema import BEST, FINAL, checkpoint_name, checkpoint_step, dict_at
from unbroken.config import TRAINED, load_yaml
from unbroken.errors import UserError
from unbroken.paths import (
    JOURNAL,
    RUN_ID_PREFIX,
    is_name,
    is_run_id,
    journal_of,
    logs_dir,
    name_of,
    name_taken,
    named_folder,
    new_run_id,
    with_logs_dir,
)
from unbroken.run.experiment import Experiment, differences
from unbroken.run.lock import LOCK, RunLocks
from unbroken.run.restarts import find_interrupted_run
from unbroken.text import printable

if TYPE_CHECKING:
    from unbroken.checkpoint.directory import CheckpointEntry
    from unbroken.checkpoint.reader import CheckpointFile
    from unbroken.distributed.world import World

LATEST, BEST_OF, AUTO = "latest", "best", "auto"
CHECKPOINT_HELP = (
    "a checkpoint file, or RUN for its newest checkpoint: a run_id or its beginning, a name or a folder; RUN/best: its"
    " best one; latest, best: those of the run that saved last"
)
LOG_HELP = "runs (run_ids, names or folders) or log files (default: the run that wrote last)"


# ---- what the user types ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """The target that a user's text names.

    `kind` is "auto", "latest", "run" (`run_id` and its folder `path`), "folder" (of an unknown run), "file" (any other
    path, also that of a best checkpoint), or "url": runs below `url`, one run if `run_id` is set, one checkpoint if
    `name` is set.
    """

    text: str
    kind: str
    path: Path = Path()
    run_id: str = ""
    url: str = ""
    name: str = ""


def parse(text: str) -> Target:
    """Return what `text` names.

    Raises UserError for a prefix of several run_ids, for a URL that names nothing, and for the best of a run without
    one.
    """
    if "://" in text:
        return _parse_url(text)
    if text in (AUTO, LATEST):
        return Target(text, text)
    run_id = complete_run_id(text)
    named = None if os.path.lexists(text) else named_folder(text)
    if run_id and named is None:
        return Target(text, "run", _folder_of_run(run_id), run_id)
    path = named or Path(text)
    if path.name == BEST_OF and not os.path.lexists(path):
        return Target(text, "file", _resolve_best(text))
    if path.name == BEST and os.path.islink(path):
        return Target(text, "file", directory.find_best(path.parent) or path)
    if not os.path.isdir(path):  # the method of Path raises for a name that is too long
        return Target(text, "file", path)
    run_id = run_id_of(path)
    if not run_id:
        return Target(text, "folder", path)
    usual = logs_dir() / run_id
    return Target(text, "run", usual if os.path.realpath(path) == os.path.realpath(usual) else path, run_id)


def _resolve_best(text: str) -> Path:
    """Return the checkpoint that `best` or `RUN/best` names. Raises UserError."""
    run = text.rpartition("/")[0]
    folder = find_run_folder(run or LATEST)
    if folder is None:
        raise UserError(
            f"{printable(text)}: there is no run {printable(run)}; type a run_id or the folder logs/<run_id>"
        )
    best = directory.find_best(folder)
    if best is None:
        raise UserError(
            f"{printable(text)}: {printable(folder, 4096)} has no best checkpoint; train with --keep_best 1 and"
            " --val_loss_every"
        )
    return best


def complete_run_id(text: str) -> str:
    """Return the run_id that `text` is, names, or is the beginning of (of one run only); "" for any other text."""
    if is_run_id(text):
        return text
    if os.path.lexists(text):
        return ""
    if RUN_ID_PREFIX.fullmatch(text) is None:
        named = named_folder(text)
        return run_id_of(named) if named else ""
    matches = [run_id for run_id in map(run_id_of, directory.list_runs(logs_dir())) if run_id.startswith(text)]
    if len(matches) > 1:
        raise UserError(f"{text}: {len(matches)} runs under {logs_dir()}/ begin with it; type more of the run_id")
    return matches[0] if matches else ""


def _folder_of_run(run_id: str) -> Path:
    """Return the folder of a run: logs/<run_id>, unless that is missing and another folder in logs/ holds the run."""
    usual = logs_dir() / run_id
    if os.path.isdir(usual):
        return usual
    return next((folder for folder in directory.list_runs(logs_dir()) if run_id_of(folder) == run_id), usual)


def run_id_of(folder: Path) -> str:
    """Return the run_id of the run in a folder: its name, that of the folder it links to, or that of a log in it.

    A folder may be renamed or copied; its log keeps its name. "" if nothing tells.
    """
    named = next((name for name in (folder.name, folder.resolve().name) if is_run_id(name)), "")
    if named:
        return named
    logs = directory.entry_names(folder, lambda entry: entry.name.endswith((".log", JOURNAL)))
    stems = {name.removesuffix(JOURNAL).removesuffix(".log") for name in logs}
    found = [stem for stem in stems if is_run_id(stem)]
    return found[0] if len(found) == 1 else ""


def _parse_url(text: str) -> Target:
    url, _, last = text.rstrip("/").rpartition("/")
    parent, _, run_id = url.rpartition("/")
    if last == BEST_OF and is_run_id(run_id):
        return Target(text, "url", url=parent, run_id=run_id, name=BEST)
    if last in (AUTO, LATEST):
        return Target(text, "url", url=parent, run_id=run_id) if is_run_id(run_id) else Target(text, "url", url=url)
    if is_run_id(last):
        return Target(text, "url", url=url, run_id=last)
    if is_run_id(run_id) and (last == FINAL or checkpoint_step(last) is not None):
        return Target(text, "url", url=parent, run_id=run_id, name=last)
    raise UserError(
        f"--resume_from {printable(text)}: below the URL of --mirror it must end in /latest, /<run_id>,"
        " /<run_id>/best or /<run_id>/model_step000256.pt"
    )


# ---- for training: which checkpoint, which run -----------------------------------------------------------------------


@dataclass(frozen=True)
class Resolved:
    """The answer of `resolve`: the checkpoint `path` of a run, or a new run if that is None.

    `run_id` and `folder` are those of the run that is trained, whose lock rank 0 holds. `entries`: the checkpoints of
    the run that `path` belongs to. `named`: the user named the checkpoint itself, not its run. `sha256`: of a forked
    checkpoint. `init_from`: the file whose weights a new run starts with. `notes`: lines for the user. `file`: on rank
    0 what `path` or `init_from` names, open, and verified if it was searched for. `name`: that of the run, "" for none.
    """

    run_id: str
    folder: Path
    path: Path | None = None
    entries: tuple[CheckpointEntry, ...] = ()
    named: bool = False
    fork: bool = False
    sha256: str = ""
    init_from: str = ""
    notes: tuple[str, ...] = ()
    file: CheckpointFile | None = field(default=None, compare=False)
    name: str = ""


@dataclass(frozen=True)
class SearchResult:
    """The result of a search: an open checkpoint, the checkpoints of its run, and lines for the user.

    `begun_id`: if there is no checkpoint, the run that the same command began and that has not saved yet.
    """

    file: CheckpointFile | None = None
    entries: tuple[CheckpointEntry, ...] = ()
    notes: tuple[str, ...] = ()
    begun_id: str = ""


def resolve(typed: dict[str, Any], agents: list[Any], locks: RunLocks, world: World, attempt: ExitStack) -> Resolved:
    """Return what `--resume_from`, `--run_id`, `--fork` and `--init_from` name together. Collective.

    Rank 0 searches, the other ranks get its answer. The run that is to be trained is locked before its folder is read,
    because another attempt may still be saving its last step. Raises UserError.

    Args:
        typed: the typed flags.
        agents: the torchrun agents of all ranks: a restarted worker continues its own run.
        locks: takes the lock of the run, for as long as the attempt lives.
        world: the ranks.
        attempt: closes the file on rank 0 at the end of the attempt.
    """
    found = None
    with world.raise_together():
        if world.is_main:
            found = _add_name(_resolve(typed, agents, locks), typed)
            if found.file is not None:
                attempt.enter_context(found.file)
    shared: Resolved = world.broadcast(found and replace(found, file=None))
    return found or shared


def _resolve(typed: dict[str, Any], agents: list[Any], locks: RunLocks) -> Resolved:
    text, fork = typed.get("resume_from", ""), bool(typed.get("fork"))
    own = find_interrupted_run(agents, Path(text))
    if own is not None:
        found, own_id = _open_newest_of(own, locks, typed), run_id_of(own)
        notes = (*found.notes, f"restarted by torchrun: continuing run {own_id}")
        if found.file is not None:
            return Resolved(own_id, own, found.file.path, found.entries, notes=notes, file=found.file)
        if text in ("", LATEST, AUTO) and not fork:  # by now the newest of all may be another run
            return _plan_new_run(typed, own_id, locks, notes)
    new_id = own_id if own is not None else new_run_id(typed.get("run_id", ""))
    if not text:
        return _plan_new_run(typed, new_id, locks)
    target = parse(text)
    found = _search(target, typed, None if fork else locks)
    if found.file is None:
        if text != AUTO:
            where = f"under {logs_dir()}/" if target.kind == LATEST else f"in {target.path}"
            text = printable(text, 4096)
            raise UserError(f"--resume_from {text}: there is no whole checkpoint {where}; {_listing()}")
        return _plan_new_run(typed, found.begun_id or new_id, locks, found.notes)
    file, named = found.file, target.kind == "file"
    if fork:
        _claim_new(new_id, locks)
        folder, run_id, sha256 = logs_dir() / new_id, new_id, file.sha256()
    else:
        run_id = _run_id_in(file) or new_id
        folder, sha256 = _run_folder_of(file.path, run_id), ""
    return Resolved(run_id, folder, file.path, found.entries, named, fork, sha256, "", found.notes, file)


def _add_name(found: Resolved, typed: dict[str, Any]) -> Resolved:
    """Return `found` with the run's typed or present name. Raises UserError if another run has the typed name.

    A folder that was moved or downloaded has no link: its run keeps the name in its checkpoint, unless another run here
    has this name now.
    """
    name = typed.get("name", "")
    saved = "" if found.file is None or found.fork or found.path is None else _saved_name(found.file.values)
    name = name or name_of(found.folder) or saved
    owner = named_folder(name)
    if owner is None or os.path.realpath(found.folder) == str(owner):
        return replace(found, name=name)
    if typed.get("name"):
        raise name_taken(name, owner)
    said = f"the name {name} belongs to run {owner.name} here; type --name to give this run another one"
    return replace(found, notes=(*found.notes, said))


def _saved_name(values: Mapping[str, Any]) -> str:
    """Return the name that the run of a checkpoint had when it was saved. Untrusted."""
    name = dict_at(values, "args").get("name", "")
    return name if isinstance(name, str) and is_name(name) else ""


def _plan_new_run(typed: dict[str, Any], run_id: str, locks: RunLocks, notes: tuple[str, ...] = ()) -> Resolved:
    """Return a new run, locked, with the open file of `--init_from`."""
    entries = _claim_new(run_id, locks)
    init_from, file = _open_init_from(typed, run_id)
    return Resolved(run_id, logs_dir() / run_id, entries=entries, init_from=init_from, notes=notes, file=file)


def _claim_new(run_id: str, locks: RunLocks) -> tuple[CheckpointEntry, ...]:
    """Lock a new run, and return the damaged checkpoints in its folder. Raises UserError if it has a whole one."""
    locks.take(logs_dir() / run_id)
    entries = directory.list_checkpoints(logs_dir() / run_id)
    file, _ = directory.open_newest_whole(entries)
    if file is not None:
        file.close()
        go_on = with_logs_dir(f"--resume_from {run_id}")
        raise UserError(f"run {run_id} exists already; continue it with {go_on}")
    return tuple(entries)


def _search(target: Target, typed: dict[str, Any], locks: RunLocks | None) -> SearchResult:
    """Return the checkpoint that `target` names, verified if it was searched for. Without `locks` lock nothing."""
    if target.kind == "file":
        return _open_named(target, locks)
    if target.kind == LATEST:
        return _open_first(directory.runs_by_last_save(logs_dir()), typed, locks)
    run_id = target.run_id or (typed.get("run_id", "") if target.kind == AUTO else "")
    if target.kind == AUTO and not run_id:
        if typed.get("fork"):
            return _open_first(directory.runs_by_last_save(logs_dir()), typed, locks)
        return _open_begun_with(typed, locks)
    folder = _folder_of_run(run_id) if target.kind == AUTO else target.path
    found = _open_newest_of(folder, locks if run_id else None, typed)
    inside = _run_id_in(found.file) if found.file else ""
    if not found.file or locks is None or inside in ("", run_id):
        return found
    if not run_id:
        return _lock_and_list(found.file, inside, locks)
    raise UserError(
        f"{found.file.path} is a checkpoint of run {inside}: type its path after --resume_from to"
        " continue that run, and --fork beside it for a run of its own"
    )


def _run_id_in(file: CheckpointFile) -> str:
    """Return the run_id in a checkpoint; "" if the earlier program wrote none."""
    run_id = file.values.get("run_id")
    return run_id if isinstance(run_id, str) and is_run_id(run_id) else ""


def _open_named(target: Target, locks: RunLocks | None) -> SearchResult:
    """Open the checkpoint file that the user named, and lock its run before reading its folder."""
    is_prefix = RUN_ID_PREFIX.fullmatch(target.text) is not None
    if not os.path.lexists(target.path) and (is_prefix or is_name(target.text)):
        runs = f"no run under {logs_dir()}/ {'begins with it' if is_prefix else 'has it'}"
        raise UserError(f"--resume_from {target.text}: no file has this name, and {runs}; {_listing()}")
    file = open_checkpoint(target.path)
    if file.is_weights_only:
        file.close()
        raise UserError(_weights_only(file))
    run_id = _run_id_in(file)
    if run_id and locks is not None:
        return _lock_and_list(file, run_id, locks)
    return SearchResult(file, tuple(directory.list_checkpoints(_run_folder_of(file.path, run_id))))


def _weights_only(file: CheckpointFile) -> str:
    """Return the error for a file of weights alone, with the nearest checkpoint that can be resumed."""
    step = int(file.values["step"])
    entries = directory.list_checkpoints(_run_folder_of(file.path, _run_id_in(file)))
    full = [entry for entry in entries if entry.step is not None and directory.find_damage(entry.path) is None]
    nearest = min(full, key=lambda entry: abs((entry.step or 0) - step), default=None)
    there = f"the nearest full checkpoint is {nearest.path}" if nearest else "the run has no full checkpoint"
    return (
        f"{file.path}: {directory.WEIGHTS_ONLY}, so it cannot be resumed; {there}; --init_from {file.path} starts a new"
        " run from the weights"
    )


def _lock_and_list(file: CheckpointFile, run_id: str, locks: RunLocks) -> SearchResult:
    """Lock the run of an open checkpoint, then list it."""
    folder = _run_folder_of(file.path, run_id)
    locks.take(folder)
    if not file.is_in_place:
        raise UserError(f"{file.path} was removed or replaced by another process just now; start again")
    return SearchResult(file, tuple(directory.list_checkpoints(folder)))


def _run_folder_of(path: Path, run_id: str) -> Path:
    """Return the folder of a checkpoint's run: the folder that it is in, if that is a run's, else logs/<run_id>."""
    folder = path.parent.parent if rewind.is_aside(path.parent.name) else path.parent
    marks = (LOCK, "config.yaml", f"{run_id}.log", f"{run_id}{JOURNAL}")
    of_this_run = folder.name == run_id or any((folder / mark).is_file() for mark in marks)
    of_another_run = is_run_id(folder.name) and folder.name != run_id
    usual = logs_dir() / run_id
    if not run_id:
        return folder
    return folder if of_this_run and not of_another_run and folder.resolve() != usual.resolve() else usual


def _open_newest_of(folder: Path, locks: RunLocks | None, typed: dict[str, Any]) -> SearchResult:
    """Open the newest whole checkpoint of a folder; the notes name the damaged ones that were passed over.

    Raises UserError if the only checkpoint must not be read: otherwise the run would begin again over it.
    """
    if locks is not None and _was_begun(folder):
        locks.take(folder)
    from unbroken.run.length import typed_length  # imports torch, which finding a folder does not need

    entries = directory.list_checkpoints(folder)
    file, damaged = directory.open_newest_whole(entries, lambda file: typed_length(typed, file))
    if file is None and locks is not None:
        locks.give_back(folder)
    refused = [f"{path}: {why}" for path, why in damaged if file is None and not os.access(path, os.R_OK)]
    if refused:
        raise UserError(refused[0])
    return SearchResult(file, tuple(entries), tuple(f"passing over {path}: {why}" for path, why in damaged))


def _was_begun(folder: Path) -> bool:
    """Return whether a folder has checkpoints, or at least a lock, whose holder may be about to save the first one."""
    return directory.has_checkpoints(folder) or directory.is_regular(folder / LOCK)


def _open_first(folders: Sequence[Path], typed: dict[str, Any], locks: RunLocks | None) -> SearchResult:
    """Open the newest whole checkpoint of the first run that has one."""
    notes: tuple[str, ...] = ()
    for folder in folders:
        found = _open_newest_of(folder, locks, typed)
        notes += found.notes
        if found.file is not None:
            return replace(found, notes=notes)
    return SearchResult(notes=notes)


# ---- auto: the run that this command began ---------------------------------------------------------------------------


def _open_begun_with(typed: dict[str, Any], locks: RunLocks | None) -> SearchResult:
    """Open the newest whole checkpoint of the newest run that was begun with the typed flags.

    A command without a flag that decides what is trained takes the newest run of all if it has begun none itself. With
    a name, only the run of that name is considered, and the command must have begun it.
    """
    differing, name = compare_runs(typed), typed.get("name", "")
    owner = named_folder(name)
    if owner is not None:
        differing = {folder: flags for folder, flags in differing.items() if os.path.realpath(folder) == str(owner)}
    same = [folder for folder, flags in differing.items() if not flags]
    found = _open_first(same, typed, locks)
    if found.file is not None:
        name, compared = found.file.path.parent.name, ", ".join(TRAINED)
        said = f"auto: {name} is the newest run begun with the flags of this command (compared: {compared})"
        return replace(found, notes=(*found.notes, said))
    unsaved = [folder for folder in same if is_run_id(folder.name) and not directory.has_checkpoints(folder)]
    if unsaved:
        begun_id = max(unsaved, key=lambda folder: (folder / "config.yaml").stat().st_mtime).name
        said = f"auto: {begun_id} was begun with the flags of this command and has no checkpoint yet"
        return SearchResult(notes=(*found.notes, said), begun_id=begun_id)
    others = [folder for folder in differing if folder not in same and directory.has_checkpoints(folder)]
    if not others:
        none = f"auto: there is no checkpoint under {logs_dir().absolute()}: a new run begins"
        return replace(found, notes=(*found.notes, none))
    if owner is not None and set(TRAINED) & set(typed):
        raise name_taken(name, owner, f" and was begun with other flags: {', '.join(*differing.values())}")
    if not set(TRAINED) & set(typed) and (owner is not None or not name):
        newest = _open_first(others, typed, locks)
        taken = f"run {name}" if name else "the newest run of all"
        said = f"auto: no flag that decides what is trained is typed; taking {taken}"
        return replace(newest, notes=(*found.notes, *newest.notes, said))
    described = describe_nearest(
        {run_id_of(folder) or folder.name: differing[folder] for folder in others}, logs_dir().absolute()
    )
    return SearchResult(notes=(*found.notes, described))


def compare_runs(typed: dict[str, Any]) -> dict[Path, list[str]]:
    """Return the folders of runs, the one that saved last first, with the flags in which each differs from `typed`."""
    differing: dict[Path, list[str]] = {}
    for folder in directory.runs_by_last_save(logs_dir()):
        begun = _experiment_of(folder) if _was_begun(folder) else None
        if begun is not None:
            differing[folder] = differences(typed, begun)
        elif directory.has_checkpoints(folder):
            differing[folder] = []  # damaged: the search reports it
    return differing


def _experiment_of(folder: Path) -> Experiment | None:
    """Return what a run trains, from its newest readable checkpoint, else its config.yaml; None without both."""
    with ExitStack() as opened, suppress(UserError):
        file = directory.open_newest_readable(folder, opened)
        if file is None:
            config = load_yaml(str(folder / "config.yaml"))
            return Experiment(config, name=name_of(folder) or str(config.get("name", "")))
        name = name_of(folder) or _saved_name(file.values)
        if not file.is_ours:
            from unbroken.run import legacy  # imports torch

            args = legacy.read_legacy(file, 1).args
            return Experiment(args, str(args.get("input_bin", "")), name=name)
        args, progress = file.values["args"], file.values["progress"]
        begun, input_bin = progress.get("begun"), str(args.get("input_bin", ""))
        forked = bool(progress.get("parent"))
        begun = begun if begun and isinstance(begun, dict) else args
        return Experiment(begun, input_bin, file.values["data"], forked, name)
    return None


def describe_nearest(differing: dict[str, list[str]], place: object) -> str:
    """Return the line of a new run: the run that is nearest to it, the flags that differ, and how to continue it."""
    nearest = min(differing, key=lambda run_id: len(differing[run_id]))
    flags, count = ", ".join(differing[nearest]), len(differing)
    runs = "the run" if count == 1 else f"any of the {count} runs"
    return (
        f"auto: this command did not begin {runs} under {place}, so a new run begins; the nearest is {nearest}:"
        f" {flags}; {with_logs_dir(f'--resume_from {nearest}')} continues that one instead"
    )


def _open_init_from(typed: dict[str, Any], run_id: str) -> tuple[str, CheckpointFile | None]:
    """Return the checkpoint file that `--init_from` names, and open it; ("", None) without the flag.

    A Hugging Face folder is returned as it is typed, for `imported.read_folder`. A run or folder means its newest
    checkpoint when the new run begins, `best` its best one; later attempts of the new run use the same file.
    """
    text = str(typed.get("init_from", ""))
    if not text:
        return "", None
    target = parse(text)
    is_best = target.kind == "file" and target.path != Path(text)
    if target.kind not in ("run", "folder") and not is_best:
        if not os.path.exists(text):
            raise UserError(f"--init_from {printable(text, 4096)}: there is no such file, folder or run; {_listing()}")
        return text, open_checkpoint(Path(text))
    folder = target.path.parent if is_best else target.path
    if (target.path / "config.json").is_file():  # a Hugging Face folder
        return text, None
    with suppress(UserError):
        first = load_yaml(str(logs_dir() / run_id / "config.yaml")).get("init_from", "")
        if os.path.isfile(first) and Path(first).parent == folder:
            return str(first), open_checkpoint(Path(first))
    if is_best:
        return str(target.path), open_checkpoint(target.path)
    file, _ = directory.open_newest_whole(directory.list_checkpoints(target.path))
    if file is None:
        raise UserError(f"--init_from {text}: there is no whole checkpoint in {target.path}; {_listing()}")
    periodic = target.path / checkpoint_name(int(file.values["step"]))
    if not directory.is_regular(periodic):
        return str(file.path), file
    if not file.is_at(periodic):  # final.pt may be replaced when that run is extended
        file.close()
        file = open_checkpoint(periodic)
    return str(periodic), file


def open_checkpoint(path: Path) -> CheckpointFile:
    """Open a checkpoint. Raises UserError, which names the newest whole checkpoint beside a damaged one."""
    try:
        return directory.open_file(path)
    except UserError as error:
        raise UserError(f"{error}{newest_beside(path)}") from None


def newest_beside(path: Path) -> str:
    """Return the end of an error about `path`: the newest whole checkpoint of the same run, if there is another."""
    entries = directory.list_checkpoints(path.parent) if is_run_id(path.parent.name) else []
    file, _ = directory.open_newest_whole(entries)
    if file is None:
        return ""
    file.close()
    return f"; the newest whole checkpoint of this run is {file.path}" if file.path != path else ""


# ---- for the tools: a run's folder, its newest checkpoint, its log ---------------------------------------------------


def find_run_folder(text: str) -> Path | None:
    """Return the folder that `text` names, of a run or any other; None if it names none. Raises UserError.

    `latest` is the run that saved last.
    """
    target = parse(text)
    if target.kind == LATEST:
        runs = directory.runs_by_last_save(logs_dir())
        if not runs:
            raise UserError(f"{text}: there are no runs under {logs_dir()}/")
        return runs[0]
    if target.kind not in ("run", "folder"):
        return None
    if not os.path.isdir(target.path):
        raise UserError(f"there is no run {text} under {logs_dir()}/; {_listing()}")
    return target.path


def _listing() -> str:
    """Return the end of an error about a run that was not found."""
    return f"`{with_logs_dir('python -m unbroken ls')}` lists the runs"


def find_file(text: str) -> Path:
    """Return the path of a file that is no run's folder. Raises UserError if there is none."""
    target = parse(text)
    path = target.path if target.kind == "file" else Path(text)
    if not os.path.exists(path):
        raise UserError(f"{printable(text)}: there is no such file, folder or run")
    return path


def open_newest(text: str) -> CheckpointFile:
    """Open the checkpoint that `text` names: a file, or the newest whole one of a run. Raises UserError."""
    folder = find_run_folder(text)
    if folder is None:
        return directory.open_file(find_file(text))
    while True:
        file, damaged = directory.open_newest_whole(directory.list_checkpoints(folder))
        if file is not None:
            return file
        if all(path.exists() for path, _ in damaged):  # else retention was faster, and there is a newer one
            why = f": {damaged[0][0].name} is damaged ({damaged[0][1]})" if damaged else ""
            raise UserError(f"{printable(folder, 4096)} has no whole checkpoint{why}")


def find_logs(texts: Sequence[str]) -> list[Path]:
    """Return the log of each text, or that of the run under logs/ that wrote last if there is no text."""
    return [find_log(text) for text in texts] or [_newest_log()]


def find_log(text: str) -> Path:
    """Return the log that `text` names: a log, the journal beside it, or a run. Raises UserError."""
    path = Path(text.removesuffix(JOURNAL) + ".log") if text.endswith(JOURNAL) else Path(text)
    if _is_log(path):
        return path
    folder = find_run_folder(text)
    if folder is None:
        raise UserError(f"{printable(text)}: there is no such log, folder or run")
    found = log_in_folder(folder)
    if found is None:
        raise UserError(f"there is no log in {printable(folder)}; type its path, <output_dir>/<run_id>.log")
    return found


def log_in_folder(folder: Path) -> Path | None:
    """Return the log of the run in a folder: beside its checkpoints, or in its --output_dir; None if there is none."""
    real = folder.resolve()
    name = f"{run_id_of(folder) or real.name}.log"
    if _is_log(folder / name):
        return folder / name
    for output_dir in _output_dirs(folder):
        for start in (Path(), *real.parents):  # the folder in which training was started is one of them
            if _is_log(start / output_dir / name):
                return start / output_dir / name
    return None


def name_of_log(log: Path) -> str:
    """Return the name of the run of a log, which may lie in its --output_dir; "" if it has none here."""
    return name_of(logs_dir() / log.stem) or name_of(log.parent)


def _is_log(path: Path) -> bool:
    """Return whether the log or at least its journal is there."""
    return os.path.isfile(path) or (path.suffix == ".log" and os.path.isfile(journal_of(path)))


def _output_dirs(folder: Path) -> Iterator[str]:
    """Yield the --output_dir in the run's config.yaml and in its newest checkpoint. Untrusted: only read there."""
    with suppress(UserError):
        yield str(load_yaml(str(folder / "config.yaml")).get("output_dir", ""))
    with ExitStack() as opened:
        file = directory.open_newest_readable(folder, opened)
        yield str(dict_at(file.values, "args").get("output_dir", "")) if file is not None else ""


def _newest_log() -> Path:
    logs = [log for log in map(log_in_folder, directory.list_runs(logs_dir())) if log is not None]
    if not logs:
        raise UserError(f"there are no logs under {logs_dir()}/ yet; type the path of one")
    return max(logs, key=lambda log: max(path.stat().st_mtime for path in (log, journal_of(log)) if path.exists()))
