"""Gradients of the rows that a batch touched."""

from itertools import pairwise

from torch import Tensor

from widedeep import ops
from widedeep.feature_spec import FeatureSpec
from widedeep.model import WideDeep
from widedeep.steps.buffers import Activations


def row_gradients(
    ids: Tensor, segments: tuple[Tensor, ...], activations: Activations, spec: FeatureSpec, columns: tuple[int, ...]
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Of the touched rows, sorted: flat rows [U], gradients per table [U_f, D], wide gradients [U].

    Args:
        segments: of the ids.  columns: first column of each table in dx, which lies in `activations` with dlogit.
    """
    starts, B = segments[-1].tolist(), len(ids)
    dx, dlogit = activations.gradient(0, B), activations.dlogit[:B]
    shapes = (spec.hotness, spec.mean, columns, spec.cardinalities, spec.dims)
    tables, wide = ops.embedding_row_gradients(ids, dx, dlogit, *segments, *shapes)
    counts = [stop - start for start, stop in pairwise(starts)]
    touched = segments[0][: starts[-1]].long()
    return touched, [values[:n] for values, n in zip(tables, counts)], wide[: starts[-1]]


def spread_rows(model: WideDeep, grads: dict[str, Tensor], touched: Tensor, tables: list[Tensor], wide: Tensor) -> None:
    """Puts what `row_gradients` gave into dense gradients by name, which are zero elsewhere."""
    spec = model.spec
    if model.has_wide:
        grads |= model.wide_tables(wide.new_zeros(spec.total_rows).index_copy_(0, touched, wide))
    if model.has_deep:
        rows = touched.split([len(values) for values in tables])
        for f, base, r, values in zip(spec.categorical, spec.row_base, rows, tables):
            grads[f"deep.table.{f.name}"].index_copy_(0, r - base, values)
