"""The exceptions of the public API. All are CheckpointError, a ValueError whose text is one line."""

from __future__ import annotations

from unbroken.errors import UserError


class CheckpointError(UserError):
    """A save or load that failed, or a wrong argument. The text says what is wrong and what to do."""


class UnsupportedValueError(CheckpointError):
    """A tree to be saved holds what a checkpoint cannot hold; nothing was written."""


class SaveError(CheckpointError):
    """A save failed in the background, or its folder cannot be written; earlier checkpoints are intact."""


class MismatchError(CheckpointError):
    """A file does not fit the live tree: a name, a shape or a dtype differs; nothing was changed."""


class DamagedError(CheckpointError):
    """A file cannot be read, is no checkpoint, or has a wrong checksum."""
