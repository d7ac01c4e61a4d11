"""GPT: the model of the guide's program. Token ids in, loss out; it knows no files, processes or checkpoints.

GPT-2's sizes with rotary positions (Su et al. 2021), RMSNorm without weights (Zhang & Sennrich 2019), no biases, and
one matrix for embedding and head. Its state-dict names are those of every checkpoint.

Shapes in this file:

    B  sequences of a batch        C  channels of the model (n_embd)      H  attention heads
    T  tokens of a sequence        D  channels of a head, C / H           V  vocabulary
"""

from __future__ import annotations

import math
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unbroken.model.attention import attend
from unbroken.model.language_model import KVCache, LanguageModel, ModelConfig
from unbroken.model.loss import embed, head_loss

NORM_EPS = 1e-6
ACTIVATION = "gelu"  # what transformers calls the function in `MLP.forward`: an export writes it
ROTARY_BASE = 10000.0


def rms_norm(x: Tensor) -> Tensor:
    """Return x [..., C] divided by the root mean square of its channels, computed in fp32."""
    return F.rms_norm(x.float(), (x.size(-1),), eps=NORM_EPS).type_as(x)


def rotary_tables(length: int, head_width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of the rotary angles of positions 0 to T-1, each fp32 [T, D/2]."""
    frequency = ROTARY_BASE ** -(torch.arange(0, head_width, 2, device=device).float() / head_width)
    angle = torch.outer(torch.arange(length, device=device).float(), frequency)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs of channels of x [..., D] by minus the angle of their position; cos and sin broadcast to [..., D/2].

    A pair is a channel of a head's first half and the same one of its second half. The sign is that of the guide's
    program, whose checkpoints depend on it.
    """
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1).type_as(x)


class Attention(nn.Module):
    """A causal self-attention with rotary positions."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)  # q, k and v
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None) -> Tensor:
        """Map x to an output of the same shape.

        Args:
            x: Input, [B, T, C].
            cos: Cosine of the rotary angles, [T, D/2].
            sin: Sine of the rotary angles, [T, D/2].
            cache: Keys and values of earlier tokens; T is 1 if there are any.
        """
        q, k, v = self.c_attn(x).unflatten(-1, (3, self.n_head, -1)).unbind(2)  # each [B, T, H, D]
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        if cache is not None:
            k, v = cache.append(k, v)
        y = attend(q, k, v, is_causal=q.size(2) == k.size(2))
        projected: Tensor = self.c_proj(y.transpose(1, 2).flatten(2))
        return projected


class MLP(nn.Module):
    """A pair of matrices with the exact GELU between them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, T, C] to [B, T, C]."""
        projected: Tensor = self.c_proj(F.gelu(self.c_fc(x)))
        return projected


class Block(nn.Module):
    """A layer: attention, then MLP; the input of each is normalized and its output added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attn = Attention(config)
        self.mlp = MLP(config)
        self.attn_scale = 1 / math.sqrt(2 * config.n_layer)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None) -> Tensor:
        """Map x to an output of the same shape.

        Args:
            x: Input, [B, T, C].
            cos: Cosine of the rotary angles, [T, D/2].
            sin: Sine of the rotary angles, [T, D/2].
            cache: Keys and values of earlier tokens; T is 1 if there are any.
        """
        x = x + self.attn_scale * self.attn(rms_norm(x), cos, sin, cache)
        x = x + self.mlp(rms_norm(x))
        return x


class GPT(LanguageModel):
    """A model of embedding, layers and head. `lm_head.weight` [V, C] is also the embedding's weight."""

    sizes: ClassVar = {
        **{f"d{depth}": ModelConfig(depth, depth, 64 * depth) for depth in (2, 4, 6, 8)},
        "d12": ModelConfig(12, 12, 768),
        "d24": ModelConfig(24, 16, 1024),
        "d36": ModelConfig(36, 20, 1280),
        "d48": ModelConfig(48, 25, 1600),
        "tiny": ModelConfig(2, 2, 128, vocab_size=512),  # for tests
    }
    fused: ClassVar = {"c_attn.weight": 3}
    computed_buffers = ("rotary.inv_freq",)

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        wte = nn.Embedding(config.vocab_size, config.n_embd)
        blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.transformer = nn.ModuleDict({"wte": wte, "h": blocks})
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.head_width = config.n_embd // config.n_head
        self.tie()

    def tie(self) -> None:
        """Make embedding and head share one weight."""
        cast(nn.Embedding, self.transformer["wte"]).weight = self.lm_head.weight

    def blocks(self) -> list[Block]:
        """Return the layers, first to last."""
        return cast("list[Block]", self.transformer["h"])

    def forward(self, inputs: Tensor, targets: Tensor | None = None, reduction: str = "mean") -> Tensor:
        """Return the loss in nats, 0-dim: the "mean" or "sum" over `targets`, int64 [B, T] like `inputs`.

        Targets that are IGNORED do not count. Without targets: the logits of the last position, [B, V].
        """
        x = self.hidden(inputs)
        if targets is None:
            logits: Tensor = self.lm_head(x[:, -1])
            return logits
        weight, mean = self.lm_head.weight, reduction == "mean"
        return head_loss(x.flatten(0, 1), weight, targets.flatten(), mean, self.softmax_loss, self.adds_in_place)

    def hidden(self, inputs: Tensor) -> Tensor:
        """Map token ids [B, T] to the input of the head, [B, T, C]."""
        x = embed(inputs, self.lm_head.weight, self.adds_in_place)
        cos, sin = rotary_tables(inputs.size(1), self.head_width, inputs.device)
        return rms_norm(self.run_blocks(x, cos, sin))

    def next_logits(self, inputs: Tensor, caches: list[KVCache]) -> Tensor:
        """Return the logits [B, V] of the token after `inputs` [B, T] and after the tokens in the caches.

        T is 1 unless the caches, one for each layer, are empty.
        """
        before = caches[0].length
        tables = rotary_tables(before + inputs.size(1), self.head_width, inputs.device)
        cos, sin = (table[before:] for table in tables)
        x: Tensor = self.transformer["wte"](inputs)
        for block, cache in zip(self.blocks(), caches, strict=True):
            x = block(x, cos, sin, cache)
        logits: Tensor = self.lm_head(rms_norm(x[:, -1]))
        return logits

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Draw each weight from U(-1/sqrt(C_in), 1/sqrt(C_in)), as nn.Linear does; on a CPU, for equal bits."""
        generator = torch.Generator().manual_seed(seed)
        for weight in self.parameters():
            bound = 1 / math.sqrt(weight.size(1))
            weight.copy_(torch.empty(weight.shape).uniform_(-bound, bound, generator=generator))
