"""Read the bytes of storages into live tensors with several threads, and checksum them on the way.

Each byte is read once, straight to its place, and its checksum is computed while it is in the cache. pread is used
because a mapping costs a page fault for every 64 KiB, and a mapped file that shrinks kills the process.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from threading import local

import numpy as np
import torch

from unbroken.checkpoint.format.checksum import crc32, crc32_combine
from unbroken.checkpoint.format.zip_index import ZipEntry
from unbroken.distributed.sliced_tensor import TensorSlice
from unbroken.errors import UserError
from unbroken.host import available_cores
from unbroken.threads import WorkerThreads

UNIT = 16 << 20  # bytes for which a thread is responsible
BLOCK = 1 << 20  # bytes per read: they are still in the cache when their checksum is taken
_FEWEST, _MOST = 4, 8  # threads: some wait for the disk, or for a processor that others use

Progress = Callable[[int, int], None]  # (bytes done, bytes in all)


@dataclass(frozen=True)
class CopyTarget:
    """A target in live memory for the bytes [start, stop) of an entry: 1-D uint8, on any device."""

    start: int
    stop: int
    memory: torch.Tensor


@dataclass(frozen=True)
class ReadJob:
    """A job to read an entry, or the bytes [start, stop) of it.

    Attributes:
        entry: the entry.
        targets: where its bytes go, sorted, without overlaps.
        check: whether to read all bytes, also those without a target, for their checksum.
        exponent: numpy dtype and mask of the exponent of its numbers, to look for those that are not finite.
        start: the first byte.
        stop: the end; None for that of the entry.
    """

    entry: ZipEntry
    targets: tuple[CopyTarget, ...] = ()
    check: bool = True
    exponent: tuple[str, int] | None = None
    start: int = 0
    stop: int | None = None

    @property
    def end(self) -> int:
        return self.entry.size if self.stop is None else self.stop


def slice_target(part: TensorSlice, offset: int) -> CopyTarget:
    """Return the target of a slice of a tensor that begins at byte `offset` of its storage."""
    size = part.data.element_size()
    return CopyTarget(offset + part.start * size, offset + part.stop * size, part.data.detach().view(torch.uint8))


EXPONENTS = {torch.float32: ("<u4", 0x7F80_0000), torch.bfloat16: ("<u2", 0x7F80), torch.float16: ("<u2", 0x7C00)}


class ParallelReader:
    """A reader of one open file, with several threads. `not_finite`: entries in which a job has found NaN or inf."""

    def __init__(self, file: int) -> None:
        self._file = file
        self._of_thread = local()
        self.not_finite: set[ZipEntry] = set()

    def run(self, jobs: Sequence[ReadJob], progress: Progress | None = None) -> list[int]:
        """Do all jobs; return the CRC-32 of each, 0 for one without `check`. Raises UserError if a read fails.

        Copies to a GPU are in the order of the caller's current stream, and done on return. `progress` is called with
        (bytes done, bytes in all).
        """
        units = [(index, start) for index, job in enumerate(jobs) for start in range(job.start, max(job.end, 1), UNIT)]
        total, done = sum(job.end - job.start for job in jobs), 0
        devices = {target.memory.device for job in jobs for target in job.targets if target.memory.is_cuda}
        streams = {device: torch.cuda.current_stream(device) for device in devices}
        crcs = [0] * len(jobs)
        with WorkerThreads(max(_FEWEST, min(_MOST, available_cores())), "read") as pool:
            results = pool.map(lambda unit: self._read_unit(jobs[unit[0]], unit[1], streams), units)
            for (index, start), crc in zip(units, results, strict=True):
                size = min(UNIT, jobs[index].end - start)
                crcs[index] = crc32_combine(crcs[index], crc, size)
                done += size
                if progress is not None:
                    progress(done, total)
        return crcs

    def _read_unit(self, job: ReadJob, start: int, streams: dict[torch.device, torch.cuda.Stream]) -> int:
        """Read one unit of a job and return its CRC-32, or 0 without `check`."""
        crc = 0
        for begin, end, memory in _cut_at_targets(job, start, min(start + UNIT, job.end)):
            if memory is not None and memory.is_cuda:
                crc = self._read_to_device(job, begin, memory, crc, streams[memory.device])
            elif memory is not None:
                crc = self._read(job, begin, _bytes_of(memory), crc)
            elif job.check:
                (scratch,) = self._buffers("scratch", 1, pinned=False)
                for at in range(begin, end, BLOCK):
                    crc = self._read(job, at, _bytes_of(scratch)[: min(BLOCK, end - at)], crc)
        return crc

    def _read(self, job: ReadJob, begin: int, memory: memoryview, crc: int) -> int:
        for at in range(0, len(memory), BLOCK):
            part = memory[at : at + BLOCK]
            read_exactly(self._file, part, job.entry.offset + begin + at)
            if job.check:
                crc = crc32(part, crc)
            if job.exponent is not None and not _all_finite(part, *job.exponent):
                self.not_finite.add(job.entry)
        return crc

    def _read_to_device(
        self, job: ReadJob, begin: int, memory: torch.Tensor, crc: int, stream: torch.cuda.Stream
    ) -> int:
        """Read through two pinned buffers: one is filled while the other is copied to the device in `stream`.

        After an error up to two copies may still be running. torch keeps the pinned memory until they are done, and the
        order of the stream keeps that of the GPU.
        """
        torch.cuda.set_device(memory.device)  # a new thread would pin memory in a context of its own on GPU 0
        buffers = self._buffers("staging", 2, pinned=True)
        events: list[torch.cuda.Event | None] = [None, None]
        with torch.cuda.stream(stream):
            for turn, at in enumerate(range(0, memory.numel(), BLOCK)):
                event, size = events[turn % 2], min(BLOCK, memory.numel() - at)
                if event is not None:
                    event.synchronize()
                staged = buffers[turn % 2][:size]
                crc = self._read(job, begin + at, _bytes_of(staged), crc)
                memory[at : at + size].copy_(staged, non_blocking=True)
                events[turn % 2] = copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
                copied.record(stream)
            for event in filter(None, events):
                event.synchronize()
        return crc

    def _buffers(self, name: str, count: int, *, pinned: bool) -> list[torch.Tensor]:
        """Return this thread's buffers of BLOCK bytes, which it keeps under `name`."""
        if not hasattr(self._of_thread, name):
            made = [torch.empty(BLOCK, dtype=torch.uint8, pin_memory=pinned) for _ in range(count)]
            setattr(self._of_thread, name, made)
        return list(getattr(self._of_thread, name))


def _cut_at_targets(job: ReadJob, start: int, stop: int) -> Iterator[tuple[int, int, torch.Tensor | None]]:
    """Yield [start, stop) of an entry, cut where targets begin and end, each with its memory; None between targets."""
    at = start
    for target in job.targets:
        begin, end = max(target.start, at), min(target.stop, stop)
        if begin >= end:
            continue
        if begin > at:
            yield at, begin, None
        yield begin, end, target.memory[begin - target.start : end - target.start]
        at = end
    if at < stop:
        yield at, stop, None


def _all_finite(part: memoryview, kind: str, mask: int) -> bool:
    """Return whether no number has all bits of its exponent set. While `part` is in the cache this costs little."""
    bits = np.frombuffer(part[: len(part) // np.dtype(kind).itemsize * np.dtype(kind).itemsize], kind)
    return not bool(((bits & mask) == mask).any())


def _bytes_of(memory: torch.Tensor) -> memoryview:
    """Return the writable memory of a 1-D uint8 tensor, without numpy. The tensor must outlive the view."""
    return memoryview((ctypes.c_char * memory.numel()).from_address(memory.data_ptr())).cast("B")


def read_exactly(file: int, memory: memoryview, offset: int) -> None:
    """Fill `memory` from `offset` of the file. Raises UserError."""
    done = 0
    while done < len(memory):
        try:
            got = os.preadv(file, [memory[done:]], offset + done)
        except OSError as error:
            raise UserError(f"it cannot be read: {error.strerror}") from None
        if got == 0:
            raise UserError("it became shorter while it was being read")
        done += got
