"""One checkpoint from the host buffers of all ranks to a committed file, or to nothing and one line with the reason.

Four phases, each ending in an exchange, so that no rank waits for one that failed: rank 0 opens the file; each rank
checksums and writes its own slices; a rank that does not see rank 0's file (no shared filesystem) sends its slices;
rank 0 writes what is left, syncs and renames.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from unbroken.checkpoint import disk
from unbroken.checkpoint.disk import OutputFile
from unbroken.checkpoint.format import schema, zip_layout
from unbroken.checkpoint.format.checksum import crc32
from unbroken.checkpoint.format.zip_layout import Layout, descriptor, fixed_parts, local_header, plan_layout
from unbroken.checkpoint.snapshot import HostBuffer
from unbroken.checkpoint.write_plan import Part, Write, combine_crcs, plan_writes, unwritten_blocks
from unbroken.distributed.world import World
from unbroken.errors import describe_error

_NONCE_BYTES = 32


@dataclass
class Contents:
    """The contents of a checkpoint on this rank.

    The pickle (that of rank 0 is written), the sizes of all storages, and the parts that this rank holds. `ready`
    returns when the host buffer is filled up to a place, and raises if it never will be.
    """

    pickled: bytes
    sizes: list[int]
    held: list[Part]
    ready: Callable[[int], None]  # returns when the arena is filled up to a place; raises if it will never be


@dataclass
class Report:
    """A report of one rank's part of the save: plain values, which travel to the other ranks."""

    error: str | None = None
    sees_file: bool = True
    written: list[tuple[int, int]] = field(default_factory=list)
    checked: list[tuple[int, int, int, int]] = field(default_factory=list)
    fragments: list[tuple[int, bytes]] = field(default_factory=list)


class Transaction:
    """A write of `contents` to `path`.

    It runs on a background thread, so `world` must have a control group of its own.
    """

    def __init__(
        self, path: Path, contents: Contents, arena: HostBuffer, world: World, pool: ThreadPoolExecutor
    ) -> None:
        self._path, self._contents, self._arena, self._world, self._pool = path, contents, arena, world, pool
        self._temporary = path.with_name(schema.temporary_name(path.name))
        self._file: OutputFile | None = None
        self._failed = False

    def run(self, before_commit: Callable[[], None] | None) -> str | None:
        """Write and commit the file.

        Return None, or the reason why there is none, the same on every rank. Collective.
        """
        try:
            error = self._run(before_commit)
        except Exception as caught:
            error = describe_error(caught)
        if self._file is not None:
            self._file.close()
        if error is not None and self._world.is_main:
            disk.remove(self._temporary)
        return error

    def _run(self, before_commit: Callable[[], None] | None) -> str | None:
        opened = self._world.broadcast(self._open() if self._world.is_main else None)
        if opened["error"] is not None:
            return str(opened["error"])
        layout = plan_layout(opened["pickle"], self._contents.sizes)
        own = self._write_own(layout, opened)
        reports: list[Report] = self._world.gather(own)
        for rank, report in enumerate(reports):
            if report.error is not None:
                return report.error if self._world.size == 1 else f"process {rank}: {report.error}"
        error = self._deliver(layout, reports)
        if self._world.is_main and error is None:
            error = self._finish(layout, reports, before_commit)
        verdict: str | None = self._world.broadcast(error)
        return verdict

    def _digest(self) -> list[int]:
        """Return a digest of the layout.

        Ranks with different ones disagree about the state, which is an error of ours.
        """
        return [
            len(self._contents.sizes),
            sum(self._contents.sizes),
            crc32(repr(self._contents.sizes).encode()),
        ]

    def _open(self) -> dict[str, Any]:
        """Open the temporary file on rank 0.

        It reuses the blocks of a spare file if there is one, and reserves room for everything.
        """
        nonce = os.urandom(_NONCE_BYTES)
        said = {
            "pickle": len(self._contents.pickled),
            "digest": self._digest(),
            "nonce": nonce,
            "error": None,
        }
        try:
            size = plan_layout(len(self._contents.pickled), self._contents.sizes).size
            disk.remove(self._temporary)
            spare = self._path.with_name(schema.SPARE)
            recycled = disk.recyclable(spare)
            if recycled:
                os.rename(spare, self._temporary)
            self._file = OutputFile(self._temporary, create=not recycled)
            self._file.reserve(-(-size // zip_layout.BLOCK) * zip_layout.BLOCK)
            if self._world.size > 1:
                self._file.write(memoryview(nonce), 0)
                self._file.sync()
        except Exception as error:
            said["error"] = describe_error(error)
        return said

    def _sees(self, nonce: bytes) -> bool:
        """Return whether this path leads to rank 0's file on other ranks: it begins with rank 0's random bytes."""
        try:
            self._file = OutputFile(self._temporary, create=False)
            return self._file.read(_NONCE_BYTES, 0) == nonce
        except OSError:
            return False

    def _write_own(self, layout: Layout, opened: dict[str, Any]) -> Report:
        report = Report()
        try:
            self._contents.ready(0)
            if opened["digest"] != self._digest():
                raise ValueError("the processes hold slices of different states")
            report.sees_file = self._world.is_main or self._sees(opened["nonce"])
            writes = plan_writes(layout, self._contents.held)
            for write, checked in zip(writes, self._in_parallel(layout, writes, report.sees_file), strict=True):
                report.checked += checked
                report.written += [(write.offset, write.size)] if write.size else []
                report.fragments += [(at, bytes(self._arena.view(place, size))) for at, size, place in write.fragments]
            if report.sees_file and not self._world.is_main and self._world.local_size != self._world.size:
                assert self._file is not None
                self._file.sync()  # rank 0's sync reaches only what was written on its own machine
        except Exception as error:
            report.error = describe_error(error)
        return report

    def _in_parallel(
        self, layout: Layout, writes: Sequence[Write], to_file: bool
    ) -> list[list[tuple[int, int, int, int]]]:
        """Do all writes. If one fails, the rest is not begun, and no write is in progress on return."""
        jobs: list[Future[list[tuple[int, int, int, int]]]]
        jobs = [self._pool.submit(self._do, layout, write, to_file) for write in writes]
        wait(jobs)
        return [job.result() for job in jobs]

    def _do(self, layout: Layout, write: Write, to_file: bool) -> list[tuple[int, int, int, int]]:
        if self._failed:
            return []
        try:
            self._contents.ready(write.parts[-1].place + write.parts[-1].size)
            checked = []
            gaps = set(write.gaps)
            for part in write.parts:
                crc = crc32(self._arena.view(part.place, part.size))
                checked.append((part.storage, part.start, part.size, crc))
                if part.storage in gaps:
                    filled = descriptor(layout.storages[part.storage], crc) + local_header(
                        layout.storages[part.storage + 1]
                    )
                    self._arena.view(part.place + part.size, len(filled))[:] = filled
            if to_file and write.size:
                assert self._file is not None
                self._file.write(self._arena.view(write.place, write.size), write.offset)
            return checked
        except BaseException:
            self._failed = True
            raise

    def _deliver(self, layout: Layout, reports: Sequence[Report]) -> str | None:
        """Send the slices of ranks that do not see the file through rank 0.

        If its disk fails, the rest is received and dropped.
        """
        blind = [rank for rank, report in enumerate(reports) if not report.sees_file]
        if self._world.rank in blind:
            for write in plan_writes(layout, self._contents.held):
                if write.size:
                    dist.send(self._arena.tensor(write.place, write.size), dst=0, group=self._world.control)
        if not blind or not self._world.is_main:
            return None
        assert self._file is not None
        # From the reports, because the headers between small storages can make a write larger than CHUNK.
        buffer = disk.warm_memory(max((size for rank in blind for _, size in reports[rank].written), default=0))
        error = None
        for rank in blind:
            for offset, size in reports[rank].written:
                dist.recv(
                    torch.frombuffer(buffer, dtype=torch.uint8, count=size),
                    src=rank,
                    group=self._world.control,
                )
                try:
                    if error is None:
                        self._file.write(memoryview(buffer)[:size], offset)
                except OSError as caught:
                    error = describe_error(caught)
        return error

    def _finish(
        self, layout: Layout, reports: Sequence[Report], before_commit: Callable[[], None] | None
    ) -> str | None:
        """Write the blocks that no rank has written, then commit. On rank 0."""
        assert self._file is not None
        try:
            crcs = combine_crcs(
                len(self._contents.sizes), self._contents.sizes, [part for r in reports for part in r.checked]
            )
            known = [
                *fixed_parts(layout, self._contents.pickled, crcs),
                *(piece for r in reports for piece in r.fragments),
            ]
            written = [block for report in reports for block in report.written]
            for offset, content in unwritten_blocks(layout.size, written, known):
                scratch = memoryview(disk.aligned(content))
                self._file.write(scratch, offset)
            self._file.sync(layout.size)
            if before_commit is not None:
                before_commit()
            disk.commit(self._temporary, self._path)
        except Exception as error:
            return describe_error(error)
        return None
