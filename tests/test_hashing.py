"""Hash buckets: published constants, an implementation in plain integers, and evenness."""

import numpy as np
import pytest
import xxhash

from preprocess import hashing
from widedeep.splitmix import mix64_

# First outputs of splitmix64 from state 0 (Vigna's reference program): the finaliser of multiples of the golden ratio.
SPLITMIX64 = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC, 0x1B39896A51A8749B]


def plain_mix(z: int) -> int:
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def test_mix64_is_the_finaliser_of_splitmix64():
    states = np.array([0x9E3779B97F4A7C15 * (i + 1) % 2**64 for i in range(5)], np.uint64)
    assert mix64_(states).tolist() == SPLITMIX64
    assert hashing.key(0) == SPLITMIX64[0]


@pytest.mark.parametrize("seed", [0, 1, 2**63])
@pytest.mark.parametrize("buckets", [1, 4, 300_000])
def test_id_buckets_match_plain_integers(seed, buckets):
    values = np.array([-1, 0, 1, 2, 2**31 - 2, 2**53, 2**63 - 1, -(2**63)])
    key = plain_mix((seed + 0x9E3779B97F4A7C15) % 2**64)
    want = [plain_mix((int(v) % 2**64) ^ key) % buckets for v in values]
    assert hashing.id_buckets(values, buckets, seed).tolist() == want


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint32])
def test_the_bucket_does_not_depend_on_the_integer_type(dtype):
    values = np.arange(1000)
    np.testing.assert_array_equal(hashing.id_buckets(values.astype(dtype), 777), hashing.id_buckets(values, 777))


def test_a_null_is_the_integer_minus_one():
    assert hashing.null_bucket(1000) == hashing.id_buckets(np.array([-1], np.int32), 1000)[0]


def test_strings_hash_by_xxh3_of_utf8():
    values = ["", "US>CA>803", "é", "日本"]
    want = [xxhash.xxh3_64_intdigest(v.encode()) % 2500 for v in values]
    assert hashing.string_buckets(values, 2500).tolist() == want
    assert hashing.string_buckets([], 2500).shape == (0,)
    # xxh3-64 of nothing with seed 0, as the reference implementation publishes it.
    assert hashing.string_buckets([""], 2**31 - 1)[0] == 0x2D06800538D394C2 % (2**31 - 1)


def test_consecutive_ids_fill_buckets_evenly():
    counts = np.bincount(hashing.id_buckets(np.arange(1_000_000), 1000), minlength=1000)
    chi_squared = ((counts - 1000) ** 2 / 1000).sum()
    assert 800 < chi_squared < 1200  # 999 degrees of freedom: mean 999, standard deviation 45


@pytest.mark.parametrize("fraction", [0.0, 0.2, 1.0])
def test_selection_takes_its_fraction_and_is_independent_of_the_seed(fraction):
    ids = np.arange(200_000)
    one, two = (hashing.is_selected(ids, fraction, seed) for seed in (1, 2))
    assert one.mean() == pytest.approx(fraction, abs=0.005)
    assert (one & two).mean() == pytest.approx(fraction**2, abs=0.005)
