"""What a run cannot go on from stops it, all of its processes, in one line: and every step so far is on the disk."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest

from tests.harness import ROOT, RUN_ID, SHORT, arguments, last_step, launch, log_lines, run_folder, train
from unbroken.checkpoint import directory

FAILING = ROOT / "tests/failing_training.py"


# ---- the data --------------------------------------------------------------------------------------------------------


def with_a_bad_token(place: Path, offset: int) -> None:
    shard = place / "data/train_000.bin"
    content = bytearray(shard.read_bytes())
    content[1024 + 2 * offset : 1026 + 2 * offset] = (60000).to_bytes(2, "little")
    shard.write_bytes(content)


@pytest.mark.parametrize("processes", [None, 2])
def test_a_bad_token_stops_all_and_loses_no_step(place: Path, processes: int | None) -> None:
    with_a_bad_token(place, 500)  # in the fourth step of 128
    changes = {**SHORT, "num_iterations": 9, "save_every": 100}
    done = train(place, changes, processes, check=False)
    assert "train_000.bin: token 60000 at offset 500 is outside" in done.err, done.text
    assert "Connection closed by peer" not in done.err
    assert directory.periodic_steps(run_folder(place)) == [3] and last_step(place) == 3
    if processes is None:
        assert done.code == 2 and done.err.count("\n") == 1


@pytest.mark.parametrize("processes", [None, 2])
def test_a_shard_cut_short_while_it_is_read_stops_all_and_loses_no_step(place: Path, processes: int | None) -> None:
    """Through a map it would be a SIGBUS. Put back as it was, the run goes on."""
    shard = place / "data/train_000.bin"
    content = shard.read_bytes()
    running = launch(place, arguments({**SHORT, "num_iterations": 5000, "save_every": 2000}), processes, hold=5)
    running.until(lambda: last_step(place) >= 5)
    os.truncate(shard, 1500)
    running.release()
    done = running.wait()
    said = f"train_000.bin changed while it was in use: it had {len(content)} bytes and now has 1500"
    assert said in done.err, done.text
    (saved,) = directory.periodic_steps(run_folder(place))
    assert saved == last_step(place) >= 5
    shard.write_bytes(content)
    done = launch(place, ["--resume_from", RUN_ID, "--num_iterations", str(saved + 3)], processes).wait()
    assert done.code == 0 and "repeated" not in done.text, done.text


@pytest.mark.parametrize("processes", [None, 2])
def test_a_validation_shard_cut_short_stops_all_and_loses_no_step(place: Path, processes: int | None) -> None:
    shard = place / "data/val_000.bin"
    content = shard.read_bytes()
    changes = {**SHORT, "num_iterations": 5000, "save_every": 2000, "val_loss_every": 10}
    running = launch(place, arguments(changes), processes, hold=5)
    running.until(lambda: last_step(place) >= 5)
    os.truncate(shard, 1500)
    running.release()
    done = running.wait()
    assert f"val_000.bin changed while it was in use: it had {len(content)} bytes and now has 1500" in done.err
    assert "Connection closed by peer" not in done.err
    (saved,) = directory.periodic_steps(run_folder(place))
    assert saved == last_step(place) and saved % 10 == 0
    shard.write_bytes(content)
    done = launch(place, ["--resume_from", RUN_ID, "--num_iterations", str(saved + 3)], processes).wait()
    assert done.code == 0 and "repeated" not in done.text, done.text
    lines = log_lines(place)
    assert lines[-5].startswith(f"s:{saved} val:") and lines[-1].startswith(f"s:{saved + 3} val:")


def test_the_save_before_bad_data_is_waited_for_and_tried_again(place: Path) -> None:
    """It was under way when the next step's data turned out bad, and the disk had no room for it at first."""
    with_a_bad_token(place, 698)  # in the sixth
    changes = {**SHORT, "num_iterations": 9, "save_every": 5}
    done = train(place, changes, None, check=False, script=FAILING, env={"FAILS": "save:1"})
    assert done.code == 2 and "token 60000" in done.err, done.text
    assert "checkpoint of step 5 was not saved: " in done.out and "saved logs/" in done.out, done.text
    assert directory.periodic_steps(run_folder(place)) == [5]


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [None, 2])
@pytest.mark.parametrize("fails", ["train:9", "val:10"])
def test_what_does_not_fit_ends_in_one_line_and_loses_no_step(place: Path, fails: str, processes: int | None) -> None:
    """In the third step of one process and the fifth of two; in the second validation."""
    changes = {**SHORT, "num_iterations": 20, "save_every": 100, "val_loss_every": 4, "on_oom": "fail"}
    small = {"val_tokens": 160, "val_batch_size": 1 if processes else 2}  # 5 batches of each process
    done = train(place, {**changes, **small}, processes, check=False, script=FAILING, env={"FAILS": fails})
    said = "with a microbatch of 2 x 16" if fails.startswith("train") else "in a validation with batches of"
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert done.code != 0 and len(errors) == 1 and f"CUDA out of memory {said}" in errors[0], done.text
    if processes is None:
        assert done.code == 2 and done.err.count("\n") == 1, done.text
    step = 4 if fails.startswith("val") or processes else 2
    assert directory.periodic_steps(run_folder(place)) == [step] and last_step(place) == step
    done = launch(place, ["--resume_from", RUN_ID, "--num_iterations", str(step + 2)], processes).wait()
    assert done.code == 0 and "repeated" not in done.text, done.text


NCCL = "NCCL error: unhandled cuda error. Last error:\nCuda failure 2 'out of memory'"
HOST = (
    "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes. Error code 12 (Cannot allocate memory)"
)
PRE_UPDATE = "CUDA out of memory after the backward passes of step 4: use a smaller --batch_size"


@pytest.mark.parametrize(
    ("fails", "operation", "named", "said"),
    [
        ("exchange:4", 1, "", PRE_UPDATE),
        ("exchange:4", 1, NCCL, PRE_UPDATE),
        ("clip:4", 4, "", PRE_UPDATE),
        ("clip:4", 4, HOST, PRE_UPDATE.replace("CUDA", "host")),
        ("train:13", 1, HOST, "host out of memory with a microbatch of 2 x 16"),
        ("train:13", 1, "MemoryError", "host out of memory with a microbatch of 2 x 16"),
        ("val:2", 1, HOST, "host out of memory in a validation"),
        ("grad:13", 1, "", "CUDA out of memory with a microbatch of 2 x 16"),
        ("train:13", 1, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling", "CUDA out of memory with a microbatch"),
        ("val:2", 1, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling", "CUDA out of memory in a validation"),
    ],
)
def test_wherever_memory_runs_out_it_is_one_line_and_no_step_is_lost(
    place: Path, fails: str, operation: int, named: str, said: str
) -> None:
    """Before the fourth update, by whatever name it is reported; and the run goes on."""
    changes = {**SHORT, "num_iterations": 20, "save_every": 100, "on_oom": "fail", "grad_clip": 0.1}
    changes |= {"val_tokens": 64, "val_loss_every": 3} if fails.startswith("val") else {}
    env = {"FAILS": fails, "OPERATION": str(operation), "NAMED": named}
    done = train(place, changes, None, check=False, script=FAILING, env=env)
    assert done.code == (1 if said.startswith("host") else 2), done.text  # another program may have taken the host's
    assert said in done.err and done.err.count("\n") == 1, done.text
    assert directory.periodic_steps(run_folder(place)) == [3] and last_step(place) == 3
    done = launch(place, ["--resume_from", RUN_ID, "--num_iterations", "5"], None).wait()
    assert done.code == 0 and "repeated" not in done.text, done.text


@pytest.mark.parametrize(
    ("phase", "stride", "said", "steps"),
    [
        ("build", 30, "out of GPU memory: a smaller --model or --batch_size needs less", []),
        ("pass", 150, "CUDA out of memory with a microbatch of 2 x 16 tokens", [2]),
        ("replay", 150, "CUDA out of memory with a microbatch of 2 x 16 tokens", []),
        ("clip", 4, "CUDA out of memory after the backward passes of step 3", [2]),
        ("losses", 1, "CUDA out of memory after the backward passes of step 3", [2]),
        ("update", 1, "CUDA out of memory in the update: resume from the newest checkpoint", []),
        ("val", 50, "CUDA out of memory in a validation with batches of 16 x 16 tokens", [2]),
    ],
)
def test_memory_that_runs_out_at_any_allocation_is_one_line(
    place: Path, phase: str, stride: int, said: str, steps: list[int]
) -> None:
    """At one of `stride` allocations, from a random one on; `STRIDE=1` in the environment tries all of them."""
    stride = int(os.environ.get("STRIDE", stride))
    changes = {**SHORT, "run_id": None, "num_iterations": 4, "save_every": 100, "on_oom": "fail", "grad_clip": 0.1}
    changes |= {"val_tokens": 64, "val_loss_every": 2}
    env = {"PHASE": phase, "STRIDE": str(stride), "FIRST": str(random.randint(1, stride))}
    script = ROOT / "tests/every_allocation.py"
    done = train(place, changes, None, script=script, env=env)
    counted, *failed = map(json.loads, done.out.splitlines())
    assert counted["code"] == 0 and failed, done.text
    for one in failed:
        assert one["code"] == 2 and one["stderr"].startswith(f"error: {said}"), one
        assert one["stderr"].count("\n") == 1, one
        run = place / "logs" / f"00000000-0000-4000-8000-{one['allocation']:012d}"
        assert directory.periodic_steps(run) == steps if run.is_dir() else not steps


def test_memory_that_runs_out_in_the_update_is_one_line(place: Path) -> None:
    """Some weights may be new and some old: the checkpoint before is what goes on, with the same bits."""
    changes = {**SHORT, "num_iterations": 5}
    done = train(place, changes, None, check=False, script=FAILING, env={"FAILS": "update:4"})
    assert done.code == 2 and "CUDA out of memory in the update: resume from the newest" in done.err, done.text
    assert done.err.count("\n") == 1 and directory.periodic_steps(run_folder(place)) == [2]
    done = launch(place, ["--resume_from", RUN_ID, "--num_iterations", "5"], None).wait()
    assert done.code == 0 and "step 3 repeated: identical" in done.out, done.text


def test_one_rank_without_memory_in_an_exchange_ends_all(place: Path) -> None:
    """The others wait for it in the exchange, so that nobody can save."""
    env = {"FAILS": "exchange:4", "NAMED": NCCL, "ON": "1"}
    done = train(place, {**SHORT, "num_iterations": 20}, 2, check=False, script=FAILING, env=env)
    assert done.code != 0 and PRE_UPDATE in done.err and "rank 1 died" in done.err, done.text
    assert done.seconds < 60 and directory.periodic_steps(run_folder(place)) == [2]


@pytest.mark.parametrize("processes", [None, 2])
def test_a_model_that_does_not_fit_is_one_line(place: Path, processes: int | None) -> None:
    done = train(place, SHORT, processes, check=False, script=FAILING, env={"FAILS": "build:1"})
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert done.code != 0 and len(errors) == 1 and "out of GPU memory: a smaller --model" in errors[0], done.text
    assert errors[0].endswith("of which 10.75 MiB is free.)"), "whole sentences of torch's text"
    assert not (place / "logs").exists(), "a run that never began leaves nothing"


def test_without_a_compiler_it_is_one_line(place: Path) -> None:
    env = {"PATH": "/nowhere", "CXX": "g++"}
    done = launch(place, arguments({**SHORT, "compile": "on"}), processes=None, env=env).wait()
    assert done.code == 2 and done.err.startswith("error: compiled code needs a C++ compiler"), done.text
    assert done.err.count("\n") == 1 and "--compile off" in done.err
