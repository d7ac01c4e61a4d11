"""A run lives where its folder is: renamed, moved, copied or named from another folder, it goes on there."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from tests import fork_server
from tests.harness import ROOT, RUN_ID, SHORT, contents, environment, run, trained


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 3 steps with checkpoints of 2 and 3."""
    return trained(tmp_path_factory.mktemp("finished"), {**SHORT, "grad_accumulation_steps": 2})


def tool(folder: Path, *typed: str) -> str:
    env = environment({"PYTHONPATH": str(ROOT)})
    command = [sys.executable, "-m", "unbroken", *typed]
    return str(fork_server.run(command, cwd=folder, env=env, capture_output=True, text=True, check=True).stdout)


def goes_on_in(folder: Path, home: Path, named: str) -> None:
    """The run takes one more step, and only in its `home`."""
    elsewhere = contents(folder / "logs") if not home.is_relative_to(folder / "logs") else {}
    log = home / f"{RUN_ID}.log"
    done = run(folder, "--resume_from", named, "--num_iterations", "4")
    assert done.code == 0 and f"resuming run {RUN_ID}" in done.out and "at step 3" in done.out, done.text
    assert (home / "model_step000003.pt").exists() and "s:4 trn:" in log.read_text()
    assert not [path for path in (folder / "logs").iterdir() if path.name == RUN_ID and path != home]
    assert not elsewhere or contents(folder / "logs") == elsewhere


@pytest.mark.parametrize("named", ["logs/best", "logs/best/final.pt", RUN_ID, RUN_ID[:6], "latest", "auto"])
def test_a_renamed_run(folder: Path, named: str) -> None:
    (folder / "logs" / RUN_ID).rename(folder / "logs/best")
    goes_on_in(folder, folder / "logs/best", named)


def test_the_tools_find_a_renamed_run(folder: Path) -> None:
    (folder / "logs" / RUN_ID).rename(folder / "logs/best")
    for named in ([], [RUN_ID], ["logs/best"]):
        assert "final.pt" in tool(folder, "ls", *named)
    assert "loss" in tool(folder, "plot", "--terminal")


@pytest.mark.parametrize("named", ["", "/final.pt"])
@pytest.mark.parametrize("name", [RUN_ID, "mine"])
def test_a_run_that_was_moved_out_of_logs(folder: Path, name: str, named: str) -> None:
    (folder / "archive").mkdir()
    (folder / "logs" / RUN_ID).rename(folder / "archive" / name)
    goes_on_in(folder, folder / "archive" / name, f"archive/{name}{named}")


def test_a_copy_goes_on_by_itself(folder: Path) -> None:
    """The original stays as it is."""
    shutil.copytree(folder / "logs" / RUN_ID, folder / "copy", symlinks=True)
    before = contents(folder / "logs")
    done = run(folder, "--resume_from", str(folder / "copy"), "--num_iterations", "4")
    assert done.code == 0 and (folder / "copy/final.pt").exists(), done.text
    assert contents(folder / "logs") == before


def test_from_another_working_folder(folder: Path) -> None:
    """With --output_dir the log is where it was; beside the checkpoint it is found at once."""
    other = folder / "other"
    other.mkdir()
    shards = [f"--input_bin={folder}/data/train_*.bin", f"--input_val_bin={folder}/data/val_*.bin"]
    done = run(other, "--resume_from", f"../logs/{RUN_ID}/final.pt", "--num_iterations", "4", *shards)
    assert done.code == 0 and "lacks the losses" not in done.out and not (other / "logs").exists(), done.text
    assert "s:4 trn:" in (folder / "logs" / RUN_ID / f"{RUN_ID}.log").read_text()


def test_a_checkpoint_in_no_run_s_folder_belongs_to_logs(folder: Path) -> None:
    shutil.copy(folder / "logs" / RUN_ID / "final.pt", folder / "kept.pt")
    done = run(folder, "--resume_from", "kept.pt", "--num_iterations", "4")
    assert done.code == 0 and "s:4 trn:" in (folder / "logs" / RUN_ID / f"{RUN_ID}.log").read_text(), done.text


def test_a_logs_link_that_leads_nowhere_is_named(folder: Path) -> None:
    (folder / "logs").rename(folder / "away")
    (folder / "logs").symlink_to("/nowhere/at/all")
    done = run(folder, "--resume_from", "auto")
    assert done.code == 2 and f"{folder}/logs is a link to /nowhere/at/all, which is not there" in done.err, done.text


def test_a_first_start_says_where_it_looked(folder: Path) -> None:
    shutil.rmtree(folder / "logs")
    typed = ["--resume_from", "auto", "--model", "d2", "--num_iterations", "1", "--input_bin", "data/train_*.bin"]
    done = run(folder, *typed)
    assert done.code == 0 and f"there is no checkpoint under {folder}/logs: a new run begins" in done.out, done.text
