"""The console: plain lines, and on a terminal a bar below them.

A console that is a file on a full disk, a pipe whose reader has gone or a terminal that was closed costs its lines and
no step.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

from unbroken.checkpoint.schema import printable

if TYPE_CHECKING:
    from rich.progress import Progress


def open_streams() -> None:
    """What was closed from the start goes nowhere: else the next file to be opened would get what is printed."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # it takes the lowest number that is free
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115


def say(text: str, error: bool = False) -> None:
    """A line on stdout, or of something wrong on stderr; what could steer a terminal is escaped."""
    file, text = sys.stderr if error else sys.stdout, printable(text, len(text))
    with suppress(OSError):
        try:
            print(text, file=file, flush=True)
        except UnicodeEncodeError:  # a name of a file, in an encoding that has not all of its letters
            print(text.encode("ascii", "backslashreplace").decode(), file=file, flush=True)


def left(code: int) -> int:
    """`code`, once all is said: what cannot be written by now is let go, or Python would end with 120 instead."""
    for file in (sys.stdout, sys.stderr):
        try:
            file.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())
    return code


class Console:
    """Prints lines; piped, nothing but lines."""

    def __init__(self, total: int, start: int) -> None:
        self._bar: Progress | None = None
        if sys.stdout.isatty():
            from rich import progress

            self._bar = progress.Progress(
                progress.TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                progress.BarColumn(),
                progress.TimeElapsedColumn(),
                progress.TextColumn("left"),
                progress.TimeRemainingColumn(elapsed_when_finished=False),
            )
            self._task = self._bar.add_task("", total=total, completed=start)
            self._bar.start()

    def line(self, text: str) -> None:
        """One line, above the bar."""
        if self._bar is None:
            say(text)
        else:
            with suppress(OSError):
                self._bar.console.print(printable(text, len(text)), highlight=False, markup=False, soft_wrap=True)

    def step(self, step: int, text: str) -> None:
        """A step's line, and the bar moves."""
        self.line(text)
        if self._bar is not None:
            with suppress(OSError):
                self._bar.update(self._task, completed=step)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            with suppress(OSError):
                self._bar.stop()
