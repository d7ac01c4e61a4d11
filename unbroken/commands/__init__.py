"""The commands of `python -m unbroken`: one module each, with `configure(parser)` and `run(args)`."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import ModuleType

from unbroken.argparser import Parser
from unbroken.model import families
from unbroken.paths import LOGS

# Group -> command -> one line. A table, so that `--help` imports nothing.
COMMANDS = {
    "run": {
        "demo": "train a small model for about a minute, kill it once, resume it (what `make train` does)",
        "doctor": "check on this machine, with your flags, that interrupted runs have the same bits",
        "launch": "start torchrun, with the exit code of the training and without torchrun's traceback",
        "save": "ask a run that is being trained for a checkpoint now; prints its path",
        "data": "make token shards from text, or download the pre-tokenized FineWeb",
    },
    "look at a run": {
        "ls": "list runs and checkpoints: state, step, loss, size, age, verified or not",
        "plot": "draw losses, learning rate, speed and gradient norm of runs, into a picture or the terminal",
        "report": "write one page of HTML: curves, attempts, saves, lost time, checkpoints, drift",
        "export-log": "write the metrics of runs as CSV, Parquet or JSON lines, a row for each step",
    },
    "use a model": {
        "sample": "generate text from a checkpoint",
        "eval": "compute validation loss, perplexity, bits per byte, or the score on HellaSwag",
        "export": "write a checkpoint as a Hugging Face model or a DCP folder",
        "import": "make a checkpoint of a Hugging Face model or a DCP folder",
    },
    "copy a run": {
        "mirror": "copy a run into object storage: s3://, gs://, az://, hf://, file://",
    },
    "look into checkpoints": {
        "show": "print everything in a checkpoint except the tensors; nothing in it is executed",
        "verify": "check every checksum; exit code 0 if all are right, else 2",
        "audit": "compute a run again and compare it with its record; exit code 0 if nothing differs, else 1",
        "diff": "list the differences of two checkpoints, down to the first bit; exit code 1 if there are any",
    },
    "shell": {
        "completion": "print a completion script for bash, zsh or fish",
    },
}
MODULES = {"export": "hf_export", "import": "hf_import"}  # `import` is a keyword: no module can have that name
BPE_HELP = "folder with GPT-2's encoder.json and vocab.bpe (default: data/gpt2_bpe)"
LOOKS_FOR_RUNS = {"demo", "ls", "plot", "report", "export-log", "sample", "eval", "export", "mirror"}
LOOKS_FOR_RUNS |= {"show", "verify", "diff", "audit", "save"}
HELP = {name: text for group in COMMANDS.values() for name, text in group.items()}
COMMAND_NAMES = set(HELP)


def module_of(name: str) -> str:
    """Return the module of a command."""
    return f"unbroken.commands.{MODULES.get(name, name.replace('-', '_'))}"


def parser_of(name: str, command: ModuleType) -> Parser:
    """Return the parser of a command."""
    parser = Parser(prog=f"python -m unbroken {name}", description=HELP[name])
    configure(name, command, parser)
    return parser


def configure(name: str, command: ModuleType, parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a tool to its parser."""
    command.configure(parser)
    if name in LOOKS_FOR_RUNS:
        parser.add_argument("--logs_dir", default=LOGS, metavar="DIR", help=f"folder of all runs (default: {LOGS})")


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a command that uses a model: the file of one, tokenizer and device."""
    from unbroken.data.tokenizers import TOKENIZERS, TokenizerNames

    names = TokenizerNames(("auto", *TOKENIZERS))
    parser.add_argument(
        "--tokenizer",
        choices=names,
        default="auto",
        help="auto: the checkpoint's own; or the path of a tokenizer.json (default: auto)",
    )
    parser.add_argument("--bpe_dir", type=Path, metavar="DIR", help=BPE_HELP)
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute (default: auto)"
    )
    add_model_file(parser)


def add_model_file(parser: argparse.ArgumentParser) -> None:
    """Add the flag that allows the code of a user's model to run."""
    parser.add_argument(
        "--model", type=model_file, metavar="FILE.py:SIZE", help="the file and size of a model of your own"
    )


def model_file(text: str) -> str:
    """Declare a typed FILE.py:SIZE, and return its short name. Raises ValueError for other text."""
    if not families.IN_FILE.fullmatch(text):
        raise ValueError
    return families.declare(text)


model_file.__name__ = "FILE.py:SIZE"  # argparse names the type in its complaint
