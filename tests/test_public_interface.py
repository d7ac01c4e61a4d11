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
from unbroken.checkpoint.format import schema
from unbroken.commands import COMMAND_NAMES, module_of
from unbroken.config import ATTEMPT_ONLY, AUTO, CRITICAL, FIELDS
from unbroken.model import families

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
    "dropout": 0.0,
    "bias": "on",
    "seed": 1337,
    "shuffle": "off",
    "window_tokens": 0,
    "num_tokens": "",
    "num_epochs": 0.0,
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
    "keep_best": 0,
    "save_steps": "",
    "save_weights_every": 0,
    "save_weights_dtype": "bfloat16",
    "grace_seconds": 30.0,
    "run_id": "",
    "name": "",
    "logs_dir": "logs",
    "log_every": 1,
    "wandb_project": "unbroken",
    "wandb_entity": "",
    "wandb_group": "",
    "wandb_tags": "",
    "log_trackio": False,
    "log_mlflow": False,
    "log_tensorboard": False,
    "fork": False,
    "on_extend": "keep",
    "on_divergence": "warn",
    "resume_processes": 1,
    "allow_data_change": False,
    "device": "auto",
    "dtype": "auto",
    "compile": "auto",
    "deterministic": "on",
    "elastic_ranks": 8,
    "threads": 0,
    "trace_steps": 0,
    "on_oom": "shrink",
    "hang": "auto",
    "on_nan": "stop",
    "on_spike": "off",
    "skip_batches": "",
    "max_hours": 0.0,
    "replay": "first",
}
GUIDE_KEYS = {"model", "optimizer", "step", "code", "args", "run_id"}
OUR_KEYS = {"format", "progress", "data", "rng", "environment", "sources"}

# The rooms of the package from the lowest to the highest: a room imports only from its own and from lower ones.
ROOMS = (
    *("errors", "findings", "text", "files", "host", "threads", "console", "argparser", "paths", "model", "config"),
    *("data", "distributed", "checkpoint", "optim", "schedule", "runtime", "metrics", "validation"),
    *("run", "mirror", "inference", "__init__", "commands", "__main__"),
)
# What a room may import, where that is less than everything below it.
NARROW = {
    "model": {"errors"},
    "data": {"errors", "files", "text", "threads", "model"},
    "distributed": {"errors", "text", "console", "host"},
    "checkpoint": {"errors", "files", "text", "host", "threads", "paths", "distributed"},
}

# Who may read environment variables, and why.
READS_ENVIRONMENT = {
    "distributed/world.py": "what torchrun tells a process",
    "distributed/peer_watch.py": "the address of torchrun's store, by which the ranks reach each other",
    "runtime/settings.py": "cuBLAS's workspace, which determinism needs; torch's allocator",
    "runtime/compile.py": "the folder of compiled code, the C++ compiler",
    "runtime/startup.py": "how OpenMP's threads wait",
    "console.py": "NO_COLOR and TERM",
    "metrics/trackers.py": "the trackers' own variables, which win over flags",
    "commands/launch.py": "OMP_NUM_THREADS, which torchrun would set with four lines",
    "commands/data.py": "the Hub's progress bars, switched off where there is no terminal",
}
WITHOUT_TORCH = (
    *("unbroken.__main__", "unbroken.config", "unbroken.console", "unbroken.data.prepare", "unbroken.data.stream"),
    "unbroken.model.families",
    *("unbroken.distributed.step_plan", "unbroken.runtime.signals", "unbroken.runtime.startup"),
    *("unbroken.checkpoint", "unbroken.checkpoint.exceptions"),
    *("unbroken.checkpoint.directory", "unbroken.checkpoint.format.schema", "unbroken.checkpoint.format.zip_layout"),
    *("unbroken.metrics.timeline", "unbroken.run.locate", "unbroken.run.lock"),
    *(module_of(name) for name in sorted(COMMAND_NAMES)),
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
    """The files of the package that a file imports: at its top, inside of a function, or for its types only."""
    names: set[str] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "unbroken":
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.split(".")[0] == "unbroken"}
    found: set[str] = set()
    for name in names:
        parts = name.split(".")[1:]
        for path_of in (Path(*parts).with_suffix(".py") if parts else None, Path(*parts, "__init__.py")):
            if path_of is not None and (PACKAGE / path_of).is_file():
                found.add(path_of.as_posix())
    # `from unbroken.data import shards` runs two __init__.py that hold docstrings, and `load` for notebooks.
    return {name for name in found if not name.endswith("__init__.py") or name == "commands/__init__.py"}


def room_of(name: str) -> str:
    """The first part of a file's path below the package: a top-level module or a sub-package."""
    return name.split("/")[0].removesuffix(".py")


# ---- what users type -------------------------------------------------------------------------------------------------


def test_the_flags_and_their_defaults_are_frozen() -> None:
    assert {name: item.default for name, item in FIELDS.items()} == {**GUIDE, **OURS}


def test_the_kinds_of_the_defaults_are_frozen() -> None:
    assert {name: type(item.default) for name, item in FIELDS.items()} == {
        k: type(v) for k, v in (GUIDE | OURS).items()
    }


def test_every_flag_has_help_and_every_model_a_name() -> None:
    assert all(item.metadata["help"] for item in FIELDS.values())
    assert families.NAMES[:9] == ("d2", "d4", "d6", "d8", "d12", "d24", "d36", "d48", "tiny")
    assert families.NAMES[9:] == ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "gpt2-tiny")


def test_what_the_guide_warns_about_is_a_flag() -> None:
    assert set(CRITICAL) == {"model", "batch_size", "sequence_length", "grad_accumulation_steps"}
    assert set(FIELDS) > ATTEMPT_ONLY


def test_every_flag_is_used_somewhere() -> None:
    """As an attribute of the configuration, or as what was typed; lists of names are no use."""
    text = "\n".join(path.read_text("utf-8") for path in SOURCES if path.name != "doctor.py")
    used = r"""(\bconfig|_config|before|new|self)\.{0}\b|(typed|args|made|values|saved)(\.get\(|\[)["']{0}["']"""
    used += '|"{0}": Entry'  # in the table of trackers
    assert [name for name in FIELDS if not re.search(used.replace("{0}", name), text)] == []


def test_the_tools_are_frozen() -> None:
    looking = {"ls", "plot", "report", "export-log", "show", "verify", "diff", "audit"}
    using = {"sample", "eval", "export", "import"}
    assert {*looking, *using, "demo", "doctor", "launch", "data", "mirror", "save", "completion"} == COMMAND_NAMES


# ---- what is on disk -------------------------------------------------------------------------------------------------


def test_the_keys_of_a_checkpoint_are_frozen() -> None:
    assert set(schema.KEYS) == GUIDE_KEYS | OUR_KEYS
    assert schema.FORMAT == 1


def test_the_names_of_checkpoints_are_frozen() -> None:
    assert schema.FINAL == "final.pt"
    assert schema.checkpoint_name(256) == "model_step000256.pt"
    assert schema.checkpoint_step("model_step000256.pt") == 256


# ---- how the code reads ----------------------------------------------------------------------------------------------


def test_the_entry_script_can_be_read_in_five_minutes() -> None:
    assert len(SCRIPT.read_text("utf-8").splitlines()) <= 300
    assert {node.name: length(node) for node in functions(SCRIPT)}["loop"] <= 80


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


def test_every_room_has_its_place_and_imports_point_downward() -> None:
    files = [path for path in SOURCES if path != SCRIPT]
    assert {room_of(name_of(path)) for path in files} == set(ROOMS)
    upward = {
        f"{name_of(path)} imports {name}"
        for path in files
        for name in imports(path)
        if ROOMS.index(room_of(name)) > ROOMS.index(room_of(name_of(path)))
    }
    assert upward == set()


@pytest.mark.parametrize("room", sorted(NARROW))
def test_a_room_of_the_engine_knows_only_what_it_must(room: str) -> None:
    for path in (PACKAGE / room).rglob("*.py"):
        strangers = {room_of(name) for name in imports(path)} - {room} - NARROW[room]
        assert strangers == set(), path


def test_the_format_is_pure() -> None:
    """The bytes of a file are worked out without touching one."""
    for path in (PACKAGE / "checkpoint" / "format").glob("*.py"):
        assert not re.search(r"\bopen\(|\bos\.", path.read_text("utf-8")), path


def test_nobody_imports_the_entry_script() -> None:
    for path in SOURCES:
        assert "train_gpt2_mod" not in {
            alias.name for node in tree(path).body if isinstance(node, ast.Import) for alias in node.names
        }


def test_every_package_says_what_it_promises() -> None:
    for folder in [path for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()]:
        assert (folder / "README.md").is_file(), folder


def test_environment_variables_are_read_in_few_places() -> None:
    readers = {name_of(path) for path in SOURCES if re.search(r"\bos\.(environ|getenv)\b", path.read_text("utf-8"))}
    assert readers == set(READS_ENVIRONMENT)


def test_nothing_of_its_surroundings_is_read_when_it_is_imported() -> None:
    """A program has what it finds when it starts, not what somebody found who imported the package before."""
    surroundings = {"environ", "getenv", "getcwd", "cwd", "home", "getpid", "time", "monotonic", "stdout", "stderr"}
    for path in SOURCES:
        waiting: list[ast.AST] = [tree(path)]
        while waiting:
            node = waiting.pop()
            is_main = isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) and not is_main:
                waiting += ast.iter_child_nodes(node)
            assert not (isinstance(node, ast.Attribute) and node.attr in surroundings), (path, ast.unparse(node))


def test_only_torch_load_of_nobody() -> None:
    """Checkpoints are strangers' files: no source file unpickles, evaluates or executes anything."""
    for path in SOURCES:
        called = {ast.unparse(node.func) for node in ast.walk(tree(path)) if isinstance(node, ast.Call)}
        assert not called & {"torch.load", "pickle.load", "pickle.loads", "eval", "exec", "os.system"}, path


def test_what_needs_no_torch_does_not_wait_for_it() -> None:
    """torch takes more than a second to import: `--help` must not."""
    code = "import importlib, sys\n" + "\n".join(
        f"importlib.import_module('{name}'); assert 'torch' not in sys.modules, {name!r}" for name in WITHOUT_TORCH
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
