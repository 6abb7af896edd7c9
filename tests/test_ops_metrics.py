"""The AUC histogram."""

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


def test_metric_ops_opcheck(device):
    logit, label = normal(50, device=device), torch.ones(50, device=device)
    opcheck(OPS.auc_histogram_.default, (logit, label, *counts(199, device)))


def test_metric_ops_reject_bad_arguments(device):
    logit, label = normal(50, device=device), torch.ones(50, device=device)
    with pytest.raises(RuntimeError, match="label must be"):
        ops.auc_histogram_(logit, label.long(), *counts(9, device))
    with pytest.raises(RuntimeError, match="negatives must be"):
        ops.auc_histogram_(logit, label, counts(9, device)[0], counts(8, device)[0])
    with pytest.raises(RuntimeError, match="at least one bin"):
        ops.auc_histogram_(logit, label, *counts(0, device))
