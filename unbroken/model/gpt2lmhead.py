"""GPT2LMHead: the GPT-2 of `gpt2.py` as transformers' `GPT2LMHeadModel`.

Transformers stores the matrices of the layers with inputs as rows and outputs as columns (`Conv1D`). It has all biases:
those that our model lacks are exported as zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from unbroken.model.gpt2 import ACTIVATION, INIT_STD, NORM_EPS
from unbroken.model.huggingface import HuggingFaceFormat
from unbroken.model.language_model import ModelConfig

PREFIX = "transformer."
HEAD, EMBEDDING = "lm_head.weight", f"{PREFIX}wte.weight"
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
MASKS = (".attn.bias", ".attn.masked_bias")  # of older files, and no weights


class GPT2LMHead(HuggingFaceFormat):
    """The names, shapes and settings of `GPT2LMHeadModel`, as transformers 4 and 5 read them."""

    architecture = "GPT2LMHeadModel"
    size_keys = ("model_type", "n_embd", "n_layer", "n_head")
    fixed_keys = (
        *("vocab_size", "n_positions", "n_inner", "activation_function", "layer_norm_epsilon", "tie_word_embeddings"),
        *("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "add_cross_attention"),
    )
    tied: ClassVar = {HEAD: EMBEDDING}

    def config_json(self, config: ModelConfig, context: int, end_of_text: int, dtype: str) -> dict[str, Any]:
        return {
            "architectures": [self.architecture],
            "model_type": "gpt2",
            "vocab_size": config.vocab_size,
            "n_positions": config.n_positions,
            "n_ctx": config.n_positions,
            "n_embd": config.n_embd,
            "n_layer": config.n_layer,
            "n_head": config.n_head,
            "n_inner": None,
            "activation_function": ACTIVATION,
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
            "layer_norm_epsilon": NORM_EPS,
            "initializer_range": INIT_STD,
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
            "tie_word_embeddings": True,
            "bos_token_id": end_of_text,
            "eos_token_id": end_of_text,
            "max_position_embeddings": config.n_positions,
            "torch_dtype": dtype,
            "use_cache": True,
        }

    def describes(self, found: Mapping[str, Any], name: str, config: ModelConfig) -> bool:
        usual = found.get("n_inner") == 4 * config.n_embd
        return super().describes({**found, "n_inner": None} if usual else found, name, config)

    def export_weights(self, weights: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
        made = {name: tensor for name, tensor in weights.items() if name != HEAD}
        for name, tensor in weights.items():
            bias = name.removesuffix("weight") + "bias"
            is_of_layer = ".h." in name or ".ln_f." in name
            if is_of_layer and name.endswith("weight") and bias not in weights:
                made[bias] = torch.zeros(len(tensor), device=tensor.device)
            if name.endswith(TRANSPOSED):
                made[name] = tensor.t()
        return made

    def clean_names(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of a file, with the prefix that OpenAI's own files lack, and without causal masks."""
        full = {
            name if name.startswith((PREFIX, "lm_head.")) else PREFIX + name: each for name, each in tensors.items()
        }
        return {name: tensor for name, tensor in full.items() if not name.endswith(MASKS)}

    def import_weights(self, tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
        made = {name: each.t().contiguous() if name.endswith(TRANSPOSED) else each for name, each in tensors.items()}
        return {**made, HEAD: made[EMBEDDING]}
