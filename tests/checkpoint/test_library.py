"""The public API: any tree, whole or absent, back into new tensors or live ones; an endless stream."""

from __future__ import annotations

import inspect
import math
import os
import random
import re
import signal
import subprocess
import threading
import warnings
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from torch import nn

import unbroken.checkpoint as ub
from tests.harness import ROOT
from unbroken.checkpoint import disk, library


def bits(tensor: torch.Tensor) -> tuple[Any, ...]:
    data = tensor.detach().resolve_conj().contiguous().reshape(-1)
    return tuple(tensor.shape), tensor.dtype, bytes(data.view(torch.uint8).tolist()) if data.numel() else b""


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and bits(a) == bits(b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b))


def saved(folder: Path, tree: Any, step: int = 1, **options: Any) -> Path:
    with ub.CheckpointWriter(folder, **options) as writer:
        writer.save(tree, step)
    path = ub.latest(folder)
    assert path is not None
    return path


class Training:
    """Everything that a training loop of plain PyTorch holds."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 8, bias=False))
        self.model.head = self.model[3]  # tied: one parameter with two names
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        warm = torch.optim.lr_scheduler.LinearLR(self.optimizer, 0.5, total_iters=3)
        steps = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, [4, 6])
        self.scheduler = torch.optim.lr_scheduler.SequentialLR(self.optimizer, [warm, steps], [3])
        self.scaler = torch.amp.GradScaler("cpu")

    def tree(self) -> dict[str, Any]:
        names = ("model", "optimizer", "scheduler", "scaler")
        return {**{name: getattr(self, name) for name in names}, "random": ub.RandomState(), "step": 0}

    def step(self) -> float:
        x = torch.randn(16, 4) + float(np.random.rand()) + random.random()
        self.optimizer.zero_grad()
        loss = self.model(x).square().mean()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        return loss.item()


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*")
def test_plain_pytorch_continues_with_the_same_bits(tmp_path: Path) -> None:
    before = Training(1)
    with ub.CheckpointWriter(tmp_path) as writer:
        for step in range(1, 4):
            before.step()
            writer.save({**before.tree(), "step": step}, step)
        losses = [before.step() for _ in range(4)]
    after = Training(2)
    path = ub.latest(tmp_path)
    assert path is not None and path.name == "model_step000003.pt"
    tree = ub.load_into(after.tree(), path)
    assert tree["step"] == 3 and tree["model"] is after.model
    assert [after.step() for _ in range(4)] == losses
    assert same(before.model.state_dict(), after.model.state_dict())
    assert same(before.optimizer.state_dict(), after.optimizer.state_dict())
    assert after.model[3].weight is after.model.head.weight
    with ub.CheckpointWriter(tmp_path / "again") as writer:
        writer.save(before.model.state_dict(), 9)
    weights = after.model.state_dict()
    assert ub.load_into(weights, tmp_path / "again/model_step000009.pt")["3.weight"] is weights["3.weight"]


def anything() -> dict[str, Any]:
    base = torch.randn(6, 8)
    return {
        **{str(kind): torch.ones(3, 2).to(kind) for kind in (torch.bfloat16, torch.float16, torch.int8, torch.bool)},
        **{"scalar": torch.tensor(3.5), "empty": torch.empty(0, 4), "complex": torch.randn(3, dtype=torch.complex64)},
        **{"turned": base.t(), "every other": base[::2, ::3], "expanded": torch.randn(3, 1).expand(3, 4), "base": base},
        "conjugated": torch.randn(3, dtype=torch.complex64).conj(),
        "channels last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "optimizer": {
            "state": {0: {"step": torch.tensor(7.0), "none": None}},
            "param_groups": [{"betas": (0.9, 0.95)}],
        },
        "plain": [
            None,
            True,
            -(2**70),
            0.1,
            math.inf,
            math.nan,
            "\x00text é",
            b"\x00\xff",
            (),
            [],
            {},
            (1, [2, {"a": 3}]),
        ],
        **{5: "a number as name", -3: torch.tensor([math.nan, -0.0])},
    }


def test_any_tree_comes_back_bit_for_bit(tmp_path: Path) -> None:
    tree = anything()
    path = saved(tmp_path, tree)
    assert same(ub.load(path), tree)
    assert same(torch.load(path)["tree"], tree)  # its safe default
    live = {key: torch.zeros_like(value) if isinstance(value, torch.Tensor) else value for key, value in tree.items()}
    live["expanded"] = torch.zeros(3, 4)
    strides = live["turned"].stride()
    assert same(ub.load_into(live, path), tree) and same(live["turned"], tree["turned"])
    assert live["turned"].stride() == strides and live["channels last"].is_contiguous(memory_format=torch.channels_last)
    for number, root in enumerate([torch.arange(3), [1, torch.ones(2)], (), {}, None, nn.Linear(2, 2)]):
        path = saved(tmp_path / str(number), root, 0)
        assert same(ub.load(path), dict(root.state_dict()) if isinstance(root, nn.Linear) else root)
    assert subprocess.run(["unzip", "-tqq", path]).returncode == 0


def test_tied_tensors_stay_one(tmp_path: Path) -> None:
    weight = torch.randn(3, 3)
    path = saved(tmp_path, {"a": weight, "b": {"c": weight.detach()}, "other": weight[:2]})
    assert [name for name in ZipFile(path).namelist() if "/data/" in name] == [f"archive/data/{key}" for key in (0, 1)]
    tree = ub.load(path)
    assert tree["a"] is tree["b"]["c"] and tree["other"] is not tree["a"]


class Text(str):
    pass


def test_subclasses_and_numbers_of_numpy_become_plain(tmp_path: Path) -> None:
    from collections import Counter, OrderedDict, namedtuple

    odd = {"a": OrderedDict(x=1), "b": Counter("aab"), "c": np.float32(0.5), "d": np.float64(0.1), "e": Text("text")}
    odd |= {
        "f": namedtuple("Pair", "x y")(1, 2),
        "g": np.int64(3),
        "h": nn.Parameter(torch.ones(1)),
        "i": np.bool_(True),
    }
    plain = {"a": {"x": 1}, "b": {"a": 2, "b": 1}, "c": 0.5, "d": 0.1, "e": "text", "f": (1, 2), "g": 3}
    assert same(ub.load(saved(tmp_path, odd)), {**plain, "h": torch.ones(1), "i": True})


class Sharded(torch.Tensor):
    def to_local(self) -> None: ...


def unsupported() -> dict[str, tuple[Any, str]]:
    deep: Any = 1
    for _ in range(40):
        deep = [deep]
    circle: dict[str, Any] = {}
    circle["circle"] = circle
    return {
        "path": (Path("x"), "a pathlib"),
        "array": (np.ones(3), r"torch\.from_numpy"),
        "keys": ({(1, 2): 3}, "a key is a tuple"),
        "class": (nn.Linear, "it is a type"),
        "sparse": (torch.ones(2, 2).to_sparse(), "to_dense"),
        "meta": (torch.empty(2, device="meta"), "meta device"),
        "kind": (torch.zeros(2, dtype=torch.uint16), "dtype torch.uint16"),
        "shard": (torch.ones(2).as_subclass(Sharded), r"Sharded, .*torch\.distributed\.checkpoint"),
        "deep": (deep, "nested too deeply"),
        "circle": (circle, "nested too deeply"),
        "keys that collide": (dict.fromkeys(range(30_000)), "numbers as keys"),
    }


def test_what_a_checkpoint_cannot_hold_is_one_line(tmp_path: Path) -> None:
    with ub.CheckpointWriter(tmp_path) as writer:
        for name, (value, says) in unsupported().items():
            with pytest.raises(ub.UnsupportedValueError, match=says) as caught:
                writer.save({"a": [1, value]}, 1)
            assert "\n" not in str(caught.value), name
        for step in (-1, True, 1.0, 10**18):
            with pytest.raises(ub.CheckpointError, match="step is"):
                writer.save({}, step)  # type: ignore[arg-type]
        for name in ("", "a/b", "..", ".x"):
            with pytest.raises(ub.CheckpointError, match="give a file name"):
                writer.save({}, 1, name=name)
        writer.save({"a": 1}, 2)
        writer.save({"a": 2}, 3, name="best.ckpt")
        writer.wait()
        assert ub.load(tmp_path / "best.ckpt") == {"a": 2} and ub.latest(tmp_path) == tmp_path / "model_step000002.pt"
        (tmp_path / "best.ckpt").unlink()
    assert ub.load(tmp_path / "model_step000002.pt") == {"a": 1}
    assert sorted(os.listdir(tmp_path)) == [".lock", "model_step000002.pt"]


def test_a_tree_that_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    path = saved(tmp_path, {"model": {"a": torch.ones(2), "b": torch.ones(3)}, "list": [torch.ones(1)], "step": 4})
    a, b = torch.zeros(2), torch.zeros(3)
    wrong: list[tuple[Any, str]] = [
        ({"model": {"a": a}}, "`model.b`: the file has this entry, the tree has no place"),
        ({"model": {"a": a, "b": b, "c": a}}, "`model.c`: the file has no such entry"),
        ({"model": {"a": a, "b": torch.zeros(4)}}, r"`model.b`: the file has \[3\] float32, the tree \[4\] float32"),
        ({"model": {"a": a, "b": b.double()}}, r"the file has \[3\] float32, the tree \[3\] float64"),
        ({"model": {"a": a, "b": {"x": b}}}, "`model.b`: the file has a tensor there, the tree a dict"),
        ({"model": {"a": a, "b": torch.zeros(3, device="meta")}}, "meta device"),
        ({"model": a}, "`model`: the file has a dict there, the tree a tensor"),
        ({"net": {"a": a, "b": b}}, "`net`: the file has no such entry; it has model, list, step"),
        ({"list": [a, b]}, "`list`: the file has a list of 1 items there, the tree 2 items"),
        ({"model": nn.Linear(2, 2)}, "`model.weight`: the file has no such entry"),
        (a, "the file has a dict there, the tree a tensor"),
    ]
    for tree, says in wrong:
        with pytest.raises(ub.MismatchError, match=says) as caught:
            ub.load_into(tree, path)
        assert "\n" not in str(caught.value)
    assert not a.any() and not b.any()
    with pytest.raises(ub.MismatchError, match="the torch.optim.sgd.SGD refuses the file's state"):
        ub.load_into({"model": torch.optim.SGD([nn.Parameter(a)])}, path)
    assert ub.load_into({"model": {"a": a, "b": b}, "step": 0}, path) == {"model": {"a": a, "b": b}, "step": 4}
    assert a.all() and b.all()


def test_damage_is_found_and_passed_over(tmp_path: Path) -> None:
    with ub.CheckpointWriter(tmp_path) as writer:
        for step in (1, 2, 3):
            writer.save({"a": torch.full((5000,), float(step)), "none": None}, step)
    third, second = tmp_path / "model_step000003.pt", tmp_path / "model_step000002.pt"
    content = bytearray(third.read_bytes())
    content[9000] ^= 1
    third.write_bytes(content)
    with pytest.raises(ub.DamagedError, match=r"model_step000003.pt: it is damaged: the checksum of tree\.a is wrong"):
        ub.load(third)
    second.rename(tmp_path / "model_step000007.pt")
    with pytest.warns(RuntimeWarning) as warned:
        assert ub.latest(tmp_path) == tmp_path / "model_step000001.pt"
    assert [("of step 2" in str(w.message), "checksum" in str(w.message)) for w in warned] == [
        (True, False),
        (False, True),
    ]
    assert ub.latest(tmp_path / "nowhere") is None
    for path, says in ((tmp_path / "nothing.pt", "no such file"), (tmp_path, "a folder")):
        with pytest.raises(ub.DamagedError, match=says):
            ub.load(path)
    torch.save({"a": Path("x")}, tmp_path / "code.pt")
    with pytest.raises(ub.DamagedError, match="could run code"):
        ub.load(tmp_path / "code.pt")
    torch.save({"a": torch.ones(3), "b": {"c": 1}}, tmp_path / "other.pt")
    assert same(ub.load(tmp_path / "other.pt"), {"a": torch.ones(3), "b": {"c": 1}})


def test_retention_keeps_the_last_and_other_programs_files(tmp_path: Path) -> None:
    torch.save({"model": {}}, tmp_path / "model_step000001.pt")
    for first in (2, 5):  # two attempts
        with ub.CheckpointWriter(tmp_path, keep_last=2, keep_every=3) as writer:
            for step in range(first, first + 3):
                writer.save({"a": torch.full((3000,), float(step))}, step)
    names = sorted(path.name for path in tmp_path.glob("*.pt"))
    assert names == [f"model_step00000{step}.pt" for step in (1, 3, 6, 7)]
    for step in (3, 6, 7):
        assert ub.load(tmp_path / f"model_step00000{step}.pt")["a"][0] == step


def test_an_error_in_the_background_is_raised_by_the_next_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    writer = ub.CheckpointWriter(tmp_path)
    writer.save({"a": torch.ones(3)}, 1)
    for call in (lambda: writer.save({"a": torch.ones(3)}, 3), writer.wait, writer.close):
        writer.wait()
        with monkeypatch.context() as patch:
            patch.setattr(disk, "commit", full)
            writer.save({"a": torch.ones(3)}, 2)
            writer._writer.wait()  # type: ignore[union-attr]
        with pytest.raises(ub.SaveError, match="model_step000002.pt: not saved: No space left"):
            call()
    with pytest.raises(ub.SaveError, match="this writer is closed"):
        writer.save({}, 4)
    assert ub.latest(tmp_path) == tmp_path / "model_step000001.pt"
    (tmp_path / "file").touch()
    with pytest.raises(ub.SaveError, match="cannot be written"):
        ub.CheckpointWriter(tmp_path / "file" / "below")
    with pytest.warns(RuntimeWarning, match="not saved"), pytest.raises(ZeroDivisionError):
        with monkeypatch.context() as patch, ub.CheckpointWriter(tmp_path) as writer:
            patch.setattr(disk, "commit", full)
            writer.save({"a": torch.ones(3)}, 2)
            raise ZeroDivisionError


def test_the_tensors_may_change_after_a_save(tmp_path: Path) -> None:
    tensor = torch.zeros(3_000_000)
    with ub.CheckpointWriter(tmp_path) as writer:
        for step in range(1, 4):
            tensor.fill_(step)
            writer.save({"a": tensor}, step)
            tensor.fill_(-1)
        tensor.fill_(4)
        writer.save({"a": tensor}, 4, overlap=True)
        writer.before_update()
        tensor.fill_(-1)
    for step in range(1, 5):
        assert ub.load(tmp_path / f"model_step00000{step}.pt")["a"].eq(step).all()


def settings() -> tuple[Any, ...]:
    handlers = [signal.getsignal(number) for number in range(1, 32)]
    return handlers, torch.get_num_threads(), torch.initial_seed(), dict(os.environ), warnings.filters[:]


def test_one_process_writes_into_a_folder_and_settings_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_LOCK_PATIENCE_SECONDS", 0.1)
    (tmp_path / ".model_step000003.pt.tmp").touch()  # of a killed process
    before, threads = settings(), threading.active_count()
    with ub.CheckpointWriter(tmp_path) as writer:
        child = os.fork()
        if child == 0:
            try:
                ub.CheckpointWriter(tmp_path)
            except ub.SaveError as error:
                os._exit("another process writes checkpoints into it" in str(error))
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
        writer.save({"a": torch.ones(3)}, 5)
    assert sorted(os.listdir(tmp_path)) == [".lock", "model_step000005.pt"]
    assert before == settings() and threads == threading.active_count()


# ---- the stream ------------------------------------------------------------------------------------------------------


class Noisy:
    """A dataset whose samples draw from all global generators."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index, float(torch.rand(())), random.random(), np.random.rand()], dtype=torch.float64)


def take(stream: ub.ResumableStream, count: int) -> torch.Tensor:
    return torch.cat([next(stream) for _ in range(count)])


def test_a_stream_continues_from_its_position_with_any_workers_and_ranks() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    whole = ub.ResumableStream(Noisy(), 4, seed=3)
    samples = take(whole, 10)
    assert whole.position == 40
    assert [sorted(epoch.tolist()) for epoch in samples[:, 0].reshape(4, 10)] == [list(range(10))] * 4
    assert not torch.equal(samples[:10, 0], samples[10:20, 0])
    assert len(samples[:, 1].unique()) == len(samples[:, 3].unique()) == 40
    first = ub.ResumableStream(Noisy(), 4, seed=3, num_workers=2)
    assert torch.equal(take(first, 3), samples[:12])  # the workers have prepared more
    second = ub.ResumableStream(Noisy(), 4, seed=3, num_workers=1)
    second.load_state_dict(first.state_dict())
    assert torch.equal(take(second, 7), samples[12:])
    parts = [take(ub.ResumableStream(Noisy(), 2, seed=3, rank=rank, ranks=2), 10).reshape(10, 2, 4) for rank in (0, 1)]
    assert torch.equal(torch.stack(parts, dim=1).reshape(40, 4), samples)
    assert torch.equal(state[0], torch.get_rng_state()) and state[1] == random.getstate()
    assert state[2] == np.random.get_state()[1].tolist()
    assert take(ub.ResumableStream(Noisy(), 5, shuffle=False), 2)[:, 0].tolist() == list(range(10))


def test_a_stream_refuses_another_order() -> None:
    state = ub.ResumableStream(Noisy(), 4, seed=3).state_dict()
    with pytest.raises(ub.MismatchError, match="seed: the file's stream has 3, this one 4"):
        ub.ResumableStream(Noisy(), 4, seed=4).load_state_dict(state)
    with pytest.raises(ub.MismatchError, match="position: it is -1"):
        ub.ResumableStream(Noisy(), 4, seed=3).load_state_dict({**state, "position": -1})
    with pytest.raises(ub.CheckpointError, match="drop_last: the stream itself"):
        ub.ResumableStream(Noisy(), 4, drop_last=True, sampler=None)


# ---- the interface ---------------------------------------------------------------------------------------------------


def test_the_public_interface_is_frozen() -> None:
    def parameters(function: Any) -> str:
        return " ".join(name for name in inspect.signature(function).parameters if name != "self")

    errors = {"CheckpointError", "UnsupportedValueError", "SaveError", "MismatchError", "DamagedError"}
    functions = {"CheckpointWriter", "latest", "load", "load_into", "RandomState", "ResumableStream"}
    assert set(ub.__all__) == errors | functions
    assert all(issubclass(getattr(ub, name), ub.CheckpointError) for name in errors)
    assert issubclass(ub.CheckpointError, ValueError)
    assert parameters(ub.CheckpointWriter) == "folder keep_last keep_every"
    assert parameters(ub.CheckpointWriter.save) == "tree step name overlap"
    assert (parameters(ub.latest), parameters(ub.load), parameters(ub.load_into)) == (
        "folder",
        "path device",
        "tree path",
    )
    assert parameters(ub.ResumableStream) == "dataset batch_size seed shuffle rank ranks loader_options"
    tree_keys = {"tree_format", "step", "tree"}
    assert library.TREE_FORMAT == 1 and tree_keys == library._KEYS


def test_the_example_of_the_documentation_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs/checkpoint-library.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    code = code.replace("1000", "3").replace("% 100", "% 1").replace(", num_workers=2", "")
    monkeypatch.chdir(tmp_path)
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    names = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "dataset": [(n, -n) for n in range(5)]}
    for _ in range(2):  # the second time it finds that it is done
        exec(compile(code, "checkpoint-library.md", "exec"), names)
        assert names["step"] == 3 and names["data"].position == 36
    assert sorted(path.name for path in Path("checkpoints").glob("*.pt")) == [f"model_step00000{n}.pt" for n in (2, 3)]
