"""Saving in the background: training waits only for the copy into host memory.

One save is in progress at a time, because there is one host buffer; the next save waits for it. A failed save removes
its temporary file and reports the error in its result; the next save does not depend on it.
"""

from __future__ import annotations

import dataclasses
import os
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unbroken import files
from unbroken.checkpoint import directory, disk
from unbroken.checkpoint.format import schema
from unbroken.checkpoint.format.digest import StateDigest, digest_state
from unbroken.checkpoint.format.pickle_reader import unpickle
from unbroken.checkpoint.format.pickle_writer import pickle_tree
from unbroken.checkpoint.format.stored_tensor import PickleRefused
from unbroken.checkpoint.snapshot import HostBuffer, Snapshot
from unbroken.checkpoint.transaction import Contents, Transaction
from unbroken.checkpoint.write_plan import Part, place_parts
from unbroken.distributed.sliced_tensor import SlicedTensor, TensorSlice
from unbroken.distributed.world import World
from unbroken.errors import UserError, describe_error
from unbroken.host import available_cores
from unbroken.threads import WorkerThreads

PATIENCE_SECONDS = 10.0
_WRITERS = 4  # threads; measured: two cores reach 75 to 86% of the raw disk with four


@dataclass
class SaveResult:
    """A result of one save. `error` is None if the checkpoint is durable.

    `seconds` is the time from the call to the durable file, `blocked_seconds` the time for which the training loop
    waited. `best`: the steps of the best checkpoints, the best one first, which stay; `unlinked`: why `best.pt` could
    not be made a link to the first of them.
    """

    step: int
    path: Path
    seconds: float
    blocked_seconds: float
    error: str | None
    sound: bool = True
    best: tuple[int, ...] = ()
    unlinked: str = ""


@dataclass
class _Job:
    """A job of the background thread; `work` returns the error, or raises it. Without `result` nothing is reported."""

    work: Callable[[], str | None]
    result: SaveResult | None
    began: float = dataclasses.field(default_factory=time.perf_counter)


class RunCheckpointWriter:
    """A writer of a run's checkpoints in the background. Every rank constructs one and makes the same calls.

    Args:
        run_folder: where the checkpoints are written.
        world: the ranks.
        keep_last: number of periodic checkpoints to keep; 0 keeps all.
        keep_every: also keep checkpoints whose step is a multiple of this; 0 keeps none by that rule.
        before_commit: called on rank 0's background thread with step, file name and digest before a complete file gets
            its name. It must make durable what the checkpoint relies on: the log.
        with_weights: whether `save_weights` will be called.
    """

    def __init__(
        self,
        run_folder: Path,
        world: World,
        *,
        keep_last: int = 0,
        keep_every: int = 0,
        before_commit: Callable[[int, str, StateDigest], None] = lambda step, name, digest: None,
        with_weights: bool = False,
    ) -> None:
        self._folder, self._keep_last, self._keep_every = Path(run_folder), keep_last, keep_every
        self._before_commit = before_commit
        self._sound, self._protected = True, set[int]()
        self._run_id, self._reasons = "", dict[int, str | None]()  # of each checkpoint, by `directory.written_for`
        self._unfinished: set[Path] = set()
        self._failed_step: int | None = None  # of the last save, if it failed; the same on all ranks
        self._world = world.for_thread()
        threads = max(1, available_cores() // world.local_size)
        writers, copiers = max(_WRITERS, min(threads, 16)), min(threads, 8)
        self._pool = WorkerThreads(writers, "checkpoint", self._enter_thread)
        self._copiers = WorkerThreads(copiers, "snapshot", self._enter_thread)
        self._buffer = HostBuffer(world.device)
        self._snapshot = Snapshot(self._buffer, self._copiers, world.device)
        self._idle = threading.Event()
        self._idle.set()
        self._finished: queue.SimpleQueue[SaveResult] = queue.SimpleQueue()
        self._latest: SaveResult | None = None
        self._checked_readable = False
        self._thread = WorkerThreads(1, "checkpoint-writer", self._enter_thread)
        self._weights = _WeightsWriter(run_folder, world) if with_weights else None

    @property
    def folder(self) -> Path:
        """Where the checkpoints are written."""
        return self._folder

    def size_of(self, tree: dict[str, Any]) -> int:
        """Return about how many bytes a checkpoint of `tree` has: those of its tensors."""
        return sum(_slices_of(pickle_tree(tree)[1])[0])

    def prepare(self, tree: dict[str, Any]) -> None:
        """Allocate the host buffer in the background, so that the first save is as fast as the others. Optional."""
        sizes, slices = _slices_of(pickle_tree(tree)[1])
        _, size = place_parts(sizes, [(storage, start, data.nbytes) for storage, start, data in slices])

        def reserve() -> None:
            with suppress(MemoryError, OSError):  # the first save tries again and reports it
                self._buffer.reserve(size)

        self._submit(_Job(reserve, None))

    def save(
        self,
        tree: dict[str, Any],
        step: int,
        *,
        final: bool = False,
        sound: bool = True,
        held_up: Callable[[], None] = lambda: None,
        best: Callable[[int | None], tuple[int, ...]] = lambda failed: (),
    ) -> None:
        """Take a snapshot of `tree` and write it in the background. Collective.

        Plain values are copied at once; tensors may change after the next `before_update`.

        Args:
            tree: nested dicts and lists of sliced tensors and plain values.
            step: number of updates in the state.
            final: write `final.pt` instead of the periodic name.
            sound: whether the run can continue from this state; retention never removes the last sound checkpoint for
                one that is not.
            held_up: called if the save before this one is still in progress after PATIENCE_SECONDS.
            best: called when the save before this one has ended, with its step if it failed; returns the steps of the
                best checkpoints, the best one first: retention keeps them, and `best.pt` becomes a link to it.

        Raises UserError if the tree holds a value that a checkpoint cannot hold.
        """
        began = time.perf_counter()
        assert tree.get("step") == step, "the tree holds another step"
        self._run_id = str(tree.get("run_id"))
        if not self._idle.wait(PATIENCE_SECONDS):
            held_up()
        self._idle.wait()
        path = self._folder / (schema.FINAL if final else self._name(step))
        try:
            self._check(tree)
            contents, tensors = self._snapshot_contents(tree)
        except (UserError, PickleRefused) as error:
            raise UserError(f"this state cannot be saved: {error}") from None
        self._sound = sound
        kept = best(self._failed_step)
        result = SaveResult(step, path, 0.0, time.perf_counter() - began, None, sound, kept)

        def complete(crcs: list[int]) -> None:
            self._wait_for_weights()
            self._before_commit(step, path.name, _digest(tree, tensors, crcs, contents.pickled))

        def work() -> str | None:
            return Transaction(path, contents, self._buffer, self._world, self._pool).run(complete)

        self._latest = result
        self._submit(_Job(work, result, began))

    def save_weights(self, tree: dict[str, Any], step: int, dtype: torch.dtype, held_up: Callable[[], None]) -> None:
        """Write the weights of `tree` alone in the background, beside a save in progress. Collective.

        They are converted at once. A checkpoint of this or a later step gets its name only after them, so that a run
        that is resumed from it has them.

        Args:
            tree: as for `save`.
            step: number of updates in the state.
            dtype: of the weights in the file.
            held_up: called if the weights before these are still being written after PATIENCE_SECONDS.
        """
        assert self._weights is not None, "with_weights was not asked for"
        alone = {"model": _convert(tree["model"], dtype), "optimizer": {"state": {}, "param_groups": []}}
        self._weights.save({**tree, **alone}, step, held_up=held_up)

    def _wait_for_weights(self) -> None:
        if self._weights is not None:
            self._weights.wait()

    def before_update(self) -> None:
        """Make the next update wait for the copies of the tensors that it changes; call before every optimizer step."""
        began = time.perf_counter()
        self._snapshot.before_update()
        if self._latest is not None:
            self._latest.blocked_seconds += time.perf_counter() - began
            self._latest = None

    def link_final(self, step: int, run_id: str = "", best: tuple[int, ...] = ()) -> None:
        """Make `final.pt` another name of the checkpoint of `step`. Collective.

        Retention removes checkpoints of the run `run_id` as after `save`, because a kill may have come before that, and
        keeps `best`.
        """
        self._run_id = run_id or self._run_id
        existing, final = self._folder / schema.checkpoint_name(step), self._folder / schema.FINAL

        def work() -> str | None:
            self._wait_for_weights()
            if self._world.is_main:
                disk.second_name(existing, self._folder / schema.temporary_name(schema.FINAL), final)
            return None

        self._submit(_Job(work, SaveResult(step, final, 0.0, 0.0, None, self._sound, best)))

    def results(self) -> list[SaveResult]:
        """Return the saves that have ended since the last call, on rank 0; nothing on other ranks."""
        ended = [self._finished.get() for _ in range(self._finished.qsize())]
        ended += self._weights.results() if self._weights is not None else []
        return ended if self._world.is_main else []

    def wait(self) -> None:
        """Wait until every pending save is durable or has failed; `results` returns which."""
        self._idle.wait()
        self._wait_for_weights()

    def protect_all(self) -> None:
        """Keep everything that exists now from retention, until a sound state is saved."""
        self._sound, self._protected = False, set(directory.periodic_steps(self._folder))

    def close(self, failed: bool = False) -> None:
        """Finish the save in progress and release threads, memory and the spare file."""
        self.wait()
        if self._weights is not None:
            self._weights.close(failed)
        for threads in (self._thread, self._copiers, self._pool):
            threads.close()
        self._buffer.release(unpin=not failed)
        if self._world.is_main:
            disk.remove(self._folder / schema.SPARE)

    def __enter__(self) -> RunCheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        # An error of all ranks leaves no kernel that waits for a rank.
        self.close(failed=kind is not None and not getattr(error[0], "on_all_ranks", False))

    def _name(self, step: int) -> str:
        """Return the file name of a periodic checkpoint."""
        return schema.checkpoint_name(step)

    def _check(self, tree: dict[str, Any]) -> None:
        """Raise UserError unless `tree` is what a file of this writer may hold."""
        schema.check_tree(tree, lambda value: isinstance(value, SlicedTensor))

    def _snapshot_contents(self, tree: dict[str, Any]) -> tuple[Contents, list[SlicedTensor]]:
        """Copy plain values into the pickle and begin to copy tensors into the host buffer; return the tensors too."""
        pickled, tensors = pickle_tree(tree)
        sizes, slices = _slices_of(tensors)
        if not self._checked_readable:  # once: later states of the run have the same form
            unpickle(pickled, {str(key): size for key, size in enumerate(sizes)})
            self._checked_readable = True
        parts: list[Part] = []
        failure: Exception | None = None
        try:
            parts, size = place_parts(sizes, [(storage, start, data.nbytes) for storage, start, data in slices])
            self._snapshot.wait_for_copies()
            self._buffer.reserve(size)
            sources = [data for _, _, data in slices if data.nbytes]
            self._snapshot.take([(data, part.place) for data, part in zip(sources, parts, strict=True)])
        except Exception as error:
            failure = error  # raised in the transaction, where all ranks learn of it

        def wait_until_copied(stop: int) -> None:
            if failure is not None:
                raise failure
            self._snapshot.wait_until_copied(stop)

        return Contents(pickled, sizes, parts, wait_until_copied), tensors

    def _submit(self, job: _Job) -> None:
        self._idle.wait()
        self._idle.clear()
        self._thread.submit(self._run, job)

    def _run(self, job: _Job) -> None:
        """Do a job on the background thread."""
        result = job.result
        if result is not None and result.path.name == schema.FINAL:  # now: after the end no attempt may come to do it
            self._apply_retention(result)
        try:
            error = job.work()
        except BaseException as caught:
            error = describe_error(caught)
        if result is not None:
            result.error, result.seconds = error, time.perf_counter() - job.began
            self._failed_step = None if error is None else result.step
            self._remove_unfinished(result)
            if result.path.name != schema.FINAL:
                self._apply_retention(result)
            self._finished.put(result)
        self._idle.set()

    def _remove_unfinished(self, result: SaveResult) -> None:
        """After a save, remove what the failed ones before it could not: their disk was read-only, for example."""
        if result.error is not None:
            self._unfinished.add(result.path.with_name(schema.temporary_name(result.path.name)))
        elif self._world.is_main:
            for path in self._unfinished:
                disk.remove(path)
            self._unfinished = {path for path in self._unfinished if os.path.lexists(path)}

    def _enter_thread(self) -> None:
        """Set this thread's GPU: otherwise waiting for an event opens a context of 0.5 GB on GPU 0."""
        if self._world.device.type == "cuda":
            torch.cuda.set_device(self._world.device)

    def _written_for(self, path: Path, run_id: str | None = None) -> str | None:
        """Return `directory.written_for` of a checkpoint."""
        return directory.written_for(path, run_id)

    def _apply_retention(self, result: SaveResult) -> None:
        """After a save, link the best checkpoint, then remove what retention gives up."""
        if result.error is not None or not self._world.is_main:
            return
        if result.best:
            try:
                directory.link_best(self._folder, result.best)
            except OSError as error:
                result.unlinked = describe_error(error)
        with suppress(OSError):  # the folder may be gone; retention after the next save removes the rest
            self._remove_expired(result)

    def _remove_expired(self, result: SaveResult) -> None:
        """Remove the checkpoints that retention gives up after this save; one stays as the spare for the next save.

        A checkpoint that was written for its validation loss is removed when it is not among the best any more, also
        if all others are kept.
        """
        if result.path.name != schema.FINAL and result.sound:
            self._protected = {result.step}
        if self._keep_last <= 0 and not result.best:
            return
        self._reasons[result.step] = self._written_for(self._folder / schema.checkpoint_name(result.step))
        spare, recycled = self._folder / schema.SPARE, False
        kept = self._protected - {result.step}
        present = [step for step in directory.periodic_steps(self._folder) if step not in kept]
        for step in present:
            if step not in self._reasons:
                self._reasons[step] = self._written_for(self._folder / schema.checkpoint_name(step), self._run_id)
        reasons = {step: why for step in present if (why := self._reasons[step]) is not None}
        if self._keep_last > 0:
            stay = {*result.best, *(step for step, why in reasons.items() if why == directory.FOR_STEPS)}
            gone = directory.expired_steps(list(reasons), result.step, self._keep_last, self._keep_every, stay)
        else:
            for_best = [step for step, why in reasons.items() if why == directory.FOR_BEST and step < result.step]
            gone = [step for step in for_best if step not in result.best]
        for step in gone:
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
        if recycled:  # otherwise, after a power cut, the old name could lead to blocks that the next save wrote over
            try:
                files.sync_folder(self._folder)
            except OSError:
                disk.remove(spare)
                raise


class _WeightsWriter(RunCheckpointWriter):
    """The writer of weights alone, with a host buffer, threads and a control group of its own."""

    def _name(self, step: int) -> str:
        return schema.weights_name(step)

    def _apply_retention(self, result: SaveResult) -> None:
        """Remove nothing: the files are small, and the user wants all of them."""


@torch.no_grad()
def _convert(model: dict[str, SlicedTensor], dtype: torch.dtype) -> dict[str, SlicedTensor]:
    """Return copies of floating-point weights in another dtype; a tensor with two names stays one.

    A copy for which a GPU has no room is made in host memory.
    """

    def converted(data: torch.Tensor) -> torch.Tensor:
        try:
            return data.to(dtype, copy=True)
        except torch.OutOfMemoryError:
            return data.cpu().to(dtype)

    made: dict[int, SlicedTensor] = {}
    for tensor in model.values():
        if id(tensor) not in made:
            slices = tuple(TensorSlice(part.start, converted(part.data)) for part in tensor.slices)
            made[id(tensor)] = SlicedTensor(tensor.shape, dtype, slices)
    return {name: made[id(tensor)] for name, tensor in model.items()}


def _slices_of(tensors: list[SlicedTensor]) -> tuple[list[int], list[tuple[int, int, torch.Tensor]]]:
    """Return the sizes of the storages in bytes, and this rank's slices (storage, first byte, 1-D tensor), sorted."""
    sizes = [tensor.numel * tensor.dtype.itemsize for tensor in tensors]
    slices = [
        (storage, part.start * tensor.dtype.itemsize, part.data)
        for storage, tensor in enumerate(tensors)
        for part in sorted(tensor.slices, key=lambda part: part.start)
    ]
    return sizes, slices


def _digest(tree: dict[str, Any], tensors: list[SlicedTensor], crcs: list[int], pickled: bytes) -> StateDigest:
    """Return the digest of a saved tree, given its tensors in the order of their storages and those CRC-32s."""
    crc_of = {id(tensor): crc for tensor, crc in zip(tensors, crcs, strict=True)}
    found = ((schema.dotted_path(path), value) for path, value in schema.walk(tree) if isinstance(value, SlicedTensor))
    named = ((name, tensor.dtype, tensor.shape, crc_of[id(tensor)]) for name, tensor in found)
    return digest_state(named, pickled)
