"""Reading gives back the very bits: our files, torch's files, whole tensors, pieces of them, other dtypes."""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import checkpoints as make
from unbroken.checkpoint.format.stored_tensor import StoredTensor
from unbroken.checkpoint.reader import CheckpointFile
from unbroken.distributed.sliced_tensor import SlicedTensor, TensorSlice
from unbroken.errors import UserError


def torch_file(path: Path, tree: object) -> Path:
    torch.save(tree, path)
    return path


def plain(values: object) -> object:
    """Values without tensors, to be compared."""
    if isinstance(values, dict):
        return {key: plain(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [plain(value) for value in values]
    return "tensor" if isinstance(values, (StoredTensor, torch.Tensor)) else values


def test_our_file_gives_back_every_value_and_bit(tmp_path: Path) -> None:
    tree = make.state()
    path = make.save_ours(tmp_path, tree)
    live = make.blank(tree)
    with CheckpointFile(path) as file:
        assert file.is_ours
        assert plain(file.values) == plain(tree)
        assert file.verify() == []
        file.restore(make.leaves(live))
    assert make.same_bits(live, {key: tree[key] for key in ("model", "optimizer")})


def test_what_torch_saves_is_read_the_same(tmp_path: Path) -> None:
    tree = make.state()
    live = make.blank(tree)
    with CheckpointFile(torch_file(tmp_path / "a.pt", tree)) as file:
        assert file.is_ours
        file.restore(make.leaves(live))
        assert make.same_bits(live["model"], tree["model"])
        assert file.values["model"]["wte.weight"] == file.values["model"]["lm_head.weight"]


def test_a_bare_tensor_is_called_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="it holds a tensor, not a dict"):
        CheckpointFile(torch_file(tmp_path / "a.pt", torch.ones(3)))


def test_twin_without_the_copy_the_bits_differ() -> None:
    tree = make.state()
    assert not make.same_bits(make.blank(tree)["model"], tree["model"])


FOREIGN = {
    "tied": (base := torch.arange(20, dtype=torch.float32)),
    "tied_view": base[4:9],
    "transposed": torch.randn(3, 5).t(),
    "strided": torch.randn(8, 8)[1:7:2, ::3],
    "permuted": torch.randn(2, 3, 4).permute(2, 0, 1),
    "bf16": torch.randn(7).bfloat16(),
    "half": torch.randn(7).half(),
    "double": torch.randn(3).double(),
    "flags": torch.tensor([True, False, True]),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "longs": torch.tensor([2**62, -1]),
    "uint16": torch.tensor([1, 65535], dtype=torch.uint16),
    "float8": torch.randn(4).to(torch.float8_e4m3fn),
    "scalar": torch.tensor(3.5),
    "empty": torch.empty(0, 3),
    "parameter": torch.nn.Parameter(torch.randn(4)),
    "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
}


def test_every_kind_of_tensor_of_a_foreign_file(tmp_path: Path) -> None:
    with CheckpointFile(torch_file(tmp_path / "a.pt", FOREIGN)) as file:
        assert not file.is_ours
        for name, expected in FOREIGN.items():
            stored = file.values[name]
            assert (stored.shape, stored.dtype) == (tuple(expected.shape), expected.dtype), name
            got = file.tensor(stored)
            assert got.is_contiguous() and make.raw(got) == make.raw(expected.detach()), name
            live = torch.zeros(expected.shape, dtype=expected.dtype)
            file.restore({name: SlicedTensor.whole(live)})
            assert make.raw(live) == make.raw(expected.detach()), name


def test_values_of_a_foreign_file(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    tree = {
        "model": module.state_dict(),  # an OrderedDict with attributes
        "plain": [None, True, 1, -1, 2**40, -(2**70), 1.5, "\u00e9\U0001f600", b"\x00\xff", (1, (2, 3))],
        "size": torch.Size((1, 2)),
        "dtype": torch.bfloat16,
        "device": torch.device("cuda", 1),
        "ordered": OrderedDict(b=1, a=2),
        7: {},
    }
    with CheckpointFile(torch_file(tmp_path / "a.pt", tree)) as file:
        values = file.values
        assert [list(value) if isinstance(value, tuple) else value for value in values["plain"][:-1]] == tree["plain"][
            :-1
        ]
        assert values["plain"][-1] == (1, (2, 3)) and values["size"] == (1, 2) and values["dtype"] is torch.bfloat16
        assert values["device"] == "cuda:1" and list(values["ordered"]) == ["b", "a"] and values[7] == {}
        assert list(values["model"]) == list(module.state_dict())
        assert torch.equal(file.tensor(values["model"]["0.weight"]), module[0].weight)


def test_optimizer_state_of_torch(tmp_path: Path) -> None:
    layer = torch.nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(3)).sum().backward()
    optimizer.step()
    with CheckpointFile(torch_file(tmp_path / "a.pt", {"optimizer": optimizer.state_dict()})) as file:
        stored = file.values["optimizer"]
        assert stored["param_groups"][0]["betas"] == (0.9, 0.999)
        assert file.tensor(stored["state"][0]["step"]).item() == 1.0


def test_cast_converts_and_only_when_asked(tmp_path: Path) -> None:
    saved = torch.randn(4, 6).bfloat16()
    path = torch_file(tmp_path / "a.pt", {"w": saved, "view": saved.t(), "count": torch.arange(3)})
    live, view = torch.zeros(4, 6), torch.zeros(6, 4)
    with CheckpointFile(path) as file:
        with pytest.raises(UserError, match=r"w is \[4, 6\] bfloat16.*\[4, 6\] float32"):
            file.restore({"w": SlicedTensor.whole(live)})
        file.restore({"w": SlicedTensor.whole(live), "view": SlicedTensor.whole(view)}, cast=True)
        with pytest.raises(UserError, match="count"):
            file.restore({"count": SlicedTensor.whole(torch.zeros(3))}, cast=True)
    assert torch.equal(live, saved.float()) and torch.equal(view, saved.t().float())


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"model": {"other": SlicedTensor.whole(torch.zeros(1))}}, "model.other"),
        (
            {"model": {"wte.weight": SlicedTensor.whole(torch.zeros(5, 6))}},
            r"model.wte.weight is \[6, 5\] float32.*\[5, 6\]",
        ),
        ({"model": {"norm": SlicedTensor.whole(torch.zeros(9))}}, r"model.norm is \[9\] bfloat16.*float32"),
        ({"step": SlicedTensor.whole(torch.zeros(1))}, "step is a int, not a tensor"),
        ({"model": {"norm": {"deeper": SlicedTensor.whole(torch.zeros(9))}}}, "model.norm.deeper"),
    ],
)
def test_a_leaf_that_does_not_fit_is_named_and_nothing_is_copied(tmp_path: Path, tree: dict, message: str) -> None:
    path = make.save_ours(tmp_path, make.state())
    untouched = torch.zeros(6, 5)
    with CheckpointFile(path) as file, pytest.raises(UserError, match=message) as caught:
        file.restore({"optimizer": {"state": {0: {"exp_avg": SlicedTensor.whole(untouched)}}}, **tree})
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    assert not untouched.any()


@pytest.fixture(scope="module")
def counting_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return torch_file(tmp_path_factory.mktemp("pieces") / "a.pt", {"w": COUNTING.view(100, 500)})


COUNTING = torch.arange(50_000, dtype=torch.float32)


@settings(max_examples=60, deadline=None)
@given(cuts=st.lists(st.integers(0, 50_000), max_size=6), taken=st.integers(0, 127))
def test_each_piece_gets_its_part_and_no_other_is_touched(counting_file: Path, cuts: list[int], taken: int) -> None:
    """`taken`: which of the pieces this process holds, in bits."""
    bounds = [0, *sorted(cuts), 50_000]
    pieces = [TensorSlice(low, torch.full((high - low,), -1.0)) for low, high in pairwise(bounds) if low < high]
    held = [piece for index, piece in enumerate(pieces) if taken >> index & 1]
    with CheckpointFile(counting_file) as file:
        file.restore({"w": SlicedTensor((100, 500), torch.float32, tuple(held))})
    for piece in pieces:
        expected = (
            COUNTING[piece.start : piece.stop] if any(piece is one for one in held) else torch.full_like(piece.data, -1)
        )
        assert torch.equal(piece.data, expected)


@pytest.mark.parametrize("size", [1, (1 << 20) - 1, 1 << 20, (16 << 20) + 5, (33 << 20) + 3])
def test_storages_of_all_sizes(tmp_path: Path, size: int) -> None:
    """Around the sizes at which the work is divided."""
    saved = torch.randint(0, 256, (size,), dtype=torch.uint8)
    path = torch_file(tmp_path / "a.pt", {"w": saved})
    live = torch.zeros_like(saved)
    seen: list[tuple[int, int]] = []
    with CheckpointFile(path) as file:
        file.restore({"w": SlicedTensor.whole(live)})
        assert file.verify(lambda done, total: seen.append((done, total))) == []
    assert torch.equal(live, saved)
    assert seen[-1][0] == seen[-1][1] >= size and seen == sorted(seen)


@pytest.mark.parametrize("where", [0, 12_345, 16 << 20, (20 << 20) - 1])
def test_a_flip_in_tensor_data_is_found_by_verify_and_restore(tmp_path: Path, where: int) -> None:
    saved = torch.zeros(20 << 20, dtype=torch.uint8)
    path = torch_file(tmp_path / "a.pt", {"other": torch.ones(3), "model": {"w": saved}})
    make.flip(path, make.payload(path.read_bytes(), "data/1")[0] + where)
    whole = SlicedTensor.whole(torch.ones_like(saved))
    part = SlicedTensor((20 << 20,), torch.uint8, (TensorSlice(100, torch.zeros(7, dtype=torch.uint8)),))
    with CheckpointFile(path) as file:
        (line,) = file.verify()
        assert "model.w" in line and "damaged" in line
        for leaf in (whole, part):
            with pytest.raises(UserError, match=r"damaged.*model\.w"):
                file.restore({"model": {"w": leaf}})
            file.trust(file.identity)
            file.restore({"model": {"w": leaf}})
            file.trust(None)
        with pytest.raises(UserError, match="damaged"):
            file.tensor(file.values["model"]["w"])
        file.restore({"other": SlicedTensor.whole(torch.zeros(3))})  # what is whole can still be had


def test_a_flip_is_found_when_the_tensor_must_be_converted(tmp_path: Path) -> None:
    saved = torch.zeros(4, 5, dtype=torch.bfloat16)
    path = torch_file(tmp_path / "a.pt", {"w": saved.t()})
    make.flip(path, make.payload(path.read_bytes(), "data/0")[0])
    with CheckpointFile(path) as file, pytest.raises(UserError, match="damaged"):
        file.restore({"w": SlicedTensor.whole(torch.zeros(5, 4))}, cast=True)


def test_identity_is_the_sha256_of_the_file(tmp_path: Path) -> None:
    path = make.save_ours(tmp_path, make.state())
    with CheckpointFile(path) as file:
        assert file.sha256() == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_link_that_was_typed_is_followed(tmp_path: Path) -> None:
    path = make.save_ours(tmp_path, make.state())
    (tmp_path / "link.pt").symlink_to(path.name)
    with CheckpointFile(tmp_path / "link.pt") as file:
        assert file.values["step"] == 7


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    path = make.save_ours(tmp_path, make.state())
    bad = tmp_path / "bad.pt"
    bad.write_bytes(path.read_bytes()[:-1])
    for _ in range(5):
        with CheckpointFile(path) as file:
            file.verify()
        with pytest.raises(UserError):
            CheckpointFile(bad)
    left = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert not [name for name in left if name.startswith(str(tmp_path))]
