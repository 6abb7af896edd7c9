"""Sizes past 2^31: element offsets are 64-bit everywhere; row numbers and positions are 32-bit and checked."""

import numpy as np
import psutil
import pytest
import torch

from widedeep import ops
from widedeep.testing import normal

ROWS, DIM = 2**25 + 3, 64  # 2^31 elements and a little: offsets of the last rows pass 32 bits
NAMED = [0, ROWS - 1, 2**25, 2**25 - 1, ROWS - 1]


def zeros(*shape, device, dtype=torch.float32):
    """On a CPU the pages exist only once they are touched, so that a huge table costs its named rows."""
    wanted = int(np.prod(shape)) * dtype.itemsize
    if device == "cpu":
        try:
            return torch.from_numpy(np.zeros(shape, torch.empty(0, dtype=dtype).numpy().dtype))
        except MemoryError:
            pytest.skip(f"wants {wanted / 2**30:.1f} GiB of address space")
    free = torch.cuda.mem_get_info()[0]
    if free < 1.2 * wanted:
        pytest.skip(f"wants {wanted / 2**30:.1f} GiB of GPU memory, {free / 2**30:.1f} GiB are free")
    return torch.zeros(*shape, device=device, dtype=dtype)


def test_embedding_of_a_table_past_2_31_elements(device):
    table, rms = zeros(ROWS, DIM, device=device), zeros(ROWS, DIM, device=device)
    wide, accum, linear, none = (zeros(n, device=device) for n in (ROWS, ROWS, ROWS, 0))
    last_step = zeros(ROWS, device=device, dtype=torch.int32)
    rows = torch.tensor(NAMED, device=device)
    table[rows] = normal(4, DIM, device=device)[[0, 1, 2, 3, 1]]
    accum[rows] = 0.1
    ids = rows[:, None].int()
    numeric, bias = torch.zeros(5, 0, device=device), torch.zeros(1, device=device)
    x, _ = ops.embedding_forward(ids, numeric, [table], wide, none, bias, [1], [0], [0], [], DIM, torch.float32)
    assert torch.equal(x, table[rows])

    segments = ops.embedding_segments(ids, [1], [ROWS])
    assert segments[0].tolist() == [0, 2**25 - 1, 2**25, ROWS - 1, -1]
    assert segments[2].tolist() == [0, 3, 2, 1, 4]
    dx, dlogit = normal(5, DIM, device=device), normal(5, device=device)
    before = table[rows]
    state = ([table], [rms], last_step, wide, accum, linear)
    lr, step = torch.tensor(0.5, device=device), torch.tensor(1, device=device)
    ops.embedding_update_(ids, dx, dlogit, *segments, *state, [1], [0], [0], lr, step, 0.5, 1e-7, 0.02)
    gradient = dx.clone()
    gradient[1] = gradient[4] = dx[1] + dx[4]
    want = before - 0.5 * gradient / ((0.5 * gradient**2).sqrt() + 1e-7)
    torch.testing.assert_close(table[rows], want)
    assert last_step[rows].tolist() == [1] * 5


def test_row_updates_of_a_table_past_2_31_elements(device):
    weight, rms, other = (zeros(ROWS, DIM, device=device) for _ in range(3))
    last_step = zeros(ROWS, device=device, dtype=torch.int32)
    rows, grads = torch.tensor(NAMED[:4], device=device), normal(4, DIM, device=device)
    lr, step = torch.tensor(0.5, device=device), torch.tensor(1, device=device)
    ops.rmsprop_rows_(weight, rms, last_step, rows, grads, lr, step, 0.5, 1e-7)
    torch.testing.assert_close(weight[rows], -0.5 * grads / ((0.5 * grads**2).sqrt() + 1e-7))
    ops.ftrl_rows_(weight, rms, other, rows, grads, 0.02)
    assert weight[rows].abs().min() > 0
    assert (other[rows] != 0).all()
    assert weight[1 : 2**25 - 1 : 2**21].abs().max() == 0


@pytest.mark.slow
def test_deep_input_past_2_31_elements(device):
    B, W = 2**21 + 1, 1024
    wanted = B * W * 2
    free = psutil.virtual_memory().available if device == "cpu" else torch.cuda.mem_get_info()[0]
    if free < 2 * wanted:
        pytest.skip(f"wants {wanted / 2**30:.1f} GiB and as much to spare, {free / 2**30:.1f} GiB are free")
    tables = [normal(3, 256, device=device, key=f) for f in range(4)]  # wider ones no GPU launch takes
    ids = (torch.arange(B, device=device, dtype=torch.int32) % 3)[:, None].repeat(1, 4)
    wide, none, bias = (torch.zeros(n, device=device) for n in (12, 0, 1))
    numeric, columns = torch.zeros(B, 0, device=device), [0, 256, 512, 768]
    lists = ([1] * 4, [0] * 4, columns, [], W, torch.bfloat16)
    x, _ = ops.embedding_forward(ids, numeric, tables, wide, none, bias, *lists)
    for b in (0, 2**20, 2**21 - 1, 2**21):
        assert torch.equal(x[b], torch.cat([table[b % 3] for table in tables]).bfloat16())


def test_too_many_rows_or_ids_are_refused(device):
    ids = torch.zeros(2, 2, dtype=torch.int32, device=device)
    with pytest.raises(RuntimeError, match="the tables have 2147483647 rows, the limit is"):
        ops.embedding_segments(ids, [1, 1], [2**31 - 2, 1])
    many = zeros(2**31 - 1, 1, device=device, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="ids has 2147483647 elements, the limit is"):
        ops.embedding_segments(many, [1], [10])
