"""Copies of the live tensors in one reused host buffer, taken before the next update changes them.

Fresh pages would cost 8 times the copy, so the buffer is kept, and its pages are allocated in advance. The copy runs
during the next forward and backward pass, on a GPU in a stream of its own: weights and moments do not change before the
next optimizer step, which waits for the copy (`before_update`).
"""

from __future__ import annotations

import ctypes
import mmap
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import torch

from unbroken.checkpoint.disk import warm_memory
from unbroken.threads import WorkerThreads

_COPY_BYTES = 8 << 20  # per copy of one thread
_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every context


class HostBuffer:
    """A host buffer on a page boundary with all pages present, pinned for a GPU. It only grows."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory: mmap.mmap | None = None
        self._pinned = False
        self.size = 0
        self.address = 0

    def reserve(self, size: int) -> None:
        """Provide at least `size` bytes, whose pages are allocated if the buffer grows."""
        if self._memory is not None and size <= self.size:
            return
        self.release()
        self._memory = warm_memory(size)
        with suppress(OSError, AttributeError):  # no child needs it, and a pinned page must not be copied
            self._memory.madvise(mmap.MADV_DONTFORK)
        self.size = len(self._memory)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        if self._device.type == "cuda":
            # A new thread's current GPU is GPU 0, so without the guard every rank would open a context there. Memory
            # that cannot be pinned works as well, only slower.
            with torch.cuda.device(self._device):
                self._pinned = int(_cudart().cudaHostRegister(self.address, self.size, _PORTABLE)) == 0
                if not self._pinned:
                    # CUDA keeps the error for this thread's next launch to report: this launch takes it.
                    with suppress(RuntimeError):
                        torch.zeros(1, device=self._device)

    def view(self, place: int, size: int) -> memoryview:
        """Return the bytes [place, place + size)."""
        assert self._memory is not None and place + size <= self.size
        return memoryview(self._memory)[place : place + size]

    def tensor(self, place: int, size: int) -> torch.Tensor:
        """Return the same bytes as a uint8 tensor, shape (size,)."""
        assert self._memory is not None
        return torch.frombuffer(self._memory, dtype=torch.uint8, offset=place, count=size)

    def release(self, unpin: bool = True) -> None:
        """Release the memory; views keep it alive until they are gone.

        `unpin=False` is for a failed attempt: unpinning waits for the GPU, whose kernels may wait for a dead rank.
        """
        if self._pinned and not unpin:
            _left_pinned.append(self._memory)
        elif self._pinned:
            with torch.cuda.device(self._device):
                _cudart().cudaHostUnregister(self.address)
        self._memory, self._pinned, self.size, self.address = None, False, 0, 0


_left_pinned: list[object] = []  # pages of a failed attempt, which stay mapped as long as they are pinned


def _cudart() -> Any:
    """Return the CUDA runtime that torch has loaded."""
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _event() -> torch.cuda.Event:
    """Return an event for which a thread waits asleep: several writers wait for one during most of a step."""
    return torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]


class Snapshot:
    """A snapshot of tensors in a host buffer.

    `take` returns at once, `before_update` when the tensors may change, `wait_until_copied` when the bytes are in the
    buffer.
    """

    def __init__(self, buffer: HostBuffer, pool: WorkerThreads, device: torch.device) -> None:
        self._buffer, self._pool, self._device = buffer, pool, device
        self._copies: list[tuple[int, Future[Any]]] = []  # of host memory: (place, copy), by place
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._issued = threading.Event()  # set unless another thread is still issuing copies from the GPU
        self._issued.set()
        self._copied: torch.cuda.Event | None = None
        self._error: BaseException | None = None

    def take(self, slices: Sequence[tuple[torch.Tensor, int]]) -> None:
        """Begin to copy each 1-D contiguous tensor to its place in the buffer; the places ascend."""
        on_gpu = [(data, place) for data, place in slices if data.is_cuda]
        if on_gpu:
            self._take_from_gpu(on_gpu)
        base = self._buffer.address
        self._copies = [
            # `data` is an argument so that it lives until it has been copied.
            (place, self._pool.submit(_copy, base + place, source, size, data))
            for data, place in slices
            if not data.is_cuda
            for source, place, size in _cut(data.data_ptr(), place, data.nbytes)
        ]

    def _take_from_gpu(self, slices: Sequence[tuple[torch.Tensor, int]]) -> None:
        """Make another thread issue the copies, because issuing hundreds of them takes milliseconds."""
        updated = _event()
        updated.record(torch.cuda.current_stream(self._device))
        self._issued.clear()
        self._error = None
        try:
            self._pool.submit(self._issue, list(slices), updated)
        except BaseException:
            self._issued.set()  # otherwise the next update would wait for ever
            raise

    def _issue(self, slices: Sequence[tuple[torch.Tensor, int]], updated: torch.cuda.Event) -> None:
        try:
            assert self._stream is not None
            with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
                self._stream.wait_event(updated)
                for data, place in slices:
                    self._buffer.tensor(place, data.nbytes).copy_(data.view(torch.uint8), non_blocking=True)
                copied = _event()
                copied.record(self._stream)
                self._copied = copied
        except BaseException as error:
            self._error = error
        finally:
            self._issued.set()

    def before_update(self) -> None:
        """Wait for the copies of host memory; make the GPU's next work, not the host, wait for those of its memory."""
        for _, copy in self._copies:
            copy.result()
        if self._stream is not None:
            self._issued.wait()
            if self._copied is not None:
                torch.cuda.current_stream(self._device).wait_event(self._copied)

    def wait_for_copies(self) -> None:
        """Wait until no copy writes into the buffer: a save that failed may have left some in progress."""
        self.before_update()
        if self._copied is not None:
            self._copied.synchronize()

    def wait_until_copied(self, stop: int) -> None:
        """Wait until the bytes of the buffer before `stop` are copied. Raises the error of a copy."""
        for place, copy in self._copies:
            if place >= stop:
                break
            copy.result()
        self._issued.wait()
        if self._error is not None:
            raise self._error
        if self._copied is not None:
            self._copied.synchronize()


def _copy(target: int, source: int, size: int, _: torch.Tensor) -> None:
    ctypes.memmove(target, source, size)


def _cut(source: int, place: int, size: int) -> Iterator[tuple[int, int, int]]:
    """Yield (source address, place, size) of copies of at most _COPY_BYTES."""
    for done in range(0, size, _COPY_BYTES):
        yield source + done, place + done, min(_COPY_BYTES, size - done)
