"""What a run has to tell never holds it up, a save that does is said and counted, and a step's time is its own."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
import torch

from tests.harness import RUN_ID
from tests.saving import whole_tree
from unbroken.checkpoint import writer
from unbroken.config import Config
from unbroken.distributed.world import Launch, World
from unbroken.metrics.logger import RunLogger
from unbroken.paths import Run


def test_a_disk_that_stands_still_costs_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps go on while write(2) into log and journal does not return; nothing is lost, and no order."""
    monkeypatch.chdir(tmp_path)
    run = Run(RUN_ID, "")
    run.create()
    thawed, written = threading.Event(), os.write

    def frozen(file: int, data: bytes) -> int:
        assert thawed.wait(60), "the steps waited for the disk"
        return written(file, data)

    about = {"header": {"step": "0"}, "environment": {}, "saved": {}, "compare": False}
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", frozen)
        with RunLogger(config=Config(), run=run, start_step=0, world=World.single(), **about) as history:  # type: ignore[arg-type]
            for step in range(1, 6):
                history.step_begins()
                history.train(step, torch.tensor([float(step)]), tokens=step, lr=0.1)
            assert run.log.read_text() == ""
            thawed.set()
            history.make_durable()
            said = run.log.read_text().splitlines()[1:]
    assert said == [f"s:{step} trn:{step}.000000" for step in range(1, 6)]


class LateGpu:
    """A clock, and a GPU that needs a second for each step that the host issues to it in a hundredth."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.done = 0.0
        gpu, empty = self, torch.empty

        class Event:
            def __init__(self, **how: bool) -> None:
                self.done = 0.0

            def record(self) -> None:
                self.done = gpu.done = max(gpu.done, gpu.now) + 1.0

            def synchronize(self) -> None:
                gpu.now = max(gpu.now, self.done)

        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory=False, **how: empty(*shape, **how))


def test_no_step_is_left_out_of_the_time_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves and validations wait for the GPU between two steps; their own time is not training time."""
    monkeypatch.chdir(tmp_path)
    run = Run(RUN_ID, "")
    run.create()
    gpu, steps, took = LateGpu(monkeypatch), 24, []
    about = {"header": {"step": "0"}, "environment": {}, "saved": {}, "compare": False}
    world = World(Launch(), torch.device("cuda"))
    with RunLogger(config=Config(), run=run, start_step=0, world=world, **about) as history:  # type: ignore[arg-type]
        for step in range(1, steps + 1):
            if step % 4 == 0:
                history.flush()
                gpu.now += 5.0
                history.val(step - 1, 1.0)
            if step % 6 == 0:
                history.progress()
                gpu.now += 0.3
            history.step_begins()
            gpu.now += 0.01
            history.train(step, torch.tensor([1.0]), tokens=step, lr=0.1)
            took += history.new_steps()
        seconds = history.progress()["training_seconds"]
        took += history.new_steps()
    drained = sum(step % 4 == 0 or step % 6 == 0 for step in range(1, steps + 1))
    assert len(took) == steps and min(took) > 0.999
    assert seconds == pytest.approx(steps + 0.01 * (drained + 1))  # the GPU waits for the host's first kernel
    assert seconds == pytest.approx(sum(took))


def test_a_save_in_the_way_of_the_next_is_said_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk takes the first save only once the second has said that it waits."""
    monkeypatch.setattr(writer, "PATIENCE_SECONDS", 2.0)
    thawed = threading.Event()
    with writer.RunCheckpointWriter(tmp_path, World.single(), before_commit=lambda *_: assert_set(thawed)) as saver:
        saver.save(whole_tree(1), 1)
        saver.before_update()
        saver.save(whole_tree(2), 2, held_up=thawed.set)
        saver.before_update()
        saver.wait()
        first, second = saver.results()
    assert first.error is None and second.error is None
    assert first.blocked_seconds < 2.0 <= second.blocked_seconds


def assert_set(event: threading.Event) -> None:
    assert event.wait(60), "nobody said that a save is in the way"
