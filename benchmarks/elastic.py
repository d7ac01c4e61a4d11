"""What the one order of addition costs: a step with it, against plain DDP with its all-reduce and AdamW.

    python benchmarks/elastic.py [--model d4] [--processes 1,2,4] [--sequence_length 64] [--steps 5] [--rounds 5]

Both train the same model on the same batches in the same processes, alternating: a window of `--steps` steps each, A B
A B; a figure is the median over the rounds, the ratio that of the medians. Memory is that of the optimizer's moments.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from unbroken.distributed.flat_params import ShardedParameters
from unbroken.distributed.gradients import Gradients
from unbroken.distributed.step_plan import StepPlan, plan_step
from unbroken.distributed.world import World, init_distributed
from unbroken.model.gpt import GPT
from unbroken.optim import build_optimizer

BATCH = 2  # sequences of a microbatch


def batches(plan: StepPlan, length: int, world: World) -> list[tuple[int, torch.Tensor]]:
    """This process's microbatches of a step, with their numbers."""
    lo, hi = plan.ranges[world.rank]
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 50257, (plan.num_microbatches, plan.microbatch_size, length), generator=generator)
    return [(index, tokens[index].to(world.device)) for index in range(lo, hi)]


def ours(name: str, plan: StepPlan, length: int, world: World) -> tuple[Callable[[], None], int]:
    """A step of this program, and the bytes of its moments."""
    model = GPT(GPT.sizes[name])
    sharded = ShardedParameters(model, world)
    optimizer = build_optimizer(sharded, learning_rate=1e-4, weight_decay=0.1)
    model.initialize(1)
    gradients, work = Gradients(sharded, plan, world), dict(batches(plan, length, world))

    def step() -> None:
        for index in gradients.microbatches():
            model(work[index], work[index]).backward()
            gradients.add(index)
        gradients.exchange()
        optimizer.step()
        gradients.gather_weights()

    return step, held(optimizer.parts)


def plain(name: str, plan: StepPlan, length: int, world: World) -> tuple[Callable[[], None], int]:
    """A step of the stock loop: DDP, no_sync until the last microbatch, fused AdamW."""
    model = GPT(GPT.sizes[name])
    model.initialize(1)
    model.to(world.device)
    wrapped = DistributedDataParallel(model) if world.size > 1 else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, betas=(0.9, 0.95), fused=True)
    work = batches(plan, length, world)

    def step() -> None:
        for number, (_, x) in enumerate(work):
            last = number == len(work) - 1
            alone = contextlib.nullcontext() if last or world.size == 1 else wrapped.no_sync()
            with alone:
                (wrapped(x, x) / len(work)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    return step, held([optimizer])


def held(optimizers: list[torch.optim.Optimizer]) -> int:
    """Bytes of the optimizers' state in this process."""
    return sum(
        value.nbytes
        for optimizer in optimizers
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )


def window(step: Callable[[], None], steps: int, world: World) -> float:
    """Seconds of a step, over a window that all processes begin and end together."""
    if world.size > 1:
        dist.barrier()
    began = time.perf_counter()
    for _ in range(steps):
        step()
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    if world.size > 1:
        dist.barrier()
    return (time.perf_counter() - began) / steps


def measure(args: argparse.Namespace) -> None:
    """In each process: alternate, and let rank 0 print one row."""
    torch.set_num_threads(args.threads)
    with init_distributed("auto") as world:
        plan = plan_step(BATCH, args.accumulation, world.size, 8)
        candidates = [make(args.model, plan, args.sequence_length, world) for make in (ours, plain)]
        seconds: list[list[float]] = [[], []]
        for _, (step, _) in enumerate(candidates):
            window(step, 1, world)
        for _ in range(args.rounds):
            for times, (step, _) in zip(seconds, candidates, strict=True):
                times.append(window(step, args.steps, world))
        if world.is_main:
            a, b = map(statistics.median, seconds)
            memory = [size / 2**20 for _, size in candidates]
            print(
                f"{world.size:>9} {a:>10.3f} {b:>10.3f} {a / b:>8.3f} {memory[0]:>12.1f} {memory[1]:>12.1f}", flush=True
            )


def main() -> None:
    """Start one measurement for each number of processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="d4", choices=GPT.sizes)
    parser.add_argument("--processes", default="1,2,4")
    parser.add_argument("--accumulation", type=int, default=4)
    parser.add_argument("--sequence_length", type=int, default=64, help="tokens of a sequence")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        return measure(args)
    tokens = f"{args.accumulation} x {BATCH} x {args.sequence_length} tokens a step"
    print(f"{args.model}, {tokens}, {args.threads} thread a process")
    print(f"{'processes':>9} {'ours s':>10} {'DDP s':>10} {'ratio':>8} {'ours MiB':>12} {'DDP MiB':>12}", flush=True)
    for count in args.processes.split(","):
        runner = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
        subprocess.run([*runner, __file__, *sys.argv[1:], "--inside"], check=True)


if __name__ == "__main__":
    main()
