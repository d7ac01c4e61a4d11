"""Faults of all kinds, at random and reproducibly, in real trainings that must end as if nothing had happened.

    python -m tests.chaos [--minutes 60] [--faults N] [--seed 1] [--lanes 2] [--only KIND ...] [--courses NAME ...]

Each lane trains one course after the other, with one random fault after the other, restarted by the same command line;
at its end a run is compared, bit for bit, with the same run that nothing has happened to. After a violation the lane
goes on with its next course. The table at the end counts the faults by kind; exit code 1: a promise was broken.
`--seed` repeats the order of the faults and their parameters; the instants depend on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.chaos.faults import FAULTS, OF_COURSES, OF_RANKS
from tests.chaos.lane import Course, Injected, Lane, Violation
from tests.chaos.storage import Rules, shim
from tests.chaos.trainings import COURSES
from tests.harness import train

ALL = {**FAULTS, **OF_COURSES}


def main(typed: list[str]) -> int:
    args = parse(typed)
    if shim() is None:
        print("error: the faults of the storage need a C compiler; install gcc", file=sys.stderr)
        return 2
    place = Path(args.folder or tempfile.mkdtemp(prefix="chaos-"))
    if args.lane is not None:
        return run_lane(place / f"lane{args.lane}", args)
    began = time.monotonic()
    before = shared_memory()
    command = [sys.executable, "-m", "tests.chaos", *typed, "--folder", str(place), "--lane"]
    lanes = [subprocess.Popen([*command, str(lane)]) for lane in range(args.lanes)]
    codes = [lane.wait() for lane in lanes]
    results = [json.loads((place / f"lane{lane}/result.json").read_text()) for lane in range(args.lanes)]
    print(table(results, time.monotonic() - began))
    left = shared_memory() - before
    if left:
        print(f"left in shared memory: {sorted(left)}")
    if not args.keep:
        shutil.rmtree(place, ignore_errors=True)
    return 1 if any(codes) or left else 0


def shared_memory() -> set[str]:
    """The segments of shared memory, without multiprocessing's semaphores: the program has none, other tests do."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith("sem.mp-")}


def parse(typed: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=60.0, help="no more faults after so many minutes")
    parser.add_argument("--faults", type=int, default=10**9, help="or after so many faults of a lane")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--lanes", type=int, default=2, help="runs at a time")
    parser.add_argument("--only", nargs="+", metavar="KIND", help="kinds that contain one of these words")
    parser.add_argument("--courses", nargs="+", choices=[course.name for course in COURSES])
    parser.add_argument("--keep", action="store_true", help="leave the folders of the runs")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--lane", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(typed)


def run_lane(place: Path, args: argparse.Namespace) -> int:
    """One lane, in a process of its own; its result goes to result.json."""
    place.mkdir(parents=True)
    library = shim()
    assert library is not None
    rules = Rules(place / "rules")
    os.environ.update(rules.environment(library))  # for the server of forks, too
    dice = random.Random(1000 * args.seed + args.lane)
    deadline = time.monotonic() + 60 * args.minutes
    courses = [course for course in COURSES if not args.courses or course.name in args.courses]
    courses = courses[args.lane % len(courses) :] + courses[: args.lane % len(courses)]
    straight: dict[str, Path] = {}
    faults: list[Injected] = []
    violations: list[str] = []
    finished: list[str] = []
    decks: dict[str, Iterator[str]] = {}
    while time.monotonic() < deadline and len(faults) < args.faults:
        course = courses[len(finished) % len(courses)]
        if course.name not in straight:
            straight[course.name] = unbroken_run(course, place / f"straight-{course.name}")
        deck = decks.setdefault(course.name, shuffled(kinds_of(course, args.only), dice))
        folder = place / f"{course.name}-{len(finished)}"
        lane, before = Lane(course, folder, straight[course.name], rules, dice), len(violations)
        try:
            while not lane.finished and time.monotonic() < deadline and len(faults) + len(lane.injected) < args.faults:
                kind = next(deck)
                lane.inject(kind, ALL[kind])
            lane.finish()
        except Exception as error:
            text = str(error) if isinstance(error, (Violation, AssertionError)) else traceback.format_exc()
            violations.append(text)
            print(f"VIOLATION in lane {args.lane}: {text}", flush=True)
        faults += lane.injected
        finished.append(course.name)
        done = f"lane {args.lane}: {course.name}, {lane.attempts} attempts, {len(lane.injected)} faults"
        print(f"{done}, {len(faults)} in all, {len(violations)} violations", flush=True)
        lane.end()
        if len(violations) > before and args.keep:
            folder.rename(place / f"violation{len(violations)}")
        shutil.rmtree(folder, ignore_errors=True)
    result = {"faults": [asdict(fault) for fault in faults], "violations": violations, "runs": finished}
    (place / "result.json").write_text(json.dumps(result))
    return 1 if violations else 0


def kinds_of(course: Course, only: list[str] | None) -> list[str]:
    """The kinds of faults that a course can have."""
    most = max(processes or 1 for processes in course.processes)
    kinds = [kind for kind in FAULTS if most > 1 or kind not in OF_RANKS]
    kinds += 3 * list(course.kinds)
    return [kind for kind in kinds if not only or any(word in kind for word in only)]


def shuffled(kinds: list[str], dice: random.Random) -> Iterator[str]:
    """All kinds in a random order, again and again."""
    while True:
        yield from dice.sample(kinds, len(kinds))


def unbroken_run(course: Course, folder: Path) -> Path:
    """The same course without a fault, all of whose checkpoints stay."""
    folder.mkdir()
    course.corpus(folder)
    train(folder, {**course.typed, "keep_last": 0}, processes=None, script=course.script, env=course.env)
    return folder


def table(results: list[dict[str, Any]], seconds: float) -> str:
    """What was injected, by kind, and what became of it."""
    faults = [Injected(**fault) for result in results for fault in result["faults"]]
    runs = Counter(name for result in results for name in result["runs"])
    lines = [
        "| fault | injected | attempts ended | seconds it took | until it trained again | steps lost |",
        "|---|---|---|---|---|---|",
    ]
    for kind in ALL:
        if these := [fault for fault in faults if fault.kind == kind]:
            back = spread([fault.back for fault in these if fault.back is not None], "1f")
            lost = spread([fault.lost for fault in these if fault.lost is not None], "0f")
            took, ended = spread([fault.took for fault in these], "1f"), sum(fault.ended for fault in these)
            lines.append(f"| {kind} | {len(these)} | {ended} | {took} | {back} | {lost} |")
    ended, kinds = sum(fault.ended for fault in faults), len({fault.kind for fault in faults})
    broken = sum(len(result["violations"]) for result in results)
    said = f"{len(faults)} faults of {kinds} kinds in {seconds / 60:.1f} minutes, {ended} of them ended an attempt; "
    said += f"{sum(runs.values())} runs ({', '.join(f'{count} {name}' for name, count in sorted(runs.items()))}), "
    return "\n".join([*lines, "", f"{said}{broken} violations"])


def spread(values: list[float], digits: str) -> str:
    """Median and maximum."""
    return f"{statistics.median(values):.{digits}}, at most {max(values):.{digits}}" if values else ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
