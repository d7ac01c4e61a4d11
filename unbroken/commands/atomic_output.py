"""Output files of tools, whole or absent: written under another name, then renamed."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from unbroken.errors import UserError, describe_error
from unbroken.text import printable


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with the name of a new file beside `path`, with the same ending, then rename it. Raises UserError.

    A link stays, and the file that it leads to is replaced. A device or a FIFO is written to, as cp(1) would.
    """
    if not path.name:
        raise UserError(f"cannot write {printable(path, 4096)!r}: it is not the name of a file")
    try:
        if _is_stream(path):
            with tempfile.TemporaryDirectory() as folder:
                filled = Path(folder) / f"out{path.suffix}"
                write(filled)
                with open(filled, "rb") as content, open(path, "wb") as stream:
                    shutil.copyfileobj(content, stream)
        else:
            _replace(Path(os.path.realpath(path)) if path.is_symlink() else path, write)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"cannot write {printable(path, 4096)}: {reason}") from None


def _is_stream(path: Path) -> bool:
    """Return whether the path is a device, a FIFO, or below /dev or /proc, such as /dev/stdout: it is not replaced."""
    try:
        kind = os.stat(path).st_mode
    except FileNotFoundError:
        return False
    return not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)) or str(path).startswith(("/dev/", "/proc/"))


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink()


def save_tree(tree: dict[str, Any], path: Path) -> None:
    """Write with torch's own writer. Raises OSError, also where torch reports a full disk as a wrong position."""
    import torch

    with open(path, "xb") as file:
        try:
            torch.save(tree, file)
        except RuntimeError as error:
            raise (
                error.__context__ if isinstance(error.__context__, OSError) else OSError(describe_error(error))
            ) from None
        file.flush()
        os.fsync(file.fileno())
