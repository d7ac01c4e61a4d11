"""What the compiler is told: the processor is looked at once, and on another machine again."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
from torch._inductor import config as inductor
from torch._inductor import cpu_vec_isa

from unbroken.runtime import compile


class Processor:
    """Stands in for inductor's own look: what the processor has, and what of it works when it is tried."""

    def __init__(self, has: list[str], works: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.tried = 0

        @functools.cache
        def listed() -> list[str]:
            if inductor.cpp.vec_isa_ok:
                return has
            self.tried += 1
            return works

        self.listed = listed
        monkeypatch.setattr(cpu_vec_isa, "valid_vec_isa_list", listed)


@pytest.fixture
def note(tmp_path: Path) -> Path:
    return tmp_path / "processor.json"


def test_the_processor_is_tried_once(note: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each trial is a child process; the next attempt has what the one before found."""
    for trials in (1, 0):
        processor = Processor(["avx512", "avx2"], ["avx512", "avx2"], monkeypatch)
        compile._look_at_processor(note)
        assert (processor.listed(), processor.tried) == (["avx512", "avx2"], trials)
        assert inductor.cpp.vec_isa_ok is None, "it is part of the key of compiled code"


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
    cpu_vec_isa.valid_vec_isa_list.cache_clear()
    compile._look_at_processor(note)
    before = cpu_vec_isa.valid_vec_isa_list.cache_info().misses
    cpu_vec_isa.pick_vec_isa()
    assert cpu_vec_isa.valid_vec_isa_list.cache_info().misses == before
