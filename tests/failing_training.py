"""train_gpt2_mod.py, to which something happens once: FAILS=train:30 takes its memory in the 30th pass of training.

`val:N`: in the N-th pass of a validation; `build:1`: when the optimizer is made; `save:N`: the disk takes nothing when
the N-th checkpoint is to get its name.
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

import train_gpt2_mod
from unbroken.metrics.logger import RunLogger
from unbroken.model.gpt import GPT
from unbroken.optim import build_optimizer

FAILS = os.environ["FAILS"].split(",")
seen: Counter[str] = Counter()
forward, make_durable = GPT.forward, RunLogger.make_durable


def fails(what: str) -> bool:
    seen[what] += 1
    return f"{what}:{seen[what]}" in FAILS


def without_memory(self, *typed, **named):  # type: ignore[no-untyped-def]
    if fails("train" if self.training else "val"):
        raise torch.OutOfMemoryError("that is too much")
    return forward(self, *typed, **named)


def too_large(*typed: Any, **named: Any) -> Any:
    if fails("build"):
        raise torch.OutOfMemoryError("that is too much")
    return build_optimizer(*typed, **named)


def without_disk(self: RunLogger) -> None:
    if fails("save"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    make_durable(self)


if __name__ == "__main__":
    GPT.forward, RunLogger.make_durable = without_memory, without_disk  # type: ignore[method-assign]
    train_gpt2_mod.build_optimizer = too_large
    sys.exit(train_gpt2_mod.main(sys.argv[1:]))
