"""The length of a run: --num_tokens and --num_epochs in steps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from unbroken.checkpoint.reader import CheckpointFile
from unbroken.config import AUTO, LENGTHS, Config, merge, parse_tokens, resolve_batch_sizes
from unbroken.data import left_out
from unbroken.data.stream import tokens_at_begin
from unbroken.run.experiment import STEP_SIZES
from unbroken.run.state import Progress
from unbroken.text import format_count


def step_tokens(config: Config) -> int:
    """Return the tokens of a step, also where the microbatch is not known yet."""
    return config.total_batch_size if config.batch_size == AUTO else config.step_tokens


def resolve_length(config: Config, epoch_tokens: int, progress: Progress) -> Config:
    """Return the flags with the `num_iterations` that --num_tokens or --num_epochs means, if one of them is typed.

    Past steps count with the tokens that they had, future steps with the present tokens of a step. So an attempt with
    the same flags finds the same number, wherever the attempt before was killed.

    Args:
        config: the flags of the attempt.
        epoch_tokens: the tokens of an epoch when the run began; 0 where they are not known yet.
        progress: that of the checkpoint; batches that were left out are not counted.
    """
    wanted = parse_tokens(config.num_tokens) or Fraction(str(config.num_epochs)) * epoch_tokens
    if not wanted:
        return config
    ahead = math.ceil((wanted - trained_tokens(progress)) / step_tokens(config))
    return dataclasses.replace(config, num_iterations=max(0, progress.step + ahead))


def epoch_tokens(file: CheckpointFile) -> int:
    """Return the tokens of an epoch when the run of a checkpoint began; 0 for one of the earlier program."""
    return tokens_at_begin(file.values["data"]) if file.is_ours else 0


def typed_length(typed: Mapping[str, Any], file: CheckpointFile) -> int:
    """Return the step to which the typed flags let the run of a checkpoint of this program train; 0 if none says so.

    Raises UserError for flags that do not fit.
    """
    if not typed.keys() & {*LENGTHS}:
        return 0
    saved = dict(file.values["args"])
    sizes = {name: typed[name] for name in (*LENGTHS, *STEP_SIZES, "sequence_length") if name in typed}
    config = merge(resolve_batch_sizes(sizes, saved), saved)
    return resolve_length(config, epoch_tokens(file), Progress.from_checkpoint(file.values["progress"])).num_iterations


def describe_length(config: Config, epoch_tokens: int, progress: Progress, before: int | None) -> str:
    """Return the line that says what --num_tokens or --num_epochs became; "" if neither is typed.

    Args:
        config: the flags, with all values resolved.
        epoch_tokens: the tokens of an epoch.
        progress: that of the checkpoint.
        before: the `num_iterations` of the checkpoint; None for a new run.
    """
    if not config.num_tokens and not config.num_epochs:
        return ""
    typed = f"--num_tokens {config.num_tokens}" if config.num_tokens else f"--num_epochs {config.num_epochs:g}"
    tokens = trained_tokens(progress) + (config.num_iterations - progress.step) * config.step_tokens
    steps, epochs = format_count(config.num_iterations, "step"), format_count(tokens / epoch_tokens, "epoch")
    line = f"{typed}: {steps}, {tokens:,} tokens, {epochs}"
    if before is None or before == config.num_iterations:
        return line
    return f"{line}; the run had {format_count(before, 'step')}"


def trained_tokens(progress: Progress) -> int:
    """Return the number of tokens that the steps so far were trained on."""
    return progress.tokens - left_out.count_before(progress.left_out, progress.tokens)
