"""The table of model families: what --model takes is what can be built, counted and recognized."""

from __future__ import annotations

import pytest

from unbroken.model import families
from unbroken.model.gpt import GPT


def test_the_names_of_a_family_are_the_sizes_of_its_class() -> None:
    for family in families.FAMILIES:
        assert set(families.model_class(family.names[0]).sizes) == set(family.names)
    assert len(set(families.NAMES)) == len(families.NAMES)


def test_a_built_model_takes_no_memory_and_is_counted() -> None:
    model = families.build("d12")
    assert isinstance(model, GPT) and all(weight.is_meta for weight in model.parameters())
    assert model.num_parameters() == 50257 * 768 + 12 * 12 * 768**2
    assert model.flops_per_token(1024) == 6 * model.num_parameters() + 12 * 12 * 768 * 1024
    assert [shape for _, shape in model.hidden_matrices()] == [(768, 768), (768, 768), (3072, 768), (768, 3072)] * 12


def shapes(name: str, **flags: str) -> dict[str, tuple[int, ...]]:
    return {key: tuple(weight.shape) for key, weight in families.build(name, flags).state_dict().items()}


@pytest.mark.parametrize("name", families.NAMES)
def test_a_model_is_recognized_by_its_weights(name: str) -> None:
    for flags in families.model_class(name).variants:
        assert families.identify(shapes(name, **flags)) == (name, flags)


@pytest.mark.parametrize("name", GPT.sizes)
def test_weights_of_a_gpt_need_not_be_all_and_may_hold_what_is_computed(name: str) -> None:
    found = shapes(name)
    del found["lm_head.weight"]  # tied, and stored once
    assert families.identify({**found, "transformer.h.0.attn.rotary.inv_freq": (32,)}) == (name, {})


@pytest.mark.parametrize("change", [{"transformer.h.2.mlp.c_fc.weight": (512, 128)}, {"lm_head.bias": (50257,)}])
def test_weights_that_have_no_place_are_no_model(change: dict[str, tuple[int, ...]]) -> None:
    """A layer or a bias that would be left out without a word makes another model."""
    assert families.identify({**shapes("d2"), **change}) == families.identify({}) == ("", {})
