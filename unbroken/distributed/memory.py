"""Memory of a GPU that runs out, as torch, cuBLAS and NCCL report it, and as the one line that the user sees."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from unbroken.errors import UserError

# Libraries that allocate by themselves report it as a RuntimeError: cuBLAS and cuDNN by a status, NCCL and the CUDA
# runtime in words, and cuBLAS's first call by a handle that it cannot make.
_REPORTS = ("out of memory", "ALLOC_FAILED", "cublasCreate")


def require_out_of_memory(error: Exception) -> bool:
    """Return True if `error` says that GPU memory ran out; raise any other error again."""
    if isinstance(error, RuntimeError) and any(report in str(error) for report in _REPORTS):
        return True
    if isinstance(error, torch.OutOfMemoryError):
        return True
    raise error


def free_cached_memory() -> None:
    """Return unused GPU memory to the driver, that of tensors in reference cycles too."""
    gc.collect()
    torch.cuda.empty_cache()


@contextmanager
def out_of_memory_as_user_error(line: str) -> Iterator[None]:
    """Raise UserError with `line` if GPU memory runs out in the body."""
    try:
        yield
    except RuntimeError as error:
        require_out_of_memory(error)
    else:
        return
    free_cached_memory()  # here, because the exception held the tensors of the body
    raise UserError(line)
