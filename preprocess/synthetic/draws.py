"""Random numbers as a pure function of (seed, stream, index), so that no result depends on chunk borders or workers."""

import numpy as np
import xxhash

from widedeep.splitmix import GOLDEN, mix64_


class Draws:
    """Counter-based draws: SplitMix64 (Steele, Lea, Flood 2014), started at a hash of the seed and a stream name."""

    def __init__(self, seed: int):
        self.seed = int(seed)

    def bits(self, stream: str, index: np.ndarray) -> np.ndarray:
        """64 random bits for every index; same shape as `index`, uint64."""
        x = np.asarray(index).astype(np.uint64)
        x *= np.uint64(GOLDEN)
        x += np.uint64(xxhash.xxh3_64_intdigest(f"{self.seed}/{stream}".encode()))
        return mix64_(x)

    def uniform(self, stream: str, index: np.ndarray) -> np.ndarray:
        """float64 in [0, 1)."""
        x = self.bits(stream, index)
        x >>= np.uint64(11)
        return x * 2.0**-53

    def integers(self, stream: str, index: np.ndarray, count) -> np.ndarray:
        """int64 in [0, count); `count` may be an array."""
        return (self.uniform(stream, index) * count).astype(np.int64)

    def normal(self, stream: str, index: np.ndarray) -> np.ndarray:
        """Standard normal float64, by Box and Muller."""
        radius = np.sqrt(-2.0 * np.log1p(-self.uniform(stream + "/radius", index)))
        return radius * np.cos(2.0 * np.pi * self.uniform(stream + "/angle", index))

    def permutation(self, stream: str, count: int) -> np.ndarray:
        """int32 permutation of 0..count-1."""
        return np.argsort(self.bits(stream, np.arange(count)), kind="stable").astype(np.int32)


def heavy_rank(u: np.ndarray, count, head) -> np.ndarray:
    """Rank in [0, count) with probability proportional to (rank + head)^-1.5, by inverting the continuous distribution.

    The exponent and a head of count/2400 give the published spread of rows per ad: median 5, third quartile 19,
    maximum 211,824 of 87 million. `count` and `head` may be arrays as long as `u`.
    """
    x = 1.0 - u * (1.0 - np.sqrt(head / (head + count)))
    rank = head * (1.0 / (x * x) - 1.0)
    return np.minimum(rank, np.asarray(count) - 1).astype(np.int64)
