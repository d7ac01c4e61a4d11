"""A watch over the other ranks: when one of them dies or is stopped, this process ends within seconds.

Without the watch a rank that waits in a collective for a dead one would wait for minutes: gloo notices a closed
connection, NCCL does not, and neither notices a stopped process. The step in progress cannot be completed or saved any
more, so ending loses nothing: the next attempt resumes from the newest checkpoint.

Rank 0 holds one connection to every other rank. A rank that leaves in order says so first; a connection that closes
without that is a death, which rank 0 passes on to the others. A process of this machine that is stopped (SIGSTOP) for
STOPPED_SECONDS is killed, and is then a death like any other. Stopping all ranks at once does no harm: a stopped watch
counts no time.

Over the same connections the ranks ask each other what they are doing (`run/watchdog.py`).
"""

from __future__ import annotations

import os
import secrets
import selectors
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from unbroken import console
from unbroken.host import hostname, process_stat

LOOK_SECONDS = 0.5  # between two looks at the state of the other processes of this machine
STOPPED_SECONDS = 3.0
CONNECT_SECONDS = 60.0
FAILED_SECONDS = 2.0  # in which the watch finds the dead rank that made a collective fail
LEAVING, ASKING, BEHIND, ENDING = b"leaving\n", b"where\n", b"behind\n", b"hung\n"
_KEY = "unbroken/watch"  # in the store: rank 0's address, and each rank's process

Report = Callable[[str], None]


@contextmanager
def watch_peers(store: Any, rank: int, size: int, report: Report) -> Iterator[Peers]:
    """Watch the other ranks while the body runs. Collective; every rank must enter it with the same `store`.

    Args:
        store: a torch.distributed store that only the processes of this attempt use.
        rank: this process's rank.
        size: the number of ranks.
        report: is given the one line that names the dead rank, on the rank that prints it.

    Only an orderly end of the body, or an exception with `on_all_ranks`, counts as leaving in order.
    """
    connections = _connect(store, rank, size)
    watch = Peers(connections, rank, _processes(store, rank, size), report)
    thread = threading.Thread(target=watch.run, name="peer-watch", daemon=True)
    thread.start()
    try:
        yield watch
    except BaseException as error:
        if getattr(error, "on_all_ranks", False):
            watch.leave()
        raise
    watch.leave()


def _connect(store: Any, rank: int, size: int) -> dict[int, socket.socket]:
    """Return this rank's connections by rank: to all others on rank 0, to rank 0 elsewhere.

    A network that allows no such connection costs the watch, not the run.
    """
    connections = dict[int, socket.socket]()
    try:
        _open_connections(store, rank, size, connections)
    except OSError as error:
        for connection in connections.values():
            with suppress(OSError):
                connection.sendall(LEAVING)
        line = f"WARNING: rank {rank} has no connection to watch the other ranks ({error}): a death is noticed late"
        console.print_line(line, error=True)
        return {}
    return connections


def _open_connections(store: Any, rank: int, size: int, connections: dict[int, socket.socket]) -> None:
    if rank:
        host, port, token = store.get(_KEY).decode().split()
        connection = socket.create_connection((host, int(port)), CONNECT_SECONDS)
        connection.sendall(f"{token} {rank:08d}\n".encode())
        connection.settimeout(None)
        connections[0] = connection
        return
    token = secrets.token_hex(16)
    with socket.create_server(("", 0), backlog=size) as server:
        server.settimeout(CONNECT_SECONDS)
        store.set(_KEY, f"{_own_address()} {server.getsockname()[1]} {token}")
        while len(connections) < size - 1:
            connection, _ = server.accept()
            connection.settimeout(CONNECT_SECONDS)
            greeting = _read_exactly(connection, len(token) + 10).decode("ascii", "replace")
            if not secrets.compare_digest(greeting[: len(token)], token):
                connection.close()  # a stranger
                continue
            connection.settimeout(None)
            connections[int(greeting[len(token) :])] = connection


def _own_address() -> str:
    """Return the address of this machine by which it reaches the store, and so the other ranks reach it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((os.environ.get("MASTER_ADDR", "127.0.0.1"), 9))  # sends nothing
            return str(probe.getsockname()[0])
        except OSError:
            return hostname()


def _read_exactly(connection: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size and (more := connection.recv(size - len(found))):
        found += more
    return found


def _processes(store: Any, rank: int, size: int) -> dict[int, int]:
    """Return the pid of every other rank on this machine."""
    store.set(f"{_KEY}/{rank}", f"{os.getpid()} {hostname()}")
    said = {other: store.get(f"{_KEY}/{other}").decode().partition(" ") for other in range(size) if other != rank}
    return {other: int(pid) for other, (pid, _, host) in said.items() if host == hostname()}


class Peers:
    """The connections of one rank to the others, whose thread reads them and looks at the processes of its machine.

    `describe` returns what this rank is doing, for the one that asks; `on_hung` ends this process when the ranks hang.
    Both are called on that thread. `asked` is set when another rank has asked, or wants rank 0 to ask.

    Args:
        connections: by rank; to all other ranks on rank 0, to rank 0 elsewhere.
        rank: this process's rank.
        processes: pid of each other rank on this machine.
        report: is given the line that names a dead rank.
    """

    def __init__(
        self, connections: dict[int, socket.socket], rank: int, processes: dict[int, int], report: Report
    ) -> None:
        self._connections, self._rank, self._processes, self._report = connections, rank, processes, report
        self._left: set[int] = set()
        self._stopped: dict[int, float] = {}
        self._unread: dict[int, bytes] = {}
        self._leaving = False
        self.describe: Callable[[], str] = str
        self.on_hung: Callable[[], None] = lambda: None
        self.asked = threading.Event()
        self.answers = dict[int, str]()

    @property
    def connected(self) -> set[int]:
        """Return the ranks that this one can ask."""
        return set(self._connections) - self._left

    def ask(self) -> None:
        """Ask the other ranks what they do. Rank 0 gets `answers` a moment later; another rank makes rank 0 ask."""
        self.answers.clear()
        self._send(ASKING if self._rank == 0 else BEHIND)

    def end(self) -> None:
        """Make all other ranks end, because the ranks hang; for rank 0."""
        self._leaving = True
        self._send(ENDING)

    def _send(self, message: bytes) -> None:
        for connection in self._connections.values():
            with suppress(OSError):
                connection.sendall(message)

    def leave(self) -> None:
        """Tell the other ranks that this one leaves in order."""
        self._leaving = True
        self._send(LEAVING)

    def fail(self, error: BaseException) -> None:
        """Tell the other ranks that this one fails, unless all do."""
        if getattr(error, "on_all_ranks", False):
            return
        if isinstance(error, RuntimeError):  # of a collective, perhaps: then the watch ends this process meanwhile
            time.sleep(FAILED_SECONDS)
        self._leaving = True
        for connection in self._connections.values():
            with suppress(OSError):
                connection.shutdown(socket.SHUT_WR)

    def run(self) -> None:
        """Watch until the process ends."""
        with selectors.DefaultSelector() as selector:
            for rank, connection in self._connections.items():
                selector.register(connection, selectors.EVENT_READ, rank)
            before = time.monotonic()
            while True:
                for key, _ in selector.select(LOOK_SECONDS):
                    if not self._read(key.data):
                        selector.unregister(key.fileobj)
                now = time.monotonic()
                self._look_for_stopped(now - before)
                before = now

    def _read(self, rank: int) -> bool:
        """Read what a rank has sent; return whether its connection is still to be watched."""
        try:
            message = self._connections[rank].recv(4096)
        except OSError:
            message = b""
        *lines, self._unread[rank] = (self._unread.get(rank, b"") + message).splitlines(keepends=True) or [b""]
        if self._unread[rank].endswith(b"\n"):
            lines, self._unread[rank] = [*lines, self._unread[rank]], b""
        for line in lines:
            self._follow(rank, line)
        if not message and rank not in self._left and not self._leaving:
            self._end(rank, announce=rank != 0 or self._rank == min(self._processes.keys() - {0} | {self._rank}))
        return bool(message)

    def _follow(self, rank: int, line: bytes) -> None:
        """Handle a line from another rank."""
        if line == LEAVING:
            self._left.add(rank)
        elif line == ASKING:
            with suppress(OSError):
                self._connections[rank].sendall(f"at {self.describe()}\n".encode())
            self.asked.set()
        elif line == BEHIND:
            self.asked.set()
        elif line == ENDING:
            self.on_hung()
        elif line.startswith(b"at "):
            self.answers[rank] = line[3:].decode("utf-8", "replace").strip()
        else:
            self._end(int(line.split()[1]), announce=False)  # rank 0 has printed the line

    def _look_for_stopped(self, seconds: float) -> None:
        """Kill a process of this machine that is stopped for too long; `seconds`: since the look before."""
        for rank, pid in self._processes.items():
            stat = None if rank in self._left else process_stat(pid)
            if stat is None or stat[0] != "T":
                self._stopped.pop(rank, None)
                continue
            # A watch that was stopped itself, or a machine that slept, counts as one look.
            self._stopped[rank] = self._stopped.get(rank, 0.0) + min(seconds, 2 * LOOK_SECONDS)
            if self._stopped[rank] >= STOPPED_SECONDS:
                with suppress(OSError):
                    os.kill(pid, signal.SIGKILL)

    def _end(self, rank: int, announce: bool) -> None:
        """End this process, after rank 0 has told the others which rank is dead."""
        if self._leaving:
            return
        if announce:
            line = f"error: rank {rank} died or was stopped; this attempt ends, resume from the newest checkpoint"
            console.print_line(line, error=True)
            self._report(line)
        if self._rank == 0:
            for other, connection in self._connections.items():
                if other != rank:
                    with suppress(OSError):
                        connection.sendall(f"dead {rank}\n".encode())
        os._exit(1)
