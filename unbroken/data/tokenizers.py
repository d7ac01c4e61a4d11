"""Text to tokens and back: bytes, or GPT-2 byte pairs."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from unbroken.data.shards import Tokens
from unbroken.errors import UserError, describe_error

if TYPE_CHECKING:
    import tiktoken


END_OF_TEXT = 50256  # stands in front of every document, as in GPT-2's own training data
BPE_FOLDER = Path("data/gpt2_bpe")
BPE_FILES = {  # the SHA-256 that tiktoken itself expects of OpenAI's two files
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}

# How GPT-2 splits text into words before it merges bytes; the possessive quantifiers are tiktoken's.
GPT2_WORDS = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""

Encode = Callable[[Iterable[bytes]], Iterator[Tokens]]  # the blocks of one document -> its tokens


def encode_bytes(blocks: Iterable[bytes]) -> Iterator[Tokens]:
    """Every byte a token, 0 to 255."""
    for block in blocks:
        yield np.frombuffer(block, dtype=np.uint8).astype(np.uint16)


def encode_gpt2(bpe_folder: Path | None = None) -> Encode:
    """GPT-2's byte-pair encoding by tiktoken; its files: in `bpe_folder`, else in BPE_FOLDER, else fetched."""
    gpt2 = load_gpt2(bpe_folder, " or --bpe_dir, or use --tokenizer bytes")

    def tokens(text: str) -> Tokens:
        return np.asarray(gpt2.encode_to_numpy(text, disallowed_special=())).astype(np.uint16)

    def encode(blocks: Iterable[bytes]) -> Iterator[Tokens]:
        decoder = codecs.getincrementaldecoder("utf-8")()
        rest = ""
        for block in blocks:
            rest += decoder.decode(block)
            cut = safe_cut(rest)
            yield tokens(rest[:cut])
            rest = rest[cut:]
        yield tokens(rest + decoder.decode(b"", final=True))

    return encode


def safe_cut(text: str) -> int:
    """Where text may be cut without changing its tokens: before the last white space after a word, else 0.

    GPT-2 first splits text into words, and none of those words has white space after anything else.
    """
    last = re.match(r"(?s).*\S(?=[ \n])", text)
    return last.end() if last else 0


def load_gpt2(bpe_folder: Path | None, other_ways: str = "") -> tiktoken.Encoding:
    """GPT-2's tokenizer; a UserError, with `other_ways` at its end, if it is not to be had."""
    try:
        import tiktoken
        from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    except ImportError as error:
        raise UserError("GPT-2 tokens need tiktoken: pip install tiktoken") from error
    if bpe_folder and not has_bpe(bpe_folder):
        raise UserError(f"{bpe_folder} does not hold GPT-2's {' and '.join(BPE_FILES)}")
    folder = bpe_folder or (BPE_FOLDER if has_bpe(BPE_FOLDER) else None)
    try:
        if folder is None:
            return tiktoken.get_encoding("gpt2")
        ranks = data_gym_to_mergeable_bpe_ranks(
            vocab_bpe_file=str(folder / "vocab.bpe"),
            encoder_json_file=str(folder / "encoder.json"),
            vocab_bpe_hash=BPE_FILES["vocab.bpe"],
            encoder_json_hash=BPE_FILES["encoder.json"],
        )
    except Exception as error:  # whatever tiktoken's HTTP client and cache raise
        raise UserError(
            f"GPT-2's vocabulary cannot be read ({describe_error(error)}): put OpenAI's {' and '.join(BPE_FILES)}"
            f" into {BPE_FOLDER}{other_ways}"
        ) from error
    special = {"<|endoftext|>": END_OF_TEXT}
    return tiktoken.Encoding("gpt2", pat_str=GPT2_WORDS, mergeable_ranks=ranks, special_tokens=special)


def has_bpe(folder: Path) -> bool:
    """Whether OpenAI's two files are there."""
    return all((folder / name).is_file() for name in BPE_FILES)


NUM_BYTES = 256


def byte_codec() -> tuple[Callable[[str], list[int]], Callable[[int], bytes]]:
    """Text to tokens, and a token to its bytes, where a token is a byte."""
    return lambda text: list(text.encode("utf-8", "surrogateescape")), lambda token: bytes([token])


def gpt2_codec() -> tuple[Callable[[str], list[int]], Callable[[int], bytes]]:
    """The same for GPT-2's tokens."""
    gpt2 = load_gpt2(None)
    return lambda text: gpt2.encode(text, disallowed_special=()), gpt2.decode_single_token_bytes
