"""A run: its id, its folder, the lock that one attempt holds, and which run a restarted worker belongs to."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
import uuid
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from unbroken.checkpoint import disk
from unbroken.checkpoint.schema import is_run_id
from unbroken.distributed import World, host
from unbroken.errors import UserError
from unbroken.journal import journal_of

LOGS = Path("logs")
LOCK_BYTES = 4096  # of a lock's content that are looked at
LOCK, ATTEMPT = ".lock", ".attempt"
ORPHAN_PATIENCE_SECONDS = 60.0


@dataclass(frozen=True)
class Run:
    """Where a run lives."""

    run_id: str
    output_dir: str

    @property
    def folder(self) -> Path:
        """Its checkpoints, lock and marks."""
        return LOGS / self.run_id

    @property
    def log(self) -> Path:
        """Its log: beside the checkpoints unless --output_dir says where."""
        return (Path(self.output_dir) if self.output_dir else self.folder) / f"{self.run_id}.log"

    def create(self) -> None:
        """Make the folders, or say why they cannot be made."""
        for folder in (self.folder, self.log.parent):
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"cannot make the folder {folder}: {error.strerror}") from None
            if not os.access(folder, os.W_OK | os.X_OK):
                raise UserError(f"cannot write into the folder {folder}: change its permissions or start elsewhere")
        for path in (self.log, journal_of(self.log)):
            if os.path.exists(path) and not os.path.isfile(path):
                raise UserError(f"cannot write the log {path}: it is no file")


def own_output_dir(saved: str, run_id: str) -> str:
    """A checkpoint's --output_dir if it is below the current folder or has the run's log; else "", the run's own.

    It is a stranger's file, which must not choose where on this machine something is written.
    """
    path = Path(saved)
    if not saved.isprintable():
        return ""
    below = not path.is_absolute() and ".." not in path.parts
    return saved if below or os.path.isfile(path / f"{run_id}.log") else ""


def write_config(folder: Path, text: str) -> list[str]:
    """Put `config.yaml` into a run's folder, whole or not at all; returns what went wrong, a run can do without it."""
    try:
        disk.replace(folder / ".config.yaml.tmp", folder / "config.yaml", text.encode())
    except OSError as error:
        return [f"{folder / 'config.yaml'} could not be written: {error.strerror}"]
    return []


def new_run_id(typed: str) -> str:
    """A fresh uuid4, or the typed one if it is one in its usual spelling: only such a string ever becomes a path."""
    if typed and not is_run_id(typed):
        raise UserError(f"--run_id {typed!r} is not a uuid4 such as {uuid.uuid4()}")
    return typed or str(uuid.uuid4())


class RunLock:
    """At most one attempt writes to a run. The kernel drops the lock with the process, however that ends (flock(2))."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK
        self._file: int | None = None

    def __enter__(self) -> RunLock:
        while not self._take():
            pass
        assert self._file is not None
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, json.dumps({"host": host(), "pid": os.getpid()}).encode(), 0)
        return self

    def _take(self) -> bool:
        """Open and lock the file; False if it has been removed meanwhile, by an attempt that left nothing."""
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        began = time.monotonic()
        while not self._try():
            holder = self._holder()
            # The worker of a killed torchrun still saves its last step; it leaves by itself, so wait for it. And one
            # that has the lock since this moment has not written its name yet.
            patience = 1.0 if not holder else ORPHAN_PATIENCE_SECONDS if _is_orphan(holder) else 0.0
            if time.monotonic() > began + patience:
                os.close(self._file)
                raise UserError(
                    f"run {self.path.parent.name} is being trained by process {holder.get('pid', '?')} on"
                    f" {holder.get('host', '?')}: stop that one first, or type --fork to continue it as another run"
                )
            time.sleep(0.1)
        if os.fstat(self._file).st_nlink:
            return True
        os.close(self._file)
        return False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            os.close(self._file)

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
        return _named_in(os.pread(self._file, LOCK_BYTES, 0))


def _named_in(lock: bytes) -> dict[str, Any]:
    """Who the content of a lock says that holds it: {"pid", "host"}; nothing where it makes no sense."""
    try:
        holder = json.loads(lock)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(holder, dict) or not isinstance(holder.get("pid"), int):
        return {}
    return {"pid": holder["pid"], "host": str(holder.get("host"))[:200]}


class RunLocks(ExitStack):
    """The runs that an attempt has to itself, each from before it is looked into until the attempt is over."""

    def __init__(self) -> None:
        super().__init__()
        self._held: dict[Path, ExitStack] = {}

    def take(self, folder: Path) -> None:
        """Hold the lock of a run, made if it is not there. Raises UserError if another attempt has it."""
        if folder in self._held:
            return
        with ExitStack() as taken:
            try:
                is_new = not os.path.lexists(folder)
                folder.mkdir(parents=True, exist_ok=True)
                taken.enter_context(RunLock(folder))
                if is_new:
                    taken.callback(_remove_untouched, folder)
            except OSError as error:
                raise UserError(f"cannot write into the folder {folder}: {error.strerror}") from None
            self._held[folder] = self.enter_context(taken.pop_all())

    def __bool__(self) -> bool:
        return bool(self._held)

    def holds(self, folder: Path) -> bool:
        """Whether this attempt has that run to itself."""
        return folder in self._held

    def give_back(self, folder: Path) -> None:
        """Others may have it, if it is held: there is nothing in it to go on from."""
        self._held.pop(folder, ExitStack()).close()


def trained_by(folder: Path) -> str:
    """The process of this machine that trains a run, in words; "" if none does, or one elsewhere (see proc(5))."""
    lock = folder / LOCK
    try:
        pid = _named_in(lock.read_bytes()[:LOCK_BYTES]).get("pid")
        held = any(os.path.samefile(link, lock) for link in Path(f"/proc/{pid}/fd").iterdir() if link.exists())
    except OSError:
        return ""
    return f"process {pid}" if held else ""


def _remove_untouched(folder: Path) -> None:
    """What an attempt leaves that was refused before it began: nothing."""
    with suppress(OSError):
        if os.listdir(folder) == [LOCK]:
            os.unlink(folder / LOCK)
        os.rmdir(folder)


def _process_stat(pid: int) -> list[str] | None:
    """The fields of /proc/<pid>/stat from the state on (proc(5)); None if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
    except OSError:
        return None


def process_began() -> float:
    """When this process was started, in seconds since 1970 (proc(5)); now, where the system does not tell."""
    stat = _process_stat(os.getpid())
    if stat is None or not hasattr(time, "CLOCK_BOOTTIME"):
        return time.time()
    return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - int(stat[19]) / os.sysconf("SC_CLK_TCK"))


def _is_orphan(holder: dict[str, Any]) -> bool:
    if holder.get("host") != host():
        return False
    stat = _process_stat(holder["pid"])
    return stat is None or stat[1] == "1" or stat[0] == "Z"


def _agent() -> list[Any]:
    """The torchrun agent that started this process: host, pid and start time, which no later process shares."""
    pid = os.getppid()
    stat = _process_stat(pid)
    return [host(), pid, stat[19] if stat else ""]


def mark_attempt(folder: Path, agents: list[Any]) -> None:
    """Remember which torchrun agents this run belongs to, so that the workers they restart find it."""
    disk.replace(folder / f"{ATTEMPT}.tmp", folder / ATTEMPT, json.dumps({"agents": agents}).encode())


def agents_of(world: World) -> list[Any]:
    """The agents of all processes; empty when nobody would restart them (other launchers set RANK too)."""
    return list(world.gather(_agent())) if world.launch.job else []


def interrupted_run(agents: list[Any]) -> str | None:
    """The run that one of these agents already trains: its worker died, or the set of nodes changed.

    An agent lives as long as its torchrun, so another job's run is never taken for this one's.
    """
    best: tuple[float, str] | None = None
    for mark in LOGS.glob(f"*/{ATTEMPT}"):
        if not is_run_id(mark.parent.name) or mark.is_symlink():
            continue
        try:
            known = json.loads(mark.read_text("utf-8"))["agents"]
            age = mark.stat().st_mtime
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if isinstance(known, list) and any(agent in known for agent in agents):
            best = max(best or (age, mark.parent.name), (age, mark.parent.name))
    return best[1] if best else None
