"""This machine: its name, its processors, and the processes that run on it."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import time
from pathlib import Path

UNLIMITED = 2.0**31
PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


def hostname() -> str:
    """Return this machine's name, for the log, the lock and the checkpoint."""
    return socket.gethostname()


def available_cores() -> int:
    """Return the number of processors that this process may run on, at most those of its cgroup's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, int(cpu_quota())))


def cpu_quota(proc: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")) -> float:
    """Return the processors that the cgroup of this process, or one above it, allows on average (cgroups(7)).

    A container without limit, or a system without cgroups, allows `UNLIMITED`.
    """
    allowed = UNLIMITED
    try:
        lines = proc.read_text("utf-8").splitlines()
    except OSError:
        return allowed
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = mounted if not controllers else mounted / "cpu"
        for folder in [base / path.strip("/"), *(base / path.strip("/")).parents]:
            if not folder.is_relative_to(base):
                break
            try:
                if controllers:
                    quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
                else:
                    quota, period = (folder / "cpu.max").read_text().split()
                allowed = min(allowed, float(quota) / float(period)) if float(quota) > 0 else allowed
            except (OSError, ValueError, ZeroDivisionError):  # not there, or "max"
                continue
    return allowed


def process_stat(pid: int) -> list[str] | None:
    """Return the fields of /proc/<pid>/stat from the state on (proc(5)); None if there is no such process.

    psutil's `create_time` follows the wall clock. The start time here is in ticks since boot, so a change of
    the clock does not change it: with the pid it identifies a process until the next boot.
    """
    try:
        return Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
    except OSError:
        return None


def process_start_time() -> float:
    """Return when this process was started, in seconds since 1970; now, where the system does not tell."""
    stat = process_stat(os.getpid())
    if stat is None or not hasattr(time, "CLOCK_BOOTTIME"):
        return time.time()
    return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - int(stat[19]) / os.sysconf("SC_CLK_TCK"))


def process_age() -> float:
    """Return the seconds since this process was started."""
    return max(0.0, time.time() - process_start_time())


def end_with_torchrun() -> bool:
    """Let the kernel send SIGTERM to this process when its parent, torchrun, dies; return whether it is dead already.

    Uses prctl(2), so on Linux alone. The death of a parent before that call is noticed by the new parent's pid. In a
    container torchrun itself may be process 1.
    """
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    return os.getppid() != parent or (parent == 1 and not is_torchrun(parent))


def is_torchrun(pid: int) -> bool:
    """Return whether a process is torchrun, or our `launch`, by its command line (proc(5))."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        return b"torch" in command or b"\0launch\0" in command
    except OSError:
        return False
