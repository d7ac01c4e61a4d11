"""The table of tokenizers: text to tokens for shards and prompts, tokens back to text. Another one is an entry here.

`--tokenizer`, the header of a shard and a checkpoint use the name of an entry. Any `tokenizer.json` can be used by
its path; `choose` takes both.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from unbroken.data.shards import TOKEN, Tokens
from unbroken.errors import UserError, cannot_read, describe_error
from unbroken.files import read_whole

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

JSON_FILE = "tokenizer.json"
MAX_JSON_BYTES = 1 << 28
# What other tokenizers call the end of a text, where no tokenizer_config.json beside them says.
END_NAMES = (END_OF_TEXT_NAME, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "[SEP]")
PIECE_CHARACTERS = 1 << 20  # of a document are in memory at once

# How GPT-2 splits text into words before it merges bytes; the possessive quantifiers are tiktoken's.
GPT2_WORDS = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


class Tokenizer(ABC):
    """A tokenizer: text to tokens and back.

    `ids` are the tokens that stand for text, `end_of_text` the one before every document, called `end_name`. `files`
    are the SHA-256 of the tokenizer's files, by name.
    """

    name: str
    ids: Sequence[int]
    vocab_size = END_OF_TEXT + 1
    end_of_text = END_OF_TEXT
    end_name = END_OF_TEXT_NAME
    files: dict[str, str] = {}  # noqa: RUF012 - replaced, never changed

    def __init__(self, folder: Path | None = None) -> None:
        """Load the tokenizer; its files, if it has any, are in `folder`. Raises UserError if they cannot be read."""
        self.folder = folder

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text. The text of a special token is text."""

    def encode_piece(self, piece: bytes) -> Tokens:
        """Return the tokens of one of `pieces`. Raises UnicodeDecodeError."""
        return np.asarray(self.encode(piece.decode())).astype(TOKEN)

    def pieces(self, blocks: Iterable[bytes]) -> Iterator[bytes]:
        """Yield the pieces in which a document is encoded; how it is cut into blocks makes no difference.

        A document of at most PIECE_CHARACTERS is one piece. Raises UnicodeDecodeError if it is not UTF-8.
        """
        decoder, rest = codecs.getincrementaldecoder("utf-8")(), ""
        for block in blocks:
            rest += decoder.decode(block)
            while len(rest) > PIECE_CHARACTERS:
                cut = self.find_cut(rest[: PIECE_CHARACTERS + 1]) or PIECE_CHARACTERS
                yield rest[:cut].encode()
                rest = rest[cut:]
        yield (rest + decoder.decode(b"", final=True)).encode()

    def find_cut(self, text: str) -> int:
        """Return where to cut a text that goes on, before its last character: after its last line, else 0."""
        return text.rfind("\n", 0, len(text) - 1) + 1

    def encode_blocks(self, blocks: Iterable[bytes]) -> Iterator[Tokens]:
        """Yield the tokens of a document that is read in blocks; where they are cut makes no difference.

        Raises UnicodeDecodeError for a document that the tokenizer cannot take.
        """
        yield from map(self.encode_piece, self.pieces(blocks))

    @abstractmethod
    def decode(self, token: int) -> bytes:
        """Return the bytes that a token of `ids` stands for."""

    @classmethod
    @abstractmethod
    def to_huggingface(cls, folder: Path | None = None) -> Any:
        """Return this tokenizer as a `tokenizers.Tokenizer`, from files in `folder` if it has any.

        Raises UserError if it cannot be made.
        """

    @classmethod
    def end_of(cls, folder: Path | None = None) -> tuple[int, str]:
        """Return `end_of_text` and `end_name` of the tokenizer in `folder`. Raises UserError."""
        return cls.end_of_text, cls.end_name


class ByteTokenizer(Tokenizer):
    """A tokenizer for which each byte of UTF-8 is a token, 0 to 255."""

    name = "bytes"
    ids = range(NUM_BYTES)

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", "surrogateescape"))  # as Python decodes a command line that is not UTF-8

    def encode_piece(self, piece: bytes) -> Tokens:
        return np.frombuffer(piece, dtype=np.uint8).astype(TOKEN)

    def pieces(self, blocks: Iterable[bytes]) -> Iterator[bytes]:
        yield from blocks

    def decode(self, token: int) -> bytes:
        return bytes([token])

    @classmethod
    def to_huggingface(cls, folder: Path | None = None) -> Any:
        from tokenizers import Tokenizer, models

        vocabulary = {letter: byte for byte, letter in _letters().items()}
        return _of_bytes(Tokenizer(models.BPE({**vocabulary, END_OF_TEXT_NAME: END_OF_TEXT}, [])), use_regex=False)


class GPT2Tokenizer(Tokenizer):
    """A tokenizer for GPT-2's byte-pair encoding, by tiktoken; see `load_gpt2`."""

    name = "gpt2"
    ids = range(END_OF_TEXT)
    files = BPE_FILES

    def __init__(self, folder: Path | None = None) -> None:
        super().__init__(folder)
        self._encoding = load_gpt2(folder)

    def encode(self, text: str) -> list[int]:
        return self._encoding.encode(text, disallowed_special=())

    def encode_piece(self, piece: bytes) -> Tokens:
        return np.asarray(self._encoding.encode_to_numpy(piece.decode(), disallowed_special=())).astype(TOKEN)

    def find_cut(self, text: str) -> int:
        return safe_cut(text)

    def decode(self, token: int) -> bytes:
        return self._encoding.decode_single_token_bytes(token)

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
                    f"GPT-2's tokenizer cannot be downloaded ({describe_error(error)}): put OpenAI's"
                    f" {' and '.join(BPE_FILES)} into {BPE_FOLDER}, or type --tokenizer none"
                ) from None
        return _of_bytes(made, use_regex=True)


class JsonTokenizer(Tokenizer):
    """A `tokenizer.json` of Hugging Face; `folder` is the file. The name ends with 8 digits of the file's SHA-256."""

    def __init__(self, folder: Path | None = None) -> None:
        super().__init__(folder)
        assert folder is not None
        content, self._made = _read_json(folder)
        digest = hashlib.sha256(content).hexdigest()
        self.files = {folder.name: digest}
        self.name = f"{_stem(folder)}-{digest[:8]}"
        vocabulary = self._made.get_vocab()
        self.vocab_size = max(vocabulary.values(), default=0) + 1
        self.end_of_text, self.end_name = _end_of(self._made, folder)
        special = {token for token, added in self._made.get_added_tokens_decoder().items() if added.special}
        self.ids = sorted(set(vocabulary.values()) - special)
        self._bytes = {letter: byte for byte, letter in _letters().items()} if b'"ByteLevel"' in content else {}

    def encode(self, text: str) -> list[int]:
        return list(self._made.encode(text, add_special_tokens=False).ids)

    def decode(self, token: int) -> bytes:
        text = self._made.id_to_token(token) or ""
        if self._bytes and all(letter in self._bytes for letter in text):
            return bytes(self._bytes[letter] for letter in text)
        if found := re.fullmatch(r"<0x([0-9A-F]{2})>", text):
            return bytes([int(found[1], 16)])
        return text.replace("▁", " ").encode()

    @classmethod
    def to_huggingface(cls, folder: Path | None = None) -> Any:
        assert folder is not None
        from tokenizers import Tokenizer

        _read_json(folder)
        return Tokenizer.from_file(str(folder))

    @classmethod
    def end_of(cls, folder: Path | None = None) -> tuple[int, str]:
        assert folder is not None
        return _end_of(_read_json(folder)[1], folder)


TOKENIZERS: dict[str, type[Tokenizer]] = {each.name: each for each in (ByteTokenizer, GPT2Tokenizer)}


class TokenizerNames(tuple[str, ...]):
    """A tuple of the choices of a flag, which completion offers; it also contains any existing path."""

    also = f"the path of a {JSON_FILE} or of its folder"

    def __contains__(self, word: object) -> bool:
        return super().__contains__(word) or (isinstance(word, str) and Path(word).exists())


def choose(typed: str, bpe_dir: Path | None = None) -> tuple[type[Tokenizer], Path | None]:
    """Return the tokenizer that a flag names, and the place of its files, for its constructor.

    `typed` is a name in TOKENIZERS, a `tokenizer.json`, or a folder with one or with GPT-2's files. Raises UserError.
    """
    if typed in TOKENIZERS:
        return TOKENIZERS[typed], bpe_dir
    path = Path(typed)
    if path.is_dir() and all((path / name).is_file() for name in BPE_FILES):
        return GPT2Tokenizer, path
    path = path / JSON_FILE if path.is_dir() else path
    if not path.is_file():
        raise UserError(
            f"--tokenizer {typed}: there is no {JSON_FILE}; type {', '.join(TOKENIZERS)}, a {JSON_FILE}, or a folder"
            f" with one or with GPT-2's {' and '.join(BPE_FILES)}"
        )
    return JsonTokenizer, path


def find_named(name: str, folders: Iterable[Path]) -> str:
    """Return the tokenizer that the header of a shard names, as `choose` takes it; "" if it is not here.

    It is one of TOKENIZERS, or a `tokenizer.json` that `data text` left beside its shards, in one of `folders`.
    """
    if name in TOKENIZERS:
        return name
    for path in [each for folder in folders for each in sorted(folder.glob(f"*.{JSON_FILE}"))]:
        with suppress(OSError):
            if hashlib.sha256(read_whole(path, MAX_JSON_BYTES)).hexdigest()[:8] == name.rpartition("-")[2]:
                return str(path)
    return ""


def _read_json(path: Path) -> tuple[bytes, Any]:
    """Return the bytes of a `tokenizer.json` and the tokenizer that they make. Raises UserError."""
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise UserError(f'{path} needs tokenizers: pip install "unbroken[data]"') from error
    try:
        content = read_whole(path, MAX_JSON_BYTES)
    except OSError as error:
        raise cannot_read(path, error) from error
    try:
        made = Tokenizer.from_str(content.decode())
    except Exception as error:  # of any class: the library raises plain Exception
        raise UserError(f"{path} is no {JSON_FILE} ({describe_error(error)}); check the path") from error
    made.no_truncation()
    made.no_padding()
    made.encode_special_tokens = True  # the text of a special token is text
    return content, made


def _end_of(made: Any, path: Path) -> tuple[int, str]:
    """Return the token at the end of a text and its name. Raises UserError if the files name none."""
    names: list[str] = []
    try:
        end = json.loads(read_whole(path.with_name("tokenizer_config.json"), MAX_JSON_BYTES))["eos_token"]
        names.append(end["content"] if isinstance(end, dict) else end)
    except (OSError, ValueError, KeyError, TypeError):
        names += END_NAMES
    for name in names:
        if isinstance(name, str) and (token := made.token_to_id(name)) is not None:
            return int(token), name
    raise UserError(
        f"{path}: no end-of-text token among {', '.join(map(str, names))}; name it as eos_token in the"
        " tokenizer_config.json beside it"
    )


def _stem(path: Path) -> str:
    """Return a name for a tokenizer: its folder's for a `tokenizer.json`, else the file's; in letters of a header."""
    stem = path.resolve().parent.name if path.name == JSON_FILE else path.name.removesuffix(".json")
    return re.sub(r"[^A-Za-z0-9_.+-]", "_", stem)[:40] or "tokenizer"


def safe_cut(text: str) -> int:
    """Return where text can be cut without changing its tokens: before the last white space after a word, else 0.

    GPT-2 first splits text into words, and a word has white space only at its beginning.
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
        reason = describe_error(error) if folder else f"its download: {type(error).__name__}"
        raise UserError(
            f"GPT-2's vocabulary cannot be read ({reason}): put OpenAI's {' and '.join(BPE_FILES)}"
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
