"""Memory, threads or open files that run out, as torch, cuBLAS and NCCL report it, and as the line that a user sees."""

from __future__ import annotations

import errno
import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from unbroken.errors import PassingError, UserError, exhausted_memory

_NO_THREADS = ("can't start new thread", "Resource temporarily unavailable")  # Python's words, and those of gloo


def require_out_of_memory(error: Exception) -> str:
    """Return which memory ran out as `error` says, "CUDA" or "host"; raise any other error again."""
    memory = exhausted_memory(error)
    if not memory:
        raise error
    return memory


def free_cached_memory() -> None:
    """Return unused GPU memory to the driver, that of tensors in reference cycles too."""
    gc.collect()
    torch.cuda.empty_cache()


@contextmanager
def out_of_memory_as_user_error(line: str) -> Iterator[None]:
    """Raise UserError with `line`, which begins with "CUDA out of memory", if memory runs out in the body."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        memory = require_out_of_memory(error)
    else:
        return
    free_cached_memory()  # here, because the exception held the tensors of the body
    raise kind_of_shortage(memory)(line.replace("CUDA", memory, 1))


def kind_of_shortage(memory: str) -> type[UserError]:
    """Return PassingError for "host", whose memory another program may have taken, else UserError."""
    return PassingError if memory == "host" else UserError


@contextmanager
def shortage_as_error() -> Iterator[None]:
    """Raise PassingError if the body ends because the system gives this process no more."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        raise PassingError(_describe_shortage(error)) from error


def _describe_shortage(error: Exception) -> str:
    inner = getattr(error, "inner_exception", None)  # of torch's compiler
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(inner, OSError):
        return f"cannot write compiled code: {inner.strerror} ({inner.filename}); start again when it can be written"
    if number in (errno.EMFILE, errno.ENFILE):
        return "no more files can be opened; raise `ulimit -n`"
    if number == errno.EAGAIN or any(report in str(error) for report in _NO_THREADS):
        return "no more threads can be started; raise `ulimit -u`, or the limit of pids of the container"
    memory = "host" if number == errno.ENOMEM else require_out_of_memory(error)
    return f"{memory} out of memory; end other programs, or use a smaller --batch_size"
