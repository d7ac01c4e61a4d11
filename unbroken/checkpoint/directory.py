"""Which checkpoints a run has, which is the newest whole one, and which retention removes."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from unbroken import text
from unbroken.checkpoint.format import schema
from unbroken.checkpoint.format.checksum import crc32
from unbroken.errors import UserError
from unbroken.files import regular
from unbroken.paths import is_run_id

if TYPE_CHECKING:
    from unbroken.checkpoint.reader import CheckpointFile


@dataclass(frozen=True)
class CheckpointEntry:
    """A file with the name of a checkpoint. The step of a final one is read from it; None if that fails."""

    path: Path
    step: int | None
    final: bool


def list_checkpoints(folder: Path) -> list[CheckpointEntry]:
    """Return the checkpoints of a folder in the order of their steps, because times of files cannot be trusted."""
    found = [
        CheckpointEntry(
            folder / name,
            read_step(folder / name) if name == schema.FINAL else schema.checkpoint_step(name),
            name == schema.FINAL,
        )
        for name in regular_files(folder)
        if name == schema.FINAL or schema.checkpoint_step(name) is not None
    ]
    return sorted(found, key=lambda item: (2**62 if item.step is None else item.step, item.final))


def finished_step(folder: Path) -> int | None:
    """Return the step of `final.pt`; None if there is none or it is damaged."""
    final = folder / schema.FINAL
    return read_step(final) if is_regular(final) and find_damage(final) is None else None


def read_step(path: Path) -> int | None:
    """Return the step in a checkpoint; None if the file cannot be read."""
    from unbroken.checkpoint.reader import CheckpointFile  # imports torch, which a list of names does not need

    try:
        with CheckpointFile(path) as file:
            step = file.values.get("step")
    except UserError:
        return None
    return step if type(step) is int else None


def regular_files(folder: Path) -> list[str]:
    """Return the names of regular files; none if there is no folder. Links are left out.

    Raises UserError for a folder that cannot be read, so that a run does not begin anew because its disk fails.
    """
    return entry_names(folder, lambda entry: entry.is_file(follow_symlinks=False))


def entry_names(folder: Path, condition: Callable[[os.DirEntry[str]], bool]) -> list[str]:
    """Return the names in a folder that meet the condition; none if there is no folder. Raises UserError."""
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in entries if condition(entry)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(f"cannot look into the folder {text.printable(folder, 4096)}: {error.strerror}") from None


def newest_whole(folder: Path) -> tuple[CheckpointEntry | None, list[tuple[Path, str]]]:
    """Return the newest checkpoint whose every checksum holds, and the newer damaged ones, each with the reason."""
    file, damaged = open_newest_whole(folder)
    if file is None:
        return None, damaged
    file.close()
    return CheckpointEntry(file.path, int(file.values["step"]), file.path.name == schema.FINAL), damaged


def open_newest_whole(folder: Path) -> tuple[CheckpointFile | None, list[tuple[Path, str]]]:
    """Return what `newest_whole` does, with the file open, so that no other can take its place before it is read."""
    damaged: list[tuple[Path, str]] = []
    for entry in reversed(list_checkpoints(folder)):
        try:
            return _open_verified(entry.path), damaged
        except UserError as error:
            damaged.append((entry.path, str(error)))
    return None, damaged


def find_damage(path: Path) -> str | None:
    """Return in one line why a checkpoint of this program is damaged; None if it is whole."""
    try:
        _open_verified(path).close()
    except UserError as error:
        return str(error)
    return None


def _open_verified(path: Path) -> CheckpointFile:
    """Open a checkpoint of this program and verify it. Raises UserError with the damage, without the path."""
    from unbroken.checkpoint.reader import CheckpointFile  # imports torch, which a list of names does not need

    with ExitStack() as opened:
        try:
            file = opened.enter_context(CheckpointFile(path))
            damages = file.verify() if file.is_ours else ["it is not a checkpoint of this program"]
        except UserError as error:
            raise UserError(str(error).removeprefix(f"{text.printable(path, 4096)}: ")) from None
        named, step = schema.checkpoint_step(path.name), file.values.get("step")
        if file.is_ours and named not in (None, step):
            damages = [f"its name says step {named}, but it is of step {step}"]
        if damages:
            raise UserError(damages[0])
        opened.pop_all()
        return file


def list_runs(logs: Path) -> list[Path]:
    """Return the folders below `logs`, or links to folders, whose name is a run_id."""
    names = entry_names(logs, lambda entry: is_run_id(entry.name) and entry.is_dir() and not _is_private(entry))
    return [logs / name for name in sorted(names)]


def _is_private(entry: os.DirEntry[str]) -> bool:
    """Return whether a folder belongs to another user and cannot be read, as on a shared disk."""
    return entry.stat().st_uid != os.geteuid() and not os.access(entry.path, os.R_OK | os.X_OK)


def runs_by_last_save(logs: Path) -> list[Path]:
    """Return the folders of runs, the one with the newest checkpoint file first."""

    def last_save(folder: Path) -> float:
        return max((_modified_time(found.path) for found in list_checkpoints(folder)), default=0.0)

    return sorted(list_runs(logs), key=last_save, reverse=True)


def _modified_time(path: Path) -> float:
    try:
        return os.lstat(path).st_mtime
    except OSError:  # retention of a run in training has removed it
        return 0.0


def clear_debris(folder: Path) -> list[Path]:
    """Remove and return the files that a killed writer left; needs the run's lock, as a live writer's look the same."""
    removed = []
    for name in sorted(regular_files(folder)):
        if schema.is_debris(name):
            try:
                os.unlink(folder / name)
            except OSError:
                continue
            removed.append(folder / name)
    return removed


def expired_steps(steps: Sequence[int], just_saved: int, keep_last: int, keep_every: int) -> list[int]:
    """Return the steps whose periodic checkpoints retention removes, oldest first.

    Steps after `just_saved` belong to an abandoned part of the run and are neither counted nor returned.

    Args:
        steps: the steps of all periodic checkpoints.
        just_saved: the step saved last, which is never returned.
        keep_last: number of checkpoints to keep; 0 keeps all.
        keep_every: also keep multiples of this step; 0 keeps none by that rule.
    """
    if keep_last <= 0:
        return []
    past = sorted(step for step in steps if step <= just_saved)
    kept = set(past[-keep_last:]) | {just_saved}
    return [step for step in past if step not in kept and not (keep_every > 0 and step % keep_every == 0)]


def periodic_steps(folder: Path) -> list[int]:
    """Return the steps of the periodic checkpoints; none for a folder that cannot be read."""
    try:
        names = regular_files(folder)
    except UserError:
        return []
    steps = map(schema.checkpoint_step, names)
    return sorted(step for step in steps if step is not None)


def is_regular(path: Path) -> bool:
    """Return whether the path is a regular file and not a link."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except OSError:
        return False


FINGERPRINT_TAIL = 256 << 10  # a checkpoint's last bytes: the directory of its zip, with the CRC-32 of every entry


@dataclass(frozen=True)
class Fingerprint:
    """A fingerprint of a checkpoint file: `size` in bytes, and the CRC-32 of its tail, which holds all other CRCs."""

    size: int
    tail: int

    @classmethod
    def of(cls, path: Path) -> Fingerprint:
        """Return the fingerprint of a file. Raises OSError."""
        with open(path, "rb", opener=regular) as file:
            size = os.fstat(file.fileno()).st_size
            return cls(size, crc32(os.pread(file.fileno(), FINGERPRINT_TAIL, max(0, size - FINGERPRINT_TAIL))))


def fingerprint_of(path: Path) -> Fingerprint | None:
    """Return the fingerprint of a file; None if there is no such file."""
    try:
        return Fingerprint.of(path)
    except OSError:
        return None
