"""A watch over progress: it ends an attempt that hangs, and a line names the rank that is behind.

A thread of each process watches the training thread. It counts only time in which it runs itself: not the time
in which the machine sleeps or the processes are stopped, and no change of the clock. When a phase lasts longer than its
limit, rank 0 asks all ranks. The ranks that have passed the fewest collectives are behind; the attempt ends if one of
them is beyond the limit of its own phase, or does not answer.
"""

from __future__ import annotations

import faulthandler
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from unbroken import console
from unbroken.config import Config
from unbroken.distributed.phases import START, STEP, VALIDATION, Phase
from unbroken.distributed.world import World, report_to_torchrun

LOOK_SECONDS = 0.5
LEAST_SECONDS, STEPS = 30.0, 10  # of --hang auto: the longer of the two
SLOW_SECONDS = 1800.0  # for the start, compilation, storage and the end; a collective fails after as much
NOTICE_SECONDS = 60.0  # until what is waited for is named, again after twice as long
ANSWER_SECONDS = 5.0
LAST_SECONDS = 2.0  # for each of: writing stacks, printing the line, leaving


class Watchdog:
    """A thread that watches the phases of this process, and on rank 0 judges those of all.

    Args:
        config: the flags; `hang` is auto, off or seconds.
        folder: of the run, where stacks are written.
        world: the ranks; the phases and connections of this one.
    """

    def __init__(self, config: Config, folder: Path, world: World) -> None:
        self._hang, self._world, self._stacks = config.hang, world, folder / f"stacks.{world.rank}.txt"
        self._seen, self._stood = world.phases.current, 0.0
        self._notice, self._look_at = NOTICE_SECONDS, 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._world.phases.enter(START)  # an attempt of this process may have ended before
        self._world.phases.forget()
        if self._world.peers:
            self._world.peers.describe, self._world.peers.on_hung = self._describe, self._end_process
        if self._hang != "off":
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._ended.wait(LOOK_SECONDS):
            now = time.monotonic()
            passed, before = min(now - before, 2 * LOOK_SECONDS), now
            phase = self._world.phases.current
            if phase is not self._seen:
                self._seen, self._stood, self._notice, self._look_at = phase, 0.0, NOTICE_SECONDS, 0.0
                continue
            self._stood += passed
            if self._stood >= self._notice and phase.what and not phase.waiting:
                of_rank = f" (rank {self._world.rank})" if self._world.size > 1 else ""
                console.print_line(f"waiting for {phase.what} since {self._stood:.0f} s{of_rank}", error=True)
                self._notice *= 2
            peers = self._world.peers
            asked = self._world.is_main and peers is not None and peers.asked.is_set()
            if asked or self._stood > max(self._limit(phase), self._look_at):
                self._look_at = self._stood + 2 * ANSWER_SECONDS
                self._judge() if self._world.is_main or not peers or not peers.connected else self._let_judge()

    def _limit(self, phase: Phase) -> float:
        """Return the seconds that a phase may last."""
        alone = self._world.size > 1 and not (self._world.peers and self._world.peers.connected)
        typical = self._world.phases.typical(phase.name)
        if phase.name not in (STEP, VALIDATION) or typical is None or (phase.waiting and alone):
            return SLOW_SECONDS
        return max(LEAST_SECONDS, STEPS * typical) if self._hang == "auto" else float(self._hang)

    def _describe(self) -> str:
        """Return what this rank is doing, for rank 0."""
        phase = self._world.phases.current
        stood = self._stood if phase is self._seen else 0.0
        return json.dumps([phase.serial, stood, self._limit(phase), str(phase)])

    def _wait(self, until: Callable[[], bool], seconds: float) -> bool:
        """Wait until `until` is true, for at most `seconds` in which this thread runs; return whether it is true."""
        for _ in range(round(seconds / 0.1)):
            if until():
                return True
            time.sleep(0.1)
        return until()

    def _let_judge(self) -> None:
        """Ask rank 0 to ask all ranks."""
        peers = self._world.peers
        assert peers is not None
        peers.asked.clear()
        peers.ask()
        if not self._wait(peers.asked.is_set, 2 * ANSWER_SECONDS) and not self._ended.is_set():
            self._end("rank 0 hangs: it does not answer")

    def _judge(self) -> None:
        """Ask all ranks what they are doing, and end the attempt if those that are behind hang."""
        answers, peers = {self._world.rank: self._describe()}, self._world.peers
        silent = set[int]()
        if peers:
            peers.asked.clear()
            peers.ask()
            self._wait(lambda: peers.connected <= set(peers.answers), ANSWER_SECONDS)
            answers |= peers.answers
            silent = peers.connected - set(peers.answers)
        if self._ended.is_set():
            return
        if silent:
            self._end(f"{_named(silent)}: no answer")
            return
        found = {rank: json.loads(answer) for rank, answer in answers.items()}
        least = min(serial for serial, *_ in found.values())
        behind = {rank: state for rank, state in found.items() if state[0] == least}
        hung = {rank: state for rank, state in behind.items() if state[1] > state[2]}
        if hung:
            _, stood, _, doing = max(hung.values(), key=lambda state: state[1])
            self._end(f"{_named(set(hung))}: {doing} for {stood:.0f} s")

    def _end(self, who: str) -> None:
        """Print the line and end all ranks."""
        line = (
            f"error: no progress of {who}; the stacks are in {self._stacks.parent}/stacks.*.txt; this attempt ends,"
            " resume from the newest checkpoint"
        )
        if self._world.peers and self._world.is_main:
            self._world.peers.end()
        _in_time(lambda: console.print_line(line, error=True))
        _in_time(lambda: report_to_torchrun(line))
        self._end_process()

    def _end_process(self) -> None:
        """Write the stacks of all threads, and end this process; rank 0, whose error torchrun reports, ends first."""
        _in_time(self._write_stacks)
        if not self._world.is_main:
            time.sleep(LAST_SECONDS)
        os._exit(1)

    def _write_stacks(self) -> None:
        with open(self._stacks, "w", encoding="utf-8") as file:
            print(
                f"rank {self._world.rank}: {self._world.phases.current} for {self._stood:.0f} s", file=file, flush=True
            )
            faulthandler.dump_traceback(file)


def _named(ranks: set[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, sorted(ranks)))}"


def _in_time(work: Callable[[], None]) -> None:
    """Run `work`, which may block for ever on a disk or a terminal, and wait for it LAST_SECONDS at most."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(LAST_SECONDS)
