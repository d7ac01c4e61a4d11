"""Lightning's checkpoints, written in the background, whole or absent, and verified when they are loaded.

    trainer = lightning.Trainer(plugins=[UnbrokenCheckpointIO()], ...)

Names and removal stay Lightning's. Sharded strategies (FSDP, DeepSpeed) write by themselves and are not changed.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lightning.pytorch.plugins.io import CheckpointIO

from unbroken.checkpoint import CheckpointWriter, load


class UnbrokenCheckpointIO(CheckpointIO):
    """A plugin for the Trainer. An error in the background is raised by the next save or the end of the training."""

    def __init__(self) -> None:
        self._writers: dict[Path, CheckpointWriter] = {}

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Return when the state is copied; the file appears when it is on the disk."""
        folder, name = Path(path).parent, Path(path).name
        if folder not in self._writers:
            self._writers[folder] = CheckpointWriter(folder)
        self._writers[folder].save(checkpoint, checkpoint["global_step"], name=name)

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Return the checkpoint, on the CPU; a file of Lightning's own is read too if it holds only plain values."""
        self._wait()
        return load(path)

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        self._wait()
        Path(path).unlink(missing_ok=True)

    def teardown(self) -> None:
        """Finish the last save; Lightning calls it at the end, also after an error."""
        while self._writers:
            self._writers.popitem()[1].close()

    def _wait(self) -> None:
        for writer in self._writers.values():
            writer.wait()
