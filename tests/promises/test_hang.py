"""A run that hangs ends, names who is behind, and goes on with the same bits; one that is only slow does not.

A process that is stopped is killed by the others: test_peer_death.py.
"""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from tests import harness
from tests.harness import ROOT, RUN_ID, arguments, assert_same_bits, launch, write_corpus

HANGING = ROOT / "tests/hanging_training.py"
SETTINGS = {"run_id": RUN_ID, "num_iterations": 12, "save_every": 3, "hang": "2"}
FINAL = f"logs/{RUN_ID}/final.pt"


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    return harness.trained(folder, SETTINGS)


@pytest.mark.parametrize(
    ("processes", "rank", "where", "doing"),
    [
        (1, 0, "train:29", "rank 0: computing step 8"),
        (4, 2, "train:8", "rank 2: computing step 8"),
        (2, 0, "exchange:8", "rank 0: computing step 8"),
    ],
)
def test_a_rank_that_hangs_is_named_and_the_restart_has_the_same_bits(
    straight: Path, tmp_path: Path, processes: int, rank: int, where: str, doing: str
) -> None:
    write_corpus(tmp_path)
    env = {"HANGS": where, "ON": str(rank)}
    done = launch(
        tmp_path, arguments(SETTINGS), processes, torchrun=["--max-restarts=1"], env=env, script=HANGING
    ).wait()
    assert done.code == 0, done.text
    assert f"error: no progress of {doing} for " in done.err, done.text
    assert_same_bits(straight / FINAL, tmp_path / FINAL)
    folder = harness.run_folder(tmp_path)
    assert {path.name for path in folder.glob("stacks.*")} == {f"stacks.{each}.txt" for each in range(processes)}
    stacks = (folder / f"stacks.{rank}.txt").read_text()
    assert "in stands_still" in stacks and "watchdog.py" in stacks


def test_a_process_by_itself_ends_with_a_code_for_another_try(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    done = launch(tmp_path, arguments(SETTINGS), None, env={"HANGS": "train:29"}, script=HANGING).wait()
    assert done.code == 1 and len(done.err.splitlines()) == 1, done.text
    assert "resume from the newest checkpoint" in done.err


def test_what_is_slow_is_named_and_is_no_hang(straight: Path, tmp_path: Path) -> None:
    """Validations of many steps, a save and a shard that take longer than the limit, a stop of the whole group."""
    write_corpus(tmp_path)
    changes = {**SETTINGS, "val_loss_every": 6, "val_batch_size": 1}
    env = {"SLOW": "val:0.1,save:5,read:0.3", "NOTICE": "1.5"}
    running = launch(tmp_path, arguments(changes), 2, env=env, script=HANGING)
    running.until(lambda: harness.last_step(tmp_path) >= 5)
    running.kill(signal.SIGSTOP)
    time.sleep(4)
    running.kill(signal.SIGCONT)
    done = running.wait()
    assert done.code == 0 and "no progress" not in done.text, done.text
    assert "waiting for the disk, the checkpoint of step 12 since " in done.err, done.text
    assert_same_bits(straight / FINAL, tmp_path / FINAL)


def test_a_shard_and_a_console_that_do_not_answer_are_named(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    env = {"SLOW": "read:2.2,tell:2.2", "NOTICE": "1"}
    changes = {**SETTINGS, "num_iterations": 6, "hang": "1.8"}
    done = launch(tmp_path, arguments(changes), None, env=env, script=HANGING).wait()
    assert done.code == 0, done.text
    assert "waiting for data/train_000.bin since 1 s" in done.err.splitlines(), done.text
    assert "waiting for the console or a tracker since 1 s" in done.err.splitlines(), done.text


def test_off_watches_nothing(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    env = {"SLOW": "train:0.5"}
    changes = {**SETTINGS, "hang": "0.2", "num_iterations": 6}
    assert launch(tmp_path, arguments({**changes, "hang": "off"}), None, env=env, script=HANGING).wait().code == 0
    assert launch(tmp_path, arguments({**changes, "hang": "soon"}), None).wait().code == 2
