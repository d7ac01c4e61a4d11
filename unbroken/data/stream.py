"""Shards -> batches. All shards are one endless cyclic stream; a position is an integer, the tokens consumed.

A batch is a pure function of files and position: nothing else decides it, so nothing else has to be saved.
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
from typing import TYPE_CHECKING, Any

import numpy as np

from unbroken.data.shards import TOKEN, Shard, Tokens
from unbroken.errors import UserError

# torch takes a second to import, and whoever only looks at shards does not need it
if TYPE_CHECKING:
    pass


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
