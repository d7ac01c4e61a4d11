"""Going back to an earlier checkpoint: newer ones are set aside, never overwritten."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from unbroken.checkpoint import disk
from unbroken.checkpoint.directory import entry_names, find_damage, is_regular, read_step, regular_files
from unbroken.checkpoint.format import schema

REWIND_MARKER = ".gone_back"


def set_aside(folder: Path, paths: Sequence[Path]) -> Path:
    """Move checkpoints that this attempt writes anew into a new folder overtaken-1, -2, ...; return it.

    Each move is one rename, so a kill between two of them loses nothing: the next start moves the rest.
    """
    aside = _new_aside(folder)
    for path in paths:
        os.rename(path, aside / path.name)
    for changed in (aside, folder):
        disk.sync_folder(changed)
    return aside


def link_aside(path: Path) -> Path:
    """Link a checkpoint that is about to be replaced into a new folder overtaken-1, -2, ...; return it."""
    aside = _new_aside(path.parent)
    disk.second_name(path, aside / schema.temporary_name(path.name), aside / path.name)
    disk.sync_folder(path.parent)
    return aside


def write_aside(folder: Path, contents: dict[str, bytes]) -> Path:
    """Write texts that are about to be replaced into a new folder overtaken-1, -2, ...; return it. Raises OSError."""
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
    """Return every checkpoint that has been set aside."""
    asides = entry_names(folder, lambda entry: re.fullmatch(r"overtaken-[1-9]\d{0,8}", entry.name) is not None)
    return [
        folder / aside / name
        for aside in sorted(asides)
        for name in regular_files(folder / aside)
        if name.endswith(".pt")
    ]


@dataclass(frozen=True)
class RewindMarker:
    """A marker that a run went back to `step`, at `time` (seconds since 1970), and its mirror does not know it yet."""

    step: int
    time: float

    def overtakes(self, step: int, when: float) -> bool:
        """Return whether a copy of `step`, made at time `when`, belongs to the abandoned steps."""
        return step > self.step and when <= self.time


def write_rewind_marker(folder: Path, step: int) -> None:
    """Mark the run as gone back, until its mirror knows it. Raises OSError."""
    before = read_rewind_marker(folder)
    said = {"step": step if before is None else min(before.step, step), "time": time.time()}
    disk.replace(folder / f"{REWIND_MARKER}.tmp", folder / REWIND_MARKER, json.dumps(said).encode())


def read_rewind_marker(folder: Path) -> RewindMarker | None:
    """Return the marker of a run that has gone back; None if there is none."""
    try:
        said = json.loads((folder / REWIND_MARKER).read_bytes()[:4096])
        step, when = said["step"], float(said["time"])
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None
    return RewindMarker(step, when) if type(step) is int and step >= 0 else None


def clear_rewind_marker(folder: Path, what: RewindMarker) -> None:
    """Remove the marker `what`: the mirror knows it now."""
    if read_rewind_marker(folder) == what:
        disk.remove(folder / REWIND_MARKER)


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
