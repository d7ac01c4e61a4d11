"""Shards: files of tokens, their format, checks and fingerprint. No other module knows how a shard is laid out.

The format is llm.c's: a header of 256 little-endian int32, then the tokens as uint16. The first three words of the
header are magic number, version and number of tokens. llm.c ignores the other words: our shards have the name of their
tokenizer there, at byte TOKENIZER_OFFSET, and after it the size of its vocabulary as an int32.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from unbroken.errors import UserError, cannot_read
from unbroken.files import describe_start, regular, sync_folder

Tokens = npt.NDArray[np.uint16]
TOKEN = np.dtype("<u2")

MAGIC, VERSION = 20240520, 1
HEADER_BYTES = 1024
TOKENIZER_OFFSET, TOKENIZER_BYTES = 512, 64  # b"tokenizer:NAME", then zeros
TOKENIZER_PREFIX = b"tokenizer:"
VOCAB_OFFSET, VOCAB_BYTES = TOKENIZER_OFFSET + TOKENIZER_BYTES, 4

# The fingerprint of a shard is taken of this many blocks of this many tokens, first and last included.
SAMPLE_BLOCKS, SAMPLE_TOKENS = 16, 2048

SHARD_TOKENS = 100_000_000  # as in FineWeb's shards
DEBRIS_SECONDS = 3600  # a temporary file that was not written to for so long belongs to a process that died

_FOREIGN = {  # the first bytes of files that are given to --input_bin by mistake
    b"\x93NUMPY": "it is a .npy array",
    b"PK\x03\x04": "it is a zip, perhaps a checkpoint",
    b"\x1f\x8b": "it is gzipped: run gunzip on it",
    b"PAR1": "it is a Parquet file",
    (20240801).to_bytes(4, "little"): "it holds Llama 3 tokens of llm.c (uint32)",
    (20240522).to_bytes(4, "little"): "it is an evaluation set of llm.c",
    (20240326).to_bytes(4, "little"): "it is a model of llm.c",
    (20240328).to_bytes(4, "little"): "it is a tokenizer of llm.c",
    MAGIC.to_bytes(4, "big"): "its byte order is big-endian",
}


@dataclass(eq=False)
class Shard:
    """A file of `count` tokens, of a tokenizer with a name and a vocabulary size: "" and 0 if the file does not say.

    The file is opened for each read, so that thousands of shards need no descriptors. It is not mapped into memory: a
    file that becomes shorter would end the process with SIGBUS.
    """

    path: Path
    count: int
    tokenizer: str = ""
    vocab_size: int = 0
    _stamp: tuple[int, int] | None = None  # inode and time of change, when the content was looked at last
    _content: str | None = None  # the first fingerprint that was taken

    @property
    def size(self) -> int:
        """Return the size of the file in bytes."""
        return HEADER_BYTES + self.count * TOKEN.itemsize

    @classmethod
    def open(cls, path: Path) -> Shard:
        """Return the shard at `path`. Raises UserError if its header is wrong or contradicts its size."""
        try:
            with open(path, "rb", opener=regular) as file:
                head, found = file.read(HEADER_BYTES), os.fstat(file.fileno())
                count = check_header(path, head, found.st_size)
        except OSError as error:
            raise cannot_read(path, error) from error
        return cls(path, count, tokenizer_of(head), vocab_size_of(head), _stamp_of(found))

    def read(self, pieces: Sequence[tuple[int, Tokens]]) -> None:
        """Fill each array with the tokens from its offset on; the file is opened once for all of them.

        Raises UserError if the file cannot be read, or has another size or content than before.
        """
        whole = True
        try:
            with open(self.path, "rb", buffering=0, opener=regular) as file:
                for offset, tokens in pieces:
                    file.seek(HEADER_BYTES + offset * TOKEN.itemsize)
                    whole &= file.readinto(tokens.view(np.uint8).data) == tokens.nbytes
                found = os.fstat(file.fileno())
        except OSError as error:
            raise cannot_read(self.path, error) from error
        if found.st_size != self.size or not whole:
            raise UserError(
                f"{self.path} changed while it was in use: it had {self.size} bytes and now has {found.st_size}"
            )
        if self._stamp not in (None, _stamp_of(found)):
            self._check_content(_stamp_of(found))

    def _check_content(self, stamp: tuple[int, int]) -> None:
        """Accept a file that was touched or replaced if its content is that of the first fingerprint."""
        if self._content is not None and self.fingerprint() != self._content:
            raise UserError(f"{self.path} changed while it was in use: it has other content of the same size")
        self._stamp = stamp

    def fingerprint(self) -> str:
        """Return the SHA-256 of the header without its tokenizer and of evenly spaced blocks, read in constant time.

        It changes with another file, another tokenization, a cut or a shift, but not with a change between two blocks
        of a large shard. Whether the header names the tokenizer makes no difference.
        """
        digest = hashlib.sha256()
        last = max(0, self.count - SAMPLE_TOKENS)
        starts = {last * block // (SAMPLE_BLOCKS - 1) for block in range(SAMPLE_BLOCKS)}
        try:
            with open(self.path, "rb", buffering=0, opener=regular) as file:
                digest.update(without_tokenizer(file.read(HEADER_BYTES)))
                for start in sorted(starts):
                    file.seek(HEADER_BYTES + start * TOKEN.itemsize)
                    digest.update(file.read(SAMPLE_TOKENS * TOKEN.itemsize))
        except OSError as error:
            raise cannot_read(self.path, error) from error
        self._content = self._content or digest.hexdigest()
        return digest.hexdigest()


def _stamp_of(found: os.stat_result) -> tuple[int, int]:
    return found.st_ino, found.st_mtime_ns


def header(count: int, tokenizer: str = "", vocab_size: int = 0) -> bytes:
    """Return the first 1024 bytes of a shard of `count` tokens.

    Args:
        count: Number of tokens.
        tokenizer: Name of at most 53 letters, "" if unknown.
        vocab_size: Size of its vocabulary, 0 if unknown.
    """
    fields = np.zeros(256, dtype="<i4")
    fields[:3] = MAGIC, VERSION, count
    name = TOKENIZER_PREFIX + tokenizer.encode("ascii") if tokenizer else b""
    assert len(name) < TOKENIZER_BYTES
    fields[VOCAB_OFFSET // 4] = vocab_size if tokenizer else 0
    head = fields.tobytes()
    return head[:TOKENIZER_OFFSET] + name + head[TOKENIZER_OFFSET + len(name) :]


def tokenizer_of(head: bytes) -> str:
    """Return the name of the tokenizer in a header; "" if there is none."""
    found = re.match(TOKENIZER_PREFIX + rb"([\w.+-]+)\0", head[TOKENIZER_OFFSET : TOKENIZER_OFFSET + TOKENIZER_BYTES])
    return found[1].decode("ascii") if found else ""


def vocab_size_of(head: bytes) -> int:
    """Return the size of the vocabulary in a header; 0 if it does not say."""
    size = int.from_bytes(head[VOCAB_OFFSET : VOCAB_OFFSET + VOCAB_BYTES], "little", signed=True)
    return max(0, size) if tokenizer_of(head) else 0


def without_tokenizer(head: bytes) -> bytes:
    """Return a header as it would be if it did not name its tokenizer."""
    if not tokenizer_of(head):
        return head
    end = VOCAB_OFFSET + VOCAB_BYTES
    return head[:TOKENIZER_OFFSET] + bytes(end - TOKENIZER_OFFSET) + head[end:]


def check_header(path: Path, head: bytes, size: int) -> int:
    """Return the number of tokens of a shard with the header `head` and `size` bytes. Raises UserError."""
    if size == 0:
        raise UserError(f"{path} is an empty file; delete it or make it again")
    magic, version, count = (int.from_bytes(head[at : at + 4], "little", signed=True) for at in (0, 4, 8))
    if magic != MAGIC:
        hint = (
            describe_start(head, _FOREIGN)
            or "it may be raw tokens without a header, or text: `python -m unbroken data text` makes shards"
        )
        raise UserError(f"{path} is not a token shard (magic {magic}, not {MAGIC}): {hint}")
    if len(head) < HEADER_BYTES:
        raise UserError(f"{path} ends inside its header ({size} of {HEADER_BYTES} bytes); download or make it again")
    if version != VERSION:
        raise UserError(f"{path} is a token shard of version {version}; only version {VERSION} (uint16) can be read")
    if HEADER_BYTES + count * TOKEN.itemsize != size:
        holds = (size - HEADER_BYTES) / TOKEN.itemsize
        raise UserError(f"{path}: its header says {count} tokens, its size {holds:.10g}; download or make it again")
    if count == 0:
        raise UserError(f"{path} holds no tokens; delete it or make it again")
    return count


class ShardWriter:
    """A shard that is being written under a temporary name that no glob matches; on the disk after `finish`."""

    def __init__(self, final: Path, tokenizer: str, vocab_size: int) -> None:
        self.final, self.tokenizer, self.vocab_size, self.count = final, tokenizer, vocab_size, 0
        self.temporary = final.with_name(f".{final.name}.{uuid.uuid4().hex}.tmp")
        self._file = open(self.temporary, "xb")  # noqa: SIM115 - closed by finish or discard
        self._file.write(header(0))

    def add(self, tokens: Tokens) -> None:
        """Append tokens."""
        self._file.write(tokens.astype(TOKEN, copy=False).tobytes())
        self.count += len(tokens)

    def finish(self) -> None:
        """Write the header, now that the count is known, and wait for the disk."""
        self._file.seek(0)
        self._file.write(header(self.count, self.tokenizer, self.vocab_size))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._close()

    def _close(self) -> None:
        with suppress(OSError):  # what was synced is on disk, whatever close(2) reports
            self._file.close()

    def discard(self) -> None:
        """Remove the temporary file; after it got its final name there is none."""
        self._close()
        self.temporary.unlink(missing_ok=True)


def write_shards(
    sets: Mapping[str, Iterable[Tokens]],
    folder: Path,
    tokenizer: str = "",
    shard_tokens: int = SHARD_TOKENS,
    vocab_size: int = 0,
) -> list[Path]:
    """Write sets of tokens as folder/NAME_000000.bin, NAME_000001.bin, ...; no file has its name before all are done.

    Args:
        sets: The tokens of each set, in pieces of any size, by its name.
        folder: Where to write; it is made if it is not there.
        tokenizer: Name in `tokenizers.TOKENIZERS`, "" if unknown.
        shard_tokens: Tokens of each shard of a set but the last.
        vocab_size: Size of the tokenizer's vocabulary, 0 if unknown.

    Returns:
        The files. Raises UserError if they cannot be written.
    """
    writers: list[ShardWriter] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _clear_debris(folder)
        for name, pieces in sets.items():
            _write_set(
                writers, pieces, lambda final: ShardWriter(final, tokenizer, vocab_size), folder / name, shard_tokens
            )
        for writer in writers:
            writer.temporary.replace(writer.final)
        sync_folder(folder)
    except OSError as error:
        raise UserError(f"cannot write shards to {folder}: {error.strerror or error}") from error
    finally:
        for writer in writers:
            writer.discard()
    return [writer.final for writer in writers]


def _write_set(
    writers: list[ShardWriter],
    pieces: Iterable[Tokens],
    make: Callable[[Path], ShardWriter],
    stem: Path,
    shard_tokens: int,
) -> None:
    """Write a set under temporary names; append the writers to `writers`, which the caller discards."""
    first = len(writers)
    for piece in pieces:
        while len(piece):
            if len(writers) == first or writers[-1].count == shard_tokens:
                if len(writers) > first:
                    writers[-1].finish()
                writers.append(make(stem.with_name(f"{stem.name}_{len(writers) - first:06d}.bin")))
            part = piece[: shard_tokens - writers[-1].count]
            writers[-1].add(part)
            piece = piece[len(part) :]
    if len(writers) > first:
        writers[-1].finish()


def _clear_debris(folder: Path) -> None:
    """Remove temporary files of killed writers, but not those that another process may be writing."""
    for path in folder.glob(".*.bin.*.tmp"):
        with suppress(FileNotFoundError):  # another process may be clearing too
            if time.time() - path.stat().st_mtime > DEBRIS_SECONDS:
                path.unlink()
