"""train_gpt2_mod.py at a pace that a test can follow: every step and every save takes PACE seconds longer.

A tiny model's steps take milliseconds: on a busy machine a run would be through before the test that is to kill it
has looked. Each batch of a validation takes a tenth of PACE longer. HOLD names a file with a step: behind it, in its
validation if there is one, the training waits until the file has a later one or a signal asks it to stop; with a second
word in it, no checkpoint gets its name.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_gpt2_mod
from unbroken import validation
from unbroken.distributed.phases import Phases
from unbroken.metrics.logger import RunLogger
from unbroken.runtime.signals import StopSignals

PACE, HOLD = float(os.environ.get("PACE", "0")), os.environ.get("HOLD")
step_begins, make_durable, val_batch = RunLogger.step_begins, RunLogger.make_durable, validation.val_batch
begin_step, begun, note, noted = Phases.begin_step, [0], StopSignals._note, list[int]()


def wait_while_held(step: int) -> None:
    """What is written behind the training goes on."""
    while HOLD and not noted and step >= int(Path(HOLD).read_text().split()[0]):
        time.sleep(0.005)


def late_step(self: RunLogger) -> None:
    """Between two steps; what is written behind the training goes on."""
    time.sleep(PACE)
    step_begins(self)


def held_step(self: Phases, step: int) -> None:
    """When it is known which step begins."""
    wait_while_held(step - 1)
    begun[0] = step
    begin_step(self, step)


def noted_signal(self: StopSignals, number: int, frame: FrameType | None) -> None:
    """As always, and the wait ends."""
    noted.append(number)
    note(self, number, frame)


def late_commit(self: RunLogger) -> None:
    """When a checkpoint is written, and does not have its name yet."""
    time.sleep(PACE)
    while HOLD and " " in Path(HOLD).read_text():
        time.sleep(0.005)
    make_durable(self)


def late_batch(*typed):  # type: ignore[no-untyped-def]
    """In the middle of a validation."""
    time.sleep(PACE / 10)
    wait_while_held(begun[0])
    return val_batch(*typed)


if __name__ == "__main__":
    validation.val_batch = late_batch
    Phases.begin_step, StopSignals._note = held_step, noted_signal  # type: ignore[method-assign]
    RunLogger.step_begins, RunLogger.make_durable = late_step, late_commit  # type: ignore[method-assign]
    sys.exit(train_gpt2_mod.main(sys.argv[1:]))
