"""Describe files that are no checkpoints of this program, by their first bytes or keys, and what to do with them."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

from unbroken.checkpoint.format.schema import dict_at
from unbroken.checkpoint.format.stored_tensor import StoredTensor
from unbroken.files import describe_start
from unbroken.text import printable

HEAD_BYTES = 64  # of a file, for `describe_bytes`
_LEGACY_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the pickled magic number of torch.save before 1.6

_BY_FIRST_BYTES = {  # of two that fit, the first one counts
    b"\x1f\x8b": "it is compressed by gzip: run gunzip on it",
    b"\x28\xb5\x2f\xfd": "it is compressed by zstd: run unzstd on it",
    b"GGUF": "it is a GGUF model, which has no optimizer and is often quantized: it cannot be taken over",
    b"\x89HDF": "it is an HDF5 file: save its weights with torch.save",
    b"\x93NUMPY": "it is a .npy array: save its weights with torch.save",
    (20240520).to_bytes(4, "little"): "it is a token shard: --input_bin takes it",
    (20240326).to_bytes(
        4, "little"
    ): "it is a model of llm.c: --init_from takes the folder that its export_hf.py makes",
    (20240527).to_bytes(4, "little"): "it is an optimizer state of llm.c, whose model is another one",
    _LEGACY_TORCH: "it is in torch.save's format of before 1.6; write it again: torch.save(torch.load(FILE), FILE)",
    b"\x80": "it is a bare pickle: save its weights with torch.save",
}


def describe_bytes(head: bytes, size: int) -> str:
    """Return the kind of a file of `size` bytes that begins with `head`, and what to do; "" for an unknown kind."""
    known = describe_start(head, _BY_FIRST_BYTES)
    if known:
        return known
    if len(head) > 8 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] <= size - 8:
        return "it is a safetensors file: --init_from takes the folder that it is in, with its config.json"
    return ""


def describe_values(values: Mapping[str, Any]) -> str:
    """Return the kind of the dict in another program's file, and how to load its weights; "" for an unknown kind."""
    load = "torch.load(FILE, map_location='cpu'"
    if "pytorch-lightning_version" in values or "state_dict" in values:
        prefixed = "{k.partition('.')[2]: v for k, v in c['state_dict'].items()}"
        return (
            "it is a Lightning checkpoint: --init_from takes its weights after"
            f" c = {load}, weights_only=False); torch.save({{'model': {prefixed}}}, 'weights.pt')"
        )
    if values and all(isinstance(value, StoredTensor) for value in values.values()):
        return f"it is a bare state dict: --init_from takes it after torch.save({{'model': {load})}}, 'weights.pt')"
    if "model_args" in values:
        sizes = ", ".join(f"{printable(name, 20)} {printable(size, 20)}" for name, size in _sizes(values).items())
        return (
            f"it is a nanoGPT checkpoint of other sizes ({sizes}): write them down as a model of your own, see"
            " docs/your-own-model.md"
        )
    return ""


def _sizes(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers in the `model_args` of a nanoGPT checkpoint, at most six."""
    numbers = {name: size for name, size in dict_at(values, "model_args").items() if type(size) is int}
    return dict(list(numbers.items())[:6])


def describe_mismatch(values: Mapping[str, Any], found: str) -> str:
    """Return why a checkpoint is of another model although its weights fit `found`; "" if it is not."""
    named = dict_at(values, "args").get("model")
    if not isinstance(named, str) or named == found:
        return ""
    return f"it was trained as --model {printable(named)}, which is not the {found} that its weights would fit"
