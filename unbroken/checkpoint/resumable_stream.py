"""An endless stream of batches whose state is one integer, with any number of DataLoader workers."""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Iterator
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

from unbroken.checkpoint.exceptions import CheckpointError, MismatchError


class _Indexed(Protocol):
    """A dataset with random access."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Any: ...


class ResumableStream(Iterator[Any]):
    """An endless iterator over the batches of a dataset, epoch after epoch.

    `position` is the number of samples that all ranks have taken together. It alone decides every later batch: batches
    that workers have prepared and the loop has not taken do not count. Sample p is dataset[order[p % n]], where `order`
    is the permutation of n indices that `seed` and the epoch p // n give. While the dataset makes it, the generators of
    torch (CPU), Python and numpy are seeded by `seed` and p, so that random augmentation is exact as well; afterwards
    they have their own states again.

    Args:
        dataset: has `__len__` and `__getitem__`.
        batch_size: samples of a batch on each rank.
        seed: of the order and of each sample.
        shuffle: whether to permute; otherwise the order is that of the dataset.
        rank: of this process; by default that of torch.distributed, or 0.
        ranks: number of processes, each of which gets its part of every `ranks * batch_size` samples.
        loader_options: of torch's DataLoader: num_workers, pin_memory, collate_fn and so on.
    """

    def __init__(
        self,
        dataset: _Indexed,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        rank: int | None = None,
        ranks: int | None = None,
        **loader_options: Any,
    ) -> None:
        joined = dist.is_available() and dist.is_initialized()
        self._rank = rank if rank is not None else dist.get_rank() if joined else 0
        self._ranks = ranks if ranks is not None else dist.get_world_size() if joined else 1
        if batch_size < 1 or len(dataset) < 1 or not 0 <= self._rank < self._ranks:
            raise CheckpointError(
                f"batch_size {batch_size}, {len(dataset)} samples, rank {self._rank} of {self._ranks}: each must be at"
                " least 1, and the rank below their number"
            )
        refused = {"batch_size", "batch_sampler", "sampler", "shuffle", "drop_last", "generator"} & {*loader_options}
        if refused:
            raise CheckpointError(f"{min(refused)}: the stream itself decides the order; leave it out")
        self._dataset, self._batch_size, self._options = dataset, batch_size, loader_options
        self._identity = {"seed": seed, "shuffle": shuffle, "samples": len(dataset)}
        self.position = 0
        self._batches: Iterator[Any] | None = None

    def __next__(self) -> Any:
        if self._batches is None:
            seed = self._identity["seed"]
            order = _Order(self._identity, self.position, self._batch_size, self._rank, self._ranks)
            # With a generator of its own the loader draws no number from the global one.
            own: dict[str, Any] = {"batch_sampler": order, "generator": torch.Generator().manual_seed(0)}
            self._batches = iter(DataLoader(_SeededSamples(self._dataset, seed), **own, **self._options))
        batch = next(self._batches)
        self.position += self._batch_size * self._ranks
        return batch

    def state_dict(self) -> dict[str, int]:
        """Return the position, and the seed, order and size of the data to which it belongs."""
        return {"position": self.position, **self._identity}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue at a position. Raises MismatchError if the stream has another seed, order or number of samples."""
        for name, own in self._identity.items():
            if state.get(name) != own:
                raise MismatchError(
                    f"{name}: the file's stream has {state.get(name)!r:.40}, this one {own}; use the same"
                )
        position = state["position"]
        if type(position) is not int or position < 0:
            raise MismatchError(f"position: it is {position!r:.40}; the file's stream is damaged")
        self.position, self._batches = position, None


class _Order(Iterator[list[tuple[int, int]]]):
    """The batches of one rank from a position on, as lists of (position, index of the dataset)."""

    def __init__(self, identity: dict[str, int], position: int, batch_size: int, rank: int, ranks: int) -> None:
        self._seed, self._shuffle, self._samples = identity["seed"], identity["shuffle"], identity["samples"]
        self._next, self._batch_size, self._stride = position + rank * batch_size, batch_size, ranks * batch_size
        self._epoch, self._permutation = -1, torch.empty(0)

    def __next__(self) -> list[tuple[int, int]]:
        start = self._next
        self._next += self._stride
        return [(position, self._index(position)) for position in range(start, start + self._batch_size)]

    def _index(self, position: int) -> int:
        epoch, place = divmod(position, self._samples)
        if not self._shuffle:
            return place
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(_mix("epoch", self._seed, epoch))
            self._epoch, self._permutation = epoch, torch.randperm(self._samples, generator=generator)
        return int(self._permutation[place])


class _SeededSamples(Dataset[Any]):
    """A dataset whose indices are (position, index): the sample is made with generators that the position seeds."""

    def __init__(self, dataset: _Indexed, seed: int) -> None:
        self._dataset, self._seed = dataset, seed

    def __getitem__(self, key: tuple[int, int]) -> Any:
        position, index = key
        seed = _mix("sample", self._seed, position)
        numpy = sys.modules.get("numpy")
        before = torch.get_rng_state(), random.getstate(), numpy.random.get_state() if numpy else None
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which would seed GPUs as well
        random.seed(seed)
        if numpy:
            numpy.random.seed(seed % 2**32)
        try:
            return self._dataset[index]
        finally:
            torch.set_rng_state(before[0])
            random.setstate(before[1])
            if numpy:
                numpy.random.set_state(before[2])


def _mix(purpose: str, seed: int, number: int) -> int:
    """Return 63 bits that a seed and a number give."""
    digest = hashlib.sha256(f"{purpose} {seed} {number}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
