"""The choice of token shards, and the making of some: the built-in corpus, or the pre-tokenized FineWeb."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from unbroken.data import sources
from unbroken.data.shards import TOKEN, Shard, Tokens, write_shards
from unbroken.data.tokenizers import END_OF_TEXT, ByteTokenizer, Tokenizer
from unbroken.errors import UserError, cannot_read, describe_error

VALIDATION_SHARE = 20  # about one file in VALIDATION_SHARE of the built-in corpus is for validation

FINEWEB = "kjj0/fineweb10B-gpt2"
FINEWEB_SHARDS = 103


def resolve_patterns(input_bin: str, input_val_bin: str, root: Path = Path("data")) -> tuple[str, str]:
    """Return the globs of training and validation shards: as typed, else FineWeb's if there, else the built-in corpus.

    If only `input_bin` is typed, the validation shards are those with `val` in place of `train` in their name; "" if
    the name has no `train`, or for several sources.
    """
    if sources.parse(input_bin) is not None:
        return input_bin, input_val_bin
    builtin = shard_globs(root / "stdlib", "stdlib")
    if (input_bin or default_pattern(root)) == builtin[0]:  # also of a run that resumes where the corpus is not
        ensure_builtin(root)
        return builtin[0], input_val_bin or builtin[1]
    if not input_bin:
        train, val = shard_globs(root / "fineweb10B", "fineweb")
        return train, input_val_bin or val
    folder, name = os.path.split(input_bin)
    before, train_word, after = name.rpartition("train")
    beside = os.path.join(folder, f"{before}val{after}") if train_word else ""
    return input_bin, input_val_bin or beside


def default_pattern(root: Path = Path("data")) -> str:
    """Return the glob of training shards without --input_bin: FineWeb's if there, else that of the built-in corpus."""
    fineweb, builtin = shard_globs(root / "fineweb10B", "fineweb")[0], shard_globs(root / "stdlib", "stdlib")[0]
    return fineweb if glob.glob(fineweb) else builtin  # a failed download may have left an empty folder


def shard_globs(folder: Path, name: str) -> tuple[str, str]:
    """Return the globs of the training and the validation shards called `name` in a folder."""
    start = f"{glob.escape(str(folder))}/{glob.escape(name)}"
    return f"{start}_train_*.bin", f"{start}_val_*.bin"


def ensure_builtin(root: Path = Path("data"), source: Path | None = None) -> tuple[str, str]:
    """Make the built-in corpus, Python's standard library as bytes, if it is missing; return its globs.

    Several processes may make it at once: all of them write the same bytes.
    """
    folder = root / "stdlib"
    train, val = shard_globs(folder, "stdlib")
    if glob.glob(train) and glob.glob(val):
        return train, val
    source = source or Path(os.path.dirname(os.__file__))
    files = library_files(source)
    sets = {}
    for name, chosen in (("stdlib_val", True), ("stdlib_train", False)):
        documents = [path for path in files if is_validation(path.relative_to(source)) == chosen]
        if not documents:
            raise UserError(f"{source} holds too little Python source for the built-in corpus; type --input_bin")
        sets[name] = token_pieces(documents, ByteTokenizer())
    write_shards(sets, folder, ByteTokenizer.name, vocab_size=ByteTokenizer.vocab_size)
    return train, val


def library_files(source: Path) -> list[Path]:
    """Return the .py files below `source`, without installed packages and tests.

    Hashes of their names decide the order: sorted by name, the end of the corpus would be of one kind.
    """
    found = []
    for folder, names, files in os.walk(source):
        names[:] = [name for name in names if not _is_excluded(name)]
        found += [Path(folder, name) for name in files if name.endswith(".py")]
    return sorted(found, key=lambda path: _name_hash(path.relative_to(source)))


def _is_excluded(folder: str) -> bool:
    """Return whether a folder holds installed packages or tests."""
    return folder.endswith("-packages") or not {"test", "tests", "lib2to3"}.isdisjoint(folder.split("_"))


def is_validation(name: Path) -> bool:
    """Return whether a file of the built-in corpus is for validation; only its own name decides."""
    return _name_hash(name)[0] % VALIDATION_SHARE == 0


def _name_hash(name: Path) -> bytes:
    return hashlib.sha256(name.as_posix().encode()).digest()


def token_pieces(documents: Iterable[Path], tokenizer: Tokenizer) -> Iterator[Tokens]:
    """Yield the tokens of files, END_OF_TEXT before each. Raises UserError if one cannot be read."""
    for path in documents:
        yield np.array([END_OF_TEXT], dtype=TOKEN)
        try:
            yield from tokenizer.encode_blocks([path.read_bytes()])
        except OSError as error:
            raise cannot_read(path, error) from error


def download_fineweb(
    num_shards: int, folder: Path = Path("data/fineweb10B"), print_line: Callable[[str], None] = print
) -> tuple[str, str]:
    """Download FineWeb's validation shard and its first `num_shards` training shards; return their globs.

    Complete files are kept, and downloads that were interrupted are continued. Raises UserError if one fails.
    """
    if not 1 <= num_shards <= FINEWEB_SHARDS:
        raise UserError(f"--shards {num_shards}: FineWeb has 1 to {FINEWEB_SHARDS} of them, 100 million tokens each")
    names = ["fineweb_val_000000.bin", *(f"fineweb_train_{index:06d}.bin" for index in range(1, num_shards + 1))]
    for done, name in enumerate(names, 1):
        path = folder / name
        if not _is_whole(path):
            print_line(f"downloading {name} ({done} of {len(names)})")
            _download(name, folder)
            Shard.open(path)
    return shard_globs(folder, "fineweb")


def _is_whole(path: Path) -> bool:
    """Return whether a file is a shard of the size that its header says."""
    try:
        Shard.open(path)
    except UserError:
        return False
    return True


def _download(name: str, folder: Path) -> None:
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise UserError("downloads need huggingface_hub: pip install huggingface_hub") from error
    try:
        # A damaged file needs force_download: by the hub's own record of the folder it may be complete.
        damaged = (folder / name).exists()
        hf_hub_download(FINEWEB, name, repo_type="dataset", local_dir=folder, force_download=damaged)
    except Exception as error:  # of any class that the hub, its HTTP client and the disk have
        raise UserError(
            f"cannot download {name} of {FINEWEB} ({describe_error(error)}); the same command continues the download"
        ) from error
