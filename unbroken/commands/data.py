"""`python -m unbroken data`: make token shards, or download them."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from unbroken import console
from unbroken.commands import BPE_HELP
from unbroken.data import prepare
from unbroken.data.documents import find_sources, split_sources
from unbroken.data.ingest import Job, make_shards
from unbroken.data.shards import SHARD_TOKENS
from unbroken.data.stream import Stream
from unbroken.data.tokenizers import TOKENIZERS, TokenizerNames, choose
from unbroken.errors import UserError
from unbroken.host import available_cores
from unbroken.paths import as_typed
from unbroken.text import format_count, format_size

LINE_SECONDS = 10.0  # between two lines of progress where there is no terminal


def configure(parser: argparse.ArgumentParser) -> None:
    """Add a subcommand for each source of shards."""
    ways = parser.add_subparsers(dest="way", required=True, metavar="{builtin,text,fineweb}")

    def way(name: str, about: str) -> argparse.ArgumentParser:
        return ways.add_parser(name, help=about, description=about)

    builtin = way("builtin", "the source of Python's standard library, as bytes")
    builtin.add_argument(
        "--root", type=Path, default=Path("data"), metavar="DIR", help="folder of data (default: data)"
    )
    text = way(
        "text", "your own text files, JSON lines, Parquet and Arrow files; after a kill the same command continues"
    )
    what = (
        "text files, each one document; .jsonl, .parquet, .arrow; text and .jsonl also as .gz or .zst; folders; globs"
    )
    text.add_argument("files", type=Path, nargs="+", metavar="FILE", help=what)
    text.add_argument("--field", default="text", metavar="NAME", help="field or column with the text (default: text)")
    folder = "folder for the shards (default: data/text)"
    text.add_argument("--folder", type=Path, default=Path("data/text"), metavar="DIR", help=folder)
    text.add_argument("--name", default="text", help="start of the files' names: NAME_train_000000.bin (default: text)")
    of_path = "a name, or a tokenizer.json, or a folder with one or with GPT-2's files (default: gpt2)"
    text.add_argument("--tokenizer", choices=TokenizerNames(TOKENIZERS), default="gpt2", help=of_path)
    text.add_argument("--bpe_dir", type=Path, metavar="DIR", help=BPE_HELP)
    share = "percent of the text, at its end, for validation (default: 5)"
    text.add_argument("--val_percent", type=float, default=5.0, metavar="X", help=share)
    size = f"tokens in each shard (default: {SHARD_TOKENS})"
    text.add_argument("--shard_tokens", type=int, default=SHARD_TOKENS, metavar="N", help=size)
    text.add_argument(
        "--skip_bad", action="store_true", help="leave out lines and rows that hold no text, and count them"
    )
    fineweb = way("fineweb", "FineWeb in GPT-2 tokens, 100 million (200 MB) a shard")
    shards = "number of training shards, at most 103 (default: 10)"
    fineweb.add_argument("--shards", type=int, default=10, metavar="N", help=shards)
    folder = "folder for the shards (default: data/fineweb10B)"
    fineweb.add_argument("--folder", type=Path, default=Path("data/fineweb10B"), metavar="DIR", help=folder)


def run(args: argparse.Namespace) -> int:
    """Make or download the shards, then print their sizes and the command that trains on them."""
    if args.way == "builtin":
        train, val = prepare.ensure_builtin(args.root)
    elif args.way == "fineweb":
        if not sys.stderr.isatty():
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        train, val = prepare.download_fineweb(args.shards, args.folder)
    else:
        train, val = _make_text(args)
    typed = f'--input_bin "{train}"'
    for kind, pattern in (("training", train), ("validation", val)):
        if pattern:
            stream = Stream.open(pattern)
            count = format_count(len(stream.shards), "shard")
            console.print_line(f"{kind}: {pattern}: {stream.num_tokens:,} tokens in {count}")
    console.print_line(
        as_typed(f"train on them with: python train_gpt2_mod.py {typed}") + (f' --input_val_bin "{val}"' if val else "")
    )
    return 0


def _make_text(args: argparse.Namespace) -> tuple[str, str]:
    """Make shards of text; return the globs of training and validation, "" for no validation."""
    if not 0 <= args.val_percent < 100:
        raise UserError(f"--val_percent {args.val_percent:g}: it must be at least 0 and below 100")
    if args.shard_tokens < 1:
        raise UserError(f"--shard_tokens {args.shard_tokens}: it must be at least 1")
    if args.name in ("", ".", "..") or Path(args.name).name != args.name:
        raise UserError(f"--name {args.name}: it must be a file name without folders; type --folder for the place")
    sources = find_sources(args.files)
    train, val = split_sources(sources, args.val_percent)
    if not train:
        raise UserError("the files hold no text to train on; check them, or use a smaller --val_percent")
    tokenizer, place = choose(args.tokenizer, args.bpe_dir)
    job = Job(
        sources=sources,
        spans={"train": train, "val": val},
        tokenizer=tokenizer(place),
        folder=args.folder,
        name=args.name,
        column=args.field,
        shard_tokens=args.shard_tokens,
        skip_bad=args.skip_bad,
    )
    with _progress(sum(source.size for source in sources)) as report:
        made = make_shards(job, available_cores(), report)
    if made.skipped:
        console.print_line(f"{format_count(made.skipped, 'document')} without text left out")
    patterns = prepare.shard_globs(args.folder, args.name)
    return patterns[0], patterns[1] if made.shards.get("val") else ""


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int, int, int], None]]:
    """Show a bar on stderr if it is a terminal, else print a line now and then.

    Each call of the yielded function says how many bytes of `total`, documents and tokens there are so far.
    """
    began, first, said = time.monotonic(), -1, time.monotonic()

    def describe(documents: int, tokens: int) -> str:
        nonlocal first
        first = tokens if first < 0 else first  # of a run that was broken off
        rate = (tokens - first) / max(time.monotonic() - began, 1e-9)
        return f"{format_count(documents, 'document')}, {tokens:,} tokens, {rate:,.0f} tokens/s"

    def say(read: int, documents: int, tokens: int) -> None:
        nonlocal said
        text = describe(documents, tokens)
        if time.monotonic() - said >= LINE_SECONDS:
            said = time.monotonic()
            console.print_line(f"{format_size(read)} of {format_size(total)}, {text}")

    if not sys.stderr.isatty():
        yield say
        return
    from rich import progress as bars
    from rich.console import Console

    columns = (bars.DownloadColumn(), bars.TextColumn("{task.fields[text]}"), bars.TimeRemainingColumn())
    with bars.Progress(bars.BarColumn(20), *columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total, text="")
        yield lambda read, documents, tokens: bar.update(task, completed=read, text=describe(documents, tokens))
