"""Tables that ranks share out: a step borrows the rows that its batch names, and gives their gradients back.

Every rank asks every other one for the distinct rows that it needs, and gets them as small tables of its own: the ops
then see a model whose tables hold just these rows, and ids that count them. Whoever holds a row updates it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from widedeep import ops
from widedeep.dist import LocalComm
from widedeep.feature_spec import FeatureSpec
from widedeep.share import Share

Counts = list[list[int]]  # [world][F]


@dataclass
class Borrowed:
    """What a batch needs of the tables; U_f distinct rows of table f, U of all, ordered by table, then by rank.

    Attributes:
        ids: [B, K] int32, rows of `tables`; -1 pads as before.
        tables: F x [max(U_f, 1), D] float32: one that no id names has a row of zeros, for the ops want one.
        wide: one float32 for each row of `tables`.
        rows: [U] int64, the borrowed rows in the flat table of the whole model.
        counts: rows that each rank holds of each table.
        lent: F x [n] int64, rows of this rank's tables that the ranks have borrowed, in the order of ranks; one that
            several have borrowed stands there as often.
        lent_wide: [m] int64, the same as rows of this rank's `wide`, table after table.
        lent_counts: how many of them each rank has.
    """

    ids: Tensor
    tables: list[Tensor]
    wide: Tensor
    rows: Tensor
    counts: Counts
    lent: list[Tensor]
    lent_wide: Tensor
    lent_counts: Counts


class Lender:
    """This rank's rows, and the way to those of the others. Every rank must make the same calls.

    Args:
        tables: F x [rows here, D] float32.  wide: [rows of all tables here] float32. Read at every call.
    """

    def __init__(self, comm: LocalComm, spec: FeatureSpec, tables: Sequence[Tensor], wide: Tensor):
        self.comm = comm
        self.spec = spec
        self.tables = tables
        self.wide = wide
        share, device = Share(comm.rank, comm.world), wide.device
        here = [share.count(rows) for rows in spec.cardinalities]
        self.base = list(accumulate(here, initial=0))[:-1]  # first row of each table in `wide`
        self.row_base = torch.tensor(spec.row_base, dtype=torch.int64, device=device)
        bounds = [rows for rows, hot in zip(spec.cardinalities, spec.hotness) for _ in range(hot)]
        self.bounds = torch.tensor(bounds, device=device)

    def borrow(self, ids: Tensor) -> Borrowed:
        """The rows of all ranks that ids [B, K] int32 name. Raises RuntimeError for an id past its table."""
        ids, flat, slots, counts = self._ask_for(ids)
        one_each = [1] * self.comm.world
        lent_counts = self.comm.all_to_all_rows(counts, one_each, one_each)
        counts, lent_counts = torch.stack([counts, lent_counts]).tolist()
        (lent,) = self._send([_split(slots, counts)], counts, lent_counts)
        lent_wide = torch.cat([rows + base for rows, base in zip(lent, self.base)])
        values = [[table[r] for table, r in zip(self.tables, lent)], _split(self.wide[lent_wide], lent_counts)]
        tables, wide = self._send(values, lent_counts, counts)
        tables, wide = ([a if len(a) else a.new_zeros(1, *a.shape[1:]) for a in values] for values in (tables, wide))
        return Borrowed(ids, tables, torch.cat(wide), flat, counts, lent, lent_wide, lent_counts)

    def give_back(
        self, borrowed: Borrowed, tables: Sequence[Tensor], wide: Tensor
    ) -> tuple[list[tuple[Tensor, Tensor]], Tensor, Tensor]:
        """Gradients of the borrowed rows, F x [U_f, D] and [U], to those who hold them.

        Returns:
            Of the rows that are here, from all ranks and in their order: (rows [n] int64, gradients [n, D]) of each
            table; rows [m] int64 of `wide`; their gradients [m]. Rows repeat where ranks share them.
        """
        counts = borrowed.counts
        of_tables, of_wide = self._send([tables, _split(wide, counts)], counts, borrowed.lent_counts)
        return list(zip(borrowed.lent, of_tables)), borrowed.lent_wide, torch.cat(of_wide)

    def _ask_for(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Ids as rows of what will be borrowed; what that is: flat rows [U] of the whole model, rows [U] of the tables
        of the rank that holds them, counts [world, F] of both.
        """
        spec, world, device = self.spec, self.comm.world, ids.device
        F = len(spec.cardinalities)
        unique, offsets, entries, _, start = ops.embedding_segments(ids, spec.hotness, spec.cardinalities)
        outside = (ids >= self.bounds).any().view(1)
        *starts, valid, outside = torch.cat([start, offsets[-1:], outside]).tolist()
        if outside:
            self._refuse(ids)
        U, start = starts[-1], start.long()
        table = torch.repeat_interleave(torch.arange(F, device=device), start.diff(), output_size=U)
        unique = unique[:U].long()
        row = unique - self.row_base[table]
        group = table * world + row % world
        order = group.argsort(stable=True)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(U, device=device)) - start[table]
        named = torch.repeat_interleave(place.int(), offsets[: U + 1].diff(), output_size=valid)
        ids = torch.full_like(ids, -1)
        ids.view(-1)[entries[:valid].long()] = named
        counts = torch.zeros(F * world, dtype=torch.int64, device=device)
        counts.scatter_add_(0, group, torch.ones_like(group))  # bincount would ask the device for its largest
        return ids, unique[order], (row // world)[order], counts.view(F, world).t().contiguous()

    def _refuse(self, ids: Tensor) -> None:
        row, column = (ids >= self.bounds).nonzero()[0].tolist()
        feature = next(f for f, last in enumerate(accumulate(self.spec.hotness)) if column < last)
        raise RuntimeError(
            f"feature {feature} has id {int(ids[row, column])} in batch row {row}, expected -1 (padding) or 0 to"
            f" {int(self.bounds[column]) - 1}"
        )

    def _send(self, lists: Sequence[Sequence[Tensor]], sent: Counts, received: Counts) -> list[list[Tensor]]:
        """Lists of F tensors [n_f, ...], each ordered by the rank that it is for, to all ranks in one collective; what
        came of each, ordered by the rank that it is from.
        """
        columns = [column for values in lists for column in values]
        shapes = [column.shape[1:] for column in columns]
        widths = [shape.numel() for shape in shapes]
        sent, received = ([per * len(lists) for per in counts] for counts in (sent, received))
        sizes = [[sum(n * width for n, width in zip(per, widths)) for per in counts] for counts in (sent, received)]
        pieces = [column.split(counts) for column, counts in zip(columns, zip(*sent))]
        packed = torch.cat([piece.reshape(-1) for of_rank in zip(*pieces) for piece in of_rank])
        packed = self.comm.all_to_all_rows(packed, *sizes)
        pieces = packed.split([n * width for per in received for n, width in zip(per, widths)])
        came = [
            torch.cat(pieces[i :: len(columns)]).view(sum(counts), *shape)
            for i, (counts, shape) in enumerate(zip(zip(*received), shapes))
        ]
        F = len(self.tables)
        return [came[i : i + F] for i in range(0, len(came), F)]


def _split(values: Tensor, counts: Counts) -> list[Tensor]:
    """[U, ...] ordered by table, to a tensor for each table."""
    return list(values.split([sum(per_table) for per_table in zip(*counts)]))
