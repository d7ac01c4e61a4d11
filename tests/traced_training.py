"""train_gpt2_mod.py, which also writes down what each process trains on: `tokens.<rank>.txt`, a line a sequence.

With the environment variable MOST_SEQUENCES there is no memory for more of them at a time; with HARD each microbatch
draws random numbers, as a dropout does, and the snapshot's copies are slow.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import train_gpt2_mod
from unbroken.checkpoint import snapshot
from unbroken.model.gpt import GPT

forward, copy = GPT.forward, snapshot._copy


def recording(self, inputs, targets=None, reduction="mean"):  # type: ignore[no-untyped-def]
    """The model's own forward pass, after noting what it is given."""
    if self.training:
        if len(inputs) > int(os.environ.get("MOST_SEQUENCES", len(inputs))):
            raise torch.OutOfMemoryError("that many do not fit")
        with open(f"tokens.{os.environ.get('RANK', '0')}.txt", "a", encoding="ascii") as file:
            for x, y in zip(inputs.tolist(), targets.tolist(), strict=True):
                file.write(" ".join(map(str, [*x, y[-1]])) + "\n")
                assert x[1:] == y[:-1]
        if "HARD" in os.environ:
            self.adds_in_place = False  # the loss is scaled
            return forward(self, inputs, targets, reduction) * (0.5 + torch.rand(()))
    return forward(self, inputs, targets, reduction)


def slow(*typed):  # type: ignore[no-untyped-def]
    """A copy that the next update overtakes, unless it waits."""
    time.sleep(0.03)
    copy(*typed)


if __name__ == "__main__":
    GPT.forward = recording  # type: ignore[method-assign]
    if "HARD" in os.environ:
        snapshot._copy = slow
    sys.exit(train_gpt2_mod.main([*sys.argv[1:], "--replay", "off"]))
