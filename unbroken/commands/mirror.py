"""`python -m unbroken mirror`: copy a run into object storage, once or for as long as it goes on.

With `--mirror URL` a training has this running beside it: a process of its own at the lowest priority, so that neither
a slow network nor a library that hangs or dies can hold up a step.
"""

from __future__ import annotations

import argparse
import os
import signal
import threading
import time
from pathlib import Path

from unbroken import console, screen
from unbroken.checkpoint import directory
from unbroken.checkpoint.schema import FINAL, checkpoint_name, printable
from unbroken.commands import given
from unbroken.errors import UserError, told
from unbroken.interrupts import STOP_SIGNALS
from unbroken.journal import journal_of
from unbroken.remote import GOODBYE, Copy, Identity, RemoteRun, Storage, say

HELP = "copy a run's checkpoints and log into object storage; a fresh machine goes on from there"
LOOK_SECONDS = 0.5  # between two looks for a new checkpoint
LOG_SECONDS = 60.0  # between two copies of the log while there is no new checkpoint
HUB_LOG_SECONDS = 1800.0  # ... where each is a commit, of which the Hub takes 128 an hour
LOG_SHARE = 20  # ... and this many times as long as the last copy of it took
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds until the next try after a failure, doubled each time
TRIES = 6  # of the command that copies once
PATIENCE_SECONDS = 60.0  # without a byte going anywhere, after the training has ended


def configure(parser: argparse.ArgumentParser) -> None:
    """Which run, and where to."""
    parser.add_argument("what", metavar="RUN", help="a run_id or a run's folder")
    parser.add_argument("url", metavar="URL", help="s3://bucket/path, gs://, az://, hf:// or file:///path")
    parser.add_argument("--follow", action="store_true", help="go on copying what comes until interrupted")
    parser.add_argument(
        "--keep_last", type=int, default=0, metavar="N", help="remove older ones there, as training does; 0: keep all"
    )
    parser.add_argument("--keep_every", type=int, default=0, metavar="N", help="but not those whose step N divides")
    parser.add_argument("--log", type=Path, metavar="FILE", help="the run's log, where it is not in the run's folder")
    parser.add_argument("--attached", action="store_true", help=argparse.SUPPRESS)  # a training began it


def run(args: argparse.Namespace) -> int:
    """Copy what is missing; 0 when everything is there."""
    folder = given.folder_of(args.what)
    run_id = given.run_id_of(folder) if folder is not None else ""
    if folder is None or not run_id:
        raise UserError(f"{printable(args.what)} is no run: type a run_id or the folder logs/<run_id>")
    for name in ("keep_last", "keep_every"):
        if getattr(args, name) < 0:
            raise UserError(f"--{name} {getattr(args, name)}: it must not be negative")
    if args.log and not args.attached and not os.path.isfile(args.log):
        raise UserError(f"--log {args.log}: there is no such file")
    log = args.log or given.log_of(folder) or folder / f"{run_id}.log"
    remote = Storage(args.url).run(run_id)
    mirror = Mirroring(remote, folder, log, args.keep_last, args.keep_every)
    if args.attached:
        return _beside_training(mirror)
    if args.follow:
        try:
            mirror.follow(threading.Event())
        except KeyboardInterrupt:
            pass
        return 0
    failed = mirror.catch_up(TRIES)
    if failed:
        raise UserError(f"{remote.url}: {failed}")
    if mirror.unread:
        raise UserError(f"{mirror.unread[0]} could not be read; all else is in {remote.url}")
    console.say(f"{len(mirror.there)} checkpoints of {run_id} are in {remote.url}, each read back when it was copied")
    return 0


class Mirroring:
    """Keeps a folder in a storage like a run's: newest checkpoint first, then the log, then the older ones."""

    def __init__(self, remote: RemoteRun, folder: Path, log: Path, keep_last: int, keep_every: int) -> None:
        self.remote, self.folder = remote, folder
        self._texts = (log, journal_of(log), folder / "config.yaml")
        self._keep_last, self._keep_every = keep_last, keep_every
        self.there: dict[str, Copy] = {}
        self.unread: list[Path] = []  # what this process may not read
        self._known = self._failing = self._back = False
        self._identities: dict[tuple[str, int, int], Identity] = {}
        self._text_sizes: dict[Path, int] = {}
        self._next_log = 0.0
        self._sending: Identity | None = None
        self._sent = self._most_sent = 0  # bytes of it, in this try and in the best one
        self.progressed = time.monotonic()

    def follow(self, ended: threading.Event) -> None:
        """Until `ended`, and then until all is there; failures are told and tried again."""
        wait = FIRST_WAIT
        while True:
            at_end = ended.is_set()
            try:
                busy = self.round(at_end)
            except Exception as error:
                self.tell_failure(error)
                self._known = False  # whatever was there, it may be another storage when it comes back
                ended.wait(wait) if not at_end else time.sleep(min(wait, 5.0))
                wait = min(2 * wait, LONGEST_WAIT)
                continue
            if self._failing:
                self._failing = False
                say(f"mirror: {self.remote.url} is back")
            wait = FIRST_WAIT
            if not busy:
                if at_end:
                    return
                ended.wait(LOOK_SECONDS)

    def catch_up(self, tries: int) -> str:
        """Everything that is there now; returns why not, after so many tries in a row that brought nothing."""
        failed, wait = 0, FIRST_WAIT
        while True:
            try:
                if not self.round(at_end=True):
                    return ""
                failed, wait = 0, FIRST_WAIT
            except Exception as error:
                failed, self._known = failed + 1, False
                if failed == tries:
                    return told(error)
                time.sleep(wait)
                wait *= 2

    def round(self, at_end: bool = False) -> bool:
        """The most urgent thing; False where nothing is left to do. Raises whatever the storage's library raises."""
        self.follow_back()
        if not self._known:
            self.there = {copy.name: copy for copy in self.remote.copies()}
            self._text_sizes, self._known = {}, True
        missing = self._missing()
        if missing:
            path, step, identity = missing[0]
            self._copy(path, step, identity)
            return True
        if at_end or time.monotonic() >= self._next_log:
            return self._copy_texts() and not at_end
        return False

    def follow_back(self) -> None:
        """Where the run has gone back, set aside there all behind that step, and what has been set aside here.

        Else newer copies are only further on the same course: another machine has been there.
        """
        back = directory.gone_back(self.folder)
        if back is None:
            return
        self._back, self._known = True, False
        gone = {self._identity(path) for path in directory.overtaken(self.folder) if os.access(path, os.R_OK)}
        later = [
            copy
            for copy in self.remote.copies()
            if (back.overtakes(copy.step, copy.time) or copy.step == back.step or copy.identity in gone)
            and not self._is_here(copy)
        ]
        if later:
            aside = self.remote.set_aside(later, self._advance_always)
            say(f"mirror: {', '.join(copy.name for copy in later)} overtaken, kept in {aside}")
        directory.told_gone_back(self.folder, back)

    def _is_here(self, copy: Copy) -> bool:
        try:
            return self._identity(self.folder / copy.name) == copy.identity
        except OSError:
            return False

    def _missing(self) -> list[tuple[Path, int, Identity]]:
        """Newest first."""
        found = []
        for item in directory.checkpoints(self.folder):
            try:
                identity = self._identity(item.path)
            except FileNotFoundError:
                continue  # retention was faster
            except OSError as error:
                self._note_unread(item.path, error)
                continue
            copy = self.there.get(item.path.name)
            # One that is there whole is given up only for one that is further; another course's was set aside before.
            kept = copy is not None and item.step is not None and copy.step >= item.step
            if item.step is not None and not kept and (copy is None or copy.identity != identity):
                found.append((item.path, item.step, identity))
        return [entry for entry in found[::-1] if self._is_kept(entry[1])]

    def _identity(self, path: Path) -> Identity:
        about = os.lstat(path)
        key = (path.name, about.st_ino, about.st_mtime_ns)
        if key not in self._identities:
            self._identities[key] = Identity.of(path)
        return self._identities[key]

    def _is_kept(self, step: int) -> bool:
        """Whether retention there would not remove it at once."""
        return step not in self._given_up({*(copy.step for copy in self.there.values()), step})

    def _given_up(self, steps: set[int]) -> list[int]:
        return directory.given_up(sorted(steps), max(steps, default=0), self._keep_last, self._keep_every)

    def _copy(self, path: Path, step: int, identity: Identity) -> None:
        began = time.monotonic()
        self._sent, self._most_sent = 0, self._most_sent if self._sending == identity else 0
        self._sending = identity
        twin = next((c for c in self.there.values() if c.identity == identity and c.name != path.name), None)
        self.there.pop(path.name, None)
        try:
            if twin:
                copy = self.remote.duplicate(twin, path.name, self._advance)
            else:
                with open(path, "rb"):  # while somebody reads it, retention removes it but does not overwrite it
                    copy = self.remote.put(path, step, self._advance)
        except FileNotFoundError:
            if path.exists():
                raise
            return  # retention was faster
        self._copy_texts()  # a log that reaches at least as far as the checkpoint
        self.remote.mark(copy)
        self.there[path.name], self._sending = copy, None
        seconds = time.monotonic() - began
        say(f"mirror: {path.name} is in {self.remote.url} ({screen.size(copy.size)} in {seconds:.1f}s, read back)")
        periodic = {copy.step for name, copy in self.there.items() if name != FINAL}
        for old in self._given_up(periodic):
            name = checkpoint_name(old)
            self.remote.remove(name)
            del self.there[name]

    def _copy_texts(self) -> bool:
        """The log, the journal and the config, where they have changed; says whether any had.

        Not while another machine's are there, which was further.
        """
        began = time.monotonic()
        here = max((found.step or 0 for found in directory.checkpoints(self.folder)), default=0)
        if not self._back and any(copy.step > here for copy in self.there.values()):
            self._next_log = began + LOG_SECONDS
            return False
        changed = [path for path in self._texts if self._copy_text(path)]
        now = time.monotonic()
        least = HUB_LOG_SECONDS if self.remote.url.startswith("hf:") else LOG_SECONDS
        self._next_log = now + max(least, LOG_SHARE * (now - began))
        return bool(changed)

    def _copy_text(self, path: Path) -> bool:
        """One of them. What is there and is not how ours begins is another log: it is kept aside before ours comes."""
        try:
            if path.stat().st_size == self._text_sizes.get(path):
                return False
            ours = path.read_bytes()
        except FileNotFoundError:
            return False
        except OSError as error:  # which must not keep the checkpoints from being copied
            self._note_unread(path, error)
            return False
        if path not in self._text_sizes and path.suffix != ".yaml":
            there = self.remote.text(path.name) or b""
            if there == ours:
                self._text_sizes[path] = len(ours)
                return False
            if there.startswith(ours) and not self._back:
                return False  # it reaches further there, on our course so far
            if not ours.startswith(there):
                say(f"mirror: {path.name} is another one there, kept in {self.remote.keep_text(path.name, there)}")
        self.remote.put_text(path.name, ours)
        self._text_sizes[path] = len(ours)
        self._advance(0)
        return True

    def _note_unread(self, path: Path, error: OSError) -> None:
        if path not in self.unread:
            say(f"WARNING: mirror: {path} cannot be read: {error.strerror}")
            self.unread.append(path)

    def _advance(self, count: int) -> None:
        """A try that comes no further than the one before is no progress."""
        self._sent += count
        if self._sent > self._most_sent or not count:
            self._most_sent = max(self._sent, self._most_sent)
            self.progressed = time.monotonic()

    def _advance_always(self, _: int) -> None:
        self._advance(0)

    def tell_failure(self, error: Exception) -> None:
        if not self._failing:
            self._failing = True
            say(f"WARNING: mirror {self.remote.url}: {told(error)}; training goes on, the copy is tried again")


# ---- as the companion of a training ----------------------------------------------------------------------------------


def _beside_training(mirror: Mirroring) -> int:
    """Copy until the training says goodbye on stdin, then the rest; leave at once if it dies."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # the training decides when it is over
    os.nice(19)
    ended = threading.Event()
    threading.Thread(target=_listen, args=(ended,), daemon=True).start()
    threading.Thread(target=_watch, args=(mirror, ended), daemon=True).start()
    mirror.follow(ended)
    return 0


def _listen(ended: threading.Event) -> None:
    if os.read(0, len(GOODBYE)) == GOODBYE:
        ended.set()
        os.read(0, 1)  # until the training's process is gone
    os._exit(1)  # it was killed: the next attempt copies what is missing


def _watch(mirror: Mirroring, ended: threading.Event) -> None:
    """After the end, give up when nothing moves any more: a dead storage must not keep a machine busy."""
    ended.wait()
    mirror.progressed = time.monotonic()
    while time.monotonic() - mirror.progressed < PATIENCE_SECONDS:
        time.sleep(1.0)
    say(
        f"WARNING: mirror {mirror.remote.url}: nothing could be copied for {PATIENCE_SECONDS:g}s; copy the rest with"
        f" python -m unbroken mirror {mirror.folder} URL"
    )
    os._exit(1)
