"""What is recorded: trainings that are killed, resumed, extended and taken back, and somebody else's training loop."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests import harness
from tests.chaos import storage
from tests.chaos.crash_model import HEAD, MARK, Call, Disk, File, read_calls, scan, tree
from tests.chaos.storage import Calls
from tests.harness import RUN_ID, SCRIPT, arguments, launch, trained_bits, write_corpus
from tests.storage import tool
from unbroken.checkpoint.format import schema
from unbroken.metrics.logfile import events
from unbroken.metrics.record import read_record
from unbroken.paths import JOURNAL

MIRROR = "elsewhere/runs"


@dataclass
class Phase:
    """What is started until it ends by itself, and started again after a cut: `typed` with `--resume_from auto`."""

    typed: list[str]
    processes: int | None = None
    back_to: int | None = None  # it goes back to this step first
    script: Path = SCRIPT

    def typed_in(self, root: Path) -> list[str]:
        """Return the command for a tree: ROOT stands for its folder."""
        return [word.replace("ROOT", str(root)) for word in self.typed]


@dataclass
class Course:
    """Phases, each with the kills in it: (calls, part of the path, kind of kill, calls to let through first)."""

    name: str
    phases: list[Phase]
    kills: list[list[tuple[Calls, str, int, int]]]
    home: str = f"logs/{RUN_ID}"
    log: str = f"logs/{RUN_ID}/{RUN_ID}.log"
    asks: bool = False  # `unbroken save` while it trains
    name_link: str = ""  # what `--name` gave


@dataclass
class Reference:
    """What the same phases leave without a kill: after each of them the bits of `final.pt`, losses, and log lines."""

    finals: list[Any] = field(default_factory=list)
    losses: list[dict[tuple[str, int], float]] = field(default_factory=list)
    logged: list[dict[tuple[str, int], str]] = field(default_factory=list)
    lines: dict[tuple[str, int], set[str]] = field(default_factory=dict)


def auto(typed: dict[str, Any]) -> list[str]:
    return arguments({"resume_from": "auto", "run_id": RUN_ID, **typed})


def courses() -> list[Course]:
    """Return the courses, the shortest first."""
    library = Phase([], script=Path(__file__).with_name("library_loop.py"))
    torn, before, after = storage.KILL_TORN, storage.KILL_BEFORE, storage.KILL_AFTER
    kept = {"keep_last": 2, "save_every": 2, "warmup_iters": 0, "warmdown_iters": 0}
    best = {**kept, "val_loss_every": 2, "keep_best": 1, "save_weights_every": 4, "name": "probe"}
    eight, more = {**best, "num_iterations": 8}, {**best, "num_iterations": 12}
    back = {**more, "resume_from": f"logs/{RUN_ID}/model_step000010.pt", "learning_rate": 5e-3}
    away = {"num_iterations": 8, "save_every": 1, "keep_last": 1, "log_every": 3, "output_dir": "out/logs"}
    return [
        Course(
            "library",
            [library],
            [[(Calls.WRITE, "step000006", torn, 0), (Calls.RENAME, "step000010", after, 0)]],
            home="checkpoints",
            log="",
        ),
        Course(
            "one process",
            [Phase(auto(eight)), Phase(auto(more)), Phase(arguments({"run_id": RUN_ID, **back}), back_to=10)],
            [
                [(Calls.WRITE, ".model_step000006", torn, 1), (Calls.RENAME, ".final.pt.tmp", after, 0)],
                [(Calls.SYNC, ".model_step000010", before, 0)],
                [(Calls.RENAME, "overtaken-1", after, 0)],
            ],
            name_link="probe",
        ),
        Course(
            "two processes",
            [Phase(auto({**kept, "num_iterations": 10, "save_steps": "3,5"}), processes=2)],
            [[(Calls.RENAME, ".model_step000006", before, 0)]],
            asks=True,
        ),
        Course(
            "log elsewhere",
            [Phase(auto({**away, "logs_dir": "out/deep/runs"}))],
            [[(Calls.UNLINK, "model_step000004", after, 0)]],
            home=f"out/deep/runs/{RUN_ID}",
            log=f"out/logs/{RUN_ID}.log",
        ),
        Course(
            "mirror",
            [Phase(auto({**kept, "num_iterations": 8, "mirror": f"file://ROOT/{MIRROR}"}))],
            [[(Calls.RENAME, ".model_step000006", before, 0)]],
        ),
    ]


# ---- recording -------------------------------------------------------------------------------------------------------


@dataclass
class Recording:
    """The calls of a course below `root`, and what was there before."""

    course: Course
    root: str
    base: dict[str, Any]
    calls: list[Call]


def refer(course: Course, folder: Path) -> Reference:
    """Run a course without a kill."""
    reference, script = Reference(), course.phases[0].script
    folder.mkdir(parents=True)
    write_corpus(folder)
    for phase in course.phases:
        done = launch(folder, phase.typed_in(folder), phase.processes, script=phase.script).wait()
        assert done.code == 0, done.text
        reference.finals.append(final_bits(course, folder))
        if script == SCRIPT:
            losses, logged = history(course, folder)
            reference.losses.append(losses)
            reference.logged.append(logged)
            for event, line in logged.items():
                reference.lines.setdefault(event, set()).add(line)
    return reference


def final_bits(course: Course, folder: Path) -> Any:
    if not course.log:
        return harness.bits(torch.load(folder / course.home / "model_step000012.pt", weights_only=True))
    return trained_bits(folder / course.home / schema.FINAL)


def history(course: Course, folder: Path) -> tuple[dict[tuple[str, int], float], dict[tuple[str, int], str]]:
    """Return the losses of the journal, and the last line of each event in the log."""
    log = folder / course.log
    logged = {(kind, step): line for kind, step, line in events(log) if kind != "#"}
    return read_record(log.with_suffix(JOURNAL)).losses, logged


def record(course: Course, folder: Path, library: Path, script: Path | None = None) -> Recording:
    """Run a course with its kills in a new folder, recorded. `script`: in place of the program.

    Raises AssertionError if the record does not lead to the tree that is there at the end.
    """
    folder = folder.resolve()
    (folder / "run").mkdir(parents=True)
    root = folder / "run"
    write_corpus(root)
    base = scan(root)
    for number, phase in enumerate(course.phases):
        for kill in [*course.kills[number], None]:
            attempt(course, number, phase, kill, folder, library, script)
    calls = list(read_calls(folder / "record"))
    compare(course, root, base, calls)
    return Recording(course, str(root), base, calls)


def attempt(
    course: Course,
    number: int,
    phase: Phase,
    kill: tuple[Calls, str, int, int] | None,
    folder: Path,
    library: Path,
    script: Path | None,
) -> None:
    """Start a phase once, until it is killed or ends."""
    rules, root, recorded = storage.Rules(folder / "rules"), folder / "run", folder / "record"
    env = {**rules.environment(library), "CHAOS_RECORD": str(recorded), "CHAOS_ROOT": str(root)}
    if kill:
        calls, part, error, skip = kill
        rules.add(calls, root, part, error=error, skip=skip, times=1)
    mark(recorded, phase=number)
    asks = course.asks and not kill
    running = launch(
        root, phase.typed_in(root), phase.processes, env=env, script=script or phase.script, pace=0.3 if asks else 0.0
    )
    if asks:
        running.until(lambda: harness.last_step(root) >= 8)
        tool(root, "save", course.home, env=env)
    done = running.wait()
    assert (done.code != 0) == bool(kill), f"{course.name}, {kill}: exit code {done.code}\n{done.text}"
    mark(recorded, ended=done.code)


def compare(course: Course, root: Path, base: dict[str, Any], calls: list[Call]) -> None:
    """Check that the recorded calls lead to the tree that is there."""
    disk = Disk(str(root), base)
    for call in calls:
        if call.kind != MARK:
            disk.apply(call)
    nodes, found = tree(disk, None), scan(root)
    assert set(nodes) == set(found), f"{course.name}: the record differs in {set(nodes) ^ set(found)}"
    for path, (kind, _, value) in found.items():
        node = nodes[path]
        if kind == "file" and (not isinstance(node, File) or node.live() != value):
            raise AssertionError(f"{course.name}: {path} is not what the record says")


def mark(record: Path, **about: Any) -> None:
    """Append a record of this program's own."""
    text = json.dumps(about).encode()
    with open(record, "ab") as file:
        file.write(HEAD.pack(MARK, os.getpid(), 0, 0, 0, 0, len(text), 0, 0, 0) + text)
