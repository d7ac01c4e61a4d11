"""Ingestion: documents to shards on several threads. After a kill the same command continues, with the same bytes.

The shards are written one after the other, in the order of the documents, under names that no glob matches. Every few
seconds the place in the documents is recorded (`.NAME.progress.json`); work after it is repeated. When all tokens are
written, the shards get their names. `NAME.json` beside them describes their sources.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from unbroken.data.documents import Piece, Source, Span, encode_piece, read_pieces
from unbroken.data.shards import HEADER_BYTES, SHARD_TOKENS, TOKEN, Tokens, header
from unbroken.data.tokenizers import JSON_FILE, JsonTokenizer, Tokenizer
from unbroken.errors import UserError
from unbroken.files import close, read_whole, sync_folder
from unbroken.threads import WorkerThreads

COMMIT_SECONDS = 10.0
MAX_VOCABULARY = 1 << 8 * TOKEN.itemsize
MAX_STATE_BYTES = 1 << 28


@dataclass(frozen=True)
class Job:
    """A job: make shards folder/NAME_train_000000.bin, ..., folder/NAME_val_000000.bin, ... of documents.

    `column` is the field or column with the text, `skip_bad` leaves out the documents without one.
    """

    sources: Sequence[Source]
    spans: dict[str, list[Span]]  # of each set
    tokenizer: Tokenizer
    folder: Path
    name: str
    column: str = "text"
    shard_tokens: int = SHARD_TOKENS
    skip_bad: bool = False

    def identity(self) -> str:
        """Return a hash of everything that decides the bytes of the shards, except `skip_bad`."""
        sources = [[os.path.abspath(each.path), *list(asdict(each).values())[1:]] for each in self.sources]
        spans = {
            name: [(str(each.source.path), each.start, each.end) for each in spans]
            for name, spans in self.spans.items()
        }
        tokenizer = self.tokenizer
        decides = [
            sources,
            spans,
            tokenizer.name,
            tokenizer.files,
            tokenizer.end_of_text,
            self.column,
            self.shard_tokens,
        ]
        return hashlib.sha256(json.dumps(decides).encode()).hexdigest()


@dataclass
class Progress:
    """The progress of a job, which is written to `.NAME.progress.json`."""

    identity: str
    name: str = ""  # of the set that is being written
    span: int = 0
    place: int | None = None  # in the span's source; None: at its start
    read: int = 0  # bytes of files
    finished: bool = False  # all tokens are there, and the shards get their names
    shards: dict[str, list[int]] = field(default_factory=dict)  # tokens of each shard, by set
    documents: dict[str, int] = field(default_factory=dict)
    skipped: int = 0


def make_shards(
    job: Job, workers: int = 1, report: Callable[[int, int, int], None] = lambda *_: None, every: float = COMMIT_SECONDS
) -> Progress:
    """Make the shards of a job, or continue to make them; return the progress at the end.

    Args:
        job: What to make. To continue after a kill, it must be the job of the killed process.
        workers: Number of threads that encode; it does not change the bytes.
        report: Called with the bytes read so far, documents and tokens, as they grow.
        every: Seconds between two records of the progress.

    Raises:
        UserError: for documents that are no text, for files that cannot be read or written, or if the folder already
            has these shards, other unfinished work of that name, or another process that makes shards in it.
    """
    if job.tokenizer.vocab_size > MAX_VOCABULARY:
        raise UserError(
            f"the vocabulary of {job.tokenizer.name} has {job.tokenizer.vocab_size:,} tokens; shards hold at most"
            f" {MAX_VOCABULARY:,} (uint16); use a smaller one"
        )
    try:
        job.folder.mkdir(parents=True, exist_ok=True)
        with _alone(job.folder):
            return _Writer(job).run(workers, report, every)
    except OSError as error:
        raise UserError(
            f"cannot write shards to {job.folder}: {error.strerror or error}; correct this, then repeat the command"
        ) from error


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Lock a folder. Raises UserError if another process makes shards in it."""
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        close(file)
        raise UserError(f"another process makes shards in {folder}; wait for its end, or type --folder") from error
    except OSError:
        pass  # a filesystem without locks
    try:
        yield
    finally:
        close(file)


class _Writer:
    """A writer that does a job."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.record = job.folder / f".{job.name}.progress.json"
        self.progress = self._begin()
        self.committed = self.record.exists()
        self._file: BinaryIO | None = None

    def run(self, workers: int, report: Callable[[int, int, int], None], every: float) -> Progress:
        """Write and name all shards. After an error, files are removed if no progress was recorded."""
        try:
            if not self.progress.finished:
                self._open()
                with WorkerThreads(workers, "tokenize") as pool:
                    self._encode(pool, workers, report, every)
                self._close_shard()
                if not self.progress.shards.get("train"):
                    raise UserError("the files hold no text to train on; check them, or use a smaller --val_percent")
                self.progress.finished = True
                self._commit()
            self._publish()
            return self.progress
        finally:
            if self._file is not None:
                _close(self._file)
            if not self.committed:
                self._remove_partial()

    def _begin(self) -> Progress:
        """Return the recorded progress of an earlier process, else that of a new job. Raises UserError."""
        try:
            saved = Progress(**json.loads(read_whole(self.record, MAX_STATE_BYTES)))
        except FileNotFoundError:
            for name in self.job.spans:
                for path in sorted(self.job.folder.glob(f"{glob.escape(self.job.name)}_{name}_*.bin")):
                    raise UserError(
                        f"{path} exists; delete the shards of this name, or choose another --name or --folder"
                    ) from None
            return Progress(self.job.identity())
        except (ValueError, TypeError) as error:
            raise UserError(f"{self.record} cannot be read; delete it to begin again") from error
        if saved.identity != self.job.identity():
            raise UserError(
                f"{self.record} is of unfinished shards with other files or flags; repeat its command to finish them,"
                " delete it to begin again, or choose another --name or --folder"
            )
        return saved

    # ---- encoding

    def _encode(self, pool: WorkerThreads, workers: int, report: Callable[[int, int, int], None], every: float) -> None:
        """Encode and write the remaining documents; read no further ahead than the threads need."""
        job, progress, pending = self.job, self.progress, deque[tuple[str, int, Piece, Future[Any]]]()
        last = time.monotonic()

        def write_next() -> None:
            nonlocal last
            name, span, piece, encoded = pending.popleft()
            tokens, documents, skipped = encoded.result()
            if name != progress.name:
                self._close_shard()
            progress.name, progress.span, progress.place = name, span, piece.end
            progress.documents[name] = progress.documents.get(name, 0) + documents
            progress.skipped += skipped
            progress.read += piece.read
            full = self._add(tokens)
            if full or time.monotonic() - last >= every:
                self._commit()
                last = time.monotonic()
            report(progress.read, sum(progress.documents.values()), sum(map(sum, progress.shards.values())))

        report(progress.read, sum(progress.documents.values()), sum(map(sum, progress.shards.values())))
        for name, span, piece in self._pieces():
            future = pool.submit(encode_piece, piece, job.tokenizer, job.column, job.skip_bad)
            pending.append((name, span, piece, future))
            while len(pending) > 2 * workers:
                write_next()
        while pending:
            write_next()

    def _pieces(self) -> Iterator[tuple[str, int, Piece]]:
        """Yield the pieces that are not recorded yet: the set, the number of the span in it, and the piece."""
        progress = self.progress
        reached, first, place = progress.name, progress.span, progress.place
        for name, spans in self.job.spans.items():
            if reached and name != reached:
                continue
            for index, span in enumerate(spans):
                if reached and index < first:
                    continue
                for piece in read_pieces(span, self.job.tokenizer, self.job.column, place if reached else None):
                    yield name, index, piece
                reached = ""

    # ---- the shards

    def _path(self, name: str, index: int) -> Path:
        return self.job.folder / f"{self.job.name}_{name}_{index:06d}.bin"

    def _partial(self, name: str, index: int) -> Path:
        final = self._path(name, index)
        return final.with_name(f".{final.name}.partial")

    def _open(self) -> None:
        """Open the shard that was being written, and cut off what was written after the record."""
        name, counts = self.progress.name, self.progress.shards.get(self.progress.name, [])
        if not counts:
            return
        path, size = self._partial(name, len(counts) - 1), HEADER_BYTES + counts[-1] * TOKEN.itemsize
        if not path.exists() or path.stat().st_size < size:
            raise UserError(f"{path} is gone or cut off; delete {self.record} to begin again")
        self._file = open(path, "r+b")  # noqa: SIM115 - closed by run or _close_shard
        self._file.truncate(size)
        self._file.seek(size)

    def _add(self, tokens: Tokens) -> bool:
        """Append tokens to the set that is being written; return whether a shard became full."""
        full, counts = False, self.progress.shards.setdefault(self.progress.name, [])
        while len(tokens):
            if self._file is None or counts[-1] == self.job.shard_tokens:
                self._close_shard()
                self._file = open(self._partial(self.progress.name, len(counts)), "wb")  # noqa: SIM115
                self._file.write(header(0))
                counts.append(0)
            part = tokens[: self.job.shard_tokens - counts[-1]]
            self._file.write(part.astype(TOKEN, copy=False).tobytes())
            counts[-1] += len(part)
            tokens = tokens[len(part) :]
            full = full or counts[-1] == self.job.shard_tokens
        return full

    def _close_shard(self) -> None:
        """Write the header of the open shard and wait for the disk."""
        if self._file is None:
            return
        count = (self._file.tell() - HEADER_BYTES) // TOKEN.itemsize
        self._file.seek(0)
        self._file.write(header(count, self.job.tokenizer.name, self.job.tokenizer.vocab_size))
        _finish(self._file)
        self._file = None

    def _commit(self) -> None:
        """Record the progress, after syncing the tokens."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
        sync_folder(self.job.folder)
        _write_whole(self.record, json.dumps(asdict(self.progress)).encode())
        self.committed = True

    def _publish(self) -> None:
        """Write the files that describe the shards, give the shards their names, and remove the record."""
        job, folder = self.job, self.job.folder
        if isinstance(job.tokenizer, JsonTokenizer):
            assert job.tokenizer.folder is not None
            _write_whole(folder / f"{job.name}.{JSON_FILE}", job.tokenizer.folder.read_bytes())
        _write_whole(folder / f"{job.name}.json", (json.dumps(self._description(), indent=2) + "\n").encode())
        for name, counts in self.progress.shards.items():
            for index in range(len(counts)):
                with suppress(FileNotFoundError):  # a process that was killed had done so
                    self._partial(name, index).replace(self._path(name, index))
        self._remove_partial()
        sync_folder(folder)
        self.record.unlink()
        sync_folder(folder)

    def _description(self) -> dict[str, Any]:
        """Return the content of `NAME.json`, which is the same for every machine and number of threads."""
        tokenizer, progress = self.job.tokenizer, self.progress
        return {
            "tokenizer": {
                "name": tokenizer.name,
                "vocab_size": tokenizer.vocab_size,
                "end_of_text": tokenizer.end_of_text,
                "sha256": tokenizer.files,
            },
            "sources": [{"path": str(each.path), "bytes": each.size} for each in self.job.sources],
            "skipped_documents": progress.skipped,
            "sets": {
                name: {
                    "documents": progress.documents.get(name, 0),
                    "tokens": sum(counts),
                    "shards": {self._path(name, index).name: count for index, count in enumerate(counts)},
                }
                for name, counts in progress.shards.items()
                if counts
            },
        }

    def _remove_partial(self) -> None:
        """Remove shards without their final names."""
        for path in self.job.folder.glob(f".{glob.escape(self.job.name)}_*.bin.partial"):
            path.unlink(missing_ok=True)


def _finish(file: BinaryIO) -> None:
    """Wait until what was written is on the disk, and close the file."""
    file.flush()
    os.fsync(file.fileno())
    _close(file)


def _close(file: BinaryIO) -> None:
    with suppress(OSError):  # what was synced is on disk, whatever close(2) reports
        file.close()


def _write_whole(path: Path, content: bytes) -> None:
    """Write a file whole: after a crash it has its old content or the new one."""
    temporary = path.with_name(f".{path.name.lstrip('.')}.new")
    file = open(temporary, "wb")  # noqa: SIM115 - closed by _finish or _close
    try:
        file.write(content)
        _finish(file)
    finally:
        _close(file)
    temporary.replace(path)
    sync_folder(path.parent)
