"""`python -m unbroken diff`: the differences between two checkpoints, down to the first bit."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unbroken import console
from unbroken.checkpoint.format.schema import dotted_path, walk
from unbroken.run import locate
from unbroken.text import printable, printable_text

if TYPE_CHECKING:
    from torch import Tensor

    from unbroken.checkpoint.reader import CheckpointFile


PLAIN = ("step", "run_id", "format", "args", "progress", "data", "rng", "environment")
CHUNK = 1 << 22  # elements compared at once: the memory of the comparison stays small whatever the model


@dataclass(frozen=True)
class Row:
    """A comparison of one tensor in both files.

    `first` is the element of the first differing bits in the flattened tensor, `largest` the largest absolute
    difference, infinite for another shape or a NaN.
    """

    name: str
    identical: bool
    largest: float
    first: int | None
    differing: int
    note: str = ""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments: the two checkpoints."""
    parser.add_argument("left", metavar="A", help=locate.CHECKPOINT_HELP)
    parser.add_argument("right", metavar="B", help="another one")
    parser.add_argument("--all", action="store_true", help="list the identical tensors too")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Compare and print. Return 0 if the checkpoints are equal, else 1."""
    with locate.open_newest(args.left) as left, locate.open_newest(args.right) as right:
        values = compare_values(left.values, right.values)
        texts = compare_texts(left.values, right.values)
        rows = compare_tensors(left, right)
        if args.json:
            tensors = [dataclasses.asdict(row) for row in rows if args.all or not row.identical]
            found = {"values": values, "sources": list(texts), "tensors": tensors, "compared": len(rows)}
            print(console.to_json({"a": str(left.path), "b": str(right.path), **found}))
        else:
            _print((left.path, right.path), values, texts, rows, args.all)
    return 1 if values or texts or not all(row.identical for row in rows) else 0


def compare_values(left: dict[str, Any], right: dict[str, Any]) -> dict[str, tuple[object, object]]:
    """Return {place in the tree: both values} where they differ."""
    flat = [dict(_plain_leaves(tree)) for tree in (left, right)]
    places = list(dict.fromkeys([*flat[0], *flat[1]]))
    absent = "(absent)"
    pairs = {place: (flat[0].get(place, absent), flat[1].get(place, absent)) for place in places}
    return {place: pair for place, pair in pairs.items() if repr(pair[0]) != repr(pair[1])}  # repr: nan equals nan


def _plain_leaves(tree: dict[str, Any]) -> list[tuple[str, object]]:
    return [(dotted_path(path), value) for key in PLAIN if key in tree for path, value in walk(tree[key], (key,))]


def compare_texts(left: dict[str, Any], right: dict[str, Any]) -> dict[str, list[str]]:
    """Return {source file: unified diff} where they differ."""
    texts = [
        {**_texts(tree.get("sources")), **_texts({"train_gpt2_mod.py": tree.get("code")})} for tree in (left, right)
    ]
    names = sorted({*texts[0], *texts[1]})
    found: dict[str, list[str]] = {}
    for name in names:
        a, b = (side.get(name, "").splitlines() for side in texts)
        if not all(texts):  # such as an imported checkpoint: thousands of lines would hide the rest
            found[name] = [] if found else [f"sources: only in {'A' if texts[0] else 'B'}, {len(names)} of them"]
        elif texts[0].get(name) != texts[1].get(name):
            found[name] = list(difflib.unified_diff(a, b, f"a/{name}", f"b/{name}", lineterm="", n=1))
    return found


def _texts(sources: object) -> dict[str, str]:
    items = sources.items() if isinstance(sources, dict) else ()
    return {name: text for name, text in items if isinstance(name, str) and isinstance(text, str)}


def compare_tensors(left: CheckpointFile, right: CheckpointFile) -> list[Row]:
    """Return a row for every tensor of either file, compared bit for bit, in the order of the left one."""
    ours, theirs = dict(left.stored()), dict(right.stored())
    rows = []
    for name in dict.fromkeys([*ours, *theirs]):
        if name not in ours or name not in theirs:
            rows.append(Row(name, False, math.inf, None, 0, "only in " + ("A" if name in ours else "B")))
        elif (ours[name].shape, ours[name].dtype) != (theirs[name].shape, theirs[name].dtype):
            a, b = (f"{tuple(leaf.shape)} {leaf.dtype}" for leaf in (ours[name], theirs[name]))
            rows.append(Row(name, False, math.inf, None, 0, f"{a} against {b}"))
        else:
            rows.append(compare(name, left.tensor(ours[name]), right.tensor(theirs[name])))
    return rows


def compare(name: str, a: Tensor, b: Tensor) -> Row:
    """Return the comparison of two tensors of one shape and dtype."""
    import torch

    flat_a, flat_b = a.reshape(-1), b.reshape(-1)
    first, differing, largest = None, 0, 0.0
    for start in range(0, flat_a.numel(), CHUNK):
        part_a, part_b = flat_a[start : start + CHUNK], flat_b[start : start + CHUNK]
        unequal = (_bytes(part_a) != _bytes(part_b)).any(1).nonzero().flatten()
        if unequal.numel() == 0:
            continue
        first = start + int(unequal[0]) if first is None else first
        differing += unequal.numel()
        kind = torch.complex128 if part_a.is_complex() else torch.float64
        apart = (part_a[unequal].to(kind) - part_b[unequal].to(kind)).abs().max().item()
        largest = max(largest, math.inf if math.isnan(apart) else apart)
    return Row(name, differing == 0, largest, first, differing)


def _bytes(flat: Tensor) -> Tensor:
    """Return the bytes of the elements, [N, bytes of an element], in words of 4 or 2 bytes where they fit."""
    import torch

    size = flat.element_size()
    word = torch.int32 if size % 4 == 0 else torch.int16 if size % 2 == 0 else torch.uint8
    return flat.contiguous().view(word).view(flat.numel(), -1)


def _print(
    paths: tuple[Path, Path],
    values: dict[str, tuple[object, object]],
    texts: dict[str, list[str]],
    rows: list[Row],
    everything: bool,
) -> None:
    parts = ["\n".join(f"{name} {printable(path, 4096)}" for name, path in zip("AB", paths, strict=True))]
    if values:
        pairs = [(name, printable(a), printable(b)) for name, (a, b) in values.items()]
        parts.append(console.format_table(("value", "A", "B"), pairs))
    parts += [printable_text("\n".join(lines)) for lines in texts.values() if lines]
    cells = [(row.name, *_cells(row)) for row in rows if everything or not row.identical]
    if cells:
        parts.append(console.format_table(("tensor", "differing", "largest", "first at"), cells, " rrr"))
    different = sum(not row.identical for row in rows)
    same = f"{len(rows)} tensors: identical, bit for bit"
    verdict = f"{different} of {len(rows)} tensors differ" if different else same
    print("\n\n".join([*parts, console.colored(verdict, console.RED if different else console.GREEN)]))


def _cells(row: Row) -> tuple[str, str, str]:
    if row.identical:
        return "0", "identical", ""
    if row.note:
        return row.note, "", ""
    return f"{row.differing:,}", f"{row.largest:.3g}", f"{row.first:,}"
