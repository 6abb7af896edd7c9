"""The dynamic loss scale against the reference: finiteness of gradients of every type, growth, backoff, counting."""

import pytest
import torch
from torch.library import opcheck

from widedeep import ops, reference
from widedeep.testing import normal

OPS = torch.ops.widedeep


def scalar(value, device, dtype=torch.float32):
    return torch.tensor(value, dtype=dtype, device=device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bad", [None, torch.inf, -torch.inf, torch.nan])
def test_check_finite(device, dtype, bad):
    tensors = [torch.zeros(0, dtype=dtype, device=device), normal(70001, device=device, dtype=dtype)]
    tensors[1][5] = torch.finfo(dtype).max
    found = scalar(0.0, device)
    if bad is not None:
        tensors[1][70000] = bad
    ops.check_finite_(tensors, found)
    assert found.item() == (0.0 if bad is None else 1.0)
    ops.check_finite_(tensors[:1], found)  # never taken back
    assert found.item() == (0.0 if bad is None else 1.0)


def test_loss_scale_follows_the_reference(device):
    scale, good, updates = scalar(4.0, device), scalar(0, device, torch.int32), scalar(7, device, torch.int64)
    want = scale.double(), good.clone(), updates.clone()
    overflow = [0, 0, 0, 1, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0]
    for bad in overflow:
        found = scalar(float(bad), device)
        ops.loss_scale_update_(scale, good, updates, found, 2.0, 0.5, 3)
        reference.loss_scale_update_(*want, found, 2.0, 0.5, 3)
        assert [scale.item(), good.item(), updates.item()] == [t.item() for t in want]
    assert updates.item() == 7 + overflow.count(0)
    scale.fill_(torch.finfo(torch.float32).max)
    ops.loss_scale_update_(scale, good.fill_(2), updates, scalar(0.0, device), 2.0, 0.5, 3)
    assert scale.item() == torch.finfo(torch.float32).max


def test_loss_scale_ops_opcheck(device):
    opcheck(OPS.check_finite_.default, ([normal(7, 3, device=device)], scalar(0.0, device)))
    state = (scalar(8.0, device), scalar(0, device, torch.int32), scalar(0, device, torch.int64))
    opcheck(OPS.loss_scale_update_.default, (*state, scalar(0.0, device), 2.0, 0.5, 5))


def test_loss_scale_ops_reject_bad_arguments(device):
    found = scalar(0.0, device)
    with pytest.raises(RuntimeError, match="tensors must be contiguous"):
        ops.check_finite_([normal(4, 3, device=device).T], found)
    with pytest.raises(RuntimeError, match="tensors must be float32, float16 or bfloat16"):
        ops.check_finite_([normal(4, device=device).double()], found)
    with pytest.raises(RuntimeError, match="found_inf must be one"):
        ops.check_finite_([normal(4, device=device)], found.double())
    good, updates = scalar(0, device, torch.int32), scalar(0, device, torch.int64)
    for name, arguments in {
        "scale": (scalar(1.0, device, torch.float64), good, updates),
        "good_steps": (scalar(1.0, device), good.long(), updates),
        "updates": (scalar(1.0, device), good, updates.int()),
    }.items():
        with pytest.raises(RuntimeError, match=f"loss_scale_update_: {name} must be one"):
            ops.loss_scale_update_(*arguments, found)
