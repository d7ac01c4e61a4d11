"""`python -m unbroken show`: everything in a checkpoint but the tensors."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

from unbroken import config as flags
from unbroken import console
from unbroken.checkpoint.format.schema import dict_at, dotted_path, walk
from unbroken.errors import UserError
from unbroken.run import locate
from unbroken.text import format_count, format_size, printable, printable_text

if TYPE_CHECKING:
    from unbroken.checkpoint.reader import CheckpointFile


LONG = ("code", "sources", "model", "optimizer")  # shown by a count, and whole only with a flag
MOST_SHARDS = 8


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments: which checkpoint, and which part of it."""
    parser.add_argument("what", metavar="FILE|RUN", help=locate.CHECKPOINT_HELP)
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--code", action="store_true", help="print the training script that made it")
    part.add_argument(
        "--source", metavar="NAME", help="print one source file of the package that made it, e.g. model.py"
    )
    part.add_argument("--tensors", action="store_true", help="list the tensors")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the part that was asked for."""
    with locate.open_newest(args.what) as file:
        if args.code or args.source:
            text = _source(file, args.source)
            print(console.to_json({"text": text}) if args.json else printable_text(text))
        elif args.tensors:
            _print_tensors(file, args.json)
        elif args.json:
            print(console.to_json({"file": str(file.path), "size": file.size, **_without_tensors(file)}))
        else:
            _print_all(file)
    return 0


def _source(file: CheckpointFile, name: str | None) -> str:
    """Return the training script, or a source file. Raises UserError if the checkpoint does not hold it."""
    sources = dict_at(file.values, "sources")
    text = sources.get(name) if name else file.values.get("code")
    if isinstance(text, str):
        return text
    there = f"source file {name!r}; it has {', '.join(map(printable, sources)) or 'none'}" if name else "`code`"
    raise UserError(f"{file.path}: it holds no {there}")


def _print_tensors(file: CheckpointFile, as_json: bool) -> None:
    rows = [
        (name, str(leaf.dtype).removeprefix("torch."), "x".join(map(str, leaf.shape)) or "scalar")
        for name, leaf in file.stored()
    ]
    if as_json:
        print(console.to_json({"tensors": [dict(zip(("name", "dtype", "shape"), row, strict=True)) for row in rows]}))
    else:
        print(console.format_table(("tensor", "dtype", "shape"), rows))


def _without_tensors(file: CheckpointFile) -> dict[str, Any]:
    """Return the values with tensors replaced by their number."""
    tensors = dict(file.stored())
    kept = {key: value for key, value in file.values.items() if key not in ("model", "optimizer")}
    counts = {key: sum(name.startswith(f"{key}.") for name in tensors) for key in ("model", "optimizer")}
    return {**kept, "tensors": counts, "ours": file.is_ours}


def _print_all(file: CheckpointFile) -> None:
    values = file.values
    print(console.colored(printable(file.path, 4096), console.BOLD), f"({format_size(file.size)})")
    if not file.is_ours:
        print("  not of a run of this program: shown as it is, unchecked")
    for key, value in values.items():
        if key in LONG:
            continue
        if not isinstance(value, dict):
            print(f"{printable(key)}: {printable(value)}")
            continue
        print(f"{printable(key)}:")
        for name, text in _lines(key, value):
            print(f"  {printable(name):<24} {text}")
    code, sources = values.get("code"), values.get("sources")
    if isinstance(code, str):
        print(f"code: {format_count(len(code.splitlines()), 'line')} (--code prints them)")
    if isinstance(sources, dict):
        print(f"sources: {format_count(len(sources), 'file')} (--source NAME prints one)")
    print(f"tensors: {len(dict(file.stored()))} (--tensors lists them)")


def _lines(key: str, value: dict[Any, Any]) -> list[tuple[str, str]]:
    """Return (name, value) of each item; arguments that differ from the default are marked."""
    if key == "data" and isinstance(value.get("shards"), list):
        shards = value["shards"]
        shown = [(f"shard {index}", printable(shard)) for index, shard in enumerate(shards[:MOST_SHARDS])]
        rest = [("", f"and {len(shards) - MOST_SHARDS} more")] if len(shards) > MOST_SHARDS else []
        return [(str(name), printable(item)) for name, item in value.items() if name != "shards"] + shown + rest
    if key != "args":
        return [(dotted_path(path), printable(item)) for path, item in walk(value)]
    defaults = dataclasses.asdict(flags.Config())
    texts = {name: printable(flags.display_value(str(name), item)) for name, item in value.items()}
    return [
        (str(name), texts[name] if defaults.get(name) == item else console.colored(texts[name], console.BOLD))
        for name, item in value.items()
    ]
