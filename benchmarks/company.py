"""A step on a machine that does something else besides: with threads that wait asleep, and as OpenMP has them wait.

    python benchmarks/company.py [--model d6] [--sequence_length 256] [--busy 0,1,2] [--steps 5] [--rounds 5]

Two trainings that differ in GOMP_SPINCOUNT alone take turns (see throughput.py), beside 0, 1, 2, ... processes that do
nothing but count. 300000 is libgomp's own, which waits awake for some milliseconds. A figure is the median over rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.throughput import ROOT, Contestant

LIBGOMP_SPINS = "300000"


def main() -> None:
    """Train the two side by side, and print a row for each number of companions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="d6")
    parser.add_argument("--busy", default="0,1,2")
    for name, number in (("batch_size", 4), ("sequence_length", 256), ("steps", 5), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=number)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        flags = [f"--{key}={getattr(args, key)}" for key in ("model", "batch_size", "sequence_length")]
        flags += ["--num_iterations=1000000", "--save_every=0", "--val_loss_every=0"]
        command = [sys.executable, "-u", str(ROOT / "train_gpt2_mod.py"), *flags]
        making = {"cwd": name, "env": {**os.environ, "PYTHONPATH": str(ROOT)}, "stdout": subprocess.DEVNULL}
        subprocess.run([sys.executable, "-m", "unbroken", "data", "builtin"], check=True, **making)
        asleep = Contestant("asleep", command, Path(name))
        asleep.window(2)
        awake = Contestant("awake", command, Path(name), GOMP_SPINCOUNT=LIBGOMP_SPINS)
        awake.window(2)
        print(f"{args.model}, {args.batch_size} x {args.sequence_length} tokens, seconds a step")
        for busy in map(int, args.busy.split(",")):
            counting = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
            for each in (asleep, awake):
                each.seconds = []
            for _ in range(args.rounds):
                for each in (asleep, awake):
                    each.seconds.append(each.window(args.steps))
            for process in counting:
                process.kill()
            ours, theirs = (statistics.median(each.seconds) for each in (asleep, awake))
            print(f"  beside {busy} busy processes: asleep {ours:.3f}, awake {theirs:.3f}, ratio {theirs / ours:.2f}")
        for each in (asleep, awake):
            each.end()


if __name__ == "__main__":
    main()
