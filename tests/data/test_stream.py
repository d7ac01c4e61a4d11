"""The stream of tokens: every token once an epoch, in order, however a step is cut."""

from __future__ import annotations

import functools
import os
import tempfile
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import fake_gpu
from tests.counting import make_bad, make_counting
from unbroken.data.loader import (
    IGNORED,
    BatchesInFlight,
    BatchLoader,
    RankShare,
    plan_validation,
    read_batch,
    val_batch,
)
from unbroken.data.mixture import batch_hash
from unbroken.data.permutation import permute
from unbroken.data.stream import Shuffle, Stream, continue_stream
from unbroken.errors import UserError

CPU = torch.device("cpu")
SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=5)
# hypothesis runs a test's examples in one tmp_path; every example writes a folder of its own there.
EXAMPLES = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def stream_of(tmp_path: Path, sizes: Sequence[int]) -> Stream:
    """The stream over shards of these sizes, at least two tokens."""
    folder = tmp_path / "-".join(map(str, sizes))
    return Stream.open(make_counting(folder, sizes), at_least=1)


def flat(steps: list[list[tuple[torch.Tensor, torch.Tensor]]], what: int) -> list[int]:
    return [int(token) for step in steps for pair in step for token in pair[what].flatten()]


# ---- the endless stream


@EXAMPLES
@given(sizes=SIZES, position=st.integers(0, 500), count=st.integers(0, 300))
def test_reading_is_the_endless_repetition_of_all_shards(
    tmp_path: Path, sizes: list[int], position: int, count: int
) -> None:
    stream = stream_of(tmp_path, sizes)
    total = sum(sizes)
    assert stream.num_tokens == total
    assert stream.read(position, count).tolist() == [at % total for at in range(position, position + count)]


@EXAMPLES
@given(sizes=SIZES, more=SIZES, position=st.integers(1, 200), count=st.integers(0, 300))
def test_shards_that_are_added_join_at_the_end_of_the_epoch(
    tmp_path: Path, sizes: list[int], more: list[int], position: int, count: int
) -> None:
    """No token is repeated or skipped, whenever the reading is cut and continued from its own record."""
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    old = Stream.open(make_counting(folder, sizes), at_least=1)
    pattern, total, whole = make_counting(folder, [*sizes, *more]), sum(sizes), sum(sizes) + sum(more)
    stream, new = continue_stream(Stream.open(pattern, at_least=1), old.identity(), position)
    end = -(-position // total) * total
    assert len(new) == len(more) and stream.begins == end and stream.epoch(end + whole) == end // total + 1
    expected = [at % total if at < end else (at - end) % whole for at in range(position, position + count)]
    assert stream.read(position, count).tolist() == expected
    again, new = continue_stream(Stream.open(pattern, at_least=1), stream.identity(), position + count)
    assert new == [] and again.identity() == stream.identity()
    assert again.read(position, count).tolist() == expected


@pytest.mark.parametrize("joined", [-1, 1.5, "x", [2**2000], 2**70, 7])
def test_a_senseless_record_of_when_a_shard_joined_is_refused(tmp_path: Path, joined: object) -> None:
    stream = stream_of(tmp_path, [30])
    saved = stream.identity()
    saved["shards"][0]["from"] = joined
    with pytest.raises(UserError, match="record of its data cannot be read"):
        continue_stream(stream, saved, 5)


def test_a_file_that_is_replaced_meanwhile_is_noticed(tmp_path: Path) -> None:
    """At the next read, though its size is the same; one that was only touched is not."""
    stream = stream_of(tmp_path, [30])
    (shard,) = stream.shards
    stream.identity()
    content = shard.path.read_bytes()
    os.utime(shard.path, (1, 1))
    assert stream.read(0, 30).tolist() == list(range(30))
    (tmp_path / "new").write_bytes(content[:-2] + b"\x07\x00")
    os.replace(tmp_path / "new", shard.path)
    with pytest.raises(UserError, match="changed while it was in use: it has other content"):
        stream.read(0, 10)


def test_positions_beyond_64_bits(tmp_path: Path) -> None:
    stream = stream_of(tmp_path, [3, 4])
    far = 7 * 10**30
    assert stream.read(far + 2, 4).tolist() == [2, 3, 4, 5]


def test_shards_come_in_sorted_order_whatever_their_age(tmp_path: Path) -> None:
    make_counting(tmp_path, [5, 5, 5])
    os.utime(tmp_path / "part_000000.bin")
    (tmp_path / "part_000002.bin").rename(tmp_path / "part_00.bin")
    assert Stream.open(f"{tmp_path}/part_*.bin").read(0, 15).tolist() == [*range(10, 15), *range(10)]


def test_a_batch_is_inputs_and_their_next_tokens(tmp_path: Path) -> None:
    inputs, targets = read_batch(stream_of(tmp_path, [7, 6, 20]), 30, 2, 4)
    assert inputs.tolist() == [[30, 31, 32, 0], [1, 2, 3, 4]]
    assert targets.tolist() == [[31, 32, 0, 1], [2, 3, 4, 5]]
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.is_contiguous() and targets.is_contiguous()


def test_a_read_is_a_copy(tmp_path: Path) -> None:
    stream = stream_of(tmp_path, [8])
    stream.read(0, 8)[:] = 9
    assert stream.read(0, 8).tolist() == list(range(8))


def test_batch_hash_tells_the_tokens_and_nothing_else(tmp_path: Path) -> None:
    one, other = stream_of(tmp_path, [30]), stream_of(tmp_path, [11, 12, 7])
    assert batch_hash(one, 5, 40) == batch_hash(other, 5, 40) == batch_hash(one, 35, 40)
    assert batch_hash(one, 5, 40) != batch_hash(one, 6, 40)
    assert batch_hash(one, 5, 40) != batch_hash(one, 5, 39)


# ---- another order in every epoch


@pytest.mark.parametrize("size", [*range(1, 40), 97, 127, 128, 129, 1009, 4096, 65537])
def test_a_permutation_has_every_index_once(size: int) -> None:
    orders = [permute(range(size), size, 7, 0, epoch).tolist() for epoch in range(2)]
    assert all(sorted(order) == list(range(size)) for order in orders)
    assert size < 10 or orders[0] != orders[1]
    assert [int(permute([index], size, 7, 0, 1)[0]) for index in range(min(size, 50))] == orders[1][:50]


def test_all_permutations_come_equally_often() -> None:
    found = Counter(tuple(permute(range(4), 4, 1, 0, epoch).tolist()) for epoch in range(1200))
    assert len(found) == 24 and 20 < min(found.values()) <= max(found.values()) < 90


def test_the_order_is_frozen() -> None:
    """Runs that are under way depend on it."""
    assert permute(range(8), 10**6, 7, 0, 1).tolist() == [
        *(787833, 141179, 59579, 855690, 616279, 604011, 57714, 841853)
    ]


@EXAMPLES
@given(sizes=SIZES, more=SIZES, window=st.integers(1, 50), cuts=st.lists(st.integers(0, 400), max_size=4))
def test_a_shuffled_epoch_has_every_token_once(
    tmp_path: Path, sizes: list[int], more: list[int], window: int, cuts: list[int]
) -> None:
    """With its successor as its target, in windows, the rest of them at the end; also of shards that join later."""
    folder, order = Path(tempfile.mkdtemp(dir=tmp_path)), Shuffle(7, window)
    old = replace(Stream.open(make_counting(folder, sizes), at_least=1), shuffle=order)
    both = Stream.open(make_counting(folder, [*sizes, *more]), at_least=1)
    total, whole = sum(sizes), sum(sizes) + sum(more)
    stream, _ = continue_stream(replace(both, shuffle=order), old.identity(), total + 1)
    inputs, targets = (part.tolist() for part in stream.read_pairs(0, 2 * total + 2 * whole))
    assert inputs == stream.read(0, len(inputs)).tolist()
    assert inputs[: 2 * total] == old.read(0, 2 * total).tolist()
    for begin, size in ((0, total), (total, total), (2 * total, whole), (2 * total + whole, whole)):
        epoch = inputs[begin : begin + size]
        assert sorted(epoch) == list(range(size))
        assert targets[begin : begin + size] == [(token + 1) % size for token in epoch]
        for at in range(0, size - window + 1, window):
            assert epoch[at] % window == 0 and epoch[at : at + window] == list(range(epoch[at], epoch[at] + window))
        assert epoch[size - size % window :] == list(range(size - size % window, size))
    edges = [0, *sorted(min(cut, len(inputs)) for cut in cuts), len(inputs)]
    parts = [stream.read_pairs(start, stop - start) for start, stop in pairwise(edges)]
    assert [token for part, _ in parts for token in part.tolist()] == inputs
    assert [token for _, part in parts for token in part.tolist()] == targets


def test_epochs_sources_and_seeds_have_other_orders(tmp_path: Path) -> None:
    stream = stream_of(tmp_path, [600])
    shuffles = [Shuffle(7, 10), Shuffle(8, 10), Shuffle(7, 10, source=1)]
    orders = [tuple(replace(stream, shuffle=each).read(600 * epoch, 600)) for each in shuffles for epoch in range(3)]
    assert len(set(orders)) == 9


# ---- the same tokens, however a step is cut


@EXAMPLES
@given(
    sizes=SIZES,
    position=st.integers(0, 200),
    size=st.integers(1, 4),
    length=st.integers(1, 6),
    accumulation=st.integers(1, 4),
)
def test_half_the_batch_twice_the_accumulation_is_the_same_tokens(
    tmp_path: Path, sizes: list[int], position: int, size: int, length: int, accumulation: int
) -> None:
    stream = stream_of(tmp_path, sizes)
    whole = RankShare(2 * size, length, accumulation, 0, accumulation)
    halved = RankShare(size, length, 2 * accumulation, 0, 2 * accumulation)
    with BatchLoader(stream, position, whole, CPU) as one, BatchLoader(stream, position, halved, CPU) as other:
        for what in (0, 1):
            assert flat([one.step(), one.step()], what) == flat([other.step(), other.step()], what)
        assert one.position == other.position == position + 4 * whole.step_tokens


@EXAMPLES
@given(sizes=SIZES, position=st.integers(0, 200), cuts=st.lists(st.integers(0, 6), max_size=4))
def test_the_shares_of_all_ranks_are_the_step_of_one(
    tmp_path: Path, sizes: list[int], position: int, cuts: list[int]
) -> None:
    stream = stream_of(tmp_path, sizes)
    edges = [0, *sorted(cuts), 6]
    expected = BatchLoader(stream, position, RankShare(2, 3, 6, 0, 6), CPU).step()
    dealt = []
    for lo, hi in pairwise(edges):
        loader = BatchLoader(stream, position, RankShare(2, 3, 6, lo, hi), CPU)
        dealt += loader.step()
        assert loader.position == position + 36
    assert [[part.tolist() for part in pair] for pair in dealt] == [
        [part.tolist() for part in pair] for pair in expected
    ]


@pytest.mark.parametrize("read_ahead", [False, True])
def test_a_loader_is_the_batches_of_the_stream(tmp_path: Path, read_ahead: bool) -> None:
    stream = stream_of(tmp_path, [17, 5, 40, 1])  # 63 tokens, 24 a step: crosses shards and epochs at odd places
    share = RankShare(2, 4, 3, 1, 3)
    with BatchLoader(stream, 50, share, CPU, read_ahead) as loader:
        for step in range(40):
            assert loader.position == 50 + 24 * step
            pairs = loader.step()
            assert len(pairs) == 2
            for index, pair in enumerate(pairs):
                expected = read_batch(stream, 50 + 24 * step + 8 * (1 + index), 2, 4)
                assert all(
                    torch.equal(*both) and both[0].dtype == torch.int64 for both in zip(pair, expected, strict=True)
                )


@pytest.mark.parametrize("read_ahead", [False, True])
@pytest.mark.parametrize("stop", [1, 2, 7, 19])
def test_a_loader_restarted_anywhere_has_the_same_tail(tmp_path: Path, read_ahead: bool, stop: int) -> None:
    stream = stream_of(tmp_path, [17, 5, 41])
    share = RankShare(2, 5, 2, 0, 2)
    with BatchLoader(stream, 3, share, CPU, read_ahead) as unbroken:
        straight = [unbroken.step() for _ in range(20)]
    with BatchLoader(stream, 3, share, CPU, read_ahead) as before:
        for _ in range(stop):
            before.step()
        saved = before.position
    with BatchLoader(stream, saved, share, CPU, read_ahead) as after:
        tail = [after.step() for _ in range(20 - stop)]
    assert flat(tail, 0) == flat(straight[stop:], 0)
    assert flat(tail, 1) == flat(straight[stop:], 1)


def test_the_twin_a_loader_restarted_elsewhere_has_another_tail(tmp_path: Path) -> None:
    stream = stream_of(tmp_path, [17, 5, 41])
    share = RankShare(2, 5, 2, 0, 2)
    right, wrong = (BatchLoader(stream, at, share, CPU) for at in (23, 24))  # one token skipped
    assert flat([right.step()], 0) != flat([wrong.step()], 0)


@pytest.mark.parametrize("read_ahead", [False, True])
def test_an_epoch_has_every_token_once(tmp_path: Path, read_ahead: bool) -> None:
    stream = stream_of(tmp_path, [13, 30, 5])
    with BatchLoader(stream, 11, RankShare(1, 4, 2, 0, 2), CPU, read_ahead) as loader:
        assert sorted(flat([loader.step() for _ in range(6)], 0)) == list(range(48))


@pytest.mark.parametrize("read_ahead", [False, True])
def test_seek_forgets_what_was_read_ahead(tmp_path: Path, read_ahead: bool) -> None:
    stream = stream_of(tmp_path, [64])
    with BatchLoader(stream, 0, RankShare(2, 4, 1, 0, 1), CPU, read_ahead) as loader:
        loader.step()
        loader.seek(loader.position, RankShare(1, 4, 2, 0, 2))
        assert [pair[0].tolist() for pair in loader.step()] == [[[8, 9, 10, 11]], [[12, 13, 14, 15]]]
        loader.seek(0)
        assert loader.step()[0][0].tolist() == [[0, 1, 2, 3]]
        assert loader.position == 8


@pytest.mark.parametrize("read_ahead", [False, True])
def test_an_error_in_reading_is_raised_by_the_step_it_belongs_to(tmp_path: Path, read_ahead: bool) -> None:
    make_counting(tmp_path, [8, 8, 8])
    make_bad(tmp_path / "part_000001.bin", tokens=[8, 9, 10, 60000, 12, 13, 14, 15])
    stream = Stream.open(f"{tmp_path}/*.bin", vocab_size=50257)
    with BatchLoader(stream, 0, RankShare(1, 4, 1, 0, 1), CPU, read_ahead) as loader:
        loader.step()
        loader.step()
        for _ in range(2):  # it does not go away by asking again
            with pytest.raises(UserError, match=r"part_000001\.bin: token 60000 at offset 3 is outside"):
                loader.step()
            assert loader.position == 8
        loader.seek(12)
        assert loader.step()[0][0].tolist() == [[12, 13, 14, 15]]


def test_a_closed_loader_leaves_no_thread(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    with BatchLoader(stream_of(tmp_path, [64]), 0, RankShare(1, 4, 1, 0, 1), CPU, True) as loader:
        loader.step()
        (own,) = set(threading.enumerate()) - before
    assert not own.is_alive()


# ---- validation


def test_validation_takes_the_first_tokens_once_and_pads_the_last_batch(tmp_path: Path) -> None:
    stream = stream_of(tmp_path, [20, 30])
    plan = plan_validation(stream, 30, 4, 5)
    assert (plan.num_sequences, plan.num_batches, plan.num_tokens, plan.notice) == (6, 2, 30, "")
    batches = [val_batch(stream, plan, index) for index in range(plan.num_batches)]
    assert all(part.shape == (4, 5) and part.dtype == torch.int64 for pair in batches for part in pair)
    counted = [int(token) for _, targets in batches for token in targets.flatten() if token != IGNORED]
    assert counted == list(range(1, 31))
    inputs, targets = batches[1]
    assert torch.equal(targets[:2], inputs[:2] + 1)
    assert (targets[2:] == IGNORED).all()


@EXAMPLES
@given(size=st.integers(3, 60), tokens=st.integers(2, 80), batch_size=st.integers(1, 7), length=st.integers(1, 2))
def test_validation_never_goes_around_the_end(
    tmp_path: Path, size: int, tokens: int, batch_size: int, length: int
) -> None:
    stream = stream_of(tmp_path, [size])
    plan = plan_validation(stream, tokens, batch_size, length)
    seen = [val_batch(stream, plan, index)[1] for index in range(plan.num_batches)]
    counted = [int(token) for targets in seen for token in targets.flatten() if token != IGNORED]
    assert counted == list(range(1, plan.num_tokens + 1))
    assert plan.num_tokens == min(tokens, size - 1) // length * length


def test_a_small_validation_set_is_used_whole_with_a_notice(tmp_path: Path) -> None:
    plan = plan_validation(stream_of(tmp_path, [33]), 1_048_576, 16, 8)
    assert plan.num_sequences == 4
    assert plan.notice == "validation uses its whole set, 33 tokens: fewer than --val_tokens 1048576"


def test_a_validation_set_below_one_sequence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a validation set of 8 tokens is too small for one sequence of 8"):
        plan_validation(stream_of(tmp_path, [8]), 100, 16, 8)
    with pytest.raises(UserError, match="--val_tokens 7 is too small for one sequence of 8"):
        plan_validation(stream_of(tmp_path, [100]), 7, 16, 8)


def test_the_host_is_at_most_one_batch_ahead_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """So a batch of a validation takes as long as on the GPU, and no wait at its end is as long as all of it."""
    fake_gpu.install(monkeypatch)
    in_flight, done = BatchesInFlight(torch.device("cuda")), list[int]()
    for batch in range(8):
        fake_gpu.current().submit(functools.partial(done.append, batch))
        in_flight.issued()
        assert len(done) >= batch
    BatchesInFlight(torch.device("cpu")).issued()
