"""Sources take turns in windows: their shares are exact at every window, and a position says it all."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from itertools import count as counting
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.counting import make_counting
from tests.data.test_stream import EXAMPLES
from unbroken.data import sources
from unbroken.data.mixture import Mixture, continue_tokens, open_tokens
from unbroken.data.sources import PERIOD, Mix, continue_mix, parse, shares_of, turns
from unbroken.errors import UserError

WEIGHTS = st.lists(st.integers(0, 20), min_size=1, max_size=4).filter(any)


def opened(folder: Path, text: str, seed: int | None, window: int) -> Mixture:
    stream = open_tokens(sources.map_globs(text, lambda name: f"{folder}/{name}/part_*.bin"), seed=seed, window=window)
    assert isinstance(stream, Mixture)
    return stream


def in_turns(mixture: Mixture) -> Iterator[tuple[int, int]]:
    """(source, place in it) of every token, by counting."""
    taken, phases = [0] * len(mixture.sources), mixture.mix.phases
    for window in counting():
        begins, shares = [(p.begins, p.shares) for p in phases if p.begins <= window * mixture.window][-1]
        order, _ = turns(shares)
        source = int(order[(window - begins // mixture.window) % len(order)])
        for _ in range(mixture.window):
            yield source, taken[source]
            taken[source] += 1


@given(weights=st.lists(st.integers(0, 3000), min_size=1, max_size=8).filter(any))
def test_shares_are_within_one_window_of_exact(weights: list[int]) -> None:
    shares = shares_of(tuple(map(Fraction, weights)))
    if not shares:  # a weight below 1 / PERIOD
        return
    order, counts = turns(shares)
    assert len(order) == sum(shares) <= PERIOD
    assert (
        max(abs(Fraction(w, sum(weights)) - Fraction(s, sum(shares))) for w, s in zip(weights, shares, strict=True))
        < 1 / PERIOD
    )
    exact = np.outer(np.arange(len(counts)), shares)
    assert np.abs(counts * sum(shares) - exact).max() < sum(shares)
    assert [int((order == source).sum()) for source in range(len(shares))] == list(shares)


def test_the_turns_are_frozen() -> None:
    """Runs that are under way depend on them."""
    assert turns(shares_of((Fraction("0.7"), Fraction("0.3"))))[0].tolist() == [0, 0, 1, 0, 0, 1, 0, 0, 0, 1]
    assert turns((3, 2, 2))[0].tolist() == [0, 1, 2, 0, 0, 1, 2]


@EXAMPLES
@given(
    weights=st.tuples(WEIGHTS, WEIGHTS),
    window=st.integers(1, 7),
    later=st.integers(0, 12),
    seed=st.sampled_from([None, 7]),
    cuts=st.lists(st.integers(0, 250), max_size=4),
)
def test_a_mixture_is_its_sources_in_turns(
    tmp_path: Path, weights: tuple[list[int], list[int]], window: int, later: int, seed: int | None, cuts: list[int]
) -> None:
    """However it is cut, over epochs and over a change of the weights."""
    first, then = weights
    number = min(len(first), len(then))
    first, then = [*first[: number - 1], 1], [*then[: number - 1], 2]
    folder, at = Path(tempfile.mkdtemp(dir=tmp_path)), later * window
    for source in range(number):
        make_counting(folder / str(source), [17 + source, 9])
    change = [f";{weight}@{at}" if at else "" for weight in then]
    mixture = opened(folder, ",".join(f"{i}={first[i]}{change[i]}" for i in range(number)), seed, window)
    expected = list(islice(in_turns(mixture), 250))
    streams = [source.read_pairs(0, 250) for source in mixture.sources]
    inputs, targets = ([int(streams[s][kind][place]) for s, place in expected] for kind in (0, 1))
    edges = [0, *sorted(cuts), 250]
    parts = [mixture.read_pairs(start, stop - start) for start, stop in pairwise(edges)]
    assert [token for part, _ in parts for token in part.tolist()] == inputs
    assert [token for _, part in parts for token in part.tolist()] == targets
    for cut in cuts:
        assert mixture.consumed(cut) == [sum(s == source for s, _ in expected[:cut]) for source in range(number)]
        assert mixture.read(cut, 250 - cut).tolist() == inputs[cut:]
        if cut < 250:
            shard, offset = mixture.locate(cut)
            assert int(shard.path.parent.name) == expected[cut][0]
            token = np.fromfile(shard.path, dtype="<u2", offset=1024)[offset]
            assert int(token) == inputs[cut]


def test_a_position_far_away(tmp_path: Path) -> None:
    for name in "ab":
        make_counting(tmp_path / name, [50])
    mixture = opened(tmp_path, "a=0.7,b=0.3", 7, 4)
    far = 10 * 4 * 10**20
    assert mixture.consumed(far + 40) == [far * 7 // 10 + 28, far * 3 // 10 + 12]
    assert len(mixture.read(far + 3, 100)) == 100


def test_texts() -> None:
    text = "a/*.bin=0.7;0.5@4096,b=x/*.bin=0.3;0.5@4096;0.1@8192"
    mix = parse(text)
    assert mix and str(mix) == text and parse(str(mix)) == mix
    assert mix.globs == ("a/*.bin", "b=x/*.bin")
    assert [(phase.begins, phase.shares) for phase in mix.phases] == [(0, (7, 3)), (4096, (1, 1)), (8192, (5, 1))]
    assert [parse(name) for name in ("", "a/*.bin", "a,b.bin", "seed=7/a.bin")] == [None] * 4
    assert (
        sources.map_globs("a=1,b=2", "x/{}".format) == "x/a=1,x/b=2" and sources.map_globs("a", "x/{}".format) == "x/a"
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a=1,b", "in a list write . for a comma in a name"),
        ("a=1,", "a list of sources is GLOB=WEIGHT"),
        (",".join(["a=1"] * 65), "of at most 64"),
        ("a=0,b=0", "at least one weight must be above 0"),
        ("a=1,b=0.00001", "at least 1/10,000 of their sum"),
        ("a=1;0@64,b=1;0@64", "at least one weight must be above 0"),
        ("a=1;2@64;3@64,b=1", "a has two weights from the same position on"),
    ],
)
def test_texts_that_are_refused(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse(text)


@pytest.mark.parametrize(
    ("typed", "before", "result", "changes"),
    [
        ("a=7,b=3", "a=0.7,b=0.3", "a=0.7,b=0.3", None),
        ("a=1,b=1", "a=0.7,b=0.3", "a=0.7;1@128,b=0.3;1@128", 128),
        ("a=1,b=1", "a=0.7;0.6@64,b=0.3", "a=0.7;0.6@64;1@128,b=0.3;1@128", 128),
        ("a=0.7,b=0.3", "a=0.7;0.6@192,b=0.3", "a=0.7,b=0.3", 192),
        ("a=0.7;0.6@192,b=0.3", "a=0.7;0.6@192,b=0.3", "a=0.7;0.6@192,b=0.3", None),
        ("a=0.7;0.6@192,b=0.3", "a=0.7,b=0.3", "a=0.7;0.6@192,b=0.3", 192),
        ("a=1,b=1", "a", "a=1,b=0;1@128", 128),
        ("a=1,b=1,c=0", "a=1,b=1", "a=1,b=1,c=0", None),
    ],
)
def test_weights_at_a_resume(typed: str, before: str, result: str, changes: int | None) -> None:
    """At position 100, in windows of 64 tokens: other weights hold from the next window on."""
    given, past = parse(typed), parse(before) or Mix.of_one(before)
    assert given
    mix, at = continue_mix(given, past, 100, 64)
    assert (str(mix), at) == (result, changes)


def test_a_typed_past_must_be_that_of_the_run() -> None:
    given, past = parse("a=1;2@64,b=1"), parse("a=1,b=1")
    assert given and past
    with pytest.raises(
        UserError, match="up to position 128 the run has read with other weights, a=1,b=1; type weights"
    ):
        continue_mix(given, past, 100, 64)


def test_weights_change_at_windows(tmp_path: Path) -> None:
    make_counting(tmp_path / "a", [50])
    with pytest.raises(UserError, match="weights can change only where a window begins, at a multiple of 4 tokens"):
        opened(tmp_path, "a=1;2@6", None, 4)


def test_shards_join_their_source_at_the_end_of_its_epoch(tmp_path: Path) -> None:
    for name in "ab":
        make_counting(tmp_path / name, [40])
    text = "a=3,b=1"
    old = opened(tmp_path, text, 7, 4)
    make_counting(tmp_path / "b", [40, 24])
    new = opened(tmp_path, text, 7, 4)
    stream, known, joins = continue_tokens(new, old.identity(), 60, text)
    assert joins == {"part_000001.bin": 40} and known.read(0, 500).tolist() == old.read(0, 500).tolist()
    assert isinstance(stream, Mixture) and stream.sources[1].begins == 40 and stream.sources[0].begins == 0
    assert stream.read(0, 160).tolist() == old.read(0, 160).tolist()
    owners, tokens = stream.owners(160, 256), stream.read(160, 256)
    assert sorted(tokens[owners == 1].tolist()) == list(range(64))
    again, _, joins = continue_tokens(new, stream.identity(), 300, text)
    assert (
        not joins
        and again.identity() == stream.identity()
        and again.read(9, 700).tolist() == stream.read(9, 700).tolist()
    )


def test_a_source_is_added_to_a_run_of_one_glob(tmp_path: Path) -> None:
    for name, size in (("a", 40), ("b", 24)):
        make_counting(tmp_path / name, [size])
    old = open_tokens(f"{tmp_path}/a/*.bin", seed=7, window=4)
    mixture = opened(tmp_path, "a=1;2@16,b=0;1@16", 7, 4)
    stream, known, joins = continue_tokens(mixture, old.identity(), 14, f"{tmp_path}/a/*.bin")
    assert not joins and known.read(0, 100).tolist() == old.read(0, 100).tolist()
    assert stream.read(0, 16).tolist() == old.read(0, 16).tolist()
    owners, tokens = stream.owners(0, 88), stream.read(0, 88)
    assert tokens[owners == 0].tolist() == old.read(0, 64).tolist() and sorted(tokens[owners == 1].tolist()) == list(
        range(24)
    )


def test_a_record_with_more_sources_is_refused(tmp_path: Path) -> None:
    make_counting(tmp_path / "a", [40])
    stream = opened(tmp_path, "a=1", None, 4)
    with pytest.raises(UserError, match="record of its data cannot be read"):
        continue_tokens(stream, stream.identity(), 4, "a=1,b=1")


def test_a_shard_of_another_source_is_another_shard(tmp_path: Path) -> None:
    from unbroken.data.stream import compare_identity

    for name in "ab":
        make_counting(tmp_path / name, [40])
    one, other = opened(tmp_path, "a=1,b=1", None, 4).identity(), opened(tmp_path, "a=1,b=1", None, 4).identity()
    records: list[dict[str, Any]] = one["shards"]
    assert [shard.get("source", 0) for shard in records] == [0, 1]
    other["shards"] = [{name: value for name, value in shard.items() if name != "source"} for shard in records]
    assert compare_identity(one, other) == ["shard 'part_000000.bin' is of another source"]
    assert replace(opened(tmp_path, "a=1,b=1", None, 4), window=8).identity() == one
