"""`python -m unbroken audit`: compute a run again on this machine and compare it, bit for bit, with its record."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unbroken import config as flags
from unbroken import console
from unbroken.checkpoint import directory
from unbroken.checkpoint.format.schema import checkpoint_name
from unbroken.commands import add_model_file
from unbroken.data import sources
from unbroken.errors import UserError
from unbroken.files import absolute_glob
from unbroken.metrics.record import Record, Start, compare_log, read_record, seals
from unbroken.model import families
from unbroken.paths import Run, is_run_id, journal_of
from unbroken.run import locate
from unbroken.runtime import child_training
from unbroken.text import format_count, printable

if TYPE_CHECKING:
    from unbroken.checkpoint.reader import CheckpointFile

# Flags that the replay sets itself, or that do not change bits.
OWN = {
    *(*flags.ATTEMPT_ONLY, *flags.LOGGING, "name", "init_from"),
    *("save_every", "save_minutes", "keep_last", "keep_every", "mtbf_minutes", "grace_seconds", "elastic_ranks"),
} - {"on_extend"}
PRINT_SEAL = "print"
SHOWN = 20  # differences that are printed


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments: the run, the steps, the number of processes, the seal."""
    parser.add_argument("run", metavar="RUN", help="a run_id, its beginning, or a run's folder")
    parser.add_argument(
        "--from",
        dest="first",
        type=int,
        metavar="STEP",
        help="begin at the last checkpoint up to this step (default: the earliest)",
    )
    parser.add_argument(
        "--to",
        dest="last",
        type=int,
        metavar="STEP",
        help="end at the last save up to this step (default: the last save)",
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=0,
        metavar="N",
        help="processes (default: as many as the run had, if there are enough cores or GPUs, else 1)",
    )
    parser.add_argument(
        "--seal",
        nargs="?",
        const=PRINT_SEAL,
        default="",
        metavar="HASH",
        help="compute nothing again: print the hash that commits to the journal so far, or check HASH",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_model_file(parser)


@dataclass(frozen=True)
class Difference:
    """A difference between the record and the audit; `bit` is counted from the lowest bit of the element."""

    step: int | None
    said: str
    tensor: str = ""
    element: int | None = None
    bit: int | None = None


@dataclass
class Verdict:
    """A verdict of an audit."""

    run_id: str
    seal: str = ""
    first: int = 0
    last: int = 0
    processes: int = 0
    losses: int = 0
    saves: list[int] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, step: int | None, said: str, **where: Any) -> None:
        """Add a difference."""
        self.differences.append(Difference(step, said, **where))


def run(args: argparse.Namespace) -> int:
    """Audit, and print the verdict. Return 0 if everything is the same, else 1."""
    folder = locate.find_run_folder(args.run)
    if folder is None:
        raise UserError(f"{printable(args.run)}: it is no run; audit needs a run_id or a run's folder")
    if args.processes < 0 or min(args.first or 0, args.last or 0) < 0:
        raise UserError("--processes, --from and --to must not be negative")
    log = locate.find_logs([args.run])[0]
    if not is_run_id(log.stem):
        raise UserError(f"{printable(log.name)}: it is not named by a run_id")
    record, verdict = read_record(journal_of(log)), Verdict(log.stem)
    if args.seal:
        _check_seal(log, args.seal, verdict)
    files = _examine(folder, record, verdict, args.first or 0, math.inf if args.last is None else args.last)
    verdict.differences += [Difference(None, line) for line in compare_log(log, record)]
    if not args.seal:
        Replay(folder, record, files, verdict, args).run()
    _print(verdict, args)
    return 1 if verdict.differences else 0


# ---- the seal, the files, the log ------------------------------------------------------------------------------------


def _check_seal(log: Path, seal: str, verdict: Verdict) -> None:
    """Compute the seal of the whole journal; if a seal is given, find the line after which it was made."""
    if seal != PRINT_SEAL and not re.fullmatch(r"[0-9a-f]{64}", seal):
        raise UserError("--seal: it must be 64 hexadecimal digits, as `audit RUN --seal` prints them")
    journal, sealed, whole = journal_of(log), 0, 0
    for number, verdict.seal in enumerate(seals(journal), 1):
        sealed, whole = (number if verdict.seal == seal else sealed), number
    verdict.notes.append(
        f"{journal.name}: {format_count(whole, 'line')}" + (f", {sealed:,} of them under the seal" if sealed else "")
    )
    if seal != PRINT_SEAL and not sealed:
        verdict.add(None, f"{journal.name}: no line has this seal: what was before it was changed, cut or replaced")


@dataclass(frozen=True)
class Kept:
    """A checkpoint of the run, and whether its checksums are right and its digest is that of the journal."""

    path: Path
    sound: bool


def _examine(folder: Path, record: Record, verdict: Verdict, first: int, last: float) -> dict[int, Kept]:
    """Read the checkpoints from the one before `first` on, compare them with the journal; return them by step."""
    kept: dict[int, Kept] = {}
    entries = directory.list_checkpoints(folder)
    begin = max((entry.step for entry in entries if entry.step is not None and entry.step <= first), default=0)
    for entry in entries:
        if entry.step is not None and not begin <= entry.step <= last:
            continue
        try:
            with directory.open_file(entry.path) as file:
                step = int(file.values["step"])
                wrong = [Difference(step, f"{entry.path.name}: {line}") for line in file.verify()]
                wrong = wrong or _against_journal(file, step, record)
        except UserError as error:
            verdict.add(entry.step, f"{error}".removeprefix(f"{folder}/"))
            continue
        verdict.differences += wrong
        if step not in kept or not kept[step].sound:
            kept[step] = Kept(entry.path, not wrong)
    return kept


def _against_journal(file: CheckpointFile, step: int, record: Record) -> list[Difference]:
    """Return the differences between a checkpoint and the digest that the journal has of it, if it has one."""
    known, digest = record.digests.get(step), file.digest()
    if known is None:
        return []
    if known["tensors"] != digest.tensors:
        return [_compare_digests(file, known, f"{file.path.name} and the journal")]
    if digest.pickle not in record.pickles[step]:
        return [Difference(step, f"{file.path.name}: its values (args, progress, code) are not those that were saved")]
    return []


def _compare_digests(file: CheckpointFile, known: dict[str, Any], who: str) -> Difference:
    """Return the first tensor of a file whose CRC-32 is not that of a digest."""
    from unbroken.checkpoint.format.digest import unpack_crcs

    names, ours, step = [name for name, _ in file.stored()], unpack_crcs(file.digest().crcs), int(file.values["step"])
    theirs = unpack_crcs(known["crcs"])
    if len(theirs) != len(ours):
        return Difference(step, f"{who} have different tensors")
    differing = [name for name, a, b in zip(names, ours, theirs, strict=True) if a != b]
    if not differing:
        return Difference(step, f"{who} have different names, shapes or digests of tensors")
    return Difference(step, f"{who}: {differing[0]}{_and_more(differing)} differs", tensor=differing[0])


def _and_more(names: Sequence[str]) -> str:
    return f" and {len(names) - 1} more tensors" if len(names) > 1 else ""


# ---- the replay ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Leg:
    """A leg of the replay: one training from `start` to the last of `stops`, with the flags of an attempt."""

    start: int
    stops: tuple[int, ...]
    attempt: Start

    @property
    def save_every(self) -> int:
        return math.gcd(*self.stops)


def plan_legs(first: int, stops: Sequence[int], starts: Sequence[Start]) -> list[Leg]:
    """Return the trainings that save exactly at the steps `stops`, all of which come after `first`.

    A training saves at the multiples of a number. Where the run changed flags, the replay changes them, too.
    """
    legs, left = list[Leg](), sorted(stops)
    while left:
        attempt = [each for each in starts if each.step <= first][-1]
        later = next((each.step for each in starts if each.step > first and _flags(each) != _flags(attempt)), None)
        limit = left[-1] if later is None else later
        count = 1
        while count < len(left) and left[count] <= limit and _hits_only(first, left[: count + 1]):
            count += 1
        legs.append(Leg(first, tuple(left[:count]), attempt))
        first, left = left[count - 1], left[count:]
    return legs


def _hits_only(first: int, stops: Sequence[int]) -> bool:
    every = math.gcd(*stops)
    return stops[-1] // every - first // every == len(stops)


def _flags(start: Start) -> dict[str, Any]:
    """Return the flags of an attempt that may change bits."""
    return {name: value for name, value in start.args.items() if name in flags.FIELDS and name not in OWN}


class Replay:
    """A replay of a run in a temporary folder; the run's own folder is only read.

    Args:
        folder: The run's folder.
        record: The content of its journal.
        kept: Its checkpoints by step.
        verdict: Gets the differences.
        args: The flags of the tool.
    """

    def __init__(
        self, folder: Path, record: Record, kept: dict[int, Kept], verdict: Verdict, args: argparse.Namespace
    ) -> None:
        self._folder, self._record, self._kept, self._verdict = folder, record, kept, verdict
        self._quiet, self._differs = bool(args.json), False
        steps = {*record.digests, *(step for step, each in kept.items() if each.sound)}
        last = max((step for step in steps if args.last is None or step <= args.last), default=0)
        if last <= (args.first or 0):
            where = f"after step {args.first or 0}" + ("" if args.last is None else f" up to step {args.last}")
            raise UserError(f"there is no save {where} to compare with; choose other --from and --to")
        self._first = self._begin(args.first or 0, last, args.first is None)
        stops = {step for step in steps if self._first < step <= last}
        stops |= {b.step for a, b in pairwise(record.starts) if self._first < b.step < last and _flags(a) != _flags(b)}
        self._legs = plan_legs(self._first, sorted(stops), record.starts)
        self._processes = args.processes or self._usual_processes()
        self._done = self._first
        verdict.first, verdict.last, verdict.processes = self._first, max(stops), self._processes

    def _begin(self, wanted: int, last: int, earliest: bool) -> int:
        """Return the step to begin at: of the last checkpoint up to `wanted`, or of the earliest there is."""
        record = self._record
        begins = {step for step, each in self._kept.items() if each.sound and step < last}
        if record.starts and record.starts[0].step == 0 and not record.starts[0].args.get("init_from"):
            begins.add(0)
        if not record.starts:
            raise UserError("the journal has no start of an attempt, which has the flags: it cannot be computed again")
        begins = {step for step in begins if step >= record.starts[0].step}
        fitting = begins if earliest else {step for step in begins if step <= wanted}
        if not fitting:
            raise UserError(
                f"there is nothing to begin from: no sound checkpoint before step {last if earliest else wanted + 1}"
            )
        return min(fitting) if earliest else max(fitting)

    def _usual_processes(self) -> int:
        """Return the number of processes that the run had, if this machine has as many GPUs or cores; else 1."""
        import torch

        had = self._legs[0].attempt.environment.get("world_size")
        here = torch.cuda.device_count() or (os.cpu_count() or 1)
        return had if type(had) is int and 0 < had <= here else 1

    def run(self) -> None:
        """Do the trainings and compare; stop at the first difference."""
        with tempfile.TemporaryDirectory(prefix="unbroken-audit-") as name:
            place = Path(name)
            self._own = Run(self._verdict.run_id, "", place / "logs" / self._verdict.run_id)
            self._own.folder.mkdir(parents=True)
            if self._first:
                self._warn_of_sources(self._kept[self._first].path)
                shutil.copyfile(self._kept[self._first].path, self._checkpoint(self._first))
            for leg in self._legs:
                if not self._quiet:
                    count = format_count(self._processes, "process")
                    print(
                        f"  computing steps {leg.start + 1} to {leg.stops[-1]} on {count}", file=sys.stderr, flush=True
                    )
                self._compute(leg, place)
                if self._differs:
                    return

    def _checkpoint(self, step: int) -> Path:
        return self._own.folder / checkpoint_name(step)

    def _warn_of_sources(self, path: Path) -> None:
        from unbroken.runtime import environment

        with directory.open_file(path) as file:
            saved, code = file.values["sources"], file.values["code"]
        now = child_training.SCRIPT.read_text("utf-8")
        self._verdict.notes += environment.sources_drift(saved, environment.read_sources(), code, now)

    def _compute(self, leg: Leg, place: Path) -> None:
        """Do one training, and compare at each of its saves."""
        left = list(leg.stops)

        def heard(line: str) -> bool:
            if "bits may differ" in line and "source changed" not in line:
                self._verdict.notes.append(line.removeprefix("WARNING: "))
            if " was not saved: " in line:
                raise UserError(f"the replay needs space in {tempfile.gettempdir()}: {line.removeprefix('WARNING: ')}")
            if line.startswith("saved "):
                self._compare_saved(left)
            return not left or self._differs

        child_training.train(list(self._typed(leg)), self._processes, place, heard=heard)
        self._compare_saved(left)
        if left and not self._differs:
            raise UserError(
                f"the replay ended before step {left[0]}: the flags in the journal are not those of the run"
            )

    def _typed(self, leg: Leg) -> Iterator[str]:
        """Yield the command line: the flags of the attempt, for another folder."""
        values = _flags(leg.attempt)
        if "model" in values:  # the journal cannot name code that is run
            values["model"] = families.long_name(families.short_name(str(values["model"])))
        environment = leg.attempt.environment
        for name in ("input_bin", "input_val_bin"):
            if values.get(name):
                typed = str(values[name])
                several = name == "input_bin"
                values[name] = sources.map_globs(typed, absolute_glob) if several else absolute_glob(typed)
        if leg.start:
            values["resume_from"] = str(self._checkpoint(leg.start).relative_to(self._own.folder.parent.parent))
        else:
            values |= {"run_id": self._verdict.run_id, "resume_from": "auto", "threads": environment.get("threads", 0)}
            values |= {"dtype": environment.get("dtype", "auto"), **self._elastic_ranks()}
            values["compile"] = "on" if environment.get("compile") else "off"
        values |= {"save_every": leg.save_every, "keep_last": 0}
        values |= {"keep_best": 0, "save_steps": "", "save_weights_every": 0}
        for name, value in values.items():
            flags.check_value(name, value)
            word = str(flags.display_value(name, value))
            yield from [f"--{name}" if value else f"--no-{name}"] if isinstance(value, bool) else [f"--{name}", word]

    def _elastic_ranks(self) -> dict[str, Any]:
        """Return the flag if it was typed when the run began, which splits microbatches; config.yaml has it then."""
        path = self._folder / "config.yaml"
        known = flags.load_yaml(str(path)) if path.is_file() else {}
        return {name: known[name] for name in ("elastic_ranks",) if name in known}

    def _compare_saved(self, left: list[int]) -> None:
        """Compare the saves that are in the replay's journal so far, and remove them from `left`."""
        own = read_record(journal_of(self._own.log))
        while left and left[0] in own.digests and not self._differs:
            step = left.pop(0)
            self._compare_losses(step, own)
            self._compare_state(step, own)
            self._done = step
            self._remove_before(step)

    def _compare_losses(self, last: int, own: Record) -> None:
        """Compare the losses since the last comparison; validation losses only if both runs have one."""
        ours, theirs = own.losses, self._record.losses
        for kind, step in sorted(ours.keys() | theirs.keys(), key=lambda key: key[1]):
            a, b = theirs.get((kind, step)), ours.get((kind, step))
            if not self._done < step <= last or (kind == "val" and None in (a, b)):
                continue
            if repr(a) != repr(b):
                what = "validation loss" if kind == "val" else "loss"
                self._verdict.add(step, f"{what} {a!r} in the journal, {b!r} computed")
                self._differs = True
                return
            self._verdict.losses += kind == "trn"

    def _compare_state(self, step: int, own: Record) -> None:
        """Compare the state with the journal's digest, and with the run's checkpoint, also if that is damaged."""
        known, found, bit = self._record.digests.get(step), None, None
        with directory.open_file(self._checkpoint(step)) as file:
            if known is not None and known["tensors"] != own.digests[step]["tensors"]:
                found = _compare_digests(file, known, "journal and replay")
            if step in self._kept:
                with directory.open_file(self._kept[step].path) as kept:
                    bit = _first_bit(kept, file, step)
        self._differs |= found is not None or (known is None and bit is not None)
        self._verdict.differences += [each for each in (found, bit) if each is not None]
        self._verdict.saves += [step] if known is not None or step in self._kept else []

    def _remove_before(self, step: int) -> None:
        """Remove the replay's checkpoints that are no longer needed."""
        for old in directory.periodic_steps(self._own.folder):
            if old < step:
                self._checkpoint(old).unlink()


def _first_bit(kept: CheckpointFile, replayed: CheckpointFile, step: int) -> Difference | None:
    """Return the first bit of the tensors in which two checkpoints differ; None if they are equal."""
    from unbroken.commands.diff import compare

    ours, differing = dict(replayed.stored()), list[tuple[str, int, int, str]]()
    for name, stored in kept.stored():
        if name not in ours or (ours[name].shape, ours[name].dtype) != (stored.shape, stored.dtype):
            return Difference(step, f"{kept.path.name} and replay have different tensors: {name}", tensor=name)
        a, b = kept.tensor(stored, verify=False), replayed.tensor(ours[name])
        row = compare(name, a, b)
        if row.first is not None:
            x, y = (_bits(each.reshape(-1)[row.first]) for each in (a, b))
            bit = ((x ^ y) & -(x ^ y)).bit_length() - 1
            values = (
                f"{a.reshape(-1)[row.first].item()!r} in {kept.path.name}, {b.reshape(-1)[row.first].item()!r} computed"
            )
            differing.append((name, row.first, bit, values))
    if not differing:
        return None
    name, element, bit, values = differing[0]
    more = _and_more([each[0] for each in differing])
    return Difference(step, f"{name} at element {element:,}, bit {bit}: {values}{more}", name, element, bit)


def _bits(element: Any) -> int:
    """Return the bits of a tensor of one element as a number."""
    import torch

    return int.from_bytes(bytes(element.reshape(1).contiguous().view(torch.uint8).tolist()), "little")


def _print(verdict: Verdict, args: argparse.Namespace) -> None:
    if args.json:
        print(console.to_json({"match": not verdict.differences, **dataclasses.asdict(verdict)}))
        return
    for note in dict.fromkeys(verdict.notes):
        print(f"note: {printable(note, 4096)}")
    if verdict.processes:
        saves = ", ".join(f"{step:,}" for step in verdict.saves)
        print(
            f"run {verdict.run_id}: steps {verdict.first + 1:,} to {verdict.last:,} computed again; {verdict.losses:,}"
            f" losses and the states of step {saves or 'none'} compared"
        )
    if args.seal:
        print(f"seal {verdict.seal}")
    for each in verdict.differences[:SHOWN]:
        print(f"  {'' if each.step is None else f'step {each.step}: '}{printable(each.said, 4096)}")
    if len(verdict.differences) > SHOWN:
        print(f"  and {len(verdict.differences) - SHOWN} more")
    print(console.colored("DIFFERS", console.RED) if verdict.differences else console.colored("MATCH", console.GREEN))
