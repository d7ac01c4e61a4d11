"""train_gpt2_mod.py, which counts the bytes of checkpoints that it reads and checksums: `read.<rank>.json`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from threading import Lock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_gpt2_mod
from unbroken.checkpoint.parallel_read import ParallelReader, ReadJob

read, lock, count = ParallelReader._read, Lock(), {"read": 0, "checked": 0}


def counting(self: ParallelReader, job: ReadJob, begin: int, memory: memoryview, crc: int) -> int:
    """Read as always, after counting the bytes."""
    with lock:
        count["read"] += len(memory)
        count["checked"] += len(memory) if job.check else 0
    return read(self, job, begin, memory, crc)


if __name__ == "__main__":
    ParallelReader._read = counting  # type: ignore[method-assign]
    code = train_gpt2_mod.main(sys.argv[1:])
    Path(f"read.{os.environ.get('RANK', '0')}.json").write_text(json.dumps(count))
    sys.exit(code)
