"""The doctor: it says what holds, and where something does not, the step and the operation."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import fork_server, harness
from tests.harness import write_corpus
from unbroken.__main__ import main
from unbroken.commands import doctor as doctor_command
from unbroken.config import AUTO


def doctor(folder: Path, *typed: str) -> subprocess.CompletedProcess[str]:
    write_corpus(folder)
    flags = ["--input_bin", str(folder / "data/train_*.bin"), "--input_val_bin", str(folder / "data/val_*.bin")]
    flags += ["--model", "tiny", "--batch_size", "1", "--sequence_length", "16", "--threads", "1", "--steps", "3"]
    command = [sys.executable, "-m", "unbroken", "doctor", *flags, *typed]
    return fork_server.run(  # type: ignore[no-any-return]
        command, cwd=harness.ROOT, env=harness.environment(), capture_output=True, text=True, timeout=800
    )


def test_a_healthy_machine(tmp_path: Path) -> None:
    done = doctor(tmp_path, "--grad_accumulation_steps", "2", "--processes", "1,2")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split("  ")[1:] for line in done.stdout.splitlines()[1:-1]]
    assert [row[0].strip() for row in rows] == [
        "the same command again",
        "killed and resumed",
        "2 processes",
        "1 -> 2 -> 1 processes, killed between",
    ]
    assert all(row[-1].strip() == "identical" for row in rows), done.stdout


@pytest.mark.first
def test_a_sum_in_another_order_is_found(tmp_path: Path) -> None:
    """Three processes add in another order than one: the first operation they do not share is an addition."""
    done = doctor(tmp_path, "--grad_accumulation_steps", "4", "--processes", "1,3", "--json")
    assert done.returncode == 1, done.stdout + done.stderr
    trials = {trial["trial"]: trial for trial in json.loads(done.stdout)["trials"]}
    assert trials["killed and resumed"]["identical"]
    assert not trials["3 processes"]["identical"]
    assert trials["3 processes"]["where"].startswith("step 1, aten.add_.Tensor (operation ")
    assert "bits may differ" in trials["3 processes"]["notice"]


def test_it_counts_the_sequences_of_a_step_however_they_are_typed(tmp_path: Path, monkeypatch: Any) -> None:
    """And tries nothing that would reach out of its folder."""
    write_corpus(tmp_path)
    (tmp_path / "run.yaml").write_text("model: d2\nsequence_length: 16\nbatch_size: auto\n")
    monkeypatch.chdir(tmp_path)
    lines: list[dict[str, Any]] = []

    class Noted(doctor_command.Lab):
        def train(self, trial: doctor_command.Trial, traced: bool = False) -> tuple[Path, str]:
            lines.append({**self.settings, "processes": trial.processes})
            return tmp_path, ""

        def compare(self, trial: doctor_command.Trial, straight: Path) -> doctor_command.Verdict:
            self.train(trial)
            return doctor_command.Verdict(trial.name, True, "", "")

    monkeypatch.setattr(doctor_command, "Lab", Noted)
    monkeypatch.setattr(doctor_command, "_microbatch", lambda _: {"batch_size": 2, "grad_accumulation_steps": 2})
    flags = ["--config", "run.yaml", "--input_bin", "data/train_*.bin", "--mirror", "s3://bucket/runs", "--keep_last=1"]
    typed = ["doctor", *flags, "--total_batch_size", "64", "--processes", "1,4"]
    assert main(typed) == 0
    assert lines[0]["processes"] == (1,) and (4,) in [line["processes"] for line in lines]
    assert lines[0]["batch_size"] == AUTO and all(line["batch_size"] == 2 for line in lines[1:])
    assert not {"mirror", "keep_last"} & set(lines[0])
    assert main([*typed[:-1], "5"]) == 2
