"""C2: the same bits on 1, 2 and 4 processes, whatever happened in between; on others the same tokens."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests import fork_server, harness
from tests.harness import RUN_ID, arguments, assert_same_bits, launch, log_lines, train, write_corpus

SETTINGS: dict[str, Any] = {
    "run_id": RUN_ID,
    "grad_accumulation_steps": 4,
    "num_iterations": 16,
    "save_every": 4,
    "val_loss_every": 8,
    "val_tokens": 320,
    "val_batch_size": 4,
    "grad_clip": 0.5,
}


def final(folder: Path) -> Path:
    return folder / "logs" / RUN_ID / "final.pt"


@pytest.fixture(scope="module")
def on_one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 steps on one process."""
    folder = tmp_path_factory.mktemp("on_one")
    write_corpus(folder)
    train(folder, SETTINGS)
    return folder


@pytest.mark.parametrize("processes", [pytest.param(2, marks=pytest.mark.fast), 4])
def test_the_same_bits_on_more_processes(on_one: Path, tmp_path: Path, processes: int) -> None:
    write_corpus(tmp_path)
    train(tmp_path, SETTINGS, processes=processes)
    assert_same_bits(final(on_one), final(tmp_path))
    assert log_lines(tmp_path) == log_lines(on_one)


def test_killed_and_resized(on_one: Path, tmp_path: Path) -> None:
    """1 -> 2 -> 4 -> 1 processes with a SIGKILL of everything between."""
    write_corpus(tmp_path)
    typed = arguments({**SETTINGS, "resume_from": "auto"})
    for processes, goal in ((1, 5), (2, 9), (4, 13)):
        launch(tmp_path, typed, processes, pace=0.05, hold=goal).kill_at(goal)
    done = launch(tmp_path, typed, 1).wait()
    assert done.code == 0, done.text
    assert_same_bits(final(on_one), final(tmp_path))
    assert log_lines(tmp_path) == log_lines(on_one)
    assert "DIFFERS" not in done.text


def test_one_rank_is_killed_and_torchrun_restarts_all(on_one: Path, tmp_path: Path) -> None:
    """SIGKILL of a single rank, anywhere: the others stop, and the restarted workers continue their own run unasked."""
    write_corpus(tmp_path)
    restarted = ["--max-restarts=3", "--monitor-interval=0.1"]
    running = launch(tmp_path, arguments(SETTINGS), 2, torchrun=restarted, pace=0.05, hold=8)
    moments = random.Random(5)
    for goal in (6, 10):
        running.until(lambda goal=goal: harness.last_step(tmp_path) >= goal)  # type: ignore[misc]
        time.sleep(moments.random() * 0.05)
        running.kill_worker(goal)
        running.release(12)
    running.release()
    done = running.wait()
    assert done.code == 0, done.text
    assert "restarted by torchrun" in done.text
    assert_same_bits(final(on_one), final(tmp_path))
    assert log_lines(tmp_path) == log_lines(on_one)


def is_asked_to_stop(pid: int) -> bool:
    """SIGTERM is pending for a process that stands still."""
    pending = Path(f"/proc/{pid}/status").read_text().partition("ShdPnd:")[2].split()[0]
    return bool(int(pending, 16) >> (signal.SIGTERM - 1) & 1)


def test_a_second_node_comes_and_goes(on_one: Path, tmp_path: Path) -> None:
    """`--nnodes=1:2`: a node that comes later takes part; when it is lost, the run goes on by itself without it."""
    write_corpus(tmp_path)
    endpoint = f"127.0.0.1:{harness.free_port()}"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2", "--nproc_per_node=1", "--max-restarts=3"),
        *(
            "--rdzv-backend=c10d",
            "--rdzv-id=elastic",
            f"--rdzv-endpoint={endpoint}",
            "--monitor-interval=0.1",
        ),
        *("--rdzv-conf=join_timeout=60,last_call_timeout=1", str(harness.PACED)),
        *arguments({**SETTINGS, "run_id": None}),
    ]
    held = harness.Hold(tmp_path, 5)
    env = harness.environment({"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "PACE": "0.1", **held.env})

    def node() -> harness.Running:
        process = fork_server.Popen(
            command, cwd=tmp_path, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        return harness.Running(process, tmp_path, held)

    first = node()  # holds the store
    first.until(lambda: harness.last_step(tmp_path) >= 4)
    (worker,) = first.workers()
    os.kill(worker, signal.SIGSTOP)  # or it would stop before both are looked at
    second = node()
    first.until(lambda: is_asked_to_stop(worker))
    os.kill(worker, signal.SIGCONT)
    first.release(12)
    first.until(lambda: harness.last_step(tmp_path) >= 8)
    assert second.workers(), "the second node did not take part"
    second.kill()
    second.wait()
    first.release()
    done = first.wait()
    assert done.code == 0, done.text
    finals = list(tmp_path.glob("logs/*/final.pt"))
    assert len(finals) == 1, "the survivor did not go on with the same run"
    assert_same_bits(final(on_one), finals[0])


@pytest.mark.parametrize(
    ("processes", "changes"),
    [
        (3, {"grad_accumulation_steps": 6}),
        (2, {"grad_accumulation_steps": 1, "batch_size": 12}),
        (3, {"grad_accumulation_steps": 4, "batch_size": 1}),
    ],
)
def test_other_counts_take_the_same_tokens(tmp_path: Path, processes: int, changes: dict[str, Any]) -> None:
    """Bits may differ, and the program says so; the tokens of every step may not."""
    settings = {**SETTINGS, "num_iterations": 6, "save_every": 3, "val_loss_every": None, "grad_clip": None, **changes}
    texts = {}
    for count in (1, processes):
        folder = tmp_path / str(count)
        write_corpus(folder)
        texts[count] = train(folder, settings, processes=count, script=TRACED).text
    assert "bits may differ" in texts[processes] and "bits may differ" not in texts[1]
    steps = settings["num_iterations"]
    assert tokens_of_steps(tmp_path / "1", steps) == tokens_of_steps(tmp_path / str(processes), steps)


TRACED = harness.ROOT / "tests/traced_training.py"


def tokens_of_steps(folder: Path, steps: int) -> list[list[str]]:
    """The sequences of each step in their order: rank 0's, then rank 1's, and so on."""
    of_ranks = [path.read_text().splitlines() for path in sorted(folder.glob("tokens.*.txt"))]
    shares = [len(lines) // steps for lines in of_ranks]
    return [
        [
            line
            for lines, share in zip(of_ranks, shares, strict=True)
            for line in lines[step * share : (step + 1) * share]
        ]
        for step in range(steps)
    ]


def test_more_processes_than_sequences(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    done = train(tmp_path, {"batch_size": 1, "grad_accumulation_steps": 1}, processes=2, check=False)
    assert done.code != 0 and "2 processes for 1 sequence per step" in done.text
    assert "Traceback (most recent call last)" not in done.text.split("error: ")[0]


def test_typed_elastic_ranks_split_from_the_start(tmp_path: Path) -> None:
    """--elastic_ranks 2 with accumulation 1: bits on two processes from the first step on."""
    for count in (1, 2):
        write_corpus(tmp_path / str(count))
        settings = {**SETTINGS, "grad_accumulation_steps": 1, "num_iterations": 6, "elastic_ranks": 2}
        train(tmp_path / str(count), settings, processes=count)
    assert_same_bits(final(tmp_path / "1"), final(tmp_path / "2"))


def test_less_optimizer_memory_per_process() -> None:
    """ZeRO-1: each of four processes holds a quarter of the moments, up to the padding."""
    import torch

    from unbroken.distributed.flat_params import ShardedParameters
    from unbroken.distributed.world import Launch, World
    from unbroken.model.gpt import GPT
    from unbroken.model.language_model import ModelConfig

    held = []
    for size in (1, 4):
        world = World(Launch(size=size), torch.device("cpu"))
        sharded = ShardedParameters(GPT(ModelConfig(2, 2, 256, vocab_size=4096)), world)
        held.append(sum(shard.parameter.numel() for group in sharded.groups for shard in group.owned))
    assert held[1] < held[0] / 4 * 1.05
