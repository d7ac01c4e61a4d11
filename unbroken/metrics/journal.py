"""The journal of a run: every metric of every step, and what happened when, a JSON line each, beside the log.

{"event": "start", "step": 256, "wall": …, "began": …, "environment": {…}, "args": {…}}   an attempt begins
{"step": 257, "wall": …, "dt": …, "train_loss": …, "lr": …, "tok_per_s": …, …}            a step; `dt` in seconds
{"step": 256, "wall": …, "val_loss": …, "val_seconds": …}                                 a validation
{"event": "saved", "step": 256, "wall": …, "file": …, "blocked": …, "durable": …}         a save, in seconds
{"event": "end", "step": 512, "wall": …, "why": "finished"}                               nothing more of this attempt

`<run_id>.metrics.jsonl`. `wall` is the clock's time in seconds since 1970, `began` that of the process's start. An
attempt that starts at step S supersedes what earlier ones said of the steps after S. The journal holds times, so it is
no part of the promise of bits; the log is.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from unbroken import console
from unbroken.errors import UserError
from unbroken.metrics.logfile import MAX_UNWRITTEN_BYTES, open_to_append
from unbroken.paths import journal_of

Metrics = dict[str, float]
Line = dict[str, Any]


class Journal:
    """A journal that is written line by line, so that a kill loses nothing.

    A journal that cannot be written costs one warning and no step. For one thread at a time.
    """

    def __init__(self, log: Path) -> None:
        path = journal_of(log)
        try:
            self._file = open_to_append(path)
        except OSError as error:
            raise UserError(f"cannot write the journal {path}: {error.strerror}") from None
        self._path, self._unwritten, self._warned = path, b"", False

    def append(self, line: Line) -> None:
        """Write a line behind those that are still to be written."""
        self._unwritten += f"{json.dumps(line)}\n".encode()
        self._write()

    def sync(self) -> None:
        """Sync what was appended."""
        self._write()
        try:
            os.fsync(self._file)
        except OSError as error:
            self._warn(error)

    def close(self) -> None:
        """Close the journal."""
        self._write()
        os.close(self._file)

    def _write(self) -> None:
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[os.write(self._file, self._unwritten) :]
        except OSError as error:
            self._warn(error)
            if len(self._unwritten) > MAX_UNWRITTEN_BYTES:
                self._unwritten = b"\n"  # closes the line that is torn now

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            console.print_line(
                f"WARNING: {self._path} could not be written ({error.strerror}); training goes on", error=True
            )
