"""The table of model families: every value of --model and the class that builds it. Importing it does not import torch.

A new family is a file beside this one and a line in FAMILIES; README.md says what the file must hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

from unbroken.errors import UserError

if TYPE_CHECKING:
    from unbroken.model.huggingface import HuggingFaceFormat
    from unbroken.model.language_model import LanguageModel, ModelConfig


@dataclass(frozen=True)
class Family:
    """A kind of model in several sizes.

    Args:
        names: Its sizes as --model takes them, the keys of the class's `sizes`.
        model: `module:class` in this package, a LanguageModel.
        huggingface: `module:class` in this package, a HuggingFaceFormat; "" if the family cannot be exported.
    """

    names: tuple[str, ...]
    model: str
    huggingface: str = ""


FAMILIES = (
    Family(("d2", "d4", "d6", "d8", "d12", "d24", "d36", "d48"), "gpt:GPT", "arcee:Arcee"),
    Family(("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "gpt2-tiny"), "gpt2:GPT2", "gpt2lmhead:GPT2LMHead"),
)
NAMES = tuple(name for family in FAMILIES for name in family.names)


def model_class(name: str) -> type[LanguageModel]:
    """Return the class of the model that --model calls `name`."""
    found: type[LanguageModel] = _load(_family(name).model)
    return found


def config_of(name: str, flags: Mapping[str, Any] | None = None) -> ModelConfig:
    """Return the sizes of the model that --model calls `name`, with the values of `flags` that the family has."""
    sizes = model_class(name).sizes[name]
    return replace(sizes, **{flag: value for flag, value in (flags or {}).items() if hasattr(sizes, flag)})


def require_flag(name: str, flag: str, value: object) -> None:
    """Raise UserError if the family of the model called `name` has no such setting."""
    if not hasattr(config_of(name), flag):
        having = next((other for other in NAMES if hasattr(config_of(other), flag)), "")
        raise UserError(f"--{flag} {value}: {name} has no such setting; leave it out, or type --model {having}")


def huggingface_format(name: str) -> HuggingFaceFormat | None:
    """Return how Hugging Face stores the model called `name`; None if it cannot."""
    reference = _family(name).huggingface
    return _load(reference)() if reference else None


def build(name: str, flags: Mapping[str, Any] | None = None) -> LanguageModel:
    """Return the model called `name` on the meta device: its weights have shapes but no memory and no values."""
    return model_class(name).build_on_meta(config_of(name, flags))


def identify(shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, dict[str, Any]]:
    """Return the name of the model that has weights of these names and shapes, and flags; ("", {}) if there is none.

    Weights may be missing, since tied ones are often stored once, but each that is there must have its place.
    """
    found, fewest_missing, widths = ("", dict[str, Any]()), 0, {width for shape in shapes.values() for width in shape}
    for name in NAMES:
        if config_of(name).n_embd not in widths:
            continue
        for flags in model_class(name).variants:
            model = build(name, flags)
            expected = {key: tuple(weight.shape) for key, weight in model.state_dict().items()}
            weights = {key: shape for key, shape in shapes.items() if not key.endswith(model.computed_buffers)}
            missing = len(expected) - len(weights)
            if weights.items() <= expected.items() and weights and (not found[0] or missing < fewest_missing):
                found, fewest_missing = (name, dict(flags)), missing
    return found


def identify_config(config_json: Mapping[str, Any]) -> tuple[str, HuggingFaceFormat]:
    """Return the model that an untrusted `config.json` of transformers describes, and its format.

    Raises UserError if there is none.
    """
    for name in NAMES:
        stored = huggingface_format(name)
        if stored and stored.describes(config_json, name, config_of(name)):
            return name, stored
    raise UserError(f"its config.json describes none of the models {', '.join(NAMES)}")


def _family(name: str) -> Family:
    return next(family for family in FAMILIES if name in family.names)


def _load(reference: str) -> Any:
    module, _, attribute = reference.partition(":")
    return getattr(import_module(f"unbroken.model.{module}"), attribute)
