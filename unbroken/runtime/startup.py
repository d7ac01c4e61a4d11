"""Before torch is imported, which takes two seconds: answer --help, and read the checkpoint while the disk is idle.

Only a guess at which file will be wanted, and nothing is done with what is read: choosing, checking and loading it are
left to `wanted.py` and `resume.py`, which then find the bytes in memory.
"""

from __future__ import annotations

import os
import signal
import stat
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from unbroken import config, console

BLOCK = 8 << 20
THREADS = 2
SPINS = 1000  # some microseconds: what is ready at once is not slept for


def prepare_process(argv: Sequence[str]) -> None:
    """Do everything that comes before the import of torch."""
    console.open_streams()
    require_posix()
    restore_default_sigint()
    set_openmp_wait_policy()
    start(argv)


def require_posix() -> None:
    """End with one line on Windows, which lacks flock(2) and signals that a training relies on."""
    if sys.platform == "win32":
        console.print_line("error: Unbroken needs Linux or macOS; on Windows run it in WSL2", error=True)
        sys.exit(2)


def set_openmp_wait_policy() -> None:
    """OpenMP's threads wait for each other asleep, unless the environment says how they are to wait.

    Awake, as is their way, they take the processor from the very thread they wait for as soon as anything else runs on
    the machine, or more threads than it has cores: every step then takes several times as long.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & set(os.environ):
        os.environ.update(OMP_WAIT_POLICY="passive", GOMP_SPINCOUNT=str(SPINS))


def start(argv: Sequence[str], logs: Path = Path("logs")) -> None:
    """Leave with the help if it is asked for; else begin to read in the background, on one process of each machine."""
    if {"-h", "--help"} & set(argv):
        config.build_parser().parse_args(["--help"])
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return
    wanted = _typed(argv) or ("latest" if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" else "")
    path = guess(wanted, logs) if wanted else None
    if path is not None:
        threading.Thread(target=read, args=(path,), name="prefetch", daemon=True).start()


def restore_default_sigint() -> None:
    """Until training listens to them: a Ctrl-C ends the process, without a traceback out of torch's imports."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _typed(argv: Sequence[str]) -> str:
    for index, word in enumerate(argv):
        if word.startswith("--resume_from="):
            return word.partition("=")[2]
        if word == "--resume_from" and index + 1 < len(argv):
            return argv[index + 1]
    return ""


def guess(wanted: str, logs: Path) -> Path | None:
    """The newest file that `--resume_from` may mean; None where there is none."""
    try:
        if wanted in ("latest", "auto"):
            folders = [folder for folder in logs.iterdir() if folder.is_dir()]
        elif (logs / wanted).is_dir():
            folders = [logs / wanted]
        else:
            path = Path(wanted)
            folders = [path] if path.is_dir() else []
            if path.is_file():
                return path
        found = [path for folder in folders for path in folder.glob("*.pt")]
        return max(found, key=lambda path: path.lstat().st_mtime, default=None)
    except OSError:
        return None


def read(path: Path) -> None:
    """Every byte of a regular file, by several threads."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return
    try:
        about = os.fstat(file)
        if stat.S_ISREG(about.st_mode):
            todo = iter(range(0, about.st_size, BLOCK))
            readers = [threading.Thread(target=_read, args=(file, todo), daemon=True) for _ in range(THREADS)]
            for reader in readers:
                reader.start()
            for reader in readers:
                reader.join()
    finally:
        os.close(file)


def _read(file: int, offsets: Iterator[int]) -> None:
    buffer = bytearray(BLOCK)
    for offset in offsets:
        try:
            os.preadv(file, [buffer], offset)
        except OSError:
            return
