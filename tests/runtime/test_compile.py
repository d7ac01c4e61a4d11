"""What the compiler is told: the processor is looked at once, and on another machine again."""

from __future__ import annotations

import functools
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from unbroken.config import merge
from unbroken.errors import UserError
from unbroken.runtime import compile, environment, settings


def inductor(name: str) -> Any:
    """A module of torch._inductor, imported here: it takes a second, and every process of pytest reads this file."""
    return importlib.import_module(f"torch._inductor.{name}")


def inductor_package() -> Any:
    return importlib.import_module("torch._inductor")


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
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(settings.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(settings.shutil, "which", lambda name: name if name in there else None)
    monkeypatch.setattr(settings.Path, "exists", lambda path: True)
    missing = settings._missing_for_compile(torch.device("cuda"))
    assert missing == ("" if there else "a C compiler for Triton, and there is no gcc or clang")
    monkeypatch.setattr(settings.Path, "exists", lambda path: False)
    assert settings._missing_for_compile(torch.device("cuda"))
    monkeypatch.setattr(settings.importlib.util, "find_spec", lambda name: None)
    assert settings._missing_for_compile(torch.device("cuda")) == "Triton, and there is no package of that name"


def test_headers_are_looked_for_where_triton_looks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The scheme of Debian's own Python names a folder below /usr/local, which has none."""
    (tmp_path / "Python.h").touch()
    places = {"posix_local": "/nowhere", "posix_prefix": str(tmp_path)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(settings.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(settings.shutil, "which", lambda name: name)
    monkeypatch.setattr(settings.sysconfig, "get_default_scheme", lambda: "posix_local")
    monkeypatch.setattr(settings.sysconfig, "get_path", lambda name, scheme="posix_local": places[scheme])
    assert settings._missing_for_compile(torch.device("cuda")) == ""


def test_a_gpu_that_triton_does_not_know_trains_without_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 0))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    gpu = torch.device("cuda")
    assert not settings.ResolvedSettings.resolve(merge({}), {}, gpu, {}).compile
    with pytest.raises(UserError, match=r"compiled code needs a GPU with compute capability 7\.0"):
        settings.ResolvedSettings.resolve(merge({"compile": "on"}), {}, gpu, {})


def test_no_number_of_shapes_ends_compilation() -> None:
    """Otherwise the ninth would run without compiling, and in an attempt that sees fewer it would not."""
    dynamo, seen = importlib.import_module("torch._dynamo"), []

    def backend(graph: Any, _: Any) -> Any:
        seen.append(graph)
        return graph

    with dynamo.config.patch(recompile_limit=8):
        compile._allow_shapes()
        doubled = torch.compile(lambda x: 2 * x, backend=backend, dynamic=False)
        for size in range(2, 14):
            doubled(torch.zeros(size))
    assert len(seen) == 12


def test_nothing_is_chosen_by_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch 2.9, which has no deterministic mode, and with later ones."""
    config = inductor("config")
    names = ("max_autotune", "max_autotune_gemm", "max_autotune_pointwise", "coordinate_descent_tuning")
    with config.patch({**dict.fromkeys(names, True), "triton.autotune_pointwise": True}):
        compile._fix_choices()
        assert config.deterministic and not any(getattr(config, name) for name in names)
        assert not config.triton.autotune_pointwise
    old = type("config", (), {"triton": type("triton", (), {})})
    monkeypatch.setitem(sys.modules, "torch._inductor.config", old)
    monkeypatch.setattr(inductor_package(), "config", old)
    compile._fix_choices()
    assert not old.shape_padding and not old.dynamic_scale_rblock  # type: ignore[attr-defined]


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
