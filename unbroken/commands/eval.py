"""`python -m unbroken eval`: what a checkpoint's loss is on any shards, and how often it is right on HellaSwag."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unbroken import console
from unbroken.errors import UserError
from unbroken.run import locate
from unbroken.text import printable

if TYPE_CHECKING:
    import torch

    from unbroken.data.stream import Stream
    from unbroken.model.gpt import GPT


HELP = "validation loss, perplexity, bits per byte; HellaSwag"
MAX_LINE_BYTES = 1 << 20


def configure(parser: argparse.ArgumentParser) -> None:
    """Which checkpoint on what."""
    parser.add_argument(
        "what", nargs="+", metavar="FILE|RUN", help=f"{locate.CHECKPOINT_HELP}; of several, one row each"
    )
    parser.add_argument("--input_bin", default="", metavar="GLOB", help="shards (default: the run's validation shards)")
    parser.add_argument("--tokens", type=int, default=0, metavar="N", help="of them (default: the run's --val_tokens)")
    parser.add_argument("--batch_size", type=int, default=16, metavar="N", help="sequences at a time (default: 16)")
    parser.add_argument("--sequence_length", type=int, default=0, metavar="N", help="default: as trained")
    parser.add_argument("--hellaswag", type=Path, metavar="FILE", help="hellaswag_val.jsonl: score it instead")
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="of HellaSwag's questions (default: all)")
    parser.add_argument("--tokenizer", choices=("auto", "bytes", "gpt2"), default="auto", help="by the checkpoint")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print a table, or one JSON object; of several checkpoints a row each, or a list."""
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
    from unbroken.data.tokenizers import byte_codec, gpt2_codec
    from unbroken.inference import context_length, load_model, trained_on_bytes

    if args.hellaswag and not os.path.isfile(args.hellaswag):
        raise UserError(f"--hellaswag {args.hellaswag}: there is no such file")
    with locate.open_newest(what) as file:
        path = file.path
        model = load_model(file, args.device)
        length = args.sequence_length or context_length(file.values)
        of_bytes = trained_on_bytes(file.values, model) if args.tokenizer == "auto" else args.tokenizer == "bytes"
        saved = file.values.get("args")
        trained = saved if isinstance(saved, dict) else {}
        step = file.values.get("step")
    about: dict[str, Any] = {"checkpoint": str(path), **({"step": step} if type(step) is int else {})}
    if args.hellaswag:
        encode, _ = byte_codec() if of_bytes else gpt2_codec()
        return about | score(model, encode, questions(args.hellaswag, args.limit), length)
    pattern = args.input_bin or trained.get("input_val_bin")
    if not pattern or not isinstance(pattern, str):
        raise UserError("the checkpoint names no validation shards: type --input_bin GLOB")
    from unbroken.config import Config
    from unbroken.data.stream import Stream

    saved_tokens = trained.get("val_tokens")
    tokens = args.tokens or max(length, saved_tokens if type(saved_tokens) is int else Config.val_tokens)
    if tokens < length:
        raise UserError(f"--tokens {tokens}: it must be at least one sequence, {length}")
    return about | measure(model, Stream.open(pattern), tokens, args.batch_size, length, of_bytes)


def measure(
    model: GPT, stream: Stream, tokens: int, batch_size: int, length: int, of_bytes: bool
) -> dict[str, int | float]:
    """The mean loss of a token in nats over the stream's first `tokens`, and what follows from it."""
    import torch

    from unbroken.config import MAX_MICROBATCH_TOKENS
    from unbroken.data.loader import plan_validation, val_batch

    batch_size = min(batch_size, max(1, min(tokens, stream.num_tokens) // length))  # the last one is filled up
    if batch_size * length > MAX_MICROBATCH_TOKENS:
        raise UserError(f"--batch_size {batch_size}: at most {MAX_MICROBATCH_TOKENS:,} tokens fit into a batch")
    plan = plan_validation(stream, tokens, batch_size, length)
    device = next(model.parameters()).device
    losses, size = [], 0
    try:
        width: Callable[[int], int] | None = _widths(of_bytes)
    except UserError as error:
        print(f"bits per byte are left out: {error}", file=sys.stderr)
        width = None
    with torch.inference_mode(), console.progress_bar("batches", plan.num_batches) as advance:
        for index in range(plan.num_batches):
            x, y = val_batch(stream, plan, index)
            losses.append(float(model(x.to(device), y.to(device), reduction="sum")))
            size += sum(width(token) for token in y.flatten().tolist() if token >= 0) if width else 0
            advance(1)
    loss = math.fsum(losses) / plan.num_tokens
    found: dict[str, int | float] = {"tokens": plan.num_tokens, "loss": loss, "perplexity": math.exp(min(loss, 700))}
    return found | ({"bits_per_byte": math.fsum(losses) / math.log(2) / size} if size else {})


def _widths(of_bytes: bool) -> Callable[[int], int]:
    """How many bytes of text a token stands for; the end of a text for none."""
    from unbroken.data.tokenizers import END_OF_TEXT, gpt2_codec

    if of_bytes:
        return lambda token: int(token < 256)
    decode = gpt2_codec()[1]
    known = [0 if token == END_OF_TEXT else len(decode(token)) for token in range(END_OF_TEXT + 1)]
    return lambda token: known[token] if token < len(known) else 0


# ---- HellaSwag (Zellers et al. 2019) ---------------------------------------------------------------------------------


def questions(path: Path, limit: int) -> Iterator[tuple[str, list[str], int]]:
    """(context, endings, the right one's number) for each line of the file, which is checked."""
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
    """Its texts as lm-evaluation-harness makes them of HellaSwag's fields; `ctx` where there is no more than that."""
    context, endings, label = entry["ctx"], entry["endings"], int(entry["label"])
    if "ctx_a" in entry:
        context = f"{entry['activity_label']}: {entry['ctx_a']} {entry['ctx_b'].capitalize()}"
    if not isinstance(endings, list) or not all(endings) or not 0 <= label < len(endings):
        raise ValueError
    return _cleaned(context), [_cleaned(ending) for ending in endings], label


def _cleaned(text: str) -> str:
    """Without the brackets that WikiHow's part of the data has kept. Raises ValueError for half a character."""
    text.encode()
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def score(
    model: GPT, encode: Callable[[str], list[int]], asked: Iterator[tuple[str, list[str], int]], length: int
) -> dict[str, int | float]:
    """acc: the likeliest ending is the right one; acc_norm: the likeliest per letter, as the harness has it."""
    right = normed = count = 0
    with console.progress_bar("questions", None) as advance:
        for context, endings, label in asked:
            sums = [ending_loss(model, encode(context), encode(" " + ending), length) for ending in endings]
            per_letter = [loss / max(1, len(ending)) for loss, ending in zip(sums, endings, strict=True)]
            count += 1
            right += sums.index(min(sums)) == label
            normed += per_letter.index(min(per_letter)) == label
            advance(1)
    return {"questions": count, "acc": right / count, "acc_norm": normed / count}


def ending_loss(model: GPT, context: list[int], ending: list[int], length: int) -> float:
    """The summed loss of the ending's tokens in nats, given as much of the context as the model takes."""
    import torch

    from unbroken.data.tokenizers import END_OF_TEXT
    from unbroken.inference import require_finite

    tokens = torch.tensor([END_OF_TEXT, *context, *ending][-length - 1 :], device=next(model.parameters()).device)
    targets: torch.Tensor = tokens[1:].clone()
    targets[: -len(ending)] = -1
    with torch.inference_mode():
        loss = model(tokens[None, :-1], targets[None], reduction="sum")
    require_finite(loss)
    return float(loss)
