"""Making shards: the built-in corpus, text files, GPT-2's tokens; without a network."""

from __future__ import annotations

import argparse
import errno
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.harness import GPT2_BPE as BPE
from tests.harness import ROOT
from unbroken.commands import data
from unbroken.data import documents, prepare, tokenizers
from unbroken.data.shards import header
from unbroken.data.stream import Stream
from unbroken.errors import PassingError, UserError

needs_bpe = pytest.mark.skipif(not BPE.is_dir(), reason="GPT-2's encoder.json and vocab.bpe are not here")


def all_tokens(pattern: str) -> list[int]:
    stream = Stream.open(pattern)
    return [int(token) for token in stream.read(0, stream.num_tokens)]


def documents_of(tokens: list[int]) -> list[bytes]:
    """The documents of a corpus of bytes."""
    assert tokens[0] == tokenizers.END_OF_TEXT
    found: list[list[int]] = []
    for token in tokens:
        if token == tokenizers.END_OF_TEXT:
            found.append([])
        else:
            found[-1].append(token)
    return [bytes(document) for document in found]


def data_command(*argv: str | Path) -> int:
    parser = argparse.ArgumentParser()
    data.configure(parser)
    return data.run(parser.parse_args([str(word) for word in argv]))


# ---- the built-in corpus


def library(folder: Path) -> dict[str, bytes]:
    """A small library with the folders that do not belong into the corpus."""
    files = {f"pack/m{index:02d}.py": f"number = {index}\n".encode() for index in range(60)}
    left_out = ("test/t.py", "pack/idle_test/t.py", "site-packages/p.py", "lib2to3/x.py", "pack/notes.txt")
    for name, content in (*files.items(), *((name, b"secret") for name in left_out)):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return files


def test_the_builtin_corpus_is_every_file_once_in_order_train_and_validation_apart(tmp_path: Path) -> None:
    files = library(tmp_path / "lib")
    globs = prepare.ensure_builtin(tmp_path, tmp_path / "lib")
    assert [Stream.open(glob).tokenizer for glob in globs] == ["bytes", "bytes"]
    train, val = (documents_of(all_tokens(glob)) for glob in globs)
    assert len(val) >= 1 and len(train) > len(val)
    assert sorted(train + val) == sorted(files.values())
    order = [files[name] for name in sorted(files, key=lambda name: hashlib.sha256(name.encode()).digest())]
    assert train == [content for content in order if content in train], "mixed, not sorted by name"


def test_a_new_file_moves_no_other_between_training_and_validation(tmp_path: Path) -> None:
    library(tmp_path / "lib")
    before = documents_of(all_tokens(prepare.ensure_builtin(tmp_path / "a", tmp_path / "lib")[1]))
    (tmp_path / "lib/aaa.py").write_text("new")
    after = documents_of(all_tokens(prepare.ensure_builtin(tmp_path / "b", tmp_path / "lib")[1]))
    assert [content for content in after if content != b"new"] == before


def test_the_real_standard_library_makes_a_corpus(tmp_path: Path) -> None:
    train, val = (Stream.open(glob, vocab_size=50257) for glob in prepare.ensure_builtin(tmp_path))
    assert train.num_tokens > 3_000_000
    assert 100_000 < val.num_tokens < train.num_tokens / 5
    head = train.read(0, 100_000)
    assert head[0] == tokenizers.END_OF_TEXT and set(head[head > 255]) == {tokenizers.END_OF_TEXT}


def test_it_is_made_once(tmp_path: Path) -> None:
    library(tmp_path / "lib")
    globs = prepare.ensure_builtin(tmp_path, tmp_path / "lib")
    path = tmp_path / "stdlib/stdlib_train_000000.bin"
    before = path.stat()
    library(tmp_path / "lib2")
    assert prepare.ensure_builtin(tmp_path, tmp_path / "lib2") == globs
    assert path.stat() == before


def test_many_may_make_it_at_once(tmp_path: Path) -> None:
    library(tmp_path / "lib")
    with ThreadPoolExecutor(6) as pool:
        made = list(pool.map(lambda _: prepare.ensure_builtin(tmp_path, tmp_path / "lib"), range(6)))
    assert len(set(made)) == 1
    alone = prepare.ensure_builtin(tmp_path / "alone", tmp_path / "lib")
    assert [all_tokens(glob) for glob in made[0]] == [all_tokens(glob) for glob in alone]
    names = [path.name for path in (tmp_path / "stdlib").iterdir()]
    assert sorted(names) == ["stdlib_train_000000.bin", "stdlib_val_000000.bin"]


def test_one_of_the_two_missing_is_made_again(tmp_path: Path) -> None:
    library(tmp_path / "lib")
    _, val = prepare.ensure_builtin(tmp_path, tmp_path / "lib")
    expected = all_tokens(val)
    (tmp_path / "stdlib/stdlib_val_000000.bin").unlink()
    prepare.ensure_builtin(tmp_path, tmp_path / "lib")
    assert all_tokens(val) == expected


# ---- which corpus


def test_what_is_typed_wins_and_validation_is_beside_it(tmp_path: Path) -> None:
    assert prepare.resolve_patterns("d/fineweb_train_*.bin", "", tmp_path) == (
        "d/fineweb_train_*.bin",
        "d/fineweb_val_*.bin",
    )
    assert prepare.resolve_patterns("train/x_train_*.bin", "", tmp_path) == (
        "train/x_train_*.bin",
        "train/x_val_*.bin",
    )
    assert prepare.resolve_patterns("a*.bin", "b*.bin", tmp_path) == ("a*.bin", "b*.bin")
    assert prepare.resolve_patterns("train/a*.bin", "", tmp_path) == ("train/a*.bin", "")
    assert list(tmp_path.iterdir()) == []


def test_without_flags_fineweb_if_it_is_there_else_the_builtin_corpus(tmp_path: Path) -> None:
    (tmp_path / "fineweb10B").mkdir()  # as a failed download leaves it
    assert prepare.resolve_patterns("", "", tmp_path)[0] == f"{tmp_path}/stdlib/stdlib_train_*.bin"
    (tmp_path / "fineweb10B/fineweb_train_000001.bin").touch()
    fineweb = tmp_path / "fineweb10B"
    assert prepare.resolve_patterns("", "", tmp_path) == (
        f"{fineweb}/fineweb_train_*.bin",
        f"{fineweb}/fineweb_val_*.bin",
    )
    assert prepare.resolve_patterns("", "mine*.bin", tmp_path)[1] == "mine*.bin"


# ---- text files


def test_text_as_bytes_with_the_end_for_validation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = tmp_path / "one.txt", tmp_path / "two.txt"
    first.write_bytes("".join(f"größe {index}\n" for index in range(50)).encode())
    second.write_bytes("".join(f"line {index}\r\n" for index in range(50)).encode())
    argv = (
        "text",
        first,
        second,
        "--tokenizer",
        "bytes",
        "--folder",
        tmp_path / "out",
        "--val_percent",
        "30",
    )
    assert data_command(*argv, "--shard_tokens", "100") == 0
    assert Stream.open(f"{tmp_path}/out/*.bin").tokenizer == "bytes"
    train = documents_of(all_tokens(f"{tmp_path}/out/text_train_*.bin"))
    val = documents_of(all_tokens(f"{tmp_path}/out/text_val_*.bin"))
    assert train[0] == first.read_bytes()
    assert b"".join([*train, *val]) == first.read_bytes() + second.read_bytes()
    assert train[1].endswith(b"\r\n") and len(val) == 1  # cut at the end of a line
    assert len(list((tmp_path / "out").glob("text_train_*.bin"))) > 1
    printed = capsys.readouterr().out
    assert f'--input_bin "{tmp_path}/out/text_train_*.bin" --input_val_bin "{tmp_path}/out/text_val_*.bin"' in printed


def test_text_is_never_written_over(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("words\n" * 100)
    argv = (
        "text",
        tmp_path / "a.txt",
        "--tokenizer",
        "bytes",
        "--folder",
        tmp_path / "out",
        "--val_percent",
        "0",
    )
    data_command(*argv)
    made = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert made == ["text.json", "text_train_000000.bin"]  # no validation asked for, none made
    with pytest.raises(UserError, match=r"text_train_000000\.bin exists; delete the shards of this name, or choose"):
        data_command(*argv)
    data_command(*argv, "--name", "other")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere.txt"], "cannot read .*nowhere.txt: No such file or directory"),
        (["none"], r"none holds no file with \.txt, \.jsonl, \.parquet, \.arrow; type the files themselves"),
        (["no*.txt"], r"no file matches no\*\.txt; check the path"),
        (["full.txt", "--tokenizer", "full.txt"], r"full\.txt is no tokenizer\.json \(.*\); check the path"),
        (["empty.txt"], "the files hold no text to train on"),
        (["full.txt", "--val_percent", "100"], "--val_percent 100: it must be at least 0 and below 100"),
        (["full.txt", "--shard_tokens", "0"], "--shard_tokens 0: it must be at least 1"),
    ],
)
def test_mistakes_with_text_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: list[str], message: str
) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "none").mkdir()
    (tmp_path / "full.txt").write_text("words\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        data_command("text", "--tokenizer", "bytes", *argv)
    assert not (tmp_path / "data").exists()


def test_a_storage_that_does_not_answer_is_no_mistake_in_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever of the ways of reading meets it."""

    def fails(*_: object) -> object:
        raise OSError(errno.ESTALE, "Stale file handle")

    path = tmp_path / "a.txt"
    path.write_text("words\n")
    spans, _ = documents.split_sources(documents.find_sources([path]), 0)
    monkeypatch.setattr(documents, "regular", fails)
    monkeypatch.setattr(Path, "read_bytes", fails)
    for reading in (
        lambda: list(documents.read_pieces(spans[0], tokenizers.ByteTokenizer(), "")),
        lambda: list(prepare.token_pieces([path], tokenizers.ByteTokenizer())),
    ):
        with pytest.raises(PassingError, match=r"cannot read .*a\.txt: Stale file handle; start again when"):
            reading()


# ---- GPT-2's tokens

PARTS = ["\n\n\n", "    ", "\r\n", "'s", *"\n \t\x1c\u00a0\u3000aun12.ß日🙂<|>"]
WORDS = st.lists(st.sampled_from(PARTS), max_size=20).map("".join)


@cache
def gpt2() -> tokenizers.GPT2Tokenizer:
    return tokenizers.GPT2Tokenizer(BPE)


def in_blocks(content: bytes, size: int) -> Iterable[bytes]:
    return (content[start : start + size] for start in range(0, len(content), size))


@needs_bpe
@settings(max_examples=200, deadline=None)
@given(text=WORDS, size=st.integers(1, 9), characters=st.integers(1, 12))
def test_tokens_do_not_depend_on_how_a_file_is_read(text: str, size: int, characters: int) -> None:
    content = text.encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizers, "PIECE_CHARACTERS", characters)
        pieces = list(gpt2().pieces(in_blocks(content, size)))
        assert pieces == list(gpt2().pieces([content])) and b"".join(pieces) == content
        for index in range(len(pieces)):  # from the end of any piece on, as a run that goes on reads
            rest = b"".join(pieces[index:])
            assert list(gpt2().pieces(in_blocks(rest, size))) == pieces[index:]


@needs_bpe
@settings(max_examples=200, deadline=None)
@given(text=WORDS)
def test_a_safe_cut_changes_no_tokens(text: str) -> None:
    cut = tokenizers.safe_cut(text)
    assert [*gpt2().encode(text[:cut]), *gpt2().encode(text[cut:])] == gpt2().encode(text)


@needs_bpe
def test_the_twin_a_cut_anywhere_changes_tokens() -> None:
    whole = np.concatenate(list(gpt2().encode_blocks([b"unbroken"])))
    halves = np.concatenate([*gpt2().encode_blocks([b"unbr"]), *gpt2().encode_blocks([b"oken"])])
    assert whole.tolist() != halves.tolist()


@needs_bpe
def test_the_tokens_are_gpt2s(tmp_path: Path) -> None:
    text = "Hello world! It's 2024.\n\n  <|endoftext|> größe"
    (tmp_path / "a.txt").write_text(text)
    data_command("text", tmp_path / "a.txt", "--bpe_dir", BPE, "--folder", tmp_path / "out", "--val_percent", "0")
    assert Stream.open(f"{tmp_path}/out/*.bin").tokenizer == "gpt2"
    tokens = all_tokens(f"{tmp_path}/out/text_train_*.bin")
    assert tokens[:4] == [50256, 15496, 995, 0]  # "Hello", " world", "!"
    assert tokens.count(50256) == 1  # the text of the marker is text, not the marker
    decoded = tokenizers.load_gpt2(BPE).decode(tokens[1:])
    assert decoded == text


@needs_bpe
def test_a_file_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 au lait\n" * 10)
    with pytest.raises(UserError, match=r"a\.txt is not UTF-8 text \(.*\); use --tokenizer bytes"):
        data_command("text", tmp_path / "a.txt", "--bpe_dir", BPE, "--folder", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_bpe_folder_without_its_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"does not hold GPT-2's encoder\.json and vocab\.bpe"):
        tokenizers.GPT2Tokenizer(tmp_path)
    for name in tokenizers.BPE_FILES:
        (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match="GPT-2's vocabulary cannot be read .*Hash mismatch.*or --tokenizer bytes"):
        tokenizers.GPT2Tokenizer(tmp_path)


# ---- FineWeb


def test_whole_shards_are_not_fetched_again(tmp_path: Path) -> None:
    for name in ("val_000000", "train_000001", "train_000002"):
        (tmp_path / f"fineweb_{name}.bin").write_bytes(header(2) + bytes(4))
    said: list[str] = []
    train, val = prepare.download_fineweb(2, tmp_path, said.append)
    assert said == [] and (train, val) == (f"{tmp_path}/fineweb_train_*.bin", f"{tmp_path}/fineweb_val_*.bin")


@pytest.mark.parametrize("damaged", [False, True])
def test_offline_is_one_line(tmp_path: Path, damaged: bool) -> None:
    """In a process of its own: the hub reads HF_HUB_OFFLINE when it is imported."""
    if damaged:
        (tmp_path / "fineweb_val_000000.bin").write_bytes(header(3) + bytes(4))
    program = (
        "from unbroken import errors\nfrom unbroken.data import prepare\nfrom pathlib import Path\nimport sys\n"
        "try: prepare.download_fineweb(1, Path(sys.argv[1]))\nexcept errors.UserError as error: print(error)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path], env=environment, capture_output=True, text=True, check=True
    )
    said, error = done.stdout.splitlines()
    assert said == "downloading fineweb_val_000000.bin (1 of 2)"
    assert error.startswith("cannot download fineweb_val_000000.bin of kjj0/fineweb10B-gpt2 (")
    assert error.endswith("; the same command continues the download")


@pytest.mark.parametrize("number", [0, -1, 104])
def test_fineweb_has_103_shards(tmp_path: Path, number: int) -> None:
    with pytest.raises(UserError, match=f"--shards {number}: FineWeb has 1 to 103 of them"):
        data_command("fineweb", "--shards", str(number), "--folder", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_nothing_here_imports_torch() -> None:
    """It takes over a second, and `python -m unbroken data --help` should not."""
    program = "import sys, unbroken.commands.data; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
