"""A GPU of threads: each stream is one, works through its queue in order and rests at random; the host does not wait.

`on_gpu(tensor)` marks a tensor as being in its memory. Copies and additions of such tensors are queued on the caller's
stream; everything else of torch happens at once, so nothing else may touch them without a wait.
"""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

REST = 0.003  # seconds, at most, before an operation
QUEUED = {"copy_", "add_"}


class Event:
    """As torch.cuda.Event: done when the stream has come to where it was recorded."""

    def __init__(self, **how: bool) -> None:
        self.done = threading.Event()

    def record(self, stream: Stream | None = None) -> None:
        (stream or current()).submit(self.done.set)

    def synchronize(self) -> None:
        assert self.done.wait(30), "nobody recorded this event"


class Stream:
    """As torch.cuda.Stream."""

    def __init__(self, device: object = None) -> None:
        self.work: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        dice = random.Random()
        while True:
            operation = self.work.get()
            time.sleep(dice.uniform(0, REST))
            operation()

    def submit(self, operation: Callable[[], object]) -> None:
        self.work.put(operation)

    def wait_event(self, event: Event) -> None:
        self.submit(event.synchronize)

    def record_event(self) -> Event:
        event = Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        self.record_event().synchronize()


_of_thread = threading.local()
_default = Stream()


def current(device: object = None) -> Stream:
    return getattr(_of_thread, "stream", _default)


@contextmanager
def stream(chosen: Stream) -> Iterator[None]:
    _of_thread.stream, before = chosen, current()
    yield
    _of_thread.stream = before


@contextmanager
def device(chosen: object) -> Iterator[None]:
    yield


class OnGpu(torch.Tensor):
    """A tensor whose operations are queued."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == torch.Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return True
        if getattr(func, "__name__", "") not in QUEUED:
            return super().__torch_function__(func, types, args, kwargs or {})
        plain = [arg.as_subclass(torch.Tensor) if isinstance(arg, OnGpu) else arg for arg in args]  # type: ignore[call-overload]
        current().submit(lambda: func(*plain))
        return args[0]


def on_gpu(tensor: torch.Tensor) -> OnGpu:
    return tensor.as_subclass(OnGpu)  # type: ignore[return-value, call-overload]


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put this GPU in the place of torch's."""
    for name, fake in (("Event", Event), ("Stream", Stream), ("stream", stream), ("device", device)):
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.cuda, "current_stream", current)
    monkeypatch.setattr(torch.cuda, "set_device", lambda chosen: None)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *given, pin_memory=False, **more: empty(*given, **more))


def finish() -> None:
    """Wait for the default stream."""
    _default.synchronize()
