"""Layers that are compiled in groups: one graph for all groups, and nothing else differs."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from unbroken.model.gpt import GPT
from unbroken.model.gpt2 import GPT2, GPT2Config
from unbroken.model.language_model import LAYERS_PER_GRAPH, LanguageModel, ModelConfig, largest_divisor

MODELS = (GPT, ModelConfig(6, 2, 32, vocab_size=64)), (GPT2, GPT2Config(6, 2, 32, vocab_size=64))


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The number of layers in each graph that is compiled, in order; nothing is generated from them."""
    found: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        layers = graph.code.count("scaled_dot_product_attention(")
        found.extend([layers] * (layers > 0))  # the loss has none
        return graph.forward

    dynamo = importlib.import_module("torch._dynamo")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    monkeypatch.setitem(LAYERS_PER_GRAPH, "cpu", 4)
    dynamo.reset()
    yield found
    dynamo.reset()


def build(kind: type[LanguageModel], config: ModelConfig) -> LanguageModel:
    model = kind.build_on_meta(config).allocate(torch.device("cpu"))
    model.initialize(1)
    return model


def gradients(model: LanguageModel, tokens: Tensor) -> list[Tensor]:
    model.zero_grad()
    model(tokens, tokens).backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize(("kind", "config"), MODELS)
def test_all_groups_of_layers_are_one_graph(kind: type[LanguageModel], config: ModelConfig, graphs: list[int]) -> None:
    """Its weights are inputs. Another batch size and validation are another graph each, for all groups."""
    model, eager = build(kind, config), build(kind, config)
    names = [name for name, _ in model.named_modules()]
    model.compile_blocks()
    assert model.layers_per_graph == 3  # 4 does not divide 6
    assert list(model.state_dict()) == list(eager.state_dict())
    assert [name for name, _ in model.named_modules()] == names

    tokens = torch.arange(48).reshape(3, 16)
    for batch in (tokens[:2], tokens, tokens[:2]):
        torch.testing.assert_close(gradients(model, batch), gradients(eager, batch))
    assert graphs == [3, 3]
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(tokens, tokens), eager(tokens, tokens))
    assert graphs == [3, 3, 3]


@pytest.mark.parametrize(("kind", "config"), MODELS[:1])
def test_layers_one_by_one(kind: type[LanguageModel], config: ModelConfig, graphs: list[int]) -> None:
    """With `recompute`, and where a model calls `run_block` itself."""
    model, eager = build(kind, config), build(kind, config)
    model.compile_blocks()
    x, tables = torch.ones(1, 4, 32, requires_grad=True), (torch.ones(4, 8), torch.zeros(4, 8))
    torch.testing.assert_close(model.run_block(model.blocks()[0], x, *tables), eager.blocks()[0](x, *tables))
    assert graphs == [1]
    model.recompute, tokens = True, torch.arange(16).reshape(1, 16)
    torch.testing.assert_close(gradients(model, tokens), gradients(eager, tokens))
    assert graphs and set(graphs) == {1}


def test_the_layers_of_a_graph_divide_those_of_the_model() -> None:
    layers = (0, 1, 2, 4, 6, 7, 8, 12, 24, 25, 36, 48)
    assert [largest_divisor(each, 4) for each in layers] == [1, 1, 2, 4, 3, 1, 4, 4, 4, 1, 4, 4]
    assert {largest_divisor(each, 1) for each in layers} == {1}
