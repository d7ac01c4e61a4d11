"""The one exception that is the user's to mend, and what others say, in one line."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in flags, data or files: its text is one line that says what is wrong and what to do.

    The door (`train_gpt2_mod.py`, `python -m unbroken`) prints that line and leaves with exit code 2.
    `on_all_ranks`: every process raises this one, so only rank 0 prints it.
    """

    on_all_ranks = False


def describe_error(error: BaseException) -> str:
    """What an exception says, in one line: its first, with the name of its kind where a stranger raised it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f" ({error.filename})" if error.filename else "")
    lines = str(error).strip().splitlines() or [""]
    if type(error).__module__.partition(".")[0] == "unbroken":
        return lines[0]
    return f"{type(error).__name__}: {lines[0][:300]}".removesuffix(": ")
