"""Snapshot, copy and update on a GPU, one stream each: the bytes are those after an update, never torn."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests import fake_gpu
from tests.fake_gpu import on_gpu
from unbroken.checkpoint import snapshot
from unbroken.checkpoint.snapshot import HostBuffer, Snapshot
from unbroken.threads import WorkerThreads

GPU = torch.device("cuda", 0)
SIZE, TENSORS, STEPS = 64, 6, 12


def saved_steps(monkeypatch: pytest.MonkeyPatch) -> list[list[float]]:
    """Update all weights by one in each step and save after each; return the values that each save has of them."""
    fake_gpu.install(monkeypatch)
    cudart = SimpleNamespace(cudaHostRegister=lambda *_: 0, cudaHostUnregister=lambda *_: 0)
    monkeypatch.setattr(snapshot, "_cudart", lambda: cudart)
    plain = [torch.zeros(SIZE) for _ in range(TENSORS)]
    weights, bytes_each = [on_gpu(weight) for weight in plain], 4 * SIZE
    pool, buffer = WorkerThreads(2, "copies"), HostBuffer(GPU)
    buffer.reserve(TENSORS * bytes_each)
    saving, found = Snapshot(buffer, pool, GPU), []
    for _ in range(STEPS):
        saving.before_update()
        for weight in weights:
            weight.add_(1)
        saving.wait_for_copies()
        saving.take([(weight, index * bytes_each) for index, weight in enumerate(weights)])
        saving.before_update()
        for weight in weights:  # the next update is queued at once; the save must not see it
            weight.add_(1000)
            weight.add_(-1000)
        saving.wait_until_copied(TENSORS * bytes_each)
        found.append(buffer.tensor(0, TENSORS * bytes_each).view(torch.float32).unique().tolist())
    fake_gpu.finish()
    pool.close()
    return found


def test_a_save_has_the_weights_of_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    assert saved_steps(monkeypatch) == [[float(step)] for step in range(1, STEPS + 1)]


@pytest.mark.parametrize("without", ["copy after update", "update after copy", "host after copy"])
def test_twin_each_of_the_three_waits_is_needed(monkeypatch: pytest.MonkeyPatch, without: str) -> None:
    if without == "copy after update":
        waits = fake_gpu.Stream.wait_event
        skipped = lambda self, event: None if self is not fake_gpu._default else waits(self, event)  # noqa: E731
        monkeypatch.setattr(fake_gpu.Stream, "wait_event", skipped)
    elif without == "update after copy":
        waits = fake_gpu.Stream.wait_event
        skipped = lambda self, event: None if self is fake_gpu._default else waits(self, event)  # noqa: E731
        monkeypatch.setattr(fake_gpu.Stream, "wait_event", skipped)
    else:
        monkeypatch.setattr(Snapshot, "wait_until_copied", lambda self, stop: self._issued.wait())
    assert saved_steps(monkeypatch) != [[float(step)] for step in range(1, STEPS + 1)]
