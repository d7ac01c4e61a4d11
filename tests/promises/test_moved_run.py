"""A run lives where its folder is: renamed, moved, copied or named from another folder, it goes on there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import ROOT, RUN_ID, SHORT, contents, run, trained


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 3 steps with checkpoints of 2 and 3, whose log is in another folder."""
    return trained(tmp_path_factory.mktemp("finished"), {**SHORT, "grad_accumulation_steps": 2})


@pytest.fixture
def place(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return tmp_path


def tool(place: Path, *typed: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "unbroken", *typed]
    return subprocess.run(command, cwd=place, env=env, capture_output=True, text=True, check=True).stdout


def goes_on_in(place: Path, folder: Path, named: str) -> None:
    """The run takes one more step, and only in this folder."""
    elsewhere = contents(place / "logs") if not folder.is_relative_to(place / "logs") else {}
    log = folder / f"{RUN_ID}.log"
    done = run(place, "--resume_from", named, "--num_iterations", "4")
    assert done.code == 0 and f"resuming run {RUN_ID}" in done.out and "at step 3" in done.out, done.text
    assert (folder / "model_step000003.pt").exists() and "s:4 trn:" in log.read_text()
    assert not [path for path in (place / "logs").iterdir() if path.name == RUN_ID and path != folder]
    assert not elsewhere or contents(place / "logs") == elsewhere


@pytest.mark.parametrize("named", ["logs/best", "logs/best/final.pt", RUN_ID, RUN_ID[:6], "latest", "auto"])
def test_a_renamed_run(place: Path, named: str) -> None:
    (place / "logs" / RUN_ID).rename(place / "logs/best")
    goes_on_in(place, place / "logs/best", named)


def test_the_tools_find_a_renamed_run(place: Path) -> None:
    (place / "logs" / RUN_ID).rename(place / "logs/best")
    for named in ([], [RUN_ID], ["logs/best"]):
        assert "final.pt" in tool(place, "ls", *named)
    assert "loss" in tool(place, "plot", "--terminal")


@pytest.mark.parametrize("named", ["", "/final.pt"])
@pytest.mark.parametrize("name", [RUN_ID, "mine"])
def test_a_run_that_was_moved_out_of_logs(place: Path, name: str, named: str) -> None:
    (place / "archive").mkdir()
    (place / "logs" / RUN_ID).rename(place / "archive" / name)
    goes_on_in(place, place / "archive" / name, f"archive/{name}{named}")


def test_a_copy_goes_on_by_itself(place: Path) -> None:
    """The original stays as it is."""
    shutil.copytree(place / "logs" / RUN_ID, place / "copy", symlinks=True)
    before = contents(place / "logs")
    done = run(place, "--resume_from", str(place / "copy"), "--num_iterations", "4")
    assert done.code == 0 and (place / "copy/final.pt").exists(), done.text
    assert contents(place / "logs") == before


def test_from_another_working_folder(place: Path) -> None:
    """With --output_dir the log is where it was; beside the checkpoint it is found at once."""
    other = place / "other"
    other.mkdir()
    shards = [f"--input_bin={place}/data/train_*.bin", f"--input_val_bin={place}/data/val_*.bin"]
    done = run(other, "--resume_from", f"../logs/{RUN_ID}/final.pt", "--num_iterations", "4", *shards)
    assert done.code == 0 and "lacks the losses" not in done.out and not (other / "logs").exists(), done.text
    assert "s:4 trn:" in (place / "logs" / RUN_ID / f"{RUN_ID}.log").read_text()


def test_a_checkpoint_in_no_run_s_folder_belongs_to_logs(place: Path) -> None:
    shutil.copy(place / "logs" / RUN_ID / "final.pt", place / "kept.pt")
    done = run(place, "--resume_from", "kept.pt", "--num_iterations", "4")
    assert done.code == 0 and "s:4 trn:" in (place / "logs" / RUN_ID / f"{RUN_ID}.log").read_text(), done.text


def test_a_logs_link_that_leads_nowhere_is_named(place: Path) -> None:
    (place / "logs").rename(place / "away")
    (place / "logs").symlink_to("/nowhere/at/all")
    done = run(place, "--resume_from", "auto")
    assert done.code == 2 and f"{place}/logs is a link to /nowhere/at/all, which is not there" in done.err, done.text


def test_a_first_start_says_where_it_looked(place: Path) -> None:
    shutil.rmtree(place / "logs")
    typed = ["--resume_from", "auto", "--model", "d2", "--num_iterations", "1", "--input_bin", "data/train_*.bin"]
    done = run(place, *typed)
    assert done.code == 0 and f"there is no checkpoint under {place}/logs: a new run begins" in done.out, done.text
