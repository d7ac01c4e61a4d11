"""train_gpt2_mod.py, which counts the bytes of checkpoints that it reads and checksums: `read.<rank>.json`.

`legacy` is the number of times that it worked out the state in a checkpoint of the earlier program.
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
from unbroken.checkpoint.parallel_read import ParallelReader, ReadJob
from unbroken.run import legacy

read, read_legacy, lock, count = (
    ParallelReader._read,
    legacy.read_legacy,
    Lock(),
    {"read": 0, "checked": 0, "legacy": 0},
)


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


if __name__ == "__main__":
    legacy.read_legacy = counting_legacy
    ParallelReader._read = counting  # type: ignore[method-assign]
    code = train_gpt2_mod.main([*sys.argv[1:], "--replay", "off"])
    Path(f"read.{os.environ.get('RANK', '0')}.json").write_text(json.dumps(count))
    sys.exit(code)
