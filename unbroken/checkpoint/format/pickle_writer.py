"""Write the pickle of a checkpoint: plain values and references to storages, opcode by opcode (protocol 2).

`torch.save` could do it through private hooks. Written out here, equal states make equal bytes on every version of
torch, and only what is listed here can get into a file.
"""

from __future__ import annotations

import pickle as op
import struct
from collections.abc import Callable

import torch

from unbroken.checkpoint.format.schema import dotted_path
from unbroken.distributed.sliced_tensor import SlicedTensor
from unbroken.errors import UserError

STORAGE_TYPES: dict[str, torch.dtype] = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}
_NAME_OF = {dtype: name for name, dtype in STORAGE_TYPES.items()}


def pickle_tree(tree: object) -> tuple[bytes, list[SlicedTensor]]:
    """Return the pickle, and the sliced tensors in the order of their storages. Raises UserError.

    An object that occurs twice in the tree is one storage.
    """
    out = _Output()
    out.parts.append(op.PROTO + b"\x02")
    _put(out, tree, ())
    out.parts.append(op.STOP)
    return b"".join(out.parts), out.leaves


class _Output:
    """The opcodes written so far, and the tensors in them: the second name of a tied tensor refers to the first."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.leaves: list[SlicedTensor] = []
        self.index: dict[int, int] = {}


def _put(out: _Output, value: object, path: tuple[str | int, ...]) -> None:
    if isinstance(value, SlicedTensor):
        _put_leaf(out, value, path)
    elif type(value) is dict:
        out.parts.append(op.EMPTY_DICT + op.MARK)
        for key, item in value.items():
            _put(out, key, path)
            _put(out, item, (*path, key))
        out.parts.append(op.SETITEMS)
    elif type(value) is list:
        out.parts.append(op.EMPTY_LIST + op.MARK)
        for index, item in enumerate(value):
            _put(out, item, (*path, index))
        out.parts.append(op.APPENDS)
    elif type(value) is tuple:
        out.parts.append(op.MARK)
        for index, item in enumerate(value):
            _put(out, item, (*path, index))
        out.parts.append(op.TUPLE)
    else:
        put = _SCALARS.get(type(value))
        if put is None:
            raise UserError(
                f"`{dotted_path(path)}` is a {type(value).__name__}: only plain values go into a checkpoint"
            )
        out.parts.append(put(value))


def _text(value: str) -> bytes:
    encoded = value.encode("utf-8", "surrogatepass")
    return op.BINUNICODE + struct.pack("<I", len(encoded)) + encoded


def _integer(value: int) -> bytes:
    if 0 <= value <= 0xFF:
        return op.BININT1 + bytes([value])
    if -(2**31) <= value < 2**31:
        return op.BININT + struct.pack("<i", value)
    encoded = op.encode_long(value)
    if len(encoded) > 255:
        raise UserError("a number of more than 600 digits cannot be stored in a checkpoint")
    return op.LONG1 + bytes([len(encoded)]) + encoded


def _bytes(value: bytes) -> bytes:
    """Return opcodes that encode a text as latin1: protocol 2 has none for bytes, and torch.load allows this call."""
    return _global("_codecs", "encode") + _text(value.decode("latin1")) + _text("latin1") + op.TUPLE2 + op.REDUCE


def _global(module: str, name: str) -> bytes:
    return op.GLOBAL + f"{module}\n{name}\n".encode()


_SCALARS: dict[type, Callable[..., bytes]] = {
    type(None): lambda value: op.NONE,
    bool: lambda value: op.NEWTRUE if value else op.NEWFALSE,
    int: _integer,
    float: lambda value: op.BINFLOAT + struct.pack(">d", value),
    str: _text,
    bytes: _bytes,
}


def _put_leaf(out: _Output, leaf: SlicedTensor, path: tuple[str | int, ...]) -> None:
    """Write torch._utils._rebuild_tensor_v2(storage, 0, shape, strides, False, OrderedDict())."""
    known = out.index.get(id(leaf))
    if known is not None:
        out.parts.append(op.LONG_BINGET + struct.pack("<I", known))
        return
    if leaf.dtype not in _NAME_OF:
        raise UserError(f"`{dotted_path(path)}` has dtype {leaf.dtype}, which a checkpoint cannot hold")
    index = out.index[id(leaf)] = len(out.leaves)
    out.leaves.append(leaf)
    storage = op.MARK + _text("storage") + _global("torch", _NAME_OF[leaf.dtype])
    storage += _text(str(index)) + _text("cpu") + _integer(leaf.numel) + op.TUPLE + op.BINPERSID
    strides = torch.empty(leaf.shape, device="meta").stride()
    shape = op.MARK + b"".join(map(_integer, leaf.shape)) + op.TUPLE
    shape += op.MARK + b"".join(map(_integer, strides)) + op.TUPLE
    hooks = _global("collections", "OrderedDict") + op.EMPTY_TUPLE + op.REDUCE
    call = op.MARK + storage + _integer(0) + shape + op.NEWFALSE + hooks + op.TUPLE + op.REDUCE
    out.parts.append(_global("torch._utils", "_rebuild_tensor_v2") + call + op.LONG_BINPUT + struct.pack("<I", index))
