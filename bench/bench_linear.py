"""Hidden layers of the seed's model beside torch: `python -m pytest bench/bench_linear.py`."""

import pytest
import torch
import torch.nn.functional as F

from widedeep import ops
from widedeep.testing import normal

P = 0.1
SHAPES = {"cpu": [(4096, 1024, 1024), (4096, 989, 1024)], "cuda": [(131072, 1024, 1024), (16384, 1024, 1024)]}
DTYPES = {"cpu": torch.float32, "cuda": torch.float16}


@pytest.fixture(params=[0, 1])
def layer(request, device):
    """x, weight, bias, y, dz and buffers for the gradients."""
    B, I, O = SHAPES[device][request.param]
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


@pytest.mark.parametrize("who", ["ours", "torch", "product"])
def test_forward(layer, measure, who):
    t = layer
    calls = {
        "ours": lambda: ops.linear_relu_dropout_out(t["x"], t["weight"], t["bias"], P, 1, t["step"], 0, 0, y=t["y"]),
        "torch": lambda: F.dropout(F.relu(F.linear(t["x"], t["weight"], t["bias"]), inplace=True), P, inplace=True),
        "product": lambda: torch.mm(t["x"], t["weight"].t(), out=t["y"]),
    }
    measure(calls[who], flops(t))


@pytest.mark.parametrize("who", ["ours", "torch", "product"])
def test_dgrad(layer, measure, who):
    t = layer
    mask = torch.relu(t["x"])

    def plain():
        dx = torch.mm(t["dz"], t["weight"]) * ((mask > 0) * (1 / (1 - P)))
        return dx, dx.sum(0)

    calls = {
        "ours": lambda: ops.linear_dgrad_out(t["dz"], t["weight"], mask, P, dx=t["dx"], dbias=t["dbias"]),
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
