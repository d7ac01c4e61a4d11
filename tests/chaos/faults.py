"""The faults: what happens to a run, and what it may do about it.

Each is a function that is given the run, FAULTS names them all. A fault either leaves the attempt alive, or ends it and
leaves the next start to the run's job script. `lane.cause` says why an attempt may end before the run is through.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from tests import harness
from tests.chaos.lane import Finished, Lane
from tests.chaos.storage import CHANGES, KILL_AFTER, KILL_BEFORE, KILL_TORN, Calls
from tests.harness import arguments
from tests.storage import tool
from unbroken.checkpoint import directory

SOON_SECONDS = 12.0  # within which the next save, or whatever else an armed rule waits for, comes
STOPPED_RANK_SECONDS = 60.0
LAYERS = 2  # of the tiny model


# ---- signals ---------------------------------------------------------------------------------------------------------


def kill_all(lane: Lane) -> None:
    lane.advance()
    lane.crash()


def kill_one_rank(lane: Lane) -> None:
    lane.advance()
    lane.signal_rank(signal.SIGKILL)
    lane.down("SIGKILL of a rank")


def kill_launcher(lane: Lane) -> None:
    """Torchrun alone is killed, and the next attempt begins while its workers are still there."""
    lane.advance().process.kill()
    lane.down("SIGKILL of the launcher", wait_for_all=False)


def kill_in_start(lane: Lane) -> None:
    lane.ended()
    lane.launch()
    time.sleep(lane.dice.uniform(0, 1.3))
    lane.crash()


def kill_again_and_again(lane: Lane) -> None:
    for _ in range(3):
        kill_in_start(lane)


def terminate(lane: Lane) -> None:
    _stop(lane, signal.SIGTERM)


def interrupt(lane: Lane) -> None:
    _stop(lane, signal.SIGINT)


def user_signal(lane: Lane) -> None:
    _stop(lane, signal.SIGUSR1, to_all=True)


def _stop(lane: Lane, number: int, to_all: bool = False) -> None:
    running = lane.advance()
    if lane.ranks > 1 and to_all:  # it would end torchrun: its workers only
        lane.signal_rank(number)
    else:
        running.process.send_signal(number)
    done = lane.down(f"signal {number}")
    lane.expect_stop(done)


def terminate_in_start(lane: Lane) -> None:
    lane.ended()
    running = lane.launch()
    time.sleep(lane.dice.uniform(0, 1.3))
    running.process.send_signal(signal.SIGTERM)
    lane.down("SIGTERM in the start")


def stop_all_for_a_while(lane: Lane) -> None:
    running = lane.advance()
    running.kill(signal.SIGSTOP)
    time.sleep(lane.dice.uniform(0.1, 2.0))
    running.kill(signal.SIGCONT)


def stop_one_rank(lane: Lane) -> None:
    """The others find out, and the attempt ends."""
    lane.advance()
    if lane.ranks == 1:  # nobody is there to find out
        raise Finished
    lane.signal_rank(signal.SIGSTOP)
    lane.down("a rank was stopped", STOPPED_RANK_SECONDS)


# ---- killed at a call ------------------------------------------------------------------------------------------------


def _kill_at(lane: Lane, calls: Calls, part: str, skip: int, how: int) -> None:
    """Armed while it trains: the process is gone before or after such a call."""
    lane.up()
    with lane.rules.during(calls, lane.run, part, error=how, skip=skip, times=1) as rule:
        ended = not lane.wait(lambda: bool(lane.rules.hits(rule)), SOON_SECONDS, patient=True)
        if lane.rules.hits(rule) or ended:
            lane.down(f"SIGKILL at a call on {part or 'any file'}")
        else:
            raise Finished  # nothing came


def kill_in_write(lane: Lane) -> None:
    _kill_at(lane, Calls.WRITE, ".pt", lane.dice.randrange(8), lane.dice.choice([KILL_BEFORE, KILL_AFTER]))


def tear_a_write(lane: Lane) -> None:
    _kill_at(lane, Calls.WRITE, lane.dice.choice([".pt", ".log", ".jsonl"]), lane.dice.randrange(6), KILL_TORN)


def kill_at_sync(lane: Lane) -> None:
    _kill_at(lane, Calls.SYNC, "", lane.dice.randrange(6), lane.dice.choice([KILL_BEFORE, KILL_AFTER]))


def kill_at_rename(lane: Lane) -> None:
    _kill_at(lane, Calls.RENAME, "", lane.dice.randrange(4), lane.dice.choice([KILL_BEFORE, KILL_AFTER]))


def kill_at_any_change(lane: Lane) -> None:
    _kill_at(lane, CHANGES, "", lane.dice.randrange(80), lane.dice.choice([KILL_BEFORE, KILL_AFTER]))


def kill_at_a_change_of_the_start(lane: Lane) -> None:
    _kill_in_start_at(lane, CHANGES, "", lane.dice.randrange(12))


def kill_in_load(lane: Lane) -> None:
    _kill_in_start_at(lane, Calls.READ | Calls.OPEN_READ, ".pt", lane.dice.randrange(10))


def _kill_in_start_at(lane: Lane, calls: Calls, part: str, skip: int) -> None:
    lane.ended()
    how = lane.dice.choice([KILL_BEFORE, KILL_AFTER])
    with lane.rules.during(calls, lane.run, part, error=how, skip=skip, times=1) as rule:
        lane.launch()
        if lane.wait(lambda: lane.trained() > 1 or bool(lane.rules.hits(rule))) and not lane.rules.hits(rule):
            raise Finished
        lane.down("SIGKILL in the start")


# ---- storage that fails for a while ----------------------------------------------------------------------------------


def _for_a_while(lane: Lane, *rule: Any, may_end: bool = False, seconds: float = 1.5, **named: Any) -> None:
    """A rule holds while it trains, and it goes on training, unless it may end.

    Near its end a run whose last checkpoint cannot be written ends with an error.
    """
    lane.advance()
    lane.user_acts = lane.is_near_end()
    with lane.may_end("storage" if may_end or lane.user_acts else ""):
        with lane.rules.during(*rule, **named):
            until = time.monotonic() + lane.dice.uniform(0.2, seconds)
            lane.wait(lambda: time.monotonic() > until)
        lane.settle()


def disk_full(lane: Lane) -> None:
    takes = Calls.WRITE | Calls.RESERVE | Calls.MKDIR | Calls.OPEN_WRITE
    _for_a_while(lane, takes, lane.run, error=errno.ENOSPC)


def quota_exceeded(lane: Lane) -> None:
    _for_a_while(lane, Calls.WRITE | Calls.RESERVE | Calls.CLOSE, lane.run, error=errno.EDQUOT)


def write_error(lane: Lane) -> None:
    _for_a_while(lane, Calls.WRITE, lane.run, ".pt", error=errno.EIO, times=lane.dice.randint(1, 4))


def sync_error(lane: Lane) -> None:
    _for_a_while(lane, Calls.SYNC, lane.run, error=errno.EIO, times=lane.dice.randint(1, 4))


def rename_error(lane: Lane) -> None:
    _for_a_while(lane, Calls.RENAME | Calls.LINK, lane.run, error=errno.EIO, times=lane.dice.randint(1, 3))


def remove_error(lane: Lane) -> None:
    _for_a_while(lane, Calls.UNLINK, lane.run, error=errno.EACCES, times=lane.dice.randint(1, 5))


def close_error(lane: Lane) -> None:
    _for_a_while(lane, Calls.CLOSE, lane.run, error=errno.EIO, times=lane.dice.randint(1, 10))


def interrupted_calls(lane: Lane) -> None:
    _for_a_while(lane, Calls.WRITE | Calls.RESERVE, lane.run, ".pt", error=errno.EINTR, times=lane.dice.randint(1, 5))


def read_only(lane: Lane) -> None:
    changes = CHANGES & ~(Calls.WRITE | Calls.SYNC)
    _for_a_while(lane, changes | Calls.MKDIR, lane.run, error=errno.EROFS)


def slow_disk(lane: Lane) -> None:
    _for_a_while(lane, CHANGES, lane.run, wait_ms=lane.dice.randint(5, 60), seconds=3)


def clock_set_back(lane: Lane) -> None:
    hours = lane.dice.choice([-24, -1, 1, 24 * 365])
    _for_a_while(lane, Calls.CLOCK, lane.folder, clock_s=3600 * hours, seconds=2)


def shards_unreadable(lane: Lane) -> None:
    calls = Calls.READ | Calls.OPEN_READ
    _for_a_while(
        lane, calls, lane.folder / "data", ".bin", error=lane.dice.choice([errno.EIO, errno.ESTALE]), may_end=True
    )


def _at_start(lane: Lane, *rule: Any, **named: Any) -> None:
    """A rule holds for the start of an attempt, which then trains all the same or ends with one line."""
    lane.ended()
    lane.user_acts = True
    with lane.rules.during(*rule, **named) as number:
        lane.launch()
        if not lane.wait(lambda: lane.trained() > 0):
            lane.down("storage at the start")
        elif not lane.rules.hits(number):
            raise Finished
    if lane.alive():
        with lane.may_end("storage at the start"):
            lane.settle()


def disk_full_at_start(lane: Lane) -> None:
    takes = Calls.WRITE | Calls.RESERVE | Calls.MKDIR | Calls.OPEN_WRITE
    _at_start(lane, takes, lane.run, error=errno.ENOSPC)


def read_only_at_start(lane: Lane) -> None:
    changes = CHANGES & ~(Calls.WRITE | Calls.SYNC)
    _at_start(lane, changes | Calls.MKDIR, lane.run, error=errno.EROFS)


def load_error(lane: Lane) -> None:
    calls = lane.dice.choice([Calls.READ, Calls.OPEN_READ])
    lane.ended()
    lane.damages = True  # a checkpoint that cannot be read is passed over, with a warning
    _at_start(lane, calls, lane.run, ".pt", error=errno.EIO, skip=lane.dice.randrange(6), times=lane.dice.randint(1, 3))


def no_more_threads(lane: Lane) -> None:
    _at_start(lane, Calls.THREAD, lane.folder, error=errno.EAGAIN, skip=lane.dice.randrange(8))


# ---- limits of the process -------------------------------------------------------------------------------------------


def _limited(lane: Lane, which: int, value: Callable[[psutil.Process], int], may_end: bool) -> None:
    """A limit holds for one training process for a while."""
    lane.advance()
    with lane.may_end("a limit" if may_end or lane.is_near_end() else ""), suppress(psutil.NoSuchProcess):
        process = psutil.Process(lane.a_rank())
        usual = process.rlimit(which)
        process.rlimit(which, (value(process), usual[1]))
        until = time.monotonic() + lane.dice.uniform(0.2, 1.5)
        lane.wait(lambda: time.monotonic() > until)
        if lane.alive():
            process.rlimit(which, usual)
            goal = lane.trained() + 2
            lane.wait(lambda: lane.trained() >= goal)
    if not lane.alive():
        lane.down("a limit")


def no_more_files(lane: Lane) -> None:
    _limited(lane, resource.RLIMIT_NOFILE, lambda process: process.num_fds(), may_end=True)


def no_large_files(lane: Lane) -> None:
    _limited(lane, resource.RLIMIT_FSIZE, lambda _: 1 << 20, may_end=False)


def no_more_memory(lane: Lane) -> None:
    _limited(lane, resource.RLIMIT_AS, lambda process: process.memory_info().vms + (1 << 20), may_end=True)


@contextmanager
def _group(lane: Lane, controller: str) -> Iterator[Path]:
    """A control group of this kind; without the right to make one, the fault does not happen."""
    group = Path("/sys/fs/cgroup", controller, f"chaos-{os.getpid()}")
    try:
        group.mkdir()
    except OSError:
        raise Finished from None
    try:
        yield group
    finally:
        for pid in (group / "cgroup.procs").read_text().split():
            with suppress(OSError):
                (group.parent / "cgroup.procs").write_text(pid)
        with suppress(OSError):
            group.rmdir()


def oom_killer(lane: Lane) -> None:
    """The kernel's, of control groups of the first version: the memory of one training process becomes too small."""
    lane.advance()
    with _group(lane, "memory") as group, lane.may_end("the OOM killer"), suppress(OSError):
        pid = lane.a_rank()
        (group / "memory.limit_in_bytes").write_text(str(1 << 20))  # what it has is not counted, what it takes is
        (group / "cgroup.procs").write_text(str(pid))
        lane.wait(lambda: not lane.alive(), SOON_SECONDS, patient=True)
    if lane.alive():
        raise Finished
    lane.down("the OOM killer")


# ---- damage between two attempts -------------------------------------------------------------------------------------


def _newest(lane: Lane) -> Path:
    """The newest checkpoint of a run that was killed."""
    lane.advance()
    lane.crash()
    steps = directory.periodic_steps(lane.run) if lane.run.is_dir() else []
    if len(steps) < 2 or (lane.run / "final.pt").exists():  # nothing would be left, or nobody reads it any more
        raise Finished
    return lane.run / f"model_step{steps[-1]:06d}.pt"


def flip_a_bit(lane: Lane) -> None:
    path = _newest(lane)
    content = bytearray(path.read_bytes())
    content[lane.dice.randrange(len(content))] ^= 1 << lane.dice.randrange(8)
    path.write_bytes(content)
    lane.launch()


def cut_the_newest(lane: Lane) -> None:
    path = _newest(lane)
    os.truncate(path, lane.dice.randrange(path.stat().st_size))
    lane.launch()


def zero_a_block(lane: Lane) -> None:
    path = _newest(lane)
    with open(path, "r+b") as file:
        file.seek(lane.dice.randrange(path.stat().st_size // 4096) * 4096)
        file.write(bytes(4096))
    lane.launch()


def remove_the_newest(lane: Lane) -> None:
    _newest(lane).unlink()
    lane.launch()


def strange_files(lane: Lane) -> None:
    """Under the names that the program uses itself: a FIFO, a sparse file, a link that leads nowhere, a folder."""
    lane.advance()
    lane.crash()
    lane.run.mkdir(exist_ok=True)
    step = lane.step() + lane.dice.randint(1, 8)
    names = [f".model_step{step:06d}.pt.tmp", ".spare.pt.tmp", f"model_step{step + 900:06d}.pt", ".final.pt.tmp"]
    path = lane.run / lane.dice.choice(names)
    kind = lane.dice.choice(["fifo", "sparse", "link", "folder"])
    if path.exists() or (path.name == ".spare.pt.tmp" and kind == "folder"):
        raise Finished
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "sparse":
        with open(path, "wb") as file:
            file.truncate(1 << 36)
    elif kind == "link":
        path.symlink_to("nowhere")
    else:
        path.mkdir()
    lane.up()
    if kind == "folder" or path.name.startswith("model_step"):
        with suppress(OSError):
            path.rmdir() if kind == "folder" else path.unlink()
    lane.strange.add(path)


def _a_shard(lane: Lane) -> Path:
    """A shard of a run that has a checkpoint, by which the next attempt knows its data; nothing runs."""
    lane.ended()
    if not lane.newest():
        raise Finished
    return lane.dice.choice(sorted((lane.folder / "data").glob("train_*.bin")))


def cut_a_shard(lane: Lane) -> None:
    """The attempt refuses it in one line; when it is back, the next one goes on."""
    path = _a_shard(lane)
    content = path.read_bytes()
    path.write_bytes(content[: lane.dice.randrange(len(content))])
    lane.refused("changed shard")
    path.write_bytes(content)


def another_shard(lane: Lane) -> None:
    path = _a_shard(lane)
    content = path.read_bytes()
    harness.write_shard(path, harness.learnable(len(content) // 2 - 512, 17))
    lane.refused("changed shard")
    path.write_bytes(content)


def shard_away(lane: Lane) -> None:
    path = _a_shard(lane)
    path.rename(path.with_suffix(".away"))
    lane.refused("missing shard")
    path.with_suffix(".away").rename(path)


# ---- others that touch the same files --------------------------------------------------------------------------------


def move_the_log(lane: Lane) -> None:
    """As logrotate does, while it trains."""
    lane.advance()
    path = lane.dice.choice([lane.log, lane.journal])
    with suppress(FileNotFoundError):
        path.rename(f"{path}.1")
    lane.settle()


def replace_the_log(lane: Lane) -> None:
    """As an editor does that saves: a copy takes its place."""
    lane.advance()
    path = lane.dice.choice([lane.log, lane.journal])
    with suppress(FileNotFoundError):
        copy = Path(shutil.copy(path, f"{path}.new"))
        copy.rename(path)
    lane.settle()


def start_twice(lane: Lane) -> None:
    """A second one of the same command is refused, and changes nothing."""
    lane.advance()
    second = lane.another().wait()
    if lane.alive() and "is being trained" not in second.text:
        lane.fail("a second attempt of the run was not refused", second)


def start_two_at_once(lane: Lane) -> None:
    lane.ended()
    lane.launch()
    lane.one_of_two(lane.another())


def mistyped(lane: Lane) -> None:
    """A command with a mistake in it, while nothing runs: one line, nothing changed."""
    lane.ended()
    before = {path: path.lstat().st_mtime_ns for path in lane.run.glob("*")} if lane.run.is_dir() else {}
    typed = [*arguments(lane.typed), *lane.dice.choice([["--learning_rate", "fast"], ["--modle", "d12"]])]
    done = harness.launch(lane.folder, typed, None).wait()
    if done.code != 2 or len(done.err.splitlines()) != 1:
        lane.fail("a mistake is not one line", done)
    if before != ({path: path.lstat().st_mtime_ns for path in lane.run.glob("*")} if lane.run.is_dir() else {}):
        lane.fail("a mistyped command changed the run", done)


def look_at_it(lane: Lane) -> None:
    """Tools that read the run while it is trained, and a reader that keeps a checkpoint open."""
    lane.advance()
    with ExitStack() as stack:
        read = []
        for path in sorted(lane.run.glob("model_step*.pt"))[-1:]:
            with suppress(OSError):  # retention has just removed it
                file = stack.enter_context(open(path, "rb"))
                read.append((file, file.read()))
        known = lane.newest()
        named = [[name, harness.RUN_ID] for name in ("verify", "show", "report")]
        done = tool(lane.folder, *lane.dice.choice([["ls"], *named]))
        if done.code and known:
            lane.fail("a tool fails while the run is trained", done)
        for file, content in read:
            file.seek(0)
            if file.read() != content:
                lane.fail("a checkpoint that a reader has open was written over")


def save_now(lane: Lane) -> None:
    """The file that asks for a checkpoint, as a user touches it at any time."""
    lane.advance()
    (lane.run / "save").touch()


# ---- of one course each ----------------------------------------------------------------------------------------------


def flip_in_memory(lane: Lane) -> None:
    """A bit of a gradient or of an activation, in the first microbatch of a step, which the replay computes again."""
    lane.ended()
    place, step = lane.dice.choice(["grad", "activation"]), lane.dice.randrange(20)
    each = 5 if place == "grad" else 5 * LAYERS  # four microbatches and the replay
    lane.env = {"FLIP": f"{place}:{step * each + 1}:{lane.dice.randrange(31)}"}
    lane.launch()
    done = lane.down("a bit flipped in memory")
    if not lane.finished and "differ" not in done.err:
        lane.fail("a flipped bit was not found", done)


def lose_the_machine(lane: Lane) -> None:
    """Its disk is gone; what the storage has goes on elsewhere."""
    lane.advance(40)
    lane.crash()
    if not lane.s3 or not lane.s3.counted():
        raise Finished
    shutil.rmtree(lane.folder / "logs")
    lane.stopped_at = max(copy.step for copy in lane.s3.counted().values())


def kill_the_server(lane: Lane) -> None:
    """What was in it is gone with it; when it is back, it is filled again."""
    lane.advance()
    assert lane.s3 is not None
    lane.s3.kill()
    time.sleep(lane.dice.uniform(0, 2))
    lane.settle()
    if not lane.s3.start():
        raise RuntimeError("moto did not start again")


def stop_the_server(lane: Lane) -> None:
    """It does not answer for a while."""
    lane.advance()
    assert lane.s3 is not None
    lane.s3.process.send_signal(signal.SIGSTOP)
    lane.settle()
    time.sleep(lane.dice.uniform(0, 3))
    lane.s3.process.send_signal(signal.SIGCONT)


def credentials_expire(lane: Lane) -> None:
    """For one attempt the storage refuses the key."""
    lane.ended()
    lane.env = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_MAX_ATTEMPTS": "1"}
    lane.launch()
    if lane.wait(lambda: lane.trained() > 3):
        lane.crash()
    else:
        lane.down("no storage")


def stand_still(lane: Lane) -> None:
    """One rank hangs, in a pass or in an exchange; all give up, and say who is behind."""
    lane.ended()
    (lane.folder / "hung").unlink(missing_ok=True)
    where = lane.dice.choice(["train", "exchange"])
    number = lane.dice.randint(5, 10) * (4 if where == "train" else 1)  # after the first three steps
    lane.env = {"HANGS": f"{where}:{number}", "ON": "0"}
    lane.launch()
    done = lane.down("a rank hangs", STOPPED_RANK_SECONDS)
    if not lane.finished and "no progress of rank 0" not in done.err:
        lane.fail("a rank that hangs was not named", done)


def tracker_gone(lane: Lane) -> None:
    """For one attempt W&B's server does not answer; the next one sends what it has missed."""
    lane.ended()
    lane.env = {"WANDB_MODE": "online", "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40}
    lane.env |= {"WANDB_INIT_TIMEOUT": "3"}
    lane.launch()
    lane.advance(30)
    lane.crash()


def kill_in_compilation(lane: Lane) -> None:
    lane.ended()
    lane.launch()
    time.sleep(lane.dice.uniform(1, 10))
    lane.crash()


FAULTS: dict[str, Callable[[Lane], None]] = {
    "SIGKILL of all processes": kill_all,
    "SIGKILL of one rank": kill_one_rank,
    "SIGKILL of torchrun": kill_launcher,
    "SIGKILL in the start": kill_in_start,
    "SIGKILL three times in the restart": kill_again_and_again,
    "SIGKILL in the load": kill_in_load,
    "SIGKILL in a write": kill_in_write,
    "SIGKILL at an fsync": kill_at_sync,
    "SIGKILL at a rename": kill_at_rename,
    "SIGKILL at any change of a file": kill_at_any_change,
    "SIGKILL at a change in the start": kill_at_a_change_of_the_start,
    "torn write": tear_a_write,
    "SIGTERM": terminate,
    "SIGTERM in the start": terminate_in_start,
    "SIGINT": interrupt,
    "SIGUSR1": user_signal,
    "SIGSTOP and SIGCONT of all": stop_all_for_a_while,
    "SIGSTOP of one rank": stop_one_rank,
    "disk full": disk_full,
    "disk full at a start": disk_full_at_start,
    "quota exceeded, also at close": quota_exceeded,
    "write error": write_error,
    "fsync error": sync_error,
    "rename or link error": rename_error,
    "remove error": remove_error,
    "close error": close_error,
    "interrupted system calls": interrupted_calls,
    "folder read-only": read_only,
    "folder read-only at a start": read_only_at_start,
    "slow disk": slow_disk,
    "read error in the load": load_error,
    "shards unreadable": shards_unreadable,
    "shard cut": cut_a_shard,
    "shard replaced": another_shard,
    "shard missing": shard_away,
    "clock set": clock_set_back,
    "no more threads": no_more_threads,
    "no more open files": no_more_files,
    "no large files": no_large_files,
    "no more memory": no_more_memory,
    "OOM killer": oom_killer,
    "bit of the newest checkpoint flipped": flip_a_bit,
    "newest checkpoint cut": cut_the_newest,
    "block of the newest checkpoint zeroed": zero_a_block,
    "newest checkpoint removed": remove_the_newest,
    "strange files in the folder": strange_files,
    "log or journal moved": move_the_log,
    "log or journal replaced": replace_the_log,
    "started twice": start_twice,
    "two starts at once": start_two_at_once,
    "command mistyped": mistyped,
    "tools and readers beside it": look_at_it,
    "save asked for": save_now,
}
OF_COURSES: dict[str, Callable[[Lane], None]] = {
    "bit flipped in memory": flip_in_memory,
    "machine lost": lose_the_machine,
    "mirror's server killed": kill_the_server,
    "mirror's server stopped for a while": stop_the_server,
    "mirror not reachable": credentials_expire,
    "SIGKILL in the compilation": kill_in_compilation,
    "rank that hangs": stand_still,
    "W&B's server gone": tracker_gone,
}
OF_RANKS = {"SIGKILL of one rank", "SIGKILL of torchrun", "SIGSTOP of one rank"}
