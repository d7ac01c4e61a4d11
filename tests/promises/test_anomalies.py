"""A step that goes wrong: the run stops, or goes back and is from then on the run that never saw those batches."""

from __future__ import annotations

import random
import re
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from tests import fork_server, harness
from tests.harness import ROOT, RUN_ID, Done, arguments, assert_same_bits, launch, learnable, train, write_shard
from unbroken.data import left_out
from unbroken.errors import UserError
from unbroken.metrics.anomaly import AnomalyDetector

SCRIPT = ROOT / "tests/anomalous_training.py"
SETTINGS: dict[str, Any] = {"run_id": RUN_ID, "num_iterations": 14, "save_every": 5}
FOLDER = Path("logs") / RUN_ID
FINAL = FOLDER / "final.pt"
TOKENS = 128  # of a step
POISON = 200


def poisoned(folder: Path, *batches: int) -> Path:
    """A corpus in which these batches hold the token that makes a loss NaN."""
    tokens = learnable(6000)
    for batch in batches:
        tokens[(batch - 1) * TOKENS + 70] = POISON
    write_shard(folder / "data/train_000.bin", tokens)
    write_shard(folder / "data/val_000.bin", learnable(700, 10**6))
    return folder


def anomalous(folder: Path, changes: dict[str, Any], processes: int | None = None, **env: str) -> Done:
    return launch(folder, arguments({**SETTINGS, **changes}), processes, env=env, script=SCRIPT).wait()


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that is given its skip list from the start."""
    folder = poisoned(tmp_path_factory.mktemp("straight"), 8)
    train(folder, {**SETTINGS, "skip_batches": "7-8"}, processes=None)
    return folder


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_nan_stops_with_one_line(tmp_path: Path, processes: int) -> None:
    done = anomalous(poisoned(tmp_path, 8), {}, None if processes == 1 else processes)
    (line,) = [line for line in done.err.splitlines() if line.startswith("error: ")]
    path = FOLDER / "model_step000005.pt"
    assert line == (
        "error: the loss of step 8 is nan, the first tensor that is not finite is transformer.wte.weight; the last"
        f" sound checkpoint is {path}; a smaller --learning_rate, --skip_batches 7-8 or --on_nan rewind may help"
    )
    assert done.code == (2 if processes == 1 else 1) and "WARNING" not in done.text
    assert [each.name for each in sorted((tmp_path / FOLDER).glob("*.pt"))] == [path.name]


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_a_rewound_run_is_the_run_that_left_the_batches_out(straight: Path, tmp_path: Path, processes: int) -> None:
    done = anomalous(poisoned(tmp_path, 8), {"on_nan": "rewind"}, processes)
    assert done.code == 0, done.text
    assert f"going back to {FOLDER}/model_step000005.pt, leaving out batches 7-8" in done.text
    assert_same_bits(straight / FINAL, tmp_path / FINAL)
    saved = torch.load(tmp_path / FINAL, weights_only=True)
    assert saved["progress"]["skipped"] == [[6 * TOKENS, 8 * TOKENS]] and saved["args"]["skip_batches"] == "7-8"
    assert saved["progress"]["rewinds"] == [[5, 8]]
    assert yaml.safe_load((tmp_path / FOLDER / "config.yaml").read_text())["skip_batches"] == "7-8"
    assert " skipped=7-8" in harness.log_path(tmp_path).read_text()
    losses = dict(line.split(" trn:") for line in harness.log_lines(tmp_path))
    assert losses == dict(line.split(" trn:") for line in harness.log_lines(straight))


def test_a_gradient_norm_leaves_one_batch_out_and_a_config_repeats_the_run(tmp_path: Path) -> None:
    done = anomalous(poisoned(tmp_path, 8), {"on_nan": "rewind", "grad_clip": 1.0})
    assert done.code == 0 and "leaving out batches 8" in done.text, done.text
    config = tmp_path / FOLDER / "config.yaml"
    again = launch(tmp_path, ["--config", str(config), "--run_id", harness.OTHER_ID], None, script=SCRIPT).wait()
    assert again.code == 0 and "going back" not in again.text, again.text
    assert_same_bits(tmp_path / FINAL, tmp_path / "logs" / harness.OTHER_ID / "final.pt")


def test_an_audit_computes_a_rewound_run_again(tmp_path: Path) -> None:
    assert anomalous(poisoned(tmp_path), {"on_nan": "rewind", "num_iterations": 8}, FLIP="6").code == 0
    command = [sys.executable, "-m", "unbroken", "audit", RUN_ID]
    env = harness.environment({"PYTHONPATH": str(ROOT)})
    done = fork_server.run(command, cwd=tmp_path, capture_output=True, text=True, env=env)
    assert done.returncode == 0 and "MATCH" in done.stdout, done.stdout + done.stderr


def test_killed_at_any_time_it_is_the_same_run(straight: Path, tmp_path: Path) -> None:
    poisoned(tmp_path, 8)
    dice, changes = random.Random(16), {**SETTINGS, "on_nan": "rewind", "resume_from": "auto"}
    for line in ("step:6/", "going back to", "leaving out", "saved ", ""):
        running = launch(tmp_path, arguments(changes), None, env={"PACE": "0.1"}, script=SCRIPT)
        for said in running.process.stdout or ():
            if line and line in said:
                time.sleep(dice.uniform(0, 0.3))
                running.kill()
                break
        code = running.wait().code
    assert code == 0
    assert_same_bits(straight / FINAL, tmp_path / FINAL)


def test_a_flipped_weight_is_gone_after_the_rewind(tmp_path: Path) -> None:
    done = anomalous(poisoned(tmp_path), {"on_nan": "rewind"}, 2, FLIP="7")
    assert done.code == 0 and "leaving out batches 7-8" in done.text, done.text
    straight = poisoned(tmp_path / "straight")
    train(straight, {**SETTINGS, "skip_batches": "7-8"}, processes=None)
    assert_same_bits(straight / FINAL, tmp_path / FINAL)


def test_the_second_rewind_goes_further_back_and_the_third_stops(tmp_path: Path) -> None:
    done = anomalous(poisoned(tmp_path, *range(8, 40)), {"on_nan": "rewind", "save_every": 2})
    back = re.findall(r"going back to \S+step(\d+)\.pt, leaving out batches (\S+)", done.text)
    assert back == [("000006", "7-8"), ("000002", "6-9")], done.text
    assert done.code == 2 and "the run went back 2 times without getting past it: stopped" in done.err


def test_go_on_warns_and_goes_on(tmp_path: Path) -> None:
    done = anomalous(poisoned(tmp_path, 8), {"on_nan": "go_on"})
    assert done.code == 0 and "the run has diverged" in done.out, done.text


def test_a_spike_is_warned_of_or_left_out(tmp_path: Path) -> None:
    changes = {"num_iterations": 42, "save_every": 20, "learning_rate": 1e-4, "warmup_iters": 0}
    done = anomalous(poisoned(tmp_path, 40), {**changes, "on_spike": "warn"}, SPIKE="1")
    assert done.code == 0 and "WARNING: the loss of step 40 is " in done.out, done.text
    changes |= {"run_id": harness.OTHER_ID, "on_spike": "rewind"}
    done = anomalous(tmp_path, changes, SPIKE="1")
    assert done.code == 0 and "step000020.pt, leaving out batches 39-40" in done.out, done.text


def test_batches_are_left_out_by_hand_also_of_a_run_that_stopped(straight: Path, tmp_path: Path) -> None:
    poisoned(tmp_path, 8)
    assert anomalous(tmp_path, {}).code == 2
    done = anomalous(tmp_path, {"skip_batches": "7-8", "resume_from": "auto"}, 2)
    assert done.code == 0 and "leaving out batches 7-8" in done.out, done.text
    assert_same_bits(straight / FINAL, tmp_path / FINAL)
    done = anomalous(tmp_path, {"skip_batches": "3", "resume_from": RUN_ID, "num_iterations": 15, "run_id": None})
    assert "--skip_batches 3 has no effect: the run has trained on them" in done.out, done.text
    assert anomalous(tmp_path, {"skip_batches": "9-3"}).code == 2


def test_ranges() -> None:
    ranges = left_out.parse("2-3,4,9", 10)
    assert ranges == ((10, 40), (80, 90)) and left_out.describe(ranges, 10) == "2-4,9"
    dice = np.random.default_rng(0)
    for _ in range(300):
        position, count = (int(each) for each in dice.integers((0, 1), (120, 30)))
        start = left_out.next_start(ranges, position, count)
        free = [at for at in range(position, 200) if all(at >= stop or at + count <= begin for begin, stop in ranges)]
        assert start == free[0]
    for text in ("0-3", "3-2", "a", "1-", "1,,2"):
        with pytest.raises(UserError, match="--skip_batches"):
            left_out.parse(text, 10)
    assert left_out.are_ranges([[0, 3], [4, 5]])
    assert not any(map(left_out.are_ranges, ([[3, 0]], [[0, 3], [3, 4]], [[0, True]], [[0]], "x", [[4, 5], [0, 1]])))


def test_noise_is_no_spike() -> None:
    dice, detector = random.Random(1), AnomalyDetector(spikes=True)
    for step in range(1, 5000):
        assert detector.look(step, 3 + dice.gauss(0, 0.05), dice.lognormvariate(0, 0.3)) is None
    found = detector.look(5000, 4.0, 1.0)
    assert found and (found.what, found.first) == ("loss", 4999) and "that of the steps before 2.99" in str(found)
