"""GPT-2 with dropout keeps every promise that the other tests check with d2: kills, process counts, audit, doctor."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import fork_server, harness
from tests.harness import RUN_ID, arguments, as_flags, assert_same_bits, launch, log_lines, run, train, write_corpus
from unbroken import config as flags
from unbroken.errors import UserError

DROPOUT = {"model": "gpt2-tiny", "dropout": 0.2, "grad_clip": 1.0}
SETTINGS = {**DROPOUT, "run_id": RUN_ID, "num_iterations": 7, "save_every": 2, "val_loss_every": 3, "replay": 2}
CASES: dict[str, dict[str, Any]] = {"recomputed": {"bias": "off", "activation_checkpointing": "on"}}
LONG = bool(os.environ.get("UNBROKEN_FAMILIES"))  # minutes
if LONG:
    CASES |= {
        "qkv": {"bias": "qkv"},
        "compiled": {"compile": "on", "val_loss_every": 0},
        "compiled, recomputed": {"compile": "on", "val_loss_every": 0, "activation_checkpointing": "on"},
    }


def tool(folder: Path, *typed: str) -> dict[str, Any]:
    """The JSON that a tool prints."""
    command = [sys.executable, "-m", "unbroken", *typed, "--json"]
    env = harness.environment({"PYTHONPATH": str(harness.ROOT)})
    done = fork_server.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("case", CASES)
def test_killed_and_resized(tmp_path: Path, case: str) -> None:
    """4 -> 2 processes with a SIGKILL of everything between, against one process; then an audit on one."""
    settings = {**SETTINGS, **CASES[case]}
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    for folder in (straight, broken):
        write_corpus(folder)
    train(straight, settings, None)
    typed = arguments({**settings, "resume_from": "auto"})
    launch(broken, typed, 4, pace=0.1, hold=3).kill_at(3)
    done = launch(broken, typed, 2).wait()
    assert done.code == 0 and "differ" not in done.text, done.text
    assert_same_bits(straight / f"logs/{RUN_ID}/final.pt", broken / f"logs/{RUN_ID}/final.pt")
    assert log_lines(broken) == log_lines(straight)
    assert tool(broken, "audit", RUN_ID, "--processes", "1")["match"]


@pytest.mark.skipif(not LONG, reason="UNBROKEN_FAMILIES is not set")
def test_the_doctor_finds_nothing(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    changes = {**DROPOUT, "bias": "off", "optimizer": "muon", "batch_size": 1, "grad_accumulation_steps": 2}
    typed = as_flags({**changes, "sequence_length": 16, "threads": 1, "input_bin": "data/train_*.bin"})
    found = tool(tmp_path, "doctor", *typed, "--steps", "2", "--processes", "1,2")
    assert len(found["trials"]) == 4 and all(trial["identical"] for trial in found["trials"])


def test_what_a_family_cannot_do_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--dropout 0.1: d2 has no such setting; leave it out, or type --model gpt2$"):
        flags.merge(flags.parse(["--model", "d2", "--dropout", "0.1"]))
    with pytest.raises(UserError, match="--dropout 1.0: it must be at least 0 and below 1"):
        flags.parse(["--model", "gpt2", "--dropout", "1"])
    write_corpus(tmp_path)
    typed = ("--input_bin", "data/train_*.bin", "--model", "gpt2-tiny", "--sequence_length", "1025")
    done = run(tmp_path, *typed)
    said = "error: a sequence of 1025 tokens: this model has 1024 positions; use a shorter --sequence_length\n"
    assert (done.code, done.err) == (2, said), done.text
