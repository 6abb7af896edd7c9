"""The AUC histogram and the order of an epoch."""

import numpy as np
import pytest
import torch
from torch.library import opcheck

from widedeep import ops, reference
from widedeep.testing import normal

OPS = torch.ops.widedeep


def counts(bins, device):
    return torch.zeros(bins, dtype=torch.int64, device=device), torch.zeros(bins, dtype=torch.int64, device=device)


@pytest.mark.parametrize("B", [0, 1, 5000])
@pytest.mark.parametrize("thresholds", [2, 200, 8000])
def test_auc_histogram_matches_reference(B, thresholds, device):
    logit = normal(B, device=device, scale=3)
    logit[::7] = 0.0
    logit[1::31] = 100.0
    logit[2::31] = -100.0
    label = (normal(B, device=device, key="label") > 1).float()
    got, want = counts(thresholds - 1, device), counts(thresholds - 1, device)
    for _ in range(2):
        ops.auc_histogram_(logit, label, *got)
        reference.auc_histogram_(logit, label, *want)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    assert (got[0] + got[1]).sum() == 2 * B


@pytest.mark.parametrize("thresholds", [200, 8000])
def test_auc_histogram_gives_the_golden_confusion(thresholds, shared, device):
    """Keras' own counts of true and false positives at every threshold."""
    z = np.load(shared / "golden" / "metrics.npz")
    logit, label = torch.from_numpy(z["logits"]).to(device), torch.from_numpy(z["labels"]).float().to(device)
    positives, negatives = counts(thresholds - 1, device)
    for start in range(0, len(logit), 4096):
        ops.auc_histogram_(logit[start : start + 4096], label[start : start + 4096], positives, negatives)
    confusion = z[f"auc{thresholds}_confusion"]
    for count, wanted in ((positives, confusion[0]), (negatives, confusion[1])):
        above = torch.cat([count.flip(0).cumsum(0).flip(0), count.new_zeros(1)]).cpu().numpy()
        np.testing.assert_allclose(above, wanted, atol=2)


@pytest.mark.parametrize("rows", [1, 2, 7, 64, 1000, 1031])
@pytest.mark.parametrize(("block", "window"), [(1, 1), (8, 32), (16, 20), (64, 1 << 20), (2000, 1)])
@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (-5, 3), (2**62, 2**31)])
def test_shuffle_rows_matches_reference(rows, block, window, seed, epoch, device):
    got = ops.shuffle_rows(rows, block, window, seed, epoch, 0, rows, device)
    assert got.device.type == device
    assert torch.equal(got.cpu(), reference.shuffle_rows(rows, block, window, seed, epoch, 0, rows, "cpu"))
    part = ops.shuffle_rows(rows, block, window, seed, epoch, rows // 3, rows // 2, device)
    assert torch.equal(part, got[rows // 3 : rows // 3 + rows // 2])


def test_shuffle_rows_of_a_huge_set_stays_in_range(device):
    rows = 2**39 + 12345
    got = ops.shuffle_rows(rows, 4096, 1 << 20, 1, 0, rows - 50_000, 50_000, device)
    assert (got >= 0).all()
    assert (got < rows).all()
    assert len(got.unique()) == 50_000


def test_metric_ops_opcheck(device):
    logit, label = normal(50, device=device), torch.ones(50, device=device)
    opcheck(OPS.auc_histogram_.default, (logit, label, *counts(199, device)))
    opcheck(OPS.shuffle_rows.default, (100, 8, 32, 1, 2, 10, 20, torch.device(device)))


def test_metric_ops_reject_bad_arguments(device):
    logit, label = normal(50, device=device), torch.ones(50, device=device)
    with pytest.raises(RuntimeError, match="label must be"):
        ops.auc_histogram_(logit, label.long(), *counts(9, device))
    with pytest.raises(RuntimeError, match="negatives must be"):
        ops.auc_histogram_(logit, label, counts(9, device)[0], counts(8, device)[0])
    with pytest.raises(RuntimeError, match="at least one bin"):
        ops.auc_histogram_(logit, label, *counts(0, device))
    for args in ((10, 0, 8, 0, 0, 0, 1), (10, 4, 0, 0, 0, 0, 1), (-1, 4, 8, 0, 0, 0, 0), (2**41, 4, 8, 0, 0, 0, 1)):
        with pytest.raises(RuntimeError, match="shuffle_rows: rows"):
            ops.shuffle_rows(*args, device)
    for start, count in ((11, 0), (0, 11), (-1, 2), (5, -1), (2**62, 2**62)):
        with pytest.raises(RuntimeError, match="are not all within 10 rows"):
            ops.shuffle_rows(10, 4, 8, 0, 0, start, count, device)
