"""Batches for training and validation, from the stream of tokens to the device."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from unbroken.data.mixture import TokenStream
from unbroken.data.stream import Stream
from unbroken.errors import UserError
from unbroken.model.loss import IGNORED
from unbroken.threads import WorkerThreads

if TYPE_CHECKING:
    from typing_extensions import Self


def read_batch(
    stream: Stream, position: int, batch_size: int, sequence_length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs and targets, both int64 [batch_size, sequence_length].

    Args:
        stream: Where tokens are read.
        position: The first token of the first sequence; the sequences follow one another.
        batch_size: Sequences of the batch.
        sequence_length: Tokens of a sequence.
    """
    count = batch_size * sequence_length
    pairs = (torch.from_numpy(tokens.astype(np.int64)) for tokens in stream.read_pairs(position, count))
    inputs, targets = (tokens.view(batch_size, sequence_length) for tokens in pairs)
    return inputs, targets


def copy_to_device(part: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Start copying a tensor to a device. For a GPU it is pinned first, because otherwise the host would wait."""
    return part.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else part


class BatchesInFlight:
    """A limit of two batches of which a GPU has not computed all, so that the time of a batch is that of the GPU.

    The host could be many batches ahead: then a whole validation would seem to end in seconds, its last line to hang.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._before: torch.cuda.Event | None = None

    def issued(self) -> None:
        """Note that the work of a batch is queued; wait until that of the batch before it is done."""
        if not self._on_gpu:
            return
        before, self._before = self._before, torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._before.record()
        if before is not None:
            before.synchronize()


@dataclass(frozen=True)
class RankShare:
    """The part of a step that one process computes: microbatches `lo` to `hi` - 1 of `num_microbatches`."""

    microbatch_size: int  # sequences
    sequence_length: int  # tokens
    num_microbatches: int  # of a step, all processes together
    lo: int
    hi: int

    @property
    def microbatch_tokens(self) -> int:
        """Return the number of tokens in a microbatch."""
        return self.microbatch_size * self.sequence_length

    @property
    def step_tokens(self) -> int:
        """Return the number of tokens that a step takes from the stream, all processes together."""
        return self.num_microbatches * self.microbatch_tokens


class BatchLoader:
    """The microbatches of this process, step after step, on its device.

    `position` is that of the next step, whatever has been read ahead; a checkpoint stores it.
    """

    def __init__(
        self, stream: TokenStream, position: int, share: RankShare, device: torch.device, read_ahead: bool | None = None
    ) -> None:
        """Start at a position.

        Args:
            stream: Where tokens are read.
            position: Tokens that were consumed by all earlier steps.
            share: The part of each step that this process computes.
            device: Where batches go.
            read_ahead: Whether a thread reads the next step during this one; None: only for a GPU.
        """
        self.stream, self.position, self.share, self.device = stream, position, share, device
        # On a CPU reading takes 0.1 to 0.7 ms; a thread that competes with training takes 2 to 5 times as long.
        ahead = device.type == "cuda" if read_ahead is None else read_ahead
        self._thread = WorkerThreads(1, "loader", self._enter_thread) if ahead else None
        self._next: Future[torch.Tensor] | None = None
        self._tokens: torch.Tensor | None = None
        self._read_next()

    @property
    def source(self) -> str:
        """Return the shard in which the next step's tokens begin."""
        return str(self.stream.locate(self.start)[0].path)

    @property
    def start(self) -> int:
        """Return the position where the next step's tokens begin: `position`, or after batches that are left out."""
        return self.stream.next_start(self.position, self.share.step_tokens)

    def read(self) -> None:
        """Read the tokens of the next step, unless that is done. After a UserError the position is unchanged."""
        if self._tokens is None:
            self._tokens = self._read(self.start, self.share) if self._next is None else self._next.result()

    def step(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return this process's microbatches of the next step, and advance to the step after it.

        Each is inputs and targets, both int64 [microbatch_size, sequence_length]. Raises UserError like `read`.
        """
        self.read()
        assert self._tokens is not None
        tokens, self._tokens = self._tokens, None
        self.position = self.start + self.share.step_tokens
        self._read_next()
        # int32 halves the transfer. torch keeps the pinned memory until the copy is done.
        tokens = tokens.to(self.device, non_blocking=True)
        shape = (self.share.hi - self.share.lo, self.share.microbatch_size, self.share.sequence_length)
        inputs, targets = (part.to(torch.int64).view(shape) for part in tokens.unbind())
        return list(zip(inputs.unbind(), targets.unbind(), strict=True))

    def seek(self, position: int, share: RankShare | None = None) -> None:
        """Continue at another position, and with another share if there is one; discard what was read ahead."""
        if self._next is not None:
            self._next.cancel()
        self._tokens = None
        self.position, self.share = position, share or self.share
        self._read_next()

    def close(self) -> None:
        """End the reading thread."""
        if self._thread is not None:
            if self._next is not None:
                self._next.cancel()
            self._thread.close()
            self._thread = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _enter_thread(self) -> None:
        """Set the thread's GPU, to which pinned memory belongs: all ranks would open a context on GPU 0 otherwise."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def _read_next(self) -> None:
        if self._thread is not None:
            self._next = self._thread.submit(self._read, self.start, self.share)

    def _read(self, position: int, share: RankShare) -> torch.Tensor:
        """Return inputs and targets of this process, int32 [2, tokens], in pinned memory for a GPU."""
        count = (share.hi - share.lo) * share.microbatch_tokens
        pairs = self.stream.read_pairs(position + share.lo * share.microbatch_tokens, count)
        host = torch.empty((2, count), dtype=torch.int32, pin_memory=self.device.type == "cuda")
        for row, tokens in zip(host.numpy(), pairs, strict=True):
            row[:] = tokens
        return host


@dataclass(frozen=True)
class ValidationPlan:
    """The batches of a validation: the first `num_sequences` sequences of the set, on any number of processes."""

    num_sequences: int
    batch_size: int  # sequences
    sequence_length: int  # tokens
    notice: str  # for the console; may be empty

    @property
    def num_batches(self) -> int:
        """Return the number of batches; the last one may be padded."""
        return -(-self.num_sequences // self.batch_size)

    @property
    def num_tokens(self) -> int:
        """Return the number of targets that count."""
        return self.num_sequences * self.sequence_length


def plan_validation(stream: Stream, val_tokens: int, batch_size: int, sequence_length: int) -> ValidationPlan:
    """Return how the first `val_tokens` tokens of the stream make batches; a smaller set is used once.

    Args:
        stream: The validation data.
        val_tokens: Tokens of a validation.
        batch_size: Sequences of a batch.
        sequence_length: Tokens of a sequence.

    Raises UserError if there are not enough tokens for a sequence.
    """
    available = stream.num_tokens - 1  # the last token is only a target
    sequences = min(val_tokens, available) // sequence_length
    if sequences == 0:
        what = (
            f"--val_tokens {val_tokens} is"
            if val_tokens < sequence_length
            else f"a validation set of {available + 1} tokens is"
        )
        raise UserError(f"{what} too small for one sequence of {sequence_length}; use more tokens or shorter sequences")
    notice = f"validation uses its whole set, {available + 1} tokens: fewer than --val_tokens {val_tokens}"
    return ValidationPlan(sequences, batch_size, sequence_length, notice if available < val_tokens else "")


def val_batch(stream: Stream, plan: ValidationPlan, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs and targets, both int64 [batch_size, sequence_length], of validation batch `index`.

    The last batch is padded with targets that are IGNORED, so that all shapes are the same.
    """
    first = index * plan.batch_size
    whole = min(plan.batch_size, plan.num_sequences - first)
    assert whole > 0
    inputs = torch.zeros(plan.batch_size, plan.sequence_length, dtype=torch.int64)
    targets = torch.full_like(inputs, IGNORED)
    inputs[:whole], targets[:whole] = read_batch(stream, first * plan.sequence_length, whole, plan.sequence_length)
    return inputs, targets
