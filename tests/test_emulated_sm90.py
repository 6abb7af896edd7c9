"""The Hopper products on the CPU emulator (tests/emulated.py), against float64. Needs no GPU."""

import platform
import shutil
from itertools import pairwise

import emulated
import pytest
import torch

from widedeep import ops, reference
from widedeep.ops import linear_sm90
from widedeep.testing import assert_close, normal, poisoned

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or platform.machine() != "x86_64", reason="the CUDA emulator needs g++ on x86-64"
)

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
# (M, N, K, dtype): one and many tiles, ragged in every direction, fewer and more stages than the ring has
SHAPES = [
    (1, 8, 8, BF16),
    (100, 128, 64, F16),
    (128, 200, 72, BF16),
    (300, 256, 200, F16),
    (257, 136, 648, BF16),
    (100, 128, 40, F32),
    (300, 264, 200, F32),
]


def close(got, want, scale=1.0):
    """As `assert_close`; what came out of TF32 operands differs by their rounding."""
    if got.dtype != F32:
        return assert_close(got, want, scale=scale)
    atol = 1.5e-3 * scale * max(1.0, float(want.abs().max()))
    torch.testing.assert_close(got.double(), want.double(), rtol=0, atol=atol)


def layer(M, N, K, dtype):
    return normal(M, K, dtype=dtype, key="a"), normal(N, K, dtype=dtype, scale=K**-0.5, key="b")


@pytest.mark.parametrize(("M", "N", "K", "dtype"), SHAPES)
@pytest.mark.parametrize(("p", "seed"), [(0.0, 1), (0.1, 2)])
def test_forward_and_gradient(M, N, K, dtype, p, seed):
    emulated.reseed(seed)
    forward_and_gradient(M, N, K, dtype, p)


@pytest.mark.parametrize("multiprocessors", [2, 5])
@pytest.mark.parametrize("seed", [3, 4, 5])
@pytest.mark.parametrize(
    ("M", "N", "K", "dtype"),
    [(700, 520, 200, BF16), (1300, 264, 8, BF16), (520, 136, 400, BF16), (700, 264, 648, F16), (520, 264, 300, F32)],
)
def test_persistent_blocks(multiprocessors, seed, M, N, K, dtype):
    """One or two clusters take all tiles: the ring goes on from tile to tile, and the warpgroups drift apart."""
    emulated.reseed(seed, multiprocessors)
    forward_and_gradient(M, N, K, dtype, 0.1)


def forward_and_gradient(M, N, K, dtype, p):
    x, weight = layer(M, N, K, dtype)
    bias = normal(N, dtype=dtype, key="bias")
    y = poisoned(M, N, dtype=dtype)
    mask = torch.full((emulated.mask_bytes(M, N),), 0xFF, dtype=torch.uint8)
    dropout = (p, -3, torch.tensor(2**32 + 7), 2, 2**32 - 50)
    emulated.linear_sm90_out(x, [weight], [bias], *dropout, y=[y], masks=[mask])
    close(y, reference.linear_relu_dropout(x.double(), weight.double(), bias.double(), *dropout))

    # The gradient into this layer's output reads the mask that the forward pass wrote.
    dz, weight_t = layer(M, N, K, dtype)
    dx, dbias = poisoned(M, N, dtype=dtype), poisoned(N)
    emulated.linear_sm90_dgrad_out(dz, [weight_t], [mask], p, dx=[dx], dbias=[dbias])
    want = torch.where(y > 0, dz.double() @ weight_t.double().T * reference.dropout_scale(p), 0)
    close(dx, want)
    close(dbias, want.sum(0), scale=5)


@pytest.mark.parametrize(("M", "N", "K", "dtype"), [(300, 136, 72, BF16), (1, 256, 8, F16), (300, 136, 40, F32)])
def test_gradient_without_mask(M, N, K, dtype):
    dz, weight_t = layer(M, N, K, dtype)
    dx = poisoned(M, N, dtype=dtype)
    emulated.linear_sm90_dgrad_out(dz, [weight_t], [], 0.0, dx=[dx], dbias=[])
    close(dx, dz.double() @ weight_t.double().T)


@pytest.mark.parametrize(("dtype", "large"), [(F16, 60000.0), (BF16, 3e38)])
@pytest.mark.parametrize("at", [None, (0, 0), (299, 135), (130, 77)])
def test_gradient_that_is_not_finite(dtype, large, at):
    """found_inf says so, also where only the rounding to a half type overflows, and is never taken back."""
    dz, weight_t = torch.zeros(300, 8, dtype=dtype), torch.zeros(136, 8, dtype=dtype)
    if at:
        dz[at[0]], weight_t[at[1]] = large, 0.5
    dx, found = poisoned(300, 136, dtype=dtype), torch.zeros(1)
    emulated.linear_sm90_dgrad_out(dz, [weight_t], [], 0.0, dx=[dx], dbias=[], found_inf=found)
    assert found.item() == (1.0 if at else 0.0) == (not dx.isfinite().all())
    emulated.linear_sm90_dgrad_out(dz * 0, [weight_t], [], 0.0, dx=[dx], dbias=[], found_inf=found)
    assert found.item() == (1.0 if at else 0.0)


@pytest.mark.parametrize("first_row", [1000, 1001])
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_dropout_drops_what_the_cpu_drops(dtype, first_row):
    """All products positive: zeros are the dropped elements, bit for bit those of the definition."""
    M, N, K = 300, 200, 8
    ones = torch.ones(M, K, dtype=dtype), torch.ones(N, K, dtype=dtype), torch.ones(N, dtype=dtype)
    dropout = (0.4, 12345, torch.tensor(77), 4, first_row)
    y, want = poisoned(M, N, dtype=dtype), poisoned(M, N, dtype=dtype)
    emulated.linear_sm90_out(ones[0], ones[1:2], ones[2:], *dropout, y=[y], masks=[])
    ops.linear_relu_dropout_out(*ones, *dropout, y=want)
    assert torch.equal(y > 0, want > 0)
    assert torch.equal(y > 0, reference.dropout_mask(M, N, *dropout[:2], int(dropout[2]), *dropout[3:]))


# Rows, the widths from input to output, clusters of the device: a band and several, layers of one and of two columns of
# tiles, ragged in every direction.
CHAINS = [
    (1, [8, 8, 16], 1),
    (300, [72, 136], 1),
    (700, [72, 136, 264, 40], 2),
    (1300, [72, 136, 264, 40], 1),
    (600, [264, 8, 520, 72, 8], 1),
]


def chain_of(M, widths, dtype, p, rounds_ahead):
    """What a chain of layers makes there and back, and what its layers make one by one."""
    pairs = list(pairwise(widths))
    weights = [normal(N, K, dtype=dtype, scale=K**-0.5, key=f"w{i}") for i, (K, N) in enumerate(pairs)]
    biases = [normal(N, dtype=dtype, key=f"b{i}") for i, N in enumerate(widths[1:])]
    transposed = [w.t().contiguous() for w in reversed(weights)]
    dropout = (p, 5, torch.tensor(3))

    def buffers():
        masks = [torch.full((emulated.mask_bytes(M, N),), 0xA5, dtype=torch.uint8) for N in widths[1:-1]]
        y, dx = ([poisoned(M, N, dtype=dtype) for N in some] for some in (widths[1:], widths[-2::-1]))
        return y, masks, dx, [poisoned(N) for N in widths[-2:0:-1]]

    x, dz = normal(M, widths[0], dtype=dtype, key="x"), normal(M, widths[-1], dtype=dtype, key="dz")
    together, one_by_one = buffers(), buffers()
    y, masks, dx, dbias = together
    emulated.linear_sm90_out(x, weights, biases, *dropout, 2, 7, rounds_ahead, y=y, masks=masks)
    emulated.linear_sm90_dgrad_out(dz, transposed, masks[::-1], p, rounds_ahead, dx=dx, dbias=dbias)
    y, masks, dx, dbias = one_by_one
    for i in range(len(pairs)):
        inputs = (([x, *y][i], [weights[i]], [biases[i]]), ([dz, *dx][i], [transposed[i]], masks[::-1][i : i + 1], p))
        emulated.linear_sm90_out(*inputs[0], *dropout, 2 + i, 7, y=[y[i]], masks=masks[i : i + 1])
    for i in range(len(pairs)):
        g = [dz, *dx][i]
        outputs = {"dx": [dx[i]], "dbias": dbias[i : i + 1]}
        emulated.linear_sm90_dgrad_out(g, [transposed[i]], masks[::-1][i : i + 1], p, **outputs)
    return together, one_by_one


@pytest.mark.parametrize("dtype", [F16, F32])
@pytest.mark.parametrize(("seed", "rounds_ahead"), [(1, 2), (2, 1)])
@pytest.mark.parametrize(("M", "widths", "clusters"), CHAINS)
def test_a_chain_has_the_bits_of_its_layers(M, widths, clusters, seed, rounds_ahead, dtype):
    """Whatever the order in which threads run: who reads waits for who writes."""
    emulated.reseed(seed, 2 * clusters)
    for got, want in zip(*chain_of(M, widths, dtype, 0.1, rounds_ahead)):
        for a, b in zip(got, want):
            assert torch.equal(a, b)


def test_a_chain_says_whether_its_last_gradient_is_finite():
    """Those below a mask it does not look at; what overflows there comes down to the last."""
    emulated.reseed(3, 4)
    M = 300
    transposed = [torch.eye(16, 24).half(), torch.eye(8, 16).half()]
    mask = torch.full((emulated.mask_bytes(M, 16),), 0xFF, dtype=torch.uint8)
    for value, want in ((1.0, 0.0), (6e4, 0.0), (float("inf"), 1.0)):
        dz, found = torch.zeros(M, 24).half(), torch.zeros(1)
        dz[257, 3] = value
        dx, dbias = [poisoned(M, N, dtype=F16) for N in (16, 8)], [poisoned(16)]
        emulated.linear_sm90_dgrad_out(dz, transposed, [mask], 0.0, dx=dx, dbias=dbias, found_inf=found)
        assert found.item() == want == (not dx[1].isfinite().all())


def test_sums_without_a_mask_are_refused():
    outputs = {"dx": [poisoned(4, 8, dtype=F16)], "dbias": [poisoned(8)]}
    with pytest.raises(RuntimeError, match="CUDA error 1"):
        emulated.linear_sm90_dgrad_out(torch.ones(4, 8).half(), [torch.eye(8).half()], [], 0.0, **outputs)


@pytest.mark.parametrize("count", [0, linear_sm90.LINKS + 1])
def test_a_chain_of_no_layers_or_too_many_is_refused(count):
    ones, outputs = [torch.ones(8, 8).half()] * count, {"y": [poisoned(4, 8, dtype=F16)] * count, "masks": []}
    with pytest.raises(RuntimeError, match="CUDA error 1"):
        emulated.linear_sm90_out(torch.ones(4, 8).half(), ones, ones, 0.0, 0, torch.tensor(0), 0, 0, **outputs)


def test_a_refused_launch_leaves_no_error_behind(monkeypatch):
    """The library's products, which are then taken, would find it after their first launch, and fail."""
    one, step = torch.eye(8).half(), torch.tensor(0)

    def chains():
        y = [poisoned(8, 8, dtype=F16) for _ in range(2)]
        emulated.linear_sm90_out(one, [one] * 2, [one[0]] * 2, 0.0, 0, step, 0, 0, y=y, masks=[])
        emulated.linear_sm90_dgrad_out(one, [one] * 2, [], 0.0, dx=y, dbias=[])

    chains()
    for call in range(5):  # attributes twice, occupancy, memset, launch; the driver's function was asked for before
        monkeypatch.setattr(emulated, "refused", call)
        with pytest.raises(RuntimeError, match="CUDA error 801"):
            chains()
        assert emulated.last_error() == 0
    monkeypatch.setattr(emulated, "refused", 5)
    chains()


def test_empty_products():
    y = poisoned(0, 8, dtype=BF16)
    x, weight = layer(0, 8, 8, BF16)
    dropout = (0.1, 1, torch.tensor(1), 0, 0)
    emulated.linear_sm90_out(x, [weight], [normal(8, dtype=BF16)], *dropout, y=[y], masks=[])
    dbias, mask = poisoned(8), torch.empty(0, dtype=torch.uint8)
    emulated.linear_sm90_dgrad_out(x, [weight], [mask], 0.0, dx=[y], dbias=[dbias])
    assert torch.equal(dbias, torch.zeros(8))
