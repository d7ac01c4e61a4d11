"""The way back: seconds from SIGKILL to the end of the next step, and loading by itself.

    python benchmarks/resume.py [--model d12] [--compile off] [--sequence_length 256] [--rounds 3]

A run in a temporary folder is killed as soon as a checkpoint of it is durable, and the same command line is started
again at once; its parts are told from when its lines appear. Then, taking turns in one process, each way to read the
same file from the page cache: ours into live tensors with every checksum verified, ours without, `torch.load` and copy,
`torch.load(mmap=True)` and copy, and raw reads.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SCRIPT = str(ROOT / "train_gpt2_mod.py")
STEP = re.compile(r"step:(\d+)/\d+ \| loss")


@dataclass
class Attempt:
    """One start of the command until it was killed: when which line appeared, in seconds from the start."""

    resumed: float | None
    steps: list[float]


def attempt(command: list[str], folder: Path) -> Attempt:
    """Run until a checkpoint is durable and three steps are done, then kill."""
    began = time.perf_counter()
    seen = Attempt(None, [])
    saved = False
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            now = time.perf_counter() - began
            if line.startswith("resuming run"):
                seen.resumed = now
            if STEP.match(line):
                seen.steps.append(now)
            saved |= line.startswith("saved ")
            if saved and len(seen.steps) >= 3:
                process.kill()
                break
    return seen


def killed_and_back(folder: Path, command: list[str], rounds: int) -> dict[str, float]:
    """Medians over the restarts, in seconds from the kill."""
    attempt(command, folder)
    attempts = [attempt(command, folder) for _ in range(rounds)]
    assert all(each.resumed is not None for each in attempts), "a restart did not resume"
    rows = {
        "(import torch)": [importing() for _ in range(rounds)],
        "state restored": [each.resumed or 0.0 for each in attempts],
        "next step done": [each.steps[0] for each in attempts],
        "(a later step)": [each.steps[2] - each.steps[1] for each in attempts],
    }
    return {part: statistics.median(seconds) for part, seconds in rows.items()}


def importing() -> float:
    """Seconds of an interpreter that only imports torch."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    return time.perf_counter() - began


def loads(path: Path) -> dict[str, Callable[[], Any]]:
    """The ways to get the file's tensors into live memory that is there already."""
    import torch

    from unbroken.checkpoint.reader import CheckpointFile
    from unbroken.distributed.sliced_tensor import SlicedTensor

    saved = torch.load(path, weights_only=True)
    names = list(saved["model"])[:-1]  # the last is the tie
    tree: dict[str, Any] = {
        "model": {name: SlicedTensor.whole(torch.empty_like(saved["model"][name]).zero_()) for name in names},
        "optimizer": {"state": {}},
    }
    for index, entry in saved["optimizer"]["state"].items():
        tree["optimizer"]["state"][index] = {
            k: SlicedTensor.whole(torch.empty_like(v).zero_()) for k, v in entry.items()
        }
    del saved

    def ours(verify: bool) -> None:
        with CheckpointFile(path) as file:
            file.trust(None if verify else file.identity)
            file.restore(tree)

    def stock(mmap: bool) -> None:
        loaded = torch.load(path, weights_only=True, mmap=mmap)
        for name in names:
            copy(tree["model"][name], loaded["model"][name])
        for index, entry in loaded["optimizer"]["state"].items():
            for key, value in entry.items():
                copy(tree["optimizer"]["state"][index][key], value)

    def copy(leaf: SlicedTensor, value: torch.Tensor) -> None:
        leaf.slices[0].data.copy_(value.view(-1))

    return {
        "ours, verified": lambda: ours(True),
        "ours, unverified": lambda: ours(False),
        "torch.load + copy": lambda: stock(False),
        "torch.load(mmap) + copy": lambda: stock(True),
        "raw reads": lambda: raw(path),
    }


def raw(path: Path) -> None:
    """Every byte, through one reused buffer."""
    buffer = bytearray(16 << 20)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def main() -> None:
    """Measure and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="d12")
    parser.add_argument("--compile", default="off")
    parser.add_argument("--batch_size", default="1")
    parser.add_argument("--sequence_length", default="256")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", ".")) as name:
        folder = Path(name).resolve()
        flags = [f"--{key}={getattr(args, key)}" for key in ("model", "compile", "batch_size", "sequence_length")]
        command = [sys.executable, "-u", SCRIPT, *flags, "--num_iterations=1000000", "--save_every=2", "--keep_last=2"]
        parts = killed_and_back(folder, [*command, "--resume_from=auto"], args.rounds)
        checkpoint = max(folder.glob("logs/*/model_step*.pt"))
        size = checkpoint.stat().st_size
        print(f"{' '.join(flags)}, {size / 1e9:.2f} GB, medians of {args.rounds}; seconds from SIGKILL")
        for part, median in parts.items():
            print(f"  {part:<26} {median:8.2f}")
        ways = loads(checkpoint)
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(args.rounds + 1):
            for way, load in ways.items():
                began = time.perf_counter()
                load()
                seconds[way].append(time.perf_counter() - began)
        print("reading it from the page cache into live tensors")
        for way, times in seconds.items():
            median = statistics.median(times[1:])
            print(f"  {way:<26} {median:8.3f} s  {size / 1e9 / median:6.2f} GB/s")


if __name__ == "__main__":
    main()
