"""The stock loop: the model of design and guide written plainly, autocast, F.cross_entropy, torch's AdamW. No saving.

What `benchmarks/throughput.py` compares with. It takes the same flags as train_gpt2_mod.py, as far as it knows them,
starts from the same weights and reads the same tokens in the same order; it prints the same lines.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from unbroken.model import gpt
from unbroken.model.language_model import ModelConfig


def rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x.float(), (x.size(-1),), eps=1e-6).type_as(x)


class Rotary(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("frequency", 10000.0 ** -(torch.arange(0, width, 2).float() / width), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        angle = torch.outer(torch.arange(x.size(1), device=x.device).float(), self.frequency)
        cos, sin = angle.cos()[None, :, None], angle.sin()[None, :, None]
        x1, x2 = x.chunk(2, dim=3)
        return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=3).type_as(x)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.rotary = Rotary(config.n_embd // config.n_head)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = (part.view(b, t, self.n_head, -1) for part in self.c_attn(x).split(c, dim=2))
        q, k = self.rotary(q), self.rotary(k)
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
        projected: Tensor = self.c_proj(y.transpose(1, 2).contiguous().view(b, t, c))
        return projected


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        projected: Tensor = self.c_proj(F.gelu(self.c_fc(x)))
        return projected


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(config), MLP(config)
        self.attn_scale = 1 / math.sqrt(2 * config.n_layer)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn_scale * self.attn(rms_norm(x))
        x = x + self.mlp(rms_norm(x))
        return x


class GPT(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        blocks = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(config.vocab_size, config.n_embd), "h": blocks})
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer["wte"].weight = self.lm_head.weight  # type: ignore[assignment]

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        x = self.transformer["wte"](inputs)
        for block in self.transformer["h"]:  # type: ignore[attr-defined]
            x = block(x)
        logits = self.lm_head(rms_norm(x)).float()
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)


class Loader:
    """The tokens of all shards in a row, in GPU memory batch by batch."""

    def __init__(self, pattern: str, batch_size: int, length: int, device: str) -> None:
        shards = [np.memmap(path, dtype=np.uint16, mode="r", offset=1024) for path in sorted(glob.glob(pattern))]
        self.tokens = np.concatenate(shards)
        self.shape, self.device, self.position = (batch_size, length), device, 0

    def __call__(self) -> tuple[Tensor, Tensor]:
        size = self.shape[0] * self.shape[1]
        part = self.tokens.take(range(self.position, self.position + size + 1), mode="wrap").astype(np.int64)
        self.position += size
        tokens = torch.from_numpy(part).to(self.device)
        return tokens[:-1].view(self.shape), tokens[1:].view(self.shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("input_bin", ""),
        ("model", "d12"),
        ("device", "cpu"),
        ("dtype", "fp32"),
        ("compile", "off"),
    ):
        parser.add_argument(f"--{name}", default=default)
    for name, number in (("batch_size", 4), ("grad_accumulation_steps", 1), ("sequence_length", 64), ("seed", 1337)):
        parser.add_argument(f"--{name}", type=int, default=number)
    parser.add_argument("--num_iterations", type=int, default=10)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    args, _ = parser.parse_known_args()
    torch.set_float32_matmul_precision("high" if args.dtype == "bf16" else "highest")
    model = GPT(gpt.GPT.sizes[args.model])
    gpt.GPT.initialize(model, args.seed)  # type: ignore[arg-type]
    model.to(args.device)
    trained = torch.compile(model) if args.compile == "on" else model
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=args.device == "cuda"
    )
    load = Loader(args.input_bin, args.batch_size, args.sequence_length, args.device)
    mixed = torch.autocast(args.device, torch.bfloat16) if args.dtype == "bf16" else contextlib.nullcontext()
    began = time.perf_counter()
    for step in range(1, args.num_iterations + 1):
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for _ in range(args.grad_accumulation_steps):
            x, y = load()
            with mixed:
                loss = trained(x, y) / args.grad_accumulation_steps
            loss.backward()
            total += loss.item()
        optimizer.step()
        seconds = time.perf_counter() - began
        print(f"step:{step}/{args.num_iterations} | loss {total:.6f} | train_time:{seconds:.2f}s", flush=True)


if __name__ == "__main__":
    main()
