"""`python -m unbroken import`: turn a Hugging Face folder into a checkpoint for --init_from."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from unbroken import console
from unbroken.commands import atomic_output
from unbroken.errors import UserError, describe_error
from unbroken.model import families

MAX_CONFIG_BYTES = 1 << 20


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the folder and the checkpoint to write."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder with config.json and model.safetensors")
    parser.add_argument("file", type=Path, metavar="FILE.pt", help="checkpoint to write; it must not exist")


def run(args: argparse.Namespace) -> int:
    """Check everything, then write the checkpoint."""
    if args.file.exists():
        raise UserError(f"{args.file} exists: choose another name")
    try:
        config = _config(args.folder / "config.json")
        name, stored = families.identify_config(config)
        weights = stored.import_model(_tensors(args.folder / "model.safetensors"), families.build(name))
    except UserError as error:
        raise UserError(f"{args.folder}: {error}") from None
    length = config.get("max_position_embeddings")
    trained = {"sequence_length": length} if type(length) is int else {}
    atomic_output.write_whole(args.file, lambda path: _save({"model": weights, "args": trained}, path))
    console.print_line(f"{args.file}: train on from these weights with train_gpt2_mod.py --init_from {args.file}")
    return 0


def _save(tree: dict[str, Any], path: Path) -> None:
    """Write with torch's own writer. Raises OSError, also where torch reports a full disk as a wrong position."""
    import torch

    with open(path, "xb") as file:
        try:
            torch.save(tree, file)
        except RuntimeError as error:
            raise (
                error.__context__ if isinstance(error.__context__, OSError) else OSError(describe_error(error))
            ) from None
        file.flush()
        os.fsync(file.fileno())


def _config(path: Path) -> dict[str, Any]:
    """Return the content of an untrusted `config.json`. Raises UserError if it is no JSON object."""
    try:
        with open(path, "rb") as file:
            config = json.loads(file.read(MAX_CONFIG_BYTES))
    except OSError as error:
        raise UserError(f"{path.name} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path.name} is not JSON") from None
    if not isinstance(config, dict):
        raise UserError(f"{path.name} is not a JSON object")
    return config


def _tensors(path: Path) -> dict[str, Any]:
    """Return the tensors of an untrusted safetensors file by name. Raises UserError if it cannot be read."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise UserError("import needs safetensors: pip install safetensors") from None
    if not path.is_file():
        raise UserError(f"{path.name} is missing; a model in several files: save it with max_shard_size='100GB'")
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{path.name} is damaged: {str(error).splitlines()[0]:.100}") from None
