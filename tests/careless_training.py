"""train_gpt2_mod.py without a care that CARELESS names: tests/chaos/powercut.py must find what a power cut then breaks.

`names`: no folder is synced after a checkpoint has got its name. `order`: the file is synced after that, not before.
`log`: the log is not synced before it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_gpt2_mod
from unbroken import files
from unbroken.checkpoint import directory, disk
from unbroken.checkpoint.disk import OutputFile
from unbroken.metrics.append_file import AppendFile

CARELESS = os.environ["CARELESS"]


def not_synced(folder: Path) -> None:
    pass


def cut_only(self: OutputFile, size: int | None = None) -> None:
    if size is not None:
        os.ftruncate(self._file, size)


def synced_late(temporary: Path, final: Path) -> None:
    os.rename(temporary, final)
    file = os.open(final, os.O_RDWR)
    os.fsync(file)
    os.close(file)
    files.sync_folder(final.parent)


if __name__ == "__main__":
    if CARELESS == "names":
        files.sync_folder = directory.sync_folder = not_synced  # type: ignore[attr-defined]
    elif CARELESS == "order":
        disk.commit, OutputFile.sync = synced_late, cut_only  # type: ignore[method-assign]
    else:
        AppendFile.sync = AppendFile._write  # type: ignore[method-assign]
    sys.exit(train_gpt2_mod.main(sys.argv[1:]))
