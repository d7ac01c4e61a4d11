"""Every system call of the save path, in one place: what a full disk, an interruption or a short write means
is decided here.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import signal
import stat
from pathlib import Path

from unbroken.checkpoint.format.zip_layout import BLOCK

_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EPERM, errno.EMLINK, errno.EXDEV)
_MADV_POPULATE_WRITE = 23  # Linux 5.14


class OutputFile:
    """A file under a temporary name, written at any offset by any number of threads, around the page cache if
    possible.
    """

    def __init__(self, path: Path, *, create: bool) -> None:
        self.path = path
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
        self._file = os.open(path, flags | (os.O_CREAT | os.O_EXCL if create else 0), 0o644)
        self._direct: int | None = None
        try:
            self._direct = os.open(path, flags | getattr(os, "O_DIRECT", 0))
        except OSError as error:
            if error.errno != errno.EINVAL:  # EINVAL: the filesystem has no O_DIRECT
                os.close(self._file)
                raise

    def reserve(self, size: int) -> None:
        """Make room for `size` bytes now: a full disk is found before anything is written."""
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
        """All of `data`. With O_DIRECT where `data` and `offset` are aligned; a filesystem that minds is
        written buffered.
        """
        done = 0
        while done < len(data):
            direct = self._direct
            aligned = direct is not None and (offset + done) % BLOCK == 0 and (len(data) - done) % BLOCK == 0
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

    _refused: int | None = None

    def read(self, size: int, offset: int) -> bytes:
        return os.pread(self._file, size, offset)

    def sync(self, size: int | None = None) -> None:
        """Onto stable storage. With `size`, cut to that first: blocks are written whole, the file ends
        anywhere.
        """
        if size is not None:
            os.ftruncate(self._file, size)
        os.fsync(self._file)

    def close(self) -> None:
        for file in (self._direct, self._refused, self._file):
            if file is not None:
                os.close(file)
        self._direct = self._refused = None


def libc_fallocate(file: int, size: int) -> int:
    """fallocate(2), not posix_fallocate(3): that one writes into every block where the filesystem cannot
    reserve.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    call = getattr(libc, "fallocate64", None) or getattr(libc, "fallocate", None)
    if call is None:
        ctypes.set_errno(errno.ENOSYS)
        return -1
    return int(call(ctypes.c_int(file), ctypes.c_int(0), ctypes.c_int64(0), ctypes.c_int64(size)))


def commit(temporary: Path, final: Path) -> None:
    """The instant at which a checkpoint exists. It has been synced before; afterwards its name is."""
    os.rename(temporary, final)
    sync_folder(final.parent)


def sync_folder(folder: Path) -> None:
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in (
            errno.EINVAL,
            errno.EOPNOTSUPP,
        ):  # some network filesystems cannot sync a folder
            raise
    finally:
        os.close(file)


def replace(temporary: Path, final: Path, content: bytes) -> None:
    """Write a small file, durably, whole or not at all. Raises OSError.

    `temporary` is always the same name, so that what a kill leaves is written over; a link under it is not followed.
    """
    try:
        temporary.unlink(missing_ok=True)
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(final)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def remove(path: Path) -> None:
    """Remove it if it is there and can be; what stays is cleared at the next start."""
    try:
        os.unlink(path)
    except OSError:
        pass


def second_name(existing: Path, temporary: Path, final: Path) -> None:
    """`final` becomes another name of `existing`'s file, or a copy where the filesystem has no hard links."""
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
    """Whether this file's blocks may be overwritten: it has no other name and nobody has it open or mapped.

    A reader of a removed file keeps its contents, one of an overwritten file would see them change. A write
    lease is granted only if nobody else has the file open (fcntl(2)); where there are no leases the answer is
    no.
    """
    try:
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        known = os.fstat(file)
        if not stat.S_ISREG(known.st_mode) or known.st_nlink != 1:
            return False
        fcntl.fcntl(file, fcntl.F_SETSIG, signal.SIGURG)  # ignored by default; the usual SIGIO would end the process
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        return True
    except (OSError, AttributeError):
        return False
    finally:
        os.close(file)


def aligned(content: bytes) -> mmap.mmap:
    """The same bytes, and not one more, on a page boundary."""
    memory = mmap.mmap(-1, max(len(content), 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory[: len(content)] = content
    return memory


def warm_memory(size: int) -> mmap.mmap:
    """`size` bytes of zeroed host memory on a page boundary, in huge pages if there are any, every page
    present.
    """
    memory = mmap.mmap(-1, max(size, BLOCK), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
        memory.madvise(_MADV_POPULATE_WRITE)
    except (OSError, AttributeError):
        pass  # an older kernel: the first copy pays for the pages
    return memory
