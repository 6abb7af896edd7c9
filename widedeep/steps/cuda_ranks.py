"""The fused GPU step of several ranks: dense gradients are summed layer by layer while the backward pass goes on, table
rows are exchanged deduplicated. Not captured, since the numbers of touched rows decide the sizes of what is exchanged.
The host is told these numbers early, so that it stays ahead of the device.
"""

import torch
from torch import Tensor

from widedeep import ops
from widedeep.data import Batch
from widedeep.steps.cuda import CudaStep
from widedeep.steps.exchange import Arriving, gather_counts, gather_tables
from widedeep.steps.rows import touched_rows, update_rows
from widedeep.steps.trial import ROUTES


class RanksCudaStep(CudaStep):
    """See `CudaStep`."""

    _summing = False

    def train(self, batch: Batch, step: int, lr: float) -> Tensor:
        if self.chooses and self.route is None:
            self._agree_on_route(len(batch.ids))
        return super().train(batch, step, lr)

    def _agree_on_route(self, rows: int) -> None:
        """All take the first rank's, which its checkpoint names: each has a clock of its own."""
        with self._on_device():
            self._prepare(rows)
            own = torch.full((1,), ROUTES.index(self.layers.bits), device=self.device)
            self.route = ROUTES[int(self.comm.all_gather_rows(own, [1] * self.comm.world)[0])]
            if self.route != self.layers.bits:
                self._forget_layers()

    def _run(self, batch: Batch) -> None:
        self._summing = True
        try:
            segments = self._backward(batch)
        finally:
            self._summing = False
        if self.model.has_wide:
            self.comm.all_reduce_(self.weights.neighbours("wide.numeric.weight", "wide.bias"))
        overflow = self._overflow()
        with self.second.queue():
            self._update_dense()
        if self.spec.categorical:
            self._update_gathered_rows(batch.ids, segments, overflow)
        self.second.wait()
        self._count()

    def _segments(self, ids: Tensor) -> ops.Segments:
        segments = super()._segments(ids)
        if self._summing:
            self._ask_for_counts(segments)
        return segments

    def _ask_for_counts(self, segments: ops.Segments) -> None:
        """While the forward pass is queued, so that they are on their way long before the host wants to know them, when
        it has queued the backward pass.
        """
        self._asked = Arriving(gather_counts(self.comm, touched_rows(segments)))

    def _own_counts(self) -> list[int]:
        """How many rows of each table the batch touches here."""
        return self._asked.tolist()[self.comm.rank]

    def _sum_over_ranks(self, weight: str, bias: str) -> None:
        if self._summing:
            with self.second.queue():
                self.comm.all_reduce_(self.weights.neighbours(weight, bias))

    def _overflow(self) -> Arriving | None:
        """Whether a gradient is not finite on any rank; the dense updates read it from the device. Those of the logits
        need no look of their own: the gradient of a bias is their sum.
        """
        if self.found_inf is None:
            return None
        ops.check_finite_([self.weights.flat], self.found_inf)
        return Arriving(self.comm.all_reduce_(self.found_inf))

    def _update_gathered_rows(self, ids: Tensor, segments: ops.Segments, overflow: Arriving | None) -> None:
        touched, tables, wide = self._row_gradients(ids, segments, self._own_counts())
        if self.scale is not None:
            tables, wide = [values / self.scale for values in tables], wide / self.scale
        gathered = self._exchange(touched, tables, wide)
        if overflow is None or not overflow.tolist():  # the device is busy with the exchange until the host knows
            update_rows(self.model, self.slots, self.config, self.lr, *gathered)

    def _exchange(
        self, touched: Tensor, tables: list[Tensor], wide: Tensor
    ) -> tuple[list[tuple[Tensor, Tensor]], Tensor, Tensor]:
        return gather_tables(self.comm, self._asked.tolist(), self.model.spec.row_base, touched, tables, wide)
