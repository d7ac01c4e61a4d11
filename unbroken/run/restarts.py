"""The run of a worker that torchrun has restarted."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unbroken.checkpoint import disk
from unbroken.files import read_small
from unbroken.host import hostname, process_stat
from unbroken.paths import logs_dir

if TYPE_CHECKING:
    from unbroken.distributed.world import World

ATTEMPT = ".attempt"
ATTEMPT_BYTES = 1 << 20  # that are looked at: an agent has about 60


def _agent() -> list[Any]:
    """Return the torchrun agent that started this process: host, pid and start time, unique while the machine runs."""
    pid = os.getppid()
    stat = process_stat(pid)
    return [hostname(), pid, stat[19] if stat else ""]


def record_agents(folder: Path, agents: list[Any]) -> None:
    """Record the torchrun agents of this run, so that workers that they restart find it. Raises OSError."""
    disk.replace(folder / f"{ATTEMPT}.tmp", folder / ATTEMPT, json.dumps({"agents": agents}).encode())


def gather_agents(world: World) -> list[Any]:
    """Return the agents of all ranks; empty if no torchrun started them. Collective."""
    return list(world.gather(_agent())) if world.launch.job else []


def find_interrupted_run(agents: list[Any], named: Path = Path()) -> Path | None:
    """Return the folder of the run that one of these agents trained before; None if they have trained none.

    An agent starts workers again when one died or the nodes changed. It lives as long as its torchrun, so the run of
    another job is never returned. The folder is searched for in the folder of runs and around the path `named`.
    """
    if not agents:
        return None
    best: tuple[float, Path] | None = None
    for mark in (*logs_dir().glob(f"*/{ATTEMPT}"), *(folder / ATTEMPT for folder in (named, *named.parents[:2]))):
        if mark.is_symlink():
            continue
        try:
            known = json.loads(read_small(mark, ATTEMPT_BYTES))["agents"]
            age = mark.stat().st_mtime
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
        if isinstance(known, list) and any(agent in known for agent in agents):
            best = max(best or (age, mark.parent), (age, mark.parent))
    return best[1] if best else None
