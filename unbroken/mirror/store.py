"""A run in object storage: the manifest of the copies that count, and how copies are written, checked and read.

<URL>/<run_id>/manifest.json                       which copies count, and how often the run has gone back
<URL>/<run_id>/model_step000256-<CRC-32>.pt        a checkpoint; the name holds its checksum, so it never changes
<URL>/<run_id>/<run_id>.log, .metrics.jsonl, config.yaml

Only what the manifest names counts: it is written after every byte of a new copy has been read back. It is replaced as
a whole, so a reader sees the old or the new one. Any storage of fsspec can be used: objects are only written whole,
read by ranges, listed and removed.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import re
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from unbroken import console, paths
from unbroken.checkpoint import disk
from unbroken.checkpoint.directory import Fingerprint
from unbroken.checkpoint.format.checksum import crc32
from unbroken.checkpoint.format.schema import (
    FINAL,
    MAX_COUNT,
    checkpoint_name,
    checkpoint_step,
    temporary_name,
    weights_step,
)
from unbroken.checkpoint.rewind import Rewinds, parse_rewinds
from unbroken.errors import UserError
from unbroken.files import sync_folder, sync_folders_above
from unbroken.text import printable
from unbroken.threads import WorkerThreads

PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "hf": "huggingface_hub", "file": "fsspec"}
BLOCK = 32 << 20  # bytes of one read of an object
MAX_TEXT_BYTES = 1 << 30  # of a log or journal, each of which is read whole
MANIFEST, MANIFEST_MAX = "manifest.json", 64 << 20  # its name, and the most bytes of it that are read
_OBJECT = re.compile(r"(final|(model|weights)_step\d{6,18}(-[0-9a-f]{8})?)\.pt", re.ASCII)
HURRIED = {"connect_timeout": 10, "read_timeout": 20, "retries": {"max_attempts": 2}}  # for botocore, in seconds
BUCKET_SECONDS = 5.0  # a start waits no longer for the answer whether a bucket exists
GOODBYE = b"end\n"  # from a training to the process that copies: nothing more will come

NoteProgress = Callable[[], None]


class DamagedCopy(OSError):
    """An error: a copy in the storage is not what was written, and asking again does not help."""


class ContentMismatch(DamagedCopy):
    """A damaged copy for certain: it has another size or checksum, or is of another step or run."""


@dataclass(frozen=True)
class RemoteCheckpoint:
    """A copy of the checkpoint `name`, stored as `object`. `time`: when it was copied, in seconds since 1970.

    `stays`: retention does not remove it.
    """

    name: str
    step: int
    size: int
    tail: int
    crc32: int
    time: float
    object: str
    stays: bool = False

    @classmethod
    def parse(cls, value: Any) -> RemoteCheckpoint | None:
        """Return the copy that a JSON value describes; None if it makes no sense. Untrusted."""
        try:
            copy = cls(**{key: value[key] for key in cls.__dataclass_fields__ if key in value or key != "stays"})
            numbers = (copy.step, copy.size, copy.tail, copy.crc32)
            sound = all(type(number) is int and 0 <= number < MAX_COUNT for number in numbers)
            named = copy.name == FINAL or copy.step in (checkpoint_step(copy.name), weights_step(copy.name))
            return copy if sound and named and 0 <= copy.time < 2**40 and _OBJECT.fullmatch(copy.object) else None
        except (TypeError, KeyError):
            return None

    @property
    def is_weights(self) -> bool:
        """Whether it is a copy of weights alone."""
        return weights_step(self.name) is not None

    @property
    def fingerprint(self) -> Fingerprint:
        return Fingerprint(self.size, self.tail)


@dataclass(frozen=True)
class Manifest:
    """A manifest of a run: the copies that count, oldest first.

    `overtaken`: copies of steps after one to which the run went back. `rewinds`: each time it went back. `best`: the
    steps that `--keep_best` keeps, the best one first. `weights`: copies of weights alone, oldest first.
    """

    checkpoints: tuple[RemoteCheckpoint, ...] = ()
    overtaken: tuple[RemoteCheckpoint, ...] = ()
    rewinds: Rewinds = ()
    best: tuple[int, ...] = ()
    weights: tuple[RemoteCheckpoint, ...] = ()

    @classmethod
    def parse(cls, content: bytes) -> Manifest:
        """Return the manifest in a file; entries that make no sense are left out. Raises DamagedCopy. Untrusted."""
        try:
            value = json.loads(content)
            items = (value["checkpoints"], value["overtaken"], value.get("weights", ()))
            lists = [[RemoteCheckpoint.parse(item) for item in listed] for listed in items]
            counted, overtaken, weights = (tuple(copy for copy in copies if copy) for copies in lists)
            best = tuple(step for step in value.get("best", ()) if type(step) is int)
            return cls((), overtaken, parse_rewinds(value["rewinds"]), best).with_copies(*counted, *weights)
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            raise DamagedCopy(f"{MANIFEST} is damaged; remove it, and the next copy writes it again") from None

    def get(self, name: str) -> RemoteCheckpoint | None:
        """Return the copy of the checkpoint or the weights `name`; None if there is none that counts."""
        return next((copy for copy in (*self.checkpoints, *self.weights) if copy.name == name), None)

    def best_copies(self) -> list[RemoteCheckpoint]:
        """Return the copies of the best checkpoints, the best one first."""
        found = (self.get(checkpoint_name(step)) for step in self.best)
        return [copy for copy in found if copy is not None]

    def with_copies(self, *copies: RemoteCheckpoint) -> Manifest:
        """Return the manifest with these copies. A final one that is replaced keeps the name of its step."""
        kept, weights = ({copy.name: copy for copy in known} for known in (self.checkpoints, self.weights))
        weights |= {copy.name: copy for copy in copies if copy.is_weights}
        for copy in copies:
            if copy.is_weights:
                continue
            before = kept.get(copy.name)
            if before and copy.name == FINAL and before.step != copy.step:
                name = checkpoint_name(before.step)
                kept.setdefault(name, replace(before, name=name))
            kept[copy.name] = copy
        ordered = (sorted(each.values(), key=lambda c: (c.step, c.name == FINAL)) for each in (kept, weights))
        checkpoints, files = map(tuple, ordered)
        return replace(self, checkpoints=checkpoints, weights=files)

    def without(self, copies: Collection[RemoteCheckpoint]) -> Manifest:
        """Return the manifest without these copies."""
        left = (tuple(copy for copy in known if copy not in copies) for known in (self.checkpoints, self.weights))
        checkpoints, weights = left
        return replace(self, checkpoints=checkpoints, weights=weights)

    def overtake(self, copies: list[RemoteCheckpoint], rewinds: Rewinds) -> Manifest:
        """Return the manifest of a run that went back: these copies do not count any more."""
        overtaken = dict.fromkeys((*self.overtaken, *copies))
        return replace(self.without(copies), overtaken=tuple(overtaken), rewinds=rewinds)


def is_url(text: str) -> bool:
    """Return whether a text names a place in a storage rather than a path."""
    return "://" in text


class Storage:
    """A URL below which runs lie. Raises UserError if it cannot be one; only the methods reach the storage."""

    def __init__(self, url: str, hurried: bool = False) -> None:
        """Prepare access. `hurried`: whether a user waits for the answer, so that time limits are short."""
        place = urlsplit(url)
        scheme = place.scheme if is_url(url) else ""
        if scheme not in PACKAGES:
            raise UserError(
                f"{printable(url)} is no storage; type s3://bucket/path, gs://, az://, hf:// or file:///path"
            )
        if "@" in place.netloc and scheme not in ("abfs", "hf"):
            raise UserError("the URL contains a secret, which others can read; put it into the environment")
        if (scheme == "file" and place.netloc) or not (place.netloc + place.path).strip("/"):
            raise UserError(f"{printable(url)} names no folder; type s3://bucket/path or file:///path")
        try:
            importlib.import_module("fsspec")
            importlib.import_module(PACKAGES[scheme])
        except ImportError:
            package = PACKAGES[scheme]
            raise UserError(f"{scheme}:// needs the package {package}: pip install {package}") from None
        self._scheme = scheme
        self._options: dict[str, Any] = {"auto_mkdir": True} if scheme == "file" else {}
        if scheme == "s3" and hurried:
            self._options = {"config_kwargs": HURRIED}
        self.url = url.rstrip("/")
        self.connect()
        self.root = str(self.fs._strip_protocol(self.url)).rstrip("/")

    def connect(self) -> None:
        """Make a new connection to the storage, which reads keys that were renewed meanwhile."""
        import fsspec

        # Nothing remembered from one call to the next: other machines write there too.
        self.fs: Any = fsspec.filesystem(
            self._scheme, use_listings_cache=False, skip_instance_cache=True, **self._options
        )
        self.fs.retries = min(getattr(self.fs, "retries", 1), 2)  # s3fs's, each with those of botocore inside

    def require_bucket(self) -> None:
        """Raise UserError if the storage answers that the bucket does not exist; a slow or failing one may recover."""
        if self._scheme in ("s3", "gs", "az"):
            bucket = self.root.partition("/")[0]
            try:
                WorkerThreads(1, "bucket").submit(self.fs.info, bucket).result(BUCKET_SECONDS)
            except FileNotFoundError:
                raise UserError(f"{printable(self.url)}: there is no bucket {bucket}; create it first") from None
            except Exception:
                return

    def run(self, run_id: str) -> RemoteRun:
        """Return a run's folder in the storage; it need not exist."""
        return RemoteRun(self, run_id)

    def runs(self) -> list[str]:
        """Return the run_ids in the storage."""
        return sorted(name for name in self.names(self.root) if paths.is_run_id(name))

    def runs_by_last_copy(self) -> list[tuple[float, str]]:
        """Return (seconds since 1970, run_id) of each run with copies, the one copied last first."""
        last = []
        for run_id in self.runs():
            try:
                last += [max((copy.time, run_id) for copy in self.run(run_id).manifest().checkpoints)]
            except DamagedCopy as error:
                say(f"WARNING: passing over {self.url}/{run_id}: {error}")
            except ValueError:  # no copies
                continue
        return sorted(last, reverse=True)

    def names(self, folder: str) -> set[str]:
        """Return the names of everything directly in a folder; none if it does not exist."""
        try:
            return {str(name).rstrip("/").rpartition("/")[2] for name in self.fs.ls(folder, detail=False)}
        except FileNotFoundError:
            return set()


class RemoteRun:
    """A run's folder in a storage. Every method may raise what the storage's library raises."""

    def __init__(self, storage: Storage, run_id: str) -> None:
        self.folder = f"{storage.root}/{run_id}"
        self.url = f"{storage.url}/{run_id}"
        self.storage = storage

    def manifest(self) -> Manifest:
        """Return the manifest; an empty one for a run that was never copied. Raises DamagedCopy."""
        content = self.text(MANIFEST, MANIFEST_MAX)
        return self._manifest_of_markers() if content is None else Manifest.parse(content)

    def _manifest_of_markers(self) -> Manifest:
        """Return the manifest of a storage without one, as older versions left it: a `.json` beside each copy."""
        names, found = self.storage.names(self.folder), []
        for name in names:
            if name + ".json" in names and _OBJECT.fullmatch(name):
                try:
                    value = json.loads(self.text(name + ".json", 1 << 16) or b"")
                    found.append(RemoteCheckpoint.parse({**value, "name": name, "object": name}))
                except (ValueError, TypeError, RecursionError):
                    continue
        return Manifest().with_copies(*(copy for copy in found if copy))

    def publish(self, manifest: Manifest) -> None:
        """Replace the manifest: from now on only its copies count."""
        self.put_text(MANIFEST, json.dumps(asdict(manifest)).encode())

    def put(self, path: Path, step: int, manifest: Manifest, note_progress: NoteProgress) -> RemoteCheckpoint:
        """Copy a checkpoint and read it back, unless the manifest has the same bytes. It counts only once it is
        published.

        Args:
            path: the checkpoint's file.
            step: its step.
            manifest: what is in the storage.
            note_progress: called whenever some of the bytes have been read, sent or read back.

        Raises:
            OSError: what is read back differs.
        """
        identity, checksum = Fingerprint.of(path), checksum_of(path, note_progress)
        named = path.name if weights_step(path.name) is not None else checkpoint_name(step)
        name = f"{named.removesuffix('.pt')}-{checksum:08x}.pt"
        copy = RemoteCheckpoint(path.name, step, identity.size, identity.tail, checksum, time.time(), name)
        known = (*manifest.checkpoints, *manifest.overtaken, *manifest.weights)
        if not any((other.object, other.fingerprint) == (name, identity) for other in known):
            self.storage.fs.put_file(str(path), self._at(name), callback=_callback(note_progress))
            self._make_durable(name)
            for _ in self._read_verified(copy):
                note_progress()
        return copy

    def _make_durable(self, name: str) -> None:
        """Sync a file on a disk, its name and its folders: it is to be there when the manifest is. Objects are."""
        if self.storage.url.startswith("file:"):
            path = Path(self._at(name))
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            self.sync_names()

    def sync_names(self) -> None:
        """Make the names in this folder durable, if the storage is a disk: those that are there may not be.

        Raises OSError.
        """
        path = Path(self.folder)
        if self.storage.url.startswith("file:") and path.is_dir():
            sync_folder(path)
            sync_folders_above(path)

    def remove(self, copy: RemoteCheckpoint) -> None:
        """Remove a copy's object."""
        try:
            self.storage.fs.rm_file(self._at(copy.object))
        except FileNotFoundError:
            pass

    def put_text(self, name: str, content: bytes) -> None:
        """Write a small file whole or not at all. A storage guarantees this for objects, a disk does not for files."""
        if self.storage.url.startswith("file:"):
            path = Path(self._at(name))
            path.parent.mkdir(parents=True, exist_ok=True)
            disk.replace(path.with_name(f".{path.name}.tmp"), path, content)
            sync_folder(path.parent)  # what a manifest does not name any more is removed after this
        else:
            self.storage.fs.pipe_file(self._at(name), content)

    def keep_text(self, name: str, content: bytes) -> str:
        """Keep a log that is to be replaced, under a name with its checksum; return its URL."""
        start, dot, ending = name.partition(".")
        kept = f"{start}-{crc32(content, 0):08x}{dot}{ending}"
        self.put_text(kept, content)
        return f"{self.url}/{kept}"

    def text(self, name: str, most: int | None = None) -> bytes | None:
        """Return the content of a file, at most its first `most` bytes; None if it is not there.

        Raises OSError if it is to be whole and has more than MAX_TEXT_BYTES.
        """
        if most is None and self.size_of(name) > MAX_TEXT_BYTES:
            raise OSError(errno.EFBIG, f"it is longer than {MAX_TEXT_BYTES:,} bytes", f"{self.url}/{name}")
        try:
            return bytes(self.storage.fs.cat_file(self._at(name), start=0 if most else None, end=most))
        except FileNotFoundError:
            return None

    def size_of(self, name: str) -> int:
        """Return the size of a file in bytes; 0 if it is not there."""
        try:
            return int(self.storage.fs.info(self._at(name))["size"])
        except FileNotFoundError:
            return 0

    def fetch(self, copy: RemoteCheckpoint, path: Path, check: Callable[[Path], None]) -> None:
        """Download a checkpoint to `path`, whole and durable, or not at all. Raises DamagedCopy, OSError.

        `check` is called with the temporary file, and may raise.
        """
        temporary = path.with_name(temporary_name(copy.name))
        try:
            with open(temporary, "wb") as file:
                file.writelines(self._read_verified(copy))
                file.flush()
                os.fsync(file.fileno())
                with suppress(OSError):  # it is on disk, whatever close(2) reports
                    file.close()
            check(temporary)
            disk.commit(temporary, path)
        finally:
            disk.remove(temporary)

    def _read_verified(self, copy: RemoteCheckpoint) -> Iterator[bytes]:
        """Yield a copy block by block. Raises ContentMismatch, at the end at the latest, for another size or CRC-32."""
        checksum = 0
        if int(self.storage.fs.info(self._at(copy.object))["size"]) != copy.size:
            raise ContentMismatch(f"{copy.object} has another size than it had when it was copied")
        for start in range(0, copy.size, BLOCK):
            stop = min(copy.size, start + BLOCK)
            block = bytes(self.storage.fs.cat_file(self._at(copy.object), start=start, end=stop))
            if len(block) != stop - start:
                raise OSError(f"{self.url}/{copy.object} ends too early")
            checksum = crc32(block, checksum)
            yield block
        if checksum != copy.crc32:
            raise ContentMismatch(f"{copy.object} is damaged: it is not what was copied there")

    def _at(self, name: str) -> str:
        return f"{self.folder}/{name}"


def checksum_of(path: Path, note_progress: NoteProgress) -> int:
    """Return the CRC-32 of a file."""
    found = 0
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            found = crc32(block, found)
            note_progress()
    return found


def say(text: str) -> None:
    """Print a line; a WARNING goes to stderr."""
    console.print_line(text, error=text.startswith("WARNING"))


def _callback(note_progress: NoteProgress) -> Any:
    from fsspec.callbacks import Callback

    class Progress(Callback):  # type: ignore[misc]
        """An fsspec callback that reports progress."""

        def relative_update(self, inc: int = 1) -> None:
            note_progress()

    return Progress()
