"""What a tool was given: a checkpoint file, the folder of a run, or a run_id."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from unbroken.checkpoint.schema import is_run_id, printable
from unbroken.errors import UserError
from unbroken.journal import JOURNAL, journal_of

if TYPE_CHECKING:
    from unbroken.checkpoint.reader import CheckpointFile

BEGINNING = re.compile(r"[0-9a-f]{4,8}(-[0-9a-f]*)*")  # of a run_id, as pictures and people write it
HELP = "a checkpoint file, or a run_id (its beginning will do) or a run's folder: its newest"
LOG_HELP = "run_ids, folders of runs, or log files (default: the run that wrote last)"


def folder_of(text: str) -> Path | None:
    """The folder of a run, where a run was given."""
    folder = Path(text)
    if is_run_id(text) or (BEGINNING.fullmatch(text) and not os.path.lexists(text)):
        from unbroken.checkpoint import directory
        from unbroken.run import LOGS  # which imports torch: not before it is needed

        begin_so = [each for each in directory.runs(LOGS) if each.name.startswith(text)]
        if len(begin_so) > 1:
            raise UserError(f"{len(begin_so)} runs under {LOGS}/ begin with {text}: type more of it")
        if not begin_so and is_run_id(text):
            raise UserError(f"there is no run {text} under {LOGS}/; `python -m unbroken ls` lists those that there are")
        folder = begin_so[0] if begin_so else folder
    return folder if os.path.isdir(folder) else None  # the method of Path raises for a name that is too long


def run_id_of(folder: Path) -> str:
    """Of the run in a folder: its name, or that of the folder it links to; "" where neither is one."""
    return next((name for name in (folder.name, folder.resolve().name) if is_run_id(name)), "")


def checkpoint(text: str) -> Path:
    """The file to open."""
    from unbroken.checkpoint import directory

    folder = folder_of(text)
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


def opened(text: str) -> CheckpointFile:
    """The same, open: of a run that is being trained, retention may have removed it between the two."""
    from unbroken.checkpoint.reader import CheckpointFile

    while True:
        path = checkpoint(text)
        try:
            return CheckpointFile(path)
        except UserError:
            if os.path.exists(path) or not os.path.isdir(path.parent):
                raise


def logs(texts: Sequence[str]) -> list[Path]:
    """The logs of what was typed, or of the run under logs/ that wrote last."""
    return [log(text) for text in texts] or [_newest_log()]


def log(text: str) -> Path:
    """The log of a run, from its folder; the path of a log, or of the journal beside it, is taken as it is."""
    path = Path(text.removesuffix(JOURNAL) + ".log") if text.endswith(JOURNAL) else Path(text)
    if _is_log(path):
        return path
    folder = folder_of(text)
    if folder is None:
        raise UserError(f"{printable(text)}: there is no such log, folder or run")
    found = log_of(folder)
    if found is None:
        raise UserError(f"there is no log in {printable(folder)}: type its path, <output_dir>/<run_id>.log")
    return found


def log_of(folder: Path) -> Path | None:
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
    from unbroken.config_file import from_file

    with suppress(UserError):
        yield str(from_file(str(folder / "config.yaml")).get("output_dir", ""))
    for found in reversed(directory.checkpoints(folder)):
        with suppress(UserError), CheckpointFile(found.path) as file:
            args = file.values.get("args")
            yield str(args.get("output_dir", "")) if isinstance(args, dict) else ""
            return


def _newest_log() -> Path:
    from unbroken.checkpoint import directory
    from unbroken.run import LOGS

    there = [path for path in map(log_of, directory.runs(LOGS)) if path is not None]
    if not there:
        raise UserError(f"there are no logs under {LOGS}/ yet; type the path of one")
    return max(there, key=lambda log: max(path.stat().st_mtime for path in (log, journal_of(log)) if path.exists()))
