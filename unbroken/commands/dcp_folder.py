"""`export --format dcp` and `import` of such a folder: the weights and moments for torch.distributed.checkpoint.

The names are those of torch.distributed.checkpoint.state_dict with `model` and `optimizer` in front, as in torchtitan.
`optimizer.param_groups` is written in both of its forms.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unbroken import console
from unbroken.commands import atomic_output
from unbroken.errors import UserError, describe_error
from unbroken.paths import as_typed
from unbroken.run import locate
from unbroken.text import printable

if TYPE_CHECKING:
    import torch

    from unbroken.checkpoint.dcp_reader import DcpFolder
    from unbroken.checkpoint.reader import CheckpointFile

DCP = "dcp"  # --format
MAX_STEP = 2**24  # a step counter in fp32 is exact up to here


def write(args: argparse.Namespace, folder: Path) -> None:
    """Write the weights and the optimizer's state of a checkpoint into the folder. Raises UserError or OSError."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    for name in ("dtype", "tokenizer", "bpe_dir"):
        if getattr(args, name) is not None:
            raise UserError(f"--{name} has no effect with --format {DCP}; leave it out")
    with locate.open_newest(args.what) as file:
        state = _state(file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch: that there is no process group
        logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)
        try:
            save(state, storage_writer=FileSystemWriter(folder), no_dist=True)
        except CheckpointException as error:
            causes = [cause for cause, _ in error.failures.values() if isinstance(cause, OSError)]
            raise causes[0] if causes else OSError(describe_error(error)) from None


def _state(file: CheckpointFile) -> dict[str, Any]:
    """Return the state dict for DCP. Raises UserError for a checkpoint without an optimizer of this program."""
    values = file.values
    if not file.is_ours:
        raise UserError(f"{printable(file.path, 4096)}: it is not of a run of this program, so it cannot be converted")
    names, optimizer = _parameter_names(values), values["optimizer"]
    read: dict[str, torch.Tensor] = {}  # by storage: tied weights are one tensor
    weights = {name: read.setdefault(stored.key, file.tensor(stored)) for name, stored in values["model"].items()}
    state: dict[str, Any] = {f"model.{name}": tensor for name, tensor in weights.items()}
    for index, entry in optimizer["state"].items():
        for key, stored in entry.items():
            state[f"optimizer.state.{names[index]}.{key}"] = file.tensor(stored)
    for number, group in enumerate(optimizer["param_groups"]):
        members = [names[index] for index in group["params"]]
        hyper = {key: tuple(value) if key == "betas" else value for key, value in group.items() if key != "params"}
        for place in (str(number), *members):
            state |= {f"optimizer.param_groups.{place}.{key}": value for key, value in hyper.items()}
        state[f"optimizer.param_groups.{number}.params"] = members
    return state


def _parameter_names(values: Mapping[str, Any]) -> dict[int, str]:
    """Return the name of each parameter by its number in the optimizer; for a tied parameter its first name."""
    from unbroken.config import MODEL_FLAGS
    from unbroken.model import families
    from unbroken.optim import param_groups

    args = values["args"]
    model = families.build(args["model"], {name: args[name] for name in MODEL_FLAGS if name in args})
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = param_groups(model, args.get("optimizer", "adamw"))
    return dict(enumerate(name_of[id(parameter)] for group in groups for parameter in group.parameters))


def is_dcp(folder: Path) -> bool:
    """Return whether a folder is one of torch.distributed.checkpoint."""
    return (folder / ".metadata").is_file()


def read(args: argparse.Namespace) -> int:
    """Write the checkpoint --like with the weights, the moments and the step of a folder."""
    from unbroken.checkpoint.dcp_reader import DcpFolder

    folder = DcpFolder(args.folder)
    if args.like is None:
        raise UserError(
            f"{printable(args.folder, 4096)}: it does not say what run it belongs to; type --like RUN, the run or the"
            " checkpoint that it was exported from"
        )
    with locate.open_newest(args.like) as file:
        if not file.is_ours:
            raise UserError(f"--like {printable(file.path, 4096)}: it is not of a run of this program")
        tree, said = _merge(folder, file)
    atomic_output.write_whole(args.file, lambda path: atomic_output.save_tree(tree, path))
    command = as_typed(f"python train_gpt2_mod.py --resume_from {shlex.quote(str(args.file))}")
    console.print_line(f"{args.file}: {said}; continue with {command}")
    return 0


def _merge(folder: DcpFolder, file: CheckpointFile) -> tuple[dict[str, Any], str]:
    """Return the checkpoint `file` with the weights and moments of the folder, and a line about its step."""
    values = file.values
    names, tied = _parameter_names(values), dict[str, list[str]]()
    for name, stored in values["model"].items():
        tied.setdefault(stored.key, []).append(name)
    weights: dict[str, torch.Tensor] = {}
    for same in tied.values():
        tensor = _read(folder, [prefix + name for prefix in ("model.", "") for name in same], values["model"][same[0]])
        weights |= dict.fromkeys(same, tensor)
    state: dict[int, dict[str, Any]] = {}
    for index, entry in values["optimizer"]["state"].items():
        same = next(same for same in tied.values() if names[index] in same)
        state[index] = {
            key: _read(folder, [f"optimizer.state.{name}.{key}" for name in same], stored)
            for key, stored in entry.items()
        }
    step = _common_step(folder, state, values["step"])
    progress, said = _advanced(values, step)
    optimizer = {"state": state, "param_groups": values["optimizer"]["param_groups"]}
    model = {name: weights[name] for name in values["model"]}
    return {**values, "model": model, "optimizer": optimizer, "step": step, "progress": progress}, said


def _read(folder: DcpFolder, names: list[str], like: Any) -> torch.Tensor:
    found = folder.find(*names)
    if found is None:
        raise UserError(f"{printable(folder.folder, 4096)}: it has no {names[0]}; another model or optimizer made it")
    return folder.read(found, names[0], like.shape)


def _common_step(folder: DcpFolder, state: dict[int, dict[str, Any]], known: int) -> int:
    """Return the number of updates that the optimizer counted, equal for all parameters; `known` if it counts none."""
    steps = {float(entry["step"]) for entry in state.values() if "step" in entry} or {float(known)}
    step = min(steps)
    if len(steps) > 1 or step != int(step) or not 0 <= step <= MAX_STEP:
        raise UserError(
            f"{printable(folder.folder, 4096)}: its optimizer counts {printable(sorted(steps))} steps, not one"
        )
    return int(step)


def _advanced(values: dict[str, Any], step: int) -> tuple[dict[str, Any], str]:
    """Return the progress at `step`, as if the steps between had read the run's data in order, and a line about it."""
    progress, args = dict(values["progress"]), values["args"]
    more = step - values["step"]
    if more == 0:
        return progress, f"step {step}"
    tokens = args["batch_size"] * args["sequence_length"] * args["grad_accumulation_steps"]
    position = progress["tokens"] + more * tokens
    if position < 0:
        raise UserError(f"step {step} lies before the beginning of the data; type an earlier checkpoint as --like")
    # The hash of the next batch is of the old position, and no loss of these steps is known.
    progress |= {"step": step, "tokens": position, "next_batch": {}, "validated": -1}
    return progress, f"step {step}, {more:+} from --like, as if these steps had read its data: at token {position:,}"
