"""The dense updates of the Outbrain model, beside torch: `python -m pytest bench/bench_optim.py`."""

import pytest
import torch

from widedeep import ops
from widedeep.testing import normal

SHAPES = [(1024, 989), *[(1024, 1024)] * 4, *[(1024,)] * 5, (1, 1024), (1,)]


@pytest.mark.parametrize("who", ["ours", "torch"])
def test_rmsprop(device, measure, who):
    weights = [normal(*s, device=device, scale=0.03, key=i) for i, s in enumerate(SHAPES)]
    grads = [normal(*s, device=device, scale=1e-3, key=(i, "g")) for i, s in enumerate(SHAPES)]
    rms, lr = [torch.zeros_like(w) for w in weights], torch.full((1,), 1e-4, device=device)
    parameters = [torch.nn.Parameter(w.clone()) for w in weights]
    for parameter, g in zip(parameters, grads):
        parameter.grad = g
    theirs = torch.optim.RMSprop(parameters, lr=1e-4, alpha=0.5, eps=1e-7, foreach=True)
    calls = {"ours": lambda: ops.rmsprop_dense_(weights, rms, grads, [], lr, 0.5, 1e-7), "torch": theirs.step}
    measure(calls[who], bytes=20 * sum(w.numel() for w in weights))


@pytest.mark.parametrize("who", ["ours", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_check_finite(device, measure, dtype, who):
    """torch's own check, which GradScaler makes, multiplies the gradients too."""
    values, found = normal(1 << 24, device=device, dtype=dtype), torch.zeros(1, device=device)
    one = torch.ones(1, device=device)
    calls = {
        "ours": lambda: ops.check_finite_([values], found),
        "torch": lambda: torch._amp_foreach_non_finite_check_and_unscale_([values], found, one),
    }
    measure(calls[who], bytes=values.numel() * values.element_size())
