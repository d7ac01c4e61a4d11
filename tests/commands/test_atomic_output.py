"""Where a tool's output goes: a link stays, and what is no file is written to, not replaced."""

from __future__ import annotations

import os
import stat
import sys
import threading
from pathlib import Path

import pytest

from tests import fork_server
from tests.harness import ROOT
from unbroken.commands.atomic_output import write_whole
from unbroken.errors import UserError


def write(path: Path) -> None:
    path.write_text("new")


def test_a_link_stays_and_its_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "far/mine.html").write_text("old")
    (tmp_path / "out.html").symlink_to("far/mine.html")
    write_whole(tmp_path / "out.html", write)
    assert (tmp_path / "out.html").is_symlink() and (tmp_path / "far/mine.html").read_text() == "new"
    assert [path.name for path in (tmp_path / "far").iterdir()] == ["mine.html"]


def test_a_fifo_is_written_to(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "out.csv")
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "out.csv").read_text()))
    reader.start()
    write_whole(tmp_path / "out.csv", write)
    reader.join(30)
    assert read == ["new"] and stat.S_ISFIFO(os.stat(tmp_path / "out.csv").st_mode)


def test_a_device_and_a_stream_stay_what_they_are(tmp_path: Path) -> None:
    write_whole(Path("/dev/null"), write)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    program = (
        "from pathlib import Path; from tests.commands.test_atomic_output import *;"
        "write_whole(Path('/dev/stdout'), write)"
    )
    with (tmp_path / "out").open("w") as out:
        fork_server.run([sys.executable, "-c", program], cwd=ROOT, stdout=out, check=True)
    assert (tmp_path / "out").read_text() == "new"


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "out.html").write_text("old")

    def fail(path: Path) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"cannot write .*out\.html: No space left on device"):
        write_whole(tmp_path / "out.html", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["out.html"]
    assert (tmp_path / "out.html").read_text() == "old"
