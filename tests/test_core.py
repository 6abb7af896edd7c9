"""The arithmetic of csrc/core, compiled alone: the same lines that the CPU ops and the CUDA kernels run."""

import ctypes
import functools
import math
import operator
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
U64, I64, F32 = ctypes.c_uint64, ctypes.c_int64, ctypes.c_float
GOLDEN, MASK = 0x9E3779B97F4A7C15, (1 << 64) - 1


@pytest.fixture(scope="module")
def core(tmp_path_factory):
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    library = tmp_path_factory.mktemp("core") / "core.so"
    flags = ["-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared"]
    source = ROOT / "tests" / "native" / "core_probe.cpp"
    subprocess.run([compiler, *flags, f"-I{ROOT / 'csrc'}", source, "-o", library], check=True)
    lib = ctypes.CDLL(str(library))
    for name, result in [("dropout_scale", F32), ("mix64", U64), ("catch_up", F32)]:
        getattr(lib, f"probe_{name}").restype = result
    for name, result in [("bce", F32), ("sigmoid", F32), ("auc_bin", I64)]:
        getattr(lib, f"probe_{name}").restype = result
    return lib


def words(*values):
    return np.array(values, dtype=np.uint32)


# counter, key, result: the known-answer vectors that ship with the authors' Random123 library.
PHILOX = {
    7: [
        ([0] * 4, [0] * 2, [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A],
        ),
    ],
    10: [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
}


@pytest.mark.parametrize("rounds", [7, 10])
def test_philox_known_answers(core, rounds):
    for counter, key, want in PHILOX[rounds]:
        got = words(0, 0, 0, 0)
        getattr(core, f"probe_philox{rounds}")(words(*counter).ctypes, words(*key).ctypes, got.ctypes)
        assert [hex(v) for v in got] == [hex(v) for v in want]


def dropout_keep(core, p, seed, step, layer, first_row, rows, columns):
    keep, keep8 = np.empty((rows, columns), np.uint8), np.empty((rows, columns), np.uint8)
    core.probe_dropout(
        ctypes.c_double(p), U64(seed), U64(step), ctypes.c_uint32(layer), I64(first_row), I64(rows), I64(columns),
        keep.ctypes, keep8.ctypes,
    )  # fmt: skip
    np.testing.assert_array_equal(keep, keep8)
    return keep.astype(bool)


def test_dropout_bits_follow_the_documented_layout(core):
    """Element by element from philox7, the way docs/architecture.md words it."""
    seed, step, layer, row, threshold = 0x1234567890ABCDEF, 5 + (7 << 32), 3, 11, 2 * round(0.3 * 32768)
    keep = dropout_keep(core, 0.3, seed, step, layer, row, 2, 96)
    for b in range(2):
        for n in range(96):
            got = words(0, 0, 0, 0)
            counter = words((row + b) // 2, (layer << 24) | n // 8, step & 0xFFFFFFFF, step >> 32)
            core.probe_philox7(counter.ctypes, words(seed & 0xFFFFFFFF, seed >> 32).ctypes, got.ctypes)
            in_order = [int(w) >> shift & 0xFF for w in got for shift in (0, 8, 16, 24)]
            parity = functools.reduce(operator.xor, in_order)
            byte = in_order[(row + b) % 2 * 8 + n % 8]
            assert keep[b, n] == (2 * (byte % 128 * 256 + parity) >= threshold)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9])
def test_dropout_drops_a_fraction_p_without_a_pattern(core, p):
    keep = dropout_keep(core, p, 42, 1000, 2, 0, 2048, 256)
    n = keep.size
    assert abs(keep.mean() - (1 - p)) <= 5 * math.sqrt(p * (1 - p) / n) + 1 / 32768
    if p > 0:
        for axis, count in [(0, 2048), (1, 256)]:
            assert np.abs(keep.mean(axis) - (1 - p)).max() <= 6 * math.sqrt(p * (1 - p) / count)
        other = dropout_keep(core, p, 42, 1001, 2, 0, 2048, 256)
        agreement = (keep == other).mean()
        assert abs(agreement - (p * p + (1 - p) ** 2)) < 0.01
    threshold = 2 * math.floor(p * 32768 + 0.5)
    assert core.probe_dropout_scale(ctypes.c_double(p)) == np.float32(65536 / (65536 - threshold))


def test_dropout_mask_of_part_of_a_batch_is_part_of_the_mask(core):
    whole = dropout_keep(core, 0.2, 9, 3, 1, 0, 64, 100)
    for first in (40, 41):
        np.testing.assert_array_equal(whole[first:], dropout_keep(core, 0.2, 9, 3, 1, first, 64 - first, 100))


def mix64(z):
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


def test_mix64_gives_the_published_splitmix64_sequence(core):
    """First outputs of splitmix64 from seed 1234567, as printed by the reference generator."""
    want = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert [core.probe_mix64(U64((1234567 + (i + 1) * GOLDEN) & MASK)) for i in range(5)] == want


def feistel(core, n, key, i):
    i = np.ascontiguousarray(i, np.uint64)
    out, back = np.empty_like(i), np.empty_like(i)
    core.probe_feistel(U64(n), U64(key), i.ctypes, U64(len(i)), out.ctypes, back.ctypes)
    np.testing.assert_array_equal(back, i)
    return out


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 17, 64, 65, 1000, 4097])
def test_feistel_is_a_permutation(core, n):
    np.testing.assert_array_equal(np.sort(feistel(core, n, 99, np.arange(n))), np.arange(n))


@pytest.mark.parametrize("n", [(1 << 33) + 5, (1 << 61) + 1])
def test_feistel_beyond_32_bits(core, n):
    i = np.array([0, 1, n // 3, 1 << 32, n - 1], dtype=np.uint64)
    out = feistel(core, n, 5, i)  # checks the inverse
    assert (out < n).all()
    assert len(set(out.tolist())) == 5


def test_feistel_position_and_value_are_independent(core):
    n = 4096
    for key in range(8):
        r = np.corrcoef(np.arange(n), feistel(core, n, mix64(key), np.arange(n)).astype(float))[0, 1]
        assert abs(r) < 5 / math.sqrt(n)


def epoch(core, rows, block, window, seed, number, start=0, count=None):
    count = rows - start if count is None else count
    out = np.empty(count, np.uint64)
    core.probe_epoch(*(U64(v) for v in (rows, block, window, seed, number, start, count)), out.ctypes)
    return out.astype(np.int64)


@pytest.mark.parametrize("rows", [1, 2, 7, 63, 64, 65, 1000, 1024, 1031])
@pytest.mark.parametrize(("block", "window"), [(1, 1), (8, 32), (16, 20), (64, 1 << 20), (2000, 1)])
def test_epoch_order_is_a_permutation_made_of_whole_blocks(core, rows, block, window):
    for number in range(3):
        order = epoch(core, rows, block, window, 11, number)
        np.testing.assert_array_equal(np.sort(order), np.arange(rows))
        # From the definition: cut the order where its windows end; every block lies in one window.
        per_window = -(-window // block)
        blocks = -(-rows // block)
        seen, at = set(), 0
        for first in range(0, blocks, per_window):
            count = min(per_window, blocks - first)
            ids, size = set(), 0
            while len(ids) < count or size < sum(min((k + 1) * block, rows) - k * block for k in ids):
                ids.add(int(order[at + size]) // block)
                size += 1
            assert not ids & seen
            seen |= ids
            at += size
        assert at == rows


def test_epoch_order_differs_by_epoch_and_seed_and_can_start_anywhere(core):
    base = epoch(core, 5000, 64, 512, 1, 0)
    assert (base != epoch(core, 5000, 64, 512, 1, 1)).mean() > 0.9
    assert (base != epoch(core, 5000, 64, 512, 2, 0)).mean() > 0.9
    np.testing.assert_array_equal(base[1234:2345], epoch(core, 5000, 64, 512, 1, 0, 1234, 1111))


def test_epoch_order_of_a_small_set_mixes_all_rows(core):
    order = epoch(core, 4096, 64, 1 << 20, 3, 0)
    assert abs(np.corrcoef(np.arange(4096), order)[0, 1]) < 0.08
    assert (np.abs(np.diff(order)) == 1).mean() < 0.01  # blocks do not survive


def test_rmsprop_steps_match_the_dense_rule_through_pauses(core):
    rng = np.random.default_rng(0)
    w, rms = F32(0.5), F32(0.0)
    w64, rms64, last = 0.5, 0.0, -1
    for step in range(60):
        touched = rng.random() < 0.3
        g = float(np.float32(rng.normal() * 1e-3)) if touched else 0.0
        rms64 = 0.5 * rms64 + 0.5 * g * g
        if touched:
            w64 -= 1e-2 * g / (math.sqrt(rms64) + 1e-7)
            decay = core.probe_catch_up(I64(step), I64(last), F32(0.5))
            core.probe_rmsprop(
                ctypes.byref(w), ctypes.byref(rms), F32(g), F32(decay), F32(1e-2), F32(0.5), F32(1e-7)
            )  # fmt: skip
            last = step
            assert rms.value == pytest.approx(rms64, rel=1e-6)
    assert w.value == pytest.approx(w64, rel=1e-5)


def test_catch_up_is_exact_for_a_half(core):
    for missed in [0, 1, 2, 31, 126, 149, 150, 151, 10**6, 2**40]:
        got = core.probe_catch_up(I64(missed + 1), I64(0), F32(0.5))
        assert got == np.float32(0.5**missed if missed < 1100 else 0.0)
    assert core.probe_catch_up(I64(3), I64(3), F32(0.5)) == 1.0  # nothing missed, even when called twice in a step
    assert core.probe_catch_up(I64(101), I64(0), F32(0.9)) == pytest.approx(0.9**100, rel=1e-5)


def ftrl64(w, accum, linear, g, lr, l1, l2):
    """The proximal step by its definition: argmin of linear w + |w| l1 + (sqrt(n) / lr + 2 l2) w^2 / 2."""
    n = accum + g * g
    linear += g - (math.sqrt(n) - math.sqrt(accum)) / lr * w
    shrunk = math.copysign(max(abs(linear) - l1, 0.0), -linear)
    return shrunk / (math.sqrt(n) / lr + 2 * l2), n, linear


@pytest.mark.parametrize(("l1", "l2"), [(0.0, 0.0), (0.01, 0.0), (0.0, 0.1), (0.02, 0.3)])
def test_ftrl_steps_match_the_proximal_rule(core, l1, l2):
    rng = np.random.default_rng(1)
    w, accum, linear = F32(0.04), F32(0.1), F32(0.0)
    want = (w.value, accum.value, 0.0)
    for _ in range(50):
        g = float(np.float32(rng.normal() * 0.05))
        core.probe_ftrl(
            ctypes.byref(w), ctypes.byref(accum), ctypes.byref(linear), F32(g), F32(0.02), F32(l1), F32(l2)
        )  # fmt: skip
        want = ftrl64(*want, g, 0.02, l1, l2)
        np.testing.assert_allclose([w.value, accum.value, linear.value], want, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("g", [0.0, 1e-24, -1e-30])
def test_ftrl_first_gradient_whose_square_is_zero_from_an_empty_accumulator_is_finite(core, g):
    w, accum, linear = F32(0.04), F32(0.0), F32(0.0)
    core.probe_ftrl(ctypes.byref(w), ctypes.byref(accum), ctypes.byref(linear), F32(g), F32(0.02), F32(0), F32(0))
    assert (w.value, accum.value, linear.value) == (0.0, 0.0, F32(g).value)


@pytest.mark.parametrize("z", [-200.0, -20.0, -1.0, 0.0, 1e-4, 3.0, 90.0, 1e30])
@pytest.mark.parametrize("y", [0.0, 1.0])
def test_bce_and_sigmoid(core, z, y):
    z = float(np.float32(z))
    softplus = max(z, 0.0) + math.log1p(math.exp(-abs(z)))
    assert core.probe_bce(F32(z), F32(y)) == pytest.approx(softplus - z * y, rel=2e-7, abs=1e-30)
    sigmoid = 1 / (1 + math.exp(-z)) if z > -700 else 0.0
    assert core.probe_sigmoid(F32(z)) == pytest.approx(sigmoid, rel=3e-7, abs=1e-38)


@pytest.mark.parametrize("thresholds", [2, 3, 200, 8000])
def test_auc_bin_is_the_count_of_thresholds_passed(core, thresholds):
    rng = np.random.default_rng(thresholds)
    inner = np.arange(1, thresholds - 1) / (thresholds - 1)  # Keras builds them in double and rounds
    t = np.concatenate([[-1e-7], inner, [1 + 1e-7]]).astype(np.float32)
    logits = np.concatenate([rng.normal(size=3000) * 4, [0.0, -200.0, 200.0, -15.9, np.inf, -np.inf]]).astype(
        np.float32
    )
    on_threshold = np.log(inner / (1 - inner)) if thresholds > 2 else np.zeros(0)
    logits = np.concatenate([logits, on_threshold.astype(np.float32)])
    with np.errstate(over="ignore"):
        p = (1 / (1 + np.exp(-logits.astype(np.float64)))).astype(np.float32)
    want = (p[:, None] > t[None, :]).sum(1) - 1
    got = [core.probe_auc_bin(F32(z), I64(thresholds - 1)) for z in logits]
    np.testing.assert_array_equal(got, want)
    assert core.probe_auc_bin(F32(float("nan")), I64(thresholds - 1)) == 0
