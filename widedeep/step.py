"""One training step: forward, loss, backward and every update, as one object with two implementations.

`reference` is plain torch through autograd; `fused` is our own ops. Both read and write the model's own parameters, so
either can follow the other on a model, and both give the same result to float tolerance, with the same dropout masks.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from widedeep.data import Batch
from widedeep.dist import LocalComm
from widedeep.errors import InputError
from widedeep.model import WideDeep

log = logging.getLogger(__name__)

GEMMS = ("auto", "cublaslt", "sm90", "sm90-relay")
PRECISIONS = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class StepConfig:
    """Settings of the update rules; the defaults are the original's.

    precision: of matrix products and activations, one of `PRECISIONS`. Weights, slots, logits and loss are float32
        always.
    gemm: the hidden layers' products in the fused step on a GPU: "cublaslt" (the library's), "sm90" or "sm90-relay"
        (ours, Hopper; half types and TF32), or "auto": of those that run and agree on random data, the fastest.
    """

    precision: str = "fp32"
    rho: float = 0.5
    eps: float = 1e-7
    wide_lr: float = 0.02
    initial_accumulator: float = 0.1
    l1: float = 0.0
    l2: float = 0.0
    gemm: str = "auto"


class Slots:
    """Optimizer state of a model, all float32 but the counts.

    Attributes:
        rms: by name of a dense deep weight.  table_rms: F x [rows, D].
        step: the last one, or -1.  updates: [1] int64 on the device, how many were made: all but those skipped.
        last_step: [R] int32; the update, by that count from 0, up to which a row's rms is decayed.
        accum, linear: [R] each, of the flat wide table. dense_accum, dense_linear: by name, of the wide numeric weights
            and the bias.
    """

    def __init__(self, model: WideDeep, initial_accumulator: float):
        self.model = model
        arrays = model.named_arrays()
        device = next(iter(arrays.values())).device
        dense = {n: a for n, a in arrays.items() if n.startswith(("deep.layer.", "deep.out."))}
        self.rms = {name: torch.zeros_like(a) for name, a in dense.items()}
        self.table_rms = [torch.zeros_like(t.data) for t in model.tables]
        self.last_step = torch.full((model.spec.total_rows,), -1, dtype=torch.int32, device=device)
        self.step = -1
        self.updates = torch.zeros(1, dtype=torch.int64, device=device)
        R = model.spec.total_rows if model.has_wide else 0
        self.accum = torch.full((R,), initial_accumulator, device=device)
        self.linear = torch.zeros(R, device=device)
        wide = {n: a for n, a in arrays.items() if n in ("wide.numeric.weight", "wide.bias")}
        self.dense_accum = {name: torch.full_like(a, initial_accumulator) for name, a in wide.items()}
        self.dense_linear = {name: torch.zeros_like(a) for name, a in wide.items()}

    def table_last_step(self) -> tuple[Tensor, ...]:
        """Views of `last_step`, one per table."""
        return self.last_step.split(list(self.model.spec.cardinalities)) if self.model.spec.categorical else ()

    def named(self) -> dict[str, Tensor]:
        """Every slot under `<slot>.<name of the weight>`, sharing memory; `step` is a copy."""
        names = [f"deep.table.{f.name}" for f in self.model.spec.categorical]
        state = {f"rms.{name}": a for name, a in self.rms.items()}
        if self.model.has_deep:
            state |= {f"rms.{name}": a for name, a in zip(names, self.table_rms)}
            state |= {f"last_step.{name}": a for name, a in zip(names, self.table_last_step())}
        if self.model.has_wide:
            for slot, flat, dense in (
                ("accum", self.accum, self.dense_accum),
                ("linear", self.linear, self.dense_linear),
            ):
                state |= {f"{slot}.{name}": a for name, a in (self.model.wide_tables(flat) | dense).items()}
        return state | {"step": torch.tensor([self.step]), "updates": self.updates}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Copies a saved state in.

        Raises:
            InputError: an entry is missing, or of another shape: the state is of another model.
        """
        targets = self.named()
        if "updates" not in state and "step" in state:  # an older state, whose rows count skipped steps too
            state = {**state, "updates": state["step"] + 1}
        for name, target in targets.items():
            source = state.get(name)
            if source is None or source.shape != target.shape:
                got = "none" if source is None else f"shape {list(source.shape)}"
                raise InputError(f"optimizer state {name}: expected shape {list(target.shape)}, got {got}")
        for name, target in targets.items():
            target.copy_(state[name])
        self.step = int(state["step"])


class Step(ABC):
    """What every implementation offers. Tensors of a batch must be on the step's device.

    Attributes:
        note: how it computes, where that depends on the machine; a line for a person, or nothing.
    """

    note = ""

    def __init__(self, model: WideDeep, config: StepConfig, device: torch.device, comm: LocalComm):
        self.model = model
        self.config = config
        self.device = device
        self.comm = comm
        self.slots = Slots(model, config.initial_accumulator)

    @abstractmethod
    def train(self, batch: Batch, step: int, lr: float) -> Tensor:
        """One update of every weight.

        Args:
            batch: this rank's part of the global batch; may have no rows. The loss is the mean over
                `batch.global_rows`.
            step: number of the step, from 0, growing by 1; dropout masks depend on it.
            lr: RMSprop's learning rate in this step.
        Returns:
            0-dim float32: this rank's share of the mean loss before the update (the shares of all ranks add up to it).
        """

    @abstractmethod
    def gradients(self, batch: Batch, step: int = 0) -> dict[str, Tensor]:
        """Dense float32 gradients of this rank's share of the loss, by name of the weight; nothing is updated."""

    @abstractmethod
    def parts(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(wide, deep) logits, [B] float32 each, dropout off; zeros for an absent part."""

    def places(self, rows: int) -> tuple[Tensor, Tensor, Tensor] | None:
        """ids [rows, K], numeric [rows, N] and label [rows] where this step reads a batch without copying it first,
        until a larger one comes; None: it reads every batch where it lies.
        """
        return None

    def predict(self, batch: Batch) -> Tensor:
        """[B] float32 logits, dropout off; a new tensor."""
        wide, deep = self.parts(batch)
        return wide + deep

    @abstractmethod
    def settle(self) -> None:
        """Brings the rms of rows that have paused up to date, as if every update had decayed the whole table."""

    def state(self) -> dict[str, Tensor]:
        """All that a resumed run needs besides the weights: optimizer slots by name, sharing memory."""
        return self.slots.named()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes a state that `state()` gave. Raises InputError where it does not fit the model."""
        self.slots.load(state)


def make_step(
    kind: str,
    model: WideDeep,
    config: StepConfig | None = None,
    device: torch.device | str | None = None,
    comm: LocalComm | None = None,
) -> Step:
    """A step for `model`, which is moved to `device`.

    Args:
        kind: "reference" (plain torch), "fused" (our ops), or "auto": fused where there is one for device and model.
        comm: the other processes; None for none.
    Raises:
        InputError: the kind or precision is unknown, or not there on this device; the model is too large for "fused" on
            a GPU.
    """
    config = config or StepConfig()
    device = torch.device(device or "cpu")
    comm = comm or LocalComm(device)
    if config.precision not in PRECISIONS:
        raise InputError(f"precision: expected one of {', '.join(PRECISIONS)}, got {config.precision!r}")
    model.to(device)
    if device.type == "cpu" and config.precision == "tf32":
        raise InputError("precision: expected fp32 or bf16 on a CPU, which has no tf32")
    if kind not in ("auto", "reference", "fused"):
        raise InputError(f"step: expected one of auto, reference, fused, got {kind!r}")
    if config.gemm not in GEMMS:
        raise InputError(f"gemm: expected one of {', '.join(GEMMS)}, got {config.gemm!r}")
    if kind == "auto":
        kind = _automatic(model, device, comm)
    if kind == "reference":
        from widedeep import _load
        from widedeep.steps.reference import ReferenceStep

        if device.type == "cpu" and config.precision == "bf16" and comm.rank == 0 and not _load.cpu_multiplies_bf16():
            log.warning(
                "this CPU has no bf16 instructions (AVX512-BF16, AMX): torch emulates them, many times slower than "
                "fp32; the fused step does not"
            )
        return ReferenceStep(model, config, device, comm)
    if device.type == "cpu":
        from widedeep.steps.fused import FusedStep

        return FusedStep(model, config, device, comm)
    if not _has_cuda_step(device):
        raise InputError(f"step: expected auto or reference on {device.type}, for which no fused step was built")
    from widedeep.steps.cuda import CudaStep
    from widedeep.steps.cuda_ranks import RanksCudaStep

    return (CudaStep if comm.world == 1 else RanksCudaStep)(model, config, device, comm)


def _automatic(model: WideDeep, device: torch.device, comm: LocalComm) -> str:
    from widedeep.steps import limits

    if device.type == "cpu":
        return "fused"
    if not _has_cuda_step(device):
        return "reference"
    problem = limits.excess(model)
    if problem and comm.rank == 0:
        log.warning("%s: the reference step takes this model", problem)
    return "reference" if problem else "fused"


def _has_cuda_step(device: torch.device) -> bool:
    """Whether the kernels are loaded, and were built with the library that multiplies matrices."""
    from widedeep import _load

    return device.type == "cuda" and _load.has_cuda_kernels and _load.build_info()["cublaslt"]
