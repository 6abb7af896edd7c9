"""Embedding tables: the gather that makes the deep input and the wide logit, and the gradients of the touched rows.

Lists of length F describe the features (one table each): `hotness` [F] id columns of each, first feature first; `mean`
[F] 0 = sum, 1 = mean over the valid ids of a sample (the wide part always sums); `columns` [F] first deep input column
of each table, of no meaning for one of a feature in the wide part only (D = 0); `numeric_columns` [N]. The flat row of
an id is its feature's row base (the sum of the rows of the tables before) plus the id: an index into the flat wide
vectors [R].

An id is -1 (padding: adds nothing, gets no gradient) or a row of its table. On a CPU any other id is an error. On a
GPU only embedding_forward checks ids: one past its table stops the kernel (a CUDA error: the process must end), one
below -1 counts as padding.
"""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from widedeep import _load  # noqa: F401  registers torch.ops.widedeep

_ops = torch.ops.widedeep


def embedding_forward(
    ids: Tensor,
    numeric: Tensor,
    tables: Sequence[Tensor],
    wide: Tensor,
    wide_numeric: Tensor,
    wide_bias: Tensor,
    hotness: Sequence[int],
    mean: Sequence[int],
    columns: Sequence[int],
    numeric_columns: Sequence[int],
    width: int,
    dtype: torch.dtype,
    sparse: bool = True,
) -> tuple[Tensor, Tensor]:
    """Gather all tables and the numerics into the deep input, and sum the wide logit, in one pass over the batch.

    x[b] = for each table its row (or the sum or mean of its rows) from column columns[f] on, and numeric[b, n] in
    column numeric_columns[n]; other columns 0. wide_logit[b] = sum of wide[flat row] + numeric[b] . wide_numeric +
    wide_bias.

    Args:
        ids:          [B, K] int32, contiguous.
        numeric:      [B, N] float32.
        tables:       F tensors [rows, D] float32.
        wide:         [R] float32.
        wide_numeric: [N] float32.
        wide_bias:    [1] float32.
        hotness, mean, columns, numeric_columns: see above.
        width:        columns of x, W >= every column used.
        dtype:        of x: torch.float32, float16 or bfloat16.
        sparse:       whether gradients of tables and wide are sparse.
    Returns:
        x [B, W] in dtype and wide_logit [B] float32, new tensors.
    Raises:
        RuntimeError: wrong shape, dtype, device or stride; on a CPU an id outside its table.
    Notes:
        Differentiable in numeric, the tables, wide, wide_numeric and wide_bias; once in the tables and wide. Their
        gradients are sparse COO, with an entry for each row that the batch names, in ascending order; torch.compile
        takes their sizes, which depend on the ids, with fullgraph=True. Or dense: the same among zeros. On a GPU the
        host waits for the sparse ones' sizes, once. Sums have a fixed order.
    """
    weights = (ids, numeric, tables, wide, wide_numeric, wide_bias)
    return _ops.embedding_forward.default(*weights, hotness, mean, columns, numeric_columns, width, dtype, sparse)


def embedding_forward_out(
    ids: Tensor,
    numeric: Tensor,
    tables: Sequence[Tensor],
    wide: Tensor,
    wide_numeric: Tensor,
    wide_bias: Tensor,
    hotness: Sequence[int],
    mean: Sequence[int],
    columns: Sequence[int],
    numeric_columns: Sequence[int],
    *,
    x: Tensor,
    wide_logit: Tensor,
) -> None:
    """Write embedding_forward into x [B, W] (float32, float16 or bfloat16) and wide_logit [B]. Not differentiable."""
    lists = (hotness, mean, columns, numeric_columns)
    weights = (ids, numeric, tables, wide, wide_numeric, wide_bias)
    _ops.embedding_forward_out.default(*weights, *lists, x=x, wide_logit=wide_logit)


class Segments(NamedTuple):
    """The entries of a batch, n = B K of them, by the flat row that they name; U distinct rows.

    unique:      [n] int32, the U distinct flat rows in ascending order, then -1.
    offsets:     [n + 1] int32, where each distinct row's entries start; from place U on, the number of valid ids.
    entries:     [n] int32, position b K + k of every valid id, by flat row and then by position; then -1.
    keys:        [n] int32, the flat row of every entry, that is unique repeated; then R.
    table_start: [F + 1] int32, where each table's rows start in unique; the last is U.
    """

    unique: Tensor
    offsets: Tensor
    entries: Tensor
    keys: Tensor
    table_start: Tensor


def embedding_segments(ids: Tensor, hotness: Sequence[int], rows: Sequence[int]) -> Segments:
    """Sort the batch's valid ids into distinct flat rows; sizes depend on B and K alone, so no host waits for a count.

    Args:
        ids:  [B, K] int32, contiguous; n = B K < 2^31 - 1.
        rows: F ints, the rows of each table; their sum R < 2^31 - 1.
    Raises:
        RuntimeError: wrong shape, dtype or stride; on a CPU an id outside its table.
    """
    return Segments(*_ops.embedding_segments.default(ids, hotness, rows))


def embedding_row_gradients(
    ids: Tensor,
    dx: Tensor,
    dlogit: Tensor,
    unique: Tensor,
    offsets: Tensor,
    entries: Tensor,
    keys: Tensor,
    table_start: Tensor,
    hotness: Sequence[int],
    mean: Sequence[int],
    columns: Sequence[int],
    rows: Sequence[int],
    dims: Sequence[int],
) -> tuple[list[Tensor], Tensor]:
    """Sum the gradients of the touched rows, in the order of `unique`: what ranks exchange.

    Args:
        dx:     [B, W] float32, float16 or bfloat16: gradient of embedding_forward's x.
        dlogit: [B] float32: gradient of its wide_logit.
        unique, offsets, entries, keys, table_start: embedding_segments(ids, hotness, rows).
        rows, dims: F ints each, the tables' shapes.
    Returns:
        F tensors [min(rows[f], B hotness[f]), dims[f]] float32, whose row i belongs to unique[table_start[f] + i], and
        the wide gradients [n] float32, one per place of unique. Places without a row are 0.
    Raises:
        RuntimeError: wrong shape, dtype or stride; on a CPU an id outside its table, or segments of another batch.
    Notes: the order of every sum is fixed, so the bits repeat, for any number of threads.
    """
    segments = (unique, offsets, entries, keys, table_start)
    return _ops.embedding_row_gradients.default(ids, dx, dlogit, *segments, hotness, mean, columns, rows, dims)


def embedding_update_(
    ids: Tensor,
    dx: Tensor,
    dlogit: Tensor,
    unique: Tensor,
    offsets: Tensor,
    entries: Tensor,
    keys: Tensor,
    table_start: Tensor,
    tables: Sequence[Tensor],
    rms: Sequence[Tensor],
    last_step: Tensor,
    wide: Tensor,
    accum: Tensor,
    linear: Tensor,
    hotness: Sequence[int],
    mean: Sequence[int],
    columns: Sequence[int],
    lr: Tensor,
    step: Tensor,
    rho: float,
    eps: float,
    wide_lr: float,
    l1: float = 0.0,
    l2: float = 0.0,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Update every touched row from the batch's gradients in one pass: RMSprop in its table, FTRL in the wide vector.

    The same as embedding_row_gradients followed by rmsprop_rows_ and ftrl_rows_ (widedeep.ops.optim), without the rows'
    gradients ever being stored. Rows that no id names keep their values; their rms is caught up when they are next
    named.

    Args:
        ids ... table_start: as for embedding_row_gradients.
        tables, rms:         F tensors [rows, D] float32 each, updated.
        last_step:           [R] int32, updated: step of each flat row's last update.
        wide, accum, linear: [R] float32, updated.
        lr, step:            one float32 and one int64 on the device, of RMSprop.
        rho, eps:            of RMSprop; wide_lr, l1, l2: of FTRL.
        grad_scale:          one float32 that dx and dlogit were multiplied by, or None.
        found_inf:           one float32; != 0 makes the call a no-op.
    Raises:
        RuntimeError: wrong shape, dtype or stride; wide_lr is not above 0; on a CPU an id outside its table, or
            segments of another batch.
    Notes: the order of every sum is fixed, so the bits repeat, for any number of threads.
    """
    segments = (unique, offsets, entries, keys, table_start)
    state = (tables, rms, last_step, wide, accum, linear)
    rules = (lr, step, rho, eps, wide_lr, l1, l2, grad_scale, found_inf)
    _ops.embedding_update_.default(ids, dx, dlogit, *segments, *state, hotness, mean, columns, *rules)


@torch.library.register_fake("widedeep::embedding_forward")
def _(
    ids, numeric, tables, wide, wide_numeric, wide_bias, hotness, mean, columns, numeric_columns, width, dtype, sparse
):
    x = numeric.new_empty((ids.shape[0], width), dtype=dtype)
    return x, numeric.new_empty((ids.shape[0],), dtype=torch.float32)


@torch.library.register_fake("widedeep::embedding_segments")
def _(ids, hotness, rows):
    n = ids.shape[0] * ids.shape[1]
    return ids.new_empty(n), ids.new_empty(n + 1), ids.new_empty(n), ids.new_empty(n), ids.new_empty(len(rows) + 1)


@torch.library.register_fake("widedeep::embedding_row_gradients")
def _(ids, dx, dlogit, unique, offsets, entries, keys, table_start, hotness, mean, columns, rows, dims):
    capacity = [torch.sym_min(r, ids.shape[0] * k) for r, k in zip(rows, hotness)]
    return [dlogit.new_empty((c, d)) for c, d in zip(capacity, dims)], dlogit.new_empty(unique.shape[0])


for _name in ("embedding_forward_out", "embedding_update_"):
    torch.library.register_fake(f"widedeep::{_name}", lambda *args, **kwargs: None)


def _save(ctx, inputs, output):
    ids, numeric, tables, wide, wide_numeric = inputs[:5]
    # What no gradient needs may change before the backward pass.
    ctx.save_for_backward(ids, numeric, wide_numeric if numeric.requires_grad else None)
    ctx.shapes = [tuple(t.shape) for t in tables]
    ctx.wide_rows = wide.shape[0]
    ctx.hotness, ctx.mean, ctx.columns, ctx.numeric_columns = inputs[6:10]
    ctx.sparse = inputs[12]


def _backward(ctx, dx, dlogit):
    ids, numeric, wide_numeric = ctx.saved_tensors
    tables, wide = (_sparse_gradients if ctx.sparse else _dense_gradients)(ctx, ids, dx, dlogit)
    dnumeric = None
    if ctx.needs_input_grad[1]:
        dnumeric = dlogit[:, None] * wide_numeric
        if ctx.numeric_columns:  # column by column: a list of them would go to the GPU first
            dnumeric = dnumeric + torch.stack([dx[:, column] for column in ctx.numeric_columns], 1).float()
    weights = (None, dnumeric, tables, wide, dlogit @ numeric, dlogit.sum(0, keepdim=True))
    # torch takes an empty list for a list of tensors, and wants a list of as many gradients.
    lists = [None if given else [] for given in (ctx.hotness, ctx.mean, ctx.columns, ctx.numeric_columns)]
    return *weights, *lists, None, None, None


def _touched(ctx, ids, dx, dlogit):
    """Segments of the batch, and the gradients of the rows that it names: see `embedding_row_gradients`."""
    rows, dims = [r for r, _ in ctx.shapes], [d for _, d in ctx.shapes]
    segments = embedding_segments(ids, ctx.hotness, rows)
    batch = (ids, dx.contiguous(), dlogit.contiguous(), *segments)
    return segments, *_ops.embedding_row_gradients.default(*batch, ctx.hotness, ctx.mean, ctx.columns, rows, dims)


def _sparse_gradients(ctx, ids, dx, dlogit):
    segments, touched, values = _touched(ctx, ids, dx, dlogit)
    if not touched:
        return [], None
    counts = segments.table_start.diff().tolist()  # here, and nowhere else, the host waits
    # What torch.compile cannot know. `len` would be a number to it, of this batch alone.
    torch._check(sum(counts) <= values.shape[0])
    for count, gradient in zip(counts, touched):
        torch._check(count >= 0)
        torch._check(count <= gradient.shape[0])
    named, values = (t.narrow(0, 0, sum(counts)) for t in (segments.unique.long(), values))
    tables, row_base = [], 0
    for (rows, dim), row, count, gradient in zip(ctx.shapes, named.split(counts), counts, touched):
        # A table of no columns gets a gradient of no entries: torch's CUDA kernels fail where entries have no elements.
        kept = count if dim else 0
        tables.append(_sparse(row.narrow(0, 0, kept) - row_base, gradient.narrow(0, 0, kept), (rows, dim)))
        row_base += rows
    return tables, _sparse(named, values, (ctx.wide_rows,))


def _sparse(rows: Tensor, values: Tensor, shape: tuple) -> Tensor:
    return torch.sparse_coo_tensor(rows[None], values, shape, check_invariants=False, is_coalesced=True)


with warnings.catch_warnings():
    # torch 2.11 warns once a process that nobody said whether sparse tensors are to be checked, though `_sparse` does.
    warnings.simplefilter("ignore")
    _sparse(torch.zeros(0, dtype=torch.int64, device="cpu"), torch.zeros(0, device="cpu"), (1,))


def _dense_gradients(ctx, ids, dx, dlogit):
    segments, touched, values = _touched(ctx, ids, dx, dlogit)
    unique, start = segments.unique, segments.table_start
    _, _, tables_wanted, wide_wanted, *_ = ctx.needs_input_grad
    tables, wide, row_base = [None] * len(touched), None, 0
    # Places without a row hold zeros: added to any row they change nothing, so that no host waits for a count. They go
    # to as many rows as there are: a GPU adds to one row one after the other.
    for f, (gradient, (rows, dim)) in enumerate(zip(touched, ctx.shapes)):
        if tables_wanted[f]:  # of a frozen table a pass over its rows would be wasted
            own = torch.arange(gradient.shape[0], device=ids.device)
            place = start[f] + own
            row = torch.where(place < start[f + 1], unique[place] - row_base, own)
            tables[f] = gradient.new_zeros(rows, dim).index_add_(0, row, gradient)
        row_base += rows
    if wide_wanted:
        own = torch.arange(unique.shape[0], device=ids.device) % ctx.wide_rows
        wide = values.new_zeros(ctx.wide_rows).index_add_(0, torch.where(unique < 0, own, unique), values)
    return tables, wide


def _twice(ctx, *gradients):
    raise RuntimeError("embedding_row_gradients is not differentiable: gradients of tables have no derivative")


torch.library.register_autograd("widedeep::embedding_forward", _backward, setup_context=_save)
torch.library.register_autograd("widedeep::embedding_row_gradients", _twice)
