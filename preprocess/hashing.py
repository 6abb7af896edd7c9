"""Hash buckets: of ids by the mixing of csrc/core/hash.h (on a GPU `kernels` has it too), of strings by xxh3-64.

    mix64(z)          z ^= z >> 30;  z *= 0xBF58476D1CE4E5B9;  z ^= z >> 27;  z *= 0x94D049BB133111EB;  z ^= z >> 31
    key(seed)         mix64(seed + 0x9E3779B97F4A7C15)
    id bucket         mix64(value ^ key(seed)) mod buckets
    string bucket     xxh3_64(UTF-8 bytes, seed) mod buckets
    tuple bucket      h mod buckets, where h begins as key(seed) and takes in the ids one by one, in their order:
                      h = mix64(h + id + 0x9E3779B97F4A7C15)

All arithmetic is modulo 2^64 on unsigned integers; a negative value enters as its two's complement. A null hashes as
the integer -1, which no id has, so nulls share one bucket with whatever else lands there.
"""

from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import xxhash

from preprocess import kernels
from widedeep.splitmix import GOLDEN, absorb, mix64_

SEED = 0
NULL = -1


def key(seed: int) -> int:
    """The constant that a seed becomes."""
    return absorb(0, seed)


def hash_ids(values: np.ndarray, seed: int = SEED) -> np.ndarray:
    """[n] of any integer type -> [n] uint64."""
    z = values.astype(np.int64).view(np.uint64)
    z ^= np.uint64(key(seed))
    return mix64_(z)


def id_buckets(values: np.ndarray, buckets: int, seed: int = SEED) -> np.ndarray:
    """[n] of any integer type -> [n] int32 in [0, buckets)."""
    return _remainder(hash_ids(values, seed), buckets)


def tuple_buckets(columns: Sequence[np.ndarray], buckets: int, seed: int = SEED) -> np.ndarray:
    """One or more [n] of any integer types, whose i-th values are a tuple -> [n] int32 in [0, buckets)."""
    hashed = np.full(len(columns[0]), key(seed), np.uint64)
    for values in columns:
        hashed += values.astype(np.int64).view(np.uint64)
        hashed += np.uint64(GOLDEN)
        mix64_(hashed)
    return _remainder(hashed, buckets)


def buckets_or_null(values: Any, buckets: int, xp: ModuleType = np) -> Any:
    """[n] int32 ids, -1 for null -> [n] int32 in [0, buckets), -1 for null."""
    if xp is not np:
        return kernels.id_buckets(values, key(SEED), buckets, xp)
    return np.where(values < 0, np.int32(NULL), id_buckets(values, buckets))


def string_buckets(values: Iterable[str], buckets: int, seed: int = SEED) -> np.ndarray:
    """n strings -> [n] int32 in [0, buckets). One Python call a string: give it the distinct values only."""
    hashed = np.fromiter((xxhash.xxh3_64_intdigest(v.encode("utf-8"), seed) for v in values), np.uint64)
    return _remainder(hashed, buckets)


def null_bucket(buckets: int, seed: int = SEED) -> int:
    """The bucket of a missing id or string."""
    return int(id_buckets(np.array([NULL]), buckets, seed)[0])


def _remainder(hashed: np.ndarray, buckets: int) -> np.ndarray:
    """[n] uint64 -> [n] int32."""
    # numpy's remainder is a division a value, its quotient by a constant is not: a third of the time.
    multiple = hashed // np.uint64(buckets)
    multiple *= np.uint64(buckets)
    return np.subtract(hashed, multiple, out=multiple).astype(np.int32)


def is_selected(values: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """[n] ids -> [n] bool, true with probability `fraction`: the upper 53 bits of the hash, as a number in [0, 1), are
    below it. The same id gives the same answer in every data set."""
    return (hash_ids(values, seed) >> np.uint64(11)) < np.uint64(round(fraction * 2**53))
