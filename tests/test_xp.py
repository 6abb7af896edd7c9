"""The array module: the stand-in for cupy is as strict as it says, streams, tables, and the kernels against numpy."""

import ctypes
import inspect
import shutil
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pytest
import strict_cupy

from preprocess import csv_io, hashing, kernels, xp
from preprocess.outbrain import clicks, layout, store
from preprocess.outbrain.lookup import Lookup
from preprocess.outbrain.similarity import Attributes
from preprocess.outbrain.transform import _filled

IDS = np.array([-1, 0, 1, 63, 64, 2**31 - 2, 2**31 - 1], np.int32)


# --- the stand-in -----------------------------------------------------------------------------------------------------


def test_the_stand_in_has_the_parameters_of_cupy():
    cupy = pytest.importorskip("cupy")
    for name in strict_cupy.__all__:
        assert inspect.signature(getattr(cupy, name)).parameters.keys() == parameters(strict_cupy, name), name
    methods = [m for m in vars(strict_cupy.ndarray) if not m.startswith("_") and callable(getattr(cupy.ndarray, m))]
    assert {"astype", "get", "set", "sum", "view"} == set(methods)
    for name in methods:  # the first line of their docstrings is all that says it
        line = getattr(cupy.ndarray, name).__doc__.splitlines()[0]
        found = [p.strip(" *").split("=")[0] for p in line[line.index("(") + 1 : line.index(")")].split(",")]
        assert found == [*parameters(strict_cupy.ndarray, name)], name
    for kind in strict_cupy.TYPES:
        assert getattr(cupy, kind.__name__) is kind


def parameters(owner, name):
    return inspect.signature(getattr(owner, name)).parameters.keys()


@pytest.mark.parametrize(
    "wrong",
    [
        lambda a: np.sum(a),
        lambda a: np.asarray(a),
        lambda a: a + np.arange(4),
        lambda a: np.arange(4) + a,
        lambda a: np.arange(4)[a],
        lambda a: a[np.arange(4)],
        lambda a: a[[0, 1]],
        lambda a: list(a),
        lambda a: strict_cupy.where(a > 1, np.arange(4), 0),
        lambda a: strict_cupy.asarray(["text"]),
        lambda a: a[a + 1],
        lambda a: a.__setitem__(a > 0, a),
        lambda a: strict_cupy.log(a),
        lambda a: bool(a),
    ],
)
def test_the_stand_in_refuses(wrong):
    with pytest.raises((TypeError, ValueError, IndexError, AttributeError)):
        wrong(strict_cupy.arange(4))


def test_the_stand_in_computes_with_scalars_of_both_kinds():
    a = strict_cupy.arange(4, dtype=np.int32)
    assert (a + 1).dtype == np.int32
    assert (np.int64(1) + a).dtype == np.int64
    assert (np.uint64(1) << a.astype(np.uint64)).get().tolist() == [1, 2, 4, 8]
    assert (10 - a)[a > 1].get().tolist() == [8, 7]


def test_work_of_another_stream_is_seen_unless_it_was_waited_for():
    mine, other = (strict_cupy.Stream(non_blocking=True) for _ in range(2))
    with mine:
        array = strict_cupy.arange(3) + 1
    with other, pytest.raises(AssertionError, match="another stream"):
        array + 1
    mine.synchronize()
    with other:
        assert (array + 1).get().tolist() == [2, 3, 4]


def test_a_copy_to_the_host_is_poison_until_the_stream_is_waited_for():
    out = np.zeros(3, np.uint8)
    with strict_cupy.Stream(non_blocking=True) as stream:
        strict_cupy.ones(3, np.uint8).get(out=out, blocking=False)
        assert out.tolist() == [strict_cupy.POISON] * 3
        stream.synchronize()
    assert out.tolist() == [1, 1, 1]


# --- streams and tables -----------------------------------------------------------------------------------------------


def test_each_thread_has_one_stream_of_its_own(cupy):
    meeting = threading.Barrier(3, timeout=30)

    def streams(_):
        meeting.wait()
        found = set()
        for _ in range(3):
            with xp.arrays("cuda") as module:
                assert module is cupy
                found.add(cupy.cuda.get_current_stream())
        return found

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(streams, range(3)))
    assert [len(s) for s in found] == [1, 1, 1]
    assert len(set.union(*found)) == 3


def test_host_copies_of_many_arrays_are_whole_after_one_wait(cupy):
    columns = {
        "bytes": np.arange(7, dtype=np.uint8),
        "none": np.empty(0, np.float64),
        "lists": np.arange(30, dtype=np.int16).reshape(10, 3) - 5,
        "numbers": np.random.default_rng(1).standard_normal(1001).astype(np.float32),
        "part": np.arange(20)[::3],
    }
    with xp.arrays("cuda"):
        device = {name: cupy.asarray(values) for name, values in columns.items()}
        device["part"] = cupy.arange(20)[::3]
        before = strict_cupy.counts["waits"]
        host = xp.to_host_all(device, cupy)
    assert strict_cupy.counts["waits"] - before == (1 if cupy is strict_cupy else 0)
    for name, values in columns.items():
        assert host[name].dtype == values.dtype
        np.testing.assert_array_equal(host[name], values, err_msg=name)


@dataclass(frozen=True)
class Inner:
    c: np.ndarray


@dataclass(frozen=True)
class Table:
    a: np.ndarray
    inner: Inner


def test_a_table_is_uploaded_once_and_whole_for_every_thread(tmp_path, cupy):
    values = Table(np.arange(50_000), Inner(np.empty(0, np.float32)))
    store.save(tmp_path, "t", values)
    before = strict_cupy.counts["uploads"]
    meeting = threading.Barrier(4, timeout=30)

    def total(_):
        meeting.wait()
        with xp.arrays("cuda"):
            table = store.load(tmp_path, "t", Table, "cuda")
            assert table.inner.c.size == 0
            return id(table), int((table.a + 1).sum())

    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(total, range(4)))
    assert len(found) == 1
    assert found.pop()[1] == int((values.a + 1).sum())
    assert strict_cupy.counts["uploads"] - before == (1 if cupy is strict_cupy else 0)


# --- kernels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 255, 256, 257, 3000])
@pytest.mark.parametrize("buckets", [1, 4, 300_000, 2**31 - 1])
def test_buckets_on_a_gpu_are_those_of_a_cpu(n, buckets, cupy):
    ids = np.random.default_rng(n).integers(-1, 2**31 - 1, n, dtype=np.int32)
    ids[: len(IDS)] = IDS[:n]
    got = hashing.buckets_or_null(cupy.asarray(ids), buckets, cupy)
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got.get(), hashing.buckets_or_null(ids, buckets))
    assert got.get().tolist() == [hashing.id_buckets(np.array([i]), buckets)[0] if i >= 0 else -1 for i in ids]


@pytest.mark.parametrize(("keys", "largest"), [(0, 0), (1, 0), (1, 2**31 - 2), (1000, 3000), (1000, 2**31 - 2)])
def test_look_ups_on_a_gpu_find_what_those_on_a_cpu_find(keys, largest, tmp_path, cupy):
    rng = np.random.default_rng(keys + largest % 97)
    known = np.unique(rng.integers(0, largest + 1, keys, dtype=np.int32))
    rng.shuffle(known)
    table = Lookup.build(known)
    asked = np.concatenate([[-1, 0, 1, largest, 2**31 - 1], known, known + 1, rng.integers(0, 2**31 - 1, 500)])
    asked = np.clip(asked, -1, 2**31 - 1).astype(np.int32)
    store.save(tmp_path, "t", table)
    with xp.arrays("cuda"):
        got = store.load(tmp_path, "t", Lookup, "cuda").find(cupy.asarray(asked), cupy)
        assert got.dtype == np.int32
        np.testing.assert_array_equal(got.get(), table.find(asked))


@pytest.mark.parametrize("kind", [np.bool_, np.uint8, np.int16, np.int32, np.float32, np.int64, np.float64])
@pytest.mark.parametrize("width", [(), (3,), (1,)])
def test_rows_are_taken_of_columns_of_any_type(kind, width, cupy):
    rng = np.random.default_rng(5)
    column = rng.integers(-9, 9, (70, *width)).astype(kind)
    for n in (0, 1, 300):
        row = rng.integers(-1, 70, n, dtype=np.int32)
        got = xp.take(cupy.asarray(column), cupy.asarray(row), cupy)
        assert got.dtype == kind
        np.testing.assert_array_equal(got.get(), xp.take(column, row))
    both = cupy.asarray(np.stack([column, column[::-1]]))
    np.testing.assert_array_equal(xp.take(both[1], cupy.asarray(row), cupy).get(), column[::-1][row])


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.uint32])
@pytest.mark.parametrize("n", [0, 1, 31, 32, 33, 256, 257, 1000])
def test_nulls_are_filled_and_counted(kind, n, cupy):
    values = np.random.default_rng(n).integers(-1, 200, n, dtype=np.int32)
    values[n // 2 :][: n // 4] = -1
    want, nulls = _filled(values, 77, kind, np)
    got, count = _filled(cupy.asarray(values), 77, kind, cupy)
    assert got.dtype == want.dtype == kind
    np.testing.assert_array_equal(got.get(), want)
    assert int(count.get()) == nulls == (values == -1).sum()


@pytest.mark.parametrize("n", [0, 1, 257, 3000])
def test_ages_and_their_histograms(n, cupy):
    """Every age around the limits, the future, missing times of both kinds."""
    rng = np.random.default_rng(n)
    days = rng.choice([-4000, -1, 0, 1, 3649, 3650, 3651, 9000], n) * layout.MILLISECONDS_A_DAY
    timestamp = rng.integers(0, 15 * layout.MILLISECONDS_A_DAY, n)
    published = timestamp + layout.ORIGIN_MS - days - rng.choice([-1, 0, 1, 5_000_000], n)
    timestamp[rng.random(n) < 0.1] = -1
    published[rng.random(n) < 0.3] = csv_io.NULL_TIME
    chosen = rng.random(n) < 0.7
    want, unknown = clicks.age_in_days(timestamp, published)
    got, count = clicks.age_in_days(cupy.asarray(timestamp), cupy.asarray(published), cupy)
    np.testing.assert_array_equal(got.get(), want)
    assert int(count.get()) == unknown == (want == clicks.MISSING_AGE).sum()
    for mask in (chosen, None):
        on_device = None if mask is None else cupy.asarray(mask)
        histogram = clicks._histogram(got, on_device, cupy).get()
        np.testing.assert_array_equal(histogram, clicks._histogram(want, mask, np))
    if n == 3000:
        assert np.count_nonzero(histogram) > 5


def entries(case: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Documents, attributes, confidences."""
    rng = np.random.default_rng(len(case))
    documents, attributes = {
        "none": (0, 0),
        "one": ([7], [3]),
        "a document with thousands": (
            np.r_[np.zeros(3000, int), np.repeat(np.arange(1, 100), 3)],
            np.r_[rng.permutation(3000), rng.integers(0, 3000, 297)],
        ),
        "shared attributes": (np.repeat(np.arange(0, 400, 2), 9), rng.integers(0, 12, 1800)),
        "pairs many times": (rng.integers(0, 30, 2000), rng.integers(0, 20, 2000)),
        "one attribute for all": (np.arange(200), np.zeros(200)),
    }[case]
    documents = np.atleast_1d(np.asarray(documents, np.int32))[: 0 if case == "none" else None]
    attributes = np.atleast_1d(np.asarray(attributes, np.int32))[: len(documents)]
    return documents, attributes, rng.uniform(0, 1, len(documents))


CASES = (
    "none", "one", "a document with thousands", "shared attributes", "pairs many times", "one attribute for all",
)  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_similarities_on_a_gpu_have_the_bits_of_those_on_a_cpu(case, tmp_path, cupy):
    """Known documents, unknown ones and nulls; a document with itself; each pair in both directions."""
    documents, attributes, confidences = entries(case)
    table = Attributes.build(documents, attributes, confidences)
    rng = np.random.default_rng(0)
    known = np.unique(documents) if len(documents) else np.array([4])
    left, right = np.where(rng.random((2, 900)) < 0.8, rng.choice(known, (2, 900)), rng.integers(-1, 500, (2, 900)))
    left, right = (np.r_[a, b, known, -1].astype(np.int32) for a, b in ((left, right), (right, left)))
    want = table.similarity(left, right).astype(np.float32)
    store.save(tmp_path, "t", table)
    with xp.arrays("cuda"):
        on_device = store.load(tmp_path, "t", Attributes, "cuda")
        got = on_device.similarity(cupy.asarray(left), cupy.asarray(right), cupy).get()
        assert on_device.similarity(cupy.asarray(left[:0]), cupy.asarray(left[:0]), cupy).shape == (0,)
    np.testing.assert_array_equal(got, want)
    if case not in ("none", "one", "one attribute for all"):
        assert (want > 0).sum() > 100


def test_a_kernel_gets_what_it_expects():
    """The checks that stand in for those that a GPU does not make."""
    rows = [strict_cupy.zeros(2, t) for t in (np.int64, np.int64, np.uint64, np.int32, np.float64)]
    one = strict_cupy.zeros(1, np.int32)
    kernels.similarity(one, one, *rows, strict_cupy)
    with pytest.raises(TypeError, match="start is i64"):
        kernels.similarity(one, one, one, *rows[1:], strict_cupy)
    with pytest.raises(TypeError, match="left is not contiguous"):
        kernels.similarity(strict_cupy.zeros(6, np.int32)[::2], one, *rows, strict_cupy)
    with pytest.raises(RuntimeError, match="similarity"):
        kernels.similarity(one + np.int32(100), one, *rows, strict_cupy)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_kernels_compile_without_warnings_or_local_memory(arch, tmp_path):
    options = [*kernels.OPTIONS, f"-arch={arch}", "-Werror=all-warnings", "-Xptxas=-v", "-cubin"]
    command = ["nvcc", *options, "-o", tmp_path / "kernels.cubin", kernels.SOURCE]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("0 bytes stack frame, 0 bytes spill stores") == kernels.SOURCE.read_text().count(
        "__global__"
    )


def test_nvrtc_takes_the_source():
    try:
        nvrtc = ctypes.CDLL("libnvrtc.so.13")
    except OSError:
        pytest.skip("no libnvrtc.so.13 on the library path")
    program, source = ctypes.c_void_p(), kernels.SOURCE.read_bytes()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, b"kernels.cu", 0, None, None) == 0
    options = [o.encode() for o in (*kernels.OPTIONS, "-arch=sm_90", "--device-as-default-execution-space")]
    error = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    assert error == 0, log.value.decode()
    assert nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)) == 0
    assert size.value > 1000
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
