"""`python -m unbroken report`: write one HTML page about a run, which loads nothing else."""

from __future__ import annotations

import argparse
import base64
import hashlib
import math
import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from unbroken import console
from unbroken.commands import add_model_file, atomic_output
from unbroken.commands.ls import Listing, look
from unbroken.config import ATTEMPT_ONLY, FIELDS, display_value
from unbroken.data.tokenizers import TOKENIZERS, TokenizerNames
from unbroken.errors import UserError
from unbroken.metrics import timeline
from unbroken.metrics.metric_table import METRICS, find_metric
from unbroken.metrics.timeline import Attempt, Interruption, Timeline, find_interruptions, read_timeline
from unbroken.paths import is_run_id, logs_dir
from unbroken.run import locate
from unbroken.text import format_duration, format_time, printable

PAGE = "report.html"
MOST_POINTS = 10_000  # of a curve; of a longer one each bucket's lowest and highest
SAMPLE_TOKENS = 160
KINDS = {"ideal": "steps of the run", **timeline.CAUSES}
MOST_MARKS = 400  # on the time line


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments: which run, and where to."""
    parser.add_argument(
        "what", nargs="?", metavar="RUN|LOG", help="a run_id, a run's folder or its log (default: last)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.html", help=f"default: {PAGE} beside the log")
    parser.add_argument("--check", action="store_true", help="verify every checksum of the checkpoints too")
    parser.add_argument(
        "--samples", type=int, default=0, metavar="N", help="texts by the newest checkpoint (default: 0)"
    )
    parser.add_argument("--prompt", default="", metavar="TEXT", help="the samples' beginning (default: none)")
    names = TokenizerNames(("auto", *TOKENIZERS))
    parser.add_argument("--tokenizer", choices=names, default="auto", help="of the samples")
    add_model_file(parser)


def run(args: argparse.Namespace) -> int:
    """Write the page, and say where it is."""
    if args.prompt and not args.samples:
        raise UserError("--prompt has no effect without --samples; type --samples N")
    if args.samples < 0:
        raise UserError(f"--samples {args.samples}: it must not be negative")
    (log,) = locate.find_logs([args.what] if args.what else [])
    folder = _folder(log)
    history = read_timeline(log)
    if not history.metrics:
        raise UserError(f"{printable(log)} holds no losses yet")
    samples = _samples(folder, args.samples, args.prompt, args.tokenizer) if args.samples else []
    out = args.out or log.parent / PAGE
    if os.path.isfile(out) and out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out {printable(out)}: the file exists and is no HTML page; type another name")
    document = page(log, history, look(folder, args.check), samples, args.prompt)
    atomic_output.write_whole(out, lambda path: path.write_text(document, "utf-8"))
    console.print_line(str(out))
    return 0


def _folder(log: Path) -> Path:
    """Return the folder of the checkpoints of a log's run."""
    elsewhere = logs_dir() / log.stem
    return elsewhere if is_run_id(log.stem) and log.parent.name != log.stem and elsewhere.is_dir() else log.parent


def _samples(folder: Path, count: int, prompt: str, tokenizer: str) -> list[str]:
    from unbroken.inference import SamplingConfig, TextGenerator

    with locate.open_newest(str(folder)) as file:
        author = TextGenerator(file, tokenizer)
    return ["".join(author.generate(prompt, SAMPLE_TOKENS, SamplingConfig(), seed)) for seed in range(1, count + 1)]


def page(log: Path, run: Timeline, listing: Listing, samples: list[str], prompt: str) -> str:
    """Return the whole page. Its policy allows no download, and no script but its own.

    Args:
        log: The run's log.
        run: The run as log and journal have it.
        listing: The run's checkpoints.
        samples: Texts of the model, without control characters.
        prompt: The beginning of the samples.
    """
    import jinja2
    from markupsafe import Markup, escape

    def shown(value: object) -> Markup:
        """Escape whatever the template prints: it may come from a file."""
        return value if isinstance(value, Markup) else escape(printable(value, 500))

    here = Path(__file__).parent
    script = (here / "report.js").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    pages = jinja2.Environment(autoescape=True, finalize=shown, trim_blocks=True, undefined=jinja2.StrictUndefined)
    pages.filters.update(time=format_time, duration=format_duration)
    attempts, broken = run.attempts, find_interruptions(log, run)
    last = attempts[-1] if attempts else None
    args = last.args if last else {}
    spent = timeline.account_time(attempts)
    flags = [(n, display_value(n, value), FIELDS[n].default == value) for n, value in args.items() if n in FIELDS]
    return pages.from_string(
        (here / "report.html").read_text("utf-8")
    ).render(
        policy=f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'",
        script=Markup(script),
        kinds=KINDS,
        name=locate.name_of_log(log) or args.get("name", ""),
        log=log,
        listing=listing,
        attempts=attempts,
        last=last,
        model=args.get("model") or listing.model or "",
        state=_state(last),
        cards=_cards(run, args, spent, len(broken)),
        curves=[(name, find_metric(name).title) for name in curves_of(run) if name != "val_loss"]
        or [("val_loss", find_metric("val_loss").title)],
        data=_data(run, listing, broken),
        goodput=_percent(spent.goodput) if spent else "",
        parts=_parts(spent),
        boxes=list(_boxes(attempts)) if spent else [],
        began=attempts[0].began if attempts else 0,
        ended=max((attempt.last for attempt in attempts), default=0),
        startup_seconds=timeline.startup_seconds,
        drift=drift(attempts),
        samples=[Markup(escape(sample)) for sample in samples],  # of several lines
        prompt=prompt,
        chosen=[flag[:2] for flag in flags if not flag[2]],
        defaults=[flag[:2] for flag in flags if flag[2]],
    )


def _state(attempt: Attempt | None) -> str:
    if attempt is None:
        return "made before journals were kept: times are not known"
    return attempt.end or "no end recorded: killed, or still running"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _cards(
    run: Timeline, args: dict[str, Any], spent: timeline.TimeAccount | None, broken: int
) -> list[tuple[str, str]]:
    """Return (figure, name) for the head of the page."""
    train, val, tokens = run.series("train_loss"), run.series("val_loss"), run.series("tokens")
    wanted = args.get("num_iterations")
    cards = [(f"{max(run.metrics):,}", f"steps of {wanted:,}" if type(wanted) is int else "steps")]
    cards += [(f"{train[-1][1]:.4f}", "training loss")] if train else []
    cards += [(f"{min(value for _, value in val):.4f}", "best validation loss")] if val else []
    if spent:
        cards += [(_percent(spent.goodput), "goodput"), (format_duration(spent.total), "from start to end")]
    cards += [(_short(tokens[-1][1]), "tokens")] if tokens else []
    attempts = max(len(run.attempts), broken + 1)
    return [*cards, (str(attempts), "attempt" if attempts == 1 else "attempts")]


def _short(count: float) -> str:
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count:.0f}"


def curves_of(run: Timeline) -> list[str]:
    """Return the metrics that the chart can show and that the run has."""
    shown = [metric.name for metric in METRICS if metric.title] + run.extra
    return [name for name in shown if run.series(name)]


def _data(run: Timeline, listing: Listing, broken: list[Interruption]) -> dict[str, Any]:
    series = {}
    for name in curves_of(run):
        points = thinned(run.series(name))
        values = [float(f"{value:.7g}") if math.isfinite(value) else None for _, value in points]
        series[name] = {"steps": [step for step, _ in points], "values": values}
    return {
        "series": series,
        "smoothed": [metric.name for metric in METRICS if metric.smoothed],
        "gaps": [[each.back_to, each.reached] for each in broken],
        "saves": sorted({line.step for line in listing.checkpoints if line.step is not None}),
    }


def _parts(spent: timeline.TimeAccount | None) -> list[tuple[str, float, float]]:
    """Return (kind, seconds, share in percent) for each use of the run's time."""
    parts = {"ideal": spent.ideal, **spent.lost} if spent else {}
    total = max(sum(parts.values()), 1e-9)
    return [(kind, seconds, 100 * seconds / total) for kind, seconds in parts.items()]


def _boxes(attempts: list[Attempt]) -> Iterator[dict[str, Any]]:
    """Yield the boxes of the time line: the time of the run over a width of 1000, with a kind of box for each use."""
    began, ended = attempts[0].began, max(attempt.last for attempt in attempts)
    scale = 1000 / max(ended - began, 1e-9)

    def box(
        kind: str, start: float, end: float, said: str, top: int = 14, height: int = 36
    ) -> Iterator[dict[str, Any]]:
        left, right = max(0.0, (start - began) * scale), min(1000.0, (end - began) * scale)
        if right > left:
            yield {"kind": kind, "left": left, "width": right - left, "top": top, "height": height, "said": said}

    yield from box("down", began, ended, "nothing was running")
    for index, attempt in enumerate(attempts):
        limit = timeline.kept_up_to(attempts, index)
        first = attempt.last if attempt.first is None else attempt.first
        again = min((wall - took for step, (wall, took) in attempt.steps.items() if step > limit), default=None)
        spans = [("start-up", attempt.began, first), ("ideal", first, attempt.last_work)]
        spans += [("other", attempt.last_work, attempt.last)]
        spans += [("repeated", again, attempt.last_work)] if again is not None else []
        spans += [("validation", wall - took, wall) for _, wall, took in attempt.validations[:MOST_MARKS]]
        for kind, start, end in spans:
            took = format_duration(max(0.0, end - start))
            yield from box(kind, start, end, f"attempt {index + 1}: {KINDS[kind]}, {took}")
        for save in attempt.saves[-MOST_MARKS:]:
            wall = save.get("wall")
            if isinstance(wall, float) and began <= wall <= ended:
                kind = "saves" if save.get("event") == "saved" else "repeated"
                how = f"durable after {save.get('durable')} s" if kind == "saves" else save.get("error")
                said = f"{save.get('event')} {save.get('file')}: {how}"
                yield from box(kind, wall - 1 / scale, wall + 1 / scale, said, 0, 10)


def drift(attempts: list[Attempt]) -> list[tuple[Any, ...]]:
    """Return (attempt, what, before, now, what it may change) for each difference from the attempt before."""
    from unbroken.run.resume import SAME_TRAJECTORY_FLAGS
    from unbroken.runtime.environment import DRIFT_NAMES  # which imports torch: not before it is needed

    found = []
    for number, (old, new) in enumerate(pairwise(attempts), 2):
        for before, now, kind in ((old.environment, new.environment, ""), (old.args, new.args, "--")):
            for key in sorted(str(key) for key in {*before, *now}):
                if before.get(key) == now.get(key) or (kind and key in ATTEMPT_ONLY):
                    continue
                bits = "bits" if (key not in SAME_TRAJECTORY_FLAGS if kind else key in DRIFT_NAMES) else ""
                found.append((number, f"{kind}{key}", before.get(key, ""), now.get(key, ""), bits))
    return found


def thinned(points: list[tuple[int, float]], most: int = MOST_POINTS) -> list[tuple[int, float]]:
    """Return at most about `most` points: the lowest and the highest of each bucket, so that no spike is lost."""
    size = max(1, math.ceil(2 * len(points) / most)) if len(points) > most else 1
    if size == 1:
        return points
    found = []
    for first in range(0, len(points), size):
        bucket = points[first : first + size]
        found += sorted({min(bucket, key=lambda point: point[1]), max(bucket, key=lambda point: point[1])})
    return found
