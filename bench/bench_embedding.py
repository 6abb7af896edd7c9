"""The Outbrain model's 13 tables beside torch: `python -m pytest bench/bench_embedding.py`."""

import functools

import pytest
import torch
import torch.nn.functional as F

from widedeep import ops
from widedeep.testing import OUTBRAIN_TABLES, embedding_case, normal

ROWS = {"cpu": 4096, "cuda": 131072}
DTYPES = {"cpu": torch.float32, "cuda": torch.float16}
LR, RHO, EPS, WIDE_LR = 1.2e-4, 0.5, 1e-7, 0.02


@pytest.fixture
def case(device):
    return drawn(device)


@functools.cache
def drawn(device):
    """Once for all tests; updates change it."""
    return embedding_case(ROWS[device], OUTBRAIN_TABLES, numeric=13, device=device, aligned=device == "cuda")


def touched(case) -> int:
    """Elements of the deep input that come from tables."""
    return len(case.ids) * sum(case.dims)


@pytest.mark.parametrize("who", ["ours", "torch"])
def test_forward(case, measure, device, who):
    dtype = DTYPES[device]
    x = torch.empty(len(case.ids), case.width, dtype=dtype, device=device)
    wide_logit = torch.empty(len(case.ids), device=device)
    base = torch.tensor([sum(case.rows[:f]) for f in range(len(case.rows))], dtype=torch.int32, device=device)

    def ours():
        lists = (case.hotness, case.mean, case.columns, case.numeric_columns)
        ops.embedding_forward_out(*case.weights(), *lists, x=x, wide_logit=wide_logit)

    def plain():
        parts = [F.embedding(case.ids[:, f], table) for f, table in enumerate(case.tables)]
        deep = torch.cat([*parts, case.numeric], 1).to(dtype)
        return deep, case.wide[case.ids + base].sum(1) + case.numeric @ case.wide_numeric + case.wide_bias

    measure(ours if who == "ours" else plain, bytes=touched(case) * 4 + x.numel() * x.element_size())


@pytest.mark.parametrize("who", ["ours", "torch"])
def test_segments(case, measure, who):
    """torch's stable sort of all (table, id), the distinct ones and how often they come."""
    base = torch.tensor([sum(case.rows[:f]) for f in range(len(case.rows))], dtype=torch.int32, device=case.ids.device)

    def plain():
        rows, entries = (case.ids + base).view(-1).sort(stable=True)
        return entries, torch.unique_consecutive(rows, return_counts=True)

    calls = {"ours": lambda: ops.embedding_segments(case.ids, case.hotness, case.rows), "torch": plain}
    measure(calls[who], bytes=case.ids.numel() * 4)


@pytest.mark.parametrize("who", ["ours", "torch"])
def test_update(case, measure, device, who):
    """Gradients of all touched rows and both optimizers; torch: summed sparse gradients and the updates of the rows."""
    dx = normal(len(case.ids), case.width, device=device, dtype=DTYPES[device], scale=1e-4)
    dlogit = normal(len(case.ids), device=device, scale=1e-4)
    rms = [torch.zeros_like(t) for t in case.tables]
    R = sum(case.rows)
    last_step = torch.full((R,), -1, dtype=torch.int32, device=device)
    accum, linear = torch.full((R,), 0.1, device=device), torch.zeros(R, device=device)
    lr, step = torch.tensor([LR], device=device), torch.tensor([0], device=device)

    def ours():
        segments = ops.embedding_segments(case.ids, case.hotness, case.rows)
        state = (case.tables, rms, last_step, case.wide, accum, linear)
        lists = (case.hotness, case.mean, case.columns)
        ops.embedding_update_(case.ids, dx, dlogit, *segments, *state, *lists, lr, step, RHO, EPS, WIDE_LR)

    def plain():
        for f, (table, mean_square) in enumerate(zip(case.tables, rms)):
            part = dx[:, case.columns[f] : case.columns[f] + table.shape[1]].float()
            grad = torch.sparse_coo_tensor(case.ids[None, :, f].long(), part, table.shape).coalesce()
            rows, g = grad.indices()[0], grad.values()
            new = mean_square[rows].mul_(RHO).addcmul_(g, g, value=1 - RHO)
            mean_square[rows] = new
            table.index_add_(0, rows, g / (new.sqrt_() + EPS), alpha=-LR)

    # Read dx; read and write weight and mean square of a row for each of its uses, at most.
    measure(ours if who == "ours" else plain, bytes=touched(case) * (dx.element_size() + 16))
