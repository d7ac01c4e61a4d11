"""Self-attention over earlier tokens: torch's own, or in compiled code on a Hopper GPU the kernels for it.

The kernels are faster there than torch's deterministic ones (docs/measurements.md). They give other bits, so what
chooses them are properties of the GPU and the model alone, never a measurement.
"""

from __future__ import annotations

import importlib
import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

HOPPER = (9, 0)  # compute capability of H100, H200 and GH200
HEAD_WIDTH = 64  # channels of a head for which the kernels are made: those of all sizes of both families

_has_kernels = False


def load_kernels(device: torch.device) -> None:
    """Let code that is compiled from now on use the kernels, if they are for the GPU `device`."""
    global _has_kernels
    is_hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) == HOPPER
    if is_hopper and importlib.util.find_spec("triton") is not None:
        importlib.import_module("unbroken.model.hopper_attention")  # registers the operators
        _has_kernels = True


def attend(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, dropout: float = 0.0) -> Tensor:
    """Return softmax(q @ k.T / sqrt(D)) @ v for each head, [B, H, T, D] like q.

    Args:
        q: Queries, [B, H, T, D].
        k: Keys, [B, H, S, D].
        v: Values, [B, H, S, D].
        is_causal: Whether a token reads only itself and earlier ones; then S is T.
        dropout: Share of the probabilities that become zero.
    """
    if (
        _has_kernels
        and torch.compiler.is_compiling()
        and q.is_cuda
        and q.dtype == torch.bfloat16
        and q.size(-1) == HEAD_WIDTH
        and is_causal
        and dropout == 0
    ):
        out: Tensor = torch.ops.unbroken.causal_attention(q, k, v)[0]
        return out
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=is_causal)
