"""Where a run lives: its run_id, its name, its folder, its log and its journal."""

from __future__ import annotations

import os
import re
import shlex
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from unbroken.errors import UserError
from unbroken.files import sync_folder, sync_folders_above
from unbroken.text import printable

_RUN_ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", re.ASCII)


MODULE = "-m train_gpt2_mod"  # as python and torchrun take an installed script
IS_INSTALLED = not {"site-packages", "dist-packages"}.isdisjoint(Path(__file__).parts)


def is_run_id(text: str) -> bool:
    """Return whether `text` is a uuid4 in its usual spelling. Only such a text becomes part of a path."""
    return _RUN_ID.fullmatch(text) is not None and str(uuid.UUID(text)) == text


RUN_ID_PREFIX = re.compile(r"[0-9a-f]{4,8}(-[0-9a-f]*)*")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]{0,63}", re.ASCII)
_NO_NAMES = ("latest", "best", "auto", "off", "final")
_ENDINGS = (".pt", ".log", ".json", ".jsonl", ".yaml")  # of a file that the user may mean


def is_name(text: str) -> bool:
    """Return whether `text` can name a run: it must not look like a run_id, a file or a word of --resume_from."""
    fits = _NAME.fullmatch(text) is not None and not text.lower().endswith(_ENDINGS)
    return fits and text.lower() not in _NO_NAMES and not RUN_ID_PREFIX.fullmatch(text.lower())


LOGS = "logs"
_logs_dir = Path(LOGS)  # of this process: like its working directory, it is set once and holds for all lookups


def use_logs_dir(typed: str) -> None:
    """Set the folder of all runs, for the rest of this process. Raises UserError if it cannot be one."""
    global _logs_dir
    if not typed or not typed.isprintable():
        raise UserError(f"--logs_dir {typed!r:.200}: not the path of a folder; give one or leave the flag out")
    path = Path(os.path.expanduser(typed))
    if os.path.islink(path) and not os.path.exists(path):
        raise UserError(f"{path.absolute()} is a link to {os.readlink(path)}, which is not there; mount or remove it")
    if os.path.exists(path) and not os.path.isdir(path):
        raise UserError(f"--logs_dir {printable(typed, 4096)}: it is not a folder; give the path of one")
    _logs_dir = path


def logs_dir() -> Path:
    """Return the folder that holds the runs: that of --logs_dir, else `logs`."""
    return _logs_dir


def with_logs_dir(command: str) -> str:
    """Return a command or flags that name a run, with the --logs_dir that is needed to find it."""
    return command if _logs_dir == Path(LOGS) else f"{command} --logs_dir {shlex.quote(str(_logs_dir))}"


def as_typed(command: str, installed: bool = IS_INSTALLED) -> str:
    """Return a command as it is typed here: `pip install` leaves no train_gpt2_mod.py in a folder of the user's."""
    if not installed:
        return command
    return command.replace("python train_gpt2_mod.py", "unbroken-train").replace(" train_gpt2_mod.py", f" {MODULE}")


@dataclass(frozen=True)
class Run:
    """The folder and the files of a run. `home` is its folder if that is not <logs_dir>/<run_id>."""

    run_id: str
    output_dir: str
    home: Path | None = None

    @property
    def folder(self) -> Path:
        """The folder of checkpoints, lock and markers."""
        return self.home or logs_dir() / self.run_id

    @property
    def log(self) -> Path:
        """The log: beside the checkpoints, or in --output_dir."""
        return (Path(self.output_dir) if self.output_dir else self.folder) / f"{self.run_id}.log"

    def create(self) -> None:
        """Make the folders, and their names durable. Raises UserError if one cannot be made or written to."""
        for folder in (self.folder, self.log.parent):
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"cannot make the folder {folder}: {error.strerror}") from None
            if not os.access(folder, os.W_OK | os.X_OK):
                raise UserError(
                    f"cannot write into the folder {folder}; change its permissions, or start in another one"
                )
            sync_folders_above(folder)
        for path in (self.log, journal_of(self.log)):
            if os.path.exists(path) and not os.path.isfile(path):
                raise UserError(f"cannot write the log {path}: it is no file")


def trusted_output_dir(saved: str, run_id: str) -> str:
    """Return a checkpoint's --output_dir if it is below the current folder or has the run's log; else "".

    A checkpoint may come from anybody, so it must not choose where on this machine something is written.
    """
    path = Path(saved)
    if not saved.isprintable():
        return ""
    below = not path.is_absolute() and ".." not in path.parts
    return saved if below or os.path.isfile(path / f"{run_id}.log") else ""


def new_run_id(typed: str) -> str:
    """Return the typed run_id, or a new uuid4. Raises UserError for any other text, because a run_id becomes a path."""
    if typed and not is_run_id(typed):
        raise UserError(f"--run_id {typed!r} is not a uuid4 such as {uuid.uuid4()}")
    return typed or str(uuid.uuid4())


JOURNAL = ".metrics.jsonl"  # the end of its name


def journal_of(log: Path) -> Path:
    """Return the journal beside a log."""
    return log.with_suffix(JOURNAL)


# ---- names of runs: logs/by-name/<name> is a relative link to the folder ---------------------------------------------

BY_NAME = "by-name"


def named_folder(name: str) -> Path | None:
    """Return the folder of the run that has a name; None for none, also if the link leads to a removed run."""
    link = logs_dir() / BY_NAME / name
    return link.resolve() if is_name(name) and os.path.isdir(link) else None


def name_of(folder: Path) -> str:
    """Return the name of the run in a folder; "" if it has none."""
    return next(iter(_names_of(folder)), "")


def _names_of(folder: Path) -> list[str]:
    with suppress(OSError), os.scandir(logs_dir() / BY_NAME) as links:
        return sorted(link.name for link in links if is_name(link.name) and _same(link.path, folder))
    return []


def _same(one: str | Path, other: str | Path) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


def give_name(name: str, folder: Path) -> None:
    """Give the run in a folder this name, durably, in place of an earlier one. Raises UserError if taken, OSError."""
    links = logs_dir() / BY_NAME
    links.mkdir(parents=True, exist_ok=True)
    with _locked(links):
        if named_folder(name) is None:
            with suppress(FileNotFoundError):
                (links / name).unlink()  # its run was removed
            with suppress(FileExistsError):  # a start at the same moment, on a filesystem without locks
                (links / name).symlink_to(os.path.relpath(folder.resolve(), links.resolve()))
        owner = named_folder(name)
        if owner is None or not _same(owner, folder):
            raise name_taken(name, owner or links / name)
        for other in _names_of(folder):
            if other != name:
                (links / other).unlink()
        sync_folder(links)
    sync_folders_above(links)


def name_taken(name: str, owner: Path, why: str = "") -> UserError:
    """Return the error of a start with a name that the run in the folder `owner` has."""
    go_on = with_logs_dir(f"--resume_from {name}")
    return UserError(f"--name {name}: run {owner.name} has this name{why}; continue it with {go_on}, or choose another")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a lock of a folder, where the filesystem has locks."""
    import fcntl  # Windows lacks it, and is told so in a line before anything is done

    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)
