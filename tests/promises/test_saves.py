"""--keep_best, --save_steps, --save_weights_every: what is there in the end is what is there without a kill."""

from __future__ import annotations

import errno
import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import unbroken
from tests import harness
from tests.data.test_ingest import json_tokenizer
from tests.harness import (
    OTHER_ID,
    RUN_ID,
    Running,
    arguments,
    assert_same_bits,
    bits,
    last_step,
    launch,
    train,
    write_corpus,
)
from tests.saving import whole_tree
from unbroken.__main__ import main
from unbroken.checkpoint import directory, disk
from unbroken.checkpoint.writer import RunCheckpointWriter
from unbroken.config import StepList, check_value, load_yaml
from unbroken.distributed.world import World
from unbroken.errors import UserError
from unbroken.run import locate

# At this rate the validation loss goes up and down: 3 is the lowest, then 10, 4, 9, 8.
CHANGES: dict[str, Any] = {
    **{"run_id": RUN_ID, "num_iterations": 10, "batch_size": 1, "learning_rate": 0.065, "seed": 6, "warmup_iters": 0},
    **{"warmdown_iters": 0, "save_every": 4, "val_loss_every": 1, "val_tokens": 64, "keep_best": 2, "keep_last": 1},
    **{"save_steps": "0,log2,5-7/2", "save_weights_every": 2},
}
RUN = Path("logs") / RUN_ID
KEPT = [f"model_step{step:06d}.pt" for step in (0, 1, 2, 3, 4, 5, 7, 8, 10)]  # 3 and 10 as the best
WEIGHTS = [f"weights_step{step:06d}.pt" for step in (2, 4, 6, 8, 10)]
THREE, TEN = KEPT[3], KEPT[8]


def left(folder: Path) -> tuple[list[str], str]:
    """The names in a run's folder, and where best.pt leads."""
    return sorted(path.name for path in folder.glob("*.pt")), os.readlink(folder / "best.pt")


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without an interruption, with a copy in a storage."""
    folder = tmp_path_factory.mktemp("straight")
    write_corpus(folder)
    train(folder, {**CHANGES, "mirror": f"file://{folder}/storage"}, processes=None)
    return folder


def test_killed_and_on_two_processes(straight: Path, tmp_path: Path) -> None:
    assert left(straight / RUN) == (["best.pt", "final.pt", *KEPT, *WEIGHTS], THREE)
    copies = {path.name.rpartition("-")[0] for path in straight.glob(f"storage/{RUN_ID}/*.pt")}
    assert copies == {name.removesuffix(".pt") for name in (*KEPT, *WEIGHTS)}, "retention there keeps the same"

    write_corpus(tmp_path)
    best = tmp_path / RUN / "best.pt"
    running = launch(tmp_path, arguments(CHANGES), 2, hold=5)
    running.kill_when(lambda: last_step(tmp_path) == 5 and os.path.lexists(best) and os.readlink(best) == THREE)
    done = train(tmp_path, {**CHANGES, "resume_from": RUN_ID}, processes=None)
    assert "overtaken" not in done.text
    assert_same_files(straight, tmp_path)


def assert_same_files(straight: Path, killed: Path) -> None:
    assert left(killed / RUN) == left(straight / RUN)
    for name in ("final.pt", *KEPT, *WEIGHTS):
        one, other = (torch.load(folder / RUN / name) for folder in (straight, killed))
        assert bits(one["model"]) == bits(other["model"]) and bits(one["optimizer"]) == bits(other["optimizer"])
        assert all(one["progress"][key] == other["progress"][key] for key in ("tokens", "best", "saved_for"))


@pytest.mark.skipif(not os.environ.get("UNBROKEN_SAVE_KILLS"), reason="UNBROKEN_SAVE_KILLS=20 takes some minutes")
def test_killed_at_random_instants_on_any_number_of_processes(straight: Path, tmp_path: Path) -> None:
    draw, kills = random.Random(os.environ.get("UNBROKEN_SEED", "1")), 0
    write_corpus(tmp_path)
    while kills < int(os.environ["UNBROKEN_SAVE_KILLS"]):
        running = launch(
            tmp_path, arguments({**CHANGES, "resume_from": "auto"}), draw.choice([None, 1, 2, 4]), pace=0.15
        )
        step = last_step(tmp_path)

        def has_gone_on(running: Running = running, step: int = step) -> bool:
            return last_step(tmp_path) > step or running.process.poll() is not None

        running.until(has_gone_on)
        time.sleep(draw.uniform(0, 4))
        if running.process.poll() is None:
            running.kill()
            running.wait()
            kills += 1
            continue
        done = running.wait()
        assert done.code == 0, done.text
        assert_same_files(straight, tmp_path)
        shutil.rmtree(tmp_path / "logs")
    train(tmp_path, {**CHANGES, "resume_from": "auto"}, processes=None)
    assert_same_files(straight, tmp_path)


def test_the_tools_know_the_best_and_the_weights(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(straight)
    one, other = (str(RUN / name) for name in WEIGHTS[1:3])
    small = ["--tokenizer", str(json_tokenizer(tmp_path / "small", 400) / "tokenizer.json")]
    for typed, said in (
        *((["verify", word], THREE) for word in ("best", f"{RUN_ID[:6]}/best", f"{RUN}/best", f"{RUN}/best.pt")),
        (["show", "latest"], f"{RUN}/final.pt"),
        (["show", one, "--tensors"], "bfloat16"),
        (["diff", one, other], "progress.tokens"),
        (["sample", one, "--num_tokens", "2", *small], ""),
        (["eval", one, "--tokens", "64", *small], "perplexity"),
        (["export", one, str(tmp_path / "hf"), "--tokenizer", "none"], ""),
        (["ls"], "5 of weights alone, weights_step*.pt, steps 2 to 10"),
        (["ls"], f"{THREE} = best"),
        (["ls", "--json", "--check"], WEIGHTS[0]),
        (["audit", RUN_ID, "--to", "1"], "MATCH"),
    ):
        code, printed = main(typed), capsys.readouterr()
        assert code in (0, 1 if typed[0] == "diff" else 0) and said in printed.out, (typed, printed)
    assert main(["show", f"{OTHER_ID}/best"]) == 2 and capsys.readouterr().err.count("\n") == 1
    full = torch.load(straight / RUN / KEPT[4])["model"]
    assert bits(torch.load(one)["model"]) == bits({name: weight.bfloat16() for name, weight in full.items()})
    model, info = unbroken.load(one)
    assert info["step"] == 4 and {weight.dtype for weight in model.parameters()} == {torch.float32}
    path, file = locate._open_init_from({"init_from": f"{RUN_ID}/best"}, OTHER_ID)
    assert file is not None and path == f"{RUN}/{THREE}"
    file.close()


def test_weights_begin_a_run_and_resume_none(straight: Path, tmp_path: Path) -> None:
    one = f"{RUN}/{WEIGHTS[2]}"
    done = launch(straight, ["--resume_from", one], processes=None).wait()
    assert done.code == 2 and done.err.count("\n") == 1, done.text
    assert f"cannot be resumed; the nearest full checkpoint is {RUN}/model_step00000" in done.err
    write_corpus(tmp_path)
    shutil.copy(straight / one, tmp_path / "model_step000006.pt")  # under another name it is no checkpoint either
    assert directory.find_damage(tmp_path / "model_step000006.pt") == directory.WEIGHTS_ONLY
    train(tmp_path, {"init_from": "model_step000006.pt", "model": None, "num_iterations": 0}, processes=None)


def test_the_best_come_back_from_the_storage(straight: Path, tmp_path: Path) -> None:
    """The best are downloaded with the newest; the link is relative; a fork does not have those of its parent."""
    write_corpus(tmp_path)
    shutil.copytree(straight / "storage", tmp_path / "storage")
    typed = {**CHANGES, "mirror": f"file://{tmp_path}/storage", "save_steps": None, "save_weights_every": None}
    train(tmp_path, {**typed, "resume_from": RUN_ID, "num_iterations": 11}, processes=None)
    assert left(tmp_path / RUN)[1] == THREE
    os.rename(tmp_path / "logs", tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere" / RUN_ID / "best.pt").is_file()
    shutil.rmtree(tmp_path / "elsewhere")
    forked = {"resume_from": f"{typed['mirror']}/{RUN_ID}/best", "run_id": OTHER_ID, "fork": True}
    done = train(tmp_path, {**typed, **forked, "num_iterations": 4}, processes=None)
    assert f"forked from run {RUN_ID} at step 3" in done.out
    assert left(tmp_path / "logs" / OTHER_ID)[1] == KEPT[4]


def test_going_back_leaves_no_link_to_what_is_overtaken(straight: Path, tmp_path: Path) -> None:
    """Also in a copy that has a file instead of the link; newer weights are of the other course, too."""
    write_corpus(tmp_path)
    shutil.copytree(straight / RUN, tmp_path / RUN, symlinks=False)
    typed = {**CHANGES, "num_iterations": 4, "run_id": None, "save_weights_dtype": "float32"}
    train(tmp_path, {**typed, "resume_from": f"{RUN}/{THREE}"}, processes=None)
    assert left(tmp_path / RUN) == (["best.pt", "final.pt", *KEPT[:5], *WEIGHTS[:2]], THREE)
    aside = sorted(path.name for path in tmp_path.glob(f"{RUN}/overtaken-*/*"))
    assert aside == sorted(["best.pt", "final.pt", *KEPT[4:], *WEIGHTS[1:]])
    assert {weight.dtype for weight in torch.load(tmp_path / RUN / WEIGHTS[1])["model"].values()} == {torch.float32}


def test_the_untrained_model_resumes_exactly(straight: Path, tmp_path: Path) -> None:
    write_corpus(tmp_path)
    (tmp_path / RUN).mkdir(parents=True)
    shutil.copy(straight / RUN / KEPT[0], tmp_path / RUN)
    typed = {**dict.fromkeys(harness.TINY), "resume_from": f"{RUN}/{KEPT[0]}", "num_iterations": 2}
    train(tmp_path, typed, processes=None)
    assert_same_bits(straight / RUN / KEPT[2], tmp_path / RUN / "final.pt")


def test_a_checkpoint_waits_for_the_weights_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a kill between the two would lose the weights: a run that is resumed from the checkpoint has them."""
    committed: list[str] = []
    commit = disk.commit

    def slow_weights(temporary: Path, path: Path) -> None:
        if path.name.startswith("weights"):
            time.sleep(0.3)
        committed.append(path.name)
        if path.name == "weights_step000002.pt":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        commit(temporary, path)

    monkeypatch.setattr(disk, "commit", slow_weights)
    with RunCheckpointWriter(tmp_path, World.single(), with_weights=True) as writer:
        for step in (1, 2):
            tree = whole_tree(step)
            writer.save_weights(tree, step, torch.bfloat16, lambda: None)
            writer.save(tree, step)
        writer.wait()
        errors = {result.path.name: result.error for result in writer.results()}
    assert committed == [f"{kind}_step00000{step}.pt" for step in (1, 2) for kind in ("weights", "model")]
    assert [name for name, error in errors.items() if error] == ["weights_step000002.pt"], "the checkpoint is there"
    assert sorted(os.listdir(tmp_path)) == ["model_step000001.pt", "model_step000002.pt", "weights_step000001.pt"]


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("", []),
        ("0,1,2,4,8-64/8", [0, 1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64]),
        ("log2", [1, 2, 4, 8, 16, 32, 64]),
        ("0,log2,60-62,70", [0, 1, 2, 4, 8, 16, 32, 60, 61, 62, 64, 70]),
        ("7-20/5,5-5", [5, 7, 12, 17]),
        ("999999999999999999", []),
    ],
)
def test_a_list_means_these_steps(text: str, steps: list[int]) -> None:
    parsed = StepList.parse(text)
    assert [step for step in range(100) if step in parsed] == steps
    for after, last in ((-1, 99), (4, 61), (0, 1), (64, 63)):
        assert parsed.count(after, last) == len([step for step in steps if after < step <= last])


@pytest.mark.parametrize("text", ["x", "1,,2", "-1", "5-3", "1-9/0", "1-", "log3", "1 2", "1.5", "1" * 19, "٣"])
def test_nonsense_is_one_line(text: str) -> None:
    with pytest.raises(UserError, match="^--save_steps .*: it must be steps such as 0,1,2,4,8-64/8 or log2"):
        check_value("save_steps", text)


def test_a_single_step_in_yaml(tmp_path: Path) -> None:
    (tmp_path / "flags.yaml").write_text("save_steps: 8\n")
    assert load_yaml(str(tmp_path / "flags.yaml")) == {"save_steps": "8"}
