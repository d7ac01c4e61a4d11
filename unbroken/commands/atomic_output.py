"""Output files of tools, whole or absent: written under another name, then renamed."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from unbroken.errors import UserError
from unbroken.text import printable


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a file beside `path`, with the same ending, then rename it. Raises UserError."""
    if not path.name:
        raise UserError(f"cannot write {printable(path, 4096)!r}: it is not the name of a file")
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        write(temporary)
        os.replace(temporary, path)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"cannot write {printable(path, 4096)}: {reason}") from None
    finally:
        with suppress(OSError):
            temporary.unlink()
