"""Mixture: several streams as one, in windows that take turns by weight; a position is still one integer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from unbroken.data import left_out, sources
from unbroken.data.shards import TOKEN, Shard, Tokens
from unbroken.data.sources import Integers, Mix
from unbroken.data.stream import Shuffle, Stream, continue_stream
from unbroken.errors import UserError


@dataclass(frozen=True, eq=False)
class Mixture:
    """A stream of several sources in turns: the index of a window and `mix` alone decide which source fills it.

    Each source is a stream of its own, with its own epochs. `skipped`: positions that no step is trained on.
    """

    sources: tuple[Stream, ...]
    mix: Mix
    window: int  # tokens
    skipped: left_out.Ranges = ()

    @property
    def shards(self) -> tuple[Shard, ...]:
        """All shards of all sources."""
        return tuple(shard for source in self.sources for shard in source.shards)

    @property
    def num_tokens(self) -> int:
        """The tokens of all sources together."""
        return sum(source.num_tokens for source in self.sources)

    def read(self, position: int, count: int) -> Tokens:
        """Return a copy of the `count` tokens from `position` on."""
        (tokens,) = self._read_in_turns(position, count, 1, lambda source, *where: (source.read(*where),))
        return tokens

    def read_pairs(self, position: int, count: int) -> tuple[Tokens, Tokens]:
        """Return `count` inputs from `position` on, and their targets: the token after each input in its source.

        Raises UserError if a token is outside the vocabulary.
        """
        inputs, targets = self._read_in_turns(position, count, 2, Stream.read_pairs)
        return inputs, targets

    def _read_in_turns(
        self, position: int, count: int, kinds: int, read: Callable[[Stream, int, int], tuple[Tokens, ...]]
    ) -> list[Tokens]:
        """Return `kinds` arrays of `count` tokens, which `read` returns for each source: one piece of its stream."""
        filled = [np.empty(count, dtype=TOKEN) for _ in range(kinds)]
        owners = self.owners(position, count)
        for index, (source, place) in enumerate(zip(self.sources, self.consumed(position), strict=True)):
            own = owners == index
            if number := int(np.count_nonzero(own)):
                for whole, part in zip(filled, read(source, place, number), strict=True):
                    whole[own] = part
        return filled

    def owners(self, position: int, count: int) -> Integers:
        """Return the source of each of the `count` tokens from `position` on."""
        parts = [np.empty(0, dtype=np.int64)]
        for begins, stop, shares in self._phases(position + count):
            start = max(begins, position)
            if start < stop:
                first, last = (start - begins) // self.window, (stop - begins - 1) // self.window
                order, _ = sources.turns(shares)
                turn = first % len(order)
                found = order.take(range(turn, turn + last - first + 1), mode="wrap").repeat(self.window)
                skipped = (start - begins) % self.window
                parts.append(found[skipped : skipped + stop - start])
        return np.concatenate(parts)

    def consumed(self, position: int) -> list[int]:
        """Return the number of tokens before `position` that each source has filled."""
        taken = [0] * len(self.sources)
        for begins, stop, shares in self._phases(position):
            order, counts = sources.turns(shares)
            windows, rest = divmod(stop - begins, self.window)
            periods, window = divmod(windows, len(order))
            for source, share in enumerate(shares):
                taken[source] += (periods * share + int(counts[window, source])) * self.window
            taken[order[window]] += rest
        return taken

    def _phases(self, stop: int) -> list[tuple[int, int, tuple[int, ...]]]:
        """Return (begin, end, shares) of each phase up to a position."""
        edges = [*(phase.begins for phase in self.mix.phases), stop]
        return [
            (begins, min(ends, stop), phase.shares)
            for (begins, ends), phase in zip(pairwise(edges), self.mix.phases, strict=True)
            if begins < stop
        ]

    def next_start(self, position: int, count: int) -> int:
        """Return where a step of `count` tokens begins, if the steps before have reached `position`."""
        return left_out.next_start(self.skipped, position, count)

    def locate(self, position: int) -> tuple[Shard, int]:
        """Return the shard that holds the token at `position`, and the offset of the token in it."""
        source = int(self.owners(position, 1)[0])
        return self.sources[source].locate(self.consumed(position)[source])

    def epoch(self, position: int) -> int:
        """Return `position` divided by the tokens of all sources together, rounded down."""
        return position // self.num_tokens

    def identity(self) -> dict[str, Any]:
        """Return a checkpoint's record of the data, as `Stream.identity`: shards of later sources have `source`."""
        records = [source.identity() for source in self.sources]
        shards = [
            {**shard, **({"source": index} if index else {})}
            for index, record in enumerate(records)
            for shard in record["shards"]
        ]
        names = {record["tokenizer"] for record in records}
        tokenizer = names.pop() if len(names) == 1 else ""
        return {"tokens": self.num_tokens, "tokenizer": tokenizer, "shards": shards}


TokenStream = Stream | Mixture


def open_tokens(text: str, *, vocab_size: int | None = None, seed: int | None = None, window: int = 0) -> TokenStream:
    """Open the shards that --input_bin names: one glob, or sources with weights. Raises UserError.

    Args:
        text: the flag.
        vocab_size: None: any token is accepted.
        seed: of the order of windows; None: that of the shards.
        window: tokens of a window, for a seed or several sources.
    """

    def opened(glob: str, source: int) -> Stream:
        shuffle = None if seed is None else Shuffle(seed, window, source)
        return replace(Stream.open(glob, vocab_size=vocab_size), shuffle=shuffle)

    mix = sources.parse(text)
    if mix is None:
        return opened(text, 0)
    if any(phase.begins % max(window, 1) for phase in mix.phases):
        raise UserError(
            f"--input_bin {text}: weights can change only where a window begins, at a multiple of {window} tokens"
        )
    return Mixture(tuple(opened(glob, index) for index, glob in enumerate(mix.globs)), mix, window)


def batch_hash(stream: TokenStream, position: int, count: int) -> str:
    """Return the SHA-256 of the `count` tokens from `position`; every checkpoint holds that of its next batch."""
    return hashlib.sha256(stream.read(position, count).tobytes()).hexdigest()


def sources_of(stream: TokenStream) -> tuple[Stream, ...]:
    """Return the sources of a stream; a single stream is its own source."""
    return stream.sources if isinstance(stream, Mixture) else (stream,)


def continue_tokens(
    stream: TokenStream, saved: Mapping[str, Any], position: int, before: str
) -> tuple[TokenStream, TokenStream, dict[str, int]]:
    """Continue all sources of a run as `continue_stream` does.

    Args:
        stream: the data as they are now, with all shards of the record.
        saved: the checkpoint's record of its data; untrusted.
        position: that of the checkpoint.
        before: its --input_bin.

    Returns:
        The stream of this attempt, the stream as the checkpoint knew it, and for each new shard the position of its
        source at which it joins. Raises UserError for a record that makes no sense.
    """
    if isinstance(stream, Stream):
        continued, new = continue_stream(stream, saved, position)
        known = continued.before if new and continued.before else continued
        return continued, known, dict.fromkeys(new, continued.begins)
    mix = sources.parse(before) or Mix.of_one(before)
    if len(mix.globs) > len(stream.sources):
        raise UserError("the checkpoint's record of its data cannot be read")
    past = replace(stream, mix=Mix(stream.mix.globs, mix.for_sources(len(stream.sources))))
    now, then, joins = list[Stream](), list[Stream](), dict[str, int]()
    for index, (source, place) in enumerate(zip(stream.sources, past.consumed(position), strict=True)):
        shards = [shard for shard in saved["shards"] if shard.get("source", 0) == index]
        both = continue_tokens(source, {"shards": shards}, place, "") if shards else (source, source, {})
        now, then, joins = [*now, *sources_of(both[0])], [*then, *sources_of(both[1])], joins | both[2]
    return replace(stream, sources=tuple(now)), replace(past, sources=tuple(then)), joins
