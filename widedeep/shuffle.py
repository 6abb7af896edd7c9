"""The order of an epoch, in numpy: position -> row, nothing stored. Definition and C++ twin: csrc/core/permute.h."""

import numpy as np

from widedeep.splitmix import GOLDEN, MASK, absorb, mix64_

BLOCK_ROWS = 4096  # 16 KiB of a 4-byte column: one contiguous read
WINDOW_ROWS = 1 << 20

_ROUNDS = 8
_PIECE = 1 << 14  # positions computed at a time: the temporaries stay in the L2 cache


class EpochOrder:
    """A permutation of [0, rows) that is a fixed function of (seed, epoch).

    Blocks of consecutive rows stand in random order, windows of consecutive blocks of that order follow each other, and
    rows are permuted inside a window; so a reader needs one window at a time. Up to `window_rows` rows are one window.
    """

    def __init__(self, rows: int, seed: int, epoch: int, block_rows: int = BLOCK_ROWS, window_rows: int = WINDOW_ROWS):
        if min(block_rows, window_rows) < 1:
            raise ValueError(f"block_rows and window_rows are at least 1, not {block_rows} and {window_rows}")
        self.rows, self.seed, self.epoch = rows, seed, epoch
        self.block_rows, self.window_rows = block_rows, window_rows
        self._key = absorb(absorb(0, seed & MASK), epoch & MASK)
        blocks = -(-rows // block_rows)
        order = feistel(np.arange(blocks), blocks, absorb(self._key, 1))
        self._block_starts = order * block_rows
        lengths = np.minimum(block_rows, rows - self._block_starts)
        self._ends = np.cumsum(lengths)
        self._window_blocks = -(-window_rows // block_rows)
        # Position of the first row of each window, and the number of rows.
        self._bounds = np.concatenate([[0], self._ends[self._window_blocks - 1 : -1 : self._window_blocks], [rows]])

    def rows_at(self, start: int, stop: int) -> np.ndarray:
        """Rows at positions [start, stop), as int64 [stop - start]."""
        if not 0 <= start <= stop <= self.rows:
            raise IndexError(f"positions {start}..{stop} are not within 0..{self.rows}")
        result = np.empty(stop - start, np.int64)
        done = 0
        while done < len(result):
            position = start + done
            window = int(np.searchsorted(self._bounds, position, side="right")) - 1
            piece = min(stop - position, int(self._bounds[window + 1]) - position, _PIECE)
            result[done : done + piece] = self._window_rows(window, position, position + piece)
            done += piece
        return result

    def _window_rows(self, window: int, start: int, stop: int) -> np.ndarray:
        first, end = int(self._bounds[window]), int(self._bounds[window + 1])
        key = absorb(absorb(self._key, 2), window)
        place = first + feistel(np.arange(start - first, stop - first), end - first, key)
        low = window * self._window_blocks
        block = low + np.searchsorted(self._ends[low : low + self._window_blocks], place, side="right")
        within = place - np.where(block > 0, self._ends[block - 1], 0)
        return self._block_starts[block] + within


def feistel(index: np.ndarray, n: int, key: int) -> np.ndarray:
    """The place of each index, an integer in [0, n), under a keyed permutation of [0, n): int64 of the same shape."""
    if n <= 1:
        return np.zeros(index.shape, np.int64)
    bits = max(2, (n - 1).bit_length())
    low, high = bits // 2, bits - bits // 2
    result = _rounds(index.astype(np.uint64), low, high, key)
    # Cycle walking: what falls outside [0, n) goes round again.
    outside = np.flatnonzero(result >= n)
    while outside.size:
        again = _rounds(result[outside], low, high, key)
        result[outside] = again
        outside = outside[again >= n]
    return result.view(np.int64)


def _rounds(index: np.ndarray, low: int, high: int, key: int) -> np.ndarray:
    left, right = index >> np.uint64(low), index & np.uint64((1 << low) - 1)
    for r in range(0, _ROUNDS, 2):
        left ^= _round(right, key, r)
        left &= np.uint64((1 << high) - 1)
        right ^= _round(left, key, r + 1)
        right &= np.uint64((1 << low) - 1)
    return (left << np.uint64(low)) | right


def _round(x: np.ndarray, key: int, r: int) -> np.ndarray:
    z = mix64_(x + np.uint64((key + r * GOLDEN) & MASK))
    z >>= np.uint64(32)
    return z
