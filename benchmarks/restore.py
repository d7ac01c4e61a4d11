"""Restoring with several processes of one machine: seconds, bytes and memory; and a resumed training beside a new one.

    python benchmarks/restore.py [--model d12] [--processes 4] [--rounds 5]

The first table is of restoring alone (gloo, CPU), from the page cache into live tensors; the ways take turns in the
same processes, and every process gets all weights and its slices of the moments. Seconds are those until the last
process is through; bytes read and checksummed are in sizes of the file, added over the processes; memory is by how much
the peak of a process is above what it held before.

The second table is of `train_gpt2_mod.py` under torchrun: new runs and resumed ones, in turns, until their first step
is done and they are killed. Memory is the peak of a process. All figures are medians over the rounds, and memory is
that of the largest process.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

TORCHRUN = [sys.executable, "-u", "-m", "torch.distributed.run", "--standalone"]
STEP = re.compile(r"step:\d+/\d+ \| loss")
ALONE, TOGETHER, APART = "each verifies all it reads", "each byte verified once", "the same, as on several machines"


def memory(name: str, pid: int | str = "self") -> float:
    """Return a size from the status of a process in MiB."""
    return int(Path(f"/proc/{pid}/status").read_text().partition(f"{name}:")[2].split()[0]) / 2**10


def work(args: argparse.Namespace) -> None:
    """What each process of the first table does: restore in all ways."""
    import torch

    from unbroken.checkpoint import parallel_read, reader
    from unbroken.distributed.flat_params import ShardedParameters
    from unbroken.distributed.world import init_distributed
    from unbroken.model import families
    from unbroken.optim import build_optimizer, param_groups
    from unbroken.run.state import Progress, RunState

    counted = {"read": 0, "checked": 0}
    read, hostname = parallel_read.ParallelReader._read, reader.hostname

    def counting(self: Any, job: Any, begin: int, memory: memoryview, crc: int) -> int:
        counted["read"] += len(memory)
        counted["checked"] += len(memory) if job.check else 0
        return read(self, job, begin, memory, crc)

    parallel_read.ParallelReader._read = counting  # type: ignore[method-assign]
    torch.set_num_threads(1)
    with init_distributed("cpu") as world:
        model = families.build(args.model)
        sharded = ShardedParameters(model, world, param_groups(model, "adamw"))
        optimizer = build_optimizer(sharded, learning_rate=1e-3, weight_decay=0.1)
        state = RunState(sharded, optimizer, Progress(), "", {"seed": 0}, "", {}, {}, {})
        whole = {
            "model": sharded.whole_model_state(),
            "optimizer": {"state": sharded.optimizer_state(optimizer)["state"]},
        }
        for way in [ALONE, TOGETHER, APART] * (args.rounds + 1):
            counted.update(read=0, checked=0)
            reader.hostname = lambda way=way: f"{hostname()}{world.rank if way == APART else ''}"
            world.gather(None)  # all begin and end together
            before, began = memory("VmRSS"), time.perf_counter()
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            with reader.CheckpointFile(args.file) as file:
                file.restore(whole) if way == ALONE else state.restore(file)
            world.gather(None)
            seconds = time.perf_counter() - began
            seen = world.gather((counted["read"], counted["checked"], memory("VmHWM") - before))
            if world.is_main:
                size = os.path.getsize(args.file)
                row = [seconds, *(sum(each[index] for each in seen) / size for index in (0, 1))]
                print("row", json.dumps([way, [*row, max(each[2] for each in seen)]]), flush=True)


def train(folder: Path, processes: int, flags: list[str], until: re.Pattern[str]) -> tuple[float, float]:
    """Train until a line comes, then kill; return the seconds until then and the peak of the largest process in MiB."""
    command = [*TORCHRUN, f"--nproc_per_node={processes}", str(ROOT / "train_gpt2_mod.py"), *flags]
    began = time.perf_counter()
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        if not any(until.match(line) for line in process.stdout):
            raise SystemExit("the training ended before the line came")
        seconds = time.perf_counter() - began
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        peak = max(memory("VmHWM", child) for child in children)
        for pid in (process.pid, *map(int, children)):
            os.kill(pid, signal.SIGKILL)
    return seconds, peak


def main() -> None:
    """Make a checkpoint, and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="d12")
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--file", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if "RANK" in os.environ:
        work(args)
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torchrun would say that it sets it
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", ".")) as name:
        folder, rounds = Path(name).resolve(), range(args.rounds)
        flags = [f"--model={args.model}", "--batch_size=1", f"--grad_accumulation_steps={args.processes}"]
        flags += ["--sequence_length=64", "--num_iterations=1000000", "--save_every=1000000", "--save_steps=1"]
        train(folder, 1, flags, re.compile("saved "))
        (file,) = folder.glob("logs/*/model_step*.pt")
        print(f"{args.model}, {file.stat().st_size / 1e9:.2f} GB, {args.processes} processes, medians of {args.rounds}")
        typed = [__file__, f"--model={args.model}", f"--rounds={args.rounds}", f"--file={file}"]
        command = [*TORCHRUN, f"--nproc_per_node={args.processes}", *typed]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows = [json.loads(line[4:]) for line in done.stdout.splitlines() if line.startswith("row ")]
        for way in (ALONE, TOGETHER, APART):
            figures = [figures for named, figures in rows if named == way][1:]  # the first warms up
            seconds, read, checked, grown = map(statistics.median, zip(*figures, strict=True))
            print(f"  {way:<34}{seconds:6.2f} s   read {read:.2f} x   checksummed {checked:.2f} x   {grown:+6.0f} MiB")
        flags[-1] = "--save_steps="  # no save's buffer is in the peak
        ways = {"new": flags, "resumed": [*flags, f"--resume_from={file}"]}
        seen = [{way: train(folder, args.processes, typed, STEP) for way, typed in ways.items()} for _ in rounds]
        for way in ways:
            seconds, peak = map(statistics.median, zip(*(each[way] for each in seen), strict=True))
            print(f"  {way:<34}{seconds:6.2f} s until the first step is done   peak {peak:,.0f} MiB a process")


if __name__ == "__main__":
    main()
