"""A checkpoint as it is read: its structure checked before anything is allocated, its bytes while they are
copied.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from unbroken import text
from unbroken.checkpoint.format import schema
from unbroken.checkpoint.format.checksum import crc32
from unbroken.checkpoint.format.pickle_reader import unpickle
from unbroken.checkpoint.format.stored_tensor import StoredTensor
from unbroken.checkpoint.format.zip_index import ZipEntry, list_entries
from unbroken.checkpoint.parallel_read import ParallelReader, Progress, ReadJob, read_exactly, slice_target
from unbroken.distributed.sliced_tensor import SlicedTensor, TensorSlice
from unbroken.errors import UserError
from unbroken.host import hostname

MAX_PICKLE = 256 << 20
_MAX_SMALL = 4096
_DATA = "data/"
_HASH_BLOCK = 1 << 20

_REASONS = {
    errno.ENOENT: "there is no such file",
    errno.ENOTDIR: "there is no such file",
    errno.EISDIR: "it is a folder, not a checkpoint",
    errno.EACCES: "it may not be read: change its permissions",
    errno.ELOOP: "its symbolic links go round in a circle",
    errno.ENAMETOOLONG: "the name is too long to be that of a file",
}


@dataclass(frozen=True)
class _Match:
    """A leaf of the caller's tree and the stored tensor at the same place."""

    name: str
    leaf: SlicedTensor
    stored: StoredTensor


class CheckpointFile:
    """An open checkpoint. Every complaint is a UserError of one line that begins with the path."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._verified: tuple[str, int, int, int, int] | None = None
        self._file = -1
        check_torch(torch.__version__)
        try:
            self._file, self._size = _open(self.path)
            self._loader = ParallelReader(self._file)
            self._entries = list_entries(self._bytes, self._size)
            self.values: dict[str, Any] = self._read_values()
            self.is_ours = "format" in self.values and "progress" in self.values
            if self.is_ours:
                schema.check_tree(self.values, lambda value: isinstance(value, StoredTensor))
        except ValueError as error:
            self.close()
            raise self._complaint(error) from None
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> CheckpointFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; its values stay."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    @property
    def size(self) -> int:
        """Of the file, in bytes."""
        return self._size

    @property
    def identity(self) -> tuple[str, int, int, int, int]:
        """This machine's name and the file's device, inode, size and time of change.

        Equal where two processes have the same file open and nobody wrote to it in between.
        """
        about = os.fstat(self._file)
        return hostname(), about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns

    @property
    def is_verified(self) -> bool:
        """Whether every checksum held, and nobody has written to the file since."""
        return self._verified is not None and self._verified == self.identity

    def trust(self, verified: tuple[str, int, int, int, int] | None) -> None:
        """Skip checksums from here on if this is the file of that identity, which was verified; None skips none."""
        self._verified = verified

    @property
    def is_in_place(self) -> bool:
        """Whether its path still names this very file."""
        try:
            return os.path.samestat(os.fstat(self._file), os.stat(self.path))
        except OSError:
            return False

    def stored(self) -> Iterator[tuple[str, StoredTensor]]:
        """Every tensor with its place in the tree, as in `optimizer.state.0.exp_avg`."""
        for path, value in schema.walk(self.values):
            if isinstance(value, StoredTensor):
                yield schema.dotted_path(path), value

    def tensor(self, stored: StoredTensor) -> torch.Tensor:
        """A copy of one tensor, contiguous, on the CPU; its storage's checksum is verified."""
        try:
            return self._strided(stored, verify=True).contiguous()
        except UserError as error:
            raise self._complaint(error) from None

    def restore(self, tree: dict[str, Any], *, cast: bool = False) -> None:
        """Copy the file's tensors into the leaves of `tree`, a nested dict/list; plain values in it are
        passed over.

        A leaf and the tensor at the same place must agree in shape and dtype (`cast`: two floating-point
        dtypes may differ) before anything is copied. All of each storage that is touched is verified,
        whatever part of it goes into this process's slices, unless the file `is_verified` already. After an error the
        leaves hold anything.
        """
        verify = not self.is_verified
        try:
            meetings = [_match(self.values, path, leaf, cast) for path, leaf in _sliced_tensors(tree)]
            direct: list[_Match] = []
            indirect: list[_Match] = []
            for meeting in meetings:
                stored, leaf = meeting.stored, meeting.leaf
                (direct if stored.contiguous and stored.dtype == leaf.dtype else indirect).append(meeting)
            self._restore_direct(direct, verify)
            for meeting in indirect:
                flat = self._strided(meeting.stored, verify).reshape(-1)
                for piece in meeting.leaf.slices:
                    piece.data.copy_(flat[piece.start : piece.stop])
        except UserError as error:
            raise self._complaint(error) from None

    def verify(self, progress: Progress | None = None) -> list[str]:
        """Read all of the file; one line for each entry whose checksum is wrong. `progress(bytes done, bytes
        in all)`.
        """
        before = self.identity
        try:
            damaged = self._loader.run([ReadJob(entry) for entry in self._entries.values()], progress)
        except UserError as error:
            raise self._complaint(error) from None
        self._verified = None if damaged else before
        return [self._damage(entry) for entry in damaged]

    def sha256(self) -> str:
        """Of the whole file."""
        digest = hashlib.sha256()
        try:
            for start in range(0, self._size, _HASH_BLOCK):
                digest.update(self._bytes(start, min(_HASH_BLOCK, self._size - start)))
        except UserError as error:
            raise self._complaint(error) from None
        return digest.hexdigest()

    def _complaint(self, error: ValueError) -> UserError:
        return UserError(f"{text.printable(self.path, 4096)}: {error}")

    def _bytes(self, offset: int, size: int) -> bytes:
        memory = bytearray(size)
        read_exactly(self._file, memoryview(memory), offset)
        return bytes(memory)

    def _small(self, name: str, limit: int) -> bytes | None:
        """The content of an entry that is no storage, verified; None if there is none."""
        entry = self._entries.get(name)
        if entry is None:
            return None
        if entry.size > limit:
            raise UserError(f"its entry {name} has {entry.size} bytes, more than the {limit} that make sense")
        content = self._bytes(entry.offset, entry.size)
        if crc32(content) != entry.crc:
            raise UserError(f"it is damaged: the checksum of {name} is wrong")
        return content

    def _read_values(self) -> dict[str, Any]:
        if self._small("byteorder", _MAX_SMALL) not in (None, b"little"):
            raise UserError("it was written on a big-endian machine, which is not supported")
        pickled = self._small("data.pkl", MAX_PICKLE)
        if pickled is None:
            raise UserError("it is a zip without a data.pkl: torch.save did not write it")
        sizes = {name[len(_DATA) :]: entry.size for name, entry in self._entries.items() if name.startswith(_DATA)}
        values = unpickle(pickled, sizes)
        if type(values) is not dict:
            raise UserError(f"it holds a {type(values).__name__}, not a dict")
        return values

    def _entry(self, stored: StoredTensor) -> ZipEntry:
        return self._entries[_DATA + stored.key]

    def _restore_direct(self, meetings: Sequence[_Match], verify: bool) -> None:
        """Tensors whose bytes are right as they are. One pass over each storage; a second leaf of it costs
        another.
        """
        jobs: list[ReadJob] = []
        seen: set[str] = set()
        done: set[tuple[int, StoredTensor]] = set()
        for meeting in meetings:
            stored, entry = meeting.stored, self._entry(meeting.stored)
            if (id(meeting.leaf), stored) in done:
                continue
            done.add((id(meeting.leaf), stored))
            start = stored.offset * stored.dtype.itemsize
            slices = sorted(
                (piece for piece in meeting.leaf.slices if piece.data.numel()), key=lambda piece: piece.start
            )
            check = verify and stored.key not in seen
            if slices or (check and meeting.leaf.slices):
                jobs.append(ReadJob(entry, tuple(slice_target(piece, start) for piece in slices), check))
                seen.add(stored.key)
        damaged = self._loader.run(jobs)
        if damaged:
            raise UserError(self._damage(damaged[0]))

    def _strided(self, stored: StoredTensor, verify: bool) -> torch.Tensor:
        """The tensor as it was saved, over a copy of its storage."""
        entry = self._entry(stored)
        memory = torch.empty(entry.size, dtype=torch.uint8)
        if entry.size and self._loader.run([ReadJob(entry, (slice_target(TensorSlice(0, memory), 0),), verify)]):
            raise UserError(self._damage(entry))
        return memory.view(stored.dtype).as_strided(stored.shape, stored.strides, stored.offset)

    def _damage(self, entry: ZipEntry) -> str:
        """What is damaged, by the name of its tensor where it has one."""
        key = entry.name.removeprefix(_DATA)
        names = (
            schema.dotted_path(path)
            for path, leaf in schema.walk(self.values)
            if isinstance(leaf, StoredTensor) and leaf.key == key
        )
        name = next(names, None) if entry.name.startswith(_DATA) else None
        return f"it is damaged: the checksum of {name or text.printable(entry.name)} is wrong"


def check_torch(version: str) -> None:
    """Refuse versions whose torch.load runs code from a file even with weights_only=True (CVE-2025-32434).

    Nothing here calls it, but what is checked here will be opened with it elsewhere in the same environment.
    """
    if [int(number) for number in version.split("+")[0].split(".")[:2]] < [2, 6]:
        raise UserError(
            f"torch {version} can be made to run code by a checkpoint (CVE-2025-32434): install 2.6 or newer"
        )


def _open(path: Path) -> tuple[int, int]:
    """(descriptor, size) of a regular file; a link that the user typed is followed."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        known = _REASONS.get(error.errno or 0, error.strerror) if isinstance(error, OSError) else "that is not a path"
        raise UserError(f"{known}") from None
    found = os.fstat(file)
    if not stat.S_ISREG(found.st_mode):
        os.close(file)
        raise UserError(
            "it is a folder, not a checkpoint" if stat.S_ISDIR(found.st_mode) else "it is not a regular file"
        )
    return file, found.st_size


def _sliced_tensors(tree: object) -> Iterator[tuple[tuple[str | int, ...], SlicedTensor]]:
    for place, value in schema.walk(tree):
        if isinstance(value, SlicedTensor):
            yield place, value


def _match(values: object, path: tuple[str | int, ...], leaf: SlicedTensor, cast: bool) -> _Match:
    """Find the stored tensor for a leaf and see that it fits."""
    name = schema.dotted_path(path)
    for part in path:
        inside = isinstance(values, (list, tuple)) and isinstance(part, int) and part < len(values)
        if inside or (isinstance(values, dict) and part in values):
            values = values[part]  # type: ignore[index]
        else:
            raise UserError(f"it has no {name}, which this run needs: another model or optimizer made it")
    if not isinstance(values, StoredTensor):
        raise UserError(f"its {name} is a {text.printable(type(values).__name__)}, not a tensor")
    dtypes_fit = values.dtype == leaf.dtype or (
        cast and values.dtype.is_floating_point and leaf.dtype.is_floating_point
    )
    if values.shape != leaf.shape or not dtypes_fit:
        raise UserError(
            f"its {name} is {list(values.shape)} {str(values.dtype).removeprefix('torch.')},"
            f" this run's is {list(leaf.shape)} {str(leaf.dtype).removeprefix('torch.')}:"
            " another model made it"
        )
    return _Match(name, leaf, values)
