"""--log_every: fewer lines in log, console and trackers; the journal, and what is compared, keep every step."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.harness import RUN_ID, arguments, last_step, launch, log_lines, log_path, trained, write_corpus
from tests.storage import tool
from unbroken.metrics.logfile import LogSchedule
from unbroken.paths import JOURNAL

CHANGES = {"run_id": RUN_ID, "num_iterations": 15, "grad_accumulation_steps": 1, "val_loss_every": 6, "save_every": 5}
CHANGES |= {"log_every": 4, "log_tensorboard": True}
LOGGED = [1, 4, 5, 6, 8, 10, 12, 15]


def steps(text: str) -> list[int]:
    return [int(step) for step in re.findall(r"^s:(\d+) trn:", text, re.M)]


def shown(out: str) -> list[int]:
    return [int(step) for step in re.findall(r"^step:(\d+)/\d+ \| loss", out, re.M)]


def journal(folder: Path) -> Path:
    return log_path(folder).with_suffix(JOURNAL)


def test_the_log_is_the_same_under_kills_and_every_repeated_step_is_compared(tmp_path: Path) -> None:
    """A twin has another loss in the journal of a step that has no line, which the repetition must find."""
    straight = trained(tmp_path / "straight", CHANGES)
    assert steps(log_path(straight).read_text()) == LOGGED
    broken = tmp_path / "broken"
    write_corpus(broken)
    typed = arguments({**CHANGES, "resume_from": "auto"})
    saved = broken / "logs" / RUN_ID / "model_step000005.pt"
    running = launch(broken, typed, processes=None, hold=8)
    running.kill_when(lambda: last_step(broken) == 8 and saved.exists())
    lines = journal(broken).read_text().splitlines()
    reached = max(line["step"] for line in map(json.loads, lines) if "train_loss" in line)
    at = next(i for i, line in enumerate(lines) if '"step": 7' in line and "train_loss" in line)
    wrong = json.loads(lines[at])
    wrong["train_loss"] += 1e-3
    twin = tmp_path / "twin"
    for name in ("data", "logs"):
        shutil.copytree(broken / name, twin / name)
    journal(twin).write_text("\n".join([*lines[:at], json.dumps(wrong), *lines[at + 1 :]]) + "\n")

    done = launch(broken, typed, processes=None).wait()
    assert done.code == 0 and f"steps 6-{reached} repeated: identical" in done.out, done.text
    assert shown(done.out) == [6, *(step for step in LOGGED if step > 6)], done.out
    assert log_lines(broken) == log_lines(straight)
    written = {line["step"] for line in map(json.loads, journal(broken).read_text().splitlines()) if "lr" in line}
    assert written == set(range(1, 16))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(log_path(broken).parent / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train_loss")] == LOGGED
    said = tool(broken, "audit", RUN_ID, "--seal")
    assert said.code == 0, said.text
    checkpoints = json.loads(tool(broken, "ls", "--json").out)["runs"][0]["checkpoints"]
    assert all(line["loss"] is not None for line in checkpoints)

    found = launch(twin, typed, processes=None).wait()
    assert "step 7 repeated: DIFFERS" in found.out, found.text


def test_a_lost_log_gets_the_lines_that_it_had(tmp_path: Path) -> None:
    folder = trained(tmp_path, {**CHANGES, "log_tensorboard": None, "warmdown_iters": 0})
    log_path(folder).write_text("")
    done = launch(folder, ["--resume_from", RUN_ID, "--num_iterations", "16"], processes=None).wait()
    assert done.code == 0 and "WARNING" not in done.text, done.text
    assert steps(log_path(folder).read_text()) == [*LOGGED, 16]


@pytest.mark.parametrize(
    ("flags", "has"),
    [
        ({}, range(1, 13)),
        ({"log_every": 5}, [1, 5, 10, 12]),
        ({"log_every": 100, "save_every": -1}, [1, 12]),
        ({"log_every": 9, "save_steps": "2-6/4"}, [1, 2, 6, 9, 12]),
        ({"log_every": 7, "val_loss_every": 4, "save_every": 6}, [1, 4, 6, 7, 8, 12]),
        ({"log_every": "x", "val_loss_every": None, "save_every": 0, "save_steps": 3.5}, range(1, 13)),
    ],
)
def test_the_schedule(flags: dict[str, object], has: list[int]) -> None:
    schedule = LogSchedule.of({"num_iterations": 12, **flags})
    assert [step for step in range(1, 13) if schedule.has(step)] == list(has)
