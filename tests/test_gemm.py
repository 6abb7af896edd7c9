"""The matrix product in every instruction set it is written for, not only that of the installed build."""

import ctypes
import mmap
import os
import platform
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PROT_NONE = 0  # which Python's mmap does not name
# machine: architecture level: (what gemm_instructions() says, the flag of /proc/cpuinfo that running it needs, if any)
LEVELS = {
    "x86_64": {
        "x86-64": ("portable matrix kernel", None),
        "x86-64-v3": ("AVX2 matrix kernel", "avx2"),
        "x86-64-v4": ("AVX-512 matrix kernel", "avx512f"),
    },
    "aarch64": {"armv8-a": ("NEON matrix kernel", None)},
}.get(platform.machine(), {})
SHAPES = [
    (1, 1, 1),
    (7, 5, 3),
    (6, 16, 8),
    (13, 33, 1),
    (100, 129, 301),  # past whole panels in every direction
    (14, 989, 257),
    (97, 1, 1030),  # more than one slab of the depth
    (1, 300, 2000),
]


@pytest.fixture(scope="module", params=LEVELS)
def gemm(request, tmp_path_factory):
    """The compiled probe of one level; compiled even where it cannot run."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    words, flag = LEVELS[request.param]
    library = tmp_path_factory.mktemp("gemm") / "gemm.so"
    flags = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", f"-march={request.param}"]
    sources = [ROOT / "tests" / "native" / "gemm_probe.cpp", ROOT / "csrc" / "cpu" / "gemm.cpp"]
    command = [compiler, *flags, "-fPIC", "-shared", f"-I{ROOT / 'csrc'}", *sources, "-o", library]
    subprocess.run(command, check=True)
    if flag and f" {flag} " not in Path("/proc/cpuinfo").read_text().replace("\n", " "):
        pytest.skip(f"this processor has no {flag}: compiled, not run")
    lib = ctypes.CDLL(str(library))
    lib.probe_instructions.restype = ctypes.c_char_p
    assert lib.probe_instructions().decode() == words
    return lib


def pointer(array):
    return array.ctypes.data_as(ctypes.c_void_p)


def sizes(*values):
    return [ctypes.c_int64(v) for v in values]


TYPES = [torch.float32, torch.float16, torch.bfloat16]  # in the order of core::DType


def normal(g, *shape, dtype=torch.float32):
    """A float32 matrix of values that `dtype` holds."""
    return torch.from_numpy(g.standard_normal(shape, np.float32)).to(dtype).float().numpy()


def stored(matrix, transposed, extra, fill=np.nan, dtype=torch.float32):
    """(memory, row stride) of a matrix, or of its transpose, in rows longer than needed; poison fills the rest."""
    matrix = matrix.T if transposed else matrix
    memory = np.full((matrix.shape[0], matrix.shape[1] + extra), fill, np.float32)
    memory[:, : matrix.shape[1]] = matrix
    if dtype != torch.float32:
        memory = torch.from_numpy(memory).to(dtype).view(torch.int16).numpy()
    return memory, memory.shape[1]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("transposed", [(0, 0), (0, 1), (1, 0), (1, 1)], ids=["AB", "ABt", "AtB", "AtBt"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_gemm_matches_float64(gemm, shape, transposed, dtype):
    """At the same limit for every type: products of rounded operands are sums of floats too."""
    M, N, K = shape
    g = np.random.default_rng(shape)
    a, b = normal(g, M, K, dtype=dtype), normal(g, K, N, dtype=dtype)
    a_memory, a_stride = stored(a, transposed[0], 3, dtype=dtype)
    b_memory, b_stride = stored(b, transposed[1], 5, dtype=dtype)
    c, c_stride = stored(np.full((M, N), np.nan), False, 2, fill=77)
    gemm.probe_gemm(
        *sizes(M, N, K),
        TYPES.index(dtype),
        *(pointer(a_memory), ctypes.c_int64(a_stride), transposed[0]),
        *(pointer(b_memory), ctypes.c_int64(b_stride), transposed[1]),
        *(pointer(c), ctypes.c_int64(c_stride)),
    )
    want = a.astype(np.float64) @ b.astype(np.float64)
    np.testing.assert_allclose(c[:, :N], want, rtol=0, atol=2e-7 * K**0.5 * max(1, np.abs(want).max()))
    assert (c[:, N:] == 77).all()


def before_a_hole(array):
    """A copy that ends where an inaccessible page begins."""
    memory = mmap.mmap(-1, -(-array.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE + mmap.PAGESIZE)
    room = len(memory) - mmap.PAGESIZE
    copy = np.frombuffer(memory, np.uint8)[room - array.nbytes : room].view(array.dtype).reshape(array.shape)
    copy[:] = array
    libc, hole = ctypes.CDLL(None, use_errno=True), copy.ctypes.data + array.nbytes
    assert libc.mprotect(ctypes.c_void_p(hole), ctypes.c_size_t(mmap.PAGESIZE), PROT_NONE) == 0
    return copy


@pytest.mark.parametrize("transposed", [(0, 0), (1, 1)], ids=["AB", "AtBt"])
@pytest.mark.parametrize("dtype", TYPES[:2], ids=str)
def test_gemm_touches_nothing_behind_its_matrices(gemm, transposed, dtype):
    """In a process of its own, which a touch would end."""
    calls = []  # made before the fork: torch's threads do not outlive it
    for M, N, K in [shape for shape in SHAPES if max(shape) < 1000]:
        g = np.random.default_rng(0)
        pairs = [(normal(g, M, K, dtype=dtype), transposed[0]), (normal(g, K, N, dtype=dtype), transposed[1])]
        (a, a_stride), (b, b_stride) = (stored(m, t, 0, dtype=dtype) for m, t in pairs)
        memory = before_a_hole(a), before_a_hole(b), before_a_hole(np.zeros((M, N), np.float32))
        strides = [ctypes.c_int64(n) for n in (a_stride, b_stride, N)]
        calls.append(((M, N, K), memory, strides))
    pid = os.fork()
    if pid == 0:
        try:
            for shape, (a, b, c), (a_stride, b_stride, c_stride) in calls:
                given = pointer(a), a_stride, transposed[0], pointer(b), b_stride, transposed[1]
                gemm.probe_gemm(*sizes(*shape), TYPES.index(dtype), *given, pointer(c), c_stride)
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0


def test_gemm_of_depth_zero_is_zero(gemm):
    c = np.full((9, 20), np.nan, np.float32)
    bits = np.full((9, 20), 77, np.int16)
    nothing = np.zeros(1, np.float32)
    one = ctypes.c_int64(1)
    gemm.probe_gemm(
        *sizes(9, 20, 0), 0, pointer(nothing), one, 0, pointer(nothing), one, 0, pointer(c), ctypes.c_int64(20)
    )
    assert (c == 0).all()
    gemm.probe_scratch(*sizes(9, 20, 0), pointer(nothing), pointer(nothing), pointer(bits))
    assert (bits == 0).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_results_in_scratch_are_rounded_to_nearest_even(gemm, shape):
    """Sums of integers are exact in float, so that the rounding to bfloat16 is all there is to differ."""
    M, N, K = shape
    g = np.random.default_rng(shape)
    a, b = (torch.from_numpy(g.integers(-60, 61, size)) for size in ((M, K), (K, N)))
    c = torch.full((M, N), 77, dtype=torch.int16)
    operands = [m.bfloat16().view(torch.int16).numpy() for m in (a, b)]
    gemm.probe_scratch(*sizes(M, N, K), *map(pointer, operands), pointer(c.numpy()))
    assert torch.equal(c.view(torch.bfloat16), (a @ b).bfloat16())


def test_ties_infinities_and_nan_become_bfloat16(gemm):
    """1 + 2^-8 lies between 1 and 1 + 2^-7, 1 + 3 * 2^-8 between that and 1 + 2^-6: the even one of each."""
    inf, nan = float("inf"), float("nan")
    rows = [[1, 2**-8, 0], [1, 3 * 2**-8, 0], [1, 2**-8, 2**-16], [3e38, 3e38, 0], [1, nan, 0], [-1, 2**-133, 0]]
    want = torch.tensor([[1], [1 + 2**-6], [1 + 2**-7], [inf], [nan], [-1]])
    c = torch.full((6, 1), 77, dtype=torch.int16)
    operands = [m.bfloat16().view(torch.int16).numpy() for m in (torch.tensor(rows), torch.ones(3, 1))]
    gemm.probe_scratch(*sizes(6, 1, 3), *map(pointer, operands), pointer(c.numpy()))
    torch.testing.assert_close(c.view(torch.bfloat16).float(), want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("M", "N", "K"), [(7, 5, 3), (100, 300, 40), (200, 129, 1100)])
def test_epilogue_sees_every_finished_element_once(gemm, M, N, K):
    g = np.random.default_rng(0)
    a, b = g.standard_normal((M, K), np.float32), g.standard_normal((K, N), np.float32)
    c, visits = np.full((M, N), np.nan, np.float32), np.zeros((M, N), np.int64)
    gemm.probe_epilogue(*sizes(M, N, K), pointer(a), pointer(b), pointer(c), pointer(visits))
    assert (visits == 1).all()
