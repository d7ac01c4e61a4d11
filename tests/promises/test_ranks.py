"""Every rank agrees: what one of them cannot do stops all with its reason; one that is killed takes nothing along."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from tests import harness
from tests.harness import RUN_ID, arguments, assert_same_bits, launch, log_lines, train, write_corpus

ELSEWHERE = harness.ROOT / "tests/elsewhere_training.py"
PATIENCE_SECONDS = 240.0  # far below any collective's timeout: a hang would be seen
SETTINGS: dict[str, Any] = {"run_id": RUN_ID, "grad_accumulation_steps": 2, "num_iterations": 12, "save_every": 1}


def absolute(folder: Path) -> dict[str, Any]:
    return {"input_bin": str(folder / "data/train_*.bin"), "input_val_bin": str(folder / "data/val_*.bin")}


@pytest.mark.parametrize("missing", ["the data", "the checkpoint"])
def test_what_one_rank_cannot_read_stops_all_with_its_reason(tmp_path: Path, missing: str) -> None:
    write_corpus(tmp_path)
    train(tmp_path, {**SETTINGS, "num_iterations": 2, **absolute(tmp_path)})
    more = {"resume_from": RUN_ID, "run_id": None, **absolute(tmp_path)} if missing == "the checkpoint" else {}
    typed = arguments({**SETTINGS, "run_id": None, **more})
    before = sorted(path.name for path in (tmp_path / "logs" / RUN_ID).iterdir())
    began = time.monotonic()
    done = launch(tmp_path, typed, 2, script=ELSEWHERE).wait()
    assert done.code != 0 and time.monotonic() - began < PATIENCE_SECONDS
    said = [line for line in done.text.splitlines() if line.startswith("error: ")]
    assert len(said) == 1, done.text
    assert ("data/train_*.bin" if missing == "the data" else "model_step000002.pt") in said[0] or "final.pt" in said[0]
    assert sorted(path.name for path in (tmp_path / "logs" / RUN_ID).iterdir()) == before


@pytest.mark.parametrize("differs", ["the checkpoint", "the training data", "the validation data"])
def test_nodes_with_other_files_do_not_train_together(tmp_path: Path, differs: str) -> None:
    """Mixed weights, or batches that nobody could say again; one line, and nothing is begun."""
    first, second = tmp_path / "first", tmp_path / "second"
    changes = {**SETTINGS, "num_iterations": 4, "val_loss_every": 2, "val_tokens": 320, "val_batch_size": 4}
    first.mkdir()
    write_corpus(first)
    typed = arguments(changes)
    if differs == "the checkpoint":
        train(first, {**changes, "num_iterations": 2}, processes=None)
        typed = ["--resume_from", f"logs/{RUN_ID}/model_step000002.pt", "--num_iterations", "4"]
    shutil.copytree(first, second)
    if differs == "the checkpoint":
        folder = second / "logs" / RUN_ID
        shutil.copy(folder / "model_step000001.pt", folder / "model_step000002.pt")
    else:
        name = "train_000" if differs == "the training data" else "val_000"
        harness.write_shard(second / f"data/{name}.bin", harness.learnable(3000, 7))
    before = sorted(path.name for path in first.rglob("*"))
    done = launch(first, typed, 2, script=ELSEWHERE, env={"ELSEWHERE": str(second)}).wait()
    said = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert done.code != 0 and len(said) == 1 and "differs between nodes" in said[0], done.text
    assert sorted({path.name for path in first.rglob("*")} - {"logs", ".lock"}) == sorted(
        set(before) - {"logs", ".lock"}
    )


def test_a_rank_killed_in_the_middle_of_a_save(tmp_path: Path) -> None:
    """Again and again, whenever a temporary file is there; the run comes to its end with the same bits."""
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    for folder in (straight, broken):
        folder.mkdir()
        write_corpus(folder)
    train(straight, SETTINGS)
    restarted = ["--max-restarts=4", "--monitor-interval=0.1"]
    running = launch(broken, arguments(SETTINGS), 2, torchrun=restarted, hold=2)
    folder = broken / "logs" / RUN_ID
    for number in range(3):
        goal = 3 * number + 2
        running.release(goal)
        running.until((folder / f"model_step{goal:06d}.pt").exists)
        running.release(goal + 1, commits=False)
        running.until(lambda: any(path.name.startswith(".model_step") for path in listed(folder)))
        running.kill_worker(number)
    running.release()
    done = running.wait()
    assert done.code == 0, done.text
    assert "restarted by torchrun" in done.text
    assert_same_bits(straight / f"logs/{RUN_ID}/final.pt", folder / "final.pt")
    assert log_lines(broken) == log_lines(straight)
    assert not [path for path in listed(folder) if path.name.startswith(".model_step")], "debris"


def listed(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []
