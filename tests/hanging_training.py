"""train_gpt2_mod.py, in which a rank stands still once: HANGS=train:30 stays in the 30th pass of training for ever.

`exchange:N`: before the N-th exchange; `read:N`: in the N-th read of a shard. ON is the rank. SLOW=val:0.5,save:8 makes
each batch of a validation and each save take so much longer, from the third one on; `read:S` each read of a shard,
`tell:S` each line on the console. NOTICE: until a wait is named.
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_gpt2_mod
from unbroken import validation
from unbroken.data.stream import Stream
from unbroken.distributed.gradients import Gradients
from unbroken.metrics.logger import RunLogger
from unbroken.model.gpt import GPT
from unbroken.run import watchdog

HANGS = os.environ.get("HANGS", "") if os.environ.get("ON", "0") == os.environ.get("RANK", "0") else ""
SLOW = {name: float(each) for name, each in (item.split(":") for item in os.environ.get("SLOW", "").split(",") if item)}
MARK = Path("hung")  # once: the next attempt finds it
seen: Counter[str] = Counter()


def hanging(name: str, method: Any) -> Any:
    def stands_still(*typed: Any, **named: Any) -> Any:
        seen[name] += 1
        if f"{name}:{seen[name]}" == HANGS and not MARK.exists():
            MARK.touch()
            time.sleep(10_000)
        if name in SLOW and seen[name] >= 3:
            time.sleep(SLOW[name])
        return method(*typed, **named)

    return stands_still


if __name__ == "__main__":
    watchdog.NOTICE_SECONDS = float(os.environ.get("NOTICE", "60"))
    validation.val_batch = hanging("val", validation.val_batch)
    for name, (owner, method) in {
        "train": (GPT, "forward"),
        "exchange": (Gradients, "exchange"),
        "read": (Stream, "read_pairs"),
        "save": (RunLogger, "make_durable"),
        "tell": (RunLogger, "_log_step"),
    }.items():
        setattr(owner, method, hanging(name, getattr(owner, method)))
    sys.exit(train_gpt2_mod.main([*sys.argv[1:], "--replay", "off"]))
