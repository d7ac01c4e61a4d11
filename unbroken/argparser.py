"""argparse with one-line errors, suggestions for misspelt flags, and help that is easy to read."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from typing import Any, NoReturn

from unbroken.errors import UserError

# The names of our flags in other programs.
FLAGS_ELSEWHERE = {
    "--lr": "--learning_rate",
    "--max_lr": "--learning_rate",
    "--steps": "--num_iterations",
    "--max_steps": "--num_iterations",
    "--max_iters": "--num_iterations",
    "--block_size": "--sequence_length",
    "--seq_len": "--sequence_length",
    "--micro_batch_size": "--batch_size",
    "--gradient_accumulation_steps": "--grad_accumulation_steps",
    "--eval_interval": "--val_loss_every",
    "--ckpt_path": "--resume_from",
    "--resume": "--resume_from",
    "--out_dir": "--logs_dir",
    "--wandb": "--log_wandb",
    "--wandb_log": "--log_wandb",
    "--log_interval": "--log_every",
    "--eval_iters": "--val_tokens",
    "--warmup_steps": "--warmup_iters",
    "--dataset": "--input_bin",
}


# What argparse calls a type, in words.
KINDS = {"int": "a whole number", "float": "a number", "number_or_auto": "a whole number or auto"}


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """A wide help formatter that shows a switch as `--[no-]fork`."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=110)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, argparse.BooleanOptionalAction):
            return f"--[no-]{action.dest}"
        return super()._format_action_invocation(action)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, which suggests the nearest flag; its subcommands have such parsers, too."""

    def __init__(self, **given: Any) -> None:  # allow_abbrev: or --resume would silently mean --resume_from
        super().__init__(**{"allow_abbrev": False, "formatter_class": HelpFormatter, **given})

    def error(self, message: str) -> NoReturn:
        """Raise the error as a UserError, in our words where we have some."""
        flag, _, fault = message.removeprefix("argument ").partition(": ")
        flag = "" if flag[0] == "{" else flag.partition("/")[0]
        if found := re.match(r"invalid (?:choice: '|(.+) value: ')(.*?)'(?: \(choose from .*)?$", fault):
            kind, value = found.groups()
            if not value:  # an unset variable of a script
                raise UserError(f"{flag} is empty; give a value or leave the flag out")
            raise UserError(f"{flag} {value}: it must be {self._allowed(kind, flag, value)}".lstrip())
        if fault == "expected one argument":
            raise UserError(f"{flag}: no value follows it; give one or leave the flag out")
        if fault.startswith("ignored explicit argument "):
            raise UserError(f"{flag} is a switch without a value; type the flag alone")
        if flag == "the following arguments are required":
            raise UserError(f"{fault} is missing; see --help")
        raise UserError(f"{message}; see --help")

    def _allowed(self, kind: str | None, flag: str, value: str) -> str:
        """Return what a flag or a positional argument allows: values of a kind, or some words."""
        if kind is not None:
            return KINDS.get(kind, kind)
        names = (each for each in self._actions if flag in (*each.option_strings, each.metavar, each.dest, ""))
        choices = next(each.choices for each in names if each.choices)
        words = [str(word) for word in choices]
        near = difflib.get_close_matches(value, words, n=1, cutoff=0.75)
        also = getattr(choices, "also", "")  # of a container that has more in it than its items
        return f"one of {', '.join(words)}" + (also and f", or {also}") + (f"; did you mean {near[0]}?" if near else "")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, and suggest the nearest flag where one is unknown."""
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            known = [option for action in self._actions for option in action.option_strings]
            word = unknown[0].split("=")[0]
            near = [FLAGS_ELSEWHERE.get(word.replace("-", "_").replace("__", "--", 1), "")]
            near = near if near[0] in known else difflib.get_close_matches(word, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else "; see --help"
            typed = list(sys.argv[1:] if args is None else args)
            before = typed[typed.index(unknown[0]) - 1] if unknown[0] in typed[1:] else ""
            if before in known and not word.startswith("-"):  # any other flag would have taken the word as its value
                hint = f"; {before} is a switch without a value"
            elif os.path.exists(unknown[0]):
                hint = ": a file; quote a glob ('*.bin'), so that the shell leaves it alone"
            raise UserError(f"unknown argument {unknown[0]!r}{hint}")
        return parsed, unknown
