"""A model of a disk, to which recorded calls are applied: what a power cut at a moment may leave.

All that a completed fsync has made durable is there, and of the rest any part. Of a file's writes since its last fsync
each is lost, kept, or torn at sectors of 512 bytes, in any order; its size is any that it had since, and what did not
arrive reads as zeros. Of the names in a folder since its last fsync any subset has changed, which POSIX permits, or
every prefix of the changes of all folders, which is what the journals of ext4 and xfs do: such a state is called
"journal". A rename between two folders never loses the file.
"""

from __future__ import annotations

import itertools
import os
import random
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.chaos.storage import Calls

HEAD = struct.Struct("=IIQQqqIIII")  # struct head of shim.c
CREATED, SYNC_BEGINS = 1 << 16, 1 << 17  # as in shim.c
MARK = 1 << 20  # written by courses.py: what it started, and how that ended
SECTOR = 512
EXHAUSTIVE = 6  # changes of names of which all subsets are tried


# ---- the record ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """A recorded call: see shim.c."""

    kind: int
    pid: int
    inode: int
    offset: int
    size: int
    path: str
    second: str
    data: bytes


def read_calls(path: Path) -> Iterator[Call]:
    """Yield the records in the order in which the calls returned."""
    with open(path, "rb") as file:
        while head := file.read(HEAD.size):
            kind, pid, inode, _, offset, size, *lengths, _ = HEAD.unpack(head)
            first, second, data = (file.read(length) for length in lengths)
            yield Call(kind, pid, inode, offset, size, first.decode(), second.decode(), data)


# ---- the disk --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Write:
    """A change of a file that is not durable: `data` at `offset`, or without data the new size `offset`."""

    number: int
    offset: int
    data: bytes | None
    size_after: int


@dataclass(eq=False)
class File:
    """A file: its durable content, and the changes since."""

    number: int
    content: bytes = b""
    version: int = 0  # of the durable content
    pending: list[Write] = field(default_factory=list)

    @property
    def size(self) -> int:
        return self.pending[-1].size_after if self.pending else len(self.content)

    def sync(self, before: int) -> None:
        """Make durable what was done before a call of this number."""
        durable = [write for write in self.pending if write.number < before]
        if durable:
            self.content = _build(self.content, durable, [-1] * len(durable), durable[-1].size_after)
            self.pending, self.version = self.pending[len(durable) :], self.version + 1

    def live(self) -> bytes:
        return _build(self.content, self.pending, [-1] * len(self.pending), self.size)


@dataclass(eq=False)
class Link:
    """A symbolic link."""

    target: str


@dataclass(eq=False)
class Folder:
    """A folder: its names as programs see them, those that are durable, and the changes between the two."""

    live: dict[str, Node] = field(default_factory=dict)
    durable: dict[str, Node] = field(default_factory=dict)
    pending: list[Change] = field(default_factory=list)


@dataclass(eq=False)
class Change:
    """A change of names in one folder, which a cut leaves whole or not at all; None: the name goes.

    `needs`: a change in another folder without which this one is never on disk.
    """

    number: int
    folder: Folder
    names: dict[str, Node | None]
    needs: Change | None = None
    durable: bool = False

    def sync(self) -> None:
        if not self.durable:
            self.durable = True
            if self.needs:
                self.needs.sync()
            _set(self.folder.durable, self.names)
            self.folder.pending = [change for change in self.folder.pending if change is not self]


Node = File | Link | Folder


def _set(names: dict[str, Node], changes: dict[str, Node | None]) -> None:
    for name, node in changes.items():
        if node is None:
            names.pop(name, None)
        else:
            names[name] = node


def _build(content: bytes, writes: Sequence[Write], masks: Sequence[int], size: int) -> bytes:
    """Return a file's content: `masks` has for each write a bit for each sector that arrives; -1 for all."""
    built = bytearray(content)

    def grow(to: int) -> None:
        built.extend(bytes(max(0, to - len(built))))

    for write, mask in zip(writes, masks, strict=True):
        if mask == 0:
            continue
        if write.data is None:
            del built[write.offset :]
            grow(write.offset)
            continue
        grow(write.offset + len(write.data))
        if mask == -1:
            built[write.offset : write.offset + len(write.data)] = write.data
            continue
        for index, start, stop in _sectors(write):
            if mask >> index & 1:
                built[start:stop] = write.data[start - write.offset : stop - write.offset]
    del built[size:]
    grow(size)
    return bytes(built)


def _sectors(write: Write) -> Iterator[tuple[int, int, int]]:
    """Yield (index, start, stop) of the parts of a write between borders of sectors of the file."""
    assert write.data is not None
    start, end, index = write.offset, write.offset + len(write.data), 0
    while start < end:
        stop = min(end, (start // SECTOR + 1) * SECTOR)
        yield index, start, stop
        start, index = stop, index + 1


class Disk:
    """A model of a disk below one folder, to which recorded calls are applied."""

    def __init__(self, root: str, base: dict[str, Any]) -> None:
        """`base`: what is there, and durable, at the beginning: of `scan`."""
        self.root, self.top = root, Folder()
        self.folders, self.number, self.journaled = [self.top], 0, 0
        self._inodes: dict[int, File] = {}
        self._files = itertools.count()
        self._begun: dict[tuple[int, str, int], list[int]] = {}  # fsyncs that have not returned
        for path, (kind, inode, value) in sorted(base.items()):
            folder, name = self._place(path)
            if kind == "file":
                node: Node = self._inodes.get(inode) or File(next(self._files), value)
                self._inodes[inode] = node  # type: ignore[assignment]
            else:
                node = Link(value) if kind == "link" else self._new_folder()
            folder.live[name] = folder.durable[name] = node

    def _new_folder(self) -> Folder:
        self.folders.append(Folder())
        return self.folders[-1]

    def relative(self, path: str) -> str:
        return os.path.relpath(os.path.normpath(path), self.root)

    def find(self, path: str) -> Node | None:
        """Return what programs see at a path relative to the root."""
        node: Node | None = self.top
        for part in () if path == "." else path.split("/"):
            node = node.live.get(part) if isinstance(node, Folder) else None
        return node

    def _place(self, path: str) -> tuple[Folder, str]:
        above, _, name = path.rpartition("/")
        folder = self.find(above or ".")
        assert isinstance(folder, Folder), f"{path}: the record lacks the folder above"
        return folder, name

    def _change(self, folder: Folder, names: dict[str, Node | None], needs: Change | None = None) -> Change:
        change = Change(self.number, folder, names, needs)
        folder.pending.append(change)
        _set(folder.live, names)
        return change

    def apply(self, call: Call) -> None:
        """Apply a record."""
        self.number += 1
        path = self.relative(call.path)
        if call.kind == CREATED:
            file = self._inodes[call.inode] = File(next(self._files))
            folder, name = self._place(path)
            self._change(folder, {name: file})
        elif call.kind == Calls.MKDIR:
            folder, name = self._place(path)
            self._change(folder, {name: self._new_folder()})
        elif call.kind == Calls.UNLINK:
            folder, name = self._place(path)
            self._change(folder, {name: None})
        elif call.kind == Calls.LINK:
            folder, name = self._place(self.relative(call.second) if call.second else path)
            self._change(folder, {name: self.find(path) if call.second else Link(call.data.decode())})
        elif call.kind == Calls.RENAME:
            self._rename(path, self.relative(call.second))
        elif call.kind in (Calls.WRITE, Calls.CUT, Calls.RESERVE):
            file = self._inodes[call.inode]
            if call.kind == Calls.WRITE:
                write = Write(self.number, call.offset, call.data, max(file.size, call.offset + len(call.data)))
            else:
                size = call.size if call.kind == Calls.CUT else max(file.size, call.offset + call.size)
                write = Write(self.number, size, None, size)
            file.pending.append(write)
        elif call.kind == SYNC_BEGINS:
            self._begun.setdefault((call.pid, path, call.inode), []).append(self.number)
        elif call.kind == Calls.SYNC:
            self._sync(path, call.inode, self._begun[call.pid, path, call.inode].pop(0))
        else:
            raise AssertionError(f"a call of kind {call.kind} is recorded")

    def _rename(self, path: str, second: str) -> None:
        (source, old), (target, new), node = self._place(path), self._place(second), self.find(path)
        assert node is not None, f"{path}: renamed, and the record does not know it"
        if target.live.get(new) is node:  # two names of one file: rename(2) does nothing
            return
        if source is target:
            self._change(source, {new: node, old: None})
        else:
            self._change(source, {old: None}, self._change(target, {new: node}))

    def _sync(self, path: str, inode: int, before: int) -> None:
        self.journaled = max(self.journaled, before)
        folder = self.find(path)
        if isinstance(folder, Folder):
            for change in [change for change in folder.pending if change.number < before]:
                change.sync()
        elif inode in self._inodes:
            self._inodes[inode].sync(before)

    def pending(self) -> list[Change]:
        """Return the changes of names that are not durable, oldest first."""
        return sorted((change for each in self.folders for change in each.pending), key=lambda change: change.number)


def scan(root: Path) -> dict[str, Any]:
    """Return what is below a folder: (kind, inode, content or target) by relative path."""
    found: dict[str, Any] = {}
    for path in sorted(root.rglob("*")):
        inode, name = path.lstat().st_ino, str(path.relative_to(root))
        if path.is_symlink():
            found[name] = ("link", inode, os.readlink(path))
        elif path.is_dir():
            found[name] = ("folder", inode, None)
        elif path.is_file():
            found[name] = ("file", inode, path.read_bytes())
    return found


# ---- what a cut may leave --------------------------------------------------------------------------------------------

Choice = tuple[tuple[int, ...], int]  # of a file: a mask for each pending write, and the size


@dataclass(eq=False)
class State:
    """A tree that a power cut may leave: nodes by path. `journal`: also ext4 and xfs may leave its names so."""

    nodes: dict[str, Node]
    choices: dict[File, Choice]
    journal: bool
    lost: str

    def key(self) -> tuple[Any, ...]:
        return tuple((path, *self.identity(node)) for path, node in sorted(self.nodes.items()))

    def identity(self, node: Node) -> tuple[Any, ...]:
        if isinstance(node, File):
            masks, size = self.choices.get(node, ((), len(node.content)))
            arrived = zip(node.pending, masks, strict=True) if masks else ()
            return node.number, node.version, tuple((write.number, mask) for write, mask in arrived if mask), size
        return (node.target,) if isinstance(node, Link) else ()

    def content(self, file: File) -> bytes:
        masks, size = self.choices.get(file, ((), len(file.content)))
        return _build(file.content, file.pending, masks, size) if masks else file.content

    def files(self, folder: str) -> dict[str, File]:
        """Return the files in a folder by name."""
        inside = {path: node for path, node in self.nodes.items() if os.path.dirname(path) == folder}
        return {os.path.basename(path): node for path, node in inside.items() if isinstance(node, File)}

    def write(self, to: Path) -> None:
        """Write the tree out into a new folder."""
        names: dict[File, Path] = {}
        to.mkdir(parents=True)
        for path, node in sorted(self.nodes.items()):
            if isinstance(node, Folder):
                (to / path).mkdir()
            elif isinstance(node, Link):
                (to / path).symlink_to(node.target)
            elif node in names:
                os.link(names[node], to / path)
            else:
                names[node] = to / path
                (to / path).write_bytes(self.content(node))


def tree(disk: Disk, chosen: set[Change] | None) -> dict[str, Node]:
    """Return the nodes by path, with the durable names and the chosen changes; with None as programs see them."""
    found: dict[str, Node] = {}

    def walk(folder: Folder, at: str) -> None:
        names = folder.live
        if chosen is not None:
            names = dict(folder.durable)
            for change in folder.pending:
                if change in chosen:
                    _set(names, change.names)
        for name, node in names.items():
            found[at + name] = node
            if isinstance(node, Folder):
                walk(node, f"{at}{name}/")

    walk(disk.top, "")
    return found


def _choose(file: File, mode: str, rng: random.Random) -> Choice:
    """Return a legal part of what is pending: `lost`, `kept`, `zeros` (sizes without data), or torn at random."""
    sizes = [len(file.content), *(write.size_after for write in file.pending)]
    if mode == "lost":
        return (0,) * len(file.pending), sizes[0]
    if mode == "kept":
        return (-1,) * len(file.pending), sizes[-1]
    if mode == "zeros":
        return tuple(-(write.data is None) for write in file.pending), sizes[-1]
    masks = []
    for write in file.pending:
        fate = rng.randrange(4)
        sectors = 0 if write.data is None else sum(1 for _ in _sectors(write))
        if fate < 2 or sectors < 2:
            masks.append(-(fate % 2))
        elif fate == 2:
            masks.append((1 << rng.randrange(1, sectors)) - 1)  # its beginning
        else:
            masks.append(rng.getrandbits(sectors))
    return tuple(masks), rng.choice(sizes)


def states(disk: Disk, budget: int, rng: random.Random) -> Iterator[State]:
    """Yield what a cut at this moment may leave: everything where that is little, else a sample. Some may be equal."""
    changes = disk.pending()
    committed = sum(change.number < disk.journaled for change in changes)
    prefixes = [tuple(changes[:count]) for count in range(len(changes) + 1)]
    if len(changes) <= EXHAUSTIVE:
        sets = [tuple(itertools.compress(changes, bits)) for bits in itertools.product((0, 1), repeat=len(changes))]
    else:
        sets = [tuple(change for change in changes if rng.random() < 0.5) for _ in range(budget)]
    modes = ("lost", "kept", "zeros", "torn", "torn", "torn")
    plan = list(itertools.product([*prefixes, *sets], modes))
    if len(plan) > budget:
        plan = rng.sample(plan, budget)
    for chosen, mode in plan:
        closed = set(chosen)
        for change in chosen:
            while change.needs is not None and not change.durable:
                change = change.needs
                closed.add(change)
        nodes = tree(disk, closed)
        files = {node for node in nodes.values() if isinstance(node, File) and node.pending}
        choices = {file: _choose(file, mode, rng) for file in sorted(files, key=lambda file: file.number)}
        journal = len(closed) >= committed and closed == set(changes[: len(closed)])
        lost = [change.names for change in changes if change not in closed]
        missing = [f"{name}{'' if node else ' (removed)'}" for names in lost for name, node in names.items()]
        yield State(nodes, choices, journal, f"names lost: {', '.join(missing) or 'none'}; data: {mode}")
