"""ls, show, verify, diff and their door, on small checkpoints of the product's own writer."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import fork_server
from tests.checkpoints import RUN_ID, save_ours, state, torch_bytes
from tests.harness import ROOT, environment
from unbroken.__main__ import main
from unbroken.commands import COMMANDS
from unbroken.commands.diff import CHUNK, compare


@pytest.fixture
def run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """logs/<run_id> with checkpoints of steps 7 and 9 and a log, the current folder above it."""
    monkeypatch.chdir(tmp_path)
    folder = Path("logs") / RUN_ID
    folder.mkdir(parents=True)
    for step in (7, 9):
        save_ours(folder, state(step))
    (folder / f"{RUN_ID}.log").write_text("# begin\ns:7 trn:4.500000\ns:7 val:4.600000\ns:9 trn:4.400000\n")
    return folder


def done(capsys: pytest.CaptureFixture[str], *typed: str) -> tuple[int, str, str]:
    code = main(list(typed))
    said = capsys.readouterr()
    return code, said.out, said.err


def answer(capsys: pytest.CaptureFixture[str], *typed: str) -> tuple[int, Any]:
    code, out, _ = done(capsys, *typed, "--json")
    return code, json.loads(out)


def flip(path: Path, fragment: bytes) -> None:
    """Change one bit where `fragment` is in the file."""
    content = bytearray(path.read_bytes())
    content[content.index(fragment)] ^= 1
    path.write_bytes(content)


def weight_bytes(step: int) -> bytes:
    return state(step)["model"]["wte.weight"].numpy().tobytes()[:32]


# ---- ls --------------------------------------------------------------------------------------------------------------


def test_ls_lists_runs_and_checkpoints_with_their_losses(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = answer(capsys, "ls")
    assert code == 0
    (listing,) = found["runs"]
    assert listing["run_id"] == RUN_ID and listing["model"] == "d12"
    rows = [(line["step"], line["loss"], line["val"], line["whole"]) for line in listing["checkpoints"]]
    assert rows == [(7, 4.5, 4.6, None), (9, 4.4, None, None)]
    code, out, _ = done(capsys, "ls", "--check")
    assert code == 0 and out.count("yes") == 2 and "\x1b" not in out


def test_ls_says_what_is_damaged_and_goes_on(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(run_folder / "model_step000009.pt", weight_bytes(9))
    (run_folder / "model_step000008.pt").write_bytes(b"nothing")
    _, found = answer(capsys, "ls", RUN_ID, "--check")
    assert [line["whole"] for line in found["runs"][0]["checkpoints"]] == [True, False, False]
    assert "wte.weight" in found["runs"][0]["checkpoints"][2]["damage"]


def test_ls_of_nothing_says_how_to_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = done(capsys, "ls")
    assert code == 0 and "train_gpt2_mod.py" in out


# ---- show ------------------------------------------------------------------------------------------------------------


def test_show_prints_everything_but_the_tensors(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = done(capsys, "show", RUN_ID)
    assert code == 0
    for said in (RUN_ID, "step: 9", "learning_rate", "digest", "sources: 1 file ("):
        assert said in out
    code, shown = answer(capsys, "show", str(run_folder / "model_step000007.pt"))
    assert shown["step"] == 7 and shown["ours"] and shown["tensors"] == {"model": 3, "optimizer": 2}
    assert shown["args"] == {"learning_rate": 3e-4, "model": "d12", "seed": 1}


def test_show_prints_code_sources_and_tensors(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert done(capsys, "show", RUN_ID, "--code")[1].strip() == "print('hello')"
    assert done(capsys, "show", RUN_ID, "--source", "unbroken/model.py")[1].strip() == "import torch"
    code, _, err = done(capsys, "show", RUN_ID, "--source", "other.py")
    assert code == 2 and "unbroken/model.py" in err
    _, found = answer(capsys, "show", RUN_ID, "--tensors")
    assert {"name": "model.norm", "dtype": "bfloat16", "shape": "9"} in found["tensors"]


def test_show_steers_no_terminal(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil = state(9)
    evil["code"] = "a\x1b[2Jb\n\tc\u202ed"
    evil["args"]["model"] = "d12\x1b]0;title\x07"
    path = save_ours(run_folder, evil)
    for typed in (["show", str(path)], ["show", str(path), "--code"], ["ls", RUN_ID], ["diff", str(path), str(path)]):
        code, out, err = done(capsys, *typed)
        assert code == 0 and not {"\x1b", "\x07", "\u202e"} & set(out + err)


def test_a_file_of_torch_save_can_be_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "foreign.pt"
    path.write_bytes(torch_bytes({"model": {"w": torch.zeros(2)}, "step": 3}))
    code, shown = answer(capsys, "show", str(path))
    assert code == 0 and not shown["ours"] and shown["step"] == 3


# ---- verify ----------------------------------------------------------------------------------------------------------


def test_verify_finds_a_single_flipped_bit(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert done(capsys, "verify", RUN_ID)[0] == 0
    flip(run_folder / "model_step000007.pt", weight_bytes(7))
    code, out, err = done(capsys, "verify", RUN_ID)
    assert code == 2 and out.count("DAMAGED") == 1 and out.count("whole") == 1
    assert "wte.weight" in err and len(err.splitlines()) == 1
    code, found = answer(capsys, "verify", str(run_folder))
    assert code == 2 and [file["whole"] for file in found["files"]] == [False, True]


def test_verify_times_the_reading_and_not_the_start_of_torch(run_folder: Path) -> None:
    code = (
        "import sys, types; from unbroken.__main__ import main; from unbroken.commands import verify;"
        "verify.time = types.SimpleNamespace(perf_counter=lambda: 'torch' in sys.modules); sys.exit(main(sys.argv[1:]))"
    )
    typed = [sys.executable, "-c", code, "verify", run_folder.absolute(), "--json"]
    told = subprocess.run(typed, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert json.loads(told.stdout)["seconds"] < 1, "torch was imported between the two looks at the clock"


@pytest.mark.parametrize("tool", ["show", "verify", "diff"])
def test_what_is_not_there_is_one_line(tool: str, run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("nothing.pt", RUN_ID.replace("3b24", "3b25")):
        code, _, err = done(capsys, tool, *([name] * (2 if tool == "diff" else 1)))
        assert code == 2 and err.startswith("error: ") and len(err.splitlines()) == 1


# ---- diff ------------------------------------------------------------------------------------------------------------


def test_diff_of_a_file_with_itself_is_empty(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(run_folder / "model_step000007.pt")
    code, out, _ = done(capsys, "diff", path, path)
    assert code == 0 and "identical, bit for bit" in out


def test_diff_finds_the_argument_the_source_and_the_bit(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = state(7)
    other["args"]["seed"] = 2
    other["sources"]["unbroken/model.py"] = "import math\n"
    other["model"]["norm"] = other["model"]["norm"].clone()
    other["model"]["norm"].view(torch.int16)[4] ^= 1
    (run_folder / "other").mkdir()
    path = save_ours(run_folder / "other", other)
    code, found = answer(capsys, "diff", str(run_folder / "model_step000007.pt"), str(path))
    assert code == 1
    assert found["values"] == {"args.seed": [1, 2]} and found["sources"] == ["unbroken/model.py"]
    (row,) = found["tensors"]
    assert (row["name"], row["first"], row["differing"]) == ("model.norm", 4, 1) and row["largest"] > 0
    _, out, _ = done(capsys, "diff", str(run_folder / "model_step000007.pt"), str(path))
    assert "-import torch" in out and "+import math" in out and "1 of 5 tensors differ" in out
    del other["sources"], other["code"]
    (run_folder / "bare").mkdir()
    torch.save({"model": other["model"]}, run_folder / "bare/bare.pt")
    _, out, _ = done(capsys, "diff", str(path), str(run_folder / "bare/bare.pt"))
    assert "sources: only in A, " in out and "+import" not in out and "-import" not in out


def test_the_comparison_is_of_bits_not_of_numbers() -> None:
    assert compare("zeros", torch.tensor([0.0, 0.0]), torch.tensor([0.0, -0.0])).first == 1
    nan = torch.tensor([math.nan])
    assert compare("nan", nan, nan.clone()).identical
    assert compare("nan", nan, torch.tensor([1.0])).largest == math.inf
    for dtype in (torch.bool, torch.int8, torch.float16, torch.float64, torch.complex64, torch.complex128):
        a = torch.zeros(3, dtype=dtype)
        b = a.clone()
        b[2] = 1
        row = compare("t", a, b)
        assert (row.first, row.differing, row.largest) == (2, 1, 1.0)
        assert compare("scalar", a[0], b[2]).differing == 1
    assert compare("empty", torch.zeros(0), torch.zeros(0)).identical


def test_a_difference_far_behind_is_found_at_its_place() -> None:
    a = torch.zeros(2 * CHUNK + 3, dtype=torch.uint8)
    b = a.clone()
    b[[CHUNK + 1, 2 * CHUNK + 2]] = 5
    row = compare("large", a, b)
    assert (row.first, row.differing, row.largest) == (CHUNK + 1, 2, 5.0)


# ---- the door --------------------------------------------------------------------------------------------------------


def test_help_names_every_tool_and_every_tool_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = done(capsys, "--help")
    for name in (name for group in COMMANDS.values() for name in group):
        assert f"\n  {name} " in out
    for name in ("ls", "show", "verify", "diff", "data", "doctor"):
        with pytest.raises(SystemExit) as left:
            main([name, "--help"])
        assert left.value.code == 0 and len(capsys.readouterr().out) > 100


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        (["dif"], "did you mean diff?"),
        (["lst"], "ls"),
        (["ls", "--chek"], "did you mean --check?"),
        (["ls", "--che"], "did you mean --check?"),  # no abbreviations
        (["data", "text", "--bpe", ".", "x.txt"], "did you mean --bpe_dir?"),
        (["show"], "FILE|RUN"),
    ],
)
def test_a_slip_is_one_line_with_the_nearest_name(
    typed: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = done(capsys, *typed)
    assert code == 2 and err.startswith("error: ") and hint in err and len(err.splitlines()) == 1


def test_a_reader_that_has_seen_enough_is_no_error(run_folder: Path) -> None:
    command = [sys.executable, "-m", "unbroken", "show", str(run_folder.absolute()), "--tensors"]
    with fork_server.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
    ) as process:
        assert process.stdout is not None and process.stderr is not None and process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait(60) == 0


# ---- a run that is being trained -------------------------------------------------------------------------------------


def test_a_run_whose_checkpoints_come_and_go(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--keep_last 1 and a save every few milliseconds: nothing is said of what is gone, and nothing breaks."""
    ended = threading.Event()

    def train() -> None:
        for step in itertools.count(10):
            save_ours(run_folder, state(step))
            for old in range(7, step):
                (run_folder / f"model_step{old:06d}.pt").unlink(missing_ok=True)
            if ended.is_set():
                return

    training = threading.Thread(target=train)
    training.start()
    try:
        for _ in range(30):
            for typed in (["ls", RUN_ID, "--check"], ["show", RUN_ID], ["diff", RUN_ID, RUN_ID], ["verify", RUN_ID]):
                code, out, err = done(capsys, *typed)
                assert code in (0, 1) if typed[0] == "diff" else code == 0, (typed, out, err)
                assert not err and "NO:" not in out, (typed, out, err)
    finally:
        ended.set()
        training.join()
