"""The fused step on a GPU: our kernels on buffers that are allocated once, the whole step captured in a CUDA graph.

One step: the batch is copied into fixed places; embedding_forward, while a second stream sorts the ids; one product per
layer; the head with loss and gradient; two products per layer on the way back; then the pass over the touched rows,
while the second stream updates the dense weights. In fp16 a loss scale on the device adapts itself, and a step whose
gradients are not finite changes nothing else.
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from widedeep import ops
from widedeep.data import Batch
from widedeep.dist import LocalComm
from widedeep.errors import InputError
from widedeep.model import WideDeep
from widedeep.steps import limits
from widedeep.steps.base import PRECISIONS, Step, StepConfig, wide_loss
from widedeep.steps.buffers import Activations, share_memory
from widedeep.steps.graphs import make_graphs
from widedeep.steps.layers import Dropout, Layers
from widedeep.steps.padded import PaddedWeights
from widedeep.steps.rows import row_gradients, spread_rows, zero_gradients
from widedeep.steps.streams import SecondStream
from widedeep.steps.trial import ROUTES, choose_layers

log = logging.getLogger(__name__)

T = TypeVar("T")


def _rounding(method: Callable[..., T]) -> Callable[..., T]:
    """The method's float32 products are rounded to TF32 if the precision says so; those of others never are."""

    @functools.wraps(method)
    def run(self: "CudaStep", batch: Batch) -> T:
        self._allow_tf32(self.config.precision == "tf32")
        try:
            return method(self, batch)
        finally:
            self._allow_tf32(False)

    return run


class CudaStep(Step):
    """See `Step`. Weights, slots, logits and loss are float32; activations and their gradients as `precision` says.

    Attributes:
        gemm: the route of the hidden layers' products, as in `StepConfig`; None before the first batch.
        graphs: what was captured.
    """

    def __init__(self, model: WideDeep, config: StepConfig, device: torch.device, comm: LocalComm):
        if problem := limits.excess(model):
            raise InputError(problem)
        super().__init__(model, config, device, comm)
        self.dtype = PRECISIONS[config.precision]
        self.spec = model.layout
        self.weights = PaddedWeights(model, self.dtype, device)
        self._make_state()
        self._make_stand_ins()
        self.activations = Activations(self.weights.widths[0], self.weights.widths[1:], self.dtype, device)
        self.layers: Layers = None  # type: ignore[assignment]  # until `_prepare` chooses
        self.chooses = config.gemm == "auto" and config.precision != "fp32"  # among the routes of the hidden layers
        # What the first training batch took, or the run that goes on here: kept where batches grow. A batch that is
        # only predicted binds nothing: what suits a small one would slow a training down.
        self.route: str | None = None
        self.told: str | None = None
        self.capacity = -1
        self._places: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # by number of rows: making views takes time
        self.parameters = list(model.parameters())
        self.copied: list[int] = []  # versions of the parameters when they were copied
        # Without a GPU the same code runs uncaptured, so that its sums and its order are tested everywhere.
        self.graphs = make_graphs(device)
        self.second = SecondStream(device)

    @property
    def gemm(self) -> str | None:
        return self.layers.name if self.layers else None

    def _make_state(self) -> None:
        """What a captured step reads from the device anew in each replay."""
        self.lr = torch.zeros(1, device=self.device)
        self.now = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.loss = torch.zeros(1, device=self.device)

    def _make_stand_ins(self) -> None:
        """In the place of an absent part: weights that add nothing, and slots for its update to write to."""
        model, device, R = self.model, self.device, sum(self.model.table_rows)
        self.lookup = model.lookup_weights()
        self.table_rms = self.slots.table_rms
        self.wide_state = (model.wide, self.slots.accum, self.slots.linear)
        if not model.has_deep:
            self.table_rms = [torch.zeros(rows, 0, device=device) for rows in model.table_rows]
        if not model.has_wide:
            self.wide_state = tuple(torch.zeros(R, device=device) for _ in range(3))  # type: ignore[assignment]  # of 3

    def train(self, batch: Batch, step: int, lr: float) -> Tensor:
        with self._on_device():
            self._prepare(len(batch.ids))
            self.route = self.layers.bits if self.chooses else None
            self.lr.fill_(lr)
            self.now.fill_(step)
            fixed = self._take(batch)
            self._run(fixed)
            torch.autograd.graph.increment_version(self.parameters)  # our ops do not, nor does a replay
            self.copied = self._versions()
            self.slots.step = step
            return self.loss.reshape(()).clone()

    def _run(self, batch: Batch) -> None:
        fixed = (self.model.seed, self.model.dropout, batch.first_row, batch.global_rows)
        self.graphs.run(("train", len(batch.ids), *fixed), lambda: self._train(batch))

    def gradients(self, batch: Batch, step: int = 0) -> dict[str, Tensor]:
        with self._on_device():
            self._prepare(len(batch.ids))
            self.now.fill_(step)
            fixed = self._take(batch)
            segments = self._backward(fixed)
            inverse = 1.0 if self.scale is None else 1.0 / self.scale
            grads = zero_gradients(self.model)
            for name, g in self.weights.padded.items():
                grads[name].copy_(self.weights.unpadded(name, g)).mul_(inverse)
            if self.spec.categorical:
                touched, tables, wide = self._row_gradients(fixed.ids, segments)
                spread_rows(self.model, grads, touched, [values * inverse for values in tables], wide * inverse)
            return grads

    def parts(self, batch: Batch) -> tuple[Tensor, Tensor]:
        with self._on_device():
            fixed = self._predict(batch)
            B = len(fixed.ids)
            return self.activations.wide_logit[:B].clone(), self.activations.logit[:B].clone()

    def predict(self, batch: Batch) -> Tensor:
        with self._on_device():
            B = len(self._predict(batch).ids)
            return self.activations.wide_logit[:B] + self.activations.logit[:B]

    def places(self, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        found = self._places.get(rows)
        if found is None:
            with self._on_device():
                self._grow(rows)
            found = self._places[rows] = (self.ids[:rows], self.numeric[:rows], self.label[:rows])
        return found

    def settle(self) -> None:
        with self._on_device():
            super().settle()

    def state(self) -> dict[str, Tensor]:
        route = {"route": torch.tensor(ROUTES.index(self.route), device="cpu")} if self.route else {}
        return super().state() | route

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        super().load_state(state)
        if self.chooses and "route" in state:
            route = int(state["route"])  # of an earlier version: perhaps one that is no more
            self.route = ROUTES[route] if route < len(ROUTES) else None
            if self.layers and self.route != self.layers.bits:
                self._forget_layers()

    # --- around the captured part ---

    @contextlib.contextmanager
    def _on_device(self) -> Iterator[None]:
        on_device = torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()
        with on_device, torch.no_grad():
            yield

    def _forget_layers(self) -> None:
        self.graphs.clear()
        self.layers = None  # type: ignore[assignment]  # until `_prepare` chooses anew

    def _grow(self, rows: int) -> None:
        if rows <= self.capacity:
            return
        self._forget_layers()  # chosen anew: what agreed on a small batch may not on a large one
        self.activations.grow(rows)
        K, N = self.spec.id_columns, len(self.spec.numeric)
        self.ids = torch.empty(rows, K, dtype=torch.int32, device=self.device)
        self.numeric = torch.empty(rows, N, device=self.device)
        self.label = torch.empty(rows, device=self.device)
        self._places.clear()
        self.capacity = rows

    def _prepare(self, rows: int) -> None:
        """Buffers for `rows`, and copies that follow the weights."""
        self._grow(rows)
        if self.layers is None:
            self._choose_layers()
        if self.copied != self._versions():
            self.weights.refresh()
            self.layers.refresh()
            self.copied = self._versions()

    def _choose_layers(self) -> None:
        self.weights.refresh()
        wanted, p = (self.config.gemm, self.weights, self.config.precision), self.model.dropout
        self.layers = choose_layers(*wanted, p, self.activations, self.route, alone=self.comm.world == 1)
        self.layers.grow(self.capacity)
        self.activations.keep_apart(self.layers.together)
        if self.gemm != self.told:  # a larger batch mostly brings the same again
            log.info("fused GPU step, %s, hidden layers through %s", self.config.precision, self.gemm)
            self.told = self.gemm

    def _allow_tf32(self, allow: bool) -> None:
        if self.device.type == "cuda":
            ops.allow_tf32_(self.lr, allow)

    def _versions(self) -> list[int]:
        return [p._version for p in self.parameters]

    def _take(self, batch: Batch) -> Batch:
        """The batch in the places that a captured step reads: it lies there already, or one launch copies it."""
        places = self.places(len(batch.ids))
        if not all(source is place for source, place in zip(batch, places)):
            # What lies there at another row would be overwritten while it is read.
            sources: list[Tensor]
            sources = [s.clone() if share_memory(s, p) else s for s, p in zip(batch, places)]  # type: ignore[arg-type, misc, union-attr]  # its tensors stand first
            ops.gather_batch_out((*sources, None), (), 0, out=(*places, None))
        return Batch(*places, None, batch.first_row, batch.global_rows)

    def _predict(self, batch: Batch) -> Batch:
        self._prepare(len(batch.ids))
        fixed = self._take(batch)
        if len(fixed.ids):
            self.graphs.run(("predict", len(fixed.ids)), lambda: self._forward_only(fixed))
        else:  # no launch: an empty graph, of which torch warns
            self._forward_only(fixed)
        return fixed

    # --- the captured part: no allocation that outlives it, no question to the device ---

    def _train(self, batch: Batch) -> None:
        segments = self._backward(batch)
        if self.found_inf is not None:
            ops.check_finite_([self.weights.flat], self.found_inf)
        with self.second.queue():
            self._update_dense()
        if self.spec.categorical:
            self._update_rows(batch, segments)
        self.second.wait()
        self._count()

    @_rounding
    def _backward(self, batch: Batch) -> ops.Segments:
        """Leaves gradients (times the loss scale) in `weights`, dx and dlogit in `activations`, and the loss; returns
        the segments of the ids, if there are tables.
        """
        spec, grads, B = self.spec, self.weights.padded, len(batch.ids)
        with self.second.queue():
            segments = self._segments(batch.ids) if spec.categorical else None
        if self.found_inf is not None:
            self.found_inf.zero_()
        h, wide_logit = self._forward(batch, training=True)
        dlogit = self.activations.dlogit[:B]
        if self.model.has_deep:
            self._head(batch, h, wide_logit, dlogit)
        else:
            self.loss.copy_(wide_loss(wide_logit, batch, dlogit))
            if self.scale is not None:
                dlogit.mul_(self.scale)
        if self.model.has_wide:
            with self.second.queue():
                wide = {"dweight": grads["wide.numeric.weight"], "dbias": grads["wide.bias"]}
                ops.wide_numeric_backward_out(batch.numeric, dlogit, **wide)
        if self.model.has_deep:
            self._backward_layers(B)
        self.second.wait()
        return segments  # type: ignore[return-value]  # without tables nobody reads it

    def _forward(self, batch: Batch, training: bool) -> tuple[Tensor, Tensor]:
        """The last hidden layer's output [B, H] and the wide logit [B]."""
        spec, buffers = self.spec, self.activations
        x, hidden = buffers.rows(len(batch.ids))
        wide_logit = buffers.wide_logit[: len(x)]
        places = (spec.hotness, spec.mean, self.weights.table_columns, self.weights.numeric_columns)
        ops.embedding_forward_out(batch.ids, batch.numeric, *self.lookup, *places, x=x, wide_logit=wide_logit)
        if hidden and training:
            self.layers.forward(x, self._dropout(batch), hidden=hidden)
        elif hidden:
            self.layers.predict(x, self.now, hidden=hidden)
        return (hidden or [x])[-1], wide_logit

    @_rounding
    def _forward_only(self, batch: Batch) -> None:
        h, _ = self._forward(batch, training=False)
        deep = self.activations.logit[: len(h)]
        if not self.model.has_deep:
            deep.zero_()
            return
        out, bias = self.weights.get("deep.out.weight"), self.weights.get("deep.out.bias")
        no_wide = self.activations.dlogit[: len(h)].zero_()
        ops.head_forward_out(h, out, bias, no_wide, logit=deep)

    def _dropout(self, batch: Batch) -> Dropout:
        return Dropout(self.model.dropout, self.model.seed, self.now, batch.first_row)

    def _head(self, batch: Batch, h: Tensor, wide_logit: Tensor, dlogit: Tensor) -> None:
        buffers, grads, L, B = self.activations, self.weights.padded, len(self.model.layers), len(h)
        weight = self.weights.get("deep.out.weight")
        dz = buffers.gradient(L, B)
        outputs = {"logit": buffers.logit[:B], "dlogit": dlogit, "dz": dz, "loss": self.loss}
        outputs |= {"dweight": grads["deep.out.weight"], "dbias": grads["deep.out.bias"]}
        outputs["dbias_hidden"] = grads[f"deep.layer.{L - 1}.bias"] if L else buffers.unused_bias
        bias = self.weights.get("deep.out.bias")
        rows, p = batch.global_rows, self.model.dropout
        ops.head_step_out(h, weight, bias, wide_logit, batch.label, rows, p, self.scale, **outputs)
        if not L:  # the head looks through a relu, and x is not the output of one
            dz.copy_(dlogit[:, None] * weight)
            if self.found_inf is not None:
                ops.check_finite_([dz], self.found_inf)

    def _backward_layers(self, B: int) -> None:
        buffers, grads, p = self.activations, self.weights.padded, self.model.dropout
        x, hidden = buffers.rows(B)
        inputs, L = [x, *hidden], len(hidden)

        def input_gradients(layers: Sequence[int]) -> None:
            dz, dx = buffers.gradient(layers[0] + 1, B), [buffers.gradient(i, B) for i in layers]
            dbias = [grads[f"deep.layer.{i - 1}.bias"] for i in layers if i]
            self.layers.dgrad(layers, dz, inputs, p, dx=dx, dbias=dbias, found_inf=self.found_inf)

        self._sum_over_ranks("deep.out.weight", "deep.out.bias")
        down = range(L - 1, -1, -1)
        if L and self.layers.together:
            input_gradients(down)
        for i in down:
            dz = buffers.gradient(i + 1, B)
            ops.linear_wgrad_out(dz, inputs[i], dweight=grads[f"deep.layer.{i}.weight"])
            self._sum_over_ranks(f"deep.layer.{i}.weight", f"deep.layer.{i}.bias")
            if not self.layers.together:
                input_gradients([i])

    def _sum_over_ranks(self, weight: str, bias: str) -> None:
        """Called as soon as the gradients of these neighbours are queued; there is nobody else here."""

    def _update_rows(self, batch: Batch, segments: ops.Segments) -> None:
        config, spec, B = self.config, self.spec, len(batch.ids)
        state = (self.lookup[0], self.table_rms, self.slots.last_step, *self.wide_state)
        rules = (self.lr, self.slots.updates, config.rho, config.eps, config.wide_lr, config.l1, config.l2)
        dx, dlogit = self.activations.gradient(0, B), self.activations.dlogit[:B]
        places = (spec.hotness, spec.mean, self.weights.table_columns)
        ops.embedding_update_(batch.ids, dx, dlogit, *segments, *state, *places, *rules, self.scale, self.found_inf)  # type: ignore[arg-type]  # mypy miscounts several tuples

    def _update_dense(self) -> None:
        config, slots, weights = self.config, self.slots, self.weights
        weights.gather_first()
        for with_copies in (True, False):
            names, copies = weights.update_lists(with_copies)
            if names:
                lists = [weights.masters[n] for n in names], [slots.rms[n] for n in names]
                grads = [weights.grads[n] for n in names]
                rules: tuple = (self.lr, config.rho, config.eps, self.scale, self.found_inf)
                ops.rmsprop_dense_(*lists, grads, copies, *rules)
        weights.scatter_first()
        self.layers.refresh()
        for name, accum in slots.dense_accum.items():
            state = (weights.masters[name], accum, slots.dense_linear[name], weights.grads[name])
            rules = (config.wide_lr, config.l1, config.l2, self.scale, self.found_inf)
            ops.ftrl_dense_(*state, *rules)  # type: ignore[arg-type]  # as above

    def _segments(self, ids: Tensor) -> ops.Segments:
        return ops.embedding_segments(ids, self.spec.hotness, self._table_rows())

    def _row_gradients(
        self, ids: Tensor, segments: ops.Segments, counts: list[int] | None = None
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        places = (self.spec, self.weights.table_columns, self._table_rows())
        return row_gradients(ids, segments, self.activations, *places, counts)

    def _table_rows(self) -> list[int]:
        """Rows of the tables that the ids of a batch are rows of."""
        return [len(table) for table in self.lookup[0]]
