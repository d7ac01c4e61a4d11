"""Saving in the background: training waits only for the copy into host memory.

One save is in progress at a time, because there is one host buffer; the next save waits for it. A save that fails has
no further effect: its temporary file is removed, its result says why, and the next save starts anew.
"""

from __future__ import annotations

import dataclasses
import os
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from unbroken.checkpoint import directory, disk
from unbroken.checkpoint.format import schema
from unbroken.checkpoint.format.pickle_reader import unpickle
from unbroken.checkpoint.format.pickle_writer import pickle_tree
from unbroken.checkpoint.format.stored_tensor import PickleRefused
from unbroken.checkpoint.snapshot import HostBuffer, Snapshot
from unbroken.checkpoint.transaction import Contents, Transaction
from unbroken.checkpoint.write_plan import Part, place_parts
from unbroken.distributed.sliced_tensor import SlicedTensor
from unbroken.distributed.world import World
from unbroken.errors import UserError, describe_error
from unbroken.host import available_cores

PATIENCE_SECONDS = 10.0
_WRITERS = 4  # threads; two cores reach 75 to 86% of the raw disk with four (research/performance.md, C)


@dataclass
class SaveResult:
    """A result of one save.

    `seconds` are from the call to the durable file, `blocked_seconds` is how long the training loop waited. `error` is
    None for a durable checkpoint.
    """

    step: int
    path: Path
    seconds: float
    blocked_seconds: float
    error: str | None
    sound: bool = True


@dataclass
class _Job:
    """A job of the background thread; `work` returns the error, or None."""

    work: Callable[[], str | None]
    outcome: SaveResult | None
    began: float = dataclasses.field(default_factory=time.perf_counter)


class CheckpointWriter:
    """A writer of a run's checkpoints in the background. Every rank constructs one and makes the same calls.

    Args:
        run_folder: where the checkpoints are written.
        world: the ranks.
        keep_last: number of periodic checkpoints to keep; 0 keeps all.
        keep_every: also keep checkpoints whose step is a multiple of this; 0 keeps none by that rule.
        before_commit: called on rank 0's background thread when a file is complete but has no name yet; what must be
            durable before the checkpoint (the log) is made so there.
    """

    def __init__(
        self,
        run_folder: Path,
        world: World,
        *,
        keep_last: int = 0,
        keep_every: int = 0,
        before_commit: Callable[[], None] | None = None,
    ) -> None:
        self._folder, self._keep_last, self._keep_every = Path(run_folder), keep_last, keep_every
        self._before_commit = before_commit
        self._sound, self._protected = True, set[int]()
        self._world = dataclasses.replace(world, control=world.new_control_group())
        threads = max(1, available_cores() // world.local_size)
        writers, copiers = max(_WRITERS, min(threads, 16)), min(threads, 8)
        self._pool = ThreadPoolExecutor(writers, "checkpoint", self._enter_thread)
        self._copiers = ThreadPoolExecutor(copiers, "snapshot", self._enter_thread)
        self._arena = HostBuffer(world.device)
        self._snapshot = Snapshot(self._arena, self._copiers, world.device)
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._idle = threading.Event()
        self._idle.set()
        self._finished: queue.SimpleQueue[SaveResult] = queue.SimpleQueue()
        self._latest: SaveResult | None = None
        self._readable = False
        self._thread = threading.Thread(target=self._serve, name="checkpoint-writer", daemon=True)
        self._thread.start()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Finish the save in progress and release threads, memory and the spare file."""
        self.wait()
        self._jobs.put(None)
        self._thread.join()
        self._copiers.shutdown()
        self._pool.shutdown()
        self._arena.release()
        if self._world.is_main:
            disk.remove(self._folder / schema.SPARE)

    def prepare(self, tree: dict[str, Any]) -> None:
        """Allocate the host buffer in the background, so that the first save is as fast as the others. Optional."""
        sizes, slices = _slices_of(pickle_tree(tree)[1])
        _, size = place_parts(sizes, [(storage, start, data.nbytes) for storage, start, data in slices])

        def reserve() -> None:
            try:
                self._arena.reserve(size)
            except (MemoryError, OSError):
                pass  # the save will say so

        self._submit(_Job(reserve, None))

    def protect_all(self) -> None:
        """Let retention remove nothing that exists now, until a sound state is saved."""
        self._sound, self._protected = False, set(directory.periodic_steps(self._folder))

    def save(
        self,
        tree: dict[str, Any],
        step: int,
        *,
        final: bool = False,
        sound: bool = True,
        held_up: Callable[[], None] = lambda: None,
    ) -> None:
        """Take a snapshot of `tree` and write it in the background. Collective.

        Plain values are copied at once; tensors may change after the next `before_update`.

        Args:
            tree: nested dicts and lists of sliced tensors and plain values.
            step: the updates that the state has.
            final: write `final.pt` instead of the periodic name.
            sound: whether the run can continue from this state; retention never removes the last sound checkpoint for
                one that is not.
            held_up: called when the save before has been in progress for PATIENCE_SECONDS.
        """
        began = time.perf_counter()
        assert tree.get("step") == step, "the state is not of this step"
        if not self._idle.wait(PATIENCE_SECONDS):
            held_up()
        self._idle.wait()
        path = self._folder / (schema.FINAL if final else schema.checkpoint_name(step))
        try:
            schema.check_tree(tree, lambda value: isinstance(value, SlicedTensor))
            contents = self._take(tree)
        except (UserError, PickleRefused) as error:
            raise UserError(f"this state cannot be saved: {error}") from None
        self._sound = sound
        outcome = SaveResult(step, path, 0.0, time.perf_counter() - began, None, sound)

        def work() -> str | None:
            return Transaction(path, contents, self._arena, self._world, self._pool).run(self._before_commit)

        self._latest = outcome
        self._submit(_Job(work, outcome, began))

    def _take(self, tree: dict[str, Any]) -> Contents:
        """Copy plain values into the pickle and begin to copy tensors into the host buffer."""
        data, leaves = pickle_tree(tree)
        sizes, slices = _slices_of(leaves)
        if not self._readable:  # once: later states of the run differ in numbers, not in their form
            unpickle(data, {str(key): size for key, size in enumerate(sizes)})
            self._readable = True
        held: list[Part] = []
        failure: Exception | None = None
        try:
            spans = [(storage, start, tensor.nbytes) for storage, start, tensor in slices]
            held, size = place_parts(sizes, spans)
            self._snapshot.wait_for_copies()
            self._arena.reserve(size)
            tensors = [tensor for _, _, tensor in slices if tensor.nbytes]
            self._snapshot.take([(tensor, part.place) for tensor, part in zip(tensors, held, strict=True)])
        except Exception as error:
            failure = error

        def ready(stop: int) -> None:
            if failure is not None:
                raise failure
            self._snapshot.ready(stop)

        return Contents(data, sizes, held, ready)

    def link_final(self, step: int) -> None:
        """Make `final.pt` another name of the saved checkpoint of `step`. Collective."""
        existing, final = self._folder / schema.checkpoint_name(step), self._folder / schema.FINAL

        def work() -> str | None:
            if not self._world.is_main:
                return None
            try:
                disk.second_name(existing, self._folder / schema.temporary_name(schema.FINAL), final)
            except OSError as error:
                return describe_error(error)
            return None

        self._submit(_Job(work, SaveResult(step, final, 0.0, 0.0, None, self._sound)))

    def before_update(self) -> None:
        """Make the next update wait for the copies of the tensors that it changes.

        Call it before every optimizer step.
        """
        began = time.perf_counter()
        self._snapshot.before_update()
        if self._latest is not None:
            self._latest.blocked_seconds += time.perf_counter() - began
            self._latest = None

    def results(self) -> list[SaveResult]:
        """Return the saves that have ended since the last call, on rank 0; nothing on other ranks."""
        ended: list[SaveResult] = []
        while not self._finished.empty():
            ended.append(self._finished.get())
        return ended if self._world.is_main else []

    def wait(self) -> None:
        """Wait until every pending save is durable or has failed; `results` says which."""
        self._idle.wait()

    def _submit(self, job: _Job) -> None:
        self._idle.wait()
        self._idle.clear()
        self._jobs.put(job)

    def _enter_thread(self) -> None:
        """Make the rank's GPU this thread's own: otherwise waiting for an event opens a context of 0.5 GB on GPU 0."""
        if self._world.device.type == "cuda":
            torch.cuda.set_device(self._world.device)

    def _serve(self) -> None:
        self._enter_thread()
        while (job := self._jobs.get()) is not None:
            try:
                error = job.work()
            except BaseException as caught:
                error = describe_error(caught)
            if job.outcome is not None:
                job.outcome.error, job.outcome.seconds = error, time.perf_counter() - job.began
                with suppress(OSError):  # of a folder that is gone now: what stays is given up after the next save
                    self._retain(job.outcome)
                self._finished.put(job.outcome)
            self._idle.set()

    def _retain(self, outcome: SaveResult) -> None:
        """Remove the checkpoints that retention gives up, after a commit.

        One of them leaves its blocks to the next save.
        """
        if outcome.error is not None or not self._world.is_main:
            return
        if outcome.sound:
            self._protected = {outcome.step}
        spare, recycled = self._folder / schema.SPARE, False
        kept = self._protected - {outcome.step}
        steps = [step for step in directory.periodic_steps(self._folder) if step not in kept]
        for step in directory.expired_steps(steps, outcome.step, self._keep_last, self._keep_every):
            path = self._folder / schema.checkpoint_name(step)
            if spare.exists():
                disk.remove(path)
                continue
            try:
                os.rename(path, spare)
            except OSError:
                continue
            recycled = disk.recyclable(spare)
            if not recycled:
                disk.remove(spare)
        if recycled:  # or after a power cut the old name could stand on what the next save wrote over its blocks
            disk.sync_folder(self._folder)


def _slices_of(leaves: list[SlicedTensor]) -> tuple[list[int], list[tuple[int, int, Any]]]:
    """Return the sizes of the storages in bytes, and this rank's slices of them.

    A slice is (storage, first byte, 1-D tensor); they are in the order of the storages.
    """
    sizes = [leaf.numel * leaf.dtype.itemsize for leaf in leaves]
    slices = [
        (storage, piece.start * leaf.dtype.itemsize, piece.data)
        for storage, leaf in enumerate(leaves)
        for piece in sorted(leaf.slices, key=lambda piece: piece.start)
    ]
    return sizes, slices
