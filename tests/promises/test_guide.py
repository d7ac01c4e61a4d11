"""Every command of docs/guide.md is run as it is written, in a folder with a small corpus and small checkpoints."""

from __future__ import annotations

import re
import shlex
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import harness
from tests.harness import ROOT, RUN_ID, Running, train, write_shard

GUIDE = ROOT / "docs" / "guide.md"
USERS = ROOT.parent / "shared" / "guide" / "CHECKPOINT_RESUMPTION_GUIDE.md"
CRAFTED = (256, 1024)


def commands(path: Path) -> list[list[str]]:
    """The torchrun command lines in the ```bash blocks, placeholders filled in."""
    blocks = re.findall(r"```bash\n(.*?)```", path.read_text(), re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    found = [line.replace("<run_id>", RUN_ID) for line in lines if line.startswith("torchrun")]
    return [[word for word in shlex.split(line, comments=True) if not word.endswith("...")] for line in found]


COMMANDS = commands(GUIDE)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FineWeb's file names with a small corpus, and checkpoints of a d2 at the steps that the guide talks about."""
    folder = tmp_path_factory.mktemp("guide")
    write_shard(folder / "data/fineweb10B/fineweb_train_000001.bin", harness.learnable(60_000))
    write_shard(folder / "data/fineweb10B/fineweb_val_000000.bin", harness.learnable(3_000, 10**6))
    settings = {"input_bin": None, "input_val_bin": None, "run_id": RUN_ID, "num_iterations": 1, "warmdown_iters": 0}
    settings |= {"model": "d2"}
    train(folder, {**settings, "warmup_iters": 0, "sequence_length": 64, "grad_accumulation_steps": 1}, processes=None)
    home = folder / "logs" / RUN_ID
    saved = torch.load(home / "final.pt", weights_only=True)
    for step in CRAFTED:
        torch.save(at_step(saved, step), home / f"model_step{step:06d}.pt")
    torch.save(at_step(saved, 4768), home / "final.pt")
    torch.save({"model": saved["model"], "step": 100}, folder / "old.pt")
    return folder


def at_step(saved: dict[str, Any], step: int) -> dict[str, Any]:
    """The checkpoint as if `step` updates had been made."""
    return {**saved, "step": step, "progress": {**saved["progress"], "step": step}}


def value(command: list[str], flag: str) -> str:
    return command[command.index(flag) + 1] if flag in command else ""


def test_the_users_guide_is_in_ours() -> None:
    """Every command that the user wrote stands in our guide."""
    if not USERS.exists():
        pytest.skip("the user's guide is not beside this checkout")
    ours = {" ".join(command) for command in COMMANDS}
    for command in commands(USERS):
        named = " ".join(command)
        assert named in ours, named


@pytest.mark.parametrize("number", range(len(COMMANDS)))
def test_a_command_of_the_guide(workshop: Path, tmp_path: Path, number: int) -> None:
    """It trains from where it says, and a SIGTERM after its first steps leaves a checkpoint."""
    command = COMMANDS[number]
    shutil.copytree(workshop, tmp_path / "run", symlinks=True)
    folder = tmp_path / "run"
    resumed = value(command, "--resume_from")
    if resumed.endswith("model_step000005.pt"):
        pytest.skip("the guide's own test has a test of its own")
    processes = int(re.sub(r"\D", "", command[2]))
    running = harness.launch(folder, [*command[4:], "--grace_seconds", "0"], processes)
    started = {"model_step000256.pt": 257, "model_step001024.pt": 1025, "final.pt": 4769}.get(Path(resumed).name, 1)
    said = follow_until(running, f"step:{started}/{value(command, '--num_iterations') or 10} | loss ")
    signal_workers(running)
    done = running.wait()
    done.out = said + done.out
    assert "stopped by SIGTERM" in done.text or f"/{started} |" in done.text, done.text
    if resumed and "--fork" not in command:
        assert "model mismatch - checkpoint: d2, current: d12" in done.text or "--model" not in command
        log = Path(folder, value(command, "--output_dir") or f"logs/{RUN_ID}") / f"{RUN_ID}.log"
        assert f"\ns:{started} trn:" in log.read_text()


def follow_until(running: Running, text: str) -> str:
    """Read what the program says until it says this, and return it."""
    assert running.process.stdout is not None
    said = []
    for line in running.process.stdout:
        said.append(line)
        if line.startswith(text):
            return "".join(said)
    _, err = running.process.communicate()
    raise AssertionError(f"it never said {text!r}\n{''.join(said)}\n{err}")


def signal_workers(running: Running) -> None:
    import os

    for pid in running.workers():
        os.kill(pid, signal.SIGTERM)


@pytest.mark.first
@pytest.mark.timeout(1800)
def test_the_guides_own_test(tmp_path: Path) -> None:
    """Its section "Testing" as typed, on d12 and the built-in corpus: resuming shows the losses of the unbroken run."""
    first, second = (command for command in COMMANDS[-2:])
    assert "--save_every" in first and value(second, "--resume_from").endswith("model_step000005.pt")
    done = harness.launch(tmp_path, first[4:]).wait(600)
    assert done.code == 0, done.text
    run_id = harness.run_folder(tmp_path).name
    second = [word.replace(RUN_ID, run_id) for word in second]
    done = harness.launch(tmp_path, second[4:]).wait(600)
    assert done.code == 0 and "steps 6-10 repeated: identical" in done.text, done.text
    assert [line.split()[0] for line in harness.log_lines(tmp_path)] == [f"s:{step}" for step in range(1, 11)]
