"""The response to a step that went wrong: stop, or go back to a sound checkpoint and leave batches out."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from unbroken.checkpoint import directory
from unbroken.checkpoint.writer import RunCheckpointWriter
from unbroken.config import Config
from unbroken.data import left_out
from unbroken.data.left_out import Ranges
from unbroken.distributed.memory import free_cached_memory
from unbroken.distributed.world import World
from unbroken.errors import UserError
from unbroken.metrics.anomaly import Anomaly
from unbroken.metrics.logger import RunLogger
from unbroken.run.state import RunState
from unbroken.text import format_count

MOST_TRIES = 2  # from one sound checkpoint: the second goes one further back


@dataclass(frozen=True)
class Rewound:
    """An attempt that goes back: to the checkpoint `path`, with all batches that the run leaves out from now on.

    `rewinds`: [step gone back to, step that went wrong] of each time.
    """

    path: Path
    skipped: Ranges
    rewinds: tuple[tuple[int, int], ...]

    def flags(self, typed: dict[str, Any]) -> dict[str, Any]:
        """Return the typed flags for this attempt."""
        kept = {name: value for name, value in typed.items() if name not in ("fork", "init_from", "skip_batches")}
        return {**kept, "resume_from": str(self.path)}


class Rewinding(Exception):
    """The end of an attempt, after which `to` begins in the same process."""

    on_all_ranks = True

    def __init__(self, to: Rewound) -> None:
        super().__init__()
        self.to = to


def with_rewinds(typed: dict[str, Any], attempt: Callable[[dict[str, Any], Rewound | None], int]) -> int:
    """Run attempts until one does not go back; return its exit code."""
    rewound: Rewound | None = None
    while True:
        try:
            return attempt(rewound.flags(typed) if rewound else typed, rewound)
        except Rewinding as again:
            rewound = again.to
        gc.collect()  # the model of the attempt before, which the exception held
        free_cached_memory()


class AnomalyResponse:
    """A response to steps that went wrong, by --on_nan and --on_spike. All ranks make the same calls.

    Args:
        config: the flags.
        state: the state of the run.
        writer: whose saves are finished before the run goes back.
        logger: has found the step that went wrong.
        world: the ranks.
    """

    def __init__(
        self,
        config: Config,
        state: RunState,
        writer: RunCheckpointWriter,
        logger: RunLogger,
        world: World,
    ) -> None:
        self._config, self._state = config, state
        self._writer, self._logger, self._world = writer, logger, world

    def found(self) -> bool:
        """Return whether this rank knows of a step that went wrong; only rank 0 does."""
        return self._logger.anomaly is not None

    def check(self) -> None:
        """Respond if a step so far went wrong; call it before a checkpoint is made of the step. Collective."""
        self._logger.flush()
        found: Anomaly | None = self._world.broadcast(self._logger.anomaly)
        if found is not None:
            self._respond(found)

    def _respond(self, anomaly: Anomaly) -> NoReturn:
        """Raise UserError to stop, or Rewinding to go back, on all ranks."""
        self._writer.wait()
        rewound: Rewound | None = None
        with self._world.raise_together():
            if self._world.is_main:
                rewound = self._plan(anomaly)
        rewound = self._world.broadcast(rewound)
        assert rewound is not None
        raise Rewinding(rewound)

    def _plan(self, anomaly: Anomaly) -> Rewound:
        """Return how to go back. Raises UserError to stop."""
        line, progress, size = f"{anomaly}{self._first_not_finite()}", self._state.progress, self._config.step_tokens
        sound = self._sound_checkpoints(anomaly.first)
        newest = f"the last sound checkpoint is {sound[0][0]}" if sound else "there is no sound checkpoint"
        how = self._config.on_nan if anomaly.usual is None else self._config.on_spike
        if how != "rewind":
            batches = left_out.describe(self._suspects(anomaly, sound), size)
            raise UserError(
                f"{line}; {newest}; a smaller --learning_rate, --skip_batches {batches} or --on_nan rewind may help"
            )
        tries = sum(wrong > sound[0][1] for _, wrong in progress.rewinds) if sound else 0
        if tries >= min(MOST_TRIES, len(sound)):
            raise UserError(
                f"{line}; {newest}, and the run went back {format_count(tries, 'time')} without getting past it:"
                " stopped"
            )
        path, step, _ = sound[tries]
        skipped = left_out.union((*progress.left_out, *self._suspects(anomaly, sound)))
        batches = left_out.describe(skipped, size)
        self._logger.warn(f"{line}: going back to {path}, leaving out batches {batches}")
        self._logger.event("rewind", anomaly.step, to=step, skipped=batches)
        return Rewound(path, skipped, (*map(tuple, progress.rewinds), (step, anomaly.step)))

    def _first_not_finite(self) -> str:
        """Return the name of the first weight that is not finite, as a part of a sentence; "" if all are."""
        with torch.no_grad():
            weights = self._state.sharded.named_parameters()
            name = next((name for name, weight in weights if not bool(torch.isfinite(weight).all())), "")
        return f", the first tensor that is not finite is {name}" if name else ""

    def _sound_checkpoints(self, before: int) -> list[tuple[Path, int, int]]:
        """Return (path, step, position) of this run's checkpoints from before a step's batch, newest first.

        Sound checkpoints are whole and have finite weights. At most MOST_TRIES are returned.
        """
        found = list[tuple[Path, int, int]]()
        with ExitStack() as opened:
            for entry in reversed(directory.list_checkpoints(self._writer.folder)):
                if len(found) == MOST_TRIES or entry.step is None or entry.step >= before or entry.final:
                    continue
                try:
                    file = opened.enter_context(directory.open_verified(entry.path))
                except UserError:
                    continue
                if not file.has_diverged and file.values.get("run_id") == self._state.run_id:
                    found.append((entry.path, entry.step, int(file.values["progress"]["tokens"])))
        return found

    def _suspects(self, anomaly: Anomaly, sound: list[tuple[Path, int, int]]) -> Ranges:
        """Return the positions of the batches that may be the cause: of its steps `first` to `step`."""
        size, skipped = self._config.step_tokens, self._state.progress.left_out
        _, step, position = sound[0] if sound else (None, 0, 0)
        ranges = list[tuple[int, int]]()
        while step < anomaly.step:
            start = left_out.next_start(skipped, position, size)
            step, position = step + 1, start + size
            ranges += [(start, position)] if step >= anomaly.first else []
        return left_out.union(ranges)
