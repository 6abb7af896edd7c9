"""The fused GPU step of several ranks: dense gradients are summed layer by layer while the backward pass goes on, table
rows are exchanged deduplicated. Not captured, since the numbers of touched rows decide the sizes of what is exchanged.
"""

from torch import Tensor

from widedeep import ops
from widedeep.data import Batch
from widedeep.steps.cuda import CudaStep
from widedeep.steps.rows import update_rows


class RanksCudaStep(CudaStep):
    """See `CudaStep`."""

    _summing = False

    def _run(self, batch: Batch) -> None:
        self._summing = True
        try:
            segments = self._backward(batch)
        finally:
            self._summing = False
        for name in self.slots.dense_accum:
            self.comm.all_reduce_(self.weights.padded[name])
        if self._all_finite(batch):
            self._update_dense()
            if self.spec.categorical:
                self._update_gathered_rows(batch.ids, segments)
        self._count()

    def _sum_over_ranks(self, *names: str) -> None:
        if not self._summing:
            return
        with self.second.queue():
            for name in names:
                self.comm.all_reduce_(self.weights.padded[name])

    def _all_finite(self, batch: Batch) -> bool:
        """Of the gradients on all ranks."""
        if self.found_inf is None:
            return True
        ops.check_finite_([self.weights.flat, self.activations.dlogit[: len(batch.ids)]], self.found_inf)
        return not self.comm.all_reduce_(self.found_inf).item()

    def _update_gathered_rows(self, ids: Tensor, segments: tuple[Tensor, ...]) -> None:
        touched, tables, wide = self._row_gradients(ids, segments)
        if self.scale is not None:
            tables, wide = [values / self.scale for values in tables], wide / self.scale
        update_rows(self.model, self.slots, self.config, self.lr, *self._exchange(touched, tables, wide))
