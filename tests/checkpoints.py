"""Small checkpoints to read: one of ours, the same through torch.save, and zips and pickles put together by hand."""

from __future__ import annotations

import copy
import io
import os
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from unbroken.checkpoint.reader import CheckpointFile
from unbroken.checkpoint.writer import RunCheckpointWriter
from unbroken.distributed.sliced_tensor import SlicedTensor
from unbroken.distributed.world import World
from unbroken.errors import UserError

RUN_ID = "3b241101-e2bb-4255-8caf-4136c566a962"


def state(step: int = 7, seed: int = 0) -> dict[str, Any]:
    """What a checkpoint of format 1 holds, with tensors: two weights of which one is tied, moments, a counter."""
    generator = torch.Generator().manual_seed(seed + step)
    weight = torch.randn(6, 5, generator=generator)
    half = torch.randn(9, generator=generator).bfloat16()
    moments = {"step": torch.tensor(float(step)), "exp_avg": torch.randn(6, 5, generator=generator)}
    return {
        "model": {"wte.weight": weight, "lm_head.weight": weight, "norm": half},
        "optimizer": {"state": {0: moments}, "param_groups": [{"lr": 3e-4, "betas": (0.9, 0.95), "params": [0]}]},
        "step": step,
        "code": "print('hello')\n",
        "args": {"learning_rate": 3e-4, "model": "d12", "seed": 1},
        "run_id": RUN_ID,
        "format": 1,
        "progress": {"step": step, "tokens": step * 1024, "history": {"digest": "ab"}},
        "data": {"shards": [["a.bin", 1000]]},
        "rng": {"seed": 1},
        "environment": {"torch": "2.13"},
        "sources": {"unbroken/model.py": "import torch\n"},
    }


def leaves(tree: Any, known: dict[int, SlicedTensor] | None = None) -> Any:
    """The tree with a leaf over the memory of each tensor; a tensor in two places is one leaf."""
    known = {} if known is None else known
    if isinstance(tree, torch.Tensor):
        return known.setdefault(id(tree), SlicedTensor.whole(tree))
    if isinstance(tree, dict):
        return {key: leaves(value, known) for key, value in tree.items()}
    if isinstance(tree, list):
        return [leaves(value, known) for value in tree]
    return tree


def blank(tree: dict[str, Any]) -> dict[str, Any]:
    """A copy of the model and the optimizer whose tensors hold something else, ties kept."""
    other = copy.deepcopy({key: tree[key] for key in ("model", "optimizer")})
    for tensor in tensors(other).values():
        tensor.fill_(-1)
    return other


def tensors(tree: Any, path: str = "") -> dict[str, torch.Tensor]:
    """Every tensor by its place."""
    if isinstance(tree, torch.Tensor):
        return {path: tree}
    found: dict[str, torch.Tensor] = {}
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        found |= tensors(value, f"{path}.{key}".lstrip("."))
    return found


def same_bits(a: Any, b: Any) -> bool:
    """Whether two trees have the same tensors, bit for bit."""

    def bits(tree: Any) -> dict[str, Any]:
        return {name: (tensor.shape, tensor.dtype, raw(tensor)) for name, tensor in tensors(tree).items()}

    return bits(a) == bits(b)


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


def save_ours(folder: Path, tree: dict[str, Any], *, final: bool = False) -> Path:
    """Through the product's own writer."""
    with RunCheckpointWriter(folder, World.single()) as saver:
        saver.save(leaves(tree), tree["step"], final=final)
        saver.wait()
        (outcome,) = saver.results()
    assert outcome.error is None, outcome.error
    return outcome.path


def torch_bytes(tree: Any) -> bytes:
    """What torch.save makes of it."""
    file = io.BytesIO()
    torch.save(tree, file)
    return file.getvalue()


def zip_of(entries: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
    """A zip made by Python's own zipfile."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return file.getvalue()


def pickle_file(pickled: bytes, storages: dict[str, bytes] | None = None) -> bytes:
    """A zip like torch.save's around any pickle."""
    entries = [("archive/data.pkl", pickled), ("archive/byteorder", b"little"), ("archive/version", b"3\n")]
    return zip_of(entries + [(f"archive/data/{key}", content) for key, content in (storages or {}).items()])


def storage_opcodes(key: str = "0", count: int = 4, kind: str = "FloatStorage") -> bytes:
    """A reference to a storage."""
    return b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu") + integer(count) + b"tQ"


def tensor_opcodes(shape: tuple[int, ...], stride: tuple[int, ...], offset: int = 0, storage: bytes = b"") -> bytes:
    """A tensor over it; the arguments may be as wrong as they like."""
    numbers = [b"(" + b"".join(map(integer, values)) + b"t" for values in (shape, stride)]
    hooks = b"ccollections\nOrderedDict\n)R"
    call = b"(" + (storage or storage_opcodes()) + integer(offset) + b"".join(numbers) + b"\x89" + hooks + b"tR"
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + call


def text(value: str) -> bytes:
    encoded = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def integer(value: int) -> bytes:
    encoded = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(encoded)]) + encoded


def dict_of(**values: bytes) -> bytes:
    """A pickle of a dict of what the opcodes make."""
    return b"\x80\x02}(" + b"".join(text(key) + value for key, value in values.items()) + b"u."


def payload(data: bytes, name: str) -> tuple[int, int]:
    """(offset, size) of what an entry holds, as Python's zipfile sees it; `name` without the folder."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        (entry,) = [item for item in archive.infolist() if item.filename.partition("/")[2] == name]
    return padding(data, entry).stop, entry.file_size


def padding(data: bytes, entry: zipfile.ZipInfo) -> range:
    """The places of the extra field in the header of a zip's entry: zeros that align what it holds."""
    named, extra = struct.unpack_from("<HH", data, entry.header_offset + 26)
    start = entry.header_offset + 30 + named
    return range(start, start + extra)


def flip(path: Path, offset: int, bit: int = 1) -> None:
    """Change one bit of a file."""
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ bit]))


def refused(folder: Path, content: bytes) -> str:
    """The one line with which a file is refused."""
    path = folder / "hostile.pt"
    path.write_bytes(content)
    before = sorted(os.listdir(folder))
    with pytest.raises(UserError) as caught:
        CheckpointFile(path)
    line = str(caught.value)
    assert line.startswith(f"{path}: ") and line.isprintable() and len(line) < len(str(path)) + 400, line
    assert sorted(os.listdir(folder)) == before
    return line.removeprefix(f"{path}: ")
