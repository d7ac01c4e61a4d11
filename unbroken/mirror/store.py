"""A run in object storage: what counts there, how it is put there and checked, and how it is brought back.

<URL>/<run_id>/model_step000256.pt         the bytes of logs/<run_id>/model_step000256.pt
<URL>/<run_id>/model_step000256.pt.json    step, size, CRC-32: written once every byte has been read back
<URL>/<run_id>/<run_id>.log, .metrics.jsonl, config.yaml

A checkpoint without its `.json` does not count: whatever a kill left of an upload is overwritten by the next. Any
storage that fsspec knows will do; of what it can, only whole objects are put, read by ranges, listed and removed.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from unbroken import console, paths
from unbroken.checkpoint import disk
from unbroken.checkpoint.directory import Fingerprint
from unbroken.checkpoint.format import schema
from unbroken.checkpoint.format.checksum import crc32
from unbroken.checkpoint.format.schema import FINAL
from unbroken.errors import UserError
from unbroken.text import printable

PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "hf": "huggingface_hub", "file": "fsspec"}
BLOCK = 32 << 20  # bytes of one read of an object
MOST_COPY = 1 << 16  # bytes of a `.json`
_MARK = ".json"
_ASIDE = re.compile(r"overtaken-[1-9]\d{0,8}")
HURRIED = {"connect_timeout": 10, "read_timeout": 20, "retries": {"max_attempts": 2}}  # for botocore, in seconds
GOODBYE = b"end\n"  # from a training to the process that copies: nothing more will come

Advance = Callable[[int], None]


class DamagedCopy(OSError):
    """An error: a copy in the storage is not what was put there; asking again is of no use."""


class ContentMismatch(DamagedCopy):
    """A damaged copy for certain: it has another size or checksum, or is of another step or run."""


@dataclass(frozen=True)
class RemoteCheckpoint:
    """A whole checkpoint in the storage. `time`: when it was copied, in seconds since 1970."""

    name: str
    step: int
    size: int
    tail: int
    crc32: int
    time: float

    @property
    def fingerprint(self) -> Fingerprint:
        return Fingerprint(self.size, self.tail)


def is_url(text: str) -> bool:
    """Return whether a text names a place in a storage rather than a path."""
    return "://" in text


class Storage:
    """A URL below which runs lie. Raises UserError if it cannot be one; only the methods reach the storage."""

    def __init__(self, url: str, hurried: bool = False) -> None:
        """Prepare access. `hurried`: a user waits for the answer, so time limits are short."""
        scheme = urlsplit(url).scheme if is_url(url) else ""
        if scheme not in PACKAGES:
            raise UserError(
                f"{printable(url)} is no storage: there are s3://bucket/path, gs://, az://, hf:// and file:///path"
            )
        if "@" in urlsplit(url).netloc and scheme not in ("abfs", "hf"):
            raise UserError("secrets do not belong into a URL, which others can read: put them into the environment")
        place = urlsplit(url)
        if (scheme == "file" and place.netloc) or not (place.netloc + place.path).strip("/"):
            raise UserError(f"{printable(url)} names no folder: there are s3://bucket/path and file:///path from / on")
        try:
            import fsspec

            importlib.import_module(PACKAGES[scheme])
        except ImportError:
            package = PACKAGES[scheme]
            raise UserError(f"{scheme}:// needs the package {package}: pip install {package}") from None
        # Nothing remembered from one call to the next: other machines write there too.
        made = {"use_listings_cache": False, "skip_instance_cache": True}
        own: dict[str, Any] = {"auto_mkdir": True} if scheme == "file" else {}
        if scheme == "s3" and hurried:
            own = {"config_kwargs": HURRIED}
        self.fs: Any = fsspec.filesystem(scheme, **made, **own)
        self.fs.retries = min(getattr(self.fs, "retries", 1), 2)  # s3fs's, each with those of botocore inside
        self.url = url.rstrip("/")
        self.root = str(self.fs._strip_protocol(self.url)).rstrip("/")

    def run(self, run_id: str) -> RemoteRun:
        """Return a run's folder in the storage; it need not exist."""
        return RemoteRun(self, run_id)

    def runs(self) -> list[str]:
        """Return the run_ids in the storage."""
        names = (entry["name"].rstrip("/").rpartition("/")[2] for entry in self.listed(self.root))
        return sorted({name for name in names if paths.is_run_id(name)})

    def newest_run(self) -> tuple[float, str]:
        """Return (seconds since 1970, run_id) of the run copied last; (0.0, "") if there is none."""
        last = [(copy.time, run_id) for run_id in self.runs() for copy in self.run(run_id).copies()]
        return max(last, default=(0.0, ""))

    def listed(self, folder: str) -> list[dict[str, Any]]:
        """Return the entries directly in a folder; none if it does not exist."""
        try:
            return list(self.fs.ls(folder, detail=True))
        except FileNotFoundError:
            return []


class RemoteRun:
    """A run's folder in a storage. Every method may raise what the storage's library raises."""

    def __init__(self, storage: Storage, run_id: str) -> None:
        self._fs, self.folder = storage.fs, f"{storage.root}/{run_id}"
        self.url = f"{storage.url}/{run_id}"
        self._storage = storage
        self._checked: tuple[Fingerprint | None, int] = None, 0
        self._aside = ""  # the folder for what this attempt overtakes, once there is something

    def names(self) -> set[str]:
        """Return the names of everything directly in the folder."""
        return {self._base(entry) for entry in self._storage.listed(self.folder)}

    def _base(self, entry: dict[str, Any]) -> str:
        return str(entry["name"]).rstrip("/").rpartition("/")[2]

    def copies(self) -> list[RemoteCheckpoint]:
        """Return the whole checkpoints, oldest first."""
        names = self.names()
        marked = (name.removesuffix(_MARK) for name in names if name.endswith(_MARK))
        found = (self._copy(name) for name in marked if name in names and _is_checkpoint(name))
        return sorted((copy for copy in found if copy), key=lambda copy: (copy.step, copy.name == FINAL))

    def _copy(self, name: str) -> RemoteCheckpoint | None:
        """Return the checkpoint that a `.json` describes; None if it makes no sense. Untrusted."""
        try:
            said = json.loads(self._fs.cat_file(f"{self.folder}/{name}{_MARK}", start=0, end=MOST_COPY))
            numbers = [said[key] for key in ("step", "size", "tail", "crc32")]
            when = float(said["time"])
            if not 0 <= when < 2**40:
                return None
        except (FileNotFoundError, ValueError, TypeError, KeyError, RecursionError):
            return None
        if any(type(number) is not int or not 0 <= number < 2**60 for number in numbers):
            return None
        base = name.rpartition("/")[2]
        if base != FINAL and schema.checkpoint_step(base) != numbers[0]:
            return None
        step, size, tail, crc = numbers
        return RemoteCheckpoint(name, step, size, tail, crc, when)

    def put(self, path: Path, step: int, advance: Advance) -> RemoteCheckpoint:
        """Copy a checkpoint and read it back. Raises OSError if what is read back differs. It does not count yet."""
        identity = Fingerprint.of(path)
        if self._checked[0] != identity:  # a second try has nothing to read here
            self._checked = identity, checksum_of(path, advance)
        checksum = self._checked[1]
        self.unpublish(path.name)
        self._fs.put_file(str(path), self._at(path.name), callback=_progress(advance))
        self._verify(path.name, identity.size, checksum, advance)
        return RemoteCheckpoint(path.name, step, identity.size, identity.tail, checksum, time.time())

    def duplicate(self, copy: RemoteCheckpoint, name: str, advance: Advance) -> RemoteCheckpoint:
        """Make `name` a second copy of `copy` inside the storage, and read it back."""
        self.unpublish(name)
        self._fs.cp_file(self._at(copy.name), self._at(name))
        self._verify(name, copy.size, copy.crc32, advance)
        return RemoteCheckpoint(name, copy.step, copy.size, copy.tail, copy.crc32, time.time())

    def publish(self, copy: RemoteCheckpoint) -> None:
        """Publish the copy: from now on it counts."""
        said = {key: value for key, value in asdict(copy).items() if key != "name"}
        self.put_text(copy.name + _MARK, json.dumps(said).encode())

    def unpublish(self, name: str) -> None:
        """Withdraw a copy: from now on it does not count."""
        self._remove(name + _MARK)

    def remove(self, name: str) -> None:
        """Remove a checkpoint; first it stops counting."""
        self.unpublish(name)
        self._remove(name)

    def set_aside(self, copies: list[RemoteCheckpoint], advance: Advance) -> str:
        """Move checkpoints of abandoned steps into overtaken-1, -2, ...; return where."""
        for copy in copies:
            aside = self._new_aside(copy.name)
            there = self.duplicate(copy, f"{aside}/{copy.name}", advance)
            self.publish(there)
            self.remove(copy.name)
        return f"{self.url}/{self._aside}"

    def overtaken(self) -> set[Fingerprint]:
        """Return the fingerprints of checkpoints that were set aside."""
        asides = [name for name in self.names() if _ASIDE.fullmatch(name)]
        files = [f"{aside}/{self._base(entry)}" for aside in asides for entry in self._storage.listed(self._at(aside))]
        found = (self._copy(name.removesuffix(_MARK)) for name in files if name.endswith(_MARK))
        return {copy.fingerprint for copy in found if copy}

    def keep_text(self, name: str, content: bytes) -> str:
        """Keep a log that is to be replaced, in overtaken-1, -2, ...; return where."""
        aside = self._new_aside(name)
        self.put_text(f"{aside}/{name}", content)
        return f"{self.url}/{aside}"

    def _new_aside(self, name: str) -> str:
        """Return a folder for abandoned checkpoints that holds nothing whole of this name."""
        number, there = 1, self.names()
        kept = name + _MARK if _is_checkpoint(name) else name
        while not self._aside or self.size_of(f"{self._aside}/{kept}"):
            self._aside = "" if f"overtaken-{number}" in there else f"overtaken-{number}"
            number += 1
        return self._aside

    def put_text(self, name: str, content: bytes) -> None:
        """Write a small file, whole or not at all: objects are so by themselves, files on a disk are not."""
        if self._storage.url.startswith("file:"):
            path = Path(self._at(name))
            path.parent.mkdir(parents=True, exist_ok=True)
            disk.replace(path.with_name(f".{path.name}.tmp"), path, content)
        else:
            self._fs.pipe_file(self._at(name), content)

    def size_of(self, name: str) -> int:
        """Return the size of a file in bytes; 0 if it is not there."""
        try:
            return self._size(name)
        except FileNotFoundError:
            return 0

    def text(self, name: str) -> bytes | None:
        """Return the content of a small file; None if it is not there."""
        try:
            return bytes(self._fs.cat_file(self._at(name)))
        except FileNotFoundError:
            return None

    def fetch(self, copy: RemoteCheckpoint, path: Path, check: Callable[[Path], None]) -> None:
        """Download a checkpoint to `path`, whole and durable, or not at all. Raises DamagedCopy, OSError.

        `check` is called with the temporary file, and may raise.
        """
        temporary = path.with_name(schema.temporary_name(copy.name))
        try:
            with open(temporary, "wb") as file:
                if self._size(copy.name) != copy.size:
                    raise ContentMismatch("it has another size than it had when it was copied")
                checksum = 0
                for block in self._blocks(copy.name, copy.size):
                    checksum = crc32(block, checksum)
                    file.write(block)
                if checksum != copy.crc32:
                    raise ContentMismatch("it is damaged: it is not what was copied there")
                file.flush()
                os.fsync(file.fileno())
            check(temporary)
            disk.commit(temporary, path)
        finally:
            disk.remove(temporary)

    def _verify(self, name: str, size: int, checksum: int, advance: Advance) -> None:
        found = 0
        if self._size(name) == size:
            for block in self._blocks(name, size):
                found = crc32(block, found)
                advance(len(block))
        if found != checksum:
            raise OSError(f"{self.url}/{name} reads back as other bytes than were written")

    def _blocks(self, name: str, size: int) -> Iterator[bytes]:
        for start in range(0, size, BLOCK):
            stop = min(size, start + BLOCK)
            block = bytes(self._fs.cat_file(self._at(name), start=start, end=stop))
            if len(block) != stop - start:
                raise OSError(f"{self.url}/{name} ends too early")
            yield block

    def _size(self, name: str) -> int:
        return int(self._fs.info(self._at(name))["size"])

    def _remove(self, name: str) -> None:
        try:
            self._fs.rm_file(self._at(name))
        except FileNotFoundError:
            pass

    def _at(self, name: str) -> str:
        return f"{self.folder}/{name}"


def checksum_of(path: Path, advance: Advance) -> int:
    """Return the CRC-32 of a file."""
    found = 0
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            found = crc32(block, found)
            advance(0)
    return found


def say(text: str) -> None:
    """Print a line; a WARNING goes to stderr."""
    console.print_line(text, error=text.startswith("WARNING"))


def _is_checkpoint(name: str) -> bool:
    return name == FINAL or schema.checkpoint_step(name) is not None


def _progress(advance: Advance) -> Any:
    from fsspec.callbacks import Callback

    class Progress(Callback):  # type: ignore[misc]
        """fsspec's way of telling how far it is."""

        def relative_update(self, inc: int = 1) -> None:
            advance(inc)

    return Progress()
