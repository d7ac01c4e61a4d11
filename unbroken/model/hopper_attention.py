"""Causal attention in Triton for Hopper GPUs, forward and backward, with the same bits each time.

The algorithm is FlashAttention's (Dao 2023): blocks of scores, never all of them. Its backward pass adds the parts of
dq in any order, or in one order with less speed. Here two kernels compute every block of scores again, one for dq and
one for dk and dv, so that a single program adds each gradient. The softmax is computed with powers of 2.

A program has BLOCK queries of a head (`_forward`, `_dq`) or BLOCK keys (`_dk_dv`). It goes through the blocks of the
other side one by one, and masks only the one on the diagonal.

Shapes: B sequences, H heads, T tokens, D channels of a head.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"
from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

BLOCK = 64
LAUNCH = {"BLOCK": BLOCK, "num_warps": 4, "num_stages": 3}  # the fastest of some thirty on an H200
LOG2_E = math.log2(math.e)


@triton.jit
def _load(base, stride, start, length, BLOCK: tl.constexpr, D: tl.constexpr, WHOLE: tl.constexpr):
    """Return the rows from `start` on, [BLOCK, D]; those from `length` on are 0."""
    rows = start + tl.arange(0, BLOCK)
    at = base + rows[:, None] * stride + tl.arange(0, D)[None, :]
    if WHOLE:
        return tl.load(at)
    return tl.load(at, mask=rows[:, None] < length, other=0.0)


@triton.jit
def _store(base, stride, start, length, rows_of, BLOCK: tl.constexpr, D: tl.constexpr, WHOLE: tl.constexpr):
    """Write [BLOCK, D] to the rows from `start` on, up to `length`."""
    rows = start + tl.arange(0, BLOCK)
    at = base + rows[:, None] * stride + tl.arange(0, D)[None, :]
    if WHOLE:
        tl.store(at, rows_of.to(base.dtype.element_ty))
    else:
        tl.store(at, rows_of.to(base.dtype.element_ty), mask=rows[:, None] < length)


@triton.jit
def _load_row(base, start, length, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """Return the numbers from `start` on, [BLOCK]; those from `length` on are 0."""
    at = start + tl.arange(0, BLOCK)
    if WHOLE:
        return tl.load(base + at)
    return tl.load(base + at, mask=at < length, other=0.0)


@triton.jit
def _store_row(base, start, length, row, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """Write [BLOCK] from `start` on, up to `length`."""
    at = start + tl.arange(0, BLOCK)
    if WHOLE:
        tl.store(base + at, row)
    else:
        tl.store(base + at, row, mask=at < length)


@triton.jit
def _program(length, H, BLOCK: tl.constexpr):
    """Return (start of the block, batch, head) of this program. The blocks of a head are neighbours."""
    blocks = tl.cdiv(length, BLOCK)
    number = tl.program_id(0)
    head = number // blocks
    return (number % blocks) * BLOCK, (head // H).to(tl.int64), head % H


@triton.jit
def _forward_block(
    total, summed, top, q, k_base, v_base, k_stride, v_stride, start, length,
    SCALE: tl.constexpr, DIAGONAL: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Add the keys from `start` on: the values in `total`, the powers in `summed`, the largest exponent in `top`."""
    k = _load(k_base, k_stride, start, length, BLOCK, D, WHOLE)
    exponent = tl.dot(q, tl.trans(k)) * SCALE
    if DIAGONAL:
        rows = tl.arange(0, BLOCK)
        exponent = tl.where(rows[:, None] >= rows[None, :], exponent, float("-inf"))
    new_top = tl.maximum(top, tl.max(exponent, 1))
    p = tl.math.exp2(exponent - new_top[:, None])
    shrink = tl.math.exp2(top - new_top)
    v = _load(v_base, v_stride, start, length, BLOCK, D, WHOLE)
    total = tl.dot(p.to(v.dtype), v, total * shrink[:, None])
    return total, summed * shrink + tl.sum(p, 1), new_top


@triton.jit
def _forward(
    q, k, v, out, exponents, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, length, H,
    SCALE: tl.constexpr, D: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    start, b, h = _program(length, H, BLOCK)
    k_base, v_base = k + b * k_b + h * k_h, v + b * v_b + h * v_h
    rows = _load(q + b * q_b + h * q_h, q_t, start, length, BLOCK, D, WHOLE)
    total = tl.zeros([BLOCK, D], tl.float32)
    summed = tl.zeros([BLOCK], tl.float32)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    for at in tl.range(0, start, BLOCK):
        total, summed, top = _forward_block(
            total, summed, top, rows, k_base, v_base, k_t, v_t, at, length, SCALE, False, BLOCK, D, True
        )
    total, summed, top = _forward_block(
        total, summed, top, rows, k_base, v_base, k_t, v_t, start, length, SCALE, True, BLOCK, D, WHOLE
    )
    _store(out + (b * length * H + h) * D, H * D, start, length, total / summed[:, None], BLOCK, D, WHOLE)
    _store_row(exponents + (b * H + h) * length, start, length, top + tl.math.log2(summed), BLOCK, WHOLE)


@triton.jit
def _dq_block(
    dq, q, do, exponent, delta, k_base, v_base, k_stride, v_stride, start, length,
    SCALE: tl.constexpr, DIAGONAL: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Add what the keys from `start` on give to the gradient of the queries."""
    k = _load(k_base, k_stride, start, length, BLOCK, D, WHOLE)
    v = _load(v_base, v_stride, start, length, BLOCK, D, WHOLE)
    p = tl.math.exp2(tl.dot(q, tl.trans(k)) * SCALE - exponent[:, None])
    if DIAGONAL:
        rows = tl.arange(0, BLOCK)
        p = tl.where(rows[:, None] >= rows[None, :], p, 0.0)
    ds = p * (tl.dot(do, tl.trans(v)) - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq)


@triton.jit
def _dq(
    q, k, v, out, do, exponents, deltas, dq, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, length, H,
    SCALE: tl.constexpr, FACTOR: tl.constexpr, D: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    start, b, h = _program(length, H, BLOCK)
    k_base, v_base = k + b * k_b + h * k_h, v + b * v_b + h * v_h
    own, stride, of_head = (b * length * H + h) * D, H * D, (b * H + h) * length
    q_rows = _load(q + b * q_b + h * q_h, q_t, start, length, BLOCK, D, WHOLE)
    do_rows = _load(do + own, stride, start, length, BLOCK, D, WHOLE)
    out_rows = _load(out + own, stride, start, length, BLOCK, D, WHOLE)
    delta = tl.sum(do_rows.to(tl.float32) * out_rows.to(tl.float32), 1)
    _store_row(deltas + of_head, start, length, delta, BLOCK, WHOLE)
    exponent = _load_row(exponents + of_head, start, length, BLOCK, WHOLE)
    total = tl.zeros([BLOCK, D], tl.float32)
    for at in tl.range(0, start, BLOCK):
        total = _dq_block(
            total, q_rows, do_rows, exponent, delta, k_base, v_base, k_t, v_t, at, length, SCALE, False, BLOCK, D, True
        )
    total = _dq_block(
        total, q_rows, do_rows, exponent, delta, k_base, v_base, k_t, v_t, start, length, SCALE, True, BLOCK, D, WHOLE
    )
    _store(dq + own, stride, start, length, total * FACTOR, BLOCK, D, WHOLE)


@triton.jit
def _dk_dv_block(
    dk, dv, k, v, q_base, do_base, q_stride, do_stride, exponents, deltas, start, length,
    SCALE: tl.constexpr, DIAGONAL: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Add what the queries from `start` on give to the gradients of the keys and values."""
    q = _load(q_base, q_stride, start, length, BLOCK, D, WHOLE)
    do = _load(do_base, do_stride, start, length, BLOCK, D, WHOLE)
    exponent = _load_row(exponents, start, length, BLOCK, WHOLE)
    delta = _load_row(deltas, start, length, BLOCK, WHOLE)
    p = tl.math.exp2(tl.dot(k, tl.trans(q)) * SCALE - exponent[None, :])  # transposed: keys by queries
    if DIAGONAL:
        rows = tl.arange(0, BLOCK)
        p = tl.where(rows[None, :] >= rows[:, None], p, 0.0)
    dv = tl.dot(p.to(do.dtype), do, dv)
    ds = p * (tl.dot(v, tl.trans(do)) - delta[None, :])
    return tl.dot(ds.to(q.dtype), q, dk), dv


@triton.jit
def _dk_dv(
    q, k, v, do, exponents, deltas, dk, dv, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, length, H,
    SCALE: tl.constexpr, FACTOR: tl.constexpr, D: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    start, b, h = _program(length, H, BLOCK)
    own, stride, of_head = (b * length * H + h) * D, H * D, (b * H + h) * length
    q_base, do_base = q + b * q_b + h * q_h, do + own
    exponents, deltas = exponents + of_head, deltas + of_head
    k_rows = _load(k + b * k_b + h * k_h, k_t, start, length, BLOCK, D, WHOLE)
    v_rows = _load(v + b * v_b + h * v_h, v_t, start, length, BLOCK, D, WHOLE)
    dk_rows = tl.zeros([BLOCK, D], tl.float32)
    dv_rows = tl.zeros([BLOCK, D], tl.float32)
    dk_rows, dv_rows = _dk_dv_block(
        dk_rows, dv_rows, k_rows, v_rows, q_base, do_base, q_t, stride, exponents, deltas,
        start, length, SCALE, True, BLOCK, D, WHOLE,
    )  # fmt: skip
    for at in tl.range(start + BLOCK, length, BLOCK):
        dk_rows, dv_rows = _dk_dv_block(
            dk_rows, dv_rows, k_rows, v_rows, q_base, do_base, q_t, stride, exponents, deltas,
            at, length, SCALE, False, BLOCK, D, WHOLE,
        )  # fmt: skip
    _store(dk + own, stride, start, length, dk_rows * FACTOR, BLOCK, D, WHOLE)
    _store(dv + own, stride, start, length, dv_rows, BLOCK, D, WHOLE)


def _new(like: Tensor) -> Tensor:
    """Return memory for [B, H, T, D] in which the heads of a token are neighbours, as the matrix products want them."""
    b, h, t, d = like.shape
    return like.new_empty(b, t, h, d).transpose(1, 2)


def _common(q: Tensor, k: Tensor, v: Tensor) -> tuple[tuple[int], tuple[Any, ...], dict[str, Any]]:
    """Return what all kernels have in common: grid, strides with sizes, and constants."""
    b, h, t, d = q.shape
    strides = [size for each in (q, k, v) for size in each.stride()[:3]]
    constants = {"SCALE": LOG2_E / math.sqrt(d), "D": d, "WHOLE": t % BLOCK == 0, **LAUNCH}
    return (triton.cdiv(t, BLOCK) * b * h,), (*strides, t, h), constants


@triton_op("unbroken::causal_attention", mutates_args={})
def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return the attention, bf16 [B, H, T, D], and log2 of the sums of its powers, fp32 [B, H, T].

    Args:
        q: Queries, bf16 [B, H, T, D].
        k: Keys, like q.
        v: Values, like q.
    """
    out, exponents = _new(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    grid, arguments, constants = _common(q, k, v)
    wrap_triton(_forward)[grid](q, k, v, out, exponents, *arguments, **constants)
    return out, exponents


@triton_op("unbroken::causal_attention_backward", mutates_args={})
def causal_attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, exponents: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v, bf16 [B, H, T, D]; `do` is that of `out`."""
    do = do.transpose(1, 2).contiguous()
    dq, dk, dv, deltas = _new(q), _new(q), _new(q), torch.empty_like(exponents)
    grid, arguments, constants = _common(q, k, v)
    constants["FACTOR"] = 1 / math.sqrt(q.size(-1))
    wrap_triton(_dq)[grid](q, k, v, out, do, exponents, deltas, dq, *arguments, **constants)
    wrap_triton(_dk_dv)[grid](q, k, v, do, exponents, deltas, dk, dv, *arguments, **constants)
    return dq, dk, dv


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx: Any, do: Tensor, _: Tensor) -> tuple[Tensor, ...]:
    gradients: tuple[Tensor, ...] = causal_attention_backward(do, *ctx.saved_tensors)
    return gradients


causal_attention.register_autograd(_backward, setup_context=_save)
