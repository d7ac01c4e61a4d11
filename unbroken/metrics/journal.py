"""The journal of a run, beside the log: a JSON line for the metrics of each step, and for each event.

{"event": "start", "step": 256, "wall": …, "began": …, "environment": {…}, "args": {…}}   an attempt begins
{"step": 257, "wall": …, "dt": …, "train_loss": …, "lr": …, "tok_per_s": …, …}            a step; `dt` in seconds
{"step": 256, "wall": …, "val_loss": …, "val_seconds": …}                                 a validation
{"event": "digest", "step": 256, "wall": …, "file": …, "tensors": …, "crcs": …, …}        a state that is being saved
{"event": "saved", "step": 256, "wall": …, "file": …, "blocked": …, "durable": …}         a save, in seconds
{"event": "end", "step": 512, "wall": …, "why": "finished"}                               nothing more of this attempt

`<run_id>.metrics.jsonl`. `wall` is the clock's time in seconds since 1970, `began` that of the process's start. An
attempt that starts at step S supersedes the lines of earlier ones about steps after S. The journal holds times, so its
bytes are not the same in every run; those of the log are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from unbroken import console
from unbroken.errors import UserError
from unbroken.metrics.append_file import AppendFile
from unbroken.paths import journal_of

Metrics = dict[str, float]
Line = dict[str, Any]


class Journal(AppendFile):
    """A journal that is written line by line, so that a kill loses nothing.

    A journal that cannot be written costs one warning and no step.
    """

    def __init__(self, log: Path) -> None:
        """Open the journal beside a log. Raises UserError."""
        path = journal_of(log)
        try:
            super().__init__(path)
        except OSError as error:
            raise UserError(f"cannot write the journal {path}: {error.strerror}") from None
        self._warned = False

    def add(self, line: Line) -> None:
        """Write a line."""
        with self._warning():
            self.append(json.dumps(line))

    def sync(self) -> None:
        """Sync what was appended."""
        with self._warning():
            super().sync()

    @contextmanager
    def _warning(self) -> Iterator[None]:
        """Turn the first OSError of the body into a warning; drop the others."""
        try:
            yield
        except OSError as error:
            if not self._warned:
                console.print_line(
                    f"WARNING: {self.path} could not be written ({error.strerror}); training goes on", error=True
                )
            self._warned = True
