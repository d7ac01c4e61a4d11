"""Exact checkpoints in the background for the Trainer of transformers.

    samples = Samples(dataset, seed=1)  # and max_steps=1000, save_steps=100, save_strategy="no" in args
    Trainer(model, args, train_dataset=samples, callbacks=[UnbrokenCallback("checkpoints", samples)]).train()

The same command continues; docs/checkpoint-library.md names the limits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from torch.utils.data import IterableDataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from unbroken.checkpoint import CheckpointWriter, RandomState, ResumableStream, latest, load_into


class Samples(IterableDataset[Any]):
    """The samples of a dataset without end, in an order that the seed gives, from `stream.position` on."""

    def __init__(self, dataset: Any, seed: int) -> None:
        self.stream = ResumableStream(dataset, 1, seed=seed, rank=0, ranks=1, collate_fn=lambda batch: batch[0])

    def __iter__(self) -> Iterator[Any]:
        return self.stream


class UnbrokenCallback(TrainerCallback):
    """Saves every `save_steps` updates, and continues from the newest whole checkpoint."""

    def __init__(self, folder: str, samples: Samples) -> None:
        self.folder, self.samples, self.random = folder, samples, {}  # type: ignore[var-annotated]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        self.writer = CheckpointWriter(self.folder, keep_last=2)
        self.tree = {name: parts[name] for name in ("model", "optimizer", "lr_scheduler")}
        newest = latest(self.folder)
        if newest:
            saved = load_into({**self.tree, "random": {}, "state": {}}, newest)
            vars(state).update({name: saved["state"][name] for name in ("global_step", "epoch", "log_history")})
            self.random = saved["random"]  # set later, because the Trainer's DataLoader draws a number first
        # By updates, because the Trainer takes samples in advance.
        self.samples.stream.position = state.global_step * args.gradient_accumulation_steps * args.train_batch_size

    def on_step_begin(self, *_: Any, **parts: Any) -> None:
        if self.random:
            RandomState().load_state_dict(self.random)
            self.random = {}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any) -> None:
        if state.global_step % args.save_steps == 0:
            self.writer.save({**self.tree, "random": RandomState(), "state": asdict(state)}, state.global_step)

    def on_train_end(self, *_: Any, **parts: Any) -> None:
        self.writer.close()
