"""Plots in a terminal, with eight dots to a character (Unicode's braille patterns, U+2800)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from unbroken import console

DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # [row][column] of a character
LABEL_WIDTH = 9
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Curve:
    """A curve of points (x, y), joined in their order, in an ANSI colour."""

    points: Points
    colour: str


class Canvas:
    """A canvas of `width` x `height` characters, 2 x 4 dots each; (0, 0) is the dot at the top left."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self._dots = [[0] * width for _ in range(height)]
        self._colours = [[""] * width for _ in range(height)]

    def dot(self, x: int, y: int, colour: str) -> None:
        """Set a dot; one outside of the canvas is ignored."""
        if 0 <= x < 2 * self.width and 0 <= y < 4 * self.height:
            self._dots[y // 4][x // 2] |= DOTS[y % 4][x % 2]
            self._colours[y // 4][x // 2] = colour

    def line(self, start: tuple[int, int], end: tuple[int, int], colour: str) -> None:
        """Set the dots from one point to the other, both included."""
        steps = max(abs(end[0] - start[0]), abs(end[1] - start[1]), 1)
        for k in range(steps + 1):
            x, y = (round(a + (b - a) * k / steps) for a, b in zip(start, end, strict=True))
            self.dot(x, y, colour)

    def rows(self) -> Iterator[str]:
        """Yield the rows of characters, coloured if the terminal shows colours."""
        for dots, colours in zip(self._dots, self._colours, strict=True):
            cells = [chr(0x2800 + bits) if bits else " " for bits in dots]
            yield "".join(
                console.colored(cell, colour) if colour else cell for cell, colour in zip(cells, colours, strict=True)
            )


def draw_plot(title: str, curves: Sequence[Curve], marks: Sequence[float], width: int, height: int) -> list[str]:
    """Return the lines of a plot with axes.

    Args:
        title: Its first line.
        curves: The curves.
        marks: The x of vertical dotted lines.
        width: Characters of a line.
        height: Number of lines without the title.
    """
    curves = [Curve([(x, y) for x, y in curve.points if math.isfinite(y)], curve.colour) for curve in curves]
    xs = [x for curve in curves for x, _ in curve.points]
    ys = [y for curve in curves for _, y in curve.points]
    if not xs:
        return [title, "  nothing that can be drawn"]
    canvas = Canvas(max(8, width - LABEL_WIDTH - 2), max(3, height - 2))
    across, down = 2 * canvas.width - 1, 4 * canvas.height - 1
    left, wide = min(xs), max(xs) - min(xs) or 1
    low, high = min(ys), max(ys)
    tall = high - low or 1

    def place(x: float, y: float) -> tuple[int, int]:
        return round((x - left) / wide * across), round((high - y) / tall * down)

    for mark in marks:
        for y in range(0, down + 1, 3):
            canvas.dot(place(mark, high)[0], y, console.DIM)
    for curve in curves:
        dots = [place(x, y) for x, y in curve.points]
        for start, end in zip(dots, dots[1:] or dots, strict=False):
            canvas.line(start, end, curve.colour)
    labels = {0: high, canvas.height // 2: (high + low) / 2, canvas.height - 1: low}
    rows = [
        f"{f'{labels[row]:.4g}' if row in labels else '':>{LABEL_WIDTH}} {'┤' if row in labels else '│'}{text}"
        for row, text in enumerate(canvas.rows())
    ]
    first, last = f"{left:g}", f"{left + wide:g}"
    foot = " " * (LABEL_WIDTH + 2) + first + last.rjust(canvas.width - len(first))
    return [f"{'':>{LABEL_WIDTH}}  {title}", *rows, foot]
