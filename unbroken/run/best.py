"""The checkpoints that `--keep_best` keeps: those of the lowest validation losses."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from unbroken.checkpoint import directory, rewind
from unbroken.checkpoint.format.schema import BEST
from unbroken.run.state import Progress


class BestCheckpoints:
    """The `limit` lowest validation losses of the run whose steps have checkpoints, in `progress.best`.

    Of two equal losses the earlier one counts as lower; step 0 and losses that are not finite do not count. All ranks
    make the same calls.
    """

    def __init__(self, limit: int, progress: Progress) -> None:
        self._limit, self._progress = limit, progress
        self._displaced: list[tuple[int, list[Any]]] = []  # (by which step, entry), until that step is saved

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps, the best one first."""
        return tuple(step for step, _ in self._progress.best)

    def add(self, step: int, loss: float) -> None:
        """Note the validation loss of a step, in nats per token."""
        if self._limit and step > 0 and math.isfinite(loss):
            others = [entry for entry in self._progress.best if entry[0] != step]
            left_out = self._keep_lowest([*others, [step, loss]])
            self._displaced += [(step, entry) for entry in left_out if entry[0] != step]

    def settle(self, step: int, failed: int | None) -> tuple[int, ...]:
        """Return the steps for a save of `step`, when the save before it has ended.

        `failed`: the step of that save if it failed; the entries that it displaced come back.
        """
        if failed is not None and failed != step:
            back = [entry for by, entry in self._displaced if by in (failed, step)]
            self._keep_lowest([entry for entry in (*self._progress.best, *back) if entry[0] != failed])
        self._displaced = [(by, entry) for by, entry in self._displaced if by == step]
        return self.steps

    def _keep_lowest(self, entries: list[list[Any]]) -> list[list[Any]]:
        """Keep the lowest of the entries; return the others."""
        ordered = sorted(entries, key=lambda entry: (entry[1], entry[0]))
        self._progress.best = ordered[: self._limit]
        return ordered[self._limit :]


def link_best(folder: Path, progress: Progress, limit: int, saves_anew: int | None = None) -> str:
    """Make `best.pt` the link that the checkpoint's `progress.best` names: a kill may have come between the two.

    Steps without a checkpoint in the run's folder are removed from `progress.best`. Return a warning, "" for none.
    Raises OSError for a folder that cannot be written.

    Args:
        folder: the run's folder.
        progress: that of the checkpoint.
        limit: --keep_best.
        saves_anew: the step that this attempt saves first, which stays in the list; None for none.
    """
    there = {*directory.periodic_steps(folder), saves_anew}
    progress.best = [entry for entry in progress.best if entry[0] in there][:limit]
    if os.path.lexists(folder / BEST) and not os.path.islink(folder / BEST):
        rewind.set_aside(folder, [folder / BEST])  # of a folder that was copied without its links
    try:
        directory.link_best(folder, [step for step, _ in progress.best])
    except OSError as error:
        return unlinked(folder, error.strerror or "")
    return ""


def unlinked(folder: Path, why: str) -> str:
    """Return the warning that `best.pt` cannot be made a link; `RUN/best` still works."""
    return f"{folder / BEST} could not be made a link: {why}; {folder}/best still names the best checkpoint"
