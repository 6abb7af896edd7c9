"""What the CUDA bindings refuse in a sentence, before a kernel would fault."""

import pytest
import torch

from widedeep import ops
from widedeep.ops import linear_sm90
from widedeep.testing import embedding_case, normal

pytestmark = pytest.mark.cuda

DEVICE = "cuda"


def test_arguments_on_another_device():
    w = normal(8, 8, device=DEVICE)
    state, lr = ([w], [torch.zeros_like(w)], [torch.ones_like(w)], []), torch.ones(1, device=DEVICE)
    for place, arguments in {
        "lr": (*state, lr.cpu()),
        "rms": ([w], [state[1][0].cpu()], *state[2:], lr),
        "grads": (*state[:2], [state[2][0].cpu()], [], lr),
    }.items():
        with pytest.raises(RuntimeError, match=rf"rmsprop_dense_: {place}.*on another device than the first argument"):
            ops.rmsprop_dense_(*arguments, 0.5, 1e-7)
    with pytest.raises(RuntimeError, match="check_finite_: found_inf is on another device"):
        ops.check_finite_([w.cpu()], torch.zeros(1, device=DEVICE))
    case = embedding_case(4, device=DEVICE)
    case.wide = case.wide.cpu()
    with pytest.raises(RuntimeError, match="wide is on another device than the first argument"):
        ops.embedding_forward(*case.forward_args(torch.float32))


def test_matrices_that_start_in_the_middle_of_16_bytes():
    buffer, weight = torch.zeros(8 * 16 + 1, device=DEVICE, dtype=torch.half), torch.zeros(16, 16, device=DEVICE).half()
    shifted, x, bias = buffer[1:].view(8, 16), torch.zeros(8, 16, device=DEVICE).half(), weight[0]
    step = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    with pytest.raises(RuntimeError, match="y must start at a multiple of 16 bytes"):
        ops.linear_relu_dropout_out(x, weight, bias, 0.1, 1, step, 0, 0, y=shifted)
    with pytest.raises(RuntimeError, match="the mask must start at a multiple of 16 bytes"):
        ops.linear_dgrad_out(x, weight, shifted, 0.1, dx=torch.empty_like(x), dbias=None)
    with pytest.raises(RuntimeError, match="matrices must start at a multiple of 16 bytes"):
        ops.transpose_out([shifted], out=[weight[:, :8].contiguous()])
    with pytest.raises(RuntimeError, match="y must start at a multiple of 16 bytes"):
        linear_sm90.linear_sm90_out(x, [weight], [bias], 0.1, 1, step, 0, 0, y=[shifted], masks=[])
    row, logit = torch.zeros(1, 16, device=DEVICE), torch.zeros(8, device=DEVICE)
    with pytest.raises(RuntimeError, match="head_forward: h must start at a multiple of 16 bytes"):
        ops.head_forward(shifted, row, logit[:1], logit)
    outputs = {"logit": logit, "dlogit": logit.clone(), "dz": shifted, "dbias_hidden": row[0].clone()}
    outputs |= {"dweight": row.clone(), "dbias": logit[:1].clone(), "loss": logit[:1].clone()}
    with pytest.raises(RuntimeError, match="head_step_out: dz must start at a multiple of 16 bytes"):
        ops.head_step_out(x, row, logit[:1], logit, logit, 8, 0.1, None, **outputs)
    mask = torch.zeros(linear_sm90.mask_bytes(8, 16) + 1, dtype=torch.uint8, device=DEVICE)[1:]
    with pytest.raises(RuntimeError, match="a mask must start at a multiple of 16 bytes"):
        linear_sm90.linear_sm90_dgrad_out(x, [weight], [mask], 0.0, dx=[torch.empty_like(x)], dbias=[])


def test_layers_of_a_chain_that_share_memory():
    """A tile may be written while another block reads what lay there."""
    x, weight = torch.zeros(8, 16, device=DEVICE).half(), torch.zeros(16, 16, device=DEVICE).half()
    both, step = torch.empty(12, 16, device=DEVICE).half(), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    for outputs in ([torch.empty_like(x), x], [both[:8], both[4:]]):
        with pytest.raises(RuntimeError, match="linear_sm90: the first argument and all of y must lie apart"):
            linear_sm90.linear_sm90_out(x, [weight] * 2, [weight[0]] * 2, 0.1, 1, step, 0, 0, y=outputs, masks=[])
        with pytest.raises(RuntimeError, match="linear_sm90_dgrad: the first argument and all of dx must lie apart"):
            linear_sm90.linear_sm90_dgrad_out(x, [weight] * 2, [], 0.0, dx=outputs, dbias=[])
