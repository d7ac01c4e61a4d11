"""Read a Hugging Face folder: `config.json` and weights in safetensors. Nothing in it is trusted, no code is run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unbroken.distributed.sliced_tensor import SlicedTensor
from unbroken.errors import UserError
from unbroken.model import families

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
MAX_JSON_BYTES = 1 << 24


@dataclass(frozen=True)
class ImportedModel:
    """A model from a Hugging Face folder: its name and flags here, its state dict in fp32, its longest context."""

    path: Path
    model: str
    flags: dict[str, Any]
    weights: dict[str, Tensor]
    context: int | None

    def digest(self) -> int:
        """Return a number that two ranks share if they read the same weights: a sum of their bits."""
        return sum(int(weight.contiguous().view(torch.int32).sum()) for weight in self.weights.values())

    def move_into(self, live: dict[str, SlicedTensor]) -> None:
        """Copy the weights into the live ones, and give up their memory."""
        for name, tensor in live.items():
            flat = self.weights[name].reshape(-1)
            for part in tensor.slices:
                part.data.copy_(flat[part.start : part.stop])
        self.weights.clear()


def is_folder(path: Path) -> bool:
    """Return whether a path is that of a Hugging Face folder."""
    return (path / CONFIG).is_file()


def read_folder(path: Path) -> ImportedModel:
    """Return the model in a Hugging Face folder. Raises UserError."""
    try:
        config = _read_json(path / CONFIG)
        name, stored = families.identify_config(config)
        model = families.build(name)
        weights = stored.import_model(_read_tensors(path), model)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    length = config.get("max_position_embeddings", config.get("n_positions"))
    variant = dict(families.model_class(name).variants[0])
    return ImportedModel(path, name, variant, weights, length if type(length) is int else None)


def _read_json(path: Path) -> dict[str, Any]:
    """Return the content of an untrusted JSON file. Raises UserError if it is no object."""
    try:
        with open(path, "rb") as file:
            content = json.loads(file.read(MAX_JSON_BYTES))
    except OSError as error:
        raise UserError(f"{path.name} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path.name} is not JSON") from None
    if not isinstance(content, dict):
        raise UserError(f"{path.name} is not a JSON object")
    return content


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of all safetensors files of a folder by name. Raises UserError if one cannot be read."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise UserError("reading it needs safetensors: pip install safetensors") from None
    names = [WEIGHTS]
    if not (folder / WEIGHTS).is_file() and (folder / INDEX).is_file():
        placed = _read_json(folder / INDEX).get("weight_map")
        names = sorted({str(name) for name in placed.values()}) if isinstance(placed, dict) else []
        if not names or any(Path(name).name != name for name in names):
            raise UserError(f"{INDEX} does not name the files beside it")
    found: dict[str, Tensor] = {}
    for name in names:
        if not (folder / name).is_file():
            raise UserError(f"{name} is missing")
        try:
            found |= load_file(folder / name)
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise UserError(f"{name} is damaged: {str(error).splitlines()[0]:.100}") from None
    return found
