"""The output head with its loss, and the embedding, which share one weight.

The logits of a microbatch, [tokens, vocabulary] in fp32, are by far the largest tensor in the step of a small model.
Here they exist for some rows at a time: the forward pass computes logits, losses and gradients of these rows at once
(as Liger Kernel does, Hsu et al. 2024), and keeps only the gradients of the head's input and weight.

The gradient of the weight is as large as the weight, a third of a small model. Autograd would allocate it three times,
for head, embedding and their sum, before adding it to `.grad`. With `in_place` head and embedding add to `.grad`.

Shapes: N tokens of a microbatch, n rows computed at once, C channels, V vocabulary, V' = V rounded up to PADDING.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unbroken.model import kernels

IGNORED = -1  # a target that the loss does not count
PADDING = 64  # logits have a multiple of this many columns: matrix products of odd widths are slow
CHUNK_BYTES = {"cpu": 128 << 20, "cuda": 4 << 30}  # of fp32 logits that exist at once
ROWS_ON_CPU = 128  # rows that `softmax_loss` gets at a time on a CPU: its fp32 copies of them stay small
BLOCK = 2048  # rows of the weight in one product on a CPU: the result is still in the cache when it is added

SoftmaxLoss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def softmax_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the losses of logits [n, V'], fp32 [n], and their derivative by the logits, which it overwrites."""
    if kernels.for_hopper and torch.compiler.is_compiling() and logits.is_cuda:
        return torch.ops.unbroken.softmax_loss(logits, targets), logits
    scores = logits.float()
    rows = torch.arange(len(targets), device=targets.device)
    if torch.compiler.is_compiling():
        # Only passes over rows: a deterministic index_put would write all probabilities to memory and read them again.
        top = scores.amax(1, keepdim=True)
        exponentials = (scores - top).exp()
        total = exponentials.sum(1, keepdim=True)
        is_target = torch.arange(logits.size(1), device=logits.device) == targets[:, None]
        # An index would split this into two kernels of a GPU, of which the second reads the logits from memory again.
        of_target = scores.where(is_target, 0.0).sum(1) if logits.is_cuda else scores[rows, targets]
        losses = (top + total.log()).squeeze(1) - of_target
        return losses, logits.copy_(exponentials * (1 / total) - is_target.float())
    top, at = scores.max(1)
    p = scores.softmax(1)
    # The probability of the likeliest token is at least 1/V, so that its logarithm is accurate enough for every row.
    losses = top - p[rows, at].log() - scores[rows, targets]
    p[rows, targets] -= 1
    return losses, logits.copy_(p)


def rows_at_a_time(kind: str, width: int) -> int:
    """Return how many tokens have their logits, `width` each, computed at once on a kind of device: a power of two."""
    return 1 << max(0, (CHUNK_BYTES.get(kind, 128 << 20) // (4 * width)).bit_length() - 1)


def head_loss(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    mean: bool = True,
    softmax: SoftmaxLoss = softmax_loss,
    in_place: bool = False,
) -> Tensor:
    """Return the cross-entropy of x @ weight.T against targets, in nats, fp32, 0-dim.

    Matrix products are in autocast's dtype where autocast is on, everything else in fp32.

    Args:
        x: Input of the head, [N, C].
        weight: [V, C].
        targets: Token ids, int64 [N].
        mean: Whether to return the mean over the targets that are not IGNORED, or their sum.
        softmax: `softmax_loss` or its compiled form.
        in_place: Whether to add the gradient of the weight to `weight.grad` here; `backward()` must then be called on
            the returned loss itself.
    """
    # Grad mode is read here: inside a Function it is off, and `needs_input_grad` is true under no_grad as well.
    arguments = (x, weight, targets, mean, softmax, torch.is_grad_enabled(), weight.grad if in_place else None)
    loss: Tensor = _HeadLoss.apply(*arguments)  # type: ignore[no-untyped-call]
    return loss


def embed(tokens: Tensor, weight: Tensor, in_place: bool = False) -> Tensor:
    """Return the rows of weight [V, C] for token ids int64 [B, T], as [B, T, C]; `in_place` as in `head_loss`."""
    if not in_place or weight.grad is None:
        return F.embedding(tokens, weight)
    rows: Tensor = _Embedding.apply(tokens, weight)  # type: ignore[no-untyped-call]
    return rows


class _ChunkedLoss:
    """A pass over the rows of x that computes losses and, if asked for, gradients; see `head_loss`.

    The weight's gradient is added to `total` [V, C], or is new if that is None.
    """

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        softmax: SoftmaxLoss,
        differentiate: bool,
        total: Tensor | None,
    ) -> None:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        self.x, self.counts, self.targets = x.detach().to(dtype), targets != IGNORED, targets.clamp(min=0)
        self.vocab_size = weight.size(0)
        self.width = -(-self.vocab_size // PADDING) * PADDING
        self.weight = weight.detach()
        if kind == "cuda" or dtype != weight.dtype:  # another dtype needs a copy anyway
            self.weight = weight.new_empty(self.width, weight.size(1), dtype=dtype)
            self.weight[: self.vocab_size].copy_(weight.detach())
            self.weight[self.vocab_size :] = 0
        self.softmax_loss = softmax
        # A power of two divides most microbatches: one shape to compile, and full tiles.
        self.chunk = rows_at_a_time(kind, self.width)
        self.rest = torch.ones((), device=x.device)
        self.dx = torch.empty_like(self.x) if differentiate else None
        self.adds = total is not None
        self.dweight = (torch.empty_like(weight.detach()) if total is None else total) if differentiate else None

    def run(self, scale: Tensor) -> Tensor:
        """Return the losses of all rows, fp32 [N], 0 where the target is ignored; compute gradients of sum * scale.

        1/n rounded to the 8 bits of bf16 would make every gradient up to 0.4% too large. In bf16 gradients are
        therefore multiplied by the power of two in `scale`, which is exact. The factor that remains, `rest` from 1 to
        2, is already applied to what was added to `total`; `backward` applies it to the other gradients.
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
        """Write x @ weight.T into `logits`, and -inf into the columns beyond the vocabulary."""
        for block in self._blocks():
            torch.mm(x, self.weight[block].t(), out=logits[:, block])
        logits[:, self.vocab_size :] = -torch.inf

    def _losses(self, logits: Tensor, targets: Tensor, losses: Tensor) -> Tensor:
        """Fill `losses` from the logits; return the derivative, which replaces the logits."""
        size = len(logits) if logits.is_cuda else ROWS_ON_CPU
        for start in range(0, len(logits), size):
            rows = slice(start, start + size)
            losses[rows], _ = self.softmax_loss(logits[rows], targets[rows])
        return logits

    def _add(self, derivative: Tensor, x: Tensor, dweight: Tensor, first: bool, alpha: float) -> None:
        """Add alpha * derivative.T @ x to the weight's gradient; `first` overwrites what is in it."""
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
        softmax: SoftmaxLoss,
        train: bool,
        total: Tensor | None,
    ) -> Tensor:
        work = _ChunkedLoss(x, weight, targets, softmax, train and any(ctx.needs_input_grad), total)
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
        if dx.is_cuda or factor != 1:  # on a GPU reading the factor would wait for all that is queued
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
