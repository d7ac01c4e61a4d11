"""A short run of the faults, one that must be found, and what a process says to which the system gives no more."""

from __future__ import annotations

import errno
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.lane import Lane, Violation
from tests.chaos.storage import FOREVER, Calls, Rules, shim
from tests.chaos.trainings import COURSES
from tests.harness import ROOT, RUN_ID, arguments, launch, train, write_corpus

pytestmark = pytest.mark.skipif(shim() is None, reason="no C compiler")
TYPED = ["--seed", "11", "--faults", "14", "--lanes", "1", "--courses", "short"]


@pytest.fixture
def rules(tmp_path: Path) -> Rules:
    return Rules(tmp_path / "rules")


@pytest.mark.first
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_under_faults_is_the_run_without_them() -> None:
    """The long one: python -m tests.chaos."""
    done = subprocess.run([sys.executable, "-m", "tests.chaos", *TYPED], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "1 short), 0 violations" in done.stdout, done.stdout + done.stderr


def test_twin_a_changed_checkpoint_is_found(tmp_path: Path, rules: Rules) -> None:
    """A run that ends with another corpus than the one that it is compared with."""
    course = COURSES[0]
    short = type(course)("short", {**course.flags, "num_iterations": 6})
    straight = tmp_path / "straight"
    write_corpus(straight)
    train(straight, {**short.typed, "learning_rate": 1.001e-3}, processes=None)
    with pytest.raises(AssertionError, match="differs"):
        Lane(short, tmp_path / "run", straight, rules, random.Random(1)).finish()
    lane = Lane(short, tmp_path / "other", straight, rules, random.Random(1))
    lane.launch()
    lane.running.kill()  # type: ignore[union-attr]
    with pytest.raises(Violation, match="it ended by itself"):
        lane.down()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    write_corpus(tmp_path)
    yield tmp_path


@pytest.mark.parametrize(
    ("calls", "part", "error", "said"),
    [
        (Calls.THREAD, "", errno.EAGAIN, "error: no more threads can be started; raise `ulimit -u`"),
        (Calls.OPEN_READ, ".bin", errno.EIO, "error: cannot read data/"),
        (Calls.READ, ".bin", errno.ESTALE, "error: cannot read data/"),
        (Calls.OPEN_READ, ".bin", errno.EACCES, "error: cannot read data/"),
    ],
)
def test_what_may_be_gone_at_the_next_attempt_is_one_line_and_exit_code_1(
    place: Path, rules: Rules, calls: Calls, part: str, error: int, said: str
) -> None:
    library = shim()
    assert library is not None
    rules.add(calls, place, part, error=error, times=FOREVER)
    changes = {"run_id": RUN_ID, "num_iterations": 2}
    done = launch(place, arguments(changes), None, env=rules.environment(library)).wait()
    lines = [line for line in done.err.splitlines() if "WARNING" not in line]
    assert len(lines) == 1 and lines[0].startswith(said), done.text
    assert done.code == (2 if error == errno.EACCES else 1), done.text
