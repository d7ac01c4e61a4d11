"""What is trained under faults: a plain run, one on changing numbers of processes, and whatever keeps a state."""

from __future__ import annotations

from pathlib import Path

from tests.chaos.lane import Course
from tests.harness import ROOT, TINY, learnable, write_shard

SAVES = {**TINY, "save_every": 3, "keep_last": 3, "val_loss_every": 25}
BEST = {"keep_best": 2, "save_weights_every": 7, "save_steps": "0,log2"}
OPTIONS = {"optimizer": "muon", "shuffle": 7, "window_tokens": 512, "grad_clip": 1}
POISON, TOKENS = 200, 128  # the token that makes a loss NaN, the tokens of a step


def poisoned(folder: Path) -> None:
    """A corpus with a batch in each epoch whose loss is NaN."""
    tokens = learnable(60 * TOKENS)
    tokens[40 * TOKENS + 70] = POISON
    write_shard(folder / "data/train_000.bin", tokens)
    write_shard(folder / "data/val_000.bin", learnable(700, 10**6))


COURSES = [
    Course("short", {**SAVES, "num_iterations": 120}, pace=0.02),
    Course("plain", {**SAVES, "num_iterations": 400}, pace=0.02),
    Course("ranks", {**SAVES, "num_iterations": 160}, processes=(None, 1, 2, 4), pace=0.05),
    Course("files", {**SAVES, **BEST, "num_iterations": 300}, pace=0.02),
    Course("options", {**SAVES, **OPTIONS, "num_iterations": 250}, pace=0.02),
    Course(
        "nan",
        {**SAVES, "num_iterations": 150, "on_nan": "rewind"},
        script=ROOT / "tests/anomalous_training.py",
        env={"PACE": "0.02"},
        corpus=poisoned,
        rewinds=True,
    ),
    Course(
        "bits",
        {**SAVES, "num_iterations": 150, "replay": 1},
        script=ROOT / "tests/corrupted_training.py",
        env={"FLIP": "none:0:0"},
        kinds=("bit flipped in memory",),
    ),
    Course(
        "mirror",
        {**SAVES, "num_iterations": 250},
        pace=0.03,
        s3=True,
        kinds=("machine lost", "mirror's server killed", "mirror's server stopped for a while", "mirror not reachable"),
    ),
    Course(
        "trackers",
        {**SAVES, "num_iterations": 150, "log_tensorboard": True, "log_wandb": True},
        pace=0.03,
        kinds=("W&B's server gone",),
    ),
    Course(
        "hang",
        {**SAVES, "num_iterations": 120, "hang": "3"},
        processes=(None, 2),
        script=ROOT / "tests/hanging_training.py",
        env={"SLOW": "tell:0.02"},
        kinds=("rank that hangs",),
    ),
    Course(
        "compiled", {**SAVES, "num_iterations": 120, "compile": "on"}, pace=0.02, kinds=("SIGKILL in the compilation",)
    ),
]
