"""RunState: the single list of a run's state. Saving and restoring walk it, so that nothing is forgotten."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from unbroken.checkpoint.directory import best_steps
from unbroken.checkpoint.format.schema import FORMAT, MAX_COUNT
from unbroken.checkpoint.reader import CheckpointFile
from unbroken.data.left_out import MAX_RANGES, Ranges, are_ranges, union
from unbroken.distributed.flat_params import ShardedParameters
from unbroken.distributed.gradients import gather_weights, slice_buffer
from unbroken.errors import UserError
from unbroken.optim import Optimizers
from unbroken.paths import is_run_id
from unbroken.run import legacy
from unbroken.run.imported import ImportedModel


@dataclass
class Progress:
    """The progress of a run: plain values, saved and restored by name.

    Attributes:
        step: the number of updates made.
        tokens: the position in the endless stream, which together with `skipped` decides every future batch.
        epoch: the epochs that have ended, for information.
        split: the parts into which each microbatch is divided.
        validated: the last step that was validated; -1 for none.
        history: what the logger restores: a hash of all losses, the training time, the last losses.
        rewarm: the warmup after an extension: {step, learning_rate, steps}.
        next_batch: {tokens, sha256} of the next step's tokens, which proves that the data are the same.
        parent: the checkpoint of a forked run: {run_id, step, file, sha256}.
        begun: the flags of the command that began the run (`run/experiment.py`).
        saved_at: seconds since 1970.
        skipped: the positions that no step is trained on, [[start, stop], …].
        rewinds: [[step gone back to, wrong step], …].
        best: [[step, validation loss], …] of the checkpoints that `--keep_best` keeps, the best one first.
        saved_for: why the checkpoint was written, if retention treats it differently from a periodic one
            (`checkpoint/directory.py`).
    """

    step: int = 0
    tokens: int = 0
    epoch: int = 0
    split: int = 1
    validated: int = -1
    history: dict[str, Any] = field(default_factory=dict)
    rewarm: dict[str, Any] = field(default_factory=dict)
    next_batch: dict[str, Any] = field(default_factory=dict)
    parent: dict[str, Any] = field(default_factory=dict)
    begun: dict[str, Any] = field(default_factory=dict)
    saved_at: float = 0.0
    skipped: list[Any] = field(default_factory=list)
    rewinds: list[Any] = field(default_factory=list)
    best: list[Any] = field(default_factory=list)
    saved_for: str = ""

    @property
    def left_out(self) -> Ranges:
        """The positions that no step is trained on."""
        return union([(start, stop) for start, stop in self.skipped])

    @classmethod
    def from_checkpoint(cls, saved: dict[str, Any]) -> Progress:
        """Return the progress in a checkpoint. Raises UserError for values that make no sense."""
        fresh = cls()
        for item in dataclasses.fields(cls):
            value = saved.get(item.name, getattr(fresh, item.name))
            least = -1 if item.name == "validated" else 0
            counts = not isinstance(value, int) or least <= value < MAX_COUNT
            if type(value) is not type(getattr(fresh, item.name)) or not counts:
                raise UserError(f"the checkpoint's progress is damaged: {item.name} is {value!r:.100}")
            setattr(fresh, item.name, value)
        rewarm, parent = fresh.rewarm, fresh.parent
        if fresh.split < 1 or (rewarm and not _is_rewarm(rewarm)) or (parent and not _is_parent(parent)):
            raise UserError("the checkpoint's progress is damaged: `split`, `rewarm` or `parent` makes no sense")
        if not are_ranges(fresh.skipped) or not _are_rewinds(fresh.rewinds):
            raise UserError("the checkpoint's progress is damaged: `skipped` or `rewinds` makes no sense")
        if len(best_steps({"progress": saved})) != len(fresh.best):
            raise UserError("the checkpoint's progress is damaged: `best` makes no sense")
        return fresh


def _are_rewinds(value: list[Any]) -> bool:
    whole = [pair for pair in value if isinstance(pair, list) and [*map(type, pair)] == [int, int]]
    return len(whole) == len(value) <= MAX_RANGES and all(0 <= step < wrong < MAX_COUNT for step, wrong in whole)


def _is_rewarm(value: dict[str, Any]) -> bool:
    if not _has(value, {"step": int, "learning_rate": float, "steps": int}):
        return False
    return 0 <= value["step"] < MAX_COUNT and 0 < value["steps"] < MAX_COUNT and math.isfinite(value["learning_rate"])


def _is_parent(value: dict[str, Any]) -> bool:
    whole = _has(value, {"run_id": str, "step": int, "file": str, "sha256": str})
    return whole and is_run_id(value["run_id"]) and 0 <= value["step"] < MAX_COUNT


def _has(value: dict[str, Any], kinds: dict[str, type]) -> bool:
    """Return whether the dict has exactly these keys, with values of these types."""
    return {key: type(item) for key, item in value.items()} == kinds


@dataclass
class RunState:
    """The state of a run: everything that decides its next step, and the record of its origin."""

    sharded: ShardedParameters
    optimizer: Optimizers
    progress: Progress
    code: str
    args: dict[str, Any]
    run_id: str
    data: dict[str, Any]
    environment: dict[str, Any]
    sources: dict[str, str]

    def tree(self) -> dict[str, Any]:
        """Return the checkpoint of the present step. Tensors are references: the snapshot copies them."""
        return {
            "model": self.sharded.model_state(),
            "optimizer": self.sharded.optimizer_state(self.optimizer),
            "step": self.progress.step,
            "code": self.code,
            "args": self.args,
            "run_id": self.run_id,
            "format": FORMAT,
            "progress": dataclasses.asdict(self.progress),
            "data": self.data,
            # Every microbatch seeds its own random numbers from this, so there is no generator state to save.
            "rng": {"seed": self.args["seed"]},
            "environment": self.environment,
            "sources": self.sources,
        }

    def restore(self, file: CheckpointFile) -> None:
        """Copy a checkpoint's tensors into the live ones. Collective.

        Raises UserError on all ranks if shapes or checksums do not fit.
        """
        with self.sharded.world.raise_together():
            moments = self.sharded.optimizer_state(self.optimizer)["state"]
            unknown = sorted(set(file.values["model"]) - set(self.sharded.model_state())) if file.is_ours else []
            if unknown:
                raise UserError(f"{file.path}: it has a weight {unknown[0]!r:.80} that this model has no place for")
        self._read(file, {"optimizer": {"state": moments}}, renamed=not file.is_ours)
        self.sharded.after_restore(self.optimizer, self.progress.step)

    def restore_weights(self, source: CheckpointFile | ImportedModel) -> None:
        """Copy only the weights, from a checkpoint of any kind or a Hugging Face folder, for a new run. Collective."""
        if isinstance(source, ImportedModel):
            source.move_into(self.sharded.whole_model_state())
        else:
            self._read(source, {}, renamed=True)

    def _read(self, file: CheckpointFile, moments: dict[str, Any], renamed: bool) -> None:
        """Read this rank's slices of the weights and the moments, then the other slices of the weights. Collective.

        The ranks of one machine take the latter from its page cache, which is faster than gloo. With NCCL, or from
        several machines, the ranks send them to each other, so that each byte of the file is read once by all.
        `renamed`: whether the file may have other names and dtypes.
        """
        world = self.sharded.world
        with world.raise_together():
            owned = {"model": self.sharded.model_state(), **moments}
            copied = {"model": self.sharded.copied_model_state()}
            if renamed:
                owned, copied = legacy.rename_to_file(owned, file), legacy.rename_to_file(copied, file)
        file.restore_slices(owned, world, cast=renamed)
        one_machine = len(set(world.gather(file.identity))) == 1
        if one_machine and (world.device.type == "cpu" or world.via_host_memory):
            with world.raise_together():
                file.restore(copied, cast=renamed, check=False)
        else:
            gather_weights(self.sharded, slice_buffer(self.sharded))
