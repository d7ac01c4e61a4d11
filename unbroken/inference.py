"""The model of a checkpoint in use: loading it, finding its tokenizer, generating text."""

from __future__ import annotations

import codecs
import io
import math
import os
import tokenize
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unbroken import console
from unbroken.checkpoint.format.schema import dict_at
from unbroken.checkpoint.reader import CheckpointFile
from unbroken.data import sources
from unbroken.data.tokenizers import END_OF_TEXT, NUM_BYTES, Tokenizer, choose, find_named
from unbroken.distributed.sliced_tensor import SlicedTensor
from unbroken.distributed.world import Launch, choose_device
from unbroken.errors import UserError
from unbroken.model import families
from unbroken.model.language_model import LanguageModel
from unbroken.run import legacy
from unbroken.runtime.environment import SAME_BITS, read_sources, sources_digest
from unbroken.text import printable, printable_text

BYTE_MODEL_PROBABILITY = 0.9  # of all bytes together as a document's first token; a GPT-2 model gives them far less


@dataclass(frozen=True)
class SamplingConfig:
    """A rule for drawing the next token."""

    temperature: float = 0.8  # divides the logits; 0: the likeliest token
    top_k: int = 0  # draw among so many of the likeliest tokens; 0: among all
    top_p: float = 1.0  # draw among the likeliest tokens whose probabilities sum to this

    def __post_init__(self) -> None:
        if not math.isfinite(self.temperature) or self.temperature < 0:
            raise UserError(f"--temperature {self.temperature}: it must be a number, not negative")
        if self.top_k < 0:
            raise UserError(f"--top_k {self.top_k}: it must not be negative")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top_p {self.top_p}: it must be above 0 and at most 1")


class TextGenerator:
    """A generator of text: the model of a checkpoint with its tokenizer."""

    def __init__(
        self, file: CheckpointFile, tokenizer: str = "auto", device: str = "auto", bpe_dir: Path | None = None
    ) -> None:
        """Load the model and its tokenizer. Raises UserError.

        Args:
            file: The checkpoint.
            tokenizer: "auto" for the checkpoint's own, or what `choose` takes.
            device: Where the model runs: auto, cpu or cuda.
            bpe_dir: The folder of GPT-2's files; None: tiktoken's cache.
        """
        self.model = load_model(file, device)
        self.context = context_length(file.values, self.model)
        name = find_tokenizer(file.values, self.model) if tokenizer == "auto" else tokenizer
        self._tokenizer = open_tokenizer(name, self.model, bpe_dir)

    def generate(self, prompt: str, num_tokens: int, sampling: SamplingConfig, seed: int) -> Iterator[str]:
        """Yield the prompt and its continuation in pieces, without control characters.

        Args:
            prompt: The beginning of the text; may be empty.
            num_tokens: Most tokens to generate; the end of the text comes earlier if the model says so.
            sampling: How each token is drawn.
            seed: Decides the text.
        """
        tokenizer, decoder = self._tokenizer, codecs.getincrementaldecoder("utf-8")("replace")
        end = tokenizer.end_of_text
        start, allowed = [end, *tokenizer.encode(prompt)], torch.tensor([*tokenizer.ids, end])
        yield printable_text(prompt)
        for token in generate_tokens(self.model, start, num_tokens, sampling, seed, self.context, allowed):
            if token == end:
                break
            yield printable_text(decoder.decode(tokenizer.decode(token)))  # a character may be several tokens
        yield printable_text(decoder.decode(b"", final=True))


def load_model(file: CheckpointFile, device: str = "cpu") -> LanguageModel:
    """Return the model of a checkpoint of any kind, its weights in fp32, ready for inference.

    The checkpoint names the architecture, so a later release reads it. A line warns if it was trained with other source
    code of the model, which only the user knows to be another one. Raises UserError if the checkpoint is damaged or
    fits none of the models.
    """
    model = families.build(*legacy.identify_model(file.values, str(file.path)))
    changed = ", ".join(changed_sources(file, model))
    if changed:
        commit = dict_at(file.values, "environment").get("git_commit")
        trained = f", trained at commit {printable(commit, 50)}" if isinstance(commit, str) and commit else ""
        console.print_line(
            f"WARNING: {printable(file.path, 4096)}: the model's source changed since the checkpoint ({changed})"
            f"{trained}: if the model was changed by hand, it computes other numbers here",
            error=True,
        )
    model = model.allocate(choose_device(device, Launch()))
    leaves = {id(parameter): SlicedTensor.whole(parameter) for parameter in model.parameters()}
    named = {name: leaves[id(tensor)] for name, tensor in model.named_parameters(remove_duplicate=False)}
    file.restore(legacy.rename_to_file({"model": named}, file), cast=True)
    return model.eval()


def changed_sources(file: CheckpointFile, model: LanguageModel) -> list[str]:
    """Return the source files of the model whose statements differ from those in the checkpoint."""
    saved = file.values.get("sources")
    if not isinstance(saved, dict) or not saved or sources_digest(saved, file.values.get("code")) in SAME_BITS:
        return []
    of_classes = {families.source_of(each.__module__) for each in type(model).__mro__} - {""}
    names = sorted({*of_classes, "model/attention.py", "model/loss.py"})
    now = read_sources()
    return [name for name in names if _statements(saved.get(name)) != _statements(now[name])]


def _statements(text: object) -> list[str]:
    """Return the tokens of an untrusted source file that decide what it does."""
    found, kind = [], tokenize.NEWLINE
    try:
        for token in tokenize.generate_tokens(io.StringIO(str(text)).readline):
            if token.type in (tokenize.COMMENT, tokenize.NL):
                continue
            is_docstring = token.type == tokenize.STRING and kind in (tokenize.NEWLINE, tokenize.INDENT)
            kind = token.type
            if not is_docstring and kind != tokenize.NEWLINE:
                found.append(token.string)
    except (tokenize.TokenError, SyntaxError):
        return [str(text)]
    return found


def generate_tokens(
    model: LanguageModel,
    start: list[int],
    num_tokens: int,
    sampling: SamplingConfig,
    seed: int,
    context: int,
    allowed: Tensor | None,
) -> Iterator[int]:
    """Yield tokens that continue a text.

    Keys and values of earlier tokens are cached. When the context is full, its later half is read again as the start of
    a text, because the model was not trained on longer ones.

    Args:
        model: On any device.
        start: The tokens to continue, at least one.
        num_tokens: How many tokens to generate.
        sampling: How each token is drawn.
        seed: Decides the tokens, on every device.
        context: The most tokens that the model reads at once.
        allowed: The token ids to draw from, int64; None for all.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)  # on the CPU: it draws the same numbers for every device
    tokens, unread, caches = list(start), start[-context:], model.new_caches()
    for _ in range(num_tokens):
        if caches[0].length + len(unread) > context:
            unread, caches = tokens[-max(1, context // 2) :], model.new_caches()
        with torch.inference_mode():
            logits = model.next_logits(torch.tensor([unread], device=device), caches)[0].float().cpu()
        require_finite(logits)
        drawn = sample_token(logits if allowed is None else logits[allowed], sampling, generator)
        tokens.append(drawn if allowed is None else int(allowed[drawn]))
        unread = tokens[-1:]
        yield tokens[-1]


def require_finite(predicted: Tensor) -> None:
    """Raise UserError if a model predicts nan or infinity."""
    if not bool(predicted.isfinite().all()):
        raise UserError("the model predicts nan: its run has diverged; use an earlier checkpoint")


def sample_token(logits: Tensor, sampling: SamplingConfig, generator: torch.Generator) -> int:
    """Return an index into `logits` [V], drawn by `generator`."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    ordered, ids = torch.sort((logits - logits.max()).double() / sampling.temperature, descending=True, stable=True)
    probabilities = torch.softmax(ordered, dim=0)
    before = probabilities.cumsum(0) - probabilities  # the sum of all likelier ones, 0 for the first: it always stays
    kept = before < sampling.top_p
    if sampling.top_k:
        kept[sampling.top_k :] = False
    return int(ids[torch.multinomial(probabilities * kept, 1, generator=generator)])


def find_tokenizer(values: dict[str, Any], model: LanguageModel) -> str:
    """Return the tokenizer that a checkpoint was trained with, as `choose` takes it; `values` is untrusted.

    The checkpoint names it if its shards did: one of TOKENIZERS, or a `tokenizer.json` that lies beside the shards.
    Otherwise the tokens of the built-in corpus are bytes, and for other shards the model's predictions decide. Raises
    UserError if the tokenizer is not here.
    """
    data = dict_at(values, "data")  # a foreign checkpoint has none
    name = data.get("tokenizer")
    if isinstance(name, str) and name:
        if found := find_named(name, _shard_folders(dict_at(values, "args"))):
            return found
        raise UserError(f"the checkpoint's tokenizer {printable(name, 60)} is unknown; type --tokenizer FILE")
    shards = data.get("shards")
    names = [str(shard.get("name")) for shard in shards if isinstance(shard, dict)] if isinstance(shards, list) else []
    builtin = bool(names) and all(name.startswith("stdlib_") for name in names)
    return "bytes" if builtin or predicts_bytes(model) else "gpt2"


def _shard_folders(args: dict[str, Any]) -> list[Path]:
    """Return the folders of the shards that the flags of a checkpoint (untrusted) name."""
    globs: list[str] = []
    for flag in ("input_bin", "input_val_bin"):
        text = args.get(flag)
        if isinstance(text, str) and text:
            with suppress(UserError):
                mix = sources.parse(text)
                globs += mix.globs if mix else (text,)
    return [Path(os.path.expanduser(glob)).parent for glob in globs]


def open_tokenizer(name: str, model: LanguageModel, bpe_dir: Path | None = None) -> Tokenizer:
    """Return the tokenizer that `choose` takes by this name. Raises UserError if the model lacks some of its tokens."""
    kind, place = choose(name, bpe_dir)
    tokenizer, most = kind(place), model.config.vocab_size
    if tokenizer.vocab_size > most:
        raise UserError(
            f"--tokenizer {printable(name, 4096)}: it has a vocabulary of {tokenizer.vocab_size:,} tokens, the model"
            f" one of {most:,}; type the one that the model was trained with"
        )
    return tokenizer


def predicts_bytes(model: LanguageModel) -> bool:
    """Return whether a model expects a byte at the start of a text."""
    if model.config.vocab_size <= END_OF_TEXT:
        return False
    with torch.inference_mode():
        logits = model(torch.tensor([[END_OF_TEXT]], device=next(model.parameters()).device))[0].float()
    return float(torch.softmax(logits, 0)[:NUM_BYTES].sum()) > BYTE_MODEL_PROBABILITY


def context_length(values: dict[str, Any], model: LanguageModel) -> int:
    """Return the sequence length that a checkpoint was trained with, 1024 if it does not say; `values` is untrusted."""
    length, longest = dict_at(values, "args").get("sequence_length"), model.config.n_positions or 1 << 20
    return min(length if type(length) is int and 0 < length <= 1 << 20 else 1024, longest)
