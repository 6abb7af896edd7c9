"""The order of an epoch as `widedeep.reference` takes it: the whole permutation at once, in plain torch.

The definition is csrc/core/permute.h; `widedeep/shuffle.py` is its other twin, which readers use.
"""

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15


def _mix64(z: Tensor) -> Tensor:
    def shifted(v, k):  # logical, on int64
        return (v >> k) & ((1 << (64 - k)) - 1)

    z = (z ^ shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ shifted(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ shifted(z, 31)


def _signed(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _absorb(h: int, v: int) -> int:
    return int(_mix64(torch.tensor(_signed(h + v + _GOLDEN))))


def _feistel(n: int, key: int) -> Tensor:
    """The permutation of range(n) that csrc/core/permute.h defines, as a whole."""
    if n <= 1:
        return torch.zeros(n, dtype=torch.int64)
    bits = max((n - 1).bit_length(), 2)
    low = bits // 2
    i = torch.arange(1 << bits)
    L, R = i >> low, i & ((1 << low) - 1)
    for r in range(8):
        noise = (_mix64((L if r % 2 else R) + _signed(key + r * _GOLDEN)) >> 32) & 0xFFFFFFFF
        if r % 2:
            R = (R ^ noise) & ((1 << low) - 1)
        else:
            L = (L ^ noise) & ((1 << (bits - low)) - 1)
    once = (L << low) | R
    i = once[:n]
    while (i >= n).any():  # cycle walking
        i = torch.where(i >= n, once[i], i)
    return i


def epoch_order(rows, block_rows, window_rows, seed, epoch):
    """Row at each position, [rows] int64."""
    order_key = _absorb(_absorb(0, seed), epoch)
    blocks = torch.arange(rows).split(block_rows)
    block_order = _feistel(len(blocks), _absorb(order_key, 1)).tolist()
    per_window = -(-window_rows // block_rows)
    windows = []
    for w, first in enumerate(range(0, len(blocks), per_window)):
        laid = torch.cat([blocks[k] for k in block_order[first : first + per_window]])
        windows.append(laid[_feistel(len(laid), _absorb(_absorb(order_key, 2), w))])
    return torch.cat(windows) if windows else torch.zeros(0, dtype=torch.int64)
