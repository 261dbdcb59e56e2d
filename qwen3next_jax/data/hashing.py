"""Pseudo-random numbers that are the same on every machine and with every version of NumPy."""

import hashlib

import numpy as np


def mix64(x: np.ndarray) -> np.ndarray:
    """A bijection of uint64 that scrambles all bits (splitmix64; Steele et al., OOPSLA 2014)."""
    with np.errstate(over="ignore"):
        x = x.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def hash64(text: str) -> int:
    """The first eight bytes of BLAKE2b of a text, as a number."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def permutation(count: int, *key: int) -> np.ndarray:
    """A permutation of range(count) that depends on the key alone; int64 [count]."""
    seed = hash64(":".join(map(str, key)))
    return np.argsort(mix64(np.arange(count, dtype=np.uint64) ^ np.uint64(seed)), kind="stable")
