"""What a power cut may leave at any moment of a course is what was promised: powercut.py does it at length."""

from __future__ import annotations

import os
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.chaos import images, powercut, storage
from tests.chaos.checks import Checker
from tests.chaos.courses import Course, Phase, Reference, record, refer
from tests.chaos.powercut import Resumes, record_again, replay
from tests.chaos.storage import Calls
from tests.harness import RUN_ID, TINY, arguments

CARELESS = Path(__file__).resolve().parent.parent / "careless_training.py"
FLAGS = {"num_iterations": 5, "save_every": 1, "keep_last": 1, "warmup_iters": 0, "warmdown_iters": 0, "name": "probe"}
TORN = (Calls.WRITE, ".model_step000004", storage.KILL_TORN, 1)
NAMED = (Calls.RENAME, ".final.pt.tmp", storage.KILL_AFTER, 0)
COURSE = Course(
    "short",
    [Phase(arguments({**TINY, **FLAGS, "run_id": RUN_ID, "resume_from": "auto"}))],
    [[TORN, NAMED]],
    name_link="probe",
)


@pytest.fixture(scope="module")
def library() -> Path:
    found = storage.shim()
    if found is None:
        pytest.skip("there is no C compiler for the recorder")
    return found


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return refer(COURSE, tmp_path_factory.mktemp("reference") / "run")


def test_no_power_cut_breaks_a_promise(library: Path, reference: Reference, tmp_path: Path) -> None:
    """A start, a kill in a save, a kill before the end is durable, and the start after a cut, cut at every call."""
    recording = record(COURSE, tmp_path / "one", library)
    rng = random.Random(1)
    resumes = Resumes(recording, reference, tmp_path / "resumed", 4, rng)
    checker = Checker(COURSE, reference, tmp_path / "scratch")
    outcome = replay(recording, checker, 12, "1", resumes.chosen)
    resumes.add_to(outcome)
    assert list(powercut.describe(outcome, "1")) == []
    assert outcome.states > 1000 and outcome.resumed == 4
    again = record_again(recording, len(recording.calls) // 2, "1", tmp_path / "again", library)
    outcome = replay(again, Checker(COURSE, reference, tmp_path / "scratch"), 6, "1")
    assert list(powercut.describe(outcome, "1")) == [] and outcome.states > 100


@pytest.mark.parametrize(
    ("careless", "said"),
    [
        ("names", "what was saved is gone"),
        ("order", "a file with the name of a whole one is not"),
        ("log", "the log lacks a step"),
    ],
)
def test_a_program_without_care_is_found_out(
    careless: str, said: str, library: Path, reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CARELESS", careless)
    once = replace(COURSE, kills=[[]])
    recording = record(once, tmp_path / "one", library, script=CARELESS)
    outcome = replay(recording, Checker(once, reference, tmp_path / "scratch"), 8, "1")
    assert said in outcome.violations, outcome.violations


real = pytest.mark.skipif(not os.environ.get("POWER_CUTS"), reason="POWER_CUTS=N cuts ext4 and xfs N times; as root")


@pytest.fixture(params=sorted(images.KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    if os.geteuid() or shutil.which(f"mkfs.{request.param}") is None:
        pytest.skip(f"takes root and mkfs.{request.param}")
    return str(request.param)


@real
def test_no_real_power_cut_breaks_a_promise(kind: str, tmp_path: Path) -> None:
    assert images.cut_image(kind, tmp_path, int(os.environ["POWER_CUTS"]), "1").violations == {}


@real
def test_a_real_power_cut_finds_a_program_without_care_out(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CARELESS", "names")
    assert "what was saved is gone" in images.cut_image(kind, tmp_path, 10, "1", CARELESS).violations
