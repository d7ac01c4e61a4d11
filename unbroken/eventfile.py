"""A run's metrics as a TensorBoard event file, in which no step stands twice however often the run was interrupted.

The file is made anew from the journal by each attempt, beside the old one, takes its place by one rename, and is
appended to from there: what a killed attempt had written after the checkpoint, or had not, leaves no trace.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unbroken.journal import TRACKED, Metrics

PREFIX = "events.out.tfevents."  # by which TensorBoard knows its files
UNFINISHED = ".being_written.tmp"


def write_events(folder: Path, run_id: str, before: dict[int, Metrics], events: Iterator[tuple[int, Metrics]]) -> None:
    """Write the steps `before` this attempt, then each event as it comes. Raises OSError."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.summary.writer.record_writer import RecordWriter

    folder.mkdir(parents=True, exist_ok=True)
    now = time.time()
    path = folder / f"{PREFIX}{int(now):010d}.{run_id}"
    with open(folder / UNFINISHED, "wb") as file:
        records = RecordWriter(file)
        records.write(Event(wall_time=now, file_version="brain.Event:2").SerializeToString())
        # An open TensorBoard forgets by this what the old file told it.
        begins = Event(wall_time=now, step=0, session_log=SessionLog(status=SessionLog.START))
        records.write(begins.SerializeToString())
        for step, metrics in before.items():
            records.write(_event(step, metrics))
        file.flush()
        os.replace(folder / UNFINISHED, path)
        for old in folder.glob(f"{PREFIX}*"):
            if old != path:
                old.unlink()
        for step, metrics in events:
            known = before.get(step, {})  # of the step resumed from, the validation may be there already
            new = {name: value for name, value in metrics.items() if name == "wall" or name not in known}
            records.write(_event(step, new))
            file.flush()


def _event(step: int, metrics: Metrics) -> bytes:
    """All scalars of one step."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    values = [Summary.Value(tag=name, simple_value=metrics[name]) for name in TRACKED if name in metrics]
    event: Any = Event(wall_time=metrics.get("wall", 0.0), step=step, summary=Summary(value=values))
    return bytes(event.SerializeToString())
