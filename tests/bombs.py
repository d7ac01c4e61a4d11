"""Small pickles that ask for much: memory, time, or both. Run as a program, since its memory is limited for good."""

from __future__ import annotations

import resource
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests import checkpoints as make
from unbroken.checkpoint.reader import CheckpointFile
from unbroken.errors import UserError

MEMORY = 800 << 20  # bytes beyond what the process has at the start
SECONDS = 60.0  # of the processor, for one file; on two busy cores the worst take three


def number(form: str, value: int) -> bytes:
    return struct.pack(form, value)


def get(index: int) -> bytes:
    return b"j" + number("<I", index)


def put(index: int) -> bytes:
    return b"r" + number("<I", index)


def many(code: bytes) -> bytes:
    return b"](" + code * 2_100_000 + b"e"


LARGEST = 60


def doubling(last: bytes = b"") -> bytes:
    """Lists that hold the one before twice, and what `last` makes of the largest: 2**60 elements."""
    lists = b"".join(b"](" + get(level) * 2 + b"e" + put(level + 1) for level in range(LARGEST))
    return b"](]" + put(0) + lists + last + b"e"


def chain(opcodes: Callable[[int], bytes]) -> bytes:
    """Numbers that make a dict slow: first many that lie on one way through its table, then many that start on it."""
    bits, way = 21, [1]
    while len(way) < 600_000:
        way.append((5 * way[-1] + 1) % 2**bits)  # how CPython goes on after a collision (Objects/dictobject.c)
    late = (start + (round << bits) for start in way[:300] for round in range(1, 1000))
    return b"".join(map(opcodes, way)) + b"".join(map(opcodes, late))


def bombs() -> Iterator[tuple[str, bytes]]:
    """Names, and opcodes that make one value."""
    for name, code, form, size in (
        ("LONG1", b"\x8a", "<B", 255),
        ("LONG4", b"\x8b", "<i", 2**31 - 1),
        ("negative LONG4", b"\x8b", "<i", -1),
        ("BINUNICODE", b"X", "<I", 2**32 - 1),
        ("BINUNICODE8", b"\x8d", "<Q", 2**62),
        ("BINBYTES", b"B", "<I", 2**32 - 1),
        ("BINBYTES8", b"\x8e", "<Q", 2**62),
        ("BYTEARRAY8", b"\x96", "<Q", 2**62),
        ("BINSTRING", b"T", "<i", 2**31 - 1),
        ("LONG_BINPUT", b"Nr", "<I", 2**32 - 1),
        ("LONG_BINGET", b"j", "<I", 2**32 - 1),
        ("FRAME", b"\x95", "<Q", 2**62),
    ):
        yield name, code + number(form, size)
    yield "PUT", b"Np999999999999999999\n"
    yield "doubling", doubling()
    yield "a doubled device", doubling(b"ctorch\ndevice\n" + get(LARGEST) + b"\x85R")
    yield "a doubled size", doubling(b"ctorch\nSize\n" + get(LARGEST) + b"\x85\x85R")
    key = make.text("storage") + b"ctorch\nFloatStorage\n" + get(LARGEST) + make.text("cpu")
    yield "a doubled storage", doubling(b"(" + key + b"K\4tQ")
    yield "objects", many(b"}")
    yield "tuples", many(b"N\x85\x85")
    yield "globals", many(b"ctorch\nSize\n")
    yield "marks", b"(" * 2_100_000
    yield "memo", b"N" + b"".join(map(put, range(2_100_000)))
    yield "memo in a chain", b"N" + chain(put)
    yield "keys in a chain", b"}(" + chain(lambda key: b"\x8a\x08" + number("<q", key) + b"N") + b"u"
    text = make.text("a" * (1 << 20))
    yield "one text many times", b"](" + text + put(0) + get(0) * 500_000 + b"e"
    encoded = b"c_codecs\nencode\n" + get(0) + make.text("latin1") + b"\x86R"
    yield "one text encoded many times", b"](" + text + put(0) + encoded * 100_000 + b"e"


def main(path: Path) -> None:
    """One line for each bomb; only "refused" is good. MemoryError would be a traceback."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for name, opcodes in bombs():
        path.write_bytes(make.pickle_file(make.dict_of(a=opcodes), {"0": bytes(16)}))
        began = time.process_time()
        try:
            with CheckpointFile(path):
                verdict = "ACCEPTED"
        except UserError as error:
            verdict = f"refused ({error})"
        seconds = time.process_time() - began
        print("SLOW" if seconds > SECONDS else verdict.split()[0], name, f"{seconds:.1f} s", verdict)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
