"""The job in widedeep."""

import torch
from torch import Tensor

from bench.job import Contender, Job
from widedeep.data import Batch
from widedeep.model import WideDeep
from widedeep.step import StepConfig, make_step


class WideDeepContender(Contender):
    """`kind` is a step of `widedeep.step.make_step`, `gemm` as in `StepConfig`."""

    def __init__(self, job: Job, kind: str = "fused", gemm: str = "auto"):
        self.name, self.version = f"widedeep ({kind})", f"torch {torch.__version__}"
        model = WideDeep(job.spec, job.hidden, job.dropout, wide_init="zeros", seed=0)
        for name, array in model.named_arrays().items():
            array.copy_(job.arrays[name])
        config = StepConfig(
            precision=job.precision,
            rho=job.rho,
            eps=job.eps,
            wide_lr=job.wide_lr,
            initial_accumulator=job.initial_accumulator,
            gemm=gemm,
        )
        self.lr = job.lr
        self.step = make_step(kind, model, config, job.device)

    @property
    def gemm(self) -> str | None:
        return getattr(self.step, "gemm", None)

    def places(self, rows: int) -> tuple[Tensor, Tensor, Tensor] | None:
        return self.step.places(rows)

    def train(self, batch: Batch, step: int) -> None:
        self.step.train(batch, step, self.lr)

    def predict(self, batch: Batch) -> Tensor:
        return self.step.predict(batch)
