"""GPT: tokens in, loss out. Knows nothing of files, processes or checkpoints.

Shapes: B sequences, T tokens of a sequence, C width, H heads, D width of a head, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from unbroken.model.loss import embed, head_loss, softmax_loss

VOCAB_SIZE = 50257  # GPT-2's byte-pair vocabulary
NORM_EPS = 1e-6
ROTARY_BASE = 10000.0


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a GPT."""

    n_layer: int
    n_head: int
    n_embd: int
    vocab_size: int = VOCAB_SIZE


PRESETS = {
    **{f"d{depth}": GPTConfig(depth, depth, 64 * depth) for depth in (2, 4, 6, 8)},
    "d12": GPTConfig(12, 12, 768),
    "d24": GPTConfig(24, 16, 1024),
    "d36": GPTConfig(36, 20, 1280),
    "d48": GPTConfig(48, 25, 1600),
}


def rms_norm(x: Tensor) -> Tensor:
    """Root-mean-square norm without weight over the last dimension, in fp32 (Zhang & Sennrich 2019)."""
    return F.rms_norm(x.float(), (x.size(-1),), eps=NORM_EPS).type_as(x)


def rotary_tables(length: int, head_width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary angles, each fp32 [T, D/2] (Su et al. 2021)."""
    frequency = ROTARY_BASE ** -(torch.arange(0, head_width, 2, device=device).float() / head_width)
    angle = torch.outer(torch.arange(length, device=device).float(), frequency)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of each head of x [B, H, T, D] by minus the angle: the earlier program's convention."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1).type_as(x)


@dataclass
class KVCache:
    """What one layer's attention keeps of the tokens so far, while text is written: keys and values [B, H, T, D]."""

    keys: Tensor | None = None
    values: Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens so far."""
        return 0 if self.keys is None else self.keys.size(2)

    def extended(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """With those of the next tokens."""
        self.keys = keys if self.keys is None else torch.cat((self.keys, keys), dim=2)
        self.values = values if self.values is None else torch.cat((self.values, values), dim=2)
        return self.keys, self.values


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, past: KVCache | None = None) -> Tensor:
        """x [B, T, C] -> [B, T, C]. After a `past` that is not empty, T is 1."""
        q, k, v = self.c_attn(x).unflatten(-1, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)  # each [B, H, T, D]
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if past is not None:
            k, v = past.extended(k, v)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=q.size(2) == k.size(2))
        projected: Tensor = self.c_proj(y.transpose(1, 2).flatten(2))
        return projected


class MLP(nn.Module):
    """Two matrices with the exact GELU between them."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, C] -> [B, T, C]."""
        projected: Tensor = self.c_proj(F.gelu(self.c_fc(x)))
        return projected


class Block(nn.Module):
    """One layer: attention and MLP, each behind a norm and beside a residual."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attn = Attention(config)
        self.mlp = MLP(config)
        self.attn_scale = 1 / math.sqrt(2 * config.n_layer)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, past: KVCache | None = None) -> Tensor:
        """x [B, T, C] -> [B, T, C]."""
        x = x + self.attn_scale * self.attn(rms_norm(x), cos, sin, past)
        x = x + self.mlp(rms_norm(x))
        return x


class GPT(nn.Module):
    """The model of the guide's program; its state-dict names are those of every checkpoint."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        wte = nn.Embedding(config.vocab_size, config.n_embd)  # its weight is the head's
        blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.transformer = nn.ModuleDict({"wte": wte, "h": blocks})
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.tie()
        self.softmax_loss = softmax_loss
        self.recompute = False  # activations: keep those between the layers only (Chen et al. 2016)
        self.adds_in_place = False  # the gradient of the tied weight: see head.py

    def tie(self) -> None:
        """Let the embedding and the head have one weight."""
        cast(nn.Embedding, self.transformer["wte"]).weight = self.lm_head.weight

    def blocks(self) -> list[Block]:
        """The layers, first to last."""
        return cast("list[Block]", self.transformer["h"])

    def hidden(self, inputs: Tensor) -> Tensor:
        """Token ids [B, T] -> what the head reads [B, T, C]."""
        x = embed(inputs, self.lm_head.weight, self.adds_in_place)
        cos, sin = rotary_tables(inputs.size(1), self._head_width, inputs.device)
        for block in self.blocks():
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, use_reentrant=False)
            else:
                x = block(x, cos, sin)
        return rms_norm(x)

    def next_logits(self, inputs: Tensor, past: list[KVCache]) -> Tensor:
        """Token ids [B, T] -> the logits of the token after them [B, V]; `past`, one a layer, holds what came before.

        The whole beginning at once while that is empty, then token by token.
        """
        before = past[0].length
        tables = rotary_tables(before + inputs.size(1), self._head_width, inputs.device)
        cos, sin = (table[before:] for table in tables)
        x: Tensor = self.transformer["wte"](inputs)
        for block, known in zip(self.blocks(), past, strict=True):
            x = block(x, cos, sin, known)
        logits: Tensor = self.lm_head(rms_norm(x[:, -1]))
        return logits

    @property
    def _head_width(self) -> int:
        return self.config.n_embd // self.config.n_head

    def forward(self, inputs: Tensor, targets: Tensor | None = None, reduction: str = "mean") -> Tensor:
        """Token ids int64 [B, T] -> the "mean" or "sum" of the cross-entropy against `targets` (same shape), in nats.

        A target of -1 counts for nothing. Without targets: the logits of the last position, [B, V].
        """
        x = self.hidden(inputs)
        if targets is None:
            logits: Tensor = self.lm_head(x[:, -1])
            return logits
        weight, mean = self.lm_head.weight, reduction == "mean"
        return head_loss(x.flatten(0, 1), weight, targets.flatten(), mean, self.softmax_loss, self.adds_in_place)

    def compile_blocks(self) -> None:
        """Compile each layer by itself: all share one piece of generated code, so a warm start is quick."""
        for block in self.blocks():
            block.compile(dynamic=False)
        self.softmax_loss = torch.compile(softmax_loss, dynamic=False)


class _NoInitialization(TorchFunctionMode):
    """Lets nn.Linear and nn.Embedding leave their weights alone."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return None if getattr(func, "__module__", "") == "torch.nn.init" else func(*args, **(kwargs or {}))


def build_on_meta(config: GPTConfig) -> GPT:
    """A GPT on the meta device: no memory and no random numbers for weights that a checkpoint is about to fill."""
    # On the meta device even an initialization that does nothing imports the whole compiler: two seconds.
    with torch.device("meta"), _NoInitialization():
        return GPT(config)


def build_uninitialized(config: GPTConfig, device: torch.device) -> GPT:
    """The same with memory on a device, whatever is in it."""
    model = build_on_meta(config).to_empty(device=device)
    model.tie()  # which to_empty has parted
    return model


@torch.no_grad()
def initialize(model: GPT, seed: int) -> None:
    """torch's own initialization of a Linear, U(-1/sqrt(fan_in), 1/sqrt(fan_in)): the same bits on every device."""
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        bound = 1 / math.sqrt(weight.size(1))
        weight.copy_(torch.empty(weight.shape).uniform_(-bound, bound, generator=generator))


def flops_per_token(config: GPTConfig, sequence_length: int) -> int:
    """Floating-point operations of forward and backward for one token: 6N + 12·L·C·T (PaLM, appendix B)."""
    weights = config.vocab_size * config.n_embd + 12 * config.n_layer * config.n_embd**2
    return 6 * weights + 12 * config.n_layer * config.n_embd * sequence_length
