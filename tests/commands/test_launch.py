"""`python -m unbroken launch`: what it prints and returns when a training is stopped, refused or killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import PACED, ROOT, SHORT, Running, arguments, children, environment, last_step
from unbroken.runtime.signals import _is_torchrun


def launched(folder: Path, *before: str, processes: int = 2, **changes: object) -> Running:
    """A training that lasts, under the launcher."""
    typed = arguments({**SHORT, "num_iterations": 10**6, "save_every": 0, "grad_accumulation_steps": 2, **changes})
    command = [*before, sys.executable, "-m", "unbroken", "launch", f"--nproc_per_node={processes}", str(PACED), *typed]
    env = environment({"PYTHONPATH": str(ROOT), "PACE": "0.1"})
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return Running(subprocess.Popen(command, cwd=folder, env=env, text=True, **pipes), folder)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_stop_ends_without_a_traceback(place: Path, number: signal.Signals) -> None:
    running = launched(place)
    running.until(lambda: last_step(place) > 1)
    assert _is_torchrun(running.process.pid), "in a container it is process 1"
    running.process.send_signal(number)
    done = running.wait()
    assert (done.code, done.err) == (128 + number, ""), done.text
    assert f"stopped by {number.name}" in done.out and len(list(place.glob("logs/*/model_step*.pt"))) == 1


def test_a_mistake_is_its_one_line(place: Path) -> None:
    done = launched(place, processes=1, model="d3").wait()
    assert done.code == 2 and done.err.count("\n") == 1 and "invalid choice: 'd3'" in done.err, done.text


def test_a_process_that_is_killed_is_named(place: Path) -> None:
    running = launched(place)
    running.until(lambda: last_step(place) > 1)
    os.kill(children(running.process.pid)[1], signal.SIGKILL)
    done = running.wait()
    assert done.code == 1 and "Traceback" not in done.err and "error: process " in done.err, done.text
    assert len(done.err.splitlines()) <= 2, done.err


def test_under_nohup_the_terminal_may_go(place: Path) -> None:
    running = launched(place, "nohup", processes=1, num_iterations=6)
    running.until(lambda: last_step(place) > 1)
    running.process.send_signal(signal.SIGHUP)
    done = running.wait()
    assert done.code == 0 and last_step(place) == 6, done.text
