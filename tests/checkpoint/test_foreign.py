"""A file that is no checkpoint of ours is named for what it is, with the way to use it, in one line."""

from __future__ import annotations

import gzip
import io
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.harness import run, write_corpus
from unbroken.checkpoint.reader import CheckpointFile
from unbroken.errors import UserError

WEIGHTS = {"transformer.wte.weight": torch.zeros(4, 2), "transformer.wpe.weight": torch.zeros(4, 2)}


def saved(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def safetensors() -> bytes:
    header = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    return len(header).to_bytes(8, "little") + header + bytes(4)


FILES = {
    "it is compressed by gzip": gzip.compress(saved(WEIGHTS)),
    "it is a Git LFS pointer: run `git lfs pull`": b"version https://git-lfs.github.com/spec/v1" + bytes(60),
    "it is a web page": b"<!DOCTYPE html><html>404</html>",
    "it is a GGUF model": b"GGUF" + bytes(60),
    "it is a token shard: --input_bin takes it": (20240520).to_bytes(4, "little") + bytes(1020),
    "it is a model of llm.c": (20240326).to_bytes(4, "little") + bytes(1020),
    "it is in torch.save's format of before 1.6": saved({"model": WEIGHTS}, _use_new_zipfile_serialization=False),
    "it is a safetensors file": safetensors(),
}


@pytest.mark.parametrize("says", FILES)
def test_a_file_is_told_by_its_first_bytes(tmp_path: Path, says: str) -> None:
    (tmp_path / "a.pt").write_bytes(FILES[says])
    with pytest.raises(UserError) as raised:
        CheckpointFile(tmp_path / "a.pt")
    assert says in str(raised.value) and "\n" not in str(raised.value)


def test_a_cut_off_checkpoint_is_still_called_one(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(saved({"model": WEIGHTS})[:-100])
    with pytest.raises(UserError, match="it is cut off"):
        CheckpointFile(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (WEIGHTS, "it is a bare state dict: --init_from takes it after torch.save"),
        (
            {"pytorch-lightning_version": "2.5", "state_dict": {"model.w": torch.zeros(1)}},
            "it is a Lightning checkpoint",
        ),
        ({"model": WEIGHTS, "model_args": {"vocab_size": 50257}, "iter_num": 5}, "it is a nanoGPT checkpoint"),
        ({"step": 3}, "it has no `model` with weights in it"),
    ],
)
@pytest.mark.parametrize("flag", ["--init_from", "--resume_from"])
def test_a_checkpoint_of_another_program_is_named(tmp_path: Path, values: dict[str, Any], says: str, flag: str) -> None:
    write_corpus(tmp_path)
    torch.save(values, tmp_path / "a.pt")
    done = run(tmp_path, flag, "a.pt", "--model", "d2")
    assert done.code == 2 and says in done.err and done.err.count("\n") == 1, done.text
    assert not (tmp_path / "logs").exists()


def test_the_line_for_a_bare_state_dict_makes_it_loadable(tmp_path: Path) -> None:
    """Where its head and its embedding are the same numbers, as they are one tensor here."""
    from unbroken.model import families

    write_corpus(tmp_path)
    model = families.build("d2").to_empty(device="cpu")
    torch.manual_seed(1)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    torch.save(model.state_dict(), tmp_path / "bare.pt")
    done = run(tmp_path, "--init_from", "bare.pt", "--model", "d2")
    line = done.err.partition("takes it after ")[2].strip()
    exec(line.replace("FILE", repr(str(tmp_path / "bare.pt"))).replace("'weights.pt'", repr(str(tmp_path / "w.pt"))))
    flags = ("--num_iterations", "1", "--input_bin", "data/train_*.bin", "--input_val_bin", "data/val_*.bin")
    done = run(tmp_path, "--init_from", "w.pt", *flags)
    assert done.code == 2 and "two different tensors where this model has one" in done.err, done.text
    weights = torch.load(tmp_path / "w.pt")
    weights["model"]["lm_head.weight"] = weights["model"]["transformer.wte.weight"].clone()
    torch.save(weights, tmp_path / "w.pt")
    done = run(tmp_path, "--init_from", "w.pt", *flags)
    assert done.code == 0, done.text
