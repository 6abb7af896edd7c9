"""Gradients of several ranks made one: dense ones summed in one flat buffer, table rows gathered."""

from collections.abc import Sequence

import torch
from torch import Tensor

from widedeep.dist import LocalComm


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
