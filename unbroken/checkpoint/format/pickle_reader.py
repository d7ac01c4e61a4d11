"""Read a pickle as data: only the values and calls that this module lists are built; nothing is imported.

Allowed are plain values, dicts with names or numbers as keys, OrderedDict (as dict), tensors (as `StoredTensor`,
without reading them), torch.Size (as tuple), dtypes, and devices (as text). Everything else is refused by name. There
are limits for the number of opcodes, for the depth, and for the size with every shared reference counted each time: a
small file cannot fill memory or keep a reader busy.
"""

from __future__ import annotations

import pickle as op
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from unbroken.checkpoint.format.pickle_writer import STORAGE_TYPES
from unbroken.checkpoint.format.stored_tensor import PickleRefused, Storage, StoredTensor, locate_tensor
from unbroken.text import printable

MAX_OPCODES = 2_000_000  # the largest of our states has some 60,000
MAX_VALUES = 4_000_000  # after unfolding
MAX_DEPTH = 32
MAX_NUMBERS_AS_KEYS = 20_000  # numbers chosen to collide make a dict quadratic in their count
TEXT_UNIT = 64  # characters of a text that count as one value


NONSENSE = (IndexError, KeyError, TypeError, ValueError, OverflowError, AttributeError, struct.error)


@dataclass(frozen=True)
class Global:
    """A name in a module, never imported; `_CALLS` and `_STORAGES` list its uses."""

    name: str


class _Mark:
    """A mark on the stack where a tuple, list or dict under construction begins."""


def unpickle(data: bytes, storage_sizes: Mapping[str, int]) -> Any:
    """Return the value of a pickle. `storage_sizes`: bytes of the entry data/<key>, by key. Raises PickleRefused."""
    decoder = Decoder(data, storage_sizes)
    try:
        value = decoder.run()
    except NONSENSE as error:
        if isinstance(error, PickleRefused):
            raise
        raise PickleRefused("its list of values is damaged") from None
    _measure(value, {}, 0)
    return value


def _measure(value: Any, known: dict[int, tuple[int, int]], depth: int) -> tuple[int, int]:
    """Return (values after unfolding, nesting) of a tree with shared containers.

    Raises PickleRefused for bombs and cycles.
    """
    if not isinstance(value, (dict, list, tuple)):
        if type(value) not in _LEAVES:
            raise PickleRefused(f"it holds a {printable(getattr(value, 'name', type(value).__name__))} as a value")
        return 1 + (len(value) // TEXT_UNIT if isinstance(value, (str, bytes)) else 0), 0
    if id(value) in known:
        return known[id(value)]
    if depth > MAX_DEPTH:
        raise PickleRefused(f"its values are nested more than {MAX_DEPTH} deep")
    total, height = 1, 0
    for item in value.values() if isinstance(value, dict) else value:
        count, below = _measure(item, known, depth + 1)
        total, height = total + count, max(height, below)
    if total > MAX_VALUES or height >= MAX_DEPTH:
        raise PickleRefused("its values are nested too deeply or refer to each other too often")
    known[id(value)] = total, height + 1
    return known[id(value)]


_LEAVES = (type(None), bool, int, float, str, bytes, StoredTensor, torch.dtype)


class Decoder:
    """A stack machine of protocol 2 (Python's Lib/pickletools.py describes the opcodes)."""

    PROTOCOL = b"\x02"
    NAMES: Mapping[str, Any]  # what GLOBAL may name
    CALLS: Mapping[str, Callable[..., Any]]  # what REDUCE may call, with the decoder first
    HANDLERS: Mapping[int, Callable[[Any], None]]

    def __init__(self, data: bytes, storage_sizes: Mapping[str, int]) -> None:
        self.data, self.sizes = data, storage_sizes
        self.position = 0
        self.stack: list[Any] = []
        self.memo: list[Any] = []  # a list, because pickle numbers its entries in order; other numbers are refused
        self.numbers_as_keys = 0
        self.bytes_left = len(data)  # that _codecs.encode may still return

    def run(self) -> Any:
        if self.data[:2] != op.PROTO + self.PROTOCOL:
            known = self.PROTOCOL[0]
            raise PickleRefused(f"its list of values is not a pickle of protocol {known}, which torch.save writes")
        self.position = 2
        for _ in range(MAX_OPCODES):
            code = self.data[self.position]
            self.position += 1
            if code == op.STOP[0]:
                if len(self.stack) != 1 or self.position != len(self.data):
                    raise PickleRefused("its list of values does not end where it should")
                return self.stack[0]
            handler = self.HANDLERS.get(code)
            if handler is None:
                raise PickleRefused(f"its list of values uses opcode {code:#04x}, which torch.save does not write")
            handler(self)
        raise PickleRefused(f"its list of values has more than {MAX_OPCODES} instructions")

    def take(self, size: int) -> bytes:
        """Return the next `size` bytes. Raises PickleRefused if there are fewer."""
        end = self.position + size
        if end > len(self.data):
            raise PickleRefused("its list of values is cut off")
        taken = self.data[self.position : end]
        self.position = end
        return taken

    def line(self) -> str:
        """Return the next line, of at most 200 characters, without its end."""
        end = self.data.index(b"\n", self.position, self.position + 200)
        taken = self.data[self.position : end]
        self.position = end + 1
        return taken.decode("ascii")

    def number(self, form: str) -> Any:
        """Return the next number, of the form that `struct` names."""
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def marked(self) -> list[Any]:
        """Return what was pushed since the last mark, and drop the mark."""
        index = len(self.stack) - 1
        while type(self.stack[index]) is not _Mark:
            index -= 1
            if index < 0:
                raise PickleRefused("its list of values is damaged")
        taken = self.stack[index + 1 :]
        del self.stack[index:]
        return taken

    def last(self, kind: type) -> Any:
        """Return the last value of the stack. Raises PickleRefused unless it is of this type."""
        if type(self.stack[-1]) is not kind:
            raise PickleRefused("its list of values is damaged")
        return self.stack[-1]


def _global(decoder: Decoder) -> None:
    push_global(decoder, f"{decoder.line()}.{decoder.line()}")


def push_global(decoder: Decoder, name: str) -> None:
    """Push a name of NAMES, without importing it. Raises PickleRefused for any other name."""
    if name not in decoder.NAMES:
        raise PickleRefused(
            f"it refers to {printable(name)}, which could run code: only tensors and plain values are read"
        )
    decoder.stack.append(decoder.NAMES[name])


def _persistent(decoder: Decoder) -> None:
    """Push the storage of ("storage", type, key, device, number of elements)."""
    _, kind, key, _, count = pid = decoder.stack.pop()
    if type(pid) is not tuple or pid[0] != "storage" or type(kind) is not Global or kind.name not in _STORAGES:
        raise PickleRefused("it refers to something that is no tensor's storage")
    if type(key) is not str or type(count) is not int:
        raise PickleRefused("it refers to something that is no tensor's storage")
    if key not in decoder.sizes:
        raise PickleRefused(f"the data of a tensor, data/{printable(key)}, are not in the file")
    dtype = _STORAGES[kind.name]
    nbytes = count * (dtype.itemsize if dtype is not None else 1)
    if nbytes != decoder.sizes[key]:
        raise PickleRefused(f"data/{key} has {decoder.sizes[key]} bytes but should have {printable(nbytes)}")
    decoder.stack.append(Storage(key, dtype, nbytes))


def _reduce(decoder: Decoder) -> None:
    arguments, function = decoder.stack.pop(), decoder.stack.pop()
    if type(function) is not Global or function.name not in decoder.CALLS or type(arguments) is not tuple:
        raise PickleRefused("it asks for a call that is not allowed")
    decoder.stack.append(decoder.CALLS[function.name](decoder, *arguments))


def _tensor(decoder: Decoder, storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> StoredTensor:
    """Return the tensor of _rebuild_tensor_v2(storage, offset, shape, strides, requires_grad, hooks[, metadata])."""
    if type(storage) is not Storage or storage.dtype is None:
        raise PickleRefused("it has a tensor without a type")
    return locate_tensor(storage, storage.dtype, offset, shape, strides)


def _tensor_v3(decoder: Decoder, storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> StoredTensor:
    """Return the tensor of _rebuild_tensor_v3, which has the dtype after the arguments of _rebuild_tensor_v2."""
    dtype = rest[2]
    if type(storage) is not Storage or type(dtype) is not torch.dtype:
        raise PickleRefused("it has a tensor without a type")
    return locate_tensor(storage, dtype, offset, shape, strides)


def _parameter(decoder: Decoder, data: Any, *rest: Any) -> StoredTensor:
    if type(data) is not StoredTensor:
        raise PickleRefused("it has a parameter that is no tensor")
    return data


def _encode(decoder: Decoder, text: Any, encoding: Any) -> bytes:
    """Return the bytes of _codecs.encode(text, "latin1"), which is how protocol 2 holds them."""
    if type(text) is not str or encoding != "latin1":
        raise PickleRefused("it asks for a call that is not allowed")
    decoder.bytes_left -= len(text)
    if decoder.bytes_left < 0:
        raise PickleRefused("its values would unfold to more than the file holds")
    return text.encode("latin1")


def _size(decoder: Decoder, shape: Any) -> tuple[Any, ...]:
    if type(shape) is not tuple:
        raise PickleRefused("it has a size that is no tuple")
    return shape


def _device(decoder: Decoder, kind: Any, index: Any = None) -> str:
    if type(kind) is not str or not (index is None or type(index) is int):
        raise PickleRefused("it has a device that makes no sense")
    return printable(kind if index is None else f"{kind}:{index}", 30)


_CALLS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "collections.OrderedDict": lambda decoder: {},
    "_codecs.encode": _encode,
    "torch.Size": _size,
    "torch.device": _device,
}
_STORAGES: dict[str, torch.dtype | None] = {f"torch.{name}": dtype for name, dtype in STORAGE_TYPES.items()}
_STORAGES |= {"torch.storage.UntypedStorage": None}
_NAMES: dict[str, Any] = {name: Global(name) for name in (*_CALLS, *_STORAGES)}
_NAMES |= {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}


def _put_items(decoder: Decoder, items: list[Any]) -> None:
    """Put items into a dict. Keys must be names or numbers: others could collide or have code of their own."""
    target = decoder.last(dict)
    for key, value in zip(items[::2], items[1::2], strict=True):
        if type(key) is int and -(2**63) <= key < 2**63:
            decoder.numbers_as_keys += 1
        elif type(key) is not str:
            raise PickleRefused("it has a dict whose keys are neither names nor numbers")
        if decoder.numbers_as_keys > MAX_NUMBERS_AS_KEYS:
            raise PickleRefused(f"it has more than {MAX_NUMBERS_AS_KEYS} numbers as keys")
        target[key] = value


def _set_item(decoder: Decoder) -> None:
    items = decoder.stack[-2:]
    del decoder.stack[-2:]
    _put_items(decoder, items)


def _append(decoder: Decoder) -> None:
    item = decoder.stack.pop()
    decoder.last(list).append(item)


def _appends(decoder: Decoder) -> None:
    items = decoder.marked()
    decoder.last(list).extend(items)


def _build(decoder: Decoder) -> None:
    """Ignore a state dict's `_metadata`, which is not needed."""
    decoder.stack.pop()
    decoder.last(dict)


def _tuple_of(count: int) -> Callable[[Decoder], None]:
    def handler(decoder: Decoder) -> None:
        items = tuple(decoder.stack[-count:])
        if len(items) != count or any(type(item) is _Mark for item in items):
            raise PickleRefused("its list of values is damaged")
        del decoder.stack[-count:]
        decoder.stack.append(items)

    return handler


def _remember(form: str) -> Callable[[Decoder], None]:
    def handler(decoder: Decoder) -> None:
        value, index = decoder.stack[-1], decoder.number(form)
        if index > len(decoder.memo):
            raise PickleRefused("its list of values remembers out of order")
        decoder.memo[index : index + 1] = [value]

    return handler


def _recall(form: str) -> Callable[[Decoder], None]:
    return lambda decoder: decoder.stack.append(decoder.memo[decoder.number(form)])


def _push_text(decoder: Decoder) -> None:
    decoder.stack.append(decoder.take(decoder.number("<I")).decode("utf-8", "surrogatepass"))


def _push(form: str) -> Callable[[Decoder], None]:
    return lambda decoder: decoder.stack.append(decoder.number(form))


_HANDLERS: dict[int, Callable[[Decoder], None]] = {
    op.NONE[0]: lambda decoder: decoder.stack.append(None),
    op.NEWTRUE[0]: lambda decoder: decoder.stack.append(True),
    op.NEWFALSE[0]: lambda decoder: decoder.stack.append(False),
    op.BININT[0]: _push("<i"),
    op.BININT1[0]: _push("<B"),
    op.BININT2[0]: _push("<H"),
    op.LONG1[0]: lambda decoder: decoder.stack.append(op.decode_long(decoder.take(decoder.number("<B")))),
    op.BINFLOAT[0]: _push(">d"),
    op.BINUNICODE[0]: _push_text,
    op.EMPTY_DICT[0]: lambda decoder: decoder.stack.append({}),
    op.EMPTY_LIST[0]: lambda decoder: decoder.stack.append([]),
    op.EMPTY_TUPLE[0]: lambda decoder: decoder.stack.append(()),
    op.MARK[0]: lambda decoder: decoder.stack.append(_Mark()),
    op.TUPLE[0]: lambda decoder: decoder.stack.append(tuple(decoder.marked())),
    op.TUPLE1[0]: _tuple_of(1),
    op.TUPLE2[0]: _tuple_of(2),
    op.TUPLE3[0]: _tuple_of(3),
    op.SETITEM[0]: _set_item,
    op.SETITEMS[0]: lambda decoder: _put_items(decoder, decoder.marked()),
    op.APPEND[0]: _append,
    op.APPENDS[0]: _appends,
    op.BINPUT[0]: _remember("<B"),
    op.LONG_BINPUT[0]: _remember("<I"),
    op.BINGET[0]: _recall("<B"),
    op.LONG_BINGET[0]: _recall("<I"),
    op.GLOBAL[0]: _global,
    op.BINPERSID[0]: _persistent,
    op.REDUCE[0]: _reduce,
    op.BUILD[0]: _build,
}
Decoder.NAMES, Decoder.CALLS, Decoder.HANDLERS = _NAMES, _CALLS, _HANDLERS
