"""Tokens per second of the program as it is, against the stock loop (benchmarks/stock.py), eager and compiled.

    python benchmarks/throughput.py [--model d12] [--batch_size 4] [--sequence_length 256] [--steps 3] [--rounds 5]
                                    [--warm 2] [--device cpu] [--dtype fp32] [--compile both|on|off] [--losses 50]

All of them are processes of their own, on the same weights, tokens and flags. They take turns: one goes on for a window
of `--steps` steps while the others are stopped (SIGSTOP); the time runs from the end of a step to the end of a later
one. A figure is the median over the rounds. The machine's matrix rate is that of torch.mm on 2048 x 2048 matrices,
measured in every round too. `--losses N` instead prints the losses of the first N steps of both, side by side.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

LINE = re.compile(r"step:\d+/\d+ \| loss (\d+\.\d+)")
PRODUCT = {"cpu": 2048, "cuda": 8192}  # rows of a matrix that fills the device


class Contestant:
    """A training process that runs only while it is its turn."""

    def __init__(self, name: str, command: list[str], folder: Path, **env: str) -> None:
        self.name = name
        self.losses: list[str] = []
        self.seconds: list[float] = []
        self._process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )

    def step(self) -> None:
        """Until the line of the next step."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if found := LINE.match(line):
                self.losses.append(found[1])
                return
        raise SystemExit(f"{self.name} ended before its time; run its command by hand to see why")

    def window(self, steps: int) -> float:
        """Seconds of a step, over `steps` of them."""
        os.killpg(self._process.pid, signal.SIGCONT)
        self.step()
        began = time.perf_counter()
        for _ in range(steps):
            self.step()
        seconds = (time.perf_counter() - began) / steps
        os.killpg(self._process.pid, signal.SIGSTOP)
        return seconds

    def peak_memory(self) -> float:
        """The largest resident size so far, in GiB."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) / 2**20

    def end(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def matrix_rate(device: str, dtype: str) -> float:
    """Floating-point operations per second of a large square product."""
    import torch

    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    size = PRODUCT[device]
    a, b = (torch.rand(size, size, device=device).to(kind) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        began = time.perf_counter()
        for _ in range(4):
            a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - began) / 4)
    return 2 * size**3 / best


def commands(args: argparse.Namespace, shards: str) -> dict[str, list[str]]:
    """The four command lines."""
    names = ("model", "batch_size", "sequence_length", "grad_accumulation_steps", "device", "dtype")
    flags = [f"--{name}={getattr(args, name)}" for name in names]
    flags += [f"--input_bin={shards}", f"--input_val_bin={shards}", "--num_iterations=1000000", "--save_every=0"]
    made = {}
    for compiled in ("off", "on") if args.compile == "both" else (args.compile,):
        for name, script in (("stock", "benchmarks/stock.py"), ("unbroken", "train_gpt2_mod.py")):
            label = f"{name}, {'compiled' if compiled == 'on' else 'eager'}"
            made[label] = [sys.executable, "-u", str(ROOT / script), *flags, f"--compile={compiled}"]
    return made


def compare(args: argparse.Namespace, folder: Path, lines: dict[str, list[str]]) -> None:
    """Print the table."""
    from unbroken.model import families

    contestants = []
    for name, command in lines.items():
        contestants.append(Contestant(name, command, folder))
        contestants[-1].window(args.warm)
    rates = []
    for _ in range(args.rounds):
        for each in contestants:
            each.seconds.append(each.window(args.steps))
        rates.append(matrix_rate(args.device, args.dtype))
    tokens = args.batch_size * args.grad_accumulation_steps * args.sequence_length
    flops = tokens * families.build(args.model).flops_per_token(args.sequence_length)
    rate = statistics.median(rates)
    print(
        f"{args.model}, {args.batch_size} x {args.sequence_length} tokens, {args.dtype};"
        f" torch.mm: {rate / 1e9:.0f} GFLOP/s"
    )
    reference = statistics.median(contestants[-2].seconds)  # the stock loop, compiled where that takes part
    for each in contestants:
        seconds = statistics.median(each.seconds)
        print(
            f"  {each.name:<20} {seconds:8.3f} s/step  {tokens / seconds:9,.0f} tok/s  {reference / seconds:5.2f} x"
            f"  {flops / seconds / rate:5.2f} of torch.mm  {each.peak_memory():6.2f} GiB peak"
        )
        each.end()


def side_by_side(args: argparse.Namespace, folder: Path, lines: dict[str, list[str]]) -> None:
    """Print both losses of every step, and the largest difference."""
    pair = [Contestant(name, lines[name], folder) for name in ("stock, eager", "unbroken, eager")]
    for _ in range(args.losses):
        for each in pair:
            each.step()
    largest = 0.0
    for step, (theirs, ours) in enumerate(zip(*(each.losses for each in pair), strict=False), 1):
        largest = max(largest, abs(float(theirs) - float(ours)))
        print(f"{step:5} {theirs:>12} {ours:>12}")
        if step == args.losses:
            break
    print(f"largest difference: {largest:.6f}")
    for each in pair:
        each.end()


def main() -> None:
    """Make the tokens, start the four, let them take turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("model", "d12"), ("device", "cpu"), ("dtype", "fp32"), ("compile", "both")):
        parser.add_argument(f"--{name}", default=default)
    for name, number in (("batch_size", 4), ("grad_accumulation_steps", 1), ("sequence_length", 256)):
        parser.add_argument(f"--{name}", type=int, default=number)
    for name, number in (("steps", 3), ("rounds", 5), ("warm", 2), ("losses", 0)):
        parser.add_argument(f"--{name}", type=int, default=number)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run(
            [sys.executable, "-m", "unbroken", "data", "builtin"],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            check=True,
            stdout=subprocess.DEVNULL,
        )
        lines = commands(args, "data/*/*_train_*.bin")
        (side_by_side if args.losses else compare)(args, folder, lines)


if __name__ == "__main__":
    main()
