"""What the documents say is there: files, tools, flags, keys."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import re
from pathlib import Path

import numpy as np
import pytest

from tests.harness import ROOT
from unbroken.checkpoint.format import schema
from unbroken.commands import COMMAND_NAMES, module_of
from unbroken.config import FIELDS
from unbroken.data.stream import Stream
from unbroken.run.state import Progress

DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
OF_OTHERS = {  # flags of torchrun, sbatch, unittest-like tools
    *("standalone", "nproc_per_node", "nnodes", "rdzv-backend", "rdzv-endpoint", "max-restarts"),
    *("signals-to-handle", "shutdown-timeout", "requeue", "open-mode", "signal", "nodes", "time", "help"),
    *("ntasks-per-node", "gpus-per-node", "cpus-per-task", "strict", "model_args", "tasks", "logdir", "private"),
    *("model-impl", "local-dir", "backend-store-uri"),
    *("key", "checkpoint", "training", "debug", "module", "start"),  # coming-from.md names other programs' own
    *(
        "config",
        "rounds",
        "steps",
        "losses",
        "products",
        "mean_seconds",
        *("minutes", "states", "resumes", "images", "faults", "lanes", "saves", "gpus"),
        "only",
        "gpus-per-task",
        "no-project",
        "text",
        "scale",
    ),  # the door, benchmarks
}


def flags_of_tools() -> set[str]:
    found = set()
    for name in sorted(COMMAND_NAMES):
        parser = argparse.ArgumentParser()
        importlib.import_module(module_of(name)).configure(parser)
        parsers = [parser]
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
        found |= {option for each in parsers for action in each._actions for option in action.option_strings}
    return {option.removeprefix("--") for option in found}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)\)", path.read_text("utf-8"))
    broken = [target for target in targets if "://" not in target and not (path.parent / target).exists()]
    assert broken == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_flags_and_tools_exist(path: Path) -> None:
    text = path.read_text("utf-8")
    named = set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", text))
    known = {*FIELDS, *(f"no-{name}" for name in FIELDS), *flags_of_tools(), *OF_OTHERS}
    assert named - known == set()
    assert set(re.findall(r"-m unbroken ([a-z-]*[a-z])", text)) <= COMMAND_NAMES


def test_nanogpt_s_tokens_are_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the lines of coming-from.md as they are, into more than one shard, no token lost."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/coming-from.md").read_text("utf-8"), re.S)
    monkeypatch.chdir(tmp_path)
    tokens = {"train": np.arange(2500, dtype=np.uint16), "val": np.arange(7, dtype=np.uint16)}
    for kind, each in tokens.items():
        each.tofile(f"{kind}.bin")
    exec(compile(code.replace("10**8", "10**3"), "coming-from.md", "exec"), {})
    assert len(list(tmp_path.glob("mine_train_*.bin"))) == 3
    for kind, each in tokens.items():
        stream = Stream.open(f"mine_{kind}_*.bin")
        assert np.array_equal(stream.read(0, len(each)), each)


def test_the_format_is_described_whole() -> None:
    text = (ROOT / "docs/format.md").read_text("utf-8")
    rows = set(re.findall(r"^\| `(\w+)`", text, re.M))
    assert rows >= set(schema.KEYS) | {item.name for item in dataclasses.fields(Progress)}
    assert f"an integer: {schema.FORMAT}" in text
