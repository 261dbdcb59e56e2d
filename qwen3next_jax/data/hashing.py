"""Numbers that look random and are the same on every machine and under every version of NumPy."""

import hashlib

import numpy as np


def mix64(x: np.ndarray) -> np.ndarray:
    """A bijection of uint64 that leaves no pattern (splitmix64; Steele et al., OOPSLA 2014)."""
    with np.errstate(over="ignore"):
        x = x.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def hash64(text: str) -> int:
    """The first eight bytes of BLAKE2b of a text, as a number."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def permutation(count: int, *key: int) -> np.ndarray:
    """An order of `count` things that the key decides; int64 [count]."""
    seed = hash64(":".join(map(str, key)))
    return np.argsort(mix64(np.arange(count, dtype=np.uint64) ^ np.uint64(seed)), kind="stable")
