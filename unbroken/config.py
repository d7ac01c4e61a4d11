"""Every flag once: name, type, default, help, check; flags from YAML; typed flags merged with those of a run."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import math
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from unbroken.argparser import Parser
from unbroken.errors import UserError
from unbroken.files import regular
from unbroken.model import families
from unbroken.paths import IS_INSTALLED, LOGS, MODULE, as_typed, is_name, is_run_id, with_logs_dir
from unbroken.text import format_count, printable

Check = Callable[[Any], bool]
KEPT_BY_AUTO = 2  # checkpoints
AUTO = -1  # what the word `auto` becomes where a number is expected


def flag(
    default: Any,
    group: str,
    text: str,
    check: tuple[Check, str] | None = None,
    choices: Sequence[str] = (),
    auto: bool = False,
) -> Any:
    """Return a field of Config with what argparse and the checks need to know about it.

    Args:
        default: the value without the flag; its type is the type of the flag.
        group: the heading in --help.
        text: the help text.
        check: (predicate, what a value must be), for typed values and those of files.
        choices: the allowed values; empty for any.
        auto: whether a number may also be the word `auto`.
    """
    about = {"group": group, "help": text, "check": check, "choices": choices, "auto": auto}
    return field(default=default, metadata=about)


AT_LEAST_ONE: tuple[Check, str] = (lambda value: 1 <= value < 10**18, "must be at least 1 and below 10**18")
SIZE: tuple[Check, str] = (lambda value: 1 <= value <= 10**7, "must be at least 1 and at most 10,000,000")
SEED: tuple[Check, str] = (lambda value: 0 <= value < 2**63, "must not be negative and at most 2**63 - 1")
THREADS: tuple[Check, str] = (lambda value: 0 <= value <= 4096, "must not be negative and at most 4096")
NOT_NEGATIVE: tuple[Check, str] = (lambda value: 0 <= value < 10**18, "must not be negative and below 10**18")
FINITE_NOT_NEGATIVE: tuple[Check, str] = (
    lambda value: math.isfinite(value) and value >= 0,
    "must be a number, not negative",
)
POSITIVE: tuple[Check, str] = (lambda value: math.isfinite(value) and value > 0, "must be a number above 0")
PROBABILITY: tuple[Check, str] = (lambda value: 0 <= value < 1, "must be at least 0 and below 1")
POWER_OF_TWO: tuple[Check, str] = (
    lambda value: 1 <= value <= 2**20 and value & (value - 1) == 0,
    "must be a power of two, at most 2**20",
)
HANG: tuple[Check, str] = (
    lambda value: value in ("auto", "off") or _is_positive(value),
    "must be auto, off or a number of seconds above 0",
)
REPLAY: tuple[Check, str] = (
    lambda value: value in ("first", "off") or (value.isdecimal() and value.isascii() and 0 < int(value[:18]) < 10**15),
    "must be first, off or a number of steps",
)
TOKENS: tuple[Check, str] = (
    lambda value: 1 <= parse_tokens(value) < 10**18,
    "must be a number of tokens such as 2.5B, 300M, 2.5e9 or 1000000",
)
SHUFFLE: tuple[Check, str] = (
    lambda value: value == "off" or (value.isdecimal() and value.isascii() and len(value) < 19),
    "must be off or a seed, a whole number below 10**18",
)
WORDS: tuple[Check, str] = (
    lambda value: len(value) <= 512 and value.isprintable() and not set(value) & set("/\\#?%:"),
    "must be printable, without any of /\\#?%:",
)
NAME: tuple[Check, str] = (
    lambda value: value == "" or is_name(value),
    "must be 1 to 64 of a-z, A-Z, 0-9 and ._+=- that begin with a letter or digit, and must not look like a run_id, a"
    " file or one of the words latest, best, auto, off, final",
)


@dataclass(frozen=True)
class StepList:
    """The steps that `--save_steps` names: some ranges, and with `powers` also 1, 2, 4, 8, and so on."""

    ranges: tuple[range, ...] = ()
    powers: bool = False

    @classmethod
    def parse(cls, text: str) -> StepList:
        """Return the steps of a text such as `0,1,2,4,8-64/8,log2`. Raises ValueError."""
        ranges, parts = list[range](), text.split(",") if text else []
        for part in parts:
            if part == "log2":
                continue
            found = re.fullmatch(r"(\d{1,18})(?:-(\d{1,18})(?:/(\d{1,18}))?)?", part, re.ASCII)
            first, last, stride = (int(number or 0) for number in found.groups()) if found else (0, 0, 0)
            if not found or (found[2] and last < first) or (found[3] and stride == 0):
                raise ValueError(part)
            ranges.append(range(first, max(first, last) + 1, stride or 1))
        return cls(tuple(ranges), "log2" in parts)

    def __contains__(self, step: int) -> bool:
        return any(step in steps for steps in self.ranges) or (self.powers and step > 0 and step & (step - 1) == 0)

    def count(self, after: int, last: int) -> int:
        """Return how many of the steps come after one step, up to another one; those named twice count twice."""
        return max(0, self._count(last) - self._count(after))

    def _count(self, last: int) -> int:
        counts = (min(len(steps), (last - steps.start) // steps.step + 1) for steps in self.ranges)
        return sum(max(0, count) for count in counts) + (max(0, last).bit_length() if self.powers else 0)


def _is_step_list(text: str) -> bool:
    try:
        StepList.parse(text)
    except ValueError:
        return False
    return True


STEPS: tuple[Check, str] = (_is_step_list, "must be steps such as 0,1,2,4,8-64/8 or log2, below 10**18")
BEST: tuple[Check, str] = (lambda value: 0 <= value <= 1000, "must not be negative and at most 1,000")
MAX_MICROBATCH_TOKENS = 1 << 27  # of a microbatch: their activations alone would be terabytes
MAX_STEP_TOKENS = 1 << 32


def _is_positive(text: str) -> bool:
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False


def parse_tokens(text: str) -> Fraction:
    """Return the number in a text such as 2.5B, exactly; 0 if it is none."""
    found = re.fullmatch(r"(\d{1,18}(?:\.\d{1,18})?(?:[eE]\+?\d{1,2})?)([KMBT]?)", text, re.ASCII | re.IGNORECASE)
    return Fraction(found[1]) * 1000 ** " KMBT".index(found[2].upper() or " ") if found else Fraction()


DATA, MODEL, STEP, OPTIM, EVAL = "data", "model", "tokens of a step", "optimization", "evaluation"
SAVE, RESUME, LOG, MACHINE = "checkpoints", "resuming", "logging", "machine and exactness"
INPUT_HELP = (
    "glob of training shards (default: data/fineweb10B/fineweb_train_*.bin, else a built-in corpus); several sources:"
    " GLOB=WEIGHT,GLOB=WEIGHT,…, with ? for a comma in a name; a weight W;W@POSITION changes at a token; a single glob"
    " that ends in =NUMBER: write ? for this ="
)
BATCH_HELP = "sequences of a microbatch; auto: as many as fit into memory, with --total_batch_size"
KEEP_HELP = "keep only the newest N periodic checkpoints; 0: all; auto: 2 with --save_every auto, else all"
RESUME_HELP = (
    "a checkpoint file; a run's folder, name, run_id or its beginning; latest: the run that saved last; best, RUN/best:"
    " the best checkpoint of that run, or of RUN (--keep_best); auto: the newest run begun with the same flags, else a"
    " new run"
)


@dataclass(frozen=True)
class Config:
    """The flags of a run, which a checkpoint stores as `args`: typed, default, or resolved from `auto`."""

    input_bin: str = flag("", DATA, INPUT_HELP)
    input_val_bin: str = flag("", DATA, "glob of validation shards (default: the ones beside the training shards)")
    shuffle: str = flag(
        "off", DATA, "off: the order of the shards; a seed: another order of windows in every epoch", SHUFFLE
    )
    window_tokens: int = flag(
        0,
        DATA,
        "tokens of a window for --shuffle and for several sources; 0: the --sequence_length with which the run begins",
        NOT_NEGATIVE,
    )
    model: str = flag(
        "d12", MODEL, "size of the model, or FILE.py:SIZE for a model of your own", choices=families.NAMES
    )
    init_from: str = flag(
        "",
        MODEL,
        "start a new run from the weights of a checkpoint, of a run's newest one, or of a Hugging Face folder",
    )
    dropout: float = flag(0.0, MODEL, "gpt2: share of the activations that are dropped in training", PROBABILITY)
    bias: str = flag(
        "on",
        MODEL,
        "gpt2: biases of linear layers and norms; qkv: only of queries, keys and values",
        choices=("on", "off", "qkv"),
    )
    seed: int = flag(1337, MODEL, "seed of the initial weights", SEED)
    batch_size: int = flag(4, STEP, BATCH_HELP, SIZE, auto=True)
    grad_accumulation_steps: int = flag(1, STEP, "microbatches of a step, over all processes together", SIZE)
    total_batch_size: int = flag(0, STEP, "tokens of a step, which decide the accumulation; 0: not used", NOT_NEGATIVE)
    sequence_length: int = flag(64, STEP, "tokens of a sequence", SIZE)
    num_iterations: int = flag(10, OPTIM, "optimizer updates of the whole run", NOT_NEGATIVE)
    num_tokens: str = flag(
        "",
        OPTIM,
        "in place of --num_iterations: tokens to train on, such as 2.5B (K, M, B, T), rounded up to whole steps",
        TOKENS,
    )
    num_epochs: float = flag(
        0.0,
        OPTIM,
        "in place of --num_iterations: epochs of the shards with which the run began, rounded up to whole steps",
        POSITIVE,
    )
    optimizer: str = flag(
        "adamw", OPTIM, "muon: torch.optim.Muon for the hidden matrices, AdamW for the rest", choices=("adamw", "muon")
    )
    learning_rate: float = flag(1e-4, OPTIM, "peak learning rate", FINITE_NOT_NEGATIVE)
    warmup_iters: int = flag(0, OPTIM, "steps of linear warmup", NOT_NEGATIVE)
    warmdown_iters: int = flag(0, OPTIM, "steps of linear warmdown at the end", NOT_NEGATIVE)
    weight_decay: float = flag(0.0, OPTIM, "decoupled weight decay of the matrices", FINITE_NOT_NEGATIVE)
    grad_clip: float = flag(0.0, OPTIM, "largest norm of the gradient; 0: no clipping", FINITE_NOT_NEGATIVE)
    val_loss_every: int = flag(0, EVAL, "steps between validations; 0: none", NOT_NEGATIVE)
    val_batch_size: int = flag(16, EVAL, "sequences of a validation batch", SIZE)
    val_tokens: int = flag(1_048_576, EVAL, "tokens of a validation, the same ones each time", AT_LEAST_ONE)
    save_every: int = flag(
        5000,
        SAVE,
        "steps between checkpoints; 0: only the final one; auto: chosen from the cost of a save and --mtbf_minutes",
        NOT_NEGATIVE,
        auto=True,
    )
    save_steps: str = flag(
        "", SAVE, "also save at these steps, and keep them: 0,1,2,4,8-64/8; log2: 1, 2, 4, 8, and so on", STEPS
    )
    save_weights_every: int = flag(
        0, SAVE, "steps between small files of the weights alone, weights_step*.pt; 0: none", NOT_NEGATIVE
    )
    save_weights_dtype: str = flag(
        "bfloat16", SAVE, "dtype of the weights in weights_step*.pt", choices=("bfloat16", "float32")
    )
    mtbf_minutes: float = flag(60.0, SAVE, "mean time between interruptions, for --save_every auto", POSITIVE)
    save_minutes: float = flag(
        0.0, SAVE, "also save when this many minutes have passed since the last save; 0: never", FINITE_NOT_NEGATIVE
    )
    keep_last: int = flag(AUTO, SAVE, KEEP_HELP, NOT_NEGATIVE, auto=True)
    keep_every: int = flag(0, SAVE, "with --keep_last: also keep those whose step is a multiple of N", NOT_NEGATIVE)
    keep_best: int = flag(
        0,
        SAVE,
        "save when a validation loss is among the N lowest, and keep those N checkpoints; best.pt links to the best",
        BEST,
    )
    grace_seconds: float = flag(
        30.0,
        SAVE,
        "seconds between a signal to stop and the kill; a warning says if a save may take longer",
        FINITE_NOT_NEGATIVE,
    )
    max_hours: float = flag(
        0.0,
        SAVE,
        "save and end before this many hours since the start of the process; 0: no limit",
        FINITE_NOT_NEGATIVE,
    )
    mirror: str = flag(
        "",
        SAVE,
        "URL to which checkpoints and log are copied: s3://, gs://, az://, hf:// or file:///, see docs/mirror.md",
    )
    resume_from: str = flag("", RESUME, RESUME_HELP)
    name: str = flag(
        "", RESUME, "name of the run, which can be typed instead of its run_id; logs/by-name/<name> links to it", NAME
    )
    run_id: str = flag("", RESUME, "uuid of a new run (default: a random one)")
    fork: bool = flag(False, RESUME, "continue the run as a new one, with a run_id of its own")
    on_extend: str = flag(
        "keep",
        RESUME,
        "learning rate if the run is made longer after its warmdown began; rewarm: raise it gradually",
        choices=("keep", "rewarm"),
    )
    on_divergence: str = flag(
        "warn", RESUME, "what to do if a repeated step differs from the log", choices=("warn", "stop")
    )
    on_nan: str = flag(
        "stop",
        RESUME,
        "what to do if a loss or gradient norm is NaN or infinite; rewind: go back and leave its batches out",
        choices=("stop", "rewind", "go_on"),
    )
    on_spike: str = flag(
        "off",
        RESUME,
        "what to do if a loss or gradient norm is far above those of the 64 steps before; rewind: as for --on_nan",
        choices=("off", "warn", "rewind"),
    )
    skip_batches: str = flag("", RESUME, "batches that no step is trained on, such as 101-103,250; the first one is 1")
    resume_processes: int = flag(1, RESUME, "number of processes that made a checkpoint of the earlier program", SIZE)
    allow_data_change: bool = flag(False, RESUME, "resume although the data shards have changed")
    logs_dir: str = flag(LOGS, LOG, "folder of all runs, such as one on a scratch disk")
    output_dir: str = flag("", LOG, "folder of <run_id>.log (default: the run's own folder, logs/<run_id>)")
    log_every: int = flag(
        1, LOG, "steps between lines in log, console and trackers; the journal has every step", AT_LEAST_ONE
    )
    log_wandb: bool = flag(False, LOG, "log to Weights & Biases, into the run whose id is the run_id")
    wandb_project: str = flag("unbroken", LOG, "project in W&B, unless WANDB_PROJECT is set", WORDS)
    wandb_entity: str = flag("", LOG, "team or user in W&B, unless WANDB_ENTITY is set", WORDS)
    wandb_group: str = flag("", LOG, "group in W&B of a new run, unless WANDB_RUN_GROUP is set", WORDS)
    wandb_tags: str = flag("", LOG, "tags in W&B of a new run, such as a,b, unless WANDB_TAGS is set", WORDS)
    log_trackio: bool = flag(False, LOG, "log to Trackio, into one run for all attempts")
    log_mlflow: bool = flag(
        False, LOG, "log to MLflow, into one run for all attempts; without MLFLOW_TRACKING_URI into logs/mlflow.db"
    )
    log_tensorboard: bool = flag(False, LOG, "write TensorBoard's event file, logs/<run_id>/tensorboard/")
    device: str = flag("auto", MACHINE, "where to train", choices=("auto", "cpu", "cuda"))
    dtype: str = flag(
        "auto",
        MACHINE,
        "dtype of the matrix products; auto: bf16 where the hardware has it",
        choices=("auto", "bf16", "fp32"),
    )
    compile: str = flag("auto", MACHINE, "torch.compile for the layers; auto: on a GPU", choices=("auto", "on", "off"))
    activation_checkpointing: str = flag(
        "off", MACHINE, "compute each layer's activations again instead of keeping them", choices=("on", "off")
    )
    deterministic: str = flag(
        "on", MACHINE, "deterministic kernels; off trades exactness for speed", choices=("on", "off")
    )
    elastic_ranks: int = flag(
        8, MACHINE, "largest number of processes with the same bits, a power of two", POWER_OF_TWO
    )
    threads: int = flag(
        0,
        MACHINE,
        "CPU threads of a process, which change bits, so a run keeps them; 0: one per core of this machine",
        THREADS,
    )
    trace_steps: int = flag(
        0,
        MACHINE,
        "write a digest of every operation of the first N steps into logs/<run_id>/trace.<rank>.txt",
        NOT_NEGATIVE,
    )
    on_oom: str = flag(
        "shrink",
        MACHINE,
        "what to do if CUDA memory runs out; shrink: halve the microbatch, with the same tokens a step",
        choices=("shrink", "fail"),
    )

    hang: str = flag(
        "auto",
        MACHINE,
        "seconds without progress in a step that end the attempt; auto: 10 usual steps, at least 30 s; off: never",
        HANG,
    )

    replay: str = flag(
        "first",
        MACHINE,
        "first: compute an attempt's first microbatch twice and compare weights at saves; N: also every N-th step; off",
        REPLAY,
    )

    @property
    def step_tokens(self) -> int:
        """Tokens of a step over all processes."""
        return self.batch_size * self.grad_accumulation_steps * self.sequence_length

    @property
    def model_flags(self) -> dict[str, Any]:
        """The values of MODEL_FLAGS."""
        return {name: getattr(self, name) for name in MODEL_FLAGS}

    @property
    def checkpoints_to_keep(self) -> int:
        """Number of periodic checkpoints to keep, 0 for all; automatic saving defaults to 2."""
        if self.keep_last != AUTO:
            return self.keep_last
        return KEPT_BY_AUTO if self.save_every == AUTO else 0


FIELDS = {item.name: item for item in dataclasses.fields(Config)}

# Flags about the log and the trackers.
LOGGING = tuple(name for name, item in FIELDS.items() if item.metadata["group"] == LOG)

# Flags about this attempt, not about the run: a resumed run never takes them from the checkpoint. `mirror` is one
# because a file must not decide where the weights are sent.
ATTEMPT_ONLY = frozenset(
    {
        *("resume_from", "run_id", "fork", "mirror", "allow_data_change", "resume_processes", "on_divergence"),
        *("on_extend", "max_hours", "device", "logs_dir", "trace_steps", "num_tokens", "num_epochs"),
    }
)

LENGTHS = ("num_iterations", "num_tokens", "num_epochs")  # each says how long a run is

# The flags that decide what is trained: two runs that differ in one of them are two experiments.
TRAINED = tuple(
    name
    for name, item in FIELDS.items()
    if item.metadata["group"] in (DATA, MODEL, STEP, OPTIM) and name not in ("input_val_bin", *LENGTHS)
)

# Texts that may look like numbers in YAML.
TEXTS = ("name", "num_tokens", "shuffle", "save_steps", "wandb_project", "wandb_entity", "wandb_group", "wandb_tags")

# The flags that set a field of the model's configuration, where its family has one of that name.
MODEL_FLAGS = ("dropout", "bias")

# Flags that must not be empty if typed.
NEVER_EMPTY = ("config", "input_bin", "init_from", "mirror", "name", "resume_from", "run_id")

# Flags for which the guide wants a warning if the typed value differs from the checkpoint.
CRITICAL = ("model", "batch_size", "sequence_length", "grad_accumulation_steps")


EXAMPLES = """\
examples:
  python train_gpt2_mod.py --model d2
      a small model on the built-in corpus: nothing else is needed
  torchrun --standalone --nproc_per_node=8 train_gpt2_mod.py --model d12 --save_every auto --resume_from auto
      one command for a job that is restarted: it starts the run, or continues it
  python train_gpt2_mod.py --resume_from latest
      continue the run that saved last; flags that are not typed keep their values
  python train_gpt2_mod.py --config logs/<run_id>/config.yaml --seed 7
      the same flags with another seed, as a new run

a run is in logs/<run_id>/; `python -m unbroken` lists the tools; docs/guide.md explains resuming"""


def build_parser() -> Parser:
    """Return the parser of train_gpt2_mod.py, whose namespace holds typed flags only."""
    made = Parser(
        prog=MODULE if IS_INSTALLED else "train_gpt2_mod.py",
        usage="[torchrun --standalone --nproc_per_node=N | python] %(prog)s [--flag value] ...",
        description="Pretrain GPT-2. An interrupted and resumed run has the same bits as an uninterrupted one.",
        epilog=as_typed(EXAMPLES),
    )
    made.add_argument(
        "--config",
        default=argparse.SUPPRESS,
        metavar="FILE",
        help="YAML file of flags; a flag on the command line replaces it",
    )
    add_flags(made)
    return made


def add_flags(made: argparse.ArgumentParser) -> None:
    """Add every flag of a run to a parser, in groups."""
    groups: dict[str, Any] = {}
    for name, item in FIELDS.items():
        about = item.metadata
        if about["group"] not in groups:
            groups[about["group"]] = made.add_argument_group(about["group"])
        group = groups[about["group"]]
        if item.default is False:
            group.add_argument(
                f"--{name}", action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=about["help"]
            )
            continue
        default = "" if item.default == "" else f" (default: {display_value(name, item.default)})"
        group.add_argument(
            f"--{name}",
            type=number_or_auto if about["auto"] else type(item.default),
            default=argparse.SUPPRESS,  # so that a typed default is told from an untyped one
            choices=about["choices"] or None,
            metavar=None if about["choices"] else {int: "N", float: "X", str: "TEXT"}[type(item.default)],
            help=(about["help"] + default).replace("%", "%%"),
        )


def display_value(name: str, value: Any) -> Any:
    """Return the value of a flag as a user types it."""
    return "auto" if name in FIELDS and FIELDS[name].metadata["auto"] and value == AUTO else value


def number_or_auto(text: str) -> int:
    """Return the number in a typed text, AUTO for `auto`. Raises ValueError."""
    number = AUTO if text == "auto" else int(text)
    if number == AUTO and text != "auto":
        raise ValueError  # -1 has other meanings in other programs
    return number


def parse(argv: Sequence[str]) -> dict[str, Any]:
    """Return the typed flags and those of --config, checked; nothing else. Raises UserError."""
    try:
        return _parse(argv)
    except UserError as error:
        error.on_all_ranks = True  # of a node, where all have the same flags and files
        raise


def _parse(argv: Sequence[str]) -> dict[str, Any]:
    typed: dict[str, Any] = vars(build_parser().parse_args(list(argv)))
    for name in NEVER_EMPTY:
        if typed.get(name) == "":  # an unset variable of a script, which would begin a run that is not meant
            raise UserError(f"--{name} is empty; give a value or leave the flag out")
    file = typed.pop("config", "")
    for name, value in typed.items():
        check_value(name, value)
    found = load_yaml(file, opener=None) if file else {}
    if Path(file).name == "config.yaml" and is_run_id(Path(file).absolute().parent.name):
        found.pop("name", "")  # that of the run which wrote the file
    for group in (found, typed):
        lengths = [name for name in LENGTHS if name in group]
        if len(lengths) > 1:
            raise UserError(f"--{lengths[0]} and --{lengths[1]} both say how long the run is; type one of them")
    if any(name in typed for name in LENGTHS):  # instead of the file's
        found = {name: value for name, value in found.items() if name not in LENGTHS}
    merged = {**found, **typed}
    if "model" in merged:
        merged["model"] = families.declare(merged["model"])
    resume_from = str(merged.get("resume_from", ""))
    starts_or_goes_on = not resume_from or resume_from.rpartition("/")[2] == "auto"
    of_the_run = "init_from" not in typed and "resume_from" in typed  # in its config.yaml: how it once began
    if merged.get("init_from") and not (starts_or_goes_on or of_the_run):
        raise UserError(
            "--init_from starts a new run and --resume_from continues one: type one of them; for a line that does"
            " either, type --resume_from auto beside --init_from"
        )
    return merged


def check_value(name: str, value: Any) -> None:
    """Raise a UserError that names the flag if it cannot have `value`."""
    about = FIELDS[name].metadata
    wanted = type(FIELDS[name].default)
    if type(value) is not wanted and not (wanted is float and type(value) is int):
        # Of a large value only the type is shown: a list in YAML can hold itself ten thousand million times.
        shown = repr(value) if isinstance(value, (str, int, float, bool)) else f"a {type(value).__name__}"
        raise UserError(
            f"--{name}: {shown} is not {'a whole number' if wanted is int else 'of type ' + wanted.__name__}"
        )
    if about["choices"] and value not in about["choices"]:
        raise UserError(f"--{name}: {value!r:.80} is not one of {', '.join(about['choices'])}")
    if about["auto"] and value == AUTO:
        return
    if about["check"] and not about["check"][0](value):
        raise UserError(f"--{name} {value!s:.80}: it {about['check'][1]}")


def merge(typed: dict[str, Any], saved: dict[str, Any] | None = None) -> Config:
    """Return the typed flags, else those of the run, else the defaults. `saved`: a checkpoint's `args`, untrusted."""
    values: dict[str, Any] = {}
    for name, value in (saved or {}).items():
        if name in FIELDS and name not in ATTEMPT_ONLY:
            check_value(name, value)
            values[name] = value
    config = Config(**{**values, **typed})
    if config.fork and not config.resume_from:
        raise UserError("--fork needs --resume_from; name the run that is continued as a new one")
    for name, value in config.model_flags.items():
        if value != FIELDS[name].default:  # imports torch, which a run of a family without such flags need not
            families.require_flag(config.model, name, value)
    microbatch = max(config.batch_size, 1) * config.sequence_length
    if microbatch > MAX_MICROBATCH_TOKENS or microbatch * config.grad_accumulation_steps > MAX_STEP_TOKENS:
        raise UserError(
            f"{format_count(config.grad_accumulation_steps, 'microbatch')} of {config.batch_size} x"
            f" {config.sequence_length} tokens:"
            f" at most {MAX_MICROBATCH_TOKENS:,} fit into one, and {MAX_STEP_TOKENS:,} into a step"
        )
    if config.val_batch_size * config.sequence_length > MAX_MICROBATCH_TOKENS:
        raise UserError(
            f"--val_batch_size {config.val_batch_size}: at most {MAX_MICROBATCH_TOKENS:,} tokens fit into a batch"
        )
    return config


def resolve_batch_sizes(typed: dict[str, Any], saved: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the typed flags with the accumulation that follows from --total_batch_size.

    For a resumed run `--batch_size auto` means the size found before. If another size is typed, a step keeps the tokens
    that the run began with, unless the accumulation is typed too. `runtime/batch_size.py` finds the size of a new run.
    """
    made = dict(typed)
    if saved and made.get("batch_size") == AUTO:
        del made["batch_size"]
    values = {name: made.get(name, (saved or {}).get(name, item.default)) for name, item in FIELDS.items()}
    total, size, length = values["total_batch_size"], values["batch_size"], values["sequence_length"]
    if size == AUTO and not total:
        raise UserError("--batch_size auto needs --total_batch_size; type the tokens of a step")
    if not total or not made.keys() & {"total_batch_size", "batch_size", "sequence_length", "grad_accumulation_steps"}:
        return made
    if "total_batch_size" not in made and "grad_accumulation_steps" in made:
        kept = total == size * length * made["grad_accumulation_steps"]
        return made if kept else {**made, "total_batch_size": 0}
    if total % length:
        raise UserError(f"--total_batch_size {total} is not a multiple of --sequence_length {length}")
    if size == AUTO:
        return made
    if total % (size * length):
        raise UserError(f"--total_batch_size {total} is not a multiple of {size} x {length} tokens, a microbatch")
    follows = total // (size * length)
    if made.get("grad_accumulation_steps", follows) != follows:
        raise UserError(
            f"--total_batch_size {total} means {format_count(follows, 'microbatch')} of {size} x {length} tokens, not"
            f" --grad_accumulation_steps {made['grad_accumulation_steps']}: type only one of them"
        )
    return {**made, "grad_accumulation_steps": follows}


def critical_mismatches(typed: dict[str, Any], saved: dict[str, Any]) -> list[str]:
    """Return the guide's warnings: a line with both values for each critical flag that differs from the checkpoint."""
    return [
        f"{name} mismatch - checkpoint: {saved[name]}, current: {typed[name]}"
        for name in CRITICAL
        if name in typed and name in saved and typed[name] != saved[name]
    ]


def optimization_changes(typed: dict[str, Any], before: Config, step: int) -> list[str]:
    """Return a line for each typed flag of the optimization that differs from the run's, whose last step is `step`."""
    return [
        f"--{name} {value} from step {step + 1} on; it was {getattr(before, name)}"
        for name, value in typed.items()
        if FIELDS[name].metadata["group"] == OPTIM and name not in LENGTHS and value != getattr(before, name)
    ]


def idle_flags(typed: dict[str, Any], config: Config) -> list[str]:
    """Return a warning for each flag that is typed, differs from its default and lacks the flag that it needs."""
    needs = {
        "keep_every": (config.checkpoints_to_keep > 0, "--keep_last"),
        "keep_best": (config.val_loss_every > 0, "--val_loss_every"),
        "save_steps": (
            config.num_epochs > 0 or StepList.parse(config.save_steps).count(-1, config.num_iterations) > 0,
            "more --num_iterations",
        ),
        "save_weights_dtype": (config.save_weights_every > 0, "--save_weights_every"),
        "mtbf_minutes": (config.save_every == AUTO, "--save_every auto"),
        "window_tokens": (config.shuffle != "off" or "=" in config.input_bin, "--shuffle SEED or several sources"),
        "val_batch_size": (config.val_loss_every > 0, "--val_loss_every"),
        "val_tokens": (config.val_loss_every > 0, "--val_loss_every"),
        **dict.fromkeys(
            ("wandb_project", "wandb_entity", "wandb_group", "wandb_tags"), (config.log_wandb, "--log_wandb")
        ),
        "replay": (config.deterministic == "on" or config.replay == "off", "--deterministic on"),
    }
    return [
        f"--{name} {typed[name]} has no effect without {needed}"
        for name, (is_there, needed) in needs.items()
        if not is_there and typed.get(name, FIELDS[name].default) != FIELDS[name].default
    ]


MAX_YAML_CHARACTERS, MAX_YAML_EVENTS = 1 << 20, 1000  # all flags are some 200 events
MAX_BITS = 256  # of a whole number in YAML


def load_yaml(path: str, opener: Callable[[str, int], int] | None = regular) -> dict[str, Any]:
    """Return the flags in a YAML file, `name: value` each, checked like typed ones. Raises UserError.

    `opener`: None also accepts a pipe, which the user may type as `--config <(…)`.
    """
    try:
        with open(path, encoding="utf-8", opener=opener) as file:
            text = file.read(MAX_YAML_CHARACTERS + 1)
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}; give the path of a YAML file") from None
    except ValueError:
        raise UserError(f"--config {path}: not YAML") from None
    return parse_yaml(text, path)


def parse_yaml(text: str, path: str) -> dict[str, Any]:
    """Return the flags in a YAML text, which is from `path`. Raises UserError."""
    import yaml

    try:
        is_large = len(text) > MAX_YAML_CHARACTERS or any(
            count > MAX_YAML_EVENTS or isinstance(event, yaml.AliasEvent)  # each line could double the one before
            for count, event in enumerate(yaml.parse(text, yaml.SafeLoader))
        )
        found = None if is_large else yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
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
        try:
            found[name] = value = _from_yaml(name, value)
            check_value(name, value)
        except UserError as error:
            raise UserError(f"--config {path}: {error}") from None
    return found


def _from_yaml(name: str, value: Any) -> Any:
    """Return a flag's value from YAML, which reads `auto` and `1e-4` as text, and `on` and `off` as booleans."""
    wanted = type(FIELDS[name].default)
    if type(value) is int and value.bit_length() > MAX_BITS:  # Python would refuse to print it (YAML: 0x…, 1:59:59…)
        raise UserError(f"--{name}: a number of {value.bit_length():,} bits is too large")
    if FIELDS[name].metadata["auto"] and value == "auto":
        return AUTO
    if wanted is float and type(value) in (str, int):
        try:
            return float(value)
        except (ValueError, OverflowError):
            return value
    if wanted is str and isinstance(value, bool):
        return "on" if value else "off"
    if name in (*TEXTS, "hang", "skip_batches", "replay") and type(value) in (int, float):
        return str(value)
    return value


def dump_yaml(config: Config, folder: Path, elastic: bool) -> str:
    """Return config.yaml in a run's folder, which repeats it under another run_id: all flags but those of one attempt.

    A typed --elastic_ranks splits microbatches, so the flag is written only if `elastic`: if the run is divided like
    that.
    """
    left_out = ATTEMPT_ONLY if elastic else ATTEMPT_ONLY | {"elastic_ranks"}
    values = {name: getattr(config, name) for name in FIELDS if name not in left_out}
    values["model"] = families.long_name(config.model)
    words = {name: display_value(name, value) for name, value in values.items()}
    file = printable(folder / "config.yaml", 4096)
    torchrun = as_typed("torchrun --standalone --nproc_per_node=1 train_gpt2_mod.py")
    command = with_logs_dir(f"{torchrun} --config {shlex.quote(file)}")
    try:
        import yaml
    except ImportError:  # JSON is YAML: a machine lent for an hour may have torch and no more
        return f"# {command}\n{json.dumps(words, indent=1, ensure_ascii=False)}\n"
    return f"# {command}\n" + str(yaml.safe_dump(words, sort_keys=False, allow_unicode=True))
