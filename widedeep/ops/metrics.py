"""Counts of probabilities by class for the AUC."""

import torch
from torch import Tensor

from widedeep import _load  # noqa: F401  registers torch.ops.widedeep

_ops = torch.ops.widedeep


def auc_histogram_(logit: Tensor, label: Tensor, positives: Tensor, negatives: Tensor) -> None:
    """Count the rows of each class by bin of their probability, for Keras' AUC with T = bins + 1 thresholds.

    Keras' thresholds are t_0 = -1e-7, t_i = i / (T - 1) rounded to float32, t_{T-1} = 1 + 1e-7; bin j holds
    t_j < sigmoid(logit) <= t_{j+1}, so a row counts as predicted positive at threshold i exactly when j >= i. Counts of
    several batches, or ranks, add up.

    Args:
        logit:     [B] float32; label: [B] float32, 0 or 1.
        positives, negatives: [T - 1] int64, added to.
    Raises:
        RuntimeError: wrong shape, dtype, device or stride.
    """
    _ops.auc_histogram_.default(logit, label, positives, negatives)


torch.library.register_fake("widedeep::auc_histogram_", lambda *args: None)
