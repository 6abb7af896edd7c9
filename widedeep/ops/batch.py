"""One batch of a data set that lies in memory, in one pass."""

from collections.abc import Sequence

import torch
from torch import Tensor

from widedeep import _load  # noqa: F401  registers torch.ops.widedeep

_ops = torch.ops.widedeep


def gather_batch_out(
    rows: Sequence[Tensor | None], order: Sequence[int], start: int, *, out: Sequence[Tensor | None]
) -> None:
    """Write rows at positions start ... start + B - 1 of an epoch's order into `out`: one launch, no host sync.

    Args:
        rows: the data set as row-major matrices on one device: ids [R, K] int32, numeric [R, N] float32, label [R]
            float32, group [R] int64 or None.
        order: empty for the rows as they are stored, or (block_rows, window_rows, seed, epoch): blocks of block_rows
            consecutive rows stand in random order, consecutive blocks of that order form windows of at least
            window_rows rows, and rows are permuted within their window; a fixed function of (seed, epoch).
            Definition: csrc/core/permute.h.
        start: position of the batch's first row.
        out: of B rows, as `rows`; group None exactly where that of `rows` is. Must not overlap `rows`.
    Raises:
        RuntimeError: wrong shape, dtype, device or stride; positions outside of the data set; a size of the order
            below 1 or above 2^40; more than 2^24 columns.
    """
    _ops.gather_batch_out.default(
        *rows, order, start, out_ids=out[0], out_numeric=out[1], out_label=out[2], out_group=out[3]
    )


torch.library.register_fake("widedeep::gather_batch_out", lambda *args, **kwargs: None)
