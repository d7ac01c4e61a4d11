"""`python -m unbroken import`: turn a folder of Hugging Face or torch.distributed.checkpoint into a checkpoint."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

from unbroken import console
from unbroken.commands import add_model_file, atomic_output, dcp_folder
from unbroken.commands.hf_export import MARK
from unbroken.data.tokenizers import TOKENIZERS
from unbroken.errors import UserError
from unbroken.files import read_whole
from unbroken.paths import as_typed

MAX_BYTES = 1 << 16  # of the file in which an export says what it is made of


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the folder and the checkpoint to write."""
    parser.add_argument(
        "folder", type=Path, metavar="DIR", help="folder with config.json and model.safetensors, or a DCP folder"
    )
    parser.add_argument("file", type=Path, metavar="FILE.pt", help="checkpoint to write; it must not exist")
    parser.add_argument(
        "--like",
        metavar="FILE|RUN",
        help="with a DCP folder: the checkpoint from which flags and data are taken",
    )
    add_model_file(parser)


def run(args: argparse.Namespace) -> int:
    """Check everything, then write the checkpoint."""
    from unbroken.run.imported import read_folder  # imports torch

    if args.file.exists():
        raise UserError(f"{args.file} exists; choose another name")
    if dcp_folder.is_dcp(args.folder):
        return dcp_folder.read(args)
    if args.like is not None:
        raise UserError("--like has no effect without a folder of torch.distributed.checkpoint; leave it out")
    found = read_folder(args.folder)
    trained = {} if found.context is None else {"sequence_length": found.context}
    tree: dict[str, Any] = {"model": found.weights, "args": {**trained, "model": found.model}}
    if tokenizer := _tokenizer_of(args.folder):
        tree["data"] = {"tokenizer": tokenizer}
    atomic_output.write_whole(args.file, lambda path: atomic_output.save_tree(tree, path))
    command = as_typed(f"python train_gpt2_mod.py --init_from {shlex.quote(str(args.file))}")
    console.print_line(f"{args.file}: train on from these weights with {command}")
    return 0


def _tokenizer_of(folder: Path) -> str:
    """Return the tokenizer that an export of ours names, "" if the folder names none; its file is untrusted."""
    try:
        about = json.loads(read_whole(folder / MARK, MAX_BYTES))
    except (OSError, ValueError, RecursionError):
        return ""
    name = about.get("tokenizer") if isinstance(about, dict) else None
    return name if isinstance(name, str) and name in TOKENIZERS else ""
