"""train_gpt2_mod.py, which counts the bytes of checkpoints that it reads and checksums: `read.<rank>.json`.

`legacy` is the number of times that it worked out the state in a checkpoint of the earlier program. `grown` is by how
many bytes memory grew while the state was restored, at its peak. COUNTED=apart: every rank believes to be on a machine
of its own; COUNTED=whole: every rank holds a whole tensor to take its slice from.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from threading import Lock
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_gpt2_mod
from unbroken.checkpoint import reader
from unbroken.checkpoint.parallel_read import ParallelReader, ReadJob
from unbroken.run import legacy, resume

read, read_legacy, restore, hostname = ParallelReader._read, legacy.read_legacy, resume.restore, reader.hostname
lock, count = Lock(), {"read": 0, "checked": 0, "legacy": 0, "grown": 0}


def counting(self: ParallelReader, job: ReadJob, begin: int, memory: memoryview, crc: int) -> int:
    """Read as always, after counting the bytes."""
    with lock:
        count["read"] += len(memory)
        count["checked"] += len(memory) if job.check else 0
    return read(self, job, begin, memory, crc)


def counting_legacy(*given: Any) -> legacy.LegacyCheckpoint:
    """Read as always, after counting."""
    count["legacy"] += 1
    return read_legacy(*given)


def measured_restore(*given: Any) -> None:
    """Restore as always; note the growth of memory."""
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    restore(*given)
    count["grown"] = memory("VmHWM") - before


def memory(name: str) -> int:
    """Return a number of bytes from the status of this process."""
    return int(Path("/proc/self/status").read_text().partition(f"{name}:")[2].split()[0]) << 10


if __name__ == "__main__":
    resume.restore = measured_restore
    if os.environ.get("COUNTED") == "apart":
        reader.hostname = lambda: f"{hostname()}-{os.environ['RANK']}"
    if os.environ.get("COUNTED") == "whole":
        reader._Match.is_direct = property(lambda match: False)  # type: ignore[assignment]
    legacy.read_legacy = counting_legacy
    ParallelReader._read = counting  # type: ignore[method-assign]
    code = train_gpt2_mod.main([*sys.argv[1:], "--replay", "off"])
    Path(f"read.{os.environ.get('RANK', '0')}.json").write_text(json.dumps(count))
    sys.exit(code)
