"""Hidden layers against the plain-torch reference in float64."""

import os

import pytest
import torch
from torch.library import opcheck

from widedeep import ops, reference
from widedeep.ops.linear import bit_row_bytes
from widedeep.testing import TOLERANCE, assert_close, normal, poisoned

RAGGED = [
    (0, 13, 16),
    (1, 1, 1),
    (1, 989, 33),
    (7, 13, 33),
    (64, 989, 16),
    (64, 1, 1024),
    (97, 300, 129),  # one row, one column, past whole tiles
    (1025, 64, 130),
    (1025, 13, 1),
]
P = 0.1
shapes = pytest.mark.parametrize(("B", "I", "O"), RAGGED, ids=lambda n: str(n))


@pytest.fixture(params=["float32", "float16", "bfloat16, own products", "bfloat16, library's products"])
def dtype(request, monkeypatch):
    """Every storage type; bfloat16 by each of its two ways, whatever this CPU takes by itself."""
    name, _, products = request.param.partition(", ")
    monkeypatch.setenv("WIDEDEEP_BF16_PRODUCTS", "library" if "library" in products else "own")
    return getattr(torch, name)


def products():
    return os.environ["WIDEDEEP_BF16_PRODUCTS"]


def random(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(sum((i + 1) * n for i, n in enumerate(shape)))
    return torch.randn(*shape, generator=generator).to(dtype)


def layer(B, I, O, dtype=torch.float32):
    return random(B, I, dtype=dtype), random(O, I, dtype=dtype) / max(I, 1) ** 0.5, random(O, dtype=dtype)


def close(got, want, dtype, scale=1.0):
    """At the one table's tolerance. A library rounds its bfloat16 products before bias and sums, where they may cancel:
    its error is relative to the largest element.
    """
    if dtype == torch.bfloat16 and products() == "library":
        rtol = TOLERANCE[dtype][0] * scale
        size = want.abs().max().item() if want.numel() else 0.0
        torch.testing.assert_close(got.double(), want.double(), rtol=rtol, atol=rtol * size + 1e-6)
    else:
        assert_close(got, want, dtype, scale)


def of_sums(dtype):
    """The type whose tolerance float32 sums over the batch have: ours see results before they are rounded."""
    return dtype if products() == "library" else torch.float32


def step(n=3):
    return torch.tensor(n)


@shapes
@pytest.mark.parametrize("p", [0.0, P])
def test_linear_relu_dropout_matches_reference(B, I, O, p, dtype):
    x, weight, bias = layer(B, I, O, dtype)
    args = (p, -5, step(2**33 + 1), 4, 2**32 - 3)
    y = poisoned(B, O, dtype=dtype)
    ops.linear_relu_dropout_out(x, weight, bias, *args, y=y)
    close(y, reference.linear_relu_dropout(x.double(), weight.double(), bias.double(), *args), dtype)
    assert torch.equal(ops.linear_relu_dropout(x, weight, bias, *args), y)


@pytest.mark.parametrize("O", [1, 33, 130, 1024])
def test_dropout_drops_what_the_reference_drops(O, dtype):
    B, p, args = 257, 0.37, (99, step(7), 2, 1000)
    x, weight, bias = torch.zeros(B, 8, dtype=dtype), torch.zeros(O, 8, dtype=dtype), torch.ones(O, dtype=dtype)
    y = ops.linear_relu_dropout(x, weight, bias, p, *args)
    keep = reference.dropout_mask(B, O, p, *args)
    assert torch.equal(y, torch.where(keep, torch.tensor(reference.dropout_scale(p)).to(dtype), 0))


def test_dropout_statistics():
    """Kept with probability 1 - p, alike in all rows and columns, independent of step, layer and seed."""
    B, O, p = 2048, 512, 0.25
    x, weight, bias = torch.zeros(B, 1), torch.zeros(O, 1), torch.ones(O)

    def kept(seed, n, layer_index):
        return (ops.linear_relu_dropout(x, weight, bias, p, seed, step(n), layer_index) > 0).double()

    first = kept(1, 0, 0)
    sigma = (p * (1 - p)) ** 0.5
    assert abs(first.mean() - (1 - p)) < 5 * sigma / (B * O) ** 0.5
    assert (first.mean(0) - (1 - p)).abs().max() < 6 * sigma / B**0.5
    assert (first.mean(1) - (1 - p)).abs().max() < 6 * sigma / O**0.5
    for other in (kept(2, 0, 0), kept(1, 1, 0), kept(1, 0, 1)):
        correlation = ((first - (1 - p)) * (other - (1 - p))).mean() / sigma**2
        assert abs(correlation) < 5 / (B * O) ** 0.5


def test_rows_of_a_rank_have_the_masks_of_the_global_batch():
    x, weight, bias = layer(100, 17, 65)
    whole = ops.linear_relu_dropout(x, weight, bias, P, 1, step(), 0, 0)
    part = ops.linear_relu_dropout(x[60:], weight, bias, P, 1, step(), 0, 60)
    assert torch.equal(part > 0, whole[60:] > 0)


def test_nan_and_infinity_are_not_hidden(dtype):
    """By relu, dropout, masks or rounding."""
    x, weight, bias = layer(8, 5, 40, dtype)
    x[3, 2], x[5, 1] = float("nan"), float("inf")
    y = ops.linear_relu_dropout(x, weight, bias, P, 1, step(), 0)
    keep = reference.dropout_mask(8, 40, P, 1, step(), 0)
    assert torch.equal(y.isnan(), keep & (torch.arange(8) == 3)[:, None])
    assert torch.equal(y[5], torch.where(keep[5] & (weight[:, 1] > 0), float("inf"), 0).to(dtype))
    dz, mask = random(8, 40, dtype=dtype), torch.relu(random(8, 5, dtype=dtype))
    dz[2, 7] = float("nan")
    dx, dbias, dweight = poisoned(8, 5, dtype=dtype), poisoned(5), torch.zeros(40, 5)
    ops.linear_dgrad_out(dz, weight, mask, P, dx=dx, dbias=dbias)
    assert torch.equal(dx.isnan(), (mask > 0) & (torch.arange(8) == 2)[:, None])
    assert torch.equal(dbias.isnan(), dx.isnan().any(0))
    ops.linear_wgrad_out(dz, torch.ones(8, 5, dtype=dtype), dweight=dweight)
    assert torch.equal(dweight.isnan(), (torch.arange(40) == 7)[:, None].expand(40, 5))


@shapes
@pytest.mark.parametrize("masked", [False, True])
def test_linear_dgrad_matches_reference(B, I, O, masked, dtype):
    dz, weight = random(B, O, dtype=dtype), random(O, I, dtype=dtype)
    mask = torch.relu(random(B, I, dtype=dtype)) if masked else None
    dx, dbias = poisoned(B, I, dtype=dtype), poisoned(I)
    ops.linear_dgrad_out(dz, weight, mask, P, dx=dx, dbias=dbias)
    want, sums = poisoned(B, I, dtype=torch.float64), poisoned(I, dtype=torch.float64)
    reference.linear_dgrad_out(dz.double(), weight.double(), mask, P, dx=want, dbias=sums)
    close(dx, want, dtype)
    close(dbias, sums, of_sums(dtype))
    again = poisoned(B, I, dtype=dtype)
    ops.linear_dgrad_out(dz, weight, mask, P, dx=again, dbias=None)
    assert torch.equal(again, dx)


@pytest.mark.parametrize(("B", "O"), [(0, 16), (1, 1), (7, 33), (64, 1024), (97, 129), (1025, 130), (5, 300)])
@pytest.mark.parametrize("p", [0.0, P])
def test_bits_stand_for_the_activations(B, O, p, dtype):
    """Forward leaves whether y > 0, NaN being not; the gradient through the bits is that through y, to the last bit."""
    x, weight, bias = layer(B, 13, O, dtype)
    if B > 1:
        x[1, 2] = float("nan")
    y, plain = poisoned(B, O, dtype=dtype), poisoned(B, O, dtype=dtype)
    bits = torch.full((B, bit_row_bytes(O)), 0xA5, dtype=torch.uint8)
    args = (x, weight, bias, p, 5, step(), 1, 9)
    ops.linear_relu_dropout_out(*args, y=plain)
    ops.linear_relu_dropout_out(*args, y=y, bits=bits)
    assert torch.equal(y.nan_to_num(-1), plain.nan_to_num(-1))
    assert torch.equal(bits, reference.pack_bits(y > 0))
    assert torch.equal(reference.unpack_bits(bits, O), y > 0)
    dz, upper = random(B, 24, dtype=dtype), random(24, O, dtype=dtype)
    results = []
    for mask, given in ((y, None), (None, bits)):
        dx, dbias = poisoned(B, O, dtype=dtype), poisoned(O)
        ops.linear_dgrad_out(dz, upper, mask, p, dx=dx, dbias=dbias, bits=given)
        results.append((dx, dbias))
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_bits_are_refused_where_they_do_not_fit():
    x, weight, bias = layer(7, 13, 33)
    y, dx, bits = poisoned(7, 33), poisoned(7, 13), torch.zeros(7, 8, dtype=torch.uint8)
    for wrong in (bits[:, :4].contiguous(), bits[:6], bits.int()):
        with pytest.raises(RuntimeError, match=r"bits must be a contiguous Byte tensor .7, 8."):
            ops.linear_relu_dropout_out(x, weight, bias, P, 1, step(), 0, 0, y=y, bits=wrong)
    with pytest.raises(RuntimeError, match=r"bits must be a contiguous Byte tensor .7, 4."):
        ops.linear_dgrad_out(y, weight, None, P, dx=dx, dbias=None, bits=bits)
    with pytest.raises(RuntimeError, match="a mask or bits, not both"):
        ops.linear_dgrad_out(y, weight, x, P, dx=dx, dbias=None, bits=bits[:, :4].contiguous())


@shapes
def test_linear_wgrad_matches_reference(B, I, O, dtype):
    dz, x = random(B, O, dtype=dtype), random(B, I, dtype=dtype)
    dweight = poisoned(O, I)
    ops.linear_wgrad_out(dz, x, dweight=dweight)
    close(dweight, dz.double().T @ x.double(), of_sums(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("B", "I", "O"), [(257, 65, 130), (30, 1100, 2100)])
def test_own_products_of_half_types_are_those_of_float32_rounded_once(B, I, O, dtype, monkeypatch):
    """Bit by bit, also past one slab of the depth; a library's are rounded before the bias is added."""
    monkeypatch.setenv("WIDEDEEP_BF16_PRODUCTS", "own")
    x, weight, bias = layer(B, I, O, dtype)
    dz, mask = random(B, O, dtype=dtype), torch.relu(x)

    def run(storage):
        y, dx, dbias, dweight = (
            poisoned(B, O, dtype=storage),
            poisoned(B, I, dtype=storage),
            poisoned(I),
            poisoned(O, I),
        )
        ops.linear_relu_dropout_out(x.to(storage), weight.to(storage), bias.float(), P, 5, step(), 1, 9, y=y)
        ops.linear_dgrad_out(dz.to(storage), weight.to(storage), mask.to(storage), P, dx=dx, dbias=dbias)
        ops.linear_wgrad_out(dz.to(storage), x.to(storage), dweight=dweight)
        return y.to(dtype), dx.to(dtype), dbias, dweight

    wants, gots = run(torch.float32), run(dtype)
    assert all(torch.equal(got, want) for got, want in zip(gots, wants))
    if dtype == torch.bfloat16:
        monkeypatch.setenv("WIDEDEEP_BF16_PRODUCTS", "library")
        assert not any(torch.equal(other, got) for other, got in zip(run(dtype), gots))


def test_an_unknown_choice_of_products_is_refused(monkeypatch):
    monkeypatch.setenv("WIDEDEEP_BF16_PRODUCTS", "fast")
    x, weight, bias = layer(2, 3, 4, torch.bfloat16)
    with pytest.raises(RuntimeError, match="WIDEDEEP_BF16_PRODUCTS: expected auto, own or library, got fast"):
        ops.linear_relu_dropout(x, weight, bias, P, 1, step(), 0)


@shapes
def test_linear_relu_dropout_backward_matches_reference(B, I, O, dtype):
    x, weight, bias = (t.requires_grad_() for t in layer(B, I, O, dtype))
    dy = random(B, O, dtype=dtype)
    y = ops.linear_relu_dropout(x, weight, bias, P, 1, step(), 0)
    y.backward(dy)
    want = reference.linear_relu_dropout_backward(dy.double(), y.detach().double(), x.double(), weight.double(), P)
    for leaf, gradient in zip((x, weight, bias), want):
        assert leaf.grad.dtype == dtype
        # dz is rounded to the storage type before the products.
        close(leaf.grad, gradient, dtype, scale=3)


def test_a_second_derivative_is_refused():
    x, weight, bias = (t.requires_grad_() for t in layer(7, 13, 33))
    y = ops.linear_relu_dropout(x, weight, bias, P, 1, step(), 0)
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_relu_dropout has no second derivative"):
        dx.square().sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("B", "I", "O"), [(1025, 301, 260), (60, 1100, 260)])
def test_bits_do_not_depend_on_the_number_of_threads(B, I, O, dtype, monkeypatch):
    monkeypatch.setenv("WIDEDEEP_BF16_PRODUCTS", "own")
    x, weight, bias = layer(B, I, O, dtype)

    def run():
        y, dx, dbias, dweight = poisoned(B, O, dtype=dtype), poisoned(B, I, dtype=dtype), poisoned(I), poisoned(O, I)
        ops.linear_relu_dropout_out(x, weight, bias, P, 5, step(), 1, 9, y=y)
        ops.linear_dgrad_out(y, weight, x, P, dx=dx, dbias=dbias)
        ops.linear_wgrad_out(y, x, dweight=dweight)
        return y, dx, dbias, dweight

    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(run())
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_linear_ops_opcheck():
    x, weight, bias = (t.requires_grad_() for t in layer(7, 13, 33))
    opcheck(torch.ops.widedeep.linear_relu_dropout.default, (x, weight, bias, P, 1, step(), 0, 0))
    x, weight, bias = layer(7, 13, 33)
    y = ops.linear_relu_dropout(x, weight, bias, P, 1, step(), 0)
    opcheck(torch.ops.widedeep.linear_relu_dropout_backward.default, (y, y, x, weight, P))
    opcheck(
        torch.ops.widedeep.linear_relu_dropout_out.default,
        (x, weight, bias, P, 1, step(), 0, 0),
        {"y": torch.zeros(7, 33), "bits": torch.zeros(7, 8, dtype=torch.uint8)},
    )
    opcheck(
        torch.ops.widedeep.linear_dgrad_out.default,
        (y, weight, x, P),
        {"dx": torch.zeros(7, 13), "dbias": torch.zeros(13), "bits": None},
    )
    bits = reference.pack_bits(x > 0)
    outputs = {"dx": torch.zeros(7, 13), "dbias": torch.zeros(13), "bits": bits}
    opcheck(torch.ops.widedeep.linear_dgrad_out.default, (y, weight, None, P), outputs)
    opcheck(torch.ops.widedeep.linear_wgrad_out.default, (y, x), {"dweight": torch.zeros(33, 13)})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: a.update(weight=torch.zeros(33, 12)), "x must be a contiguous Float tensor"),
        (lambda a: a.update(x=torch.zeros(13, 7).T), "not contiguous"),
        (lambda a: a.update(weight=torch.zeros(33, 13, dtype=torch.bfloat16)), "weight must be a contiguous Float"),
        (lambda a: a.update(bias=torch.zeros(32)), "bias must be"),
        (lambda a: a.update(p=1.0), "p must be in [0, 1)"),
        (lambda a: a.update(p=-0.1), "p must be in [0, 1)"),
        (lambda a: a.update(layer=256), "layer must be in [0, 256)"),
        (lambda a: a.update(step=torch.zeros(1)), "step must be one Long"),
        (lambda a: a.update(x=torch.zeros(7, 13, dtype=torch.float64)), "must be float32, float16 or bfloat16"),
    ],
)
def test_linear_relu_dropout_rejects(change, words):
    x, weight, bias = layer(7, 13, 33)
    args = {"x": x, "weight": weight, "bias": bias, "p": P, "seed": 0, "step": step(), "layer": 0, "first_row": 0}
    change(args)
    with pytest.raises(RuntimeError) as error:
        ops.linear_relu_dropout(**args)
    assert words in str(error.value)


def test_linear_gradients_reject_wrong_shapes():
    dz, weight = torch.zeros(7, 33), torch.zeros(33, 13)
    with pytest.raises(RuntimeError, match="linear_dgrad: dx must be"):
        ops.linear_dgrad_out(dz, weight, None, 0.0, dx=torch.zeros(7, 12), dbias=None)
    with pytest.raises(RuntimeError, match="linear_dgrad: mask must be"):
        ops.linear_dgrad_out(dz, weight, torch.zeros(7, 33), 0.0, dx=torch.zeros(7, 13), dbias=None)
    with pytest.raises(RuntimeError, match="linear_wgrad: x must be"):
        ops.linear_wgrad_out(dz, torch.zeros(8, 13), dweight=torch.zeros(33, 13))


SIZES = [(1, 1), (64, 64), (65, 130), (7, 200), (129, 64), (200, 33), (0, 5), (63, 95), (95, 31)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_transpose_matches_reference(dtype, device):
    """Whole and ragged tiles, odd sizes, a matrix without rows; more matrices than a launch takes."""
    matrices = [normal(*size, device=device, dtype=dtype, key=i) for i, size in enumerate(SIZES * 10)]
    got = [poisoned(*m.shape[::-1], device=device, dtype=dtype) for m in matrices]
    want = [torch.empty_like(t) for t in got]
    ops.transpose_out(matrices, out=got)
    reference.transpose_out(matrices, out=want)
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_transpose_of_views_that_start_anywhere():
    buffer, out = normal(13), poisoned(13)
    ops.transpose_out([buffer[1:].view(3, 4)], out=[out[1:].view(4, 3)])
    assert torch.equal(out[1:].view(4, 3), buffer[1:].view(3, 4).T)


def test_transpose_refuses_by_words():
    m = torch.zeros(3, 4)
    with pytest.raises(RuntimeError, match="transpose_out: matrices and out must be lists of one length, got 1, 0"):
        ops.transpose_out([m], out=[])
    with pytest.raises(RuntimeError, match=r"transpose_out: out\[0\] must be a contiguous Float tensor \[4, 3\]"):
        ops.transpose_out([m], out=[torch.zeros(3, 4)])
    opcheck(torch.ops.widedeep.transpose_out.default, ([m],), {"out": [torch.zeros(4, 3)]})
