"""Files: opening those that somebody else may have written, closing them, making their names durable."""

from __future__ import annotations

import errno
import glob
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

_NEVER_MEANT = {  # the first bytes of files that are never the right ones
    b"version https://git-lfs": "it is a Git LFS pointer: run `git lfs pull`",
    b"<": "it is a web page, perhaps of a failed download",
}


def regular(path: str | Path, flags: int) -> int:
    """Return a descriptor of a regular file: an opener for `open`. Raises OSError for any other kind of file.

    A FIFO would make open(2) wait for its other end, and signals to stop would not end that.
    """
    file = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    kind = os.fstat(file).st_mode
    if stat.S_ISREG(kind):
        return file
    close(file)
    if stat.S_ISDIR(kind):
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "it is not a regular file", str(path))


def close(file: int) -> None:
    """Close a descriptor; it is closed even where close(2) reports an error (NFS, a quota, FUSE).

    What was synced is on disk, and for the rest nothing can be done any more, so the error is dropped.
    """
    with suppress(OSError):
        os.close(file)


def absolute_glob(pattern: str) -> str:
    """Return a glob that means the same in another folder."""
    return os.path.join(glob.escape(os.getcwd()), os.path.expanduser(pattern))


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, if its filesystem can. Raises OSError."""
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # some network filesystems cannot sync a folder
            raise
    finally:
        close(file)


def sync_folders_above(folder: Path) -> None:
    """Make the names of a folder and of those above it durable, as far as that is possible.

    A durable file would be lost together with a folder whose name is not durable. An attempt that was killed may have
    made some of the folders, so all folders that this user can write are synced.
    """
    with suppress(OSError):
        for above in folder.absolute().parents:
            if os.access(above, os.R_OK | os.W_OK):
                sync_folder(above)


def describe_start(head: bytes, kinds: Mapping[bytes, str]) -> str:
    """Return the description in `kinds` of a file that begins with `head`, by its first bytes; "" for none."""
    return next((text for start, text in {**kinds, **_NEVER_MEANT}.items() if head.startswith(start)), "")


MAX_SKIPPED_BYTES = 1 << 26  # without the end of a line; what follows is not looked for


def bounded_lines(file: BinaryIO, most: int) -> Iterator[bytes]:
    """Yield the lines of a file with their ends, without those of more than `most` bytes. Raises OSError.

    A damaged or malicious file costs little: holes are skipped, and the file ends after MAX_SKIPPED_BYTES without the
    end of a line.
    """
    skipped = 0
    while line := file.readline(most):
        is_whole = line.endswith(b"\n")
        if not skipped and (is_whole or len(line) < most):
            yield line
        skipped = 0 if is_whole else skipped + len(line)
        if skipped > MAX_SKIPPED_BYTES:
            return
        if skipped >= most:
            _skip_hole(file)


def _skip_hole(file: BinaryIO) -> None:
    """Move to the end of the hole in which the file is, if it is in one and its filesystem tells."""
    at, descriptor = file.tell(), file.fileno()
    buffered = os.lseek(descriptor, 0, os.SEEK_CUR)
    try:
        data = os.lseek(descriptor, at, os.SEEK_DATA)
    except OSError as error:
        data = os.fstat(descriptor).st_size if error.errno == errno.ENXIO else at
    os.lseek(descriptor, buffered, os.SEEK_SET)  # the buffer knows nothing of this
    file.seek(max(at, data))


def read_whole(path: Path, limit: int) -> bytes:
    """Return the content of a regular file. Raises OSError, also if it is longer than `limit` bytes."""
    with open(path, "rb", opener=regular) as file:
        if os.fstat(file.fileno()).st_size > limit:
            raise OSError(errno.EFBIG, f"it is longer than {limit:,} bytes", str(path))
        return file.read(limit)


def read_small(path: Path, limit: int) -> bytes:
    """Return at most `limit` bytes of a regular file. Raises OSError."""
    with open(path, "rb", opener=regular) as file:
        return file.read(limit)
