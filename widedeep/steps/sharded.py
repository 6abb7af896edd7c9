"""The fused steps of ranks that share the tables out: each borrows the rows of its batch, the rest is as ever.

Tables, their slots and updates are split over the ranks; layers and wide numerics are the same on all. Nothing is
captured on a GPU: the numbers of borrowed rows decide the sizes of the tables that a batch sees.
"""

import torch
from torch import Tensor

from widedeep import ops
from widedeep.data import Batch
from widedeep.dist import LocalComm
from widedeep.model import WideDeep
from widedeep.steps.base import Step, StepConfig
from widedeep.steps.borrowed import Borrowed, Lender
from widedeep.steps.cuda_ranks import RanksCudaStep
from widedeep.steps.fused import FusedStep
from widedeep.steps.graphs import NoGraphs


class _Sharded(Step):
    """What both steps do otherwise. Each call of `train`, `predict`, `parts` and `gradients` is one of all ranks."""

    lender: Lender
    borrowed: Borrowed

    def __init__(self, model: WideDeep, config: StepConfig, device: torch.device, comm: LocalComm):
        super().__init__(model, config, device, comm)
        tables, wide, *_ = model.lookup_weights()
        self.lender = Lender(comm, model.spec, [table.data for table in tables], wide.data)

    def _take(self, batch: Batch) -> Batch:
        taken = super()._take(batch)  # type: ignore[misc]  # both steps have one
        self.borrowed = self.lender.borrow(taken.ids)
        return taken._replace(ids=self.borrowed.ids)

    def _row_gradients(self, *args) -> tuple[Tensor, list[Tensor], Tensor]:
        _, tables, wide = super()._row_gradients(*args)  # type: ignore[misc]  # as above
        return self.borrowed.rows, tables, wide

    def _exchange(
        self, touched: Tensor, tables: list[Tensor], wide: Tensor
    ) -> tuple[list[tuple[Tensor, Tensor]], Tensor, Tensor]:
        return self.lender.give_back(self.borrowed, tables, wide)


class ShardedFusedStep(_Sharded, FusedStep):
    """See `FusedStep`."""

    def _tables(self) -> tuple[list[Tensor], Tensor]:
        return self.borrowed.tables, self.borrowed.wide


class ShardedCudaStep(_Sharded, RanksCudaStep):
    """See `RanksCudaStep`."""

    def __init__(self, model: WideDeep, config: StepConfig, device: torch.device, comm: LocalComm):
        super().__init__(model, config, device, comm)
        self.graphs = NoGraphs()

    def _take(self, batch: Batch) -> Batch:
        taken = super()._take(batch)
        self.lookup = (self.borrowed.tables, self.borrowed.wide, *self.lookup[2:])
        return taken

    def _ask_for_counts(self, segments: ops.Segments) -> None:
        """Nothing: they are those of the borrowed rows."""

    def _own_counts(self) -> list[int]:
        return [sum(of_table) for of_table in zip(*self.borrowed.counts)]
