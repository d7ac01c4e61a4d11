"""Whole or absent: what the writer leaves on disk, when all goes well and when each system call fails."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import fork_server
from tests.harness import OTHER_ID, RUN_ID, environment
from tests.saving import assert_is_step, assert_whole, tensors, tree, whole_tree
from unbroken import files
from unbroken.checkpoint import directory, disk
from unbroken.checkpoint.disk import OutputFile
from unbroken.checkpoint.format import schema
from unbroken.checkpoint.writer import RunCheckpointWriter, SaveResult
from unbroken.distributed.sliced_tensor import SlicedTensor
from unbroken.distributed.world import World
from unbroken.errors import UserError


def save(saver: RunCheckpointWriter, step: int, final: bool = False) -> SaveResult:
    saver.save(whole_tree(step), step, final=final)
    saver.before_update()
    saver.wait()
    (outcome,) = saver.results()
    return outcome


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_saved_file_is_what_every_reader_expects(tmp_path: Path) -> None:
    with RunCheckpointWriter(tmp_path, World.single()) as saver:
        outcome = save(saver, 3)
        assert save(saver, 4, final=True).path.name == "final.pt"
    assert outcome.error is None and outcome.seconds >= outcome.blocked_seconds > 0
    assert names(tmp_path) == ["final.pt", "model_step000003.pt"]
    assert_is_step(outcome.path, 3)
    with zipfile.ZipFile(outcome.path) as file:
        assert file.testzip() is None
    assert subprocess.run([sys.executable, "-m", "zipfile", "-t", outcome.path], capture_output=True).returncode == 0
    if shutil.which("unzip"):
        assert subprocess.run(["unzip", "-tq", outcome.path], capture_output=True).returncode == 0
    mapped = torch.load(outcome.path, mmap=True, weights_only=True)
    assert mapped["model"]["tied"].data_ptr() == mapped["model"]["w0"].data_ptr()
    assert mapped["rng"]["state"] == b"\x00\xff" and mapped["optimizer"]["param_groups"][0]["betas"] == (
        0.9,
        0.95,
    )


def test_equal_states_make_equal_files(tmp_path: Path) -> None:
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        with RunCheckpointWriter(folder, World.single()) as saver:
            save(saver, 1)
    first, second = ((tmp_path / name / "model_step000001.pt").read_bytes() for name in "ab")
    assert first == second


def test_the_state_is_taken_by_value(tmp_path: Path) -> None:
    """Numbers may change when save() has returned, tensors after before_update(): none of it is in the file."""
    live = tensors(5)
    state = tree(5, [SlicedTensor.whole(tensor) for tensor in live])
    with RunCheckpointWriter(tmp_path, World.single()) as saver:
        saver.save(state, 5)
        state["progress"]["history"]["losses"].append(9.0)
        state["args"]["seed"] = 2
        saver.before_update()
        for tensor in live:
            tensor.fill_(-1)
    assert_is_step(tmp_path / "model_step000005.pt", 5)
    assert torch.load(tmp_path / "model_step000005.pt", weights_only=True)["args"]["seed"] == 1


def test_twin_a_change_before_save_is_in_the_file(tmp_path: Path) -> None:
    live = tensors(5)
    live[0].view(-1)[7] += 1
    with RunCheckpointWriter(tmp_path, World.single()) as saver:
        saver.save(tree(5, [SlicedTensor.whole(tensor) for tensor in live]), 5)
    with pytest.raises(AssertionError):
        assert_is_step(tmp_path / "model_step000005.pt", 5)


def test_what_does_not_belong_into_a_checkpoint_is_named(tmp_path: Path) -> None:
    state = whole_tree(1)
    state["progress"]["when"] = Path("x")
    with (
        RunCheckpointWriter(tmp_path, World.single()) as saver,
        pytest.raises(UserError, match=r"progress\.when.*Path"),
    ):
        saver.save(state, 1)
    assert names(tmp_path) == []


def test_the_log_is_durable_before_the_checkpoint_exists(tmp_path: Path) -> None:
    seen: list[list[str]] = []
    with RunCheckpointWriter(tmp_path, World.single(), before_commit=lambda *_: seen.append(names(tmp_path))) as saver:
        save(saver, 1)
    assert seen == [[".model_step000001.pt.tmp"]]


def test_the_final_one_is_a_second_name_and_replaces_an_older_final_one(tmp_path: Path) -> None:
    with RunCheckpointWriter(tmp_path, World.single()) as saver:
        save(saver, 1, final=True)
        save(saver, 2)
        for _ in range(2):  # the second time both names are the same file already
            saver.link_final(2)
            saver.wait()
            assert saver.results()[0].error is None
    assert names(tmp_path) == ["final.pt", "model_step000002.pt"]
    assert (tmp_path / "final.pt").samefile(tmp_path / "model_step000002.pt")
    assert [found.step for found in directory.list_checkpoints(tmp_path)] == [2, 2]


def test_a_final_one_without_its_checkpoint_is_an_outcome_not_a_crash(tmp_path: Path) -> None:
    with RunCheckpointWriter(tmp_path, World.single()) as saver:
        saver.link_final(9)
        saver.wait()
        assert "No such file" in str(saver.results()[0].error)


def test_retention_recycles_the_blocks_of_what_it_gives_up(tmp_path: Path) -> None:
    with RunCheckpointWriter(tmp_path, World.single(), keep_last=2, keep_every=3) as saver:
        inodes = {}
        for step in range(1, 9):
            assert save(saver, step).error is None
            inodes[step] = (tmp_path / schema.checkpoint_name(step)).stat().st_ino
    assert names(tmp_path) == [schema.checkpoint_name(step) for step in (3, 6, 7, 8)]
    assert len(set(inodes.values())) < len(inodes), "no file was recycled"
    assert assert_whole(tmp_path, 8) == 8


def test_retention_removes_only_what_this_run_wrote(tmp_path: Path) -> None:
    """Not the earlier program's files, nor another run's, nor the end that the run had before it was extended."""
    with RunCheckpointWriter(tmp_path, World.single()) as saver:
        for step in (1, 2, 4):
            state = whole_tree(step)
            state["args"]["num_iterations"] = 2
            state["run_id"] = RUN_ID if step < 4 else OTHER_ID
            saver.save(state, step)
            saver.before_update()
    torch.save({"step": 3}, tmp_path / "model_step000003.pt")
    with RunCheckpointWriter(tmp_path, World.single(), keep_last=1) as saver:
        for step in (5, 6):
            assert save(saver, step).error is None
    assert names(tmp_path) == [schema.checkpoint_name(step) for step in (2, 3, 4, 6)]


@pytest.mark.parametrize("use", ["hard link", "open file", "mapping"])
def test_a_file_that_somebody_uses_is_never_written_over(tmp_path: Path, use: str) -> None:
    with RunCheckpointWriter(tmp_path, World.single(), keep_last=1) as saver:
        first = save(saver, 1).path
        before = first.read_bytes()
        reading: Any = first.open("rb") if use == "open file" else None
        mapped = torch.load(first, mmap=True, weights_only=True)["model"]["w0"] if use == "mapping" else None
        if use == "hard link":
            os.link(first, tmp_path / "mine.pt")
        for step in range(2, 5):
            assert save(saver, step).error is None
        if use == "hard link":
            assert (tmp_path / "mine.pt").read_bytes() == before
        elif reading is not None:
            assert reading.read() == before
            reading.close()
        else:
            assert mapped is not None and torch.equal(mapped, tensors(1)[0])
    assert not first.exists()


def test_a_spare_of_another_size_is_cut_to_fit(tmp_path: Path) -> None:
    with RunCheckpointWriter(tmp_path, World.single()) as saver:
        for step, spare_size in ((1, 10), (2, 9_000_000)):
            (tmp_path / schema.SPARE).write_bytes(b"\xee" * spare_size)
            inode = (tmp_path / schema.SPARE).stat().st_ino
            assert save(saver, step).path.stat().st_ino == inode
    assert assert_whole(tmp_path, 2) == 2


def test_a_spare_whose_old_name_may_come_back_is_not_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder cannot be synced when the file has given up its name: after a power cut it may have it again."""
    sync = files.sync_folder

    def fails(folder: Path) -> None:
        if (folder / schema.SPARE).exists():
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(folder)

    monkeypatch.setattr(files, "sync_folder", fails)
    with RunCheckpointWriter(tmp_path, World.single(), keep_last=1) as saver:
        for step in (1, 2):
            save(saver, step)
        assert [path.name for path in tmp_path.iterdir()] == ["model_step000002.pt"]


@pytest.mark.parametrize(
    ("steps", "just", "last", "every", "gone"),
    [
        ([1, 2, 3], 3, 0, 0, []),
        ([1, 2, 3], 3, 0, 2, []),
        ([1, 2, 3], 3, 2, 0, [1]),
        ([1, 2, 3, 4], 4, 1, 2, [1, 3]),
        ([10, 20, 30], 15, 1, 0, []),  # 20 and 30 are overtaken, not counted, not touched
        ([10, 15, 20, 30], 15, 1, 0, [10]),
    ],
)
def test_what_retention_gives_up(steps: list[int], just: int, last: int, every: int, gone: list[int]) -> None:
    assert directory.expired_steps(steps, just, last, every) == gone


# -- each system call fails
# ------------------------------------------------------------------------------------------

FAULTS: dict[str, tuple[str, int]] = {
    "disk full": ("pwrite", errno.ENOSPC),
    "quota": ("pwrite", errno.EDQUOT),
    "broken disk": ("pwrite", errno.EIO),
    "broken at fsync": ("fsync", errno.EIO),
    "full at fsync": ("fsync", errno.ENOSPC),
    "no rename": ("rename", errno.EACCES),
    "no open": ("open", errno.EMFILE),
    "no cut": ("ftruncate", errno.EIO),
}


def failing(call: Callable[..., Any], code: int, nth: int) -> Callable[..., Any]:
    count = 0

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == nth:
            raise OSError(code, os.strerror(code))
        return call(*args, **kwargs)

    return wrapper


@pytest.mark.parametrize("nth", [1, 2, 3])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_failed_save_costs_that_save_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, nth: int
) -> None:
    name, code = FAULTS[fault]
    with RunCheckpointWriter(tmp_path, World.single(), keep_last=1) as saver:
        save(saver, 1)
        with monkeypatch.context() as patch:
            patch.setattr(os, name, failing(getattr(os, name), code, nth))
            outcome = save(saver, 2)
        if outcome.error is not None:
            assert os.strerror(code) in outcome.error and "\n" not in outcome.error
            assert [item for item in names(tmp_path) if item.startswith(".model")] == [], "debris"
        assert assert_whole(tmp_path, 1 if outcome.error else 2) >= 1
        assert save(saver, 3).error is None
    assert names(tmp_path)[-1] == "model_step000003.pt" and assert_whole(tmp_path, 3) == 3


def test_what_a_read_only_disk_keeps_of_a_failed_save_goes_after_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(*_: Any, **__: Any) -> Any:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with RunCheckpointWriter(tmp_path, World.single()) as saver:
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", read_only)
            patch.setattr(disk, "remove", lambda path: None)
            assert save(saver, 1).error is not None
        assert names(tmp_path) == [".model_step000001.pt.tmp"]
        assert save(saver, 2).error is None
        assert names(tmp_path) == ["model_step000002.pt"]


def test_short_and_interrupted_writes_are_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.pwrite, 0

    def stingy(file: int, data: memoryview, offset: int) -> int:
        nonlocal calls
        calls += 1
        if calls % 3 == 0:
            raise InterruptedError(errno.EINTR, "interrupted")
        return real(file, data[: max(1, len(data) // 3)] if calls % 3 == 1 else data, offset)

    with RunCheckpointWriter(tmp_path, World.single()) as saver, monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", stingy)
        assert save(saver, 1).error is None
    assert calls > 3
    assert_is_step(tmp_path / "model_step000001.pt", 1)


def test_a_filesystem_without_direct_writes_is_written_buffered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two kinds refuse: at open, and only at the first write."""
    real_open, real_write = os.open, os.pwrite
    direct: set[int] = set()

    def refusing_open(path: Any, flags: int, *mode: int, **more: Any) -> int:
        if flags & os.O_DIRECT and at_open:
            raise OSError(errno.EINVAL, "no O_DIRECT")
        file = real_open(path, flags, *mode, **more)
        (direct.add if flags & os.O_DIRECT else direct.discard)(file)
        return file

    def refusing_write(file: int, data: memoryview, offset: int) -> int:
        if file in direct:
            raise OSError(errno.EINVAL, "no O_DIRECT")
        return real_write(file, data, offset)

    monkeypatch.setattr(os, "open", refusing_open)
    monkeypatch.setattr(os, "pwrite", refusing_write)
    with RunCheckpointWriter(tmp_path, World.single()) as saver:
        for step, at_open in ((1, True), (2, False)):  # noqa: B007 - refusing_open reads it
            assert save(saver, step).error is None
    assert assert_whole(tmp_path, 2) == 2


def test_a_vanished_folder_is_an_outcome_and_the_next_save_works(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with RunCheckpointWriter(folder, World.single(), keep_last=1) as saver:
        save(saver, 1)
        shutil.rmtree(folder)
        assert "No such file or directory" in str(save(saver, 2).error)
        folder.mkdir()
        assert save(saver, 3).error is None
    assert assert_whole(folder, 3) == 3


def test_a_log_that_cannot_be_synced_keeps_the_checkpoint_from_existing(tmp_path: Path) -> None:
    def broken(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error", "run.log")

    with RunCheckpointWriter(tmp_path, World.single(), before_commit=broken) as saver:
        assert "run.log" in str(save(saver, 1).error)
    assert names(tmp_path) == []


def test_a_real_full_disk(tmp_path: Path) -> None:
    """A limit on the size of files stops the kernel's own writes (EFBIG): no shim between."""
    program = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from tests.checkpoint.test_writer import save\n"
        "from unbroken.checkpoint.writer import RunCheckpointWriter\n"
        "from unbroken.distributed.world import World\n"
        "with RunCheckpointWriter(Path(sys.argv[1]), World.single()) as saver:\n"
        "    assert save(saver, 1).error is None\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))\n"
        "    print(save(saver, 2).error)\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
        "    assert save(saver, 3).error is None\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = fork_server.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "File too large" in done.stdout
    assert names(tmp_path) == ["model_step000001.pt", "model_step000003.pt"]
    assert assert_whole(tmp_path, 3) == 3


def test_what_our_reader_would_refuse_is_not_written(tmp_path: Path) -> None:
    """The reader has limits, so that a hostile file cannot make it work for ever; a state beyond them is not saved."""
    tree = whole_tree(1)
    tree["progress"] = {**tree["progress"], "many": dict.fromkeys(range(30_000), 0)}
    with (
        RunCheckpointWriter(tmp_path, World.single()) as saver,
        pytest.raises(UserError, match="saved: .*numbers as keys"),
    ):
        saver.save(tree, 1)
    assert names(tmp_path) == []


@pytest.mark.parametrize("allowed", [0, 1, 3])
def test_a_limit_of_threads_costs_no_save_and_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: int
) -> None:
    """Whatever threads cannot start: every checkpoint is saved and whole, and no write comes after its save."""
    real, started = threading.Thread.start, []

    def start(thread: threading.Thread) -> None:
        if thread.name.startswith(("checkpoint", "snapshot")):
            if len(started) == allowed:
                raise RuntimeError("can't start new thread")
            started.append(thread)
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    with RunCheckpointWriter(tmp_path, World.single()) as saver:
        for step in range(1, 6):
            assert save(saver, step).error is None
            with (tmp_path / "stranger").open("wb") as stranger:
                stranger.write(b"mine")
    assert (tmp_path / "stranger").read_bytes() == b"mine"
    for step in range(1, 6):
        assert_is_step(tmp_path / schema.checkpoint_name(step), step)


def test_a_closed_file_is_not_written_through_its_old_number(tmp_path: Path) -> None:
    output = OutputFile(tmp_path / "checkpoint", create=True)
    output.close()
    with (tmp_path / "stranger").open("w+b") as stranger:
        with pytest.raises(OSError, match="Bad file descriptor"):
            output.write(memoryview(b"ours"), 0)
        assert stranger.read() == b""


@pytest.mark.parametrize("harm", ["cut", "replace", "overwrite"])
def test_a_file_that_another_process_changed_is_not_called_saved(tmp_path: Path, harm: str) -> None:
    temporary = tmp_path / ".model_step000001.pt.tmp"

    def fsync(file: int) -> None:
        real(file)
        if not temporary.exists():
            return
        if harm == "cut":
            os.truncate(temporary, 1000)
        elif harm == "replace":
            temporary.unlink()
            temporary.write_bytes(b"stranger")
        else:
            with temporary.open("r+b") as opened:
                opened.seek(-100, os.SEEK_END)
                opened.write(bytes(50))

    real = os.fsync
    with pytest.MonkeyPatch.context() as patch, RunCheckpointWriter(tmp_path, World.single()) as saver:
        patch.setattr(os, "fsync", fsync)
        error = str(save(saver, 1).error)
    assert "does not hold what was written" in error if harm == "overwrite" else "replaced or cut" in error
    assert names(tmp_path) == []


def test_an_error_of_close_is_no_error_of_the_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS, quotas and FUSE report through close(2) too; what was synced before is on disk."""
    with RunCheckpointWriter(tmp_path, World.single()) as saver:
        real = os.close

        def close(file: int) -> None:
            written = os.readlink(f"/proc/self/fd/{file}").endswith(".pt")
            real(file)
            if written:
                raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

        with monkeypatch.context() as patch:
            patch.setattr(os, "close", close)
            assert save(saver, 1).error is None and save(saver, 2).error is None
    assert assert_whole(tmp_path, 2) == 2


def test_a_full_filesystem(tmp_path: Path) -> None:
    """A small tmpfs with room for one checkpoint, not for two: the kernel itself says ENOSPC."""
    folder = tmp_path / "small"
    folder.mkdir()
    size = 3 * 2**19
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("mounting a tmpfs needs root")
    try:
        filler = folder / "filler"
        with RunCheckpointWriter(folder, World.single()) as saver:
            assert save(saver, 1).error is None
            left = os.statvfs(folder)
            filler.write_bytes(bytes(left.f_bavail * left.f_frsize))
            assert "No space left on device" in str(save(saver, 2).error)
            assert [item for item in names(folder) if item.startswith(".")] == []
            filler.unlink()
            assert save(saver, 3).error is None
        assert names(folder) == ["model_step000001.pt", "model_step000003.pt"]
        assert assert_whole(folder, 3) == 3
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
