"""`python -m unbroken sample`: a checkpoint writes text."""

from __future__ import annotations

import argparse
import codecs
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from unbroken import screen
from unbroken.commands import given
from unbroken.errors import UserError

if TYPE_CHECKING:
    import torch

    from unbroken.checkpoint.reader import CheckpointFile
    from unbroken.model import GPT

HELP = "let a checkpoint write text"
NUM_BYTES = 256
BYTE_MODEL_MASS = 0.9  # of the probability of a document's first token; single bytes get far less of GPT-2's tokens


def configure(parser: argparse.ArgumentParser) -> None:
    """Which checkpoint, and how it writes."""
    parser.add_argument("what", metavar="FILE|RUN", help=given.HELP)
    parser.add_argument("--prompt", default="", metavar="TEXT", help="its beginning (default: none)")
    parser.add_argument("--num_tokens", type=int, default=200, metavar="N", help="tokens to write (default: 200)")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="X", help="0: the likeliest (default: 0.8)")
    parser.add_argument("--top_k", type=int, default=0, metavar="N", help="among the N likeliest (default: all)")
    parser.add_argument("--top_p", type=float, default=1.0, metavar="X", help="among those that sum to X (default: 1)")
    parser.add_argument("--seed", type=int, default=1337, metavar="N", help="decides the text (default: 1337)")
    parser.add_argument(
        "--tokenizer", choices=("auto", "bytes", "gpt2"), default="auto", help="auto: by the checkpoint"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")


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


def run(args: argparse.Namespace) -> int:
    """Print the prompt and what the model makes of it, token by token."""
    choice = Choice(args.temperature, args.top_k, args.top_p)
    if args.num_tokens < 1:
        raise UserError(f"--num_tokens {args.num_tokens}: it must be at least 1")
    if not 0 <= args.seed < 2**63:
        raise UserError(f"--seed {args.seed}: it must be at least 0 and below 2**63")
    for text in write_from(args.what, args.prompt, args.num_tokens, choice, args.seed, args.tokenizer, args.device):
        sys.stdout.write(text)
        sys.stdout.flush()
    print()
    return 0


def write_from(
    what: str,
    prompt: str,
    num_tokens: int,
    choice: Choice,
    seed: int,
    tokenizer: str = "auto",
    device: str = "auto",
) -> Iterator[str]:
    """The prompt and its continuation by the model of a checkpoint, in pieces that are safe to print."""
    import torch

    from unbroken.corpus import END_OF_TEXT

    with given.opened(what) as file:
        model = load_model(file, device)
        context = context_of(file.values)
        of_bytes = trained_on_bytes(file.values, model) if tokenizer == "auto" else tokenizer == "bytes"
    encode, decode = byte_codec() if of_bytes else gpt2_codec()
    allowed = torch.tensor([*range(NUM_BYTES), END_OF_TEXT]) if of_bytes else None
    begin = [END_OF_TEXT, *encode(prompt)]
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may be split over tokens
    yield screen.safe_text(prompt)
    for token in continuation(model, begin, num_tokens, choice, seed, context, allowed):
        if token == END_OF_TEXT:
            break
        yield screen.safe_text(decoder.decode(decode(token)))
    yield screen.safe_text(decoder.decode(b"", final=True))


def load_model(file: CheckpointFile, device: str = "cpu") -> GPT:
    """The model of a checkpoint of any kind, its weights in fp32."""

    from unbroken import earlier
    from unbroken.distributed import Launch, World, choose_device
    from unbroken.model import PRESETS, without_weights
    from unbroken.sharding import ShardedParameters

    model = without_weights(PRESETS[earlier.preset_of(file.values, str(file.path))])
    sharded = ShardedParameters(model, World(Launch(), choose_device(device, Launch())))
    file.restore(earlier.with_file_names({"model": sharded.whole_model_leaves()}, file), cast=True)
    return model.eval()


def continuation(
    model: GPT, begin: list[int], num_tokens: int, choice: Choice, seed: int, context: int, allowed: torch.Tensor | None
) -> Iterator[int]:
    """Tokens after `begin`, one by one, of the `allowed` ids.

    Keys and values of the tokens so far are kept. When there are `context` of them, beyond which the model knows no
    positions, the later half is read anew as a beginning.
    """
    import torch

    from unbroken.model import Past

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


def check_numbers(predicted: torch.Tensor) -> None:
    """Raise a UserError where a model predicts no numbers any more."""
    if not bool(predicted.isfinite().all()):
        raise UserError("the model predicts nan: its run has diverged; take a checkpoint from before that")


def choose(logits: torch.Tensor, choice: Choice, generator: torch.Generator) -> int:
    """A token id drawn from `logits` [V]."""
    import torch

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
    import torch

    from unbroken.corpus import END_OF_TEXT

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
    from unbroken.corpus import load_gpt2

    gpt2 = load_gpt2(None)
    return lambda text: gpt2.encode(text, disallowed_special=()), gpt2.decode_single_token_bytes
