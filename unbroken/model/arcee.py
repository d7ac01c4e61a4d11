"""Arcee: the GPT of `gpt.py` as transformers' `ArceeForCausalLM` with the exact GELU.

Transformers has separate matrices for q, k and v. Three differences are folded into weights:

- Its rotary embedding turns by +theta, ours by -theta. With the second half of each head's rows of W_q and W_k negated,
  the products q·k are the same numbers.
- Our attention's output is multiplied by 1/sqrt(2 layers): `o_proj` is multiplied by it.
- Its norms have weights, ours have none: the weights are 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from unbroken.errors import UserError
from unbroken.model.gpt import ACTIVATION, NORM_EPS, ROTARY_BASE
from unbroken.model.huggingface import HuggingFaceFormat
from unbroken.model.language_model import ModelConfig

EMBEDDING, NORM = "model.embed_tokens.weight", "model.norm.weight"


class Arcee(HuggingFaceFormat):
    """The names, shapes and settings of `ArceeForCausalLM`, as transformers 4.57 and 5 read them."""

    architecture = "ArceeForCausalLM"
    limits = (
        "Engines with an Arcee of their own compute ReLU² instead of its GELU: vLLM needs `--model-impl transformers`, "
        "llama.cpp cannot run it."
    )
    size_keys = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    fixed_keys = ("num_key_value_heads", "vocab_size", "hidden_act", "rms_norm_eps", "attention_bias", "mlp_bias")
    tied: ClassVar = {"lm_head.weight": EMBEDDING}

    def config_json(self, config: ModelConfig, context: int, end_of_text: int, dtype: str) -> dict[str, Any]:
        return {
            "architectures": [self.architecture],
            "model_type": "arcee",
            "vocab_size": config.vocab_size,
            "hidden_size": config.n_embd,
            "intermediate_size": 4 * config.n_embd,
            "num_hidden_layers": config.n_layer,
            "num_attention_heads": config.n_head,
            "num_key_value_heads": config.n_head,
            "head_dim": config.n_embd // config.n_head,
            "hidden_act": ACTIVATION,
            "max_position_embeddings": context,
            "rms_norm_eps": NORM_EPS,
            "tie_word_embeddings": True,
            "attention_bias": False,
            "mlp_bias": False,
            "rope_theta": ROTARY_BASE,
            "rope_parameters": {"rope_type": "default", "rope_theta": ROTARY_BASE},
            "bos_token_id": end_of_text,
            "eos_token_id": end_of_text,
            "pad_token_id": None,
            "torch_dtype": dtype,
            "use_cache": True,
        }

    def describes(self, found: Mapping[str, Any], name: str, config: ModelConfig) -> bool:
        if not super().describes(found, name, config):
            return False
        rope = found.get("rope_parameters") or {}
        theta = found.get("rope_theta", rope.get("rope_theta") if isinstance(rope, dict) else None)
        if theta not in (None, ROTARY_BASE) or found.get("tie_word_embeddings", True) is not True:
            raise UserError(f"its config.json has another rope_theta than {ROTARY_BASE:g}, or untied embeddings")
        return True

    def export_weights(self, weights: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
        made = {EMBEDDING: weights["transformer.wte.weight"], NORM: torch.ones(config.n_embd)}
        scale = 1 / math.sqrt(2 * config.n_layer)
        for layer in range(config.n_layer):
            ours, theirs = f"transformer.h.{layer}", f"model.layers.{layer}"
            q, k, v = weights[f"{ours}.attn.c_attn.weight"].float().chunk(3)
            made[f"{theirs}.self_attn.q_proj.weight"] = _negate_second_halves(q, config)
            made[f"{theirs}.self_attn.k_proj.weight"] = _negate_second_halves(k, config)
            made[f"{theirs}.self_attn.v_proj.weight"] = v
            made[f"{theirs}.self_attn.o_proj.weight"] = weights[f"{ours}.attn.c_proj.weight"].float() * scale
            made[f"{theirs}.mlp.up_proj.weight"] = weights[f"{ours}.mlp.c_fc.weight"]
            made[f"{theirs}.mlp.down_proj.weight"] = weights[f"{ours}.mlp.c_proj.weight"]
            for norm in ("input_layernorm", "post_attention_layernorm"):
                made[f"{theirs}.{norm}.weight"] = torch.ones(config.n_embd)
        return made

    def import_weights(self, tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
        made = {"transformer.wte.weight": tensors[EMBEDDING] * 1.0}
        scale = math.sqrt(2 * config.n_layer)
        for layer in range(config.n_layer):
            ours, theirs = f"transformer.h.{layer}", f"model.layers.{layer}"
            attention = {name: tensors[f"{theirs}.self_attn.{name}_proj.weight"] for name in "qkvo"}
            # The weights of a norm that was trained elsewhere scale the columns of the matrices that read its output.
            norms = ("input_layernorm", "post_attention_layernorm")
            before_attention, before_mlp = (tensors[f"{theirs}.{name}.weight"] for name in norms)
            q, k = (_negate_second_halves(attention[name], config) for name in "qk")
            made[f"{ours}.attn.c_attn.weight"] = torch.cat((q, k, attention["v"])) * before_attention
            made[f"{ours}.attn.c_proj.weight"] = attention["o"] * scale
            made[f"{ours}.mlp.c_fc.weight"] = tensors[f"{theirs}.mlp.up_proj.weight"] * before_mlp
            made[f"{ours}.mlp.c_proj.weight"] = tensors[f"{theirs}.mlp.down_proj.weight"]
        if not torch.equal(tensors[NORM], torch.ones(config.n_embd)):
            raise UserError(
                "its last norm has weights other than 1, which a head tied to the embedding cannot take over; freeze "
                "model.norm where it is trained"
            )
        made["lm_head.weight"] = made["transformer.wte.weight"]
        return made


def _negate_second_halves(rows: Tensor, config: ModelConfig) -> Tensor:
    """Return W_q or W_k [C, C] with the second half of each head's rows negated; applied twice, it changes nothing."""
    heads = rows.float().clone().view(config.n_head, 2, -1, config.n_embd)
    heads[:, 1].neg_()
    return heads.view(config.n_embd, config.n_embd)
