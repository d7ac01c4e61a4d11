"""`python -m unbroken report`: write one HTML page about a run, which loads nothing else."""

from __future__ import annotations

import argparse
import base64
import hashlib
import math
import os
from pathlib import Path
from typing import Any

from unbroken import console
from unbroken.commands import atomic_output, html, report_sections
from unbroken.commands.html import text
from unbroken.commands.ls import look
from unbroken.commands.report_sections import KINDS, Facts, curves_of
from unbroken.errors import UserError
from unbroken.metrics.metric_table import METRICS
from unbroken.metrics.timeline import find_interruptions, read_timeline
from unbroken.paths import is_run_id
from unbroken.run import locate
from unbroken.text import printable

HELP = "write one page of HTML about a run: curves, attempts, saves, lost time, checkpoints, drift, samples"
PAGE = "report.html"
MOST_POINTS = 10_000  # of a curve; of a longer one each bucket's lowest and highest
SAMPLE_TOKENS = 160


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
    parser.add_argument("--tokenizer", choices=("auto", "bytes", "gpt2"), default="auto", help="of the samples")


def run(args: argparse.Namespace) -> int:
    """Write the page, and say where it is."""
    if args.prompt and not args.samples:
        raise UserError("--prompt is of the samples: type --samples N beside it")
    if args.samples < 0:
        raise UserError(f"--samples {args.samples}: it must not be negative")
    (log,) = locate.find_logs([args.what] if args.what else [])
    folder = _folder(log)
    history = read_timeline(log)
    if not history.metrics:
        raise UserError(f"{printable(log)} holds no losses yet")
    samples = _samples(folder, args.samples, args.prompt, args.tokenizer) if args.samples else []
    facts = Facts(log, history, look(folder, args.check), find_interruptions(log, history), samples, args.prompt)
    out = args.out or log.parent / PAGE
    if os.path.isfile(out) and out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out {printable(out)}: it is there already and is no page; choose a name that ends in .html")
    document = page(facts)

    def write(path: Path) -> None:
        path.write_text(document, "utf-8")

    atomic_output.write_whole(out, write)
    console.print_line(str(out))
    return 0


def _folder(log: Path) -> Path:
    """Return the folder of the checkpoints of a log's run."""
    from unbroken.paths import LOGS

    elsewhere = LOGS / log.stem
    return elsewhere if is_run_id(log.stem) and log.parent.name != log.stem and elsewhere.is_dir() else log.parent


def _samples(folder: Path, count: int, prompt: str, tokenizer: str) -> list[str]:
    from unbroken.inference import SamplingConfig, TextGenerator

    with locate.open_newest(str(folder)) as file:
        author = TextGenerator(file, tokenizer)
    return ["".join(author.generate(prompt, SAMPLE_TOKENS, SamplingConfig(), seed)) for seed in range(1, count + 1)]


def page(facts: Facts) -> str:
    """Return the whole page. Its policy allows no download, and no script but its own."""
    here = Path(__file__).parent
    script = (here / "report.js").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"
    parts = {
        "policy": policy,
        "title": text(f"run {facts.log.stem}"),
        "kinds": "".join(f".k-{kind} {{ background: var(--{kind}); fill: var(--{kind}); }}\n" for kind in KINDS),
        "body": "\n".join(section(facts) for section in report_sections.IN_ORDER),
        "data": html.data(_data(facts)),
        "script": script,
    }
    return html.filled((here / "report.html").read_text("utf-8"), parts)


def _data(facts: Facts) -> dict[str, Any]:
    series = {}
    for name in curves_of(facts.run):
        points = thinned(facts.run.series(name))
        values = [float(f"{value:.7g}") if math.isfinite(value) else None for _, value in points]
        series[name] = {"steps": [step for step, _ in points], "values": values}
    saves = sorted({line.step for line in facts.listing.checkpoints if line.step is not None})
    return {
        "series": series,
        "smoothed": [metric.name for metric in METRICS if metric.smoothed],
        "gaps": [[each.back_to, each.reached] for each in facts.broken],
        "saves": saves,
    }


def thinned(points: list[tuple[int, float]], most: int = MOST_POINTS) -> list[tuple[int, float]]:
    """Return at most about `most` points, of each bucket the lowest and the highest, so that no spike is lost."""
    size = max(1, math.ceil(2 * len(points) / most)) if len(points) > most else 1
    if size == 1:
        return points
    found = []
    for first in range(0, len(points), size):
        bucket = points[first : first + size]
        found += sorted({min(bucket, key=lambda point: point[1]), max(bucket, key=lambda point: point[1])})
    return found
