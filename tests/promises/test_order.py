"""The order of the data is a part of the run: the same bits however it is cut, on any number of processes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import yaml

from tests import harness
from tests.harness import RUN_ID, arguments, assert_same_bits, launch, log_lines, train, write_corpus

FINAL = Path("logs") / RUN_ID / "final.pt"
# 700 tokens are 43 windows and 12 tokens, and less than six steps.
SHUFFLED: dict[str, Any] = {"run_id": RUN_ID, "num_iterations": 12, "save_every": 2, "shuffle": 7}


def test_a_shuffled_run_is_the_same_run(tmp_path: Path) -> None:
    """Killed, on another number of processes, over epochs; sequences of another length keep the windows."""
    for name in ("straight", "broken"):
        write_corpus(tmp_path / name, train_tokens=700)
    done = train(tmp_path / "straight", SHUFFLED, processes=None)
    assert "windows of 16 tokens in the order of seed 7\n" in done.out, done.text
    launch(tmp_path / "broken", arguments({**SHUFFLED, "resume_from": "auto"}), 2, pace=0.1, hold=7).kill_at(7)
    done = launch(tmp_path / "broken", ["--resume_from", "auto"], None).wait()
    assert done.code == 0, done.text
    assert_same_bits(tmp_path / "straight" / FINAL, tmp_path / "broken" / FINAL)
    assert log_lines(tmp_path / "broken") == log_lines(tmp_path / "straight")
    more = ["--num_iterations", "13", "--sequence_length", "8", "--shuffle", "8", "--window_tokens", "9"]
    done = launch(tmp_path / "broken", ["--resume_from", RUN_ID, *more], None).wait()
    assert done.code == 0 and "--shuffle 8 has no effect: the order of the data is the run's" in done.out, done.text
    args = torch.load(tmp_path / "broken" / FINAL, weights_only=True)["args"]
    assert (args["shuffle"], args["window_tokens"], args["sequence_length"]) == ("7", 16, 8)


def test_sources_with_other_weights_are_the_same_run(tmp_path: Path) -> None:
    """Of one glob, then of two, then with other weights, and killed on 2, 4 and 1 processes: config.yaml repeats it.

    With batches that are left out.
    """
    broken, straight = tmp_path / "broken", tmp_path / "straight"
    for folder in (broken, straight):
        write_corpus(folder, train_tokens=700)
    changes = {**SHUFFLED, "num_iterations": 16, "skip_batches": "2,9-10"}
    two = {**changes, "run_id": None, "resume_from": RUN_ID, "input_bin": "data/train_*.bin=0.7,data/val_*.bin=0.3"}
    typed = arguments({**two, "input_bin": "data/train_*.bin=1,data/val_*.bin=2"})
    commands = (arguments({**changes, "resume_from": "auto"}), arguments(two), typed)
    for command, processes, step in zip(commands, (2, 4, None), (2, 6, 12), strict=True):
        running = launch(broken, command, processes, hold=step + 1)
        running.kill_when((broken / FINAL.with_name(f"model_step{step:06d}.pt")).exists)
    done = launch(broken, typed, 2).wait()
    assert done.code == 0, done.text
    file = broken / FINAL.with_name("config.yaml")
    text = yaml.safe_load(file.read_text())["input_bin"]
    # Each change once, where the newest checkpoint was: at multiples of two steps.
    found = re.fullmatch(r"data/train_\*\.bin=1;0\.7@(\d+);1@(\d+),data/val_\*\.bin=0;0\.3@\1;2@\2", text)
    assert found and 256 <= int(found[1]) < 768 <= int(found[2]) < 1536, text
    assert torch.load(broken / FINAL, weights_only=True)["args"]["input_bin"] == text
    assert f" sources={text}" in harness.log_path(broken).read_text()
    done = launch(straight, ["--config", str(file), "--run_id", RUN_ID], None).wait()
    assert done.code == 0, done.text
    assert f"data data/train_*.bin, weight 1;0.7@{found[1]};1@{found[2]}: 700 tokens in 2 shards; 1." in done.out
    assert f"; data/val_*.bin, weight 0;0.3@{found[1]};2@{found[2]}: 700 tokens in 1 shard; " in done.out, done.text
    assert_same_bits(broken / FINAL, straight / FINAL)
    losses = dict(line.split(" trn:") for line in log_lines(broken))
    assert losses == dict(line.split(" trn:") for line in log_lines(straight))


def test_a_checkpoint_from_before_goes_on_in_the_order_of_the_shards(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    changes = {"run_id": RUN_ID, "num_iterations": 4, "save_every": 2, "warmdown_iters": 0}
    train(tmp_path, changes, processes=None)
    path = tmp_path / FINAL.with_name("model_step000002.pt")
    saved = torch.load(path, weights_only=True)
    for name in ("shuffle", "window_tokens"):
        del saved["args"][name]
    torch.save(saved, tmp_path / "old.pt")
    done = launch(tmp_path, ["--resume_from", "old.pt", "--shuffle", "7"], None).wait()
    assert done.code == 0 and "steps 3-4 repeated: identical" in done.out, done.text
    assert "--shuffle 7 has no effect: the order of the data is the run's; shuffle stays off" in done.out
    several = "data/train_*.bin=1,data/val_*.bin=1"
    done = launch(tmp_path, ["--resume_from", "old.pt", "--input_bin", several], None).wait()
    line = "from position 256 on the sources have other weights: data/train_*.bin=1,data/val_*.bin=0;1@256\n"
    assert done.code == 0 and line in done.out, done.text
    done = launch(
        tmp_path, ["--resume_from", RUN_ID, "--input_bin", "data/val_*.bin", "--num_iterations", "5"], None
    ).wait()
    assert done.code == 2 and "the training data changed: shard 'train_000.bin' is gone" in done.err, done.text
