"""The Hopper products on the CPU emulator (tests/emulated.py), against float64. Needs no GPU."""

import platform
import shutil

import pytest
import torch

from tests import emulated
from widedeep import ops, reference
from widedeep.testing import assert_close, normal, poisoned

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or platform.machine() != "x86_64", reason="the CUDA emulator needs g++ on x86-64"
)

BF16, F16 = torch.bfloat16, torch.float16
# (M, N, K, dtype): one and many tiles, ragged in every direction, fewer and more stages than the ring has
SHAPES = [
    (1, 8, 8, BF16),
    (100, 128, 64, F16),
    (128, 200, 72, BF16),
    (300, 256, 200, F16),
    (257, 136, 648, BF16),
]


def layer(M, N, K, dtype):
    return normal(M, K, dtype=dtype, key="a"), normal(N, K, dtype=dtype, scale=K**-0.5, key="b")


@pytest.mark.parametrize(("M", "N", "K", "dtype"), SHAPES)
@pytest.mark.parametrize(("p", "seed"), [(0.0, 1), (0.1, 2)])
def test_forward_and_gradient(M, N, K, dtype, p, seed):
    emulated.reseed(seed)
    forward_and_gradient(M, N, K, dtype, p)


@pytest.mark.parametrize("multiprocessors", [2, 5])
@pytest.mark.parametrize("seed", [3, 4, 5])
@pytest.mark.parametrize(("M", "N", "K"), [(700, 256, 200), (520, 264, 8), (520, 136, 400), (700, 128, 648)])
def test_persistent_blocks(multiprocessors, seed, M, N, K):
    """One or two clusters take all tiles: the warpgroups take turns, and the ring goes on from tile to tile. The last
    two tiles are longer than the ring, so that a parity alone does not say whose turn it is.
    """
    emulated.reseed(seed, multiprocessors)
    forward_and_gradient(M, N, K, BF16, 0.1)


def forward_and_gradient(M, N, K, dtype, p):
    x, weight = layer(M, N, K, dtype)
    bias = normal(N, dtype=dtype, key="bias")
    y = poisoned(M, N, dtype=dtype)
    mask = torch.full((emulated.mask_bytes(M, N),), 0xFF, dtype=torch.uint8)
    dropout = (p, -3, torch.tensor(2**32 + 7), 2, 2**32 - 50)
    emulated.linear_sm90_out(x, weight, bias, *dropout, y=y, mask=mask)
    assert_close(y, reference.linear_relu_dropout(x.double(), weight.double(), bias.double(), *dropout))

    # The gradient into this layer's output reads the mask that the forward pass wrote.
    dz, weight_t = layer(M, N, K, dtype)
    dx, dbias = poisoned(M, N, dtype=dtype), poisoned(N)
    scale = reference.dropout_scale(p)
    emulated.linear_sm90_dgrad_out(dz, weight_t, mask, scale, dx=dx, dbias=dbias)
    want = torch.where(y > 0, dz.double() @ weight_t.double().T * scale, 0)
    assert_close(dx, want)
    assert_close(dbias, want.sum(0), scale=5)


@pytest.mark.parametrize(("M", "N", "K", "dtype"), [(300, 136, 72, BF16), (1, 256, 8, F16)])
def test_gradient_without_mask(M, N, K, dtype):
    dz, weight_t = layer(M, N, K, dtype)
    dx = poisoned(M, N, dtype=dtype)
    emulated.linear_sm90_dgrad_out(dz, weight_t, None, 1.0, dx=dx, dbias=None)
    assert_close(dx, dz.double() @ weight_t.double().T)


def test_dropout_drops_what_the_cpu_drops():
    """All products positive: zeros are the dropped elements, bit for bit those of the definition."""
    M, N, K = 300, 200, 8
    ones = torch.ones(M, K, dtype=BF16), torch.ones(N, K, dtype=BF16), torch.ones(N, dtype=BF16)
    dropout = (0.4, 12345, torch.tensor(77), 4, 1000)
    y, want = poisoned(M, N, dtype=BF16), poisoned(M, N, dtype=BF16)
    emulated.linear_sm90_out(*ones, *dropout, y=y, mask=None)
    ops.linear_relu_dropout_out(*ones, *dropout, y=want)
    assert torch.equal(y > 0, want > 0)
    assert torch.equal(y > 0, reference.dropout_mask(M, N, *dropout[:2], int(dropout[2]), *dropout[3:]))


def test_empty_products():
    y = poisoned(0, 8, dtype=BF16)
    step = torch.tensor(1)
    x, weight = layer(0, 8, 8, BF16)
    emulated.linear_sm90_out(x, weight, normal(8, dtype=BF16), 0.1, 1, step, 0, 0, y=y, mask=None)
    dbias = poisoned(8)
    emulated.linear_sm90_dgrad_out(x, weight, None, 1.0, dx=y, dbias=dbias)
    assert torch.equal(dbias, torch.zeros(8))
