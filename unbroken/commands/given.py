"""What a tool was given: a checkpoint file, the folder of a run, or a run_id."""

from __future__ import annotations

from pathlib import Path

from unbroken.checkpoint.schema import is_run_id, printable
from unbroken.errors import UserError

HELP = "a checkpoint file, or a run_id or a run's folder for its newest whole checkpoint"


def folder_of(text: str) -> Path | None:
    """The folder of a run, where a run was given."""
    from unbroken.run import LOGS  # which imports torch: not before it is needed

    folder = LOGS / text if is_run_id(text) else Path(text)
    if is_run_id(text) and not folder.is_dir():
        raise UserError(f"there is no run {text} under {LOGS}/; `python -m unbroken ls` lists those that there are")
    return folder if folder.is_dir() else None


def checkpoint(text: str) -> Path:
    """The file to open."""
    from unbroken.checkpoint import directory

    folder = folder_of(text)
    if folder is None:
        if not Path(text).exists():
            raise UserError(f"{printable(text)}: there is no such file, folder or run")
        return Path(text)
    newest, damaged = directory.newest_whole(folder)
    if newest is None:
        why = f": {damaged[0][0].name} is damaged ({damaged[0][1]})" if damaged else ""
        raise UserError(f"{folder} has no whole checkpoint{why}")
    return newest.path
