"""Power cuts: record what trainings change on disk, lose every legal part of what is not durable, check what is left.

    python -m tests.chaos.powercut --states 20000 --resumes 60
    python -m tests.chaos.powercut --images 20

Trainings run with the recorder of shim.c (courses.py). Their calls are applied one by one to a model of a disk, which
tells after each what a power cut at this moment may leave (crash_model.py), and that is checked (checks.py).
`--images` takes the power from real filesystems instead (images.py).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pickle
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from tests.chaos import storage
from tests.chaos.checks import Checker, Outcome, Witness, command_again, is_whole, resume
from tests.chaos.courses import Course, Phase, Recording, Reference, attempt, compare, courses, record, refer
from tests.chaos.crash_model import MARK, SYNC_BEGINS, Disk, State, read_calls, scan, states, tree
from tests.chaos.images import KINDS, cut_image
from unbroken.checkpoint.format import schema
from unbroken.errors import UserError


def replay(
    recording: Recording,
    checker: Checker,
    budget: int,
    seed: str,
    chosen: Callable[[int, int, list[State]], None] = lambda cut, phase, there: None,
    only: int | None = None,
) -> Outcome:
    """Apply a recording call by call, and check what a cut after each may leave: `budget` states.

    `chosen` gets the number of the cut, the phase and the states; `only`: the number of the only cut that is checked.
    """
    disk = Disk(recording.root, recording.base)
    witness, seen, checked = Witness(recording.course, disk), set[int](), set[int]()
    if any(path.startswith(recording.course.home) for path in recording.base):  # of a start after a cut
        witness.phase = json.loads(recording.calls[0].path)["phase"]
        found = State(tree(disk, None), {}, True, "")
        for name, node in found.files(recording.course.home).items():
            if is_whole(name):
                witness.reported.add(node)
                witness.newest = max(witness.newest, schema.checkpoint_step(name) or -1)
        back_to = recording.course.phases[witness.phase].back_to
        witness.newest = witness.newest if back_to is None else min(witness.newest, back_to)
    outcome = Outcome(recording.course.name, len(recording.calls))
    for cut, call in enumerate(recording.calls):
        if call.kind != MARK:
            disk.apply(call)
        witness.see(call)
        if call.kind == SYNC_BEGINS or (only is not None and cut != only):
            continue
        there, kept = list(states(disk, budget, random.Random(f"{seed}/{cut}"))), witness.kept()
        outcome.cuts += 1
        for state in there:
            key = hash(state.key())
            outcome.states += key not in seen
            seen.add(key)
            promised = hash((key, witness.newest, *sorted(kept.values())))
            if promised in checked:
                continue
            checked.add(promised)
            for said in checker.check(state, witness, kept):
                outcome.add(said, cut, state)
        chosen(cut, witness.phase, there)
    return outcome


class Resumes:
    """Resumes a random sample of states, two at a time, and records some of them to be cut again.

    Args:
        recording: which states.
        reference: the run that was never cut.
        folder: for the trees; those of a broken promise stay.
        count: number of states to resume.
        rng: chooses.
    """

    def __init__(
        self, recording: Recording, reference: Reference, folder: Path, count: int, rng: random.Random
    ) -> None:
        self._recording, self._reference, self._folder, self._rng = recording, reference, folder, rng
        cuts = [cut for cut, call in enumerate(recording.calls) if call.kind != SYNC_BEGINS]
        self._cuts = set(rng.sample(cuts, min(count, len(cuts))))
        self._pool = ThreadPoolExecutor(2)
        self._jobs: list[tuple[int, State, Future[list[str]]]] = []

    def chosen(self, cut: int, phase: int, there: list[State]) -> None:
        if cut in self._cuts:
            state, folder = self._rng.choice(there), self._folder / str(cut)
            state.write(folder)
            job = self._pool.submit(self._resume, max(phase, 0), folder)
            self._jobs.append((cut, state, job))
            if len(self._jobs) > 4:
                self._jobs[-4][2].exception()  # not too many trees at a time

    def _resume(self, phase: int, folder: Path) -> list[str]:
        try:
            said = resume(self._recording.course, phase, folder, self._reference)
        except (AssertionError, OSError, UserError) as error:
            said = [f"resumed: {error}"]
        if not said:
            shutil.rmtree(folder)
        return said

    def add_to(self, outcome: Outcome) -> None:
        for cut, state, job in self._jobs:
            outcome.resumed += 1
            for said in job.result():
                outcome.add(f"resumed: {said}", cut, state)
        self._pool.shutdown()


def record_again(recording: Recording, cut: int, seed: str, folder: Path, library: Path) -> Recording:
    """Record the start after one of the states of a cut."""
    disk, phase = Disk(recording.root, recording.base), 0
    for call in recording.calls[: cut + 1]:
        if call.kind == MARK:
            phase = json.loads(call.path).get("phase", phase)
        else:
            disk.apply(call)
    rng = random.Random(f"{seed}/again/{cut}")
    rng.choice(list(states(disk, 40, rng))).write(folder / "run")
    base, course = scan(folder / "run"), recording.course
    again = Phase(
        command_again(course, phase, folder / "run"), course.phases[phase].processes, None, course.phases[phase].script
    )
    attempt(course, phase, again, None, folder, library, None)
    calls = list(read_calls(folder / "record"))
    compare(course, folder / "run", base, calls)
    return Recording(course, str(folder / "run"), base, calls)


# ---- the command -----------------------------------------------------------------------------------------------------

SAVED = "recording.pickle"
SPARSE = 3  # so many states that may be equal make one more
CUT_AGAIN = 3  # starts after a cut that are recorded and cut themselves, of each course


def run(course: Course, folder: Path, library: Path, aim: int, resumes: int, seed: str) -> list[Outcome]:
    """Record a course, cut it everywhere, and cut some starts after a cut again; `aim`: about so many states."""
    reference = refer(course, folder / "reference")
    recording, rng = record(course, folder, library), random.Random(f"{seed}/{course.name}")
    outcomes = [Outcome(course.name), Outcome(f"{course.name}, cut again")]

    def cut(recording: Recording, place: Path, aim: int, resumes: int) -> Outcome:
        (place / SAVED).write_bytes(pickle.dumps((recording, reference)))
        jobs = Resumes(recording, reference, place / "resumed", resumes, rng)
        budget = math.ceil(SPARSE * aim / len(recording.calls))
        found = replay(recording, Checker(course, reference, place / "scratch"), budget, seed, jobs.chosen)
        jobs.add_to(found)
        return found

    outcomes[0].include(cut(recording, folder, aim, resumes), folder)
    cuts = [number for number, call in enumerate(recording.calls) if call.kind not in (SYNC_BEGINS, MARK)]
    for number in sorted(rng.sample(cuts, CUT_AGAIN)):
        place = folder / f"again-{number}"
        again = record_again(recording, number, seed, place, library)
        outcomes[1].include(cut(again, place, aim // 10, resumes // 10), place)
    return outcomes


def describe(outcome: Outcome, seed: str) -> Iterator[str]:
    """Yield two lines for each broken promise: what and where, and the command that checks the cut again."""
    for violation in outcome.violations.values():
        kind = "journal" if violation.journal else "only what POSIX permits"
        where = f"{violation.times} states, {kind}; first at cut {violation.cut}: {violation.lost}"
        yield f"{outcome.course}: {violation.said} [{where}]"
        yield f"    python -m tests.chaos.powercut --again {violation.place} --cut {violation.cut} --seed {seed}"


def main(argv: Sequence[str]) -> int:
    """Print a table and the broken promises. Return 1 if there are any."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.powercut", description=__doc__.splitlines()[0])
    parser.add_argument("--states", type=int, default=20_000, help="about so many in all courses together")
    parser.add_argument("--resumes", type=int, default=60, help="states of each course that are resumed to the end")
    parser.add_argument("--seed", default="1")
    parser.add_argument("--course", action="append", help="only this one; may be repeated")
    parser.add_argument("--folder", type=Path, help="keep the recordings here; by default those with a broken promise")
    parser.add_argument(
        "--images", type=int, default=0, metavar="N", help="instead: N real cuts of ext4 and xfs; as root"
    )
    parser.add_argument("--again", type=Path, metavar="FOLDER", help="check a kept recording")
    parser.add_argument("--cut", type=int, help="with --again: only this cut, with 2,000 states")
    typed = parser.parse_args(argv)
    if typed.again:
        recording, reference = pickle.loads((typed.again / SAVED).read_bytes())
        checker = Checker(recording.course, reference, typed.again / "scratch")
        budget = 50 if typed.cut is None else 2000
        outcome = replay(recording, checker, budget, typed.seed, only=typed.cut)
        print(f"{outcome.states} states", *describe(outcome, typed.seed), sep="\n")
        return 1 if outcome.violations else 0
    library = storage.shim()
    if library is None:
        print("skipped: there is no C compiler for the recorder")
        return 0
    place = typed.folder or Path(tempfile.mkdtemp(prefix="powercut-"))
    print(f"{'course':32} {'calls':>6} {'cuts':>6} {'states':>7} {'resumed':>7} {'violations':>10} {'seconds':>7}")
    if typed.images:
        return _cut_images(typed.images, place, typed.seed)
    total, start = Outcome("all"), time.monotonic()
    due = [course for course in courses() if not typed.course or course.name in typed.course]
    for course in due:
        began, folder = time.monotonic(), place / course.name.replace(" ", "-")
        outcomes = run(course, folder, library, typed.states // len(due), typed.resumes, typed.seed)
        for outcome in outcomes:
            _print_row(outcome, time.monotonic() - began)
            for line in describe(outcome, typed.seed):
                print(line)
            total.include(outcome)
        if not typed.folder and not any(outcome.violations for outcome in outcomes):
            shutil.rmtree(folder)
    _print_row(total, time.monotonic() - start)
    if not typed.folder and not total.violations:
        shutil.rmtree(place)
    return 1 if total.violations else 0


def _cut_images(cuts: int, place: Path, seed: str) -> int:
    """Print a row for each filesystem that can be made and mounted here. Return 1 if a promise is broken."""
    code = 0
    for kind in KINDS:
        began = time.monotonic()
        if os.geteuid() or shutil.which(f"mkfs.{kind}") is None:
            print(f"{kind}: skipped, it takes root and mkfs.{kind}")
            continue
        outcome = cut_image(kind, place / kind, cuts, seed)
        _print_row(outcome, time.monotonic() - began)
        for violation in outcome.violations.values():
            code = 1
            print(f"{outcome.course}: {violation.said} [{violation.times} times, first at cut {violation.cut}]")
    return code


def _print_row(outcome: Outcome, seconds: float) -> None:
    counts = f"{outcome.calls:6} {outcome.cuts:6} {outcome.states:7} {outcome.resumed:7} {len(outcome.violations):10}"
    print(f"{outcome.course:32} {counts} {seconds:7.0f}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
