"""The log and the journal in a storage: all that was ever written, whatever is lost on a machine."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path

import pytest

from tests.harness import RUN_ID, SHORT, Done, run, trained
from unbroken import __main__ as door

LOG, JOURNAL = f"{RUN_ID}.log", f"{RUN_ID}.metrics.jsonl"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A machine with a run of 4 steps, and its storage."""
    folder = tmp_path_factory.mktemp("finished")
    trained(folder / "machine", {**SHORT, "num_iterations": 4, "mirror": f"file://{folder}/store"})
    return folder


def local(folder: Path, name: str) -> Path:
    return folder / "machine/logs" / RUN_ID / name


def copied(folder: Path, name: str) -> bytes:
    return (folder / "store" / RUN_ID / name).read_bytes()


def extend(folder: Path, resume_from: str) -> Done:
    flags = {"resume_from": resume_from, "num_iterations": 5, "mirror": f"file://{folder}/store"}
    done = run(folder / "machine", *(word for name, value in flags.items() for word in (f"--{name}", str(value))))
    assert done.code == 0, done.text
    return done


def test_the_copy_ends_where_the_run_ended(folder: Path) -> None:
    for name in (LOG, JOURNAL, "config.yaml"):
        assert copied(folder, name) == local(folder, name).read_bytes()
    assert json.loads(copied(folder, JOURNAL).splitlines()[-1])["event"] == "end"


def test_what_a_killed_copy_may_not_have_synced_is_synced_by_the_next(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though everything is there, so that nothing is copied."""
    monkeypatch.chdir(folder / "machine")
    synced, fsync = list[str](), os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: [fsync(file), synced.append(os.readlink(f"/proc/self/fd/{file}"))])
    assert door.main(["mirror", RUN_ID, f"file://{folder}/store"]) == 0
    assert {f"{folder}/store/{RUN_ID}", f"{folder}/store"} <= {*synced}


@pytest.mark.parametrize("kept", [0, 0.5])
def test_what_was_lost_here_is_brought_back_first(folder: Path, kept: float) -> None:
    """Though every checkpoint is still here."""
    before = {name: copied(folder, name) for name in (LOG, JOURNAL)}
    for name in before:
        path, content = local(folder, name), local(folder, name).read_bytes()
        path.unlink() if not kept else path.write_bytes(content[: int(kept * len(content))])
    done = extend(folder, "auto")
    assert "downloaded" not in done.out and "lacks the losses" not in done.text, done.text
    for name, content in before.items():
        now = local(folder, name).read_bytes()
        assert now.startswith(content) and len(now) > len(content)
        assert copied(folder, name) == now
    assert not list((folder / "store" / RUN_ID).glob("*-????????.log"))


def test_a_log_begun_anew_does_not_replace_the_one_there(folder: Path) -> None:
    """Resumed by its path a run looks into no storage."""
    before = {name: copied(folder, name) for name in (LOG, JOURNAL)}
    for name in before:
        local(folder, name).unlink()
    done = extend(folder, f"logs/{RUN_ID}/final.pt")
    assert f"mirror: {LOG} differs from the storage's copy, which is kept in" in done.out, done.text
    for name, content in before.items():
        start, dot, ending = name.partition(".")
        assert copied(folder, f"{start}-{zlib.crc32(content):08x}{dot}{ending}") == content
        assert copied(folder, name) == local(folder, name).read_bytes()


def test_another_log_here_is_kept(folder: Path) -> None:
    local(folder, LOG).write_text("# somebody's\n")
    done = extend(folder, RUN_ID)
    assert f"logs/{RUN_ID}/{LOG} differs from the storage's copy, kept in" in done.out, done.text
    assert local(folder, f"overtaken-1/{LOG}").read_text() == "# somebody's\n"
    assert copied(folder, LOG) == local(folder, LOG).read_bytes() and b"s:1 trn:" in copied(folder, LOG)


def test_a_dead_storage_is_no_reason_to_stop(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from unbroken.mirror import download
    from unbroken.mirror.store import RemoteRun, Storage

    class Dead(RemoteRun):
        def size_of(self, name: str) -> int:
            raise TimeoutError("no answer")

    here = download.LocalCheckpoint(RUN_ID, 4, 0.0, local(folder, "final.pt"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder / "machine")
        download._fetch_log(Dead(Storage(f"file://{folder}/store"), RUN_ID), here, {})
    said = capsys.readouterr().err
    assert "cannot look for the log in" in said and "continuing with the local files" in said
    assert local(folder, LOG).read_bytes() == copied(folder, LOG)
