"""The output head: nothing is computed that nobody reads, and the compiled form has the bits of the plain one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from unbroken.head import head_loss, softmax_loss

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


def test_what_is_compiled_has_the_same_bits_and_writes_to_no_single_elements() -> None:
    """A deterministic index_put cannot be part of a compiled kernel: all probabilities would go through memory."""
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph.code)
        return graph.forward

    generator = torch.Generator().manual_seed(2)
    logits, targets = torch.randn(ROWS, VOCABULARY, generator=generator), torch.arange(ROWS)
    compiled = torch.compile(softmax_loss, backend=backend, dynamic=False)
    assert all(
        torch.equal(*pair) for pair in zip(compiled(logits, targets), softmax_loss(logits, targets), strict=True)
    )
    assert len(graphs) == 1 and "setitem" not in graphs[0] and "index_put" not in graphs[0]
