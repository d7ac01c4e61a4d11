"""Two machines and one storage: what one of them has saved is not taken away by the other, whatever happens between."""

from __future__ import annotations

import fcntl
import shutil
import signal
from pathlib import Path

import pytest
import torch

from tests.harness import (
    OTHER_ID,
    ROOT,
    RUN_ID,
    SHORT,
    assert_same_bits,
    contents,
    flip,
    last_step,
    launch,
    run,
    run_folder,
    train,
    trained,
    write_corpus,
)
from tests.storage import copy_all, overtaken, stored, tool, withdraw
from unbroken.checkpoint import rewind


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 6 steps with checkpoints of 2, 4 and 6."""
    return trained(tmp_path_factory.mktemp("six"), {**SHORT, "num_iterations": 6})


@pytest.fixture(scope="module")
def eight(six: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, extended to 8 steps on another machine."""
    folder = tmp_path_factory.mktemp("eight")
    shutil.copytree(six, folder, dirs_exist_ok=True)
    assert run(folder, "--resume_from", RUN_ID, "--num_iterations", "8").code == 0
    return folder


@pytest.fixture
def storage(eight: Path, tmp_path: Path) -> Path:
    """What the other machine has copied before it was lost."""
    assert tool(eight, "mirror", RUN_ID, f"file://{tmp_path}/storage").code == 0
    return tmp_path / "storage"


@pytest.fixture
def here(six: Path, tmp_path: Path) -> Path:
    shutil.copytree(six, tmp_path / "here")
    return tmp_path / "here"


def test_who_has_nothing_to_do_takes_nothing_away(storage: Path, here: Path) -> None:
    before = contents(storage)
    done = run(here, "--resume_from", f"logs/{RUN_ID}/final.pt", "--mirror", f"file://{storage}")
    assert done.code == 0 and "nothing to do" in done.out, done.text
    assert contents(storage) == before


def test_a_damaged_extension_moves_nothing_here(storage: Path, here: Path) -> None:
    flip(stored(storage, "final.pt"))
    withdraw(storage, "model_step000008.pt")
    before = contents(here / "logs")
    done = run(here, "--resume_from", f"file://{storage}/{RUN_ID}/final.pt")
    assert done.code == 2 and "it is not what was copied there" in done.err, done.text
    assert {**contents(here / "logs"), f"{RUN_ID}/.lock": b""} == {**before, f"{RUN_ID}/.lock": b""}
    done = run(here, "--resume_from", "auto", "--mirror", f"file://{storage}")
    assert done.code == 0 and "nothing to do" in done.out and "at step 6" in done.out, done.text


def test_an_extension_is_brought_and_the_old_end_keeps_its_step_s_name(storage: Path, here: Path, eight: Path) -> None:
    old = (here / "logs" / RUN_ID / "final.pt").read_bytes()
    (here / "logs" / RUN_ID / "model_step000006.pt").unlink()
    done = run(here, "--resume_from", "auto", "--mirror", f"file://{storage}")
    assert done.code == 0 and "nothing to do" in done.out and "at step 8" in done.out, done.text
    assert (here / "logs" / RUN_ID / "model_step000006.pt").read_bytes() == old
    assert_same_bits(here / "logs" / RUN_ID / "final.pt", eight / "logs" / RUN_ID / "final.pt")


def test_what_was_gone_back_behind_does_not_come_back(six: Path, here: Path, tmp_path: Path) -> None:
    """Killed before the storage has heard of it; the next attempt tells it."""
    store = tmp_path / "store"
    assert tool(six, "mirror", RUN_ID, f"file://{store}").code == 0
    run_folder = here / "logs" / RUN_ID
    back = ["--resume_from", f"logs/{RUN_ID}/model_step000002.pt", "--learning_rate", "5e-3"]
    running = launch(here, [*back, "--save_every", "100"], processes=None, hold=2)  # without a mirror: it is not told
    running.kill_when(lambda: bool(rewind.read_rewinds(run_folder)))  # which is the last that it does
    done = run(here, "--resume_from", "auto", "--mirror", f"file://{store}")
    assert done.code == 0 and "model_step000002.pt at step 2" in done.out and "downloaded" not in done.out, done.text
    assert overtaken(store) == {"model_step000004.pt", "model_step000006.pt", "final.pt"}
    assert stored(store, "final.pt").read_bytes() == (run_folder / "final.pt").read_bytes()


KILLED = f"""import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import train_gpt2_mod

def killing(source, target, rename=os.rename):
    if "model_step000006.pt" in str(target):
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)

os.rename = killing
sys.exit(train_gpt2_mod.main(sys.argv[1:]))
"""


def test_a_kill_while_checkpoints_are_set_aside_leaves_the_run_as_it_was(storage: Path, here: Path) -> None:
    """Also what only the storage has."""
    (here / "killed.py").write_text(KILLED)
    back = ["--resume_from", f"logs/{RUN_ID}/model_step000002.pt", "--learning_rate", "5e-3"]
    assert launch(here, back, processes=None, script=here / "killed.py").wait().code == -signal.SIGKILL
    assert {path.name for path in here.glob("logs/*/overtaken-1/*")} == {"model_step000004.pt"}
    done = run(here, "--resume_from", "auto", "--mirror", f"file://{storage}")
    assert done.code == 0 and "nothing to do" in done.out and "at step 8" in done.out, done.text
    assert overtaken(storage) == set()


def test_the_newest_run_is_the_newest_of_both_places(storage: Path, tmp_path: Path, six: Path) -> None:
    """A machine that has an older run goes on with the one that was lost elsewhere."""
    here = tmp_path / "other"
    trained(here, {**SHORT, "run_id": OTHER_ID})
    for path in (here / "logs" / OTHER_ID).glob("*.pt"):
        saved = torch.load(path, weights_only=True)
        saved["progress"]["saved_at"] = 1e9
        path.unlink()
        torch.save(saved, path)
    done = run(here, "--resume_from", "auto", "--mirror", f"file://{storage}")
    assert done.code == 0 and f"run {RUN_ID} is at step 8" in done.out, done.text


def test_the_log_of_a_run_that_is_being_trained_is_left_alone(storage: Path, here: Path) -> None:
    folder = here / "logs" / RUN_ID
    before = (folder / f"{RUN_ID}.log").read_bytes()
    with open(folder / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.truncate(0)
        lock.write('{"host": "elsewhere", "pid": 1}')
        lock.flush()
        done = run(here, "--resume_from", f"file://{storage}/{RUN_ID}/model_step000004.pt")
    assert done.code == 2 and "is being trained by process 1 on elsewhere" in done.err, done.text
    assert (folder / f"{RUN_ID}.log").read_bytes() == before


def test_a_machine_that_is_only_behind_sets_nothing_aside(storage: Path, here: Path) -> None:
    """As after a storage that did not answer at first: the same course, so what is further there stays."""
    from unbroken.mirror.store import Storage
    from unbroken.mirror.upload import Uploader

    before = contents(storage)
    remote = Storage(f"file://{storage}").run(RUN_ID)
    folder = here / "logs" / RUN_ID
    mirroring = Uploader(remote, folder, folder / f"{RUN_ID}.log", 0, 0)
    copy_all(mirroring)
    assert contents(storage) == before
    rewind.record_rewind(folder, 6)
    copy_all(mirroring)
    assert overtaken(storage) == {"model_step000008.pt", "final.pt"}
    assert last_step(here) == 6


def test_the_beginning_of_a_run_id_asks_the_storage_too(storage: Path, here: Path) -> None:
    done = run(here, "--resume_from", RUN_ID[:8], "--mirror", f"file://{storage}")
    assert done.code == 0 and f"of run {RUN_ID} from file://{storage}" in done.out, done.text
    assert "is at step 8" in done.out, done.text


def test_auto_brings_the_run_that_the_command_began(tmp_path: Path) -> None:
    """Two seeds into one storage: on an empty machine each command goes on with its own run, a third begins one."""
    store, steps = tmp_path / "store", {**SHORT, "run_id": None, "batch_size": 1, "grad_accumulation_steps": 2}
    typed = {seed: {**steps, "seed": seed, "resume_from": "auto", "mirror": f"file://{store}"} for seed in (1, 2, 3)}
    runs = {}
    for seed in (1, 2):
        place = tmp_path / f"first{seed}"
        write_corpus(place)
        train(place, typed[seed], processes=None)
        runs[seed] = run_folder(place).name
    write_corpus(tmp_path / "empty")
    for seed in (1, 2, 1):
        done = train(tmp_path / "empty", {**typed[seed], "num_iterations": 4}, processes=None)
        assert f"resuming run {runs[seed]}" in done.out or f"nothing to do: run {runs[seed]}" in done.out, done.text
    write_corpus(tmp_path / "third")
    done = train(tmp_path / "third", typed[3], processes=None)
    assert "new run" in done.out and f"any of the 2 runs under file://{store}" in done.text, done.text
    assert "seed 2 there, 3 here" in done.text or "seed 1 there, 3 here" in done.text
