"""Hidden layers of the Outbrain model beside torch: `python -m pytest bench/bench_linear.py`."""

import functools

import pytest
import torch
import torch.nn.functional as F

from widedeep import ops
from widedeep.ops import linear_sm90
from widedeep.ops.linear import bit_row_bytes
from widedeep.testing import normal

P = 0.1
SHAPES = {"cpu": [(4096, 1024, 1024), (4096, 989, 1024)], "cuda": [(131072, 1024, 1024), (16384, 1024, 1024)]}
DTYPES = {"cpu": torch.float32, "cuda": torch.float16}


@pytest.fixture(params=[0, 1])
def layer(request, device):
    return tensors(device, *SHAPES[device][request.param])


@functools.cache
def tensors(device, B, I, O):
    """x, weight, bias, y, dz and buffers for the gradients."""
    dtype = DTYPES[device]
    x, y, dz = (normal(B, n, device=device, dtype=dtype, key=k) for k, n in enumerate((I, O, O)))
    weight = normal(O, I, device=device, dtype=dtype, scale=I**-0.5)
    bias = normal(O, device=device, dtype=dtype)
    dx, dweight, dbias = torch.empty_like(x), torch.empty(O, I, device=device), torch.empty(I, device=device)
    step = torch.tensor(1, device=device)
    return {
        "x": x,
        "weight": weight,
        "bias": bias,
        "y": y,
        "dz": dz,
        "dx": dx,
        "dweight": dweight,
        "dbias": dbias,
        "step": step,
    }


def flops(t) -> float:
    return 2.0 * t["x"].numel() * t["weight"].shape[0]


def hopper_bits(who, rows, columns, device):
    """Room for bits of the Hopper products; skips where they are asked for and do not run."""
    if who.startswith("ours, Hopper") and not linear_sm90.available(device):
        pytest.skip("the Hopper products need compute capability 9.0")
    return torch.empty(linear_sm90.mask_bytes(rows, columns), dtype=torch.uint8, device=device)


@pytest.mark.parametrize("who", ["ours", "ours, Hopper", "torch", "product"])
def test_forward(layer, measure, who):
    t = layer
    mask, dropout = hopper_bits(who, *t["y"].shape, t["y"].device), (P, 1, t["step"], 0, 0)
    args = (t["x"], t["weight"], t["bias"], *dropout)
    calls = {
        "ours": lambda: ops.linear_relu_dropout_out(*args, y=t["y"]),
        "ours, Hopper": lambda: linear_sm90.linear_sm90_out(
            t["x"], [t["weight"]], [t["bias"]], *dropout, y=[t["y"]], masks=[mask]
        ),
        "torch": lambda: F.dropout(F.relu(F.linear(t["x"], t["weight"], t["bias"]), inplace=True), P, inplace=True),
        "product": lambda: torch.mm(t["x"], t["weight"].t(), out=t["y"]),
    }
    measure(calls[who], flops(t))


@pytest.mark.parametrize("who", ["ours", "ours, bits", "ours, Hopper", "torch", "product"])
def test_dgrad(layer, measure, who):
    t = layer
    mask, bits = torch.relu(t["x"]), hopper_bits(who, *t["x"].shape, t["x"].device).fill_(0x55)
    rows = torch.full((len(mask), bit_row_bytes(mask.shape[1])), 0x55, dtype=torch.uint8, device=mask.device)
    out, weight_t = {"dx": t["dx"], "dbias": t["dbias"]}, t["weight"].t().contiguous()

    def plain():
        dx = torch.mm(t["dz"], t["weight"]) * ((mask > 0) * (1 / (1 - P)))
        return dx, dx.sum(0)

    calls = {
        "ours": lambda: ops.linear_dgrad_out(t["dz"], t["weight"], mask, P, **out),
        "ours, bits": lambda: ops.linear_dgrad_out(t["dz"], t["weight"], None, P, **out, bits=rows),
        "ours, Hopper": lambda: linear_sm90.linear_sm90_dgrad_out(
            t["dz"], [weight_t], [bits], P, dx=[t["dx"]], dbias=[t["dbias"]]
        ),
        "torch": plain,
        "product": lambda: torch.mm(t["dz"], t["weight"], out=t["dx"]),
    }
    measure(calls[who], flops(t))


@pytest.mark.parametrize("who", ["ours", "product"])
def test_wgrad(layer, measure, who):
    t = layer
    calls = {
        "ours": lambda: ops.linear_wgrad_out(t["dz"], t["x"], dweight=t["dweight"]),
        "product": lambda: torch.mm(t["dz"].t(), t["x"]),
    }
    measure(calls[who], flops(t))
