"""Kernels of our own, by the GPU they are for; compiled code uses them in place of torch's.

They are faster there (docs/measurements.md) and give other bits, so what chooses them are properties of the GPU and the
model alone, never a measurement.
"""

from __future__ import annotations

import importlib

import torch

HOPPER = (9, 0)  # compute capability of H100, H200 and GH200

for_hopper = False  # whether the operators torch.ops.unbroken.* are there, for code that is compiled from now on


def load_kernels(device: torch.device) -> None:
    """Import the kernels for the GPU `device`, if there are any; they register operators."""
    global for_hopper
    if device.type == "cuda" and torch.cuda.get_device_capability(device) == HOPPER:
        importlib.import_module("unbroken.model.hopper_attention")
        importlib.import_module("unbroken.model.hopper_loss")
        for_hopper = True
