"""Which checkpoints a run has, which one is the newest whole, and what may be touched in its folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import checkpoints as make
from tests.saving import newest_whole
from unbroken import paths
from unbroken.checkpoint import directory, rewind
from unbroken.checkpoint.format import schema
from unbroken.checkpoint.reader import CheckpointFile
from unbroken.distributed.sliced_tensor import SlicedTensor
from unbroken.errors import UserError


def folder_with(tmp_path: Path, *steps: int, final: int | None = None) -> Path:
    folder = tmp_path / make.RUN_ID
    folder.mkdir()
    for step in steps:
        make.save_ours(folder, make.state(step))
    if final is not None:
        make.save_ours(folder, make.state(final), final=True)
    return folder


def damage_weight(path: Path) -> None:
    """Flip a bit of the first weight."""
    make.flip(path, make.payload(path.read_bytes(), "data/0")[0])


def names(folder: Path) -> list[str]:
    return [found.path.name for found in directory.list_checkpoints(folder)]


def test_sorted_by_step_not_by_time_or_name(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, 1_000_000, 20, 3)
    os.utime(folder / "model_step000003.pt", (2e9, 2e9))
    assert [found.step for found in directory.list_checkpoints(folder)] == [3, 20, 1_000_000]
    assert names(folder)[-1] == "model_step1000000.pt"


def test_a_final_one_has_the_step_that_is_inside_and_follows_the_periodic_of_that_step(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, 5, 10, 20, final=10)
    assert names(folder) == ["model_step000005.pt", "model_step000010.pt", "final.pt", "model_step000020.pt"]
    assert [found.final for found in directory.list_checkpoints(folder)] == [False, False, True, False]


def test_an_unreadable_final_one_has_no_step_and_is_passed_over(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, 5)
    (folder / "final.pt").write_bytes(b"half a zip")
    found = directory.list_checkpoints(folder)
    assert [item.step for item in found] == [5, None]
    newest, damaged = newest_whole(folder)
    assert newest is not None and newest.path == folder / "model_step000005.pt"
    assert [path.name for path, _ in damaged] == ["final.pt"]


@pytest.mark.parametrize(
    "name",
    [
        *(".model_step000009.pt.tmp", "model_step9.pt", "model_step00009.pt", "model_step0000009.pt", "final.pt.bak"),
        *("model_step000009.pt ", "model_step00000٩.pt", "model_step-00009.pt", "best.pt", "MODEL_STEP000009.PT"),
    ],
)
def test_other_names_are_no_checkpoints(tmp_path: Path, name: str) -> None:
    folder = folder_with(tmp_path, 5)
    (folder / "model_step000005.pt").rename(folder / name)
    assert directory.list_checkpoints(folder) == [] and schema.checkpoint_step(name) is None


@given(st.integers(0, 10**12))
def test_names_and_steps_are_each_others_inverse(step: int) -> None:
    assert schema.checkpoint_step(schema.checkpoint_name(step)) == step


def test_links_folders_and_pipes_are_not_followed(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, 5)
    outside = tmp_path / "outside.pt"
    (folder / "model_step000005.pt").rename(outside)
    (folder / "model_step000006.pt").symlink_to(outside)
    (folder / "final.pt").symlink_to(outside)
    (folder / "model_step000007.pt").mkdir()
    os.mkfifo(folder / "model_step000008.pt")
    assert directory.list_checkpoints(folder) == []
    assert newest_whole(folder) == (None, [])


def test_no_folder_no_checkpoints(tmp_path: Path) -> None:
    assert directory.list_checkpoints(tmp_path / "nowhere") == []
    assert newest_whole(tmp_path / "nowhere") == (None, [])
    assert directory.list_runs(tmp_path / "nowhere") == []
    assert directory.clear_debris(tmp_path / "nowhere") == []


def test_newest_whole_falls_back_past_every_kind_of_damage(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, 1, 2, 3, 4, 5, 6)
    path = {step: folder / schema.checkpoint_name(step) for step in range(1, 7)}
    damage_weight(path[6])  # a bit of a weight
    path[5].write_bytes(path[5].read_bytes()[:-100])  # the end is missing
    path[4].write_bytes(b"")
    path[3].write_bytes(make.torch_bytes({"model": {}}))  # nothing of ours
    newest, damaged = newest_whole(folder)
    assert newest is not None and newest.step == 2
    assert [p.name for p, _ in damaged] == [path[step].name for step in (6, 5, 4, 3)]
    assert all(reason and "\n" not in reason and str(folder) not in reason for _, reason in damaged)
    assert "wte.weight" in damaged[0][1]


def test_twin_without_damage_the_newest_is_taken(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, 1, 2, final=3)
    newest, damaged = newest_whole(folder)
    assert newest is not None and newest.final and newest.step == 3 and damaged == []


def test_all_damaged_is_none_with_a_reason_each(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, 1, 2)
    for found in directory.list_checkpoints(folder):
        damage_weight(found.path)
    newest, damaged = newest_whole(folder)
    assert newest is None and len(damaged) == 2


def test_a_checkpoint_whose_name_lies_about_its_step_is_not_taken_for_it(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, 2, 4)
    (folder / "model_step000002.pt").rename(folder / "model_step000099.pt")
    newest, damaged = newest_whole(folder)
    assert newest is not None and newest.path.name == "model_step000004.pt"
    assert [path.name for path, _ in damaged] == ["model_step000099.pt"] and "2" in damaged[0][1]


def test_runs_are_folders_with_a_uuid4_as_name_and_links_to_folders(tmp_path: Path) -> None:
    """A link that a user has made to where the disk is large."""
    other = "9c0d1e4b-0f0a-4b8e-9d59-6f7f2e0a8a11"
    (tmp_path / make.RUN_ID).mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / other).symlink_to(tmp_path / "outside")
    for name in (
        make.RUN_ID.upper(),
        "demo",
        "3b241101-e2bb-1255-8caf-4136c566a962",
        make.RUN_ID[:-1],
        f"{make.RUN_ID}\n",
    ):
        (tmp_path / name).mkdir()
    (tmp_path / "1c0d1e4b-0f0a-4b8e-9d59-6f7f2e0a8a11").write_text("a file")
    assert directory.list_runs(tmp_path) == sorted([tmp_path / make.RUN_ID, tmp_path / other])


@pytest.mark.parametrize(
    "text",
    ["", "latest", "../" + make.RUN_ID, make.RUN_ID + "/..", make.RUN_ID.replace("-", ""), "{" + make.RUN_ID + "}",
     make.RUN_ID.upper(), make.RUN_ID + "\n", make.RUN_ID.replace("3", "٣"), "00000000-0000-0000-0000-000000000000"],
)  # fmt: skip
def test_only_a_uuid4_in_its_usual_spelling_is_a_run_id(text: str) -> None:
    assert not paths.is_run_id(text) and paths.is_run_id(make.RUN_ID)


def test_debris_goes_and_nothing_else(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, 5, final=6)
    outside = tmp_path / "precious"
    outside.write_text("precious")
    kept = ["notes.tmp", ".lock", ".attempt", ".hidden", "model_step000005.pt.tmp", ".model_step5.pt.tmp", "run.log"]
    for name in kept:
        (folder / name).write_text("mine")
    debris = [".model_step000007.pt.tmp", ".final.pt.tmp"]
    for name in debris:
        (folder / name).write_text("half")
    (folder / ".model_step000008.pt.tmp").symlink_to(outside)
    (folder / ".model_step000009.pt.tmp").mkdir()
    before = set(os.listdir(folder))
    removed = directory.clear_debris(folder)
    assert {path.name for path in removed} >= set(debris)
    assert before - set(os.listdir(folder)) == {path.name for path in removed} <= {*debris, ".model_step000008.pt.tmp"}
    assert outside.read_text() == "precious"
    assert directory.clear_debris(folder) == []


def test_retention_keeps_the_last_the_multiples_and_the_one_just_saved() -> None:
    steps = list(range(10, 101, 10))
    assert directory.expired_steps(steps, 100, 0, 0) == []
    assert directory.expired_steps(steps, 100, 3, 0) == [10, 20, 30, 40, 50, 60, 70]
    assert directory.expired_steps(steps, 100, 3, 20) == [10, 30, 50, 70]
    assert directory.expired_steps([10], 10, 1, 0) == []
    assert directory.expired_steps([10, 20, 500], 20, 1, 0) == [10], "later ones are not this attempt's to remove"


@given(st.sets(st.integers(1, 60)), st.integers(1, 60), st.integers(0, 5), st.integers(0, 7))
def test_retention_laws(others: set[int], just_saved: int, keep_last: int, keep_every: int) -> None:
    steps = sorted(others | {just_saved})
    gone = directory.expired_steps(steps, just_saved, keep_last, keep_every)
    left = [step for step in steps if step not in gone]
    assert gone == sorted(set(gone)) and set(gone) <= set(steps) and just_saved in left
    assert all(step <= just_saved for step in gone)
    past = [step for step in steps if step <= just_saved]
    assert keep_last == 0 or set(past[-keep_last:]) <= set(left)
    assert keep_every == 0 or all(step % keep_every for step in gone)
    assert directory.expired_steps(left, just_saved, keep_last, keep_every) == [], "what is left is not reduced further"


def test_overtaken_checkpoints_are_moved_whole_into_a_new_folder_each_time(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, 1, 2, 3)
    content = (folder / "model_step000003.pt").read_bytes()
    first = rewind.set_aside(folder, [folder / "model_step000002.pt", folder / "model_step000003.pt"])
    assert first == folder / "overtaken-1" and (first / "model_step000003.pt").read_bytes() == content
    assert names(folder) == ["model_step000001.pt"]
    make.save_ours(folder, make.state(2))
    second = rewind.set_aside(folder, [folder / "model_step000002.pt"])
    assert second == folder / "overtaken-2"
    assert sorted(os.listdir(first)) == ["model_step000002.pt", "model_step000003.pt"]
    assert sorted(os.listdir(second)) == ["model_step000002.pt"]


def test_a_verified_checkpoint_is_handed_on_open_and_its_checksums_are_not_read_again(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, 1, 2)
    file, damaged = directory.open_newest_whole(directory.list_checkpoints(folder))
    assert file is not None and file.is_verified and damaged == []
    name, stored = next(iter(file.values["model"].items()))
    leaf = SlicedTensor.whole(torch.zeros(stored.shape, dtype=stored.dtype))
    damaged_copy = Path(shutil.copy(file.path, tmp_path / "copy.pt"))
    damage_weight(damaged_copy)
    os.replace(damaged_copy, file.path)  # the open file is still the verified one
    assert file.is_verified and not file.is_in_place
    file.restore({"model": {name: leaf}})
    verified = file.identity
    file.close()
    with CheckpointFile(file.path) as other:
        other.trust(verified)
        assert not other.is_verified  # it is another file at the same path
        with pytest.raises(UserError, match="damaged"):
            other.restore({"model": {name: leaf}})
    assert directory.open_newest_whole(directory.list_checkpoints(folder))[1][0][0] == file.path


def test_a_verified_checkpoint_that_is_written_to_is_verified_again(tmp_path: Path) -> None:
    file, _ = directory.open_newest_whole(directory.list_checkpoints(folder_with(tmp_path, 1)))
    assert file is not None
    with file:
        name, stored = next(iter(file.values["model"].items()))
        content = file.path.read_bytes()
        offset = make.payload(content, "data/0")[0]
        with open(file.path, "r+b") as same:
            same.seek(offset)
            same.write(bytes([content[offset] ^ 1]))
        os.utime(file.path, ns=(0, 1))  # clocks of file systems are coarse
        assert not file.is_verified
        with pytest.raises(UserError, match="damaged"):
            file.restore({"model": {name: SlicedTensor.whole(torch.zeros(stored.shape, dtype=stored.dtype))}})
