"""Gradients of the rows that a batch touched, and the updates that they make."""

from collections.abc import Sequence

from torch import Tensor

from widedeep import ops
from widedeep.feature_spec import FeatureSpec
from widedeep.model import WideDeep
from widedeep.share import is_table
from widedeep.steps.base import Slots, StepConfig
from widedeep.steps.buffers import Activations


def row_gradients(
    ids: Tensor,
    segments: ops.Segments,
    activations: Activations,
    spec: FeatureSpec,
    columns: Sequence[int],
    table_rows: Sequence[int],
    counts: Sequence[int] | None = None,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Of the touched rows, sorted: flat rows [U], gradients per table [U_f, D], wide gradients [U].

    Args:
        segments: of the ids.  columns: first column of each table in dx, which lies in `activations` with dlogit.
        table_rows: rows of each table.
        counts: of its touched rows, where the host knows them; else it waits for the device, which does.
    """
    counts = touched_rows(segments).tolist() if counts is None else counts
    B = len(ids)
    dx, dlogit = activations.gradient(0, B), activations.dlogit[:B]
    shapes = (spec.hotness, spec.mean, columns, table_rows, spec.dims)
    tables, wide = ops.embedding_row_gradients(ids, dx, dlogit, *segments, *shapes)
    U = sum(counts)
    return segments.unique[:U].long(), [values[:n] for values, n in zip(tables, counts)], wide[:U]


def touched_rows(segments: ops.Segments) -> Tensor:
    """[F] int64: how many rows of each table the ids of a batch name, on their device."""
    return segments.table_start.diff().long()


def zero_gradients(model: WideDeep) -> dict[str, Tensor]:
    """A gradient for every array of a checkpoint, of whole tables wherever they lie."""
    rows = dict(zip(model.spec.names, model.spec.cardinalities))
    grads = {}
    for name, a in model.named_arrays().items():
        shape = (rows[name.partition(".table.")[2]], *a.shape[1:]) if is_table(name) else a.shape
        grads[name] = a.new_zeros(shape)
    return grads


def spread_rows(model: WideDeep, grads: dict[str, Tensor], touched: Tensor, tables: list[Tensor], wide: Tensor) -> None:
    """Puts what `row_gradients` gave into dense gradients by name, which are zero elsewhere."""
    counts = [len(values) for values in tables]
    per_table = zip(model.spec.names, model.spec.row_base, touched.split(counts), tables, wide.split(counts))
    for name, base, rows, table_values, wide_values in per_table:
        if model.has_deep:
            grads[f"deep.table.{name}"].index_copy_(0, rows - base, table_values)
        if model.has_wide:
            grads[f"wide.table.{name}"].index_copy_(0, rows - base, wide_values)


def update_rows(
    model: WideDeep,
    slots: Slots,
    config: StepConfig,
    lr: Tensor,
    tables: Sequence[tuple[Tensor, Tensor]],
    wide_rows: Tensor,
    wide: Tensor,
) -> None:
    """RMSprop and FTRL of the rows that this process holds.

    Args:
        tables: rows [n] int64 of each table and their gradients [n, D].  wide_rows: [m] int64 rows of the flat wide
            table.  wide: [m].  Gradients of rows that stand there repeatedly are summed in their order.
    """
    rules = (lr, slots.updates, config.rho, config.eps)
    if model.has_deep:
        per_table = zip(model.tables, slots.table_rms, slots.table_last_step(), tables)
        for weight, rms, last_step, (rows, values) in per_table:
            if weight.shape[1]:  # else the rows would be sorted for nothing
                ops.rmsprop_rows_(weight.data, rms, last_step, rows, values, *rules)
    if model.has_wide:
        state = (model.wide.data, slots.accum, slots.linear)
        ops.ftrl_rows_(*state, wide_rows, wide, config.wide_lr, config.l1, config.l2)
