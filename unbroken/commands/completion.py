"""`python -m unbroken completion`: print a script that completes commands, flags and their values, made by shtab."""

from __future__ import annotations

import argparse
import importlib
import re
from typing import Any

from unbroken import config
from unbroken.argparser import Parser
from unbroken.errors import UserError
from unbroken.metrics.metric_table import BY_PANEL

HELP = "print a script that completes commands, flags, runs and checkpoints in your shell"
SHELLS = {
    "bash": 'eval "$(python -m unbroken completion bash)"',
    "zsh": 'eval "$(python -m unbroken completion zsh)"',
    "fish": "python -m unbroken completion fish | source",
}
RUNS = "ls logs 2>/dev/null"
CHECKPOINT = {
    "bash": "_unbroken_files",
    "zsh": "_unbroken_files",
    "fish": f"latest auto ({RUNS}) (__fish_complete_suffix .pt)",
}
TRAINING = {  # what flags of train_gpt2_mod.py take that their own metavars do not say
    "resume_from": "FILE|RUN",
    "init_from": "FILE|RUN",
    "run_id": "RUN",
    "input_bin": "FILE",
    "input_val_bin": "FILE",
    "output_dir": "FILE",
}

# shtab completes `unbroken` and `train_gpt2_mod.py`. These functions call it where the names follow python or torchrun.
BASH = f"""
_unbroken_files() {{
    compgen -W "latest auto $({RUNS})" -- "$1"; compgen -f -X '!*.pt' -- "$1"; compgen -d -- "$1"
}}
_unbroken_line() {{
    local i word cut=()
    for ((i = 0; i <= COMP_CWORD; i++)); do
        word=${{COMP_WORDS[i]}}
        if (( ${{#cut[@]}} )); then [[ $word == = ]] || cut+=("$word")  # bash takes `--flag=value` apart
        elif [[ ${{word##*/}} == train_gpt2_mod.py || $word == unbroken ]]; then cut=("${{word##*/}}"); fi
    done
    [[ ${{COMP_WORDS[COMP_CWORD]}} == = ]] && cut+=("")
    if (( ${{#cut[@]}} > 1 )); then
        COMP_WORDS=("${{cut[@]}}") COMP_CWORD=$(( ${{#cut[@]}} - 1 ))
        "_shtab_${{cut[0]//./_}}"
    elif [[ -n $_unbroken_before ]]; then "$_unbroken_before" "$@"; fi
}}
declare -F _completion_loader >/dev/null && _completion_loader python 2>/dev/null
[[ $(complete -p python 2>/dev/null) =~ -F\\ ([^ ]*) && ${{BASH_REMATCH[1]}} != _unbroken_line ]] &&
    _unbroken_before=${{BASH_REMATCH[1]}}
complete -o bashdefault -o default -F _unbroken_line python python3 torchrun unbroken train_gpt2_mod.py
"""
ZSH = f"""
_unbroken_files() {{ compadd latest auto $({RUNS}); _files -g '*.pt' }}
_unbroken_line() {{
    local i
    for ((i = 2; i < CURRENT; i++)); do
        if [[ $words[i] == (*/|)train_gpt2_mod.py || $words[i] == unbroken ]]; then
            words=("${{(@)words[i,-1]}}"); (( CURRENT -= i - 1 )); _shtab_${{${{words[1]:t}}//./_}}; return
        fi
    done
    ${{_unbroken_before:-_default}} "$@"
}}
[[ $_comps[python] == _unbroken_line ]] || _unbroken_before=$_comps[python]
compdef _unbroken_line python python3 torchrun
"""
LINES = {"bash": BASH, "zsh": ZSH}


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
    from unbroken.commands import COMMANDS, module_of

    tools = Parser(prog="unbroken")
    commands = tools.add_subparsers()
    for name, text in (item for group in COMMANDS.values() for item in group.items()):
        importlib.import_module(module_of(name)).configure(commands.add_parser(name, help=text, description=text))
    parsers = (config.build_parser(), tools)
    for parser in parsers:
        _mark_values(parser)
    return "\n".join([*(shtab.complete(parser, shell) for parser in parsers), LINES.get(shell, "")])


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
