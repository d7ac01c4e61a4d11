"""The names of checkpoint files, and the tree inside them, which is checked before writing and after reading."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from unbroken.errors import UserError
from unbroken.paths import is_run_id
from unbroken.text import printable

FORMAT = 1

FINAL = "final.pt"
BEST = "best.pt"  # a link to the checkpoint of the lowest validation loss
_STEP_NAME = re.compile(r"model_step(\d{6,18})\.pt", re.ASCII)
_WEIGHTS_NAME = re.compile(r"weights_step(\d{6,18})\.pt", re.ASCII)
_DEBRIS_NAME = re.compile(r"\.(?:(?:model|weights)_step\d{6,18}|final|spare)\.pt\.tmp", re.ASCII)

# The top level of a checkpoint, name -> type; `_check_tensors` checks `model` and `optimizer` further.
KEYS: dict[str, type] = {
    "model": dict,
    "optimizer": dict,
    "step": int,
    "code": str,
    "args": dict,
    "run_id": str,
    "format": int,
    "progress": dict,
    "data": dict,
    "rng": dict,
    "environment": dict,
    "sources": dict,
}

_PLAIN = (type(None), bool, int, float, str, bytes)
_MAX_DEPTH = 32
MAX_COUNT = 10**18  # no count of a run reaches it


def checkpoint_name(step: int) -> str:
    """Return the file name of the state after `step` updates."""
    return f"model_step{step:06d}.pt"


def checkpoint_step(name: str) -> int | None:
    """Return the step in a periodic checkpoint's file name; None for any other name."""
    match = _STEP_NAME.fullmatch(name)
    return int(match[1]) if match and checkpoint_name(int(match[1])) == name else None


def weights_name(step: int) -> str:
    """Return the file name of the weights alone after `step` updates."""
    return f"weights_step{step:06d}.pt"


def weights_step(name: str) -> int | None:
    """Return the step in the name of a file of weights; None for any other name."""
    match = _WEIGHTS_NAME.fullmatch(name)
    return int(match[1]) if match and weights_name(int(match[1])) == name else None


def is_checkpoint_name(name: str) -> bool:
    """Return whether a file of this name is a checkpoint."""
    return name == FINAL or checkpoint_step(name) is not None


def temporary_name(name: str) -> str:
    """Return the name of a checkpoint while it is being written, which no reader takes for a checkpoint."""
    return f".{name}.tmp"


SPARE = temporary_name("spare.pt")  # the blocks of a checkpoint that was given up, for the next one


def is_debris(name: str) -> bool:
    """Return whether a file of this name is one that a writer leaves only if it is killed."""
    return _DEBRIS_NAME.fullmatch(name) is not None


def dict_at(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return the dict under a key of an untrusted file's values; empty if there is none."""
    found = values.get(key)
    return found if isinstance(found, dict) else {}


def walk(tree: object, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], object]]:
    """Yield every leaf of a tree of dicts, lists and tuples with its path, in the order of the tree."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from walk(value, (*path, key))
    elif isinstance(tree, (list, tuple)):
        for index, value in enumerate(tree):
            yield from walk(value, (*path, index))
    else:
        yield path, tree


def dotted_path(path: tuple[str | int, ...]) -> str:
    """Return a leaf's place in the tree for messages, as in optimizer.state.0.exp_avg."""
    return printable(".".join(str(part) for part in path))


def check_tree(tree: object, is_tensor: Callable[[object], bool]) -> None:
    """Raise UserError, which names the key, unless `tree` is a checkpoint of format 1."""
    if not isinstance(tree, dict):
        raise UserError(f"it holds a {type(tree).__name__}, not a dict of what belongs to a run")
    _check_format(tree)
    for key, kind in KEYS.items():
        if key not in tree:
            raise UserError(f"`{key}` is missing")
        if type(tree[key]) is not kind:
            raise UserError(f"`{key}` is a {printable(type(tree[key]).__name__)}, not a {kind.__name__}")
    for key in tree:
        if key not in KEYS:
            raise UserError(f"`{printable(key)}` does not belong in a checkpoint of format {FORMAT}")
    if not 0 <= tree["step"] < MAX_COUNT:
        raise UserError(f"`step` is {tree['step']}")
    if not is_run_id(tree["run_id"]):
        raise UserError(f"`run_id` is {printable(tree['run_id'])!r}, not a uuid4")
    for name, text in tree["sources"].items():
        if type(name) is not str or type(text) is not str:
            raise UserError(f"`sources.{printable(name)}` is not text")
    _check_tensors(tree, is_tensor)
    for key in KEYS.keys() - {"model", "optimizer"}:
        _check_plain(tree[key], (key,), is_tensor=None)


def _check_format(tree: dict[Any, Any]) -> None:
    version = tree.get("format")
    if type(version) is int and version > FORMAT:
        raise UserError(f"its format is {version}, this program knows up to {FORMAT}; use a newer version of it")
    if type(version) is not int or version < 1:
        raise UserError(f"`format` is {printable(version)}, not {FORMAT}")


def _check_tensors(tree: dict[str, Any], is_tensor: Callable[[object], bool]) -> None:
    for name, leaf in tree["model"].items():
        if type(name) is not str or not is_tensor(leaf):
            raise UserError(
                f"`model.{printable(name)}` is a {printable(type(leaf).__name__)}, not a tensor with a name"
            )
    optimizer = tree["optimizer"]
    if set(optimizer) != {"state", "param_groups"}:
        raise UserError("`optimizer` does not consist of `state` and `param_groups`")
    state, groups = optimizer["state"], optimizer["param_groups"]
    if type(state) is not dict or type(groups) is not list:
        raise UserError("`optimizer.state` is not a dict or `optimizer.param_groups` not a list")
    for index, entry in state.items():
        if type(index) is not int or type(entry) is not dict:
            raise UserError(f"`optimizer.state.{printable(index)}` is not the state of a numbered parameter")
    for index, group in enumerate(groups):
        if type(group) is not dict:
            raise UserError(f"`optimizer.param_groups.{index}` is not a dict")
    _check_plain(optimizer, ("optimizer",), is_tensor)


def _check_plain(
    value: object, path: tuple[str | int, ...], is_tensor: Callable[[object], bool] | None, depth: int = 0
) -> None:
    """Raise UserError unless the types are exactly plain: a numpy number needs numpy, a subclass has its own code."""
    if depth > _MAX_DEPTH:
        raise UserError(f"`{dotted_path(path)}` is nested more than {_MAX_DEPTH} deep")
    kind = type(value)
    if kind is dict:
        assert isinstance(value, dict)
        for key, item in value.items():
            if type(key) not in (str, int):
                raise UserError(
                    f"`{dotted_path(path)}` has a key that is a {printable(type(key).__name__)}, not a name or a number"
                )
            _check_plain(item, (*path, key), is_tensor, depth + 1)
    elif kind in (list, tuple):
        assert isinstance(value, (list, tuple))
        for index, item in enumerate(value):
            _check_plain(item, (*path, index), is_tensor, depth + 1)
    elif kind not in _PLAIN and not (is_tensor is not None and is_tensor(value)):
        raise UserError(
            f"`{dotted_path(path)}` is a {printable(f'{kind.__module__}.{kind.__name__}')}, not a plain value"
        )
