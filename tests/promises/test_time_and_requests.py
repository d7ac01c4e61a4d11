"""An attempt that has so many hours saves in time; a checkpoint is saved when it is asked for, and named."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import harness
from tests.harness import ROOT, RUN_ID, arguments, assert_same_bits, launch, run, train, write_corpus

SETTINGS = {"run_id": RUN_ID, "num_iterations": 2000, "save_every": 0, "warmdown_iters": 0}
FOLDER = Path("logs") / RUN_ID


def test_an_attempt_ends_in_time_and_the_next_goes_on(tmp_path: Path) -> None:
    straight, limited = tmp_path / "straight", tmp_path / "limited"
    for folder in (straight, limited):
        write_corpus(folder)
    seconds = 36.0
    changes = {**SETTINGS, "max_hours": seconds / 3600}
    done = launch(limited, arguments(changes), 2, ["--max-restarts=1"], pace=0.3).wait()
    assert done.code == 1, "not 0, that of a finished run; nor does torchrun start it again"
    (step,) = re.findall(r"stopped by --max_hours 0.01 at step (\d+); continue with --resume_from \S+\n\Z", done.out)
    assert 0 < int(step) < 2000
    events = [json.loads(line) for line in next(limited.glob("logs/*/*.metrics.jsonl")).read_text().splitlines()]
    took = events[-1]["wall"] - events[0]["began"]  # the start of torchrun is not counted
    assert events[-1]["event"] == "end" and took < seconds, took
    changes = {**SETTINGS, "num_iterations": int(step) + 3}
    assert "max_hours" not in train(limited, {**changes, "resume_from": RUN_ID}).out
    train(straight, changes, processes=None)
    assert_same_bits(straight / FOLDER / "final.pt", limited / FOLDER / "final.pt")


def ask(folder: Path) -> subprocess.CompletedProcess[str]:
    env = harness.environment({"PYTHONPATH": str(ROOT)})
    command = [sys.executable, "-m", "unbroken", "save", RUN_ID]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=env)


@pytest.mark.parametrize("processes", [None, 2])
def test_a_checkpoint_is_saved_when_it_is_asked_for(tmp_path: Path, processes: int | None) -> None:
    write_corpus(tmp_path)
    running = launch(tmp_path, arguments(SETTINGS), processes, pace=0.1)
    running.until(lambda: harness.last_step(tmp_path) >= 2)
    done = ask(tmp_path)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    path = tmp_path / done.stdout.strip()
    assert re.fullmatch(r"model_step\d{6}\.pt", path.name) and path.is_file()
    (tmp_path / FOLDER / "save").touch()
    running.until(lambda: not (tmp_path / FOLDER / "save").exists())
    named = tmp_path / FOLDER / (tmp_path / FOLDER / "saved").read_text().strip()
    assert named.is_file() and named.name > path.name
    running.kill()
    running.wait()
    done = ask(tmp_path)
    assert done.returncode == 2 and "this run is not being trained" in done.stderr, done.stderr
    assert not (tmp_path / FOLDER / "save").exists()


def test_a_request_at_the_end_is_answered_by_the_final_checkpoint(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    request = tmp_path / FOLDER / "save"
    request.parent.mkdir(parents=True)
    running = launch(tmp_path, arguments({**SETTINGS, "num_iterations": 4, "val_loss_every": 4}), None, hold=4)
    running.until(lambda: harness.last_step(tmp_path) >= 4)  # in its validation
    request.touch()
    running.release()
    assert running.wait().code == 0
    assert (request.parent / "saved").read_text() == "final.pt\n" and not request.exists()


def test_what_asks_in_another_way_is_answered_once(tmp_path: Path) -> None:
    """A folder cannot be removed as a file is: the run goes on, and does not save at every step."""
    write_corpus(tmp_path)
    (tmp_path / FOLDER / "save").mkdir(parents=True)
    done = launch(tmp_path, arguments({**SETTINGS, "num_iterations": 12}), None, pace=0.3).wait()
    assert done.code == 0 and done.out.count("saved logs/") == 2, done.text
    assert run(tmp_path, "--max_hours", "-1").code == 2
