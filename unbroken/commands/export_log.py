"""`python -m unbroken export-log`: write the metrics of runs as a table."""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from unbroken import console
from unbroken.commands import atomic_output
from unbroken.errors import UserError
from unbroken.metrics.metric_table import columns
from unbroken.metrics.timeline import read_timeline
from unbroken.run import locate
from unbroken.text import printable

STDOUT = "-"

Row = dict[str, Any]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments: which runs, and where to."""
    parser.add_argument("what", nargs="*", metavar="RUN|LOG", help=locate.LOG_HELP)
    where = "FILE.csv, FILE.parquet or FILE.jsonl (default: CSV to stdout, as with -)"
    parser.add_argument("--out", default=STDOUT, metavar="FILE", help=where)


def run(args: argparse.Namespace) -> int:
    """Write the rows of all runs, and say where they are."""
    out = Path(args.out)
    if args.out != STDOUT and out.suffix not in WRITERS:
        raise UserError(f"--out {printable(args.out)}: the ending decides the format: {', '.join(WRITERS)}")
    rows = [row for log in locate.find_logs(args.what) for row in rows_of(log)]
    if args.out == STDOUT:
        sys.stdout.write(_csv(rows))
        return 0
    atomic_output.write_whole(out, lambda path: WRITERS[out.suffix](rows, path))
    console.print_line(f"{out}: {len(rows)} rows")
    return 0


def rows_of(log: Path) -> Iterator[Row]:
    """Yield a row for each step of the run as it is now; repeated steps occur once."""
    name = printable(log.stem, 200)
    for step, metrics in read_timeline(log).metrics.items():
        known = {key: metrics[key] for key in columns(metrics) if key in metrics}
        yield {"run": name, "step": step, **known, **({"tokens": int(known["tokens"])} if "tokens" in known else {})}


def _heads(rows: Sequence[Row]) -> tuple[str, ...]:
    """Return the columns: the same ones for every run, then metrics that only some runs have."""
    return ("run", "step", *columns({name for row in rows for name in row} - {"run", "step"}))


def _csv(rows: Sequence[Row]) -> str:
    """Return CSV in which numbers read back as the same bits; a missing value is empty."""
    text = io.StringIO()
    table = csv.DictWriter(text, _heads(rows), restval="", lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()


def _write_csv(rows: Sequence[Row], path: Path) -> None:
    path.write_text(_csv(rows), "utf-8")


def _write_json_lines(rows: Sequence[Row], path: Path) -> None:
    """Write JSON lines. JSON has no nan and no infinity, so they become text."""
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            spelled = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
            file.write(json.dumps(spelled) + "\n")


def _write_parquet(rows: Sequence[Row], path: Path) -> None:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError("Parquet needs pyarrow: pip install pyarrow, or write .csv or .jsonl") from None
    kinds = {"run": pyarrow.string(), "step": pyarrow.int64(), "tokens": pyarrow.int64()}
    schema = pyarrow.schema([(name, kinds.get(name, pyarrow.float64())) for name in _heads(rows)])
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), path)


WRITERS = {".csv": _write_csv, ".parquet": _write_parquet, ".jsonl": _write_json_lines}
