"""Hidden layers on a GPU against the float64 reference: through cuBLASLt, and fused on Hopper."""

from itertools import pairwise

import pytest
import torch

from widedeep import ops, reference
from widedeep.ops import linear_sm90
from widedeep.ops.linear import bit_row_bytes
from widedeep.steps.trial import disagreement
from widedeep.testing import normal, poisoned

pytestmark = pytest.mark.cuda

DEVICE = "cuda"
# (B, I, O): one row, whole and ragged tiles of 128 and 256, many tiles for each block, sizes no multiple of 8.
SHAPES = [(0, 16, 8), (1, 8, 8), (7, 16, 40), (129, 72, 136), (256, 1024, 128), (300, 200, 264), (4099, 1024, 1024)]
ODD = [(1, 1, 1), (67, 13, 33), (130, 989, 1024)]
# Of the result's size: roundings of the stored result and of the library's half-typed product, and of the sums.
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 1.8e-2, torch.float16: 2.5e-3}
TF32 = 2.5e-3  # what the Hopper products make of float32
ROUTES = ["cublaslt", "sm90"]


def close(got, want, tolerance):
    size = want.abs().max().item() if want.numel() else 1.0
    torch.testing.assert_close(got.double(), want.double(), rtol=tolerance, atol=tolerance * max(size, 1e-30))


def layer(B, I, O, dtype):
    x, weight = normal(B, I, device=DEVICE, dtype=dtype), normal(O, I, device=DEVICE, scale=I**-0.5, dtype=dtype)
    return x, weight, normal(O, device=DEVICE, dtype=dtype, key="bias")


def step(n=2**33 + 1):
    return torch.tensor(n, device=DEVICE)


def needs(route):
    if route != "cublaslt" and not linear_sm90.available(torch.device(DEVICE)):
        pytest.skip("the Hopper products need compute capability 9.0")


def cases():
    for B, I, O in SHAPES + ODD:
        for dtype in TOLERANCE:
            yield pytest.param("cublaslt", B, I, O, dtype, id=f"cublaslt-{B}-{I}-{O}-{dtype}")
            if (B, I, O) in SHAPES:
                for route in ROUTES[1:]:
                    yield pytest.param(route, B, I, O, dtype, id=f"{route}-{B}-{I}-{O}-{dtype}")


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(("route", "B", "I", "O", "dtype"), list(cases()))
def test_forward_and_gradients_match_reference(route, B, I, O, dtype, p):
    needs(route)
    tolerance = TF32 if route != "cublaslt" and dtype == torch.float32 else TOLERANCE[dtype]
    x, weight, bias = layer(B, I, O, dtype)
    args = (p, -5, step(), 4, 2**32 - 3)  # rows wrap around 2^32
    y, mask = poisoned(B, O, device=DEVICE, dtype=dtype), None
    if route != "cublaslt":
        mask = torch.full((linear_sm90.mask_bytes(B, O),), 0xA5, dtype=torch.uint8, device=DEVICE)
        linear_sm90.linear_sm90_out(x, [weight], [bias], *args, y=[y], masks=[mask])
    else:
        bits = torch.full((B, bit_row_bytes(O)), 0xA5, dtype=torch.uint8, device=DEVICE)
        ops.linear_relu_dropout_out(x, weight, bias, *args, y=y, bits=bits)
        assert torch.equal(bits, reference.pack_bits(y > 0))
    want = reference.linear_relu_dropout(x.double(), weight.double(), bias.double(), *args)
    close(y, want, tolerance)
    # The library rounds its product to y's type before the bias is added, relative to the product.
    clear = want.abs() > tolerance * max(1.0, float(want.abs().max())) if B else want > 0
    assert torch.equal((y > 0)[clear], (want > 0)[clear])

    upper, dz = normal(24, O, device=DEVICE, dtype=dtype, key="upper"), normal(B, 24, device=DEVICE, dtype=dtype)
    dx, dbias = poisoned(B, O, device=DEVICE, dtype=dtype), poisoned(O, device=DEVICE)
    if route != "cublaslt":
        linear_sm90.linear_sm90_dgrad_out(dz, [upper.t().contiguous()], [mask], p, dx=[dx], dbias=[dbias])
    else:
        ops.linear_dgrad_out(dz, upper, y, p, dx=dx, dbias=dbias)
        through_bits = poisoned(B, O, device=DEVICE, dtype=dtype), poisoned(O, device=DEVICE)
        ops.linear_dgrad_out(dz, upper, None, p, dx=through_bits[0], dbias=through_bits[1], bits=bits)
        assert torch.equal(through_bits[0], dx)
        assert torch.equal(through_bits[1], dbias)
    want_dx, want_dbias = torch.empty_like(dx, dtype=torch.float64), torch.empty_like(dbias, dtype=torch.float64)
    reference.linear_dgrad_out(dz.double(), upper.double(), y.double(), p, dx=want_dx, dbias=want_dbias)
    close(dx, want_dx, tolerance)
    close(dbias, want_dbias, tolerance * 4)

    dweight = poisoned(24, O, device=DEVICE)
    ops.linear_wgrad_out(dz, y, dweight=dweight)
    close(dweight, dz.double().T @ y.double(), 5e-5)


@pytest.mark.parametrize("route", ROUTES)
def test_plain_gradient_without_mask_or_sums(route):
    needs(route)
    dz, weight = normal(515, 136, device=DEVICE, dtype=torch.float16), normal(136, 72, device=DEVICE, dtype=torch.half)
    dx = poisoned(515, 72, device=DEVICE, dtype=torch.float16)
    if route != "cublaslt":
        linear_sm90.linear_sm90_dgrad_out(dz, [weight.t().contiguous()], [], 0.0, dx=[dx], dbias=[])
    else:
        ops.linear_dgrad_out(dz, weight, None, 0.0, dx=dx, dbias=None)
    close(dx, dz.double() @ weight.double(), TOLERANCE[torch.float16])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("at", [None, (0, 0), (4098, 1023), (2500, 77)])
def test_hopper_gradient_says_whether_it_is_finite(dtype, at):
    needs("sm90")
    dz, weight_t = normal(4099, 136, device=DEVICE, dtype=dtype), normal(1024, 136, device=DEVICE, dtype=dtype)
    if at:
        dz[at[0]], weight_t[at[1]] = 3e4, 1.0
        dz[at[0]] *= 1 if dtype == torch.float16 else 1e34
    dx, found = torch.empty(4099, 1024, device=DEVICE, dtype=dtype), torch.zeros(1, device=DEVICE)
    linear_sm90.linear_sm90_dgrad_out(dz, [weight_t], [], 0.0, dx=[dx], dbias=[], found_inf=found)
    assert bool(found) == (not dx.isfinite().all()) == bool(at)


@pytest.mark.parametrize(("p", "first_row"), [(0.1, 1000), (0.5, 1000), (0.1, 1001)])
@pytest.mark.parametrize("route", ROUTES)
def test_masks_are_those_of_the_counter(route, p, first_row):
    """Every value is positive before dropout, so y > 0 is the keep bit, and its share is 1 - p."""
    needs(route)
    B, O = 1000, 264
    x, weight = torch.zeros(B, 64, device=DEVICE).half(), torch.zeros(O, 64, device=DEVICE).half()
    y = torch.empty(B, O, device=DEVICE).half()
    args = (p, 77, step(12), 3, first_row)
    bias = torch.ones(O, device=DEVICE).half()
    if route != "cublaslt":
        linear_sm90.linear_sm90_out(x, [weight], [bias], *args, y=[y], masks=[])
    else:
        ops.linear_relu_dropout_out(x, weight, bias, *args, y=y)
    keep = reference.dropout_mask(B, O, *args[:1], 77, 12, 3, first_row)
    assert torch.equal((y > 0).cpu(), keep)
    assert abs((y > 0).float().mean().item() - (1 - p)) < 5 * (p * (1 - p) / (B * O)) ** 0.5


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("B", "I", "O"), [(1, 64, 128), (777, 320, 200), (20000, 1024, 1024)])
def test_the_two_routes_agree(B, I, O, dtype):
    needs("sm90")
    assert disagreement(B, I, O, dtype, 0.1, torch.device(DEVICE)) is None


def test_hopper_products_repeat_their_bits():
    needs("sm90")
    x, weight, bias = layer(70000, 512, 1024, torch.float16)
    mask = torch.empty(linear_sm90.mask_bytes(70000, 1024), dtype=torch.uint8, device=DEVICE)
    dropout, results = (0.1, 1, step(), 0, 0), []
    for _ in range(3):
        y, dx = torch.empty(70000, 1024, device=DEVICE).half(), torch.empty(70000, 1024, device=DEVICE).half()
        dbias = torch.empty(1024, device=DEVICE)
        linear_sm90.linear_sm90_out(x, [weight], [bias], *dropout, y=[y], masks=[mask])
        linear_sm90.linear_sm90_dgrad_out(x, [weight], [mask], 0.1, dx=[dx], dbias=[dbias])
        results.append((y, dx, dbias, mask.clone()))
    for other in results[1:]:
        for a, b in zip(results[0], other):
            assert torch.equal(a, b)


@pytest.mark.parametrize(("captured", "rounds_ahead"), [(False, 2), (True, 2), (True, 1)])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    ("B", "widths"),
    [(1, [64, 128, 64]), (777, [320, 200, 264, 8]), (40001, [704, 1024, 1024, 1024]), (131072, [256, 512, 256])],
)
def test_one_launch_for_all_layers_has_the_bits_of_one_for_each(B, widths, dtype, captured, rounds_ahead):
    """Several times over poisoned buffers: a layer that did not wait for what it reads would show."""
    needs("sm90")
    pairs = list(pairwise(widths))
    weights, biases = zip(*(layer(1, I, O, dtype)[1:] for I, O in pairs))
    x, dz = layer(B, widths[0], 8, dtype)[0], normal(B, widths[-1], device=DEVICE, dtype=dtype)
    y, dx = ([torch.empty(B, n, device=DEVICE, dtype=dtype) for n in some] for some in (widths[1:], widths[-2::-1]))
    sizes = [linear_sm90.mask_bytes(B, n) for n in widths[1:-1]]
    masks, alone = ([torch.empty(n, dtype=torch.uint8, device=DEVICE) for n in sizes] for _ in range(2))
    dbias = [torch.empty(n, device=DEVICE) for n in widths[-2:0:-1]]
    transposed = [w.t().contiguous() for w in reversed(weights)]
    dropout = (0.1, 3, step())

    def there_and_back():
        linear_sm90.linear_sm90_out(x, weights, biases, *dropout, 1, 7, rounds_ahead, y=y, masks=masks)
        linear_sm90.linear_sm90_dgrad_out(dz, transposed, masks[::-1], 0.1, rounds_ahead, dx=dx, dbias=dbias)

    run = there_and_back
    if captured:
        there_and_back()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            there_and_back()
        run = graph.replay
    for _ in range(5):
        for a in (*y, *dx, *dbias):
            a.fill_(float("nan"))
        run()
        for i, (_, O) in enumerate(pairs):
            want, found = torch.empty(B, O, device=DEVICE, dtype=dtype), alone[i : i + 1]
            args = ([x, *y][i], weights[i : i + 1], biases[i : i + 1], *dropout, 1 + i, 7)
            linear_sm90.linear_sm90_out(*args, y=[want], masks=found)
            assert torch.equal(want, y[i])
            assert all(torch.equal(a, b) for a, b in zip(found, masks[i : i + 1]))
            down = len(pairs) - 1 - i  # the layer whose input's gradient is dx[i]
            want, sums = torch.empty_like(dx[i]), [torch.empty_like(b) for b in dbias[i : i + 1]]
            args = ([dz, *dx][i], transposed[i : i + 1], masks[down - 1 : down] if down else [], 0.1)
            linear_sm90.linear_sm90_dgrad_out(*args, dx=[want], dbias=sums)
            assert torch.equal(want, dx[i])
            assert all(torch.equal(a, b) for a, b in zip(sums, dbias[i : i + 1]))


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_a_small_hopper_chain_matches_reference(dtype):
    """Few launches, and none of the library's: what racecheck is shown of the Hopper products."""
    needs("sm90")
    B, widths, p = 300, [64, 264, 136], 0.1
    tolerance = TF32 if dtype == torch.float32 else TOLERANCE[dtype]
    weights, biases = zip(*(layer(1, I, O, dtype)[1:] for I, O in pairwise(widths)))
    x, dz = (normal(B, n, device=DEVICE, dtype=dtype) for n in (widths[0], widths[-1]))
    y, dx = ([poisoned(B, n, device=DEVICE, dtype=dtype) for n in some] for some in (widths[1:], widths[-2::-1]))
    mask = torch.full((linear_sm90.mask_bytes(B, widths[1]),), 0xA5, dtype=torch.uint8, device=DEVICE)
    linear_sm90.linear_sm90_out(x, weights, biases, p, 3, step(), 0, 0, y=y, masks=[mask])
    for i, h in enumerate((x, y[0])):
        rows = (h.double().cpu(), weights[i].double().cpu(), biases[i].double().cpu())
        close(y[i].cpu(), reference.linear_relu_dropout(*rows, p, 3, step().cpu(), i, 0), tolerance)
    dbias = poisoned(widths[1], device=DEVICE)
    back = [w.t().contiguous() for w in reversed(weights)]
    linear_sm90.linear_sm90_dgrad_out(dz, back, [mask], p, dx=dx, dbias=[dbias])
    want = dz.double().cpu() @ weights[1].double().cpu() * (y[0] > 0).cpu() * reference.dropout_scale(p)
    close(dx[0].cpu(), want, tolerance)
    close(dbias.cpu(), want.sum(0), tolerance * 4)
    close(dx[1].cpu(), dx[0].double().cpu() @ weights[0].double().cpu(), tolerance)


def test_autograd_through_the_op():
    x, weight, bias = (t.requires_grad_() for t in layer(67, 40, 48, torch.float32))
    y = ops.linear_relu_dropout(x, weight, bias, 0.2, 3, step(), 1, 0)
    got = torch.autograd.grad(y.square().sum(), (x, weight, bias))
    leaves = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    z = reference.linear_relu_dropout(*leaves, 0.2, 3, step(), 1, 0)
    for a, b in zip(got, torch.autograd.grad(z.square().sum(), leaves)):
        close(a, b, 1e-5)
