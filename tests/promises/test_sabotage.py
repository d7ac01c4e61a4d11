"""What surrounds a run breaks: its console, its disk, its terminal, its launcher. No step and no line may be lost."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests import fork_server
from tests.harness import (
    PACED,
    RUN_ID,
    SCRIPT,
    SHORT,
    Hold,
    arguments,
    environment,
    has_open,
    last_step,
    launch,
    run_folder,
    train,
)
from tests.saving import newest_whole, whole_tree
from unbroken.checkpoint import directory
from unbroken.checkpoint.writer import RunCheckpointWriter
from unbroken.distributed.world import World
from unbroken.metrics.logfile import LogFile, events

# ---- the console -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("console", ["a full disk", "a pipe without a reader"])
def test_a_console_that_takes_nothing_costs_no_step(place: Path, console: str) -> None:
    if console == "a full disk":
        taking = os.open("/dev/full", os.O_WRONLY)
    else:
        reading, taking = os.pipe()
        os.close(reading)
    command = [sys.executable, str(SCRIPT), *arguments(SHORT)]
    done = fork_server.run(
        command, cwd=place, env=environment(), stdout=taking, stderr=subprocess.PIPE, text=True, timeout=120
    )
    os.close(taking)
    assert (done.returncode, done.stderr) == (0, "")
    assert directory.finished_step(directory.list_checkpoints(run_folder(place))) == 3 and last_step(place) == 3


def test_closing_the_terminal_saves(place: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
    running = launch(place, arguments({**SHORT, "num_iterations": 10**6, "save_every": 0}), processes=None)
    signal.signal(signal.SIGHUP, before)
    running.until(lambda: last_step(place) > 1)
    running.process.send_signal(signal.SIGHUP)
    done = running.wait()
    assert done.code == 129 and done.out.splitlines()[-1].startswith("stopped by SIGHUP at step"), done.text
    newest, _ = newest_whole(run_folder(place))
    assert newest is not None and newest.step == last_step(place)


def test_under_nohup_the_terminal_may_go(place: Path) -> None:
    typed, hold = ["nohup", sys.executable, str(PACED), *arguments({**SHORT, "num_iterations": 6})], Hold(place, 1)
    with open(place / "nohup.out", "wb") as out:
        process = subprocess.Popen(
            typed, cwd=place, env=environment(hold.env), stdin=subprocess.DEVNULL, stdout=out, stderr=out
        )
        while not last_step(place):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGHUP)
        hold.at(6)
        assert process.wait(120) == 0
    assert directory.finished_step(directory.list_checkpoints(run_folder(place))) == 6


# Python runs it at its start: in the middle of the import of torch, the program writes `importing` and waits for `go`.
IN_IMPORT = """
import sys, time
from pathlib import Path

class Waiting:
    def find_spec(self, name, *more):
        if name == "torch.optim" and sys.argv[0].endswith("train_gpt2_mod.py"):
            Path("importing").touch()
            while not Path("go").exists():
                time.sleep(0.01)

sys.meta_path.insert(0, Waiting())
"""


@pytest.fixture
def in_import(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a program that waits there."""
    folder = tmp_path_factory.mktemp("in_import")
    (folder / "sitecustomize.py").write_text(IN_IMPORT)
    return {"PYTHONPATH": str(folder)}


def test_an_interrupt_while_torch_is_imported_shows_no_traceback(place: Path, in_import: dict[str, str]) -> None:
    running = launch(place, arguments(SHORT), processes=None, env=in_import, fresh=True)
    running.until((place / "importing").exists)
    running.process.send_signal(signal.SIGINT)
    done = running.wait()
    assert (done.code, done.text) == (-signal.SIGINT, "")


# ---- the log on a full disk ------------------------------------------------------------------------------------------


def test_what_a_full_disk_does_not_take_of_the_log_is_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real, room = tmp_path / "a.log", os.write, [10**6]

    def write(file: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = real(file, data[: room[0]])
        room[0] -= count
        return count

    log = LogFile(path, 0)
    monkeypatch.setattr(os, "write", write)
    log.append("s:1 trn:4.000000")
    room[0] = 5
    for step in (2, 3):
        with pytest.raises(OSError, match="No space"):
            log.append(f"s:{step} trn:4.000000")
    room[0] = 10**6
    log.append("s:4 trn:4.000000")
    log.close()
    assert [step for _, step, _ in events(path)] == [1, 2, 3, 4]


def test_a_line_that_was_cut_short_is_no_loss(tmp_path: Path) -> None:
    (tmp_path / "a.log").write_bytes(b"s:1 trn:4.123456\ns:2 trn:4.12")
    log = LogFile(tmp_path / "a.log", 0)
    log.close()
    assert log.later == {("trn", 1): "s:1 trn:4.123456"}


# ---- the end of a run ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save_every", [3, 0])
def test_the_first_cause_is_what_is_said(place: Path, save_every: int) -> None:
    """A limit on the size of files: the periodic save fails too, so that there is nothing to link `final.pt` to."""
    running = launch(place, arguments({**SHORT, "save_every": save_every}), processes=None, hold=1)
    running.until(lambda: last_step(place) >= 1)
    resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    running.release()
    done = running.wait()
    assert done.code == 2 and "error: final.pt could not be written: File too large" in done.err, done.text
    assert "No such file" not in done.text
    assert done.text.count("WARNING: checkpoint of step 3 was not saved: File too large") == 1, done.text


def test_too_little_space_is_said_at_the_start(place: Path) -> None:
    running = launch(place, arguments({**SHORT, "num_iterations": 10**7, "save_every": 1}), processes=None)
    running.until(lambda: last_step(place) >= 2)
    running.kill(signal.SIGTERM)
    done = running.wait()
    said = r"WARNING: 9,999,999 checkpoints of [\d.]+ MB will be written, and logs/.* has .* free: --keep_last 2"
    assert done.code == 143 and re.search(said, done.text) and done.text.count("will be written") == 1, done.text


@pytest.mark.parametrize("what", ["of the old end", "damaged"])
def test_killed_before_its_new_final_one_a_run_is_not_finished(place: Path, what: str) -> None:
    train(place, {**SHORT, "num_iterations": 2}, processes=None)
    final = run_folder(place) / "final.pt"
    shutil.copy(final, place / "old.pt")
    typed = ["--resume_from", RUN_ID, "--num_iterations", "4"]
    assert launch(place, typed, processes=None).wait().code == 0
    final.unlink()  # as a kill between the two names of step 4 leaves it
    if what == "damaged":
        content = bytearray((run_folder(place) / "model_step000004.pt").read_bytes())
        content[len(content) // 2] ^= 1
        (place / "old.pt").write_bytes(content)
    shutil.copy(place / "old.pt", final)
    done = launch(place, typed, processes=None).wait()
    assert done.code == 0 and "nothing to do" not in done.text, done.text
    assert directory.finished_step(directory.list_checkpoints(run_folder(place))) == 4
    assert final.samefile(run_folder(place) / "model_step000004.pt")
    assert "nothing to do" in launch(place, typed, processes=None).wait().out


# ---- the launcher ----------------------------------------------------------------------------------------------------


def test_what_an_orphan_saves_last_is_gone_on_from(place: Path) -> None:
    """torchrun is killed and started again at once, while its worker has yet to save the step that it is in."""
    first = launch(place, arguments({**SHORT, "num_iterations": 10**6, "save_every": 10**6}), fresh=True)
    first.until(lambda: last_step(place) > 1)
    (worker,) = first.workers()
    os.kill(worker, signal.SIGSTOP)
    os.kill(first.process.pid, signal.SIGKILL)
    second = launch(place, ["--resume_from", RUN_ID, "--num_iterations", "10000000"], fresh=True)
    second.until(lambda: any(has_open(pid, ".lock") for pid in second.workers()))
    os.kill(worker, signal.SIGCONT)
    second.until(lambda: (place / "logs" / RUN_ID / f"{RUN_ID}.log").read_text().count("# ") == 2)
    saved = directory.periodic_steps(run_folder(place))
    second.kill(signal.SIGTERM)
    done = second.wait()
    assert f"resuming run {RUN_ID} from logs/{RUN_ID}/model_step{saved[0]:06d}.pt" in done.out, done.text
    assert "overtaken" not in done.text


def test_an_orphan_that_has_not_begun_leaves_nothing(place: Path, in_import: dict[str, str]) -> None:
    """torchrun is killed while its worker still imports torch."""
    first = launch(place, arguments({**SHORT, "num_iterations": 10**6}), env=in_import, fresh=True)
    first.until((place / "importing").exists)
    (worker,) = first.workers()
    os.kill(first.process.pid, signal.SIGKILL)
    first.process.wait(60)
    (place / "go").touch()
    with suppress(psutil.NoSuchProcess):
        psutil.Process(worker).wait(60)
    assert not (place / "logs").exists()


# ---- the run's folder ------------------------------------------------------------------------------------------------


def test_retention_that_fails_holds_nothing_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Path) -> list[int]:
        raise OSError(errno.EIO, "Input/output error")

    with RunCheckpointWriter(tmp_path, World.single(), keep_last=1) as saver:
        for step in (1, 2, 3):
            if step == 2:
                monkeypatch.setattr(directory, "periodic_steps", broken)
            saver.save(whole_tree(step), step)
            saver.wait()
            monkeypatch.undo()
        assert [outcome.error for outcome in saver.results()] == [None] * 3
    assert directory.periodic_steps(tmp_path) == [3]


def test_a_lock_that_cannot_be_made_is_one_line(place: Path) -> None:
    (place / "logs" / RUN_ID / ".lock").mkdir(parents=True)
    done = launch(place, arguments(SHORT), processes=None).wait()
    assert done.code == 2 and done.err.count("\n") == 1 and "cannot write" in done.err, done.text


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["--resume_from", "x" * 5000], "too long"),
        (["--seed", str(2**63)], "at most 2**63 - 1"),
        (["--batch_size", "1000000000000"], "at most 10,000,000"),
        (["--threads", "5000"], "at most 4096"),
    ],
)
def test_an_absurd_value_is_one_line(place: Path, typed: list[str], message: str) -> None:
    done = launch(place, typed, processes=None).wait()
    assert done.code == 2 and done.err.count("\n") == 1 and message in done.err, done.text[-500:]


def test_a_run_that_diverged_keeps_its_last_good_checkpoint(tmp_path: Path) -> None:
    """In this attempt and the next, whatever --keep_last says; once it is sound again, retention goes on."""
    with RunCheckpointWriter(tmp_path, World.single(), keep_last=1) as saver:
        for step, sound in ((1, True), (2, True), (3, False), (4, False)):
            saver.save(whole_tree(step), step, sound=sound)
        saver.link_final(4)
        saver.wait()
        assert directory.periodic_steps(tmp_path) == [2, 4]
    with RunCheckpointWriter(tmp_path, World.single(), keep_last=1) as saver:
        saver.protect_all()
        saver.save(whole_tree(5), 5, sound=False)
        saver.wait()
        assert directory.periodic_steps(tmp_path) == [2, 4, 5]
        saver.save(whole_tree(6), 6)
    assert directory.periodic_steps(tmp_path) == [6]


def test_a_loss_that_is_no_number_spends_no_good_checkpoint(place: Path) -> None:
    changes = {**SHORT, "num_iterations": 5, "save_every": 1, "keep_last": 1, "learning_rate": 1e30, "on_nan": "go_on"}
    train(place, changes, processes=None)
    losses = {step: text.rpartition(":")[2] for _, step, text in events(run_folder(place) / f"{RUN_ID}.log") if step}
    good = max(step for step, loss in losses.items() if loss != "nan")
    assert directory.periodic_steps(run_folder(place)) == [good, 5]


def test_a_fork_is_not_begun_again_over_itself(place: Path) -> None:
    """The same command once more, as a loop of restarts types it, must not go back to where the fork began."""
    train(place, {**SHORT, "num_iterations": 2}, processes=None)
    other = "00c1e2f3-0000-4000-8000-000000000001"
    typed = ["--resume_from", RUN_ID, "--fork", "--run_id", other, "--num_iterations", "4"]
    done = launch(place, typed, processes=None).wait()
    assert done.code == 0 and "WARNING" not in done.text, done.text
    done = launch(place, typed, processes=None).wait()
    assert done.code == 2 and f"run {other} exists already" in done.err, done.text
    assert not list(place.glob("logs/*/overtaken-1"))


def test_a_checkpoint_from_elsewhere_at_its_end_is_finished_at_once(place: Path) -> None:
    """And it does not choose where on this machine a log is written."""
    outside = place / "outside"
    train(place, {**SHORT, "num_iterations": 2, "output_dir": str(outside)}, processes=None)
    shutil.move(run_folder(place) / "model_step000002.pt", place)
    shutil.rmtree(place / "logs")
    resumed = launch(place, ["--resume_from", "model_step000002.pt"], processes=None).wait()
    assert resumed.code == 0 and "WARNING" not in resumed.text, resumed.text
    assert (outside / f"{RUN_ID}.log").read_text().count("# ") == 2, "the run's own log is still the run's own"
    assert directory.finished_step(directory.list_checkpoints(run_folder(place))) == 2
    shutil.rmtree(outside)
    typed = ["--resume_from", "model_step000002.pt", "--num_iterations", "3"]
    resumed = launch(place, typed, processes=None).wait()
    assert resumed.code == 0 and "the log goes into the run's folder" in resumed.text, resumed.text
    assert not outside.exists() and last_step(place) == 3
