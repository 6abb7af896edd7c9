"""The output layer with loss and gradients, beside torch: `python -m pytest bench/bench_head.py`."""

import functools

import pytest
import torch
import torch.nn.functional as F

from widedeep import ops
from widedeep.testing import normal

H, P = 1024, 0.1
ROWS = {"cpu": 4096, "cuda": 131072}
DTYPES = {"cpu": torch.float32, "cuda": torch.float16}


@pytest.fixture
def inputs(device):
    return tensors(device)


@functools.cache
def tensors(device):
    """h, weight, bias, wide_logit and label; drawn once for all tests."""
    B = ROWS[device]
    h = normal(B, H, device=device, dtype=DTYPES[device]).relu()
    weight, bias = normal(1, H, device=device, scale=H**-0.5), torch.zeros(1, device=device)
    return h, weight, bias, normal(B, device=device), (normal(B, device=device, key="label") > 1).float()


@pytest.mark.parametrize("who", ["ours", "torch"])
def test_forward(inputs, measure, who):
    h, weight, bias, wide, _ = inputs
    calls = {
        "ours": lambda: ops.head_forward(h, weight, bias, wide),
        "torch": lambda: F.linear(h, weight.to(h.dtype), bias.to(h.dtype)).squeeze(1).float() + wide,
    }
    with torch.no_grad():
        measure(calls[who], bytes=h.numel() * h.element_size())


@pytest.mark.parametrize("who", ["ours", "torch"])
def test_loss_and_gradients(inputs, measure, who):
    h, weight, bias, wide, label = inputs
    B, device = len(h), h.device
    out = {name: torch.empty(B, device=device) for name in ("logit", "dlogit")} | {"dz": torch.empty_like(h)}
    out |= {"dbias_hidden": torch.empty(H, device=device), "dweight": torch.empty(1, H, device=device)}
    out |= {"dbias": torch.empty(1, device=device), "loss": torch.empty(1, device=device)}
    leaves = [t.detach().requires_grad_() for t in (h, weight.to(h.dtype), bias.to(h.dtype))]

    def plain():
        logit = F.linear(*leaves).squeeze(1).float() + wide
        loss = F.binary_cross_entropy_with_logits(logit, label)
        dh, *grads = torch.autograd.grad(loss, leaves)
        dz = dh * ((h > 0) * (1 / (1 - P)))
        return loss, dz, dz.sum(0), grads

    calls = {"ours": lambda: ops.head_step_out(h, weight, bias, wide, label, B, P, None, **out), "torch": plain}
    measure(calls[who], bytes=2 * h.numel() * h.element_size())


@pytest.mark.parametrize("who", ["ours", "torch"])
def test_wide_numeric_backward(device, measure, who):
    B, N = ROWS[device], 13
    numeric, dlogit = normal(B, N, device=device), normal(B, device=device, key="dlogit")
    out = {"dweight": torch.empty(N, device=device), "dbias": torch.empty(1, device=device)}
    calls = {
        "ours": lambda: ops.wide_numeric_backward_out(numeric, dlogit, **out),
        "torch": lambda: ((numeric * dlogit[:, None]).sum(0), dlogit.sum()),
    }
    measure(calls[who], bytes=4 * (numeric.numel() + B))
