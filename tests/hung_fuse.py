"""A FUSE filesystem that does not answer, as one whose server is gone: every system call on it hangs."""

from __future__ import annotations

import ctypes
import os
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

INIT = 26  # FUSE_INIT of <linux/fuse.h>
REQUEST, REPLY, INITIALIZED = struct.Struct("=IIQQIIII"), struct.Struct("=IiQ"), struct.Struct("=IIIIHHIIHH32x")
MNT_DETACH = 2


@contextmanager
def hung_folder(path: Path) -> Iterator[None]:
    """Let every system call below `path` hang while the body runs."""
    libc = ctypes.CDLL(None, use_errno=True)
    path.mkdir(exist_ok=True)
    try:
        device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        pytest.skip(f"there is no FUSE here: {error}")
    about = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
    if libc.mount(b"hung", bytes(path), b"fuse", 0, about):
        os.close(device)
        pytest.skip(f"FUSE cannot be mounted here: {os.strerror(ctypes.get_errno())}")

    def serve() -> None:
        with suppress(OSError):
            _, kind, unique, *_ = REQUEST.unpack_from(os.read(device, 1 << 20))
            assert kind == INIT
            answer = INITIALIZED.pack(7, 31, 0, 0, 0, 0, 1 << 16, 1, 0, 0)
            os.write(device, REPLY.pack(REPLY.size + len(answer), 0, unique) + answer)
            # No further request is read: one that the server has read not even SIGKILL ends.

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield
    finally:
        libc.umount2(bytes(path), MNT_DETACH | 1)  # MNT_FORCE: what waits for an answer gets an error
        os.close(device)
