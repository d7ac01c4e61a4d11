"""The uploader as a process of its own, so that a slow network cannot delay a step."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from unbroken.config import Config
from unbroken.mirror.store import GOODBYE, say
from unbroken.mirror.upload import Uploader
from unbroken.paths import Run
from unbroken.runtime.signals import STOP_SIGNALS

if TYPE_CHECKING:
    from unbroken.distributed.world import World

PROGRAM = Path(__file__).resolve().parents[2]  # where `python -m unbroken` is found
RESTART_SECONDS = 5.0


class UploaderProcess:
    """A process on rank 0 that copies the run's folder to `--mirror URL`; on other ranks and without URL, nothing."""

    def __init__(self, config: Config, run: Run, world: World) -> None:
        self._config, self._run = config, run
        self._is_needed = bool(config.mirror) and world.is_main
        self._process: subprocess.Popen[bytes] | None = None
        self._ended = threading.Event()

    def begin(self) -> None:
        """Start the process, and again if it dies."""
        if self._is_needed:
            self._process = self._start()
            threading.Thread(target=self._restart_when_dead, name="mirror", daemon=True).start()

    def _start(self) -> subprocess.Popen[bytes]:
        config, run = self._config, self._run
        typed = ["--follow", "--attached", "--log", str(run.log.absolute())]
        typed += ["--keep_last", str(config.checkpoints_to_keep), "--keep_every", str(config.keep_every)]
        python = [sys.executable, "-c", _PROGRAM, str(PROGRAM)]
        command = [*python, "mirror", str(run.folder.absolute()), config.mirror, *typed]
        return subprocess.Popen(command, stdin=subprocess.PIPE, bufsize=0, start_new_session=True)

    def _restart_when_dead(self) -> None:
        assert self._process is not None
        warned = False
        while self._process.wait() != 2 and not self._ended.is_set():  # 2: it has said what is wrong, and would again
            if not warned:
                say("WARNING: mirror: its process has died; it is started again")
            warned = True
            if self._ended.wait(RESTART_SECONDS):
                return
            with suppress(OSError):
                self._process = self._start()

    def __enter__(self) -> UploaderProcess:
        return self

    def __exit__(self, *error: object) -> None:
        """Wait while the process copies the rest and makes progress."""
        self._ended.set()
        if self._process is None:
            return
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.write(GOODBYE)
        if self._process.wait() < 0:
            say("WARNING: mirror: its process has died; the newest checkpoints are only on this machine")
        with suppress(OSError):
            self._process.stdin.close()


# `-m unbroken` would find another package of that name in the current folder first.
_PROGRAM = "import sys; sys.path[0] = sys.argv.pop(1); from unbroken.__main__ import main; sys.exit(main(sys.argv[1:]))"
PATIENCE_SECONDS = 60.0  # without a byte going anywhere, after the training has ended
TRIES = 14  # then, if the storage refuses at once: a minute as well


# ---- as the companion of a training ----------------------------------------------------------------------------------


def run_beside_training(mirror: Uploader) -> int:
    """Copy until the training sends GOODBYE on stdin, then the rest; exit at once if the training dies."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # the training decides when it is over
    os.nice(19)
    ended = threading.Event()
    threading.Thread(target=_listen, args=(ended,), daemon=True).start()
    threading.Thread(target=_watch, args=(mirror, ended), daemon=True).start()
    try:
        mirror.follow(ended, TRIES)
    except Exception:
        _give_up(mirror)
    return 0


def _listen(ended: threading.Event) -> None:
    if os.read(0, len(GOODBYE)) == GOODBYE:
        ended.set()
        os.read(0, 1)  # until the training's process is gone
    os._exit(1)  # it was killed: the next attempt copies what is missing


def _watch(mirror: Uploader, ended: threading.Event) -> None:
    """Give up after the end of training when nothing is copied any more: a dead storage must not hold the machine."""
    ended.wait()
    mirror.progressed = time.monotonic()
    while time.monotonic() - mirror.progressed < PATIENCE_SECONDS:
        time.sleep(1.0)
    _give_up(mirror)


def _give_up(mirror: Uploader) -> None:
    say(
        f"WARNING: mirror {mirror.remote.url}: the rest cannot be copied now; copy it with"
        f" python -m unbroken mirror {mirror.folder} {mirror.remote.storage.url}"
    )
    os._exit(1)
