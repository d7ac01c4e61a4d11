"""Memory of a GPU or the host that runs out, as torch, cuBLAS and NCCL report it, and as the line that a user sees."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from unbroken.errors import UserError

# Libraries that allocate by themselves report it as a RuntimeError: cuBLAS and cuDNN by a status, NCCL and the CUDA
# runtime in words, and cuBLAS's first call by a handle that it cannot make.
_REPORTS = ("out of memory", "ALLOC_FAILED", "cublasCreate")
_HOST_REPORTS = ("can't allocate memory", "not enough memory", "Cannot allocate memory")  # torch's, on a CPU


def require_out_of_memory(error: Exception) -> str:
    """Return which memory ran out as `error` says, "CUDA" or "host"; raise any other error again."""
    if isinstance(error, MemoryError) or any(report in str(error) for report in _HOST_REPORTS):
        return "host"
    if isinstance(error, RuntimeError) and any(report in str(error) for report in _REPORTS):
        return "CUDA"
    if isinstance(error, torch.OutOfMemoryError):
        return "CUDA"
    raise error


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
        line = line.replace("CUDA", require_out_of_memory(error), 1)
    else:
        return
    free_cached_memory()  # here, because the exception held the tensors of the body
    raise UserError(line)
