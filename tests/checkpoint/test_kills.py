"""Killed at any instant: the newest committed checkpoint is whole, and a start clears what is left.

UNBROKEN_KILLS sets how many random instants are tried.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.saving import assert_whole, whole_tree
from unbroken.checkpoint import disk
from unbroken.checkpoint.format import schema
from unbroken.checkpoint.writer import RunCheckpointWriter
from unbroken.distributed.world import World

KILLS = int(os.environ.get("UNBROKEN_KILLS", "200"))
CALLS = ("open", "pwrite", "ftruncate", "fsync", "rename", "unlink", "link", "close")


def in_child(work: Callable[[int], None]) -> tuple[int, int]:
    """Fork, do `work(pipe)` there; (pid, the end of the pipe on which it tells what it has committed)."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(reading)
            # OpenMP's threads do not survive a fork: a child that asked for them would hang
            torch.set_num_threads(1)
            work(writing)
            code = 0
        except BaseException as error:
            print(f"child: {error!r}", file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    os.close(writing)
    return pid, reading


def committed(reading: int) -> int:
    """The last step that the child called durable; 0 if none."""
    said = b""
    while piece := os.read(reading, 65536):
        said += piece
    os.close(reading)
    steps = said.split(b"\n")[:-1]
    return int(steps[-1]) if steps else 0


def save_for_ever(folder: Path, first: int, told: int, until: int = 2**30, keep_last: int = 2) -> None:
    """Save one step after the other, every second one linked as the final one too."""
    with RunCheckpointWriter(folder, World.single(), keep_last=keep_last) as saver:
        for step in range(first, until):
            saver.save(whole_tree(step), step)
            saver.wait()
            if step % 2:
                saver.link_final(step)
                saver.wait()
            for outcome in saver.results():
                assert outcome.error is None, outcome.error
            os.write(told, f"{step}\n".encode())


@pytest.mark.first
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_killed_at_random_instants(tmp_path: Path) -> None:
    draw = random.Random(os.environ.get("UNBROKEN_SEED", "1"))
    newest = 0
    for _ in range(KILLS):
        first = newest + 1
        pid, reading = in_child(partial(save_for_ever, tmp_path, first))
        time.sleep(draw.uniform(0.0, 0.12))
        os.kill(pid, signal.SIGKILL)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL, "the child ended by itself"
        newest = assert_whole(tmp_path, max(newest, committed(reading)))
    assert newest > 0, "no child lived long enough to save anything"


def killing(call: Callable[..., Any], counter: list[int], nth: int, after: bool) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        counter[0] += 1
        last = counter[0] == nth
        if last and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            return call(*args, **kwargs)
        finally:
            if last:
                os.kill(os.getpid(), signal.SIGKILL)

    return wrapper


# On the disk, after a call is before the next one, except where several threads write.
@pytest.mark.parametrize("after", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_killed_at_every_system_call_in_turn(tmp_path: Path, after: bool) -> None:
    """Before and after each call of three saves, of which the last recycles what the first has left."""

    def work(folder: Path, nth: int, told: int) -> None:
        counter = [0]
        for name in CALLS:
            setattr(os, name, killing(getattr(os, name), counter, nth, after))
        disk.libc_fallocate = killing(disk.libc_fallocate, counter, nth, after)
        save_for_ever(folder, 1, told, until=4, keep_last=1)

    for nth in range(1, 400):
        folder = tmp_path / str(nth)
        folder.mkdir()
        pid, reading = in_child(partial(work, folder, nth))
        status = os.waitpid(pid, 0)[1]
        assert_whole(folder, committed(reading))
        if status == 0:
            assert nth > 40, f"only {nth} calls were tried"
            return
        assert status == signal.SIGKILL
    raise AssertionError("the saves make more calls than were tried")


def test_twin_without_the_temporary_name_a_kill_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written under its own name at once, a killed file is found damaged: the check above is no formality."""
    monkeypatch.setattr(schema, "temporary_name", lambda name: name)

    def work(told: int) -> None:
        os.pwrite = killing(os.pwrite, [0], 1, True)
        save_for_ever(tmp_path, 1, told, until=2)

    pid, reading = in_child(work)
    os.waitpid(pid, 0)
    with pytest.raises(AssertionError):
        assert_whole(tmp_path, committed(reading))
