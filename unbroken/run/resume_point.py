"""ResumePoint: what an attempt starts from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unbroken.checkpoint.format.schema import FINAL, checkpoint_name
from unbroken.checkpoint.reader import CheckpointFile
from unbroken.config import Config
from unbroken.paths import Run
from unbroken.run.lock import RunLocks
from unbroken.run.state import Progress


@dataclass
class ResumePoint:
    """What an attempt begins with. `file` is open when it resumes; `notes` and `warnings` are for the console.

    `finished`: the checkpoint is the end already. A run killed before its `final.pt`, or one that is being extended and
    whose `final.pt` is of its old end, still has that to write. `named`: the checkpoint was, not the run.
    """

    config: Config
    run: Run
    file: CheckpointFile | None = None
    progress: Progress = field(default_factory=Progress)
    finished: bool = False
    same_trajectory: bool = True
    elastic_ranks_typed: bool = False
    agents: list[Any] = field(default_factory=list)
    locks: RunLocks = field(default_factory=RunLocks)
    named: bool = False
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def on_disk(self) -> Path | None:
        """The checkpoint, if it is one of the run's own folder: a fork, say, has nothing there yet."""
        file = self.file
        if file is None or not file.is_ours or file.path.parent.resolve() != self.run.folder.resolve():
            return None
        return file.path if file.path.name in (FINAL, checkpoint_name(self.progress.step)) else None

    @property
    def to_be_saved(self) -> bool:
        """Whether the run's folder lacks what it goes on from, so that a worker that dies would go on from another."""
        here = self.file is None or self.on_disk is not None
        return not here and self.progress.parent.get("step") != self.progress.step

    @property
    def saved(self) -> dict[str, Any]:
        """The checkpoint's values if it is one of ours; else nothing."""
        return self.file.values if self.file is not None and self.file.is_ours else {}

    def saved_dict(self, key: str) -> dict[str, Any]:
        """One of the checkpoint's dicts; empty for a fresh run."""
        return dict(self.saved.get(key, {}))
