"""`python -m unbroken eval`: the loss of a checkpoint on any shards, or its score on HellaSwag."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unbroken import console
from unbroken.checkpoint.format.schema import dict_at
from unbroken.commands import add_model_flags
from unbroken.config import MAX_MICROBATCH_TOKENS, Config
from unbroken.data.stream import Stream
from unbroken.data.tokenizers import Tokenizer, choose, find_named
from unbroken.errors import UserError
from unbroken.run import locate
from unbroken.text import printable

if TYPE_CHECKING:
    import torch

    from unbroken.model.language_model import LanguageModel


MAX_LINE_BYTES = 1 << 20


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the checkpoints, the data and the flags of evaluation."""
    parser.add_argument(
        "what", nargs="+", metavar="FILE|RUN", help=f"{locate.CHECKPOINT_HELP}; several give a row each"
    )
    parser.add_argument(
        "--input_bin", default="", metavar="GLOB", help="shards to evaluate (default: the run's validation shards)"
    )
    parser.add_argument(
        "--tokens", type=int, default=0, metavar="N", help="tokens to evaluate (default: as many as the run)"
    )
    parser.add_argument("--batch_size", type=int, default=16, metavar="N", help="sequences of a batch (default: 16)")
    parser.add_argument(
        "--sequence_length",
        type=int,
        default=0,
        metavar="N",
        help="tokens of a sequence (default: that of the training)",
    )
    parser.add_argument("--hellaswag", type=Path, metavar="FILE", help="score HellaSwag instead: its jsonl file")
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="questions of HellaSwag (default: all)")
    add_model_flags(parser)
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object, or a list of them for several checkpoints"
    )


def run(args: argparse.Namespace) -> int:
    """Print a table or a JSON object; for several checkpoints a row each, or a list of objects."""
    for name, least in (("batch_size", 1), ("tokens", 0), ("sequence_length", 0), ("limit", 0)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} {getattr(args, name)}: it must be at least {least}")
    found = [_evaluate(what, args) for what in args.what]
    if args.json:
        print(console.to_json(found if len(found) > 1 else found[0]))
        return 0
    texts = [{key: _shown(value) for key, value in row.items()} for row in found]
    if len(found) == 1:
        print("\n".join(f"{key:<16} {text}" for key, text in texts[0].items()))
        return 0
    heads = list(dict.fromkeys(key for row in texts for key in row))
    print(console.format_table(heads, [[row.get(key, "") for key in heads] for row in texts], " " + "r" * len(heads)))
    return 0


def _shown(value: object) -> str:
    return f"{value:.6f}" if isinstance(value, float) else printable(value, 4096)


def _evaluate(what: str, args: argparse.Namespace) -> dict[str, Any]:
    """Return the row of a checkpoint. Raises UserError if it cannot be evaluated."""
    from unbroken.inference import context_length, find_tokenizer, load_model, open_tokenizer

    if args.hellaswag and not os.path.isfile(args.hellaswag):
        raise UserError(f"--hellaswag {args.hellaswag}: there is no such file")
    with locate.open_newest(what) as file:
        path = file.path
        model = load_model(file, args.device)
        length = args.sequence_length or context_length(file.values, model)
        values, trained, step = file.values, dict_at(file.values, "args"), file.values.get("step")
    about: dict[str, Any] = {"checkpoint": str(path), **({"step": step} if type(step) is int else {})}
    if args.hellaswag:
        name = find_tokenizer(values, model) if args.tokenizer == "auto" else args.tokenizer
        reader = open_tokenizer(name, model, args.bpe_dir)
        return about | score(model, reader, questions(args.hellaswag, args.limit), length)
    pattern = args.input_bin or trained.get("input_val_bin")
    if not pattern or not isinstance(pattern, str):
        raise UserError("the checkpoint names no validation shards; type --input_bin GLOB")
    saved_tokens = trained.get("val_tokens")
    tokens = args.tokens or max(length, saved_tokens if type(saved_tokens) is int else Config.val_tokens)
    if tokens < length:
        raise UserError(f"--tokens {tokens}: it must be at least one sequence, {length}")
    stream = Stream.open(pattern, vocab_size=model.config.vocab_size)
    tokenizer = args.tokenizer
    if tokenizer == "auto":  # the shards know best what made them
        tokenizer = find_named(stream.tokenizer, [stream.shards[0].path.parent]) or find_tokenizer(values, model)
    return about | measure(model, stream, tokens, args.batch_size, length, tokenizer, args.bpe_dir)


def measure(
    model: LanguageModel,
    stream: Stream,
    tokens: int,
    batch_size: int,
    length: int,
    tokenizer: str,
    bpe_dir: Path | None = None,
) -> dict[str, int | float]:
    """Return the mean loss of a token in nats, the perplexity and, if the tokenizer can be loaded, the bits per byte.

    Args:
        model: On any device.
        stream: The tokens to evaluate.
        tokens: Their number, from the beginning of the stream.
        batch_size: Sequences of a batch.
        length: Tokens of a sequence.
        tokenizer: What made the tokens, as `choose` takes it.
        bpe_dir: Folder of its files.
    """
    import torch

    from unbroken.data.loader import plan_validation, val_batch

    # The last batch is padded: one that is larger than the set would compute padding only.
    batch_size = min(batch_size, max(1, min(tokens, stream.num_tokens) // length))
    if batch_size * length > MAX_MICROBATCH_TOKENS:
        raise UserError(f"--batch_size {batch_size}: at most {MAX_MICROBATCH_TOKENS:,} tokens fit into a batch")
    plan = plan_validation(stream, tokens, batch_size, length)
    device = next(model.parameters()).device
    losses, size, width = [], 0, _bytes_of_tokens(tokenizer, bpe_dir)
    with torch.inference_mode(), console.progress_bar("batches", plan.num_batches) as advance:
        for index in range(plan.num_batches):
            x, y = val_batch(stream, plan, index)
            losses.append(float(model(x.to(device), y.to(device), reduction="sum")))
            size += sum(width.get(token, 0) for token in y.flatten().tolist())
            advance(1)
    loss = math.fsum(losses) / plan.num_tokens
    found: dict[str, int | float] = {"tokens": plan.num_tokens, "loss": loss, "perplexity": math.exp(min(loss, 700))}
    return found | ({"bits_per_byte": math.fsum(losses) / math.log(2) / size} if size else {})


def _bytes_of_tokens(name: str, bpe_dir: Path | None) -> dict[int, int]:
    """Return the number of bytes of each token of text; empty if the tokenizer cannot be loaded."""
    try:
        kind, place = choose(name, bpe_dir)
        tokenizer = kind(place)
    except UserError as error:
        print(f"bits per byte are left out: {error}", file=sys.stderr)
        return {}
    return {token: len(tokenizer.decode(token)) for token in tokenizer.ids}


# ---- HellaSwag (Zellers et al. 2019) ---------------------------------------------------------------------------------


def questions(path: Path, limit: int) -> Iterator[tuple[str, list[str], int]]:
    """Yield (context, endings, index of the right ending) for each line of a jsonl file.

    Raises UserError for a line that is no question.
    """
    count = 0
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if limit and number > limit:
                    return
                if not line.strip():
                    continue
                try:
                    question = _question(json.loads(line[:MAX_LINE_BYTES]))
                except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
                    raise UserError(f"{path}, line {number}: not a question with ctx, endings and label") from None
                count += 1
                yield question
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if not count:
        raise UserError(f"{path}: it has no questions")


def _question(entry: dict[str, Any]) -> tuple[str, list[str], int]:
    """Return the texts that lm-evaluation-harness makes of HellaSwag's fields, or of `ctx` if there are no others."""
    context, endings, label = entry["ctx"], entry["endings"], int(entry["label"])
    if "ctx_a" in entry:
        context = f"{entry['activity_label']}: {entry['ctx_a']} {entry['ctx_b'].capitalize()}"
    if not isinstance(endings, list) or not all(endings) or not 0 <= label < len(endings):
        raise ValueError
    return _cleaned(context), [_cleaned(ending) for ending in endings], label


def _cleaned(text: str) -> str:
    """Return a text without the brackets of WikiHow's part of the data. Raises ValueError for half a character."""
    text.encode()
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def score(
    model: LanguageModel, tokenizer: Tokenizer, asked: Iterator[tuple[str, list[str], int]], length: int
) -> dict[str, int | float]:
    """Return how often the right ending is the likeliest (acc), and the likeliest per letter (acc_norm).

    Args:
        model: On any device.
        tokenizer: That of the model.
        asked: The questions, as `questions` yields them.
        length: The most tokens that the model reads.
    """
    right = normed = count = 0
    with console.progress_bar("questions", None) as advance:
        for context, endings, label in asked:
            before = [tokenizer.end_of_text, *tokenizer.encode(context)]
            sums = [ending_loss(model, before, tokenizer.encode(" " + ending), length) for ending in endings]
            per_letter = [loss / max(1, len(ending)) for loss, ending in zip(sums, endings, strict=True)]
            count += 1
            right += sums.index(min(sums)) == label
            normed += per_letter.index(min(per_letter)) == label
            advance(1)
    return {"questions": count, "acc": right / count, "acc_norm": normed / count}


def ending_loss(model: LanguageModel, context: list[int], ending: list[int], length: int) -> float:
    """Return the summed loss of the ending's tokens in nats.

    Args:
        model: On any device.
        context: Tokens before the ending, cut at their beginning if they are too many.
        ending: Tokens of the ending.
        length: The most tokens that the model reads.
    """
    import torch

    from unbroken.inference import require_finite
    from unbroken.model.loss import IGNORED

    tokens = torch.tensor([*context, *ending][-length - 1 :], device=next(model.parameters()).device)
    targets: torch.Tensor = tokens[1:].clone()
    targets[: -len(ending)] = IGNORED
    with torch.inference_mode():
        loss = model(tokens[None, :-1], targets[None], reduction="sum")
    require_finite(loss)
    return float(loss)
