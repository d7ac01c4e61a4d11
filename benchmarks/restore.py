"""Restoring with several processes of one machine: each verifies all that it reads, or a share of the storages.

    python benchmarks/restore.py [--model d12] [--processes 4] [--rounds 5]

Both ways take turns in the same processes (gloo, CPU), from the page cache into live tensors: every process gets all
weights and its slices of the moments. Seconds are those until the last process is through, medians over the rounds;
bytes read and checksummed are in sizes of the file, added over the processes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def build(args: argparse.Namespace, world):  # type: ignore[no-untyped-def]
    """Return the sharded parameters and the optimizer of a run."""
    from unbroken.distributed.flat_params import ShardedParameters
    from unbroken.model import families
    from unbroken.optim import build_optimizer, param_groups

    model = families.build(args.model)
    sharded = ShardedParameters(model, world, param_groups(model, "adamw"))
    return sharded, build_optimizer(sharded, learning_rate=1e-3, weight_decay=0.1)


def work(args: argparse.Namespace) -> None:
    """What each process does: save once, then restore in both ways."""
    import torch
    import torch.distributed as dist

    from unbroken.checkpoint import parallel_read
    from unbroken.checkpoint.reader import CheckpointFile
    from unbroken.distributed.world import init_distributed

    counted = {"read": 0, "checked": 0}
    read = parallel_read.ParallelReader._read

    def counting(self, job, begin, memory, crc):  # type: ignore[no-untyped-def]
        counted["read"] += len(memory)
        counted["checked"] += len(memory) if job.check else 0
        return read(self, job, begin, memory, crc)

    parallel_read.ParallelReader._read = counting  # type: ignore[method-assign]
    torch.set_num_threads(1)
    path = Path(args.folder) / "state.pt"
    with init_distributed("cpu") as world:
        sharded, optimizer = build(args, world)
        if world.is_main:
            moments = {
                index: {key: torch.rand(slot.parameter.shape) for key in ("exp_avg", "exp_avg_sq")}
                for index, (_, slot) in enumerate(sharded._order)
            }
            weights = {name: parameter.detach().clone() for name, parameter in sharded.model.named_parameters()}
            torch.save({"model": weights, "optimizer": {"state": moments}}, path)
        dist.barrier()
        named = dict(sharded.model.named_parameters())
        whole = {name: live for name, live in sharded.whole_model_state().items() if name in named}
        state = {
            index: {key: entry[key] for key in ("exp_avg", "exp_avg_sq")}
            for index, entry in sharded.optimizer_state(optimizer)["state"].items()
        }
        tree = {"model": whole, "optimizer": {"state": state}}
        for shared in [True, False] * (args.rounds + 1):
            counted.update(read=0, checked=0)
            dist.barrier()
            began = time.perf_counter()
            with CheckpointFile(path) as file:
                if shared:
                    file.share_checks(world.rank, world.size)
                file.restore(tree)
            dist.barrier()
            seconds = time.perf_counter() - began
            peak = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 2**10
            seen = world.gather((counted["read"], counted["checked"], peak))
            if world.is_main:
                size = path.stat().st_size
                sums = [sum(each[0] for each in seen) / size, sum(each[1] for each in seen) / size]
                print(f"row {int(shared)} {seconds} {sums[0]} {sums[1]} {max(each[2] for each in seen)}", flush=True)


def main() -> None:
    """Start the processes, and print a row for each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="d12")
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if "RANK" in os.environ:
        work(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        runner = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.processes}"]
        typed = [f"--model={args.model}", f"--rounds={args.rounds}", f"--folder={folder}"]
        done = subprocess.run([*runner, __file__, *typed], stdout=subprocess.PIPE, text=True, check=True)
    rows = [list(map(float, line.split()[1:])) for line in done.stdout.splitlines() if line.startswith("row ")]
    for shared, name in ((0.0, "each verifies what it reads"), (1.0, "a share of the storages each")):
        own = [row for row in rows if row[0] == shared][1:]  # the first warms up
        seconds, read, checked, peak = (statistics.median(row[index] for row in own) for index in (1, 2, 3, 4))
        print(
            f"{args.model}, {args.processes} processes, {name:<30} {seconds:6.2f} s   read {read:.2f} x"
            f"   checksummed {checked:.2f} x   peak {peak:,.0f} MiB a process"
        )


if __name__ == "__main__":
    main()
