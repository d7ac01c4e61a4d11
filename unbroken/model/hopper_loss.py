"""The softmax of the output head with its loss and derivative in Triton, for Hopper GPUs.

A program has one row of logits, which is read from memory once: the second and third pass find it in the cache, because
few rows are in work at a time.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

LAUNCH = {"BLOCK": 4096, "num_warps": 32}  # the fastest of seven on an H200


@triton.jit
def _load(row, start, width, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """Return the logits from `start` on in fp32, [BLOCK]; those from `width` on are -inf."""
    columns = start + tl.arange(0, BLOCK)
    if WHOLE:
        return tl.load(row + columns).to(tl.float32)
    return tl.load(row + columns, mask=columns < width, other=float("-inf")).to(tl.float32)


@triton.jit
def _write_derivative(row, start, width, top, scale, target, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """Replace the logits from `start` on by their probabilities, less 1 for the target."""
    columns = start + tl.arange(0, BLOCK)
    p = tl.exp(_load(row, start, width, BLOCK, WHOLE) - top) * scale
    derivative = tl.where(columns == target, p - 1, p).to(row.dtype.element_ty)
    if WHOLE:
        tl.store(row + columns, derivative)
    else:
        tl.store(row + columns, derivative, mask=columns < width)


@triton.jit
def _softmax_loss(logits, targets, losses, stride, width, BLOCK: tl.constexpr):
    number = tl.program_id(0)
    row = logits + number.to(tl.int64) * stride
    target = tl.load(targets + number).to(tl.int32)
    of_target = tl.load(row + target).to(tl.float32)  # before other threads overwrite it
    whole = width // BLOCK * BLOCK
    tops = _load(row, whole, width, BLOCK, False)
    for start in tl.range(0, whole, BLOCK):
        tops = tl.maximum(tops, _load(row, start, width, BLOCK, True))
    top = tl.max(tops, 0)
    totals = tl.exp(_load(row, whole, width, BLOCK, False) - top)
    for start in tl.range(0, whole, BLOCK):
        totals += tl.exp(_load(row, start, width, BLOCK, True) - top)
    total = tl.sum(totals, 0)
    tl.store(losses + number, top + tl.log(total) - of_target)
    scale = 1 / total
    for start in tl.range(0, whole, BLOCK):
        _write_derivative(row, start, width, top, scale, target, BLOCK, True)
    _write_derivative(row, whole, width, top, scale, target, BLOCK, False)


@triton_op("unbroken::softmax_loss", mutates_args={"logits"})
def softmax_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the losses, fp32 [n], and overwrite the logits with their derivative.

    Args:
        logits: [n, V'], rows without gaps.
        targets: Token ids, int64 [n].
    """
    losses = torch.empty(len(targets), device=logits.device)
    rows, width = logits.shape
    wrap_triton(_softmax_loss)[(rows,)](logits, targets, losses, logits.stride(0), width, **LAUNCH)
    return losses
