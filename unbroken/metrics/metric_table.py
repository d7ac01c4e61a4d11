"""The table of metrics: each metric once, for the journal, the trackers, plots, tables, the report and the docs.

A metric that is passed to `RunLogger.train` and is not in this table is also logged, exported and plotted, under its
own name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """A metric of a step.

    `label` is the axis of a plot, with the unit; `title` the name in the report. `panel` is its name in `plot --show`,
    "" for a metric that is not plotted by itself. `smoothed`: plots average it. `is_time`: the journal and tables have
    it, trackers do not. `text` is its row in docs/looking.md.
    """

    name: str
    text: str
    label: str = ""
    title: str = ""
    panel: str = ""
    smoothed: bool = False
    is_time: bool = False


METRICS = (
    Metric("train_loss", "nats per token", "loss (nats per token)", "training loss", "loss", smoothed=True),
    Metric("val_loss", "nats per token", "loss (nats per token)", "validation loss"),
    Metric("lr", "the learning rate of this step", "learning rate", "learning rate", "lr"),
    Metric(
        *("grad_norm", "the norm before clipping", "norm of the gradient", "gradient norm", "grad_norm"), smoothed=True
    ),
    Metric(
        *("tok_per_s", "an average over the last 20 steps of the attempt", "tokens per second", "tokens per second"),
        panel="tok_s",
    ),
    Metric(
        "mfu",
        "model FLOPs utilization: 6N + 12·L·C·T a token (PaLM) by the bf16 peak of a GPU whose data sheet is known",
        "share of the GPUs' peak",
        "share of the GPUs' peak (MFU)",
        "mfu",
    ),
    Metric("tokens", "tokens trained on so far"),
    Metric("time", "training time so far in milliseconds, over all attempts, without repeated steps"),
    Metric("dt", "seconds of the step", is_time=True),
    Metric("val_seconds", "seconds of the validation", is_time=True),
    Metric("wall", "end of the step, in seconds since 1970", is_time=True),
)
BY_NAME = {metric.name: metric for metric in METRICS}
BY_PANEL = {metric.panel: metric for metric in METRICS if metric.panel}
TIMES = tuple(metric.name for metric in METRICS if metric.is_time)
MAX_EXTRA = 100  # metrics of a run beyond the table; more are a damaged journal
MAX_NAME = 64  # characters


def find_metric(name: str) -> Metric:
    """Return the metric with this name or panel; one that is not in the table is plotted under its own name."""
    return BY_PANEL.get(name) or BY_NAME.get(name) or Metric(name, "", name, name, name)


def is_metric_name(name: object) -> bool:
    """Return whether a journal's key can be the name of a metric."""
    return isinstance(name, str) and 0 < len(name) <= MAX_NAME and name.isprintable() and name not in ("step", "event")


def tracked(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return what trackers get of a line of the journal: everything but times and the step itself."""
    return {name: value for name, value in metrics.items() if name not in (*TIMES, "step")}


def columns(names: Iterable[str]) -> tuple[str, ...]:
    """Return the metrics of the table, then other `names`, sorted."""
    return (*BY_NAME, *sorted(set(names) - BY_NAME.keys()))
