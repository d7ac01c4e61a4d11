"""Find what the user names: a checkpoint file, a run, a folder, `latest`, `auto`, or a checkpoint in object storage.

`parse` alone interprets the user's word. Training asks `resolve`, the mirror asks `parse`, the tools ask
`find_run_folder`, `open_newest` and `find_logs`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unbroken.checkpoint import directory
from unbroken.checkpoint.format.schema import FINAL, checkpoint_name, checkpoint_step
from unbroken.config import load_yaml
from unbroken.errors import UserError
from unbroken.paths import JOURNAL, LOGS, is_run_id, journal_of, new_run_id
from unbroken.run.lock import RunLocks
from unbroken.run.restarts import find_interrupted_run
from unbroken.text import printable

if TYPE_CHECKING:
    from unbroken.checkpoint.reader import CheckpointFile
    from unbroken.distributed.world import World

LATEST, AUTO = "latest", "auto"
RUN_ID_PREFIX = re.compile(r"[0-9a-f]{4,8}(-[0-9a-f]*)*")
CHECKPOINT_HELP = "a checkpoint file, or a run_id (its beginning is enough) or a run's folder: its newest checkpoint"
LOG_HELP = "run_ids, folders of runs, or log files (default: the run that wrote last)"


# ---- the user's word -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Word:
    """What a user's word names.

    `kind` is "auto", "latest", "run" (`run_id` and its folder `path`), "folder" (another folder with checkpoints),
    "file" (any other path), or "url": runs below `url`, one run if `run_id` is set, one checkpoint if `name` is set.
    """

    text: str
    kind: str
    path: Path = Path()
    run_id: str = ""
    url: str = ""
    name: str = ""


def parse(text: str) -> Word:
    """Return what `text` names. Raises UserError for a prefix of several run_ids and for a URL of nothing."""
    if "://" in text:
        return _parse_url(text)
    if text in (AUTO, LATEST):
        return Word(text, text)
    run_id = complete_run_id(text)
    if run_id:
        return Word(text, "run", LOGS / run_id, run_id)
    path = Path(text)
    if not os.path.isdir(path):  # the method of Path raises for a name that is too long
        return Word(text, "file", path)
    if is_run_id(path.name) and os.path.realpath(path) == os.path.realpath(LOGS / path.name):
        return Word(text, "run", LOGS / path.name, path.name)
    return Word(text, "folder", path)


def complete_run_id(text: str) -> str:
    """Return the run_id that `text` is, or begins as the only one below logs/; "" for any other text."""
    if is_run_id(text):
        return text
    if RUN_ID_PREFIX.fullmatch(text) is None or os.path.lexists(text):
        return ""
    matches = [folder.name for folder in directory.list_runs(LOGS) if folder.name.startswith(text)]
    if len(matches) > 1:
        raise UserError(f"{text}: {len(matches)} runs under {LOGS}/ begin with it; type more of the run_id")
    return matches[0] if matches else ""


def _parse_url(text: str) -> Word:
    url, _, last = text.rstrip("/").rpartition("/")
    parent, _, run_id = url.rpartition("/")
    if last in (AUTO, LATEST):
        return Word(text, "url", url=parent, run_id=run_id) if is_run_id(run_id) else Word(text, "url", url=url)
    if is_run_id(last):
        return Word(text, "url", url=url, run_id=last)
    if is_run_id(run_id) and (last == FINAL or checkpoint_step(last) is not None):
        return Word(text, "url", url=parent, run_id=run_id, name=last)
    raise UserError(
        f"--resume_from {printable(text)}: below the URL of --mirror it must end in /latest, /<run_id> or"
        " /<run_id>/model_step000256.pt"
    )


# ---- for training: which checkpoint, which run -----------------------------------------------------------------------


@dataclass(frozen=True)
class Resolved:
    """What an attempt starts from: a checkpoint (`path`), or a new run if that is None.

    `run_id` is that of a new or forked run. `init_from` is the file whose weights a new run starts with. `notes` are
    lines for the user. `file` is the same checkpoint, open and verified, on rank 0 if it was searched for.
    """

    path: Path | None
    run_id: str
    fork: bool = False
    init_from: str = ""
    notes: tuple[str, ...] = ()
    file: CheckpointFile | None = field(default=None, compare=False)


def resolve(typed: dict[str, Any], agents: list[Any], locks: RunLocks, world: World, attempt: ExitStack) -> Resolved:
    """Return what `--resume_from`, `--run_id`, `--fork` and `--init_from` name together. Collective.

    Rank 0 searches, the other ranks get its answer. The run that is to be continued is locked before its folder is
    read, because another attempt may still be saving its last step. Raises UserError.

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
            found = _resolve(typed, agents, locks)
            if found.file is not None:
                attempt.enter_context(found.file)
    shared: Resolved = world.broadcast(found and replace(found, file=None))
    return found or shared


def _resolve(typed: dict[str, Any], agents: list[Any], locks: RunLocks) -> Resolved:
    own = find_interrupted_run(agents)
    text, fork = typed.get("resume_from", ""), bool(typed.get("fork"))
    if own is not None:
        file, notes = _open_newest_of(LOGS / own, locks)
        notes = (*notes, f"restarted by torchrun: continuing run {own}")
        if file is not None:
            return Resolved(file.path, own, notes=notes, file=file)
        if text in ("", LATEST, AUTO) and not fork:  # by now the newest of all may be another run
            return Resolved(None, own, init_from=_init_from(typed, own), notes=notes)
    run_id = own or new_run_id(typed.get("run_id", ""))
    is_new = not text or fork
    if is_new and own is None and typed.get("run_id") and directory.list_checkpoints(LOGS / run_id):
        raise UserError(f"run {run_id} exists already: continue it with --resume_from {run_id}")
    if not text:
        return Resolved(None, run_id, init_from=_init_from(typed, run_id))
    path, file, notes = _search(parse(text), run_id if typed.get("run_id") else "", None if fork else locks)
    if path is None and text != AUTO:
        raise UserError(f"--resume_from {printable(text, 4096)}: there is no whole checkpoint {_where(text)}")
    return Resolved(path, run_id, fork, "" if path else _init_from(typed, run_id), notes, file)


def _where(text: str) -> str:
    word = parse(text)
    return f"under {LOGS}/" if word.kind == LATEST else f"in {word.path}"


def _search(
    word: Word, run_id: str, locks: RunLocks | None
) -> tuple[Path | None, CheckpointFile | None, tuple[str, ...]]:
    """Return the checkpoint that `word` names, open and verified where it was searched for, and notes.

    `run_id` is the typed one, "" for none. Without `locks` the run is only read.
    """
    if word.kind == "file":
        if not os.path.lexists(word.path) and RUN_ID_PREFIX.fullmatch(word.text):
            raise UserError(f"--resume_from {word.text}: no file has this name, and no run under {LOGS}/ begins so")
        return word.path, None, ()
    if word.kind == "run" or (word.kind == AUTO and run_id):
        file, notes = _open_newest_of(LOGS / (word.run_id or run_id), locks)
    elif word.kind == "folder":
        file, notes = _open_newest_of(word.path, None)
    else:
        file, notes = _open_newest_of_all(locks)
    return (file.path if file else None), file, notes


def _open_newest_of(folder: Path, locks: RunLocks | None) -> tuple[CheckpointFile | None, tuple[str, ...]]:
    """Open the newest whole checkpoint of a folder; the notes name the damaged ones that were passed over."""
    if locks is not None and directory.list_checkpoints(folder):  # else nothing here is continued
        locks.take(folder)
    file, damaged = directory.open_newest_whole(folder)
    if file is None and locks is not None:
        locks.give_back(folder)
    return file, tuple(f"passing over {path}: {why}" for path, why in damaged)


def _open_newest_of_all(locks: RunLocks | None) -> tuple[CheckpointFile | None, tuple[str, ...]]:
    """Open the newest whole checkpoint of the run that saved last."""
    notes: tuple[str, ...] = ()
    for folder in directory.runs_by_last_save(LOGS):
        file, more = _open_newest_of(folder, locks)
        notes += more
        if file is not None:
            return file, notes
    return None, notes


def _init_from(typed: dict[str, Any], run_id: str) -> str:
    """Return the checkpoint file that `--init_from` names; "" without the flag.

    A run or folder means its newest checkpoint at the time when the new run begins, and that same file ever after.
    """
    text = str(typed.get("init_from", ""))
    word = parse(text) if text else None
    if word is None or word.kind not in ("run", "folder"):
        return text
    if (word.path / "config.json").is_file():
        raise UserError(f"--init_from {text}: python -m unbroken import {text} FILE.pt makes a checkpoint of it")
    with suppress(UserError):
        first = load_yaml(str(LOGS / run_id / "config.yaml")).get("init_from", "")
        if os.path.isfile(first) and Path(first).parent == word.path:
            return str(first)
    newest, _ = directory.newest_whole(word.path)
    if newest is None:
        raise UserError(f"--init_from {text}: there is no whole checkpoint in {word.path}")
    periodic = word.path / checkpoint_name(newest.step or 0)  # final.pt may be replaced when that run is extended
    return str(periodic if newest.final and directory.is_regular(periodic) else newest.path)


def open_checkpoint(path: Path) -> CheckpointFile:
    """Open a checkpoint. Raises UserError, which names the newest whole checkpoint beside a damaged one."""
    from unbroken.checkpoint.reader import CheckpointFile  # imports torch

    try:
        return CheckpointFile(path)
    except UserError as error:
        raise UserError(f"{error}{newest_beside(path)}") from None


def newest_beside(path: Path) -> str:
    """Return the end of an error about `path`: the newest whole checkpoint of the same run, if there is another."""
    newest, _ = directory.newest_whole(path.parent) if is_run_id(path.parent.name) else (None, [])
    return f"; the newest whole checkpoint of this run is {newest.path}" if newest and newest.path != path else ""


# ---- for the tools: a run's folder, its newest checkpoint, its log ---------------------------------------------------


def find_run_folder(text: str) -> Path | None:
    """Return the folder of a run, or any folder, that `text` names; None if it names none. Raises UserError."""
    word = parse(text)
    if word.kind not in ("run", "folder"):
        return None
    if not os.path.isdir(word.path):
        raise UserError(f"there is no run {text} under {LOGS}/; `python -m unbroken ls` lists the runs")
    return word.path


def run_id_of(folder: Path) -> str:
    """Return the run_id of the run in a folder: its name or that of the folder it links to; "" if neither is one."""
    return next((name for name in (folder.name, folder.resolve().name) if is_run_id(name)), "")


def find_checkpoint(text: str) -> Path:
    """Return the checkpoint file that `text` names: a file, or the newest whole one of a run. Raises UserError."""
    folder = find_run_folder(text)
    if folder is None:
        if not os.path.exists(text):
            raise UserError(f"{printable(text)}: there is no such file, folder or run")
        return Path(text)
    while True:
        newest, damaged = directory.newest_whole(folder)
        if newest is not None:
            return newest.path
        if all(path.exists() for path, _ in damaged):  # else retention was faster, and there is a newer one
            why = f": {damaged[0][0].name} is damaged ({damaged[0][1]})" if damaged else ""
            raise UserError(f"{printable(folder, 4096)} has no whole checkpoint{why}")


def open_newest(text: str) -> CheckpointFile:
    """Open the checkpoint that `text` names. Retention of a running training may remove it between search and open."""
    from unbroken.checkpoint.reader import CheckpointFile  # imports torch

    while True:
        path = find_checkpoint(text)
        try:
            return CheckpointFile(path)
        except UserError:
            if os.path.exists(path) or not os.path.isdir(path.parent):
                raise


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
        raise UserError(f"there is no log in {printable(folder)}: type its path, <output_dir>/<run_id>.log")
    return found


def log_in_folder(folder: Path) -> Path | None:
    """Return the log of the run in a folder: beside its checkpoints, or in its --output_dir; None if there is none."""
    real = folder.resolve()
    name = f"{run_id_of(folder) or real.name}.log"
    if _is_log(folder / name):
        return folder / name
    for output_dir in _output_dirs(folder):
        for start in (Path(), real.parent.parent):  # the folder in which training was started
            if _is_log(start / output_dir / name):
                return start / output_dir / name
    return None


def _is_log(path: Path) -> bool:
    """Return whether the log or at least its journal is there."""
    return os.path.isfile(path) or (path.suffix == ".log" and os.path.isfile(journal_of(path)))


def _output_dirs(folder: Path) -> Iterator[str]:
    """Yield the --output_dir in the run's config.yaml and in its newest checkpoint. Untrusted: only read there."""
    from unbroken.checkpoint.reader import CheckpointFile  # imports torch

    with suppress(UserError):
        yield str(load_yaml(str(folder / "config.yaml")).get("output_dir", ""))
    for entry in reversed(directory.list_checkpoints(folder)):
        with suppress(UserError), CheckpointFile(entry.path) as file:
            args = file.values.get("args")
            yield str(args.get("output_dir", "")) if isinstance(args, dict) else ""
            return


def _newest_log() -> Path:
    logs = [log for log in map(log_in_folder, directory.list_runs(LOGS)) if log is not None]
    if not logs:
        raise UserError(f"there are no logs under {LOGS}/ yet; type the path of one")
    return max(logs, key=lambda log: max(path.stat().st_mtime for path in (log, journal_of(log)) if path.exists()))
