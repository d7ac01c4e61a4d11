"""Documents for shards: text files, JSON lines, Parquet and Arrow files, read in pieces from any place on.

A place in a source is one integer: bytes of its (decompressed) content, or rows of a table. Reading that begins at the
end of a piece yields the same pieces as reading from the start, so interrupted work continues with the same tokens.
"""

from __future__ import annotations

import glob
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from unbroken.data.shards import TOKEN, Tokens
from unbroken.data.tokenizers import Tokenizer
from unbroken.errors import UserError, cannot_read, describe_error
from unbroken.files import regular

TEXT, LINES, PARQUET, ARROW = "text", "lines", "parquet", "arrow"
KINDS = {".txt": TEXT, ".jsonl": LINES, ".parquet": PARQUET, ".arrow": ARROW}  # of the files in a folder
COMPRESSIONS = (".gz", ".zst")
EXTRA = 'pip install "unbroken[data]"'

BLOCK_BYTES = 1 << 20
COMPRESSED_BYTES = 1 << 14  # read at once: the decompressed content may be a thousand times as large
MAX_LINE_BYTES = 1 << 28


class BadDocument(Exception):
    """An error: a document is no text. `index` is its number in its piece, from 0; `reason` says what is wrong."""

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(reason)
        self.index, self.reason = index, reason


@dataclass(frozen=True)
class Source:
    """A file of documents: a text, one JSON object a line, or a table."""

    path: Path
    kind: str
    compression: str  # "", ".gz" or ".zst"
    size: int  # bytes on disk
    changed: int  # st_mtime_ns


@dataclass(frozen=True)
class Span:
    """The content of a source from `start` to `end` - 1, None for its end, in bytes or rows."""

    source: Source
    start: int = 0
    end: int | None = None


@dataclass(frozen=True)
class Piece:
    """A piece that is encoded at once: documents, or a part of one."""

    source: Source
    start: int  # place in the source
    end: int
    read: int  # bytes of the file that were read for it
    content: bytes | list[bytes | None]  # a part of a text, whole lines, or cells of a table
    begins: bool = False  # whether a text begins here


def find_sources(typed: Sequence[Path]) -> list[Source]:
    """Return the sources in `typed`: files, globs, and folders, with all files of KINDS below them, sorted.

    Raises UserError.
    """
    return [_source(path) for each in typed for path in _files(each)]


def _files(typed: Path) -> list[Path]:
    if typed.is_dir():
        return _files_of_folder(typed)
    if not typed.exists() and glob.has_magic(str(typed)):
        found = sorted(Path(name) for name in glob.glob(str(typed), recursive=True) if not os.path.isdir(name))
        if not found:
            raise UserError(f"no file matches {typed}; check the path")
        return found
    return [typed]


def _files_of_folder(folder: Path) -> list[Path]:
    """Return the files of KINDS below a folder, without hidden ones; for a saved dataset the files that it lists."""
    if (folder / "dataset_dict.json").is_file():
        raise UserError(f"{folder} holds several splits of a dataset; type the folder of one, as {folder / 'train'}")
    try:
        saved = json.loads((folder / "state.json").read_bytes())["_data_files"]
        return [folder / each["filename"] for each in saved]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    found = []
    for place, names, files in os.walk(folder):
        names[:] = [name for name in names if not name.startswith(".")]
        found += [Path(place, name) for name in files if not name.startswith(".") and _kind(Path(name))[0]]
    if not found:
        raise UserError(f"{folder} holds no file with {', '.join(KINDS)}; type the files themselves")
    return sorted(found)


def _kind(path: Path) -> tuple[str, str]:
    """Return kind and compression by a file's name; the kind is "" for an unknown one."""
    compression = path.suffix if path.suffix in COMPRESSIONS else ""
    inner = Path(path.stem) if compression else path
    if compression and inner.suffix == ".json":  # C4 and others name JSON lines so
        return LINES, compression
    kind = KINDS.get(inner.suffix, "")
    return ("", "") if compression and kind in (PARQUET, ARROW) else (kind, compression)


def _source(path: Path) -> Source:
    try:
        found = path.stat()
    except OSError as error:
        raise cannot_read(path, error) from error
    if not path.is_file():
        raise UserError(f"{path} is not a file; type the text files themselves")
    kind, compression = _kind(path)
    return Source(path, kind or TEXT, compression, found.st_size, found.st_mtime_ns)


def split_sources(sources: Sequence[Source], val_percent: float) -> tuple[list[Span], list[Span]]:
    """Return the spans for training and for validation; the latter are the last `val_percent` of all bytes on disk.

    A text or a file of lines is cut at the end of a line, a table between two rows. Raises UserError.
    """
    left = int(sum(source.size for source in sources) * (100 - val_percent) / 100)
    train, val = [], []
    for source in sources:
        if left >= source.size:
            train += [Span(source)] if source.size else []
        elif left <= 0:
            val.append(Span(source))
        else:
            cut, end = _cut(source, left)
            train += [Span(source, 0, cut)] if cut > 0 else []
            val += [Span(source, cut)] if cut < end else []
        left -= source.size
    return train, val


def _cut(source: Source, left: int) -> tuple[int, int]:
    """Return the place after about `left` bytes on disk at which a source is cut, and its end."""
    if source.kind in (PARQUET, ARROW):
        with _readable(source):
            rows = _count_rows(source)
        return rows * left // source.size, rows
    end = source.size
    if source.compression:
        end = sum(len(block) for block in _blocks(source, 0, None, _nothing))
    place = offset = end * left // source.size
    for block in _blocks(source, offset, None, _nothing):
        line = block.find(b"\n")
        if line >= 0:
            return place + line + 1, end
        place += len(block)
    return end, end


def read_pieces(span: Span, tokenizer: Tokenizer, field: str, start: int | None = None) -> Iterator[Piece]:
    """Yield a span in pieces. Raises UserError.

    Args:
        span: The span.
        tokenizer: Decides where a text is cut.
        field: The column of a table.
        start: Where an earlier piece of the span ended; None: at its start.
    """
    source, place = span.source, span.start if start is None else start
    read = [0]

    def taken() -> int:
        count, read[0] = read[0], 0
        return count

    def count(more: int) -> None:
        read[0] += more

    if source.kind in (PARQUET, ARROW):
        with _readable(source):
            for cells in _cells(source, field, place, span.end, count):
                yield Piece(source, place, place + len(cells), taken(), cells)
                place += len(cells)
        return
    blocks = _blocks(source, place, span.end, count)
    pieces = _whole_lines(source, blocks) if source.kind == LINES else tokenizer.pieces(blocks)
    try:
        for content in pieces:
            if content:
                yield Piece(source, place, place + len(content), taken(), content, place == span.start)
            place += len(content)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{source.path} is not UTF-8 text ({error.reason} in line {_bad_line(source)}); use --tokenizer bytes"
        ) from error


def encode_piece(piece: Piece, tokenizer: Tokenizer, field: str, skip_bad: bool) -> tuple[Tokens, int, int]:
    """Return a piece's tokens, the number of its documents, and of the bad documents that were left out.

    Args:
        piece: The piece.
        tokenizer: Encodes it.
        field: The field or column with the text.
        skip_bad: Whether to leave out documents that are no text.

    Raises UserError, with file and line, for a document that is no text, unless `skip_bad`.
    """
    begin = np.array([tokenizer.end_of_text], dtype=TOKEN)
    if piece.source.kind == TEXT:
        assert isinstance(piece.content, bytes)
        tokens = tokenizer.encode_piece(piece.content)
        return (np.concatenate([begin, tokens]) if piece.begins else tokens), int(piece.begins), 0
    found: list[Tokens] = []
    documents = skipped = 0
    lines = piece.content.split(b"\n") if isinstance(piece.content, bytes) else piece.content
    for index, content in enumerate(lines):
        try:
            text = _text_of(index, content, field, piece.source.kind)
            encoded = list(tokenizer.encode_blocks([text])) if text else []
        except (BadDocument, UnicodeDecodeError) as error:
            if not skip_bad:
                reason = error.reason if isinstance(error, BadDocument) else f"invalid UTF-8 ({error.reason})"
                raise UserError(f"{_where(piece, index)}: {reason}; correct it, or type --skip_bad") from error
            skipped += 1
            continue
        if text:
            found += [begin, *encoded]
            documents += 1
    return (np.concatenate(found) if found else begin[:0]), documents, skipped


def _text_of(index: int, content: bytes | None, field: str, kind: str) -> bytes:
    """Return the text of a line or a cell in UTF-8; empty for an empty line. Raises BadDocument, UnicodeDecodeError."""
    if kind != LINES:
        if content is None:
            raise BadDocument(index, f"no text in column {field!r}")
        content.decode()
        return content
    assert content is not None
    if not content.strip():
        return b""
    try:
        values = json.loads(content.decode())
    except UnicodeDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        raise BadDocument(index, f"invalid JSON ({describe_error(error)})") from error
    if not isinstance(values, dict) or field not in values:
        names = ", ".join(list(values)[:8]) if isinstance(values, dict) else type(values).__name__
        raise BadDocument(index, f"no field {field!r} (it has {names}); type --field NAME")
    if not isinstance(values[field], str):
        raise BadDocument(index, f"the field {field!r} is no text")
    try:
        return bytes(values[field].encode())
    except UnicodeEncodeError as error:
        raise BadDocument(index, f"invalid UTF-8 in the field {field!r} (half of a surrogate pair)") from error


def _where(piece: Piece, index: int) -> str:
    """Return a bad document's file with its line or row, from 1 on."""
    if piece.source.kind != LINES:
        return f"{piece.source.path}, row {piece.start + index + 1}"
    before = sum(block.count(b"\n") for block in _blocks(piece.source, 0, piece.start, _nothing))
    return f"{piece.source.path}, line {before + index + 1}"


def _bad_line(source: Source) -> int:
    """Return the first line of a text that is not UTF-8, from 1 on."""
    before = 0
    for lines in _whole_lines(source, _blocks(source, 0, None, _nothing)):
        try:
            lines.decode()
        except UnicodeDecodeError as error:
            return before + lines[: error.start].count(b"\n") + 1
        before += lines.count(b"\n")
    return before


# ---- bytes


def _nothing(_: int) -> None:
    """Ignore the number of bytes that were read."""


@contextmanager
def _readable(source: Source) -> Iterator[None]:
    """Turn the errors of reading into UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # OSError, zlib.error, EOFError, and the classes of zstandard and pyarrow
        if isinstance(error, OSError) and error.strerror:
            raise cannot_read(source.path, error) from error
        if not isinstance(error, (OSError, EOFError, zlib.error)) and type(error).__module__.partition(".")[0] not in (
            *("pyarrow", "zstandard", "zstd", "compression", "_zstd"),
        ):
            raise
        raise UserError(f"cannot read {source.path}: {describe_error(error)}; check the file") from error


def _blocks(source: Source, start: int, end: int | None, count: Callable[[int], None]) -> Iterator[bytes]:
    """Yield the content from `start` to `end` - 1 in blocks; call `count` with the bytes of the file that it took."""
    place = 0

    def count_behind(more: int) -> None:
        if place >= start:
            count(more)

    with _readable(source), open(source.path, "rb", opener=regular) as file:
        if source.compression:
            raw = _decompress(source, file, count_behind)
        else:
            raw, place = _read(file, BLOCK_BYTES, count), file.seek(start)
        for block in raw:
            first, place = place, place + len(block)
            chosen = block[max(0, start - first) : None if end is None else max(0, end - first)]
            if chosen:
                yield chosen
            if end is not None and place >= end:
                return


def _read(file: BinaryIO, size: int, count: Callable[[int], None]) -> Iterator[bytes]:
    while block := file.read(size):
        count(len(block))
        yield block


def _decompress(source: Source, file: BinaryIO, count: Callable[[int], None]) -> Iterator[bytes]:
    """Yield the decompressed content of a file in blocks of about BLOCK_BYTES. Raises EOFError if it was cut off."""
    make = _decompressor(source)
    decompressor, ended, gathered, size = make(), True, list[bytes](), 0
    for raw in _read(file, COMPRESSED_BYTES, count):
        while raw:
            if ended:  # several streams one after the other are one
                raw = raw.lstrip(b"\0") if source.compression == ".gz" else raw
                decompressor, ended = make(), False
                continue
            gathered.append(decompressor.decompress(raw))
            size += len(gathered[-1])
            ended = decompressor.eof
            raw = decompressor.unused_data if ended else b""
        if size >= BLOCK_BYTES:
            yield b"".join(gathered)
            gathered, size = [], 0
    if not ended:
        raise EOFError("it is cut off")
    yield b"".join(gathered)


def _decompressor(source: Source) -> Callable[[], Any]:
    """Return a constructor of objects with `decompress`, `eof` and `unused_data`."""
    if source.compression == ".gz":
        return lambda: zlib.decompressobj(31)
    try:
        from compression.zstd import ZstdDecompressor  # type: ignore[import-not-found, unused-ignore]  # Python 3.14

        return lambda: ZstdDecompressor()
    except ImportError:
        pass
    try:
        import zstandard
    except ImportError as error:
        raise UserError(f"{source.path} needs zstandard: {EXTRA}") from error
    return lambda: zstandard.ZstdDecompressor().decompressobj()


def _whole_lines(source: Source, blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the blocks cut at the end of a line. Raises UserError for a line that is too long."""
    rest = b""
    for block in blocks:
        rest += block
        cut = rest.rfind(b"\n") + 1
        if cut:
            yield rest[:cut]
            rest = rest[cut:]
        elif len(rest) > MAX_LINE_BYTES:
            raise UserError(f"{source.path} has a line of more than {MAX_LINE_BYTES:,} bytes; is it JSON lines?")
    yield rest


# ---- tables


def _pyarrow(source: Source) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{source.path} needs pyarrow: {EXTRA}") from error
    return pyarrow


def _count_rows(source: Source) -> int:
    """Return the rows of a table."""
    pyarrow = _pyarrow(source)
    if source.kind == PARQUET:
        return int(pyarrow.parquet.read_metadata(source.path).num_rows)
    return sum(batch.num_rows for batch in _arrow_batches(source))


def _cells(
    source: Source, field: str, start: int, end: int | None, count: Callable[[int], None]
) -> Iterator[list[bytes | None]]:
    """Yield the cells of a column from row `start` to row `end` - 1 in lists of about BLOCK_BYTES."""
    pyarrow, first = _pyarrow(source), 0
    batches = _parquet_batches(source, field, start) if source.kind == PARQUET else _arrow_batches(source)
    found: list[bytes | None] = []
    size, rows = 0, max(1, _count_rows(source))
    for batch in batches:
        if isinstance(batch, int):  # the number of skipped rows
            first += batch
            continue
        column = _text_column(pyarrow, source, field, batch)
        column = column[max(0, start - first) :][: None if end is None else max(0, end - max(first, start))]
        first += batch.num_rows
        for cell in column:
            found.append(cell.as_py())
            size += len(found[-1] or b"")
            if size >= BLOCK_BYTES:
                count(source.size * len(found) // rows)
                yield found
                found, size = [], 0
        if end is not None and first >= end:
            break
    count(source.size * len(found) // rows)
    if found:
        yield found


def _text_column(pyarrow: Any, source: Source, field: str, batch: Any) -> Any:
    """Return a column as bytes. Raises UserError if the table lacks it or it is no text."""
    names = batch.schema.names
    if field not in names:
        raise UserError(f"{source.path} has no column {field!r} (it has {', '.join(names)}); type --field NAME")
    column = batch.column(names.index(field))
    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    try:
        return column.cast(pyarrow.large_binary())
    except pyarrow.ArrowException as error:
        raise UserError(f"{source.path}: the column {field!r} is {column.type}, no text; type --field NAME") from error


def _parquet_batches(source: Source, field: str, start: int) -> Iterator[Any]:
    """Yield the number of skipped rows, in whole row groups before `start`, then batches of rows."""
    pyarrow = _pyarrow(source)
    with pyarrow.parquet.ParquetFile(source.path) as file:
        group = passed = 0
        while group < file.num_row_groups and passed + file.metadata.row_group(group).num_rows <= start:
            passed += file.metadata.row_group(group).num_rows
            group += 1
        yield passed
        columns = [field] if field in file.schema_arrow.names else None
        yield from file.iter_batches(256, row_groups=range(group, file.num_row_groups), columns=columns)


def _arrow_batches(source: Source) -> Iterator[Any]:
    """Yield the batches of an Arrow file, in the form of a stream, as `datasets` writes it, or of a file."""
    pyarrow = _pyarrow(source)
    with pyarrow.memory_map(str(source.path)) as file:
        try:
            reader = pyarrow.ipc.open_stream(file)
        except pyarrow.ArrowInvalid:
            opened = pyarrow.ipc.open_file(file)
            yield from (opened.get_batch(index) for index in range(opened.num_record_batches))
            return
        yield from reader
