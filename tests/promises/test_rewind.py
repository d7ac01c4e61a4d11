"""Which checkpoint a run goes on from, and what becomes of the others: none that is whole is ever replaced unseen."""

from __future__ import annotations

import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests import harness
from tests.harness import (
    OTHER_ID,
    RUN_ID,
    SHORT,
    arguments,
    assert_same_bits,
    flip,
    last_step,
    launch,
    run,
    train,
    trained,
)

SIX = {**SHORT, "num_iterations": 6}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 6 steps with checkpoints of 2, 4 and 6."""
    return trained(tmp_path_factory.mktemp("finished"), SIX)


def test_going_back_to_what_was_overtaken_keeps_the_other_course_whole(folder: Path, finished: Path) -> None:
    """Its checkpoint of the same step too, which would be written over."""
    home = folder / "logs" / RUN_ID
    done = run(folder, "--resume_from", f"logs/{RUN_ID}/model_step000002.pt", "--learning_rate", "5e-3")
    assert done.code == 0, done.text
    other = {name: (home / name).read_bytes() for name in ("model_step000004.pt", "model_step000006.pt", "final.pt")}
    done = run(folder, "--resume_from", f"logs/{RUN_ID}/overtaken-1/model_step000004.pt")
    assert done.code == 0 and "going back to step 4: model_step000004.pt, model_step000006.pt, final.pt" in done.out
    assert other == {name: (home / "overtaken-2" / name).read_bytes() for name in other}
    assert_same_bits(finished / "logs" / RUN_ID / "final.pt", home / "final.pt")


def test_diverged_weights_are_not_continued_while_there_are_sound_ones(folder: Path, finished: Path) -> None:
    """Of a run that was killed after them; the end of a run is its end, whatever it holds."""
    home = folder / "logs" / RUN_ID
    typed = arguments({**SIX, "resume_from": "auto"})
    spoil(home / "model_step000006.pt")
    (home / "final.pt").unlink()
    done = run(folder, *typed)
    said = "passing over logs/.*model_step000006.pt: its weights are NaN or infinite"
    assert done.code == 0 and re.search(said, done.text) and "at step 4" in done.text, done.text
    assert_same_bits(finished / "logs" / RUN_ID / "final.pt", home / "final.pt")
    for step in (2, 4, 6):
        spoil(home / f"model_step00000{step}.pt")
    (home / "final.pt").unlink()
    done = run(folder, *typed)
    assert done.code == 0 and "passing over" not in done.text and "model_step000006.pt at step 6" in done.text, (
        done.text
    )


@pytest.mark.parametrize(
    ("named", "flag", "same", "longer"),
    [
        ("auto", "--num_iterations", "6", "7"),
        ("latest", "--num_tokens", "768", "800"),
        (RUN_ID, "--num_epochs", "0.128", "0.145"),
    ],
)
def test_a_run_that_ended_diverged_is_extended_from_the_last_sound_weights(
    folder: Path, named: str, flag: str, same: str, longer: str
) -> None:
    """Its end stays its end until a length that is larger is typed, in steps, tokens or epochs."""
    home = folder / "logs" / RUN_ID
    for name in ("final.pt", "model_step000006.pt"):
        spoil(home / name)
    done = run(folder, "--resume_from", named, flag, same)
    assert done.code == 0 and "nothing to do" in done.out, done.text
    done = run(folder, "--resume_from", named, flag, longer)
    said = "passing over logs/.*final.pt: its weights are NaN or infinite"
    assert done.code == 0 and re.search(said, done.text) and "at step 4" in done.text, done.text
    saved = torch.load(home / "final.pt", weights_only=True)
    assert saved["step"] == 7 and all(bool(weight.isfinite().all()) for weight in saved["model"].values())
    assert (home / "overtaken-1/final.pt").exists()


def spoil(path: Path) -> None:
    """Give a checkpoint a weight that is NaN, with right checksums."""
    saved = torch.load(path, weights_only=True)
    saved["model"]["transformer.wte.weight"][3, 3] = math.nan
    path.unlink()
    torch.save(saved, path)


def test_the_only_whole_file_of_the_old_end_stays(folder: Path) -> None:
    home = folder / "logs" / RUN_ID
    flip(home / "model_step000006.pt")
    old = (home / "final.pt").read_bytes()
    done = run(folder, "--resume_from", RUN_ID, "--num_iterations", "7")
    assert done.code == 0 and (home / "model_step000006.pt").read_bytes() == old, done.text
    assert (home / "overtaken-1/model_step000006.pt").exists()


def test_a_run_s_folder_with_another_run_s_checkpoints(folder: Path) -> None:
    shutil.copytree(folder / "logs" / RUN_ID, folder / "logs" / OTHER_ID)
    (folder / "logs" / OTHER_ID / "model_step000006.pt").unlink()
    before = {path: path.read_bytes() for path in folder.glob("logs/*/*.pt")}
    done = run(folder, "--resume_from", OTHER_ID, "--num_iterations", "7")
    assert done.code == 2 and f"is a checkpoint of run {RUN_ID}: type its path" in done.err, done.text
    assert before == {path: path.read_bytes() for path in folder.glob("logs/*/*.pt")}


def test_a_run_s_folder_may_be_a_link(folder: Path) -> None:
    os.rename(folder / "logs" / RUN_ID, folder / "large")
    (folder / "logs" / RUN_ID).symlink_to("../large")
    done = run(folder, "--resume_from", "auto", "--num_iterations", "7")
    assert done.code == 0 and f"resuming run {RUN_ID}" in done.out, done.text
    assert [path.name for path in (folder / "logs").iterdir()] == [RUN_ID]


# ---- a worker that torchrun restarts ---------------------------------------------------------------------------------


def killed_once(running: harness.Running, step: int) -> harness.Done:
    running.until(lambda: last_step(running.folder) >= step)
    running.kill_worker(0)
    running.release()
    return running.wait()


def test_a_worker_restarted_before_its_first_save_begins_its_own_run_again(folder: Path, tmp_path: Path) -> None:
    """Though another job has saved in the same logs/ meanwhile."""
    hidden = tmp_path / "hidden"
    os.rename(folder / "logs", hidden)
    typed = arguments({**SIX, "run_id": None, "save_every": 0, "resume_from": "auto"})
    running = launch(folder, typed, 1, ["--max-restarts=1"], hold=2)
    running.until(lambda: last_step(folder) >= 2)
    (own,) = (path.name for path in (folder / "logs").iterdir())
    os.rename(hidden / RUN_ID, folder / "logs" / RUN_ID)
    done = killed_once(running, 2)
    assert done.code == 0 and f"continuing run {own}" in done.out and RUN_ID not in done.out, done.text
    assert (folder / "logs" / own / "final.pt").exists()


def test_a_worker_goes_on_from_what_its_attempt_began_with(folder: Path) -> None:
    """A file from elsewhere, newer than what the run's folder has: it is saved there at once."""
    home = folder / "logs" / RUN_ID
    os.rename(home / "final.pt", folder / "elsewhere.pt")
    (home / "model_step000006.pt").unlink()
    typed = ["--resume_from", "elsewhere.pt", "--num_iterations", "11", "--save_every", "0"]
    done = killed_once(launch(folder, typed, 1, ["--max-restarts=1"], hold=8), 8)
    assert done.code == 0 and f"from logs/{RUN_ID}/model_step000006.pt at step 6" in done.out, done.text
    assert "repeated: identical" in done.out


def test_who_sets_rank_without_torchrun_restarts_nobody(folder: Path) -> None:
    """The second command of a script is a run of its own."""
    env = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    shutil.rmtree(folder / "logs")
    for seed in (1, 2):  # by the same parent
        done = train(folder, {**SHORT, "run_id": None, "num_iterations": 1, "seed": seed}, None, env=env)
        assert done.out.count("new run ") == 1, done.text
    assert len(list((folder / "logs").iterdir())) == 2


def test_variables_set_by_hand_are_no_torchrun(folder: Path) -> None:
    """The process that started it ends at once: training stopped after a step, with exit code 0."""
    env = {"RANK": "0", "WORLD_SIZE": "1", "PACE": "0.1"}
    command = shlex.join([sys.executable, str(harness.PACED), "--resume_from", RUN_ID, "--num_iterations", "16"])
    (folder / "said").touch()
    script = f"setsid {command} > said 2>&1 & exit 0"
    subprocess.run(["bash", "-c", script], cwd=folder, env=harness.environment(env), check=True)
    end = time.monotonic() + 60
    while "peak memory" not in (said := (folder / "said").read_text()) and "stopped by" not in said:
        assert time.monotonic() < end, said
        time.sleep(0.1)
    assert "stopped by" not in said and last_step(folder) == 16, said


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR is not set, but WORLD_SIZE is 2"),
        ({"RANK": "2", "WORLD_SIZE": "1"}, "RANK is 2, but WORLD_SIZE is 1"),
        ({"RANK": "first"}, "RANK is 'first', not a number"),
    ],
)
def test_variables_that_make_no_sense_are_one_line(folder: Path, env: dict[str, str], says: str) -> None:
    done = launch(folder, ["--resume_from", RUN_ID], processes=None, env=env).wait()
    assert done.code == 2 and says in done.err and done.err.count("\n") == 1, done.text
