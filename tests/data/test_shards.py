"""Each bad file is one clear line, and the identity of the data sees what has changed."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.counting import make_bad, make_counting
from unbroken.data.loader import read_batch
from unbroken.data.shards import HEADER_BYTES, MAGIC, SAMPLE_TOKENS, Tokens, header, write_shards
from unbroken.data.stream import Stream, compare_identity
from unbroken.errors import UserError

# ---- what is wrong with a file


BAD: list[tuple[str, Callable[[Path], Any], str]] = [
    ("empty", lambda path: path.write_bytes(b""), "is an empty file; delete it or make it again"),
    ("text", lambda path: path.write_text("Once upon a time"), "may be raw tokens without a header, or text"),
    (
        "lfs",
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"),
        "run `git lfs pull`",
    ),
    (
        "html",
        lambda path: path.write_text("<!DOCTYPE html>"),
        "it is a web page, perhaps of a failed download",
    ),
    ("zip", lambda path: path.write_bytes(b"PK\x03\x04" + bytes(2000)), "it is a zip, perhaps a checkpoint"),
    ("npy", lambda path: np.save(path.open("wb"), np.arange(9)), r"it is a \.npy array"),
    (
        "llama",
        lambda path: make_bad(path, magic=20240801),
        r"magic 20240801, not 20240520\): it holds Llama 3",
    ),
    (
        "endian",
        lambda path: path.write_bytes(np.full(256, MAGIC, ">i4").tobytes()),
        "byte order is big-endian",
    ),
    ("cut", lambda path: path.write_bytes(header(9)[:100]), r"ends inside its header \(100 of 1024 bytes\)"),
    ("version", lambda path: make_bad(path, version=2), "is a token shard of version 2; only version 1"),
    (
        "more",
        lambda path: make_bad(path, count=4),
        "its header says 4 tokens, its size 3; download or make it again",
    ),
    ("less", lambda path: make_bad(path, count=2), "its header says 2 tokens, its size 3"),
    ("negative", lambda path: make_bad(path, count=-3), "its header says -3 tokens, its size 3"),
    (
        "odd",
        lambda path: path.write_bytes(header(3) + b"1234567"),
        r"its header says 3 tokens, its size 3\.5",
    ),
    ("none", lambda path: make_bad(path, tokens=()), "holds no tokens; delete it or make it again"),
    ("folder", lambda path: path.mkdir(), "is a folder; name its shards, such as"),
    ("broken link", lambda path: path.symlink_to("nowhere"), "cannot read .*: No such file or directory"),
]


@pytest.mark.parametrize(("make_it", "message"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_each_bad_shard_is_one_clear_line(tmp_path: Path, make_it: Callable[[Path], Any], message: str) -> None:
    make_counting(tmp_path, [5])
    make_it(tmp_path / "part_bad.bin")
    with pytest.raises(UserError, match=message) as caught:
        Stream.open(f"{tmp_path}/part_*.bin")
    assert "\n" not in str(caught.value)
    assert "part_bad.bin" in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_shard(tmp_path: Path) -> None:
    make_counting(tmp_path, [5])
    (tmp_path / "part_000000.bin").chmod(0)
    with pytest.raises(UserError, match="cannot read .*: Permission denied"):
        Stream.open(f"{tmp_path}/*.bin")


def test_a_folder_or_an_empty_glob_says_what_to_type(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"{tmp_path} is a folder; name its shards, such as '{tmp_path}/\*\.bin'"):
        Stream.open(str(tmp_path))
    with pytest.raises(UserError, match=r"match --input_bin 'nowhere/\*\.bin'; check the path, or make shards"):
        Stream.open("nowhere/*.bin")
    with pytest.raises(UserError, match="get them with: python -m unbroken data fineweb$"):
        Stream.open("data/fineweb10B/fineweb_nothing_*.bin")


def test_too_few_tokens(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds only 1 token; at least 2 are needed"):
        Stream.open(make_counting(tmp_path, [1]))
    with pytest.raises(UserError, match="holds only 1 token; at least 65 are needed"):
        Stream.open(f"{tmp_path}/*.bin", at_least=65)


def test_a_token_outside_the_vocabulary_is_found_where_it_is(tmp_path: Path) -> None:
    stream = Stream.open(make_counting(tmp_path, [10, 10, 10]), vocab_size=25)
    read_batch(stream, 0, 4, 6)  # tokens 0..24
    with pytest.raises(UserError, match=r"part_000002\.bin: token 25 at offset 5 is outside the vocabulary of 25"):
        read_batch(stream, 1, 4, 6)
    with pytest.raises(UserError, match=r"part_000002\.bin: token 25 at offset 5 "):
        read_batch(stream, 13, 4, 20)  # more than an epoch


# ---- identity


def test_identity_is_plain_and_the_same_wherever_the_data_lies(tmp_path: Path) -> None:
    here, there = (Stream.open(make_counting(tmp_path / name, [5, 7])).identity() for name in ("here", "there"))
    assert here == there and compare_identity(here, there) == []
    assert here["tokens"] == 12
    assert [(shard["name"], shard["bytes"], shard["tokens"]) for shard in here["shards"]] == [
        ("part_000000.bin", HEADER_BYTES + 10, 5),
        ("part_000001.bin", HEADER_BYTES + 14, 7),
    ]


def test_every_difference_is_one_line(tmp_path: Path) -> None:
    saved = Stream.open(make_counting(tmp_path, [5, 7, 9, 4])).identity()
    (tmp_path / "part_000003.bin").unlink()
    make_bad(tmp_path / "part_000000.bin", tokens=[0, 1, 2, 3, 5])
    make_bad(tmp_path / "part_000001.bin", tokens=[1] * 8)
    make_bad(tmp_path / "part_000007.bin")
    assert compare_identity(saved, Stream.open(f"{tmp_path}/*.bin").identity()) == [
        "shard 'part_000003.bin' is gone (4 tokens)",
        "shard 'part_000007.bin' is new (3 tokens)",
        "shard 'part_000000.bin' has other content (same size)",
        "shard 'part_000001.bin' has 8 tokens, it had 7",
    ]


def test_another_order_is_a_difference(tmp_path: Path) -> None:
    saved = Stream.open(make_counting(tmp_path, [5, 7])).identity()
    turned = {**saved, "shards": saved["shards"][::-1]}
    assert compare_identity(saved, turned) == ["the shards come in another order"]


def test_shards_of_one_name_in_several_folders(tmp_path: Path) -> None:
    make_counting(tmp_path / "a", [5])
    make_counting(tmp_path / "b", [7])
    saved = Stream.open(f"{tmp_path}/*/*.bin").identity()
    assert compare_identity(saved, saved) == []
    assert compare_identity(saved, {**saved, "shards": saved["shards"][:1]}) == [
        "shard 'part_000000.bin' is gone (7 tokens)"
    ]


def test_the_fingerprint_sees_both_ends_and_a_shift_of_a_large_shard(tmp_path: Path) -> None:
    tokens = (np.arange(40 * SAMPLE_TOKENS) % 50000).astype("<u2")
    changed = {"same": tokens, "shift": np.roll(tokens, 1), "first": tokens.copy(), "last": tokens.copy()}
    changed["first"][0] += 1
    changed["last"][-1] += 1
    hashes = set()
    for name, content in changed.items():
        path = tmp_path / name
        path.mkdir()
        (path / "x.bin").write_bytes(header(len(content)) + content.tobytes())
        hashes.add(Stream.open(f"{path}/x.bin").identity()["shards"][0]["hash"])
    assert len(hashes) == 4


@pytest.mark.parametrize(
    "damage",
    [
        lambda saved: saved.pop("shards"),
        lambda saved: saved.update(shards="x"),
        lambda saved: saved["shards"].append(None),
        lambda saved: saved["shards"][0].pop("hash"),
        lambda saved: saved["shards"][0].update(tokens=True),
        lambda saved: saved["shards"][0].update(name=3),
    ],
)
def test_a_strangers_identity_is_not_trusted(tmp_path: Path, damage: Callable[[dict[str, Any]], Any]) -> None:
    now = Stream.open(make_counting(tmp_path, [5, 7])).identity()
    saved = copy.deepcopy(now)
    damage(saved)
    assert compare_identity(saved, now) == ["the checkpoint's record of its data cannot be read"]


def test_a_strangers_names_print_no_control_characters(tmp_path: Path) -> None:
    now = Stream.open(make_counting(tmp_path, [5])).identity()
    saved = copy.deepcopy(now)
    saved["shards"][0]["name"] = "\x1b[2Jevil\n"
    assert all(line.isprintable() for line in compare_identity(saved, now))


def test_opening_and_identity_take_no_longer_for_large_shards(tmp_path: Path) -> None:
    for index in range(10):
        path = tmp_path / f"{index}.bin"
        path.write_bytes(header(2_000_000_000))
        os.truncate(path, HEADER_BYTES + 4_000_000_000)  # a hole: no blocks on the disk
    began = time.process_time()
    stream = Stream.open(f"{tmp_path}/*.bin")
    assert len({shard["hash"] for shard in stream.identity()["shards"]}) == 1
    assert stream.read(10**30 + 19_999_999_999, 2).tolist() == [0, 0]
    assert time.process_time() - began < 3  # reading 40 GB would take ten


# ---- writing


def pieces(*sizes: int) -> Iterator[Tokens]:
    """Pieces of these sizes whose tokens count up."""
    first = 0
    for size in sizes:
        yield np.arange(first, first + size, dtype=np.uint16)
        first += size


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(st.integers(0, 30), min_size=1, max_size=6), shard_tokens=st.integers(1, 40))
def test_what_is_written_is_read(tmp_path: Path, sizes: list[int], shard_tokens: int) -> None:
    folder = tmp_path / f"{'-'.join(map(str, sizes))}of{shard_tokens}"
    paths = write_shards({"own": pieces(*sizes)}, folder, shard_tokens=shard_tokens)
    total = sum(sizes)
    assert [path.name for path in paths] == [f"own_{index:06d}.bin" for index in range(-(-total // shard_tokens))]
    assert sorted(folder.iterdir()) == paths
    if total:
        stream = Stream.open(f"{folder}/own_*.bin", at_least=1)
        assert stream.read(0, total).tolist() == list(range(total))
        assert all(shard.count == shard_tokens for shard in stream.shards[:-1])


def test_shards_name_their_tokenizer_and_stay_the_same_data(tmp_path: Path) -> None:
    """The name stands where other readers do not look; data from before names were written are no other data."""
    identities = []
    for name in ("", "bytes"):
        (path,) = write_shards({"own": pieces(50)}, tmp_path / f"of {name}", name)
        assert np.fromfile(path, "<i4", 3).tolist() == [MAGIC, 1, 50]
        assert np.fromfile(path, "<u2", offset=HEADER_BYTES).tolist() == list(range(50))
        identities.append(Stream.open(str(path)).identity())
    assert [each.pop("tokenizer") for each in identities] == ["", "bytes"]
    assert identities[0] == identities[1]
    assert Stream.open(f"{tmp_path}/of */own_*.bin").tokenizer == "", "one of them does not say"


def test_what_others_write_into_the_header_is_a_part_of_the_data(tmp_path: Path) -> None:
    hashes = set()
    for word in (b"", b"tokenizer", b"tokenizer:", b"tokenizer:\x1b[2J", b"tokenizer:" + 60 * b"x"):
        (path,) = write_shards({"own": pieces(50)}, tmp_path)
        content = bytearray(path.read_bytes())
        content[512 : 512 + len(word)] = word
        path.write_bytes(content)
        (shard,) = Stream.open(str(path)).shards
        assert shard.tokenizer == ""
        hashes.add(shard.fingerprint())
    assert len(hashes) == 5


def test_an_error_on_the_way_leaves_nothing(tmp_path: Path) -> None:
    def failing() -> Iterator[Tokens]:
        yield from pieces(10, 10)
        assert list(tmp_path.glob(".own_*.tmp"))  # two whole shards are already there, under other names
        assert not list(tmp_path.glob("own_*.bin"))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards({"own": failing()}, tmp_path, shard_tokens=10)
    assert list(tmp_path.iterdir()) == []


def test_the_debris_of_a_killed_writer_is_cleared_and_a_living_ones_is_not(tmp_path: Path) -> None:
    old, young = (tmp_path / f".own_000000.bin.{name}.tmp" for name in ("old", "young"))
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    write_shards({"own": pieces(3)}, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [young.name, "own_000000.bin"]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write shards to .*file/below: Not a directory"):
        write_shards({"own": pieces(3)}, tmp_path / "file/below")
