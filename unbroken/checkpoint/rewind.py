"""Going back to an earlier checkpoint: newer ones are set aside, never overwritten, and the run records the rewind.

Two copies of a run, on two machines or in a storage, compare these records to decide whose checkpoints count.
"""

from __future__ import annotations

import json
import os
import re
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from unbroken.checkpoint import disk
from unbroken.checkpoint.directory import entry_names, find_damage, is_regular, read_step
from unbroken.checkpoint.format import schema
from unbroken.files import regular, sync_folder

REWINDS = ".rewinds.json"  # in the run's folder


def set_aside(folder: Path, paths: Sequence[Path]) -> Path:
    """Move checkpoints that this attempt will write again into a new folder overtaken-1, -2, ...; return it.

    Each move is one rename, so a kill between two of them loses nothing: the next start moves the rest.
    """
    aside = _new_aside(folder)
    for path in paths:
        os.rename(path, aside / path.name)
    for changed in (aside, folder):
        sync_folder(changed)
    return aside


def link_aside(path: Path) -> Path:
    """Link a checkpoint that is about to be replaced into a new folder overtaken-1, -2, ...; return it."""
    aside = _new_aside(path.parent)
    disk.second_name(path, aside / schema.temporary_name(path.name), aside / path.name)
    sync_folder(path.parent)
    return aside


def write_aside(folder: Path, contents: dict[str, bytes]) -> Path:
    """Write texts that are about to be replaced into a new folder overtaken-1, -2, ...; return it. Raises OSError."""
    aside = _new_aside(folder)
    for name, content in contents.items():
        disk.replace(aside / schema.temporary_name(name), aside / name, content)
    return aside


def is_aside(name: str) -> bool:
    """Return whether a folder of this name was made for what was set aside."""
    return re.fullmatch(r"overtaken-[1-9]\d{0,8}", name) is not None


def sync_names(folder: Path) -> None:
    """Make the names in a run's folder and in those set aside durable. Raises OSError.

    An attempt that was killed may have given them and not synced them; whoever finds them would do nothing more.
    """
    for aside in filter(is_aside, entry_names(folder, lambda entry: entry.is_dir(follow_symlinks=False))):
        sync_folder(folder / aside)
    sync_folder(folder)


def _new_aside(folder: Path) -> Path:
    number = 1
    while True:
        aside = folder / f"overtaken-{number}"
        try:
            aside.mkdir()
        except FileExistsError:
            number += 1
        else:
            sync_folder(folder)  # before anything is moved into it
            return aside


@dataclass(frozen=True)
class Rewind:
    """A return of a run to `step`, after which it takes another course; at `time`, in seconds since 1970."""

    id: str
    step: int
    time: float


Rewinds = tuple[Rewind, ...]  # of a run, oldest first


@dataclass(frozen=True)
class Divergence:
    """A divergence of two copies of a run after `step`: one has gone back, and the other does not know it."""

    step: int
    ours_is_newer: bool


def find_divergence(ours: Rewinds, theirs: Rewinds) -> Divergence | None:
    """Compare the rewinds of two copies of a run; None if they are on the same course.

    The copy that went back later is the newer one.
    """
    common = 0
    while common < min(len(ours), len(theirs)) and ours[common] == theirs[common]:
        common += 1
    only_ours, only_theirs = ours[common:], theirs[common:]
    if not only_ours and not only_theirs:
        return None
    last = [max((rewind.time for rewind in only), default=-1.0) for only in (only_ours, only_theirs)]
    return Divergence(min(rewind.step for rewind in only_ours + only_theirs), last[0] > last[1])


def parse_rewinds(value: Any) -> Rewinds:
    """Return the rewinds in a JSON value. Raises ValueError, TypeError or KeyError if it holds anything else."""
    found = tuple(Rewind(str(item["id"]), item["step"], float(item["time"])) for item in value)
    if any(type(rewind.step) is not int or rewind.step < 0 or not 0 <= rewind.time < 2**40 for rewind in found):
        raise ValueError
    return found


def read_rewinds(folder: Path) -> Rewinds:
    """Return the rewinds of a run; none if its file is missing or makes no sense."""
    try:
        with open(folder / REWINDS, "rb", opener=regular) as file:
            return parse_rewinds(json.loads(file.read(1 << 20)))
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return ()


def write_rewinds(folder: Path, rewinds: Rewinds) -> None:
    """Write the rewinds of a run. Raises OSError."""
    content = json.dumps([asdict(rewind) for rewind in rewinds]).encode()
    disk.replace(folder / f"{REWINDS}.tmp", folder / REWINDS, content)


def record_rewind(folder: Path, step: int) -> None:
    """Record that the run goes back to `step` now. Raises OSError."""
    write_rewinds(folder, (*read_rewinds(folder), Rewind(uuid.uuid4().hex, step, time.time())))


def keep_final_as_periodic(folder: Path, step: int) -> Path | None:
    """Give `final.pt`, if it is of `step`, the periodic name too, because the run will write another final one.

    Return the new name; None if final.pt is of another step or a whole checkpoint has that name. A damaged one is set
    aside.
    """
    final, periodic = folder / schema.FINAL, folder / schema.checkpoint_name(step)
    if not is_regular(final) or read_step(final) != step:
        return None
    if os.path.lexists(periodic):
        if final.samefile(periodic) or find_damage(periodic) is None:
            return None
        set_aside(folder, [periodic])
    disk.second_name(final, folder / schema.temporary_name(periodic.name), periodic)
    return periodic
