"""Ingestion: every kind of file, the same bytes after any kill and with any number of threads, bad lines named."""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.harness import GPT2_BPE as BPE
from tests.harness import contents
from unbroken.commands import data
from unbroken.data import documents, ingest, tokenizers
from unbroken.data.shards import HEADER_BYTES, header, vocab_size_of
from unbroken.data.stream import Stream
from unbroken.errors import UserError

END = tokenizers.END_OF_TEXT
WORDS = ["größe", "the", " quick", "\n", "\r\n", "日本", "fox 🙂", '"\\', "<|endoftext|>"]


def run(*argv: object, workers: int = 1) -> int:
    parser = argparse.ArgumentParser()
    data.configure(parser)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "available_cores", lambda: workers)
        return data.run(parser.parse_args(["text", *map(str, argv)]))


def tokens_of(pattern: str) -> list[int]:
    stream = Stream.open(pattern)
    return [int(token) for token in stream.read(0, stream.num_tokens)]


def as_tokens(texts: list[str]) -> list[int]:
    """The tokens of documents as bytes."""
    return [token for text in texts for token in (END, *text.encode())]


def texts(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices(WORDS, k=draw.randint(1, 30))) for _ in range(count)]


def lines(documents_: list[str]) -> bytes:
    return b"".join(json.dumps({"id": 1, "text": text}).encode() + b"\n" for text in documents_)


def write_parquet(path: Path, cells: list[str], column: str = "text") -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"id": list(range(len(cells))), column: cells})
    pyarrow.parquet.write_table(table, path, row_group_size=7)


def write_arrow(path: Path, cells: list[str]) -> None:
    import pyarrow

    table = pyarrow.table({"text": cells})
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=5)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A folder with a file of each kind, and the documents in it, in order."""
    pytest.importorskip("pyarrow")
    folder, found = tmp_path_factory.mktemp("mixed"), [texts(40, seed) for seed in range(6)]
    (folder / "a.txt").write_bytes("".join(found[0]).encode())
    (folder / "b.jsonl").write_bytes(lines(found[1]) + b"\n")
    middle = len(lines(found[2][:20]))
    compressed = lines(found[2])
    (folder / "c.json.gz").write_bytes(gzip.compress(compressed[:middle]) + gzip.compress(compressed[middle:]))
    write_parquet(folder / "d.parquet", found[3])
    (folder / "saved").mkdir()
    for index, part in enumerate((found[4][:25], found[4][25:])):
        write_arrow(folder / f"saved/data-0000{index}-of-00002.arrow", part)
    files = [{"filename": f"data-0000{index}-of-00002.arrow"} for index in range(2)]
    (folder / "saved/state.json").write_text(json.dumps({"_data_files": files}))
    write_arrow(folder / "saved/cache-1.arrow", ["a left-over of map()"])
    (folder / ".hidden.txt").write_text("hidden")
    (folder / "README.md").write_text("about")
    (folder / "z.jsonl").write_bytes(lines(found[5]).rstrip(b"\n"))
    return folder, ["".join(found[0]), *(text for each in found[1:] for text in each)]


def inputs(folder: Path) -> list[str]:
    """As many ways of typing them."""
    return [f"{folder}/[a-b].*", f"{folder}/c.json.gz", f"{folder}/d.parquet", f"{folder}/saved", f"{folder}/z.jsonl"]


def test_every_kind_of_file_is_read_in_order(mixed: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, expected = mixed
    flags = ("--tokenizer", "bytes", "--shard_tokens", 5000)
    assert run(*inputs(folder), "--folder", tmp_path / "all", "--val_percent", 0, *flags) == 0
    assert tokens_of(f"{tmp_path}/all/text_train_*.bin") == as_tokens(expected)
    described = json.loads((tmp_path / "all/text.json").read_text())
    assert described["tokenizer"] == {"name": "bytes", "vocab_size": 50257, "end_of_text": END, "sha256": {}}
    assert described["sets"]["train"]["documents"] == len(expected)
    assert described["sets"]["train"]["tokens"] == len(as_tokens(expected))
    assert [Path(each["path"]).name for each in described["sources"]][:3] == ["a.txt", "b.jsonl", "c.json.gz"]
    first = (tmp_path / "all/text_train_000000.bin").read_bytes()[:HEADER_BYTES]
    assert first == header(5000, "bytes", 50257) and vocab_size_of(first) == 50257
    # A folder takes all that is in it but hidden and unknown files; with validation nothing is lost or double.
    (folder / "saved/cache-1.arrow").rename(folder / "saved/.cache-1.arrow")
    for percent in (3, 20, 35, 60, 97):  # the cut falls into each kind of file
        name = f"of{percent}"
        run(folder, "--folder", tmp_path / "parts", "--name", name, "--val_percent", percent, *flags)
        train, val = (tokens_of(f"{tmp_path}/parts/{name}_{kind}_*.bin") for kind in ("train", "val"))
        both = train + val
        if both != as_tokens(expected):  # a text that is cut is two documents
            assert val[0] == END and train + val[1:] == as_tokens(expected)
        assert abs(len(val) / len(both) - percent / 100) < 0.2


def killed(job: Callable[[], object], events: int) -> bool:
    """Run a job in a process that is killed before its system call number `events`; return whether it came so far."""
    child = os.fork()
    if child == 0:
        left = [events]

        def counted(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **named: Any) -> Any:
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **named)

            return call

        try:
            for name in ("fsync", "replace", "unlink", "rename"):
                setattr(os, name, counted(getattr(os, name)))
            ingest._Writer._add = counted(ingest._Writer._add)  # type: ignore[method-assign]
            job()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def small_pieces(patch: pytest.MonkeyPatch) -> None:
    """Many pieces, and a record of the progress after each."""
    patch.setattr(documents, "BLOCK_BYTES", 700)
    patch.setattr(documents, "COMPRESSED_BYTES", 64)
    patch.setattr(tokenizers, "PIECE_CHARACTERS", 500)


def test_killed_anywhere_the_bytes_are_the_same(
    mixed: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    small_pieces(monkeypatch)
    flags = ("--tokenizer", "bytes", "--shard_tokens", 4000, "--val_percent", 30)
    run(*inputs(mixed[0]), *flags, "--folder", tmp_path / "whole", workers=3)
    expected = contents(tmp_path / "whole")
    assert len(expected) > 4
    real = ingest.make_shards

    def attempt(target: Path, events: int) -> bool:
        if not killed(lambda: run(*inputs(mixed[0]), *flags, "--folder", target), events):
            return False
        there = {name: content for name, content in contents(target).items() if not name.startswith(".")}
        assert all(content == expected[name] for name, content in there.items()), "what has its name is whole"
        return True

    # A record after every piece, and kills until it is done.
    monkeypatch.setattr(data, "make_shards", lambda *args: real(*args, 0.0))
    target, kills = tmp_path / "often", 0
    while attempt(target, 11 + kills):
        kills += 1
    assert kills > 5 and contents(target) == expected
    # A record with every shard only, and one kill anywhere, the naming of the shards included.
    monkeypatch.setattr(data, "make_shards", lambda *args: real(*args, 1e9))
    events = 1
    while attempt(target := tmp_path / f"once{events}", events):
        if contents(target) != expected:  # else the kill came behind all
            run(*inputs(mixed[0]), *flags, "--folder", target, workers=2)
        assert contents(target) == expected, events
        events += 1 if os.environ.get("UNBROKEN_INGEST_KILLS") else 9
    assert events > 40
    with pytest.raises(UserError, match="exists; delete the shards of this name"):
        run(*inputs(mixed[0]), *flags, "--folder", target)


@pytest.mark.skipif(not BPE.is_dir(), reason="GPT-2's encoder.json and vocab.bpe are not here")
def test_gpt2_from_a_folder_is_tiktokens_with_any_number_of_threads(
    mixed: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tokenizers")
    folder, expected = mixed
    encoding = tokenizers.load_gpt2(BPE)
    whole = [token for text in expected for token in (END, *encoding.encode(text, disallowed_special=()))]
    for workers in (1, 4):
        target = tmp_path / str(workers)
        run(*inputs(folder), "--tokenizer", BPE, "--val_percent", 0, "--folder", target, workers=workers)
        assert tokens_of(f"{target}/*.bin") == whole
    assert contents(tmp_path / "1") == contents(tmp_path / "4")
    # The same vocabulary as a tokenizer.json gives the same numbers, and another name.
    path = tmp_path / "mine" / "tokenizer.json"
    path.parent.mkdir()
    tokenizers.GPT2Tokenizer.to_huggingface(BPE).save(str(path))
    run(*inputs(folder), "--tokenizer", path.parent, "--val_percent", 0, "--folder", tmp_path / "json", workers=2)
    assert tokens_of(f"{tmp_path}/json/*.bin") == whole
    assert (tmp_path / "json/text.tokenizer.json").read_bytes() == path.read_bytes()
    name = Stream.open(f"{tmp_path}/json/*.bin").tokenizer
    assert name.startswith("mine-")
    places = [tmp_path, tmp_path / "json"]
    assert tokenizers.find_named(name, places) == f"{tmp_path}/json/text.tokenizer.json"
    assert [tokenizers.find_named(other, places) for other in ("mine-00000000", "gpt2")] == ["", "gpt2"]
    loaded = tokenizers.JsonTokenizer(path)
    assert (loaded.end_of_text, loaded.vocab_size, len(loaded.ids)) == (END, 50257, END)
    assert b"".join(loaded.decode(token) for token in loaded.encode(expected[3])).decode() == expected[3]


BAD = [
    (b'{"text": "ok"}\n{"text": \n', r"a\.jsonl, line 2: invalid JSON"),
    (b'{"text": "ok"}\n\n{"body": "x", "n": 1}\n', r"line 3: no field 'text' \(it has body, n\); type --field NAME"),
    (b'{"text": "ok"}\n{"text": 7}\n', "line 2: the field 'text' is no text"),
    (b'{"text": "ok"}\n{"text": "caf\xe9"}\n', r"line 2: invalid UTF-8 \(.*\); correct it, or type --skip_bad"),
    (b'{"text": "ok"}\n{"text": "\\ud800"}', "line 2: invalid UTF-8 in the field 'text'"),
    (b'{"text": "ok"}\n' + b"[" * 100_000 + b"\n", "line 2: invalid JSON"),
]


@pytest.mark.parametrize(("content", "message"), BAD)
def test_a_bad_line_is_named_or_left_out(
    tmp_path: Path, content: bytes, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    flags = (path, "--tokenizer", "bytes", "--val_percent", 0, "--folder", tmp_path / "out")
    with pytest.raises(UserError, match=message):
        run(*flags)
    assert list((tmp_path / "out").iterdir()) == []
    run(*flags, "--skip_bad")
    assert tokens_of(f"{tmp_path}/out/*.bin") == as_tokens(["ok"])
    assert "1 document without text left out" in capsys.readouterr().out
    assert json.loads((tmp_path / "out/text.json").read_text())["skipped_documents"] == 1


def test_a_late_bad_line_keeps_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line number is right behind many pieces, and --skip_bad continues with what was there."""
    small_pieces(monkeypatch)
    real = ingest.make_shards
    monkeypatch.setattr(data, "make_shards", lambda *args: real(*args, 0.0))
    good = texts(300, 1)
    (tmp_path / "a.jsonl").write_bytes(lines(good) + b"oops\n")
    flags = (tmp_path / "a.jsonl", "--tokenizer", "bytes", "--val_percent", 0, "--folder", tmp_path / "out")
    with pytest.raises(UserError, match="line 301: invalid JSON"):
        run(*flags)
    assert (tmp_path / "out/.text.progress.json").exists() and not list((tmp_path / "out").glob("text*"))
    with pytest.raises(UserError, match=r"\.text\.progress\.json is of unfinished shards with other files or flags"):
        run(*flags, "--shard_tokens", 50)
    begun: list[tuple[int, int, int]] = []

    def watched(job: Any, workers: int, report: Any) -> Any:
        return real(job, workers, lambda *args: begun.append(args))

    monkeypatch.setattr(data, "make_shards", watched)
    run(*flags, "--skip_bad")
    assert begun[0][2] > 0.8 * len(as_tokens(good)), "it went on"
    assert tokens_of(f"{tmp_path}/out/*.bin") == as_tokens(good)


def test_files_that_cannot_be_read_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyarrow")
    whole = gzip.compress(lines(texts(200, 2)))
    files = {
        "cut.jsonl.gz": (whole[: len(whole) // 2], r"cannot read .*cut\.jsonl\.gz: .*it is cut off; check the file"),
        "wrong.jsonl.gz": (b"no gzip at all" * 9, r"cannot read .*wrong\.jsonl\.gz: .*incorrect header check"),
        "wrong.parquet": (b"no parquet" * 9, r"cannot read .*wrong\.parquet: "),
        "wrong.arrow": (b"no arrow at all" * 9, r"cannot read .*wrong\.arrow: "),
    }
    for name, (content, message) in files.items():
        (tmp_path / name).write_bytes(content)
        for percent in (0, 50):
            with pytest.raises(UserError, match=message):
                run(tmp_path / name, "--tokenizer", "bytes", "--val_percent", percent, "--folder", tmp_path / "out")
    write_parquet(tmp_path / "b.parquet", ["x"], "body")
    with pytest.raises(UserError, match=r"b\.parquet has no column 'text' \(it has id, body\); type --field NAME"):
        run(tmp_path / "b.parquet", "--tokenizer", "bytes", "--folder", tmp_path / "out", "--val_percent", 0)
    with pytest.raises(UserError, match="the column 'id' is int64, no text; type --field NAME"):
        run(tmp_path / "b.parquet", "--field", "id", "--tokenizer", "bytes", "--folder", tmp_path, "--val_percent", 0)
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits/dataset_dict.json").write_text("{}")
    with pytest.raises(UserError, match="holds several splits of a dataset; type the folder of one, as .*splits/train"):
        run(tmp_path / "splits")
    (tmp_path / "long.jsonl").write_bytes(b"x" * 5000)
    monkeypatch.setattr(documents, "MAX_LINE_BYTES", 1000)
    monkeypatch.setattr(documents, "BLOCK_BYTES", 1000)
    with pytest.raises(UserError, match="has a line of more than 1,000 bytes; is it JSON lines?"):
        run(tmp_path / "long.jsonl", "--tokenizer", "bytes", "--folder", tmp_path / "out", "--val_percent", 0)


def test_what_is_missing_is_named_with_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for module in ("zstandard", "compression.zstd", "pyarrow", "tokenizers"):
        monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "tokenizer.json").write_text("{}")
    for name in ("a.jsonl.zst", "a.parquet", "a.txt"):
        (tmp_path / name).write_bytes(b"x" * 100)
    for typed, module in (("a.jsonl.zst", "zstandard"), ("a.parquet", "pyarrow"), ("a.txt", "tokenizers")):
        with pytest.raises(UserError, match=rf'needs {module}: pip install "unbroken\[data\]"'):
            tokenizer = tmp_path if module == "tokenizers" else "bytes"
            run(tmp_path / typed, "--tokenizer", tokenizer, "--folder", tmp_path / "out", "--val_percent", 0)


def test_zstandard(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    found = texts(50, 3)
    compress = zstandard.ZstdCompressor().compress
    content = compress(lines(found[:20])) + compress(lines(found[20:]))
    (tmp_path / "a.jsonl.zst").write_bytes(content)
    flags = ("--tokenizer", "bytes", "--val_percent", 0, "--folder")
    run(tmp_path / "a.jsonl.zst", *flags, tmp_path / "out")
    assert tokens_of(f"{tmp_path}/out/*.bin") == as_tokens(found)
    for bad in (content[:-9], b"no zstandard" * 9):
        (tmp_path / "b.txt.zst").write_bytes(bad)
        with pytest.raises(UserError, match=r"cannot read .*b\.txt\.zst: "):
            run(tmp_path / "b.txt.zst", *flags, tmp_path / "bad")


def json_tokenizer(folder: Path, words: int, end: str = "</s>") -> Path:
    hf = pytest.importorskip("tokenizers")
    vocabulary = {"[UNK]": 0, **{f"w{number}": number for number in range(1, words - 1)}}
    made = hf.Tokenizer(hf.models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = hf.pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["[UNK]", end])
    made.enable_truncation(4)
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    return folder


def test_any_tokenizer_json(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(["w5 w6 w7 w8 w9 </s> w10", "w11"]))
    flags = (tmp_path / "a.jsonl", "--val_percent", 0, "--folder")
    run(*flags, tmp_path / "out", "--tokenizer", json_tokenizer(tmp_path / "small", 3000))
    assert tokens_of(f"{tmp_path}/out/*.bin") == [2999, 5, 6, 7, 8, 9, 0, 10, 2999, 11]  # not truncated; </s> is text
    shard = Stream.open(f"{tmp_path}/out/*.bin", vocab_size=3000).shards[0]
    assert shard.vocab_size == 3000 and shard.tokenizer.startswith("small-")
    with pytest.raises(
        UserError, match=r"its tokenizer small-\w{8} has a vocabulary of 3,000 tokens, the model one of 2"
    ):
        Stream.open(f"{tmp_path}/out/*.bin", vocab_size=2999)
    large = json_tokenizer(tmp_path / "large", 70_000)
    with pytest.raises(UserError, match=r"large-\w{8} has 70,000 tokens; shards hold at most 65,536 \(uint16\)"):
        run(*flags, tmp_path / "none", "--tokenizer", large)
    odd = json_tokenizer(tmp_path / "odd", 9, end="<fin>")
    with pytest.raises(UserError, match="no end-of-text token among .*; name it as eos_token in the tokenizer_config"):
        run(*flags, tmp_path / "none", "--tokenizer", odd)
    (odd / "tokenizer_config.json").write_text('{"eos_token": {"content": "<fin>"}}')
    run(*flags, tmp_path / "named", "--tokenizer", odd)
    assert tokens_of(f"{tmp_path}/named/*.bin")[:2] == [8, 5]


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("words\n" * 9)
    with ingest._alone(tmp_path), pytest.raises(UserError, match="another process makes shards in"):
        run(tmp_path / "a.txt", "--tokenizer", "bytes", "--folder", tmp_path)


def test_progress_is_told_in_lines_without_a_terminal(
    mixed: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(data, "LINE_SECONDS", 0.0)
    run(*inputs(mixed[0]), "--tokenizer", "bytes", "--folder", tmp_path, "--val_percent", 0)
    said = [line for line in capsys.readouterr().out.splitlines() if " documents, " in line]
    read, _, rest = said[-1].partition(" of ")
    assert rest.startswith(f"{read}, ") and rest.endswith(" tokens/s"), said[-1]  # all of it was read
