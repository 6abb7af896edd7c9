"""What every implementation of a training step is: its settings, its optimizer state, what it offers."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from widedeep import ops
from widedeep.config import Gemm
from widedeep.data import Batch
from widedeep.dist import LocalComm
from widedeep.errors import InputError
from widedeep.model import WideDeep

GEMMS = get_args(Gemm)
# The original's dynamic loss scale for float16; rules: growth, backoff, and the steps between growths.
INITIAL_SCALE, SCALE_RULES = 2.0**15, (2.0, 0.5, 2000)
PRECISIONS = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class StepConfig:
    """Settings of the update rules; the defaults are the original's.

    precision: of matrix products and activations, one of `PRECISIONS`. Weights, slots, logits and loss are float32
        always.
    gemm: the hidden layers' products in the fused step on a GPU: "cublaslt" (the library's), "sm90" (ours, Hopper; half
        types and TF32), "sm90-chain" (the same in one launch each way; the same bits, more memory; not for two steps
        that train on one GPU at the same time), or "auto": of those that run and agree on random data, the fastest
        ("sm90-chain" with half types only).
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
        self.last_step = torch.full((sum(model.table_rows),), -1, dtype=torch.int32, device=device)
        self.step = -1
        self.updates = torch.zeros(1, dtype=torch.int64, device=device)
        R = sum(model.table_rows) if model.has_wide else 0
        self.accum = torch.full((R,), initial_accumulator, device=device)
        self.linear = torch.zeros(R, device=device)
        wide = {n: a for n, a in arrays.items() if n in ("wide.numeric.weight", "wide.bias")}
        self.dense_accum = {name: torch.full_like(a, initial_accumulator) for name, a in wide.items()}
        self.dense_linear = {name: torch.zeros_like(a) for name, a in wide.items()}

    def table_last_step(self) -> tuple[Tensor, ...]:
        """Views of `last_step`, one per table."""
        return self.last_step.split(list(self.model.table_rows)) if self.model.spec.categorical else ()

    def named(self) -> dict[str, Tensor]:
        """Every slot under `<slot>.<name of the weight>`, sharing memory; `step` is a copy, on the CPU. A table without
        columns has none: its `last_step` counts nothing.
        """
        state = {f"rms.{name}": a for name, a in self.rms.items()}
        if self.model.has_deep:
            for f, rms, last_step in zip(self.model.spec.categorical, self.table_rms, self.table_last_step()):
                if f.dim:
                    state |= {f"rms.deep.table.{f.name}": rms, f"last_step.deep.table.{f.name}": last_step}
        if self.model.has_wide:
            for slot, flat, dense in (
                ("accum", self.accum, self.dense_accum),
                ("linear", self.linear, self.dense_linear),
            ):
                state |= {f"{slot}.{name}": a for name, a in (self.model.wide_tables(flat) | dense).items()}
        return state | {"step": torch.tensor([self.step], device="cpu"), "updates": self.updates}

    def start_from_weights(self, lr: float, l1: float, l2: float) -> None:
        """Sets `linear` to what gives the wide weights of the model as they are: FTRL makes weights of its state, and
        the first update by a fresh one would all but erase what was learned without it.
        """
        model, arrays = self.model, self.model.named_arrays()
        wide = [(arrays[name], accum, self.dense_linear[name]) for name, accum in self.dense_accum.items()]
        if model.has_wide:
            wide.append((model.wide.data, self.accum, self.linear))
        for weight, accum, linear in wide:
            linear.copy_(-weight * (accum.sqrt() / lr + 2 * l2) - weight.sign() * l1)

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
        rules: the module that updates are made with.
        note: how it computes, where that depends on the machine; a line for a person, or nothing.
        threads: of the host, where their number decides the order of sums and so the bits, else None.
        scale, found_inf: in fp16 the loss scale, and whether a gradient is not finite; else None.
        good_steps: since the scale last changed.
    """

    rules: ModuleType = ops
    note = ""
    threads: int | None = None

    def __init__(self, model: WideDeep, config: StepConfig, device: torch.device, comm: LocalComm):
        self.model = model
        self.config = config
        self.device = device
        self.comm = comm
        self.slots = Slots(model, config.initial_accumulator)
        fp16 = config.precision == "fp16"
        self.scale = torch.full((), INITIAL_SCALE, device=device) if fp16 else None
        self.good_steps = torch.zeros((), dtype=torch.int32, device=device)
        self.found_inf = torch.zeros((), device=device) if fp16 else None

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

    @torch.no_grad()
    def settle(self) -> None:
        """Brings the rms of rows that have paused up to date, as if every update had decayed the whole table."""
        last = self.slots.updates - 1
        for rms, last_step in zip(self.slots.table_rms, self.slots.table_last_step()):
            self.rules.rmsprop_settle_(rms, last_step, last, self.config.rho)

    def state(self) -> dict[str, Tensor]:
        """All that a resumed run needs besides the weights: optimizer slots by name, sharing memory."""
        state = self.slots.named()
        return state if self.scale is None else state | {"loss_scale": self.scale, "good_steps": self.good_steps}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes a state that `state()` gave. Raises InputError where it does not fit the model."""
        self.slots.load(state)
        if self.scale is not None and "loss_scale" in state:
            self.scale.copy_(state["loss_scale"].reshape(()))
            self.good_steps.copy_(state["good_steps"].reshape(()))

    @torch.no_grad()
    def start_from_weights(self) -> None:
        """Makes a fresh state fit weights that were learned elsewhere."""
        self.slots.start_from_weights(self.config.wide_lr, self.config.l1, self.config.l2)

    def _count(self) -> None:
        """Counts the update, unless it was skipped, and adapts the loss scale."""
        if self.scale is None:
            self.slots.updates += 1
            return
        counters = (self.scale, self.good_steps, self.slots.updates)
        self.rules.loss_scale_update_(*counters, self.found_inf, *SCALE_RULES)


def wide_loss(wide_logit: Tensor, batch: Batch, dlogit: Tensor) -> Tensor:
    """What the head does, of a model without a deep part: this rank's share of the loss; its gradient to `dlogit`."""
    loss = F.binary_cross_entropy_with_logits(wide_logit, batch.label, reduction="sum") / batch.global_rows
    torch.sigmoid(wide_logit, out=dlogit)
    dlogit.sub_(batch.label).div_(batch.global_rows)
    return loss
