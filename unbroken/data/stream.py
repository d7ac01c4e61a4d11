"""Stream: all shards as one endless cyclic sequence of tokens. A position is an integer, the number of tokens consumed.

A batch is a pure function of the shards and a position: nothing else needs to be saved to continue with the next one.
Without --shuffle, position p is place p of the repeated shards; with it, each epoch has the windows in another order.
"""

from __future__ import annotations

import bisect
import glob
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from unbroken.data import left_out
from unbroken.data.permutation import permute
from unbroken.data.shards import TOKEN, Shard, Tokens
from unbroken.errors import UserError
from unbroken.text import format_count

MAX_READ = 1 << 28  # tokens; read(2) returns less than 2 GiB at once
MAX_JOINS = 500  # times at which shards were added to a run


@dataclass(frozen=True)
class Shuffle:
    """An order of the windows of `window` tokens within each epoch, given by `seed`; each source has its own."""

    seed: int
    window: int
    source: int = 0

    def spans(self, within: int, count: int, num_tokens: int, epoch: int) -> list[tuple[int, int]]:
        """Return (start, length) of the pieces of an epoch that are read, in order.

        The tokens after the last whole window come at the end of the epoch.

        Args:
            within: The position within the epoch from which on tokens are read.
            count: Number of tokens that are read.
            num_tokens: Number of tokens of the epoch.
            epoch: Number of epochs before this one.
        """
        whole, first, skipped = num_tokens // self.window, within // self.window, within % self.window
        stop = -(-(within + count) // self.window)
        order = permute(range(first, min(stop, whole)), whole, self.seed, self.source, epoch).tolist()
        found = list[tuple[int, int]]()
        for window in [*order, *range(whole, stop)]:
            length = min(self.window - skipped, count)
            found.append((window * self.window + skipped, length))
            skipped, count = 0, count - length
        return found


@dataclass(frozen=True, eq=False)
class Stream:
    """The shards in sorted order, repeated endlessly from position `begins`; shard i begins at `starts[i]` of an epoch.

    `before` is the stream up to `begins`, while it had fewer shards: shards that are added join when an epoch ends.
    `skipped`: positions that no step is trained on. `shuffle`: None for the order of the shards.
    """

    shards: tuple[Shard, ...]
    starts: tuple[int, ...]
    num_tokens: int  # of an epoch
    vocab_size: int | None  # None: any token is accepted
    before: Stream | None = None
    begins: int = 0
    skipped: left_out.Ranges = ()
    shuffle: Shuffle | None = None

    def with_shards(self, shards: Sequence[Shard], before: Stream | None = None, begins: int = 0) -> Stream:
        """Return the stream over other shards from `begins` on."""
        ends = list(accumulate(shard.count for shard in shards))
        starts = (0, *ends[:-1])
        return replace(self, shards=tuple(shards), starts=starts, num_tokens=ends[-1], before=before, begins=begins)

    @classmethod
    def open(
        cls, pattern: str, *, vocab_size: int | None = None, at_least: int = 2, flag: str = "--input_bin"
    ) -> Stream:
        """Open every shard that matches the glob of a flag. Only headers are read: large shards take no longer.

        Raises UserError if no shard matches, a shard is damaged or of a larger vocabulary than `vocab_size`, or there
        are fewer than `at_least` tokens.
        """
        paths = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))
        if not paths:
            _require_readable(pattern)
            raise UserError(f"no token shards match {flag} {pattern!r}; {_way_to_get(pattern)}")
        if folder := next(filter(os.path.isdir, paths), None):
            raise UserError(f"{flag} {pattern!r}: {folder} is a folder; name its shards, such as '{folder}/*.bin'")
        stream = cls((), (), 0, vocab_size).with_shards([Shard.open(Path(path)) for path in paths])
        largest = max(stream.shards, key=lambda shard: shard.vocab_size)
        if vocab_size is not None and largest.vocab_size > vocab_size:
            raise UserError(
                f"{largest.path}: its tokenizer {largest.tokenizer} has a vocabulary of {largest.vocab_size:,} tokens,"
                f" the model one of {vocab_size:,}; use a --model with as many, or a smaller tokenizer"
            )
        if stream.num_tokens < at_least:
            raise UserError(
                f"{pattern!r} holds only {format_count(stream.num_tokens, 'token')}; at least {at_least} are needed"
            )
        return stream

    @property
    def tokenizer(self) -> str:
        """Return the name of the tokenizer that all shards were made with; "" if they differ or do not say."""
        names = {shard.tokenizer for shard in self.shards}
        return names.pop() if len(names) == 1 else ""

    def read(self, position: int, count: int) -> Tokens:
        """Return a copy of the `count` tokens from `position` on. Both numbers may exceed an epoch."""
        return self._read(self.spans(position, count))

    def read_pairs(self, position: int, count: int) -> tuple[Tokens, Tokens]:
        """Return `count` inputs from `position` on, and their targets: the token after each input in the shards.

        Raises UserError if a token is outside the vocabulary.
        """
        spans = [(place, length + 1) for place, length in self.spans(position, count)]
        tokens = self._read(spans)
        self._check(tokens, spans)
        if len(spans) == 1:
            return tokens[:-1], tokens[1:]
        lengths = np.array([length for _, length in spans], dtype=np.int64)
        ends = np.cumsum(lengths)
        return np.delete(tokens, ends - 1), np.delete(tokens, ends - lengths)

    def spans(self, position: int, count: int) -> list[tuple[int, int]]:
        """Return (place, length) of the pieces that are read from `position` on."""
        assert position >= 0 and count >= 0
        if not count:
            return []
        if self.before is not None and position < self.begins:
            first = min(count, self.begins - position)
            return self.before.spans(position, first) + self.spans(self.begins, count - first)
        if self.shuffle is None:
            return [(position, count)]
        within = (position - self.begins) % self.num_tokens
        here = min(count, self.num_tokens - within)
        moved = self.shuffle.spans(within, here, self.num_tokens, self.epoch(position))
        found = [(position - within + start, length) for start, length in moved]
        return found + self.spans(position + here, count - here)

    def _read(self, spans: Sequence[tuple[int, int]]) -> Tokens:
        """Return the tokens of spans, one after the other. Each shard is opened once."""
        tokens = np.empty(sum(length for _, length in spans), dtype=TOKEN)
        pieces, done = dict[Shard, list[tuple[int, Tokens]]](), 0
        for place, length in spans:
            stop = done + length
            while done < stop:
                shard, offset = self._at_place(place + done - stop + length)
                piece = tokens[done : min(stop, done + min(shard.count - offset, MAX_READ))]
                pieces.setdefault(shard, []).append((offset, piece))
                done += len(piece)
        for shard, of_shard in pieces.items():
            shard.read(of_shard)
        return tokens

    def next_start(self, position: int, count: int) -> int:
        """Return where a step of `count` tokens begins, if the steps before have reached `position`."""
        return left_out.next_start(self.skipped, position, count)

    def locate(self, position: int) -> tuple[Shard, int]:
        """Return the shard that holds the token at `position`, and the offset of the token in it."""
        return self._at_place(self.spans(position, 1)[0][0])

    def _at_place(self, place: int) -> tuple[Shard, int]:
        """Return the shard at a place of the repeated shards, and the offset of its token there."""
        if self.before is not None and place < self.begins:
            return self.before._at_place(place)
        within = (place - self.begins) % self.num_tokens
        index = bisect.bisect_right(self.starts, within) - 1
        return self.shards[index], within - self.starts[index]

    def epoch(self, position: int) -> int:
        """Return the number of epochs that have ended before `position`."""
        if self.before is None:
            return position // self.num_tokens
        if position < self.begins:
            return self.before.epoch(position)
        return self.before.epoch(self.begins) + (position - self.begins) // self.num_tokens

    def epoch_end(self, position: int) -> int:
        """Return the first position from `position` on at which an epoch begins."""
        if self.before is not None and position < self.begins:
            return self.before.epoch_end(position)
        return position + (self.begins - position) % self.num_tokens

    def joined_at(self, shard: Shard) -> int:
        """Return the position from which a shard is a part of the stream."""
        return self.before.joined_at(shard) if self.before and shard in self.before.shards else self.begins

    def _check(self, tokens: Tokens, spans: Sequence[tuple[int, int]]) -> None:
        """Raise UserError with file and offset if a token of these spans is outside the vocabulary."""
        if self.vocab_size is not None and len(tokens) and int(tokens.max()) >= self.vocab_size:
            first = within = int(np.argmax(tokens >= self.vocab_size))
            while within >= spans[0][1]:
                within, spans = within - spans[0][1], spans[1:]
            shard, offset = self._at_place(spans[0][0] + within)
            raise UserError(
                f"{shard.path}: token {int(tokens[first])} at offset {offset} is outside the"
                f" vocabulary of {self.vocab_size}; the shard is damaged or made for another tokenizer"
            )

    def identity(self) -> dict[str, Any]:
        """Return a checkpoint's record of the data: {tokens, tokenizer, shards: [{name, bytes, tokens, hash}]}.

        Names have no folders, so that the data can be moved. The hash is `Shard.fingerprint`. A shard that joined later
        has `from`, the position at which it did.
        """
        shards = [
            {
                "name": shard.path.name,
                "bytes": shard.size,
                "tokens": shard.count,
                "hash": shard.fingerprint(),
                **({"from": joined} if (joined := self.joined_at(shard)) else {}),
            }
            for shard in self.shards
        ]
        return {"tokens": self.num_tokens, "tokenizer": self.tokenizer, "shards": shards}


def _require_readable(pattern: str) -> None:
    """Raise UserError if the folder of the shards exists but must not be listed, so that a glob finds nothing."""
    folder = os.path.dirname(os.path.expanduser(pattern)) or "."
    if not glob.has_magic(folder):
        try:
            os.listdir(folder)
            os.stat(os.path.join(folder, "."))
        except PermissionError as error:
            raise UserError(f"cannot look into the folder {folder}: {error.strerror}") from None
        except OSError:
            return


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


def tokens_at_begin(saved: Mapping[str, Any]) -> int:
    """Return the tokens of an epoch when a run began, by its checkpoint's record (untrusted): without later shards."""
    return sum(shard["tokens"] for shard in (_by_name(saved) or {}).values() if not shard.get("from"))


def has_all(saved: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Return whether all shards of a checkpoint's record (untrusted) are here, unchanged; more may be here too."""
    known = _by_name(saved) or {}
    shards = [shard for key, shard in (_by_name(now) or {}).items() if key in known]
    return not compare_identity(saved, {"shards": shards})


def continue_stream(stream: Stream, saved: Mapping[str, Any], position: int) -> tuple[Stream, list[str]]:
    """Return the stream of a run that has reached `position`, and the names of the shards that are new to it.

    `saved` is its checkpoint's record (untrusted), all of whose shards `stream` has (`has_all`), and perhaps more. New
    shards join at the end of the epoch: no token is repeated or skipped. Raises UserError for a record that makes no
    sense.
    """
    here = _by_name({"shards": [{"name": s.path.name, "bytes": 0, "tokens": 0, "hash": ""} for s in stream.shards]})
    shards, known = dict(zip(here or {}, stream.shards, strict=True)), _by_name(saved) or {}
    joins = {shards[key]: record.get("from", 0) for key, record in known.items()}
    sound = all(type(at) is int and 0 <= at < 2**62 for at in joins.values())
    positions = set(joins.values()) if sound else set()
    if 0 not in positions or len(positions) > MAX_JOINS:
        raise UserError("the checkpoint's record of its data cannot be read")

    def joined(before: Stream | None, at: int) -> Stream:
        return stream.with_shards([s for s in stream.shards if joins.get(s, at + 1) <= at], before, at)

    continued: Stream | None = None
    for at in sorted(positions):
        continued = joined(continued, at)
    assert continued is not None
    new = [shard for shard in stream.shards if shard not in joins]
    if new:
        end = continued.epoch_end(position)
        joins |= dict.fromkeys(new, end)
        continued = joined(continued if end else None, end)
    return continued, [shard.path.name for shard in new]


def _compare_shard(name: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    for what in ("tokens", "bytes"):
        if before[what] != after[what]:
            return [f"shard {name!r} has {after[what]} {what}, it had {before[what]}"]
    if before.get("source", 0) != after.get("source", 0):
        return [f"shard {name!r} is of another source"]
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
