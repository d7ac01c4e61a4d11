"""What the compiler is told: the processor is looked at once, and on another machine again."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from unbroken.runtime import compile, environment, settings


def inductor(name: str) -> Any:
    """A module of torch._inductor, imported here: it takes a second, and every process of pytest reads this file."""
    return importlib.import_module(f"torch._inductor.{name}")


class Processor:
    """Stands in for inductor's own look: what the processor has, and what of it works when it is tried."""

    def __init__(self, has: list[str], works: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.tried = 0
        cpp = inductor("config").cpp

        @functools.cache
        def listed() -> list[str]:
            if cpp.vec_isa_ok:
                return has
            self.tried += 1
            return works

        self.listed = listed
        monkeypatch.setattr(inductor("cpu_vec_isa"), "valid_vec_isa_list", listed)


@pytest.fixture
def note(tmp_path: Path) -> Path:
    return tmp_path / "processor.json"


def test_the_processor_is_tried_once(note: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each trial is a child process; the next attempt has what the one before found."""
    for trials in (1, 0):
        processor = Processor(["avx512", "avx2"], ["avx512", "avx2"], monkeypatch)
        compile._look_at_processor(note)
        assert (processor.listed(), processor.tried) == (["avx512", "avx2"], trials)
        assert inductor("config").cpp.vec_isa_ok is None, "it is part of the key of compiled code"


def test_what_does_not_work_is_tried_every_time(note: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        processor = Processor(["avx512", "avx2"], ["avx2"], monkeypatch)
        compile._look_at_processor(note)
        assert (processor.listed(), processor.tried) == (["avx2"], 1)
    assert not note.exists()


@pytest.mark.parametrize("there", ["", "\udcff", '["avx512"]'])
def test_what_was_found_elsewhere_is_tried_here(note: Path, monkeypatch: pytest.MonkeyPatch, there: str) -> None:
    note.write_bytes(there.encode("utf-8", "surrogateescape"))
    processor = Processor(["avx2"], ["avx2"], monkeypatch)
    compile._look_at_processor(note)
    assert (processor.listed(), processor.tried) == (["avx2"], 1)


def test_the_look_that_is_replaced_here_is_the_one_that_inductor_takes(note: Path) -> None:
    """Of torch itself: the names, and that its answer is kept."""
    cpu_vec_isa = inductor("cpu_vec_isa")
    cpu_vec_isa.valid_vec_isa_list.cache_clear()
    compile._look_at_processor(note)
    before = cpu_vec_isa.valid_vec_isa_list.cache_info().misses
    cpu_vec_isa.pick_vec_isa()
    assert cpu_vec_isa.valid_vec_isa_list.cache_info().misses == before


@pytest.mark.parametrize("there", [set[str](), {"gcc"}, {"clang"}])
def test_compiling_for_a_gpu_needs_a_c_compiler(monkeypatch: pytest.MonkeyPatch, there: set[str]) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(settings.shutil, "which", lambda name: name if name in there else None)
    monkeypatch.setattr(settings.Path, "exists", lambda path: True)
    missing = settings._missing_for_compile(torch.device("cuda"))
    assert missing == ("" if there else "a C compiler for Triton, and there is no gcc or clang")
    monkeypatch.setattr(settings.Path, "exists", lambda path: False)
    assert settings._missing_for_compile(torch.device("cuda"))


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), "fp32"), ((7, 0), "fp32"), ((8, 0), "bf16")])
def test_bf16_is_for_gpus_that_do_not_emulate_it(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: str
) -> None:
    """torch's own question answers for a T4 with yes, by emulation, unless that is left out."""

    def supported(including_emulation: bool = True) -> bool:
        return including_emulation or capability[0] >= 8

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert settings._best_dtype(torch.device("cuda")) == dtype


def test_sources_of_a_release_with_the_same_bits_are_no_drift(monkeypatch: pytest.MonkeyPatch) -> None:
    before, now = {"model.py": "a", "commands/ls.py": "x"}, {"model/gpt.py": "b"}
    monkeypatch.setattr(environment, "git_commit", lambda: "4d794a5")
    assert "model.py" in environment.sources_drift(before, now, "code", "other code")[0]
    monkeypatch.setattr(environment, "SAME_BITS", {environment.sources_digest(before, "code")})
    assert environment.sources_drift(before, now, "code", "other code") == []
    assert environment.sources_drift({**before, "model.py": "c"}, now, "code", "other code") != []
    monkeypatch.setattr(environment, "git_commit", lambda: "4d794a5+")  # with changes of the user's own
    assert environment.sources_drift(before, now, "code", "other code") != []
