"""The work before the import of torch, which takes two seconds: answer --help, prepare streams and signals."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

from unbroken import config, console

SPINS = 1000  # some microseconds of spinning before a thread sleeps


def prepare_process(argv: Sequence[str]) -> None:
    """Do everything that comes before the import of torch."""
    console.open_streams()
    require_posix()
    restore_default_sigint()
    set_openmp_wait_policy()
    if {"-h", "--help"} & set(argv):
        config.build_parser().parse_args(["--help"])  # prints and exits


def require_posix() -> None:
    """End with one line on Windows, which lacks flock(2) and signals that a training relies on."""
    if sys.platform == "win32":
        console.print_line("error: Unbroken needs Linux or macOS; on Windows run it in WSL2", error=True)
        sys.exit(2)


def set_openmp_wait_policy() -> None:
    """Make OpenMP's threads sleep while they wait, unless the environment says how they wait.

    By default they spin. If other programs run on the machine, or there are more threads than cores, they take the
    processor from the thread for which they wait: every step takes several times as long.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & set(os.environ):
        os.environ.update(OMP_WAIT_POLICY="passive", GOMP_SPINCOUNT=str(SPINS))


def restore_default_sigint() -> None:
    """Make Ctrl-C end the process without a traceback, until training handles signals itself."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
