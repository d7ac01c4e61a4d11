"""A tensor in a file: its storage, offset and strides, and the check that they lie inside the file."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from unbroken.text import printable

# The dtypes that torch.save writes and whose elements are whole bytes: no quantized and no packed ones.
DTYPES = frozenset(
    getattr(torch, name)
    for name in (
        *("float32", "float64", "float16", "bfloat16", "complex64", "complex128", "complex32", "bool"),
        *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"),
    )
)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: shape, dtype and place. Offset and strides are in elements of storage `data/<key>`."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    key: str
    offset: int
    strides: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def contiguous(self) -> bool:
        """Whether the elements lie in the order of their indices, without holes."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != expected:
                return self.numel == 0
            expected *= size
        return True

    def __repr__(self) -> str:
        return f"tensor(shape={self.shape}, dtype={self.dtype})"


@dataclass(frozen=True)
class Storage:
    """A storage `data/<key>` of the file, as a pickle refers to it; an untyped one has no dtype."""

    key: str
    dtype: torch.dtype | None
    nbytes: int


class PickleRefused(ValueError):
    """An error: a pickle that asks for something not allowed, or is damaged."""


def locate_tensor(storage: Storage, dtype: torch.dtype, offset: Any, shape: Any, strides: Any) -> StoredTensor:
    """Return the tensor at a place in a storage.

    Args:
        storage: Its storage.
        dtype: Its dtype.
        offset: Its first element; untrusted, like the following two.
        shape: Its shape.
        strides: Its strides in elements.

    Raises PickleRefused if elements lie outside the storage, or are more than the storage has.
    """
    if type(shape) is not tuple or type(strides) is not tuple or len(shape) != len(strides) or len(shape) > 64:
        raise PickleRefused("it has a tensor whose shape makes no sense")
    numbers = (offset, *shape, *strides)
    if any(type(number) is not int or not 0 <= number < 2**63 for number in numbers):
        raise PickleRefused("it has a tensor whose shape makes no sense")
    if dtype not in DTYPES or storage.nbytes % dtype.itemsize:
        raise PickleRefused(f"it has a tensor of {dtype} in {storage.nbytes} bytes, which cannot be read")
    numel = math.prod(shape)
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) if numel else -1
    if (last + 1) * dtype.itemsize > storage.nbytes or numel * dtype.itemsize > storage.nbytes:
        raise PickleRefused(
            f"a tensor of shape {printable(shape)} does not fit into the {storage.nbytes} bytes of data/{storage.key}"
        )
    if numel == 0:
        offset = 0
    return StoredTensor(shape, dtype, storage.key, offset, strides)
