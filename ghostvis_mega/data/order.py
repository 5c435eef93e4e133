"""Randomness that is arithmetic: the same on every machine and numpy version, at any index.

numpy promises no stable streams between versions; a run must be able to continue after an update.
"""

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_ROUNDS = 8


def hash_u64(values: np.ndarray, *keys: int) -> np.ndarray:
    """splitmix64 of each value (uint64), keyed; array operations wrap modulo 2**64 by design."""
    x = np.asarray(values).astype(np.uint64)
    for key in (*keys, 0):
        x = x + np.uint64((key * int(_GOLDEN) + int(_GOLDEN)) & 0xFFFF_FFFF_FFFF_FFFF)
        x = (x ^ (x >> np.uint64(30))) * _MIX_1
        x = (x ^ (x >> np.uint64(27))) * _MIX_2
        x = x ^ (x >> np.uint64(31))
    return x


def shuffled(count: int, *keys: int) -> np.ndarray:
    """A permutation of range(count), int64, from integer keys."""
    return np.argsort(hash_u64(np.arange(count), *keys), kind="stable")


def permute(indices: np.ndarray, *, count: int, seed: int, epoch: int) -> np.ndarray:
    """Images of `indices` under a bijection of range(count) that depends on (seed, epoch).

    A Feistel network over the smallest even number of bits that holds `count`; results outside of
    the range walk on until they fall inside. No array of size `count` is made.
    """
    half = max(1, ((max(count - 1, 1)).bit_length() + 1) // 2)
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    x = np.atleast_1d(np.asarray(indices)).astype(np.uint64)
    outside = np.ones(x.shape, dtype=bool)
    while outside.any():
        left, right = x[outside] >> shift, x[outside] & mask
        for number in range(_ROUNDS):
            left, right = right, left ^ (hash_u64(right, seed, epoch, number) & mask)
        x[outside] = (left << shift) | right
        outside = x >= np.uint64(count)
    return x.astype(np.int64)
