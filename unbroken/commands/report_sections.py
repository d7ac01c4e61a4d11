"""The sections of the report, each a function from the facts to markup."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from unbroken.commands import html
from unbroken.commands.html import table, text
from unbroken.commands.ls import Listing
from unbroken.config import ATTEMPT_ONLY, FIELDS, display_value
from unbroken.metrics import timeline
from unbroken.metrics.metric_table import METRICS, find_metric
from unbroken.metrics.timeline import Attempt, Interruption, Timeline
from unbroken.text import format_duration, format_time

KINDS = {"ideal": "steps of the run", **timeline.CAUSES}
MOST_MARKS = 400  # on the time line


@dataclass(frozen=True)
class Facts:
    """The facts that the page shows."""

    log: Path
    run: Timeline
    listing: Listing
    broken: list[Interruption]
    samples: list[str]
    prompt: str

    @property
    def last(self) -> Attempt | None:
        """The newest attempt; None if the journal has none."""
        return self.run.attempts[-1] if self.run.attempts else None


def _head(facts: Facts) -> str:
    run, args = facts.run, facts.last.args if facts.last else {}
    train, val = run.series("train_loss"), run.series("val_loss")
    spent = timeline.account_time(run.attempts)
    last_step = max(run.metrics)
    wanted = args.get("num_iterations")
    cards = [(f"{last_step:,}", f"steps of {wanted:,}" if type(wanted) is int else "steps")]
    cards += [(f"{train[-1][1]:.4f}", "training loss")] if train else []
    cards += [(f"{min(value for _, value in val):.4f}", "best validation loss")] if val else []
    if spent:
        cards += [(f"{100 * spent.goodput:.1f} %", "goodput"), (format_duration(spent.total), "from start to end")]
    tokens = run.series("tokens")
    cards += [(_short(tokens[-1][1]), "tokens")] if tokens else []
    attempts = max(len(run.attempts), len(facts.broken) + 1)
    cards.append((str(attempts), "attempt" if attempts == 1 else "attempts"))
    shown = "".join(f'<div class="card"><b>{text(value)}</b><span>{text(name)}</span></div>' for value, name in cards)
    parent = f" · forked from {text(facts.listing.parent)}" if facts.listing.parent else ""
    model = text(args.get("model") or facts.listing.model or "")
    ended = f" · last sign of life {format_time(facts.last.last)} UTC" if facts.last else ""
    said = f'<p class="soft">{_state(facts.last)}{ended}{parent}</p>'
    return f'<h1>{model} {text(facts.log.stem)}</h1>{said}<div class="cards">{shown}</div>'


def _short(count: float) -> str:
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count:.0f}"


def _state(attempt: Attempt | None) -> str:
    if attempt is None:
        return "made before journals were kept: times are not known"
    return text(attempt.end) if attempt.end else "no word of its end: killed, or still running"


def curves_of(run: Timeline) -> list[str]:
    """Return the metrics that the chart can show and that the run has."""
    shown = [metric.name for metric in METRICS if metric.title] + run.extra
    return [name for name in shown if run.series(name)]


def _curves(facts: Facts) -> str:
    names = [name for name in curves_of(facts.run) if name != "val_loss"] or ["val_loss"]
    options = "".join(f'<option value="{text(name)}">{text(find_metric(name).title)}</option>' for name in names)
    marks = [" Dashed: an attempt went on from there; grey: the steps it repeated."] if facts.broken else []
    marks += [" The marks along the bottom are checkpoints."] if facts.listing.checkpoints else []
    return f"""<h2>Curves</h2>
<div class="controls"><label><select id="pick" aria-label="which curve">{options}</select></label>
<label>smoothing <input type="range" id="smooth" min="0" max="100" value="25">
<span id="reach" class="soft"></span></label>
<label><input type="checkbox" id="log"> logarithmic</label><button id="back" hidden>whole run</button>
<span id="key"><i class="train"></i>training<i class="val"></i>validation</span></div>
<div class="chart"><canvas aria-label="the curve over the step"></canvas><div id="tip"></div></div>
<p class="soft">Drag to zoom, double click to see all again.{"".join(marks)}</p>"""


def _time(facts: Facts) -> str:
    spent = timeline.account_time(facts.run.attempts)
    if spent is None:
        return '<h2>Time</h2><p class="soft">This run has no journal of times.</p>'
    parts = {"ideal": spent.ideal, **spent.lost}
    total = max(sum(parts.values()), 1e-9)
    bar, rows = "", []
    for kind, seconds in parts.items():
        share, took, name = 100 * seconds / total, format_duration(seconds), KINDS[kind]
        bar += f'<i class="k-{kind}" style="width:{share:.3f}%" title="{name}: {took}"></i>'
        rows.append((f'<i class="k-{kind}"></i>{name}', took, f"{share:.1f} %"))
    began, ended = facts.run.attempts[0].began, max(attempt.last for attempt in facts.run.attempts)
    return f"""<h2>Time: {100 * spent.goodput:.1f} % goodput</h2>
<div class="bar">{bar}</div>{table(("where it went", "time", "share"), rows, " rr")}
<h2>Time line</h2>{time_line(facts.run.attempts)}
<p class="soft ends"><span>{format_time(began)}</span><span>{format_time(ended)} UTC</span></p>
<p class="soft">Colours as above; the marks on top are saves.</p>"""


def time_line(attempts: list[Attempt]) -> str:
    """Return the time of the run from left to right, with a colour for each use of it."""
    began, ended = attempts[0].began, max(attempt.last for attempt in attempts)
    scale = 1000 / max(ended - began, 1e-9)
    shapes = [_box("down", 0, 1000, 14, "nothing was running")]
    for index, attempt in enumerate(attempts):
        limit = timeline.kept_up_to(attempts, index)
        first = attempt.last if attempt.first is None else attempt.first
        again = min((wall - took for step, (wall, took) in attempt.steps.items() if step > limit), default=None)
        spans = [("start-up", attempt.began, first), ("ideal", first, attempt.last_work)]
        spans += [("other", attempt.last_work, attempt.last)]
        spans += [("repeated", again, attempt.last_work)] if again is not None else []
        spans += [("validation", wall - took, wall) for _, wall, took in attempt.validations[:MOST_MARKS]]
        for kind, start, end in spans:
            said = f"attempt {index + 1}: {KINDS[kind]}, {format_duration(max(0.0, end - start))}"
            shapes.append(_box(kind, (start - began) * scale, (end - began) * scale, 14, said))
        for save in attempt.saves[-MOST_MARKS:]:
            wall = save.get("wall")
            if isinstance(wall, float) and began <= wall <= ended:
                at, kind = (wall - began) * scale, "saves" if save.get("event") == "saved" else "repeated"
                took = f"durable after {save.get('durable')} s" if kind == "saves" else save.get("error")
                said = f"{save.get('event')} {save.get('file')}: {took}"
                shapes.append(_box(kind, at - 1, at + 1, 0, said, 10))
    return f'<svg class="time" viewBox="0 0 1000 50" preserveAspectRatio="none" role="img">{"".join(shapes)}</svg>'


def _box(kind: str, left: float, right: float, top: int, said: str, high: int = 36) -> str:
    left, right = max(0.0, left), min(1000.0, right)
    if not right > left:
        return ""
    where = f'x="{left:.2f}" y="{top}" width="{right - left:.2f}" height="{high}"'
    return f'<rect class="k-{kind}" {where}><title>{text(said)}</title></rect>'


def _attempts(facts: Facts) -> str:
    rows = []
    for number, attempt in enumerate(facts.run.attempts, 1):
        reached = f"{attempt.step + 1:,} – {max(attempt.steps):,}" if attempt.steps else "none"
        ended = text(attempt.end) if attempt.end else '<span class="bad">no word of its end</span>'
        origin = attempt.about.get("from", "")
        rows.append(
            (
                str(number),
                format_time(attempt.began),
                reached,
                format_duration(max(0.0, attempt.last - attempt.began)),
                format_duration(timeline.startup_seconds(attempt)),
                ended,
                text(Path(origin).name if origin != "scratch" else origin),
                text(attempt.about.get("host", "")),
                text(attempt.about.get("processes", "")),
                text(attempt.about.get("git", "")[:10]),
            )
        )
    heads = ("", "began (UTC)", "steps", "lasted", "start-up", "ended", "from", "host", "processes", "commit")
    return f'<h2>Attempts</h2><div class="wide">{table(heads, rows, "r  rr")}</div>' if rows else ""


def drift(attempts: list[Attempt]) -> list[tuple[str, str, str, str, str]]:
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
                found.append((str(number), f"{kind}{key}", before.get(key, ""), now.get(key, ""), bits))
    return [(a, text(b), text(c), text(d), e) for a, b, c, d, e in found]


def _drift(facts: Facts) -> str:
    if len(facts.run.attempts) < 2:
        return ""
    rows = drift(facts.run.attempts)
    none = '<p class="soft">Every attempt ran with the same environment and arguments.</p>'
    return "<h2>Drift between attempts</h2>" + (
        table(("attempt", "what", "before", "now", "may change"), rows, "r") if rows else none
    )


def _checkpoints(facts: Facts) -> str:
    rows = []
    for line in facts.listing.checkpoints:
        whole = "yes" if line.whole else "looks&nbsp;so"
        state = f'<span class="bad">NO: {text(line.damage)}</span>' if line.damage else whole
        losses = ["" if loss is None else f"{loss:.6f}" for loss in (line.loss, line.val)]
        step = "?" if line.step is None else f"{line.step:,}"
        size = f"{line.size / 1e6:,.1f} MB"
        rows.append((f"<code>{text(line.file)}</code>", step, *losses, size, state))
    heads = ("file", "step", "loss", "validation", "size", "whole?")
    none = '<p class="soft">None.</p>'
    return "<h2>Checkpoints</h2>" + (table(heads, rows, " rrrr") if rows else none)


def _written(facts: Facts) -> str:
    if not facts.samples:
        return ""
    begun = f" after <code>{text(facts.prompt)}</code>" if facts.prompt else ""
    texts = "".join(f'<pre class="sample">{html.lines(sample)}</pre>' for sample in facts.samples)
    return f"<h2>What it writes{begun}</h2>{texts}"


def _settings(facts: Facts) -> str:
    if facts.last is None:
        return ""
    rows = [
        (FIELDS[name].default == value, (f"<code>--{text(name)}</code>", text(display_value(name, value))))
        for name, value in facts.last.args.items()
        if name in FIELDS
    ]
    chosen, default = ([row for same, row in rows if same is wanted] for wanted in (False, True))
    heads = ("flag", "value")
    arguments = table(heads, chosen) if chosen else '<p class="soft">All have their defaults.</p>'
    arguments += f"<details><summary>{len(default)} more have their defaults</summary>{table(heads, default)}</details>"
    machine = [(text(name), text(value)) for name, value in facts.last.environment.items()]
    return f"<h2>Arguments</h2>{arguments}<h2>Environment</h2>{table(('of the last attempt', ''), machine)}"


IN_ORDER = (_head, _curves, _time, _attempts, _drift, _checkpoints, _written, _settings)
