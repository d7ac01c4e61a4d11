"""Two commands are one experiment exactly if they train the same thing; everything else may change on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.harness import RUN_ID, write_corpus
from unbroken.config import FIELDS, TRAINED
from unbroken.data.mixture import open_tokens
from unbroken.data.stream import Stream
from unbroken.run.experiment import Experiment, begun_with, differences

COMMAND: dict[str, Any] = {"input_bin": "data/train_*.bin", "model": "d2", "batch_size": 2, "learning_rate": 1e-3}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path)
    return tmp_path


def begun(**more: Any) -> Experiment:
    flags = {**COMMAND, **more}
    return Experiment(begun_with(flags), flags["input_bin"], Stream.open(flags["input_bin"]).identity())


def test_what_is_trained_and_what_is_not() -> None:
    """A new flag of these groups counts unless it is left out on purpose."""
    assert set(TRAINED) == {
        *("input_bin", "model", "dropout", "bias", "init_from", "seed", "batch_size", "grad_accumulation_steps"),
        "total_batch_size",
        *("sequence_length", "optimizer", "learning_rate", "warmup_iters", "warmdown_iters", "weight_decay"),
        *("grad_clip", "shuffle", "window_tokens"),
    }


@pytest.mark.parametrize("name", sorted(set(FIELDS) - {*TRAINED, "name"}))
def test_what_may_change_on_the_way(name: str) -> None:
    assert differences({**COMMAND, name: "anything"}, begun()) == []


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ({"seed": 7}, "seed 1337 there, 7 here"),
        ({"name": "b"}, "name none there, b here"),
        ({"learning_rate": 2e-3}, "learning_rate 0.001 there, 0.002 here"),
        ({"model": "d4"}, "model d2 there, d4 here"),
        ({"shuffle": "7"}, "shuffle off there, 7 here"),
        ({"batch_size": 4}, "tokens of a step 128 there, 256 here"),
        ({"init_from": "a.pt"}, "init_from none there, a.pt here"),
        ({"input_bin": "data/val_*.bin"}, "input_bin data/train_*.bin there, data/val_*.bin here"),
    ],
)
def test_what_makes_another_experiment(flag: dict[str, Any], said: str) -> None:
    assert differences({**COMMAND, **flag}, begun()) == [said]


TWO = "data/train_*.bin=0.7,data/val_*.bin=0.3"


@pytest.mark.parametrize(
    ("typed", "same"),
    [
        (TWO, True),
        ("data/train_*.bin=7,data/val_*.bin=3", True),
        ("./data/train_*.bin=7,data/val_*.bin=3", True),
        ("data/train_*.bin=0.7;1@128,data/val_*.bin=0.3", True),
        ("data/train_*.bin=0.6,data/val_*.bin=0.4", False),
        ("data/val_*.bin=0.7,data/train_*.bin=0.3", False),
        ("data/train_*.bin=0.7,data/val_*.bin", False),
        ("data/train_*.bin", False),
    ],
)
def test_sources_with_other_weights_are_another_experiment(typed: str, same: bool) -> None:
    """The weights with which the run began, and those of its config.yaml, are its own."""
    identity = open_tokens(TWO, window=16).identity()
    run = Experiment(begun_with({**COMMAND, "input_bin": TWO}), TWO.replace("0.7", "0.7;1@128"), identity)
    found = differences({**COMMAND, "input_bin": typed}, run)
    assert (found == []) == same
    assert same or found[0].startswith("input_bin data/train_*.bin=0.7;1@128,")


def test_other_windows_are_another_experiment() -> None:
    run = begun(shuffle="7", sequence_length=16)
    assert differences({**COMMAND, "shuffle": "7", "sequence_length": 16, "window_tokens": 16}, run) == []
    assert differences({**COMMAND, "shuffle": "7", "sequence_length": 16, "window_tokens": 8}, run) == [
        "tokens of a window 16 there, 8 here"
    ]


def test_a_flag_that_is_not_typed_any_more_counts_with_its_default() -> None:
    assert differences(COMMAND, begun(seed=7)) == ["seed 7 there, 1337 here"]


@pytest.mark.parametrize(
    "split",
    [
        {"batch_size": 1, "grad_accumulation_steps": 2},
        {"batch_size": 2, "total_batch_size": 128},
        {"batch_size": -1, "total_batch_size": 128},
    ],
)
def test_another_split_of_the_same_tokens_is_the_same(split: dict[str, Any]) -> None:
    assert differences({**COMMAND, **split}, begun()) == []


def test_the_same_shards_in_another_folder_are_the_same(place: Path) -> None:
    (place / "data").rename(place / "moved")
    moved = {**COMMAND, "input_bin": "moved/train_*.bin"}
    identity = Stream.open("moved/train_*.bin").identity()
    assert differences(moved, Experiment(begun_with(COMMAND), "data/train_*.bin", identity)) == []


def test_the_default_data_are_what_the_run_has() -> None:
    """A run of an earlier release records only the glob that no --input_bin became."""
    flags = {**COMMAND, "input_bin": "data/stdlib/stdlib_train_*.bin"}
    assert differences({**COMMAND, "input_bin": ""}, Experiment(begun_with(flags), flags["input_bin"])) == []


def test_a_run_or_its_folder_stands_for_a_checkpoint_in_it() -> None:
    file = f"logs/{RUN_ID}/model_step000002.pt"
    assert differences({**COMMAND, "init_from": RUN_ID}, begun(init_from=file)) == []
    assert differences({**COMMAND, "init_from": f"logs/{RUN_ID}"}, begun(init_from=file)) == []


def test_a_fork_was_begun_by_another_command() -> None:
    assert differences(COMMAND, Experiment(begun_with(COMMAND), forked=True)) == ["it is a fork"]
