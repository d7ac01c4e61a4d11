"""A file of lines to which a training appends, whatever another process does to the file meanwhile."""

from __future__ import annotations

import errno
import os
import re
from contextlib import suppress
from pathlib import Path

from unbroken.files import bounded_lines, close, regular, sync_folder
from unbroken.text import format_count

_OURS = re.compile(rb'# time=|s:\d+ (trn|val):|\{"(event|step)": ')  # how a log or a journal begins
_TORN_EVENT = re.compile(rb"s:?|s:\d+|s:\d+ (t|tr|trn|v|va|val)?|s:\d+ (trn|val):(-|i|in|n|na|-?\d+(\.\d{0,5})?)?")
_TAIL_BYTES = 1 << 20  # of a file, which are searched for what a power cut leaves
MAX_LINE_BYTES = 1 << 20  # of a line; a start in the journal, with its flags, has about 2,000
MAX_UNWRITTEN_BYTES = 1 << 24  # bytes kept for a disk that is full at the moment


class AppendFile:
    """A file to which each line is appended by one write(2), so that a kill can tear only the last line.

    Lines that a full disk refuses are kept, and written as soon as it accepts them. For one thread at a time. All
    methods but `close` raise OSError.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._unwritten = path, b""
        self._file = _open(path)
        self._size, self._is_named = os.fstat(self._file).st_size, False

    def append(self, line: str) -> None:
        """Write a line, after those that the disk has refused so far."""
        if len(self._unwritten) < MAX_UNWRITTEN_BYTES:
            self._unwritten += f"{line}\n".encode("utf-8", "backslashreplace")
        self._write()

    def _write(self) -> None:
        while self._unwritten:
            count = os.write(self._file, self._unwritten)
            self._unwritten, self._size = self._unwritten[count:], self._size + count

    def sync(self) -> None:
        """Sync what was appended, and the name of the file."""
        self._write()
        os.fsync(self._file)
        if not self._is_named:
            self._is_named = True
            with suppress(OSError):  # the folder may be one that cannot be opened; the lines count more than the name
                sync_folder(self.path.parent)

    def restore(self) -> str:
        """Make the path hold all lines again; return what another process had done to the file, "" for nothing.

        "moved": the file was removed, renamed or replaced; the open one has all lines, and those that the path lacks
        are written there. "cut": it lost lines that cannot be read any more.
        """
        found = os.fstat(self._file)
        with suppress(FileNotFoundError):
            if os.path.samestat(found, os.stat(self.path)):
                was_cut, self._size = found.st_size < self._size, found.st_size
                return "cut" if was_cut else ""
        file = _open(self.path)
        try:
            missing = _copy_lines(self._file, file, self.path)
        except OSError:
            close(file)
            raise
        close(self._file)
        self._file, self._size, self._is_named = file, os.fstat(file).st_size, False
        return "moved" if missing else ""  # some filesystems give one file different inodes

    def close(self) -> str:
        """Close the file. Return a line about lost lines; "" if everything is written. Raises nothing."""
        lost = ""
        try:
            self._write()
        except OSError as error:
            lost = f"{self.path} lost {format_count(self._unwritten.count(10), 'line')}: {error.strerror}"
        close(self._file)
        return lost


def _open(path: Path) -> int:
    """Return a descriptor that appends whole lines, after removing what a kill or a power cut has torn.

    A link is followed only to a log: in an untrusted run folder it could lead to any file of the user's.
    """
    is_link = path.is_symlink()
    file = regular(path, os.O_RDWR | os.O_APPEND | (0 if is_link else os.O_CREAT | os.O_NOFOLLOW))
    try:
        found = os.fstat(file)
        if is_link and not _OURS.match(os.pread(file, 64, 0)):
            raise OSError(errno.ELOOP, "it is a link to a file that is no log", str(path))
        size = _drop_damage(file, found.st_size)
        if size and os.pread(file, 1, size - 1) != b"\n":
            os.write(file, b"\n")
    except BaseException:
        close(file)
        raise
    return file


def _drop_damage(file: int, size: int) -> int:
    """Remove the lines at the end that a power cut or a full disk has damaged; return the new size.

    They are lines with zeros, where data did not arrive, and a last line of this program without its end. They were
    never synced, and their steps are repeated. For other programs a file with zeros is no text file.
    """
    start = max(0, size - _TAIL_BYTES)
    tail = os.pread(file, size - start, start)
    if b"\0" not in tail and not _is_torn(tail[tail.rfind(b"\n") + 1 :]):
        return size
    first = tail.rfind(b"\n", 0, tail.find(b"\0") if b"\0" in tail else None) + 1
    lines = tail[first:].splitlines(keepends=True)
    kept = b"".join(line for line in lines if b"\0" not in line and not _is_torn(line))
    os.ftruncate(file, start + first)
    os.write(file, kept)
    return start + first + len(kept)


def _is_torn(line: bytes) -> bool:
    """Return whether a line of ours lacks its end: a loss with fewer than six decimals, a JSON object without }."""
    return _TORN_EVENT.fullmatch(line) is not None or (line.startswith(b"{") and not line.endswith((b"}", b"\n")))


def _copy_lines(source: int, target: int, path: Path) -> int:
    """Append to `target`, which is open at `path`, the lines of `source` that it does not have; return their number."""
    missing = 0
    with open(path, "rb", opener=regular) as there:
        known = set(bounded_lines(there, MAX_LINE_BYTES))
    with open(source, "rb", closefd=False) as lines:
        lines.seek(0)
        for line in bounded_lines(lines, MAX_LINE_BYTES):
            if line not in known:
                os.write(target, line)
                missing += 1
    return missing
