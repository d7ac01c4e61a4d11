"""`python -m unbroken data`: make token shards, or download them."""

from __future__ import annotations

import argparse
import glob
import os
import sys
from pathlib import Path

from unbroken import console
from unbroken.commands import BPE_HELP
from unbroken.data import prepare
from unbroken.data.shards import SHARD_TOKENS, write_shards
from unbroken.data.stream import Stream
from unbroken.data.tokenizers import TOKENIZERS
from unbroken.errors import UserError
from unbroken.text import format_count


def configure(parser: argparse.ArgumentParser) -> None:
    """Add a subcommand for each source of shards."""
    ways = parser.add_subparsers(dest="way", required=True, metavar="{builtin,text,fineweb}")

    def way(name: str, about: str) -> argparse.ArgumentParser:
        return ways.add_parser(name, help=about, description=about)

    builtin = way("builtin", "the source of Python's standard library, as bytes")
    builtin.add_argument(
        "--root", type=Path, default=Path("data"), metavar="DIR", help="folder of data (default: data)"
    )
    text = way("text", "your own text files")
    text.add_argument("files", type=Path, nargs="+", metavar="FILE", help="text files; each is a document")
    folder = "folder for the shards (default: data/text)"
    text.add_argument("--folder", type=Path, default=Path("data/text"), metavar="DIR", help=folder)
    text.add_argument("--name", default="text", help="start of the files' names: NAME_train_000000.bin (default: text)")
    text.add_argument("--tokenizer", choices=tuple(TOKENIZERS), default="gpt2", help="default: gpt2")
    text.add_argument("--bpe_dir", type=Path, metavar="DIR", help=BPE_HELP)
    share = "percent of the text, at its end, for validation (default: 5)"
    text.add_argument("--val_percent", type=float, default=5.0, metavar="X", help=share)
    size = f"tokens in each shard (default: {SHARD_TOKENS})"
    text.add_argument("--shard_tokens", type=int, default=SHARD_TOKENS, metavar="N", help=size)
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
        f"train on them with: python train_gpt2_mod.py {typed}" + (f' --input_val_bin "{val}"' if val else "")
    )
    return 0


def _make_text(args: argparse.Namespace) -> tuple[str, str]:
    """Make shards of the text files; return the globs of training and validation, "" for no validation."""
    if not 0 <= args.val_percent < 100:
        raise UserError(f"--val_percent {args.val_percent:g}: it must be at least 0 and below 100")
    if args.shard_tokens < 1:
        raise UserError(f"--shard_tokens {args.shard_tokens}: it must be at least 1")
    if args.name in ("", ".", "..") or Path(args.name).name != args.name:
        raise UserError(f"--name {args.name}: it must be a file name without folders; type --folder for the place")
    patterns = dict(zip(("train", "val"), prepare.shard_globs(args.folder, args.name), strict=True))
    there = [path for pattern in patterns.values() for path in sorted(glob.glob(pattern))]
    if there:
        raise UserError(f"{there[0]} is already there; delete it and its like, or choose another --name or --folder")
    train, val = prepare.split_documents(args.files, args.val_percent)
    if not train:
        raise UserError("the files hold no text to train on; check them, or use a smaller --val_percent")
    tokenizer = TOKENIZERS[args.tokenizer](args.bpe_dir)
    size = sum(path.stat().st_size for path in args.files)
    with console.progress_bar("tokenizing", size, of_bytes=True) as advance:
        documents = {"val": val, "train": train}
        sets = {
            f"{args.name}_{kind}": prepare.token_pieces(found, tokenizer, advance) for kind, found in documents.items()
        }
        write_shards(sets, args.folder, args.tokenizer, args.shard_tokens)
    return patterns["train"], patterns["val"] if val else ""
