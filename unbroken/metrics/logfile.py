"""The log of a run: one line per event, appended for ever, and read back to prove that a repeated step is the same.

# time=2026-11-23T18:40:40+00:00 from=scratch step=0 host=…          begins an attempt
s:257 trn:4.648776                                                   the loss of step 257, before its update
s:256 val:4.700000                                                   the validation loss after 256 updates
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from unbroken.errors import UserError
from unbroken.text import printable

# All six decimals: a line that a kill has torn must not pass for one with another loss.
EVENT = re.compile(rb"s:(\d{1,15}) (trn|val):(-?(?:\d+\.\d{6}|inf|nan))\Z")
_UNNAMED = "other"  # the course of any attempt that left the one before it, in logs from before courses had names
MAX_UNWRITTEN_BYTES = 1 << 24  # bytes kept for a disk that is full at the moment


def attempt_line(about: Mapping[str, str]) -> str:
    """Return the line that begins an attempt. Blanks in values are escaped, so that none can pass for another key.

    `course` names the course that the attempt begins or continues, if that is not the run's first: the steps of one
    course have the same bits in all its attempts. A checkpoint stores it under `progress.history`.
    """
    words = (f"{key}={printable(value, 4096).replace(' ', chr(92) + 'x20')}" for key, value in about.items())
    return " ".join(["#", *words])


def event_line(kind: str, step: int, loss: float) -> str:
    """Return a line in the format that the guide's users parse; `kind` is trn or val."""
    return "s:%d %s:%f" % (step, kind, loss)  # noqa: UP031 - the format is C's, and promised


def events(path: Path) -> Iterator[tuple[str, int, str]]:
    """Yield (kind, step, line) of each event, and ("#", 0, text) of each attempt; other lines are skipped."""
    with open(path, "rb") as file:
        for line in file:
            whole = line.rstrip(b"\n")
            if whole.startswith(b"#"):
                yield "#", 0, whole[1:].strip().decode("utf-8", "replace")
            elif found := EVENT.match(whole):
                yield found[2].decode(), int(found[1]), whole.decode()


@dataclass
class LoggedLosses:
    """The losses of a log by step, of each step the last one, and where attempts began (step, header)."""

    train: list[tuple[int, float]] = field(default_factory=list)
    val: list[tuple[int, float]] = field(default_factory=list)
    attempts: list[tuple[int, str]] = field(default_factory=list)


def read_log(path: Path) -> LoggedLosses:
    """Read the log of a run. Raises UserError if there is none."""
    losses: dict[str, dict[int, float]] = {"trn": {}, "val": {}}
    log = LoggedLosses()
    try:
        for kind, step, text in events(path):
            if kind == "#":
                log.attempts.append((_began(text), text))
            else:
                losses[kind][step] = float(text.rpartition(":")[2])
    except OSError as error:
        raise UserError(f"cannot read the log {path}: {error.strerror}") from None
    log.train, log.val = sorted(losses["trn"].items()), sorted(losses["val"].items())
    return log


def _course(header: str) -> str:
    """Return the course of an attempt; "" for the run's first."""
    return next((word.removeprefix("course=") for word in header.split() if word.startswith("course=")), "")


def _began(header: str) -> int:
    """Return the step that an attempt resumed from."""
    found = re.search(r"(?:^| )step=(\d{1,15})(?= |$)", header)
    return int(found[1]) if found else 0


def open_to_append(path: Path) -> int:
    """Return a descriptor that appends whole lines, after closing a line that a kill has torn. Raises OSError."""
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
    size = os.fstat(file).st_size
    if size and os.pread(file, 1, size - 1) != b"\n":
        os.write(file, b"\n")
    return file


class LogFile:
    """A run's log, written by one write(2) per line, so that a kill can tear only the last line.

    Lines that a full disk refuses are kept, and written as soon as it accepts them.
    """

    def __init__(self, path: Path, start_step: int, course: str | None = None) -> None:
        """Open the log.

        `later` becomes its last lines of steps that will be repeated, `expected` those of `course`, which a repeated
        step must equal; with None there are none.
        """
        self.path = path
        self.later: dict[tuple[str, int], str] = {}
        self.expected: dict[tuple[str, int], str] = {}
        self.reaches = 0  # the last step up to `start_step` whose loss is there
        self._unwritten = b""
        try:
            if path.exists():
                ours = course == ""
                for kind, step, text in events(path):
                    if kind == "#":
                        ours = _course(text) == course
                        if course == "" and _course(text) == _UNNAMED and _began(text) < start_step:
                            ours = True  # the checkpoint may be of that course; then the one before is abandoned
                            self._forget_after(_began(text))
                    elif step > start_step or (kind == "val" and step == start_step):
                        self.later[kind, step] = text
                        if ours:
                            self.expected[kind, step] = text
                    elif kind == "trn":
                        self.reaches = max(self.reaches, step)
            self._file = open_to_append(path)
        except OSError as error:
            raise UserError(f"cannot write the log {path}: {error.strerror}") from None

    def _forget_after(self, last: int) -> None:
        self.expected = {event: text for event, text in self.expected.items() if event[1] <= last}

    def append(self, line: str) -> None:
        """Write a line behind those that are still to be written. Raises OSError."""
        if len(self._unwritten) < MAX_UNWRITTEN_BYTES:
            self._unwritten += f"{line}\n".encode("utf-8", "backslashreplace")
        self._write()

    def _write(self) -> None:
        while self._unwritten:
            self._unwritten = self._unwritten[os.write(self._file, self._unwritten) :]

    def sync(self) -> None:
        """Sync the log, before a checkpoint that counts on it is committed. Raises OSError."""
        self._write()
        os.fsync(self._file)

    def close(self) -> str:
        """Close the log. Return a line about lost lines; "" if everything is written."""
        try:
            self._write()
        except OSError as error:
            return f"{self._unwritten.count(10)} lines of {self.path} are lost: {error.strerror}"
        finally:
            os.close(self._file)
        return ""
