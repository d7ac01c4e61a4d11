"""`python -m unbroken completion`: print a script that completes commands, flags and their values.

It is made from the parsers themselves; `shells.py` holds the scripts of the shells.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from unbroken import config
from unbroken.commands import shells
from unbroken.commands.shells import Context, Flag
from unbroken.metrics.metric_table import BY_PANEL
from unbroken.run import locate

HELP = "print a script that completes commands, flags, runs and checkpoints in your shell"
FILES_OF = ("GLOB", "DIR", "FILE")
TRAIN = "train"  # the context of train_gpt2_mod.py; the others are commands: "ls", "data text"

# What the training flags take that their types do not say.
TAKES = {
    "resume_from": (shells.CHECKPOINT, ("latest", "auto")),
    "init_from": (shells.CHECKPOINT, ()),
    "run_id": (shells.RUN, ()),
    "input_bin": (shells.FILE, ()),
    "input_val_bin": (shells.FILE, ()),
    "output_dir": (shells.FILE, ()),
    "config": (shells.FILE, ()),
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the argument: which shell."""
    parser.add_argument("shell", choices=tuple(shells.SCRIPTS), help="whose script to print")
    parser.epilog = "\n".join(
        ["for this session, or for all of them in the shell's start-up file:", *(f"  {how}" for how in shells.HOW)]
    )


def run(args: argparse.Namespace) -> int:
    """Print it."""
    print(shells.SCRIPTS[args.shell](contexts()), end="")
    return 0


def contexts() -> list[Context]:
    """Return every context of completion; `unbroken` itself, with its commands, comes first."""
    from unbroken.commands import COMMANDS, module_of, parser_of

    commands = tuple(name for group in COMMANDS.values() for name in group)
    found = [Context("unbroken", (), shells.WORDS, commands), *_below(TRAIN, config.build_parser())]
    for name in commands:
        found += _below(name, parser_of(name, importlib.import_module(module_of(name))))
    return found


def _below(name: str, parser: argparse.ArgumentParser) -> list[Context]:
    """Return the context of a parser and those of its subcommands."""
    flags: list[Flag] = []
    takes, words = shells.NOTHING, tuple[str, ...]()
    more: list[Context] = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            takes, words = shells.WORDS, tuple(action.choices)
            for way, each in action.choices.items():
                more += _below(f"{name} {way}", each)
        elif action.option_strings and action.help != argparse.SUPPRESS:
            kind, values = _takes(action)
            long = [option for option in action.option_strings if option.startswith("--")]
            flags += [Flag(option, _first_words(action.help or ""), kind, values) for option in long]
        elif takes == shells.NOTHING and not action.option_strings:
            takes, words = _takes(action)
    return [Context(name, tuple(flags), takes, words), *more]


def _takes(action: argparse.Action) -> tuple[str, tuple[str, ...]]:
    """Return what an argument takes, and the known words among that."""
    if action.nargs == 0:
        return shells.SWITCH, ()
    if action.dest in TAKES and action.option_strings:
        return TAKES[action.dest]
    if action.choices is not None:
        return shells.WORDS, tuple(map(str, action.choices))
    if action.type is config.number_or_auto:
        return shells.WORDS, ("auto",)
    if action.dest == "show" and str(action.metavar) == "NAMES":
        return shells.WORDS, tuple(BY_PANEL)
    shape = str(action.metavar or "")
    if shape == "FILE|RUN" or action.help == locate.CHECKPOINT_HELP:
        return shells.CHECKPOINT, ()
    if shape.startswith("RUN"):
        return shells.RUN, ()
    if action.type is Path or shape.startswith(FILES_OF):
        return shells.FILE, ()
    return shells.NOTHING, ()


def _first_words(text: str) -> str:
    """Return the beginning of a help text, which fits beside the flag."""
    return text.replace("%%", "%").split(" (")[0].split("; ")[0]
