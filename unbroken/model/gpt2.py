"""GPT-2 as OpenAI made it (Radford et al. 2019): learned positions, LayerNorm, biases, tanh GELU, dropout, tied head.

The names in the state dict are those of nanoGPT. OpenAI's lack a prefix, and its matrices are transposed. The
vocabulary has the 50257 tokens of the released models.

Shapes in this file:

    B  sequences of a batch        C  channels of the model (n_embd)      H  attention heads
    T  tokens of a sequence        D  channels of a head, C / H           V  vocabulary
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unbroken.model.attention import attend
from unbroken.model.language_model import KVCache, LanguageModel, ModelConfig
from unbroken.model.loss import embed, head_loss

NORM_EPS = 1e-5
ACTIVATION = "gelu_new"  # what transformers calls the function in `MLP.forward`: an export writes it
INIT_STD = 0.02


@dataclass(frozen=True)
class GPT2Config(ModelConfig):
    """The sizes of a GPT-2, and what --dropout and --bias set.

    `bias`: "on" for every linear layer and norm, "qkv" for queries, keys and values alone, or "off".
    """

    n_positions: int = 1024
    dropout: float = 0.0
    bias: str = "on"


class LayerNorm(nn.Module):
    """A LayerNorm whose bias may be missing, computed in fp32."""

    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., C] to [..., C]."""
        return F.layer_norm(x.float(), self.weight.shape, self.weight, self.bias, NORM_EPS).type_as(x)


def drop(x: Tensor, share: float, training: bool) -> Tensor:
    """Return x with a `share` of its numbers zero and the others scaled up, while training."""
    return F.dropout(x, share) if training and share > 0 else x


class Attention(nn.Module):
    """A causal self-attention."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias != "off")  # q, k and v
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias == "on")

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        """Map x [B, T, C] to [B, T, C]; with a `cache` that holds earlier tokens, T is 1."""
        q, k, v = self.c_attn(x).unflatten(-1, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)  # each [B, H, T, D]
        if cache is not None:
            k, v = cache.append(k, v)
        share = self.dropout if self.training else 0.0
        y = attend(q, k, v, is_causal=q.size(2) == k.size(2), dropout=share)
        return drop(self.c_proj(y.transpose(1, 2).flatten(2)), self.dropout, self.training)


class MLP(nn.Module):
    """A pair of matrices with the tanh form of the GELU between them."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias == "on")
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias == "on")

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, T, C] to [B, T, C]."""
        return drop(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")), self.dropout, self.training)


class Block(nn.Module):
    """A layer: attention, then MLP; the input of each is normalized and its output added to the residual stream."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, config.bias == "on")
        self.attn = Attention(config)
        self.ln_2 = LayerNorm(config.n_embd, config.bias == "on")
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        """Map x [B, T, C] to [B, T, C]."""
        x = x + self.attn(self.ln_1(x), cache)
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT2(LanguageModel):
    """A model of token and position embeddings, layers and head. `lm_head.weight` [V, C] also embeds the tokens."""

    sizes: ClassVar = {
        "gpt2": GPT2Config(12, 12, 768),
        "gpt2-medium": GPT2Config(24, 16, 1024),
        "gpt2-large": GPT2Config(36, 20, 1280),
        "gpt2-xl": GPT2Config(48, 25, 1600),
        "gpt2-tiny": GPT2Config(2, 2, 128),
    }
    variants: ClassVar = ({"bias": "on"}, {"bias": "off"}, {"bias": "qkv"})
    fused: ClassVar = {"c_attn.weight": 3}
    computed_buffers = (".attn.bias", ".attn.masked_bias")  # causal masks

    config: GPT2Config

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        parts = {
            "wte": nn.Embedding(config.vocab_size, config.n_embd),
            "wpe": nn.Embedding(config.n_positions, config.n_embd),
            "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            "ln_f": LayerNorm(config.n_embd, config.bias == "on"),
        }
        self.transformer = nn.ModuleDict(parts)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
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
        """Map token ids [B, T] to the input of the head, [B, T, C]. Raises UserError if T is too large."""
        x = embed(inputs, self.lm_head.weight, self.adds_in_place) + self._positions(0, inputs.size(1))
        x = drop(x, self.config.dropout, self.training)
        normed: Tensor = self.transformer["ln_f"](self.run_blocks(x))
        return normed

    def _positions(self, start: int, stop: int) -> Tensor:
        """Return the embeddings of positions `start` to `stop` - 1, [T, C]."""
        self.config.require_length(stop)
        return cast(nn.Embedding, self.transformer["wpe"]).weight[start:stop]

    def next_logits(self, inputs: Tensor, caches: list[KVCache]) -> Tensor:
        """Return the logits [B, V] of the token after `inputs` [B, T] and after the tokens in the caches.

        T is 1 unless the caches, one for each layer, are empty.
        """
        before = caches[0].length
        x: Tensor = self.transformer["wte"](inputs) + self._positions(before, before + inputs.size(1))
        for block, cache in zip(self.blocks(), caches, strict=True):
            x = block(x, cache)
        logits: Tensor = self.lm_head(self.transformer["ln_f"](x[:, -1]))
        return logits

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Draw matrices from N(0, 0.02²), the last of each branch from 1/sqrt(2 layers) of that; norms are 1, biases 0.

        It does so on a CPU and in fp64, so that the bits depend neither on the device nor on vector instructions.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, weight in self.named_parameters():
            if weight.dim() < 2:
                weight.fill_(float(name.endswith("weight")))
                continue
            std = INIT_STD / math.sqrt(2 * self.config.n_layer) if name.endswith("c_proj.weight") else INIT_STD
            weight.copy_(torch.empty(weight.shape, dtype=torch.float64).normal_(0, std, generator=generator))

    def flops_per_token(self, sequence_length: int) -> int:
        """Return the operations of a token, as for any model, without the position embeddings, which are only added."""
        table = cast(nn.Embedding, self.transformer["wpe"]).weight
        return super().flops_per_token(sequence_length) - 6 * table.numel()

    def activation_bytes(self, sequence_length: int) -> int:
        """Return an estimate of the fp32 activations that a sequence keeps for the backward pass, in bytes.

        With dropout a CPU keeps the probabilities of every head before and after dropout, and the mask.
        """
        kept = 3 * 4 * self.config.n_head * sequence_length**2 if self.config.dropout else 0
        layers = 1 if self.recompute else self.config.n_layer
        return super().activation_bytes(sequence_length) + kept * layers
