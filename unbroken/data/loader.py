"""Batches for training and validation, from the token stream to the device."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from unbroken.errors import UserError

# torch takes a second to import, and whoever only looks at shards does not need it
if TYPE_CHECKING:
    import torch
    from typing_extensions import Self
from unbroken.data.stream import Stream

IGNORED = -1  # the target that no loss counts


def read_batch(
    stream: Stream, position: int, batch_size: int, sequence_length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets, int64 [batch_size, sequence_length]; sequence i starts i*sequence_length on."""
    import torch

    count = batch_size * sequence_length
    tokens = torch.from_numpy(stream.read_checked(position, count + 1).astype(np.int64))
    return tokens[:-1].view(batch_size, sequence_length), tokens[1:].clone().view(batch_size, sequence_length)


def copy_to_device(part: torch.Tensor, device: torch.device) -> torch.Tensor:
    """On its way; for a GPU from pinned memory: from other memory the host would wait for all the GPU has to do."""
    return part.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else part


@dataclass(frozen=True)
class RankShare:
    """What one process trains on in a step: microbatches lo..hi-1 of `num_microbatches`."""

    microbatch_size: int  # sequences
    sequence_length: int
    num_microbatches: int  # of a step, over all processes
    lo: int
    hi: int

    @property
    def microbatch_tokens(self) -> int:
        return self.microbatch_size * self.sequence_length

    @property
    def step_tokens(self) -> int:
        """Tokens a step takes from the stream, over all processes."""
        return self.num_microbatches * self.microbatch_tokens


class BatchLoader:
    """The batches of this process, step after step, on its device; for a GPU the next are read meanwhile.

    `position` is that of the next batch to be trained, whatever has been read ahead: a checkpoint stores it.
    """

    def __init__(
        self,
        stream: Stream,
        position: int,
        share: RankShare,
        device: torch.device,
        read_ahead: bool | None = None,
    ) -> None:
        self.stream, self.position, self.share, self.device = stream, position, share, device
        # On a CPU reading takes 0.1 to 0.7 ms; by a thread that competes with training, 2 to 5 times that.
        ahead = device.type == "cuda" if read_ahead is None else read_ahead
        self._thread = ThreadPoolExecutor(1, "feed", self._enter_thread) if ahead else None
        self._next: Future[torch.Tensor] | None = None
        self._tokens: torch.Tensor | None = None
        self._read_next()

    def read(self) -> None:
        """Have the tokens of the next step. Raises what reading raised; nothing has changed then."""
        if self._tokens is None:
            self._tokens = self._read(self.position, self.share) if self._next is None else self._next.result()

    def step(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """This process's microbatches of the next step, as (inputs, targets).

        Both int64 [microbatch_size, sequence_length]. Raises what `read` raises.
        """
        import torch

        self.read()
        assert self._tokens is not None
        tokens, self._tokens = self._tokens, None
        self.position += self.share.step_tokens
        self._read_next()
        # int32 halves the transfer; the pinned memory is kept by torch until the copy is done.
        tokens = tokens.to(self.device, non_blocking=True)
        shape = (self.share.hi - self.share.lo, self.share.microbatch_size, self.share.sequence_length)
        inputs, targets = (part.to(torch.int64).view(shape) for part in (tokens[:-1], tokens[1:]))
        return list(zip(inputs.unbind(), targets.unbind(), strict=True))

    def seek(self, position: int, share: RankShare | None = None) -> None:
        """Go on at another position, or with another share of the step. What was read ahead is forgotten."""
        if self._next is not None:
            self._next.cancel()
        self._tokens = None
        self.position, self.share = position, share or self.share
        self._read_next()

    def close(self) -> None:
        """End the thread."""
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
            self._thread = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _enter_thread(self) -> None:
        """Pinned memory belongs to the thread's current GPU: else all ranks would open a context on GPU 0."""
        if self.device.type == "cuda":
            import torch

            torch.cuda.set_device(self.device)

    def _read_next(self) -> None:
        if self._thread is not None:
            self._next = self._thread.submit(self._read, self.position, self.share)

    def _read(self, position: int, share: RankShare) -> torch.Tensor:
        """int32 [tokens of this process + 1], in pinned memory for a GPU."""
        import torch

        count = (share.hi - share.lo) * share.microbatch_tokens
        tokens = self.stream.read_checked(position + share.lo * share.microbatch_tokens, count + 1)
        host = torch.empty(count + 1, dtype=torch.int32, pin_memory=self.device.type == "cuda")
        host.numpy()[:] = tokens
        return host


@dataclass(frozen=True)
class ValidationPlan:
    """The validation batches: the first `num_sequences` sequences of the set, on any number of processes."""

    num_sequences: int
    batch_size: int
    sequence_length: int
    notice: str  # for the user; empty if there is nothing to say

    @property
    def num_batches(self) -> int:
        return -(-self.num_sequences // self.batch_size)

    @property
    def num_tokens(self) -> int:
        """Targets that count."""
        return self.num_sequences * self.sequence_length


def plan_validation(stream: Stream, val_tokens: int, batch_size: int, sequence_length: int) -> ValidationPlan:
    """How `val_tokens` tokens from the beginning of the stream, never around its end, make batches."""
    available = stream.num_tokens - 1  # the last input needs a target
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
    """Inputs and targets, int64 [batch_size, sequence_length], of validation batch `index`.

    The last one is filled up with targets IGNORED (-1), which no loss counts, so that shapes never change.
    """
    import torch

    first = index * plan.batch_size
    whole = min(plan.batch_size, plan.num_sequences - first)
    assert whole > 0
    inputs = torch.zeros(plan.batch_size, plan.sequence_length, dtype=torch.int64)
    targets = torch.full_like(inputs, IGNORED)
    inputs[:whole], targets[:whole] = read_batch(stream, first * plan.sequence_length, whole, plan.sequence_length)
    return inputs, targets
