"""Flags in a YAML file: `--config FILE` reads one, and every run's folder holds the one that repeats it."""

from __future__ import annotations

import difflib
from typing import Any

from unbroken.config import ATTEMPT_ONLY, AUTO, FIELDS, Config, check_value, shown
from unbroken.errors import UserError

MAX_CHARACTERS = 1 << 20


def from_file(path: str) -> dict[str, Any]:
    """The flags in a YAML file, `name: value` each, checked like typed ones."""
    import yaml

    try:
        with open(path, encoding="utf-8") as file:
            found = yaml.safe_load(file.read(MAX_CHARACTERS))
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        where = getattr(error, "problem_mark", None)
        raise UserError(f"--config {path}: not YAML" + (f", see line {where.line + 1}" if where else "")) from None
    if not isinstance(found, dict):
        raise UserError(f"--config {path}: it must be lines of the form `flag: value`")
    for name, value in found.items():
        if name not in FIELDS:
            near = difflib.get_close_matches(str(name), FIELDS, n=1)
            raise UserError(
                f"--config {path}: unknown flag {name!r:.80}" + (f"; did you mean {near[0]}?" if near else "")
            )
        if FIELDS[name].metadata["auto"] and value == AUTO:
            raise UserError(f"--config {path}: --{name} {value}: it must be a number, not negative, or auto")
        found[name] = value = _from_yaml(name, value)
        try:
            check_value(name, value)
        except UserError as error:
            raise UserError(f"--config {path}: {error}") from None
    return found


def _from_yaml(name: str, value: Any) -> Any:
    """YAML takes `auto` and, without a dot, `1e-4` for text, and `on` and `off` for truth values."""
    wanted = type(FIELDS[name].default)
    if FIELDS[name].metadata["auto"] and value == "auto":
        return AUTO
    if wanted is float and type(value) in (str, int):
        try:
            return float(value)
        except (ValueError, OverflowError):
            return value
    if wanted is str and isinstance(value, bool):
        return "on" if value else "off"
    return value


def as_yaml(config: Config, run_id: str, elastic: bool) -> str:
    """The file that repeats a run, with another run_id: every flag but those about one attempt.

    To type --elastic_ranks means to split microbatches for it, so it is there only if the run is split as that does.
    """
    import yaml

    left_out = ATTEMPT_ONLY if elastic else ATTEMPT_ONLY | {"elastic_ranks"}
    values = {name: getattr(config, name) for name in FIELDS if name not in left_out}
    words = {name: shown(name, value) for name, value in values.items()}
    command = f"# torchrun --standalone --nproc_per_node=1 train_gpt2_mod.py --config logs/{run_id}/config.yaml\n"
    return command + str(yaml.safe_dump(words, sort_keys=False, allow_unicode=True))
