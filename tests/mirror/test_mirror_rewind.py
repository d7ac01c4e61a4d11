"""A run that was set back, and its storage: whoever is killed before the other has heard of it, no course is mixed up.

And what else can happen to a storage, its companion and the logs in it.
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
from pathlib import Path

import pytest

from tests.harness import (
    RUN_ID,
    SHORT,
    Done,
    arguments,
    assert_same_bits,
    children,
    command_line,
    flip,
    launch,
    run,
    trained,
)
from tests.storage import copy_all, counted, manifest, overtaken, prepared, stored, tool
from unbroken.checkpoint import rewind
from unbroken.checkpoint.directory import Fingerprint
from unbroken.mirror import upload
from unbroken.mirror.store import Manifest, Storage
from unbroken.mirror.upload import Uploader

LOG, JOURNAL = f"{RUN_ID}.log", f"{RUN_ID}.metrics.jsonl"
FOUR = {**SHORT, "num_iterations": 4}
BACK = ["--learning_rate", "5e-3", "--num_iterations", "6"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 steps, in `a`, and its storage."""
    place = tmp_path_factory.mktemp("finished")
    trained(place / "a", FOUR)
    assert tool(place / "a", "mirror", RUN_ID, f"file://{place}/store").code == 0
    return place


@pytest.fixture
def place(folder: Path) -> Path:
    """A copy of both, and `b`, an empty machine."""
    prepared(folder / "b")
    return folder


@pytest.fixture(scope="module")
def set_back(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The end of the run once it was set back to step 2 and has taken another course, undisturbed."""
    there = tmp_path_factory.mktemp("set_back")
    shutil.copytree(finished / "a", there, dirs_exist_ok=True)
    done = run(there, "--resume_from", f"logs/{RUN_ID}/model_step000002.pt", *BACK)
    assert done.code == 0, done.text
    return there / "logs" / RUN_ID / "final.pt"


def folder(machine: Path) -> Path:
    return machine / "logs" / RUN_ID


def store(place: Path) -> Path:
    return place / "store" / RUN_ID


def mirroring(place: Path, machine: str) -> Uploader:
    run_folder = folder(place / machine)
    return Uploader(Storage(f"file://{place}/store").run(RUN_ID), run_folder, run_folder / LOG, 0, 0)


def latest(place: Path, machine: str, *more: str) -> Done:
    done = run(place / machine, "--resume_from", "latest", "--mirror", f"file://{place}/store", *more)
    assert done.code == 0, done.text
    return done


# ---- two courses -----------------------------------------------------------------------------------------------------


def test_killed_before_the_storage_has_heard_of_it(place: Path, set_back: Path) -> None:
    """On an empty machine, where nothing is left to tell it by; and what was overtaken there is kept, whole."""
    typed = ["--resume_from", f"file://{place}/store/{RUN_ID}/model_step000002.pt", *BACK]
    running = launch(place / "b", typed, processes=None, hold=2)  # without --mirror: the storage is not told
    running.kill_when(lambda: bool(rewind.read_rewinds(folder(place / "b"))))
    done = latest(place, "b", *BACK)
    assert "downloaded" not in done.out and "model_step000002.pt at step 2" in done.out, done.text
    assert_same_bits(folder(place / "b") / "final.pt", set_back)
    assert rewind.read_rewinds(folder(place / "b")) == manifest(place / "store").rewinds
    assert overtaken(place / "store") == {"model_step000004.pt", "final.pt"}
    assert {*counted(place / "store")} == {*(f"model_step00000{step}.pt" for step in (2, 4, 6)), "final.pt"}


def test_a_machine_that_was_further_follows(place: Path, set_back: Path) -> None:
    """It has the old course on its disk, the other one only the storage."""
    shutil.copytree(place / "a", place / "c")
    typed = ["--resume_from", f"logs/{RUN_ID}/model_step000002.pt", *BACK, "--save_every", "1"]
    running = launch(place / "a", [*typed, "--mirror", f"file://{place}/store"], processes=None, hold=3)
    running.kill_when(lambda: "model_step000003.pt" in counted(place / "store"))
    shutil.rmtree(place / "a")
    done = latest(place, "c", *BACK)
    assert "model_step000004.pt, final.pt overtaken by another machine, kept in" in done.out, done.text
    assert_same_bits(folder(place / "c") / "final.pt", set_back)
    assert {path.name for path in folder(place / "c").glob("overtaken-1/*.pt")} == {"model_step000004.pt", "final.pt"}


def test_one_that_is_whole_gives_way_only_to_one_that_is_further(place: Path) -> None:
    """Not to other bytes of the same step, of which a kill would leave neither."""
    trained(place / "other", FOUR)
    before = {path.name: path.read_bytes() for path in store(place).iterdir() if path.suffix in (".pt", ".json")}
    assert Fingerprint.of(folder(place / "other") / "final.pt") != Fingerprint.of(folder(place / "a") / "final.pt")
    copy_all(mirroring(place, "other"))
    after = {path.name: path.read_bytes() for path in store(place).iterdir() if path.suffix in (".pt", ".json")}
    assert after == before


def test_going_back_that_the_storage_refuses_is_tried_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rewind.record_rewind(folder(place / "a"), 2)
    (folder(place / "a") / "final.pt").unlink()
    (folder(place / "a") / "model_step000004.pt").unlink()
    behind = mirroring(place, "a")

    def refuse(manifest: Manifest) -> None:
        raise OSError("no")

    before = manifest(place / "store")
    monkeypatch.setattr(behind.remote, "publish", refuse)
    with pytest.raises(OSError, match="no"):
        behind.round()
    assert manifest(place / "store") == before
    monkeypatch.undo()
    copy_all(behind)
    assert {*counted(place / "store")} == {"model_step000002.pt"}
    assert overtaken(place / "store") == {"model_step000004.pt", "final.pt"}


def test_two_that_went_back_without_knowing_of_each_other(place: Path) -> None:
    """The later one counts; the other one keeps what it trained, and copies nothing any more."""
    shutil.copytree(place / "a", place / "c")
    for machine, step in (("a", 2), ("c", 4)):
        typed = ["--resume_from", f"logs/{RUN_ID}/model_step00000{step}.pt", *BACK]
        assert run(place / machine, *typed).code == 0
    copy_all(mirroring(place, "a"))
    assert overtaken(place / "store") == {"model_step000004.pt", "final.pt"}
    copy_all(mirroring(place, "c"))
    after = manifest(place / "store")
    assert {*counted(place / "store")} == {*(f"model_step00000{step}.pt" for step in (2, 4, 6)), "final.pt"}
    assert_same_bits(stored(place / "store", "final.pt"), folder(place / "c") / "final.pt")
    copy_all(mirroring(place, "a"))
    assert manifest(place / "store") == after
    done = latest(place, "a", "--num_iterations", "6")
    assert "overtaken by another machine" in done.out and "nothing to do" in done.out, done.text
    assert_same_bits(folder(place / "a") / "final.pt", folder(place / "c") / "final.pt")


def test_a_damaged_newest_one_does_not_count_for_ever(place: Path) -> None:
    """Or retention there would take everything older for superfluous."""
    flip(stored(place / "store", "final.pt"))
    done = latest(place, "b", "--keep_last", "1", "--save_every", "1", "--num_iterations", "3", "--warmdown_iters", "0")
    assert done.text.count("passing over") == 1, done.text
    assert {*counted(place / "store")} == {"model_step000003.pt", "final.pt"}
    assert_same_bits(stored(place / "store", "final.pt"), folder(place / "b") / "final.pt")


# ---- the companion ---------------------------------------------------------------------------------------------------


def test_a_companion_that_dies_is_started_again(place: Path) -> None:
    typed = arguments({**FOUR, "num_iterations": 10, "save_every": 5, "mirror": f"file://{place}/new"})
    running = launch(place / "b", typed, processes=None, hold=6)

    def companions() -> list[int]:
        return [pid for pid in children(running.process.pid) if b"--attached" in command_line(pid)]

    running.until(lambda: bool(companions()))
    (first,) = companions()
    os.kill(first, signal.SIGKILL)
    running.until(lambda: bool(set(companions()) - {first}))
    running.release()
    done = running.wait()
    assert done.code == 0 and done.err.count("mirror: its process has died; it is started again") == 1, done.text
    assert "Traceback" not in done.text
    assert_same_bits(stored(place / "new", "final.pt"), folder(place / "b") / "final.pt")


def test_a_storage_that_answers_and_refuses_is_given_up_after_the_end(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that it does not keep a machine busy, however many bytes it takes before it refuses."""
    copying, ended, tries = mirroring(place, "a"), threading.Event(), []

    def refuse(at_end: bool) -> bool:
        tries.append(at_end)
        if len(tries) == 3:
            ended.set()
        raise OSError("no")

    monkeypatch.setattr(copying, "round", refuse)
    monkeypatch.setattr(upload, "FIRST_WAIT", 0.0)
    with pytest.raises(OSError, match="no"):
        copying.follow(ended, tries=5)
    assert tries == [False] * 3 + [True] * 5


def test_keys_are_read_again_after_a_failure(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copying, ended = mirroring(place, "a"), threading.Event()
    first, refuse = copying.remote.storage.fs, OSError("ExpiredToken")

    def expired(*_: object, **__: object) -> None:
        ended.set()
        raise refuse

    monkeypatch.setattr(first, "cat_file", expired)
    (store(place) / "manifest.json").unlink()
    copying.follow(ended, tries=2)
    assert copying.remote.storage.fs is not first and "final.pt" in counted(place / "store")


def test_a_run_folder_that_is_a_link_to_another_name(place: Path) -> None:
    (place / "scratch").mkdir()
    shutil.move(folder(place / "a"), place / "scratch/run42")
    folder(place / "a").symlink_to(place / "scratch/run42")
    assert tool(place / "a", "mirror", RUN_ID, f"file://{place}/one").code == 0
    latest(place, "a", "--num_iterations", "5", "--mirror", f"file://{place}/two")
    for name in ("one", "two"):
        assert {LOG, JOURNAL} <= {path.name for path in (place / name / RUN_ID).iterdir()}
        assert "final.pt" in counted(place / name)


# ---- logs ------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_comes_with_its_own_log(place: Path) -> None:
    """Though the one here is longer: of attempts that came to nothing."""
    late = folder(place / "b")
    shutil.copytree(folder(place / "a"), late, ignore=shutil.ignore_patterns("*4.pt", "final.pt"))
    text = (late / LOG).read_text().partition("s:3 ")[0] + "# of attempts that came to nothing\n" * 99
    (late / LOG).write_text(text)
    done = latest(place, "b", "--num_iterations", "5")
    assert f"{LOG} differs from the storage's copy, kept in" in done.out and "lacks the losses" not in done.text, (
        done.text
    )
    assert "s:4 trn:" in (late / LOG).read_text() and (late / "overtaken-1" / LOG).read_text() == text
    assert (store(place) / LOG).read_bytes() == (late / LOG).read_bytes()


def test_a_log_is_brought_whatever_becomes_of_the_rest(place: Path) -> None:
    """The copy that is newer is damaged, and a folder stands where the config belongs."""
    here = folder(place / "b")
    shutil.copytree(folder(place / "a"), here, ignore=shutil.ignore_patterns("*4.pt", "final.pt", "*.log", "*.jsonl"))
    (here / "config.yaml").unlink()
    (here / "config.yaml").mkdir()
    flip(stored(place / "store", "final.pt"))
    before = (store(place) / LOG).read_bytes()
    done = latest(place, "b")
    assert "continuing with the local files" in done.err and "model_step000002.pt at step 2" in done.out, done.text
    assert (here / LOG).read_bytes().startswith(before) and "lacks the losses" not in done.text


def test_a_log_that_is_a_link_has_its_own_name_there(place: Path) -> None:
    shutil.move(folder(place / "a") / LOG, place / "my.log")
    (folder(place / "a") / LOG).symlink_to(place / "my.log")
    latest(place, "a", "--num_iterations", "5", "--mirror", f"file://{place}/new")
    assert (place / "new" / RUN_ID / LOG).read_bytes() == (place / "my.log").read_bytes()
    assert (place / "new" / RUN_ID / JOURNAL).is_file() and not (place / "new" / RUN_ID / "my.log").exists()


@pytest.mark.parametrize("name", [LOG, JOURNAL])
def test_a_log_that_is_no_file_is_refused(place: Path, name: str) -> None:
    (folder(place / "a") / name).unlink()
    os.mkfifo(folder(place / "a") / name)
    done = run(place / "a", "--resume_from", "auto", "--num_iterations", "5", "--mirror", f"file://{place}/store")
    assert done.code == 2 and f"{name}: it is no file" in done.err, done.text


def test_what_was_kept_is_not_written_over(place: Path) -> None:
    remote = Storage(f"file://{place}/store").run(RUN_ID)
    kept = [remote.keep_text(LOG, text) for text in (b"x", b"y")]
    assert [(store(place) / Path(url).name).read_text() for url in kept] == ["x", "y"]


def test_links_that_somebody_planted_are_not_followed(place: Path) -> None:
    (place / "mine").write_text("mine")
    for name in (".attempt.tmp", ".config.yaml.tmp", ".rewinds.json.tmp"):
        (folder(place / "a") / name).symlink_to(place / "mine")
    done = run(place / "a", "--resume_from", f"logs/{RUN_ID}/model_step000002.pt", "--learning_rate", "1e-3")
    assert done.code == 0 and (place / "mine").read_text() == "mine", done.text
