"""Read the `.metadata` of a torch.distributed.checkpoint folder as data: a pickle of a few classes, none imported."""

from __future__ import annotations

import math
import pickle as op
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from unbroken.checkpoint.format import pickle_reader
from unbroken.checkpoint.format.pickle_reader import Decoder, Global
from unbroken.checkpoint.format.stored_tensor import DTYPES, PickleRefused
from unbroken.text import printable

MAX_CHUNKS = 1 << 16  # of one tensor
_PREFIX = "torch.distributed.checkpoint."
_RECORDS = {
    f"{_PREFIX}{name}"
    for name in (
        *("metadata.Metadata", "metadata.TensorStorageMetadata", "metadata.TensorProperties"),
        *("metadata.ChunkStorageMetadata", "metadata.BytesStorageMetadata", "metadata.MetadataIndex"),
        *("metadata.StorageMeta", "filesystem._StorageInfo"),
    )
}
_FILE = re.compile(r"\w[\w.-]{0,200}\.distcp", re.ASCII)


@dataclass(frozen=True)
class Chunk:
    """A block of a tensor: its first index and shape, and its bytes in a file, which `torch.save` wrote."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    start: int
    size: int


@dataclass(frozen=True)
class ChunkedTensor:
    """A tensor of the folder; its chunks lie inside of it and have as many elements as it has."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]


class Metadata:
    """The tensors of a folder by name, each checked at its look-up. Constructor and method raise PickleRefused."""

    def __init__(self, data: bytes) -> None:
        try:
            self._tensors, self._places = _decode(data)
        except pickle_reader.NONSENSE as error:
            raise error if isinstance(error, PickleRefused) else PickleRefused("its .metadata is damaged") from None

    def tensor(self, name: str) -> ChunkedTensor | None:
        """Return a tensor; None if the folder has none of this name."""
        found = self._tensors.get(name)
        if not isinstance(found, _Record) or not found.name.endswith("TensorStorageMetadata"):
            return None
        try:
            return self._checked(name, found)
        except pickle_reader.NONSENSE as error:
            if isinstance(error, PickleRefused):
                raise
            raise PickleRefused(f"its .metadata makes no sense for {printable(name)}") from None

    def _checked(self, name: str, found: _Record) -> ChunkedTensor:
        shape, dtype = _numbers(found.state["size"]), found.state["properties"].state["dtype"]
        if dtype not in DTYPES or len(found.state["chunks"]) > MAX_CHUNKS:
            raise PickleRefused(f"its {printable(name)} has {printable(dtype)} or too many chunks; it cannot be read")
        chunks = tuple(self._chunk(name, each.state, shape) for each in found.state["chunks"])
        if sum(math.prod(chunk.shape) for chunk in chunks) != math.prod(shape):
            raise PickleRefused(f"the chunks of its {printable(name)} do not make up the tensor")
        return ChunkedTensor(shape, dtype, chunks)

    def _chunk(self, name: str, state: dict[str, Any], whole: tuple[int, ...]) -> Chunk:
        offsets, shape = _numbers(state["offsets"]), _numbers(state["sizes"])
        if any(lo + size > full for lo, size, full in zip(offsets, shape, whole, strict=True)):
            raise PickleRefused(f"a chunk of its {printable(name)} lies outside of the tensor")
        place = self._places[name, offsets].state
        if place.get("transform_descriptors"):
            raise PickleRefused(f"its {printable(name)} is compressed or encrypted; save it without extensions")
        if not _FILE.fullmatch(place["relative_path"]):
            raise PickleRefused(
                f"its {printable(name)} lies in {printable(place['relative_path'])}, no file of the folder"
            )
        start, size = _numbers((place["offset"], place["length"]))
        return Chunk(offsets, shape, place["relative_path"], start, size)


def _numbers(value: Any) -> tuple[int, ...]:
    """Return a tuple of sizes. Raises ValueError for anything else."""
    if type(value) is not tuple or any(type(number) is not int or not 0 <= number < 2**60 for number in value):
        raise ValueError
    return value


@dataclass(eq=False)
class _Record:
    """An object of one of the known classes, as its name and its attributes."""

    name: str
    state: dict[str, Any]


def _decode(data: bytes) -> tuple[dict[str, Any], dict[Any, Any]]:
    """Return `state_dict_metadata` and `storage_data`, whose keys are (name, first index of the chunk)."""
    root = _MetadataDecoder(data, {}).run()
    if type(root) is not _Record or root.name != f"{_PREFIX}metadata.Metadata":
        raise PickleRefused("its .metadata is of another kind of checkpoint")
    tensors, places = root.state["state_dict_metadata"], root.state["storage_data"]
    if type(tensors) is not dict or type(places) is not dict:
        raise PickleRefused("its .metadata is of another kind of checkpoint")
    return tensors, places


class _MetadataDecoder(Decoder):
    """The machine of protocol 4, as far as these files use it."""

    PROTOCOL = b"\x04"


def _stack_global(decoder: Decoder) -> None:
    name, module = decoder.stack.pop(), decoder.stack.pop()
    pickle_reader.push_global(decoder, f"{module}.{name}")


def _new_object(decoder: Decoder) -> None:
    arguments, kind = decoder.stack.pop(), decoder.stack.pop()
    if type(kind) is not Global or kind.name not in _RECORDS or arguments != ():
        raise PickleRefused("it asks for an object that is not allowed")
    decoder.stack.append(_Record(kind.name, {}))


def _build(decoder: Decoder) -> None:
    state, target = decoder.stack.pop(), decoder.last(_Record)
    if target.name.endswith("TensorProperties"):  # a tuple, of which the first is the dtype
        state = {"dtype": state[0]}
    if type(state) is not dict:
        raise PickleRefused("its .metadata is damaged")
    target.state.update(state)


def _put_items(decoder: Decoder) -> None:
    items = decoder.marked()
    target = decoder.last(dict)
    for key, value in zip(items[::2], items[1::2], strict=True):
        if type(key) is _Record:
            key = (key.state["fqn"], key.state.get("offset"))
        if type(key) is not str and not (
            type(key) is tuple and type(key[0]) is str and type(key[1]) in (tuple, type(None))
        ):
            raise PickleRefused("its .metadata has a key that is no name")
        target[key] = value


def _short_text(decoder: Decoder) -> None:
    decoder.stack.append(decoder.take(decoder.number("<B")).decode("utf-8"))


_CALLS: dict[str, Callable[..., Any]] = {
    "torch.Size": lambda decoder, shape: shape,
    "torch.serialization._get_layout": lambda decoder, name: None,
    f"{_PREFIX}metadata._MEM_FORMAT_ENCODING": lambda decoder, number: None,
    "pathlib.PosixPath": lambda decoder, *parts: None,
    "pathlib._local.PosixPath": lambda decoder, *parts: None,
    "collections.OrderedDict": lambda decoder: {},
}
_MetadataDecoder.CALLS = _CALLS
_MetadataDecoder.NAMES = {name: Global(name) for name in (*_CALLS, *_RECORDS)} | {str(dtype): dtype for dtype in DTYPES}
_MetadataDecoder.HANDLERS = {
    **Decoder.HANDLERS,
    op.FRAME[0]: lambda decoder: decoder.take(8),
    op.MEMOIZE[0]: lambda decoder: decoder.memo.append(decoder.stack[-1]),
    op.SHORT_BINUNICODE[0]: _short_text,
    op.STACK_GLOBAL[0]: _stack_global,
    op.NEWOBJ[0]: _new_object,
    op.BUILD[0]: _build,
    op.SETITEMS[0]: _put_items,
}
