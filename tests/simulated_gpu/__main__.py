"""Run a command that finds simulated GPUs: `python -m tests.simulated_gpu [--gpus N] COMMAND ...`."""

from __future__ import annotations

import argparse
import os
import sys

from tests.simulated_gpu import environment, missing

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.simulated_gpu", description=__doc__)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    typed = parser.parse_args()
    if missing() or not typed.command:
        sys.exit(f"error: {missing() or 'type a command'}")
    os.environ.update(environment(typed.gpus))
    os.execvp(typed.command[0], typed.command)
