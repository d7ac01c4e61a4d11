"""The run that a command began: the flags that decide what is trained, and the differences between two commands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unbroken.config import AUTO, FIELDS, TRAINED, display_value
from unbroken.data import prepare, sources
from unbroken.data.mixture import open_tokens
from unbroken.data.stream import compare_identity
from unbroken.errors import UserError
from unbroken.model.families import short_name
from unbroken.paths import named_folder
from unbroken.text import printable

STEP_SIZES = ("batch_size", "grad_accumulation_steps", "total_batch_size")  # only their product, the tokens, counts


@dataclass(frozen=True)
class Experiment:
    """A description of what a run trains, from one of its checkpoints. Untrusted.

    `begun`: the flags of the command that began it, or those of the checkpoint if that does not hold them. `input_bin`:
    the glob that --input_bin became. `data`: the identity of the shards. `forked`: whether --fork began it. `name`: its
    present name.
    """

    begun: Mapping[str, Any]
    input_bin: str = ""
    data: Mapping[str, Any] | None = None
    forked: bool = False
    name: str = ""


def begun_with(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flags that tell experiments apart, each with the value that a new run with `flags` would have."""
    found = {name: flags.get(name, FIELDS[name].default) for name in (*TRAINED, "name")}
    return found | {"model": short_name(str(found["model"]))}


def differences(typed: Mapping[str, Any], run: Experiment) -> list[str]:
    """Return a text for each flag by which a new run with the typed flags would be another experiment than `run`."""
    here, there = begun_with(typed), begun_with(run.begun)
    plain = [name for name in TRAINED if name not in (*STEP_SIZES, "input_bin", "init_from", "window_tokens")]
    names = [name for name in plain if here[name] != there[name]]
    if here["init_from"]:
        names = [name for name in names if name in typed or name not in ("model", "bias")]  # those of the weights
    if not same_weights(str(here["init_from"]), str(there["init_from"])):
        names.append("init_from")
    found = [f"{name} {_shown(name, there[name])} there, {_shown(name, here[name])} here" for name in names]
    several = "=" in here["input_bin"]
    if (
        (several or here["shuffle"] != "off")
        and here["shuffle"] == there["shuffle"]
        and _window(here) != _window(there)
    ):
        found.append(f"tokens of a window {_window(there)} there, {_window(here)} here")
    if _step_tokens(here) != _step_tokens(there):
        found.append(f"tokens of a step {_step_tokens(there)} there, {_step_tokens(here)} here")
    name = run.name if here["name"] else there["name"]  # the command that began a run may have named it later
    if name != here["name"]:
        found.append(f"name {_shown('name', name)} there, {_shown('name', here['name'])} here")
    if run.forked:
        found.append("it is a fork")
    before, now = str(run.input_bin or there["input_bin"]), here["input_bin"] or prepare.default_pattern()
    alike = now in (there["input_bin"], before) or (not here["input_bin"] and not there["input_bin"])
    weights = _weights(now)
    other_weights = weights not in (_weights(str(there["input_bin"])), _weights(before))
    if not alike and (found or other_weights or not _same_shards(before, now, run.data)):
        found.append(f"input_bin {printable(before)} there, {printable(now)} here")
    return found


def _shown(name: str, value: Any) -> str:
    return printable(display_value(name, value)) if value != "" else "none"


def _window(flags: Mapping[str, Any]) -> Any:
    return flags["window_tokens"] or flags["sequence_length"]


def _step_tokens(flags: Mapping[str, Any]) -> Any:
    """Return the tokens of a step; None where the values make no sense."""
    sizes = [flags[name] for name in (*STEP_SIZES, "sequence_length")]
    if any(type(size) is not int for size in sizes):
        return None
    batch_size, accumulation, total, length = sizes
    return total or (None if batch_size == AUTO else batch_size * accumulation * length)


def same_weights(one: str, other: str) -> bool:
    """Return whether two values of --init_from mean the same: a run or its folder stands for a checkpoint in it."""
    one, other = (str(named_folder(text) or text) for text in (one, other))
    return one == other or any(a and b and Path(a).parent.name == Path(b).name for a, b in ((one, other), (other, one)))


def _weights(input_bin: str) -> Any:
    """Return the shares of all sources with the positions from which they hold; None for a single glob."""
    try:
        mix = sources.parse(input_bin)
    except UserError:  # of a checkpoint; a typed one is refused by another check
        return "none"
    return mix and [(phase.begins, phase.shares) for phase in mix.phases]


def _names(input_bin: str) -> list[str]:
    mix = sources.parse(input_bin)
    return [Path(glob).name for glob in (mix.globs if mix else [input_bin])]


def _same_shards(before: str, now: str, data: Mapping[str, Any] | None) -> bool:
    """Return whether a glob matches the shards of a run, which another machine may have in another folder.

    Without their identity only the names are compared; a resume compares the contents.
    """
    try:
        if data is None:
            return _names(before) == _names(now)
        return not compare_identity(data, open_tokens(now, window=1).identity())
    except UserError:  # there are none: another check says so
        return False
