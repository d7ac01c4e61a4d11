"""What must be true of every tree that a power cut leaves, and of the run that is resumed in it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from tests.chaos.courses import MIRROR, Course, Reference, final_bits, history
from tests.chaos.crash_model import MARK, Call, Disk, File, Link, Node, State, tree
from tests.chaos.storage import Calls
from tests.harness import launch
from unbroken.checkpoint import directory, rewind
from unbroken.checkpoint.format import schema
from unbroken.errors import UserError
from unbroken.metrics.logfile import events
from unbroken.metrics.record import read_record
from unbroken.mirror.store import MANIFEST, Manifest, checksum_of
from unbroken.paths import JOURNAL


@dataclass
class Violation:
    """A broken promise, and the first cut that breaks it."""

    said: str
    cut: int
    lost: str
    journal: bool
    times: int = 1
    place: Path = Path()  # of the recording


@dataclass
class Outcome:
    """What the replay of one recording has found."""

    course: str
    calls: int = 0
    cuts: int = 0
    states: int = 0
    resumed: int = 0
    violations: dict[str, Violation] = field(default_factory=dict)

    def add(self, said: str, cut: int, state: State) -> None:
        kind = said.partition(" (")[0]
        known = self.violations.setdefault(kind, Violation(said, cut, state.lost, state.journal, 0))
        known.times, known.journal = known.times + 1, known.journal or state.journal

    def include(self, other: Outcome, place: Path | None = None) -> None:
        """Add the counts and violations of another recording, which is kept in `place`."""
        self.calls, self.cuts = self.calls + other.calls, self.cuts + other.cuts
        self.states, self.resumed = self.states + other.states, self.resumed + other.resumed
        for said, violation in other.violations.items():
            violation.place = place or violation.place
            self.violations.setdefault(said, violation)


@dataclass
class Witness:
    """What the program has said up to a moment: which checkpoints are saved, and in which phase it is.

    `newest`: the step of the newest one of its course; `final`: the `final.pt` that it has announced.
    """

    course: Course
    disk: Disk
    phase: int = -1
    newest: int = -1
    reported: set[File] = field(default_factory=set)
    final: File | None = None

    def see(self, call: Call) -> None:
        """Note what a call tells, after it was applied."""
        if call.kind == MARK:
            about = json.loads(call.path)
            if about.get("phase", self.phase) != self.phase:
                self.phase = about["phase"]
                back_to = self.course.phases[self.phase].back_to
                self.newest = self.newest if back_to is None else min(self.newest, back_to)
            if about.get("ended") == 0:
                self._report(schema.FINAL, self.newest)
        elif call.kind == Calls.WRITE and call.path.endswith(JOURNAL):
            for line in call.data.splitlines():
                if b'"event": "saved"' in line:
                    said = json.loads(line)
                    self._report(said["file"], said["step"])
        elif call.kind == Calls.WRITE and call.path.endswith("/committed"):
            self._report(schema.checkpoint_name(int(call.data)), int(call.data))

    def _report(self, name: str, step: int) -> None:
        node = self.disk.find(f"{self.course.home}/{name}")
        self.newest = max(self.newest, step)
        if isinstance(node, File):
            self.reported.add(node)
            self.final = node if name == schema.FINAL else self.final

    def kept(self) -> dict[File, str]:
        """Return the reported checkpoints that programs still see. What was given up becomes another one."""
        found = {
            node: path
            for path, node in tree(self.disk, None).items()
            if isinstance(node, File) and node in self.reported and is_whole(os.path.basename(path))
        }
        self.reported = set(found)
        if self.disk.find(f"{self.course.home}/{schema.FINAL}") is not self.final:
            self.final = None  # it was set aside, or another one is there
        return found


def is_whole(name: str) -> bool:
    return schema.is_checkpoint_name(name) or schema.weights_step(name) is not None


class Checker:
    """The promises, checked for one state after the other; equal files are read once."""

    def __init__(self, course: Course, reference: Reference, folder: Path) -> None:
        self._course, self._reference, self._scratch = course, reference, folder
        folder.mkdir(parents=True, exist_ok=True)
        self._known: dict[tuple[Any, ...], Any] = {}

    def _read(self, state: State, node: File, name: str, reader: Callable[[Path], Any]) -> Any:
        key = (name, *state.identity(node))
        if key not in self._known:
            path = self._scratch / name
            path.write_bytes(state.content(node))
            self._known[key] = reader(path)
        return self._known[key]

    def check(self, state: State, witness: Witness, kept: dict[File, str]) -> list[str]:
        """Return a line for each promise that the state breaks, each as `kind (about this one)`."""
        found, home = list[str](), self._course.home
        folders: dict[str, dict[str, Node]] = {}
        for path, node in state.nodes.items():
            above, _, name = path.rpartition("/")
            folders.setdefault(above, {})[name] = node
        steps, whole = list[int](), set[File]()
        asides = [at for at in folders if os.path.dirname(at) == home and rewind.is_aside(os.path.basename(at))]
        for at in (home, *asides):
            for name, node in folders.get(at, {}).items():
                if not isinstance(node, File) or not is_whole(name):
                    continue
                step, damage = self._read(state, node, name, verified)
                if damage:
                    found.append(f"a file with the name of a whole one is not ({at}/{name}: {damage})")
                    continue
                whole.add(node)
                if at == home and schema.is_checkpoint_name(name):
                    steps.append(step)
        newest = max(steps, default=-1)
        if newest < witness.newest:
            found.append(f"what was saved is gone (step {witness.newest}, and the newest is of step {newest})")
        for node, path in kept.items():
            if node not in whole:
                found.append(f"a checkpoint was saved and not removed, and is gone ({path})")
        if witness.final in kept and state.nodes.get(f"{home}/{schema.FINAL}") is not witness.final:
            found.append(f"{schema.FINAL} was announced, and is another or none")
        best, back_to = state.nodes.get(f"{home}/{schema.BEST}"), self._course.phases[witness.phase].back_to
        # Going back sets aside what it leads to, and mends it at the end of the start.
        if isinstance(best, Link) and back_to is None and state.nodes.get(f"{home}/{best.target}") not in whole:
            found.append(f"{schema.BEST} leads nowhere ({best.target})")
        mirror = f"{MIRROR}/{os.path.basename(home)}"
        manifest = state.nodes.get(f"{mirror}/{MANIFEST}")
        if isinstance(manifest, File):
            listed = Manifest.parse(state.content(manifest))
            for copy in (*listed.checkpoints, *listed.overtaken, *listed.weights):
                node = state.nodes.get(f"{mirror}/{copy.object}")
                if not isinstance(node, File) or self._read(state, node, "copy", _checksum) != (copy.size, copy.crc32):
                    found.append(f"the mirror has not what its manifest says ({copy.object})")
        if self._course.log:
            found += self._check_texts(state, witness, newest, folders.get(home, {}))
        return found

    def _check_texts(self, state: State, witness: Witness, newest: int, names: dict[str, Node]) -> list[str]:
        """Check log, journal and the small files."""
        found, reference = list[str](), self._reference
        logged, losses = {}, {}
        log = state.nodes.get(self._course.log)
        if isinstance(log, File):
            logged = self._read(state, log, "log", _read_log)
        journal = state.nodes.get(str(Path(self._course.log).with_suffix(JOURNAL)))
        if isinstance(journal, File):
            losses = self._read(state, journal, "journal", lambda path: read_record(path).losses)
        for event, lines in reference.lines.items():
            if event[1] <= newest and event not in logged:
                found.append(f"the log lacks a step ({event}, and the newest checkpoint is of step {newest})")
            if event in logged and not logged[event] <= lines:
                found.append(f"the log has a false line ({logged[event] - lines})")
        allowed = reference.losses[: witness.phase + 1]
        back_to = self._course.phases[witness.phase].back_to  # its start supersedes what the journal has after that
        newest = newest if back_to is None else min(newest, back_to)
        for event in allowed[-1] if allowed else ():
            if event[1] <= newest and event not in losses:
                found.append(f"the journal lacks a step ({event}, and the newest checkpoint is of step {newest})")
            if event in losses and all(losses[event] != each.get(event) for each in allowed):
                found.append(f"the journal has a false loss ({event})")
        readers: dict[str, Callable[[Path], Any]] = {
            rewind.REWINDS: lambda path: rewind.parse_rewinds(json.loads(path.read_bytes())),
            ".attempt": lambda path: json.loads(path.read_bytes())["agents"],
            "config.yaml": lambda path: yaml.safe_load(path.read_text())["model"],
            "saved": lambda path: {True: 0}[schema.is_checkpoint_name(path.read_text().removesuffix("\n"))],
        }
        for name, reader in readers.items():
            node = names.get(name)
            if isinstance(node, File) and not self._read(state, node, name, partial(_parses, reader)):
                found.append(f"{name} makes no sense ({state.content(node)[:80]!r})")
        link = f"{os.path.dirname(self._course.home)}/by-name/{self._course.name_link}"
        if self._course.name_link and witness.newest > 0 and not isinstance(state.nodes.get(link), Link):
            found.append("the run's name leads nowhere")
        return found


def verified(path: Path) -> tuple[int, str]:
    """Return the step of a checkpoint, and its damage or ""."""
    try:
        with directory.open_file(path) as file:
            damages, step = file.verify(), file.values.get("step")
    except UserError as error:
        return -1, str(error).removeprefix(f"{path}: ")
    named = schema.checkpoint_step(path.name)
    if type(step) is not int or named not in (None, step):
        return -1, f"it is of step {step}"
    return step, damages[0] if damages else ""


def _checksum(path: Path) -> tuple[int, int]:
    return path.stat().st_size, checksum_of(path, lambda: None)


def _read_log(path: Path) -> dict[tuple[str, int], set[str]]:
    found: dict[tuple[str, int], set[str]] = {}
    for kind, step, line in events(path):
        if kind != "#":
            found.setdefault((kind, step), set()).add(line)
    return found


def _parses(reader: Callable[[Path], Any], path: Path) -> bool:
    try:
        reader(path)
    except (ValueError, TypeError, KeyError, yaml.YAMLError):
        return False
    return True


def resume(course: Course, phase: int, folder: Path, reference: Reference) -> list[str]:
    """Run the command of a phase in a tree that a cut left, to its end; return a line for each broken promise."""
    again = course.phases[phase]
    done = launch(folder, command_again(course, phase, folder), again.processes, script=again.script).wait()
    return [done.text] if done.code else examine(course, phase, folder, reference)


def command_again(course: Course, phase: int, folder: Path) -> list[str]:
    """Return the command that a job's script types after a cut."""
    typed, back_to = course.phases[phase].typed_in(folder), course.phases[phase].back_to
    if back_to is not None and not (folder / course.home / schema.checkpoint_name(back_to)).exists():
        typed[typed.index("--resume_from") + 1] = "auto"
    return typed


def examine(course: Course, phase: int, folder: Path, reference: Reference) -> list[str]:
    """Compare what a resumed phase has left with the run that was never cut."""
    found, home = list[str](), folder / course.home
    if final_bits(course, folder) != reference.finals[phase]:
        found.append("the end has other bits")
    for path in home.iterdir():
        if path.name.endswith(".tmp"):
            found.append(f"a file is left over ({path.name})")
        elif is_whole(path.name) and (damage := verified(path)[1]):
            found.append(f"a file is damaged ({path.name}: {damage})")
    if course.log:
        losses, logged = history(course, folder)
        if logged != reference.logged[phase]:
            found.append(f"the log differs ({set(logged.items()) ^ set(reference.logged[phase].items())}"[:300])
        if losses != reference.losses[phase]:
            found.append(f"the journal differs ({set(losses.items()) ^ set(reference.losses[phase].items())}"[:300])
        for text in (folder / course.log, (folder / course.log).with_suffix(JOURNAL)):
            if b"\0" in text.read_bytes():
                found.append(f"zeros are left over ({text.name})")
    return found
