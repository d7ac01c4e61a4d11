"""What the default `--replay first` costs a step, in seconds of processor time: other programs hardly disturb that.

    python benchmarks/replay.py [--model d6] [--rounds 3] [--steps 2]

Steps with it and with `off` in turn (A B A B), paired; then its parts by themselves: a microbatch that is not computed
twice, the checksums of all weights at a save, and those of a gradient in a microbatch that is.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from unbroken.config import Config
from unbroken.distributed.flat_params import ShardedParameters
from unbroken.distributed.gradients import Gradients
from unbroken.distributed.step_plan import plan_step
from unbroken.distributed.world import World
from unbroken.model import families
from unbroken.run import corruption
from unbroken.run.corruption import MicrobatchReplay


def seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="d6")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    world, model = World.single(), families.build(args.model)
    sharded = ShardedParameters(model, world)
    model.initialize(1)
    gradients, tokens = Gradients(sharded, plan_step(1, 2, 1, 8), world), torch.arange(64).view(1, 64)
    replays = {name: MicrobatchReplay(Config(replay=name), sharded, gradients, world) for name in ("first", "off")}

    def step(name: str, number: int) -> None:
        losses = list[torch.Tensor]()
        for index in gradients.microbatches():
            for _ in replays[name].passes(number, index, losses):
                loss = model(tokens, tokens)
                loss.backward()
                losses.append(loss.detach())
            gradients.add(index)
        replays[name].require_equal(number)

    for name in replays:
        step(name, 1)
    pairs = [[seconds(lambda kept=name: step(kept, 2)) for name in replays] for _ in range(args.rounds * args.steps)]
    usual = statistics.median(off for _, off in pairs)
    not_due = statistics.median(seconds(lambda: list(replays["first"].passes(2, 1, []))) for _ in range(50))
    sums = statistics.median(
        seconds(lambda: [corruption._sums(group, group.data) for group in sharded.groups]) for _ in range(5)
    )
    shares = [first / off - 1 for first, off in pairs]
    print(
        f"{args.model}: a step of 2 x 64 tokens takes {usual:.3f} s of processor time; first against off, {len(shares)}"
        f" pairs: median {statistics.median(shares):+.2%}, from {min(shares):+.1%} to {max(shares):+.1%}"
    )
    print(f"a microbatch that is computed once: {1e6 * not_due:.0f} us, {not_due / usual:.4%} of a step")
    print(f"checksums of all weights or gradients: {1000 * sums:.1f} ms, {sums / usual:.2%} of a step, once a save")


if __name__ == "__main__":
    main()
