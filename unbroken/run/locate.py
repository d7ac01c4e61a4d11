"""Find what the user names: a checkpoint file, a run by its run_id, a folder, `latest` or `auto`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unbroken import paths
from unbroken.checkpoint import directory
from unbroken.checkpoint.format.schema import checkpoint_name
from unbroken.config import load_yaml
from unbroken.errors import UserError
from unbroken.paths import JOURNAL, is_run_id, journal_of
from unbroken.run import restarts
from unbroken.run.lock import RunLocks
from unbroken.text import printable

if TYPE_CHECKING:
    from unbroken.checkpoint.reader import CheckpointFile


LATEST, AUTO = "latest", "auto"


def resolve_resume_from(
    typed: dict[str, Any], agents: list[Any], locks: RunLocks
) -> tuple[str | None, str, bool, list[str]]:
    """On rank 0: (checkpoint or None, run_id for a fresh or forked run, whether to fork, what to say).

    The lock of the run that is to be continued is taken first: whoever trains it may still be saving its last step.
    """
    own = restarts.find_interrupted_run(agents)
    wanted, fork = typed.get("resume_from", ""), bool(typed.get("fork"))
    if own is not None:
        found, said = _newest_of(own, locks)
        said.append(f"restarted by torchrun: continuing run {own}")
        if found is not None:
            return str(found), own, False, said
        if wanted in ("", LATEST, AUTO) and not fork:  # the newest of all may be another run by now
            return None, own, False, said
    run_id = own or paths.new_run_id(typed.get("run_id", ""))
    begins = not wanted or fork
    if begins and own is None and typed.get("run_id") and directory.list_checkpoints(paths.LOGS / run_id):
        raise UserError(f"run {run_id} exists already: continue it with --resume_from {run_id}")
    if not wanted:
        return None, run_id, fork, []
    found, said = _wanted(wanted, run_id if typed.get("run_id") else None, None if fork else locks)
    if found is None and wanted != AUTO:
        where = "under logs/" if wanted == LATEST else f"in {paths.LOGS / Path(wanted).name}"
        raise UserError(f"--resume_from {wanted}: there is no whole checkpoint {where}")
    return (str(found) if found else None), run_id, fork, said


def _wanted(wanted: str, run_id: str | None, locks: RunLocks | None) -> tuple[Path | None, list[str]]:
    """What --resume_from names, and what was passed over on the way. Without `locks` it is only to be read."""
    if wanted == AUTO and run_id is not None:
        return _newest_of(run_id, locks)
    if wanted in (LATEST, AUTO):
        return _newest_of_all(locks)
    if is_run_id(wanted):
        return _newest_of(wanted, locks)
    path = Path(wanted)
    if os.path.isdir(path):  # the method of Path raises for a name that is too long
        if is_run_id(path.name) and os.path.realpath(path) == os.path.realpath(paths.LOGS / path.name):
            return _newest_of(path.name, locks)
        newest, damaged = directory.newest_whole(path)
        if newest is None:
            raise UserError(f"--resume_from {path}: there is no whole checkpoint in this folder")
        return newest.path, _passed_over(damaged)
    return path, []


def _newest_of(run_id: str, locks: RunLocks | None) -> tuple[Path | None, list[str]]:
    folder = paths.LOGS / run_id
    if locks is not None and os.path.isdir(folder):
        locks.take(folder)
    newest, damaged = directory.newest_whole(folder)
    if newest is None and locks is not None:
        locks.give_back(folder)
    return (newest.path if newest else None), _passed_over(damaged)


def _passed_over(damaged: list[tuple[Path, str]]) -> list[str]:
    return [f"passing over {path}: {why}" for path, why in damaged]


def _newest_of_all(locks: RunLocks | None) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint of the run that saved last."""
    said: list[str] = []
    for folder in directory.runs_by_last_save(paths.LOGS):
        path, more = _newest_of(folder.name, locks)
        said += more
        if path is not None:
            return path, said
    return None, said


def resolve_init_from(named: str, run_id: str) -> str:
    """The checkpoint that --init_from means: the file itself, or a run's newest; for ever the one that it was once."""
    folder = paths.LOGS / named if is_run_id(named) else Path(named)
    if not os.path.isdir(folder):
        return named
    if (folder / "config.json").is_file():
        raise UserError(f"--init_from {named}: python -m unbroken import {named} FILE.pt makes a checkpoint of it")
    with suppress(UserError):
        begun = load_yaml(str(paths.LOGS / run_id / "config.yaml")).get("init_from", "")
        if os.path.isfile(begun) and Path(begun).parent == folder:
            return str(begun)
    newest, _ = directory.newest_whole(folder)
    if newest is None:
        raise UserError(f"--init_from {named}: there is no whole checkpoint in {folder}")
    periodic = folder / checkpoint_name(newest.step or 0)  # final.pt may be another one tomorrow
    return str(periodic if newest.final and directory.is_regular(periodic) else newest.path)


def open_checkpoint(path: Path) -> CheckpointFile:
    """Open a checkpoint; where it is damaged, name the newest good one beside it."""
    from unbroken.checkpoint.reader import CheckpointFile  # which imports torch: not before it is needed

    try:
        return CheckpointFile(path)
    except UserError as error:
        raise UserError(f"{error}{newest_beside(path)}") from None


def newest_beside(path: Path) -> str:
    """A hint for an error about `path`."""
    folder = path.parent
    newest, _ = directory.newest_whole(folder) if is_run_id(folder.name) else (None, [])
    return f"; the newest whole checkpoint of this run is {newest.path}" if newest and newest.path != path else ""


RUN_ID_PREFIX = re.compile(r"[0-9a-f]{4,8}(-[0-9a-f]*)*")  # of a run_id, as pictures and people write it
CHECKPOINT_HELP = "a checkpoint file, or a run_id (its beginning will do) or a run's folder: its newest"
LOG_HELP = "run_ids, folders of runs, or log files (default: the run that wrote last)"


def find_run_folder(text: str) -> Path | None:
    """The folder of a run, where a run was given."""
    folder = Path(text)
    if is_run_id(text) or (RUN_ID_PREFIX.fullmatch(text) and not os.path.lexists(text)):
        from unbroken.checkpoint import directory
        from unbroken.paths import LOGS  # which imports torch: not before it is needed

        begin_so = [each for each in directory.list_runs(LOGS) if each.name.startswith(text)]
        if len(begin_so) > 1:
            raise UserError(f"{len(begin_so)} runs under {LOGS}/ begin with {text}: type more of it")
        if not begin_so and is_run_id(text):
            raise UserError(f"there is no run {text} under {LOGS}/; `python -m unbroken ls` lists those that there are")
        folder = begin_so[0] if begin_so else folder
    return folder if os.path.isdir(folder) else None  # the method of Path raises for a name that is too long


def run_id_of(folder: Path) -> str:
    """Of the run in a folder: its name, or that of the folder it links to; "" where neither is one."""
    return next((name for name in (folder.name, folder.resolve().name) if is_run_id(name)), "")


def find_checkpoint(text: str) -> Path:
    """The file to open."""
    from unbroken.checkpoint import directory

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
    """The same, open: of a run that is being trained, retention may have removed it between the two."""
    from unbroken.checkpoint.reader import CheckpointFile

    while True:
        path = find_checkpoint(text)
        try:
            return CheckpointFile(path)
        except UserError:
            if os.path.exists(path) or not os.path.isdir(path.parent):
                raise


def find_logs(texts: Sequence[str]) -> list[Path]:
    """The logs of what was typed, or of the run under logs/ that wrote last."""
    return [find_log(text) for text in texts] or [_newest_log()]


def find_log(text: str) -> Path:
    """The log of a run, from its folder; the path of a log, or of the journal beside it, is taken as it is."""
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
    """The log of the run in a folder: beside its checkpoints, or in the --output_dir that it was given."""
    real = folder.resolve()
    name = f"{run_id_of(folder) or real.name}.log"
    if _is_log(folder / name):
        return folder / name
    for output_dir in _output_dirs(folder):
        for start in (Path(), real.parent.parent):  # the folder that training was started in
            if _is_log(start / output_dir / name):
                return start / output_dir / name
    return None


def _is_log(path: Path) -> bool:
    """Whether it is there, or at least its journal."""
    return os.path.isfile(path) or (path.suffix == ".log" and os.path.isfile(journal_of(path)))


def _output_dirs(folder: Path) -> Iterator[str]:
    """What the run's config.yaml and its newest checkpoint say, which are a stranger's: a log is only read there."""
    from unbroken.checkpoint import directory
    from unbroken.checkpoint.reader import CheckpointFile
    from unbroken.config import load_yaml

    with suppress(UserError):
        yield str(load_yaml(str(folder / "config.yaml")).get("output_dir", ""))
    for found in reversed(directory.list_checkpoints(folder)):
        with suppress(UserError), CheckpointFile(found.path) as file:
            args = file.values.get("args")
            yield str(args.get("output_dir", "")) if isinstance(args, dict) else ""
            return


def _newest_log() -> Path:
    from unbroken.checkpoint import directory
    from unbroken.paths import LOGS

    there = [path for path in map(log_in_folder, directory.list_runs(LOGS)) if path is not None]
    if not there:
        raise UserError(f"there are no logs under {LOGS}/ yet; type the path of one")
    return max(there, key=lambda log: max(path.stat().st_mtime for path in (log, journal_of(log)) if path.exists()))
