"""--keep_best: which checkpoints stay, and where best.pt leads, at whatever instant the program is killed."""

from __future__ import annotations

import os
import random
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.test_kills import in_child, killing
from tests.saving import RUN_ID, whole_tree
from unbroken.checkpoint import directory
from unbroken.checkpoint.directory import FOR_BEST
from unbroken.checkpoint.format.schema import BEST, checkpoint_name
from unbroken.checkpoint.writer import RunCheckpointWriter
from unbroken.distributed.world import World
from unbroken.run.best import BestCheckpoints, link_best
from unbroken.run.state import Progress

LOSSES = {1: 5.0, 2: 3.0, 3: 4.0, 4: 2.0, 5: 6.0, 6: 2.5, 7: 3.5, 8: 9.0}


def train_on(folder: Path, keep_last: int, last: int) -> None:
    """Go on from the newest checkpoint to the end, as a training does, with a validation at each step."""
    newest = directory.list_checkpoints(folder)
    progress = Progress()
    if newest:
        with directory.open_file(newest[-1].path) as file:
            progress = Progress.from_checkpoint({**file.values["progress"], "history": {}})
    if newest and newest[-1].final:
        return
    directory.clear_debris(folder)
    assert link_best(folder, progress, 2) == ""
    best = BestCheckpoints(2, progress)
    with RunCheckpointWriter(folder, World.single(), keep_last=keep_last) as writer:
        for step in range(progress.step + 1, last + 1):
            progress.step = step
            best.add(step, LOSSES[step])
            periodic = step % 3 == 0
            if periodic or step in best.steps:
                tree = whole_tree(step)
                progress.saved_for = "" if periodic else FOR_BEST
                tree["args"]["num_iterations"] = last
                tree["progress"] |= {"step": step, "best": progress.best, "saved_for": progress.saved_for}
                writer.save(tree, step, best=partial(best.settle, step))
        if last in directory.periodic_steps(folder):
            writer.link_final(last, RUN_ID, best.steps)
        else:
            writer.save(whole_tree(last), last, final=True, best=partial(best.settle, last))


def left(folder: Path) -> tuple[list[str], str]:
    """The names of the checkpoints, and where best.pt leads."""
    return sorted(name for name in os.listdir(folder) if not name.startswith(".")), os.readlink(folder / BEST)


@pytest.mark.parametrize(("keep_last", "last", "steps"), [(0, 8, [3, 4, 6]), (1, 5, [2, 4]), (1, 6, [4, 6])])
def test_killed_at_every_change_of_a_name(tmp_path: Path, keep_last: int, last: int, steps: list[int]) -> None:
    """What is there in the end is what is there without a kill; after each kill best.pt leads to a whole file."""
    straight = tmp_path / "straight"
    straight.mkdir()
    train_on(straight, keep_last, last)
    assert left(straight) == ([BEST, "final.pt", *map(checkpoint_name, steps)], checkpoint_name(4))

    def work(folder: Path, nth: int, told: int) -> None:
        counter = [0]
        for name in ("rename", "replace", "unlink", "symlink", "link"):
            setattr(os, name, killing(getattr(os, name), counter, nth, True))
        train_on(folder, keep_last, last)

    # Every second change, at the one parameter the odd ones, at the others the even ones, or all of them.
    stride = 1 if os.environ.get("UNBROKEN_ALL_KILLS") else 2
    for nth in range(1 + keep_last % stride, 100, stride):
        folder = tmp_path / str(nth)
        folder.mkdir()
        pid, reading = in_child(partial(work, folder, nth))
        status = os.waitpid(pid, 0)[1]
        os.close(reading)
        if os.path.lexists(folder / BEST):
            assert directory.find_damage(folder / BEST) is None
        train_on(folder, keep_last, last)
        assert left(folder) == left(straight), f"killed at change {nth}"
        if status == 0:
            assert nth > 15, f"only {nth} changes were tried"
            return
        assert status == signal.SIGKILL
    raise AssertionError("there are more changes of names than were tried")


def test_the_lowest_losses_stay_whatever_saves_fail() -> None:
    """Against a computation from all losses: the N lowest of the steps that were asked for and saved."""
    draw = random.Random(7)
    for _ in range(300):
        progress, limit = Progress(), draw.randint(0, 3)
        best = BestCheckpoints(limit, progress)
        saved, failed = dict[int, float](), None
        for step in range(20):
            loss = draw.choice([float("nan"), *map(float, range(6))])
            best.add(step, loss)
            if step not in best.steps:
                continue
            kept = best.settle(step, failed)
            saved[step] = loss
            saved.pop(failed, None)
            assert list(kept) == sorted(saved, key=lambda step: (saved[step], step))[:limit]
            saved = {step: saved[step] for step in kept} if (fails := draw.random() < 0.1) is False else saved
            failed = step if fails else None


def test_a_link_to_elsewhere_is_not_followed(tmp_path: Path) -> None:
    """Nor one to a file that is gone; without a link the newest checkpoint tells."""
    run, other = tmp_path / "run", tmp_path / "other"
    for folder in (run, other):
        folder.mkdir()
        with RunCheckpointWriter(folder, World.single()) as writer:
            for step in (1, 2):
                tree: dict[str, Any] = whole_tree(step)
                tree["progress"]["best"] = [[1, 0.5], [2, 0.75]][:step]
                writer.save(tree, step)
    for target in ("../other/model_step000002.pt", "model_step000009.pt", BEST):
        (run / BEST).unlink(missing_ok=True)
        (run / BEST).symlink_to(target)
        assert directory.find_best(run) == run / checkpoint_name(1)
    directory.link_best(run, [9, 2, 1])
    assert os.readlink(run / BEST) == checkpoint_name(2)
    directory.link_best(run, [9])
    assert not os.path.lexists(run / BEST)
