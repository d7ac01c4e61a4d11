"""The digest of a state, which the journal keeps so that a checkpoint can be compared after its file was removed."""

from __future__ import annotations

import base64
import hashlib
import struct
from collections.abc import Iterable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class StateDigest:
    """A digest of a checkpoint, the same for any number of processes.

    `tensors`: SHA-256 over name, dtype, shape and CRC-32 of every tensor. `crcs`: these CRC-32s in the order of the
    tree, 4 bytes each, in base64. `pickle`: SHA-256 of the rest, which holds times and differs between two runs.
    """

    tensors: str
    crcs: str
    pickle: str


def digest_state(named: Iterable[tuple[str, torch.dtype, tuple[int, ...], int]], pickled: bytes) -> StateDigest:
    """Return the digest of a checkpoint.

    Args:
        named: name, dtype, shape and CRC-32 of each tensor, in the order of the tree.
        pickled: the checkpoint's `data.pkl`.
    """
    tensors = list(named)
    text = "".join(f"{name} {dtype} {tuple(shape)} {crc:08x}\n" for name, dtype, shape, crc in tensors)
    packed = struct.pack(f"<{len(tensors)}I", *(crc for *_, crc in tensors))
    crcs = base64.b64encode(packed).decode()
    return StateDigest(hashlib.sha256(text.encode()).hexdigest(), crcs, hashlib.sha256(pickled).hexdigest())


def unpack_crcs(text: str) -> list[int]:
    """Return the CRC-32s of a digest, untrusted; an empty list for a text that holds none."""
    try:
        return [crc for (crc,) in struct.iter_unpack("<I", base64.b64decode(text, validate=True))]
    except (ValueError, struct.error):
        return []
