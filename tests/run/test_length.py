"""--num_tokens and --num_epochs: a number of steps, the same one for every attempt of the same command."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests.harness import RUN_ID, arguments, assert_same_bits, launch, run, train, write_corpus
from unbroken import config as flags
from unbroken.data.left_out import next_start
from unbroken.errors import UserError
from unbroken.run.length import resolve_length, trained_tokens
from unbroken.run.state import Progress

STEP = 128  # tokens
TYPED = {"run_id": RUN_ID, "num_iterations": None, "save_every": 3, "warmdown_iters": 4, "resume_from": "auto"}
FOLDER = Path("logs") / RUN_ID


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("1", 1),
        ("2.5B", 2_500_000_000),
        ("2.5e9", 2_500_000_000),
        ("300m", 300_000_000),
        ("1.2K", 1200),
        ("1T", 10**12),
    ],
)
def test_numbers_of_tokens(text: str, tokens: int) -> None:
    assert flags.parse(["--num_tokens", text])["num_tokens"] == text
    assert flags.parse_tokens(text) == tokens


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["--num_tokens", "many"], "--num_tokens many: it must be a number of tokens such as 2.5B"),
        (["--num_tokens", "0"], "--num_tokens 0: it must be"),
        (["--num_tokens", "1e99"], "--num_tokens 1e99: it must be"),
        (["--num_epochs", "0"], "--num_epochs 0.0: it must be a number above 0"),
        (
            ["--num_tokens", "1K", "--num_iterations", "9"],
            "--num_iterations and --num_tokens both say how long the run",
        ),
        (["--num_tokens", "1K", "--num_epochs", "9"], "--num_tokens and --num_epochs both say how long the run"),
    ],
)
def test_what_is_refused(typed: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        flags.parse(typed)


def test_a_typed_length_replaces_that_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("num_iterations: 7\n")
    typed = flags.parse(["--config", str(file), "--num_epochs", "2"])
    assert typed == {"num_epochs": 2.0}
    file.write_text("num_tokens: 3000\n")
    assert flags.parse(["--config", str(file)]) == {"num_tokens": "3000"}


@given(
    tokens=st.integers(1, 5000),
    cut=st.integers(0, 30),
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    skipped=st.lists(st.integers(0, 20), max_size=3),
)
def test_an_attempt_that_begins_anywhere_finds_the_same_length(
    tokens: int, cut: int, sizes: tuple[int, int], skipped: list[int]
) -> None:
    """Also if steps have other tokens from some step on, and if batches are left out."""
    first, then = (flags.merge({"num_tokens": str(tokens), "batch_size": size, "sequence_length": 4}) for size in sizes)
    left_out = [[at * first.step_tokens, (at + 1) * first.step_tokens] for at in sorted(set(skipped))]
    progress = Progress(skipped=left_out)
    assert resolve_length(first, 0, progress).num_iterations == -(-tokens // first.step_tokens)
    trained_with(first, progress, cut)
    progress.skipped = [pair for pair in left_out if pair[1] <= progress.tokens]
    trained_with(then, progress, 10**6)
    assert tokens <= trained_tokens(progress) < tokens + max(first.step_tokens, then.step_tokens)


def trained_with(config: flags.Config, progress: Progress, most: int) -> None:
    """Train so many steps, or up to the end, which is looked for at every step."""
    length = resolve_length(config, 0, progress).num_iterations
    for _ in range(min(most, length - progress.step)):
        start = next_start(progress.left_out, progress.tokens, config.step_tokens)
        progress.step, progress.tokens = progress.step + 1, start + config.step_tokens
        assert resolve_length(config, 0, progress).num_iterations == length


def test_tokens_are_the_steps_that_they_say(tmp_path: Path) -> None:
    """Killed, continued by the same command and made longer, a run has the bits of one with that many steps."""
    for name in ("steps", "tokens"):
        write_corpus(tmp_path / name)
    train(tmp_path / "steps", {**TYPED, "num_iterations": 8}, processes=None)
    typed = {**TYPED, "num_tokens": "1K", "total_batch_size": STEP, "grad_accumulation_steps": None}
    running = launch(tmp_path / "tokens", arguments(typed), None, hold=5)
    running.kill_when((tmp_path / "tokens" / FOLDER / "model_step000003.pt").exists)
    done = train(tmp_path / "tokens", typed, processes=None)
    assert "--num_tokens 1K: 8 steps, 1,024 tokens, 0.171 epochs\n" in done.out and "step 3" in done.out, done.text
    assert_same_bits(tmp_path / "steps" / FOLDER / "final.pt", tmp_path / "tokens" / FOLDER / "final.pt")
    written = yaml.safe_load((tmp_path / "tokens" / FOLDER / "config.yaml").read_text())
    assert written["num_iterations"] == 8 and not {"num_tokens", "num_epochs"} & set(written)
    assert "nothing to do" in train(tmp_path / "tokens", typed, processes=None).out
    done = train(tmp_path / "tokens", {**typed, "num_tokens": "1.1K"}, processes=None)
    assert "--num_tokens 1.1K: 9 steps, 1,152 tokens, 0.192 epochs; the run had 8 steps\n" in done.out, done.text
    assert "extending after the warmdown began" in done.out


def test_epochs_are_those_of_the_shards_that_the_run_began_with(tmp_path: Path) -> None:
    """A shard that joins later makes the run no longer."""
    write_corpus(tmp_path, train_tokens=400)
    typed = {**TYPED, "num_epochs": 1.5, "warmdown_iters": 0}
    done = train(tmp_path, typed, processes=None)
    assert "--num_epochs 1.5: 5 steps, 640 tokens, 1.6 epochs\n" in done.out, done.text
    saved = torch.load(tmp_path / FOLDER / "final.pt", weights_only=True)
    assert saved["step"] == saved["args"]["num_iterations"] == 5
    shard = tmp_path / "data/train_001.bin"
    shard.with_name("train_002.bin").write_bytes(shard.read_bytes())
    assert "nothing to do" in train(tmp_path, typed, processes=None).out
    done = train(tmp_path, {**typed, "num_epochs": 2}, processes=None)
    assert "new shards of training data" in done.out and "--num_epochs 2: 7 steps, 896 tokens" in done.out, done.text
    assert run(tmp_path, *arguments({**typed, "num_tokens": "1K"})).code == 2
