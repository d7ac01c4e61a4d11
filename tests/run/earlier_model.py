"""The model of the earlier program, as small as its checkpoints allow: names, shapes, buffers and what it computes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Rotary(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inv_freq: Tensor
        self.register_buffer("inv_freq", 1.0 / (10000 ** (torch.arange(0, width, 2).float() / width)))

    def forward(self, x: Tensor) -> Tensor:
        """Rotate x [B, T, H, D]."""
        angle = torch.outer(torch.arange(x.shape[1]).type_as(self.inv_freq), self.inv_freq)
        cos, sin = angle.cos()[None, :, None], angle.sin()[None, :, None]
        one, other = x.chunk(2, dim=3)
        return torch.cat([one * cos + other * sin, one * -sin + other * cos], 3)


def normed(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class Attention(nn.Module):
    def __init__(self, heads: int, channels: int) -> None:
        super().__init__()
        self.heads = heads
        self.c_attn = nn.Linear(channels, 3 * channels, bias=False)
        self.c_proj = nn.Linear(channels, channels, bias=False)
        self.rotary = Rotary(channels // heads)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(2, (self.heads, -1)) for part in self.c_attn(x).chunk(3, dim=2))
        q, k = self.rotary(q), self.rotary(k)
        y = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (q, k, v)), is_causal=True)
        projected: Tensor = self.c_proj(y.transpose(1, 2).flatten(2))
        return projected


class MLP(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(channels, 4 * channels, bias=False)
        self.c_proj = nn.Linear(4 * channels, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        projected: Tensor = self.c_proj(F.gelu(self.c_fc(x)))
        return projected


class Block(nn.Module):
    def __init__(self, layers: int, heads: int, channels: int) -> None:
        super().__init__()
        self.attn = Attention(heads, channels)
        self.mlp = MLP(channels)
        self.attn_scale = 1 / (2 * layers) ** 0.5

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn_scale * self.attn(normed(x))
        x = x + self.mlp(normed(x))
        return x


class EarlierGPT(nn.Module):
    def __init__(self, layers: int, heads: int, channels: int, vocabulary: int = 50257) -> None:
        super().__init__()
        blocks = nn.ModuleList(Block(layers, heads, channels) for _ in range(layers))
        wte = nn.Embedding(vocabulary, channels)
        self.transformer = nn.ModuleDict({"wte": wte, "h": blocks})
        self.lm_head = nn.Linear(channels, vocabulary, bias=False)
        wte.weight = self.lm_head.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits [B, V] of the last position of tokens [B, T]."""
        x = self.transformer["wte"](tokens)
        for block in self.transformer["h"].children():
            x = block(x)
        logits: Tensor = self.lm_head(normed(x)[:, -1])
        return logits
