"""The table of tokenizers: text to tokens for shards and prompts, tokens back to text. Another one is an entry here.

The name of an entry is what `--tokenizer` takes, what the header of a shard says, and what a checkpoint remembers.
"""

from __future__ import annotations

import codecs
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from unbroken.data.shards import TOKEN, Tokens
from unbroken.errors import UserError, describe_error

if TYPE_CHECKING:
    import tiktoken

END_OF_TEXT = 50256  # comes before every document, as in GPT-2's own training data
END_OF_TEXT_NAME = "<|endoftext|>"
NUM_BYTES = 256
BPE_FOLDER = Path("data/gpt2_bpe")
BPE_FILES = {  # the SHA-256 that tiktoken itself expects of OpenAI's two files
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}

# How GPT-2 splits text into words before it merges bytes; the possessive quantifiers are tiktoken's.
GPT2_WORDS = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


class Tokenizer(ABC):
    """Text to tokens and back. `ids` are the tokens that stand for text."""

    ids: range

    def __init__(self, folder: Path | None = None) -> None:
        """Load the tokenizer; its files, if it has any, are in `folder`. Raises UserError if they cannot be read."""
        self.folder = folder

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text. The text of END_OF_TEXT_NAME is text."""

    @abstractmethod
    def encode_blocks(self, blocks: Iterable[bytes]) -> Iterator[Tokens]:
        """Yield the tokens of a document that is read in blocks; where they are cut makes no difference.

        Raises UnicodeDecodeError for a document that the tokenizer cannot take.
        """

    @abstractmethod
    def decode(self, token: int) -> bytes:
        """Return the bytes that a token of `ids` stands for."""

    @classmethod
    @abstractmethod
    def to_huggingface(cls, folder: Path | None = None) -> Any:
        """Return the same tokenizer as a `tokenizers.Tokenizer`, from files in `folder` if it has any.

        Raises UserError if it cannot be made.
        """


class ByteTokenizer(Tokenizer):
    """Every byte of UTF-8 is a token, 0 to 255."""

    ids = range(NUM_BYTES)

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", "surrogateescape"))  # as Python decodes a command line that is not UTF-8

    def encode_blocks(self, blocks: Iterable[bytes]) -> Iterator[Tokens]:
        for block in blocks:
            yield np.frombuffer(block, dtype=np.uint8).astype(TOKEN)

    def decode(self, token: int) -> bytes:
        return bytes([token])

    @classmethod
    def to_huggingface(cls, folder: Path | None = None) -> Any:
        from tokenizers import Tokenizer, models

        vocabulary = {letter: byte for byte, letter in _letters().items()}
        return _of_bytes(Tokenizer(models.BPE({**vocabulary, END_OF_TEXT_NAME: END_OF_TEXT}, [])), use_regex=False)


class GPT2Tokenizer(Tokenizer):
    """GPT-2's byte-pair encoding, by tiktoken; see `load_gpt2`."""

    ids = range(END_OF_TEXT)

    def __init__(self, folder: Path | None = None) -> None:
        super().__init__(folder)
        self._encoding = load_gpt2(folder)

    def encode(self, text: str) -> list[int]:
        return self._encoding.encode(text, disallowed_special=())

    def encode_blocks(self, blocks: Iterable[bytes]) -> Iterator[Tokens]:
        decoder = codecs.getincrementaldecoder("utf-8")()
        rest = ""
        for block in blocks:
            rest += decoder.decode(block)
            cut = safe_cut(rest)
            yield self._encode_array(rest[:cut])
            rest = rest[cut:]
        yield self._encode_array(rest + decoder.decode(b"", final=True))

    def decode(self, token: int) -> bytes:
        return self._encoding.decode_single_token_bytes(token)

    def _encode_array(self, text: str) -> Tokens:
        return np.asarray(self._encoding.encode_to_numpy(text, disallowed_special=())).astype(TOKEN)

    @classmethod
    def to_huggingface(cls, folder: Path | None = None) -> Any:
        from tokenizers import Tokenizer, models

        folder = _bpe_folder(folder)
        if folder is not None:
            made = Tokenizer(models.BPE.from_file(*(str(folder / name) for name in BPE_FILES)))
        else:
            try:
                made = Tokenizer.from_pretrained("openai-community/gpt2")
            except Exception as error:  # of any class that the hub's client has
                raise UserError(
                    f"GPT-2's tokenizer cannot be fetched ({describe_error(error)}): put OpenAI's"
                    f" {' and '.join(BPE_FILES)} into {BPE_FOLDER}, or type --tokenizer none"
                ) from None
        return _of_bytes(made, use_regex=True)


TOKENIZERS: dict[str, type[Tokenizer]] = {"bytes": ByteTokenizer, "gpt2": GPT2Tokenizer}


def safe_cut(text: str) -> int:
    """Return where text can be cut without changing its tokens: before the last white space after a word, else 0.

    GPT-2 first splits text into words, and in none of them white space follows anything else.
    """
    last = re.match(r"(?s).*\S(?=[ \n])", text)
    return last.end() if last else 0


def load_gpt2(bpe_folder: Path | None = None) -> tiktoken.Encoding:
    """Return GPT-2's encoding from a folder, else from BPE_FOLDER if its files are there, else from the network.

    Raises UserError if it cannot be read.
    """
    try:
        import tiktoken
        from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    except ImportError as error:
        raise UserError("GPT-2 tokens need tiktoken: pip install tiktoken") from error
    folder = _bpe_folder(bpe_folder)
    try:
        if folder is None:
            return tiktoken.get_encoding("gpt2")
        ranks = data_gym_to_mergeable_bpe_ranks(
            vocab_bpe_file=str(folder / "vocab.bpe"),
            encoder_json_file=str(folder / "encoder.json"),
            vocab_bpe_hash=BPE_FILES["vocab.bpe"],
            encoder_json_hash=BPE_FILES["encoder.json"],
        )
    except Exception as error:  # of any class that tiktoken's HTTP client and cache have
        raise UserError(
            f"GPT-2's vocabulary cannot be read ({describe_error(error)}): put OpenAI's {' and '.join(BPE_FILES)}"
            f" into {BPE_FOLDER}; or type --bpe_dir, or --tokenizer bytes"
        ) from error
    special = {END_OF_TEXT_NAME: END_OF_TEXT}
    return tiktoken.Encoding("gpt2", pat_str=GPT2_WORDS, mergeable_ranks=ranks, special_tokens=special)


def _bpe_folder(typed: Path | None) -> Path | None:
    """Return the folder with OpenAI's two files: the typed one, else BPE_FOLDER; None: the network has them."""
    folder = typed or BPE_FOLDER
    if all((folder / name).is_file() for name in BPE_FILES):
        return folder
    if typed:
        raise UserError(f"{typed} does not hold GPT-2's {' and '.join(BPE_FILES)}")
    return None


def _of_bytes(made: Any, use_regex: bool) -> Any:
    """Return a `tokenizers.Tokenizer` that maps bytes to the letters of its vocabulary, with the end of text added."""
    from tokenizers import decoders, pre_tokenizers

    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([END_OF_TEXT_NAME])
    return made


def _letters() -> dict[int, str]:
    """Return GPT-2's printable letter for each byte: the byte's own if it is visible, else one from 256 on."""
    visible = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(NUM_BYTES) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + number) for number, byte in enumerate(hidden)}
