"""`python -m unbroken COMMAND`: the tools around a run. Only the chosen one is imported."""

from __future__ import annotations

import difflib
import importlib
import io
import os
import runpy
import sys
from typing import NoReturn

import unbroken
from unbroken import console
from unbroken.commands import COMMAND_NAMES, COMMANDS, LOOKS_FOR_RUNS, module_of, parser_of
from unbroken.errors import UserError, exhausted_memory
from unbroken.paths import as_typed, use_logs_dir
from unbroken.runtime import startup

EXAMPLES = """\
examples:
  python -m unbroken ls
  python -m unbroken verify logs/<run_id>/final.pt
  python -m unbroken sample <run_id> --prompt "def main("
  python -m unbroken doctor --model d2 --batch_size 2 --grad_accumulation_steps 4

training itself: torchrun --standalone --nproc_per_node=1 train_gpt2_mod.py --help"""


def usage() -> str:
    """Return the page of `python -m unbroken --help`."""
    lines = ["usage: python -m unbroken COMMAND [--help] ...", ""]
    width = max(map(len, COMMAND_NAMES))
    for group, commands in COMMANDS.items():
        lines.append(f"{group}:")
        lines += [f"  {name:<{width}} {text}" for name, text in commands.items()]
        lines.append("")
    return "\n".join([*lines, as_typed(EXAMPLES)])


def main(argv: list[str]) -> int:
    """Run a command; a user's mistake, or a file that cannot be read or written, is one line and exit code 2."""
    console.open_streams()
    startup.require_posix()
    startup.set_openmp_wait_policy()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for a terminal whose encoding lacks a letter
    try:
        code = _run(argv)
        sys.stdout.flush()
        return code
    except UserError as error:
        console.print_line(f"error: {error}", error=True)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of a pipe (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (MemoryError, RuntimeError) as error:
        memory = exhausted_memory(error)
        if not memory:
            raise
        console.print_line(
            f"error: {memory} out of memory; a smaller --batch_size, or --device cpu, may fit", error=True
        )
    except OSError as error:
        what = "writing or reading failed" if error.filename is None else error.filename  # the output has no name
        console.print_line(f"error: {what}: {error.strerror or error}", error=True)
    return 2


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if argv[0] == "--version":
        print(f"unbroken {unbroken.__version__}")
        return 0
    name, rest = argv[0], argv[1:]
    if name not in COMMAND_NAMES:
        near = difflib.get_close_matches(name, COMMAND_NAMES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(COMMAND_NAMES))}"
        raise UserError(f"unknown command {name!r}; {hint}")
    command = importlib.import_module(module_of(name))
    if name == "launch" and rest not in (["-h"], ["--help"]):
        rest = ["--", *rest]  # torchrun parses them
    args = parser_of(name, command).parse_args(rest)
    if name in LOOKS_FOR_RUNS:
        use_logs_dir(args.logs_dir)
    return int(command.run(args))


def entrypoint() -> NoReturn:
    """Run `python -m unbroken`, or `unbroken` where the package is installed."""
    sys.exit(console.finish_output(main(sys.argv[1:])))


def train() -> None:
    """Run train_gpt2_mod.py as `unbroken-train`, where the package is installed."""
    runpy.run_module("train_gpt2_mod", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    entrypoint()
