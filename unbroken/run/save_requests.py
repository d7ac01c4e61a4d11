"""A request for a checkpoint now, as a file in the run's folder, and the file that answers it."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

from unbroken.checkpoint import disk

REQUEST, ANSWER = "save", "saved"
LOOK_SECONDS = 1.0  # between two looks


class SaveRequests:
    """The file `save` in the run's folder, which asks for a checkpoint now; the file `saved` answers with its name."""

    def __init__(self, folder: Path) -> None:
        self._request, self._answer = folder / REQUEST, folder / ANSWER
        self._looked = 0.0
        self._step: int | None = None
        self._answered: tuple[int, int] | None = None

    def arrived(self, step: int, at_once: bool = False) -> bool:
        """Return whether a checkpoint of `step` or later has been asked for since the last call; once a second."""
        now = time.monotonic()
        if self._step is not None or not (at_once or now - self._looked >= LOOK_SECONDS):
            return False
        self._looked = now
        if identity(self._request) in (None, self._answered):
            return False
        self._step = step
        return True

    def answer(self, step: int, name: str, error: str | None) -> None:
        """Answer a request with a save that has ended, if it is of the step that was asked for or of a later one."""
        if self._step is None or step < self._step:
            return
        self._step, self._answered = None, identity(self._request)  # one that cannot be removed is answered once
        with suppress(OSError):
            content = f"{name}\n" if error is None else f"error: {error}\n"
            disk.replace(self._answer.with_name(f".{ANSWER}.tmp"), self._answer, content.encode())
            os.unlink(self._request)


def identity(path: Path) -> tuple[int, int] | None:
    """Return numbers that differ between a file and the one that replaces it; None if there is no file."""
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns
