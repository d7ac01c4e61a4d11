"""`python -m unbroken launch`: torchrun, with exit codes that mean something and without its tracebacks."""

from __future__ import annotations

import argparse
import logging
import os
import signal
from typing import TYPE_CHECKING, NoReturn

from unbroken import console
from unbroken.errors import UserError
from unbroken.paths import as_typed
from unbroken.runtime.signals import STOP_SIGNALS
from unbroken.text import printable

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

HINT = as_typed("type torchrun's flags, then train_gpt2_mod.py and its flags")
STOPPED = {128 + number for number in STOP_SIGNALS}  # exit codes of a process that saved and left

EXIT_CODES = """\
can replace torchrun in every command line; exit codes:
  0      the run is finished
  2      a mistake of the user's, which the line before names; starting again would not help
  128+N  signal N stopped the training (143: SIGTERM or --max_hours) after a save; start again to continue
  1      a process was killed or failed; start again

SIGUSR1 and SIGUSR2 stop the training too; under nohup SIGHUP does not."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments: torchrun's own."""
    parser.usage = as_typed("python -m unbroken launch [torchrun's flags] train_gpt2_mod.py [--flag value] ...")
    parser.epilog = EXIT_CODES
    parser.add_argument("words", nargs=argparse.REMAINDER, help="the arguments of torchrun")


def run(args: argparse.Namespace) -> int:
    """Start the processes, wait for them, and return the exit code."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does, which takes four lines to say so
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    parser = torchrun.get_args_parser()
    parser.error = _refuse  # type: ignore[method-assign]
    typed = parser.parse_args(args.words[args.words[:1] == ["--"] :])
    if not (typed.module or typed.no_python or typed.run_path or os.path.exists(typed.training_script)):
        raise UserError(f"{printable(typed.training_script, 4096)}: there is no such file; {HINT}")
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN  # nohup(1): the terminal may go
    kept = [number.name for number in STOP_SIGNALS if not (ignored and number == signal.SIGHUP)]
    typed.signals_to_handle = ",".join([*kept, "SIGQUIT"])
    for part in ("agent.server.api", "multiprocessing.api"):  # their lines about a stop or a failure are printed below
        logging.getLogger(f"torch.distributed.elastic.{part}").addFilter(_is_news)
    try:
        torchrun.run(typed)  # type: ignore[no-untyped-call]
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    except ChildFailedError as failed:
        return _report(failed)
    return 0


def _refuse(message: str) -> NoReturn:
    """Raise a complaint of torchrun's parser as a UserError."""
    raise UserError(f"{message}; {HINT}")


def _is_news(record: logging.LogRecord) -> bool:
    """Return whether to show a line of torchrun's log: one about a worker that did not leave in time is news."""
    text = record.getMessage()
    return not text.startswith(("failed (exitcode", "Received ", "Sending process "))


def _report(failed: ChildFailedError) -> int:
    """Print which processes failed, unless they have said why themselves, and return the exit code."""
    codes = {failure.exitcode for failure in failed.failures.values()}
    if 2 in codes:
        return 2
    if codes <= STOPPED | {-signal.SIGTERM}:  # torchrun's own, for those that were still about to leave
        return max(codes)
    rank, first = min(failed.failures.items(), key=lambda item: item[1].exitcode)  # the killed one before its peers
    how = f"killed by {first.signal_name()}" if first.exitcode < 0 else f"ended with exit code {first.exitcode}"
    console.print_line(f"error: process {first.pid} (rank {rank}) {how}; start the command again", error=True)
    return 1
