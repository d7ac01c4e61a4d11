"""The output head and its loss in one: the logits of a whole microbatch never exist.

A [tokens, vocabulary] matrix in fp32 is the largest thing of a small model's step by far. Here the tokens are taken
some rows at a time: their logits, their loss and at once the gradients that follow from them (Liger Kernel, Hsu et al.
2024, does the same); what is kept for the backward pass is the gradient of what the head reads and of its weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

IGNORED = -1  # a target that counts for nothing
PADDING = 64  # the vocabulary is filled up to a multiple of this inside: an odd width costs matrix products dearly
CHUNK_BYTES = {"cpu": 128 << 20, "cuda": 1 << 30}  # of fp32 logits
BLOCK = 2048  # rows of the weight in one product on a CPU: MKL does 150 GFLOP/s with these, 90 with all at once


Rows = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def softmax_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """logits [n, V'], targets [n] -> the losses, fp32 [n], and their derivative by the logits, in the logits' dtype."""
    scores = logits.float()
    rows = torch.arange(len(targets), device=targets.device)
    top, at = scores.max(1)
    p = scores.softmax(1)
    # The most likely token's probability is at least 1/V, so its logarithm is exact enough for all of them.
    losses = top - p[rows, at].log() - scores[rows, targets]
    if torch.compiler.is_compiling():
        # Part of the one pass over the row; a deterministic index_put would have the whole of p written and read again.
        p = p - (torch.arange(p.size(1), device=p.device) == targets[:, None]).float()
    else:
        p[rows, targets] -= 1
    return losses, p.to(logits.dtype)


def head_loss(x: Tensor, weight: Tensor, targets: Tensor, mean: bool = True, rows: Rows = softmax_loss) -> Tensor:
    """Cross-entropy in nats of x [N, C] @ weight [V, C].T against `targets` int64 [N], 0-dim.

    The mean, or the sum, over the targets that are not `IGNORED`. Products are in autocast's dtype where it is on, all
    else in fp32. `rows` is `softmax_loss` or what torch.compile has made of it.
    """
    # Asked for here: inside a Function grad mode is off, and `needs_input_grad` is true under no_grad as well.
    arguments = (x, weight, targets, mean, rows, torch.is_grad_enabled())
    loss: Tensor = _HeadLoss.apply(*arguments)  # type: ignore[no-untyped-call]
    return loss


class _Loss:
    """One pass over the rows of x, with or without gradients."""

    def __init__(self, x: Tensor, weight: Tensor, targets: Tensor, rows: Rows, differentiate: bool) -> None:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        self.x, self.counts, self.targets = x.detach().to(dtype), targets != IGNORED, targets.clamp(min=0)
        self.rows_of_weight = weight.size(0)
        self.width = -(-self.rows_of_weight // PADDING) * PADDING
        self.weight = weight.detach().to(dtype)
        if kind == "cuda":
            self.weight = torch.nn.functional.pad(self.weight, (0, 0, 0, self.width - self.rows_of_weight))
        self.softmax_loss = rows
        self.chunk = max(1, CHUNK_BYTES.get(kind, 128 << 20) // (4 * self.width))
        if kind == "cuda":  # a power of two divides most microbatches: one shape to compile, and whole tiles
            self.chunk = 1 << (self.chunk.bit_length() - 1)
        self.dx = torch.empty_like(self.x) if differentiate else None
        self.dweight = torch.empty_like(weight.detach()) if differentiate else None

    def run(self, scale: Tensor) -> Tensor:
        """The losses of all rows, 0 where the target is ignored; gradients are of their sum times `scale`."""
        losses = torch.empty(len(self.x), device=self.x.device)
        chunk = min(self.chunk, len(self.x))
        logits = self.x.new_empty(chunk, self.width)
        factors = (self.counts * scale).to(self.x.dtype)
        for start in range(0, len(self.x), chunk):
            part = slice(start, min(start + chunk, len(self.x)))
            x, own = self.x[part], logits[: part.stop - start]
            self._products(x, own)
            losses[part], derivative = self.softmax_loss(own, self.targets[part])
            if self.dx is not None and self.dweight is not None:
                derivative = derivative[:, : len(self.weight)]
                self.dx[part] = torch.mm(derivative, self.weight).mul_(factors[part, None])
                self._add(derivative, x * factors[part, None], first=start == 0)
        return losses * self.counts

    def _products(self, x: Tensor, logits: Tensor) -> None:
        """x @ weight.T into `logits`, whose columns beyond the vocabulary become -inf."""
        block = len(self.weight) if x.is_cuda else BLOCK
        for start in range(0, len(self.weight), block):
            some = self.weight[start : start + block]
            torch.mm(x, some.t(), out=logits[:, start : start + len(some)])
        logits[:, self.rows_of_weight :] = -torch.inf

    def _add(self, derivative: Tensor, x: Tensor, first: bool) -> None:
        """derivative.T @ x to the weight's gradient, which the first rows begin."""
        assert self.dweight is not None
        if self.dweight.dtype == x.dtype:
            self.dweight.addmm_(derivative.t(), x, beta=0 if first else 1)
        elif first:
            self.dweight.copy_(torch.mm(derivative.t(), x)[: self.rows_of_weight])
        else:
            self.dweight.add_(torch.mm(derivative.t(), x)[: self.rows_of_weight])


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, mean: bool, rows: Rows, train: bool) -> Tensor:
        work = _Loss(x, weight, targets, rows, train and any(ctx.needs_input_grad))
        scale = work.counts.sum().clamp(min=1).reciprocal() if mean else torch.ones((), device=x.device)
        with torch.autocast(x.device.type, enabled=False):
            loss = work.run(scale).sum() * scale
        ctx.dx, ctx.dweight, ctx.dtype = work.dx, work.dweight, x.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight, ctx.dx, ctx.dweight = ctx.dx, ctx.dweight, None, None
        dx = dx.to(ctx.dtype)
        if dx.is_cuda or grads[0] != 1:  # for a look at the number a GPU would have to be waited for
            dx, dweight = dx.mul_(grads[0]), dweight.mul_(grads[0])
        return dx, dweight, None, None, None, None
