"""docs/compatibility.md lists every private name of torch that the code leans on, and no other."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

from tests import matrix
from tests.harness import ROOT

PAGE = ROOT / "docs/compatibility.md"
CODE = [
    *sorted((ROOT / "unbroken").rglob("*.py")),
    ROOT / "train_gpt2_mod.py",
    *sorted((ROOT / "benchmarks").glob("*.py")),
]
PRIVATE = re.compile(r"torch(?:\.\w+)*\._[a-zA-Z]\w*(?:\.\w+)*")


def private_names(source: str) -> set[str]:
    """The private names of torch in a file: imported, reached from a module, or spelled in a text."""
    nodes, found = list(ast.walk(ast.parse(source))), set()
    aliases = {"torch": "torch"}
    for node in nodes:
        if isinstance(node, ast.Import):
            aliases |= {each.asname: each.name for each in node.names if each.asname}
            found |= {each.name for each in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {each.asname or each.name: f"{node.module}.{each.name}" for each in node.names}
            aliases |= names
            found |= set(names.values())
    for node in nodes:
        reached = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
        if asked := re.match(r"getattr\(([\w.]+), '(\w+)'", ast.unparse(node) if isinstance(node, ast.Call) else ""):
            reached = f"{asked[1]}.{asked[2]}"
        if reached:
            root, _, rest = reached.partition(".")
            found.add(f"{aliases.get(root, root)}.{rest}")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= set(PRIVATE.findall(node.value))
    # Of a private module it is enough to know the module, and what is reached in it.
    whole = {name for name in found if PRIVATE.fullmatch(name)}
    return {name for name in whole if not any(other.startswith(f"{name}.") for other in whole)}


def listed() -> set[str]:
    rows = re.findall(r"^\| (`torch.*?) \|", PAGE.read_text("utf-8"), re.M)
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


def test_every_private_name_of_torch_is_listed() -> None:
    used: dict[str, str] = {}
    for path in CODE:
        used |= dict.fromkeys(private_names(path.read_text("utf-8")), path.relative_to(ROOT).as_posix())
    assert {name: where for name, where in used.items() if name not in listed()} == {}, "not in docs/compatibility.md"
    assert listed() - used.keys() == set(), "no longer used"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import torch\ntorch._C._a(1)", {"torch._C._a"}),
        ("from torch import distributed as dist\ndist.c10d._b", {"torch.distributed.c10d._b"}),
        ("import torch._inductor.config as x\nx.max_autotune = 1", {"torch._inductor.config.max_autotune"}),
        ("from torch._utils import thing", {"torch._utils.thing"}),
        ("import importlib\nimportlib.import_module('torch._dynamo')", {"torch._dynamo"}),
        ("import torch\ntorch._foreach_add_(a, b)", {"torch._foreach_add_"}),
        ("import torch\ngetattr(torch._C, '_d', None)()", {"torch._C._d"}),
        ("self._torch._x; torch.nn.Module; 'torch.save'", set()),
    ],
)
def test_it_would_be_seen(source: str, found: set[str]) -> None:
    assert private_names(source) == found


def test_the_matrix_names_its_parts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert {"numpy", "pytest", "tokenizers"} <= set(matrix.requirements())
    assert not [name for name in matrix.requirements() if name.startswith(("torch", "unbroken"))]
    assert matrix.counts("3 passed\nnoise\n2 failed, 10 passed, 1 skipped in 3.0s\n") == [10, 2, 0, 1]
    assert matrix.find_interpreter(f"{sys.version_info[0]}.{sys.version_info[1]}") is not None
    monkeypatch.setenv("UNBROKEN_MATRIX", str(tmp_path))
    assert matrix.main(["9.9:2.9"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "| 9.9 | 2.9 | no interpreter | | |"
