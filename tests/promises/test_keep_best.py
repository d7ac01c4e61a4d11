"""--keep_best: the best checkpoints stay and have a name, after kills, through the mirror and in other folders."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.harness import OTHER_ID, RUN_ID, arguments, assert_same_bits, launch, train, write_corpus
from unbroken.__main__ import main

# At this rate the validation loss goes up and down: 3 is the lowest, then 10, 9, 4, 2.
CHANGES: dict[str, Any] = {
    **{"run_id": RUN_ID, "num_iterations": 10, "batch_size": 1, "learning_rate": 0.05, "warmup_iters": 0},
    **{"warmdown_iters": 0, "save_every": 4, "val_loss_every": 1, "val_tokens": 64, "keep_best": 2, "keep_last": 1},
}
RUN = Path("logs") / RUN_ID
THREE, TEN = "model_step000003.pt", "model_step000010.pt"


def left(folder: Path) -> tuple[list[str], str]:
    """The names of the checkpoints in a run's folder, and where best.pt leads."""
    return sorted(path.name for path in folder.glob("*.pt")), os.readlink(folder / "best.pt")


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without an interruption, with a copy in a storage."""
    folder = tmp_path_factory.mktemp("straight")
    write_corpus(folder)
    train(folder, {**CHANGES, "mirror": f"file://{folder}/storage"}, processes=None)
    return folder


def test_killed_and_on_two_processes(straight: Path, tmp_path: Path) -> None:
    assert left(straight / RUN) == (["best.pt", "final.pt", THREE, TEN], THREE)
    write_corpus(tmp_path)
    running = launch(tmp_path, arguments(CHANGES), 2, pace=0.3)
    running.kill_at(5)
    assert os.readlink(tmp_path / RUN / "best.pt") == THREE
    train(tmp_path, {**CHANGES, "resume_from": RUN_ID}, processes=None)
    assert left(tmp_path / RUN) == left(straight / RUN)
    for name in ("best.pt", "final.pt"):
        assert_same_bits(straight / RUN / name, tmp_path / RUN / name)
        one, other = (torch.load(folder / RUN / name)["progress"] for folder in (straight, tmp_path))
        assert one["best"] == other["best"] and one["saved_for"] == other["saved_for"]


def test_the_tools_know_it(straight: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(straight)
    for word in ("best", f"{RUN_ID[:6]}/best", f"{RUN}/best", f"{RUN}/best.pt"):
        assert main(["verify", word]) == 0 and f"{RUN}/{THREE}" in capsys.readouterr().out
    assert main(["ls"]) == 0 and f"{THREE} = best" in capsys.readouterr().out
    assert main(["show", "latest"]) == 0 and f"{RUN}/final.pt" in capsys.readouterr().out
    assert main(["show", f"{OTHER_ID}/best"]) == 2 and capsys.readouterr().err.count("\n") == 1


def test_it_comes_back_from_the_storage_with_the_folder_renamed(straight: Path, tmp_path: Path) -> None:
    """The two best are downloaded with the newest; the link is relative; --init_from and --resume_from take it."""
    write_corpus(tmp_path)
    shutil.copytree(straight / "storage", tmp_path / "storage")
    typed = {**CHANGES, "mirror": f"file://{tmp_path}/storage", "num_iterations": 11}
    train(tmp_path, {**typed, "resume_from": RUN_ID}, processes=None)
    assert left(tmp_path / RUN)[1] == THREE
    os.rename(tmp_path / "logs", tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere" / RUN_ID / "best.pt").is_file()
    shutil.rmtree(tmp_path / "elsewhere")
    best = f"{typed['mirror']}/{RUN_ID}/best"
    back = {**CHANGES, "resume_from": best, "num_iterations": 4, "keep_best": 1, "learning_rate": 1e-9}
    done = train(tmp_path, back, processes=None)
    assert f"{RUN}/{THREE} at step 3" in done.out
    assert left(tmp_path / RUN) == (["best.pt", "final.pt", THREE, "model_step000004.pt"], THREE)

    forked = {**back, "resume_from": f"{RUN_ID}/best", "run_id": OTHER_ID, "fork": True}
    train(tmp_path, forked, processes=None)  # the parent's best is not in this folder
    assert left(tmp_path / "logs" / OTHER_ID)[1] == "model_step000004.pt"
    began = {"init_from": f"{RUN_ID}/best", "model": None, "num_iterations": 0, "run_id": None}
    done = train(tmp_path, began, processes=None)
    assert f"init_from: {RUN}/{THREE}" in "".join(
        path.read_text() for path in tmp_path.glob("logs/*/config.yaml") if path.parent.name not in (RUN_ID, OTHER_ID)
    )


def test_going_back_leaves_no_link_to_what_is_overtaken(straight: Path, tmp_path: Path) -> None:
    """Also in a copy that has a file instead of the link; without --keep_best there is no best.pt any more."""
    write_corpus(tmp_path)
    shutil.copytree(straight / RUN, tmp_path / RUN, symlinks=False)
    typed = {**CHANGES, "num_iterations": 5, "run_id": None}
    train(tmp_path, {**typed, "resume_from": f"{RUN}/{THREE}"}, processes=None)
    assert left(tmp_path / RUN) == (["best.pt", "final.pt", THREE, "model_step000004.pt"], THREE)
    assert sorted(path.name for path in tmp_path.glob(f"{RUN}/overtaken-*/*")) == ["best.pt", "final.pt", TEN]
    train(tmp_path, {**typed, "num_iterations": 6, "resume_from": RUN_ID, "keep_best": 0}, processes=None)
    assert not os.path.lexists(tmp_path / RUN / "best.pt")
