"""An attempt that is refused has changed nothing; one that has to wait looks at what it finds then."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.harness import (
    OTHER_ID,
    RUN_ID,
    SHORT,
    arguments,
    contents,
    flip,
    has_open,
    launch,
    run_folder,
    trained,
    write_corpus,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 6 steps with checkpoints of 2, 4 and 6."""
    return trained(tmp_path_factory.mktemp("finished"), {**SHORT, "num_iterations": 6})


def nothing(folder: Path) -> None:
    pass


def flipped(folder: Path) -> None:
    flip(run_folder(folder) / "model_step000002.pt")


def other_data(folder: Path) -> None:
    shard = folder / "data/train_000.bin"
    content = bytearray(shard.read_bytes())
    content[1024 + 2 * 300] ^= 1
    shard.write_bytes(content)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "more", "says"),
    [
        (nothing, ["--input_bin", "dta/*.bin"], "dta/*.bin"),
        (nothing, ["--input_bin", "dta/*.bin", "--fork"], "dta/*.bin"),
        (nothing, ["--optimizer", "muon"], "the state of another optimizer"),
        (nothing, ["--num_iterations", "7", "--val_loss_every", "2", "--input_val_bin", "x"], "x"),
        (flipped, [], "the newest whole checkpoint of this run is"),
        (other_data, [], "the training data changed"),
    ],
)
def test_a_refused_step_back_overtakes_nothing(
    folder: Path, spoil: Callable[[Path], None], more: list[str], says: str
) -> None:
    """Neither checkpoints nor config nor log: the next attempt finds the newest one where it was."""
    spoil(folder)
    run = run_folder(folder)
    before = contents(run)
    done = launch(folder, ["--resume_from", f"logs/{RUN_ID}/model_step000002.pt", *more], processes=None).wait()
    assert done.code == 2 and says in done.err and done.err.count("\n") == 1, done.text
    assert {**contents(run), ".lock": b""} == {**before, ".lock": b""}
    assert [path.name for path in (folder / "logs").iterdir()] == [RUN_ID]
    done = launch(folder, ["--resume_from", "auto"], processes=None).wait()
    assert "nothing to do" in done.out and "at step 6" in done.out, done.text


@pytest.mark.parametrize("typed", [{"input_bin": "dta/*.bin"}, {"init_from": "none.pt"}, {"threads": 5000}])
def test_a_refused_fresh_start_leaves_no_folder(tmp_path: Path, typed: dict[str, str]) -> None:
    write_corpus(tmp_path)
    done = launch(tmp_path, arguments(typed), processes=None).wait()
    assert done.code == 2 and done.err.count("\n") == 1, done.text
    assert not list(tmp_path.glob("logs/*"))


# ---- what is waited for ----------------------------------------------------------------------------------------------


@contextmanager
def orphan_at_work(folder: Path) -> Iterator[None]:
    """Holds a run's lock as the worker of a killed torchrun does, until the block ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write(json.dumps({"host": os.uname().nodename, "pid": 2**22 + 1}))  # beyond the largest pid
        lock.flush()
        yield


@pytest.mark.parametrize("named", ["auto", "latest", RUN_ID, f"logs/{RUN_ID}"])
def test_what_is_saved_while_it_waits_for_the_lock_is_gone_on_from(folder: Path, named: str) -> None:
    """With --keep_last 1 the one before is gone by then: it must be neither chosen nor make the newer one overtaken."""
    run, kept = run_folder(folder), folder / "kept"
    kept.mkdir()
    for name in ("model_step000004.pt", "model_step000006.pt", "final.pt"):
        os.rename(run / name, kept / name)
    with orphan_at_work(run):
        running = launch(folder, ["--resume_from", named, "--keep_last", "1"], processes=None)
        running.until(lambda: has_open(running.process.pid, ".lock"))
        time.sleep(0.3)
        os.rename(kept / "model_step000004.pt", run / "model_step000004.pt")
        os.unlink(run / "model_step000002.pt")
    done = running.wait()
    assert done.code == 0 and "model_step000004.pt at step 4" in done.out and "overtaken" not in done.text, done.text
    assert (run / "final.pt").exists()


@pytest.mark.parametrize("more", [[], ["--fork", "--resume_from", f"logs/{RUN_ID}/model_step000002.pt"]])
def test_a_run_that_another_begins_meanwhile_is_not_begun_again(folder: Path, more: list[str]) -> None:
    run, other = run_folder(folder), folder / "logs" / OTHER_ID
    with orphan_at_work(other):
        typed = more or arguments({**SHORT, "run_id": None})
        running = launch(folder, ["--run_id", OTHER_ID, *typed], processes=None)
        running.until(lambda: has_open(running.process.pid, ".lock"))
        shutil.copy(run / "final.pt", other / "final.pt")
    done = running.wait()
    assert done.code == 2 and f"run {OTHER_ID} exists already; continue it with" in done.err, done.text
    assert {path.name for path in other.iterdir()} == {".lock", "final.pt"}


def test_a_file_that_vanishes_while_the_lock_is_waited_for(folder: Path) -> None:
    """What another attempt's retention has removed cannot be this one's only checkpoint."""
    run = run_folder(folder)
    with orphan_at_work(run):
        running = launch(folder, ["--resume_from", str(run / "model_step000002.pt")], processes=None)
        running.until(lambda: has_open(running.process.pid, ".lock"))
        os.unlink(run / "model_step000002.pt")
    done = running.wait()
    assert done.code == 2 and "was removed or replaced by another process just now" in done.err, done.text
    assert not list(run.glob("overtaken*"))


def test_one_command_started_twice_trains_once(tmp_path: Path) -> None:
    """Two machines, one command, one shared folder: one begins the run, the other is told so or goes on."""
    write_corpus(tmp_path)
    typed = arguments({**SHORT, "resume_from": "auto"})
    both = [launch(tmp_path, typed, processes=None) for _ in range(2)]
    ended: list[str] = []
    threads = [threading.Thread(target=lambda one=one: ended.append(one.wait().text)) for one in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log = (run_folder(tmp_path) / f"{RUN_ID}.log").read_text()
    assert re.findall(r"^s:(\d+) trn:", log, re.M) == ["1", "2", "3"], ended
    assert not list(tmp_path.glob("logs/*/overtaken*")), ended
