"""A zip, a path and values that claim what is not so: each is refused with one line that says what is wrong."""

from __future__ import annotations

import os
import pickle
import re
import struct
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import checkpoints as make
from tests.harness import arguments, launch, write_corpus
from unbroken import text
from unbroken.checkpoint.format import schema
from unbroken.checkpoint.reader import CheckpointFile
from unbroken.errors import UserError

FOUR_FLOATS = {"0": bytes(16)}
EMPTY_DICT = b"\x80\x02}."


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty|bytes"),
        (b"x", ""),
        (b"not a zip at all, just text " * 100, ""),
        (b"\x7fELF" + bytes(5000), ""),
        (pickle.dumps({"model": 1}), ""),
        (b"PK\x05\x06" + bytes(18), ""),
        (b"PK\x05\x06" + b"\xff" * 18, ""),
        (make.zip_of([("archive/data.pkl", EMPTY_DICT)], zipfile.ZIP_DEFLATED), "compressed"),
        (make.zip_of([("archive/data.pkl", bytes(50_000_000))], zipfile.ZIP_DEFLATED), "compressed"),
        (make.zip_of([("archive/data.pkl", EMPTY_DICT)], zipfile.ZIP_BZIP2), "compressed"),
        (make.zip_of([("archive/version", b"3")]), "data.pkl|torch.save"),
        (make.zip_of([("data.pkl", EMPTY_DICT)]), ""),
        (make.zip_of([("a/data.pkl", EMPTY_DICT), ("b/data/0", b"1")]), "folder"),
        (make.zip_of([("a/data.pkl", EMPTY_DICT), ("a/../../etc/passwd", b"1")]), "name|no checkpoint"),
        (make.zip_of([("../data.pkl", EMPTY_DICT)]), ""),
        (make.zip_of([("/data.pkl", EMPTY_DICT)]), ""),
        (make.zip_of([("a/data.pkl", EMPTY_DICT), ("a/data/\x1b[2J", b"1")]), ""),
        (make.zip_of([("a/data.pkl", EMPTY_DICT), ("a/data/" + "0" * 60_000, b"1")]), ""),
        (make.zip_of([("a/data.pkl", EMPTY_DICT), ("a/byteorder", b"big")]), "big"),
        (make.pickle_file(EMPTY_DICT) + b"trailing", ""),
        (b"in front" + make.pickle_file(EMPTY_DICT), ""),
    ],
)
def test_what_is_no_checkpoint(tmp_path: Path, content: bytes, message: str) -> None:
    assert re.search(message, make.refused(tmp_path, content))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_entries_of_one_name(tmp_path: Path) -> None:
    make.refused(tmp_path, make.zip_of([("a/data.pkl", EMPTY_DICT), ("a/data.pkl", b"\x80\x02}X\x01\0\0\0aNs.")]))


CENTRAL_FIELDS = {  # offset in an entry of the directory, form, what is put there
    "flags: encrypted": (8, "<H", 1),
    "method": (10, "<H", 8),
    "crc": (16, "<I", 1),
    "packed": (20, "<I", 2**31),
    "size": (24, "<I", 5),
    "size in zip64": (24, "<I", 2**32 - 1),
    "length of the name": (28, "<H", 60_000),
    "length of the extra field": (30, "<H", 60_000),
    "comment": (32, "<H", 3),
    "disk": (34, "<H", 1),
    "header beyond": (42, "<I", 2**32 - 2),
    "header in zip64": (42, "<I", 2**32 - 1),
    "header of another entry": (42, "<I", 0),
}


@pytest.mark.parametrize("field", CENTRAL_FIELDS)
def test_a_directory_that_contradicts_the_file(tmp_path: Path, field: str) -> None:
    content = bytearray(make.pickle_file(make.dict_of(a=make.tensor_opcodes((4,), (1,))), FOUR_FLOATS))
    offset, form, value = CENTRAL_FIELDS[field]
    struct.pack_into(form, content, content.rindex(b"PK\x01\x02") + offset, value)
    make.refused(tmp_path, bytes(content))


def test_entries_that_share_their_bytes(tmp_path: Path) -> None:
    """Both names on one payload: small files must not unfold, and two readers must not see two files."""
    content = bytearray(make.zip_of([("a/data.pkl", EMPTY_DICT), ("a/data/0", b"1" * 16), ("a/data/1", b"1" * 16)]))
    last = content.rindex(b"PK\x01\x02")
    first = content.rindex(b"PK\x01\x02", 0, last)
    content[last + 42 : last + 46] = content[first + 42 : first + 46]
    make.refused(tmp_path, bytes(content))


def test_an_entry_inside_of_another_one(tmp_path: Path) -> None:
    """The storage of one tensor is the local header and the storage of another, and both are listed."""
    whole = make.zip_of([("a/data.pkl", EMPTY_DICT), ("a/data/1", b"1" * 16)])
    inner = whole[whole.index(b"PK\x03\x04", 4) : whole.index(b"PK\x01\x02")]
    content = make.zip_of([("a/data.pkl", EMPTY_DICT), ("a/data/0", inner)])
    end, directory = content.rindex(b"PK\x05\x06"), content.index(b"PK\x01\x02")
    listed = bytearray(whole[whole.rindex(b"PK\x01\x02") : whole.rindex(b"PK\x05\x06")])
    struct.pack_into("<I", listed, 42, content.index(inner))
    last = bytearray(content[end:])
    struct.pack_into("<HHI", last, 8, 3, 3, end - directory + len(listed))
    make.refused(tmp_path, content[:end] + bytes(listed) + bytes(last))


def test_a_flip_in_the_values_is_found_before_they_are_believed(tmp_path: Path) -> None:
    content = make.save_ours(tmp_path, make.state()).read_bytes()
    assert "checksum of data.pkl" in make.refused(tmp_path, content.replace(b"print('hello')", b"print('hallo')"))


@pytest.mark.parametrize("count", [0, 1, 2, 50_000, 65_535])
def test_wrong_number_of_entries(tmp_path: Path, count: int) -> None:
    content = bytearray(make.pickle_file(EMPTY_DICT))
    struct.pack_into("<HH", content, len(content) - 14, count, count)
    make.refused(tmp_path, bytes(content))


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    for content in (make.save_ours(tmp_path, make.state()).read_bytes(), make.torch_bytes(make.state())):
        for length in range(0, len(content), 100):
            line = make.refused(tmp_path, content[:length])
            assert line
        for length in range(len(content) - 120, len(content)):
            make.refused(tmp_path, content[:length])


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    names = ["nowhere.pt", "", "pipe", "circle", "dangling", "file/below", "n" * 300, "nul\0byte", "esc\x1b[2J"]
    for path in [*(tmp_path / name for name in names), Path("/dev/zero"), Path("/dev/null")]:
        began = time.process_time()
        with pytest.raises(UserError) as caught:
            CheckpointFile(path)
        assert str(caught.value).isprintable() and time.process_time() - began < 1


CHANGES: dict[str, tuple[tuple[Any, ...], Any, str]] = {
    "NaN step": (("step",), float("nan"), "step"),
    "negative step": (("step",), -1, "step"),
    "bool step": (("step",), True, "step"),
    "huge step": (("step",), 10**40, "step"),
    "tensor step": (("step",), torch.tensor(3), "step"),
    "run_id that climbs": (("run_id",), "../../../etc", "run_id"),
    "run_id with control characters": (("run_id",), "\x1b[2J\n" + make.RUN_ID, "run_id"),
    "run_id of another version": (("run_id",), "3b241101-e2bb-1255-8caf-4136c566a962", "run_id"),
    "run_id with a line end": (("run_id",), make.RUN_ID + "\n", "run_id"),
    "run_id number": (("run_id",), 5, "run_id"),
    "newer format": (("format",), 2, "newer"),
    "format 0": (("format",), 0, "format"),
    "format text": (("format",), "1", "format"),
    "code bytes": (("code",), b"print()", "code"),
    "args list": (("args",), [1], "args"),
    "args with a tensor": (("args", "lr"), torch.ones(2), "args.lr"),
    "args with a dtype": (("args", "dtype"), torch.float32, "args.dtype"),
    "model list": (("model",), [torch.ones(2)], "model"),
    "model with a number": (("model", "w"), 1.0, "model.w"),
    "model with a nested dict": (("model", "w"), {"deeper": torch.ones(1)}, "model.w"),
    "model with a number as name": (("model", 3), torch.ones(1), "model.3"),
    "optimizer with more": (("optimizer", "more"), 1, "optimizer"),
    "optimizer state under a name": (("optimizer", "state", "zero"), {}, "optimizer.state.zero"),
    "optimizer state no dict": (("optimizer", "state", 1), [], "optimizer.state.1"),
    "group no dict": (("optimizer", "param_groups"), [3], "optimizer.param_groups.0"),
    "sources with a number": (("sources", "a.py"), 3, "sources.a.py"),
    "sources under a number": (("sources", 3), "x", "sources.3"),
    "unknown key": (("extra",), 1, "extra"),
    "control characters in a key": (("\x1b]0;owned\x07",), 1, "x1b"),
    "direction changed in a key": (("model", "a\u202eb"), 1, "u202e"),
    "surrogate in a key": (("model", "a\udc80b"), 1, "udc80"),
    "very long key": (("model", "k" * 100_000), 1, "kkk"),
}


def changed(path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    tree = make.state()
    node: Any = tree
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = value
    return tree


@pytest.mark.parametrize("name", CHANGES)
def test_values_against_the_schema(tmp_path: Path, name: str) -> None:
    path, value, message = CHANGES[name]
    assert message in make.refused(tmp_path, make.torch_bytes(changed(path, value)))


@pytest.mark.parametrize("key", [key for key in schema.KEYS if key not in ("format", "progress")])
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    tree = make.state()
    del tree[key]
    assert key in make.refused(tmp_path, make.torch_bytes(tree))


def test_text_of_a_file_is_printed_harmless() -> None:
    shown = text.printable("a\x1b[31m\r\n\x00\x9b\u202e\u2066\udc80\ufeff" + "z" * 1000)
    assert shown.isprintable() and "\x1b" not in shown and len(shown) < 400 and shown.startswith("a\\x1b")
    shown.encode("utf-8")


def test_secrets_stay_out_of_checkpoints(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    done = launch(
        tmp_path,
        arguments({"num_iterations": 1}),
        processes=None,
        env={"WANDB_API_KEY": "s3cr3t" * 6, "HF_TOKEN": "hf_t0k3n"},
    ).wait()
    assert done.code == 0, done.text
    content = next(tmp_path.glob("logs/*/final.pt")).read_bytes()
    assert b"s3cr3ts3cr3t" not in content and b"hf_t0k3n" not in content
