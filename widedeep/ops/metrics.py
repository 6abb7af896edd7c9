"""Counts of probabilities by class for the AUC, and the order of an epoch's rows."""

import torch
from torch import Tensor

import widedeep._load  # noqa: F401  registers torch.ops.widedeep

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


def shuffle_rows(
    rows: int,
    block_rows: int,
    window_rows: int,
    seed: int,
    epoch: int,
    start: int,
    count: int,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return the rows at positions start ... start + count - 1 of an epoch's order, a fixed function of (seed, epoch).

    Blocks of block_rows consecutive rows are put in random order, consecutive blocks of that order form windows of at
    least window_rows rows, and rows are permuted within their window. Definition: csrc/core/permute.h.

    Returns:
        [count] int64 on `device`, new tensor.
    Raises:
        RuntimeError: a size < 1 or > 2^40, or positions outside the epoch.
    """
    return _ops.shuffle_rows.default(rows, block_rows, window_rows, seed, epoch, start, count, torch.device(device))


torch.library.register_fake("widedeep::auc_histogram_", lambda *args: None)


@torch.library.register_fake("widedeep::shuffle_rows")
def _(rows, block_rows, window_rows, seed, epoch, start, count, device):
    return torch.empty(count, dtype=torch.int64, device=device)


def _by_device(*args):
    """No argument is a tensor, so the dispatcher cannot see where to run: the last argument says it."""
    key = torch._C.DispatchKey.CUDA if args[-1].type == "cuda" else torch._C.DispatchKey.CPU
    return _ops.shuffle_rows.default.redispatch(torch._C.DispatchKeySet(key), *args)


_library = torch.library.Library("widedeep", "IMPL")
_library.impl("shuffle_rows", _by_device, "BackendSelect")
