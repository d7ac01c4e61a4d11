"""The write of one checkpoint: a committed file from the host buffers of all ranks, or no file and the reason.

Four phases, each ending in an exchange, so that no rank waits for one that failed: rank 0 opens the file; each rank
checksums and writes its own slices; a rank that does not see rank 0's file (no shared filesystem) sends its slices;
rank 0 writes the remaining bytes, syncs and renames.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from unbroken.checkpoint import disk
from unbroken.checkpoint.disk import OutputFile
from unbroken.checkpoint.format import schema
from unbroken.checkpoint.format.checksum import crc32
from unbroken.checkpoint.format.zip_layout import Layout, fixed_parts, plan_layout
from unbroken.checkpoint.snapshot import HostBuffer
from unbroken.checkpoint.write_plan import Part, Write, combine_crcs, plan_writes, round_up, unwritten_blocks
from unbroken.distributed.world import World
from unbroken.errors import describe_error
from unbroken.threads import WorkerThreads

_NONCE_BYTES = 32

PartCrc = tuple[int, int, int, int]  # storage, start, size, CRC-32


@dataclass
class Contents:
    """The contents of a checkpoint on this rank, sizes in bytes. Only rank 0's `pickled` is written.

    `wait_until_copied(stop)` returns when the host buffer is filled up to `stop`, or raises the error of a copy.
    """

    pickled: bytes
    storage_sizes: list[int]
    parts: list[Part]
    wait_until_copied: Callable[[int], None]


@dataclass
class Report:
    """A report of one rank's part of a save, in plain values, which all ranks gather."""

    error: str | None = None
    sees_file: bool = True
    written: list[tuple[int, int]] = field(default_factory=list)  # (offset, size) of whole blocks
    crcs: list[PartCrc] = field(default_factory=list)
    fragments: list[tuple[int, bytes]] = field(default_factory=list)  # (offset, bytes) that fill no block


class Transaction:
    """A write of one checkpoint.

    Args:
        path: the name that the file gets when it is complete.
        contents: this rank's parts of it.
        buffer: the host buffer that holds them.
        world: the ranks, with a control group that no other thread uses.
        pool: the threads that checksum and write.
    """

    def __init__(self, path: Path, contents: Contents, buffer: HostBuffer, world: World, pool: WorkerThreads) -> None:
        self._path, self._contents, self._buffer, self._world, self._pool = path, contents, buffer, world, pool
        self._temporary = path.with_name(schema.temporary_name(path.name))
        self._file: OutputFile | None = None
        self._failed = False

    def run(self, before_commit: Callable[[list[int]], None]) -> str | None:
        """Write and commit the file; return None, or on every rank the same reason of a failure. Collective.

        `before_commit` is called on rank 0 with the CRC-32 of each storage, before the file gets its name.
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

    def _run(self, before_commit: Callable[[list[int]], None]) -> str | None:
        opened = self._world.broadcast(self._open() if self._world.is_main else None)
        if opened["error"] is not None:
            return str(opened["error"])
        layout = plan_layout(opened["pickle_size"], self._contents.storage_sizes)
        reports: list[Report] = self._world.gather(self._write_parts(layout, opened))
        for rank, report in enumerate(reports):
            if report.error is not None:
                return report.error if self._world.size == 1 else f"process {rank}: {report.error}"
        error = self._send_through_rank_0(layout, reports)
        if self._world.is_main and error is None:
            error = self._complete_and_commit(layout, reports, before_commit)
        result: str | None = self._world.broadcast(error)
        return result

    def _open(self) -> dict[str, Any]:
        """Open the temporary file on rank 0, over the blocks of a spare file if there is one, and reserve its size."""
        nonce = os.urandom(_NONCE_BYTES)
        pickle_size, storage_sizes = len(self._contents.pickled), self._contents.storage_sizes
        opened: dict[str, Any] = {
            "pickle_size": pickle_size,
            "storage_sizes": storage_sizes,
            "nonce": nonce,
            "error": None,
        }
        try:
            size = plan_layout(pickle_size, storage_sizes).size
            disk.remove(self._temporary)
            spare = self._path.with_name(schema.SPARE)
            recycled = schema.weights_step(self._path.name) is None and disk.recyclable(spare)
            if recycled:
                os.rename(spare, self._temporary)
            self._file = OutputFile(self._temporary, create=not recycled)
            self._file.reserve(round_up(size))
            if self._world.size > 1:
                self._file.write(memoryview(nonce), 0)
                self._file.sync()
        except Exception as error:
            opened["error"] = describe_error(error)
        return opened

    def _write_parts(self, layout: Layout, opened: dict[str, Any]) -> Report:
        """Checksum this rank's parts, and write them if it sees the file; return the report."""
        report = Report()
        try:
            self._contents.wait_until_copied(0)
            if opened["storage_sizes"] != self._contents.storage_sizes:
                raise ValueError("the processes hold slices of different states")
            report.sees_file = self._world.is_main or self._sees_file(opened["nonce"])
            writes = plan_writes(layout, self._contents.parts)
            for write, crcs in zip(writes, self._write_all(layout, writes, report.sees_file), strict=True):
                report.crcs += crcs
                report.written += [(write.offset, write.size)] if write.size else []
                report.fragments += [(at, bytes(self._buffer.view(place, size))) for at, size, place in write.fragments]
            if report.sees_file and not self._world.is_main and self._world.local_size != self._world.size:
                assert self._file is not None
                self._file.sync()  # rank 0's sync reaches only what was written on its own machine
        except Exception as error:
            report.error = describe_error(error)
        return report

    def _write_all(self, layout: Layout, writes: Sequence[Write], to_file: bool) -> list[list[PartCrc]]:
        """Do all writes on the pool; return the checksums of each. No write is in progress or queued afterwards."""
        jobs: list[Future[list[PartCrc]]] = []
        try:
            for write in writes:
                jobs.append(self._pool.submit(self._write, layout, write, to_file))
        except BaseException:
            self._failed = True
            raise
        finally:
            wait(jobs)
        return [job.result() for job in jobs]

    def _sees_file(self, nonce: bytes) -> bool:
        """Open the temporary file on another rank; return whether it is rank 0's, which begins with `nonce`."""
        try:
            self._file = OutputFile(self._temporary, create=False)
            return self._file.read(_NONCE_BYTES, 0) == nonce
        except OSError:
            return False

    def _write(self, layout: Layout, write: Write, to_file: bool) -> list[PartCrc]:
        """Checksum the parts, fill in the headers between them, and write the blocks. After a failure, do nothing."""
        if self._failed:
            return []
        try:
            self._contents.wait_until_copied(write.parts[-1].place + write.parts[-1].size)
            crcs, gaps = [], set(write.gaps)
            for part in write.parts:
                crc = crc32(self._buffer.view(part.place, part.size))
                crcs.append((part.storage, part.start, part.size, crc))
                if part.storage in gaps:
                    gap = layout.gap(part.storage, crc)
                    self._buffer.view(part.place + part.size, len(gap))[:] = gap
            if to_file and write.size:
                assert self._file is not None
                self._file.write(self._buffer.view(write.place, write.size), write.offset)
            return crcs
        except BaseException:
            self._failed = True
            raise

    def _send_through_rank_0(self, layout: Layout, reports: Sequence[Report]) -> str | None:
        """Send the parts of ranks that do not see the file to rank 0, which writes them; return its error.

        After an error rank 0 receives the rest and drops it, because the senders are already sending.
        """
        senders = [rank for rank, report in enumerate(reports) if not report.sees_file]
        if self._world.rank in senders:
            for write in plan_writes(layout, self._contents.parts):
                if write.size:
                    dist.send(self._buffer.tensor(write.place, write.size), dst=0, group=self._world.control)
        if not senders or not self._world.is_main:
            return None
        assert self._file is not None
        # From the reports, because the headers between small storages can make a write larger than CHUNK.
        buffer = disk.warm_memory(max((size for rank in senders for _, size in reports[rank].written), default=0))
        error = None
        for rank in senders:
            for offset, size in reports[rank].written:
                received = torch.frombuffer(buffer, dtype=torch.uint8, count=size)
                dist.recv(received, src=rank, group=self._world.control)
                try:
                    if error is None:
                        self._file.write(memoryview(buffer)[:size], offset)
                except OSError as caught:
                    error = describe_error(caught)
        return error

    def _complete_and_commit(
        self, layout: Layout, reports: Sequence[Report], before_commit: Callable[[list[int]], None]
    ) -> str | None:
        """Write the blocks that no rank has written, then commit. On rank 0."""
        assert self._file is not None
        try:
            crcs = combine_crcs(self._contents.storage_sizes, [crc for report in reports for crc in report.crcs])
            fragments = [fragment for report in reports for fragment in report.fragments]
            fixed = list(fixed_parts(layout, self._contents.pickled, crcs))
            known = [*fixed, *fragments]
            written = [block for report in reports for block in report.written]
            for offset, content in unwritten_blocks(layout.size, written, known):
                self._file.write(memoryview(disk.aligned(content)), offset)
            self._file.sync(layout.size)
            self._file.check(layout.size, [fixed[0], fixed[-1]])  # the pickle and the directory
            before_commit(crcs)
            disk.commit(self._temporary, self._path)
        except Exception as error:
            return describe_error(error)
        return None
