"""`python -m unbroken completion`: print a script that completes commands, flags and their values, made by shtab."""

from __future__ import annotations

import argparse
import importlib
import re
from pathlib import Path
from typing import Any

from unbroken import config
from unbroken.argparser import Parser
from unbroken.errors import UserError
from unbroken.metrics.metric_table import BY_PANEL

SHELLS = {
    "bash": 'eval "$(python -m unbroken completion bash)"',
    "zsh": 'eval "$(python -m unbroken completion zsh)"',
    "fish": "python -m unbroken completion fish | source",
}
RUNS = "_unbroken_runs"  # a function of the script of each shell
CHECKPOINT = {
    "bash": "_unbroken_files",
    "zsh": "_unbroken_files",
    "fish": f"latest best auto ({RUNS}) (__fish_complete_suffix .pt)",
}
TRAINING = {  # values of flags of train_gpt2_mod.py whose metavars do not tell them
    "resume_from": "FILE|RUN",
    "init_from": "FILE|RUN",
    "run_id": "RUN",
    "input_bin": "FILE",
    "input_val_bin": "FILE",
    "output_dir": "FILE",
    "logs_dir": "FILE",
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the argument: which shell."""
    parser.add_argument("shell", choices=tuple(SHELLS), help="whose script to print")
    lines = [f"  {shell + ':':<5} {line}" for shell, line in SHELLS.items()]
    parser.epilog = "\n".join(["for this session, or for all of them in the shell's start-up file:", *lines])


def run(args: argparse.Namespace) -> int:
    """Print the script."""
    print(script(args.shell))
    return 0


def script(shell: str) -> str:
    """Return the script of a shell. Raises UserError without shtab."""
    try:
        import shtab
    except ImportError:
        raise UserError("completion needs shtab: pip install shtab") from None
    from unbroken.commands import HELP, module_of
    from unbroken.commands import configure as add_arguments

    tools = Parser(prog="unbroken")
    commands = tools.add_subparsers()
    for name, text in HELP.items():
        parser = commands.add_parser(name, help=text, description=text)
        add_arguments(name, importlib.import_module(module_of(name)), parser)
    parsers = (config.build_parser(), tools)
    for parser in parsers:
        _mark_values(parser)
    # This completes runs, and commands that are not at the beginning of the line, which shtab does not.
    more = Path(__file__).with_suffix(f".{shell}").read_text("utf-8")
    return "\n".join([*(shtab.complete(parser, shell) for parser in parsers), more])


def _mark_values(parser: argparse.ArgumentParser) -> None:
    """Set the `complete` that shtab reads on the arguments of a parser and its subcommands."""
    import shtab

    takes: dict[str, Any] = {"FILE|RUN": CHECKPOINT, "A": CHECKPOINT, "B": CHECKPOINT, "RUN": shtab.cmd(RUNS)}
    takes.update(dict.fromkeys(("FILE", "GLOB", "DIR"), shtab.FILE), NAMES=shtab.cmd(f"echo {' '.join(BY_PANEL)}"))
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for each in action.choices.values():
                _mark_values(each)
            continue
        shape = TRAINING.get(action.dest) or str(action.metavar)
        values = takes.get(shape) or takes.get(re.split(r"\W", shape)[0])
        if action.type is config.number_or_auto:
            values = shtab.cmd("echo auto")
        if values:
            action.complete = values  # type: ignore[attr-defined]
