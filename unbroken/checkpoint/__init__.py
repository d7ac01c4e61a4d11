"""Checkpoints: trees of tensors and plain values, to a file and back. README.md says where to begin.

The names below are the public API for a training loop of one's own; docs/checkpoint-library.md explains it. They are
imported when they are first used, because they need torch, and much else in this package does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unbroken.checkpoint.exceptions import (
        CheckpointError,
        DamagedError,
        MismatchError,
        SaveError,
        UnsupportedValueError,
    )
    from unbroken.checkpoint.library import CheckpointWriter, latest, load, load_into
    from unbroken.checkpoint.random_state import RandomState
    from unbroken.checkpoint.resumable_stream import ResumableStream

__all__ = [
    "CheckpointError",
    "CheckpointWriter",
    "DamagedError",
    "MismatchError",
    "RandomState",
    "ResumableStream",
    "SaveError",
    "UnsupportedValueError",
    "latest",
    "load",
    "load_into",
]

_MODULES = {"CheckpointWriter": "library", "latest": "library", "load": "library", "load_into": "library"}
_MODULES |= {"RandomState": "random_state", "ResumableStream": "resumable_stream"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_MODULES.get(name, 'exceptions')}"), name)
