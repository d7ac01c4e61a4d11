"""What --resume_from names: a file, a run, the newest checkpoint of all, or nothing yet."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from unbroken import run
from unbroken.checkpoint import directory
from unbroken.checkpoint.reader import CheckpointFile
from unbroken.checkpoint.schema import checkpoint_name, is_run_id
from unbroken.config_file import from_file
from unbroken.errors import UserError
from unbroken.run import RunLocks

LATEST, AUTO = "latest", "auto"


def choose(typed: dict[str, Any], agents: list[Any], locks: RunLocks) -> tuple[str | None, str, bool, list[str]]:
    """On rank 0: (checkpoint or None, run_id for a fresh or forked run, whether to fork, what to say).

    The lock of the run that is to be continued is taken first: whoever trains it may still be saving its last step.
    """
    own = run.interrupted_run(agents)
    wanted, fork = typed.get("resume_from", ""), bool(typed.get("fork"))
    if own is not None:
        found, said = _newest_of(own, locks)
        said.append(f"restarted by torchrun: continuing run {own}")
        if found is not None:
            return str(found), own, False, said
        if wanted in ("", LATEST, AUTO) and not fork:  # the newest of all may be another run by now
            return None, own, False, said
    run_id = own or run.new_run_id(typed.get("run_id", ""))
    begins = not wanted or fork
    if begins and own is None and typed.get("run_id") and directory.checkpoints(run.LOGS / run_id):
        raise UserError(f"run {run_id} exists already: continue it with --resume_from {run_id}")
    if not wanted:
        return None, run_id, fork, []
    found, said = _wanted(wanted, run_id if typed.get("run_id") else None, None if fork else locks)
    if found is None and wanted != AUTO:
        where = "under logs/" if wanted == LATEST else f"in {run.LOGS / Path(wanted).name}"
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
        if is_run_id(path.name) and os.path.realpath(path) == os.path.realpath(run.LOGS / path.name):
            return _newest_of(path.name, locks)
        newest, damaged = directory.newest_whole(path)
        if newest is None:
            raise UserError(f"--resume_from {path}: there is no whole checkpoint in this folder")
        return newest.path, _passed_over(damaged)
    return path, []


def _newest_of(run_id: str, locks: RunLocks | None) -> tuple[Path | None, list[str]]:
    folder = run.LOGS / run_id
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
    for folder in directory.runs_by_last_save(run.LOGS):
        path, more = _newest_of(folder.name, locks)
        said += more
        if path is not None:
            return path, said
    return None, said


def file_of(named: str, run_id: str) -> str:
    """The checkpoint that --init_from means: the file itself, or a run's newest; for ever the one that it was once."""
    folder = run.LOGS / named if is_run_id(named) else Path(named)
    if not os.path.isdir(folder):
        return named
    if (folder / "config.json").is_file():
        raise UserError(f"--init_from {named}: python -m unbroken import {named} FILE.pt makes a checkpoint of it")
    with suppress(UserError):
        begun = from_file(str(run.LOGS / run_id / "config.yaml")).get("init_from", "")
        if os.path.isfile(begun) and Path(begun).parent == folder:
            return str(begun)
    newest, _ = directory.newest_whole(folder)
    if newest is None:
        raise UserError(f"--init_from {named}: there is no whole checkpoint in {folder}")
    periodic = folder / checkpoint_name(newest.step or 0)  # final.pt may be another one tomorrow
    return str(periodic if newest.final and directory.is_regular(periodic) else newest.path)


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
