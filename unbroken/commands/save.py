"""`python -m unbroken save`: ask a run that is being trained for a checkpoint now, and wait for its name."""

from __future__ import annotations

import argparse
import os
import time
from contextlib import suppress

from unbroken import console
from unbroken.errors import UserError
from unbroken.files import read_small
from unbroken.run import locate
from unbroken.run.lock import trained_elsewhere, training_process
from unbroken.run.save_requests import ANSWER, REQUEST, identity
from unbroken.text import printable


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments: which run, and how long to wait."""
    parser.add_argument("what", metavar="RUN", help="a run_id or a run's folder")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help="longest wait (default: 600)")


def run(args: argparse.Namespace) -> int:
    """Print the path of the new checkpoint; training goes on."""
    folder = locate.find_run_folder(args.what)
    if folder is None:
        raise UserError(f"{printable(args.what)} is no run; type a run_id or the folder logs/<run_id>")
    if not training_process(folder) and not trained_elsewhere(folder):
        raise UserError(f"{folder}: this run is not being trained, so it has nothing newer to save; start it first")
    before = identity(folder / ANSWER)
    (folder / REQUEST).touch()
    deadline = time.monotonic() + args.timeout
    try:
        while os.path.lexists(folder / REQUEST) or identity(folder / ANSWER) == before:
            if time.monotonic() > deadline:
                raise UserError(f"{folder}: no answer in {args.timeout:g} s; type a longer --timeout")
            time.sleep(0.05)
    except BaseException:
        with suppress(OSError):
            os.unlink(folder / REQUEST)
        raise
    answer = read_small(folder / ANSWER, 1000).decode("utf-8", "replace").strip()
    if answer.startswith("error: "):
        raise UserError(f"{folder}: the checkpoint was not saved: {printable(answer.removeprefix('error: '))}")
    console.print_line(str(folder / answer))
    return 0
