"""A training loop of one's own: a small GPT on the letters of a text, in plain PyTorch, without checkpoints.

    python examples/own_loop.py --text README.md --steps 200

docs/checkpoint-library.md shows the few lines that make it resume with the same bits.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset


class Block(nn.Module):
    """A layer of the transformer: attention, then an MLP."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.drop = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, time, width = x.shape
        q, k, v = self.qkv(self.norm_1(x)).view(batch, time, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        dropped = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropped, is_causal=True)
        x = x + self.drop(self.out(mixed.transpose(1, 2).reshape(batch, time, width)))
        return x + self.drop(self.mlp(self.norm_2(x)))


class GPT(nn.Module):
    """Letters in, the loss of the next ones out. The embedding is the output head."""

    def __init__(self, letters: int, context: int, width: int = 64, depth: int = 2, dropout: float = 0.1) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(letters, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, width // 32, dropout) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, letters, bias=False)
        self.head.weight = self.embedding.weight
        self.apply(self.initialize)

    @staticmethod
    def initialize(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)

    def forward(self, x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        places = torch.arange(x.shape[1], device=x.device)
        hidden = self.norm(self.blocks(self.embedding(x) + self.positions(places)))
        return F.cross_entropy(self.head(hidden).flatten(0, 1), targets.flatten())


class Pieces(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Pieces of a text, each with the letters that follow its own."""

    def __init__(self, text: str, context: int) -> None:
        self.letters = sorted(set(text))
        number = {letter: index for index, letter in enumerate(self.letters)}
        self.data, self.context = torch.tensor([number[letter] for letter in text]), context

    def __len__(self) -> int:
        return (len(self.data) - 1) // self.context

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        start = index * self.context + int(torch.randint(0, self.context, ()))  # a little elsewhere in each epoch
        start = min(start, len(self.data) - self.context - 1)
        return self.data[start : start + self.context], self.data[start + 1 : start + 1 + self.context]


def endless(loader: DataLoader[tuple[torch.Tensor, torch.Tensor]]) -> Iterator[list[torch.Tensor]]:
    """Yield the batches of one epoch after the other."""
    while True:
        yield from loader


def build_optimizer(model: nn.Module, rate: float) -> torch.optim.AdamW:
    """Return AdamW that decays matrices and leaves norms and biases alone."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    others = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95))


def factor(step: int, warmup: int, steps: int) -> float:
    """Return what the learning rate is multiplied by: linear warmup, then a cosine down to a tenth."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small GPT on a text.")
    parser.add_argument("--text", default="README.md", help="a text file to train on")
    parser.add_argument("--steps", type=int, default=200, help="number of updates")
    parser.add_argument("--batch_size", type=int, default=8, help="pieces of text in a microbatch")
    parser.add_argument("--accumulate", type=int, default=2, help="microbatches of an update")
    parser.add_argument("--context", type=int, default=64, help="letters of a piece")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="the highest learning rate")
    parser.add_argument("--save_every", type=int, default=20, help="updates between two checkpoints")
    parser.add_argument("--out", default="own_loop", help="folder for what the training writes")
    args = parser.parse_args()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(1337)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pieces = Pieces(Path(args.text).read_text("utf-8"), args.context)
    data = endless(DataLoader(pieces, args.batch_size, shuffle=True, num_workers=1))
    model = GPT(len(pieces.letters), args.context).to(device)
    optimizer = build_optimizer(model, args.learning_rate)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(step, 10, args.steps))
    scaler = torch.amp.GradScaler(device, enabled=device == "cuda")
    step, best = 0, math.inf

    model.train()
    while step < args.steps:
        total = 0.0
        for _ in range(args.accumulate):
            x, y = (part.to(device, non_blocking=True) for part in next(data))
            with torch.autocast(device, torch.float16, enabled=device == "cuda"):
                loss = model(x, y) / args.accumulate
            scaler.scale(loss).backward()
            total += loss.item()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        step, best = step + 1, min(best, total)
        with open(out / "loss.txt", "a") as log:
            log.write(f"{step} {total!r} {best!r}\n")
        if step % args.save_every == 0:
            print(f"step {step}: loss {total:.4f}, best {best:.4f}", flush=True)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, out / "trained.pt")


if __name__ == "__main__":
    main()
