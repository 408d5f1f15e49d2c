"""A random permutation of the numbers of some bits, by NumPy: the network of kernels/permutation.cuh."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

Integers: TypeAlias = np.ndarray[tuple[int], np.dtype[np.int64]]

ROUNDS = 8

# Places that NumPy computes at a time, as a call of it costs as much as some hundred of them: 46 to 98 ns a place.
TOGETHER = 1 << 16


def feistel(x: Integers, bits: int, keys: Any, changes: Any = 0, way: int = 1) -> Integers:
    """The network's images of numbers of ``bits`` bits; each round changes one half. ``way=-1`` is the inverse.

    ``changes`` are words that are combined with every key: none, or one for each number.
    """
    below = (bits + 1) // 2
    halves = (x & ((1 << below) - 1)).astype(np.uint32), (x >> below).astype(np.uint32)
    words = np.asarray(changes, np.uint64)
    low, high = (words & np.uint64(0xFFFFFFFF)).astype(np.uint32), (words >> np.uint64(32)).astype(np.uint32)
    for number in range(ROUNDS)[::way]:
        changed, key = (number + 1) % 2, int(keys[number])  # the upper half, then the lower one
        mixed = halves[1 - changed] ^ (np.uint32(key & 0xFFFFFFFF) ^ low)
        mixed *= np.uint32(0x85EBCA6B)
        mixed ^= mixed >> np.uint32(16)
        mixed ^= np.uint32(key >> 32) ^ high
        mixed *= np.uint32(0xC2B2AE35)
        mixed >>= np.uint32(32 - (bits - below if changed else below))
        np.bitwise_xor(halves[changed], mixed, out=halves[changed])
    return (halves[1].astype(np.int64) << below) | halves[0]
