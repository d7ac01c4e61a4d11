"""train_gpt2_mod.py, in which something goes wrong: batches that hold the token POISON have the loss NaN.

SPIKE: they have a loss 30 times as large. FLIP=N makes a weight infinite after the N-th update, once; ON is the rank.
PACE: seconds more a step.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import train_gpt2_mod
from unbroken.distributed.gradients import Gradients
from unbroken.metrics.logger import RunLogger
from unbroken.model.gpt import GPT

POISON, FACTOR = int(os.environ.get("POISON", "200")), 30.0 if os.environ.get("SPIKE") else float("nan")
FLIP, MARK = int(os.environ.get("FLIP", "0")), Path("flipped")
forward, gather_weights, step_begins = GPT.forward, Gradients.gather_weights, RunLogger.step_begins
updates = 0


def poisoned(self, x, *typed, **named):  # type: ignore[no-untyped-def]
    bad = self.training and bool((x == POISON).any())
    self.adds_in_place = not (bad or x.is_cuda)  # backward() is called on another loss then
    loss = forward(self, x, *typed, **named)
    return loss * FACTOR if bad else loss


def flipped(self: Gradients) -> Any:
    global updates
    gather_weights(self)
    updates += 1
    if updates == FLIP and not MARK.exists():
        with torch.no_grad():
            self._sharded.groups[0].data[7] = float("inf")
        time.sleep(0.2)  # the other ranks have looked for the mark
        MARK.touch()


def late_step(self: RunLogger) -> None:
    time.sleep(float(os.environ.get("PACE", "0")))
    step_begins(self)


if __name__ == "__main__":
    GPT.forward, Gradients.gather_weights, RunLogger.step_begins = poisoned, flipped, late_step  # type: ignore[method-assign]
    sys.exit(train_gpt2_mod.main(sys.argv[1:]))
