"""One file of tokens: its format, checks and fingerprint. Only this module knows how a shard is laid out."""

from __future__ import annotations

import hashlib
import os
import time
import uuid
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from unbroken.errors import UserError

Tokens = npt.NDArray[np.uint16]

# llm.c's token file: 256 little-endian int32 (magic, version, token count, zeros), then the tokens as uint16.
MAGIC, VERSION = 20240520, 1
HEADER_BYTES = 1024
TOKEN = np.dtype("<u2")

# The fingerprint of a shard samples this many blocks of this many tokens, first and last included.
SAMPLE_BLOCKS, SAMPLE_TOKENS = 16, 2048

SHARD_TOKENS = 100_000_000  # as FineWeb's
DEBRIS_SECONDS = 3600  # a temporary file not written to for so long belongs to a process that died

_FOREIGN = {  # the first bytes of files that people point --input_bin at by mistake
    b"version https://git-lfs": "it is a Git LFS pointer: run `git lfs pull`",
    b"\x93NUMPY": "it is a .npy array",
    b"PK\x03\x04": "it is a zip, perhaps a checkpoint",
    b"\x1f\x8b": "it is gzipped: run gunzip on it",
    b"PAR1": "it is a Parquet file",
    b"<": "it is a web page, perhaps of a failed download",
    (20240801).to_bytes(4, "little"): "it holds Llama 3 tokens of llm.c (uint32)",
    (20240522).to_bytes(4, "little"): "it is an evaluation set of llm.c",
    (20240326).to_bytes(4, "little"): "it is a model of llm.c",
    (20240328).to_bytes(4, "little"): "it is a tokenizer of llm.c",
    MAGIC.to_bytes(4, "big"): "its byte order is big-endian",
}


@dataclass(frozen=True, eq=False)
class Shard:
    """One file of `count` tokens.

    Opened for each read, so that thousands need no descriptors. Not mapped: a map of a file that becomes shorter kills.
    """

    path: Path
    count: int

    @property
    def size(self) -> int:
        """Of the file, in bytes."""
        return HEADER_BYTES + self.count * TOKEN.itemsize

    @classmethod
    def open(cls, path: Path) -> Shard:
        """A shard whose header is right and whose size is what the header says; a UserError otherwise."""
        try:
            with open(path, "rb") as file:
                count = check_header(path, file.read(HEADER_BYTES), os.fstat(file.fileno()).st_size)
        except OSError as error:
            raise UserError(
                f"cannot read {path}: {error.strerror or error}; check the path and its permissions"
            ) from error
        return cls(path, count)

    def read(self, offset: int, count: int) -> Tokens:
        """Up to `count` tokens from `offset` on, uint16; a UserError if the file cannot be read or has another size."""
        tokens = np.empty(min(count, self.count - offset), dtype=TOKEN)
        try:
            with open(self.path, "rb") as file:
                file.seek(HEADER_BYTES + offset * TOKEN.itemsize)
                done, size = file.readinto(tokens.view(np.uint8).data), os.fstat(file.fileno()).st_size
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror or error}") from error
        if size != self.size or done != tokens.nbytes:
            raise UserError(f"{self.path} changed while it was in use: it had {self.size} bytes and now has {size}")
        return tokens

    def fingerprint(self) -> str:
        """sha256 over the header and evenly spaced blocks: a sample, read in constant time.

        It sees another file, another tokenization, a cut or a shift. It is blind to a change that lies
        between two blocks of a large shard.
        """
        digest = hashlib.sha256()
        last = max(0, self.count - SAMPLE_TOKENS)
        starts = {last * block // (SAMPLE_BLOCKS - 1) for block in range(SAMPLE_BLOCKS)}
        try:
            with open(self.path, "rb", buffering=0) as file:
                digest.update(file.read(HEADER_BYTES))
                for start in sorted(starts):
                    file.seek(HEADER_BYTES + start * TOKEN.itemsize)
                    digest.update(file.read(SAMPLE_TOKENS * TOKEN.itemsize))
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror or error}") from error
        return digest.hexdigest()


def header(count: int) -> bytes:
    """The first 1024 bytes of a shard of `count` tokens."""
    fields = np.zeros(256, dtype="<i4")
    fields[:3] = MAGIC, VERSION, count
    return fields.tobytes()


def check_header(path: Path, head: bytes, size: int) -> int:
    """The token count of a shard of `size` bytes that begins with `head`; a UserError if they are wrong."""
    if size == 0:
        raise UserError(f"{path} is an empty file; delete it or make it again")
    magic, version, count = (int.from_bytes(head[at : at + 4], "little", signed=True) for at in (0, 4, 8))
    if magic != MAGIC:
        hint = next((text for start, text in _FOREIGN.items() if head.startswith(start)), "")
        hint = hint or "it may be raw tokens without a header, or text: `python -m unbroken data text` makes shards"
        raise UserError(f"{path} is not a token shard (magic {magic}, not {MAGIC}): {hint}")
    if len(head) < HEADER_BYTES:
        raise UserError(f"{path} ends inside its header ({size} of {HEADER_BYTES} bytes); fetch or make it again")
    if version != VERSION:
        raise UserError(f"{path} is a token shard of version {version}; only version {VERSION} (uint16) can be read")
    if HEADER_BYTES + count * TOKEN.itemsize != size:
        holds = (size - HEADER_BYTES) / TOKEN.itemsize
        raise UserError(f"{path}: its header says {count} tokens, its size {holds:.10g}; fetch or make it again")
    if count == 0:
        raise UserError(f"{path} holds no tokens; delete it or make it again")
    return count


class ShardWriter:
    """A shard being written, under a temporary name that no glob matches; on the disk after `finish`."""

    def __init__(self, final: Path) -> None:
        self.final, self.count = final, 0
        self.temporary = final.with_name(f".{final.name}.{uuid.uuid4().hex}.tmp")
        self._file = open(self.temporary, "xb")  # noqa: SIM115 - closed by finish or discard
        self._file.write(header(0))

    def add(self, tokens: Tokens) -> None:
        """Append tokens, uint16 [any]."""
        self._file.write(tokens.astype(TOKEN, copy=False).tobytes())
        self.count += len(tokens)

    def finish(self) -> None:
        """Write the header, now that the count is known, and wait for the disk."""
        self._file.seek(0)
        self._file.write(header(self.count))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def discard(self) -> None:
        """Leave nothing behind; after a rename there is nothing to leave."""
        self._file.close()
        self.temporary.unlink(missing_ok=True)


def write_shards(pieces: Iterable[Tokens], folder: Path, name: str, shard_tokens: int = SHARD_TOKENS) -> list[Path]:
    """Write tokens as folder/name_000000.bin, name_000001.bin, ..., each of `shard_tokens` but the last."""
    return write_sets({name: pieces}, folder, shard_tokens)


def write_sets(sets: Mapping[str, Iterable[Tokens]], folder: Path, shard_tokens: int = SHARD_TOKENS) -> list[Path]:
    """The same of several names. All or nothing: none has its name until the last one is on the disk."""
    writers: list[ShardWriter] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _clear_debris(folder)
        for name, pieces in sets.items():
            _write_set(writers, pieces, folder / name, shard_tokens)
        for writer in writers:
            writer.temporary.replace(writer.final)
        _sync_folder(folder)
    except OSError as error:
        raise UserError(f"cannot write shards to {folder}: {error.strerror or error}") from error
    finally:
        for writer in writers:
            writer.discard()
    return [writer.final for writer in writers]


def _write_set(writers: list[ShardWriter], pieces: Iterable[Tokens], stem: Path, shard_tokens: int) -> None:
    """Append to `writers`, which the caller discards if anything goes wrong."""
    first = len(writers)
    for piece in pieces:
        while len(piece):
            if len(writers) == first or writers[-1].count == shard_tokens:
                if len(writers) > first:
                    writers[-1].finish()
                writers.append(ShardWriter(stem.with_name(f"{stem.name}_{len(writers) - first:06d}.bin")))
            part = piece[: shard_tokens - writers[-1].count]
            writers[-1].add(part)
            piece = piece[len(part) :]
    if len(writers) > first:
        writers[-1].finish()


def _sync_folder(folder: Path) -> None:
    """Make renames in the folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _clear_debris(folder: Path) -> None:
    """Remove what a killed writer left, but nothing that another one may still be writing."""
    for path in folder.glob(".*.bin.*.tmp"):
        with suppress(FileNotFoundError):  # another process may be clearing too
            if time.time() - path.stat().st_mtime > DEBRIS_SECONDS:
                path.unlink()
