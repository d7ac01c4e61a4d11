"""Shards -> batches. All shards are one endless cyclic stream; a position is an integer, the tokens consumed.

A batch is a pure function of files and position: nothing else decides it, so nothing else has to be saved.
"""

from __future__ import annotations

import bisect
import glob
import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from unbroken.errors import UserError
from unbroken.shards import TOKEN, Shard, Tokens

# torch takes a second to import, and whoever only looks at shards does not need it
if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

IGNORED = -1  # the target that no loss counts


@dataclass(frozen=True, eq=False)
class Stream:
    """The shards in sorted order as one endless cyclic stream; shard i begins at position `starts[i]`."""

    shards: tuple[Shard, ...]
    starts: tuple[int, ...]
    num_tokens: int  # of one epoch
    vocab_size: int

    @classmethod
    def open(cls, pattern: str, *, vocab_size: int = 50257, at_least: int = 2) -> Stream:
        """Open every shard that matches the glob; only headers are read, so large shards take no longer.

        Raises UserError, one line, for anything that cannot be trained on, or fewer than `at_least` tokens.
        """
        paths = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))
        if not paths:
            raise UserError(f"no token shards match {pattern!r}; {_way_to_get(pattern)}")
        shards = tuple(Shard.open(Path(path)) for path in paths)
        ends = list(accumulate(shard.count for shard in shards))
        if ends[-1] < at_least:
            raise UserError(f"{pattern!r} holds only {ends[-1]} tokens; at least {at_least} are needed")
        return cls(shards, (0, *ends[:-1]), ends[-1], vocab_size)

    def read(self, position: int, count: int) -> Tokens:
        """A copy of the `count` tokens from `position` on: uint16 [count]. Both may exceed an epoch."""
        assert position >= 0 and count >= 0
        if count > self.num_tokens:
            return np.resize(self.read(position, self.num_tokens), count)
        tokens = np.empty(count, dtype=np.uint16)
        done = 0
        while done < count:
            index, offset = self.locate(position + done)
            piece = self.shards[index].read(offset, count - done)
            tokens[done : done + len(piece)] = piece
            done += len(piece)
        return tokens

    def read_checked(self, position: int, count: int) -> Tokens:
        """`read`, and a UserError if there is a token outside the vocabulary among them."""
        tokens = self.read(position, count)
        self.check_tokens(tokens, position)
        return tokens

    def locate(self, position: int) -> tuple[int, int]:
        """The index of the shard that holds the token at `position`, and the token's offset in it."""
        within = position % self.num_tokens
        index = bisect.bisect_right(self.starts, within) - 1
        return index, within - self.starts[index]

    def check_tokens(self, tokens: Tokens, position: int) -> None:
        """A UserError naming file and offset if a token, read from `position`, is outside the vocabulary."""
        if len(tokens) and int(tokens.max()) >= self.vocab_size:
            first = int(np.argmax(tokens >= self.vocab_size))
            index, offset = self.locate(position + first)
            raise UserError(
                f"{self.shards[index].path}: token {int(tokens[first])} at offset {offset} is outside the"
                f" vocabulary of {self.vocab_size}; the shard is damaged or made for another tokenizer"
            )

    def identity(self) -> dict[str, Any]:
        """What a checkpoint remembers of the data: {tokens, shards: [{name, bytes, tokens, hash}]}.

        Plain values. Names have no folders, so that data may move. The hash is a sample: `Shard.fingerprint`.
        """
        shards = [
            {
                "name": shard.path.name,
                "bytes": shard.size,
                "tokens": shard.count,
                "hash": shard.fingerprint(),
            }
            for shard in self.shards
        ]
        return {"tokens": self.num_tokens, "shards": shards}


def _way_to_get(pattern: str) -> str:
    if "fineweb10B" in Path(pattern).parts:
        return "get them with: python -m unbroken data fineweb"
    return "check the path, or make shards from text files with: python -m unbroken data text"


def compare_identity(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line for each difference between the data of a checkpoint (untrusted values) and that of today."""
    before, after = _by_name(saved), _by_name(now)
    if before is None or after is None:
        return ["the checkpoint's record of its data cannot be read"]
    kept = [key for key in before if key in after]
    lines = [f"shard {key[0]!r} is gone ({before[key]['tokens']} tokens)" for key in before if key not in after]
    lines += [f"shard {key[0]!r} is new ({after[key]['tokens']} tokens)" for key in after if key not in before]
    for key in kept:
        lines += _compare_shard(key[0], before[key], after[key])
    if kept != [key for key in after if key in before]:
        lines.append("the shards come in another order")
    return lines


def _compare_shard(name: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    for what in ("tokens", "bytes"):
        if before[what] != after[what]:
            return [f"shard {name!r} has {after[what]} {what}, it had {before[what]}"]
    return [] if before["hash"] == after["hash"] else [f"shard {name!r} has other content (same size)"]


def _by_name(identity: Mapping[str, Any]) -> dict[tuple[str, int], Mapping[str, Any]] | None:
    """The shards of an identity by (name, how many of that name came before), in order; None if malformed."""
    kinds = {"name": str, "bytes": int, "tokens": int, "hash": str}
    shards = identity.get("shards")
    found: dict[tuple[str, int], Mapping[str, Any]] = {}
    seen: dict[str, int] = {}
    for shard in shards if isinstance(shards, list) else [None]:
        if not isinstance(shard, dict) or any(type(shard.get(key)) is not kind for key, kind in kinds.items()):
            return None
        name = shard["name"]
        found[name, seen.get(name, 0)] = shard
        seen[name] = seen.get(name, 0) + 1
    return found


def batch_hash(stream: Stream, position: int, count: int) -> str:
    """sha256 of the `count` tokens from `position`: by that of its next batch a resume proves itself."""
    return hashlib.sha256(stream.read(position, count).astype(TOKEN, copy=False).tobytes()).hexdigest()


def batch(stream: Stream, position: int, batch_size: int, sequence_length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets, int64 [batch_size, sequence_length]; sequence i starts i*sequence_length on."""
    import torch

    count = batch_size * sequence_length
    tokens = torch.from_numpy(stream.read_checked(position, count + 1).astype(np.int64))
    return tokens[:-1].view(batch_size, sequence_length), tokens[1:].clone().view(batch_size, sequence_length)


def to_device(part: torch.Tensor, device: torch.device) -> torch.Tensor:
    """On its way; for a GPU from pinned memory: from other memory the host would wait for all the GPU has to do."""
    return part.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else part


@dataclass(frozen=True)
class Share:
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


class Feed:
    """The batches of this process, step after step, on its device; for a GPU the next are read meanwhile.

    `position` is that of the next batch to be trained, whatever has been read ahead: a checkpoint stores it.
    """

    def __init__(
        self,
        stream: Stream,
        position: int,
        share: Share,
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

    def reseat(self, position: int, share: Share | None = None) -> None:
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

    def _read(self, position: int, share: Share) -> torch.Tensor:
        """int32 [tokens of this process + 1], in pinned memory for a GPU."""
        import torch

        count = (share.hi - share.lo) * share.microbatch_tokens
        tokens = self.stream.read_checked(position + share.lo * share.microbatch_tokens, count + 1)
        host = torch.empty(count + 1, dtype=torch.int32, pin_memory=self.device.type == "cuda")
        host.numpy()[:] = tokens
        return host


@dataclass(frozen=True)
class Validation:
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


def val_batches(stream: Stream, val_tokens: int, batch_size: int, sequence_length: int) -> Validation:
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
    return Validation(sequences, batch_size, sequence_length, notice if available < val_tokens else "")


def val_batch(stream: Stream, plan: Validation, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets, int64 [batch_size, sequence_length], of validation batch `index`.

    The last one is filled up with targets IGNORED (-1), which no loss counts, so that shapes never change.
    """
    import torch

    first = index * plan.batch_size
    whole = min(plan.batch_size, plan.num_sequences - first)
    assert whole > 0
    inputs = torch.zeros(plan.batch_size, plan.sequence_length, dtype=torch.int64)
    targets = torch.full_like(inputs, IGNORED)
    inputs[:whole], targets[:whole] = batch(stream, first * plan.sequence_length, whole, plan.sequence_length)
    return inputs, targets
