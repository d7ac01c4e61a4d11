"""Run a training as a child process of a tool, under torchrun, and end it with all that it started."""

from __future__ import annotations

import importlib.util
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

from unbroken.errors import UserError

SCRIPT = Path(__file__).resolve().parents[2] / "train_gpt2_mod.py"


def torchrun_command(processes: int) -> list[str]:
    """Return the command that starts a number of processes on this machine with this Python."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]


def train(
    typed: Sequence[str],
    processes: int = 1,
    folder: Path | None = None,
    kill_at: int | None = None,
    heard: Callable[[str], object] = lambda line: None,
) -> list[str]:
    """Run a training to its end, or kill it on the way. Return the lines that it printed.

    Args:
        typed: Its flags.
        processes: Number of processes.
        folder: Where it runs; None: here.
        kill_at: Kill it when it reports this step; None: to its end.
        heard: Called with each line; True kills it.

    Raises:
        UserError: if it fails or ends before `kill_at`; without psutil.
    """
    lines: list[str] = []
    with running_command([*torchrun_command(processes), str(SCRIPT), *typed], folder) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            enough = heard(lines[-1]) is True
            if enough or (kill_at is not None and step_of(line) >= kill_at):
                return lines  # leaving the block kills it
        code = process.wait()
    if code != 0 or kill_at is not None:
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        said = errors[-1] if errors else "\n".join(lines[-3:]).strip() or "it said nothing"
        raise UserError(f"the training failed with exit code {code}: {said}")
    return lines


def step_of(line: str) -> int:
    """Return the step that a console line reports; -1 for any other line."""
    found = re.match(r"step:(\d+)/\d+ \| loss ", line)
    return int(found[1]) if found else -1


@contextmanager
def running_command(command: Sequence[str], folder: Path | None = None) -> Iterator[subprocess.Popen[str]]:
    """Run a command in a session of its own with its output in one pipe; at the end kill its remaining processes.

    The session lets the tool pass a Ctrl-C on. SIGTERM and SIGHUP become a KeyboardInterrupt, or the command would
    outlive the tool. Raises UserError without psutil.
    """
    if importlib.util.find_spec("psutil") is None:
        raise UserError("running a training from here needs psutil: pip install psutil")
    before = {number: signal.signal(number, _interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        process = subprocess.Popen(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        try:
            yield process
        finally:
            kill_tree(process)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def kill_tree(process: subprocess.Popen[str]) -> None:
    """Send SIGKILL to a command and all that it started: torchrun gives its workers sessions of their own."""
    import psutil

    below = []
    if process.poll() is None:
        with suppress(psutil.NoSuchProcess):
            below = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    for child in below:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    process.wait()
