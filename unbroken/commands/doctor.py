"""`python -m unbroken doctor`: check the guarantees with the user's flags on this machine, bit for bit."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unbroken import config as flags
from unbroken.checkpoint import directory
from unbroken.checkpoint.format.schema import FINAL
from unbroken.commands.diff import compare_tensors
from unbroken.data import prepare, sources
from unbroken.errors import UserError
from unbroken.files import absolute_glob
from unbroken.metrics.logfile import read_log
from unbroken.model import families
from unbroken.paths import logs_dir, use_logs_dir
from unbroken.runtime import child_training
from unbroken.text import format_count

OWN = (  # flags that the trials set themselves, or that have no part in them
    *("name", "run_id", "resume_from", "fork", "init_from", "mirror", *flags.LOGGING),
    *("save_every", "save_minutes", "keep_last", "keep_every", *flags.LENGTHS, "trace_steps"),
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments: every training flag, and what to try."""
    parser.usage = "python -m unbroken doctor [--steps N] [--processes N,N] [--json] [any flag of train_gpt2_mod.py]"
    parser.add_argument("--steps", type=int, default=6, metavar="N", help="steps of each run (default: 6)")
    parser.add_argument(
        "--processes", default="", metavar="N,N", help="process counts to compare (default: 1, 2, 4 where they fit)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--config", default="", metavar="FILE", help="YAML file of flags, such as a run's config.yaml")
    flags.add_flags(parser)


@dataclass(frozen=True)
class Trial:
    """A way to do the same run: the process counts of its attempts, of which all but the last are killed."""

    name: str
    processes: tuple[int, ...]


@dataclass(frozen=True)
class Verdict:
    """A verdict on a trial: what differs from the straight run."""

    trial: str
    identical: bool
    where: str
    notice: str


def run(args: argparse.Namespace) -> int:
    """Train, compare and print. Return 0 if everything is identical, else 1."""
    typed = {name: value for name, value in vars(args).items() if name in flags.FIELDS}
    for name, value in typed.items():
        flags.check_value(name, value)
    if args.config:
        typed = {**flags.load_yaml(args.config, opener=None), **typed}
    if "model" in typed:
        typed["model"] = families.declare(typed["model"])
    place = typed.pop("logs_dir", None)
    if place is not None:
        use_logs_dir(place)
        logs_dir().mkdir(parents=True, exist_ok=True)
    left_out = [f"--{name}" for name in OWN if name in typed]
    if left_out:
        print(f"left out: {', '.join(left_out)}; these are fresh runs in a temporary folder", file=sys.stderr)
    if args.steps < 2:
        raise UserError("--steps must be at least 2, so that there is something to interrupt")
    typed = flags.resolve_batch_sizes({name: value for name, value in typed.items() if name not in OWN})
    config = flags.merge(typed)
    counts = _counts(args.processes, config)
    trials = [Trial("the same command again", (counts[0],)), Trial("killed and resumed", (counts[0], counts[0]))]
    trials += [Trial(f"{count} processes", (count,)) for count in counts[1:]]
    if len(counts) > 1:
        trials.append(
            Trial(" -> ".join(map(str, (*counts, counts[0]))) + " processes, killed between", (*counts, counts[0]))
        )
    with tempfile.TemporaryDirectory(prefix="unbroken-doctor-", dir=place and logs_dir()) as folder:
        lab = Lab(Path(folder), _settings(typed, config), Trial("straight", (counts[0],)), args.steps, args.json)
        straight, _ = lab.train(lab.straight)
        lab.settings |= _microbatch(straight)
        verdicts = [lab.compare(trial, straight) for trial in trials]
    _print(verdicts, counts[0], args)
    return 0 if all(verdict.identical for verdict in verdicts) else 1


def _counts(wanted: str, config: flags.Config) -> list[int]:
    """Return the process counts to try; the first is that of the straight run."""
    if wanted:
        try:
            counts = [int(part) for part in wanted.split(",")]
        except ValueError:
            raise UserError(f"--processes {wanted}: type whole numbers with commas between, such as 1,2,4") from None
        if min(counts) < 1:
            raise UserError("--processes: a run has at least one process")
        most = _sequences(config)
        if max(counts) > most:
            raise UserError(f"--processes {str(max(counts))[:40]}: a step has {most} sequences, at most one a process")
        return counts
    sequences = _sequences(config)
    return [count for count in (1, 2, 4) if count == 1 or (count <= sequences and count <= 2 * (os.cpu_count() or 1))]


def _sequences(config: flags.Config) -> int:
    """Return the number of sequences of a step."""
    if config.batch_size == flags.AUTO:
        return config.total_batch_size // config.sequence_length
    return config.batch_size * config.grad_accumulation_steps


def _microbatch(straight: Path) -> dict[str, int]:
    """Return the sizes that `--batch_size auto` found, so that the other trials use them too."""
    with directory.open_file(straight / FINAL) as file:
        return {name: file.values["args"][name] for name in ("batch_size", "grad_accumulation_steps")}


def _settings(typed: dict[str, Any], config: flags.Config) -> dict[str, Any]:
    """Return the user's flags for a run in another folder."""
    train_bin, val_bin = prepare.resolve_patterns(config.input_bin, config.input_val_bin)
    return {
        **typed,
        "input_bin": sources.map_globs(train_bin, absolute_glob),
        "input_val_bin": absolute_glob(val_bin) if val_bin else "",
        "model": families.long_name(config.model),
    }


@dataclass
class Lab:
    """A temporary folder in which the trials are made."""

    folder: Path
    settings: dict[str, Any]
    straight: Trial
    steps: int
    quiet: bool

    def train(self, trial: Trial, traced: bool = False) -> tuple[Path, list[str]]:
        """Do the run of a trial; return the folder of its checkpoints, and the output of its last attempt."""
        run_id = str(uuid.uuid4())
        run_folder = self.folder / "logs" / run_id
        legs, said = len(trial.processes), list[str]()
        for leg, processes in enumerate(trial.processes):
            stop_at = None if leg == legs - 1 else 1 + leg * max(1, (self.steps - 1) // max(1, legs - 1))
            if not self.quiet:
                upto = "" if stop_at is None else f", killed after step {stop_at}"
                upto += ", once more with every operation noted" if traced else ""
                print(f"  {trial.name}: {format_count(processes, 'process')}{upto}", file=sys.stderr, flush=True)
            own = {"save_every": 1 if legs > 1 else 0, "trace_steps": self.steps if traced else 0}
            said = self._attempt(run_id, processes, stop_at, own)
        return run_folder, said

    def _attempt(self, run_id: str, processes: int, stop_at: int | None, own: dict[str, int]) -> list[str]:
        typed: list[str] = []
        values = {**self.settings, "run_id": run_id, "resume_from": "auto", "num_iterations": self.steps}
        values |= {**own, "keep_last": 2}
        for name, value in values.items():
            word = str(flags.display_value(name, value))
            typed += [f"--{name}" if value else f"--no-{name}"] if isinstance(value, bool) else [f"--{name}", word]
        return child_training.train(typed, processes, self.folder, stop_at)

    def compare(self, trial: Trial, straight: Path) -> Verdict:
        """Do a trial and compare its end with that of the straight run."""
        other, said = self.train(trial)
        where = difference(straight, other)
        if where:
            from unbroken.runtime import op_trace

            runs = [self.train(one, traced=True)[0] for one in (self.straight, trial)]
            where = f"{op_trace.first_difference(*runs) or 'no operation that both traced'}; {where}"
        notice = next(
            (line for line in said if "bits may differ" in line), ""
        )  # the program's own, of this many processes
        return Verdict(trial.name, where == "", where, notice)


def difference(a: Path, b: Path) -> str:
    """Return the differences at the end of two runs: the first loss and the most different tensor; "" if equal."""
    with directory.open_file(a / FINAL) as left, directory.open_file(b / FINAL) as right:
        differing = [row for row in compare_tensors(left, right) if not row.identical]
        digests = [file.values["progress"]["history"].get("digest") for file in (left, right)]
    if not differing and digests[0] == digests[1]:
        return ""
    logs = [read_log(folder / f"{folder.name}.log") for folder in (a, b)]
    steps = [step for (step, x), (_, y) in zip(logs[0].train, logs[1].train, strict=False) if x != y]
    logged = f"logged losses from step {steps[0]}" if steps else "no logged digit"
    worst = max(differing, key=lambda row: row.largest, default=None)
    if worst is None:
        return f"in the end {logged} differ{'' if steps else 's'}"
    return f"in the end {logged}, {len(differing)} tensors, most of all {worst.name} by {worst.largest:.3g}"


def _print(verdicts: list[Verdict], count: int, args: argparse.Namespace) -> None:
    if args.json:
        print(json.dumps({"steps": args.steps, "trials": [dataclasses.asdict(verdict) for verdict in verdicts]}))
        return
    width = max(len(verdict.trial) for verdict in verdicts)
    print(f"{args.steps} steps on {format_count(count, 'process')} straight through, against the same run")
    for verdict in verdicts:
        print(f"  {verdict.trial:<{width}}  {'identical' if verdict.identical else 'DIFFERS: ' + verdict.where}")
        if verdict.notice:
            print(f"  {'':<{width}}  ({verdict.notice})")
    print("compared: every weight, both moments, every loss, bit for bit")
