"""The original's two optimizers as `torch.optim.Optimizer`s over our ops, for training loops of one's own.

Gradients are dense, or sparse COO with the rows of a table in one sparse dimension; equal rows are summed before the
update. Weights must be contiguous float32.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from widedeep import ops


class RMSprop(torch.optim.Optimizer):
    """RMSprop of TensorFlow 2 (Keras's legacy class), no momentum: the optimizer of the deep part.

        rms = rho rms + (1 - rho) g^2;    w = w - lr g / (sqrt(rms) + eps)

    eps stands outside the root. A sparse gradient moves only its rows, yet the rms of every row decays in every step,
    as if the gradient were dense: a row that comes back after k missed steps is first multiplied by rho^k.

    State of each parameter: `rms` like it; `step` int64, the number of its last update, from 0; and once it has had a
        sparse gradient, `last_step` [rows] int32, the step up to which the row's rms is decayed. Learning rates may
        change between steps.
    Raises:
        ValueError: lr is below 0, eps not above it, or rho not in [0, 1).
    """

    def __init__(self, params, lr: float = 1.2e-4, rho: float = 0.5, eps: float = 1e-7):
        super().__init__(params, {"lr": lr, "rho": rho, "eps": eps})

    def add_param_group(self, param_group: dict) -> None:
        """As torch's; ValueError where a setting is out of range."""
        lr, rho, eps = _settings(self, param_group)
        _check("lr", lr)
        if not eps > 0:  # else a weight without a gradient so far becomes 0 / 0
            raise ValueError(f"eps: expected a number > 0, got {eps}")
        if not 0 <= rho < 1:
            raise ValueError(f"rho: expected a number in [0, 1), got {rho}")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]  # torch says float
        loss = _evaluate(closure)
        for group in self.param_groups:
            dense = []
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["rms"] = torch.zeros_like(p)
                    state["step"] = torch.full((1,), -1, dtype=torch.int64, device="cpu")
                state["step"] += 1
                if p.grad.is_sparse:
                    self._step_rows(p, p.grad, state, group)
                else:
                    self._settle(p, state, group)
                    dense.append(p)
            if dense:
                self._step_dense(dense, group)
        _count_versions(self.param_groups)
        return loss

    def _step_dense(self, params: list[Tensor], group: dict) -> None:
        by_device: dict[torch.device, list[Tensor]] = {}
        for p in params:
            by_device.setdefault(p.device, []).append(p)
        for device, some in by_device.items():
            rms = [self.state[p]["rms"] for p in some]
            grads = [p.grad.contiguous() for p in some]  # type: ignore[union-attr]  # `step` has seen it
            lr = _number(group["lr"], torch.float32, device)
            ops.rmsprop_dense_([p.data for p in some], rms, grads, [], lr, group["rho"], group["eps"])

    def _step_rows(self, p: Tensor, grad: Tensor, state: dict, group: dict) -> None:
        rows, grads = _rows(grad)
        if "last_step" not in state:  # all steps before this one were dense: every row is up to date
            state["last_step"] = torch.full((len(p),), int(state["step"]) - 1, dtype=torch.int32, device=p.device)
        lr = _number(group["lr"], torch.float32, p.device)
        step = _number(state["step"], torch.int64, p.device)
        args = (rows, grads, lr, step, group["rho"], group["eps"])
        ops.rmsprop_rows_(_flat(p.data), _flat(state["rms"]), state["last_step"], *args)

    def _settle(self, p: Tensor, state: dict, group: dict) -> None:
        """Before a dense step: every row as of the step before; after it every row is up to date."""
        if "last_step" in state:
            before = _number(state["step"] - 1, torch.int64, p.device)
            ops.rmsprop_settle_(_flat(state["rms"]), state["last_step"], before, group["rho"])
            state["last_step"] += 1

    def load_state_dict(self, state_dict: dict) -> None:
        """As torch's; ValueError where it is another optimizer's."""
        _check_own(self, state_dict, ("rms", "step"))
        super().load_state_dict(state_dict)
        for saved, group in zip(state_dict["param_groups"], self.param_groups):
            for key, p in zip(saved["params"], group["params"]):
                if given := state_dict["state"].get(key):
                    self.state[p]["step"] = given["step"].to("cpu", torch.int64)
                    if "last_step" in given:  # torch cast it to the parameter's dtype: float32 is exact up to 2^24
                        self.state[p]["last_step"] = given["last_step"].to(p.device, torch.int32)


class FTRL(torch.optim.Optimizer):
    """FTRL-proximal with learning-rate power -0.5, as TensorFlow 2's `Ftrl`: the optimizer of the wide part.

        n = accum + g^2;    linear += g - (sqrt(n) - sqrt(accum)) / lr w;    accum = n
        w = (sign(linear) l1 - linear) / (sqrt(n) / lr + 2 l2) where |linear| > l1, else 0

    A sparse gradient changes only its rows. A dense one changes all: an element that never had a gradient becomes 0,
    whatever its initial value, and each is computed anew with the rate of the step, so that dense and sparse runs agree
    only from zero initial weights and at a constant rate. The first update of a weight all but erases its initial
    value. While the rate of a group is 0 its weights and state stay as they are. Source: McMahan et al. 2013, "Ad Click
    Prediction: a View from the Trenches".

    State of each parameter: `accum`, `linear`, like it.
    Raises:
        ValueError: lr is not above 0, or another setting is below it.
    """

    def __init__(
        self, params, lr: float = 0.02, initial_accumulator_value: float = 0.1, l1: float = 0.0, l2: float = 0.0
    ):
        defaults = {"lr": lr, "initial_accumulator_value": initial_accumulator_value, "l1": l1, "l2": l2}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict) -> None:
        """As torch's; ValueError where a setting is out of range."""
        lr, *others = _settings(self, param_group)
        if not lr > 0:
            raise ValueError(f"lr: expected a number > 0, got {lr}")
        for name, value in zip(("initial_accumulator_value", "l1", "l2"), others):
            _check(name, value)
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]  # torch says float
        loss = _evaluate(closure)
        for group in self.param_groups:
            rules = (float(group["lr"]), group["l1"], group["l2"])
            _check("lr", rules[0])
            for p in group["params"]:
                if p.grad is None or rules[0] == 0:  # the rule divides by it: a schedule that begins at 0 waits
                    continue
                state = self.state[p]
                if not state:
                    state["accum"] = torch.full_like(p, group["initial_accumulator_value"])
                    state["linear"] = torch.zeros_like(p)
                if p.grad.is_sparse:
                    rows, grads = _rows(p.grad)
                    whole = (_flat(p.data), _flat(state["accum"]), _flat(state["linear"]))
                    ops.ftrl_rows_(*whole, rows, grads, *rules)
                else:
                    ops.ftrl_dense_(p.data, state["accum"], state["linear"], p.grad.contiguous(), *rules)
        _count_versions(self.param_groups)
        return loss

    def load_state_dict(self, state_dict: dict) -> None:
        """As torch's; ValueError where it is another optimizer's."""
        _check_own(self, state_dict, ("accum", "linear"))
        super().load_state_dict(state_dict)


def _settings(optimizer: torch.optim.Optimizer, group: dict) -> list:
    """Those of a new group, in the order of the defaults, which stand where it names none."""
    return [group.get(name, default) for name, default in optimizer.defaults.items()]


def _evaluate(closure: Callable[[], Tensor] | None) -> Tensor | None:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def _check_own(optimizer: torch.optim.Optimizer, state_dict: dict, slots: tuple[str, ...]) -> None:
    """Raises ValueError where a group lacks a setting, or a parameter's state one of `slots`: else the step would."""
    wanted: list[tuple[dict, Iterable[str], str]]
    wanted = [(group, optimizer.defaults, "of each group") for group in state_dict["param_groups"]]
    wanted += [(state, slots, "of each parameter") for state in state_dict["state"].values() if state]
    for found, names, where in wanted:
        if missing := [name for name in names if name not in found]:
            kind = f"widedeep's {type(optimizer).__name__}"
            told = f"expected that of {kind}, with {', '.join(missing)} {where}, found {', '.join(found)}"
            raise ValueError(f"state_dict: {told}")


def _count_versions(groups: list[dict]) -> None:
    """Raises the versions of what was updated: our ops do not, and a fused step renews its copies by them."""
    torch.autograd.graph.increment_version(p for group in groups for p in group["params"] if p.grad is not None)


def _rows(g: Tensor) -> tuple[Tensor, Tensor]:
    """Row numbers [n] int64 and gradients [n, D] of a sparse gradient, duplicates kept."""
    if g.sparse_dim() != 1:
        raise RuntimeError(f"expected a sparse gradient with one sparse dimension, got {g.sparse_dim()}")
    values = g._values().reshape(g._nnz(), math.prod(g.shape[1:]))
    return g._indices()[0].contiguous(), values.contiguous()


def _number(value: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[1], as an argument of a kernel that fills it: a copy from the host's memory would wait for all queued work."""
    return torch.full((1,), float(value), dtype=dtype, device=device)


def _flat(t: Tensor) -> Tensor:
    """[rows, D] view: what is not rows in one dimension."""
    return t.view(len(t), math.prod(t.shape[1:]))


def _check(name: str, value: float) -> None:
    if not value >= 0:
        raise ValueError(f"{name}: expected a number >= 0, got {value}")
