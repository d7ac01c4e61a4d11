"""What the order of the data costs the loader, in milliseconds of processor time for each step that it reads.

    python benchmarks/order.py [--steps 40] [--shards 8]

Shards of 20 million random tokens each, in the page cache; sequences and windows of 1024 tokens, on one process. The
three orders are read in turn.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from unbroken.data.loader import BatchLoader, RankShare
from unbroken.data.mixture import open_tokens
from unbroken.data.shards import header

LENGTH, SHARD_TOKENS, VOCABULARY = 1024, 20_000_000, 50_257
SEQUENCES = (8, 64, 512)  # of a step


def milliseconds(loader: BatchLoader) -> float:
    began = time.process_time()
    loader.step()
    return 1000 * (time.process_time() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--shards", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(1)
    dice, cpu = np.random.default_rng(0), torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        for index in range(args.shards):
            tokens = dice.integers(0, VOCABULARY, SHARD_TOKENS, dtype=np.uint16)
            Path(folder, f"{'ab'[index % 2]}_{index}.bin").write_bytes(header(SHARD_TOKENS) + tokens.tobytes())
        several = f"{folder}/a_*.bin=0.7,{folder}/b_*.bin=0.3"
        orders = {
            "shards in order": open_tokens(f"{folder}/*.bin", vocab_size=VOCABULARY),
            "--shuffle": open_tokens(f"{folder}/*.bin", vocab_size=VOCABULARY, seed=7, window=LENGTH),
            "--shuffle, two sources": open_tokens(several, vocab_size=VOCABULARY, seed=7, window=LENGTH),
        }
        for sequences in SEQUENCES:
            share = RankShare(sequences, LENGTH, 1, 0, 1)
            loaders = {name: BatchLoader(stream, 0, share, cpu, read_ahead=False) for name, stream in orders.items()}
            times = [{name: milliseconds(loader) for name, loader in loaders.items()} for _ in range(args.steps)]
            medians = {name: statistics.median(each[name] for each in times) for name in orders}
            print(
                f"{sequences * LENGTH:,} tokens:", ", ".join(f"{name} {each:.2f} ms" for name, each in medians.items())
            )


if __name__ == "__main__":
    main()
