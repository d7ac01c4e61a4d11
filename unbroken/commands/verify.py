"""`python -m unbroken verify`: check every checksum of checkpoints."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from unbroken import console
from unbroken.checkpoint import directory
from unbroken.errors import UserError
from unbroken.run import locate
from unbroken.text import format_size, printable

_LEAST_SECONDS = 1e-9


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments: files or runs."""
    parser.add_argument(
        "what",
        nargs="+",
        metavar="FILE|RUN",
        help="a checkpoint, or a run_id or run's folder for all checkpoints of the run",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Read every file once and print a line for each. Return 0 if all are whole, else 2."""
    paths = [path for text in args.what for path in _files(text)]
    importlib.import_module("unbroken.checkpoint.reader")  # before the reading is timed, because it imports torch
    total = sum(_size(path) for path in paths)
    began = time.perf_counter()
    with console.progress_bar("verifying", total, of_bytes=True) as advance:
        verdicts = [examine(path, advance) for path in paths]
    typed = set(args.what)  # other files may have been removed by the run's retention meanwhile
    verdicts = [one for one in verdicts if one["whole"] or os.path.exists(one["file"]) or one["file"] in typed]
    seconds = max(time.perf_counter() - began, _LEAST_SECONDS)
    damaged = [verdict for verdict in verdicts if not verdict["whole"]]
    if args.json:
        print(console.to_json({"whole": not damaged, "seconds": seconds, "bytes": total, "files": verdicts}))
        return 2 if damaged else 0
    for verdict in verdicts:
        said = console.colored("whole", console.GREEN) if verdict["whole"] else console.colored("DAMAGED", console.RED)
        print(f"{said}  {printable(verdict['file'], 4096)}  {format_size(verdict['size'])}")
    print(f"{format_size(total)} read in {seconds:.2f}s, {format_size(total / seconds)} a second")
    if damaged:
        sys.stdout.flush()
        more = f" (and {len(damaged) - 1} more of {len(verdicts)} files)" if len(damaged) > 1 else ""
        raise UserError(f"{printable(damaged[0]['file'], 4096)}: {damaged[0]['damages'][0]}{more}")
    return 0


def _files(text: str) -> list[Path]:
    folder = locate.find_run_folder(text)
    if folder is None:
        return [locate.find_file(text)]
    found = [item.path for item in (*directory.list_checkpoints(folder), *directory.list_weights(folder))]
    if not found:
        raise UserError(f"{printable(folder, 4096)} holds no checkpoints")
    return found


def _size(path: Path) -> int:
    """Return the size of a file in bytes; 0 if it is gone."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def examine(path: Path, advance: Callable[[int], None]) -> dict[str, Any]:
    """Return the verdict on one file, as --json prints it. `advance` is told how many more bytes are done."""
    size, heard = _size(path), 0

    def tell(done: int, _: int) -> None:
        nonlocal heard
        advance(done - heard)
        heard = done

    try:
        with directory.open_file(path) as file:
            damages = file.verify(tell)
    except UserError as error:
        damages = [str(error).removeprefix(f"{printable(path, 4096)}: ")]
    return {"file": str(path), "size": size, "damages": damages, "whole": not damages}
