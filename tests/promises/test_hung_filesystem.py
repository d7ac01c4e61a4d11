"""A filesystem that does not answer: a signal ends the start that waits for it, and no log is read without end."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.harness import RUN_ID, SHORT, arguments, launch, log_path, train
from tests.hung_fuse import hung_folder
from unbroken.files import read_whole
from unbroken.mirror import upload
from unbroken.mirror.store import Storage


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("hung", ["logs", "data/hung"])
def test_a_signal_ends_a_start_that_waits(place: Path, hung: str, number: signal.Signals) -> None:
    """In the search for runs, and in the opening of shards."""
    with hung_folder(place / hung):
        shards = {"input_bin": "data/hung/a.bin"} if hung != "logs" else {}
        running = launch(place, arguments({**SHORT, "resume_from": "auto", **shards}), processes=None)
        waits_in = Path(f"/proc/{running.process.pid}/wchan")
        running.until(lambda: waits_in.read_text() == "request_wait_answer")
        began = time.monotonic()
        running.process.send_signal(number)
        done = running.wait(30)
    assert time.monotonic() - began < 10 and done.code in (128 + number, -number), done.text
    if hung != "logs":  # which is waited for before the signals are handled
        assert done.code == 128 + number, done.text
        assert done.err == f"stopped by {number.name} before the first step; the same command starts again\n"


def test_a_log_that_is_a_fifo_or_huge_is_not_uploaded(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train(place, SHORT, processes=None)
    log, remote = log_path(place), Storage(f"file://{place}/there").run(RUN_ID)
    log.unlink()
    os.mkfifo(log)
    journal = log.with_suffix(".metrics.jsonl")
    os.truncate(journal, 1 << 33)
    uploader = upload.Uploader(remote, log.parent, log, 0, 0)
    while uploader.round(at_end=True):
        pass
    err = capfd.readouterr()
    assert f"{log} cannot be read: it is not a regular file" in err.out + err.err
    assert f"{journal} cannot be read: it is longer than" in err.out + err.err
    os.truncate(place / f"there/{RUN_ID}/config.yaml", 1 << 33)
    with pytest.raises(OSError, match="longer than"):
        remote.text("config.yaml")
    with pytest.raises(OSError, match="longer than 10 bytes"):
        read_whole(log.parent / "config.yaml", 10)
