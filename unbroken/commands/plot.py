"""`python -m unbroken plot`: the loss curves of runs as a picture, with the places where they were interrupted."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unbroken.checkpoint.schema import printable
from unbroken.errors import UserError
from unbroken.logfile import events, read_log

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HELP = "draw the loss curves of runs"
PICTURE = "loss.png"
INCHES, DOTS_PER_INCH = (8.0, 4.0), 110
MOST_LABELS = 4  # of interruptions: a run that was interrupted a hundred times has other things to show


def configure(parser: argparse.ArgumentParser) -> None:
    """Which runs, and where to."""
    help_text = "run_ids, folders of runs, or log files (default: the run that wrote last)"
    parser.add_argument("what", nargs="*", metavar="RUN|LOG", help=help_text)
    where = f"the picture; its ending decides the format (default: {PICTURE} beside the log, or here for several runs)"
    parser.add_argument("--out", type=Path, metavar="FILE", help=where)
    smooth = "also the mean over so many steps, the raw losses pale behind it; 0: not (default: a fiftieth of them)"
    parser.add_argument("--smooth", type=int, default=-1, metavar="N", help=smooth)


def run(args: argparse.Namespace) -> int:
    """Draw, and say where the picture is."""
    logs = [log_of(text) for text in args.what] or [newest_log()]
    out = args.out or (logs[0].parent / PICTURE if len(logs) == 1 else Path(PICTURE))
    draw(logs, out, args.smooth)
    print(out)
    return 0


def log_of(text: str) -> Path:
    """The log of what was typed."""
    from unbroken.commands import given

    if Path(text).is_file():
        return Path(text)
    folder = given.folder_of(text)
    if folder is None:
        raise UserError(f"{printable(text)}: there is no such log, folder or run")
    log = folder / f"{folder.resolve().name}.log"
    if not log.is_file():
        raise UserError(f"there is no log in {printable(folder)}: type its path, <output_dir>/<run_id>.log")
    return log


def newest_log() -> Path:
    """Of the runs under logs/, the log that was written to last."""
    from unbroken.checkpoint import directory
    from unbroken.run import LOGS

    logs = [folder / f"{folder.name}.log" for folder in directory.runs(LOGS)]
    there = [log for log in logs if directory.is_regular(log)]
    if not there:
        raise UserError(f"there are no logs under {LOGS}/ yet; type the path of one")
    return max(there, key=lambda log: log.stat().st_mtime)


def interruptions(log: Path) -> list[tuple[int, int]]:
    """For each attempt but the first: (the step it went back to, the step that the one before had reached)."""
    found: list[tuple[int, int]] = []
    reached = 0
    began = [step for step, _ in read_log(log).attempts]
    for kind, step, _ in events(log):
        if kind == "trn":
            reached = max(reached, step)
        elif kind == "#" and began:
            found.append((began.pop(0), reached))
    return found[1:]


def draw(logs: Sequence[Path], out: Path, smooth: int = -1) -> None:
    """Training and validation losses of each log over the step, as PNG, SVG or PDF by the ending of `out`.

    Raises UserError without matplotlib or a loss.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("pictures need matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=INCHES, dpi=DOTS_PER_INCH, layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per token)")
    for index, log in enumerate(logs):
        _draw_run(axes, log, f"C{2 * index % 10}", f"C{(2 * index + 1) % 10}", len(logs) == 1, smooth)
    axes.grid(alpha=0.25)
    axes.legend(framealpha=0.9)
    try:
        figure.savefig(out)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write the picture {printable(out)}: {error}") from None


def smoothed(points: Sequence[tuple[int, float]], window: int) -> list[tuple[int, float]]:
    """The running mean over the last `window` points, from the point on at which there are so many."""
    sums = [0.0, *itertools.accumulate(value for _, value in points)]
    return [(points[i - 1][0], (sums[i] - sums[i - window]) / window) for i in range(window, len(points) + 1)]


def _draw_run(axes: Axes, log: Path, colour: str, val_colour: str, alone: bool, smooth: int) -> None:
    history = read_log(log)
    if not history.train and not history.val:
        raise UserError(f"{printable(log)} holds no losses yet")
    name = "" if alone else f" {printable(log.stem, 8).removesuffix('...')}"
    style: dict[str, Any] = {"linewidth": 1.2, "alpha": 0.9}
    window = len(history.train) // 50 if smooth < 0 else smooth
    if history.train and 1 < window <= len(history.train):
        axes.plot(*zip(*history.train, strict=True), color=colour, linewidth=0.7, alpha=0.25)
        label = f"training{name}, mean of {window}"
        axes.plot(*zip(*smoothed(history.train, window), strict=True), color=colour, label=label, **style)
    elif history.train:
        axes.plot(*zip(*history.train, strict=True), color=colour, label=f"training{name}", **style)
    if history.val:
        axes.plot(*zip(*history.val, strict=True), "o-", color=val_colour, markersize=4, label=f"validation{name}")
    for number, (back_to, reached) in enumerate(interruptions(log) if alone else []):
        said = f"interrupted after step {reached}, resumed from {back_to}" if number < MOST_LABELS else None
        axes.axvline(reached, color="0.3", linestyle="--", linewidth=1)
        axes.axvspan(back_to, reached, color="0.85", label=said)
