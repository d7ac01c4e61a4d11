"""Slips on the command line that could pass for something else, and begin another run than the one meant."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests.harness import OTHER_ID, RUN_ID, SHORT, arguments, launch, run, trained
from tests.storage import tool
from unbroken import config
from unbroken.__main__ import main
from unbroken.data import tokenizers
from unbroken.errors import UserError


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 2 steps."""
    return trained(tmp_path_factory.mktemp("finished"), {**SHORT, "num_iterations": 2})


@pytest.mark.parametrize("name", ["config", "resume_from", "init_from", "run_id", "mirror", "input_bin"])
def test_a_variable_that_is_not_set_begins_no_other_run(tmp_path: Path, name: str) -> None:
    done = run(tmp_path, f"--{name}", "", "--model", "d2")
    assert done.code == 2 and f"--{name} is empty" in done.err, done.text
    assert done.err.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--lr", "learning_rate"),
        ("--max-iters", "num_iterations"),
        ("--block_size=64", "sequence_length"),
        ("--ckpt_path", "resume_from"),
        ("--learning_rat", "learning_rate"),
    ],
)
def test_what_other_programs_call_it_is_suggested(typed: str, meant: str) -> None:
    with pytest.raises(UserError, match=rf"unknown argument .*; did you mean --{meant}\?"):
        config.parse([typed, "1"])


def test_a_glob_that_the_shell_took_apart_is_named(folder: Path) -> None:
    files = [str(path.relative_to(folder)) for path in sorted((folder / "data").glob("*.bin"))]
    done = run(folder, "--input_bin", *files)
    assert done.code == 2 and f"unknown argument '{files[1]}': a file; quote a glob" in done.err, done.text
    assert len(done.err.splitlines()) == 1


def test_a_folder_without_gpt2s_files_is_named(folder: Path) -> None:
    for typed in (["sample", RUN_ID], ["eval", RUN_ID, "--hellaswag", "x.jsonl"], ["export", RUN_ID, "out"]):
        (folder / "x.jsonl").touch()
        done = tool(folder, *typed, "--tokenizer", "gpt2", "--bpe_dir", "nowhere")
        assert done.code == 2 and "nowhere does not hold GPT-2's encoder.json and vocab.bpe" in done.err, done.text
        assert len(done.err.splitlines()) == 1


def test_weights_go_into_the_model_they_are_of(folder: Path) -> None:
    weights = f"logs/{RUN_ID}/final.pt"
    done = run(folder, *arguments({"init_from": weights, "model": "d4", "num_iterations": 1, "warmdown_iters": 0}))
    assert done.code == 2 and f"--model d4: the weights of {weights} are those of tiny" in done.err, done.text
    assert [path.name for path in (folder / "logs").iterdir()] == [RUN_ID]


def test_a_beginning_and_a_continuation_exclude_each_other_in_a_file_too(folder: Path) -> None:
    """But a run's own config.yaml, which says what it was begun from, may be typed beside --resume_from."""
    weights = f"logs/{RUN_ID}/final.pt"
    (folder / "both.yaml").write_text("resume_from: latest\n")
    done = run(folder, "--config", "both.yaml", "--init_from", weights)
    assert done.code == 2 and "--init_from starts a new run and --resume_from continues one" in done.err, done.text
    begun = arguments({**SHORT, "run_id": OTHER_ID, "init_from": weights, "model": None, "num_iterations": 1})
    assert run(folder, *begun).code == 0
    kept = ["--config", f"logs/{OTHER_ID}/config.yaml", "--resume_from", OTHER_ID, "--num_iterations", "2"]
    done = run(folder, *kept)
    assert done.code == 0 and f"resuming run {OTHER_ID}" in done.out, done.text


def test_ls_of_a_folder_of_runs_lists_them_and_other_folders_are_no_run(folder: Path) -> None:
    listed = tool(folder, "ls", "logs")
    assert listed.code == 0 and listed.out.startswith(f"run {RUN_ID}  tiny  2 iterations\n"), listed.text
    refused = tool(folder, "ls", "data")
    assert refused.code == 2 and "data: not a run" in refused.err
    shutil.rmtree(folder / "logs")
    assert tool(folder, "ls").out == "no runs under logs/ yet; start one with: python train_gpt2_mod.py\n"


def test_eval_does_without_gpt2s_vocabulary(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from unbroken.commands.eval import measure
    from unbroken.model.gpt import GPT
    from unbroken.model.language_model import ModelConfig

    def missing(*_: object) -> None:
        raise UserError("GPT-2's vocabulary cannot be read")

    class Words:
        num_tokens, vocab_size = 100, 64

        def read_pairs(self, position: int, count: int) -> object:
            tokens = torch.arange(position, position + count + 1).remainder(64).to(torch.uint16).numpy()
            return tokens[:-1], tokens[1:]

    monkeypatch.setattr(tokenizers, "load_gpt2", missing)
    torch.manual_seed(0)
    model = GPT(ModelConfig(vocab_size=64, n_layer=1, n_head=1, n_embd=8))
    found = measure(model, Words(), 64, 2, 16, tokenizer="gpt2")  # type: ignore[arg-type]
    assert found["loss"] > 0 and "bits_per_byte" not in found
    assert "bits per byte are left out: GPT-2's vocabulary cannot be read" in capsys.readouterr().err


def test_a_file_that_is_not_there_is_said_before_the_vocabulary_is_looked_for(folder: Path) -> None:
    done = tool(folder, "eval", RUN_ID, "--hellaswag", "none.jsonl", "--tokenizer", "gpt2")
    assert done.code == 2 and "--hellaswag none.jsonl: there is no such file" in done.err, done.text


@pytest.mark.parametrize("name", ["save_every", "batch_size"])
def test_minus_one_is_not_auto(tmp_path: Path, name: str) -> None:
    """In Lightning it means never."""
    (tmp_path / "a.yaml").write_text(f"{name}: -1\n")
    for typed in ([f"--{name}", "-1"], ["--config", "a.yaml"]):
        done = run(tmp_path, *typed)
        assert done.code == 2 and name in done.err and done.err.count("\n") == 1, done.text


def test_doctor_starts_no_more_processes_than_a_step_has_sequences(folder: Path) -> None:
    done = tool(folder, "doctor", "--processes", f"1,{10**30}")
    assert done.code == 2 and "at most one a process" in done.err and done.err.count("\n") == 1, done.text


def test_a_report_is_written_over_no_other_file(folder: Path) -> None:
    path = folder / "logs" / RUN_ID / "final.pt"
    before = path.read_bytes()
    done = tool(folder, "report", RUN_ID, "--out", str(path))
    assert done.code == 2 and "is no HTML page" in done.err and path.read_bytes() == before, done.text


@pytest.mark.parametrize("named", [RUN_ID, RUN_ID[:8], f"logs/{RUN_ID}"])
def test_a_run_gives_its_newest_weights(folder: Path, named: str) -> None:
    flags = {"init_from": named, "num_iterations": 1, "save_every": 1, "run_id": OTHER_ID, "warmdown_iters": 0}
    done = run(folder, *arguments({**flags, "learning_rate": 1e-9, "weight_decay": 0.0}))
    assert done.code == 0, done.text
    ours, theirs = (
        torch.load(folder / "logs" / run_id / "final.pt", weights_only=True) for run_id in (OTHER_ID, RUN_ID)
    )
    assert ours["args"]["init_from"] == f"logs/{RUN_ID}/model_step000002.pt"
    for name, weight in theirs["model"].items():
        torch.testing.assert_close(ours["model"][name], weight, atol=1e-7, rtol=0)


def test_a_run_without_a_checkpoint_gives_nothing(folder: Path) -> None:
    (folder / "logs" / OTHER_ID).mkdir()
    done = run(folder, "--init_from", OTHER_ID, "--model", "d2")
    assert done.code == 2 and f"--init_from {OTHER_ID}: there is no whole checkpoint in" in done.err, done.text


def test_the_weights_that_a_run_began_with_stay_its_own(folder: Path) -> None:
    """Killed before its first save, while the run that they are of went on."""
    flags = {"init_from": RUN_ID, "run_id": OTHER_ID, "resume_from": "auto", "num_iterations": 4, "save_every": 100}
    typed = arguments({**flags, "warmdown_iters": 0})
    running = launch(folder, typed, processes=None, hold=2)
    log = folder / "logs" / OTHER_ID / f"{OTHER_ID}.log"
    running.kill_when(lambda: log.exists() and "s:2 trn" in log.read_text())
    assert run(folder, "--resume_from", RUN_ID, "--num_iterations", "3", "--warmdown_iters", "0").code == 0
    done = run(folder, *typed)
    assert done.code == 0 and "repeated: identical" in done.out, done.text


def test_the_beginning_of_a_run_id_will_do(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert main(["verify", RUN_ID[:8]]) == 0
    (folder / "logs" / f"{RUN_ID[:-1]}4").mkdir()
    assert main(["verify", RUN_ID[:8]]) == 2
    assert main(["verify", "ffff"]) == 2
