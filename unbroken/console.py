"""The console: plain lines, and on a terminal a bar below them.

A console that is a file on a full disk, a pipe whose reader has gone or a terminal that was closed costs its lines and
no step.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress


def say(text: str, error: bool = False) -> None:
    """A line on stdout, or of something wrong on stderr."""
    file = sys.stderr if error else sys.stdout
    with suppress(OSError):
        try:
            print(text, file=file, flush=True)
        except UnicodeEncodeError:  # a name of a file, in an encoding that has not all of its letters
            print(text.encode("ascii", "backslashreplace").decode(), file=file, flush=True)


def left(code: int) -> int:
    """`code`, once all is said: what cannot be written by now is let go, or Python would end with 120 instead."""
    for file in filter(None, (sys.stdout, sys.stderr)):  # either may be closed from the start
        try:
            file.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())
    return code


class Console:
    """Prints lines; piped, nothing but lines."""

    def __init__(self, total: int, start: int) -> None:
        self._bar: Progress | None = None
        if sys.stdout and sys.stdout.isatty():
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
                self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)

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
