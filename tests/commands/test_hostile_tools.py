"""The tools where a machine does not do as they wish: disks, terminals, permissions, and values that nobody types."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import PIPE

import pytest
import torch

from tests import fork_server, harness
from tests.harness import ROOT, RUN_ID, SCRIPT, SHORT, Done, trained
from tests.storage import tool
from unbroken.__main__ import main
from unbroken.commands import ls
from unbroken.data.shards import Tokens, write_shards
from unbroken.data.stream import Stream
from unbroken.distributed.memory import require_out_of_memory
from unbroken.errors import UserError
from unbroken.files import absolute_glob

LONG = "a" * 300
EVIL = "a\x1b[2J\nb"
TOOL = [sys.executable, "-m", "unbroken"]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run whose log is not beside its checkpoints."""
    return trained(tmp_path_factory.mktemp("finished"), {**SHORT, "model": "d2", "output_dir": "out"})


@pytest.fixture
def place(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, the current folder."""
    monkeypatch.chdir(folder)
    return folder


def started(
    typed: list[str], folder: Path, before: Callable[[], None] | None = None, out: str | None = None, **more: str
) -> Done:
    """A tool in a process of its own, which does `before` first, and prints into the file `out`."""
    env = harness.environment({"PYTHONPATH": str(ROOT), **more})
    with open(out or os.devnull, "wb") as file:
        done = fork_server.run(
            typed, cwd=folder, env=env, preexec_fn=before, stdout=file if out else PIPE, stderr=PIPE, timeout=120
        )
    return Done(done.returncode, (done.stdout or b"").decode(errors="replace"), done.stderr.decode(errors="replace"), 0)


def refused(done: Done, says: str) -> None:
    """One line and 2."""
    assert done.code == 2 and says in done.err, done.text
    assert done.err.startswith("error: ") and done.err.count("\n") == 1, done.text


# ---- a log that is elsewhere -----------------------------------------------------------------------------------------


def test_a_log_elsewhere_is_found(
    place: Path, tmp_path_factory: pytest.TempPathFactory, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = place / f"out/{RUN_ID}.log"
    for typed in (["plot", RUN_ID, "--out", "a.png"], ["plot", "--out", "a.png"], ["report"], ["export-log", RUN_ID]):
        assert main(typed) == 0, capsys.readouterr().err
    capsys.readouterr()
    assert main(["ls", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"][0]["checkpoints"][-1]["loss"]
    assert main(["mirror", RUN_ID, f"file://{place}/store"]) == 0
    assert (place / f"store/{RUN_ID}/{RUN_ID}.log").read_bytes() == log.read_bytes()
    monkeypatch.chdir(tmp_path_factory.mktemp("another"))
    assert main(["export-log", str(place / "logs" / RUN_ID), "--out", "a.csv"]) == 0
    for path in (place / "logs" / RUN_ID).glob("*.pt"):
        path.unlink()  # a run that has not saved yet: its config.yaml knows
    assert main(["export-log", str(place / "logs" / RUN_ID), "--out", "b.csv"]) == 0
    log.unlink()
    journal = log.with_suffix(".metrics.jsonl")  # is enough, and may be typed as well
    assert main(["export-log", str(journal), "--out", "c.csv"]) == 0
    assert Path("c.csv").read_bytes() == Path("b.csv").read_bytes()
    journal.unlink()
    assert main(["export-log", str(place / "logs" / RUN_ID)]) == 2


# ---- where it prints -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["ls", "export-log", "--help"])
def test_an_output_that_takes_nothing_is_one_line(place: Path, command: str) -> None:
    refused(started([*TOOL, command], place, out="/dev/full"), "No space left on device")
    assert started([*TOOL, command], place, lambda: os.close(1)).code == 0


def test_no_file_is_taken_for_an_output_that_was_closed(place: Path) -> None:
    """The lowest number that is free would be that of the checkpoint, and what is printed would go into it."""
    typed = [sys.executable, str(SCRIPT), "--resume_from", "auto", "--num_iterations", "5"]
    done = started(typed, place, lambda: (os.close(1), os.close(2))[0])
    assert done.code == 0 and main(["verify", RUN_ID]) == 0
    assert "s:5 trn:" in (place / f"out/{RUN_ID}.log").read_text()


def test_a_terminal_without_the_letters(place: Path) -> None:
    code = place / "logs" / RUN_ID / "final.pt"
    ascii_only = {"PYTHONIOENCODING": "ascii"}
    refused(started([*TOOL, "plot", "--terminal"], place, **ascii_only), "is not UTF-8")
    assert started([*TOOL, "show", str(code), "--source", "commands/terminal_plot.py"], place, **ascii_only).code == 0


# ---- what it may not read, and where nothing fits --------------------------------------------------------------------


@pytest.mark.parametrize(
    "typed",
    [
        ["ls"],
        ["plot", RUN_ID],
        ["verify", RUN_ID],
        ["mirror", RUN_ID, "file:///nowhere"],
        [str(SCRIPT), "--resume_from", "auto", "--model", "d2"],
    ],
)
def test_a_folder_that_cannot_be_looked_into_is_not_an_empty_one(place: Path, typed: list[str]) -> None:
    """Else a run would begin anew."""
    folder = place / "logs" / RUN_ID
    folder.chmod(0)
    powerless = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []
    if powerless and not shutil.which("setpriv"):
        pytest.skip("root may read everything, and there is no setpriv to make it less")
    command = TOOL if typed[0] != str(SCRIPT) else [sys.executable]
    done = started([*powerless, *command, *typed], place)
    folder.chmod(0o755)
    refused(done, f"logs/{RUN_ID}: Permission denied")
    assert "cannot look into the folder" in done.err
    assert os.listdir(place / "logs") == [RUN_ID]


WITH_SMALL_FILES = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
runpy.run_module("unbroken", run_name="__main__", alter_sys=True)
"""


def test_a_full_disk_leaves_nothing(place: Path) -> None:
    assert tool(place, "export", RUN_ID, "exported", "--tokenizer", "bytes").code == 0
    (place / "text").write_text("some words in a line\n" * 10_000)
    before = harness.contents(place)
    full = [sys.executable, "-c", WITH_SMALL_FILES]
    refused(started([*full, "export", RUN_ID, "x", "--tokenizer", "bytes"], place), "File too large")
    refused(started([*full, "import", "exported", "x.pt"], place), "x.pt: File too large")
    data = ["data", "text", "text", "--tokenizer", "bytes", "--folder", "data"]
    refused(started([*full, *data], place), "File too large")
    assert harness.contents(place) == before
    assert started([*TOOL, *data], place).code == 0


def test_no_set_of_shards_is_there_without_the_other(tmp_path: Path) -> None:
    def broken_off() -> object:
        yield torch.zeros(5, dtype=torch.uint16).numpy()
        raise KeyboardInterrupt

    pieces: list[Tokens] = [torch.ones(5, dtype=torch.uint16).numpy()]
    with pytest.raises(KeyboardInterrupt):
        write_shards({"a_val": pieces, "a_train": broken_off()}, tmp_path)  # type: ignore[dict-item]
    assert not list(tmp_path.iterdir())


# ---- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "typed",
    [
        ["import", LONG, "x.pt"],
        ["import", "data", LONG],
        ["export", RUN_ID, LONG],
        ["export", RUN_ID, "."],
        ["export", RUN_ID, ""],
        ["data", "text", LONG],
        ["data", "text", "data/train_000.bin", "--tokenizer", "bytes", "--folder", LONG],
        ["data", "text", "data/train_000.bin", "--name", "../up"],
        ["data", "text", "data/train_000.bin", "--name", "/abs"],
        ["plot", "--out", f"{LONG}.png"],
        ["report", "--out", f"{LONG}.html"],
        ["export-log", "--out", f"{LONG}.csv"],
        ["eval", RUN_ID, "--hellaswag", LONG],
        ["show", LONG],
        ["mirror", LONG, "file:///x"],
        ["mirror", RUN_ID, "file:///"],
        ["mirror", RUN_ID, "file://x"],
        ["mirror", RUN_ID, "s3://"],
        ["mirror", RUN_ID, "file:///x", "--log", "none"],
        ["mirror", RUN_ID, "file:///x", "--keep_last", "-1"],
        ["import", EVIL, "x.pt"],
        ["import", "data", f"{EVIL}.pt"],
        ["data", "text", EVIL],
        ["plot", EVIL],
        ["eval", RUN_ID, "--input_bin", EVIL],
        ["sample", RUN_ID, "--seed", "1" * 30],
    ],
)
def test_what_cannot_be_is_one_line(place: Path, typed: list[str], capsys: Capture) -> None:
    before = harness.contents(place)
    assert main(typed) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and "\x1b" not in said.err
    assert harness.contents(place) == before


def test_a_name_that_steers_a_terminal_is_printed_as_text(place: Path, capsys: Capture) -> None:
    assert main(["plot", "--out", f"{EVIL}.png"]) == 0
    assert capsys.readouterr().out == "a\\x1b[2J\\nb.png\n"
    done = started([sys.executable, str(SCRIPT), "--config", EVIL], place)
    refused(done, "--config a\\x1b[2J\\nb: No such file")


def test_a_folder_named_like_a_glob(place: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "text").write_text("words\n" * 100)
    typed = ["data", "text", "text", "--tokenizer", "bytes", "--folder", "a[1]*", "--name", "n?"]
    assert main(typed) == 0
    said = capsys.readouterr().out
    pattern = said.partition('--input_bin "')[2].partition('"')[0]
    assert Stream.open(pattern).num_tokens > 500
    assert main(typed) == 2 and "exists; delete" in capsys.readouterr().err
    monkeypatch.chdir("a[1]*")
    assert Stream.open(absolute_glob("n[?]_train_*.bin")).num_tokens > 500


def test_an_export_goes_where_a_link_points(place: Path) -> None:
    (place / "there").mkdir()
    (place / "link").symlink_to("there")
    for _ in range(2):
        assert main(["export", RUN_ID, "link", "--tokenizer", "bytes"]) == 0
    assert (place / "link").is_symlink() and (place / "there/model.safetensors").is_file()
    assert not [path.name for path in place.iterdir() if path.name.startswith(".")]


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "memory"),
    [
        (MemoryError(), "host"),
        (RuntimeError("not enough memory: you tried to allocate 9 bytes"), "host"),
        (RuntimeError("could not create a primitive"), "host"),
        (RuntimeError("MemoryError: std::bad_alloc"), "host"),  # as the compiler's own error says it
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "CUDA"),
        (torch.OutOfMemoryError("that is too much"), "CUDA"),
    ],
)
def test_memory_that_runs_out_is_one_line_whoever_says_it(
    said: Exception, memory: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def fails(*_: object) -> object:
        raise said

    monkeypatch.setattr(ls, "run", fails)
    assert main(["ls"]) == 2
    assert (
        capsys.readouterr().err == f"error: {memory} out of memory; a smaller --batch_size, or --device cpu, may fit\n"
    )
    monkeypatch.undo()
    assert require_out_of_memory(said) == memory


def test_a_diverged_model_is_named_as_such(place: Path, capsys: Capture) -> None:
    saved = torch.load(place / "logs" / RUN_ID / "final.pt", weights_only=True)
    for weight in saved["model"].values():
        weight.fill_(float("nan"))
    torch.save({"model": saved["model"], "args": saved["args"]}, "nan.pt")
    Path("h.jsonl").write_text('{"ctx": "a", "endings": ["b", "c"], "label": 0}\n')
    for typed in (["sample", "nan.pt"], ["eval", "nan.pt", "--hellaswag", "h.jsonl"]):
        assert main([*typed, "--tokenizer", "bytes"]) == 2
        assert "its run has diverged" in capsys.readouterr().err
    assert main(["eval", "nan.pt", "--tokenizer", "bytes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == "nan"


@pytest.mark.parametrize("more", [["--temperature", "1e-300"], ["--top_p", "1e-300"], ["--temperature", "1e300"]])
def test_a_choice_at_the_end_of_the_scale(place: Path, more: list[str], capsys: Capture) -> None:
    typed = ["sample", RUN_ID, "--tokenizer", "bytes", "--num_tokens", "4"]
    assert main([*typed, *more]) == 0
    said = capsys.readouterr().out
    assert main([*typed, "--temperature", "0"]) == 0
    assert (capsys.readouterr().out == said) == ("1e-300" in more)


def test_a_batch_is_no_larger_than_the_data(place: Path, capsys: Capture) -> None:
    said = []
    for size in ("2", "9" * 30):
        assert main(["eval", RUN_ID, "--tokenizer", "bytes", "--json", "--batch_size", size]) == 0
        said.append(json.loads(capsys.readouterr().out))
    assert said[0]["tokens"] == said[1]["tokens"] and said[0]["loss"] == pytest.approx(said[1]["loss"], abs=1e-5)
    assert main(["eval", RUN_ID, "--sequence_length", "100", "--tokens", "50"]) == 2
    assert "--tokens 50: it must be at least one sequence, 100" in capsys.readouterr().err


@pytest.mark.parametrize("question", ['"ctx": "a", "label": 1e999', '"ctx": "\\ud800", "label": 0'])
def test_a_question_that_is_none(place: Path, question: str, capsys: Capture) -> None:
    Path("h.jsonl").write_text(f'{{{question}, "endings": ["b", "c"]}}\n')
    assert main(["eval", RUN_ID, "--tokenizer", "bytes", "--hellaswag", "h.jsonl"]) == 2
    assert "h.jsonl, line 1: not a question" in capsys.readouterr().err


@pytest.mark.parametrize("more", [["--terminal"], ["--out", "x.png"]])
def test_numbers_that_no_axis_reaches(
    tmp_path: Path, more: list[str], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "x.log"
    log.write_text("# step=0\n")
    lines = [{"step": step, "lr": (-1) ** step * 1e308, "train_loss": 2.0} for step in range(1, 9)]
    log.with_suffix(".metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.chdir(tmp_path)
    assert main(["plot", str(log), "--show", "loss,lr", "--smooth", "9" * 400, *more]) == 0, capsys.readouterr().err


def test_load_knows_its_devices(place: Path) -> None:
    import unbroken

    with pytest.raises(UserError, match="device 'bogus': it must be auto, cpu or cuda"):
        unbroken.load(RUN_ID, "bogus")
