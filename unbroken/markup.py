"""HTML in small pieces. Everything that was read from a file passes through `text` here, and only here."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Sequence
from datetime import datetime, timezone

from unbroken.checkpoint.schema import printable


def text(value: object, most: int = 500) -> str:
    """Any value as the text of an element or an attribute: no markup, no control characters."""
    return html.escape(printable(value, most), quote=True)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], right: str = "") -> str:
    """Cells are markup already. `right` has an `r` at the place of each column of numbers."""
    kinds = [' class="number"' if right[i : i + 1] == "r" else "" for i in range(len(heads))]
    head = "".join(f"<th{kind}>{name}</th>" for name, kind in zip(heads, kinds, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{kind}>{cell}</td>" for cell, kind in zip(row, kinds, strict=True)) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def data(value: object) -> str:
    """JSON inside of a script element: nothing in it can end the element."""
    return re.sub("[<>&\u2028\u2029]", lambda found: f"\\u{ord(found[0]):04x}", json.dumps(value, allow_nan=False))


def filled(template: str, parts: dict[str, str]) -> str:
    """The template with {{name}} replaced, in one pass: what is put in is not looked at again."""
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)


def duration(seconds: float) -> str:
    """1.4 s, 3 m 20 s, 2 h 05 m, 3 d 04 h."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds >= 0.095 or seconds == 0 else f"{1000 * seconds:.2g} ms"
    for unit, below, name, least in ((60, 3600, "m", "s"), (3600, 86400, "h", "m"), (86400, math.inf, "d", "h")):
        if seconds < below:
            whole, rest = divmod(int(seconds), unit)
            return f"{whole} {name} {rest // {'s': 1, 'm': 60, 'h': 3600}[least]:02d} {least}"
    return "for ever"


def moment(wall: float) -> str:
    """Seconds since 1970 as UTC; of a stranger's journal they may be anything."""
    try:
        return datetime.fromtimestamp(wall, timezone.utc).strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError, OSError):
        return "no time"


def lines(value: str) -> str:
    """A text of several lines that is safe to print already (`screen.safe_text`)."""
    return html.escape(value, quote=True)
