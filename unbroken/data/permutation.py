"""A permutation of the windows of an epoch, computed for each index from a key, so that no table is needed.

It is a Feistel network over the smallest power of two that holds all indices; an index that leaves the range is sent
through the network again until it is back (cycle walking).
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

ROUNDS = 8  # even: then both halves have their first widths again
LEAST_BITS = 4  # of the domain: over fewer, a network has only few permutations
MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # of splitmix64, a hash of 64 bits
Indices = npt.NDArray[np.uint64]


def permute(indices: npt.ArrayLike, size: int, *key: int) -> Indices:
    """Return the values of a permutation of 0 to size - 1 at these indices; each key has a permutation of its own."""
    bits = max(LEAST_BITS, (size - 1).bit_length())
    digest = hashlib.shake_128(",".join(map(str, key)).encode()).digest(8 * ROUNDS)
    keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)
    found = _through_network(np.asarray(indices, dtype=np.uint64), bits, keys)
    while (outside := found >= size).any():
        found[outside] = _through_network(found[outside], bits, keys)
    return found


def _through_network(indices: Indices, bits: int, keys: Indices) -> Indices:
    low_bits, high_bits = np.uint64(bits // 2), np.uint64(bits - bits // 2)
    one = np.uint64(1)
    high, low = indices >> low_bits, indices & ((one << low_bits) - one)
    for key in keys:
        mixed = low ^ key  # splitmix64's last steps
        mixed = (mixed ^ (mixed >> np.uint64(30))) * MIX[0]
        mixed = (mixed ^ (mixed >> np.uint64(27))) * MIX[1]
        mixed ^= mixed >> np.uint64(31)
        high, low = low, high ^ (mixed & ((one << high_bits) - one))
        low_bits, high_bits = high_bits, low_bits
    together: Indices = (high << low_bits) | low
    return together
