"""The head and the embedding: nothing is computed that nobody reads, and every form of them is the same function."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from unbroken.model.loss import BLOCK, embed, head_loss, softmax_loss

ROWS, WIDTH, VOCABULARY = 6, 8, 100


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "mm" in str(func)
        return func(*args, **(kwargs or {}))


def products_and_loss() -> tuple[int, Tensor]:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator).requires_grad_()
    x, targets = torch.randn(ROWS, WIDTH, generator=generator), torch.arange(ROWS)
    with Products() as counted:
        loss = head_loss(x, weight, targets)
    return counted.count, loss.detach()


def test_validation_computes_no_gradients() -> None:
    """Two of the head's three products are gradients, and the head is a third of a small model."""
    trained, loss = products_and_loss()
    with torch.no_grad():
        validated, same = products_and_loss()
    assert (trained, validated) == (3, 1)
    assert torch.equal(loss, same)


def test_what_is_compiled_is_the_same_and_writes_to_no_single_elements() -> None:
    """A deterministic index_put cannot be part of a compiled kernel: all probabilities would go through memory."""
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph.code)
        return graph.forward

    generator = torch.Generator().manual_seed(2)
    logits, targets = torch.randn(ROWS, VOCABULARY, generator=generator), torch.arange(ROWS)
    compiled = torch.compile(softmax_loss, backend=backend, dynamic=False)
    for one, other in zip(compiled(logits.clone(), targets), softmax_loss(logits.clone(), targets), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    assert len(graphs) == 1 and "setitem" not in graphs[0] and "index_put" not in graphs[0]


@pytest.mark.parametrize("mixed", [False, True])
def test_gradients_added_in_place_are_those_of_autograd(mixed: bool) -> None:
    """More rows than one piece, more vocabulary than one block, targets that count for nothing, and what was there."""
    torch.manual_seed(3)
    vocabulary, tokens = 3 * BLOCK + 17, torch.randint(0, 50, (2, 150))
    weight, targets = torch.randn(vocabulary, WIDTH) / 8, torch.randint(0, vocabulary, (300,))
    targets[7] = -1
    before = torch.randn(vocabulary, WIDTH)
    made = []
    for way in ("plain", "autograd", "in place"):
        own = weight.clone().requires_grad_()
        own.grad = before.clone()
        in_place = way == "in place"
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            x = embed(tokens, own, in_place).flatten(0, 1) * 3
            if way == "plain":
                loss = F.cross_entropy(F.linear(x, own).float(), targets, ignore_index=-1)
            else:
                loss = head_loss(x, own, targets, in_place=in_place)
        loss.backward()
        made.append((loss.detach(), own.grad))
    exact = {"rtol": 1e-5, "atol": 1e-6}
    for one, other in zip(made[1], made[2], strict=True):
        torch.testing.assert_close(one, other, **exact)
    for one, other in zip(made[0], made[2], strict=True):
        torch.testing.assert_close(one, other, **({"rtol": 2e-2, "atol": 2e-3} if mixed else exact))


def test_what_was_added_already_cannot_be_scaled() -> None:
    weight = torch.randn(VOCABULARY, WIDTH).requires_grad_()
    weight.grad = torch.zeros(VOCABULARY, WIDTH)
    x = torch.randn(ROWS, WIDTH).requires_grad_()
    with pytest.raises(RuntimeError, match="on the loss itself"):
        (head_loss(x, weight, torch.arange(ROWS), in_place=True) / 2).backward()


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("rows", [48, 96, 513])
def test_a_mean_over_any_number_of_tokens_is_a_mean(rows: int, in_place: bool) -> None:
    """1/n is no bf16 number unless n is a power of two: rounded, it would scale every gradient by up to 0.4%."""
    torch.manual_seed(4)
    vocabulary, width = 512, 64
    x, targets = torch.randn(rows, width), torch.randint(0, vocabulary, (rows,))
    weight, made = torch.randn(vocabulary, width) / 8, []
    for mixed in (False, True):
        own, read = weight.clone().requires_grad_(), x.clone().requires_grad_()
        own.grad = torch.zeros_like(weight)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            head_loss(read, own, targets, in_place=in_place).backward()
        made.append((read.grad, own.grad))
    for exact, ours in zip(*made, strict=True):
        assert (ours * exact).sum() / exact.square().sum() == pytest.approx(1, abs=1e-3)
