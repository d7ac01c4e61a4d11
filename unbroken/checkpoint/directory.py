"""The checkpoints of a run: a list, the newest whole one, the best one, and those that retention removes."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unbroken import text
from unbroken.checkpoint.format import schema
from unbroken.checkpoint.format.checksum import crc32
from unbroken.errors import UserError
from unbroken.files import regular, sync_folder
from unbroken.paths import is_run_id

if TYPE_CHECKING:
    from unbroken.checkpoint.reader import CheckpointFile


@dataclass(frozen=True)
class CheckpointEntry:
    """A file with the name of a checkpoint. The step of a final one is read from it; None if that fails."""

    path: Path
    step: int | None
    final: bool


def open_file(path: Path) -> CheckpointFile:
    """Open a checkpoint without verifying it. Raises UserError."""
    from unbroken.checkpoint.reader import CheckpointFile  # imports torch, which a list of names does not need

    return CheckpointFile(path)


def list_checkpoints(folder: Path) -> list[CheckpointEntry]:
    """Return the checkpoints of a folder in the order of their steps, because times of files cannot be trusted."""
    found = [
        CheckpointEntry(
            folder / name,
            read_step(folder / name) if name == schema.FINAL else schema.checkpoint_step(name),
            name == schema.FINAL,
        )
        for name in regular_files(folder)
        if schema.is_checkpoint_name(name)
    ]
    return sorted(found, key=lambda item: (2**62 if item.step is None else item.step, item.final))


def list_weights(folder: Path) -> list[CheckpointEntry]:
    """Return the files of weights alone in a folder, in the order of their steps."""
    steps = sorted(step for step in map(schema.weights_step, regular_files(folder)) if step is not None)
    return [CheckpointEntry(folder / schema.weights_name(step), step, final=False) for step in steps]


def has_checkpoints(folder: Path) -> bool:
    """Return whether a folder holds files with the names of checkpoints."""
    return any(map(schema.is_checkpoint_name, regular_files(folder)))


def finished_step(entries: Sequence[CheckpointEntry], known: CheckpointFile | None = None) -> int | None:
    """Return the step at which a run ended: that of a whole `final.pt` with no newer checkpoint; None if there is none.

    A run is finished if this is at least its `num_iterations`. The checkpoint `known`, if it is verified, is not
    verified again.
    """
    last = entries[-1] if entries else None
    if last is None or not last.final or last.step is None:
        return None
    is_known = known is not None and known.is_verified and known.is_at(last.path)
    return last.step if is_known or find_damage(last.path) is None else None


def read_step(path: Path) -> int | None:
    """Return the step in a checkpoint; None if the file cannot be read."""
    try:
        with open_file(path) as file:
            step = file.values.get("step")
    except UserError:
        return None
    return step if type(step) is int else None


def regular_files(folder: Path) -> list[str]:
    """Return the names of regular files; none if there is no folder. Links are left out.

    Raises UserError for a folder that cannot be read: otherwise a run would begin from step 0 because its disk fails.
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


WEIGHTS_ONLY = "it holds the weights alone, without the optimizer's state"
DIVERGED = "its weights are NaN or infinite, the run had diverged"


def open_newest_whole(
    entries: Sequence[CheckpointEntry], goal: Callable[[CheckpointFile], int] | None = None
) -> tuple[CheckpointFile | None, list[tuple[Path, str]]]:
    """Open the newest checkpoint whose every checksum holds; return it, and why newer ones are passed over.

    A checkpoint of the earlier program is taken only if there is no whole one of this program. One whose weights are
    not finite is taken only if there is no other. A final one with such weights is still the end of its run, unless the
    run is to be trained on to a later step: that of `goal(file)`.
    """
    damaged: list[tuple[Path, str]] = []
    legacy: list[Path] = []
    diverged: list[CheckpointFile] = []
    newer = 0  # number of `damaged` that are newer than the first of `diverged`
    for entry in reversed(entries):
        try:
            file = open_verified(entry.path)
        except LegacyError:
            legacy.append(entry.path)
            continue
        except UserError as error:
            damaged.append((entry.path, str(error)))
            continue
        if not file.has_diverged or (entry.final and (goal is None or goal(file) <= int(file.values["step"]))):
            for passed_over in diverged:
                passed_over.close()
            return file, damaged
        newer = newer if diverged else len(damaged)
        diverged.append(file)
        damaged.append((entry.path, DIVERGED))
    if diverged:
        for passed_over in diverged[1:]:
            passed_over.close()
        return diverged[0], damaged[:newer]
    for path in legacy:
        try:
            return open_verified(path, legacy=True), damaged
        except UserError as error:
            damaged.append((path, str(error)))
    return None, damaged


class LegacyError(UserError):
    """A checkpoint that this program did not write."""


def find_damage(path: Path) -> str | None:
    """Return in one line why a checkpoint of this program is damaged; None if it is whole."""
    try:
        open_verified(path).close()
    except UserError as error:
        return str(error)
    return None


def open_verified(path: Path, legacy: bool = False) -> CheckpointFile:
    """Open a checkpoint that can be resumed, and verify it. Raises UserError with the damage, without the path.

    Unless `legacy`, a checkpoint of the earlier program, which has an optimizer but not this program's keys, raises
    LegacyError.
    """
    with ExitStack() as opened:
        try:
            file = opened.enter_context(open_file(path))
            if not file.is_ours and not (legacy and "optimizer" in file.values):
                kind = LegacyError if "optimizer" in file.values else UserError
                raise kind("it is not a checkpoint of this program")
            if file.is_weights_only:
                raise UserError(WEIGHTS_ONLY)
            damages = file.verify()
        except LegacyError:
            raise
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
    """Return the folders below `logs`, or links to folders, whose name is a run_id or which hold checkpoints."""
    names = entry_names(logs, lambda entry: entry.is_dir() and not _is_private(entry) and _is_run(entry))
    return [logs / name for name in sorted(names)]


def _is_run(entry: os.DirEntry[str]) -> bool:
    return is_run_id(entry.name) or has_checkpoints(Path(entry.path))


def _is_private(entry: os.DirEntry[str]) -> bool:
    """Return whether a folder belongs to another user and cannot be read, as on a shared disk."""
    return entry.stat().st_uid != os.geteuid() and not os.access(entry.path, os.R_OK | os.X_OK)


def runs_by_last_save(logs: Path) -> list[Path]:
    """Return the folders of runs, the one that saved last first."""

    def last_save(folder: Path) -> float:
        with ExitStack() as opened:
            file = open_newest_readable(folder, opened)
            return 0.0 if file is None else saved_at(file.values, file.path)

    return sorted(list_runs(logs), key=last_save, reverse=True)


def open_newest_readable(folder: Path, opened: ExitStack) -> CheckpointFile | None:
    """Return the newest checkpoint whose structure is sound, without reading its tensors; `opened` closes it."""
    for entry in reversed(list_checkpoints(folder)):
        with suppress(UserError):
            return opened.enter_context(open_file(entry.path))
    return None


def saved_at(values: Mapping[str, Any], path: Path) -> float:
    """Return when a checkpoint with these values was saved, in seconds since 1970.

    It is the time inside the checkpoint, because copying a file changes the file's own time, which counts only if there
    is no other.
    """
    inside = schema.dict_at(values, "progress").get("saved_at")
    if isinstance(inside, float) and 0 < inside < math.inf:
        return inside
    try:
        return os.lstat(path).st_mtime
    except OSError:  # retention of a run in training has removed it
        return 0.0


def clear_debris(folder: Path) -> list[Path]:
    """Remove and return the files of a killed writer. The run must be locked: a live writer's files look the same."""
    removed = []
    for name in sorted(regular_files(folder)):
        if schema.is_debris(name):
            try:
                os.unlink(folder / name)
            except OSError:
                continue
            removed.append(folder / name)
    return removed


def expired_steps(
    steps: Sequence[int], just_saved: int, keep_last: int, keep_every: int, kept: Collection[int] = ()
) -> list[int]:
    """Return the steps whose periodic checkpoints retention removes, oldest first.

    Steps after `just_saved` belong to an abandoned part of the run and are neither counted nor returned.

    Args:
        steps: the steps of all periodic checkpoints.
        just_saved: the step saved last, which is never returned.
        keep_last: number of checkpoints to keep; 0 keeps all.
        keep_every: also keep multiples of this step; 0 keeps none by that rule.
        kept: steps that stay in any case.
    """
    if keep_last <= 0:
        return []
    past = sorted(step for step in steps if step <= just_saved)
    stay = {*past[-keep_last:], just_saved, *kept}
    return [step for step in past if step not in stay and not (keep_every > 0 and step % keep_every == 0)]


# `progress.saved_for` of a checkpoint that was written only for its validation loss, and of one of `--save_steps`.
FOR_BEST, FOR_STEPS = "best", "steps"


def written_for(path: Path, run_id: str | None = None) -> str | None:
    """Return why a run wrote a periodic checkpoint: FOR_BEST, FOR_STEPS or ""; None if retention must not touch it.

    It must not touch a file that cannot be read, a file of another program or of another run than `run_id`, and the
    file of a run's end from before the run was extended. Without `run_id` the file may be of any run and step.
    """
    try:
        with open_file(path) as file:
            values = file.values if file.is_ours else {}
    except UserError:
        return None
    is_end = schema.dict_at(values, "args").get("num_iterations") == values.get("step")
    if not values or (run_id is not None and (values["run_id"] != run_id or is_end)):
        return None
    return str(schema.dict_at(values, "progress").get("saved_for", ""))


# ---- the best checkpoint ---------------------------------------------------------------------------------------------


def best_steps(values: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the steps that `--keep_best` keeps by the values of a checkpoint, the best one first. Untrusted."""
    best = schema.dict_at(values, "progress").get("best")
    pairs = [pair for pair in best if isinstance(pair, list) and len(pair) == 2] if isinstance(best, list) else []
    return tuple(
        step
        for step, loss in pairs
        if type(step) is int and 0 <= step < schema.MAX_COUNT and type(loss) is float and math.isfinite(loss)
    )


def find_best(folder: Path, newest: Mapping[str, Any] | None = None) -> Path | None:
    """Return the checkpoint to which `best.pt` links; without a link, the best one that the newest checkpoint names.

    `newest`: the values of the newest checkpoint, if they are known.
    """
    with suppress(OSError):
        name = os.readlink(folder / schema.BEST)
        if schema.is_checkpoint_name(name) and is_regular(folder / name):
            return folder / name
    with ExitStack() as opened:
        file = open_newest_readable(folder, opened) if newest is None else None
        values = file.values if file is not None else newest or {}
    named = [folder / schema.checkpoint_name(step) for step in best_steps(values)]
    return next((path for path in named if is_regular(path)), None)


def link_best(folder: Path, steps: Sequence[int]) -> None:
    """Make `best.pt` a relative link to the first of these steps that has a checkpoint; remove it if none has.

    The link is replaced by one rename and is durable on return. Raises OSError.
    """
    names = (schema.checkpoint_name(step) for step in steps)
    name = next((name for name in names if is_regular(folder / name)), None)
    link, temporary = folder / schema.BEST, folder / schema.temporary_name(schema.BEST)
    with suppress(FileNotFoundError):
        os.unlink(temporary)
    if not os.path.lexists(link) if name is None else os.path.islink(link) and os.readlink(link) == name:
        return
    if name is None:
        os.unlink(link)
    else:
        os.symlink(name, temporary)
        os.replace(temporary, link)
    sync_folder(folder)


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
