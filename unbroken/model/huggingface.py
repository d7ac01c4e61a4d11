"""Our weights under Hugging Face's names, and back. Pure: tensors in, tensors out.

`ArceeForCausalLM` with the exact GELU is this model: grouped into q, k, v, and with three differences that are folded
into weights. Its rotary turns by +theta where ours turns by -theta: with the second half of each head's rows of W_q and
W_k negated the products q·k are the same numbers. Our attention's output is scaled by 1/sqrt(2 layers): so is its
`o_proj`. Its norms have weights: they are 1.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from unbroken.errors import UserError
from unbroken.model.gpt import NORM_EPS, PRESETS, ROTARY_BASE, GPTConfig

ARCHITECTURE = "ArceeForCausalLM"
EMBEDDING, NORM = "model.embed_tokens.weight", "model.norm.weight"


def config_json(shape: GPTConfig, context: int, end_of_text: int, dtype: str) -> dict[str, Any]:
    """The `config.json`, for transformers 4.57 and 5; `dtype` is torch's name of it."""
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "arcee",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.n_embd,
        "intermediate_size": 4 * shape.n_embd,
        "num_hidden_layers": shape.n_layer,
        "num_attention_heads": shape.n_head,
        "num_key_value_heads": shape.n_head,
        "head_dim": shape.n_embd // shape.n_head,
        "hidden_act": "gelu",
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


def identify_config(config: dict[str, Any]) -> GPTConfig:
    """Which of our models a `config.json` describes. Untrusted: raises UserError where it is none."""
    for name, shape in PRESETS.items():
        wanted = config_json(shape, 0, 0, "")
        same = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        more = ("num_key_value_heads", "vocab_size", "hidden_act", "rms_norm_eps", "attention_bias", "mlp_bias")
        if all(config.get(key) == wanted[key] for key in same):
            for key in more:
                if config.get(key, wanted[key]) != wanted[key]:
                    raise UserError(f"its config.json has {key} {config[key]!r:.60}, a {name} has {wanted[key]!r}")
            rope = config.get("rope_parameters") or {}
            theta = config.get("rope_theta", rope.get("rope_theta") if isinstance(rope, dict) else None)
            if theta not in (None, ROTARY_BASE) or config.get("tie_word_embeddings", True) is not True:
                raise UserError(f"its config.json has another rope_theta than {ROTARY_BASE:g}, or untied embeddings")
            return shape
    raise UserError(f"its config.json describes none of the models {', '.join(PRESETS)} as an Arcee model")


def to_huggingface(weights: dict[str, Tensor], shape: GPTConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """Our state dict, fp32, as theirs in `dtype`. The head is tied, so it is not among them."""
    made = {EMBEDDING: weights["transformer.wte.weight"], NORM: torch.ones(shape.n_embd)}
    scale = 1 / math.sqrt(2 * shape.n_layer)
    for layer in range(shape.n_layer):
        ours, theirs = f"transformer.h.{layer}", f"model.layers.{layer}"
        q, k, v = weights[f"{ours}.attn.c_attn.weight"].float().chunk(3)
        made[f"{theirs}.self_attn.q_proj.weight"] = negate_second_halves(q, shape)
        made[f"{theirs}.self_attn.k_proj.weight"] = negate_second_halves(k, shape)
        made[f"{theirs}.self_attn.v_proj.weight"] = v
        made[f"{theirs}.self_attn.o_proj.weight"] = weights[f"{ours}.attn.c_proj.weight"].float() * scale
        made[f"{theirs}.mlp.up_proj.weight"] = weights[f"{ours}.mlp.c_fc.weight"]
        made[f"{theirs}.mlp.down_proj.weight"] = weights[f"{ours}.mlp.c_proj.weight"]
        for norm in ("input_layernorm", "post_attention_layernorm"):
            made[f"{theirs}.{norm}.weight"] = torch.ones(shape.n_embd)
    return {name: tensor.to(dtype).contiguous() for name, tensor in made.items()}


def from_huggingface(tensors: dict[str, Tensor], shape: GPTConfig) -> dict[str, Tensor]:
    """Their tensors, which are untrusted, as our state dict in fp32. Raises UserError for what does not fit."""
    expected = to_huggingface(_meta(shape), shape, torch.float32)
    for name, like in expected.items():
        if name not in tensors:
            raise UserError(f"its weight {name} is missing")
        if tensors[name].shape != like.shape or not tensors[name].is_floating_point():
            raise UserError(f"its weight {name} is {list(tensors[name].shape)}, not {list(like.shape)} of numbers")
    given = {name: tensors[name].float() for name in expected}
    unknown = sorted(set(tensors) - set(expected) - {"lm_head.weight"})
    if unknown:
        raise UserError(f"it has a weight {unknown[0]!r:.80} that this model has no place for")
    if "lm_head.weight" in tensors and not torch.equal(tensors["lm_head.weight"].float(), given[EMBEDDING]):
        raise UserError("its lm_head.weight is not its embedding: this model has one matrix for both")
    made = {"transformer.wte.weight": given[EMBEDDING] * 1.0}
    scale = math.sqrt(2 * shape.n_layer)
    for layer in range(shape.n_layer):
        ours, theirs = f"transformer.h.{layer}", f"model.layers.{layer}"
        attention = {name: given[f"{theirs}.self_attn.{name}_proj.weight"] for name in "qkvo"}
        # A norm's weights, trained elsewhere, belong to the columns of the matrices that read its output.
        before, middle = (given[f"{theirs}.{name}.weight"] for name in ("input_layernorm", "post_attention_layernorm"))
        rows = [
            negate_second_halves(attention["q"], shape),
            negate_second_halves(attention["k"], shape),
            attention["v"],
        ]
        made[f"{ours}.attn.c_attn.weight"] = torch.cat(rows) * before
        made[f"{ours}.attn.c_proj.weight"] = attention["o"] * scale
        made[f"{ours}.mlp.c_fc.weight"] = given[f"{theirs}.mlp.up_proj.weight"] * middle
        made[f"{ours}.mlp.c_proj.weight"] = given[f"{theirs}.mlp.down_proj.weight"]
    if not torch.equal(given[NORM], torch.ones(shape.n_embd)):
        raise UserError("its last norm has weights other than 1, which a head tied to the embedding cannot take over")
    made["lm_head.weight"] = made["transformer.wte.weight"]
    return made


def negate_second_halves(rows: Tensor, shape: GPTConfig) -> Tensor:
    """W_q or W_k [C, C] with the second half of each head's rows negated: its own inverse."""
    heads = rows.float().clone().view(shape.n_head, 2, -1, shape.n_embd)
    heads[:, 1].neg_()
    return heads.view(shape.n_embd, shape.n_embd)


def _meta(shape: GPTConfig) -> dict[str, Tensor]:
    width = shape.n_embd
    sizes = {
        "attn.c_attn": (3 * width, width),
        "attn.c_proj": (width, width),
        "mlp.c_fc": (4 * width, width),
        "mlp.c_proj": (width, 4 * width),
    }
    made = {"transformer.wte.weight": torch.empty(shape.vocab_size, width, device="meta")}
    for layer in range(shape.n_layer):
        for name, size in sizes.items():
            made[f"transformer.h.{layer}.{name}.weight"] = torch.empty(size, device="meta")
    return made
