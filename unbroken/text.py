"""Text for users: escaping for terminals; sizes, ages, durations and times in words."""

from __future__ import annotations

import math
from datetime import datetime, timezone

_MINUTE, _HOUR, _DAY = 60, 3600, 86400


def format_size(count: float) -> str:
    """Return a size in bytes in words, in powers of 1000: 1536 becomes 1.5 KB."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def format_count(count: float, noun: str) -> str:
    """Return a number with its noun: 1 process, 2 processes, 3 shards, 1.25 epochs."""
    shown = f"{count:,}" if isinstance(count, int) else f"{count:.3g}"
    plural = "" if shown == "1" else "es" if noun.endswith(("s", "tch")) else "s"
    return f"{shown} {noun}{plural}"


def format_age(seconds: float) -> str:
    """Return an age in seconds in one unit."""
    if seconds < _MINUTE:
        return f"{max(0, seconds):.0f}s"
    if seconds < _HOUR:
        return f"{seconds / _MINUTE:.0f}m"
    return f"{seconds / _HOUR:.0f}h" if seconds < _DAY else f"{seconds / _DAY:.0f}d"


def printable_text(text: str) -> str:
    """Return a text of several lines with terminal control characters escaped; line breaks and tabs stay."""
    return "".join(c if c in "\n\t" else printable(c) for c in text)


def format_duration(seconds: float) -> str:
    """Return seconds in words: 1.4 s, 3 m 20 s, 2 h 05 m, 3 d 04 h."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds >= 0.095 or seconds == 0 else f"{1000 * seconds:.2g} ms"
    for unit, below, name, least in ((60, 3600, "m", "s"), (3600, 86400, "h", "m"), (86400, math.inf, "d", "h")):
        if seconds < below:
            whole, rest = divmod(int(seconds), unit)
            return f"{whole} {name} {rest // {'s': 1, 'm': 60, 'h': 3600}[least]:02d} {least}"
    return "for ever"


def format_time(wall: float) -> str:
    """Return seconds since 1970 as UTC; "no time" for values out of range."""
    try:
        return datetime.fromtimestamp(wall, timezone.utc).strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError, OSError):
        return "no time"


def printable(text: object, limit: int = 200) -> str:
    """Return `text` with control and direction-changing characters escaped, cut at `limit` characters."""
    shown = str(text)
    cut = shown if len(shown) <= limit else shown[: limit - 3] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in cut)
