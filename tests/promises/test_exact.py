"""C1: a run that is interrupted and resumed leaves the same bits as one that is not."""

from __future__ import annotations

import random
import shutil
import signal
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from tests import harness
from tests.harness import RUN_ID, arguments, assert_same_bits, launch, log_lines, train, write_corpus
from unbroken.config import Config
from unbroken.run.state import Progress
from unbroken.runtime import settings
from unbroken.runtime.settings import ResolvedSettings

# GPT-2's vocabulary, and checkpoints of 83 MB: a kill may come in the middle of a write.
WITH_LARGE_FILES = {"run_id": RUN_ID, "model": "d2"}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 20 steps that nothing interrupted."""
    folder = tmp_path_factory.mktemp("unbroken")
    write_corpus(folder)
    train(folder, {**WITH_LARGE_FILES, "val_loss_every": 7})
    return folder


def prepared(folder: Path) -> Path:
    write_corpus(folder)
    return folder / "logs" / RUN_ID


@pytest.mark.fast
def test_stopped_by_hand_and_resumed_from_a_file(unbroken: Path, tmp_path: Path) -> None:
    """Ten steps, then the file by name and nothing else: C6 takes every other flag from the checkpoint."""
    run = prepared(tmp_path)
    running = launch(tmp_path, arguments({**WITH_LARGE_FILES, "val_loss_every": 7}), hold=12)
    running.kill_when(lambda: (run / "model_step000010.pt").exists())
    shutil.copy(run / "model_step000010.pt", tmp_path / "kept.pt")
    done = launch(tmp_path, ["--resume_from", f"logs/{RUN_ID}/model_step000010.pt"]).wait()
    assert done.code == 0, done.text
    assert_same_bits(unbroken / "logs" / RUN_ID / "final.pt", run / "final.pt")
    assert log_lines(tmp_path) == log_lines(unbroken)


@pytest.mark.parametrize("seed", [1, 2])
def test_killed_at_arbitrary_moments(unbroken: Path, tmp_path: Path, seed: int) -> None:
    """Three SIGKILLs of everything, the same command line each time."""
    run = prepared(tmp_path)
    moments = random.Random(seed)
    typed = arguments({**WITH_LARGE_FILES, "val_loss_every": 7, "resume_from": "auto"})
    for _ in range(3):
        running = launch(tmp_path, typed, pace=0.02, hold=19)
        goal = min(harness.last_step(tmp_path) + moments.randint(1, 6), 17)
        running.kill_at(goal, later=moments.random() * 0.1)
    done = launch(tmp_path, typed).wait()
    assert done.code == 0, done.text
    assert_same_bits(unbroken / "logs" / RUN_ID / "final.pt", run / "final.pt")
    assert log_lines(tmp_path) == log_lines(unbroken)
    assert "repeated: identical" in done.text or "repeated" not in done.text


def test_twin_a_lost_moment_is_seen(unbroken: Path, tmp_path: Path) -> None:
    """The comparison is no formality: one bit of one moment in the checkpoint changes the end of the run."""
    run = prepared(tmp_path)
    source = unbroken / "logs" / RUN_ID / "model_step000010.pt"
    saved = torch.load(source, weights_only=True)
    saved["optimizer"]["state"][0]["exp_avg"].view(-1)[0] += 1e-3
    run.mkdir(parents=True)
    torch.save(saved, run / "model_step000010.pt")
    done = launch(tmp_path, ["--resume_from", f"logs/{RUN_ID}/model_step000010.pt"]).wait()
    assert done.code == 0, done.text
    with pytest.raises(AssertionError, match="differs"):
        assert_same_bits(unbroken / "logs" / RUN_ID / "final.pt", run / "final.pt")


def test_across_epoch_and_shard_boundaries(tmp_path: Path) -> None:
    """A corpus of 300 tokens in three shards: a step of 128 tokens crosses one at almost every step."""
    for name in ("straight", "broken"):
        write_corpus(tmp_path / name, train_tokens=300, shards=3)
    train(tmp_path / "straight", {"run_id": RUN_ID})
    typed = arguments({"run_id": RUN_ID, "resume_from": "auto", "save_every": 3})
    for goal in (4, 10):
        launch(tmp_path / "broken", typed, pace=0.05, hold=goal).kill_at(goal)
    done = launch(tmp_path / "broken", typed).wait()
    assert done.code == 0, done.text
    assert_same_bits(tmp_path / "straight/logs" / RUN_ID / "final.pt", tmp_path / "broken/logs" / RUN_ID / "final.pt")
    assert log_lines(tmp_path / "broken") == log_lines(tmp_path / "straight")


def test_a_signal_saves_and_leaves_at_once(unbroken: Path, tmp_path: Path) -> None:
    """SIGTERM between two saves costs no step: the checkpoint is of the step that was under way."""
    run = prepared(tmp_path)
    typed = arguments({**WITH_LARGE_FILES, "val_loss_every": 7, "save_every": 0})
    running = launch(tmp_path, typed, processes=None, hold=3)
    running.until(lambda: harness.last_step(tmp_path) >= 3)
    running.process.send_signal(signal.SIGTERM)
    running.release()
    done = running.wait()
    assert done.code == 143 and "SIGTERM" in done.text, done.text
    assert len(list(run.glob("model_step*.pt"))) == 1
    done = launch(tmp_path, ["--resume_from", RUN_ID], processes=None).wait()
    assert done.code == 0 and "repeated" not in done.text, done.text
    assert_same_bits(unbroken / "logs" / RUN_ID / "final.pt", run / "final.pt")
    assert log_lines(tmp_path) == log_lines(unbroken)


def test_a_signal_during_the_last_validation(tmp_path: Path) -> None:
    """The final checkpoint is the one of an unbroken run to the last value, its validation loss and rate included."""
    changes = {"run_id": RUN_ID, "val_loss_every": 3, "val_batch_size": 1, "num_iterations": 3}
    for name in ("straight", "broken"):
        write_corpus(tmp_path / name, val_tokens=1300)
    train(tmp_path / "straight", changes, None)
    running = launch(tmp_path / "broken", arguments(changes), None, hold=3)
    running.until(lambda: harness.last_step(tmp_path / "broken") == 3)
    running.process.send_signal(signal.SIGTERM)
    running.release()
    done = running.wait()
    assert "stopped by SIGTERM at step 3" in done.text, done.text
    done = launch(tmp_path / "broken", ["--resume_from", RUN_ID], None).wait()
    assert done.code == 0, done.text
    ends = [tmp_path / name / "logs" / RUN_ID / "final.pt" for name in ("straight", "broken")]
    assert_same_bits(*ends)
    left, right = (torch.load(path, weights_only=True)["progress"] for path in ends)
    for progress in (left, right):
        del progress["history"]["training_seconds"], progress["saved_at"]
    assert left == right and left["validated"] == 3
    assert log_lines(tmp_path / "broken") == log_lines(tmp_path / "straight")


# Both runs generate code; what the compiler makes of a text it makes once: 17 kernels of two seconds each.
COMPILER = """#!{python}
import hashlib, os, shutil, subprocess, sys
from pathlib import Path
words = sys.argv[1:]
sources = [Path(word) for word in words if word.endswith(".cpp")]
if "-o" not in words or not sources:
    os.execv("{real}", ["{real}", *words])
made = words[words.index("-o") + 1]
text = repr([os.path.basename(word) for word in words]).encode() + b"".join(path.read_bytes() for path in sources)
kept = Path("{folder}", hashlib.sha256(text).hexdigest())
if not kept.exists():
    code = subprocess.call(["{real}", *words])
    if code:
        sys.exit(code)
    shutil.copy(made, f"{{kept}}.{{os.getpid()}}")
    os.rename(f"{{kept}}.{{os.getpid()}}", kept)
else:
    shutil.copy(kept, made)
"""


@pytest.fixture
def compiler(tmp_path: Path) -> dict[str, str]:
    """The environment of a process whose C++ compiler keeps what it has made."""
    folder, real = tmp_path / "made", shutil.which(settings.cpp_compiler())
    folder.mkdir()
    compiler = tmp_path / Path(real or "g++").name
    compiler.write_text(COMPILER.format(python=sys.executable, real=real, folder=folder))
    compiler.chmod(0o755)
    return {"CXX": str(compiler)}


def test_compiled(tmp_path: Path, compiler: dict[str, str]) -> None:
    """The same promise for generated code, and no false alarm when every step's first microbatch is computed twice."""
    changes = {"run_id": RUN_ID, "compile": "on", "num_iterations": 8, "save_every": 4}
    for name in ("straight", "broken"):
        write_corpus(tmp_path / name)
    train(tmp_path / "straight", {**changes, "replay": 1}, env=compiler)
    typed = arguments({**changes, "resume_from": "auto"})
    launch(tmp_path / "broken", typed, env=compiler, pace=0.2, hold=5).kill_at(5)
    done = launch(tmp_path / "broken", ["--resume_from", "auto"], env=compiler).wait()
    assert done.code == 0, done.text
    assert_same_bits(tmp_path / "straight/logs" / RUN_ID / "final.pt", tmp_path / "broken/logs" / RUN_ID / "final.pt")


def test_out_of_memory_and_resumed(tmp_path: Path) -> None:
    """Halved twice in the first step: an attempt that finds the parts in its checkpoint adds them in the same order.

    With a model that draws random numbers, and updates that come before a snapshot would be through.
    """
    write_corpus(tmp_path)
    changes = {"run_id": RUN_ID, "batch_size": 4, "grad_accumulation_steps": 1, "num_iterations": 6, "save_every": 2}
    traced = harness.ROOT / "tests/traced_training.py"
    done = train(tmp_path, changes, None, script=traced, env={"MOST_SEQUENCES": "1", "HARD": "1"})
    assert done.text.count("CUDA out of memory: going on with microbatches of") == 2
    run = tmp_path / "logs" / RUN_ID
    typed = ["--resume_from", str(run / "model_step000002.pt")]
    done = launch(tmp_path, typed, None, script=traced, env={"HARD": "1"}).wait()
    assert done.code == 0 and "steps 3-6 repeated: identical" in done.text, done.text
    assert_same_bits(run / "overtaken-1/final.pt", run / "final.pt")


def test_progress_is_restored_to_the_last_field() -> None:
    """Each with a value that a new run has not."""
    rewarm = {"step": 3, "learning_rate": 0.1, "steps": 2}
    batch = {"tokens": 4, "sha256": "x"}
    parent = {"run_id": RUN_ID, "step": 1, "file": "a.pt", "sha256": "x"}
    lists = ([[128, 256]], [[1, 2]], [[5, 2.5]], "best")
    kept = Progress(7, 896, 2, 4, 6, {"digest": "x"}, rewarm, batch, parent, {"seed": 1}, 2.0, *lists)
    assert all(value != getattr(Progress(), name) for name, value in asdict(kept).items())
    assert Progress.from_checkpoint(asdict(kept)) == kept


def test_what_auto_became_is_kept() -> None:
    """On a machine that would choose otherwise."""
    saved = {"dtype": "bf16", "compile": True, "threads": 3}
    assert ResolvedSettings.resolve(Config(), saved, torch.device("cpu"), {}) == ResolvedSettings("bf16", True, 3)
    typed = {"dtype": "fp32", "compile": "off", "threads": 2}
    assert ResolvedSettings.resolve(Config(**typed), saved, torch.device("cpu"), typed) == ResolvedSettings(
        "fp32", False, 2
    )


def test_training_goes_somewhere(unbroken: Path) -> None:
    """The loss falls, so that a lost state would show."""
    losses = [float(line.split("trn:")[1]) for line in log_lines(unbroken) if "trn:" in line]
    assert len(losses) == 20 and losses[-1] < losses[0] - 1
