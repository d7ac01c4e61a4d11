"""train_gpt2_mod.py on a machine that computes wrongly once: FLIP=PLACE:N:BIT on the rank ON.

`grad:N`: a bit of a gradient after the N-th backward pass; `activation:N`: of what the first layer returns in the N-th
forward pass of training; `weight:N`: of a weight after the N-th update.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

import train_gpt2_mod
from unbroken.distributed.flat_params import ShardedParameters
from unbroken.distributed.gradients import Gradients
from unbroken.model.gpt import GPT

PLACE, N, BIT = os.environ["FLIP"].split(":")
HERE = os.environ.get("ON", "0") == os.environ.get("RANK", "0")
ELEMENT = 12_345
seen: Counter[str] = Counter()
backward, gather_weights, block = Tensor.backward, Gradients.gather_weights, GPT.run_block
sharded: list[ShardedParameters] = []


def is_now(place: str) -> bool:
    seen[place] += 1
    return HERE and place == PLACE and seen[place] == int(N)


def flip(tensor: Tensor) -> None:
    """Change one bit of a tensor, in place."""
    size = tensor.element_size()
    word = {4: torch.int32, 2: torch.int16}[size]
    flat = tensor.detach().view(-1).view(word)
    flat[ELEMENT % flat.numel()] ^= 1 << int(BIT) % (8 * size - 1)


def after_backward(self: Tensor, *typed: Any, **named: Any) -> None:
    backward(self, *typed, **named)
    if is_now("grad"):
        flip(sharded[0].groups[0].grad)


def after_update(self: Gradients) -> None:
    gather_weights(self)
    if is_now("weight"):
        flip(self._sharded.groups[0].data)


def after_block(self: GPT, layer: Any, *inputs: Any) -> Tensor:
    result = block(self, layer, *inputs)
    if self.training and is_now("activation"):
        result = result.clone()
        flip(result)
    return result


class Noted(ShardedParameters):
    def __init__(self, *typed: Any, **named: Any) -> None:
        super().__init__(*typed, **named)
        sharded.append(self)


if __name__ == "__main__":
    Tensor.backward = after_backward  # type: ignore[method-assign,assignment]
    Gradients.gather_weights = after_update  # type: ignore[method-assign]
    GPT.run_block = after_block  # type: ignore[method-assign]
    train_gpt2_mod.ShardedParameters = Noted  # type: ignore[misc]
    sys.exit(train_gpt2_mod.main(sys.argv[1:]))
