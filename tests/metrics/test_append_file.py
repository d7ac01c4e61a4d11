"""Files in a run's folder: who may read and write them, and what close(2) says of them."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from tests.harness import RUN_ID
from tests.saving import whole_tree
from unbroken.checkpoint import disk
from unbroken.checkpoint.writer import RunCheckpointWriter
from unbroken.config import Config
from unbroken.distributed.world import World
from unbroken.metrics.append_file import AppendFile
from unbroken.metrics.trackers import TensorBoardTracker
from unbroken.paths import Run
from unbroken.run.lock import RunLock


def test_files_have_the_modes_of_the_umask(tmp_path: Path) -> None:
    """With 002 in a setgid folder, a colleague of the group resumes the run."""
    before = os.umask(0o002)
    try:
        AppendFile(tmp_path / "run.log").close()
        disk.replace(tmp_path / "config.tmp", tmp_path / "config.yaml", b"")
        with RunLock(tmp_path), RunCheckpointWriter(tmp_path, World.single()) as saver:
            saver.save(whole_tree(1), 1)
            saver.before_update()
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == dict.fromkeys([".lock", "config.yaml", "model_step000001.pt", "run.log"], 0o664)


@pytest.mark.parametrize(
    ("last", "left"),
    [(b"s:12 trn:3.141592"[:cut], b"") for cut in range(1, 17)]
    + [(b"s", b""), (b"s:3 val:na", b""), (b'{"step": 12, "train', b"")]
    + [(line, line + b"\n") for line in (b"s:12 trn:3.141592", b"s:3 val:nan", b'{"step": 1}', b"a note", b"# time=2")],
)
def test_a_torn_line_is_removed_and_one_without_an_end_gets_it(tmp_path: Path, last: bytes, left: bytes) -> None:
    path = tmp_path / "run.log"
    path.write_bytes(b"s:1 trn:4.000000\n" + last)
    AppendFile(path).close()
    assert path.read_bytes() == b"s:1 trn:4.000000\n" + left


def test_an_error_of_close_is_no_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = AppendFile(tmp_path / "run.log")
    file.append("s:1 trn:4.000000")
    file.sync()

    def close(number: int) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    with monkeypatch.context() as patch:
        patch.setattr(os, "close", close)
        assert file.close() == ""


def test_event_files_of_others_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.chdir(tmp_path)
    run, folder = Run(RUN_ID, ""), tmp_path / "logs" / RUN_ID / "tensorboard"
    folder.mkdir(parents=True)
    mine = folder / "events.out.tfevents.1700000000.myhost.1.0"
    mine.write_bytes(b"mine")
    (folder / f"events.out.tfevents.1700000000.{RUN_ID}").write_bytes(b"of an earlier attempt")
    (tmp_path / "letter").write_text("mine")
    (folder / ".being_written.tmp").symlink_to(tmp_path / "letter")
    TensorBoardTracker(Config(), run, {}, is_new=True).close()
    assert mine.read_bytes() == b"mine" and (tmp_path / "letter").read_text() == "mine"
    assert len(list(folder.iterdir())) == 2


def test_zeros_of_a_power_cut_are_removed(tmp_path: Path) -> None:
    """Lines whose data did not arrive; those before and behind them stay, and so does what follows."""
    path = tmp_path / "run.log"
    path.write_bytes(b"s:1 trn:4.500000\ns:2 t" + bytes(14) + b"3 trn:4.300000\ns:4 trn:4.200000\ns:5 tr" + bytes(9))
    file = AppendFile(path)
    file.append("s:6 trn:4.100000")
    file.sync()
    assert file.restore() == file.close() == ""
    assert path.read_text() == "s:1 trn:4.500000\ns:4 trn:4.200000\ns:6 trn:4.100000\n"
