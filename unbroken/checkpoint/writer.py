"""Saving: training waits for a copy into host memory, and for nothing else.

One save is under way at a time, because there is one buffer: a save that comes while the one before is still
being written waits for it. A save that fails costs that save: its debris is removed, its outcome says why,
the next one tries anew.
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
    """What became of a save. Seconds are from the call to the durable file; `blocked_seconds` is what the
    loop waited.
    """

    step: int
    path: Path
    seconds: float
    blocked_seconds: float
    error: str | None
    sound: bool = True


@dataclass
class _Job:
    """One thing for the background thread; `work` returns the error or None."""

    work: Callable[[], str | None]
    outcome: SaveResult | None
    began: float = dataclasses.field(default_factory=time.perf_counter)


class CheckpointWriter:
    """Writes a run's checkpoints in the background. One per run and process, constructed and used by all
    processes alike.

    `before_commit` is called on rank 0's background thread when a file is complete but has no name yet: what
    must be durable before the checkpoint is (the log) becomes so there.
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
        """Finish what is under way and let go of threads, memory and the spare file."""
        self.wait()
        self._jobs.put(None)
        self._thread.join()
        self._copiers.shutdown()
        self._pool.shutdown()
        self._arena.release()
        if self._world.is_main:
            disk.remove(self._folder / schema.SPARE)

    def prepare(self, tree: dict[str, Any]) -> None:
        """Fill the buffer with pages in the background, so that the first save is as fast as the others.
        Optional.
        """
        sizes, slices = _slices_of(pickle_tree(tree)[1])
        _, size = place_parts(sizes, [(storage, start, data.nbytes) for storage, start, data in slices])

        def reserve() -> None:
            try:
                self._arena.reserve(size)
            except (MemoryError, OSError):
                pass  # the save will say so

        self._submit(_Job(reserve, None))

    def protect_all(self) -> None:
        """Give up nothing of what is there now until a state is saved that is sound."""
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
        """Collective. Takes all but the tensors by value; those may change after the next `before_update`.

        `sound`: whether the run can go on from this state. One that is not never makes retention give up the last one
        that is. `held_up` is called when the save before has been in the way for PATIENCE_SECONDS.
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
        """Everything by value: scalars into the pickle, tensors into the arena."""
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
        """`final.pt` becomes another name of the checkpoint of `step`, which has been saved before."""
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
        """Call it before every optimizer step: the update waits for the copy of what it is about to change."""
        began = time.perf_counter()
        self._snapshot.before_update()
        if self._latest is not None:
            self._latest.blocked_seconds += time.perf_counter() - began
            self._latest = None

    def results(self) -> list[SaveResult]:
        """On rank 0, the saves that have ended since the last call; elsewhere nothing."""
        ended: list[SaveResult] = []
        while not self._finished.empty():
            ended.append(self._finished.get())
        return ended if self._world.is_main else []

    def wait(self) -> None:
        """Until everything pending is durable, or has failed: see `outcomes`."""
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
        """After a commit, and only then, what retention gives up goes; one of them leaves its blocks to the
        next save.
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
    """The storages' sizes in bytes, and this process's slices of them: (storage, first byte, 1-D tensor), in
    order.
    """
    sizes = [leaf.numel * leaf.dtype.itemsize for leaf in leaves]
    slices = [
        (storage, piece.start * leaf.dtype.itemsize, piece.data)
        for storage, leaf in enumerate(leaves)
        for piece in sorted(leaf.slices, key=lambda piece: piece.start)
    ]
    return sizes, slices
