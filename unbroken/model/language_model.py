"""LanguageModel: what the program asks of a model of any family, and what all families share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from unbroken.errors import UserError
from unbroken.model.loss import softmax_loss

if TYPE_CHECKING:
    from typing_extensions import Self

LAYERS_PER_GRAPH = {"cpu": 1, "cuda": 4}  # at most so many layers are compiled as one graph
KEPT_PER_LAYER = 20  # values that a layer keeps for its backward pass, for each token and channel


@dataclass(frozen=True)
class ModelConfig:
    """The sizes of a model. A family that needs more settings derives its own class from this one.

    A field with the name of a flag in `config.MODEL_FLAGS` is set by it. `n_positions`: tokens of the longest sequence
    that the model can read; 0: of any length.
    """

    n_layer: int
    n_head: int
    n_embd: int
    vocab_size: int = 50257  # of GPT-2's byte-pair encoding
    n_positions: int = 0

    def require_length(self, sequence_length: int) -> None:
        """Raise UserError if the model cannot read a sequence of `sequence_length` tokens."""
        if 0 < self.n_positions < sequence_length:
            raise UserError(
                f"a sequence of {sequence_length} tokens: this model has {self.n_positions} positions; use a shorter"
                " --sequence_length"
            )


@dataclass
class KVCache:
    """A cache of the keys and values of the tokens that one layer has read, each [B, H, T, D], for generating text."""

    keys: Tensor | None = None
    values: Tensor | None = None

    @property
    def length(self) -> int:
        """Number of tokens in the cache."""
        return 0 if self.keys is None else self.keys.size(2)

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values of the next tokens; return all of them."""
        self.keys = keys if self.keys is None else torch.cat((self.keys, keys), dim=2)
        self.values = values if self.values is None else torch.cat((self.values, values), dim=2)
        return self.keys, self.values


class LanguageModel(nn.Module, ABC):
    """A model that predicts the next token. A family is a subclass with its sizes.

    Attributes:
        sizes: Configuration for each name of the family in `families.FAMILIES`.
        variants: Values of the flags that decide which weights a model of one size has, the default first.
        fused: Number of equal matrices that are stacked in one weight, by the end of the weight's name.
        computed_buffers: Ends of the names of buffers in older checkpoints that are computed, so they are not
            weights.
        recompute: Whether layers compute their activations again in the backward pass instead of keeping them.
        adds_in_place: Whether `forward` may add gradients to `.grad` itself; `backward()` is then called on its result.
        layers_per_graph: Number of layers that `run_blocks` runs as one compiled graph; 1 until they are compiled.
        softmax_loss: `loss.softmax_loss`, or its compiled form.
    """

    sizes: ClassVar[Mapping[str, ModelConfig]]
    variants: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)
    fused: ClassVar[Mapping[str, int]] = {}
    computed_buffers: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute = False
        self.adds_in_place = False
        self.layers_per_graph = 1
        self._run_in_order = _run_in_order
        self.softmax_loss = softmax_loss

    # ---- what a family defines

    @abstractmethod
    def forward(self, inputs: Tensor, targets: Tensor | None = None, reduction: str = "mean") -> Tensor:
        """Return the loss, or the logits of the next token.

        Args:
            inputs: Token ids, int64 [B, T].
            targets: The token ids that follow, int64 [B, T]; those that are `loss.IGNORED` do not count.
            reduction: "mean" or "sum" over the targets that count.

        Returns:
            The cross-entropy in nats, fp32, 0-dim; without targets the logits of the last position, [B, V].
        """

    @abstractmethod
    def blocks(self) -> Sequence[nn.Module]:
        """Return the layers, first to last."""

    @abstractmethod
    def initialize(self, seed: int) -> None:
        """Fill the weights with values that depend on the seed only, not on the device."""

    def next_logits(self, inputs: Tensor, caches: list[KVCache]) -> Tensor:
        """Return the logits [B, V] of the token after `inputs`, int64 [B, T], and add `inputs` to the caches.

        T is 1 unless the caches, one for each layer, are empty. A family without a cache of its own reads all tokens
        again; the first cache holds them.
        """
        tokens, _ = caches[0].append(inputs[:, None, :, None], inputs[:, None, :, None])
        logits: Tensor = self(tokens[:, 0, :, 0])
        return logits

    def tie(self) -> None:
        """Make modules with a common weight share it again after the weights were replaced."""

    # ---- what all families share

    @classmethod
    def build_on_meta(cls, config: ModelConfig) -> Self:
        """Return a model on the meta device: no memory and no random numbers for weights that a checkpoint fills.

        Raises UserError if it has buffers, which are neither saved nor moved.
        """
        # Even on the meta device some initializations import the whole compiler, which takes two seconds.
        with torch.device("meta"), _NoInitialization():
            model = cls(config)
        for name, _ in model.named_buffers():
            raise UserError(f"{cls.__name__} has a buffer {name}, which is not saved; compute it in forward")
        return model

    def allocate(self, device: torch.device) -> Self:
        """Give a model on the meta device memory on another one, uninitialized; return the model."""
        self.to_empty(device=device)
        self.tie()
        return self

    def run_block(self, block: nn.Module, *inputs: Any) -> Tensor:
        """Return `block(*inputs)`; with `recompute` only the inputs are kept (Chen et al. 2016)."""
        if self.recompute and torch.is_grad_enabled():
            result: Tensor = checkpoint(block, *inputs, use_reentrant=False)
        else:
            result = block(*inputs)
        return result

    def run_blocks(self, x: Tensor, *inputs: Any) -> Tensor:
        """Return x after all layers, each of which maps `(x, *inputs)` to the next x."""
        blocks = tuple(self.blocks())
        if self.layers_per_graph == 1 or self.recompute:
            for block in blocks:
                x = self.run_block(block, x, *inputs)
        else:
            for start in range(0, len(blocks), self.layers_per_graph):
                x = self._run_in_order(blocks[start : start + self.layers_per_graph], x, *inputs)
        return x

    def compile_blocks(self) -> None:
        """Compile the layers in groups of equal size: all share the generated code, so that a start is quick.

        The host needs time to enter each graph, and a GPU waits for it if the microbatch is small. The time of
        compiling grows with the number of layers in a graph. On a CPU each layer is a graph, and on every device with
        `recompute` and for `run_block`.
        """
        blocks = self.blocks()
        for block in blocks:
            block.compile(dynamic=False)
        self.softmax_loss = torch.compile(softmax_loss, dynamic=False)
        self._run_in_order = torch.compile(_run_in_order, dynamic=False)
        kind = next(self.parameters()).device.type
        self.layers_per_graph = largest_divisor(len(blocks), LAYERS_PER_GRAPH.get(kind, 1))

    def new_caches(self) -> list[KVCache]:
        """Return an empty cache for each layer."""
        return [KVCache() for _ in self.blocks()]

    def hidden_matrices(self) -> list[tuple[nn.Parameter, tuple[int, int]]]:
        """Return each matrix of the layers with the shape of the matrices that are stacked in it (`fused`)."""
        found = []
        for block in self.blocks():
            for name, parameter in block.named_parameters():
                if parameter.dim() == 2:
                    count = next((count for end, count in self.fused.items() if name.endswith(end)), 1)
                    found.append((parameter, (parameter.size(0) // count, parameter.size(1))))
        return found

    def num_parameters(self) -> int:
        """Return the number of weights, tied ones counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self, sequence_length: int) -> int:
        """Return the floating-point operations of a token, forward and backward: 6N + 12LCT (PaLM, appendix B)."""
        return 6 * self.num_parameters() + 12 * self.config.n_layer * self.config.n_embd * sequence_length

    def activation_bytes(self, sequence_length: int) -> int:
        """Return an estimate of the fp32 activations that a sequence keeps for the backward pass, in bytes."""
        layers = 2 if self.recompute else self.config.n_layer
        return 4 * sequence_length * self.config.n_embd * (KEPT_PER_LAYER * layers + self.config.n_layer)


def largest_divisor(number: int, limit: int) -> int:
    """Return the largest divisor of `number` that is at most `limit`; 1 if `number` is 0."""
    return next((size for size in range(min(limit, number), 0, -1) if number % size == 0), 1)


def _run_in_order(blocks: tuple[nn.Module, ...], x: Tensor, *inputs: Any) -> Tensor:
    for block in blocks:
        x = block(x, *inputs)
    return x


class _NoInitialization(TorchFunctionMode):
    """A mode in which nn.Linear, nn.Embedding and others leave their weights as they are."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return None if getattr(func, "__module__", "") == "torch.nn.init" else func(*args, **(kwargs or {}))
