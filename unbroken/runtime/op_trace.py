"""A record of every operation of a step, by which the doctor finds the first one that differs between two runs."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from unbroken.distributed.flat_params import ShardedParameters
from unbroken.errors import UserError

SUM = "sum-over-the-microbatches"
AFTER_MICROBATCHES = 2**31  # where the sum stands among the microbatches of its step


def digest(value: Any) -> int:
    """Return a CRC-32 over the bits of every tensor in an operation's result."""
    crc = 0
    for tensor in _tensors(value):
        host = tensor.detach().cpu().contiguous().view(-1)
        crc = zlib.crc32(host.view(torch.uint8).numpy().data, crc) if host.numel() else crc
    return crc


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A recorder of every operation below autograd, forward and backward, with a digest of its result."""

    def __init__(self, lines: list[str], step: int, microbatch: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._lines, self._place, self._count = lines, f"{step} {microbatch}", 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # Memory that was not written to yet has random contents, and so do views of it.
        if "empty" not in str(func) and not getattr(func, "is_view", False):
            self._lines.append(f"{self._place} {self._count} {func} {digest(result):08x}")
        self._count += 1
        return result


@dataclass
class OperationTrace:
    """A trace of this rank's operations in steps 1 to `steps`, appended to `path`; with 0 it does nothing."""

    steps: int
    path: Path
    _lines: list[str] = field(default_factory=list)

    def microbatch(self, step: int, index: int) -> AbstractContextManager[Any]:
        """Return the context for the forward and backward pass of one microbatch."""
        return _Recorder(self._lines, step, index) if step <= self.steps else nullcontext()

    def gradient(self, step: int, sharded: ShardedParameters) -> None:
        """Record the blocks of the summed gradient that this rank owns, and write to the file."""
        if step > self.steps:
            return
        for number, group in enumerate(sharded.groups):
            for owned in group.owned:
                for start in range(owned.start, min(owned.stop, group.used), group.block):
                    crc = digest(group.grad[start : start + group.block])
                    self._lines.append(f"{step} {AFTER_MICROBATCHES} {number * 2**40 + start} {SUM} {crc:08x}")
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write("\n".join(self._lines) + "\n")
        except OSError as error:
            raise UserError(
                f"cannot write the trace {self.path}: {error.strerror}; go on without --trace_steps"
            ) from None
        self._lines.clear()


def first_difference(left: Path, right: Path) -> str:
    """Return the first operation whose result differs between the traces of two runs, with its step; "" for none."""
    a, b = (_read(folder) for folder in (left, right))
    for key in sorted(a.keys() & b.keys()):
        if a[key] != b[key]:
            step, microbatch, place = key
            name = a[key][0].replace("-", " ")
            where = "" if microbatch == AFTER_MICROBATCHES else f" (operation {place} of microbatch {microbatch})"
            return f"step {step}, {name}{where}"
    return ""


def _read(folder: Path) -> dict[tuple[int, int, int], tuple[str, str]]:
    """Return the records of all ranks by (step, microbatch, place); of a repeated step the last."""
    found = {}
    for path in folder.glob("trace.*.txt"):
        for line in path.read_text("utf-8").splitlines():
            step, microbatch, place, name, crc = line.split(" ")
            found[(int(step), int(microbatch), int(place))] = (name, crc)
    return found
