"""--name: a readable name of a run, unique under the folder of runs, typed wherever a run_id is."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.harness import OTHER_ID, ROOT, RUN_ID, SHORT, arguments, assert_same_bits, launch, run, train, trained
from tests.storage import tool
from unbroken import __main__ as door
from unbroken import paths
from unbroken.config import parse
from unbroken.errors import UserError

AUTO = {**SHORT, "run_id": None, "resume_from": "auto"}


def begin(folder: Path, code: int = 0, **changes: Any) -> str:
    done = launch(folder, arguments({**AUTO, **changes}), processes=None).wait()
    assert done.code == code, done.text
    return done.text


def names(folder: Path) -> dict[str, str]:
    """Each name with the folder that its link spells."""
    return {link.name: os.readlink(link) for link in sorted((folder / "logs/by-name").iterdir())}


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run with the name base."""
    return trained(tmp_path_factory.mktemp("named"), {**SHORT, "name": "base"})


def test_a_name_is_taken_wherever_a_run_id_is(
    named: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(named)

    def said(*typed: str) -> str:
        capsys.readouterr()
        assert door.main([*typed]) == 0
        return capsys.readouterr().out

    assert names(named) == {"base": f"../{RUN_ID}"}
    assert said("ls").startswith(f"run {RUN_ID}  base  tiny")
    assert f"run {RUN_ID}  base  tiny" in said("ls", "base")
    assert RUN_ID in said("show", "base") and said("verify", "base")
    assert "base" in said("plot", "base", "--terminal").splitlines()[0]
    assert said("export-log", "base") == said("export-log", RUN_ID)
    said("report", "base")
    assert f"<h1>base {RUN_ID}</h1>" in (named / "logs" / RUN_ID / "report.html").read_text()
    said("diff", "base", "logs/by-name/base/final.pt")


RECORDING = f"""
import os, stat, sys
sys.path.insert(0, {str(ROOT)!r})
import train_gpt2_mod
fsync = os.fsync

def recorded(file):
    fsync(file)
    if stat.S_ISDIR(os.fstat(file).st_mode):
        print("synced", os.readlink(f"/proc/self/fd/{{file}}"), file=sys.stderr)

os.fsync = recorded
sys.exit(train_gpt2_mod.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("steps", [SHORT["num_iterations"], 4])
def test_names_that_a_killed_attempt_may_not_have_synced_are_synced_at_the_next_start(
    named: Path, tmp_path: Path, steps: int
) -> None:
    """Of the link of --name and of what was set aside; also if the next attempt has nothing to train."""
    folder = Path(shutil.copytree(named, tmp_path / "run", symlinks=True))
    run_folder = folder / "logs" / RUN_ID
    (run_folder / "overtaken-1").mkdir()
    (folder / "recording.py").write_text(RECORDING)
    typed = arguments({**SHORT, "num_iterations": steps, "name": "base", "resume_from": "auto", "save_every": 0})
    done = launch(folder, typed, processes=None, script=folder / "recording.py").wait()
    assert done.code == 0 and ("nothing to do" in done.out) == (steps == SHORT["num_iterations"]), done.text
    synced = [Path(line.removeprefix("synced ")) for line in done.err.splitlines() if line.startswith("synced ")]
    for there in (folder / "logs/by-name", folder / "logs", run_folder / "overtaken-1", run_folder):
        assert there in synced, (there, synced)


def test_the_same_line_continues_and_another_name_is_another_run(place: Path) -> None:
    """One run is killed before its end, and goes on under its name alone; the names decide where flags do not."""
    first = begin(place, name="a", num_iterations=2)
    run_a = re.search(r"new run (\S+) in .*, name a\n", first)
    assert run_a, first
    second = begin(place, name="b", num_iterations=2)
    assert f"the nearest is {run_a[1]}: name a there, b here" in second
    third = begin(place, num_iterations=2)
    assert "name a there, none here" in third or "name b there, none here" in third
    again = begin(place, name="a", num_iterations=3)
    assert f"resuming run {run_a[1]} from" in again and ", name a\n" in again
    done = run(place, "--resume_from", "b", "--num_iterations", "3")
    assert done.code == 0 and ", name b\n" in done.out and "\nname: b\n" in done.out, done.text
    only = run(place, "--resume_from", "auto", "--name", "a")
    assert only.code == 0 and f"nothing to do: run {run_a[1]}" in only.out, only.text
    assert len(names(place)) == 2 and len(list((place / "logs").iterdir())) == 4
    a, b = (place / "logs/by-name" / name / "final.pt" for name in "ab")
    assert_same_bits(a, b)
    taken = begin(place, code=2, name="a", seed=7).splitlines()
    assert taken == [
        f"error: --name a: run {run_a[1]} has this name and was begun with other flags: seed 1337 there, 7 here;"
        " continue it with --resume_from a, or choose another"
    ]


def test_a_name_of_another_run_is_refused_and_nothing_is_left(named: Path) -> None:
    before = sorted(path.name for path in (named / "logs").iterdir())
    for more in ({"run_id": OTHER_ID}, {"run_id": OTHER_ID, "resume_from": "base", "fork": True}):
        done = launch(named, arguments({**SHORT, "name": "base", **more}), processes=None).wait()
        said = [line for line in done.err.splitlines() if line.startswith("error")]
        assert done.code == 2 and len(said) == 1 and f"run {RUN_ID} has this name; continue it" in said[0], done.text
    assert sorted(path.name for path in (named / "logs").iterdir()) == before


def test_a_run_gets_another_name_when_it_is_resumed(place: Path) -> None:
    train(place, SHORT, processes=None)
    said = run(place, "--resume_from", RUN_ID, "--name", "late")  # it is finished
    assert said.code == 0 and "nothing to do" in said.out and names(place) == {"late": f"../{RUN_ID}"}
    more = run(place, "--resume_from", "late", "--name", "later", "--num_iterations", "4", "--logs_dir", "logs")
    assert more.code == 0 and names(place) == {"later": f"../{RUN_ID}"}, more.text
    forgotten = run(place, "--resume_from", "late")
    assert forgotten.code == 2 and forgotten.err == (
        "error: --resume_from late: no file has this name, and no run under logs/ has it;"
        " `python -m unbroken ls` lists the runs\n"
    )
    begun = begin(place, num_iterations=4)  # the line that began it has no name
    assert f"nothing to do: run {RUN_ID}" in begun and ", name later;" in begun
    (place / "logs/by-name/later").unlink()  # as a folder that was moved to another machine has none
    last = run(place, "--resume_from", RUN_ID, "--num_iterations", "5")
    assert last.code == 0 and names(place) == {"later": f"../{RUN_ID}"}, last.text


def test_an_empty_machine_finds_the_name_in_the_storage(named: Path, tmp_path: Path) -> None:
    store, empty = tmp_path / "store", tmp_path / "empty"
    assert tool(named, "mirror", "base", f"file://{store}").code == 0
    for typed in (["--resume_from", "base"], ["--resume_from", "auto", "--name", "base"]):
        (empty / "logs").mkdir(parents=True, exist_ok=True)
        (empty / "data").exists() or (empty / "data").symlink_to(named / "data")
        done = run(empty, *typed, "--mirror", f"file://{store}", "--num_iterations", "4")
        assert done.code == 0 and f"run {RUN_ID}" in done.out, done.text
        assert names(empty) == {"base": f"../{RUN_ID}"}
    missing = run(empty, "--resume_from", "nobody", "--mirror", f"file://{store}")
    assert missing.code == 2 and "no run under logs/ has it" in missing.err, missing.text


@pytest.mark.parametrize("name", ["a", "baseline-lr3e-4", "x" * 64, "lr=3e-4", "v1.2_b"])
def test_what_can_be_a_name(name: str) -> None:
    assert parse(["--name", name]) == {"name": name}


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "a/b", "-a", "a b", "x" * 65, "latest", "BEST", "auto", "off", "final", "beef", "DEAD0000-1"],
)
def test_what_cannot_be_a_name(name: str) -> None:
    with pytest.raises(UserError, match="--name"):
        parse([f"--name={name}"])
    for ending in (".pt", ".log", ".jsonl"):
        assert not paths.is_name(f"run{ending}")


def test_the_name_in_a_run_s_own_config_is_not_that_of_a_new_run(named: Path, tmp_path: Path) -> None:
    own = named / "logs" / RUN_ID / "config.yaml"
    assert "name: base" in own.read_text()
    assert "name" not in parse(["--config", str(own)])
    copy = tmp_path / "config.yaml"
    copy.write_text(own.read_text())
    assert parse(["--config", str(copy)])["name"] == "base"


def test_of_two_starts_at_once_one_has_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was looked at before may be old: the link itself decides, also where a removed run has left one."""
    monkeypatch.chdir(tmp_path)
    one, other = (Path("logs", run_id) for run_id in (RUN_ID, OTHER_ID))
    one.mkdir(parents=True)
    (tmp_path / "logs/by-name").mkdir()
    (tmp_path / "logs/by-name/base").symlink_to("../removed")
    paths.give_name("base", one)
    paths.give_name("base", one)
    other.mkdir()
    with pytest.raises(UserError, match=f"run {RUN_ID} has this name"):
        paths.give_name("base", other)
    assert paths.name_of(one) == "base" and paths.name_of(other) == ""
    assert (tmp_path / "logs/by-name/base").resolve() == one.resolve()
