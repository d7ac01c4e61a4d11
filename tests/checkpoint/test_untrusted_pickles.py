"""Nothing that a pickle says is trusted: no code runs, no memory fills, no time passes; the answer is one line."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import checkpoints as make
from tests import fork_server
from tests.harness import environment
from unbroken.checkpoint.reader import CheckpointFile

FOUR_FLOATS = {"0": bytes(16)}


class Runs:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", range(6))
def test_no_call_of_a_pickle_is_made(tmp_path: Path, protocol: int) -> None:
    mark = tmp_path / "mark"
    for call in (
        Runs(os.system, f"touch {mark}"),
        Runs(eval, "1"),
        Runs(__import__, "antigravity"),
        Runs(open, str(mark), "w"),
    ):
        make.refused(tmp_path, make.pickle_file(pickle.dumps({"model": call}, protocol)))
        assert not mark.exists() and "antigravity" not in sys.modules


def test_twin_python_itself_would_have_run_it(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    pickle.loads(pickle.dumps({"model": Runs(os.system, f"touch {mark}")}, 2))
    assert mark.exists()


@pytest.mark.parametrize(
    "name",
    ["os\nsystem", "builtins\neval", "torch\nload", "torch\nFloatStorage.__init__", "collections\nCounter", "torch.\n",
     "torch._utils\n_rebuild_tensor_v2.__globals__", "\n", "torch\n\x1b[2J", "torch.storage\n_load_from_bytes"],
)  # fmt: skip
def test_globals_other_than_tensors_are_refused_by_name(tmp_path: Path, name: str) -> None:
    line = make.refused(tmp_path, make.pickle_file(b"\x80\x02}(X\x01\0\0\0ac" + name.encode() + b"\nu."))
    assert "\x1b" not in line


def test_nothing_named_in_a_file_is_imported(tmp_path: Path) -> None:
    (tmp_path / "unbroken_trap.py").write_text("raise SystemExit('imported')")
    sys.path.insert(0, str(tmp_path))
    try:
        make.refused(tmp_path, make.pickle_file(b"\x80\x02}(X\x01\0\0\0acunbroken_trap\nx\nu."))
    finally:
        sys.path.remove(str(tmp_path))
    assert "unbroken_trap" not in sys.modules


BIG = 2**63
PICKLES: dict[str, bytes] = {
    "nothing": b"",
    "only the protocol": b"\x80\x02",
    "no stop": b"\x80\x02}",
    "stop at once": b"\x80\x02.",
    "empty stack": b"\x80\x020.",
    "two values": b"\x80\x02}}.",
    "more behind the stop": b"\x80\x02}.}",
    "open mark": b"\x80\x02(}.",
    "mark as value": b"\x80\x02(.",
    "mark in a tuple": b"\x80\x02}X\x01\0\0\0a(\x85s.",
    "mark as key": b"\x80\x02}((}u.",
    "no mark": b"\x80\x02}u.",
    "odd items": b"\x80\x02}(Nu.",
    "unhashable key": b"\x80\x02}]Ns.",
    "tuple key": b"\x80\x02})Ns.",
    "float key": b"\x80\x02}G\x7f\xf8\0\0\0\0\0\0Ns.",
    "a list at the top": b"\x80\x02].",
    "None at the top": b"\x80\x02N.",
    "a storage type as value": make.dict_of(a=b"ctorch\nFloatStorage\n"),
    "a function as value": make.dict_of(a=b"ctorch._utils\n_rebuild_tensor_v2\n"),
    "a storage as value": make.dict_of(a=make.storage_opcodes()),
    "a storage in a list": make.dict_of(a=b"](" + make.storage_opcodes() + b"e"),
    "append to a dict": b"\x80\x02}Na.",
    "items into a list": b"\x80\x02](NNu.",
    "call of a string": b"\x80\x02X\x01\0\0\0a)R.",
    "call of a storage type": b"\x80\x02ctorch\nFloatStorage\n)R.",
    "call without a tuple": b"\x80\x02ccollections\nOrderedDict\nNR.",
    "call with too many": b"\x80\x02ccollections\nOrderedDict\nN\x85R.",
    "tensor without arguments": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
    "build on a tensor": make.dict_of(a=make.tensor_opcodes((4,), (1,)) + b"}b"),
    "build on nothing": b"\x80\x02}b.",
    "memo of nothing": b"\x80\x02h\x05.",
    "put of nothing": b"\x80\x02q\x05.",
    "invalid utf-8": b"\x80\x02X\x02\0\0\0\xff\xff.",
    "persistent id no tuple": b"\x80\x02NQ.",
    "persistent id too short": b"\x80\x02X\x07\0\0\0storage\x85Q.",
    "persistent id of something else": b"\x80\x02(X\x06\0\0\0moduleNNNNtQ.",
    "missing storage": make.dict_of(a=make.tensor_opcodes((1,), (1,), storage=make.storage_opcodes("9", 1))),
    "storage named like a path": make.dict_of(a=make.tensor_opcodes((1,), (1,), storage=make.storage_opcodes("../0"))),
    "storage of another size": make.dict_of(a=make.tensor_opcodes((1,), (1,), storage=make.storage_opcodes("0", 5))),
    "storage of negative size": make.dict_of(a=make.tensor_opcodes((1,), (1,), storage=make.storage_opcodes("0", -4))),
    "storage of another type": make.dict_of(
        a=make.tensor_opcodes((4,), (1,), storage=make.storage_opcodes(kind="LongStorage"))
    ),
    "storage of huge size": make.dict_of(
        a=make.tensor_opcodes((1,), (1,), storage=make.storage_opcodes("0", 2**62 + 4))
    ),
    "huge shape": make.dict_of(a=make.tensor_opcodes((2**40,), (1,))),
    "shape that wraps around": make.dict_of(a=make.tensor_opcodes((2**32, 2**32), (2**32, 1))),
    "expanded far beyond": make.dict_of(a=make.tensor_opcodes((2**40,), (0,))),
    "negative shape": make.dict_of(a=make.tensor_opcodes((-1,), (1,))),
    "two negative sizes": make.dict_of(a=make.tensor_opcodes((-2, -2), (2, 1))),
    "negative stride": make.dict_of(a=make.tensor_opcodes((4,), (-1,), 3)),
    "negative offset": make.dict_of(a=make.tensor_opcodes((1,), (1,), -1)),
    "offset beyond": make.dict_of(a=make.tensor_opcodes((1,), (1,), 4)),
    "last element beyond": make.dict_of(a=make.tensor_opcodes((2, 2), (3, 1))),
    "stride overflow": make.dict_of(a=make.tensor_opcodes((2,), (BIG,))),
    "offset overflow": make.dict_of(a=make.tensor_opcodes((1,), (1,), BIG)),
    "sizes and strides differ in number": make.dict_of(a=make.tensor_opcodes((2, 2), (1,))),
    "hundred dimensions": make.dict_of(a=make.tensor_opcodes((1,) * 100, (1,) * 100)),
    "tensor over None": make.dict_of(a=make.tensor_opcodes((1,), (1,), storage=b"N")),
    "encode of a number": b"\x80\x02c_codecs\nencode\nK\x01X\x06\0\0\0latin1\x86R.",
    "encode by another codec": make.dict_of(a=b"c_codecs\nencode\n" + make.text("a") + make.text("zlib") + b"\x86R"),
    "encode what latin1 has not": make.dict_of(
        a=b"c_codecs\nencode\n" + make.text("\u20ac") + make.text("latin1") + b"\x86R"
    ),
    "size of no tuple": make.dict_of(a=b"ctorch\nSize\nN\x85R"),
    "other protocols": b"\x80\x04}.",
    "a frame": b"\x80\x02\x95\xff\xff\xff\xff\xff\xff\xff\x7f}.",
    "a line without end": b"\x80\x02c" + b"a" * 5000,
    "self in self": b"\x80\x02}q\0X\x01\0\0\0ah\0s.",
    "list in itself": b"\x80\x02}X\x01\0\0\0a]q\0h\0as.",
}


@pytest.mark.parametrize("name", PICKLES)
def test_pickles_that_make_no_sense_or_reach_beyond(tmp_path: Path, name: str) -> None:
    make.refused(tmp_path, make.pickle_file(PICKLES[name], FOUR_FLOATS))


def test_twin_the_same_pickles_made_right_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(make.pickle_file(make.dict_of(a=make.tensor_opcodes((2, 2), (2, 1))), FOUR_FLOATS))
    with CheckpointFile(path) as file:
        assert file.tensor(file.values["a"]).tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("opening", [b"]", b"}X\x01\0\0\0a", b"", b"("])
def test_deep_nesting(tmp_path: Path, opening: bytes) -> None:
    """100,000 lists in lists, dicts in dicts, tuples around tuples, marks upon marks."""
    depth = 100_000
    close = {b"]": b"a", b"}X\x01\0\0\0a": b"s", b"": b"\x85", b"(": b"t"}[opening]
    make.refused(tmp_path, make.pickle_file(make.dict_of(a=opening * depth + b"N" + close * depth)))


@pytest.mark.parametrize(
    ("dtype", "size"), [("float32", 5), ("qint8", 4), ("bits1x8", 4), ("uint3", 4), ("float4_e2m1fn_x2", 4)]
)
def test_types_that_cannot_be_read(tmp_path: Path, dtype: str, size: int) -> None:
    """A tensor of its own type over mere bytes."""
    make.refused(tmp_path, of_own_type(dtype, size))


def of_own_type(dtype: str, size: int) -> bytes:
    storage = make.storage_opcodes("0", size, "UntypedStorage").replace(b"ctorch\n", b"ctorch.storage\n")
    opcodes = make.tensor_opcodes((1,), (1,), storage=storage).replace(b"_v2\n", b"_v3\n")
    tensor = opcodes.removesuffix(b"tR") + f"ctorch\n{dtype}\ntR".encode()
    return make.pickle_file(make.dict_of(a=tensor), {"0": bytes(size)})


def test_twin_a_type_that_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(of_own_type("uint16", 4))
    with CheckpointFile(tmp_path / "a.pt") as file:
        assert file.tensor(file.values["a"]).tolist() == [0]


def test_bombs_do_not_fill_memory_or_run_for_long(tmp_path: Path) -> None:
    """In a process that may have 800 MB more than it starts with."""
    command = [sys.executable, "-m", "tests.bombs", str(tmp_path / "bomb.pt")]
    ran = fork_server.run(command, env=environment(), capture_output=True, text=True, timeout=280)
    assert ran.returncode == 0, ran.stderr[-2000:]
    lines = ran.stdout.splitlines()
    assert len(lines) > 20 and all(line.startswith("refused ") for line in lines), ran.stdout
