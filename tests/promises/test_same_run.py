"""`--resume_from auto` goes on with the run that the command began, and with no other one."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import fork_server
from tests.harness import (
    ROOT,
    RUN_ID,
    SHORT,
    arguments,
    assert_same_bits,
    launch,
    learnable,
    run,
    train,
    write_corpus,
    write_shard,
)
from unbroken.runtime.environment import missing_gpu

AUTO = {**SHORT, "run_id": None, "resume_from": "auto", "batch_size": 1, "grad_accumulation_steps": 2}


def folders(place: Path) -> list[str]:
    return sorted(path.name for path in (place / "logs").iterdir())


def auto(place: Path, **changes: Any) -> str:
    return train(place, {**AUTO, **changes}, processes=None).out


def run_in(out: str) -> str:
    found = re.search(r"(?:new|resuming) run ([0-9a-f-]{36})", out)
    assert found, out
    return found[1]


def test_another_seed_is_another_run_and_each_command_finds_its_own(place: Path) -> None:
    """Today's worst: "nothing to do" for the second seed, or the first run continued and recorded as the second."""
    first, second = run_in(auto(place)), auto(place, seed=7)
    assert run_in(second) != first
    assert f"the nearest is {first}: seed 1337 there, 7 here; --resume_from {first} continues that one" in second
    assert f"this command did not begin the run under {place}/logs" in second
    saved = torch.load(place / "logs" / run_in(second) / "final.pt", weights_only=True)
    assert saved["args"]["seed"] == saved["progress"]["begun"]["seed"] == 7
    again = auto(place)
    assert f"nothing to do: run {first} is at step 3" in again and "begun with the flags of this command" in again
    assert len(folders(place)) == 2


def test_more_iterations_and_other_habits_continue(place: Path) -> None:
    first = run_in(auto(place))
    more = {"num_iterations": 4, "save_every": 1, "keep_last": 3, "val_loss_every": 2, "log_tensorboard": True}
    said = auto(place, **more)
    assert f"resuming run {first}" in said and "at step 3" in said
    split = auto(place, num_iterations=5, batch_size=2, grad_accumulation_steps=1)
    assert f"resuming run {first}" in split and folders(place) == [first]


def test_other_data_are_another_run_though_the_newest_has_the_same_flags(place: Path) -> None:
    """After `make train`, the README's training line died with "the training data changed"."""
    first = run_in(auto(place))
    write_shard(place / "mine/train_000.bin", learnable(3000, 5))
    said = auto(place, input_bin="mine/train_*.bin", input_val_bin=None)
    assert run_in(said) != first and "input_bin data/train_*.bin there, mine/train_*.bin here" in said


def test_data_that_were_moved_are_the_same(place: Path) -> None:
    first = run_in(auto(place))
    (place / "data").rename(place / "scratch")
    said = auto(place, input_bin="scratch/train_*.bin", input_val_bin="scratch/val_*.bin", num_iterations=4)
    assert f"resuming run {first}" in said


def test_a_command_without_flags_of_its_own_takes_the_newest(place: Path) -> None:
    auto(place)
    second = run_in(auto(place, seed=7))
    done = run(place, "--resume_from", "auto", "--num_iterations", "4")
    assert done.code == 0 and f"resuming run {second}" in done.out, done.text
    assert "no flag that decides what is trained is typed" in done.out


def test_latest_is_the_newest_of_all(place: Path) -> None:
    auto(place)
    second = run_in(auto(place, seed=7))
    typed = arguments({**AUTO, "resume_from": "latest", "num_iterations": 4})
    done = launch(place, typed, processes=None).wait()
    assert done.code == 0 and f"resuming run {second}" in done.out, done.text
    assert "WARNING: --seed" not in done.out


def test_the_newest_run_is_known_by_the_time_inside_its_checkpoints(place: Path) -> None:
    """`cp -r` without -p gives all files new times, in any order."""
    first, second = run_in(auto(place)), run_in(auto(place, seed=7))
    for path in (place / "logs" / first).iterdir():
        os.utime(path, (2**31, 2**31))
    done = run(place, "--resume_from", "latest")
    assert f"nothing to do: run {second}" in done.out, done.text
    command = [sys.executable, "-m", "unbroken", "ls"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    listing = fork_server.run(command, cwd=place, env=env, capture_output=True, text=True)
    assert listing.stdout.index(first) < listing.stdout.index(second), listing.stdout


@pytest.mark.parametrize("kept", ["args", "earlier program"])
def test_runs_from_before_flags_were_recorded_are_found_by_their_arguments(place: Path, kept: str) -> None:
    train(place, {**SHORT, "batch_size": 1, "grad_accumulation_steps": 2}, processes=None)
    folder = place / "logs" / RUN_ID
    for path in folder.glob("*.pt"):
        saved = torch.load(path, weights_only=True)
        del saved["progress"]["begun"], saved["progress"]["saved_at"]
        if kept == "earlier program":
            saved = {key: saved[key] for key in ("model", "optimizer", "step", "code", "args", "run_id")}
            saved["args"] = {name: saved["args"][name] for name in ("input_bin", "batch_size", "learning_rate")} | {
                **{name: saved["args"][name] for name in ("grad_accumulation_steps", "sequence_length")},
                **{name: saved["args"][name] for name in ("weight_decay", "model", "num_iterations")},
            }
        os.unlink(path)
        torch.save(saved, path)
    other = auto(place, seed=7)
    assert "new run" in other and f"the nearest is {RUN_ID}" in other
    assert f"resuming run {RUN_ID}" in auto(place, num_iterations=5)


def test_flags_that_cannot_take_effect_are_warned_about_and_not_recorded(place: Path) -> None:
    train(place, {**SHORT, "dtype": "fp32"}, processes=None)
    more = ["--seed", "7", "--dtype", "auto", "--threads", "0", "--keep_every", "5", "--trace_steps", "2"]
    done = run(place, "--resume_from", RUN_ID, "--num_iterations", "4", *more)
    assert done.code == 0, done.text
    assert "WARNING: --seed 7 has no effect: the weights are the checkpoint's; seed stays 1337" in done.out
    assert "WARNING: --dtype auto has no effect: the run keeps fp32" in done.out
    assert "WARNING: --threads 0 has no effect: the run keeps 1" in done.out
    assert "WARNING: --keep_every 5 has no effect without --keep_last" in done.out
    assert "WARNING: --trace_steps 2 has no effect: the run is at step 3 already" in done.out
    saved = torch.load(place / "logs" / RUN_ID / "final.pt", weights_only=True)
    assert [saved["args"][name] for name in ("seed", "dtype", "threads")] == [1337, "fp32", 1]
    assert saved["rng"] == {"seed": 1337}


def test_a_sweep_of_seeds_under_kills_ends_with_the_bits_of_unbroken_runs(tmp_path: Path) -> None:
    """In one folder, after another experiment, each command killed twice in turn with the others."""
    steps = {**AUTO, "num_iterations": 8, "save_every": 2}
    for name in ("straight", "sweep"):
        write_corpus(tmp_path / name)
    for seed in (1, 2, 3):
        train(tmp_path / "straight", {**steps, "seed": seed}, processes=None)
    ends = {}
    for path in (tmp_path / "straight").glob("logs/*/final.pt"):
        ends[torch.load(path, weights_only=True)["args"]["seed"]] = path
    sweep = tmp_path / "sweep"
    auto(sweep, model="d2", sequence_length=32)  # another experiment
    ours: dict[int, str] = {}
    for least in (3, 5):
        for seed in (1, 2, 3):
            running = launch(sweep, arguments({**steps, "seed": seed}), processes=None, hold=least)
            before = set(folders(sweep)) if seed not in ours else set()
            running.until(lambda before=before, seed=seed: seed in ours or bool(set(folders(sweep)) - before))
            ours.setdefault(seed, next(iter(set(folders(sweep)) - before)))
            log = sweep / "logs" / ours[seed] / f"{ours[seed]}.log"
            running.kill_when(lambda log=log, least=least: log.exists() and f"s:{least} " in log.read_text())
    for seed in (1, 2, 3):
        train(sweep, {**steps, "seed": seed}, processes=None)
        assert_same_bits(ends[seed], sweep / "logs" / ours[seed] / "final.pt")
    assert len(folders(sweep)) == 4


def test_a_run_killed_before_its_first_checkpoint_is_continued(place: Path) -> None:
    """Under the same run_id and in the same log, so that it has one run in W&B; another command's run is another."""
    for least in (3, 5):
        running = launch(place, arguments({**AUTO, "num_iterations": 30, "save_every": 100}), None, hold=least)
        logs = [*place.glob("logs/*/*.log")]
        running.kill_when(lambda n=least: any(f"s:{n} " in log.read_text() for log in place.glob("logs/*/*.log")))
        assert len(logs) == (least > 3)
    other = auto(place, seed=7)
    out = auto(place, num_iterations=8)
    assert len(folders(place)) == 2 and run_in(out) != run_in(other)
    assert f"auto: {run_in(out)} was begun with the flags of this command and has no checkpoint yet" in out
    assert re.search(r"steps 1-\d repeated: identical", out), out


def test_the_start_says_what_is_trained_where(place: Path) -> None:
    said = auto(place)
    run_id = run_in(said)
    assert f"run {run_id}, folder {place}/logs/{run_id}\n" in said
    assert re.search(r"model tiny: [\d,]+ parameters; 32 tokens a step \(1 x 2 x 16\), 3 steps\n", said)
    assert "data data/train_*.bin: 6,000 tokens in 2 shards; 0.016 epochs\n" in said
    assert re.search(r"device .+: (fp32|bf16), not compiled; processes: 1, threads of each: 1\n", said)


@pytest.mark.parametrize(
    ("wanted", "device", "says"), [("auto", "cpu", True), ("cpu", "cpu", False), ("auto", "cuda", False)]
)
def test_a_gpu_that_is_not_found_is_missed(
    monkeypatch: pytest.MonkeyPatch, wanted: str, device: str, says: bool
) -> None:
    assert missing_gpu(wanted, torch.device("cpu")) == "" or torch.version.cuda
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    line = missing_gpu(wanted, torch.device(device))
    assert ("built for CUDA 12.8 but finds no GPU" in line) == says and bool(line) == says
