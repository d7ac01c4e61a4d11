"""The console: plain lines, and on a terminal a bar below them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress


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
            print(text, flush=True)
        else:
            self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def step(self, step: int, text: str) -> None:
        """A step's line, and the bar moves."""
        self.line(text)
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()
