"""Sizes at which 32-bit offsets would wrap, and one row that takes the whole batch. Skipped where memory is short."""

import pytest
import torch

from widedeep import ops
from widedeep.testing import normal

pytestmark = pytest.mark.cuda

DEVICE = "cuda"


@pytest.fixture(autouse=True)
def memory_goes_back():
    yield
    torch.cuda.empty_cache()


def needs_gib(gib):
    """Takes them at once, for torch's allocator to hand out: other processes of the tests share the GPU."""
    try:
        torch.empty(gib << 30, dtype=torch.uint8, device=DEVICE)
    except torch.OutOfMemoryError:
        pytest.skip(f"needs {gib} GiB of device memory, {torch.cuda.mem_get_info()[0] >> 30} are free")


def test_tables_and_activations_past_two_billion_elements():
    """Table, deep input and gradient each have more than 2^31 elements; the last row and column must come out right."""
    rows, D, B = 9_000_000, 256, 8_400_000
    needs_gib(60)
    table = torch.zeros(rows, D, device=DEVICE)
    table[-1] = torch.arange(D, device=DEVICE, dtype=torch.float32)
    ids = torch.zeros(B, 1, dtype=torch.int32, device=DEVICE)
    ids[-1] = rows - 1
    wide = torch.zeros(rows, device=DEVICE)
    wide[-1] = 5.0
    none, bias = torch.zeros(0, device=DEVICE), torch.zeros(1, device=DEVICE)
    numeric = torch.zeros(B, 0, device=DEVICE)
    args = (ids, numeric, [table], wide, none, bias, [1], [0], [0], [], D, torch.float16)
    x, wide_logit = ops.embedding_forward(*args)
    assert torch.equal(x[-1].float(), table[-1])
    assert not x[:-1].any()
    assert wide_logit[-1] == 5.0
    x[:-1].fill_(2.0**-10)
    dlogit = torch.ones(B, device=DEVICE)
    segments = ops.embedding_segments(ids, [1], [rows])
    (row_gradients,), wide_gradients = ops.embedding_row_gradients(
        ids, x, dlogit, *segments, [1], [0], [0], [rows], [D]
    )
    assert segments[-1].tolist() == [0, 2]
    torch.testing.assert_close(row_gradients[0], torch.full((D,), (B - 1) * 2.0**-10, device=DEVICE), rtol=1e-5, atol=0)
    assert torch.equal(row_gradients[1], table[-1])
    torch.testing.assert_close(wide_gradients[:2], torch.tensor([B - 1.0, 1.0], device=DEVICE))


@pytest.mark.parametrize("kind", ["hot", "all different"])
def test_one_row_takes_the_batch(kind):
    B, D = 131072, 128
    ids = torch.zeros(B, 1, dtype=torch.int32, device=DEVICE) + 3
    if kind == "all different":
        ids = torch.randperm(200_000, device=DEVICE)[:B, None].int()
    dx, dlogit = normal(B, D, device=DEVICE, dtype=torch.float16), normal(B, device=DEVICE)
    segments = ops.embedding_segments(ids, [1], [200_000])
    (got,), wide = ops.embedding_row_gradients(ids, dx, dlogit, *segments, [1], [0], [0], [200_000], [D])
    want = torch.zeros(200_000, D, dtype=torch.float64, device=DEVICE).index_add_(0, ids[:, 0].long(), dx.double())
    want_wide = torch.zeros(200_000, dtype=torch.float64, device=DEVICE).index_add_(
        0, ids[:, 0].long(), dlogit.double()
    )
    count = int(segments[-1][-1])
    touched = segments[0][:count].long()
    torch.testing.assert_close(got[:count].double(), want[touched], rtol=1e-5, atol=2e-3)
    torch.testing.assert_close(wide[:count].double(), want_wide[touched], rtol=1e-5, atol=2e-3)
    again, _ = ops.embedding_row_gradients(ids, dx, dlogit, *segments, [1], [0], [0], [200_000], [D])
    assert torch.equal(got, again[0])


def test_wgrad_of_a_large_batch():
    B = 1 << 21
    needs_gib(24)
    dz = torch.full((B, 1032), 2.0**-10, device=DEVICE, dtype=torch.float16)  # 2.16e9 elements
    x = torch.ones(B, 64, device=DEVICE, dtype=torch.float16)
    dweight = torch.empty(1032, 64, device=DEVICE)
    ops.linear_wgrad_out(dz, x, dweight=dweight)
    torch.testing.assert_close(dweight, torch.full_like(dweight, B * 2.0**-10), rtol=1e-4, atol=0)
    dbias, out = torch.empty(1032, device=DEVICE), torch.empty_like(dz)
    eye = torch.eye(1032, device=DEVICE, dtype=torch.float16)
    ops.linear_dgrad_out(dz, eye, None, 0.0, dx=out, dbias=dbias)
    torch.testing.assert_close(dbias, torch.full_like(dbias, B * 2.0**-10), rtol=1e-4, atol=0)


def test_a_layer_of_a_large_batch():
    """The last rows of an output of more than 2^31 elements are those of a batch of them alone, dropout included."""
    B, last = (1 << 21) + 5, 8
    needs_gib(24)
    x = normal(last, 16, device=DEVICE, dtype=torch.float16).repeat(-(-B // last), 1)[:B].contiguous()
    weight, bias = normal(1032, 16, device=DEVICE, dtype=torch.float16), normal(1032, device=DEVICE)
    step = torch.ones(1, dtype=torch.int64, device=DEVICE)
    y = ops.linear_relu_dropout(x, weight, bias, 0.5, 7, step, 0)
    want = ops.linear_relu_dropout(x[-last:].contiguous(), weight, bias, 0.5, 7, step, 0, B - last)
    torch.testing.assert_close(y[-last:], want, rtol=2e-3, atol=2e-3)


def test_a_dense_update_past_four_billion_elements():
    rows, D = (1 << 24) + 1, 256
    needs_gib(50)
    weight, rms = (torch.zeros(rows, D, device=DEVICE) for _ in range(2))
    grad = torch.zeros(rows, D, device=DEVICE, dtype=torch.float16)
    grad[-1] = 1
    ops.rmsprop_dense_([weight], [rms], [grad], [], torch.full((1,), 0.25, device=DEVICE), 0.5, 1e-7)
    torch.testing.assert_close(rms[-1], torch.full((D,), 0.5, device=DEVICE))
    torch.testing.assert_close(weight[-1], torch.full((D,), -0.25 / 0.5**0.5, device=DEVICE), rtol=1e-5, atol=0)
    assert not weight[:-1].any()
    assert not rms[:-1].any()
