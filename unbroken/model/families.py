"""The table of model families, and models in files of the user. Importing this module does not import torch.

A new family is a file beside this one and a line in FAMILIES; README.md says what the file must hold. A model in any
other file is called FILE.py:SIZE. Its code is run only if the user types the file, as --model or in a --config, and
never because a checkpoint names it: only `declare` stores where the file is.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
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
    Family(("d2", "d4", "d6", "d8", "d12", "d24", "d36", "d48", "tiny"), "gpt:GPT", "arcee:Arcee"),
    Family(("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "gpt2-tiny"), "gpt2:GPT2", "gpt2lmhead:GPT2LMHead"),
)
IN_FILE = re.compile(r"(.*/)?([\w.-]+\.py:[\w.-]+)")  # FILE.py:SIZE


class Names(tuple[str, ...]):
    """A tuple of the names of models, which also contains any FILE.py:SIZE."""

    also = "FILE.py:SIZE for a model of your own"

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or (isinstance(name, str) and bool(IN_FILE.fullmatch(name)))


NAMES = Names(name for family in FAMILIES for name in family.names)
_declared: dict[str, Path] = {}  # the file of each model FILE.py:SIZE that the user has typed, by its short name


def short_name(name: str) -> str:
    """Return the name of a model without the folder of its file: checkpoints have this one."""
    found = IN_FILE.fullmatch(name)
    return found[2] if found else name


def declare(name: str) -> str:
    """Remember the file of a model that the user typed as FILE.py:SIZE. Return the model's short name."""
    short = short_name(name)
    if IN_FILE.fullmatch(name):
        _declared[short] = Path(name.rpartition(":")[0]).absolute()
    return short


def long_name(name: str) -> str:
    """Return the name by which another process, in any folder, finds the model."""
    return f"{_file_of(name)}:{name.rpartition(':')[2]}" if IN_FILE.fullmatch(name) else name


def model_class(name: str) -> type[LanguageModel]:
    """Return the class of the model that --model calls `name`. Raises UserError if its file was not declared."""
    if not IN_FILE.fullmatch(name):
        found: type[LanguageModel] = _load(_family(name).model)
        return found
    from unbroken.model.language_model import LanguageModel

    module, size = _import(_file_of(name)), name.rpartition(":")[2]
    families = [each for each in _classes_in(module) if issubclass(each, LanguageModel)]
    fitting = [each for each in families if size in getattr(each, "sizes", {})]
    if not fitting:
        sizes = ", ".join(size for each in families for size in getattr(each, "sizes", {})) or "none"
        raise UserError(f"--model {name}: its file has no LanguageModel of this size; the sizes are: {sizes}")
    lacks = ", ".join(sorted(fitting[0].__abstractmethods__))
    if lacks:
        raise UserError(f"--model {name}: its class has no {lacks}; docs/your-own-model.md says what is needed")
    return fitting[0]


def source_of(module: str) -> str:
    """Return the name that a checkpoint has for the source file of a module of models; "" for any other module."""
    if module.startswith("unbroken.model."):
        return f"model/{module.rpartition('.')[2]}.py"
    return next((path.name for path in _declared.values() if _module_name(path) == module), "")


def declared_sources() -> dict[str, str]:
    """Return the text of each user's file that was declared, by the name of the file."""
    return {path.name: path.read_text("utf-8") for path in _declared.values()}


def config_of(name: str, flags: Mapping[str, Any] | None = None) -> ModelConfig:
    """Return the sizes of the model that --model calls `name`, with the values of `flags` that the family has."""
    sizes = model_class(name).sizes[name.rpartition(":")[2]]
    return replace(sizes, **{flag: value for flag, value in (flags or {}).items() if hasattr(sizes, flag)})


def require_flag(name: str, flag: str, value: object) -> None:
    """Raise UserError if the family of the model called `name` has no such setting."""
    if not hasattr(config_of(name), flag):
        having = next((other for other in NAMES if hasattr(config_of(other), flag)), "")
        raise UserError(f"--{flag} {value}: {name} has no such setting; leave it out, or type --model {having}")


def huggingface_format(name: str) -> HuggingFaceFormat | None:
    """Return how Hugging Face stores the model called `name`; None if it cannot.

    For a model in a user's file it is the HuggingFaceFormat in that file, else that of the family from which the model
    is derived.
    """
    if not IN_FILE.fullmatch(name):
        reference = _family(name).huggingface
        return _load(reference)() if reference else None
    from unbroken.model.huggingface import HuggingFaceFormat

    model = model_class(name)
    own = [each for each in _classes_in(_import(_file_of(name))) if issubclass(each, HuggingFaceFormat)]
    inherited = [
        _load(each.huggingface) for each in FAMILIES if each.huggingface and issubclass(model, _load(each.model))
    ]
    return next((each() for each in (*own, *inherited)), None)


def build(name: str, flags: Mapping[str, Any] | None = None) -> LanguageModel:
    """Return the model called `name` on the meta device: its weights have shapes but no memory and no values."""
    return model_class(name).build_on_meta(config_of(name, flags))


def identify(shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, dict[str, Any]]:
    """Return the name and the flags of the model that has weights of these names and shapes; ("", {}) for none.

    Weights may be missing, because tied ones are often stored once, but every weight given must be one of the model.
    """
    found, fewest_missing, widths = ("", dict[str, Any]()), 0, {width for shape in shapes.values() for width in shape}
    for name in (*_declared, *NAMES):
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
    for name in (*_declared, *NAMES):
        stored = huggingface_format(name)
        if stored and stored.describes(config_json, name, config_of(name)):
            return name, stored
    raise UserError(f"its config.json describes none of the models {', '.join(NAMES)}")


def _family(name: str) -> Family:
    return next(family for family in FAMILIES if name in family.names)


def _file_of(name: str) -> Path:
    """Return the file of a model. Raises UserError if only a checkpoint names it and the user has not typed it."""
    if name not in _declared:
        short = short_name(name)
        raise UserError(f"model {short}: its code is run only if you name the file: type --model FOLDER/{short}")
    return _declared[name]


def _module_name(path: Path) -> str:
    return f"model_in_{path.stem}"


@cache
def _import(path: Path) -> ModuleType:
    """Run the user's file. Raises UserError with the error of its code."""
    spec = importlib.util.spec_from_file_location(_module_name(path), path)
    if spec is None or spec.loader is None or not path.is_file():
        raise UserError(f"--model {path}: there is no such file")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"--model {path}: the file cannot be imported: {said}") from None
    return module


def _classes_in(module: ModuleType) -> list[type[Any]]:
    """Return the classes that a module defines itself."""
    return [each for each in vars(module).values() if isinstance(each, type) and each.__module__ == module.__name__]


def _load(reference: str) -> Any:
    module, _, attribute = reference.partition(":")
    return getattr(import_module(f"unbroken.model.{module}"), attribute)
