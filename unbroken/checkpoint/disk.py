"""All system calls of the save path, with their handling of full disks, interruptions and short writes."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import signal
import stat
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from unbroken import files
from unbroken.checkpoint.format.zip_layout import BLOCK
from unbroken.files import close

_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EPERM, errno.EMLINK, errno.EXDEV)
_MADV_POPULATE_WRITE = 23  # Linux 5.14
_HUGE_BYTES = 256 << 20  # for less, moving memory to make room for huge pages may cost 10 times what they save


class OutputFile:
    """A file under a temporary name, which several threads write at any offset, past the page cache if possible."""

    def __init__(self, path: Path, *, create: bool) -> None:
        self.path = path
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
        self._file = os.open(path, flags | (os.O_CREAT | os.O_EXCL if create else 0), 0o666)
        self._direct: int | None = None
        self._refused: int | None = None  # the descriptor of `_direct`, once a write through it was refused
        try:
            self._direct = os.open(path, flags | getattr(os, "O_DIRECT", 0))
        except OSError as error:
            if error.errno != errno.EINVAL:  # EINVAL: the filesystem has no O_DIRECT
                close(self._file)
                raise

    def reserve(self, size: int) -> None:
        """Reserve `size` bytes now, so that a full disk is found before anything is written. Raises OSError."""
        while libc_fallocate(self._file, size) != 0:
            error = ctypes.get_errno()
            if error == errno.EINTR:
                continue
            if error not in _UNSUPPORTED:
                raise OSError(error, os.strerror(error), str(self.path))
            if os.fstat(self._file).st_size < size:
                os.ftruncate(self._file, size)
            return

    def write(self, data: memoryview, offset: int) -> None:
        """Write all of `data`, with O_DIRECT where `data` and `offset` are aligned and the filesystem allows it.

        Raises OSError.
        """
        done = 0
        while done < len(data):
            direct, aligned = self._direct, (offset + done) % BLOCK == 0 and (len(data) - done) % BLOCK == 0
            file = direct if aligned and direct is not None else self._file
            try:
                count = os.pwrite(file, data[done:], offset + done)
            except InterruptedError:
                continue
            except OSError as error:
                if error.errno == errno.EINVAL and file != self._file:
                    self._direct = None  # its descriptor stays open until close(): other threads may be using it
                    self._refused = direct
                    continue
                raise
            if count == 0:
                raise OSError(errno.EIO, "the disk takes no more bytes", str(self.path))
            done += count

    def read(self, size: int, offset: int) -> bytes:
        """Return up to `size` bytes from `offset`."""
        return os.pread(self._file, size, offset)

    def sync(self, size: int | None = None) -> None:
        """Flush to stable storage. `size` cuts the file first, whose last block was written whole. Raises OSError."""
        if size is not None:
            os.ftruncate(self._file, size)
        os.fsync(self._file)

    def check(self, size: int, contents: Sequence[tuple[int, bytes]]) -> None:
        """Raise OSError unless the path names this file, of `size` bytes, with these contents (offset, bytes)."""
        found = os.fstat(self._file)
        if not os.path.samestat(found, os.lstat(self.path)) or found.st_size != size:
            raise OSError(errno.EIO, "another process replaced or cut the file", str(self.path))
        for offset, content in contents:
            if self.read(len(content), offset) != content:
                raise OSError(errno.EIO, "the file does not hold what was written", str(self.path))

    def close(self) -> None:
        """Close the descriptors. What `sync` returned for is on disk, whatever close(2) reports."""
        descriptors = [file for file in (self._direct, self._refused, self._file) if file is not None]
        self._direct, self._refused, self._file = None, None, -1  # a later call fails: another file may get the number
        for file in descriptors:
            close(file)


def libc_fallocate(file: int, size: int) -> int:
    """Call fallocate(2). posix_fallocate(3) would write into every block where a filesystem cannot reserve."""
    libc = ctypes.CDLL(None, use_errno=True)
    call = getattr(libc, "fallocate64", None) or getattr(libc, "fallocate", None)
    if call is None:
        ctypes.set_errno(errno.ENOSYS)
        return -1
    return int(call(ctypes.c_int(file), ctypes.c_int(0), ctypes.c_int64(0), ctypes.c_int64(size)))


def commit(temporary: Path, final: Path) -> None:
    """Give the synced temporary file its final name, and sync the folder. Raises OSError."""
    os.rename(temporary, final)
    files.sync_folder(final.parent)


def replace(temporary: Path, final: Path, content: bytes) -> None:
    """Write a small file durably, whole or not at all. Raises OSError.

    `temporary` is always the same name, so that the next call overwrites what a kill leaves; a link under that name is
    not followed.
    """
    try:
        temporary.unlink(missing_ok=True)
        file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            left = memoryview(content)
            while left:
                left = left[os.write(file, left) :]
            os.fsync(file)
        finally:
            close(file)
        temporary.replace(final)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def remove(path: Path) -> None:
    """Remove a file if it exists and can be removed; the next start tries again."""
    with suppress(OSError):
        os.unlink(path)


def second_name(existing: Path, temporary: Path, final: Path) -> None:
    """Make `final` another name of the file `existing`, or a copy where the filesystem has no hard links."""
    remove(temporary)
    try:
        os.link(existing, temporary, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        _copy(existing, temporary)
    try:
        commit(temporary, final)
    finally:
        remove(temporary)  # rename(2) does nothing when both are names of the same file already


def _copy(source: Path, target: Path) -> None:
    with open(source, "rb") as reading:
        writing = OutputFile(target, create=True)
        try:
            size = os.fstat(reading.fileno()).st_size
            writing.reserve(size)
            for offset in range(0, size, 1 << 24):
                writing.write(memoryview(os.pread(reading.fileno(), 1 << 24, offset)), offset)
            writing.sync(size)
        finally:
            writing.close()


def recyclable(path: Path) -> bool:
    """Return whether the blocks of a file may be overwritten: no other name, and no process has it open or mapped.

    A reader of a removed file keeps its contents; a reader of an overwritten file would see them change. A write lease
    is granted only if no other process has the file open (fcntl(2)). Return False on a filesystem without leases.
    """
    try:
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
            return False
        fcntl.fcntl(file, fcntl.F_SETSIG, signal.SIGURG)  # ignored by default; the usual SIGIO would end the process
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        return True
    except (OSError, AttributeError):
        return False
    finally:
        close(file)


def aligned(content: bytes) -> mmap.mmap:
    """Return a copy of the bytes on a page boundary."""
    memory = mmap.mmap(-1, len(content), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory[:] = content
    return memory


def warm_memory(size: int) -> mmap.mmap:
    """Return `size` bytes of zeroed memory on a page boundary, with all pages present; many of them as huge pages."""
    memory = mmap.mmap(-1, max(size, BLOCK), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError, AttributeError):  # an older kernel: the first copy allocates the pages
        if size >= _HUGE_BYTES:
            memory.madvise(mmap.MADV_HUGEPAGE)
        memory.madvise(_MADV_POPULATE_WRITE)
    return memory
