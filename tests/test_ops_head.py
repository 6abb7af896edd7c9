"""The output layer and the loss with its gradients."""

import pytest
import torch
from torch.library import opcheck

from widedeep import ops, reference
from widedeep.testing import assert_close, normal, poisoned

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [(0, 5), (1, 1), (7, 33), (1025, 64), (4099, 40), (129, 1024)]
OPS = torch.ops.widedeep
OUTPUTS = ("logit", "dlogit", "dz", "dbias_hidden", "dweight", "dbias", "loss")


def inputs(B, H, device, dtype=torch.float32, key=()):
    """The last hidden activation has zeros as relu and dropout leave them."""
    h = normal(B, H, device=device, dtype=dtype, key=key).relu()
    weight, bias = normal(1, H, device=device, scale=H**-0.5, key=key), normal(1, device=device, key=(key, "b"))
    return h, weight, bias, normal(B, device=device, key=(key, "wide"))


def label(B, device):
    return (normal(B, device=device, key="label") > 1).float()


def outputs(h):
    B, H = h.shape
    shapes = {"logit": (B,), "dlogit": (B,), "dz": (B, H), "dbias_hidden": (H,), "dweight": (1, H), "dbias": (1,)}
    out = {n: poisoned(*s, device=h.device, dtype=h.dtype if n == "dz" else torch.float32) for n, s in shapes.items()}
    return out | {"loss": poisoned(device=h.device)}


@pytest.mark.parametrize(("B", "H"), SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_head_forward_matches_reference(B, H, dtype, device):
    args = inputs(B, H, device, dtype)
    got = ops.head_forward(*args)
    assert got.dtype == torch.float32
    assert_close(got, reference.head_forward(*(t.double() for t in args)))
    logit = poisoned(B, device=device)
    ops.head_forward_out(*args, logit=logit)
    assert torch.equal(logit, got)


@pytest.mark.parametrize("dtype", DTYPES)
def test_head_forward_backward_matches_reference(dtype, device):
    args = inputs(67, 40, device, dtype)
    grads = []
    for module, leaves in ((ops, args), (reference, [t.double() for t in args])):
        leaves = [t.detach().requires_grad_() for t in leaves]
        logit = module.head_forward(*leaves)
        grads.append(torch.autograd.grad((logit * normal(67, device=device, key="dlogit")).sum(), leaves))
    for got, want, leaf in zip(*grads, args):
        assert got.dtype == leaf.dtype
        assert_close(got, want, scale=3)


def test_head_has_second_derivatives(device):
    args = inputs(67, 40, device)
    second = []
    for module, leaves in ((ops, args), (reference, [t.double() for t in args])):
        leaves = [t.detach().requires_grad_() for t in leaves]
        first = torch.autograd.grad(module.head_forward(*leaves).square().sum(), leaves, create_graph=True)
        second.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
    for got, want in zip(*second):
        assert_close(got, want, scale=5)


@pytest.mark.parametrize(("B", "H"), SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("p", "scale"), [(0.0, None), (0.1, None), (0.3, 1024.0)])
def test_head_step_matches_reference(B, H, dtype, p, scale, device):
    args = (*inputs(B, H, device, dtype), label(B, device), 3 * B + 1, p)
    scale = None if scale is None else torch.tensor(scale, device=device)
    got, want = outputs(args[0]), outputs(args[0].double())
    want = {name: t.double() for name, t in want.items()}
    ops.head_step_out(*args, scale, **got)
    exact = [a.double() if isinstance(a, torch.Tensor) else a for a in args]
    reference.head_step_out(*exact, None if scale is None else scale.double(), **want)
    for name in OUTPUTS:
        assert_close(got[name], want[name], scale=10 if "bias" in name or name == "dweight" else 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("H", [40, 300, 1024, 1304])
def test_head_step_in_place(H, dtype, device):
    args = (*inputs(300, H, device, dtype), label(300, device), 300, 0.1, None)
    want, got = outputs(args[0]), outputs(args[0])
    ops.head_step_out(*args, **want)
    ops.head_step_out(*args, **got | {"dz": args[0]})
    assert torch.equal(args[0], want.pop("dz"))
    assert all(torch.equal(got[name], a) for name, a in want.items())


def test_head_step_of_extreme_logits_is_finite(device):
    h, weight, bias, wide_logit = inputs(4, 8, device)
    wide_logit = torch.tensor([200.0, -200.0, 1e30, -1e30], device=device)
    out = outputs(h)
    ops.head_step_out(h, weight, bias, wide_logit, torch.tensor([1.0, 0.0, 1.0, 0.0], device=device), 4, 0.0, **out)
    assert all(t.isfinite().all() for t in out.values())
    assert out["loss"].item() == 0.0
    ops.head_step_out(h, weight, bias, wide_logit, torch.tensor([0.0, 1.0, 1.0, 0.0], device=device), 4, 0.0, **out)
    assert out["loss"].item() == pytest.approx(100.0, rel=0.02)
    torch.testing.assert_close(out["dlogit"], torch.tensor([0.25, -0.25, 0.0, 0.0], device=device))


def test_head_step_masks_where_the_activation_is_zero(device):
    h, weight, bias, wide_logit = inputs(50, 20, device)
    out = outputs(h)
    ops.head_step_out(h, weight, bias, wide_logit, label(50, device), 50, 0.5, **out)
    assert torch.equal(out["dz"] == 0, (h == 0) | (weight == 0))
    torch.testing.assert_close(out["dbias_hidden"], out["dz"].sum(0))
    kept = out["dlogit"][:, None] * weight * 2
    torch.testing.assert_close(out["dz"], torch.where(h > 0, kept, 0))


def test_head_step_gives_the_same_bits_for_any_thread_count():
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        args = inputs(4099, 40, "cpu")
        out = outputs(args[0])
        ops.head_step_out(*args, label(4099, "cpu"), 4099, 0.1, **out)
        results.append(out)
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in OUTPUTS)


NUMERICS = [(0, 0), (0, 3), (1, 1), (67, 0), (7, 13), (4099, 13), (129, 256)]


def wide_numeric(B, N, device, dtype=torch.float32):
    outputs = {"dweight": poisoned(N, device=device, dtype=dtype), "dbias": poisoned(1, device=device, dtype=dtype)}
    return (normal(B, N, device=device, dtype=dtype), normal(B, device=device, dtype=dtype, key="dlogit")), outputs


@pytest.mark.parametrize(("B", "N"), NUMERICS)
def test_wide_numeric_backward_matches_reference(B, N, device):
    (args, got), (_, want) = wide_numeric(B, N, device), wide_numeric(B, N, device, torch.float64)
    ops.wide_numeric_backward_out(*args, **got)
    reference.wide_numeric_backward_out(*(t.double() for t in args), **want)
    again = wide_numeric(B, N, device)[1]
    ops.wide_numeric_backward_out(*args, **again)
    for name in got:
        assert_close(got[name], want[name], scale=10)
        assert torch.equal(got[name], again[name])


def test_wide_numeric_backward_gives_the_same_bits_for_any_thread_count():
    results, before = [], torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        args, out = wide_numeric(4099, 13, "cpu")
        ops.wide_numeric_backward_out(*args, **out)
        results.append(out)
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


def test_wide_numeric_backward_opcheck_and_refusals(device):
    (numeric, dlogit), out = wide_numeric(9, 3, device)
    ops.wide_numeric_backward_out(numeric, dlogit, **out)
    opcheck(OPS.wide_numeric_backward_out.default, (numeric, dlogit), out)
    for change, words in (
        ({"numeric": numeric.half()}, "numeric must be a contiguous Float"),
        ({"numeric": numeric.t().contiguous().t()}, "not contiguous"),
        ({"dlogit": dlogit[:8]}, r"dlogit must be a contiguous Float tensor .9."),
        ({"dweight": out["dweight"][:2]}, "dweight must be"),
        ({"dbias": out["dweight"]}, "dbias must be"),
    ):
        with pytest.raises(RuntimeError, match=words):
            ops.wide_numeric_backward_out(**{"numeric": numeric, "dlogit": dlogit} | out | change)
    if device == "cuda":
        args, out = wide_numeric(9, 257, device)
        with pytest.raises(RuntimeError, match="at most 256 numeric features, got 257"):
            ops.wide_numeric_backward_out(*args, **out)


def test_head_opcheck(device):
    for dtype in DTYPES:
        args = inputs(9, 16, device, dtype)
        opcheck(OPS.head_forward.default, args)
        opcheck(OPS.head_forward_out.default, args, {"logit": poisoned(9, device=device)})
        opcheck(OPS.head_forward.default, [t.detach().requires_grad_() for t in args])
        step = (*args, label(9, device), 9, 0.1, torch.tensor(8.0, device=device))
        ops.head_step_out(*step, **(out := outputs(args[0])))
        opcheck(OPS.head_step_out.default, step, out)


def test_head_rejects_bad_arguments(device):
    h, weight, bias, wide_logit = inputs(9, 16, device)
    with pytest.raises(RuntimeError, match="h must be float32, float16 or bfloat16"):
        ops.head_forward(h.double(), weight, bias, wide_logit)
    with pytest.raises(RuntimeError, match=r"weight must be a contiguous Float tensor .1, 16."):
        ops.head_forward(h, weight[0], bias, wide_logit)
    with pytest.raises(RuntimeError, match="wide_logit must be"):
        ops.head_forward(h, weight, bias, wide_logit[:3])
    y = label(9, device)
    for p in (-0.1, 1.0, 1.5, float("nan")):
        with pytest.raises(RuntimeError, match="p must be in"):
            ops.head_step_out(h, weight, bias, wide_logit, y, 9, p, **outputs(h))
    with pytest.raises(RuntimeError, match="global_rows must be >= 1"):
        ops.head_step_out(h, weight, bias, wide_logit, y, 0, 0.1, **outputs(h))
    with pytest.raises(RuntimeError, match="dz must be"):
        ops.head_step_out(h, weight, bias, wide_logit, y, 9, 0.1, **outputs(h) | {"dz": h.half()})
    with pytest.raises(RuntimeError, match="label must be"):
        ops.head_step_out(h, weight, bias, wide_logit, y.long(), 9, 0.1, **outputs(h))
