"""The kernels of the head and of the passes around a product on the CPU emulator (tests/emulated.py), against float64.
Needs no GPU.
"""

import platform
import shutil

import emulated
import pytest
import torch
from test_emulated_kernels import dtypes, order, same_in_any_order  # noqa: F401  order: a fixture of every test

from widedeep import reference
from widedeep.ops.linear import bit_row_bytes
from widedeep.testing import assert_close, normal, poisoned

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or platform.machine() != "x86_64", reason="the CUDA emulator needs g++ on x86-64"
)


# --- head -------------------------------------------------------------------------------------------------------------

HEADS = [
    (0, 64), (1, 8), (7, 264), (33, 1024), (300, 520), (12, 1032), (9, 2048), (33, 19), (5, 989), (3, 1021),
    (1700, 8), (3169, 512), (3200, 9), (1585, 520), (3300, 768),  # several turns of a warp, whole and not
]  # fmt: skip


def head_case(B, H, dtype):
    h = (normal(B, H, key="h").relu() * (normal(B, H, key="keep") > -1)).to(dtype)
    label = (normal(B, key="label") > 0).float()
    return h, normal(1, H, scale=H**-0.5), normal(1, key="bias"), normal(B, key="wide"), label


def head_step(module, case, make_output, dtype):
    h, weight, bias, wide_logit, label = case
    B, H = h.shape
    shapes = {
        "logit": (B,), "dlogit": (B,), "dz": (B, H), "dbias_hidden": (H,), "dweight": (1, H), "dbias": (1,), "loss": (),
    }  # fmt: skip
    out = {name: make_output(shape, dtype if name == "dz" else None) for name, shape in shapes.items()}
    module.head_step_out(h, weight, bias, wide_logit, label, 2 * B + 1, 0.1, torch.tensor(4.0), **out)
    return out


@pytest.mark.parametrize(("B", "H"), HEADS)
@dtypes
def test_head(B, H, dtype):
    case = head_case(B, H, dtype)
    got = head_step(emulated, case, lambda shape, d: poisoned(*shape, dtype=d or torch.float32), dtype)
    wanted = [t.double() for t in case]
    want = head_step(reference, wanted, lambda shape, _: torch.full(shape, 7.0, dtype=torch.float64), dtype)
    for name in got:
        assert_close(got[name], want[name], dtype if name == "dz" else torch.float32, scale=3)
    emulated.head_forward_out(*case[:4], logit=(logit := poisoned(len(case[0]))))
    assert_close(logit, reference.head_forward(*wanted[:4]), scale=3)


@pytest.mark.parametrize("H", [8, 1040])  # kept in registers, and read again
def test_head_of_rows_that_begin_at_no_multiple_of_32_bytes(H):
    """As in a view: 16 bytes are what the op asks for, and eight floats are 32."""
    B = 7
    case = head_case(B, H, torch.float32)
    want = head_step(reference, [t.double() for t in case], lambda s, _: poisoned(*s, dtype=torch.float64), None)
    # Memory ends where a page begins, so that 16 bytes behind the rows move their start.
    h, dz = torch.cat([case[0].flatten(), torch.zeros(4)]), poisoned(B * H + 4)
    got = {name: poisoned(*t.shape) for name, t in want.items()} | {"dz": dz}
    inputs = (h, torch.float32, B, H, *case[1:], 2 * B + 1, 0.1, torch.tensor(4.0))
    emulated.call("head_step", *inputs, *got.values())
    got["dz"] = dz[: B * H].view(B, H)
    for name in got:
        assert_close(got[name], want[name], scale=3)
    emulated.call("head_forward", *inputs[:7], logit := poisoned(B))
    assert_close(logit, want["logit"], scale=3)


def test_head_is_the_same_in_any_order():
    case = head_case(1700, 8, torch.float16)
    same_in_any_order(
        lambda: head_step(emulated, case, lambda s, d: poisoned(*s, dtype=d or torch.float32), torch.float16).values()
    )


@pytest.mark.parametrize(
    ("B", "N"), [(0, 0), (0, 3), (1, 1), (700, 0), (33, 13), (9505, 13), (300, 256), (700, 255), (1000, 100)]
)
def test_wide_numeric_backward(B, N):
    numeric, dlogit = normal(B, N), normal(B, key="dlogit")

    def run(module, *arguments, dtype):
        out = {"dweight": poisoned(N, dtype=dtype), "dbias": poisoned(1, dtype=dtype)}
        module.wide_numeric_backward_out(*arguments, **out)
        return out

    want = run(reference, numeric.double(), dlogit.double(), dtype=torch.float64)
    for name, got in run(emulated, numeric, dlogit, dtype=torch.float32).items():
        assert_close(got, want[name], scale=5)
    if B == 33:
        same_in_any_order(lambda: run(emulated, numeric, dlogit, dtype=torch.float32).values())


def test_too_many_wide_numerics_are_refused():
    with pytest.raises(RuntimeError, match="CUDA error 1"):
        emulated.wide_numeric_backward_out(normal(3, 257), normal(3), dweight=poisoned(257), dbias=poisoned(1))


# --- passes around a product ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("M", "N"), [(0, 8), (1, 8), (7, 64), (33, 264), (129, 77), (40, 1032), (37, 1), (5, 36), (9, 1023), (54400, 136)]
)
@pytest.mark.parametrize("with_bits", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.1])
@dtypes
def test_bias_relu_dropout(M, N, p, dtype, with_bits):
    if M * N > 1 << 20 and not (with_bits and p and dtype == torch.float16):
        pytest.skip("one such case is enough")  # past one turn of the grid
    y, bias = normal(M, N, dtype=dtype), normal(N, dtype=dtype, key="bias")
    y.view(-1)[::7] = 0
    seed, step, layer, first_row = -5, torch.tensor(2**33 + 5), 3, 2**32 - 2
    want = torch.relu(y.double() + bias.double())
    if p:
        keep = reference.dropout_mask(M, N, p, seed, step, layer, first_row)
        want = torch.where(keep, want * reference.dropout_scale(p), 0)
    got = y.clone()
    bits = poisoned(M, bit_row_bytes(N), dtype=torch.uint8).fill_(0xA5) if with_bits else None
    emulated.bias_relu_dropout(got, bias, p, seed, step, layer, first_row, bits)
    assert_close(got, want)
    assert torch.equal(got != 0, want.to(dtype) != 0)
    assert not with_bits or torch.equal(bits, reference.pack_bits(got > 0))


@pytest.mark.parametrize(("M", "N"), [(0, 8), (1, 8), (128, 64), (129, 77), (150, 520), (4500, 8), (70, 1036)])
@pytest.mark.parametrize("masked", ["values", "bits", None])
@dtypes
def test_mask_and_sum(M, N, masked, dtype):
    values = normal(M, N, dtype=dtype)
    mask = normal(M, N, dtype=dtype, key="mask") if masked else None
    if masked:
        mask.view(-1)[::3] = 0  # as of an activation
    out, dbias = poisoned(M, N, dtype=dtype), poisoned(N)
    if masked == "bits":
        emulated.mask_and_sum(values, None, 1.25, out=out, dbias=dbias, bits=reference.pack_bits(mask > 0))
    else:
        emulated.mask_and_sum(values, mask, 1.25, out=out, dbias=dbias)
    want = values.double() * 1.25
    if masked:
        want = torch.where(mask > 0, want, 0)
    assert_close(out, want)
    assert_close(dbias, want.sum(0), scale=5)


# --- transposed copies ------------------------------------------------------------------------------------------------


@dtypes
def test_transpose(dtype):
    """Whole and ragged tiles, odd sizes, matrices without rows or columns; more matrices than a launch takes."""
    sizes = [(64, 64), (1, 1), (65, 130), (7, 200), (129, 63), (0, 5), (5, 0)] * 10
    matrices = [normal(*size, dtype=dtype, key=i) for i, size in enumerate(sizes)]
    got = [poisoned(*m.shape[::-1], dtype=dtype) for m in matrices]
    emulated.transpose_out(matrices, out=got)
    assert all(torch.equal(a, m.t()) for a, m in zip(got, matrices))
