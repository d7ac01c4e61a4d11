"""Upload a run to object storage: the newest checkpoint first, then the log, then older checkpoints."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

from unbroken import text
from unbroken.checkpoint import directory, rewind
from unbroken.checkpoint.directory import Fingerprint
from unbroken.checkpoint.format.schema import FINAL, checkpoint_name
from unbroken.errors import describe_error
from unbroken.mirror.store import RemoteCheckpoint, RemoteRun, say
from unbroken.paths import journal_of

LOOK_SECONDS = 0.5  # between two looks for a new checkpoint
LOG_SECONDS = 60.0  # between two copies of the log while there is no new checkpoint
HUB_LOG_SECONDS = 1800.0  # ... where each is a commit, of which the Hub takes 128 an hour
LOG_SHARE = 20  # ... and this many times as long as the last copy of it took
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds until the next try after a failure, doubled each time
TRIES = 6  # of the command that copies once


class Uploader:
    """An uploader that keeps a storage like the folder of a run.

    The newest checkpoint comes first, then the log, then older checkpoints.
    """

    def __init__(self, remote: RemoteRun, folder: Path, log: Path, keep_last: int, keep_every: int) -> None:
        self.remote, self.folder = remote, folder
        self._texts = (log, journal_of(log), folder / "config.yaml")
        self._keep_last, self._keep_every = keep_last, keep_every
        self.there: dict[str, RemoteCheckpoint] = {}
        self.unread: list[Path] = []  # what this process may not read
        self._known = self._failing = self._back = False
        self._identities: dict[tuple[str, int, int], Fingerprint] = {}
        self._text_sizes: dict[Path, int] = {}
        self._next_log = 0.0
        self._sending: Fingerprint | None = None
        self._sent = self._most_sent = 0  # bytes of it, in this try and in the best one
        self.progressed = time.monotonic()

    def follow(self, ended: threading.Event) -> None:
        """Copy until `ended`, then until everything is there; failures are reported and tried again."""
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
        """Copy everything that is there now. Return "", or why not after `tries` failures in a row."""
        failed, wait = 0, FIRST_WAIT
        while True:
            try:
                if not self.round(at_end=True):
                    return ""
                failed, wait = 0, FIRST_WAIT
            except Exception as error:
                failed, self._known = failed + 1, False
                if failed == tries:
                    return describe_error(error)
                time.sleep(wait)
                wait *= 2

    def round(self, at_end: bool = False) -> bool:
        """Do the most urgent piece of work; return False if nothing is left. Raises the storage's errors."""
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
        """Set aside in the storage what the run went back behind, and what was set aside here.

        Without a marker, newer copies in the storage are from another machine on the same trajectory.
        """
        back = rewind.read_rewind_marker(self.folder)
        if back is None:
            return
        self._back, self._known = True, False
        gone = {self._identity(path) for path in rewind.overtaken(self.folder) if os.access(path, os.R_OK)}
        later = [
            copy
            for copy in self.remote.copies()
            if (back.overtakes(copy.step, copy.time) or copy.step == back.step or copy.fingerprint in gone)
            and not self._is_here(copy)
        ]
        if later:
            aside = self.remote.set_aside(later, self._advance_always)
            say(f"mirror: {', '.join(copy.name for copy in later)} overtaken, kept in {aside}")
        rewind.clear_rewind_marker(self.folder, back)

    def _is_here(self, copy: RemoteCheckpoint) -> bool:
        try:
            return self._identity(self.folder / copy.name) == copy.fingerprint
        except OSError:
            return False

    def _missing(self) -> list[tuple[Path, int, Fingerprint]]:
        """Return the checkpoints that the storage lacks, newest first."""
        found = []
        for item in directory.list_checkpoints(self.folder):
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
            if item.step is not None and not kept and (copy is None or copy.fingerprint != identity):
                found.append((item.path, item.step, identity))
        return [entry for entry in found[::-1] if self._is_kept(entry[1])]

    def _identity(self, path: Path) -> Fingerprint:
        about = os.lstat(path)
        key = (path.name, about.st_ino, about.st_mtime_ns)
        if key not in self._identities:
            self._identities[key] = Fingerprint.of(path)
        return self._identities[key]

    def _is_kept(self, step: int) -> bool:
        """Return whether retention in the storage would keep a step."""
        return step not in self._given_up({*(copy.step for copy in self.there.values()), step})

    def _given_up(self, steps: set[int]) -> list[int]:
        return directory.expired_steps(sorted(steps), max(steps, default=0), self._keep_last, self._keep_every)

    def _copy(self, path: Path, step: int, identity: Fingerprint) -> None:
        began = time.monotonic()
        self._sent, self._most_sent = 0, self._most_sent if self._sending == identity else 0
        self._sending = identity
        twin = next((c for c in self.there.values() if c.fingerprint == identity and c.name != path.name), None)
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
        self.remote.publish(copy)
        self.there[path.name], self._sending = copy, None
        seconds = time.monotonic() - began
        say(f"mirror: {path.name} is in {self.remote.url} ({text.format_size(copy.size)} in {seconds:.1f}s, read back)")
        periodic = {copy.step for name, copy in self.there.items() if name != FINAL}
        for old in self._given_up(periodic):
            name = checkpoint_name(old)
            self.remote.remove(name)
            del self.there[name]

    def _copy_texts(self) -> bool:
        """Copy log, journal and config if they changed; return whether any did.

        Not while those of another machine, which was further, are there.
        """
        began = time.monotonic()
        here = max((found.step or 0 for found in directory.list_checkpoints(self.folder)), default=0)
        if not self._back and any(copy.step > here for copy in self.there.values()):
            self._next_log = began + LOG_SECONDS
            return False
        changed = [path for path in self._texts if self._copy_text(path)]
        now = time.monotonic()
        least = HUB_LOG_SECONDS if self.remote.url.startswith("hf:") else LOG_SECONDS
        self._next_log = now + max(least, LOG_SHARE * (now - began))
        return bool(changed)

    def _copy_text(self, path: Path) -> bool:
        """Copy one of them. A different log in the storage is kept aside first."""
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
        """Note progress: a try that comes no further than the one before is none."""
        self._sent += count
        if self._sent > self._most_sent or not count:
            self._most_sent = max(self._sent, self._most_sent)
            self.progressed = time.monotonic()

    def _advance_always(self, _: int) -> None:
        self._advance(0)

    def tell_failure(self, error: Exception) -> None:
        if not self._failing:
            self._failing = True
            say(
                f"WARNING: mirror {self.remote.url}: {describe_error(error)}; training goes on, the copy is tried again"
            )
