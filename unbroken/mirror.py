"""A run whose checkpoints are in object storage too: the process that copies them there, beside the training.

What is there and when it counts: `remote.py`. What that process does: `commands/mirror.py`. The way back: `bring.py`.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from unbroken.config import Config
from unbroken.distributed import World
from unbroken.remote import GOODBYE, say
from unbroken.run import Run
from unbroken.saves import keep_last

PROGRAM = Path(__file__).resolve().parent.parent  # where `python -m unbroken` is found
RESTART_SECONDS = 5.0


class Mirror:
    """On rank 0, the process that copies the run's folder to `--mirror URL`; elsewhere and without a URL, nothing."""

    def __init__(self, config: Config, run: Run, world: World) -> None:
        self._config, self._run = config, run
        self._wanted = bool(config.mirror) and world.is_main
        self._process: subprocess.Popen[bytes] | None = None
        self._ended = threading.Event()

    def begin(self) -> None:
        """Start it, and again should it die."""
        if self._wanted:
            self._process = self._started()
            threading.Thread(target=self._keep, name="mirror", daemon=True).start()

    def _started(self) -> subprocess.Popen[bytes]:
        config, run = self._config, self._run
        typed = ["--follow", "--attached", "--log", str(run.log.absolute())]
        typed += ["--keep_last", str(keep_last(config)), "--keep_every", str(config.keep_every)]
        door = [sys.executable, "-c", _DOOR, str(PROGRAM)]
        command = [*door, "mirror", str(run.folder.absolute()), config.mirror, *typed]
        return subprocess.Popen(command, stdin=subprocess.PIPE, bufsize=0, start_new_session=True)

    def _keep(self) -> None:
        assert self._process is not None
        told = False
        while self._process.wait() != 2 and not self._ended.is_set():  # 2: it has said what is wrong, and would again
            if not told:
                say("WARNING: mirror: its process has died; another one goes on from where it was")
            told = True
            if self._ended.wait(RESTART_SECONDS):
                return
            with suppress(OSError):
                self._process = self._started()

    def __enter__(self) -> Mirror:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let it copy the rest, for as long as it gets anything done."""
        self._ended.set()
        if self._process is None:
            return
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.write(GOODBYE)
        if self._process.wait() < 0:
            say("WARNING: mirror: its process has died; the newest checkpoints are only here")
        with suppress(OSError):
            self._process.stdin.close()


# `-m unbroken` would find another package of that name in the current folder first.
_DOOR = "import sys; sys.path[0] = sys.argv.pop(1); from unbroken.__main__ import main; sys.exit(main(sys.argv[1:]))"
