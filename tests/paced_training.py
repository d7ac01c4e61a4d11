"""train_gpt2_mod.py at a pace that a test can follow: every step and every save takes PACE seconds longer.

A tiny model's steps take milliseconds: on a busy machine a run would be through before the test that is to kill it
has looked. Each batch of a validation takes a tenth of PACE longer.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_gpt2_mod
from unbroken import validation
from unbroken.metrics.logger import RunLogger

PACE = float(os.environ["PACE"])
step_begins, make_durable, val_batch = RunLogger.step_begins, RunLogger.make_durable, validation.val_batch


def late_step(self: RunLogger) -> None:
    """Between two steps; what is written behind the training goes on."""
    time.sleep(PACE)
    step_begins(self)


def late_commit(self: RunLogger) -> None:
    """When a checkpoint is written, and does not have its name yet."""
    time.sleep(PACE)
    make_durable(self)


def late_batch(*typed):  # type: ignore[no-untyped-def]
    """In the middle of a validation."""
    time.sleep(PACE / 10)
    return val_batch(*typed)


if __name__ == "__main__":
    validation.val_batch = late_batch
    RunLogger.step_begins, RunLogger.make_durable = late_step, late_commit  # type: ignore[method-assign]
    sys.exit(train_gpt2_mod.main(sys.argv[1:]))
