"""Ratchets: what users, checkpoints and readers of the code rely on changes only on purpose, by editing this."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.harness import ROOT
from unbroken import __main__ as door
from unbroken.checkpoint import schema
from unbroken.config import ATTEMPT_ONLY, AUTO, CRITICAL, FIELDS, MODELS

SCRIPT = ROOT / "train_gpt2_mod.py"
PACKAGE = ROOT / "unbroken"
SOURCES = [SCRIPT, *sorted(PACKAGE.rglob("*.py"))]
TESTS = [*sorted((ROOT / "tests").rglob("*.py")), *sorted((ROOT / "benchmarks").rglob("*.py"))]

# The guide's program: names and defaults as its users type and omit them.
GUIDE = {
    "input_bin": "",
    "input_val_bin": "",
    "output_dir": "",
    "model": "d12",
    "batch_size": 4,
    "grad_accumulation_steps": 1,
    "sequence_length": 64,
    "num_iterations": 10,
    "learning_rate": 1e-4,
    "warmup_iters": 0,
    "warmdown_iters": 0,
    "weight_decay": 0.0,
    "val_loss_every": 0,
    "val_batch_size": 16,
    "save_every": 5000,
    "log_wandb": False,
    "resume_from": "",
}
OURS = {
    "init_from": "",
    "seed": 1337,
    "grad_clip": 0.0,
    "optimizer": "adamw",
    "total_batch_size": 0,
    "mirror": "",
    "mtbf_minutes": 60.0,
    "activation_checkpointing": "off",
    "val_tokens": 1_048_576,
    "save_minutes": 0.0,
    "keep_last": AUTO,
    "keep_every": 0,
    "grace_seconds": 30.0,
    "run_id": "",
    "log_tensorboard": False,
    "fork": False,
    "on_extend": "keep",
    "on_divergence": "warn",
    "allow_data_change": False,
    "device": "auto",
    "dtype": "auto",
    "compile": "auto",
    "deterministic": "on",
    "elastic_ranks": 8,
    "threads": 0,
    "trace_steps": 0,
    "on_oom": "shrink",
}
GUIDE_KEYS = {"model", "optimizer", "step", "code", "args", "run_id"}
OUR_KEYS = {"format", "progress", "data", "rng", "environment", "sources"}

# Who may read environment variables, and why.
READS_ENVIRONMENT = {
    "distributed.py": "what torchrun tells a process",
    "machine.py": "cuBLAS's workspace, which determinism needs; torch's allocator",
    "compiling.py": "the folder of compiled code, the C++ compiler",
    "prefetch.py": "what torchrun tells a process, before torch is there; how OpenMP's threads wait",
    "screen.py": "NO_COLOR and TERM",
    "tracking.py": "WANDB_PROJECT",
}
WITHOUT_TORCH = (
    *("__main__", "errors", "config", "screen", "corpus", "shards", "tokens", "plan", "interrupts", "prefetch"),
    *("checkpoint.schema", "checkpoint.archive", "journal", "logfile"),
    *(f"commands.{name.replace('-', '_')}" for name in sorted(door.KNOWN)),
)


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE if path.is_relative_to(PACKAGE) else ROOT).as_posix()


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree(path)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def imports(path: Path) -> set[str]:
    """The modules of the package that a file imports at its top, as paths: checkpoint/reader.py."""
    names: set[str] = set()
    for node in tree(path).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "unbroken":
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    modules = {name.removeprefix("unbroken.").replace(".", "/") + ".py" for name in names}
    return {name for name in modules if (PACKAGE / name).is_file()}


# ---- what users type -------------------------------------------------------------------------------------------------


def test_the_flags_and_their_defaults_are_frozen() -> None:
    assert {name: item.default for name, item in FIELDS.items()} == {**GUIDE, **OURS}


def test_the_kinds_of_the_defaults_are_frozen() -> None:
    assert {name: type(item.default) for name, item in FIELDS.items()} == {
        k: type(v) for k, v in (GUIDE | OURS).items()
    }


def test_every_flag_has_help_and_every_model_a_name() -> None:
    assert all(item.metadata["help"] for item in FIELDS.values())
    assert MODELS == ("d2", "d4", "d6", "d8", "d12", "d24", "d36", "d48")


def test_what_the_guide_warns_about_is_a_flag() -> None:
    assert set(CRITICAL) == {"model", "batch_size", "sequence_length", "grad_accumulation_steps"}
    assert set(FIELDS) > ATTEMPT_ONLY


def test_every_flag_is_used_somewhere() -> None:
    """As an attribute of the configuration, or as what was typed; lists of names are no use."""
    text = "\n".join(path.read_text("utf-8") for path in SOURCES if path.name not in ("config.py", "doctor.py"))
    used = r"""(\bconfig|_config|before|new)\.{0}\b|(typed|args|made|values|saved)(\.get\(|\[)["']{0}["']"""
    assert [name for name in FIELDS if not re.search(used.replace("{0}", name), text)] == []


def test_the_tools_are_frozen() -> None:
    looking = {"ls", "plot", "report", "export-log", "show", "verify", "diff"}
    using = {"sample", "eval", "export", "import"}
    assert {*looking, *using, "demo", "doctor", "data", "mirror", "completion"} == door.KNOWN


# ---- what is on disk -------------------------------------------------------------------------------------------------


def test_the_keys_of_a_checkpoint_are_frozen() -> None:
    assert set(schema.KEYS) == GUIDE_KEYS | OUR_KEYS
    assert schema.FORMAT == 1


def test_the_names_of_checkpoints_are_frozen() -> None:
    assert schema.FINAL == "final.pt"
    assert schema.checkpoint_name(256) == "model_step000256.pt"
    assert schema.checkpoint_step("model_step000256.pt") == 256


# ---- how the code reads ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [*SOURCES, *TESTS], ids=name_of)
def test_files_stay_short(path: Path) -> None:
    limit = 300 if path == SCRIPT else 350
    assert len(path.read_text("utf-8").splitlines()) <= limit


@pytest.mark.parametrize("path", [*SOURCES, *TESTS], ids=name_of)
def test_functions_stay_short(path: Path) -> None:
    long = {node.name: length(node) for node in functions(path) if length(node) > 50}
    if path == SCRIPT:
        assert long.pop("loop", 0) <= 80
    assert long == {}


def test_there_are_no_rooms_for_odds_and_ends() -> None:
    assert not [path for path in SOURCES if re.search(r"util|common|helper|manager|misc", path.name)]


def test_nothing_is_left_to_do() -> None:
    assert not [
        path for path in SOURCES if re.search(r"\b(TODO|FIXME|XXX|NotImplementedError)\b", path.read_text("utf-8"))
    ]


# ---- who knows whom --------------------------------------------------------------------------------------------------


def test_imports_go_round_in_no_circle() -> None:
    graph = {name_of(path): imports(path) for path in SOURCES}
    tuple(TopologicalSorter(graph).static_order())  # CycleError names the circle


def test_the_checkpoint_engine_knows_nothing_of_training() -> None:
    allowed = {"errors.py", "leaves.py", "distributed.py"}
    for path in sorted((PACKAGE / "checkpoint").glob("*.py")):
        strangers = {name for name in imports(path) if not name.startswith("checkpoint/")} - allowed
        assert strangers == set(), path


def test_the_bottom_knows_nobody_and_the_top_is_known_by_nobody() -> None:
    for name in ("errors.py", "leaves.py", "head.py", "cadence.py"):
        assert imports(PACKAGE / name) == set()
    assert imports(PACKAGE / "model.py") == {"head.py"}
    for path in SOURCES:
        if "commands" not in path.parts:
            assert not [name for name in imports(path) if name.startswith("commands/")], path
        assert "train_gpt2_mod" not in {
            alias.name for node in tree(path).body if isinstance(node, ast.Import) for alias in node.names
        }


def test_environment_variables_are_read_in_few_places() -> None:
    readers = {name_of(path) for path in SOURCES if re.search(r"\bos\.(environ|getenv)\b", path.read_text("utf-8"))}
    assert readers == set(READS_ENVIRONMENT)


def test_only_torch_load_of_nobody() -> None:
    """Checkpoints are strangers' files: no source file unpickles, evaluates or executes anything."""
    for path in SOURCES:
        called = {ast.unparse(node.func) for node in ast.walk(tree(path)) if isinstance(node, ast.Call)}
        assert not called & {"torch.load", "pickle.load", "pickle.loads", "eval", "exec", "os.system"}, path


def test_what_needs_no_torch_does_not_wait_for_it() -> None:
    """torch takes more than a second to import: `--help` must not."""
    code = "import importlib, sys\n" + "\n".join(
        f"importlib.import_module('unbroken.{name}'); assert 'torch' not in sys.modules, {name!r}"
        for name in WITHOUT_TORCH
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
