"""Silent corruption: a microbatch is computed twice, and the processes' copies of the weights are compared at a save.

A step has one result, so two computations of it differ only if the machine computed wrongly. The bits are compared by
their sums as integers: any flipped bit changes the sum, and the order of addition does not matter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor

from unbroken.config import Config
from unbroken.distributed.flat_params import ALIGNMENT, FlatBuffer, ShardedParameters
from unbroken.distributed.gradients import Gradients
from unbroken.distributed.world import World
from unbroken.errors import CorruptionError

ADVICE = "nothing of this step is saved; resume from the newest checkpoint, on another machine if it happens again"


class MicrobatchReplay:
    """A second computation of each rank's first microbatch, in the first step of an attempt and in every N-th.

    Args:
        config: the flags; `replay` is first, off or N.
        sharded: the parameters.
        gradients: their sum, which exchanges nothing of the computation that is dropped.
        world: the ranks.
    """

    def __init__(self, config: Config, sharded: ShardedParameters, gradients: Gradients, world: World) -> None:
        self._every = int(config.replay) if config.replay.isdecimal() else 0
        self._first = config.replay != "off" and config.deterministic == "on"
        self._sharded, self._gradients, self._world = sharded, gradients, world
        self._differs: str | None = None
        self._seed = config.seed
        self._done = not self._first

    def _is_due(self, step: int) -> bool:
        return not self._done or (self._first and self._every > 0 and step % self._every == 0)

    def passes(self, step: int, index: int, losses: list[Tensor]) -> Iterator[None]:
        """Yield once for each computation of a microbatch, which appends its loss to `losses`; the last one counts.

        Each begins with the same random numbers: those of the microbatch, on any rank and in any attempt.
        """
        seed = hash((self._seed, step - 1, index)) & (2**63 - 1)  # of integers: the same in every process
        _seed_generators(seed, self._world.device)
        if index != self._gradients.first or not self._is_due(step):
            yield
            return
        self._gradients.begin_pass(index, is_dropped=True)
        yield
        loss, sums = losses.pop(), [_sums(group, group.grad) for group in self._sharded.groups]
        self._gradients.begin_pass(index)
        _seed_generators(seed, self._world.device)
        yield
        self._differs = None
        for group, before in zip(self._sharded.groups, sums, strict=True):
            rows = (_sums(group, group.grad) != before).nonzero()
            if len(rows):
                self._differs = f"the gradient of {self._sharded.name_at(group, int(rows[0]) * ALIGNMENT)}"
        if loss.view(torch.int32) != losses[-1].view(torch.int32):
            self._differs = "the loss" + (f" and {self._differs}" if self._differs else "")

    def require_equal(self, step: int) -> None:
        """Raise CorruptionError on all ranks if the two computations differed on any. Collective; before the update."""
        if not self._is_due(step):
            return
        self._done = True
        for rank, differs in enumerate(self._world.gather(self._differs)):
            if differs is not None:
                raise CorruptionError(
                    f"step {step}, rank {rank}: {differs} of a microbatch differs when it is computed again: {ADVICE}"
                )


def require_equal_replicas(config: Config, sharded: ShardedParameters, step: int, world: World) -> None:
    """Raise CorruptionError on all ranks unless all have the same weights. Collective; waits for a GPU.

    Only the weights can be compared: every rank has all of them, while each moment is on one rank only.

    Args:
        config: the flags; with `--replay off` nothing is compared.
        sharded: the weights of this rank.
        step: named in the error.
        world: the ranks.
    """
    if world.size == 1 or config.replay == "off":
        return
    places = [(group, slot) for group in sharded.groups for slot in group.slots]
    # Parameter by parameter, which needs no memory of the GPU.
    ends = [-(-slot.stop // ALIGNMENT) * ALIGNMENT for _, slot in places]
    words = [group.data[slot.start : end].view(torch.int64) for (group, slot), end in zip(places, ends, strict=True)]
    ours = torch.stack([word.sum() for word in words])
    of_ranks = [tuple(row) for row in world.gather(ours.tolist())]
    usual, count = Counter(of_ranks).most_common(1)[0]
    doubt = "" if count > world.size / 2 else ", or rank 0 has"
    for rank, row in enumerate(of_ranks):
        for (group, slot), a, b in zip(places, row, usual, strict=True):
            if a != b:
                name = sharded.name_at(group, slot.start)
                raise CorruptionError(f"step {step}, rank {rank}: it has another copy of {name}{doubt}: {ADVICE}")


def _seed_generators(seed: int, device: torch.device) -> None:
    """Seed the CPU's generator and the device's; torch.manual_seed costs a tiny model 5% of a step on other devices."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _sums(group: FlatBuffer, flat: Tensor) -> Tensor:
    """Return the sum of the bits of every ALIGNMENT elements of a buffer, int64: a parameter has its own ones."""
    return flat[: group.used].view(torch.int64).view(-1, ALIGNMENT // 2).sum(1)
