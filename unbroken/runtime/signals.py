"""Signals, the end of --max_hours and the death of the parent process, as one question: should the run stop now?"""

from __future__ import annotations

import math
import os
import re
import select
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)

# One Ctrl-C reaches a worker twice, from the terminal and from torchrun, within milliseconds; a second one comes later.
SAME_KEYPRESS_SECONDS = 0.7

START_SECONDS, LOOK_SECONDS = 1.5, 0.2


def _write(text: str) -> None:
    """Write to stderr from a signal handler, where print is not allowed."""
    with suppress(OSError, ValueError):
        os.write(sys.stderr.fileno(), text.encode())


class StopSignals:
    """A handler of signals to stop: a signal sets `name`, and the loop looks at it at every step and batch.

    Before training begins, a signal ends the process after START_SECONDS, wherever it is: the start may wait for a
    filesystem or a storage that does not answer, and nothing was trained that could be saved.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.out_of_time = False
        self.announces = False  # whether this process prints the signals; one process of a run does
        self._number = int(signal.SIGTERM)  # also for the end of --max_hours and a signal to another process
        self._parent, self._starts_again, self._is_first = 0, False, True
        self._first: dict[int, float] = {}  # when each signal came first
        self._before: dict[signal.Signals, Any] = {}
        self._deadline, self._deadline_name = math.inf, ""
        self._training = threading.Event()
        self._watch = threading.Thread(target=self._watch_start, name="signals", daemon=True)

    def __enter__(self) -> StopSignals:
        for number in STOP_SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup(1): the terminal may go
            self._before[number] = signal.signal(number, self._note)
        self._heard, heard_by_python = os.pipe()
        os.set_blocking(heard_by_python, False)
        self._wakeup = heard_by_python
        signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
        with suppress(RuntimeError):  # a limit of processes
            self._watch.start()
        return self

    def training_begins(self) -> None:
        """Make a signal only ask to stop, from now on."""
        if self._training.is_set():
            return
        self._training.set()
        signal.set_wakeup_fd(-1)
        os.write(self._wakeup, b"\0")
        if self._watch.ident is not None:
            self._watch.join()
        for file in (self._heard, self._wakeup):
            os.close(file)

    def _watch_start(self) -> None:
        """End the process if training has not begun START_SECONDS after a signal.

        A system call that hangs keeps the main thread from handling a signal, which is then pending (FUSE, NFS), or
        handled by Python's C code only.
        """
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # they are for the main thread
        number = 0
        while not number and not self._training.is_set():
            if select.select([self._heard], [], [], LOOK_SECONDS)[0]:
                number = os.read(self._heard, 1)[0]
            number = next((each for each in self._before if each in (number, _pending(each))), 0)
        if number and not self._training.wait(START_SECONDS):
            if self.announces:
                _write(
                    f"stopped by {signal.Signals(number).name} before the first step; the same command starts again\n"
                )
            os._exit(128 + number)

    def __exit__(self, *error: object) -> None:
        self.training_begins()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        if self.name is None and time.monotonic() >= self._deadline:
            self.name, self.out_of_time = self._deadline_name, True
        return self.name is not None

    @property
    def why(self) -> str:
        """The cause of a stop, for the line that reports it."""
        return self.name or "a signal to another process"

    def stop_at(self, deadline: float, name: str) -> None:
        """Stop at a time on the monotonic clock, as if a signal of this name came."""
        self._deadline, self._deadline_name = deadline, name

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        first = self._first.setdefault(number, now)
        if self.name is None:
            self.name, self._number = signal.Signals(number).name, number
            if self.announces and sys.stderr.isatty():
                _write(f"{self.name}: leaving after this step and its save; Ctrl-C once more leaves at once\n")
        elif number == signal.SIGINT and now - first > SAME_KEYPRESS_SECONDS:
            _write("stopped at once: on disk is what was announced as saved\n")
            os._exit(130)

    def exit_code(self) -> int:
        """Return the exit code of a stopped process: 128 + the signal's number, 143 if another process got the signal.

        Under torchrun only the first process of a node returns it, and it ends last: torchrun kills the others as soon
        as one fails, even in the middle of an upload. When the time of --max_hours is over torchrun is stopped too,
        because with --max-restarts it would start the processes again; not after a signal, which may be torchrun's own,
        because a node has joined.
        """
        if self._parent and not self._is_first:
            return 0
        if self.out_of_time and self._starts_again and os.getppid() == self._parent:
            os.kill(self._parent, signal.SIGTERM)
        return 128 + self._number

    def follow_parent(self, starts_again: bool, is_first: bool) -> None:
        """Note the parent, torchrun, whose death sends SIGTERM since `init_distributed`.

        `starts_again`: torchrun starts processes that fail again. `is_first`: this is the first process of its node.
        """
        self._parent = os.getppid()
        self._starts_again, self._is_first = starts_again, is_first


def _pending(number: int) -> int:
    """Return the signal if it is pending because the main thread has not received it, else 0 (proc(5))."""
    try:
        found = re.search(r"^ShdPnd:\s*([0-9a-f]+)$", Path("/proc/self/status").read_text("ascii"), re.M)
    except OSError:
        return 0
    return number if found and int(found[1], 16) >> (number - 1) & 1 else 0
