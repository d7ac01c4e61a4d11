"""Real filesystems that lose their power under a training: ext4 and xfs in a file, on a loop device; only as root."""

from __future__ import annotations

import fcntl
import os
import random
import re
import shutil
import struct
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from tests.chaos.checks import Checker, Outcome, Witness, resume
from tests.chaos.courses import Course, Phase, auto, refer
from tests.chaos.crash_model import Disk, State, scan, tree
from tests.harness import PACED, launch, write_corpus
from unbroken.checkpoint.format import schema

SHUTDOWN, WITHOUT_LOG = 0x8004587D, 2  # FS_IOC_SHUTDOWN: from now on nothing reaches the device, as after a power cut
IMAGE_BYTES = 512 << 20
KINDS = {"ext4": ["-q", "-F"], "xfs": ["-q", "-f"]}


class Image:
    """A filesystem in a file, mounted while the `with` statement lasts; only root may."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.file, self.mounted_at = kind, folder / f"{kind}.img", folder / kind
        self.mounted_at.mkdir(parents=True)
        with open(self.file, "wb") as file:
            file.truncate(IMAGE_BYTES)
        _command(f"mkfs.{kind}", *KINDS[kind], str(self.file))

    def __enter__(self) -> Image:
        self._mount()
        return self

    def __exit__(self, *error: object) -> None:
        _command("umount", str(self.mounted_at))

    def _mount(self) -> None:
        _command("mount", "-o", "loop", str(self.file), str(self.mounted_at))

    def shut_down(self) -> None:
        """Let nothing more reach the image: neither what is in memory nor the journal's last part."""
        folder = os.open(self.mounted_at, os.O_RDONLY)
        try:
            fcntl.ioctl(folder, SHUTDOWN, struct.pack("i", WITHOUT_LOG))
        finally:
            os.close(folder)

    def start_again(self) -> None:
        """Mount it anew, with what the journal brings back."""
        self.__exit__()
        self._mount()

    def copy_frozen(self, folder: Path) -> None:
        """Copy the image of this moment, and what is in it into a folder."""
        mounted_at, copied = folder.with_suffix(".mnt"), folder.with_suffix(".img")
        _command("fsfreeze", "-f", str(self.mounted_at))
        try:
            _command("cp", "--sparse=always", str(self.file), str(copied))
        finally:
            _command("fsfreeze", "-u", str(self.mounted_at))
        mounted_at.mkdir()
        _command("mount", "-o", "loop" + ",nouuid" * (self.kind == "xfs"), str(copied), str(mounted_at))
        try:
            shutil.copytree(mounted_at / "run", folder, symlinks=True)
        finally:
            _command("umount", str(mounted_at))
        copied.unlink()


def _command(*typed: str) -> None:
    done = subprocess.run(typed, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(typed)}: {done.stderr.strip()}")


def cut_image(kind: str, folder: Path, cuts: int, seed: str, script: Path | None = None) -> Outcome:
    """Cut the power of a filesystem under a training again and again; check and resume what it leaves each time.

    The training is started again in what is left, until its end, and then anew. Between two cuts the image is copied
    once while it is frozen, checked, and sometimes resumed. `script`: in place of the program, until a cut.
    """
    flags = {"num_iterations": 40, "save_every": 2, "keep_last": 2, "val_loss_every": 4, "keep_best": 1}
    course = Course(f"{kind}, real cuts", [Phase(auto({**flags, "save_weights_every": 6, "name": "probe"}))], [[]])
    reference, rng = refer(course, folder / "reference"), random.Random(f"{seed}/{kind}")
    outcome = Outcome(course.name)

    def look(root: Path, reported: int, cut: int) -> None:
        disk = Disk(str(root), scan(root))
        state, witness = State(tree(disk, None), {}, True, "real"), Witness(course, disk, 0, reported)
        outcome.states += 1
        for said in Checker(course, reference, folder / "scratch").check(state, witness, {}):
            outcome.add(said, cut, state)

    def end(root: Path, cut: int) -> None:
        outcome.resumed += 1
        state = State({}, {}, True, "real")
        for said in resume(course, 0, root, reference):
            outcome.add(f"resumed: {said}", cut, state)

    with Image(kind, folder) as image:
        root = image.mounted_at / "run"
        while outcome.cuts < cuts:
            shutil.rmtree(root, ignore_errors=True)
            root.mkdir()
            write_corpus(root)
            os.sync()
            ended = False
            while not ended and outcome.cuts < cuts:
                running = launch(root, course.phases[0].typed, None, script=script or PACED, env={"PACE": "0.05"})
                lines: list[str] = []
                assert running.process.stdout is not None
                reader = threading.Thread(target=lines.extend, args=(running.process.stdout,))
                reader.start()
                time.sleep(rng.uniform(0.3, 4.0))
                frozen = folder / f"frozen-{outcome.cuts}"
                before = _newest_reported(lines)
                image.copy_frozen(frozen)
                look(frozen, before, outcome.cuts)
                if rng.random() < 0.3:
                    end(frozen, outcome.cuts)
                shutil.rmtree(frozen)
                if rng.random() < 0.5:
                    time.sleep(rng.uniform(0.0, 0.5))
                else:  # at the moment at which a checkpoint is said to be saved
                    deadline, count = time.monotonic() + 3, _newest_reported(lines)
                    while _newest_reported(lines) == count and time.monotonic() < deadline:
                        time.sleep(0.0005)
                before = _newest_reported(lines)
                image.shut_down()
                running.kill()
                running.process.wait()
                reader.join()
                image.start_again()
                outcome.cuts += 1
                look(root, before, outcome.cuts)
                ended = (root / course.home / schema.FINAL).exists()
            end(root, outcome.cuts)
    return outcome


def _newest_reported(lines: Sequence[str]) -> int:
    """Return the step of the last checkpoint that the program has said to be saved; -1 for none."""
    return max((int(step) for step in re.findall(r"saved \S*/model_step(\d+)\.pt", "".join(lines))), default=-1)
