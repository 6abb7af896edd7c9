"""The order of an epoch: every row once, the same from any start, and the same as the compiled twin."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from widedeep.shuffle import EpochOrder, feistel


def shuffle_rows(rows, block_rows, window_rows, seed, epoch, start, count):
    return EpochOrder(rows, seed, epoch, block_rows, window_rows).rows_at(start, start + count)


sizes = st.one_of(st.integers(0, 40), st.integers(0, 5000))


@settings(max_examples=200, deadline=None)
@given(sizes, st.integers(1, 300), st.integers(1, 3000), st.integers(-(2**63), 2**64 - 1), st.integers(0, 1000))
def test_every_row_comes_once(rows, block_rows, window_rows, seed, epoch):
    order = EpochOrder(rows, seed, epoch, block_rows, window_rows).rows_at(0, rows)
    assert order.dtype == np.int64
    np.testing.assert_array_equal(np.sort(order), np.arange(rows))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 100), st.integers(1, 900), st.data())
def test_a_range_of_positions_is_a_slice_of_the_whole(rows, block_rows, window_rows, draw):
    start = draw.draw(st.integers(0, rows))
    count = draw.draw(st.integers(0, rows - start))
    whole = EpochOrder(rows, 5, 2, block_rows, window_rows).rows_at(0, rows)
    part = shuffle_rows(rows, block_rows, window_rows, 5, 2, start, count)
    np.testing.assert_array_equal(part, whole[start : start + count])


def scalar_order(rows, block_rows, window_rows, seed, epoch):
    """The definition in csrc/core/permute.h, word by word, on Python integers."""
    mask = 2**64 - 1

    def mix64(z):
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    def absorb(h, v):
        return mix64((h + v + 0x9E3779B97F4A7C15) & mask)

    def permute(i, n, key):
        if n <= 1:
            return 0
        b = max(2, (n - 1).bit_length())
        low, high = b // 2, b - b // 2
        while True:
            left, right = i >> low, i % 2**low
            for r in range(8):

                def f(x, r=r):
                    return mix64((x + key + r * 0x9E3779B97F4A7C15) & mask) >> 32

                if r % 2 == 0:
                    left = (left ^ f(right)) % 2**high
                else:
                    right = (right ^ f(left)) % 2**low
            i = left * 2**low + right
            if i < n:
                return i

    e = absorb(absorb(0, seed), epoch)
    blocks = [range(k, min(k + block_rows, rows)) for k in range(0, rows, block_rows)]
    blocks = [blocks[permute(q, len(blocks), absorb(e, 1))] for q in range(len(blocks))]
    c = -(-window_rows // block_rows)
    order = []
    for w, first in enumerate(range(0, len(blocks), c)):
        laid = [row for block in blocks[first : first + c] for row in block]
        order += [laid[permute(j, len(laid), absorb(absorb(e, 2), w))] for j in range(len(laid))]
    return order


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 63, 64, 65, 1000])
@pytest.mark.parametrize(("block_rows", "window_rows"), [(1, 1), (7, 20), (64, 128), (4096, 1 << 20)])
def test_matches_the_definition(rows, block_rows, window_rows):
    got = shuffle_rows(rows, block_rows, window_rows, 11, 3, 0, rows)
    assert got.tolist() == scalar_order(rows, block_rows, window_rows, 11, 3)


def test_large_sizes_stay_exact():
    n = 2**33 + 5
    places = np.concatenate([np.arange(1000), n - 1 - np.arange(1000)])
    got = feistel(places, n, 99)
    assert len(np.unique(got)) == 2000
    assert got.min() >= 0
    assert got.max() < n


def test_epochs_and_seeds_differ_and_rows_are_spread():
    orders = [shuffle_rows(4000, 100, 5000, seed, epoch, 0, 4000) for seed, epoch in [(0, 0), (0, 1), (1, 0)]]
    for a in range(3):
        for b in range(a):
            assert (orders[a] == orders[b]).sum() < 40
        # Neighbours in a shuffled order are on average a third of the data set apart.
        assert 0.3 < np.abs(np.diff(orders[a])).mean() / 4000 < 0.37


def test_positions_outside_are_errors():
    with pytest.raises(IndexError):
        shuffle_rows(10, 4, 8, 0, 0, 5, 6)
    with pytest.raises(ValueError):
        EpochOrder(10, 0, 0, block_rows=0)
