"""A long attempt with a save after every step: memory, threads, descriptors and files stay as they were.

    python -m tests.chaos.soak [--saves 1000] [--processes 1]

It prints what the training process holds after a tenth of the saves and at their end; exit code 1: something grew.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from tests.harness import RUN_ID, SCRIPT, Running, arguments, environment, last_step, write_corpus

MEMORY_BYTES = 24 << 20  # what the history of losses and the allocator may add over 1,000 steps


def main(typed: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--saves", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=1)
    args = parser.parse_args(typed)
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    try:
        return soak(folder, args.saves, args.processes)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def soak(folder: Path, saves: int, processes: int) -> int:
    write_corpus(folder)
    changes = {"run_id": RUN_ID, "num_iterations": saves, "save_every": 1, "keep_last": 2, "val_loss_every": 50}
    shared = set(os.listdir("/dev/shm"))
    runner = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *runner, str(SCRIPT), *arguments(changes)]
    with open(folder / "out", "w") as out:  # a pipe that nobody reads would be full
        process = subprocess.Popen(command, cwd=folder, env=environment(), stdout=out, stderr=out)
    held = []
    for goal in (saves // 10, saves - 20):
        while last_step(folder) < goal and process.poll() is None:
            time.sleep(0.05)
        workers = [process.pid] if processes == 1 else Running(process, folder).workers()
        held.append({pid: held_by(pid) for pid in workers})
        files = len(list((folder / "logs" / RUN_ID).iterdir()))
        print(f"step {last_step(folder)}: {list(held[-1].values())}, {files} files", flush=True)
    process.wait()
    first, last = held
    grew = [name for pid in first for name, value in last[pid].items() if grown(name, first[pid], value)]
    left = set(os.listdir("/dev/shm")) - shared
    if process.returncode or grew or left:
        said = (folder / "out").read_text()[-2000:]
        print(f"exit code {process.returncode}, grown: {grew}, left in shared memory: {left}\n{said}")
        return 1
    print("nothing grew")
    return 0


def held_by(pid: int) -> dict[str, int]:
    """Bytes of memory, numbers of threads and descriptors."""
    process = psutil.Process(pid)
    return {"memory": process.memory_info().rss, "threads": process.num_threads(), "descriptors": process.num_fds()}


def grown(name: str, before: dict[str, int], value: int) -> bool:
    """Whether there is more than there was; a save that is under way has a few threads and files."""
    return value > before[name] + {"memory": MEMORY_BYTES, "threads": 4, "descriptors": 6}[name]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
