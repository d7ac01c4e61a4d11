"""`python -m unbroken launch`: what it prints and returns when a training is stopped, refused or killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests import fork_server
from tests.harness import (
    PACED,
    ROOT,
    RUN_ID,
    SCRIPT,
    SHORT,
    Hold,
    Running,
    arguments,
    children,
    environment,
    free_port,
    last_step,
    launch,
    log_lines,
)
from unbroken.host import is_torchrun


def launched(folder: Path, *before: str, processes: int = 2, hold: int = 10**9, **changes: object) -> Running:
    """A training that lasts, under the launcher."""
    typed = arguments({**SHORT, "num_iterations": 10**6, "save_every": 0, "grad_accumulation_steps": 2, **changes})
    command = [*before, sys.executable, "-m", "unbroken", "launch", f"--nproc_per_node={processes}", str(PACED), *typed]
    held = Hold(folder, hold)
    env = environment({"PYTHONPATH": str(ROOT), "PACE": "0.1", **held.env})
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return Running(fork_server.Popen(command, cwd=folder, env=env, text=True, **pipes), folder, held)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_stop_ends_without_a_traceback(place: Path, number: signal.Signals) -> None:
    running = launched(place)
    running.until(lambda: last_step(place) > 1)
    assert is_torchrun(running.process.pid), "in a container it is process 1"
    running.process.send_signal(number)
    done = running.wait()
    assert (done.code, done.err) == (128 + number, ""), done.text
    assert f"stopped by {number.name}" in done.out and len(list(place.glob("logs/*/model_step*.pt"))) == 1


def test_a_mistake_is_its_one_line(place: Path) -> None:
    done = launched(place, processes=1, model="d3").wait()
    assert done.code == 2 and done.err.count("\n") == 1 and "--model d3: it must be one of d2" in done.err, done.text
    both = launched(place, processes=2, model="d3").wait()
    assert both.err == done.err, "once, not once for each process"


def test_a_rank_that_is_late_still_prints_the_line_of_all(tmp_path: Path) -> None:
    script = tmp_path / "late.py"
    late = "import os, runpy, time; time.sleep(1.5 * (os.environ['LOCAL_RANK'] == '0'))\n"
    script.write_text(f"{late}runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n")
    done = launch(tmp_path, ["--model", "d3"], 2, script=script).wait()
    lines = [line for line in done.err.splitlines() if line.startswith("error: --model d3: it must be one of")]
    assert len(lines) == 1, done.text


def test_a_process_that_is_killed_is_named(place: Path) -> None:
    running = launched(place)
    running.until(lambda: last_step(place) > 1)
    os.kill(children(running.process.pid)[-1], signal.SIGKILL)
    done = running.wait()
    assert done.code == 1 and "Traceback" not in done.err and "error: process " in done.err, done.text
    assert len(done.err.splitlines()) <= 2, done.err


def test_under_nohup_the_terminal_may_go(place: Path) -> None:
    running = launched(place, "nohup", processes=1, num_iterations=6, hold=2)
    running.until(lambda: last_step(place) > 1)
    running.process.send_signal(signal.SIGHUP)
    running.release()
    done = running.wait()
    assert done.code == 0 and last_step(place) == 6, done.text


def test_a_stop_of_one_process_is_told_from_the_end_of_the_run(place: Path) -> None:
    """The block of results is for grep: only a finished run prints it."""
    running = launched(place, num_iterations=2000)
    running.until(lambda: last_step(place) > 1)
    os.kill(children(running.process.pid)[-1], signal.SIGTERM)
    done = running.wait()
    assert (done.code, done.err) == (143, ""), done.text
    (step,) = re.findall(r"stopped by .* at step (\d+); continue with --resume_from \S+\n\Z", done.out)
    done = launched(place, num_iterations=int(step) + 2, val_loss_every=1, resume_from="auto").wait()
    values = dict(re.findall(r"^([a-z_]+): (\S+)$", done.out, re.M))
    assert done.code == 0 and done.out.splitlines()[-1] == f"finished at step {int(step) + 2}: {values['checkpoint']}"
    losses = re.findall(r"^s:\d+ val:(\S+)", "\n".join(log_lines(place)), re.M)
    assert values | {"run_id": RUN_ID, "steps": f"{int(step) + 2}", "attempts": "2"} == values
    assert values["final_val_loss"] == f"{float(losses[-1]):.6f}"
    assert values["best_val_loss"] == f"{min(map(float, losses)):.6f}"
    assert 0 < float(values["goodput"]) < 1 and int(values["tokens"]) == (int(step) + 2) * 64


def test_a_process_that_still_waits_for_the_others_ends_with_torchrun(tmp_path: Path) -> None:
    """Rank 1 of 2 looks for a store that nobody serves; the shell that is its parent in torchrun's place is killed."""
    rank = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}
    env = {**environment(), **rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shell = subprocess.Popen(["sh", "-c", f"{sys.executable} {SCRIPT} & wait"], env=env, text=True)
    running = Running(shell, tmp_path)
    running.until(lambda: len(running.workers()) == 1)
    (worker,) = running.workers()
    running.until(lambda: "libgomp" in Path(f"/proc/{worker}/maps").read_text())
    cpu = psutil.Process(worker).cpu_times
    used = 0.0
    while used != (used := cpu().user):  # it has imported torch, and connects again and again
        time.sleep(1)
    assert psutil.pid_exists(worker)
    shell.kill()
    shell.wait()
    deadline = time.monotonic() + 20
    while psutil.pid_exists(worker) and time.monotonic() < deadline:
        time.sleep(0.02)
    if psutil.pid_exists(worker):
        os.kill(worker, signal.SIGKILL)
        raise AssertionError("it goes on waiting")
