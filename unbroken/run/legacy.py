"""Read checkpoints of other programs (the guide's, nanoGPT's, bare weights), and write those of the guide's.

The guide's program counted `step` from 0 in `model_step*.pt`, trained in bf16, and saved
its compiled model's names. It did not save its position in the data or its number of processes. This module computes
what is missing, and a line says what was assumed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import torch

from unbroken.checkpoint.format import foreign
from unbroken.checkpoint.format.schema import dict_at
from unbroken.checkpoint.format.stored_tensor import StoredTensor
from unbroken.checkpoint.reader import CheckpointFile
from unbroken.config import ATTEMPT_ONLY, FIELDS, merge
from unbroken.data.stream import Stream
from unbroken.errors import UserError
from unbroken.model import families
from unbroken.text import format_count, printable

# nanoGPT pads its vocabulary with rows that no token has, and stores its settings under these names.
PADDED_VOCABULARY, VOCABULARY = 50304, 50257
NANOGPT_FLAGS = {
    **{"batch_size": "batch_size", "gradient_accumulation_steps": "grad_accumulation_steps"},
    **{"block_size": "sequence_length", "max_iters": "num_iterations", "warmup_iters": "warmup_iters"},
    **{name: name for name in ("learning_rate", "weight_decay", "grad_clip", "dropout")},
}

COMPILED = "_orig_mod."  # what torch.compile puts before the names of a model's weights
_PREFIXES = re.compile(r"(_orig_mod\.|module\.)*")  # of torch.compile and DDP
ATTENTION, ROTARY = "attn.c_proj.weight", "rotary.inv_freq"
ROTARY_BASE = 10000  # of the earlier program's models


def clean_name(name: str) -> str:
    """Return a state-dict name without the prefixes of torch.compile and DDP."""
    return _PREFIXES.sub("", name, count=1)


def weight_names(values: dict[str, Any], path: str) -> dict[str, str]:
    """Return the file's own name of each tensor of the model, by its clean name."""
    model = values.get("model")
    if not isinstance(model, dict) or not model:
        known = foreign.describe_values(values) or "it has no `model` with weights in it"
        raise UserError(f"{path}: {known}")
    return {clean_name(str(name)): name for name, leaf in model.items() if isinstance(leaf, StoredTensor)}


def identify_model(values: dict[str, Any], path: str) -> tuple[str, dict[str, Any]]:
    """Return the model that has weights of these names and shapes, and its flags. Raises UserError if there is none.

    The rows with which nanoGPT pads its vocabulary are cut off in `values`.
    """
    named = dict_at(values, "args").get("model")
    if isinstance(named, str) and named in families.NAMES:
        families.model_class(named)  # one in a file of the user's must be typed
    if is_nanogpt(values):
        _leave_out_padding(values)
    shapes = {name: tuple(values["model"][own].shape) for name, own in weight_names(values, path).items()}
    found, model_flags = families.identify(shapes)
    if not found:
        known = foreign.describe_values(values) or f"its weights fit none of the models {', '.join(families.NAMES)}"
        raise UserError(f"{path}: {known}")
    heads = dict_at(values, "model_args").get("n_head", families.config_of(found).n_head)
    if heads != families.config_of(found).n_head:
        raise UserError(f"{path}: {foreign.describe_values(values)}")
    mismatch = foreign.describe_mismatch(values, found)
    if mismatch:
        raise UserError(f"{path}: {mismatch}")
    return found, model_flags


def is_nanogpt(values: dict[str, Any]) -> bool:
    """Return whether a file is a `ckpt.pt` of nanoGPT."""
    return "model_args" in values and "iter_num" in values


def _leave_out_padding(values: dict[str, Any]) -> None:
    """Cut the padding rows off the embedding, the head, and their moments."""
    state = dict_at(dict_at(values, "optimizer"), "state")
    for tree in (dict_at(values, "model"), *(entry for entry in state.values() if isinstance(entry, dict))):
        for name, leaf in tree.items():
            if isinstance(leaf, StoredTensor) and len(leaf.shape) == 2 and leaf.shape[0] == PADDED_VOCABULARY:
                tree[name] = replace(leaf, shape=(VOCABULARY, leaf.shape[1]))


@dataclass(frozen=True)
class LegacyCheckpoint:
    """The step and the flags of a checkpoint of another program at `path`, made by `processes` processes.

    `nanogpt`: whether nanoGPT made it, whose data had no order. `best_loss`: the best validation loss in it, in nats;
    None for a checkpoint of the earlier program.
    """

    path: str
    step: int
    args: dict[str, Any]
    processes: int
    nanogpt: bool = False
    best_loss: float | None = None


def read_legacy(file: CheckpointFile, processes: int) -> LegacyCheckpoint:
    """Return the state of the run in a checkpoint of the earlier program. Raises UserError.

    The earlier program saved the accumulation divided by its number of processes.
    """
    values, path = file.values, str(file.path)
    model, model_flags = identify_model(values, path)
    if "optimizer" not in values:
        raise UserError(
            f"{path}: it was made before checkpoints held the optimizer, so it cannot be resumed;"
            f" start a new run from its weights with --init_from {path}"
        )
    step = count_updates(file)
    if is_nanogpt(values):
        args = {"model": model, **model_flags, **_nanogpt_flags(values)}
        return LegacyCheckpoint(path, step, args, 1, nanogpt=True, best_loss=_best_loss(file))
    args = {
        name: value
        for name, value in dict_at(values, "args").items()
        if name in FIELDS and type(value) is type(FIELDS[name].default)
    }
    args |= {"model": model, **model_flags}
    args["grad_accumulation_steps"] = merge({}, args).grad_accumulation_steps * processes
    return LegacyCheckpoint(path, step, args, processes)


def _nanogpt_flags(values: dict[str, Any]) -> dict[str, Any]:
    """Return our flags for the settings in a checkpoint of nanoGPT, as far as they have the right type."""
    settings = dict_at(values, "config") | dict_at(values, "model_args")
    flags = {ours: settings[name] for name, ours in NANOGPT_FLAGS.items() if name in settings}
    return {name: value for name, value in flags.items() if type(value) is type(FIELDS[name].default)}


def _best_loss(file: CheckpointFile) -> float | None:
    """Return the best validation loss in a checkpoint of nanoGPT; None if it has validated nothing."""
    best = file.values.get("best_val_loss")
    best = file.tensor(best).item() if isinstance(best, StoredTensor) and best.shape == () else best
    return best if isinstance(best, float) and 0 <= best < 1e9 else None  # which it begins with


def data_position(found: LegacyCheckpoint, stream: Stream) -> tuple[int, str]:
    """Return the place in the data after the steps of `found`, and a line about what was assumed.

    nanoGPT drew random windows: from here on the stream is read in order, from the position after as many tokens.

    The earlier program read batches of all processes from each shard, and dropped the rest of the shard, which was too
    short for another batch.
    """
    config = merge({}, found.args)
    if found.nanogpt:
        position = found.step * config.step_tokens
        best = "" if found.best_loss is None else f", best validation loss {found.best_loss:.4f}"
        return position, (
            f"{found.path} is a checkpoint of nanoGPT at iteration {found.step}{best}: its data order was random and"
            " its learning rate a cosine; from here on the data come in the order of the shards, from token"
            f" {position:,}, and the learning rate follows --learning_rate, --warmup_iters and --warmdown_iters"
        )
    batch = config.batch_size * config.sequence_length * found.processes
    batches = found.step * config.grad_accumulation_steps // found.processes
    of_shards = [max(1, (shard.count - 1) // batch) for shard in stream.shards]
    epochs, rest = divmod(batches, sum(of_shards))
    index = 0
    while rest >= of_shards[index]:
        rest, index = rest - of_shards[index], index + 1
    position = epochs * stream.num_tokens + stream.starts[index] + rest * batch
    processes = format_count(found.processes, "process")
    return position, (
        f"{found.path} is a checkpoint of the earlier program: after {found.step} updates by its optimizer's own count,"
        f" on {processes} (--resume_processes); its next batch begins at token {position:,}"
    )


def count_updates(file: CheckpointFile) -> int:
    """Return the number of updates from the optimizer's own counter; the file's `step` counts from 0."""
    state = dict_at(dict_at(file.values, "optimizer"), "state")
    counters = [entry.get("step") for entry in state.values() if isinstance(entry, dict)]
    if not counters:
        raise UserError(f"{file.path}: its optimizer has no state to resume; start from its weights with --init_from")
    counter = counters[0]
    step = file.tensor(counter).item() if isinstance(counter, StoredTensor) and counter.shape == () else counter
    if not isinstance(step, (int, float)) or not 0 <= step < 10**15 or step != int(step):
        raise UserError(f"{file.path}: its optimizer's step counter is {printable(step)}, not a count")
    return int(step)


def rename_to_file(tree: dict[str, Any], file: CheckpointFile) -> dict[str, Any]:
    """Return our state tree under the names in the file, so that the reader can match both. Raises UserError."""
    names = weight_names(file.values, str(file.path))
    present = {id(leaf) for name, leaf in tree["model"].items() if name in names}  # of tied weights one is enough
    missing = [name for name, leaf in tree["model"].items() if id(leaf) not in present]
    if missing:
        raise UserError(f"{file.path}: the weight {missing[0]} is missing, so it cannot be loaded")
    renamed = {"model": {names[name]: leaf for name, leaf in tree["model"].items() if name in names}}
    if "optimizer" in tree:
        kept = ("exp_avg", "exp_avg_sq")
        states = tree["optimizer"]["state"].items()
        renamed["optimizer"] = {
            "state": {i: {key: leaf for key, leaf in entry.items() if key in kept} for i, entry in states}
        }
    return renamed


def to_legacy(file: CheckpointFile) -> dict[str, Any]:
    """Return a checkpoint of this program as the earlier one writes it, for its strict loader. Raises UserError.

    It has the compiled model's names, the rotary frequencies of each layer beside the weights, and a `step` counted
    from 0. It does not have the position in the data.
    """
    values, path, saved = file.values, printable(file.path, 4096), file.values.get("args")
    if not file.is_ours or not isinstance(saved, dict):
        raise UserError(f"{path}: it is not of a run of this program, so it cannot be converted")
    if saved.get("optimizer", "adamw") != "adamw":
        raise UserError(f"{path}: it is of --optimizer {saved['optimizer']}; the earlier program has only AdamW")
    name, _ = identify_model(values, str(file.path))
    if ROTARY not in families.model_class(name).computed_buffers:
        raise UserError(f"{path}: it is of --model {name}; the earlier program has only models such as d12")
    config = families.config_of(name)
    width = config.n_embd // config.n_head
    frequencies = 1.0 / (ROTARY_BASE ** (torch.arange(0, width, 2).float() / width))
    model: dict[str, torch.Tensor] = {}
    read: dict[str, torch.Tensor] = {}  # by storage: tied weights are one tensor
    for name, own in weight_names(values, path).items():
        stored = values["model"][own]
        if stored.key not in read:
            read[stored.key] = file.tensor(stored)
        model[COMPILED + name] = read[stored.key]
        if name.endswith(ATTENTION):
            model[COMPILED + name.removesuffix(ATTENTION) + f"attn.{ROTARY}"] = frequencies.clone()
    return {
        "model": model,
        "optimizer": _read_tensors(values["optimizer"], file),
        "step": values["step"] - 1,
        "code": values["code"],
        "args": {name: value for name, value in saved.items() if name not in ATTEMPT_ONLY} | {"resume_from": ""},
        "run_id": values["run_id"],
    }


def _read_tensors(value: Any, file: CheckpointFile) -> Any:
    """Return a value of a checkpoint with its tensors in memory."""
    if isinstance(value, StoredTensor):
        return file.tensor(value)
    if isinstance(value, dict):
        return {key: _read_tensors(item, file) for key, item in value.items()}
    return [_read_tensors(item, file) for item in value] if isinstance(value, list) else value
