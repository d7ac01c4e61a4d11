"""Upload a run to object storage: the newest checkpoint first, then the log, then older checkpoints."""

from __future__ import annotations

import os
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from unbroken import text
from unbroken.checkpoint import directory, rewind
from unbroken.checkpoint.directory import best_steps, fingerprint_of
from unbroken.checkpoint.format.schema import FINAL
from unbroken.checkpoint.rewind import Rewinds
from unbroken.errors import describe_error
from unbroken.files import read_whole
from unbroken.mirror.store import MAX_TEXT_BYTES, Manifest, RemoteRun, say
from unbroken.paths import journal_of

LOOK_SECONDS = 0.5  # between two looks for a new checkpoint
LOG_SECONDS = 60.0  # between two copies of the log while there is no new checkpoint
HUB_LOG_SECONDS = 1800.0  # ... where each is a commit, of which the Hub takes 128 an hour
LOG_SHARE = 20  # ... and this many times as long as the last copy of it took
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds until the next try after a failure, doubled each time
MOST_WAIT_AT_END = 5.0  # ... when no new checkpoint will come


class Uploader:
    """An uploader that keeps the storage equal to the folder of a run.

    The newest checkpoint comes first, then the log, then older checkpoints.

    Args:
        remote: the run in the storage.
        folder: the run's folder on this machine.
        log: its log.
        keep_last: number of checkpoints to keep in the storage; 0 keeps all.
        keep_every: also keep checkpoints whose step is a multiple of this; 0 keeps none by that rule.
    """

    def __init__(self, remote: RemoteRun, folder: Path, log: Path, keep_last: int, keep_every: int) -> None:
        self.remote, self.folder = remote, folder
        self._texts = (log, journal_of(log), folder / "config.yaml")
        self._keep_last, self._keep_every = keep_last, keep_every
        self.manifest: Manifest | None = None  # the storage's, while it is known
        self.unread: list[Path] = []  # what this process may not read
        self._failing = self._went_back = self._is_overtaken = False
        self._rewinds: Rewinds = ()  # the run's, when the manifest was read
        self._best, self._best_of = tuple[int, ...](), -1  # the best steps, by the checkpoint of which step
        self._staying: dict[int, bool] = {}
        self._text_sizes: dict[Path, int] = {}
        self._next_log = 0.0
        self.progressed = time.monotonic()

    def follow(self, ended: threading.Event, tries: int) -> None:
        """Copy until `ended`, then until everything is there; failures are reported and tried again.

        Raises the storage's error after `tries` failures in a row once it has ended.
        """
        wait, failed_at_end = FIRST_WAIT, 0
        while True:
            at_end = ended.is_set()
            try:
                busy = self.round(at_end)
            except Exception as error:
                failed_at_end += at_end
                if failed_at_end == tries:
                    raise
                if not self._failing:
                    self._failing = True
                    say(f"WARNING: mirror {self.remote.url}: {describe_error(error)}; the copy is tried again")
                self.manifest = None  # the storage may have changed when it answers again
                self.remote.storage.connect()
                ended.wait(wait) if not at_end else time.sleep(min(wait, MOST_WAIT_AT_END))
                wait = min(2 * wait, LONGEST_WAIT)
                continue
            if self._failing:
                self._failing = False
                say(f"mirror: {self.remote.url} is back")
            wait, failed_at_end = FIRST_WAIT, 0
            if not busy:
                if at_end:
                    return
                ended.wait(LOOK_SECONDS)

    def round(self, at_end: bool = False) -> bool:
        """Do the most urgent piece of work; return False if nothing is left. Raises the storage's errors."""
        if self.manifest is None or self._rewinds != rewind.read_rewinds(self.folder):
            self.manifest = self.load_manifest()
        if self._is_overtaken:
            return False
        self._note_best(self.manifest)
        missing = self._missing(self.manifest) or self._missing_weights(self.manifest)
        if missing:
            self._copy(*missing[0], self.manifest)
            return True
        if at_end or time.monotonic() >= self._next_log:
            return self._copy_texts(self.manifest) and not at_end
        return False

    def load_manifest(self) -> Manifest:
        """Return the storage's manifest. If the run went back here, copies of later steps do not count from now on.

        Newer copies of a run that did not go back are from another machine on the same course, and stay.
        """
        self.remote.sync_names()  # what is there and equal is not copied again
        self._rewinds, manifest = rewind.read_rewinds(self.folder), self.remote.manifest()
        divergence = rewind.find_divergence(self._rewinds, manifest.rewinds)
        overtaken, self._is_overtaken = self._is_overtaken, divergence is not None and not divergence.ours_is_newer
        if divergence is not None and divergence.ours_is_newer:
            self._went_back = True
            later = [
                copy
                for copy in (*manifest.checkpoints, *manifest.weights)
                if copy.step > divergence.step and copy.fingerprint != fingerprint_of(self.folder / copy.name)
            ]
            manifest = manifest.overtake(later, self._rewinds)
            self.remote.publish(manifest)
            if later:
                say(f"mirror: {', '.join(copy.name for copy in later)} overtaken, kept in {self.remote.url}")
        elif divergence is not None and not overtaken:
            say(
                f"WARNING: mirror {self.remote.url}: another machine took this run back to step {divergence.step};"
                " what is trained here is not copied"
            )
        self._text_sizes = {}
        return manifest

    def _note_best(self, manifest: Manifest) -> None:
        """Read the best steps of the run from its newest local checkpoint, if that is newer than the one read before.

        If the storage has a newer checkpoint, take the best steps of the manifest.
        """
        entries = directory.list_checkpoints(self.folder)
        newest = max((entry.step or 0 for entry in entries), default=0)
        if any(copy.step > newest for copy in manifest.checkpoints):
            self._best, self._best_of = manifest.best, -1
        elif newest != self._best_of:
            with ExitStack() as opened:
                file = directory.open_newest_readable(self.folder, opened)
                self._best, self._best_of = best_steps(file.values) if file else (), newest

    def _missing(self, manifest: Manifest) -> list[tuple[Path, int]]:
        """Return the checkpoints that the storage lacks, newest first."""
        found = []
        for item in directory.list_checkpoints(self.folder):
            copy = manifest.get(item.path.name)
            if item.step is None or (copy is not None and copy.step >= item.step):  # one of the same step has its bits
                continue
            try:
                with open(item.path, "rb"):
                    found.append((item.path, item.step))
            except FileNotFoundError:
                continue  # retention was faster
            except OSError as error:
                self._note_unread(item.path, error)
        return [
            entry for entry in found[::-1] if self._stays(*entry) or entry[1] not in self._expired(manifest, entry[1])
        ]

    def _missing_weights(self, manifest: Manifest) -> list[tuple[Path, int]]:
        """Return the files of weights alone that the storage lacks, oldest first."""
        return [
            (item.path, item.step)
            for item in directory.list_weights(self.folder)
            if item.step is not None and manifest.get(item.path.name) is None and os.access(item.path, os.R_OK)
        ]

    def _stays(self, path: Path, step: int) -> bool:
        """Return whether retention never removes a checkpoint of this folder."""
        if step not in self._staying:
            self._staying[step] = directory.written_for(path) == directory.FOR_STEPS
        return self._staying[step]

    def _expired(self, manifest: Manifest, *more: int) -> list[int]:
        """Return the steps that retention removes from the storage, if it gets the periodic checkpoints `more`."""
        steps = {*(copy.step for copy in manifest.checkpoints if copy.name != FINAL or more), *more}
        newest, kept = max(steps, default=0), {*self._best, *(copy.step for copy in manifest.checkpoints if copy.stays)}
        return directory.expired_steps(sorted(steps), newest, self._keep_last, self._keep_every, kept)

    def _copy(self, path: Path, step: int, manifest: Manifest) -> None:
        began = time.monotonic()
        try:
            with open(path, "rb"):  # while it is open, retention removes it but does not overwrite it
                copy = self.remote.put(path, step, manifest, self._note_progress)
        except FileNotFoundError:
            if path.exists():
                raise
            return  # retention was faster
        self._copy_texts(manifest)  # a log that reaches at least as far as the checkpoint
        now = self.remote.manifest()  # another machine may have published meanwhile
        if now.rewinds != self._rewinds:
            self.manifest = None  # it is compared again
            return
        copy = replace(copy, stays=not copy.is_weights and self._stays(path, step))
        self.manifest = manifest = replace(now.with_copies(copy), best=self._best)
        self.remote.publish(manifest)
        seconds = time.monotonic() - began
        say(f"mirror: {path.name} is in {self.remote.url} ({text.format_size(copy.size)} in {seconds:.1f}s, read back)")
        expired = self._expired(manifest)
        gone = [copy for copy in manifest.checkpoints if copy.name != FINAL and copy.step in expired]
        if gone:
            self.manifest = manifest = manifest.without(gone)
            needed = {copy.object for copy in (*manifest.checkpoints, *manifest.overtaken)}
            for copy in gone:
                if copy.object not in needed:
                    self.remote.remove(copy)
            self.remote.publish(manifest)

    def _copy_texts(self, manifest: Manifest) -> bool:
        """Copy log, journal and config if they changed; return whether any did.

        Do nothing while the storage has a newer checkpoint: its log is that of another machine.
        """
        began = time.monotonic()
        here = max((found.step or 0 for found in directory.list_checkpoints(self.folder)), default=0)
        if any(copy.step > here for copy in manifest.checkpoints):
            self._next_log = began + LOG_SECONDS
            return False
        changed = [path for path in self._texts if self._copy_text(path)]
        now = time.monotonic()
        least = HUB_LOG_SECONDS if self.remote.url.startswith("hf:") else LOG_SECONDS
        self._next_log = now + max(least, LOG_SHARE * (now - began))
        return bool(changed)

    def _copy_text(self, path: Path) -> bool:
        """Copy a log, journal or config; return whether it changed. A different log in the storage is kept aside."""
        try:
            if path.stat().st_size == self._text_sizes.get(path):
                return False
            ours = read_whole(path, MAX_TEXT_BYTES)
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
            if there.startswith(ours) and not self._went_back:
                return False  # the storage's goes further, on the same course
            if not ours.startswith(there):
                kept = self.remote.keep_text(path.name, there)
                say(f"mirror: {path.name} differs from the storage's copy, which is kept in {kept}")
        self.remote.put_text(path.name, ours)
        self._text_sizes[path] = len(ours)
        self._note_progress()
        return True

    def _note_unread(self, path: Path, error: OSError) -> None:
        if path not in self.unread:
            say(f"WARNING: mirror: {path} cannot be read: {error.strerror}")
            self.unread.append(path)

    def _note_progress(self) -> None:
        self.progressed = time.monotonic()
