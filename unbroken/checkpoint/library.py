"""The public API for any training loop: save a tree in the background, find the newest whole file, load it.

A checkpoint holds {"tree_format": 1, "step": step, "tree": tree}; `torch.load(path)` opens it with its safe default.
"""

from __future__ import annotations

import fcntl
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from unbroken import files
from unbroken.checkpoint import directory
from unbroken.checkpoint.exceptions import CheckpointError, DamagedError, SaveError, UnsupportedValueError
from unbroken.checkpoint.format import schema
from unbroken.checkpoint.live_tree import TreeToFill, TreeToSave
from unbroken.checkpoint.reader import CheckpointFile
from unbroken.checkpoint.writer import RunCheckpointWriter
from unbroken.distributed.world import Launch, World
from unbroken.errors import UserError
from unbroken.text import printable

TREE_FORMAT = 1
_KEYS = {"tree_format", "step", "tree"}
_LOCK = ".lock"
_LOCK_PATIENCE_SECONDS = 10.0  # a killed process may take seconds to give its memory back
_MOST_UNFOLDED = 4  # times the file's size: what overlapping tensors of another program's file may take


class CheckpointWriter:
    """A writer of checkpoints into a folder, in the background; use it in a `with` statement.

    A checkpoint `model_step000256.pt` is whole, on stable storage, and carries its checksums, or it is absent. One
    process at a time writes into a folder. If torch.distributed is initialised, rank 0 writes its own tree, and the
    calls of the other ranks do nothing; there is no communication.

    Args:
        folder: where the checkpoints are written; it is made if it is missing.
        keep_last: number of checkpoints to keep; 0 keeps all.
        keep_every: also keep checkpoints whose step is a multiple of this; 0 keeps none by that rule.

    Raises SaveError if the folder cannot be written, or another process writes into it.
    """

    def __init__(self, folder: str | os.PathLike[str], *, keep_last: int = 0, keep_every: int = 0) -> None:
        for name, value in (("keep_last", keep_last), ("keep_every", keep_every)):
            if type(value) is not int or value < 0:
                raise CheckpointError(f"{name} is {value!r:.40}: give a whole number from 0")
        self._folder, self._keep_last, self._keep_every = Path(folder), keep_last, keep_every
        self._writer: _TreeWriter | None = None  # made by the first save, which tells the device
        self._lock: int | None = None
        self._writes = not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
        if self._writes:
            self._lock = _lock_folder(self._folder)
            directory.clear_debris(self._folder)

    def save(self, tree: Any, step: int, *, name: str | None = None, overlap: bool = False) -> None:
        """Copy a tree into host memory and write it in the background; wait first for the save before this one.

        Args:
            tree: nested dicts, lists and tuples of tensors, plain values, and objects with a state_dict.
            step: names the file; from 0. A file of the same step is replaced.
            name: of the file, if another one decides the names. `latest` and retention take no notice of it then.
            overlap: return while the copy is in progress. No tensor of the tree may change before the next
                `before_update()`, so call that before every optimizer step.

        Raises UnsupportedValueError if the tree holds something else, and SaveError if an earlier save has failed.
        """
        if type(step) is not int or not 0 <= step < schema.MAX_COUNT:
            raise CheckpointError(f"step is {step!r:.40}: give a whole number from 0")
        if name is not None and (not name or name != os.path.basename(name) or name.startswith(".")):
            raise CheckpointError(
                f"name {printable(name)!r}: give a file name without a folder and without a dot before it"
            )
        if not self._writes:
            return
        if self._lock is None:
            raise SaveError(f"{printable(self._folder, 4096)}: this writer is closed; make a new one")
        self._raise_failed()
        found = TreeToSave(tree)
        if self._writer is None or self._writer.device != found.device:
            self._close_writer()
            world = World(Launch(), found.device)
            self._writer = _TreeWriter(self._folder, world, keep_last=self._keep_last, keep_every=self._keep_every)
        self._writer.name = name
        try:
            self._writer.save({"tree_format": TREE_FORMAT, "step": step, "tree": found.values}, step)
        except UserError as error:
            raise UnsupportedValueError(str(error)) from None
        if not overlap:
            self._writer.before_update()

    def before_update(self) -> None:
        """Wait until the tensors of the last `save(..., overlap=True)` may change."""
        if self._writer is not None:
            self._writer.before_update()

    def wait(self) -> None:
        """Wait until the last save is on stable storage. Raises SaveError if it has failed."""
        if self._writer is not None:
            self._writer.wait()
        self._raise_failed()

    def close(self) -> None:
        """Finish the save in progress, release memory and folder. Raises SaveError if a save has failed."""
        writer = self._writer
        try:
            self._close_writer()
        finally:
            if self._lock is not None:
                files.close(self._lock)
                self._lock = None
        _raise_failed(writer)

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        try:
            self.close()
        except SaveError as failed:
            if kind is None:
                raise
            warnings.warn(str(failed), RuntimeWarning, stacklevel=2)  # the error of the body is raised

    def _raise_failed(self) -> None:
        _raise_failed(self._writer)

    def _close_writer(self) -> None:
        if self._writer is not None:
            writer, self._writer = self._writer, None
            writer.close()
            _raise_failed(writer)


def _raise_failed(writer: _TreeWriter | None) -> None:
    """Raise the error of a save that has ended."""
    for result in writer.results() if writer is not None else []:
        if result.error is not None:
            raise SaveError(f"{printable(result.path, 4096)}: not saved: {result.error}")


class _TreeWriter(RunCheckpointWriter):
    """The writer of a run's checkpoints, for trees of any form. `name`: of the next file, if not that of its step."""

    name: str | None = None

    @property
    def device(self) -> torch.device:
        return self._world.device

    def _name(self, step: int) -> str:
        return self.name or super()._name(step)

    def _check(self, tree: dict[str, Any]) -> None:
        self._checked_readable = False  # two trees of one folder may differ in form

    def _written_for(self, path: Path, run_id: str | None = None) -> str | None:
        """Return "" for a tree, and None for another program's file, which retention does not remove."""
        try:
            with directory.open_file(path) as file:
                return "" if _is_tree(file) else None
        except UserError:
            return None


def _lock_folder(folder: Path) -> int:
    """Make the folder and return a descriptor that holds its lock until it is closed or the process ends.

    lockf and not flock, whose lock would live on in the forked workers of a DataLoader. Raises SaveError.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files.sync_folders_above(folder)
        files.sync_folder(folder)  # a save that was killed may have given a file its name, and not made that durable
        file = files.regular(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
    except OSError as error:
        raise SaveError(f"{printable(folder, 4096)}: cannot be written: {error.strerror}") from None
    give_up = time.monotonic() + _LOCK_PATIENCE_SECONDS
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() > give_up:
                files.close(file)
                raise SaveError(
                    f"{printable(folder, 4096)}: another process writes checkpoints into it; stop that one, give"
                    " another folder, or make the writer after init_process_group"
                ) from None
            time.sleep(0.05)
        except OSError:
            return file  # a filesystem without locks: save rather than refuse


def latest(folder: str | os.PathLike[str]) -> Path | None:
    """Return the checkpoint of the highest step in a folder whose every checksum is right; None if there is none.

    Damaged files are passed over with a RuntimeWarning. Reads the whole file. Raises DamagedError if the folder cannot
    be read.
    """
    with _as_damaged():
        named = {schema.checkpoint_step(name): name for name in directory.regular_files(Path(folder))}
    for step in sorted((step for step in named if step is not None), reverse=True):
        path = Path(folder) / str(named[step])
        try:
            with _open(path) as file:
                damages = file.verify()
            if not damages:
                return path
            problem = f"{printable(path, 4096)}: {damages[0]}"
        except CheckpointError as error:
            problem = str(error)
        warnings.warn(f"{problem}; passed over", RuntimeWarning, stacklevel=2)
    return None


def load(path: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> Any:
    """Return the tree of a checkpoint, with new contiguous tensors on `device`.

    Objects with a state_dict come back as that dict. A file of any other program that `torch.load` opens with its safe
    default is read too. It cannot run code. Raises DamagedError, also for a wrong checksum.
    """
    with _open(Path(path)) as file:
        fill = _tree_to_fill(file, device)
        total = sum(stored.nbytes for stored in {stored for _, stored in file.stored()})
        if total > _MOST_UNFOLDED * file.size:
            raise DamagedError(f"{printable(path, 4096)}: its tensors overlap and would take {total:,} bytes; not read")
        tree = fill.build()
        _restore(file, fill)
        return tree


def load_into(tree: Any, path: str | os.PathLike[str]) -> Any:
    """Copy a checkpoint into a live tree; return the tree with the file's plain values.

    Tensors and modules are filled in place. Other objects with `load_state_dict` get their state by that. Plain values
    are only returned. Names, shapes and dtypes must be those of the file; the top level of `tree` may name only some of
    the file's entries.

    Raises MismatchError, before anything is changed unless an object refuses its state, and DamagedError, after which
    the contents of the tensors are undefined: `latest` returns only files that are whole.
    """
    with _open(Path(path)) as file:
        fill = _tree_to_fill(file, "cpu")
        result = fill.match(tree)
        _restore(file, fill)
    fill.finish()
    return result


def _tree_to_fill(file: CheckpointFile, device: str | torch.device) -> TreeToFill:
    if _is_tree(file):
        return TreeToFill(file.values["tree"], ("tree",), device)
    return TreeToFill(file.values, (), device)


def _restore(file: CheckpointFile, fill: TreeToFill) -> None:
    with _as_damaged():
        file.restore(fill.targets)


def _is_tree(file: CheckpointFile) -> bool:
    return set(file.values) == _KEYS


@contextmanager
def _open(path: Path) -> Iterator[CheckpointFile]:
    """Open a checkpoint; a renamed one is damaged. Raises DamagedError."""
    with _as_damaged():
        file = CheckpointFile(path)
    with file:
        if _is_tree(file):
            version, step = file.values["tree_format"], file.values["step"]
            if version != TREE_FORMAT:
                raise DamagedError(
                    f"{printable(path, 4096)}: its format is {printable(version)}, this version knows {TREE_FORMAT};"
                    " use a newer version of unbroken"
                )
            if schema.checkpoint_step(path.name) not in (None, step):
                raise DamagedError(
                    f"{printable(path, 4096)}: it is of step {printable(step)}; give it the name of that step"
                )
        yield file


@contextmanager
def _as_damaged() -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except UserError as error:
        raise DamagedError(str(error)) from None
