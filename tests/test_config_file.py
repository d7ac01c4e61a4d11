"""`--config FILE.yaml`: flags from a file, checked like typed ones; the file in a run's folder repeats the run."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.harness import RUN_ID, arguments, assert_same_bits, launch, log_lines, train, write_corpus
from unbroken.config import ATTEMPT_ONLY, AUTO, FIELDS, dump_yaml, load_yaml, merge, parse, parse_yaml
from unbroken.errors import UserError


def test_a_run_s_own_file_repeats_it(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
        write_corpus(folder)
    train(first, {"run_id": RUN_ID, "num_iterations": 4, "save_every": "auto", "learning_rate": 2e-3})
    saved = first / f"logs/{RUN_ID}/config.yaml"
    found = yaml.safe_load(saved.read_text())
    assert found["save_every"] == "auto" and found["learning_rate"] == 2e-3 and found["model"] == "tiny"
    assert set(found) == set(FIELDS) - ATTEMPT_ONLY - {"elastic_ranks"}, "typing that splits microbatches"
    assert saved.read_text().splitlines()[0] == (
        f"# torchrun --standalone --nproc_per_node=1 train_gpt2_mod.py --config logs/{RUN_ID}/config.yaml"
    )
    done = launch(second, ["--config", str(saved), "--run_id", RUN_ID], None).wait()
    assert done.code == 0, done.text
    assert log_lines(second) == log_lines(first)
    assert_same_bits(first / f"logs/{RUN_ID}/final.pt", second / f"logs/{RUN_ID}/final.pt")


def test_without_pyyaml_the_file_is_json_and_says_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = merge({"learning_rate": 1e-5, "save_every": "auto", "grad_clip": 1.0, "log_wandb": True})
    expected = parse_yaml(dump_yaml(config, tmp_path, False), "x")
    with monkeypatch.context() as missing:
        missing.setitem(sys.modules, "yaml", None)
        text = dump_yaml(config, tmp_path, False)
    assert parse_yaml(text, "x") == expected and expected["learning_rate"] == 1e-5


def test_what_is_typed_wins_and_counts_as_typed(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("model: d4\nlearning_rate: 1e-4\nlog_wandb: true\ncompile: off\nsave_every: auto\nseed: 7\n")
    typed = parse(["--seed", "8", "--config", str(path)])
    assert typed == {
        **{"model": "d4", "learning_rate": 1e-4, "log_wandb": True, "compile": "off", "save_every": AUTO},
        "seed": 8,
    }


def test_a_hostile_file_costs_a_second_at_most(tmp_path: Path) -> None:
    """Aliases that multiply, more flags than there are, and 8 GB of which nothing is on the disk."""
    doubling = ", ".join(f"&a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}" for i in range(1, 9))
    texts = [f"seed: [&a0 {{k: 1}}, {doubling}]", "".join(f"a{i}: 1\n" for i in range(60_000)), ""]
    path = tmp_path / "c.yaml"
    for text in texts:
        path.write_text(text)
        if not text:
            os.truncate(path, 8 << 30)
        began = time.process_time()
        with pytest.raises(UserError, match="it must be lines of the form|not YAML"):
            load_yaml(str(path))
        assert time.process_time() - began < 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("modle: d2", "unknown flag 'modle'; did you mean model?"),
        ("model: d3", "--model: 'd3' is not one of"),
        ("seed: 1.5", "--seed: 1.5 is not a whole number"),
        ("seed: yes", "--seed: True is not a whole number"),
        ("learning_rate: fast", "--learning_rate: 'fast' is not of type float"),
        ("batch_size: -3", "--batch_size -3: it must be at least 1"),
        ("- model", "it must be lines of the form `flag: value`"),
        ("model: [d2", "not YAML, see line "),
        ("a: !!python/object/apply:os.system ['echo hi']", "not YAML"),
    ],
)
def test_a_mistake_in_it_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text + "\n")
    with pytest.raises(ValueError, match=r"^--config ") as caught:
        load_yaml(str(path))
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        f"seed: {'9' * 5000}",
        f"seed: 0x{'9' * 5000}",
        f"seed: 1{':59' * 4000}",
        f"learning_rate: 1{'0' * 5000}",
        f"model: {'9' * 4000}",
        f"model: {'a' * 5000}",
        f"{'9' * 5000}: 1",
    ],
    ids=lambda text: text[:12],
)
def test_a_number_of_thousands_of_digits_is_a_short_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "flags.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"^--config .*flags\.yaml: ") as caught:
        parse(["--config", str(path)])
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)


def test_the_door_says_it_in_one_line(tmp_path: Path) -> None:
    refused = launch(tmp_path, arguments({"config": "nowhere.yaml"}), None).wait()
    assert refused.code == 2 and "error: --config nowhere.yaml: No such file" in refused.err
    assert "Traceback" not in refused.text and not (tmp_path / "logs").exists()
