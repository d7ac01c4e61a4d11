"""--logs_dir: all runs are in another folder than logs/, for the training and for the tools."""

from __future__ import annotations

import re
import shlex
import signal
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from tests.harness import (
    RUN_ID,
    SHORT,
    Done,
    arguments,
    assert_same_bits,
    launch,
    run,
    train,
    trained,
    write_corpus,
)
from unbroken import __main__ as door
from unbroken import paths
from unbroken.commands import COMMAND_NAMES, LOOKS_FOR_RUNS, demo, doctor, module_of
from unbroken.errors import UserError

DIR = "scratch/x y"
LOGS = ("--logs_dir", DIR)
HINT = f"--logs_dir '{DIR}'"


class Tool:
    """`python -m unbroken` in this process, with the output and the exit code looked at."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, folder: Path, *typed: str, expected: int = 0) -> str:
        self._monkeypatch.chdir(folder)
        code = door.main(list(typed))
        said = self._capsys.readouterr()
        assert code == expected, said
        return said.out + said.err


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Tool]:
    yield Tool(monkeypatch, capsys)
    paths.use_logs_dir(paths.LOGS)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 3 steps in DIR, with checkpoints of 2 and 3."""
    return trained(tmp_path_factory.mktemp("finished"), {**SHORT, "logs_dir": DIR})


def lost_its_end(folder: Path) -> Path:
    """The run's folder as if it had been killed after step 2."""
    home = folder / DIR / RUN_ID
    for path in (home / "final.pt", home / "model_step000003.pt"):
        path.unlink(missing_ok=True)
    return home


@pytest.mark.parametrize("named", ["auto", "latest", RUN_ID, RUN_ID[:6]])
def test_a_run_goes_on_there(finished: Path, folder: Path, named: str) -> None:
    lost_its_end(folder)
    changes = {name: value for name, value in SHORT.items() if name != "run_id"}
    done = train(folder, {**changes, "logs_dir": DIR, "resume_from": named}, processes=None)
    assert f"resuming run {RUN_ID}" in done.out and not (folder / "logs").exists(), done.text
    assert_same_bits(folder / DIR / RUN_ID / "final.pt", finished / DIR / RUN_ID / "final.pt")


def test_a_killed_run_goes_on_by_auto_under_torchrun(finished: Path, tmp_path: Path) -> None:
    write_corpus(tmp_path)
    typed = {**SHORT, "logs_dir": DIR, "resume_from": "auto"}
    home = tmp_path / DIR / RUN_ID
    running = launch(tmp_path, arguments(typed), hold=2)
    running.kill_when((home / "model_step000002.pt").exists)
    done = train(tmp_path, typed)
    assert "at step 2" in done.out and not (tmp_path / "logs").exists(), done.text
    assert_same_bits(home / "final.pt", finished / DIR / RUN_ID / "final.pt")


def test_the_folder_does_not_count_for_auto(folder: Path) -> None:
    """The runs are moved to another disk; a YAML file names it there."""
    lost_its_end(folder)
    (folder / DIR).rename(folder / "disk")
    (folder / "machine.yaml").write_text("logs_dir: disk\n")
    done = train(folder, {**SHORT, "run_id": None, "config": "machine.yaml", "resume_from": "auto"}, processes=None)
    assert f"resuming run {RUN_ID}" in done.out and (folder / "disk" / RUN_ID / "final.pt").exists(), done.text
    assert not (folder / "logs").exists() and not (folder / DIR).exists()
    assert "logs_dir" not in (folder / "disk" / RUN_ID / "config.yaml").read_text().split("\n", 1)[1]


def test_from_another_working_folder(folder: Path) -> None:
    lost_its_end(folder)
    (folder / "other").mkdir()
    shards = {name: f"{folder}/data/{kind}_*.bin" for name, kind in (("input_bin", "train"), ("input_val_bin", "val"))}
    typed = {**SHORT, **shards, "run_id": None, "logs_dir": f"../{DIR}", "resume_from": "latest"}
    done = train(folder / "other", typed, processes=None)
    assert f"resuming run {RUN_ID}" in done.out and (folder / DIR / RUN_ID / "final.pt").exists(), done.text
    assert not list((folder / "other").iterdir())


def test_the_tools_look_there(folder: Path, tool: Tool) -> None:
    for typed in (["ls"], ["show", RUN_ID[:5]], ["verify", RUN_ID], ["plot", "--terminal"], ["export-log"]):
        assert tool(folder, *typed, *LOGS)
    tool(folder, "report", *LOGS)
    tool(folder, "diff", RUN_ID, RUN_ID, *LOGS)
    tool(folder, "eval", RUN_ID, "--input_bin", "data/val_*.bin", *LOGS)
    tool(folder, "mirror", RUN_ID, f"file://{folder}/bucket", *LOGS)
    assert (folder / DIR / RUN_ID / "report.html").exists() and not (folder / "logs").exists()
    assert "there is no run" in tool(folder, "show", RUN_ID, expected=2)
    assert "no runs under logs/ yet; start one with: python train_gpt2_mod.py\n" in tool(folder, "ls")


def test_every_tool_that_looks_for_runs_takes_the_flag() -> None:
    assert {name for name in COMMAND_NAMES if hasattr(import_module(module_of(name)), "locate")} <= LOOKS_FOR_RUNS


def test_a_mirror_is_brought_there(folder: Path, tool: Tool) -> None:
    url = f"file://{folder}/bucket"
    tool(folder, "mirror", RUN_ID, url, *LOGS)
    typed = {**SHORT, "run_id": None, "num_iterations": 4, "logs_dir": "new", "mirror": url, "resume_from": "auto"}
    done = train(folder, typed, processes=None)
    assert "at step 3" in done.out and (folder / "new" / RUN_ID / "final.pt").exists(), done.text
    assert not (folder / "logs").exists()


def test_hints_contain_it(folder: Path, tool: Tool) -> None:
    assert (
        f"{RUN_ID} {HINT} continues that one"
        in run(folder, *arguments({**SHORT, "run_id": None, "seed": 7, "resume_from": "auto"}), *LOGS).out
    )
    assert f"continue it with --resume_from {RUN_ID} {HINT}" in run(folder, *arguments(SHORT), *LOGS).err
    assert f"`python -m unbroken ls {HINT}` lists the runs" in tool(
        folder, "show", "00000000-0000-4000-8000-000000000000", *LOGS, expected=2
    )
    first = (folder / DIR / RUN_ID / "config.yaml").read_text().splitlines()[0]
    assert first.endswith(f"--config {shlex.quote(f'{DIR}/{RUN_ID}/config.yaml')} {HINT}")
    (folder / "empty").mkdir()
    empty = tool(folder, "ls", "--logs_dir", "empty")
    assert "no runs under empty/ yet; start one with: python train_gpt2_mod.py --logs_dir empty" in empty


def test_a_stopped_run_says_how_to_go_on(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    running = launch(tmp_path, arguments({**SHORT, "num_iterations": 500, "logs_dir": DIR}), processes=None, pace=0.1)
    running.until(lambda: any("s:2 trn:" in log.read_text() for log in tmp_path.glob("scratch/*/*/*.log")))
    running.kill(signal.SIGTERM)
    done = running.wait()
    assert re.search(rf"stopped by SIGTERM at step \d+; continue with --resume_from {RUN_ID} {HINT}", done.out), done


def refused(done: Done | str, folder: Path, line: str) -> None:
    text = done if isinstance(done, str) else done.err
    assert text == f"error: {line}\n"
    assert isinstance(done, str) or done.code == 2
    assert not (folder / "logs").exists()


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ("", "--logs_dir '': not the path of a folder; give one or leave the flag out"),
        ("a\nb", r"--logs_dir 'a\nb': not the path of a folder; give one or leave the flag out"),
        ("file", "--logs_dir file: it is not a folder; give the path of one"),
        ("link", "{folder}/link is a link to /nowhere, which is not there; mount or remove it"),
    ],
)
def test_an_unusable_folder_is_one_line(tmp_path: Path, tool: Tool, typed: str, line: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("/nowhere")
    line = line.format(folder=tmp_path)
    refused(run(tmp_path, "--logs_dir", typed), tmp_path, line)
    refused(tool(tmp_path, "ls", "--logs_dir", typed, expected=2), tmp_path, line)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    (tmp_path / "file").touch()
    done = run(tmp_path, *arguments({**SHORT, "logs_dir": "file/below"}))
    refused(done, tmp_path, f"cannot write file/below/{RUN_ID}: Not a directory")
    done = run(tmp_path, *arguments({**SHORT, "logs_dir": "/proc/runs"}))
    assert done.code == 2 and done.err.startswith("error: cannot write /proc/runs") and done.err.count("\n") == 1


def test_the_demonstration_trains_there(tmp_path: Path, tool: Tool) -> None:
    tool(tmp_path, "ls", *LOGS)
    shown = demo.Demo(paths.Run(RUN_ID, ""), 6)
    assert shown.place.folder == Path(DIR) / RUN_ID and shown.flags()[-2:] == [*LOGS]
    tool(tmp_path, "ls")
    assert shown.place.folder == Path("logs") / RUN_ID and "--logs_dir" not in shown.flags()


def test_the_doctor_s_temporary_folder_is_there(tmp_path: Path, tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    write_corpus(tmp_path)
    places = []

    def no_training(lab: doctor.Lab, trial: doctor.Trial) -> tuple[Path, list[str]]:
        places.append(lab.folder)
        raise UserError("no training")

    monkeypatch.setattr(doctor.Lab, "train", no_training)
    tool(tmp_path, "doctor", "--input_bin", "data/train_*.bin", *LOGS, expected=2)
    # Python 3.12 and newer make temporary folders under absolute paths.
    assert [tmp_path / place.parent for place in places] == [tmp_path / DIR] and not list((tmp_path / DIR).iterdir())
