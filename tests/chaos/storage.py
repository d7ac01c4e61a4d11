"""The preloaded library of shim.c: compiled once, and the table by which its rules are set in running processes."""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntFlag
from pathlib import Path

SOURCE = Path(__file__).with_name("shim.c")
RULES, FOREVER = 64, 2**31 - 1
KILL_BEFORE, KILL_AFTER, KILL_TORN = -1, -2, -3  # in place of an errno; torn: half of a write reaches the file
_RULE = struct.Struct("=IIiiiiIi224s64s")  # struct rule
_HITS = 24  # bytes from its beginning


class Calls(IntFlag):
    """The kinds of calls, as in shim.c. THREAD and CLOCK have the folder in which the process stands for a path."""

    OPEN_READ = 1
    OPEN_WRITE = 2
    READ = 4
    WRITE = 8
    SYNC = 16
    RENAME = 32
    LINK = 64
    UNLINK = 128
    CUT = 256
    RESERVE = 512
    CLOSE = 1024
    MKDIR = 2048
    THREAD = 4096
    CLOCK = 8192


CHANGES = (
    Calls.OPEN_WRITE | Calls.WRITE | Calls.SYNC | Calls.RENAME | Calls.LINK | Calls.UNLINK | Calls.CUT | Calls.RESERVE
)


def shim() -> Path | None:
    """Return the compiled library; None where there is no C compiler."""
    name = f"unbroken-shim-{os.getuid()}-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]}.so"
    path = Path(tempfile.gettempdir(), name)
    if not path.exists():
        new = path.with_suffix(f".{os.getpid()}")
        command = ["cc", "-O2", "-shared", "-fPIC", "-o", str(new), str(SOURCE), "-ldl", "-pthread"]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        new.replace(path)
    return path


class Rules:
    """The table of rules: an entry is seen at once by every process that was started with `environment`."""

    def __init__(self, path: Path) -> None:
        self.path, self._lock = path, threading.Lock()
        path.write_bytes(bytes(RULES * _RULE.size))
        with open(path, "r+b") as file:
            self._table = mmap.mmap(file.fileno(), 0)
        self._free = list(range(RULES))

    def environment(self, library: Path) -> dict[str, str]:
        return {"LD_PRELOAD": str(library), "CHAOS_TABLE": str(self.path)}

    def add(
        self,
        calls: Calls,
        where: Path,
        part: str = "",
        *,
        error: int = 0,
        skip: int = 0,
        times: int = FOREVER,
        wait_ms: int = 0,
        clock_s: int = 0,
    ) -> int:
        """Add a rule for the paths that begin with `where` and contain `part`; return its number."""
        with self._lock:
            number = self._free.pop()
        packed = _RULE.pack(0, calls, error, skip, times, wait_ms, 0, clock_s, bytes(where), part.encode())
        at = number * _RULE.size
        self._table[at : at + _RULE.size] = packed
        self._table[at : at + 4] = struct.pack("=I", 1)
        return number

    def hits(self, number: int) -> int:
        """Return how many calls the rule has affected."""
        return int(struct.unpack_from("=I", self._table, number * _RULE.size + _HITS)[0])

    def remove(self, number: int) -> int:
        """Take the rule away; return how many calls it has affected."""
        at = number * _RULE.size
        self._table[at : at + 4] = struct.pack("=I", 0)
        with self._lock:
            self._free.append(number)
        return self.hits(number)

    @contextmanager
    def during(self, *typed: object, **named: object) -> Iterator[int]:
        """Add a rule for a while."""
        number = self.add(*typed, **named)  # type: ignore[arg-type]
        try:
            yield number
        finally:
            self.remove(number)
