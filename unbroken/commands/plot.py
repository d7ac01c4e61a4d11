"""`python -m unbroken plot`: draw curves of runs into a picture, or in the terminal."""

from __future__ import annotations

import argparse
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unbroken import console
from unbroken.commands import atomic_output
from unbroken.commands.terminal_plot import Curve, draw_plot
from unbroken.errors import UserError
from unbroken.metrics.metric_table import BY_PANEL, find_metric
from unbroken.metrics.timeline import Interruption, Timeline, find_interruptions, read_timeline
from unbroken.run import locate
from unbroken.text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes


PICTURE = "loss.png"
SMOOTH_SHARE = 50  # unless typed, the average is over 1/SMOOTH_SHARE of the steps
INCHES_WIDE, INCHES_HIGH, DOTS_PER_INCH = 8.0, {1: 4.0}, 160
PANEL_INCHES = 2.3  # where there are several
LARGEST = 1e100  # that the arithmetic of pictures can handle
ENDINGS = (".png", ".svg", ".pdf")
MOST_LABELS = 4  # of interruptions: a hundred of them would cover the picture
TERMINAL_COLOURS = ("36", "33", "35", "32", "34", "31")

AXES = {"step": "step", "tokens": "tokens", "hours": "hours of training"}
MINUTES = "minutes of training"  # instead of hours, if no run has one
MS_PER_HOUR = 3.6e6

Points = list[tuple[float, float]]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments: which runs, what of them, and where to."""
    parser.add_argument("what", nargs="*", metavar="RUN|LOG", help=locate.LOG_HELP)
    where = f"the picture, .png, .svg or .pdf (default: {PICTURE} beside the log, or in this folder for several runs)"
    parser.add_argument("--out", type=Path, metavar="FILE", help=where)
    panels = f"panels, of {','.join(BY_PANEL)} or a metric of your own (default: loss)"
    parser.add_argument("--show", default="loss", metavar="NAMES", help=panels)
    smooth = "steps over which the smoothed curve averages; 0: raw only (default: a fiftieth of the run)"
    parser.add_argument("--x", default="step", choices=AXES, help="the x axis (default: step)")
    parser.add_argument("--smooth", type=int, metavar="N", help=smooth)
    parser.add_argument("--terminal", action="store_true", help="draw in the terminal and write no file")


@dataclass(frozen=True)
class Drawn:
    """A run to draw. `places`: the x of each step if it is not the step itself."""

    name: str
    run: Timeline
    broken: list[Interruption]
    places: dict[float, float] | None = None

    def place(self, step: float) -> float | None:
        """Return the x of a step; None if it is not known."""
        return step if self.places is None else self.places.get(step)

    def series(self, metric: str, smooth: float = 0) -> Points:
        """Return the points of a metric, averaged over `smooth` steps; values too large for an axis become NaN."""
        known = self.run.series(metric)
        points = smoothed([(step, value if abs(value) < LARGEST else math.nan) for step, value in known], smooth)
        places = self.places
        return points if places is None else [(places[step], value) for step, value in points if step in places]

    @classmethod
    def read(cls, log: Path, x: str = "step") -> Drawn:
        """Return the run of a log, to be drawn over `x`. Raises UserError if there is nothing to draw."""
        run = read_timeline(log)
        if not run.metrics:
            raise UserError(f"{printable(log)} holds no losses yet")
        args = run.attempts[-1].args if run.attempts else {}
        name = f"{printable(args.get('model', ''), 20)} {printable(log.stem[:8])}".strip()
        name = locate.name_of_log(log) or printable(args.get("name", ""), 64) or name
        if x == "step":
            return cls(name, run, find_interruptions(log, run))
        metric, unit = ("tokens", 1.0) if x == "tokens" else ("time", MS_PER_HOUR)
        places: dict[float, float] = {step: value / unit for step, value in run.series(metric) if abs(value) < LARGEST}
        if not places:
            raise UserError(f"{printable(log)} has no journal with the {x} of its steps; leave out --x")
        places[0] = 0.0
        return cls(name, run, find_interruptions(log, run), places)


def read_runs(logs: Sequence[Path], panels: Sequence[str], x: str) -> tuple[list[Drawn], list[str], str]:
    """Return the runs, the panels whose metrics are logged, and the name of the x axis.

    Raises UserError if there is nothing to draw.
    """
    shown, axis = [Drawn.read(log, x) for log in logs], AXES[x]
    if x == "hours" and max(max((one.places or {}).values()) for one in shown) < 1:
        axis = MINUTES
        shown = [replace(one, places={step: 60 * at for step, at in (one.places or {}).items()}) for one in shown]
    known = {name for one in shown for metrics in one.run.metrics.values() for name in metrics}
    names = {panel: {find_metric(panel).name, "val_loss" if panel == "loss" else ""} for panel in panels}
    missing = [panel for panel in panels if not names[panel] & known]
    if len(missing) == len(panels):
        raise UserError(f"--show {','.join(map(printable, panels))}: not logged by this run")
    for panel in missing:
        console.print_line(f"--show {printable(panel)}: not logged by this run, left out", error=True)
    return shown, [panel for panel in panels if panel not in missing], axis


def run(args: argparse.Namespace) -> int:
    """Draw, and print the path of the picture."""
    panels = args.show.split(",")
    if args.smooth is not None and args.smooth < 0:
        raise UserError(f"--smooth {args.smooth}: it must not be negative")
    logs = locate.find_logs(args.what)
    if set(panels) - set(BY_PANEL):
        known = [*BY_PANEL, *sorted({name for log in logs for name in read_timeline(log).extra})]
        strange = [name for name in panels if name not in known]
        if strange:
            raise UserError(f"--show {printable(strange[0])}: there are {', '.join(map(printable, known))}")
    if args.terminal:
        if args.out:
            raise UserError("--terminal writes no file; leave out --out")
        if not console.can_print("⣿┤"):
            raise UserError("--terminal: this terminal's encoding is not UTF-8; type LC_ALL=C.UTF-8 before the command")
        print("\n".join(in_terminal(logs, panels, args.smooth, args.x)))
        return 0
    if args.out and args.out.suffix.lower() not in ENDINGS:
        raise UserError(f"--out {args.out}: the ending decides the format: {', '.join(ENDINGS)}")
    out = args.out or (logs[0].parent / PICTURE if len(logs) == 1 else Path(PICTURE))
    draw(logs, out, panels, args.smooth, args.x)
    console.print_line(str(out))
    return 0


def smoothed(points: Points, steps: float) -> Points:
    """Return points averaged over about `steps` steps, with exponential weights to both sides, without nan and inf."""
    known = [(step, value) for step, value in points if math.isfinite(value)]
    if steps <= 1:
        return points
    ahead, behind = _decayed(known, steps / 2), _decayed(known[::-1], steps / 2)[::-1]
    return [
        (step, (total + more - value) / (weight + heavier - 1))
        for (step, value), (total, weight), (more, heavier) in zip(known, ahead, behind, strict=True)
    ]


def _decayed(points: Points, steps: float) -> list[tuple[float, float]]:
    """Return for each point the decayed sum of the values up to it, and of the weights.

    Each value counts e times less for every `steps` steps before the point.
    """
    total = weight = 0.0
    found = []
    before = points[0][0] if points else 0.0
    for step, value in points:
        kept = math.exp(-max(1, abs(step - before)) / steps)
        total, weight, before = total * kept + value, weight * kept + 1, step
        found.append((total, weight))
    return found


def reach_of(shown: Sequence[Drawn], typed: int | None) -> float:
    """Return the number of steps to average over, the same for all runs of a picture."""
    longest = max(len(one.run.metrics) for one in shown)
    return float(min(typed, 10**9)) if typed is not None else float(longest // SMOOTH_SHARE)


# ---- as a picture ----------------------------------------------------------------------------------------------------


def draw(
    logs: Sequence[Path], out: Path, panels: Sequence[str] = ("loss",), smooth: int | None = None, x: str = "step"
) -> None:
    """Draw panels below one another into a file.

    Args:
        logs: The logs of the runs.
        out: The picture; its ending decides the format.
        panels: Names of panels or metrics.
        smooth: Steps to average over; None: a share of the run.
        x: A key of AXES.

    Raises:
        UserError: without matplotlib, or where there is nothing to draw.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("pictures need matplotlib: pip install matplotlib, or type --terminal") from None
    shown, panels, axis = read_runs(logs, panels, x)
    reach = reach_of(shown, smooth)
    height = INCHES_HIGH.get(len(panels), PANEL_INCHES * len(panels))
    style: dict[Any, Any] = {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.fonttype": "none",
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(INCHES_WIDE, height), dpi=DOTS_PER_INCH, layout="constrained")
        rows: list[Axes] = list(figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0])
        for axes, panel in zip(rows, panels, strict=True):
            for index, one in enumerate(shown):
                _draw_run(axes, panel, one, index, len(shown) == 1, reach if find_metric(panel).smoothed else 0)
                _draw_breaks(axes, panel, one, index, len(shown) == 1)
            axes.set_ylabel(find_metric(panel).label)
            axes.grid(alpha=0.25, linewidth=0.6)
            if axes.get_legend_handles_labels()[1] and (axes is rows[0] or panel == "loss"):
                said = f"averaged over {reach:.0f} steps" if find_metric(panel).smoothed and reach > 1 else None
                axes.legend(framealpha=0.85, edgecolor="none", title=said if len(shown) > 1 else None)
        rows[-1].set_xlabel(axis)
        if len(shown) == 1:
            figure.suptitle(f"run {shown[0].name}", fontsize=10)
        figure.align_ylabels(rows)
        atomic_output.write_whole(out, figure.savefig)


def _draw_run(axes: Axes, panel: str, one: Drawn, index: int, alone: bool, reach: float) -> None:
    colour, val_colour = (f"C{index % 10}", "C1" if alone else f"C{index % 10}")
    points = one.series(find_metric(panel).name)
    kind = "training" if panel == "loss" else "raw"
    if points and reach > 1:
        label = f"{kind}, every step" if alone else None
        axes.plot(*zip(*points, strict=True), color=colour, linewidth=0.7, alpha=0.3, label=label)
        label = f"{kind if panel == 'loss' else ''} averaged over {reach:.0f} steps".strip() if alone else one.name
        axes.plot(
            *zip(*one.series(find_metric(panel).name, reach), strict=True), color=colour, linewidth=1.4, label=label
        )
    elif points:
        axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.2, label=kind if alone else one.name)
    val = one.series("val_loss") if panel == "loss" else []
    if val:
        marks: dict[str, Any] = {"markersize": 3.5, "linewidth": 1, "linestyle": "-" if alone else "--"}
        label = "validation" if alone else f"{one.name}, validation"
        axes.plot(*zip(*val, strict=True), marker="o", color=val_colour, label=label, **marks)


def _draw_breaks(axes: Axes, panel: str, one: Drawn, index: int, alone: bool) -> None:
    """Draw a line where an attempt resumed, and a grey range over the steps that it repeated."""
    last = max(one.run.metrics)
    for number, each in enumerate(one.broken):
        back_to, reached = one.place(each.back_to), one.place(min(each.reached, last))
        if back_to is None:
            continue
        if not alone:
            said = f"{one.name}, resumed" if number == 0 else None
            axes.axvline(back_to, color=f"C{index % 10}", linestyle=":", linewidth=0.8, alpha=0.7, label=said)
            continue
        left = len(one.broken) - MOST_LABELS
        said = each.said if number < MOST_LABELS else f"and {left} more" if number == MOST_LABELS else None
        said = said if panel == "loss" else None
        if reached is None or reached <= back_to:
            axes.axvline(back_to, color="0.3", linestyle="--", linewidth=0.8, label=said)
        else:
            axes.axvline(back_to, color="0.3", linestyle="--", linewidth=0.8)
            axes.axvspan(back_to, reached, color="0.88", linewidth=0, label=said)


# ---- in the terminal -------------------------------------------------------------------------------------------------


def in_terminal(logs: Sequence[Path], panels: Sequence[str], smooth: int | None, x: str) -> list[str]:
    """Return panels in characters; validation has the second colour if one run is drawn.

    Args:
        logs: The logs of the runs.
        panels: Names of panels or metrics.
        smooth: Steps to average over; None: a share of the run.
        x: A key of AXES.
    """
    shown, panels, axis = read_runs(logs, panels, x)
    width, rows = shutil.get_terminal_size((80, 24))
    height = max(8, min(rows - 2, 24) // len(panels))
    lines: list[str] = []
    averaged = reach_of(shown, smooth)
    for panel in panels:
        metric = find_metric(panel)
        curves, names = [], []
        for index, one in enumerate(shown):
            colour = TERMINAL_COLOURS[index % len(TERMINAL_COLOURS)]
            reach = averaged if metric.smoothed else 0
            curves.append(Curve(one.series(metric.name, reach), colour))
            names.append(console.colored(one.name, colour))
            val = one.series("val_loss") if panel == "loss" and len(shown) == 1 else []
            if val:
                curves.append(Curve(val, TERMINAL_COLOURS[1]))
                names.append(console.colored("validation", TERMINAL_COLOURS[1]))
        marks = [at for one in shown for each in one.broken if (at := one.place(each.back_to)) is not None]
        over = "" if x == "step" else f" over {axis}"
        said = f"{metric.label}{over}: {', '.join(names)}" + ("; dotted: resumed from there" if marks else "")
        lines += draw_plot(said, curves, marks, min(width, 120), height)
    return lines
