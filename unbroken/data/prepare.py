"""Make token shards: the built-in corpus, text files, or the pre-tokenized FineWeb."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from unbroken.data.shards import Shard, Tokens, write_shards
from unbroken.errors import UserError, describe_error

if TYPE_CHECKING:
    pass
from unbroken.data.tokenizers import END_OF_TEXT, Encode, encode_bytes

BLOCK_BYTES = 1 << 20
VALIDATION_SHARE = 20  # of the built-in corpus: about one file in so many

FINEWEB = "kjj0/fineweb10B-gpt2"
FINEWEB_SHARDS = 103
PrintLine = Callable[[str], None]


def resolve_patterns(input_bin: str, input_val_bin: str, root: Path = Path("data")) -> tuple[str, str]:
    """The globs of training and validation shards: as typed, else FineWeb if there, else the built-in corpus.

    By default the validation shards are those beside the training shards; "" if no name can be told.
    """
    if input_bin == shard_globs(root / "stdlib", "stdlib")[0]:  # a run's that goes on where it has not been made yet
        train, val = ensure_builtin(root)
        return train, input_val_bin or val
    if not input_bin:
        train, val = shard_globs(root / "fineweb10B", "fineweb")
        if not glob.glob(train):  # nor is a folder enough that a failed download left
            train, val = ensure_builtin(root)
        return train, input_val_bin or val
    folder, name = os.path.split(input_bin)
    before, train_word, after = name.rpartition("train")
    beside = os.path.join(folder, f"{before}val{after}") if train_word else ""
    return input_bin, input_val_bin or beside


def shard_globs(folder: Path, name: str) -> tuple[str, str]:
    """Of the training and of the validation shards of that name, whatever letters the folder has."""
    typed = f"{glob.escape(str(folder))}/{glob.escape(name)}"
    return f"{typed}_train_*.bin", f"{typed}_val_*.bin"


def ensure_builtin(root: Path = Path("data"), source: Path | None = None) -> tuple[str, str]:
    """The globs of the built-in corpus, the source of Python's standard library as bytes; made if not there.

    Deterministic, so several processes may make it at once: whoever renames last puts the same bytes there.
    """
    folder = root / "stdlib"
    train, val = shard_globs(folder, "stdlib")
    if glob.glob(train) and glob.glob(val):
        return train, val
    source = source or Path(os.path.dirname(os.__file__))
    files = library_files(source)
    for name, chosen in (("stdlib_val", True), ("stdlib_train", False)):
        documents = [Document(path) for path in files if is_validation(path.relative_to(source)) == chosen]
        if not documents:
            raise UserError(f"{source} holds too little Python source for the built-in corpus; type --input_bin")
        write_shards(token_pieces(documents, encode_bytes), folder, name)
    return train, val


def library_files(source: Path) -> list[Path]:
    """The .py files under `source`, sorted, without installed packages and without tests."""
    found = []
    for folder, names, files in os.walk(source):
        names[:] = [name for name in names if not _left_out(name)]
        found += [Path(folder, name) for name in files if name.endswith(".py")]
    return sorted(found)


def _left_out(folder: str) -> bool:
    return folder.endswith("-packages") or not {"test", "tests", "lib2to3"}.isdisjoint(folder.split("_"))


def is_validation(name: Path) -> bool:
    """Whether a file of the built-in corpus is for validation: by its name alone, whatever its neighbours."""
    return hashlib.sha256(name.as_posix().encode()).digest()[0] % VALIDATION_SHARE == 0


@dataclass(frozen=True)
class Document:
    """The bytes start..end-1 of a file; end None: to its end."""

    path: Path
    start: int = 0
    end: int | None = None

    def blocks(self) -> Iterator[bytes]:
        """Its bytes, a block at a time. Raises UserError if it cannot be read."""
        try:
            with open(self.path, "rb") as file:
                file.seek(self.start)
                left = float("inf") if self.end is None else self.end - self.start
                while block := file.read(int(min(BLOCK_BYTES, left))):
                    left -= len(block)
                    yield block
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror or error}") from error


def split_documents(paths: Sequence[Path], val_percent: float) -> tuple[list[Document], list[Document]]:
    """Documents to train on, and to validate on: the last `val_percent` of the bytes, cut at a line's end."""
    try:
        sizes = [path.stat().st_size for path in paths]
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path} is not a file; type the text files themselves")
    left = int(sum(sizes) * (100 - val_percent) / 100)
    train, val = [], []
    for path, size in zip(paths, sizes, strict=True):
        cut = _line_end(path, left) if 0 < left < size else min(max(left, 0), size)
        train += [Document(path, 0, cut)] if cut > 0 else []
        val += [Document(path, cut, size)] if cut < size else []
        left -= size
    return train, val


def _line_end(path: Path, offset: int) -> int:
    with open(path, "rb") as file:
        file.seek(offset)
        file.readline()
        return file.tell()


def token_pieces(
    documents: Iterable[Document], encode: Encode, advance: Callable[[int], None] | None = None
) -> Iterator[Tokens]:
    """The tokens of the documents, a piece at a time; `advance` hears the size of every block read."""

    def heard(blocks: Iterator[bytes]) -> Iterator[bytes]:
        for block in blocks:
            if advance:
                advance(len(block))
            yield block

    for document in documents:
        yield np.array([END_OF_TEXT], dtype=np.uint16)
        try:
            yield from encode(heard(document.blocks()))
        except UnicodeDecodeError as error:
            raise UserError(f"{document.path} is not UTF-8 text ({error.reason}); use --tokenizer bytes") from error


def download_fineweb(
    num_shards: int, folder: Path = Path("data/fineweb10B"), say: PrintLine = print
) -> tuple[str, str]:
    """Fetch FineWeb's validation shard and its first `num_shards` training shards; returns their globs.

    What is there whole is not fetched again, and what is there in part is continued.
    """
    if not 1 <= num_shards <= FINEWEB_SHARDS:
        raise UserError(f"--shards {num_shards}: FineWeb has 1 to {FINEWEB_SHARDS} of them, 100 million tokens each")
    names = [
        "fineweb_val_000000.bin",
        *(f"fineweb_train_{index:06d}.bin" for index in range(1, num_shards + 1)),
    ]
    for done, name in enumerate(names, 1):
        path = folder / name
        if not _is_whole(path):
            say(f"fetching {name} ({done} of {len(names)})")
            _fetch(name, folder)
            Shard.open(path)
    return shard_globs(folder, "fineweb")


def _is_whole(path: Path) -> bool:
    if not path.exists():
        return False
    try:
        Shard.open(path)
    except UserError:
        return False
    return True


def _fetch(name: str, folder: Path) -> None:
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise UserError("downloads need huggingface_hub: pip install huggingface_hub") from error
    try:
        # A file that is there but not whole is forced: the hub's own bookkeeping may take it for whole.
        damaged = (folder / name).exists()
        hf_hub_download(FINEWEB, name, repo_type="dataset", local_dir=folder, force_download=damaged)
    except Exception as error:  # the hub's own, its HTTP client's or the disk's
        raise UserError(
            f"cannot fetch {name} of {FINEWEB} ({describe_error(error)}); the same command goes on where it stopped"
        ) from error
