"""Read checkpoints of other programs: of the one that the guide was written for, and bare weights.

That program counted `step` from 0 in `model_step*.pt`, trained in bf16, saved its compiled model's names, and did not
say where in the data it was. What is missing is worked out here, and said.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from unbroken.checkpoint.format.stored_tensor import StoredTensor
from unbroken.checkpoint.reader import CheckpointFile
from unbroken.config import FIELDS, merge
from unbroken.errors import UserError
from unbroken.model import families
from unbroken.text import printable

PREFIXES = ("_orig_mod.", "module.")


def clean_name(name: str) -> str:
    """Return a state-dict name without the prefixes of torch.compile and DDP."""
    stripped = True
    while stripped:
        stripped = False
        for prefix in PREFIXES:
            if name.startswith(prefix):
                name, stripped = name[len(prefix) :], True
    return name


def weight_names(values: dict[str, Any], path: str) -> dict[str, str]:
    """Return the file's own name of each tensor of the model, by its clean name."""
    model = values.get("model")
    if not isinstance(model, dict) or not model:
        raise UserError(f"{path}: it has no `model` with weights in it, so it is no checkpoint of this program")
    return {clean_name(str(name)): name for name, leaf in model.items() if isinstance(leaf, StoredTensor)}


def identify_model(values: dict[str, Any], path: str) -> str:
    """Return the name of the model that has weights of these names and shapes; raise UserError if there is none."""
    shapes = {name: tuple(values["model"][own].shape) for name, own in weight_names(values, path).items()}
    found = families.identify(shapes)
    if not found:
        raise UserError(f"{path}: its weights fit none of the models {', '.join(families.NAMES)}")
    return found


@dataclass(frozen=True)
class LegacyCheckpoint:
    """The step, flags and data position of a foreign checkpoint, and a line about the assumptions."""

    step: int
    args: dict[str, Any]
    position: int
    assumed: str


def read_legacy(file: CheckpointFile) -> LegacyCheckpoint:
    """Return the state of the run in a checkpoint of the earlier program. Raises UserError."""
    values, path = file.values, str(file.path)
    weight_names(values, path)
    if "optimizer" not in values:
        raise UserError(
            f"{path}: it was made before checkpoints held the optimizer, so it cannot be resumed;"
            f" start a new run from its weights with --init_from {path}"
        )
    step = count_updates(file)
    given = values.get("args")
    args = {
        name: value
        for name, value in (given if isinstance(given, dict) else {}).items()
        if name in FIELDS and type(value) is type(FIELDS[name].default)
    }
    args["model"] = identify_model(values, path)
    step_tokens = merge({}, args).step_tokens
    assumed = (
        f"{path} is a checkpoint of the earlier program: after {step} updates by its optimizer's own count;"
        f" data position assumed {step} x {step_tokens:,} = {step * step_tokens:,} tokens (it was made on one process)"
    )
    return LegacyCheckpoint(step, args, step * step_tokens, assumed)


def count_updates(file: CheckpointFile) -> int:
    """Return the number of updates from the optimizer's own counter; the file's `step` counts from 0."""
    optimizer = file.values["optimizer"]
    state = optimizer.get("state") if isinstance(optimizer, dict) else None
    counters = (
        [entry.get("step") for entry in state.values() if isinstance(entry, dict)] if isinstance(state, dict) else []
    )
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
