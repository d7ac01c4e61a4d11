"""Goodput under SIGKILLs: the time that the same steps take undisturbed, divided by the time they took.

    python benchmarks/goodput.py [--model d6] [--mean_seconds 300] [--minutes 30] [--seed 1] [-- training flags]

One command line with `--resume_from auto` is started again each time that it, torchrun included, is killed; the times
between the kills are exponential with the given mean. What was lost is told by cause: steps done again, the way back
(from the kill to the end of the first step after it, less that step), and steps that took longer than the median, which
is where saves show.
"""

from __future__ import annotations

import argparse
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from unbroken.runtime.child_training import SCRIPT, kill_tree, torchrun_command

STEP = re.compile(r"step:(\d+)/\d+ \| loss")


@dataclass
class Seen:
    """Of one attempt: when it was started, and when which step was through."""

    began: float
    steps: list[tuple[int, float]] = field(default_factory=list)

    def read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if found := STEP.match(line):
                self.steps.append((int(found[1]), time.perf_counter()))


def attempts(command: list[str], folder: Path, mean: float, seconds: float, seed: int) -> tuple[list[Seen], float]:
    """Run, kill, run again, for so many seconds; returns what was seen and when it ended."""
    chance = random.Random(seed)
    end = time.perf_counter() + seconds
    made: list[Seen] = []
    while time.perf_counter() < end:
        seen = Seen(time.perf_counter())
        made.append(seen)
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True, start_new_session=True)
        reader = threading.Thread(target=seen.read, args=(process,))
        reader.start()
        wanted = min(chance.expovariate(1 / mean), end - time.perf_counter())
        try:
            process.wait(max(wanted, 0.1))
        except subprocess.TimeoutExpired:
            kill_tree(process)
        reader.join()
    return made, time.perf_counter()


def account(made: list[Seen], ended: float) -> dict[str, float]:
    """Where the time went, in seconds."""
    between = [
        (step, later - earlier)
        for seen in made
        for (_, earlier), (step, later) in zip(seen.steps, seen.steps[1:], strict=False)
    ]
    median = statistics.median(duration for _, duration in between)
    best: set[int] = set()
    ideal = again = back = slow = 0.0
    for seen in made:
        if not seen.steps:
            continue
        back += seen.steps[0][1] - seen.began - median
        for number, (step, at) in enumerate(seen.steps):
            duration = at - seen.steps[number - 1][1] if number else median
            slow += duration - median
            if step in best:
                again += median
            else:
                ideal += median
            best.add(step)
    whole = ended - made[0].began
    rest = whole - ideal - again - back - slow
    return {"whole": whole, "ideal": ideal, "again": again, "back": back, "slow": slow, "rest": rest, "step": median}


def main() -> None:
    """Run it and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="d6")
    parser.add_argument("--mean_seconds", type=float, default=300.0)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("flags", nargs="*", help="after --: flags of the training")
    args = parser.parse_args()
    flags = [f"--model={args.model}", "--num_iterations=10000000", "--save_every=auto", "--sequence_length=256"]
    flags += [f"--mtbf_minutes={args.mean_seconds / 60}", "--resume_from=auto", *args.flags]
    with tempfile.TemporaryDirectory(dir=".") as folder:
        command = [*torchrun_command(1), str(SCRIPT), *flags]
        made, ended = attempts(command, Path(folder), args.mean_seconds, 60 * args.minutes, args.seed)
    parts = account(made, ended)
    kills = len(made) - 1
    print(f"{args.model}: {kills} kills in {parts['whole']:.0f} s, a step is {parts['step']:.2f} s")
    print(f"  goodput                   {parts['ideal'] / parts['whole']:8.1%}")
    causes = (("again", "steps done again"), ("back", "the way back"), ("slow", "slow steps, saves"), ("rest", "other"))
    for key, name in causes:
        print(f"  {name:<25} {parts[key] / parts['whole']:8.1%}  {parts[key] / max(kills, 1):6.1f} s a kill")


if __name__ == "__main__":
    main()
