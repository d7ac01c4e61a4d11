"""What the tools print: tables, sizes, ages, JSON. Colour only on a terminal, and never where NO_COLOR is set."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from unbroken.checkpoint.schema import printable

BOLD, DIM, RED, GREEN = "1", "2", "31", "32"
_MINUTE, _HOUR, _DAY = 60, 3600, 86400


def paint(text: str, colour: str) -> str:
    """`text` in an ANSI colour (https://no-color.org)."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not sys.stdout.isatty():
        return text
    return f"\x1b[{colour}m{text}\x1b[0m"


def shows(letters: str) -> bool:
    """Whether stdout has them in its encoding."""
    try:
        letters.encode(sys.stdout.encoding)
    except UnicodeEncodeError:
        return False
    return True


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], right: str = "") -> str:
    """Columns two spaces apart. `right` has an `r` at the place of each column that is aligned to the right."""
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    sides = [">" if right[i : i + 1] == "r" else "<" for i in range(len(heads))]

    def line(cells: Sequence[str]) -> str:
        padded = (f"{cell:{side}{width}}" for cell, side, width in zip(cells, sides, widths, strict=True))
        return "  ".join(padded).rstrip()

    return "\n".join([paint(line(heads), DIM), *map(line, rows)])


@contextmanager
def progress(what: str, total: int | None, of_bytes: bool = False) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, where that is a terminal; nothing elsewhere. Each call says how many more are done."""
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


def size(count: float) -> str:
    """1536 -> 1.5 KB, in powers of 1000 as disks are sold."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def age(seconds: float) -> str:
    """How long ago, to one unit."""
    if seconds < _MINUTE:
        return f"{max(0, seconds):.0f}s"
    if seconds < _HOUR:
        return f"{seconds / _MINUTE:.0f}m"
    return f"{seconds / _HOUR:.0f}h" if seconds < _DAY else f"{seconds / _DAY:.0f}d"


def safe_text(text: str) -> str:
    """A text of several lines from a file: what could steer a terminal is escaped, lines and tabs stay."""
    return "".join(c if c in "\n\t" else printable(c) for c in text)


def as_json(value: object) -> str:
    """One JSON document. Numbers that JSON has not (nan, inf) and bytes become text."""
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
