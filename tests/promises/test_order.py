"""The order of the data is a part of the run: the same bits however it is cut, on any number of processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.harness import RUN_ID, arguments, assert_same_bits, launch, log_lines, train, write_corpus

FINAL = Path("logs") / RUN_ID / "final.pt"
# 700 tokens are 43 windows and 12 tokens, and less than six steps.
SHUFFLED: dict[str, Any] = {"run_id": RUN_ID, "num_iterations": 14, "save_every": 2, "shuffle": 7}


def test_a_shuffled_run_is_the_same_run(tmp_path: Path) -> None:
    """Killed, on other numbers of processes, over epochs; sequences of another length keep the windows."""
    for name in ("straight", "broken"):
        write_corpus(tmp_path / name, train_tokens=700)
    done = train(tmp_path / "straight", SHUFFLED, processes=None)
    assert "windows of 16 tokens in the order of seed 7\n" in done.out, done.text
    typed = arguments({**SHUFFLED, "resume_from": "auto"})
    for processes, goal in ((2, 4), (4, 9)):
        launch(tmp_path / "broken", typed, processes, pace=0.1).kill_at(goal)
    done = launch(tmp_path / "broken", ["--resume_from", "auto"], None).wait()
    assert done.code == 0, done.text
    assert_same_bits(tmp_path / "straight" / FINAL, tmp_path / "broken" / FINAL)
    assert log_lines(tmp_path / "broken") == log_lines(tmp_path / "straight")
    more = ["--num_iterations", "15", "--sequence_length", "8", "--shuffle", "8", "--window_tokens", "9"]
    done = launch(tmp_path / "broken", ["--resume_from", RUN_ID, *more], None).wait()
    assert done.code == 0 and "--shuffle 8 has no effect: the order of the data is the run's" in done.out, done.text
    args = torch.load(tmp_path / "broken" / FINAL, weights_only=True)["args"]
    assert (args["shuffle"], args["window_tokens"], args["sequence_length"]) == ("7", 16, 8)


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
