"""`locate.parse` interprets what --resume_from, --init_from and the tools are given."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness import OTHER_ID, RUN_ID
from unbroken.errors import UserError
from unbroken.run.locate import Target, parse


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with one run and one other folder."""
    (tmp_path / "logs" / RUN_ID).mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "text", [RUN_ID, RUN_ID[:4], RUN_ID[:13], f"logs/{RUN_ID}", f"logs/{RUN_ID}/", f"./logs/{RUN_ID}"]
)
def test_a_run(text: str) -> None:
    assert parse(text) == Target(text, "run", Path("logs", RUN_ID), RUN_ID)


def test_a_run_id_is_one_before_the_run_exists() -> None:
    assert parse(OTHER_ID).run_id == OTHER_ID


@pytest.mark.parametrize("text", ["auto", "latest"])
def test_a_search(text: str) -> None:
    assert parse(text) == Target(text, text)


def test_paths() -> None:
    assert parse("elsewhere") == Target("elsewhere", "folder", Path("elsewhere"))
    for text in (f"logs/{RUN_ID}/final.pt", "missing.pt", "0123", "x" * 5000):
        assert parse(text) == Target(text, "file", Path(text))


def test_a_file_comes_before_the_run_that_begins_so(place: Path) -> None:
    (place / RUN_ID[:8]).write_text("")
    assert parse(RUN_ID[:8]).kind == "file"


def test_a_prefix_of_two_runs_is_refused(place: Path) -> None:
    (place / "logs" / (RUN_ID[:-1] + ("0" if RUN_ID[-1] != "0" else "1"))).mkdir()
    with pytest.raises(UserError, match=r"2 runs under logs/ begin with it"):
        parse(RUN_ID[:8])


@pytest.mark.parametrize(
    ("end", "run_id", "name"),
    [
        ("latest", "", ""),
        ("auto", "", ""),
        (RUN_ID, RUN_ID, ""),
        (f"{RUN_ID}/latest", RUN_ID, ""),
        (f"{RUN_ID}/final.pt", RUN_ID, "final.pt"),
        (f"{RUN_ID}/model_step000002.pt", RUN_ID, "model_step000002.pt"),
    ],
)
def test_a_url(end: str, run_id: str, name: str) -> None:
    text = f"s3://bucket/runs/{end}"
    assert parse(text) == Target(text, "url", url="s3://bucket/runs", run_id=run_id, name=name)


@pytest.mark.parametrize("end", ["", "other.pt", f"{RUN_ID}/other.pt", "model_step000002.pt"])
def test_a_url_of_nothing(end: str) -> None:
    with pytest.raises(UserError, match=r"it must end in /latest"):
        parse(f"s3://bucket/runs/{end}")
