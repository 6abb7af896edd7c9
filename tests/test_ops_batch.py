"""The gather of a batch from a data set in memory."""

import numpy as np
import pytest
import torch
from torch.library import opcheck

from widedeep import ops, reference
from widedeep.shuffle import EpochOrder
from widedeep.testing import generator, normal, poisoned

OPS = torch.ops.widedeep
ORDERS = [(), (1, 1, 0, 0), (8, 32, -5, 3), (64, 1 << 20, 2**62, 2**31), (2000, 1, 4, 1)]


def data_set(R, K, N, group, device="cpu"):
    ids = torch.randint(-1, 2**31 - 1, (R, K), generator=generator(R, K), dtype=torch.int32)
    groups = torch.arange(R) * 2**33 - 7 if group else None
    rows = (ids, normal(R, N), normal(R, key="label"), groups)
    return tuple(None if t is None else t.to(device) for t in rows)


def outputs(rows, B):
    return tuple(None if t is None else poisoned(B, *t.shape[1:], device=t.device, dtype=t.dtype) for t in rows)


def same(got, want):
    return all((g is None and w is None) or torch.equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize(("R", "K", "N"), [(1, 13, 13), (64, 1, 0), (333, 0, 1), (1031, 13, 13), (500, 40, 33)])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("group", [False, True])
def test_matches_reference(R, K, N, order, group, device):
    rows = data_set(R, K, N, group, device)
    for start, B in [(0, R), (R // 3, R // 2), (R - 1, 1), (R, 0)]:
        got, want = outputs(rows, B), outputs(rows, B)
        ops.gather_batch_out(rows, order, start, out=got)
        reference.gather_batch_out(rows, order, start, out=want)
        assert same(got, want)


def test_batches_of_an_epoch_hold_every_row_once(device):
    rows = data_set(10_001, 2, 1, True, device)
    seen = []
    for start in range(0, 10_001, 512):
        out = outputs(rows, min(512, 10_001 - start))
        ops.gather_batch_out(rows, (16, 2000, 7, 1), start, out=out)
        seen.append(out[3])
    assert torch.equal(torch.cat(seen).sort()[0], rows[3])


def test_takes_the_order_of_the_numpy_twin(device):
    """A data set of two columns of places, and windows that are no power of two."""
    rows, order = 100_003, EpochOrder(100_003, 9, 4, 4096, 20_000)
    places = torch.arange(rows, dtype=torch.int32, device=device)[:, None].expand(-1, 2).contiguous()
    stored = (places, torch.empty(rows, 0, device=device), torch.zeros(rows, device=device), None)
    out = outputs(stored, 50_000)
    ops.gather_batch_out(stored, (4096, 20_000, 9, 4), 30_000, out=out)
    np.testing.assert_array_equal(out[0][:, 1].cpu().numpy(), order.rows_at(30_000, 80_000))


def test_opcheck(device):
    for group in (False, True):
        rows = data_set(100, 3, 2, group, device)
        names = ("out_ids", "out_numeric", "out_label", "out_group")
        out = dict(zip(names, outputs(rows, 20)))
        opcheck(OPS.gather_batch_out.default, (*rows, [8, 32, 1, 2], 10), out)
        opcheck(OPS.gather_batch_out.default, (*rows, [], 10), out)


def test_an_empty_data_set_has_the_empty_batch(device):
    rows = data_set(0, 3, 2, True, device)
    ops.gather_batch_out(rows, (8, 32, 1, 2), 0, out=outputs(rows, 0))


def test_refusals(device):
    rows = data_set(10, 3, 2, True, device)
    out = outputs(rows, 4)
    for start in (-1, 7, 2**62):
        with pytest.raises(RuntimeError, match="are not all within 10 rows"):
            ops.gather_batch_out(rows, (), start, out=out)
    for order in ((0, 8, 0, 0), (4, 0, 0, 0), (4, 2**41, 0, 0)):
        with pytest.raises(RuntimeError, match=r"block_rows and window_rows must be in \[1, 2\^40\]"):
            ops.gather_batch_out(rows, order, 0, out=out)
    with pytest.raises(RuntimeError, match="order must be empty or block_rows"):
        ops.gather_batch_out(rows, (4, 8), 0, out=out)
    with pytest.raises(RuntimeError, match="expected both group and out_group"):
        ops.gather_batch_out(rows, (), 0, out=(*out[:3], None))
    wrong = {
        "ids": (0, rows[0].long()),
        "numeric": (1, rows[1][:9]),
        "label": (2, rows[2].double()),
        "group": (3, rows[3].int()),
    }
    for name, (place, tensor) in wrong.items():
        bad = (*rows[:place], tensor, *rows[place + 1 :])
        with pytest.raises(RuntimeError, match=f"gather_batch_out: {name} must be"):
            ops.gather_batch_out(bad, (), 0, out=out)
    with pytest.raises(RuntimeError, match="out_numeric must be"):
        ops.gather_batch_out(rows, (), 0, out=(out[0], out[1].t().contiguous().t(), *out[2:]))


@pytest.mark.cuda
def test_is_capturable_on_a_side_stream():
    rows = data_set(5000, 13, 13, True, "cuda")
    got, want = outputs(rows, 700), outputs(rows, 700)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.gather_batch_out(rows, (16, 2000, 7, 1), 333, out=got)
    graph.replay()
    torch.cuda.synchronize()
    ops.gather_batch_out(rows, (16, 2000, 7, 1), 333, out=want)
    assert same(got, want)
