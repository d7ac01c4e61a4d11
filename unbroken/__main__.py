"""`python -m unbroken COMMAND`: the tools around a run. Only the chosen one is imported."""

from __future__ import annotations

import argparse
import difflib
import importlib
import io
import os
import sys
from types import ModuleType
from typing import NoReturn

import unbroken
from unbroken import console, prefetch
from unbroken.errors import UserError

# Group -> command -> one line. A table, so that `--help` imports nothing.
COMMANDS = {
    "run": {
        "demo": "train a small model, kill it once, resume it (what `make train` does)",
        "doctor": "does this machine keep the promises for your flags, bit for bit?",
        "data": "make token shards from text, or fetch the pre-tokenized FineWeb",
    },
    "look at a run": {
        "ls": "what each run is doing, and its checkpoints: step, loss, size, age, whole?",
        "plot": "draw losses, learning rate, speed and gradient norm of runs, on a terminal too",
        "report": "one page of HTML: curves, attempts, saves, lost time, checkpoints, drift",
        "export-log": "the metrics of runs as CSV, Parquet or JSON lines",
    },
    "use a model": {
        "sample": "let a checkpoint write text",
        "eval": "validation loss, perplexity, bits per byte; HellaSwag",
        "export": "write a checkpoint as a Hugging Face model",
        "import": "turn a Hugging Face model back into weights for --init_from",
    },
    "keep a run elsewhere": {
        "mirror": "copy its checkpoints and log into object storage: s3://, gs://, az://, hf://, file://",
    },
    "look into checkpoints": {
        "show": "everything in a checkpoint but the tensors",
        "verify": "check every checksum",
        "diff": "what two checkpoints differ in, to the first bit",
    },
    "make yourself at home": {
        "completion": "print a script that completes all of this in bash, zsh or fish",
    },
}
EXAMPLES = """\
examples:
  python -m unbroken ls
  python -m unbroken verify logs/<run_id>/final.pt
  python -m unbroken sample <run_id> --prompt "def main("
  python -m unbroken doctor --model d2 --batch_size 2 --grad_accumulation_steps 4

training itself: torchrun --standalone --nproc_per_node=1 train_gpt2_mod.py --help"""
KNOWN = {name for group in COMMANDS.values() for name in group}


def usage() -> str:
    """The page of `python -m unbroken --help`."""
    lines = ["usage: python -m unbroken COMMAND [--help] ...", ""]
    width = max(map(len, KNOWN))
    for group, commands in COMMANDS.items():
        lines.append(f"{group}:")
        lines += [f"  {name:<{width}} {text}" for name, text in commands.items()]
        lines.append("")
    return "\n".join([*lines, EXAMPLES])


def main(argv: list[str]) -> int:
    """The door: a user's mistake, or a file that cannot be read or written, is one line and exit code 2."""
    console.open_streams()
    prefetch.let_threads_sleep()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that has not all letters
    try:
        code = _run(argv)
        sys.stdout.flush()
        return code
    except UserError as error:
        console.say(f"error: {error}", error=True)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of a pipe (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        console.say("error: out of memory: a smaller --batch_size, or --device cpu, may fit", error=True)
    except OSError as error:
        what = "writing or reading failed" if error.filename is None else error.filename  # the output has no name
        console.say(f"error: {what}: {error.strerror or error}", error=True)
    return 2


def _is_out_of_memory(error: Exception) -> bool:
    """Python's, CUDA's, or that of torch's allocator on a CPU, which is a RuntimeError like any other."""
    kind = type(error).__name__
    return kind in ("MemoryError", "OutOfMemoryError") or "allocate memory" in f"{error}"


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if argv[0] == "--version":
        print(f"unbroken {unbroken.__version__}")
        return 0
    name, rest = argv[0], argv[1:]
    if name not in KNOWN:
        near = difflib.get_close_matches(name, KNOWN, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(KNOWN))}"
        raise UserError(f"unknown command {name!r}; {hint}")
    command = importlib.import_module(module_of(name))
    return int(command.run(parser_of(name, command).parse_args(rest)))


def module_of(name: str) -> str:
    """The module of a command."""
    return f"unbroken.commands.{name.replace('-', '_')}"


def parser_of(name: str, command: ModuleType) -> argparse.ArgumentParser:
    """The command line of one tool."""
    from unbroken.parsing import Parser

    parser = Parser(prog=f"python -m unbroken {name}", description=command.HELP)
    command.configure(parser)
    return parser


def door() -> NoReturn:
    """`python -m unbroken`, and `unbroken` where the package is installed."""
    sys.exit(console.left(main(sys.argv[1:])))


if __name__ == "__main__":
    door()
