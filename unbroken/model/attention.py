"""Self-attention: torch's, or in compiled code the kernels for the GPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from unbroken.model import kernels

HEAD_WIDTH = 64  # channels of a head for which there are kernels: those of all sizes of both families


def attend(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, dropout: float = 0.0) -> Tensor:
    """Return softmax(q @ k.T / sqrt(D)) @ v of each head, [B, H, T, D] like q.

    Args:
        q: Queries, [B, H, T, D].
        k: Keys, [B, H, S, D].
        v: Values, [B, H, S, D].
        is_causal: Whether a token reads only itself and earlier ones; then S is T.
        dropout: Share of the probabilities that become zero.
    """
    has_kernel = kernels.for_hopper and torch.compiler.is_compiling() and q.is_cuda
    if has_kernel and q.dtype == torch.bfloat16 and q.size(-1) == HEAD_WIDTH and is_causal and dropout == 0:
        out: Tensor = torch.ops.unbroken.causal_attention(q, k, v)[0]
        return out
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=is_causal)
