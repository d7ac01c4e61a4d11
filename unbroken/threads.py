"""Threads that start when they are constructed, so that no accepted job is left undone."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

Result = TypeVar("Result")
_Job = tuple["Future[Any]", Callable[..., Any], tuple[Any, ...]]


class WorkerThreads:
    """A group of threads that do jobs in the order in which they come.

    All start at once. If the system allows fewer (a limit of processes), the ones that started do the work; without
    any, the caller does. ThreadPoolExecutor starts them late, and raises from `submit` after it has queued the job.

    Args:
        count: number of threads.
        name: the beginning of their names.
        enter: called first on each thread.
    """

    def __init__(self, count: int, name: str, enter: Callable[[], None] | None = None) -> None:
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        for index in range(count):
            thread = threading.Thread(target=self._work, args=(enter,), name=f"{name}_{index}", daemon=True)
            try:
                thread.start()
            except RuntimeError:
                break
            self._threads.append(thread)

    def submit(self, function: Callable[..., Result], *args: object) -> Future[Result]:
        """Queue a job; return its result to come. Without threads, do it now."""
        future: Future[Result] = Future()
        if self._threads:
            self._jobs.put((future, function, args))
        else:
            _do(future, function, args)
        return future

    def map(self, function: Callable[..., Result], items: Iterable[object]) -> Iterator[Result]:
        """Yield function(item) for each item, in order; after an error the jobs that have not begun are cancelled."""
        futures = [self.submit(function, item) for item in items]
        try:
            for future in futures:
                yield future.result()
        finally:
            for future in futures:
                future.cancel()

    def close(self) -> None:
        """Finish what is queued and end the threads."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        self._threads = []

    def __enter__(self) -> WorkerThreads:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _work(self, enter: Callable[[], None] | None) -> None:
        if enter is not None:
            enter()
        while (job := self._jobs.get()) is not None:
            _do(*job)
            del job  # its arguments may be large, and the next job may come late


def _do(future: Future[Any], function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function(*args))
    except BaseException as error:
        future.set_exception(error)
