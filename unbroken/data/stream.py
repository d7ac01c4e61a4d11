"""Stream: all shards as one endless cyclic sequence of tokens. A position is an integer, the number of tokens consumed.

A batch is a pure function of the shards and a position: nothing else needs to be saved to continue with the next one.
"""

from __future__ import annotations

import bisect
import glob
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from unbroken.data.shards import TOKEN, Shard, Tokens
from unbroken.errors import UserError


@dataclass(frozen=True, eq=False)
class Stream:
    """The shards in sorted order, repeated endlessly; shard i begins at position `starts[i]` of an epoch."""

    shards: tuple[Shard, ...]
    starts: tuple[int, ...]
    num_tokens: int  # of an epoch
    vocab_size: int | None  # None: any token is accepted

    @classmethod
    def open(cls, pattern: str, *, vocab_size: int | None = None, at_least: int = 2) -> Stream:
        """Open every shard that matches the glob. Only headers are read, which takes no longer for large shards.

        Raises UserError if no shard matches, a shard is damaged, or there are fewer than `at_least` tokens.
        """
        paths = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))
        if not paths:
            raise UserError(f"no token shards match {pattern!r}; {_way_to_get(pattern)}")
        shards = tuple(Shard.open(Path(path)) for path in paths)
        ends = list(accumulate(shard.count for shard in shards))
        if ends[-1] < at_least:
            raise UserError(f"{pattern!r} holds only {ends[-1]} tokens; at least {at_least} are needed")
        return cls(shards, (0, *ends[:-1]), ends[-1], vocab_size)

    @property
    def tokenizer(self) -> str:
        """Return the name of the tokenizer that all shards were made with; "" if they differ or do not say."""
        names = {shard.tokenizer for shard in self.shards}
        return names.pop() if len(names) == 1 else ""

    def read(self, position: int, count: int) -> Tokens:
        """Return a copy of the `count` tokens from `position` on. Both numbers may exceed an epoch."""
        assert position >= 0 and count >= 0
        if count > self.num_tokens:
            return np.resize(self.read(position, self.num_tokens), count)
        tokens = np.empty(count, dtype=TOKEN)
        done = 0
        while done < count:
            index, offset = self.locate(position + done)
            piece = self.shards[index].read(offset, count - done)
            tokens[done : done + len(piece)] = piece
            done += len(piece)
        return tokens

    def read_checked(self, position: int, count: int) -> Tokens:
        """Return the same as `read`. Raises UserError if a token is outside the vocabulary."""
        tokens = self.read(position, count)
        self.check_tokens(tokens, position)
        return tokens

    def locate(self, position: int) -> tuple[int, int]:
        """Return the index of the shard that holds the token at `position`, and the offset of the token in it."""
        within = position % self.num_tokens
        index = bisect.bisect_right(self.starts, within) - 1
        return index, within - self.starts[index]

    def check_tokens(self, tokens: Tokens, position: int) -> None:
        """Raise UserError with file and offset if a token, read from `position` on, is outside the vocabulary."""
        if self.vocab_size is not None and len(tokens) and int(tokens.max()) >= self.vocab_size:
            first = int(np.argmax(tokens >= self.vocab_size))
            index, offset = self.locate(position + first)
            raise UserError(
                f"{self.shards[index].path}: token {int(tokens[first])} at offset {offset} is outside the"
                f" vocabulary of {self.vocab_size}; the shard is damaged or made for another tokenizer"
            )

    def identity(self) -> dict[str, Any]:
        """Return a checkpoint's record of the data: {tokens, tokenizer, shards: [{name, bytes, tokens, hash}]}.

        Names have no folders, so that the data can be moved. The hash is `Shard.fingerprint`.
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
        return {"tokens": self.num_tokens, "tokenizer": self.tokenizer, "shards": shards}


def _way_to_get(pattern: str) -> str:
    if "fineweb10B" in Path(pattern).parts:
        return "get them with: python -m unbroken data fineweb"
    return "check the path, or make shards from text files with: python -m unbroken data text"


def compare_identity(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return a line for each difference between the shards of a checkpoint (untrusted) and those that are here now.

    The tokenizer is not compared: older checkpoints do not name it, and tokens decide whether the data are the same.
    """
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
    """Return the shards of a record by (name, number of earlier shards of that name), in order; None if malformed."""
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
    """Return the SHA-256 of the `count` tokens from `position`; that of its next batch is in every checkpoint."""
    return hashlib.sha256(stream.read(position, count).tobytes()).hexdigest()
