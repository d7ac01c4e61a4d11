"""`python -m unbroken mirror`: copy a run into object storage, once or while it is trained.

A training with `--mirror URL` starts this as a separate process at the lowest priority. So no step waits for a slow
network, or for a library that hangs or crashes.
"""

from __future__ import annotations

import argparse
import os
import threading
from pathlib import Path

from unbroken import console
from unbroken.errors import UserError, describe_error
from unbroken.mirror.companion import run_beside_training
from unbroken.mirror.store import Storage
from unbroken.mirror.upload import Uploader
from unbroken.run import locate
from unbroken.text import format_count, printable

TRIES = 6  # to copy once


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments: which run, and where to."""
    parser.add_argument("what", metavar="RUN", help="a run_id or a run's folder")
    parser.add_argument("url", metavar="URL", help="s3://bucket/path, gs://, az://, hf:// or file:///path")
    parser.add_argument("--follow", action="store_true", help="keep copying new checkpoints until interrupted")
    parser.add_argument(
        "--keep_last",
        type=int,
        default=0,
        metavar="N",
        help="keep the newest N checkpoints in the storage, as training does; 0: keep all",
    )
    parser.add_argument(
        "--keep_every",
        type=int,
        default=0,
        metavar="N",
        help="with --keep_last: also keep those whose step is a multiple of N",
    )
    parser.add_argument("--log", type=Path, metavar="FILE", help="the run's log, if it is not in the run's folder")
    parser.add_argument("--attached", action="store_true", help=argparse.SUPPRESS)  # a training began it


def run(args: argparse.Namespace) -> int:
    """Copy what is missing. Return 0 when everything is in the storage."""
    folder = locate.find_run_folder(args.what)
    run_id = locate.run_id_of(folder) if folder is not None else ""
    if folder is None or not run_id:
        raise UserError(f"{printable(args.what)} is no run; type a run_id or the folder logs/<run_id>")
    for name in ("keep_last", "keep_every"):
        if getattr(args, name) < 0:
            raise UserError(f"--{name} {getattr(args, name)}: it must not be negative")
    if args.log and not args.attached and not os.path.isfile(args.log):
        raise UserError(f"--log {args.log}: there is no such file")
    log = args.log or locate.log_in_folder(folder) or folder / f"{run_id}.log"
    remote = Storage(args.url).run(run_id)
    mirror = Uploader(remote, folder, log, args.keep_last, args.keep_every)
    if args.attached:
        return run_beside_training(mirror)
    ended = threading.Event()
    if not args.follow:
        ended.set()
    try:
        mirror.follow(ended, TRIES)
    except KeyboardInterrupt:
        if args.follow:
            return 0
        raise
    except Exception as error:
        raise UserError(f"{remote.url}: {describe_error(error)}") from None
    if mirror.unread:
        raise UserError(f"{mirror.unread[0]} could not be read; everything else is in {remote.url}")
    count = len(mirror.manifest.checkpoints) if mirror.manifest else 0
    console.print_line(
        f"{remote.url} has {format_count(count, 'checkpoint')} of {run_id}, each read back when it was copied"
    )
    return 0
