"""The oracle: plain torch through autograd, and the update rules of `widedeep.reference`, on any device."""

import contextlib
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from widedeep import reference
from widedeep.data import Batch
from widedeep.dist import LocalComm
from widedeep.model import WideDeep
from widedeep.steps.base import PRECISIONS, Step, StepConfig
from widedeep.steps.exchange import gather_rows, sum_dense_


class ReferenceStep(Step):
    """See `Step`. In fp16 the loss is scaled, and a step with a non-finite gradient changes nothing but the scale."""

    rules = reference

    def __init__(self, model: WideDeep, config: StepConfig, device: torch.device, comm: LocalComm):
        super().__init__(model, config, device, comm)
        self.dtype = PRECISIONS[config.precision]
        self.threads = torch.get_num_threads() if device.type == "cpu" else None
        self.parameters = dict(model.named_parameters())

    def train(self, batch: Batch, step: int, lr: float) -> Tensor:
        with self._matmul_precision():
            loss, grads = self._backward(batch, step)
        grads = {name: g.data for name, g in grads.items()}
        dense = [g for name, g in grads.items() if name != "wide" and not name.startswith("tables.")]
        sum_dense_(self.comm, dense)
        if self._unscale_(grads.values()):
            with torch.no_grad():
                self._update(batch.ids, grads, lr)
        self._count()
        self.slots.step = step
        return loss

    def gradients(self, batch: Batch, step: int = 0) -> dict[str, Tensor]:
        with self._matmul_precision():
            _, grads = self._backward(batch, step)
        if self.scale is not None:
            grads = {name: g / self.scale for name, g in grads.items()}
        return self._by_array_name(grads)

    @torch.no_grad()
    def parts(self, batch: Batch) -> tuple[Tensor, Tensor]:
        with self._matmul_precision():
            return self._logits(batch, step=0, p=0.0)

    def _logits(self, batch: Batch, step: int, p: float) -> tuple[Tensor, Tensor]:
        model, layout = self.model, self.model.layout
        places = (layout.hotness, layout.mean, layout.table_columns, layout.numeric_columns, layout.deep_width)
        weights = model.lookup_weights()
        x, wide_logit = reference.embedding_forward(batch.ids, batch.numeric, *weights, *places, self.dtype)
        zeros = torch.zeros_like(wide_logit)
        if not model.has_deep:
            return wide_logit, zeros
        for i, layer in enumerate(model.layers):
            x = reference.linear_relu_dropout(x, layer.weight, layer.bias, p, model.seed, step, i, batch.first_row)
        return wide_logit, reference.head_forward(x.float(), model.out.weight, model.out.bias, zeros)

    def _backward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """This rank's share of the mean loss, and its gradients (times the loss scale) by parameter name."""
        wide, deep = self._logits(batch, step, self.model.dropout)
        total = F.binary_cross_entropy_with_logits(wide + deep, batch.label, reduction="sum")
        loss = total / batch.global_rows
        scaled = loss if self.scale is None else loss * self.scale
        learned = {name: p for name, p in self.parameters.items() if p.numel()}  # of nothing there is no gradient
        grads = dict(zip(learned, torch.autograd.grad(scaled, list(learned.values()), materialize_grads=True)))
        return loss.detach(), {n: grads[n] if n in grads else torch.zeros_like(p) for n, p in self.parameters.items()}

    def _unscale_(self, grads: Iterable[Tensor]) -> bool:
        """Divides by the loss scale, one for both parts, in place; whether the update may be made, on all ranks."""
        scale, found = self.scale, self.found_inf
        if scale is None or found is None:
            return True
        found.zero_()
        for g in grads:
            reference.check_finite_([g], found)
            g /= scale
        return not self.comm.all_reduce_(found).item()

    def _update(self, ids: Tensor, grads: dict[str, Tensor], lr: float) -> None:
        config, slots, model = self.config, self.slots, self.model
        if model.has_deep:
            named = self._by_array_name(grads)
            arrays = model.named_arrays()
            names = list(slots.rms)
            reference.rmsprop_dense_(
                [arrays[n] for n in names],
                [slots.rms[n] for n in names],
                [named[n] for n in names],
                [],
                lr,
                config.rho,
                config.eps,
                None,
                None,
            )
            last_steps = slots.table_last_step()
            for f, (start, hot) in enumerate(zip(model.spec.hot_start, model.spec.hotness)):
                rows = _distinct(ids[:, start : start + hot])
                rows, values = gather_rows(self.comm, rows, grads[f"tables.{f}"][rows])
                reference.rmsprop_rows_(
                    model.tables[f].data,
                    slots.table_rms[f],
                    last_steps[f],
                    rows,
                    values,
                    lr,
                    slots.updates,
                    config.rho,
                    config.eps,
                )
        if model.has_wide:
            rules = (config.wide_lr, config.l1, config.l2)
            flat, valid = model.wide_rows(ids)
            rows = _distinct(torch.where(valid, flat, -1))
            rows, values = gather_rows(self.comm, rows, grads["wide"][rows])
            reference.ftrl_rows_(model.wide.data, slots.accum, slots.linear, rows, values, *rules)
            for name, attribute in (("wide.numeric.weight", "wide_numeric"), ("wide.bias", "wide_bias")):
                weight = getattr(model, attribute).data
                state = (slots.dense_accum[name], slots.dense_linear[name])
                reference.ftrl_dense_(weight, *state, grads[attribute], *rules, None, None)

    def _by_array_name(self, grads: dict[str, Tensor]) -> dict[str, Tensor]:
        """Gradients by parameter name (`tables.0`, `wide`) to those by checkpoint name."""
        model = self.model
        others = {f"tables.{i}": f"deep.table.{f.name}" for i, f in enumerate(model.spec.categorical)}
        others |= {"wide_numeric": "wide.numeric.weight", "wide_bias": "wide.bias"}
        named: dict[str, Tensor] = {}
        for name, g in grads.items():
            if name == "wide":
                named |= model.wide_tables(g)
            elif name.startswith("layers."):
                named[f"deep.layer.{name.removeprefix('layers.')}"] = g
            elif name.startswith("out."):
                named[f"deep.{name}"] = g
            else:
                named[others[name]] = g
        return named

    @contextlib.contextmanager
    def _matmul_precision(self):
        """On a GPU float32 products are exact in fp32 and rounded in tf32, whatever the process has set."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if self.config.precision == "tf32" else "highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


def _distinct(ids: Tensor) -> Tensor:
    """Sorted distinct ids, int64, without padding."""
    rows = ids.reshape(-1).unique().long()
    return rows[rows >= 0]
