"""What a checkpoint costs: a blocking torch.save + fsync, torch.distributed.checkpoint.async_save, and ours.

On a state of the size of a `d12` (1.48 GB). A step is products of matrices, about a second of them, and one in-place
pass over weights and moments, as an optimizer's. Methods take turns; a row shows medians. Columns: seconds for which
the loop is blocked, in the call and before the update; time lost over a window of steps with a save in it, against the
same window without; seconds until the file is durable. Then the same bytes by raw O_DIRECT writes beside the same
steps, into a fresh file and over an old one.

    python benchmarks/save.py [--folder DIR] [--rounds 3] [--steps 20] [--scale 1.0] [--json]
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from unbroken.checkpoint.writer import RunCheckpointWriter
from unbroken.distributed.sliced_tensor import SlicedTensor
from unbroken.distributed.world import World

CHUNK = 16 << 20
Rows = list[dict[str, Any]]


@dataclass
class State:
    """Weights, two moments of the same shapes, and the tree that saves them."""

    weights: list[torch.Tensor]
    first: list[torch.Tensor]
    second: list[torch.Tensor]
    counters: list[torch.Tensor]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.weights + self.first + self.second)

    def plain(self, step: int) -> dict[str, Any]:
        """For the other two: tensors where ours has leaves."""
        entries = enumerate(zip(self.counters, self.first, self.second, strict=True))
        moments = {index: {"step": n, "exp_avg": m, "exp_avg_sq": v} for index, (n, m, v) in entries}
        return {
            "model": {f"w{index}": weight for index, weight in enumerate(self.weights)},
            "optimizer": {"state": moments, "param_groups": [{"lr": 1e-3, "params": list(moments)}]},
            "step": step,
        }

    def tree(self, step: int) -> dict[str, Any]:
        rest: dict[str, Any] = {key: {} for key in ("args", "progress", "data", "rng", "environment", "sources")}
        run_id = "691bd736-d91a-48bf-a7a9-4b17d3ec0733"
        return {**leaves(self.plain(step)), **rest, "code": "", "format": 1, "run_id": run_id}


def leaves(tree: Any) -> Any:
    """The same tree with a leaf for each tensor."""
    if isinstance(tree, torch.Tensor):
        return SlicedTensor.whole(tree)
    return {key: leaves(value) for key, value in tree.items()} if isinstance(tree, dict) else tree


def make_state(scale: float) -> State:
    """The shapes of a d12, all dimensions but the width shrunk by `scale`."""
    rows, width = int(50257 * scale), 768
    layer = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    shapes = [(rows, width), *(layer * max(1, int(12 * scale)))]
    made = [[torch.rand(shape) for shape in shapes] for _ in range(3)]
    return State(made[0], made[1], made[2], [torch.tensor(1.0) for _ in shapes])


def forward_backward(left: torch.Tensor, right: torch.Tensor, products: int) -> None:
    """Something for the cores to do."""
    for _ in range(products):
        torch.mm(left, right)


def update(state: State) -> None:
    """As an optimizer's: everything changes in place."""
    for weight, first, second in zip(state.weights, state.first, state.second, strict=True):
        first.mul_(0.9)
        second.mul_(0.99)
        weight.add_(first, alpha=-1e-6)


class Ours:
    name = "unbroken"

    def __init__(self, folder: Path) -> None:
        self.saver = RunCheckpointWriter(folder, World.single(), keep_last=1)

    def save(self, state: State, step: int) -> None:
        self.saver.save(state.tree(step), step)

    def before_update(self) -> None:
        self.saver.before_update()

    def wait(self) -> None:
        self.saver.wait()
        for outcome in self.saver.results():
            assert outcome.error is None, outcome.error

    def close(self) -> None:
        self.saver.close()


class Blocking:
    name = "torch.save + fsync"

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, state: State, step: int) -> None:
        with open(self.folder / f"{step}.pt", "wb") as file:
            torch.save(state.plain(step), file)
            file.flush()
            os.fsync(file.fileno())
        for old in self.folder.glob("*.pt"):
            if old.name != f"{step}.pt":
                old.unlink()

    def before_update(self) -> None:
        pass

    def wait(self) -> None:
        pass

    def close(self) -> None:
        pass


class Distributed:
    """async_save as documented: a folder of files, the state copied first. It needs a process group."""

    name = "dcp.async_save"

    def __init__(self, folder: Path) -> None:
        import torch.distributed as dist

        self.folder = folder
        self.pending: Any = None
        if not dist.is_initialized():
            dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)

    def save(self, state: State, step: int) -> None:
        from torch.distributed.checkpoint.state_dict_saver import async_save

        self.wait()
        for old in self.folder.glob("step*"):
            shutil.rmtree(old)
        self.pending = async_save(state.plain(step), checkpoint_id=str(self.folder / f"step{step}"))

    def before_update(self) -> None:
        pass

    def wait(self) -> None:
        if self.pending is not None:
            self.pending.result()
            self.pending = None

    def close(self) -> None:
        self.wait()


def window(method: Any, state: State, steps: int, products: int, save_at: int | None) -> tuple[float, float, float]:
    """(seconds for `steps` steps, seconds blocked, seconds until durable) with a save before step `save_at`."""
    left, right = torch.rand(1024, 1024), torch.rand(1024, 1024)
    blocked, durable = 0.0, [0.0]
    watcher: threading.Thread | None = None
    began = time.perf_counter()
    for step in range(steps):
        if step == save_at:
            started = time.perf_counter()
            method.save(state, int(started * 1e6))
            blocked = time.perf_counter() - started

            def watch(started: float = started) -> None:
                method.wait()
                durable[0] = time.perf_counter() - started

            watcher = threading.Thread(target=watch)
            watcher.start()
        forward_backward(left, right, products)
        waited = time.perf_counter()
        method.before_update()
        blocked += time.perf_counter() - waited
        update(state)
    total = time.perf_counter() - began
    if watcher is not None:
        watcher.join()
    return total, blocked, durable[0]


class Raw:
    """The same bytes, from a buffer that is there already, around the page cache: what the disk can do."""

    def __init__(self, folder: Path, size: int, fresh: bool) -> None:
        self.name = "raw O_DIRECT, " + ("fresh file" if fresh else "over an old file")
        self.path, self.size, self.fresh = folder / "raw", size // CHUNK * CHUNK, fresh
        self.buffer = mmap.mmap(-1, CHUNK)
        self.buffer.write(os.urandom(1 << 20) * (CHUNK >> 20))
        self.thread: threading.Thread | None = None

    def save(self, state: State, step: int) -> None:
        self.thread = threading.Thread(target=self.write)
        self.thread.start()

    def write(self) -> None:
        if self.fresh and self.path.exists():
            self.path.unlink()
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_DIRECT)
        if self.fresh:
            os.posix_fallocate(file, 0, self.size)
        todo = iter(range(0, self.size, CHUNK))
        threads = [threading.Thread(target=lambda: [os.pwrite(file, self.buffer, at) for at in todo]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        os.fsync(file)
        os.close(file)

    def before_update(self) -> None:
        pass

    def wait(self) -> None:
        if self.thread is not None:
            self.thread.join()

    def close(self) -> None:
        self.path.unlink()


def measure(folder: Path, rounds: int, steps: int, scale: float, products: int) -> Rows:
    """A row for each method and each raw write."""
    state = make_state(scale)
    makers: list[Callable[[Path], Any]] = [
        Blocking,
        Distributed,
        Ours,
        lambda folder: Raw(folder, state.nbytes, fresh=True),
        lambda folder: Raw(folder, state.nbytes, fresh=False),
    ]
    methods = []
    for index, maker in enumerate(makers):
        (folder / str(index)).mkdir()
        methods.append(maker(folder / str(index)))
    seen: dict[str, list[tuple[float, float, float]]] = {method.name: [] for method in methods}
    for turn in range(rounds + 1):  # the first turn warms everything up, recycled files included
        for method in methods:
            if turn == 0:
                for _ in range(2):
                    window(method, state, 1, 0, 0)
                continue
            quiet = window(method, state, steps, products, None)[0]
            total, blocked, durable = window(method, state, steps, products, steps // 4)
            seen[method.name].append((blocked, total - quiet, durable))
    for method in methods:
        method.close()
    rows = []
    for name, results in seen.items():
        blocked, lost, durable = (statistics.median(column) for column in zip(*results, strict=True))
        speed = state.nbytes / 1e9 / max(durable, blocked)
        rows.append({"method": name, "blocked": blocked, "lost": lost, "durable": durable, "GB/s": speed})
    return rows


def run(about: str | None, measure: Callable[[Path, int, int, float, int], Rows], show: Callable[[Rows], None]) -> None:
    """Measure by the flags of the command line, in a folder of its own, and show the rows or print them as JSON."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default=".", help="on the disk to be measured; holds a checkpoint of each method")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20, help="of a window")
    parser.add_argument("--scale", type=float, default=1.0, help="of the state; 1 is a d12")
    parser.add_argument("--products", type=int, default=60, help="of 1024 x 1024 matrices in a step")
    parser.add_argument("--json", action="store_true")
    typed = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="benchmark-", dir=typed.folder)).resolve()
    try:
        rows = measure(folder, typed.rounds, typed.steps, typed.scale, typed.products)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if typed.json:
        print(json.dumps(rows))
    else:
        show(rows)


def show(rows: Rows) -> None:
    print(f"{'':28} {'blocked s':>10} {'lost s':>10} {'durable s':>10} {'GB/s':>7}")
    for row in rows:
        print(
            f"{row['method']:28} {row['blocked']:10.3f} {row['lost']:10.3f} {row['durable']:10.3f} {row['GB/s']:7.2f}"
        )


if __name__ == "__main__":
    run(__doc__, measure, show)
