"""Which checkpoints a run has, which is the newest whole one, which may go, and what a killed writer left
behind.
"""

from __future__ import annotations

import json
import os
import re
import stat
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from unbroken.checkpoint import disk, schema
from unbroken.errors import UserError

GONE_BACK = ".gone_back"


@dataclass(frozen=True)
class Found:
    """A file with a checkpoint's name. A final one's step stands inside; None where it cannot be read."""

    path: Path
    step: int | None
    final: bool


def checkpoints(folder: Path) -> list[Found]:
    """From oldest to newest by the steps they are of: times of files are not to be trusted."""
    found = [
        Found(
            folder / name,
            _final_step(folder / name) if name == schema.FINAL else schema.checkpoint_step(name),
            name == schema.FINAL,
        )
        for name in regular_files(folder)
        if name == schema.FINAL or schema.checkpoint_step(name) is not None
    ]
    return sorted(found, key=lambda item: (2**62 if item.step is None else item.step, item.final))


def finished_at(folder: Path) -> int | None:
    """The step of a whole `final.pt`; None where there is none."""
    final = folder / schema.FINAL
    return _final_step(final) if is_regular(final) and damage(final) is None else None


def _final_step(path: Path) -> int | None:
    from unbroken.checkpoint.reader import CheckpointFile  # which imports torch: not for a listing of names

    try:
        with CheckpointFile(path) as file:
            step = file.values.get("step")
    except UserError:
        return None
    return step if type(step) is int else None


def regular_files(folder: Path) -> list[str]:
    """Names of regular files, none where there is no folder; a link is not followed out of the run's folder.

    Raises UserError for one that cannot be looked into: a run must not begin anew because its disk does not answer.
    """
    return _names(folder, lambda entry: entry.is_file(follow_symlinks=False))


def _names(folder: Path, is_wanted: Callable[[os.DirEntry[str]], bool]) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in entries if is_wanted(entry)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(f"cannot look into the folder {schema.printable(folder, 4096)}: {error.strerror}") from None


def newest_whole(folder: Path) -> tuple[Found | None, list[tuple[Path, str]]]:
    """The newest checkpoint whose every checksum holds, and the newer ones that had to be passed over, with
    reasons.
    """
    damaged: list[tuple[Path, str]] = []
    for found in reversed(checkpoints(folder)):
        reason = damage(found.path)
        if reason is None:
            return found, damaged
        damaged.append((found.path, reason))
    return None, damaged


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint of ours, in one line; None if it is whole."""
    from unbroken.checkpoint.reader import CheckpointFile

    try:
        with CheckpointFile(path) as file:
            if not file.is_ours:
                return "it is not a checkpoint of this program"
            named, step = schema.checkpoint_step(path.name), file.values["step"]
            if named not in (None, step):
                return f"its name says step {named}, but it is of step {step}"
            damages = file.verify()
    except UserError as error:
        return str(error).removeprefix(f"{schema.printable(path, 4096)}: ")
    return damages[0] if damages else None


def runs(logs: Path) -> list[Path]:
    """The folders of runs below `logs`, or links to folders: those whose name is a run_id."""
    names = _names(logs, lambda entry: schema.is_run_id(entry.name) and entry.is_dir() and not _is_private(entry))
    return [logs / name for name in sorted(names)]


def _is_private(entry: os.DirEntry[str]) -> bool:
    """Somebody else's run on a shared disk, which is nobody's concern; one's own that cannot be read is."""
    return entry.stat().st_uid != os.geteuid() and not os.access(entry.path, os.R_OK | os.X_OK)


def runs_by_last_save(logs: Path) -> list[Path]:
    """The run that saved last comes first."""

    def last_save(folder: Path) -> float:
        return max((_changed(found.path) for found in checkpoints(folder)), default=0.0)

    return sorted(runs(logs), key=last_save, reverse=True)


def _changed(path: Path) -> float:
    try:
        return os.lstat(path).st_mtime
    except OSError:  # a run that is being trained has given it up meanwhile
        return 0.0


def clear_debris(folder: Path) -> list[Path]:
    """Remove what a killed writer left. Only for the process that holds the run's lock: a living writer's
    look the same.
    """
    removed = []
    for name in sorted(regular_files(folder)):
        if schema.is_debris(name):
            try:
                os.unlink(folder / name)
            except OSError:
                continue
            removed.append(folder / name)
    return removed


def set_aside(folder: Path, paths: Sequence[Path]) -> Path:
    """Move checkpoints that another attempt overtakes into a new folder overtaken-1, -2, ... below the run's;
    return it.

    Each move is one rename, so a kill between two of them loses nothing: the next start moves the rest.
    """
    aside = _new_aside(folder)
    for path in paths:
        os.rename(path, aside / path.name)
    for changed in (aside, folder):
        disk.sync_folder(changed)
    return aside


def keep_aside(path: Path) -> Path:
    """Give a checkpoint that is about to be replaced a second name in a new folder overtaken-1, -2, ...; return it."""
    aside = _new_aside(path.parent)
    disk.second_name(path, aside / schema.temporary_name(path.name), aside / path.name)
    disk.sync_folder(path.parent)
    return aside


def keep_contents(folder: Path, contents: dict[str, bytes]) -> Path:
    """Write what is about to be replaced into a new folder overtaken-1, -2, ...; return it. Raises OSError."""
    aside = _new_aside(folder)
    for name, content in contents.items():
        disk.replace(aside / schema.temporary_name(name), aside / name, content)
    return aside


def _new_aside(folder: Path) -> Path:
    number = 1
    while True:
        aside = folder / f"overtaken-{number}"
        try:
            aside.mkdir()
            return aside
        except FileExistsError:
            number += 1


def overtaken(folder: Path) -> list[Path]:
    """Every checkpoint that has been set aside."""
    asides = _names(folder, lambda entry: re.fullmatch(r"overtaken-[1-9]\d{0,8}", entry.name) is not None)
    return [
        folder / aside / name
        for aside in sorted(asides)
        for name in regular_files(folder / aside)
        if name.endswith(".pt")
    ]


@dataclass(frozen=True)
class GoneBack:
    """A run was set back to `step`, at a `time` in seconds since 1970, and its storage has not heard of it."""

    step: int
    time: float

    def overtakes(self, step: int, when: float) -> bool:
        """Whether a copy of `step` that was made at that time is of the course that was left."""
        return step > self.step and when <= self.time


def note_gone_back(folder: Path, step: int) -> None:
    """Whatever becomes of this attempt, the storage is to be told. Raises OSError."""
    before = gone_back(folder)
    said = {"step": step if before is None else min(before.step, step), "time": time.time()}
    disk.replace(folder / f"{GONE_BACK}.tmp", folder / GONE_BACK, json.dumps(said).encode())


def gone_back(folder: Path) -> GoneBack | None:
    """Whether a run has gone back without a storage's having heard of it."""
    try:
        said = json.loads((folder / GONE_BACK).read_bytes()[:4096])
        step, when = said["step"], float(said["time"])
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None
    return GoneBack(step, when) if type(step) is int and step >= 0 else None


def told_gone_back(folder: Path, what: GoneBack) -> None:
    """The storage has heard of it."""
    if gone_back(folder) == what:
        disk.remove(folder / GONE_BACK)


def keep_final_as_periodic(folder: Path, step: int) -> Path | None:
    """Give `final.pt`, if it is of `step`, the periodic name as well: the run goes on and will write another
    final one.

    Returns the new name; None where final.pt is not of that step, or the name is that of a whole one already. A
    damaged one is set aside.
    """
    final, periodic = folder / schema.FINAL, folder / schema.checkpoint_name(step)
    if not is_regular(final) or _final_step(final) != step:
        return None
    if os.path.lexists(periodic):
        if final.samefile(periodic) or damage(periodic) is None:
            return None
        set_aside(folder, [periodic])
    disk.second_name(final, folder / schema.temporary_name(periodic.name), periodic)
    return periodic


def given_up(steps: Sequence[int], just_saved: int, keep_last: int, keep_every: int) -> list[int]:
    """The steps whose periodic checkpoints retention gives up, oldest first.

    `keep_last` 0 keeps all. Later steps than the one just saved belong to an attempt that this one overtakes:
    they are not counted and not touched here. The one just saved is never given up.
    """
    if keep_last <= 0:
        return []
    past = sorted(step for step in steps if step <= just_saved)
    kept = set(past[-keep_last:]) | {just_saved}
    return [step for step in past if step not in kept and not (keep_every > 0 and step % keep_every == 0)]


def periodic_steps(folder: Path) -> list[int]:
    """The steps of the periodic checkpoints that are there; of a folder that cannot be looked into, none."""
    try:
        names = regular_files(folder)
    except UserError:
        return []
    steps = map(schema.checkpoint_step, names)
    return sorted(step for step in steps if step is not None)


def is_regular(path: Path) -> bool:
    """Whether it is a file and no link to one."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except OSError:
        return False
