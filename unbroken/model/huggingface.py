"""HuggingFaceFormat: how transformers stores a model of a family. Tensors in, tensors out; no file is touched here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from unbroken.errors import UserError
from unbroken.model.language_model import LanguageModel, ModelConfig


class HuggingFaceFormat(ABC):
    """A mapping between a family and an architecture of transformers: names, shapes, settings. One subclass a family.

    Attributes:
        architecture: The class in transformers that opens the model.
        limits: The programs that cannot run the model, for its model card.
        size_keys: The entries of `config.json` that tell sizes and architectures apart.
        fixed_keys: The entries of `config.json` that must have our value where they are present.
        tied: Names that transformers may store in addition, with the name of the tensor that each must equal.
    """

    architecture: ClassVar[str]
    limits: ClassVar[str] = ""
    size_keys: ClassVar[tuple[str, ...]]
    fixed_keys: ClassVar[tuple[str, ...]]
    tied: ClassVar[Mapping[str, str]] = {}

    @abstractmethod
    def config_json(self, config: ModelConfig, context: int, end_of_text: int, dtype: str) -> dict[str, Any]:
        """Return the content of `config.json`.

        Args:
            config: Sizes of the model.
            context: Tokens of the longest sequence that it was trained on.
            end_of_text: Token id that begins and ends every text.
            dtype: torch's name of the weights' dtype.
        """

    @abstractmethod
    def export_weights(self, weights: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
        """Return our state dict under the names of transformers."""

    @abstractmethod
    def import_weights(self, tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
        """Return our state dict from fp32 tensors of transformers, whose names and shapes were checked.

        Raises UserError for values that our model cannot represent.
        """

    def clean_names(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return untrusted tensors of a file under the names of `export_weights`, without those that are no weights."""
        return dict(tensors)

    def describes(self, found: Mapping[str, Any], name: str, config: ModelConfig) -> bool:
        """Return whether an untrusted `config.json` describes this size. Raises UserError if only a setting differs."""
        ours = self.config_json(config, 0, 0, "")
        if any(found.get(key) != ours[key] for key in self.size_keys):
            return False
        for key in self.fixed_keys:
            if found.get(key, ours[key]) != ours[key]:
                raise UserError(f"its config.json has {key} {found[key]!r:.60}, a {name} has {ours[key]!r}")
        return True

    def export_model(self, model: LanguageModel, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the weights of a model, fp32, as transformers stores them in `dtype`; each tied weight once."""
        made = self.export_weights(model.state_dict(), model.config)
        return {name: tensor.to(dtype).contiguous() for name, tensor in made.items()}

    def import_model(self, tensors: Mapping[str, Tensor], like: LanguageModel) -> dict[str, Tensor]:
        """Return the state dict of `like`, a model on the meta device, in fp32 from untrusted tensors.

        Raises UserError for a tensor that is missing, unknown, or has another shape.
        """
        tensors, expected = self.clean_names(tensors), self.export_model(like, torch.float32)
        for name, tensor in expected.items():
            if name not in tensors:
                raise UserError(f"its weight {name} is missing")
            if tensors[name].shape != tensor.shape or not tensors[name].is_floating_point():
                raise UserError(
                    f"its weight {name} is {list(tensors[name].shape)}, not {list(tensor.shape)} of numbers"
                )
        known = {name: tensors[name].float() for name in expected}
        unknown = sorted(set(tensors) - set(expected) - set(self.tied))
        if unknown:
            raise UserError(f"it has a weight {unknown[0]!r:.80} that this model has no place for")
        for name, source in self.tied.items():
            if name in tensors and not torch.equal(tensors[name].float(), known[source]):
                raise UserError(f"its {name} is not its {source}: this model has one matrix for both")
        return self.import_weights(known, like.config)
