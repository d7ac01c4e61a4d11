"""The demonstration and the sampler: a real kill, a real Ctrl-C, text that a checkpoint really writes."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests import fork_server
from tests.harness import ROOT, RUN_ID, command_line, descendants, environment
from unbroken import inference
from unbroken.__main__ import main
from unbroken.checkpoint.reader import CheckpointFile
from unbroken.checkpoint.writer import RunCheckpointWriter
from unbroken.commands import demo, plot
from unbroken.distributed.flat_params import ShardedParameters
from unbroken.distributed.world import World
from unbroken.errors import UserError
from unbroken.inference import SamplingConfig
from unbroken.metrics.timeline import find_interruptions, read_timeline
from unbroken.model.gpt import GPT
from unbroken.optim import build_optimizer
from unbroken.run.state import Progress, RunState
from unbroken.runtime import child_training

END_OF_TEXT = 50256


def start(folder: Path, *typed: str) -> subprocess.Popen[str]:
    """`python -m unbroken …` in a folder, as a shell starts it."""
    env = environment({"PYTHONPATH": str(ROOT)})
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return fork_server.Popen([sys.executable, "-m", "unbroken", *typed], cwd=folder, env=env, text=True, **pipes)  # type: ignore[call-overload,no-any-return]


def of_run(run_id: str) -> list[int]:
    """The processes that have this run_id on their command line."""
    pids = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    return [pid for pid in pids if run_id.encode() in command_line(pid)]


def wait_for(condition: object, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.05)


# ---- demo ------------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(400)
def test_the_demonstration_kills_resumes_and_proves(tmp_path: Path) -> None:
    process = start(tmp_path, "demo", "--num_iterations", "6")
    said, _ = process.communicate(timeout=380)
    assert process.returncode == 0, said
    assert "KILLED with SIGKILL" in said
    assert "repeated: identical" in said
    (folder,) = (tmp_path / "logs").iterdir()
    assert (folder / "final.pt").is_file()
    assert str(folder.relative_to(tmp_path) / f"{folder.name}.log") in said
    pictures = list(folder.glob("*.png"))
    assert len(pictures) == 1 and str(pictures[0].relative_to(tmp_path)) in said
    assert pictures[0].read_bytes().startswith(b"\x89PNG")
    assert of_run(folder.name) == []


@pytest.mark.timeout(200)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_an_interrupted_demonstration_leaves_nothing_behind(number: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "data").symlink_to(_corpus(tmp_path), target_is_directory=True)
    process = start(tmp_path, "demo", "--num_iterations", "1000")
    wait_for(lambda: list((tmp_path / "logs").glob("*/*.log")))
    (folder,) = (tmp_path / "logs").iterdir()
    assert of_run(folder.name), "nothing was training"
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    wait_for(lambda: of_run(folder.name) == [], 10)
    assert list((tmp_path / "logs").iterdir()) == []
    assert "Traceback" not in said


def _corpus(folder: Path) -> Path:
    """A small stand-in for the built-in corpus: the demonstration only looks for its files."""
    from tests.harness import learnable, write_shard

    for name in ("train", "val"):
        write_shard(folder / f"corpus/stdlib/stdlib_{name}_000000.bin", learnable(80_000))
    return folder / "corpus"


def test_a_resume_that_differs_is_no_success(tmp_path: Path) -> None:
    lines = ["steps 5-6 repeated: identical", "WARNING: step 7 repeated: DIFFERS, log has 2.0, now 2.1 (1e-01 apart)"]
    found = demo.repeated([*lines, "step:7/10 | loss 2.100000"])
    assert [text.endswith("identical") for text in found] == [True, False]
    assert demo.repeated(["resuming run"]) == []


def test_the_kill_falls_behind_a_checkpoint() -> None:
    from unbroken.paths import Run

    for iterations in (*range(demo.LEAST, 60), demo.ITERATIONS, 1000):
        plan = demo.Demo(Run(RUN_ID, ""), iterations)
        assert plan.save_every < plan.kill_at < iterations
        assert plan.kill_at % plan.save_every != 0 or plan.save_every == 1
    assert abs(demo.Demo(Run(RUN_ID, ""), demo.ITERATIONS).kill_at / demo.ITERATIONS - demo.KILLED_AT) < 0.1


def test_all_that_a_command_started_is_killed(tmp_path: Path) -> None:
    """Grandchildren in sessions of their own too, as torchrun's workers are."""
    grandchild = "import subprocess, sys; subprocess.Popen(['sleep', '1234.5'], start_new_session=True).wait()"
    with child_training.running_command([sys.executable, "-c", grandchild]) as process:
        wait_for(lambda: descendants(process.pid), 30)
        below = descendants(process.pid)
    wait_for(lambda: not any(command_line(pid) for pid in below), 10)
    assert process.returncode == -signal.SIGKILL
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_without_psutil_nothing_is_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs psutil: pip install psutil"):
        child_training.running_command(["touch", str(tmp_path / "started")]).__enter__()
    assert not (tmp_path / "started").exists()


# ---- sample ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of an untrained d2 whose data are bytes of the standard library; nothing is written beside it."""
    return save(tmp_path_factory.mktemp("untrained"), {"shards": [{"name": "stdlib_train_000000.bin"}]})


def save(folder: Path, data: dict[str, object]) -> Path:
    with torch.random.fork_rng():
        model = GPT(GPT.sizes["d2"])
        model.initialize(1)
    sharded = ShardedParameters(model, World.single())
    optimizer = build_optimizer(sharded, learning_rate=1e-3, weight_decay=0.0)
    args = {"model": "d2", "seed": 1, "sequence_length": 16}
    state = RunState(sharded, optimizer, Progress(step=5), "", args, RUN_ID, data, {}, {})
    with RunCheckpointWriter(folder, World.single()) as saver:
        saver.save(state.tree(), 5)
        saver.wait()
        (outcome,) = saver.results()
    assert outcome.error is None, outcome.error
    return outcome.path


def text_of(path: Path, prompt: str = "def ", count: int = 12, seed: int = 1, **sampling: float) -> str:
    with CheckpointFile(path) as file:
        generator = inference.TextGenerator(file, device="cpu")
    return "".join(generator.generate(prompt, count, SamplingConfig(**sampling), seed))  # type: ignore[arg-type]


def test_a_seed_decides_the_text(checkpoint: Path) -> None:
    text = text_of(checkpoint)
    assert text == text_of(checkpoint) and text.startswith("def ")
    assert text != text_of(checkpoint, seed=2)


def test_temperature_zero_is_the_likeliest_token_of_the_whole_model(checkpoint: Path) -> None:
    with CheckpointFile(checkpoint) as file:
        model = inference.load_model(file)
    begin = [END_OF_TEXT, *b"def "]
    chosen = list(
        inference.generate_tokens(model, begin, 6, SamplingConfig(temperature=0), 1, context=16, allowed=None)
    )
    tokens = list(begin)
    for token in chosen:
        with torch.no_grad():
            assert token == int(model(torch.tensor([tokens]))[0].argmax())
        tokens.append(token)


def test_what_is_kept_of_the_past_changes_nothing() -> None:
    """Keys and values of earlier tokens are those that reading everything anew would give, past a full context too."""
    model = GPT(GPT.sizes["tiny"]).eval()
    model.initialize(1)
    tokens = torch.tensor([[0, *b"import os"]])
    past = model.new_caches()
    with torch.inference_mode():
        for stop in range(4, tokens.size(1) + 1):
            got = model.next_logits(tokens[:, :stop] if stop == 4 else tokens[:, stop - 1 : stop], past)
            torch.testing.assert_close(got, model(tokens[:, :stop]), rtol=1e-5, atol=1e-5)
    begin = [0, *b"def "]
    chosen = list(
        inference.generate_tokens(model, begin, 30, SamplingConfig(temperature=0), 1, context=8, allowed=None)
    )
    seen = list(begin)
    for token in chosen:
        if len(seen) > 8:
            seen = seen[-4:]
        with torch.inference_mode():
            assert token == int(model(torch.tensor([seen]))[0].argmax())
        seen.append(token)


def test_the_loaded_weights_are_the_saved_ones_and_tied(checkpoint: Path) -> None:
    with CheckpointFile(checkpoint) as file:
        model = inference.load_model(file)
    saved = torch.load(checkpoint, weights_only=True)["model"]
    assert all(torch.equal(weight, saved[name]) for name, weight in model.state_dict().items())
    assert model.get_parameter("transformer.wte.weight").data_ptr() == model.lm_head.weight.data_ptr()


def test_top_k_and_top_p_leave_out_the_unlikely() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    generator = torch.Generator().manual_seed(0)

    def drawn(sampling: SamplingConfig) -> set[int]:
        return {inference.sample_token(logits, sampling, generator) for _ in range(300)}

    assert drawn(SamplingConfig(1.0)) == {0, 1, 2, 3}
    assert drawn(SamplingConfig(1.0, top_k=2)) == {0, 1}
    assert drawn(SamplingConfig(1.0, top_p=0.6)) == {0, 1}
    assert drawn(SamplingConfig(1.0, top_p=0.4)) == {0}
    assert drawn(SamplingConfig(0.0)) == {0}


def test_bytes_are_told_from_words_by_the_model_itself() -> None:
    model = GPT(dataclasses.replace(GPT.sizes["d2"], n_layer=1, n_head=1, n_embd=32))
    model.initialize(1)
    assert not inference.predicts_bytes(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2)
    text = torch.tensor([[END_OF_TEXT, *b"import os\n"]])
    for _ in range(12):
        loss: torch.Tensor = model(text[:, :-1], text[:, 1:])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    assert inference.predicts_bytes(model)


@pytest.mark.parametrize(
    ("data", "found"),
    [
        ({"tokenizer": "gpt2", "shards": [{"name": "stdlib_train_000000.bin"}]}, "gpt2"),
        ({"tokenizer": "bytes", "shards": [{"name": "x.bin"}]}, "bytes"),
        ({"tokenizer": "", "shards": [{"name": "stdlib_train_000000.bin"}]}, "bytes"),
        ({"shards": [{"name": "stdlib_train_000000.bin"}]}, "bytes"),
        ({"shards": [{"name": "x.bin"}]}, "gpt2"),
        ({"tokenizer": 7, "shards": "x"}, "gpt2"),
        (None, "gpt2"),
    ],
)
def test_the_tokenizer_is_the_one_that_the_checkpoint_names(data: object, found: str) -> None:
    """Older checkpoints name none: then the built-in corpus is bytes, and else the untrained model says no."""
    model = GPT(GPT.sizes["d2"])
    model.initialize(1)
    assert inference.find_tokenizer({"data": data}, model) == found
    folders = inference._shard_folders({"input_bin": "a/*.bin=0.7,b/*.bin=0.3", "input_val_bin": "c/val_*.bin"})
    assert folders == [Path("a"), Path("b"), Path("c")]
    with pytest.raises(UserError, match=r"the checkpoint's tokenizer llama\\x1b is unknown; type --tokenizer"):
        inference.find_tokenizer({"data": {"tokenizer": "llama\x1b"}}, model)


def test_what_is_written_steers_no_terminal(checkpoint: Path) -> None:
    said = text_of(checkpoint, prompt="\x1b[2Jx\r", count=200, temperature=5.0)
    assert not [char for char in said if not char.isprintable() and char not in "\n\t"]


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"temperature": -1.0}, "--temperature -1.0: it must be a number, not negative"),
        ({"temperature": float("nan")}, "--temperature nan: it must be a number, not negative"),
        ({"top_k": -1}, "--top_k -1: it must not be negative"),
        ({"top_p": 0.0}, "--top_p 0.0: it must be above 0 and at most 1"),
    ],
)
def test_a_choice_that_makes_no_sense_is_one_line(wrong: dict[str, float], why: str) -> None:
    with pytest.raises(UserError) as error:
        SamplingConfig(**wrong)  # type: ignore[arg-type]
    assert str(error.value) == why


def test_sampling_from_the_shell(checkpoint: Path) -> None:
    process = start(checkpoint.parent, "sample", checkpoint.name, "--prompt", "def ", "--num_tokens", "5")
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and said.startswith("def ") and said.endswith("\n"), said
    process = start(checkpoint.parent, "sample", "nothing.pt")
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 2 and said == "error: nothing.pt: there is no such file, folder or run\n"
    assert os.listdir(checkpoint.parent) == [checkpoint.name]


# ---- plot ------------------------------------------------------------------------------------------------------------

LOG = """# time=t from=scratch step=0 host=h
s:1 trn:4.000000
s:2 trn:3.000000
s:2 val:3.500000
s:3 trn:2.500000
# time=t from=logs/x/model_step000002.pt step=2 host=h
s:4 trn:2.000000
# time=t from=logs/x/model_step000004.pt step=4 host=h
s:5 trn:1.500000
"""


def test_interruptions_are_read_from_the_log(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    log.write_text(LOG)
    found = find_interruptions(log, read_timeline(log))
    assert [(each.back_to, each.reached) for each in found] == [(2, 3), (4, 4)]


def test_a_picture_of_one_run_and_of_several(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / RUN_ID
    folder.mkdir()
    (folder / f"{RUN_ID}.log").write_text(LOG)
    (tmp_path / "other.log").write_text(LOG.replace("1.5", "1.4"))
    assert main(["plot", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder / plot.PICTURE}\n"
    out = tmp_path / "both.png"
    assert main(["plot", str(folder), str(tmp_path / "other.log"), "--out", str(out)]) == 0
    for picture in (folder / plot.PICTURE, out):
        assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size < 100_000


@pytest.mark.parametrize(
    ("text", "why"),
    [("# begin\n", "x.log holds no losses yet"), (None, "x.log: there is no such log, folder or run")],
)
def test_a_picture_of_nothing_is_one_line(
    text: str | None, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path("x.log").write_text(text)
    assert main(["plot", "x.log"]) == 2
    assert capsys.readouterr().err == f"error: {why}\n"


def test_a_tokenizer_that_is_too_large_for_the_model_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    Path("questions.jsonl").write_text("{}\n")
    for typed in (["sample"], ["eval", "--hellaswag", "questions.jsonl"]):
        assert main([*typed, RUN_ID, "--tokenizer", "bytes"]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "has a vocabulary of 50,257 tokens, the model one of 512; type" in said, said
