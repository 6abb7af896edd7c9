"""The fused GPU step of several ranks: dense gradients are summed layer by layer while the backward pass goes on, table
rows are exchanged deduplicated. Not captured, since the numbers of touched rows decide the sizes of what is exchanged.
"""

import torch
from torch import Tensor

from widedeep import ops
from widedeep.data import Batch
from widedeep.steps.cuda import CudaStep
from widedeep.steps.rows import update_rows
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
        if self._all_finite():
            self._update_dense()
            if self.spec.categorical:
                self._update_gathered_rows(batch.ids, segments)
        self._count()

    def _sum_over_ranks(self, weight: str, bias: str) -> None:
        if self._summing:
            with self.second.queue():
                self.comm.all_reduce_(self.weights.neighbours(weight, bias))

    def _all_finite(self) -> bool:
        """Of the gradients on all ranks; a bias has the sum of those of the logits."""
        if self.found_inf is None:
            return True
        ops.check_finite_([self.weights.flat], self.found_inf)
        return not self.comm.all_reduce_(self.found_inf).item()

    def _update_gathered_rows(self, ids: Tensor, segments: ops.Segments) -> None:
        touched, tables, wide = self._row_gradients(ids, segments)
        if self.scale is not None:
            tables, wide = [values / self.scale for values in tables], wide / self.scale
        update_rows(self.model, self.slots, self.config, self.lr, *self._exchange(touched, tables, wide))
