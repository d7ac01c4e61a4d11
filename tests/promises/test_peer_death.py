"""The death of a rank: the others leave within seconds, one line names it, and the next attempt has the same bits."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests import harness
from tests.harness import RUN_ID, Running, arguments, assert_same_bits, launch, log_lines, train, write_corpus
from unbroken.distributed.world import choose_backend

# Instants of death; the long version: UNBROKEN_PEER_DEATHS=30 make test ARGS=tests/promises/test_peer_death.py
DEATHS = int(os.environ.get("UNBROKEN_PEER_DEATHS", "4"))
PATIENCE_SECONDS = 20.0  # 5 on a quiet machine; far below torchrun's own 30 s and the 30 minutes of a collective
SETTINGS: dict[str, Any] = {"run_id": RUN_ID, "num_iterations": 400, "save_every": 3, "keep_last": 2}


@pytest.mark.first
def test_the_others_leave_and_the_restart_has_the_same_bits(tmp_path: Path) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    for folder in (straight, broken):
        folder.mkdir()
        write_corpus(folder)
    steps = 12 * DEATHS
    changes = {**SETTINGS, "num_iterations": steps}
    train(straight, changes)
    restarts = [f"--max-restarts={DEATHS}", "--monitor-interval=0.1"]
    running = launch(broken, arguments(changes), 4, torchrun=restarts, pace=0.1, hold=steps - 1)
    dice, seen = random.Random(16), set[int]()
    for number in range(DEATHS):
        workers = all_workers(running, seen)
        seen |= set(workers)
        at_start = number % 3 == 0  # before the ranks have met: a stopped one is then nobody's peer yet
        if not at_start:
            goal = harness.last_step(broken) + dice.randrange(1, 8)
            running.until(lambda goal=goal: harness.last_step(broken) >= goal)  # type: ignore[misc]
        time.sleep(dice.uniform(0, 0.5))
        victim = dice.choice(workers)
        stopped = number % 2 and not at_start
        os.kill(victim, signal.SIGSTOP if stopped else signal.SIGKILL)
        began = time.monotonic()
        while any(alive(pid) for pid in workers) and time.monotonic() - began < PATIENCE_SECONDS:
            time.sleep(0.02)
        seconds = time.monotonic() - began
        print(f"{'stopped' if stopped else 'killed'}: all gone after {seconds:.1f}s")
        assert seconds < PATIENCE_SECONDS
    running.release()
    done = running.wait()
    assert done.code == 0, done.text
    assert_same_bits(straight / f"logs/{RUN_ID}/final.pt", broken / f"logs/{RUN_ID}/final.pt")
    assert log_lines(broken) == log_lines(straight)
    assert "died or was stopped; this attempt ends" in done.text, done.text


def test_stopping_all_ranks_for_a_while_changes_nothing(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    running = launch(tmp_path, arguments({**SETTINGS, "num_iterations": 30}), 2, pace=0.1, hold=29)
    running.until(lambda: harness.last_step(tmp_path) >= 3)
    running.kill(signal.SIGSTOP)
    time.sleep(6)  # longer than a single stopped rank is waited for
    running.kill(signal.SIGCONT)
    running.release()
    done = running.wait()
    assert done.code == 0 and "died" not in done.text, done.text


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ([("a", "gpu0"), ("a", "gpu1")], ("nccl", 1)),
        ([("a", "gpu0"), ("b", "gpu0")], ("nccl", 1)),  # cloned machines repeat a uuid
        ([("a", "MIG 0"), ("b", "MIG 0")], ("nccl", 1)),
        ([("a", "MIG 0"), ("a", "MIG 1")], ("gloo", 1)),  # parts of one GPU, which is one to NCCL
        ([("a", "gpu0"), ("a", "gpu0")], ("gloo", 2)),
        ([("a", "gpu0"), ("a", "gpu1"), ("a", "gpu1"), ("a", "gpu1")], ("gloo", 3)),
        ([("a", ""), ("a", "")], ("gloo", 1)),
        ([("a", "gpu0"), ("b", "")], ("gloo", 1)),
    ],
)
def test_nccl_is_for_ranks_that_have_a_gpu_each(places: list[tuple[str, str]], expected: tuple[str, int]) -> None:
    assert choose_backend(places) == expected


def all_workers(running: Running, seen: set[int]) -> list[int]:
    """The four workers of the present attempt."""
    running.until(lambda: len(set(running.workers()) - seen) == 4)
    return sorted(set(running.workers()) - seen)


def alive(pid: int) -> bool:
    """Whether the process runs or is stopped; a zombie has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
