"""Run a training as a child process of a tool, under torchrun, and end it with all that it started."""

from __future__ import annotations

import importlib.util
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

from unbroken.errors import UserError

SCRIPT = Path(__file__).resolve().parents[2] / "train_gpt2_mod.py"


def torchrun_command(processes: int) -> list[str]:
    """Return the command that starts a number of processes on this machine with this Python."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]


@contextmanager
def running_command(command: Sequence[str], folder: Path | None = None) -> Iterator[subprocess.Popen[str]]:
    """Run a command in a session of its own with its output in one pipe; at the end kill what is left of it.

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


def read_lines(process: subprocess.Popen[str], every: float) -> Iterator[str | None]:
    """Yield the lines of a command as they come, and None whenever none came for `every` seconds."""
    arrived: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    reader = threading.Thread(target=_read, args=(process, arrived), daemon=True)
    reader.start()
    while True:
        try:
            line = arrived.get(timeout=every)
        except queue.Empty:
            yield None
            continue
        if line is None:
            return
        yield line


def _read(process: subprocess.Popen[str], arrived: queue.SimpleQueue[str | None]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        arrived.put(line.rstrip("\n"))
    arrived.put(None)
