"""The guess at which checkpoint will be wanted: the newest, never more than a guess, never an error."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.harness import RUN_ID
from unbroken.runtime import startup

OTHER = "3b241101-e2bb-4255-8caf-4136c566a962"


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    """Two runs; the newest file is the other one's."""
    folder = tmp_path / "logs"
    for age, name in enumerate([f"{OTHER}/final.pt", f"{RUN_ID}/model_step000002.pt", f"{RUN_ID}/model_step000001.pt"]):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * 100)
        os.utime(path, (1e9 - age, 1e9 - age))
    return folder


def test_the_newest_of_what_is_named(logs: Path) -> None:
    assert startup.guess("latest", logs) == startup.guess("auto", logs) == logs / OTHER / "final.pt"
    assert startup.guess(RUN_ID, logs) == logs / RUN_ID / "model_step000002.pt"
    assert startup.guess(str(logs / RUN_ID), logs) == logs / RUN_ID / "model_step000002.pt"
    named = logs / RUN_ID / "model_step000001.pt"
    assert startup.guess(str(named), logs) == named


def test_what_is_not_there_is_nobody_s_error(logs: Path, tmp_path: Path) -> None:
    for wanted in ("latest", "auto", "nowhere.pt", "\0", "x" * 10_000):
        assert startup.guess(wanted, tmp_path / "empty") is None
    startup.read(tmp_path / "nowhere.pt")
    startup.read(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    startup.read(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(logs / OTHER / "final.pt")
    startup.read(tmp_path / "link")


@pytest.mark.parametrize(
    ("argv", "env", "read"),
    [
        (["--resume_from", "auto"], {}, True),
        (["--model", "d2", "--resume_from=latest"], {}, True),
        (["--resume_from"], {}, False),
        ([], {}, False),
        ([], {"TORCHELASTIC_RESTART_COUNT": "1"}, True),
        (["--resume_from", "auto"], {"LOCAL_RANK": "1"}, False),
    ],
)
def test_who_reads(
    logs: Path, monkeypatch: pytest.MonkeyPatch, argv: list[str], env: dict[str, str], read: bool
) -> None:
    seen: list[Path] = []
    monkeypatch.setattr(startup.threading.Thread, "start", lambda thread: seen.append(thread._args[0]))
    for name in ("LOCAL_RANK", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    startup.start(argv, logs)
    assert seen == ([logs / OTHER / "final.pt"] if read else [])
