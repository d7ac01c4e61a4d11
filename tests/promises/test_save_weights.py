"""--save_weights_every: small files of the weights alone, whole or absent, which every tool reads."""

from __future__ import annotations

import errno
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import unbroken
from tests.harness import RUN_ID, arguments, bits, launch, train, write_corpus
from tests.saving import whole_tree
from unbroken.__main__ import main
from unbroken.checkpoint import directory, disk
from unbroken.checkpoint.writer import RunCheckpointWriter
from unbroken.distributed.world import World

CHANGES: dict[str, Any] = {
    **{"run_id": RUN_ID, "num_iterations": 8, "batch_size": 1, "warmup_iters": 0, "warmdown_iters": 0},
    **{"save_every": 3, "keep_last": 1, "save_weights_every": 2},
}
RUN = Path("logs") / RUN_ID
WEIGHTS = [f"weights_step{step:06d}.pt" for step in (2, 4, 6, 8)]


def weights_of(folder: Path) -> dict[str, Any]:
    """The bits of the weights in each file of weights alone."""
    return {path.name: bits(torch.load(path)["model"]) for path in sorted((folder / RUN).glob("weights_*.pt"))}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    write_corpus(folder)
    train(folder, {**CHANGES, "mirror": f"file://{folder}/storage"}, processes=None)
    return folder


def test_they_are_the_weights_of_the_run_after_kills_and_on_two_processes(straight: Path, tmp_path: Path) -> None:
    expected = weights_of(straight)
    assert [*expected] == WEIGHTS
    full = torch.load(straight / RUN / "model_step000006.pt")["model"]
    assert expected[WEIGHTS[2]] == bits({name: weight.bfloat16() for name, weight in full.items()})
    copies = sorted(path.name[: len("weights_step000002")] for path in straight.glob(f"storage/{RUN_ID}/weights*.pt"))
    assert [f"{name}.pt" for name in copies] == WEIGHTS

    write_corpus(tmp_path)
    running = launch(tmp_path, arguments(CHANGES), 2, pace=0.3)
    running.kill_at(5)
    done = train(tmp_path, {**CHANGES, "resume_from": RUN_ID}, processes=None)
    assert weights_of(tmp_path) == expected and "overtaken" not in done.text

    back = {**CHANGES, "resume_from": f"{RUN}/model_step000006.pt", "save_weights_dtype": "float32"}
    train(tmp_path, back, processes=None)
    assert [path.name for path in tmp_path.glob(f"{RUN}/overtaken-1/weights*.pt")] == WEIGHTS[3:]
    assert {weight.dtype for weight in torch.load(tmp_path / RUN / WEIGHTS[3])["model"].values()} == {torch.float32}


def test_every_tool_reads_them_and_only_resuming_refuses(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(straight)
    one, other = (str(RUN / name) for name in WEIGHTS[1:3])
    for typed, said in (
        (["verify", RUN_ID], WEIGHTS[0]),
        (["show", one, "--tensors"], "bfloat16"),
        (["diff", one, other], "progress.tokens"),
        (["sample", one, "--num_tokens", "2", "--tokenizer", "bytes"], ""),
        (["eval", one, "--tokens", "64", "--tokenizer", "bytes"], "perplexity"),
        (["export", one, str(tmp_path / "hf"), "--tokenizer", "none"], ""),
        (["ls"], "4 of weights alone, weights_step*.pt, steps 2 to 8"),
        (["ls", "--json", "--check"], WEIGHTS[0]),
    ):
        code, printed = main(typed), capsys.readouterr()
        assert code in (0, 1 if typed[0] == "diff" else 0) and said in printed.out, (typed, printed)
    model, info = unbroken.load(one)
    assert info["step"] == 4 and {weight.dtype for weight in model.parameters()} == {torch.float32}

    done = launch(straight, ["--resume_from", one], processes=None).wait()
    assert done.code == 2 and done.err.count("\n") == 1, done.text
    assert f"cannot be resumed; the nearest full checkpoint is {RUN}/model_step000006.pt" in done.err
    write_corpus(tmp_path)
    shutil.copy(one, tmp_path / "model_step000004.pt")  # under another name it is no checkpoint either
    assert directory.find_damage(tmp_path / "model_step000004.pt") == directory.WEIGHTS_ONLY
    began = {"init_from": "model_step000004.pt", "model": None, "num_iterations": 0}
    assert train(tmp_path, began, processes=None).code == 0


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
