"""The way back: seconds from the start of the process to the end of the first resumed step, and loading by itself.

    python benchmarks/resume.py [--model d12] [--rounds 3]

A run of one step is made in a temporary folder. Then, taking turns: the resumed process (its parts told from when its
lines appear), and in one process of its own each way to read the same file from the page cache: ours into live tensors
with every checksum verified, ours without, `torch.load` and copy, `torch.load(mmap=True)` and copy, and raw reads.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SCRIPT = str(ROOT / "train_gpt2_mod.py")
SMALL_STEP = ["--batch_size", "1", "--sequence_length", "64", "--save_every", "0"]


def make_run(folder: Path, model: str) -> Path:
    """A checkpoint after one step."""
    command = [sys.executable, SCRIPT, "--model", model, "--num_iterations", "1", *SMALL_STEP]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return next(folder.glob("logs/*/final.pt"))


def resumed(folder: Path, checkpoint: Path) -> dict[str, float]:
    """Seconds until the resumed process has read its checkpoint, and until its first step is through."""
    began = time.perf_counter()
    command = [sys.executable, "-u", SCRIPT, "--resume_from", str(checkpoint), "--fork", "--num_iterations", "2"]
    marks: dict[str, float] = {}
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("resuming") or "resuming run" in line:
                marks["state restored"] = time.perf_counter() - began
            if line.startswith("step:2/2 | loss"):
                marks["first step done"] = time.perf_counter() - began
                process.kill()
    return marks


def importing() -> float:
    """Seconds of an interpreter that only imports torch."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    return time.perf_counter() - began


def loads(path: Path) -> dict[str, Callable[[], Any]]:
    """The ways to get the file's tensors into live memory that is there already."""
    import torch

    from unbroken.checkpoint.reader import CheckpointFile
    from unbroken.leaves import Leaf

    saved = torch.load(path, weights_only=True)
    names = list(saved["model"])[:-1]  # the last is the tie
    tree: dict[str, Any] = {
        "model": {name: Leaf.whole(torch.empty_like(saved["model"][name]).zero_()) for name in names},
        "optimizer": {"state": {}},
    }
    for index, entry in saved["optimizer"]["state"].items():
        tree["optimizer"]["state"][index] = {k: Leaf.whole(torch.empty_like(v).zero_()) for k, v in entry.items()}
    del saved

    def ours(verify: bool) -> None:
        with CheckpointFile(path) as file:
            file.restore(tree, verify=verify)

    def stock(mmap: bool) -> None:
        loaded = torch.load(path, weights_only=True, mmap=mmap)
        for name in names:
            copy(tree["model"][name], loaded["model"][name])
        for index, entry in loaded["optimizer"]["state"].items():
            for key, value in entry.items():
                copy(tree["optimizer"]["state"][index][key], value)

    def copy(leaf: Leaf, value: torch.Tensor) -> None:
        leaf.pieces[0].data.copy_(value.view(-1))

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
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", ".")) as name:
        folder = Path(name).resolve()
        checkpoint = make_run(folder, args.model)
        size = checkpoint.stat().st_size
        rounds = [{"import torch": importing(), **resumed(folder, checkpoint)} for _ in range(args.rounds)]
        print(f"{args.model}, {size / 1e9:.2f} GB, medians of {args.rounds}; seconds from the start of the process")
        for part in rounds[0]:
            print(f"  {part:<26} {statistics.median(entry[part] for entry in rounds):8.2f}")
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
