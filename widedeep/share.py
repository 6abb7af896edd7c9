"""Which rows of the tables a process holds where processes share them out (`--embedding_parallel sharded`)."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from widedeep.dist import LocalComm

GATHERED_BYTES = 64 << 20  # of a table at a time, of all processes: what is gathered must fit beside the model


class Share(NamedTuple):
    """Rows `rank`, `rank + world`, ... of every table: row r is row r // world of process r % world."""

    rank: int = 0
    world: int = 1

    def count(self, rows: int) -> int:
        """How many of a table's `rows` are here."""
        return len(range(self.rank, rows, self.world))

    def take(self, whole: Tensor) -> Tensor:
        """The rows [count, ...] of a table [rows, ...] that are here; of all of them a view."""
        return whole if self.world == 1 else whole[self.rank :: self.world].clone()


ALL_ROWS = Share()


def is_table(name: str) -> bool:
    """Whether an array of a checkpoint has a row for each id, as `deep.table.ad_id` and `accum.wide.table.ad_id`."""
    return ".table." in name


def gather_arrays(comm: LocalComm, share: Share, arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Arrays of a checkpoint with whole tables, those on the first process's CPU; every process must call it.

    Args:
        arrays: by the names of a checkpoint; of tables [count, ...] the rows of `share`, the others the same on all.
    Returns:
        The arrays on the first process, with tables [rows, ...]; none on the others, unless nothing is shared out.
    """
    if share.world == 1:
        return dict(arrays)
    whole = {name: _gather(comm, share, a) if is_table(name) else a for name, a in arrays.items()}
    return whole if comm.rank == 0 else {}


def _gather(comm: LocalComm, share: Share, part: Tensor) -> Tensor:
    """The whole table on the first process; on the others, which only send, one without rows."""
    counts = comm.all_gather_rows(torch.tensor([len(part)], device=comm.device)).tolist()
    whole = torch.empty(sum(counts) if comm.rank == 0 else 0, *part.shape[1:], dtype=part.dtype)
    row = max(1, part.element_size() * part.shape[1:].numel())
    rows = max(1, GATHERED_BYTES // (row * comm.world))
    for start in range(0, max(counts), rows):
        here = slice(start, start + rows)
        lengths = [len(range(n)[here]) for n in counts]
        pieces = comm.all_gather_rows(part[here], lengths).split(lengths)
        for rank, piece in enumerate(pieces if comm.rank == 0 else ()):
            whole[rank :: share.world][here] = piece
    return whole
