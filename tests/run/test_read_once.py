"""A checkpoint is verified once before the first step, by one process, however it is named; the way there is short."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.harness import ROOT, RUN_ID, SHORT, flip, launch, trained

COUNTED = ROOT / "tests" / "counted_training.py"
WALKED = ROOT / "tests" / "walked_training.py"
NEWEST = f"logs/{RUN_ID}/final.pt"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 3 steps with checkpoints of 2 and 3."""
    return trained(tmp_path_factory.mktemp("finished"), {**SHORT, "model": "d2", "batch_size": 1})


def shares(folder: Path, rank: int, size: int) -> dict[str, float]:
    """What a rank read and checksummed, in sizes of the checkpoint."""
    count = json.loads((folder / f"read.{rank}.json").read_text())
    return {name: value / size for name, value in count.items()}


@pytest.mark.parametrize("named", ["auto", "latest", RUN_ID, f"logs/{RUN_ID}", NEWEST])
def test_every_checksum_is_computed_once(folder: Path, named: str) -> None:
    size = (folder / NEWEST).stat().st_size
    done = launch(folder, ["--resume_from", named, "--num_iterations", "4"], processes=None, script=COUNTED).wait()
    assert done.code == 0 and f"from {NEWEST} at step 3" in done.out, done.text
    seen = shares(folder, 0, size)
    assert 0.95 < seen["checked"] <= 1.0, seen
    assert seen["read"] <= (1.0 if named == NEWEST else 2.0), seen  # a search verifies before the model is built


def test_the_other_ranks_of_a_machine_trust_the_first_one(folder: Path) -> None:
    size = (folder / NEWEST).stat().st_size
    done = launch(folder, ["--resume_from", "auto", "--num_iterations", "4"], processes=2, script=COUNTED).wait()
    assert done.code == 0, done.text
    first, second = shares(folder, 0, size), shares(folder, 1, size)
    assert 0.95 < first["checked"] <= 1.0 and second["checked"] == 0, (first, second)
    assert 0 < second["read"] < 0.95, second  # only its own slices


def resumed(folder: Path, processes: int, counted: str) -> tuple[list[dict[str, float]], bytes]:
    """What each rank of a resumed run counted, and the tensors at its end."""
    size = (folder / NEWEST).stat().st_size
    typed = ["--resume_from", NEWEST, "--num_iterations", "4"]
    done = launch(folder, typed, processes, script=COUNTED, env={"COUNTED": counted}).wait()
    assert done.code == 0, done.text
    saved = torch.load(folder / NEWEST, weights_only=True)
    tensors = [*saved["model"].values(), *(each[key] for each in saved["optimizer"]["state"].values() for key in each)]
    return [shares(folder, rank, size) for rank in range(processes)], b"".join(t.numpy().tobytes() for t in tensors)


SLACK = 0.15  # of the file, which has 76 MB: eight buffers of a MiB, and small objects


def test_each_rank_reads_and_holds_its_own_and_all_check_each_byte_once(finished: Path, tmp_path: Path) -> None:
    """The file is weights and two moments of the same size."""
    ended = {}
    for processes, counted in ((4, ""), (4, "apart"), (2, "whole")):
        folder = tmp_path / f"{processes}{counted}"
        shutil.copytree(finished, folder, symlinks=True)
        seen, ended[processes, counted] = resumed(folder, processes, counted)
        own = (1 + 2 / processes) / 3  # all weights, its slices of the moments
        if counted == "whole":  # a way that the test refuses
            assert max(each["grown"] for each in seen) > own + SLACK and sum(each["checked"] for each in seen) > 1.5
            continue
        assert 0.95 < sum(each["checked"] for each in seen) <= 1.0, seen
        assert max(each["grown"] for each in seen) < own + SLACK, seen
        if counted == "apart":  # each sends the others its slices of the weights
            assert 0.95 < sum(each["read"] for each in seen) <= 1.0, seen
        else:
            assert max(each["read"] for each in seen) < own + 0.01, seen
    assert len(set(ended.values())) == 1


@pytest.mark.parametrize(("processes", "counted"), [(4, ""), (2, "apart")])
def test_damage_that_one_rank_finds_ends_all_in_one_line(folder: Path, processes: int, counted: str) -> None:
    flip(folder / NEWEST)
    typed = ["--resume_from", NEWEST, "--num_iterations", "4"]
    done = launch(folder, typed, processes, script=COUNTED, env={"COUNTED": counted}).wait()
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert done.code != 0 and len(errors) == 1 and "damaged: the checksum of" in errors[0], done.text
    assert "step:4/4" not in done.out


def test_damage_is_passed_over_in_a_search_and_an_error_of_a_named_file(folder: Path) -> None:
    flip(folder / NEWEST)
    named = launch(folder, ["--resume_from", NEWEST, "--num_iterations", "4"], None, script=COUNTED).wait()
    assert named.code == 2 and "damaged: the checksum of" in named.err, named.text
    done = launch(folder, ["--resume_from", "auto", "--num_iterations", "4"], None, script=COUNTED).wait()
    assert done.code == 0 and f"passing over {NEWEST}" in done.out and "at step 2" in done.out, done.text


@pytest.mark.parametrize("typed", [["auto", "--save_every", "5"], [f"logs/{RUN_ID}/model_step000002.pt"]])
def test_from_the_command_line_to_the_restored_state_there_are_five_climbs_at_most(
    folder: Path, typed: list[str]
) -> None:
    """A reader who follows the calls is led upward, from a package to a higher one, by callbacks alone."""
    done = launch(folder, ["--resume_from", *typed, "--num_iterations", "4"], processes=2, script=WALKED).wait()
    climbs = (folder / "climbs.txt").read_text().splitlines()
    assert done.code == 0 and 1 <= len(climbs) <= 5, climbs
