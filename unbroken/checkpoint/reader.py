"""The reader of a checkpoint: it checks the structure before memory is allocated, the bytes during the copy."""

from __future__ import annotations

import errno
import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from unbroken import files, text
from unbroken.checkpoint.format import foreign, schema
from unbroken.checkpoint.format.checksum import crc32, crc32_combine
from unbroken.checkpoint.format.digest import StateDigest, digest_state
from unbroken.checkpoint.format.pickle_reader import unpickle
from unbroken.checkpoint.format.stored_tensor import StoredTensor
from unbroken.checkpoint.format.zip_index import ZipEntry, list_entries
from unbroken.checkpoint.parallel_read import EXPONENTS, ParallelReader, Progress, ReadJob, read_exactly, slice_target
from unbroken.distributed.sliced_tensor import SlicedTensor, TensorSlice
from unbroken.distributed.world import World
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
    """A tensor of the caller's tree and the stored tensor at the same path."""

    live: SlicedTensor
    stored: StoredTensor

    @property
    def is_direct(self) -> bool:
        """Whether the stored bytes are those of the live tensor."""
        return self.stored.contiguous and self.stored.dtype == self.live.dtype


class CheckpointFile:
    """An open checkpoint, whose structure has been checked. `values` is its tree, with a StoredTensor for each tensor.

    The constructor and every method raise UserError: one line that begins with the path.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._verified: tuple[str, int, int, int, int] | None = None
        self._file = -1
        check_torch(torch.__version__)
        try:
            self._file, self._size = _open(self.path)
            self._reader = ParallelReader(self._file)
            self._entries = self._list_entries()
            self.values: dict[str, Any] = self._read_values()
            self.is_ours = "format" in self.values and "progress" in self.values
            if self.is_ours:
                schema.check_tree(self.values, lambda value: isinstance(value, StoredTensor))
        except ValueError as error:
            self.close()
            raise self._error(error) from None
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> CheckpointFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; `values` stays."""
        if self._file >= 0:
            files.close(self._file)
            self._file = -1

    @property
    def size(self) -> int:
        """Size of the file in bytes."""
        return self._size

    @property
    def identity(self) -> tuple[str, int, int, int, int]:
        """Host, device, inode, size and time of change: equal if two processes have the same unchanged file open."""
        found = os.fstat(self._file)
        return hostname(), found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns

    @property
    def is_weights_only(self) -> bool:
        """Whether the file is a run's weights without the optimizer's state, from which nothing can be resumed."""
        return self.is_ours and not self.values["optimizer"]["param_groups"]

    @property
    def is_verified(self) -> bool:
        """Whether every checksum was right, and the file has not been written to since."""
        return self._verified is not None and self._verified == self.identity

    @property
    def has_diverged(self) -> bool:
        """Whether `verify` has found weights that are NaN or infinite."""
        return bool(self._reader.not_finite)

    def trust(self, verified: tuple[str, int, int, int, int] | None) -> None:
        """Skip checksums from now on if this is the file with the identity `verified`; None skips none."""
        self._verified = verified

    @property
    def is_in_place(self) -> bool:
        """Whether the path still leads to this file."""
        return self.is_at(self.path)

    def is_at(self, path: Path) -> bool:
        """Return whether a path leads to this file."""
        try:
            return os.path.samestat(os.fstat(self._file), os.stat(path))
        except OSError:
            return False

    def stored(self) -> Iterator[tuple[str, StoredTensor]]:
        """Yield every tensor with its path in the tree, such as `optimizer.state.0.exp_avg`."""
        for path, value in schema.walk(self.values):
            if isinstance(value, StoredTensor):
                yield schema.dotted_path(path), value

    def tensor(self, stored: StoredTensor, verify: bool = True) -> torch.Tensor:
        """Return a contiguous copy of one tensor on the CPU. Without `verify`, also if its checksum is wrong."""
        with self._naming_path():
            return self._strided(stored, verify).contiguous()

    def restore(self, tree: dict[str, Any], *, cast: bool = False, check: bool = True) -> None:
        """Copy the file's tensors into the sliced tensors of `tree`, whose plain values are ignored.

        Before anything is copied, shapes and dtypes are compared. Unless the file `is_verified`, each storage is
        verified completely, even if only a slice of it is needed. After an error the contents of the tensors are
        undefined.

        Args:
            tree: nested dicts and lists, shaped like the file's `values`.
            cast: whether two floating-point dtypes may differ.
            check: whether storages are verified.
        """
        with self._naming_path():
            self._fill(self._matches(tree, cast), check and not self.is_verified)

    def restore_slices(self, tree: dict[str, Any], world: World, *, cast: bool = False) -> None:
        """Restore as `restore` does, where the slices of all ranks cover each element once. Collective.

        Each rank verifies only what it reads: the checksum of a storage is combined from those of its slices. So all
        ranks together read each byte once. An error is raised on all ranks.

        Args:
            tree: nested dicts and lists, shaped like the file's `values`.
            world: the ranks; all have opened a file with the same checksums.
            cast: whether two floating-point dtypes may differ.
        """
        (check,) = world.any_rank(not self.is_verified)
        with world.raise_together(), self._naming_path():
            matches = self._matches(tree, cast)
            sharing = Counter(match.stored.key for match in matches)
            covered, others = list[_Match](), list[_Match]()
            for match in matches:
                (covered if sharing[match.stored.key] == 1 and self._is_alone(match) else others).append(match)
            self._fill(others, check)
            jobs = [
                ReadJob(self._entry(match.stored), (target,), check, start=target.start, stop=target.stop)
                for match in covered
                for target in (slice_target(part, 0) for part in match.live.slices)
            ]
            crcs = self._reader.run(jobs)
            read = [(job.entry.name, (job.start, job.end, crc)) for job, crc in zip(jobs, crcs, strict=True)]
        parts = defaultdict[str, list[tuple[int, int, int]]](list)  # of all ranks, by the name of the entry
        for name, part in chain.from_iterable(world.gather(read)):
            parts[name].append(part)
        with world.raise_together(), self._naming_path():
            for match in covered[world.rank :: world.size] if check else ():
                entry = self._entry(match.stored)
                if _combine(parts[entry.name]) != entry.crc:
                    raise UserError(self._describe_damage(entry))

    def _matches(self, tree: dict[str, Any], cast: bool) -> list[_Match]:
        """Return the sliced tensors of a tree with the stored tensors at their paths. Raises UserError."""
        live = ((path, value) for path, value in schema.walk(tree) if isinstance(value, SlicedTensor))
        return self._without_twins([_match(self.values, path, tensor, cast) for path, tensor in live])

    def _is_alone(self, match: _Match) -> bool:
        """Return whether the bytes of the live tensor are those of the whole storage."""
        size = match.live.numel * match.live.dtype.itemsize
        return match.is_direct and match.stored.offset == 0 and size == self._entry(match.stored).size

    def _fill(self, matches: Sequence[_Match], check: bool) -> None:
        """Read all slices of the live tensors; with `check` verify their storages completely."""
        self._restore_direct([match for match in matches if match.is_direct], check)
        for match in matches:
            if not match.is_direct:
                flat = self._strided(match.stored, check).reshape(-1)
                for part in match.live.slices:
                    part.data.copy_(flat[part.start : part.stop])

    def _without_twins(self, matches: list[_Match]) -> list[_Match]:
        """Return one match for each live tensor, as two reads into one memory would mix. Raises UserError.

        A live tensor has two names if weights are tied; a file that stores it twice must store the same numbers.
        """
        first: dict[int, _Match] = {}
        for match in matches:
            kept = first.setdefault(id(match.live), match)
            if kept.stored != match.stored and not torch.equal(self.tensor(kept.stored), self.tensor(match.stored)):
                raise UserError("it has two different tensors where this model has one (tied weights): another model")
        return list(first.values())

    def verify(self, progress: Progress | None = None) -> list[str]:
        """Read the whole file; return one line for each entry whose checksum is wrong.

        `progress` is called with (bytes done, bytes in all).
        """
        before = self.identity
        weights = {_DATA + stored.key: stored for name, stored in self.stored() if name.startswith("model.")}
        kinds = {name: EXPONENTS.get(stored.dtype) for name, stored in weights.items()}
        jobs = [ReadJob(entry, exponent=kinds.get(name)) for name, entry in self._entries.items()]
        with self._naming_path():
            damaged = self._read(jobs, progress)
        self._verified = None if damaged else before
        return [self._describe_damage(entry) for entry in damaged]

    def digest(self) -> StateDigest:
        """Return the digest that the journal keeps of this file, from the checksums that the file states."""
        entry = self._entries["data.pkl"]
        named = ((name, stored.dtype, stored.shape, self._entry(stored).crc) for name, stored in self.stored())
        return digest_state(named, self._bytes(entry.offset, entry.size))

    def sha256(self) -> str:
        """Return the SHA-256 of the whole file, in hexadecimal."""
        digest = hashlib.sha256()
        with self._naming_path():
            for start in range(0, self._size, _HASH_BLOCK):
                digest.update(self._bytes(start, min(_HASH_BLOCK, self._size - start)))
        return digest.hexdigest()

    @contextmanager
    def _naming_path(self) -> Iterator[None]:
        """Put the path in front of a UserError of the body."""
        try:
            yield
        except UserError as error:
            raise self._error(error) from None

    def _error(self, error: ValueError) -> UserError:
        return UserError(f"{text.printable(self.path, 4096)}: {error}")

    def _bytes(self, offset: int, size: int) -> bytes:
        memory = bytearray(size)
        read_exactly(self._file, memoryview(memory), offset)
        return bytes(memory)

    def _small(self, name: str, limit: int) -> bytes | None:
        """Return the verified content of an entry that is not a storage; None if there is no such entry."""
        entry = self._entries.get(name)
        if entry is None:
            return None
        if entry.size > limit:
            raise UserError(f"its entry {name} has {entry.size} bytes, more than the {limit} that make sense")
        content = self._bytes(entry.offset, entry.size)
        if crc32(content) != entry.crc:
            raise UserError(f"it is damaged: the checksum of {name} is wrong")
        return content

    def _list_entries(self) -> dict[str, ZipEntry]:
        """Return the entries of the zip. Raises ValueError, which names the kind of the file if it is known."""
        try:
            return list_entries(self._bytes, self._size)
        except ValueError:
            known = foreign.describe_bytes(self._bytes(0, min(self._size, foreign.HEAD_BYTES)), self._size)
            if known:
                raise ValueError(known) from None
            raise

    def _read_values(self) -> dict[str, Any]:
        if self._small("byteorder", _MAX_SMALL) not in (None, b"little"):
            raise UserError("it was written on a big-endian machine, which is not supported")
        pickled = self._small("data.pkl", MAX_PICKLE)
        if pickled is None:
            raise UserError("it is a zip without a data.pkl: torch.save did not write it")
        sizes = {name[len(_DATA) :]: entry.size for name, entry in self._entries.items() if name.startswith(_DATA)}
        values = unpickle(pickled, sizes)
        if type(values) is not dict:
            kind = "tensor" if isinstance(values, StoredTensor) else type(values).__name__
            raise UserError(f"it holds a {kind}, not a dict of what belongs to a run")
        return values

    def _entry(self, stored: StoredTensor) -> ZipEntry:
        return self._entries[_DATA + stored.key]

    def _read(self, jobs: Sequence[ReadJob], progress: Progress | None = None) -> list[ZipEntry]:
        """Do jobs of whole entries; return the entries whose checksum is wrong."""
        crcs = self._reader.run(jobs, progress)
        return [job.entry for job, crc in zip(jobs, crcs, strict=True) if job.check and crc != job.entry.crc]

    def _restore_direct(self, matches: Sequence[_Match], to_check: bool) -> None:
        """Read straight into live tensors: one pass over each storage, another for a second tensor in it."""
        jobs: list[ReadJob] = []
        verified: set[str] = set()
        for match in matches:
            stored, live = match.stored, match.live
            start = stored.offset * stored.dtype.itemsize
            slices = sorted((part for part in live.slices if part.data.numel()), key=lambda part: part.start)
            check = to_check and stored.key not in verified
            if slices or check:
                jobs.append(ReadJob(self._entry(stored), tuple(slice_target(part, start) for part in slices), check))
                verified.add(stored.key)
        damaged = self._read(jobs)
        if damaged:
            raise UserError(self._describe_damage(damaged[0]))

    def _strided(self, stored: StoredTensor, verify: bool) -> torch.Tensor:
        """Return the tensor with its stored strides, over a copy of its storage."""
        entry = self._entry(stored)
        memory = torch.empty(entry.size, dtype=torch.uint8)
        if entry.size and self._read([ReadJob(entry, (slice_target(TensorSlice(0, memory), 0),), verify)]):
            raise UserError(self._describe_damage(entry))
        return memory.view(stored.dtype).as_strided(stored.shape, stored.strides, stored.offset)

    def _describe_damage(self, entry: ZipEntry) -> str:
        """Return one line that names the damaged tensor, or the entry if it is not a tensor's storage."""
        name = next((name for name, stored in self.stored() if _DATA + stored.key == entry.name), None)
        return f"it is damaged: the checksum of {name or text.printable(entry.name)} is wrong"


def _combine(parts: Iterable[tuple[int, int, int]]) -> int:
    """Return the CRC-32 of a whole from its parts (start, stop, CRC-32)."""
    crc = end = 0
    for start, stop, of_part in sorted(parts):
        assert start == end, "the slices of all ranks cover each element once"
        crc, end = crc32_combine(crc, of_part, stop - start), stop
    return crc


def check_torch(version: str) -> None:
    """Raise UserError for a torch whose torch.load runs code from a file even with weights_only=True.

    This module does not call torch.load, but the user will, in the same environment (CVE-2025-32434).
    """
    if [int(number) for number in version.split("+")[0].split(".")[:2]] < [2, 6]:
        raise UserError(
            f"torch {version} can be made to run code by a checkpoint (CVE-2025-32434); install 2.6 or newer"
        )


def _open(path: Path) -> tuple[int, int]:
    """Return (descriptor, size) of a regular file, following links. Raises UserError."""
    try:
        file = files.regular(path, os.O_RDONLY)
    except (OSError, ValueError) as error:
        known = _REASONS.get(error.errno or 0, error.strerror) if isinstance(error, OSError) else "that is not a path"
        raise UserError(f"{known}") from None
    return file, os.fstat(file).st_size


def _match(values: object, path: tuple[str | int, ...], live: SlicedTensor, cast: bool) -> _Match:
    """Return a live tensor with the stored one at its path. Raises UserError if shapes or dtypes do not match."""
    name = schema.dotted_path(path)
    for part in path:
        inside = isinstance(values, (list, tuple)) and isinstance(part, int) and part < len(values)
        if inside or (isinstance(values, dict) and part in values):
            values = values[part]  # type: ignore[index]
        else:
            raise UserError(f"it has no {name}, which this run needs: another model or optimizer made it")
    if not isinstance(values, StoredTensor):
        raise UserError(f"its {name} is a {text.printable(type(values).__name__)}, not a tensor")
    both_floating = values.dtype.is_floating_point and live.dtype.is_floating_point
    if values.shape != live.shape or not (values.dtype == live.dtype or (cast and both_floating)):
        raise UserError(
            f"its {name} is {list(values.shape)} {str(values.dtype).removeprefix('torch.')},"
            f" this run's is {list(live.shape)} {str(live.dtype).removeprefix('torch.')}:"
            " another model made it"
        )
    return _Match(live, values)
