"""Signals, the end of --max_hours and the death of the parent process, as one question: should the run stop now?"""

from __future__ import annotations

import ctypes
import math
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
PR_SET_PDEATHSIG = 1  # <sys/prctl.h>

# One Ctrl-C reaches a worker twice, from the terminal and from torchrun, within milliseconds; a second one comes later.
SAME_KEYPRESS_SECONDS = 0.7


def _write(text: str) -> None:
    """Write to stderr from a signal handler, where print is not allowed."""
    with suppress(OSError, ValueError):
        os.write(sys.stderr.fileno(), text.encode())


class StopSignals:
    """A handler of signals to stop: a signal only sets `name`, and the loop asks for it at every step and batch."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.announces = False  # one process of a run says what it has heard
        self._first: dict[int, float] = {}  # when each signal came first
        self._before: dict[signal.Signals, Any] = {}
        self._deadline, self._deadline_name = math.inf, ""

    def __enter__(self) -> StopSignals:
        for number in STOP_SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup(1): the terminal may go
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        if self.name is None and time.monotonic() >= self._deadline:
            self.name = self._deadline_name
        return self.name is not None

    def stop_at(self, deadline: float, name: str) -> None:
        """Stop at a time on the monotonic clock, as if a signal of this name came."""
        self._deadline, self._deadline_name = deadline, name

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        first = self._first.setdefault(number, now)
        if self.name is None:
            self.name = signal.Signals(number).name
            if self.announces and sys.stderr.isatty():
                _write(f"{self.name}: leaving after this step and its save; Ctrl-C once more leaves at once\n")
        elif number == signal.SIGINT and now - first > SAME_KEYPRESS_SECONDS:
            _write("stopped at once: on disk is what was announced as saved\n")
            os._exit(130)

    def follow_parent(self) -> None:
        """Stop when torchrun dies, because its workers would train on beside those of the next attempt.

        Uses prctl(2). The death of a parent before that call is noticed by the new parent's pid. In a container
        torchrun itself may be process 1.
        """
        parent = os.getppid()
        if sys.platform == "linux":
            ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent or (parent == 1 and not _is_torchrun(parent)):
            self._note(signal.SIGTERM, None)


def _is_torchrun(pid: int) -> bool:
    """Return whether a process is torchrun, or our `launch`, by its command line (proc(5))."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        return b"torch" in command or b"\0launch\0" in command
    except OSError:
        return False
