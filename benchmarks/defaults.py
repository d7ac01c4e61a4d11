"""What the defaults with which a run watches itself cost: hang watchdog, NaN check, replay, replica checksums.

    python benchmarks/defaults.py [--model d6] [--rounds 6] [--steps 16] [--processes 1]

Whole trainings with the defaults and with `--hang off --on_nan go_on --replay off` in turn (A B B A …), each with a
save in its middle. The wall clock runs from the end of the first step to the end of the last one, by the journal, so
what threads do in the background counts. It prints the ratio of the medians, and median and range of the paired ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.harness import RUN_ID, as_flags, write_corpus  # noqa: E402

OFF = {"hang": "off", "on_nan": "go_on", "replay": "off"}


def seconds(folder: Path, flags: dict[str, object], processes: int) -> float:
    """Train in an empty folder and return the seconds of all steps but the first."""
    write_corpus(folder, train_tokens=400_000)
    runner = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    command = [sys.executable, *runner, str(ROOT / "train_gpt2_mod.py"), *as_flags(flags)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    lines = (folder / f"logs/{RUN_ID}/{RUN_ID}.metrics.jsonl").read_text().splitlines()
    walls = [line["wall"] for line in map(json.loads, lines) if "train_loss" in line]
    return float(walls[-1] - walls[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="d6")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--processes", type=int, default=1)
    args = parser.parse_args()
    flags = {
        **{"model": args.model, "batch_size": 2, "grad_accumulation_steps": 4, "sequence_length": 128},
        **{"input_bin": "data/train_*.bin", "num_iterations": args.steps, "save_every": args.steps // 2},
        **{"threads": 1, "run_id": RUN_ID},
    }
    taken: dict[str, list[float]] = {"defaults": [], "off": []}
    for number in range(args.rounds):
        for name in sorted(taken, reverse=bool(number % 2)):
            with tempfile.TemporaryDirectory() as folder:
                taken[name].append(seconds(Path(folder), flags | (OFF if name == "off" else {}), args.processes))
    usual, watched = statistics.median(taken["off"]), statistics.median(taken["defaults"])
    shares = [on / off - 1 for on, off in zip(taken["defaults"], taken["off"], strict=True)]
    print(
        f"{args.model}, {args.processes} process(es), {args.steps - 1} steps and a save, {args.rounds} pairs: off"
        f" {usual:.2f} s, defaults {watched:.2f} s, ratio {watched / usual:.4f}; paired: median"
        f" {statistics.median(shares):+.2%}, from {min(shares):+.1%} to {max(shares):+.1%}"
    )


if __name__ == "__main__":
    main()
