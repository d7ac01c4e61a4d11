"""`--total_batch_size`, `--batch_size auto`, `--activation_checkpointing`: other ways to the same tokens of a step."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.harness import RUN_ID, arguments, assert_same_bits, launch, log_lines, train, write_corpus
from unbroken.config import AUTO, Config, merge, resolve_batch_sizes
from unbroken.distributed.step_plan import plan_step
from unbroken.distributed.world import World
from unbroken.model import families
from unbroken.model.gpt import GPT
from unbroken.runtime import batch_size
from unbroken.runtime.batch_size import find_batch_size, largest_batch_size
from unbroken.runtime.compile import Compiler
from unbroken.runtime.settings import ResolvedSettings
from unbroken.text import format_count

SETTINGS = {"run_id": RUN_ID, "num_iterations": 6, "save_every": 3}
TOTAL = {"total_batch_size": 2 * 4 * 16, "grad_accumulation_steps": None}


def final(folder: Path) -> Path:
    return folder / "logs" / RUN_ID / "final.pt"


@given(
    sequences=st.integers(1, 2000), fits=st.integers(1, 500), world=st.integers(1, 9), elastic=st.sampled_from([1, 8])
)
def test_the_largest_divides_fits_and_keeps_what_can_be_kept(
    sequences: int, fits: int, world: int, elastic: int
) -> None:
    size = largest_batch_size(sequences, fits, world, elastic)
    sizes = [each for each in range(1, min(fits, sequences) + 1) if sequences % each == 0]
    assert size in sizes
    exact = [each for each in sizes if sequences // each % elastic == 0]
    assert not exact or size == max(exact)


def test_a_long_sequence_is_not_too_long_for_a_cpu() -> None:
    config = merge({"batch_size": AUTO, "total_batch_size": 1 << 15, "sequence_length": 1 << 15, "model": "d2"})
    cpu = torch.device("cpu")
    settings = ResolvedSettings.resolve(config, {}, cpu, {})
    compiler = Compiler(config, settings, cpu, Path("compiled"))
    assert find_batch_size(config, settings, World.single(), compiler)[0].batch_size == 1


def test_the_memory_of_a_compiled_run_is_that_of_the_compiled_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything of a GPU but the GPU."""
    config = merge({"model": "d2", "sequence_length": 8, "compile": "on"})
    compiled: list[object] = []
    settings = ResolvedSettings("fp32", True, 1)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 1000 + len(compiled))
    compiler = SimpleNamespace(compile=compiled.append)
    assert batch_size._peak_memory((1, 2), config, settings, World.single(), compiler) == [1001, 1001]  # type: ignore[arg-type]
    assert isinstance(compiled[0], GPT)


def test_what_is_measured_is_the_model_that_is_trained() -> None:
    """Its embedding and its head are one weight."""
    model = families.build("d2").allocate(torch.device("cpu"))
    numbers = sum(weight.numel() for weight in model.parameters())
    assert (
        numbers
        == sum(weight.numel() for weight in GPT(GPT.sizes["d2"]).parameters())
        == families.build("d2").num_parameters()
    )


def test_one_of_a_kind_is_said_in_the_singular() -> None:
    config = Config(batch_size=2, grad_accumulation_steps=1)
    plan, line = batch_size.shrink(plan_step(2, 1, 1, 1), config, "CUDA")
    assert plan.microbatch_size == 1 and "going on with microbatches of 1 sequence, twice" in line
    counts = (
        format_count(count, noun)
        for count, noun in ((1, "microbatch"), (1024, "microbatch"), (1.001, "epoch"), (2.5, "epoch"))
    )
    assert ", ".join(counts) == "1 microbatch, 1,024 microbatches, 1 epoch, 2.5 epochs"


def test_the_accumulation_follows_from_the_tokens_of_a_step(tmp_path: Path) -> None:
    """And a run that is resumed with the same flags finds nothing changed."""
    for name, typed in (("plain", {}), ("total", TOTAL)):
        (tmp_path / name).mkdir()
        write_corpus(tmp_path / name)
        train(tmp_path / name, {**SETTINGS, **typed})
    assert log_lines(tmp_path / "total") == log_lines(tmp_path / "plain")
    model = [torch.load(final(tmp_path / name), weights_only=True)["model"] for name in ("plain", "total")]
    assert all(torch.equal(model[0][key], model[1][key]) for key in model[0])
    again = arguments({**SETTINGS, **TOTAL, "resume_from": RUN_ID, "run_id": None, "num_iterations": 8})
    done = launch(tmp_path / "total", again).wait()
    assert done.code == 0 and "mismatch" not in done.text, done.text


def test_auto_finds_a_microbatch_and_a_resumed_run_keeps_it(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    typed = {**SETTINGS, "batch_size": "auto", "total_batch_size": 16 * 16, "grad_accumulation_steps": None}
    done = train(tmp_path, typed)
    assert "--batch_size auto: 8 microbatches of 2 sequences a step (at most " in done.out
    args = torch.load(final(tmp_path), weights_only=True)["args"]
    assert (args["batch_size"], args["grad_accumulation_steps"]) == (2, 8), "8 elastic ranks have a microbatch each"
    done = launch(tmp_path, arguments({**typed, "run_id": None, "resume_from": RUN_ID, "num_iterations": 8})).wait()
    assert done.code == 0 and "mismatch" not in done.text, done.text


@pytest.mark.parametrize(
    ("typed", "total", "accumulation"),
    [
        ({}, 128, 4),
        ({"batch_size": 1}, 128, 8),
        ({"batch_size": 1, "grad_accumulation_steps": 8}, 128, 8),
        ({"sequence_length": 8}, 128, 8),
        ({"grad_accumulation_steps": 2}, 0, 2),
        ({"total_batch_size": 256}, 256, 8),
        ({"batch_size": -1}, 128, 4),
    ],
)
def test_a_resumed_run_keeps_the_tokens_of_its_steps(typed: dict[str, int], total: int, accumulation: int) -> None:
    """Whatever microbatch is typed for another machine; only a typed accumulation says otherwise."""
    saved = {"total_batch_size": 128, "batch_size": 2, "grad_accumulation_steps": 4, "sequence_length": 16}
    config = merge(resolve_batch_sizes(typed, saved), saved)
    assert (config.total_batch_size, config.grad_accumulation_steps) == (total, accumulation)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["--batch_size=auto"], "--batch_size auto needs --total_batch_size"),
        (["--total_batch_size=100", "--sequence_length=64"], "is not a multiple of --sequence_length 64"),
        (["--total_batch_size=192", "--sequence_length=64", "--batch_size=2"], "is not a multiple of 2 x 64 tokens"),
        (
            ["--total_batch_size=256", "--sequence_length=64", "--batch_size=2", "--grad_accumulation_steps=3"],
            "means 2 microbatches of 2 x 64 tokens, not --grad_accumulation_steps 3",
        ),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path: Path, typed: list[str], said: str) -> None:
    refused = launch(tmp_path, typed, None).wait()
    assert refused.code == 2 and said in refused.text and "Traceback" not in refused.text
    assert not (tmp_path / "logs").exists()


def test_computing_activations_again_changes_no_bit(tmp_path: Path) -> None:
    for name in ("off", "on"):
        (tmp_path / name).mkdir()
        write_corpus(tmp_path / name)
        train(tmp_path / name, {**SETTINGS, "activation_checkpointing": name})
    assert log_lines(tmp_path / "on") == log_lines(tmp_path / "off")
    assert_same_bits(final(tmp_path / "off"), final(tmp_path / "on"))
