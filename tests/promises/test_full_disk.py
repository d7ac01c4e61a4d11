"""A disk that is full to the last byte when a run is started again: one line, nothing lost, the same bits later."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import OTHER_ID, RUN_ID, SHORT, arguments, assert_same_bits, last_step, launch, write_corpus
from unbroken.checkpoint import directory
from unbroken.metrics.logfile import read_log

PAGE = 4096
TYPED = arguments({**SHORT, "num_iterations": 4, "resume_from": "auto", "val_loss_every": 2})


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder whose logs/ is a filesystem of its own, with room for a few checkpoints."""
    folder = tmp_path / "run"
    folder.mkdir()
    write_corpus(folder)
    (folder / "logs").mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"none", bytes(folder / "logs"), b"tmpfs", 0, b"size=600m"):
        pytest.skip(f"no filesystem can be mounted here: {os.strerror(ctypes.get_errno())}")
    yield folder
    libc.umount2(bytes(folder / "logs"), 2)


def fill(disk: Path) -> Path:
    """Take all space that is left."""
    filling = disk / "filling"
    with open(filling, "wb", buffering=0) as file:
        try:
            while file.write(bytes(PAGE)):
                pass
        except OSError:
            return filling


@pytest.mark.parametrize("page_is_full", [False, True], ids=["", "log"])
def test_a_full_disk_at_a_restart(small_disk: Path, tmp_path: Path, page_is_full: bool) -> None:
    straight = tmp_path / "straight"
    straight.mkdir()
    write_corpus(straight)
    assert launch(straight, TYPED, processes=None).wait().code == 0
    log = small_disk / f"logs/{RUN_ID}/{RUN_ID}.log"
    running = launch(small_disk, TYPED, processes=None, hold=3)
    running.kill_when(lambda: last_step(small_disk) == 3 and directory.periodic_steps(log.parent) == [2])
    for path in (log, log.with_suffix(".metrics.jsonl")) if page_is_full else ():
        with open(path, "a") as file:  # the next line needs another block of the disk
            file.write("#" * (PAGE - 1 - path.stat().st_size % PAGE) + "\n")
    before = log.read_text()
    filling = fill(small_disk / "logs")
    done = launch(small_disk, TYPED, processes=None).wait()
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert done.code == 2 and len(errors) == 1 and "No space left" in errors[0], done.text
    assert "Traceback" not in done.text and log.read_text().startswith(before)
    assert directory.periodic_steps(log.parent) == [2]
    filling.unlink()
    done = launch(small_disk, TYPED, processes=None).wait()
    assert done.code == 0 and "repeated: identical" in done.out, done.text
    assert_same_bits(straight / f"logs/{RUN_ID}/final.pt", log.parent / "final.pt")
    assert read_log(log).train == read_log(straight / f"logs/{RUN_ID}/{RUN_ID}.log").train


def test_a_new_run_on_a_full_disk(small_disk: Path) -> None:
    filling = fill(small_disk / "logs")
    typed = arguments({**SHORT, "run_id": OTHER_ID})
    done = launch(small_disk, typed, processes=None).wait()
    assert done.code == 2 and done.err.count("error: ") == 1 and "No space left" in done.err, done.text
    assert "Traceback" not in done.text
    filling.unlink()
    done = launch(small_disk, typed, processes=None).wait()
    assert done.code == 0, done.text
