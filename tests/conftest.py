"""A finished run, for the tests that go on from one; and which tests `make test-fast` leaves out."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from torch.multiprocessing.spawn import spawn

from tests import fork_server
from tests.harness import RUN_ID, train, write_corpus

# Where it is set, each process would compile the sources again, for a tenth of a second.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# A busy machine may stand still for longer than an example is given.
settings.register_profile("unbroken", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unbroken")

STARTERS = {fork_server.Popen, fork_server.run, fork_server.start_method, spawn, subprocess.Popen, subprocess.run}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: not part of `make test-fast`; whatever starts a process is, unasked")
    config.addinivalue_line(
        "markers", "first: begun before the others, for half a minute: the end is not to wait for it"
    )
    config.addinivalue_line("markers", "fast: part of `make test-fast`, though it starts a process")


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow every test that starts a process, by itself or through what it calls and the fixtures it takes.

    `fast` on a test takes precedence (see the Makefile); `slow` is typed at the few that take long without a process.
    Those marked `first` come before the others.
    """
    known: dict[Any, bool] = {}
    items.sort(key=lambda item: item.get_closest_marker("first") is None)
    for item in items:
        if isinstance(item, pytest.Function):
            fixtures = item._fixtureinfo.name2fixturedefs.values()
            functions = [item.function, *(definition.func for group in fixtures for definition in group)]
            if any(starts_a_process(function, known) for function in functions):
                item.add_marker("slow")


def starts_a_process(what: Any, known: dict[Any, bool]) -> bool:
    """Whether a function, or a method of a class, of the tests names one of STARTERS, or a function that does."""
    if what in STARTERS:
        return True
    if what not in known:
        known[what] = False  # it may call itself
        known[what] = any(starts_a_process(found, known) for found in named_by(what))
    return known[what]


def named_by(what: Any) -> Iterator[Callable[..., Any]]:
    """The functions and classes that the code of a function names: the tests' own, and STARTERS."""
    if isinstance(what, type):
        for method in vars(what).values():
            if isinstance(method, types.FunctionType):
                yield from named_by(method)
        return
    space = getattr(what, "__globals__", {})
    names = set(names_in(getattr(what, "__code__", None)))
    values = [space[name] for name in names & set(space)]
    values += [vars(module).get(name) for module in values if isinstance(module, types.ModuleType) for name in names]
    for value in values:
        if isinstance(value, (types.FunctionType, type)) and (
            value in STARTERS or value.__module__.partition(".")[0] == "tests"
        ):
            yield value


def names_in(code: types.CodeType | None) -> Iterator[str]:
    if code is not None:
        yield from code.co_names
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                yield from names_in(constant)


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
