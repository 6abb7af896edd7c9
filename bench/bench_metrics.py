"""Counts for the AUC beside torch: `python -m pytest bench/bench_metrics.py`."""

import pytest
import torch

from widedeep import ops
from widedeep.testing import normal

ROWS = {"cpu": 65536, "cuda": 1 << 20}
BINS = 199  # of the 200 thresholds of `auc_val`


@pytest.mark.parametrize("who", ["ours", "torch"])
def test_auc_histogram(device, measure, who):
    """Both classes, added to the counts so far; torch searches and counts for each, probabilities from float64 too."""
    logit, label = normal(ROWS[device], device=device), (normal(ROWS[device], device=device, key="label") > 1).float()
    positives, negatives = (torch.zeros(BINS, dtype=torch.int64, device=device) for _ in range(2))
    thresholds = (torch.arange(1, BINS, dtype=torch.float64, device=device) / BINS).float()

    def plain():
        bins = torch.searchsorted(thresholds, logit.double().sigmoid().float())
        for counts, weight in ((positives, label), (negatives, 1 - label)):
            counts += torch.bincount(bins, weight, minlength=BINS).long()

    calls = {"ours": lambda: ops.auc_histogram_(logit, label, positives, negatives), "torch": plain}
    measure(calls[who], bytes=2 * 4 * ROWS[device])
