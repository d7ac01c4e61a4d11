"""`python -m unbroken ls`: list runs and their checkpoints."""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unbroken import console
from unbroken.checkpoint import directory
from unbroken.checkpoint.format.schema import FINAL, dict_at
from unbroken.errors import UserError
from unbroken.metrics.logfile import LoggedLosses, read_log
from unbroken.metrics.timeline import RunStatus, read_status
from unbroken.paths import as_typed, logs_dir, name_of, with_logs_dir
from unbroken.run import locate
from unbroken.run.lock import training_process
from unbroken.text import format_age, format_duration, format_size, printable

if TYPE_CHECKING:
    from unbroken.checkpoint.reader import CheckpointFile


@dataclass(frozen=True)
class Line:
    """A line for one checkpoint.

    Losses are those of its step, None if the log lacks them. `size` in bytes, `age` in seconds. `whole`: None if only
    structure and size were checked. `best`: whether it is the one that `RUN/best` names.
    """

    file: str
    step: int | None
    loss: float | None
    val: float | None
    size: int
    age: float
    whole: bool | None
    damage: str
    best: bool


@dataclass(frozen=True)
class Listing:
    """A run with its checkpoints, oldest first, and its files of weights alone.

    The other fields come from its newest readable checkpoint and the end of its journal. `trained_by`: the process of
    this machine that trains it, and `seconds_left` until its end. `ended`: how it ended, if that is recorded.
    """

    run_id: str
    name: str
    model: str
    num_iterations: int | None
    parent: str
    step: int | None
    loss: float | None
    tok_per_s: float | None
    last_sign: float | None
    trained_by: str
    seconds_left: float | None
    ended: str
    checkpoints: list[Line]
    weights: list[Line]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments: all runs, or some."""
    parser.add_argument("what", nargs="*", metavar="RUN", help="run_ids, names or run folders (default: all of them)")
    parser.add_argument("--check", action="store_true", help="verify every checksum too, which reads every byte")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the list, with the run that saved last at the bottom."""
    folders = [folder for text in args.what for folder in _folders(text)] or directory.list_runs(logs_dir())
    listings = sorted((look(folder, args.check) for folder in folders), key=_last_save)
    if args.json:
        print(console.to_json({"runs": [asdict(listing) for listing in listings]}))
        return 0
    if not listings:
        print(f"no runs under {logs_dir()}/ yet; start one with: {with_logs_dir(as_typed('python train_gpt2_mod.py'))}")
        return 0
    print("\n\n".join(_shown(listing) for listing in listings))
    if any(line.whole is None and not line.damage for listing in listings for line in listing.checkpoints):
        print(console.colored("\nnot verified: structure and size match; --check reads every byte", console.DIM))
    return 0


def _folders(text: str) -> list[Path]:
    """Return the run, or the runs in a folder of runs."""
    folder = locate.find_run_folder(text)
    if folder is not None and (locate.run_id_of(folder) or directory.list_checkpoints(folder)):
        return [folder]
    found = directory.list_runs(folder) if folder is not None else []
    if not found:
        raise UserError(f"{printable(text)}: not a run; give a run_id or the folder of a run")
    return found


def _last_save(listing: Listing) -> float:
    return -min((line.age for line in listing.checkpoints), default=math.inf)


def look(folder: Path, check: bool = False) -> Listing:
    """Return the listing of a run; a damaged checkpoint is listed as such."""
    lines: list[Line] = []
    newest: dict[str, Any] = {}
    log = locate.log_in_folder(folder)
    losses = None
    for found in directory.list_checkpoints(folder):
        values, damage = _open(found.path, check)
        if values is not None:
            newest = values
            losses = losses or _read_losses(log)
        try:
            lines.append(_line(found, values, damage, check, losses or ({}, {})))
        except FileNotFoundError:
            continue  # the run is being trained, and has given it up meanwhile
    best = directory.find_best(folder, newest)
    lines = [replace(line, best=best is not None and line.file == best.name) for line in lines]
    args, parent = dict_at(newest, "args"), dict_at(dict_at(newest, "progress"), "parent")
    words = read_status(log) if log else RunStatus()
    iterations = args.get("num_iterations") if words.num_iterations is None else words.num_iterations
    iterations = iterations if type(iterations) is int else None
    trained_by, left = training_process(folder), None
    if trained_by and iterations is not None and words.step and words.tokens and words.tok_per_s:
        left = max(0, iterations - words.step) * words.tokens / words.step / words.tok_per_s
    last = lines[-1] if lines else None
    reached = last.step if last and last.file == FINAL else None
    at_end = reached is not None and iterations is not None and reached >= iterations
    return Listing(
        folder.name,
        name_of(folder),
        printable(args.get("model", "")),
        iterations,
        printable(f"{parent.get('run_id')} at step {parent.get('step')}") if parent else "",
        words.step,
        words.loss,
        words.tok_per_s,
        words.wall,
        trained_by,
        left,
        printable(words.end) or ("finished" if at_end else ""),
        lines,
        _weights_lines(folder, check, losses or _read_losses(log)),
    )


def _weights_lines(folder: Path, check: bool, losses: tuple[dict[int, float], dict[int, float]]) -> list[Line]:
    """Return a line for each file of weights alone; unless `check`, none of them is opened, as there may be many."""
    found = directory.list_weights(folder)
    return [_line(entry, None, _open(entry.path, True)[1] if check else "", check, losses) for entry in found]


def _open(path: Path, check: bool) -> tuple[dict[str, Any] | None, str]:
    """Return (values, what is wrong); values is None if the file cannot be opened."""
    try:
        with directory.open_file(path) as file:
            damages = file.verify() if check else []
            values = file.values if file.is_ours or "optimizer" not in file.values else _foreign(file)
            return values, damages[0] if damages else ""
    except UserError as error:
        return None, str(error).removeprefix(f"{printable(path, 4096)}: ")


def _foreign(file: CheckpointFile) -> dict[str, Any]:
    """Return the values of a checkpoint of the earlier program, with the step as this program counts it."""
    from unbroken.run import legacy

    try:
        return {**file.values, "step": legacy.count_updates(file)}
    except UserError:
        return file.values


def _read_losses(log: Path | None) -> tuple[dict[int, float], dict[int, float]]:
    """Return (training, validation) losses by step, as far as there is a log."""
    try:
        losses = read_log(log) if log else LoggedLosses()
    except UserError:
        losses = LoggedLosses()
    return dict(losses.train), dict(losses.val)


def _line(
    found: directory.CheckpointEntry,
    values: dict[str, Any] | None,
    damage: str,
    check: bool,
    losses: tuple[dict[int, float], dict[int, float]],
) -> Line:
    size = found.path.stat().st_size
    age = time.time() - directory.saved_at(values or {}, found.path)
    step = values.get("step") if values else found.step
    step = step if type(step) is int else found.step
    whole = False if damage else True if check else None
    loss, val = (None if step is None else known.get(step) for known in losses)
    if loss is None:  # with --log_every
        known_loss = dict_at(dict_at(values or {}, "progress"), "history").get("loss")
        loss = known_loss if isinstance(known_loss, float) else None
    return Line(found.path.name, step, loss, val, size, age, whole, damage, best=False)


def _shown(listing: Listing) -> str:
    facts = [
        listing.name,
        listing.model,
        f"{listing.num_iterations} iterations" if listing.num_iterations is not None else "",
    ]
    facts.append(f"forked from {listing.parent}" if listing.parent else "")
    head = console.colored(f"run {listing.run_id}", console.BOLD) + "".join(f"  {fact}" for fact in facts if fact)
    head += f"\n  {_state(listing)}" if listing.last_sign is not None else ""
    if listing.weights:
        weights, steps = listing.weights, [line.step for line in listing.weights]
        damaged = "".join(f"\n  {line.file}: {_wholeness(line)}" for line in weights if line.damage)
        size = format_size(sum(line.size for line in weights))
        tail = (
            f"\n  {len(weights)} of weights alone, weights_step*.pt, steps {steps[0]} to {steps[-1]}, {size}{damaged}"
        )
    else:
        tail = ""
    if not listing.checkpoints:
        return head + "\n  no checkpoints yet" + tail
    rows = []
    for line in listing.checkpoints:
        step = "?" if line.step is None else str(line.step)
        losses = ["" if loss is None else f"{loss:.6f}" for loss in (line.loss, line.val)]
        rows.append(
            (
                f"  {line.file}{' = best' if line.best else ''}",
                step,
                *losses,
                format_size(line.size),
                format_age(line.age),
                _wholeness(line),
            )
        )
    heads = ("  file", "step", "loss", "val", "size", "age", "whole?")
    return f"{head}\n{console.format_table(heads, rows, ' rrrrr')}{tail}"


def _state(listing: Listing) -> str:
    """Return the state of a run in words: its step, loss, speed, and whether it is running."""
    said = [f"step {listing.step}" + (f" of {listing.num_iterations}" if listing.num_iterations is not None else "")]
    said += [f"loss {listing.loss:.6f}"] if listing.loss is not None else []
    if listing.trained_by:
        said += [f"{listing.tok_per_s:,.0f} tok/s"] if listing.tok_per_s is not None else []
        said += [f"{format_duration(listing.seconds_left)} left"] if listing.seconds_left is not None else []
        return " · ".join([*said, console.colored(f"running, {listing.trained_by}", console.GREEN)])
    ago = format_age(time.time() - listing.last_sign) if listing.last_sign is not None else ""
    ended = listing.ended or "no end recorded (killed, or running on another machine)"
    return " · ".join([*said, f"{ended}, {ago} ago"])


def _wholeness(line: Line) -> str:
    if line.damage:
        return console.colored(f"NO: {line.damage}", console.RED)
    return console.colored("yes", console.GREEN) if line.whole else "not verified"
