"""The finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014), a bijection of 64 bits. C++ twin: core/hash.h."""

import numpy as np

GOLDEN = 0x9E3779B97F4A7C15
MASK = (1 << 64) - 1


def mix64_(z: np.ndarray) -> np.ndarray:
    """[...] uint64, in place; returns it. A large array is bound by memory: one temporary, and no more."""
    shifted = np.empty_like(z)
    z ^= np.right_shift(z, np.uint64(30), out=shifted)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= np.right_shift(z, np.uint64(27), out=shifted)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= np.right_shift(z, np.uint64(31), out=shifted)
    return z


def absorb(h: int, v: int) -> int:
    """The hash h of some numbers, from 0 on, with the number v taken in."""
    return int(mix64_(np.array([(h + v + GOLDEN) & MASK], np.uint64))[0])
