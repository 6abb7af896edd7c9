"""The job in plain PyTorch: eager or compiled, with dense or sparse gradients of the embeddings; and in a loop of
one's own around this package's model.
"""

import contextlib

import torch
from torch import Tensor, nn

from bench.job import Contender, Job
from widedeep import FTRL, RMSprop, WideDeep, ops
from widedeep.data import Batch


class TorchWideDeep(nn.Module):
    """nn.Embedding and nn.Linear as one would write them; the wide tables are one embedding over all ids."""

    row_base: Tensor

    def __init__(self, job: Job, sparse: bool):
        super().__init__()
        spec, arrays = job.spec, {name: a.clone() for name, a in job.arrays.items()}
        self.columns = [(c.kind, c.name) for c in spec.deep_columns]
        self.features = {f"{f.name}_embedding": i for i, f in enumerate(spec.categorical)}
        self.numerics = {f.name: i for i, f in enumerate(spec.numeric)}
        self.tables = nn.ModuleList(
            nn.Embedding.from_pretrained(arrays[f"deep.table.{f.name}"], freeze=False, sparse=sparse)
            for f in spec.categorical
        )
        wide = torch.cat([arrays[f"wide.table.{f.name}"] for f in spec.categorical])
        self.wide = nn.Embedding.from_pretrained(wide[:, None], freeze=False, sparse=sparse)
        self.wide_numeric = nn.Linear(len(spec.numeric), 1)
        self.wide_numeric.weight.data.copy_(arrays["wide.numeric.weight"][None])
        self.wide_numeric.bias.data.copy_(arrays["wide.bias"])
        self.register_buffer("row_base", torch.tensor(spec.row_base, dtype=torch.int32))
        layers, inputs = [], spec.deep_width
        for i, units in enumerate(job.hidden):
            layers += [_linear(inputs, units, arrays, f"deep.layer.{i}"), nn.ReLU(), nn.Dropout(job.dropout)]
            inputs = units
        self.mlp = nn.Sequential(*layers, _linear(inputs, 1, arrays, "deep.out"))

    def embed(self, ids: Tensor, numeric: Tensor) -> tuple[Tensor, Tensor]:
        parts = []
        for kind, name in self.columns:
            if kind == "table":
                i = self.features[name]
                parts.append(self.tables[i](ids[:, i]))
            else:
                i = self.numerics[name]
                parts.append(numeric[:, i : i + 1])
        return torch.cat(parts, 1), self.wide(ids + self.row_base).sum((1, 2))

    def forward(self, ids: Tensor, numeric: Tensor) -> Tensor:
        x, wide = self.embed(ids, numeric)
        return (wide + self.wide_numeric(numeric).squeeze(1) + self.mlp(x).squeeze(1)).float()


def _linear(inputs: int, outputs: int, arrays: dict[str, Tensor], name: str) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    layer.weight.data.copy_(arrays[f"{name}.weight"])
    layer.bias.data.copy_(arrays[f"{name}.bias"])
    return layer


class SparseRMSprop(torch.optim.Optimizer):
    """RMSprop on the rows that a batch touched: torch.optim has none. A row's rms does not decay while it pauses."""

    def __init__(self, params, job: Job):
        super().__init__(params, {})
        self.job = job
        for p in self.param_groups[0]["params"]:
            self.state[p] = {"rms": torch.zeros_like(p)}

    @torch.no_grad()
    def step(self, closure=None) -> None:  # type: ignore[override]  # closures are for other optimizers
        job = self.job
        for p, state in self.state.items():
            assert p.grad is not None
            grad = p.grad.coalesce()
            rows, values = grad.indices()[0], grad.values()
            mean = state["rms"][rows].mul_(job.rho).addcmul_(values, values, value=1 - job.rho)
            state["rms"][rows] = mean
            p.index_add_(0, rows, values.div(mean.sqrt_().add_(job.eps)), alpha=-job.lr)


class Ftrl(torch.optim.Optimizer):
    """FTRL-proximal without regularisation (torch.optim has none), on touched rows if the gradient is sparse."""

    def __init__(self, params, job: Job):
        super().__init__(params, {})
        self.lr = job.wide_lr
        for p in self.param_groups[0]["params"]:
            self.state[p] = {"accum": torch.full_like(p, job.initial_accumulator), "linear": torch.zeros_like(p)}

    @torch.no_grad()
    def step(self, closure=None) -> None:  # type: ignore[override]  # closures are for other optimizers
        for p, state in self.state.items():
            assert p.grad is not None
            accum, linear = state["accum"], state["linear"]
            if p.grad.is_sparse:
                grad = p.grad.coalesce()
                rows, g = grad.indices()[0], grad.values()
                w, n, z = p[rows], accum[rows], linear[rows]
                new = n + g * g
                z += g - (new.sqrt() - n.sqrt()) / self.lr * w
                p[rows], accum[rows], linear[rows] = -z * self.lr / new.sqrt(), new, z
            else:
                new = accum.addcmul(p.grad, p.grad)
                linear += p.grad - (new.sqrt() - accum.sqrt()) / self.lr * p
                accum.copy_(new)
                p.copy_(-linear * self.lr / new.sqrt_())


class TorchContender(Contender):
    """PyTorch; see `peers.PEERS` for the variants.

    compile: None, or the mode of torch.compile: for the whole model, or with `sparse` for its layers only (sparse
        gradients cannot be compiled).
    """

    model: nn.Module

    def __init__(self, name: str, job: Job, sparse: bool, compile: str | None = None):
        self.name, self.version = name, f"torch {torch.__version__}"
        self.job = job
        self.model = model = TorchWideDeep(job, sparse).to(job.device)
        if compile is not None:
            # Not dynamic: the second batch size too gets kernels made for it.
            options = {"dynamic": False} | ({} if compile == "default" else {"mode": compile})
            if sparse:
                model.mlp = torch.compile(model.mlp, **options)  # type: ignore[call-overload]  # options as a dict
            else:
                self.model = torch.compile(model, **options)  # type: ignore[call-overload]  # options as a dict
        wide = [model.wide.weight, *model.wide_numeric.parameters()]
        tables, layers = list(model.tables.parameters()), list(model.mlp.parameters())
        dense = torch.optim.RMSprop(layers if sparse else tables + layers, lr=job.lr, alpha=job.rho, eps=job.eps)
        self._steps_by([dense, Ftrl(wide, job), *([SparseRMSprop(tables, job)] if sparse else [])])

    def _steps_by(self, optimizers: list[torch.optim.Optimizer]) -> None:
        self.optimizers, self.loss = optimizers, nn.BCEWithLogitsLoss()
        self.scaler = torch.amp.GradScaler(self.job.device.type) if self.job.precision == "fp16" else None

    def train(self, batch: Batch, step: int) -> None:
        self.model.train()
        self.model.zero_grad(set_to_none=True)
        with self._precision():
            logit = self.model(batch.ids, batch.numeric)
        loss = self.loss(logit, batch.label)
        if self.scaler is None:
            loss.backward()
            for optimizer in self.optimizers:
                optimizer.step()
            return
        self.scaler.scale(loss).backward()
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()

    @torch.no_grad()
    def predict(self, batch: Batch) -> Tensor:
        self.model.eval()
        with self._precision():
            return self.model(batch.ids, batch.numeric)

    def _precision(self) -> contextlib.AbstractContextManager:
        precision = self.job.precision
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        if precision in ("fp32", "tf32"):
            return contextlib.nullcontext()
        return torch.autocast(self.job.device.type, torch.float16 if precision == "fp16" else torch.bfloat16)


class OwnLoopContender(TorchContender):
    """`widedeep.WideDeep` and its optimizers in a loop of one's own (docs/your-own-loop.md)."""

    model: WideDeep

    def __init__(self, name: str, job: Job):
        self.name, self.version, self.job = name, f"torch {torch.__version__}", job
        model = WideDeep(job.spec, job.hidden, job.dropout, seed=0)
        for key, array in model.named_arrays().items():
            array.copy_(job.arrays[key])
        self.model = model.to(job.device)
        deep = RMSprop(model.deep_parameters(), job.lr, job.rho, job.eps)
        self._steps_by([deep, FTRL(model.wide_parameters(), job.wide_lr, job.initial_accumulator)])

    def _precision(self) -> contextlib.AbstractContextManager:
        if self.job.device.type == "cuda":
            weight = self.model.out.weight  # type: ignore[union-attr]  # a job has hidden layers
            ops.allow_tf32_(weight, self.job.precision == "tf32")
        return super()._precision()
