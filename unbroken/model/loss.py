"""The two ends of the model that share one weight: the output head with its loss, and the embedding.

A [tokens, vocabulary] matrix in fp32 is the largest thing of a small model's step by far. Here the tokens are taken
some rows at a time: their logits, their loss and at once the gradients that follow from them (Liger Kernel, Hsu et al.
2024, does the same); what is kept for the backward pass is the gradient of what the head reads and of its weight.

The weight's gradient is as large as the weight, of a small model a third of all. Autograd would make it three times,
once at each end and their sum, before it adds it to `.grad`. With `in_place` both ends add to `.grad` what is theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -1  # a target that counts for nothing
PADDING = 64  # the vocabulary is filled up to a multiple of this inside: an odd width costs matrix products dearly
CHUNK_BYTES = {"cpu": 128 << 20, "cuda": 1 << 30}  # of fp32 logits
ROWS_ON_CPU = 128  # of logits that `softmax_loss` gets at a time: its fp32 copies of them stay small
BLOCK = 2048  # rows of the weight in one product on a CPU: their result is still in the cache when it is added


Rows = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def softmax_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """logits [n, V'], targets [n] -> the losses, fp32 [n], and the logits, overwritten by the losses' derivative."""
    scores = logits.float()
    rows = torch.arange(len(targets), device=targets.device)
    if torch.compiler.is_compiling():
        # Written as passes over a row; a deterministic index_put would have the whole of p written and read again.
        top = scores.amax(1, keepdim=True)
        exponentials = (scores - top).exp()
        total = exponentials.sum(1, keepdim=True)
        losses = (top + total.log()).squeeze(1) - scores[rows, targets]
        is_target = torch.arange(logits.size(1), device=logits.device) == targets[:, None]
        return losses, logits.copy_(exponentials * (1 / total) - is_target.float())
    top, at = scores.max(1)
    p = scores.softmax(1)
    # The most likely token's probability is at least 1/V, so its logarithm is exact enough for all of them.
    losses = top - p[rows, at].log() - scores[rows, targets]
    p[rows, targets] -= 1
    return losses, logits.copy_(p)


def rows_at_a_time(kind: str, width: int) -> int:
    """How many tokens' logits exist at once on a kind of device, a power of two."""
    return 1 << max(0, (CHUNK_BYTES.get(kind, 128 << 20) // (4 * width)).bit_length() - 1)


def head_loss(
    x: Tensor, weight: Tensor, targets: Tensor, mean: bool = True, rows: Rows = softmax_loss, in_place: bool = False
) -> Tensor:
    """Cross-entropy in nats of x [N, C] @ weight [V, C].T against `targets` int64 [N], 0-dim.

    The mean, or the sum, over the targets that are not `IGNORED`. Products are in autocast's dtype where it is on, all
    else in fp32. `rows` is `softmax_loss` or what torch.compile has made of it. With `in_place` the gradient of the
    weight is added to `weight.grad` already here; the loss must then be what `backward()` is called on.
    """
    # Asked for here: inside a Function grad mode is off, and `needs_input_grad` is true under no_grad as well.
    arguments = (x, weight, targets, mean, rows, torch.is_grad_enabled(), weight.grad if in_place else None)
    loss: Tensor = _HeadLoss.apply(*arguments)  # type: ignore[no-untyped-call]
    return loss


def embed(tokens: Tensor, weight: Tensor, in_place: bool = False) -> Tensor:
    """Token ids int64 [B, T] -> their rows of weight [V, C], [B, T, C]. `in_place` as of `head_loss`."""
    if not in_place or weight.grad is None:
        return F.embedding(tokens, weight)
    rows: Tensor = _Embedding.apply(tokens, weight)  # type: ignore[no-untyped-call]
    return rows


class _ChunkedLoss:
    """One pass over the rows of x, with or without gradients; the weight's is added to `total` where that is given."""

    def __init__(
        self, x: Tensor, weight: Tensor, targets: Tensor, rows: Rows, differentiate: bool, total: Tensor | None
    ) -> None:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        self.x, self.counts, self.targets = x.detach().to(dtype), targets != IGNORED, targets.clamp(min=0)
        self.rows_of_weight = weight.size(0)
        self.width = -(-self.rows_of_weight // PADDING) * PADDING
        self.weight = weight.detach()
        if kind == "cuda" or dtype != weight.dtype:  # which is a copy anyway
            self.weight = weight.new_empty(self.width, weight.size(1), dtype=dtype)
            self.weight[: self.rows_of_weight].copy_(weight.detach())
            self.weight[self.rows_of_weight :] = 0
        self.softmax_loss = rows
        # A power of two divides most microbatches: one shape to compile, and whole tiles.
        self.chunk = rows_at_a_time(kind, self.width)
        self.rest = torch.ones((), device=x.device)
        self.dx = torch.empty_like(self.x) if differentiate else None
        self.adds = total is not None
        self.dweight = (torch.empty_like(weight.detach()) if total is None else total) if differentiate else None

    def run(self, scale: Tensor) -> Tensor:
        """The losses of all rows, 0 where the target is ignored; gradients are of their sum times `scale`.

        In bf16 times the power of two in it, which is exact: 1/n rounded to 8 bits would make each of them up to 0.4%
        too large. The `rest`, 1 to 2, is in what has been added to a `total`, and not yet in other gradients.
        """
        losses = torch.empty(len(self.x), device=self.x.device)
        chunk = min(self.chunk, len(self.x))
        logits = self.x.new_empty(chunk, self.width)
        if self.x.dtype == torch.bfloat16:
            self.rest = 2 * torch.frexp(scale).mantissa
            scale = scale / self.rest
        factors = (self.counts * scale).to(self.x.dtype)
        alpha = float(self.rest) if self.adds else 1.0
        for start in range(0, len(self.x), chunk):
            part = slice(start, min(start + chunk, len(self.x)))
            x, own = self.x[part], logits[: part.stop - start]
            self._products(x, own)
            derivative = self._losses(own, self.targets[part], losses[part])
            if self.dx is not None and self.dweight is not None:
                derivative = derivative[:, : len(self.weight)]
                self.dx[part] = torch.mm(derivative, self.weight).mul_(factors[part, None])
                self._add(derivative, x * factors[part, None], self.dweight, start == 0 and not self.adds, alpha)
        return losses * self.counts

    def _blocks(self) -> Iterator[slice]:
        rows = len(self.weight)
        size = rows if self.weight.is_cuda else BLOCK
        return (slice(start, min(start + size, rows)) for start in range(0, rows, size))

    def _products(self, x: Tensor, logits: Tensor) -> None:
        """x @ weight.T into `logits`, whose columns beyond the vocabulary become -inf."""
        for block in self._blocks():
            torch.mm(x, self.weight[block].t(), out=logits[:, block])
        logits[:, self.rows_of_weight :] = -torch.inf

    def _losses(self, logits: Tensor, targets: Tensor, losses: Tensor) -> Tensor:
        """`softmax_loss` of all rows: `losses` are filled in; returns the logits, now their derivative."""
        size = len(logits) if logits.is_cuda else ROWS_ON_CPU
        for start in range(0, len(logits), size):
            rows = slice(start, start + size)
            losses[rows], _ = self.softmax_loss(logits[rows], targets[rows])
        return logits

    def _add(self, derivative: Tensor, x: Tensor, dweight: Tensor, first: bool, alpha: float) -> None:
        """alpha * derivative.T @ x to the weight's gradient, which the first rows begin."""
        for block in self._blocks():
            own, part = dweight[block], derivative[:, block].t()
            if own.dtype == x.dtype:
                own.addmm_(part[: len(own)], x, beta=0 if first else 1, alpha=alpha)
            elif first:
                own.copy_(torch.mm(part, x)[: len(own)])
            else:
                own.add_(torch.mm(part, x)[: len(own)], alpha=alpha)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        mean: bool,
        rows: Rows,
        train: bool,
        total: Tensor | None,
    ) -> Tensor:
        work = _ChunkedLoss(x, weight, targets, rows, train and any(ctx.needs_input_grad), total)
        scale = work.counts.sum().clamp(min=1).reciprocal() if mean else torch.ones((), device=x.device)
        with torch.autocast(x.device.type, enabled=False):
            loss = work.run(scale).sum() * scale
        ctx.dx, ctx.dweight, ctx.dtype, ctx.rest = work.dx, None if work.adds else work.dweight, x.dtype, work.rest
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight, ctx.dx, ctx.dweight = ctx.dx, ctx.dweight, None, None
        if dweight is None and grads[0] != 1:
            raise RuntimeError("call backward() on the loss itself, or set model.adds_in_place = False")
        dx, factor = dx.to(ctx.dtype), grads[0] * ctx.rest
        if dx.is_cuda or factor != 1:  # for a look at the number a GPU would have to be waited for
            dx, dweight = dx.mul_(factor), dweight if dweight is None else dweight.mul_(factor)
        return dx, dweight, *[None] * 5


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor) -> Tensor:
        ctx.tokens, ctx.weight = tokens, weight
        return F.embedding(tokens, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        ctx.weight.grad.index_add_(0, ctx.tokens.flatten(), grads[0].flatten(0, 1))
        return None, None
