"""train_gpt2_mod.py, to which something happens once: FAILS=train:30 takes its memory in the 30th pass of training.

`val:N`: in the N-th pass of a validation; `build:1`: when the optimizer is made; `save:N`: the disk takes nothing when
the N-th checkpoint is to get its name. `exchange:N`, `clip:N`, `losses:N`, `update:N`, `grad:N`: in the N-th of these,
at operation OPERATION of it. NAMED is the report, by default torch's; ON is the only rank that fails.
"""

from __future__ import annotations

import errno
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import train_gpt2_mod
from unbroken.distributed.gradients import Gradients
from unbroken.metrics.logger import RunLogger
from unbroken.model.gpt import GPT
from unbroken.optim import Optimizers, build_optimizer

FAILS = os.environ["FAILS"].split(",") if os.environ.get("ON", "0") == os.environ.get("RANK", "0") else []
OPERATION, NAMED = int(os.environ.get("OPERATION", "1")), os.environ.get("NAMED", "")
PHASES = {
    **{"exchange": (Gradients, "exchange"), "clip": (Gradients, "clip"), "losses": (Gradients, "losses")},
    **{"update": (Optimizers, "step"), "grad": (Gradients, "add")},
}
seen: Counter[str] = Counter()
forward, make_durable = GPT.forward, RunLogger.make_durable


def fails(what: str) -> bool:
    seen[what] += 1
    return f"{what}:{seen[what]}" in FAILS


OF_TORCH = (
    "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.11 GiB of which 10.75 MiB is"
    " free. Including non-PyTorch memory, this process has 79.09 GiB memory in use. Of the allocated memory 78.40 GiB"
    " is allocated by PyTorch, and 97.42 MiB is reserved by PyTorch but unallocated.\nSee its page."
)


def too_much() -> Exception:
    if NAMED == "MemoryError":
        return MemoryError()
    return RuntimeError(NAMED) if NAMED else torch.OutOfMemoryError(OF_TORCH)


class MemoryRunsOut(TorchDispatchMode):
    """Has every operation of torch come by, and lets one fail."""

    def __init__(self) -> None:
        super().__init__()
        self.left = OPERATION

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left == 0:
            raise too_much()
        return func(*args, **(kwargs or {}))


def failing(name: str, method: Any) -> Any:
    def phase(*typed: Any, **named: Any) -> Any:
        if not fails(name):
            return method(*typed, **named)
        with MemoryRunsOut():
            return method(*typed, **named)

    return phase


def without_memory(self, *typed, **named):  # type: ignore[no-untyped-def]
    if fails("train" if self.training else "val"):
        raise too_much()
    return forward(self, *typed, **named)


def too_large(*typed: Any, **named: Any) -> Any:
    if fails("build"):
        raise too_much()
    return build_optimizer(*typed, **named)


def without_disk(self: RunLogger) -> None:
    if fails("save"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    make_durable(self)


if __name__ == "__main__":
    GPT.forward, RunLogger.make_durable = without_memory, without_disk  # type: ignore[method-assign]
    train_gpt2_mod.build_optimizer = too_large
    for name, (owner, method) in PHASES.items():
        setattr(owner, method, failing(name, getattr(owner, method)))
    sys.exit(train_gpt2_mod.main([*sys.argv[1:], "--replay", "off"]))
