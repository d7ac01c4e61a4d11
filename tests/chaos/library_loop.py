"""Somebody else's training loop, which saves with unbroken.checkpoint; `committed` gets each step that is durable."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch

from unbroken.checkpoint import CheckpointWriter, latest, load

LAST = 12

if __name__ == "__main__":
    folder = Path("checkpoints")
    with CheckpointWriter(folder, keep_last=2) as writer:
        newest = latest(folder)
        state = load(newest) if newest else {"weights": torch.arange(20_000, dtype=torch.float32), "step": 0}
        while state["step"] < LAST:
            state = {"weights": state["weights"] * 1.001 + state["step"], "step": state["step"] + 1}
            if state["step"] % 2 == 0:
                writer.save(state, state["step"])
                writer.wait()
                with open("committed", "a") as file:
                    file.write(f"{state['step']}\n")
