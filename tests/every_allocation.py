"""Train once for each allocation of a phase, in one process: GPU memory runs out at that allocation.

Flags: those of the training. PHASE is `build`, or `pass` (forward and backward of a microbatch), `clip`,
`losses` or `update` of step 3, or `val` of step 2. STRIDE tries one of so many allocations, beginning with FIRST.
Prints one line of JSON for each training: the number of the allocation, the exit code, and what was written to stderr.
The run_id ends with that number. Training 0 only counts the allocations.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import train_gpt2_mod
from unbroken.distributed.gradients import Gradients
from unbroken.model.gpt import GPT
from unbroken.optim import Optimizers
from unbroken.validation import Validator

PHASE, STRIDE, FIRST = os.environ["PHASE"], int(os.environ["STRIDE"]), int(os.environ["FIRST"])
# The method that a phase is, and the call of it in which memory runs out: in the first microbatch of step 3, say.
METHODS: dict[str, tuple[Any, str, int]] = {
    "build": (train_gpt2_mod, "build", 1),
    "pass": (GPT, "forward", 9),
    "replay": (GPT, "forward", 2),
    "clip": (Gradients, "clip", 3),
    "losses": (Gradients, "losses", 3),
    "update": (Optimizers, "step", 3),
    "val": (Validator, "run", 2),
}


class MemoryRunsOut(TorchDispatchMode):
    """A mode that counts the allocations of torch and lets number `at` fail."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.count = at, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        allocates = any(result.alias_info is None for result in func._schema.returns)  # no view, not in place
        self.count += allocates
        if allocates and self.count == self.at:
            raise torch.OutOfMemoryError("that is too much")
        return func(*args, **(kwargs or {}))


def train(argv: list[str], at: int) -> tuple[dict[str, Any], int]:
    """Train once; return how it ended, and the number of allocations in the phase."""
    (owner, name, call), calls, mode = METHODS[PHASE], 0, MemoryRunsOut(at)
    method: Callable[..., Any] = getattr(owner, name)

    def watched(*typed: Any, **named: Any) -> Any:
        nonlocal calls
        calls += owner is not GPT or typed[0].training
        if calls != call or (owner is GPT and not typed[0].training):
            return method(*typed, **named)
        if owner is not GPT:
            with mode:
                return method(*typed, **named)
        opened.enter_context(mode)  # the backward pass follows, until its gradient is added
        return method(*typed, **named)

    def add(*typed: Any) -> None:
        add_gradient(*typed)
        opened.close()

    add_gradient = Gradients.add
    setattr(owner, name, watched)
    Gradients.add = add  # type: ignore[method-assign]
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.ExitStack() as opened:
            replay = ["--replay", "first" if PHASE == "replay" else "off"]
            code = train_gpt2_mod.main([*argv, *replay, "--run_id", f"00000000-0000-4000-8000-{at:012d}"])
    finally:
        setattr(owner, name, method)
        Gradients.add = add_gradient  # type: ignore[method-assign]
    return {"allocation": at, "code": code, "stderr": err.getvalue()}, mode.count


if __name__ == "__main__":
    counted, allocations = train(sys.argv[1:], 0)
    print(json.dumps({**counted, "allocations": allocations}), flush=True)
    for at in range(FIRST, allocations + 1, STRIDE):
        print(json.dumps(train(sys.argv[1:], at)[0]), flush=True)
