"""Gradients of several ranks made one: dense ones summed in one flat buffer, table rows gathered."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from widedeep.dist import LocalComm


class Arriving:
    """A tensor of the device on its way to the host, which goes on meanwhile and waits when it wants to know it."""

    def __init__(self, tensor: Tensor):
        on_gpu = tensor.device.type == "cuda"
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=on_gpu)
        self._host.copy_(tensor, non_blocking=on_gpu)
        self._there = torch.cuda.Event() if on_gpu else None
        if self._there is not None:
            self._there.record()

    def tolist(self) -> Any:
        """As of the tensor, lists or a number; waits for what was queued before this was made, and for nothing that was
        queued later.
        """
        if self._there is not None:
            self._there.synchronize()
        return self._host.tolist()


def sum_dense_(comm: LocalComm, grads: Sequence[Tensor]) -> None:
    """Replaces each gradient by its sum over the ranks; one collective for all of them."""
    if comm.world == 1 or not grads:
        return
    flat = torch.cat([g.reshape(-1) for g in grads])
    comm.all_reduce_(flat)
    for g, part in zip(grads, flat.split([g.numel() for g in grads])):
        g.copy_(part.view_as(g))


def gather_rows(comm: LocalComm, rows: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Row numbers [n] and their gradients [n, ...] of all ranks, in the order of ranks; rows may repeat."""
    if comm.world == 1:
        return rows, values
    return comm.all_gather_rows(rows), comm.all_gather_rows(values)


def gather_counts(comm: LocalComm, counts: Tensor) -> Tensor:
    """[F] of each rank to [world, F]: of how many rows of each table they have gradients."""
    return comm.all_gather_rows(counts[None], [1] * comm.world)


def gather_tables(
    comm: LocalComm,
    counts: Sequence[Sequence[int]],
    row_base: Sequence[int],
    touched: Tensor,
    tables: Sequence[Tensor],
    wide: Tensor,
) -> tuple[list[tuple[Tensor, Tensor]], Tensor, Tensor]:
    """The touched rows of all tables on all ranks, in two collectives; rows repeat where ranks share them.

    Args:
        counts: [world][F], as `gather_counts` gives them.
        row_base: first flat row of each table.
        touched: [U] int64 flat rows of this rank, table after table.
        tables: gradients [U_f, D] of each table's rows.  wide: [U].
    Returns:
        (rows within the table [n] int64, gradients [n, D]) of each table; flat rows [m] int64; wide gradients [m]. All
        in the order of ranks, so that sums have the same bits on every rank.
    """
    F, dims = len(tables), [values.shape[1] for values in tables]
    sizes = [[*(n * D for n, D in zip(per_rank, dims)), sum(per_rank)] for per_rank in counts]
    flat = comm.all_gather_rows(touched, [sum(per_rank) for per_rank in counts])
    packed = torch.cat([*(values.reshape(-1) for values in tables), wide])
    packed = comm.all_gather_rows(packed, [sum(per_rank) for per_rank in sizes])
    row_parts = flat.split([n for per_rank in counts for n in per_rank])
    value_parts = packed.split([size for per_rank in sizes for size in per_rank])
    gathered = []
    for f, (base, D) in enumerate(zip(row_base, dims)):
        rows = torch.cat(row_parts[f::F]) - base
        gathered.append((rows, torch.cat(value_parts[f :: F + 1]).view(len(rows), D)))
    return gathered, flat, torch.cat(value_parts[F :: F + 1])
