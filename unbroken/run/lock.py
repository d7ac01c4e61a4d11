"""The lock of a run: at most one attempt writes to it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from unbroken.errors import UserError
from unbroken.files import close, read_small, regular
from unbroken.host import hostname, process_stat

LOCK_BYTES = 4096  # of a lock's content that are looked at
LOCK = ".lock"
ORPHAN_PATIENCE_SECONDS = 60.0


class RunLock:
    """A lock of a run's folder. The kernel releases it when the process ends, however that happens (flock(2))."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK
        self._file: int | None = None

    def __enter__(self) -> RunLock:
        while not self._take():
            pass
        assert self._file is not None
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, json.dumps({"host": hostname(), "pid": os.getpid()}).encode(), 0)
        return self

    def _take(self) -> bool:
        """Open and lock the file; return False if an attempt that was refused has removed it meanwhile."""
        self._file = regular(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
        began = time.monotonic()
        while not self._try():
            holder = self._holder()
            # The worker of a killed torchrun still saves its last step and then exits, so wait for it. A process that
            # got the lock just now has not written its pid yet.
            patience = 1.0 if not holder else ORPHAN_PATIENCE_SECONDS if _is_orphan(holder) else 0.0
            if time.monotonic() > began + patience:
                close(self._file)
                raise UserError(
                    f"run {self.path.parent.name} is being trained by process {holder.get('pid', '?')} on"
                    f" {holder.get('host', '?')}: stop that one first, or type --fork to continue it as another run"
                )
            time.sleep(0.1)
        if os.fstat(self._file).st_nlink:
            return True
        close(self._file)
        return False

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            close(self._file)

    def _try(self) -> bool:
        assert self._file is not None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                return True  # a filesystem without locks: train rather than refuse
            raise
        return True

    def _holder(self) -> dict[str, Any]:
        assert self._file is not None
        return _parse_holder(os.pread(self._file, LOCK_BYTES, 0))


def _parse_holder(lock: bytes) -> dict[str, Any]:
    """Return the holder {"pid", "host"} from a lock's content; empty if the content makes no sense."""
    try:
        holder = json.loads(lock)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(holder, dict) or not isinstance(holder.get("pid"), int):
        return {}
    return {"pid": holder["pid"], "host": str(holder.get("host"))[:200]}


class RunLocks(ExitStack):
    """The locks that an attempt holds, each from before the run's folder is read until the attempt ends."""

    def __init__(self) -> None:
        super().__init__()
        self._held: dict[Path, ExitStack] = {}

    def take(self, folder: Path) -> None:
        """Lock a run, making its folder if necessary. Raises UserError if another attempt has the lock."""
        if folder in self._held:
            return
        with ExitStack() as taken:
            try:
                new = [path for path in (folder, folder.parent) if not os.path.lexists(path)]
                folder.mkdir(parents=True, exist_ok=True)
                taken.enter_context(RunLock(folder))
                if new:
                    taken.callback(_remove_untouched, *new)
            except OSError as error:
                raise UserError(f"cannot write {error.filename or folder}: {error.strerror}") from None
            self._held[folder] = self.enter_context(taken.pop_all())

    def give_back(self, folder: Path) -> None:
        """Release the lock of a run, if it is held: the run has no checkpoint to resume from."""
        self._held.pop(folder, ExitStack()).close()


def training_process(folder: Path) -> str:
    """Return "process <pid>" for the process of this machine that trains a run; "" if there is none (see proc(5))."""
    lock = folder / LOCK
    try:
        pid = _parse_holder(read_small(lock, LOCK_BYTES)).get("pid")
        held = any(os.path.samefile(link, lock) for link in Path(f"/proc/{pid}/fd").iterdir() if link.exists())
    except OSError:
        return ""
    return f"process {pid}" if held else ""


def trained_elsewhere(folder: Path) -> bool:
    """Return whether the last attempt of a run was on another machine, whose processes cannot be seen from here."""
    try:
        return bool(_parse_holder(read_small(folder / LOCK, LOCK_BYTES)).get("host", hostname()) != hostname())
    except OSError:
        return False


def _remove_untouched(folder: Path, *parents: Path) -> None:
    """Remove the new folder of an attempt that was refused before it wrote anything but the lock, and new parents."""
    with suppress(OSError):
        if os.listdir(folder) == [LOCK]:
            os.unlink(folder / LOCK)
        for path in (folder, *parents):
            os.rmdir(path)


def _is_orphan(holder: dict[str, Any]) -> bool:
    if holder.get("host") != hostname():
        return False
    stat = process_stat(holder["pid"])
    return stat is None or stat[1] == "1" or stat[0] == "Z"
