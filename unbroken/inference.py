"""A checkpoint's model in use: which tokens it knows, what it expects next, the text it writes."""

from __future__ import annotations

import codecs
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unbroken import earlier, screen
from unbroken.checkpoint.reader import CheckpointFile
from unbroken.corpus import END_OF_TEXT, load_gpt2
from unbroken.distributed import Launch, choose_device
from unbroken.errors import UserError
from unbroken.leaves import Leaf
from unbroken.model import GPT, PRESETS, Past, unfilled

NUM_BYTES = 256
BYTE_MODEL_MASS = 0.9  # of the probability of a document's first token; single bytes get far less of GPT-2's tokens


@dataclass(frozen=True)
class Choice:
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


class Author:
    """The model of a checkpoint, with the codec of its tokens."""

    def __init__(self, file: CheckpointFile, tokenizer: str = "auto", device: str = "auto") -> None:
        """`tokenizer`: bytes, gpt2, or auto, by the checkpoint."""
        self.model, self.context = load_model(file, device), context_of(file.values)
        of_bytes = trained_on_bytes(file.values, self.model) if tokenizer == "auto" else tokenizer == "bytes"
        self._encode, self._decode = byte_codec() if of_bytes else gpt2_codec()
        self._allowed = torch.tensor([*range(NUM_BYTES), END_OF_TEXT]) if of_bytes else None

    def write(self, prompt: str, num_tokens: int, choice: Choice, seed: int) -> Iterator[str]:
        """The prompt and its continuation, in pieces that are safe to print."""
        begin = [END_OF_TEXT, *self._encode(prompt)]
        decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may be split over tokens
        yield screen.safe_text(prompt)
        for token in continuation(self.model, begin, num_tokens, choice, seed, self.context, self._allowed):
            if token == END_OF_TEXT:
                break
            yield screen.safe_text(decoder.decode(self._decode(token)))
        yield screen.safe_text(decoder.decode(b"", final=True))


def load_model(file: CheckpointFile, device: str = "cpu") -> GPT:
    """The model of a checkpoint of any kind, its weights in fp32."""
    shape = PRESETS[earlier.preset_of(file.values, str(file.path))]
    model = unfilled(shape, choose_device(device, Launch()))
    leaves = {id(parameter): Leaf.whole(parameter) for parameter in model.parameters()}
    named = {name: leaves[id(tensor)] for name, tensor in model.named_parameters(remove_duplicate=False)}
    file.restore(earlier.with_file_names({"model": named}, file), cast=True)
    return model.eval()


def continuation(
    model: GPT, begin: list[int], num_tokens: int, choice: Choice, seed: int, context: int, allowed: Tensor | None
) -> Iterator[int]:
    """Tokens after `begin`, one by one, of the `allowed` ids.

    Keys and values of the tokens so far are kept. When there are `context` of them, beyond which the model knows no
    positions, the later half is read anew as a beginning.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same numbers on every device
    tokens, unread, past = list(begin), begin[-context:], [Past() for _ in model.blocks()]
    for _ in range(num_tokens):
        if past[0].length + len(unread) > context:
            unread, past = tokens[-max(1, context // 2) :], [Past() for _ in model.blocks()]
        with torch.inference_mode():
            logits = model.next_logits(torch.tensor([unread], device=device), past)[0].float().cpu()
        check_numbers(logits)
        chosen = choose(logits if allowed is None else logits[allowed], choice, generator)
        tokens.append(chosen if allowed is None else int(allowed[chosen]))
        unread = tokens[-1:]
        yield tokens[-1]


def check_numbers(predicted: Tensor) -> None:
    """Raise a UserError where a model predicts no numbers any more."""
    if not bool(predicted.isfinite().all()):
        raise UserError("the model predicts nan: its run has diverged; take a checkpoint from before that")


def choose(logits: Tensor, choice: Choice, generator: torch.Generator) -> int:
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


def context_of(values: dict[str, Any]) -> int:
    """The sequence length that the model was trained on: beyond it the model knows no positions."""
    args = values.get("args")
    length = args.get("sequence_length") if isinstance(args, dict) else None
    return length if type(length) is int and 0 < length <= 1 << 20 else 1024


def byte_codec() -> tuple[Callable[[str], list[int]], Callable[[int], bytes]]:
    """Text to tokens, and a token to its bytes, where a token is a byte."""
    return lambda text: list(text.encode("utf-8", "surrogateescape")), lambda token: bytes([token])


def gpt2_codec() -> tuple[Callable[[str], list[int]], Callable[[int], bytes]]:
    """The same for GPT-2's tokens."""
    gpt2 = load_gpt2(None)
    return lambda text: gpt2.encode(text, disallowed_special=()), gpt2.decode_single_token_bytes
