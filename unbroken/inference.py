"""A checkpoint's model in use: which tokens it knows, what it expects next, the text it writes."""

from __future__ import annotations

import codecs
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unbroken.checkpoint.reader import CheckpointFile
from unbroken.data.tokenizers import END_OF_TEXT, NUM_BYTES, byte_codec, gpt2_codec
from unbroken.distributed.sliced_tensor import SlicedTensor
from unbroken.distributed.world import Launch, choose_device
from unbroken.errors import UserError
from unbroken.model.gpt import GPT, PRESETS, KVCache, build_uninitialized
from unbroken.run import legacy
from unbroken.text import printable_text

BYTE_MODEL_MASS = 0.9  # of the probability of a document's first token; single bytes get far less of GPT-2's tokens


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen."""

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.temperature) or self.temperature < 0:
            raise UserError(f"--temperature {self.temperature}: it must be a number, not negative")
        if self.top_k < 0:
            raise UserError(f"--top_k {self.top_k}: it must not be negative")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top_p {self.top_p}: it must be above 0 and at most 1")


class TextGenerator:
    """The model of a checkpoint, with the codec of its tokens."""

    def __init__(self, file: CheckpointFile, tokenizer: str = "auto", device: str = "auto") -> None:
        """`tokenizer`: bytes, gpt2, or auto, by the checkpoint."""
        self.model, self.context = load_model(file, device), context_length(file.values)
        of_bytes = trained_on_bytes(file.values, self.model) if tokenizer == "auto" else tokenizer == "bytes"
        self._encode, self._decode = byte_codec() if of_bytes else gpt2_codec()
        self._allowed = torch.tensor([*range(NUM_BYTES), END_OF_TEXT]) if of_bytes else None

    def write(self, prompt: str, num_tokens: int, choice: SamplingConfig, seed: int) -> Iterator[str]:
        """The prompt and its continuation, in pieces that are safe to print."""
        begin = [END_OF_TEXT, *self._encode(prompt)]
        decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may be split over tokens
        yield printable_text(prompt)
        for token in generate_tokens(self.model, begin, num_tokens, choice, seed, self.context, self._allowed):
            if token == END_OF_TEXT:
                break
            yield printable_text(decoder.decode(self._decode(token)))
        yield printable_text(decoder.decode(b"", final=True))


def load_model(file: CheckpointFile, device: str = "cpu") -> GPT:
    """The model of a checkpoint of any kind, its weights in fp32."""
    shape = PRESETS[legacy.identify_model(file.values, str(file.path))]
    model = build_uninitialized(shape, choose_device(device, Launch()))
    leaves = {id(parameter): SlicedTensor.whole(parameter) for parameter in model.parameters()}
    named = {name: leaves[id(tensor)] for name, tensor in model.named_parameters(remove_duplicate=False)}
    file.restore(legacy.rename_to_file({"model": named}, file), cast=True)
    return model.eval()


def generate_tokens(
    model: GPT,
    begin: list[int],
    num_tokens: int,
    choice: SamplingConfig,
    seed: int,
    context: int,
    allowed: Tensor | None,
) -> Iterator[int]:
    """Tokens after `begin`, one by one, of the `allowed` ids.

    Keys and values of the tokens so far are kept. When there are `context` of them, beyond which the model knows no
    positions, the later half is read anew as a beginning.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same numbers on every device
    tokens, unread, past = list(begin), begin[-context:], [KVCache() for _ in model.blocks()]
    for _ in range(num_tokens):
        if past[0].length + len(unread) > context:
            unread, past = tokens[-max(1, context // 2) :], [KVCache() for _ in model.blocks()]
        with torch.inference_mode():
            logits = model.next_logits(torch.tensor([unread], device=device), past)[0].float().cpu()
        require_finite(logits)
        chosen = sample_token(logits if allowed is None else logits[allowed], choice, generator)
        tokens.append(chosen if allowed is None else int(allowed[chosen]))
        unread = tokens[-1:]
        yield tokens[-1]


def require_finite(predicted: Tensor) -> None:
    """Raise a UserError where a model predicts no numbers any more."""
    if not bool(predicted.isfinite().all()):
        raise UserError("the model predicts nan: its run has diverged; take a checkpoint from before that")


def sample_token(logits: Tensor, choice: SamplingConfig, generator: torch.Generator) -> int:
    """A token id drawn from `logits` [V]."""
    if choice.temperature == 0:
        return int(logits.argmax())
    ordered, ids = torch.sort((logits - logits.max()).double() / choice.temperature, descending=True, stable=True)
    probabilities = torch.softmax(ordered, dim=0)
    before = probabilities.cumsum(0) - probabilities  # what the likelier ones sum to: the first is never cut off
    kept = before < choice.top_p
    if choice.top_k:
        kept[choice.top_k :] = False
    return int(ids[torch.multinomial(probabilities * kept, 1, generator=generator)])


def trained_on_bytes(values: dict[str, Any], model: GPT) -> bool:
    """Whether a checkpoint's tokens are bytes: the built-in corpus's are, of others the model is asked."""
    return _builtin_corpus(values) or writes_bytes(model)


def writes_bytes(model: GPT) -> bool:
    """Whether a model was trained on bytes, asked by what it expects first of all."""
    with torch.inference_mode():
        logits = model(torch.tensor([[END_OF_TEXT]], device=next(model.parameters()).device))[0].float()
    return float(torch.softmax(logits, 0)[:NUM_BYTES].sum()) > BYTE_MODEL_MASS


def _builtin_corpus(values: dict[str, Any]) -> bool:
    """Whether the run's data are the built-in corpus. `values` is untrusted, and of a foreign file has no `data`."""
    data = values.get("data")
    shards = data.get("shards") if isinstance(data, dict) else None
    names = [shard.get("name") for shard in shards if isinstance(shard, dict)] if isinstance(shards, list) else []
    return bool(names) and all(str(name).startswith("stdlib_") for name in names)


def context_length(values: dict[str, Any]) -> int:
    """The sequence length that the model was trained on: beyond it the model knows no positions."""
    args = values.get("args")
    length = args.get("sequence_length") if isinstance(args, dict) else None
    return length if type(length) is int and 0 < length <= 1 << 20 else 1024
