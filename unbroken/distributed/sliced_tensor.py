"""A tensor of the run's state, as the slices of it that this process holds."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TensorSlice:
    """A slice of consecutive elements of a flattened tensor.

    `start` is the offset of the first one in elements; `data` is live memory, 1-D and contiguous, on any device.
    """

    start: int
    data: torch.Tensor

    @property
    def stop(self) -> int:
        return self.start + self.data.numel()


@dataclass(frozen=True, eq=False)
class SlicedTensor:
    """A tensor of the state. Over all processes the slices cover each element exactly once.

    Exactly once, because a process writes its slices to disk: an element in no slice would be lost,
    one in two slices would be written twice. The same object at two places of a tree is one tensor with two names.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    slices: tuple[TensorSlice, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @classmethod
    def whole(cls, tensor: torch.Tensor) -> SlicedTensor:
        """Return a tensor that this process holds whole; it must be contiguous."""
        return cls(tuple(tensor.shape), tensor.dtype, (TensorSlice(0, tensor.detach().view(-1)),))

    @classmethod
    def elsewhere(cls, tensor: torch.Tensor) -> SlicedTensor:
        """Return the same tensor on a process that holds nothing of it."""
        return cls(tuple(tensor.shape), tensor.dtype, ())
