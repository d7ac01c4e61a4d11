"""`python -m unbroken import`: turn a folder of Hugging Face or torch.distributed.checkpoint into a checkpoint."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from unbroken import console
from unbroken.commands import atomic_output, dcp_folder
from unbroken.errors import UserError
from unbroken.model import families

MAX_CONFIG_BYTES = 1 << 20


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the folder and the checkpoint to write."""
    parser.add_argument(
        "folder", type=Path, metavar="DIR", help="folder with config.json and model.safetensors, or of DCP"
    )
    parser.add_argument("file", type=Path, metavar="FILE.pt", help="checkpoint to write; it must not exist")
    parser.add_argument(
        "--like",
        metavar="FILE|RUN",
        help="of a DCP folder: the checkpoint that has what the folder lacks (flags, data)",
    )


def run(args: argparse.Namespace) -> int:
    """Check everything, then write the checkpoint."""
    if args.file.exists():
        raise UserError(f"{args.file} exists: choose another name")
    if dcp_folder.is_dcp(args.folder):
        return dcp_folder.read(args)
    if args.like is not None:
        raise UserError("--like has no effect without a folder of torch.distributed.checkpoint; leave it out")
    try:
        config = _config(args.folder / "config.json")
        name, stored = families.identify_config(config)
        weights = stored.import_model(_tensors(args.folder / "model.safetensors"), families.build(name))
    except UserError as error:
        raise UserError(f"{args.folder}: {error}") from None
    length = config.get("max_position_embeddings")
    trained = {"sequence_length": length} if type(length) is int else {}
    atomic_output.write_whole(
        args.file, lambda path: atomic_output.save_tree({"model": weights, "args": trained}, path)
    )
    console.print_line(f"{args.file}: train on from these weights with train_gpt2_mod.py --init_from {args.file}")
    return 0


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
