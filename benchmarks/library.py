"""What a save costs a training loop of one's own: unbroken.checkpoint, torch.save, DCP's and Lightning's async saves.

The loop, the state and the columns are those of save.py: seconds blocked, seconds lost over a window of steps with a
save in it against the same window without, seconds until the save is done. Methods take turns; a row shows medians, and
what is blocked as a share of torch.save's. Only ours, and torch.save with fsync, are on stable storage when they are
done. Lightning is measured if it is installed.

    python benchmarks/library.py [--folder DIR] [--rounds 3] [--steps 20] [--scale 1.0] [--json]
"""

from __future__ import annotations

import statistics
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.save import Blocking, Distributed, Rows, State, make_state, run, window
from unbroken.checkpoint import CheckpointWriter


class Library:
    """Our writer, as in the documentation's first example; with `overlap`, it copies during the next step."""

    def __init__(self, folder: Path, overlap: bool) -> None:
        self.name, self.overlap = "unbroken" + ", overlap=True" * overlap, overlap
        self.writer = CheckpointWriter(folder, keep_last=1)

    def save(self, state: State, step: int) -> None:
        self.writer.save(state.plain(step), step, overlap=self.overlap)

    def before_update(self) -> None:
        self.writer.before_update()

    def wait(self) -> None:
        self.writer.wait()

    def close(self) -> None:
        self.writer.close()


class Plain(Blocking):
    """torch.save as most loops have it: into the page cache, over the file before."""

    name = "torch.save"

    def save(self, state: State, step: int) -> None:
        torch.save(state.plain(step), self.folder / "latest.pt")


class Lightning(Blocking):
    """AsyncCheckpointIO: clones the tensors, then torch.save in a thread, into memory and from there into the file."""

    name = "Lightning AsyncCheckpointIO"

    def __init__(self, folder: Path) -> None:
        from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO

        super().__init__(folder)
        self.plugin = AsyncCheckpointIO(TorchCheckpointIO())

    def save(self, state: State, step: int) -> None:
        self.plugin.save_checkpoint(state.plain(step), str(self.folder / "latest.ckpt"))

    def wait(self) -> None:
        self.plugin.teardown()


def measure(folder: Path, rounds: int, steps: int, scale: float, products: int) -> Rows:
    """Return a row for each method."""
    state = make_state(scale)
    makers = {
        "plain": Plain,
        "fsync": Blocking,
        "dcp": Distributed,
        "lightning": Lightning,
        "ours": lambda path: Library(path, overlap=False),
        "overlap": lambda path: Library(path, overlap=True),
    }
    methods: list[Any] = []
    for name, maker in makers.items():
        (folder / name).mkdir()
        with suppress(ImportError):
            methods.append(maker(folder / name))
    seen: dict[str, list[tuple[float, float, float]]] = {method.name: [] for method in methods}
    for turn in range(rounds + 1):  # the first turn warms everything up
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
    rows = [[name, *map(statistics.median, zip(*results, strict=True))] for name, results in seen.items()]
    share = {name: blocked / rows[0][1] for name, blocked, _, _ in rows}
    return [
        {"method": name, "blocked": blocked, "of torch.save": share[name], "lost": lost, "done": done}
        for name, blocked, lost, done in rows
    ]


def show(rows: Rows) -> None:
    print(f"{'':28} {'blocked s':>10} {'share':>8} {'lost s':>10} {'done s':>10}")
    for row in rows:
        blocked, share = row["blocked"], row["of torch.save"]
        print(f"{row['method']:28} {blocked:10.3f} {share:8.1%} {row['lost']:10.3f} {row['done']:10.3f}")


if __name__ == "__main__":
    run(__doc__, measure, show)
