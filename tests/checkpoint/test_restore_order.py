"""Reading into the memory of a GPU: in the order of the caller's stream, through buffers that are reused."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from tests import fake_gpu
from tests.fake_gpu import on_gpu
from unbroken.checkpoint import parallel_read
from unbroken.checkpoint.parallel_read import ParallelReader
from unbroken.checkpoint.reader import CheckpointFile
from unbroken.distributed.sliced_tensor import SlicedTensor, TensorSlice
from unbroken.errors import UserError

SIZE = 20_000  # elements: dozens of turns of the two staging buffers


def restored(path: Path) -> torch.Tensor:
    """Fill, restore and add one in a stream that is busy; return what the memory has at the end."""
    live, stream = torch.zeros(SIZE), fake_gpu.Stream()
    memory = on_gpu(live)
    with fake_gpu.stream(stream), CheckpointFile(path) as file:
        stream.submit(lambda: time.sleep(0.2))
        memory.copy_(torch.full((SIZE,), -1.0))
        file.restore({"w": SlicedTensor((SIZE,), torch.float32, (TensorSlice(0, memory),))})
        memory.add_(1)
        stream.synchronize()
    return live


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, torch.Tensor]:
    """A file, and its tensor."""
    values = torch.rand(SIZE)
    torch.save({"w": values}, tmp_path / "w.pt")
    fake_gpu.install(monkeypatch)
    monkeypatch.setattr(parallel_read, "UNIT", 16_384)
    monkeypatch.setattr(parallel_read, "BLOCK", 1024)
    return tmp_path / "w.pt", values


def test_reading_comes_after_earlier_work_and_before_later_work(saved: tuple[Path, torch.Tensor]) -> None:
    path, values = saved
    assert torch.equal(restored(path), values + 1)


@pytest.mark.parametrize("without", ["the stream", "waits for the buffers"])
def test_twin_order_is_needed(saved: tuple[Path, torch.Tensor], monkeypatch: pytest.MonkeyPatch, without: str) -> None:
    path, values = saved
    if without == "the stream":  # side threads copy in the device's default stream
        read = ParallelReader._read_to_device
        monkeypatch.setattr(ParallelReader, "_read_to_device", lambda *given: read(*given[:-1], fake_gpu._default))
    else:
        waits = fake_gpu.Event.synchronize
        skipped = lambda self: None if fake_gpu.threading.current_thread().name.startswith("read") else waits(self)  # noqa: E731
        monkeypatch.setattr(fake_gpu.Event, "synchronize", skipped)
    assert not torch.equal(restored(path), values + 1)


def test_an_error_leaves_no_copy_without_its_buffer(
    saved: tuple[Path, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies that are under way keep their staging memory, and what the stream does next comes after them."""
    reads, begun = parallel_read.read_exactly, list[int]()

    def fails(file: int, memory: memoryview, offset: int) -> None:
        begun.append(offset)
        if len(begun) > 8:
            raise UserError("it cannot be read: Input/output error")
        reads(file, memory, offset)

    live, stream = torch.zeros(SIZE), fake_gpu.Stream()
    with fake_gpu.stream(stream), CheckpointFile(saved[0]) as file:
        monkeypatch.setattr(parallel_read, "read_exactly", fails)
        with pytest.raises(UserError, match="Input/output error"):
            file.restore({"w": SlicedTensor((SIZE,), torch.float32, (TensorSlice(0, on_gpu(live)),))})
        on_gpu(live).copy_(torch.full((SIZE,), 7.0))
        stream.synchronize()
    assert live.unique().tolist() == [7.0]
