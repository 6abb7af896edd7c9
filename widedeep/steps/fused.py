"""The fused step on a CPU: our ops on buffers that are allocated once, updates in one pass over what the batch touched.

One step: embedding_forward; one product per layer with bias, relu and dropout in it; the head with loss and gradient;
two products per layer on the way back; the segments of the batch, and one pass over their rows that sums their
gradients and applies both optimizers.
"""

import logging

import torch
from torch import Tensor

from widedeep import _load, ops
from widedeep.data import Batch
from widedeep.dist import LocalComm
from widedeep.errors import InputError
from widedeep.model import WideDeep
from widedeep.steps.base import PRECISIONS, Step, StepConfig, wide_loss
from widedeep.steps.buffers import Activations, DenseGradients
from widedeep.steps.exchange import gather_counts, gather_tables
from widedeep.steps.rows import row_gradients, spread_rows, update_rows, zero_gradients

log = logging.getLogger(__name__)

PREDICT_ROWS = 4096  # the activations of a chunk stay in the cache


class FusedStep(Step):
    """See `Step`. In bf16 activations, their gradients and copies of the layers' weights are bfloat16, nothing else."""

    def __init__(self, model: WideDeep, config: StepConfig, device: torch.device, comm: LocalComm):
        if config.precision not in ("fp32", "bf16"):
            raise InputError(f"precision: expected fp32 or bf16 for the fused step on a CPU, got {config.precision!r}")
        super().__init__(model, config, device, comm)
        self.dtype = PRECISIONS[config.precision]
        if self.dtype == torch.bfloat16:
            self.note = f"bf16: {_load.bf16_products()}"
            self.threads = torch.get_num_threads() if _load.library_bf16() else None
            if comm.rank == 0:
                log.info(self.note)
        self.spec = model.layout
        # Stand-ins for the slots of an absent part, so that one pass over the ids serves every kind of model.
        self.no_rms = [] if model.has_deep else [torch.zeros(rows, 0, device=device) for rows in model.table_rows]
        R = 0 if model.has_wide else sum(model.table_rows)
        self.no_slots = torch.zeros(R, device=device), torch.zeros(R, device=device)
        self.activations = Activations(self.spec.deep_width, model.hidden if model.has_deep else (), self.dtype)
        self.grads = DenseGradients(model)
        self.copies = {}
        if self.dtype != torch.float32:
            self.copies = {name: torch.empty_like(rms, dtype=self.dtype) for name, rms in self.slots.rms.items()}
        self.copied: list[int] = []  # versions of the parameters when they were copied

    def train(self, batch: Batch, step: int, lr: float) -> Tensor:
        batch = self._take(batch)
        loss = self._backward(batch, step)
        if self.comm.world > 1:
            self.comm.all_reduce_(self.grads.flat)
        rate = torch.tensor([lr], dtype=torch.float32, device=self.device)
        if self.spec.categorical:
            self._update_tables(batch.ids, rate)
        self._update_dense(rate)
        torch.autograd.graph.increment_version(self.model.parameters())  # our ops do not
        self.copied = self._versions()
        self.slots.step = step
        self._count()
        return loss

    def gradients(self, batch: Batch, step: int = 0) -> dict[str, Tensor]:
        batch = self._take(batch)
        self._backward(batch, step)
        grads = zero_gradients(self.model)
        for name, g in self.grads.named.items():
            grads[name].copy_(g)
        if self.spec.categorical:
            spread_rows(self.model, grads, *self._row_gradients(batch.ids))
        return grads

    @torch.no_grad()
    def parts(self, batch: Batch) -> tuple[Tensor, Tensor]:
        batch, B = self._take(batch), len(batch.ids)
        wide, deep = (torch.zeros(B, device=self.device) for _ in range(2))
        self._refresh_copies()
        for start in range(0, B, PREDICT_ROWS):
            rows = slice(start, start + PREDICT_ROWS)
            part = batch._replace(ids=batch.ids[rows], numeric=batch.numeric[rows])
            h, wide_logit = self._forward(part, step=0, p=0.0)
            wide[rows] = wide_logit
            if self.model.has_deep:
                out = self.model.out
                deep[rows] = ops.head_forward(h, out.weight, out.bias, torch.zeros_like(wide_logit))
        return wide, deep

    def _take(self, batch: Batch) -> Batch:
        """The batch with ids that `_tables` knows; called before all else is done with it."""
        return batch

    def _tables(self) -> tuple[list[Tensor], Tensor]:
        """Tables F x [rows, D] and wide [rows of all] that the ids of a batch are rows of."""
        tables, wide, *_ = self.model.lookup_weights()
        return tables, wide

    def _forward(self, batch: Batch, step: int, p: float) -> tuple[Tensor, Tensor]:
        """The last hidden layer's output [B, H] and the wide logit [B], in buffers that the next call overwrites."""
        model, spec, buffers = self.model, self.spec, self.activations
        x, hidden = buffers.rows(len(batch.ids))
        wide_logit = buffers.wide_logit[: len(x)]
        places = (spec.hotness, spec.mean, spec.table_columns, spec.numeric_columns)
        weights = (*self._tables(), *model.lookup_weights()[2:])
        ops.embedding_forward_out(batch.ids, batch.numeric, *weights, *places, x=x, wide_logit=wide_logit)
        counter = torch.tensor([step], device=self.device)
        for i, (layer, y) in enumerate(zip(model.layers, hidden)):
            dropout = (p, model.seed, counter, i, batch.first_row)
            ops.linear_relu_dropout_out(x, self._weight(i), layer.bias.data, *dropout, y=y)
            x = y
        return x, wide_logit

    @torch.no_grad()
    def _backward(self, batch: Batch, step: int) -> Tensor:
        """Returns this rank's share of the loss; leaves dense gradients in `grads`, dx and dlogit in `activations`."""
        self._refresh_copies()
        buffers, grads = self.activations, self.grads
        h, wide_logit = self._forward(batch, step, self.model.dropout)
        B = len(h)
        dlogit = buffers.dlogit[:B]
        if self.model.has_deep:
            loss = self._backward_deep(batch, h, wide_logit, dlogit)
        else:
            loss = wide_loss(wide_logit, batch, dlogit)
        if self.model.has_wide:
            wide = {"dweight": grads.named["wide.numeric.weight"], "dbias": grads.named["wide.bias"]}
            ops.wide_numeric_backward_out(batch.numeric, dlogit, **wide)
        return loss

    def _backward_deep(self, batch: Batch, h: Tensor, wide_logit: Tensor, dlogit: Tensor) -> Tensor:
        model, buffers, grads = self.model, self.activations, self.grads.named
        p, L, B = model.dropout, len(model.layers), len(h)
        x, hidden = buffers.rows(B)
        inputs = [x, *hidden]
        dz = buffers.gradient(L, B)
        head = {"logit": buffers.logit[:B], "dlogit": dlogit, "dz": dz, "loss": buffers.loss}
        head |= {"dweight": grads["deep.out.weight"], "dbias": grads["deep.out.bias"]}
        head["dbias_hidden"] = grads[f"deep.layer.{L - 1}.bias"] if L else buffers.unused_bias
        ops.head_step_out(
            h, model.out.weight.data, model.out.bias.data, wide_logit, batch.label, batch.global_rows, p, None, **head
        )
        if not L:  # the head looks through a relu, and x is not the output of one
            dz.copy_(dlogit[:, None] * model.out.weight)
        for i in reversed(range(L)):
            ops.linear_wgrad_out(dz, inputs[i], dweight=grads[f"deep.layer.{i}.weight"])
            below = buffers.gradient(i, B)
            if i:
                dbias = grads[f"deep.layer.{i - 1}.bias"]
                ops.linear_dgrad_out(dz, self._weight(i), inputs[i], p, dx=below, dbias=dbias)
            else:
                ops.linear_dgrad_out(dz, self._weight(0), None, 0.0, dx=below, dbias=None)
            dz = below
        return buffers.loss.reshape(()).clone()

    def _row_gradients(self, ids: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        rows = [len(table) for table in self._tables()[0]]
        segments = ops.embedding_segments(ids, self.spec.hotness, rows)
        return row_gradients(ids, segments, self.activations, self.spec, self.spec.table_columns, rows)

    @torch.no_grad()
    def _update_tables(self, ids: Tensor, lr: Tensor) -> None:
        if self.comm.world > 1:
            gathered = self._exchange(*self._row_gradients(ids))
            update_rows(self.model, self.slots, self.config, lr, *gathered)
            return
        config, spec, B = self.config, self.spec, len(ids)
        tables, wide, *_ = self.model.lookup_weights()
        accum, linear = (self.slots.accum, self.slots.linear) if self.model.has_wide else self.no_slots
        segments = ops.embedding_segments(ids, spec.hotness, spec.cardinalities)
        rms = self.slots.table_rms if self.model.has_deep else self.no_rms
        ops.embedding_update_(
            ids,
            self.activations.gradient(0, B),
            self.activations.dlogit[:B],
            *segments,
            tables,
            rms,
            self.slots.last_step,
            wide,
            accum,
            linear,
            spec.hotness,
            spec.mean,
            spec.table_columns,
            lr,
            self.slots.updates,
            config.rho,
            config.eps,
            config.wide_lr,
            config.l1,
            config.l2,
        )

    def _exchange(
        self, touched: Tensor, tables: list[Tensor], wide: Tensor
    ) -> tuple[list[tuple[Tensor, Tensor]], Tensor, Tensor]:
        """What `row_gradients` gave on this rank to what `update_rows` takes: the gradients of all ranks."""
        own = torch.tensor([len(values) for values in tables], device=self.device)
        counts = gather_counts(self.comm, own).tolist()
        return gather_tables(self.comm, counts, self.model.spec.row_base, touched, tables, wide)

    @torch.no_grad()
    def _update_dense(self, lr: Tensor) -> None:
        config, slots, grads = self.config, self.slots, self.grads.named
        arrays = self.model.named_arrays()
        if slots.rms:
            weights, dense = [arrays[name] for name in slots.rms], [grads[name] for name in slots.rms]
            copies = list(self.copies.values())
            ops.rmsprop_dense_(weights, list(slots.rms.values()), dense, copies, lr, config.rho, config.eps)
        for name, accum in slots.dense_accum.items():
            rules = (config.wide_lr, config.l1, config.l2)
            ops.ftrl_dense_(arrays[name], accum, slots.dense_linear[name], grads[name], *rules)

    def _weight(self, i: int) -> Tensor:
        """Weight [O, I] of layer i in the type of the activations."""
        if self.copies:
            return self.copies[f"deep.layer.{i}.weight"]
        return self.model.layers[i].weight.data  # type: ignore[return-value]  # of a Linear

    def _versions(self) -> list[int]:
        return [p._version for p in self.model.parameters()]

    def _refresh_copies(self) -> None:
        """Copies the weights again if someone else has written them since the last update (a checkpoint, another
        step).
        """
        if self.copies and self.copied != self._versions():
            arrays = self.model.named_arrays()
            for name, copy in self.copies.items():
                copy.copy_(arrays[name])
            self.copied = self._versions()
