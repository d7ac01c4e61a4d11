"""The console: plain lines, a progress bar on a terminal, tables and JSON for the tools.

A console that cannot be written (a full disk, a closed pipe, a closed terminal) loses lines, never a step.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from unbroken.text import printable

if TYPE_CHECKING:
    from rich.progress import Progress


def open_streams() -> None:
    """Open /dev/null for closed standard streams: otherwise the next opened file would receive what is printed."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # it takes the lowest number that is free
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115


def print_line(text: str, error: bool = False) -> None:
    """Print a line to stdout, or an error to stderr; characters that could control a terminal are escaped."""
    file, text = sys.stderr if error else sys.stdout, printable(text, len(text))
    with suppress(OSError):
        try:
            print(text, file=file, flush=True)
        except UnicodeEncodeError:  # a file name with a letter that the encoding lacks
            print(text.encode("ascii", "backslashreplace").decode(), file=file, flush=True)


def finish_output(code: int) -> int:
    """Return `code` after flushing. Output that cannot be written is dropped, or Python would exit with 120."""
    for file in (sys.stdout, sys.stderr):
        try:
            file.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())
    return code


class Console:
    """A console for training: plain lines, and on a terminal a progress bar."""

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
        """Print a line, above the bar."""
        if self._bar is None:
            print_line(text)
        else:
            with suppress(OSError):
                self._bar.console.print(printable(text, len(text)), highlight=False, markup=False, soft_wrap=True)

    def step(self, step: int, text: str) -> None:
        """Print the line of a step, if it has one, and move the bar."""
        if text:
            self.line(text)
        if self._bar is not None:
            with suppress(OSError):
                self._bar.update(self._task, completed=step)

    def close(self) -> None:
        """Restore the terminal."""
        if self._bar is not None:
            with suppress(OSError):
                self._bar.stop()


BOLD, DIM, RED, GREEN = "1", "2", "31", "32"


def colored(text: str, colour: str) -> str:
    """Return `text` in an ANSI colour, if stdout is a terminal that shows colours (https://no-color.org)."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not sys.stdout.isatty():
        return text
    return f"\x1b[{colour}m{text}\x1b[0m"


def can_print(letters: str) -> bool:
    """Return whether the encoding of stdout has these letters."""
    try:
        letters.encode(sys.stdout.encoding)
    except UnicodeEncodeError:
        return False
    return True


def format_table(heads: Sequence[str], rows: Sequence[Sequence[str]], right: str = "") -> str:
    """Return a table with columns two spaces apart. `right` has an `r` for each right-aligned column."""
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    sides = [">" if right[i : i + 1] == "r" else "<" for i in range(len(heads))]

    def line(cells: Sequence[str]) -> str:
        padded = (f"{cell:{side}{width}}" for cell, side, width in zip(cells, sides, widths, strict=True))
        return "  ".join(padded).rstrip()

    return "\n".join([colored(line(heads), DIM), *map(line, rows)])


@contextmanager
def progress_bar(what: str, total: int | None, of_bytes: bool = False) -> Iterator[Callable[[int], None]]:
    """Show a bar on stderr if it is a terminal; the yielded function is called with the number of new items."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich import progress as bars
    from rich.console import Console

    done: tuple[bars.ProgressColumn, ...] = (bars.MofNCompleteColumn(), bars.TimeElapsedColumn())
    if of_bytes:
        done = (bars.DownloadColumn(), bars.TransferSpeedColumn())
    columns = (bars.BarColumn(), *done, bars.TimeRemainingColumn())
    with bars.Progress(what, *columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda more: bar.update(task, advance=more)


def to_json(value: object) -> str:
    """Return one JSON document. Numbers that JSON lacks (nan, inf) and bytes become text."""
    return json.dumps(_jsonable(value), indent=2, ensure_ascii=True)


def _jsonable(value: object) -> object:
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, bytes):
        return value.hex()
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
