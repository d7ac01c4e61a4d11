"""The exception for users' mistakes, and other exceptions as one line."""

from __future__ import annotations

import errno
from pathlib import Path

_PASSING_NAMES = ("EIO", "ESTALE", "ETIMEDOUT", "EAGAIN", "EREMOTEIO", "ENOTCONN", "ECONNRESET", "EHOSTDOWN", "EMFILE")
_PASSING = {getattr(errno, name) for name in _PASSING_NAMES if hasattr(errno, name)}


class UserError(ValueError):
    """A mistake in flags, data or files: one line that says what is wrong and what to do.

    The entry points print the line and exit with `exit_code`. `on_all_ranks`: every rank raises this error, so only
    rank 0 prints it.
    """

    on_all_ranks = False
    exit_code = 2


class PassingError(UserError):
    """An error of the machine or its storage that may be gone at the next attempt: job scripts retry exit code 1."""

    exit_code = 1


class CorruptionError(Exception):
    """A wrong result of the machine, found by all ranks: the attempt ends with a code that job scripts retry."""

    on_all_ranks = True
    exit_code = 1


def describe_error(error: BaseException) -> str:
    """Return an exception as one line: its first line, with the name of its type if it is not ours."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f" ({error.filename})" if error.filename else "")
    lines = str(error).strip().splitlines() or [""]
    if type(error).__module__.partition(".")[0] == "unbroken":
        return lines[0]
    return f"{type(error).__name__}: {shorten(lines[0], 300)}".removesuffix(": ")


def shorten(text: str, limit: int) -> str:
    """Return the first line of `text`, cut where a sentence ends if that is past half of `limit`, else at a word."""
    line = text.strip().partition("\n")[0]
    if len(line) <= limit:
        return line
    if (end := line.rfind(". ", limit // 2, limit)) > 0:
        return line[: end + 1]
    end = line.rfind(" ", limit // 2, limit)
    return f"{line[:end]} ..." if end > 0 else line[:limit]


# Libraries that allocate by themselves report it as a RuntimeError: cuBLAS and cuDNN by a status, NCCL and the CUDA
# runtime in words, and cuBLAS's first call by a handle that it cannot make. oneDNN on a CPU says "primitive", and the
# compiler wraps what C++ says into an error of its own.
_CUDA_REPORTS = ("out of memory", "ALLOC_FAILED", "cublasCreate")
_HOST_REPORTS = (
    *("can't allocate memory", "not enough memory", "Cannot allocate memory"),
    *("could not create a primitive", "std::bad_alloc"),
)


def exhausted_memory(error: Exception) -> str:
    """Return which memory ran out as an exception says, "CUDA" or "host"; "" for any other exception."""
    if isinstance(error, MemoryError) or any(report in str(error) for report in _HOST_REPORTS):
        return "host"
    is_reported = isinstance(error, RuntimeError) and any(report in str(error) for report in _CUDA_REPORTS)
    return "CUDA" if is_reported or type(error).__name__ == "OutOfMemoryError" else ""  # the class is torch's


def cannot_read(path: Path, error: OSError) -> UserError:
    """Return the error for a file of the user's that cannot be read: PassingError if storage failed."""
    reason = error.strerror or error
    if error.errno in _PASSING:
        return PassingError(f"cannot read {path}: {reason}; start again when the storage answers")
    return UserError(f"cannot read {path}: {reason}; check the path and its permissions")
