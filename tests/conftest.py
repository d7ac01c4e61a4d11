"""A finished run, for the tests that go on from one."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.harness import RUN_ID, train, write_corpus

# A busy machine may stand still for longer than an example is given.
settings.register_profile("unbroken", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unbroken")


@pytest.fixture(autouse=True, scope="session")
def can_be_interrupted() -> None:
    """A shell has what it starts in the background ignore Ctrl-C, and that would be inherited."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a corpus."""
    write_corpus(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 10 steps with checkpoints of 5 and 10."""
    folder = tmp_path_factory.mktemp("finished")
    write_corpus(folder)
    train(folder, {"run_id": RUN_ID, "num_iterations": 10, "warmup_iters": 0, "warmdown_iters": 4}, processes=None)
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of that run to play with."""
    shutil.copytree(finished, tmp_path / "run", symlinks=True)
    return tmp_path / "run"
