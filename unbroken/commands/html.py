"""Small pieces of HTML. Everything that was read from a file passes through `text` here."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence

from unbroken.text import printable


def text(value: object, most: int = 500) -> str:
    """Return a value as the text of an element or attribute, without markup and control characters."""
    return html.escape(printable(value, most), quote=True)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], right: str = "") -> str:
    """Return a table; the cells are markup already. `right` has an `r` for each column of numbers."""
    kinds = [' class="number"' if right[i : i + 1] == "r" else "" for i in range(len(heads))]
    head = "".join(f"<th{kind}>{name}</th>" for name, kind in zip(heads, kinds, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{kind}>{cell}</td>" for cell, kind in zip(row, kinds, strict=True)) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def data(value: object) -> str:
    """Return JSON for a script element, which nothing in it can end."""
    return re.sub("[<>&\u2028\u2029]", lambda found: f"\\u{ord(found[0]):04x}", json.dumps(value, allow_nan=False))


def filled(template: str, parts: dict[str, str]) -> str:
    """Return the template with {{name}} replaced in one pass, so that inserted text is not replaced again."""
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)


def lines(value: str) -> str:
    """A text of several lines that is safe to print already (`screen.safe_text`)."""
    return html.escape(value, quote=True)
