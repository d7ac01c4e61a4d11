"""A training loop of one's own, made resumable by at most ten lines: kills at random instants leave no trace."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import unbroken.checkpoint as ub
from tests import fork_server
from tests.harness import ROOT, bits, environment

KILLS = int(os.environ.get("UNBROKEN_OWN_LOOP_KILLS", "2"))
STEPS = max(40, 9 * KILLS)
MOST_LINES = 10


@pytest.fixture
def resumable(tmp_path: Path) -> Path:
    """The example with its change applied."""
    made, change = tmp_path / "own_loop_resumable.py", ROOT / "examples/own_loop.diff"
    subprocess.run(["patch", "-s", "-o", made, ROOT / "examples/own_loop.py", change], check=True)
    return made


# The script, which after so many updates waits to be killed.
HELD = """import runpy, sys, time, torch
left, step = [int(sys.argv.pop(1))], torch.optim.AdamW.step

def held(*given, **named):
    while not left[0]:
        time.sleep(1)
    left[0] -= 1
    return step(*given, **named)

torch.optim.AdamW.step = held
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def start(script: Path, out: Path, most: int = -1) -> fork_server.Popen:
    """`most`: the updates that it takes; -1 is all."""
    typed = ["--text", str(ROOT / "README.md"), "--steps", str(STEPS), "--save_every", "2", "--out", str(out)]
    typed += ["--batch_size", "4", "--context", "32"]
    env = environment({"PYTHONPATH": str(ROOT)})
    with open(out.with_suffix(".txt"), "ab") as output:
        return fork_server.Popen(
            [sys.executable, "-c", HELD, str(most), str(script), *typed],
            cwd=script.parent,
            env=env,
            stdout=output,
            stderr=output,
        )


def test_at_most_ten_lines_change() -> None:
    change = (ROOT / "examples/own_loop.diff").read_text("utf-8").splitlines()
    changed = [line for line in change if line[:1] == "+" and line[:3] != "+++" and line != "+"]
    assert 0 < len(changed) <= MOST_LINES
    assert sum(line[:1] == "-" and line[:3] != "---" for line in change) <= len(changed)
    assert len((ROOT / "examples/own_loop.py").read_text("utf-8").splitlines()) <= 150


def lines(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


@pytest.mark.timeout(120 + 30 * KILLS)
def test_kills_at_random_instants_leave_no_trace(resumable: Path, tmp_path: Path) -> None:
    straight, killed, cut = tmp_path / "straight", tmp_path / "killed", tmp_path / "cut"
    assert start(resumable, straight).wait() == 0, straight.with_suffix(".txt").read_text()
    log, chance, kills, resumed = killed / "loss.txt", random.Random(KILLS), 0, set()
    while kills < KILLS:
        newest, before = ub.latest(killed), len(lines(log))
        resumed |= {newest} if newest else set()
        more = chance.randint(5, 12)
        attempt = start(resumable, killed, more + 4)
        while attempt.poll() is None and len(lines(log)) < before + more:
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.03))
        attempt.send_signal(signal.SIGKILL)
        if attempt.wait() == 0:
            break  # there was nothing left
        assert attempt.returncode == -signal.SIGKILL, killed.with_suffix(".txt").read_text()
        kills += 1
    assert start(resumable, killed).wait() == 0, killed.with_suffix(".txt").read_text()
    assert kills and (resumed or KILLS < 2), "nothing was interrupted"
    print(f"{kills} kills, {len(resumed)} checkpoints resumed from, {len(lines(log)) - STEPS} steps repeated")
    trained = bits(torch.load(straight / "trained.pt"))
    assert bits(torch.load(killed / "trained.pt")) == trained
    assert set(lines(log)) == set(lines(straight / "loss.txt")) and len(set(lines(log))) == STEPS

    # The twin: a tree that lacks one thing is noticed.
    resumable.write_text(resumable.read_text().replace(", random=RandomState()", ""))
    cut.mkdir()
    earlier = min(straight.glob("model_step*.pt"))
    (cut / earlier.name).write_bytes(earlier.read_bytes())
    assert start(resumable, cut).wait() == 0
    assert bits(torch.load(cut / "trained.pt")) != trained
