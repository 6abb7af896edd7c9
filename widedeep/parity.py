"""Replays a golden file through a step and compares every quantity that it holds: `widedeep parity`.

Quantities, norms and limits are those published with the golden files. In fp32 everything is compared; in lower
precision RMSprop turns a rounding error of a nearly cancelled gradient into a whole move of its weight, so only losses
and predictions are.
"""

import json as jsonlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from widedeep.data import Batch
from widedeep.errors import InputError
from widedeep.golden import Golden, check_shape, from_keras, keras_name, to_keras
from widedeep.model import WideDeep
from widedeep.outputs import plain
from widedeep.schedule import deep_lr
from widedeep.share import is_table
from widedeep.step import PRECISIONS, Step, StepConfig, make_step

ULPS = 2 * 2.0**-23
SMALLEST_MOVE = 1e-7
TINY = 1e-30  # slots below are rounding of a vanished value, and may be flushed to 0

LIMITS = {
    "learning rate": 1.2e-7,
    "wide logit": 2e-6,
    "deep logit": 2e-6,
    "probability": 1e-6,
    "loss": 1e-6,
    "gradient": 5e-6,
    "weights": 5e-3,
    "weights, 99.9 %": 3e-4,
    "slot rms": 5e-4,
    "slot accum": 2e-3,
    "slot linear": 2e-3,
}
# fp16 rounds to as many bits as TF32.
ROUNDED_LIMITS = {
    "tf32": {"deep logit": 2e-3, "loss": 3e-4, "probability": 1e-3},
    "fp16": {"deep logit": 2e-3, "loss": 3e-4, "probability": 1e-3},
    "bf16": {"deep logit": 1.5e-2, "loss": 2e-3, "probability": 8e-3},
}


@dataclass(frozen=True)
class Quantity:
    """One line of the result: the largest error of a kind, in the norm of its limit."""

    quantity: str
    max_error: float
    limit: float

    @property
    def ok(self) -> bool:
        return bool(self.max_error <= self.limit)  # not for nan


def run(file: str | Path, device: str = "cpu", step: str = "auto", precision: str = "fp32", json: bool = False) -> int:
    """Replays `file`, prints the table (or one JSON object), and returns the exit code: 0 if every limit holds, else 1.

    Raises:
        InputError: not a golden file, or no such device, step or precision here.
    """
    quantities = replay(file, device, step, precision)
    ok = all(q.ok for q in quantities)
    if json:
        lines = [plain(asdict(q) | {"ok": q.ok}) for q in quantities]
        about = {"file": str(file), "device": device, "step": step, "precision": precision}
        print(jsonlib.dumps(about | {"ok": ok, "quantities": lines}))
    else:
        _print_table(quantities, f"{file}, {device}, {step} step, {precision}")
    return 0 if ok else 1


def replay(file: str | Path, device: str = "cpu", step: str = "auto", precision: str = "fp32") -> list[Quantity]:
    """Trains on the file's batches from its initial weights and returns every quantity that it allows to compare."""
    _check_device(device)
    if precision not in PRECISIONS:
        raise InputError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
    golden = Golden.load(file)
    model = _model(golden)
    return _Replay(golden, make_step(step, model, _step_config(golden, precision), device), precision).quantities()


def _check_device(device: str) -> None:
    try:
        kind = torch.device(device).type
    except RuntimeError as e:
        raise InputError(f"device {device!r}: expected cpu or cuda") from e
    if kind not in ("cpu", "cuda"):
        raise InputError(f"device {device!r}: expected cpu or cuda")
    if kind == "cuda" and (torch.device(device).index or 0) >= (count := torch.cuda.device_count()):
        raise InputError(f"device {device!r}: torch finds {count or 'no'} CUDA device{'s' * (count != 1)} here")


def _step_config(golden: Golden, precision: str) -> StepConfig:
    deep, wide = golden.config["deep_optimizer"], golden.config["linear_optimizer"]
    default = StepConfig()
    return StepConfig(
        precision=precision,
        rho=deep.get("rho", default.rho),
        eps=deep.get("epsilon", default.eps),
        wide_lr=golden.config["linear_learning_rate"],
        initial_accumulator=wide.get("initial_accumulator_value", default.initial_accumulator),
        l1=wide.get("l1", default.l1),
        l2=wide.get("l2", default.l2),
    )


def _model(golden: Golden) -> WideDeep:
    """A model with the file's initial weights."""
    model = WideDeep(golden.spec, golden.config["hidden"], dropout=0.0, seed=0, parts=golden.parts)
    for name, target in model.named_arrays().items():
        variable = f"init/{keras_name(name)}"
        if golden.lacks(keras_name(name)):
            target.zero_()
            continue
        shape = to_keras(name, np.empty(tuple(target.shape))).shape
        check_shape(golden, variable, shape)
        target.copy_(torch.from_numpy(from_keras(name, golden[variable], tuple(target.shape))))
    return model


class _Replay:
    def __init__(self, golden: Golden, step: Step, precision: str):
        self.golden = golden
        self.step = step
        self.exact = precision == "fp32"
        self.limits = LIMITS if self.exact else LIMITS | ROUNDED_LIMITS[precision]
        self.found: list[Quantity] = []
        self.absent = {name for name in step.model.named_arrays() if golden.lacks(keras_name(name))}
        self.initial = self._weights()
        self.moved = dict.fromkeys(self.initial, SMALLEST_MOVE)

    def quantities(self) -> list[Quantity]:
        g, config = self.golden, self.golden.config
        self._orders()
        first = self._batch(g["ids"][0], g["numeric"][0], g["labels"][0])
        self._step0(first)
        self._heldout("init")
        losses, rates = [], []
        for i, arrays in enumerate(g.batches()):
            rates.append(
                deep_lr(
                    i,
                    base=config["deep_learning_rate"],
                    steps_per_epoch=config["steps_per_epoch"],
                    num_epochs=config["num_epochs"],
                    warmup_epochs=config["deep_warmup_epochs"],
                )
            )
            losses.append(self.step.train(self._batch(*arrays), i, rates[-1]))
            self._hold_absent()
            for label in {1: "step1", 10: "step10"}.get(i + 1), "end" if i + 1 == config["steps"] else None:
                if label and self.exact and g.has(label):
                    self._compare_weights(label)
        if "lr_deep" in g and g.parts != "wide":
            want = g["lr_deep"].astype(np.float64)
            self._add("learning rate", "", np.abs(np.array(rates) - want) / np.maximum(want, TINY))
        self._add("loss", ", every step", torch.stack(losses).double().cpu().numpy() - g["loss"])
        if self.exact and g.has("slot"):
            self._compare_slots()
        self._heldout("end")
        return self.found

    def _add(self, kind: str, detail: str, error: np.ndarray | float) -> None:
        error = np.abs(np.asarray(error, np.float64))
        self.found.append(Quantity(kind + detail, float(error.max(initial=0.0)), self.limits[kind]))

    def _batch(self, ids: np.ndarray, numeric: np.ndarray, label: np.ndarray) -> Batch:
        def tensor(array, dtype):
            return torch.from_numpy(np.ascontiguousarray(array, dtype)).to(self.step.device)

        return Batch(tensor(ids, np.int32), tensor(numeric, np.float32), tensor(label, np.float32), None, 0, len(ids))

    def _weights(self) -> dict[str, np.ndarray]:
        return {name: _numpy(a) for name, a in self.step.model.named_arrays().items() if name not in self.absent}

    def _hold_absent(self) -> None:
        arrays = self.step.model.named_arrays()
        for name in self.absent:
            arrays[name].zero_()

    def _orders(self) -> None:
        """The file's column orders are part of what it states; a difference counts columns."""
        config, spec = self.golden.config, self.golden.spec
        if self.golden.parts != "wide" and "deep_concat_order" in config:
            kinds = {"table": "embedding"}
            ours = [(c.name, kinds.get(c.kind, c.kind), c.offset, c.width) for c in spec.deep_columns]
            keys = ("sort_key", "kind", "offset", "width")
            try:
                theirs = [tuple(entry[key] for key in keys) for entry in config["deep_concat_order"]]
            except (TypeError, KeyError):
                self.golden.fail("config.deep_concat_order", f"objects with {', '.join(keys)}")
            differing = sum(a != b for a, b in zip(ours, theirs)) + abs(len(ours) - len(theirs))
            self.found.append(Quantity("order of the deep input, columns that differ", differing, 0))
        if self.golden.parts != "deep" and "wide_numeric_order" in config:
            differing = sum(a != b for a, b in zip(spec.numeric_names, config["wide_numeric_order"]))
            differing += abs(len(spec.numeric) - len(config["wide_numeric_order"]))
            self.found.append(Quantity("order of the wide numerics, columns that differ", differing, 0))

    def _step0(self, batch: Batch) -> None:
        g = self.golden
        wide, deep = (_numpy(part) for part in self.step.parts(batch))
        for name, part, kind in (("linear", wide, "wide logit"), ("deep", deep, "deep logit")):
            if f"step0/{name}_logit" in g:
                self._add(kind, ", step 0", part - self._of_rows(f"step0/{name}_logit", part))
        if "step0/prob" in g:
            self._add("probability", ", step 0", _sigmoid(wide + deep) - self._of_rows("step0/prob", wide))
        if self.exact and g.has("grad0"):
            self._compare_gradients(batch)

    def _heldout(self, when: str) -> None:
        g = self.golden
        if "heldout/ids" not in g:
            return
        label = g["heldout/labels"]
        batch = self._batch(g["heldout/ids"], g["heldout/numeric"], label)
        logit = _numpy(self.step.predict(batch)).astype(np.float64)
        if f"heldout/{when}_prob" in g:
            want = self._of_rows(f"heldout/{when}_prob", logit)
            self._add("probability", f", held-out {when}", _sigmoid(logit) - want)
        if f"heldout/{when}_loss" in g:
            loss = np.mean(np.maximum(logit, 0) - logit * label + np.log1p(np.exp(-np.abs(logit))))
            self._add("loss", f", held-out {when}", loss - g[f"heldout/{when}_loss"])

    def _of_rows(self, name: str, like: np.ndarray) -> np.ndarray:
        check_shape(self.golden, name, like.shape)
        return self.golden[name]

    def _stored(self, group: str, name: str, array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ours and theirs of the elements that the file holds, float64, rows first."""
        variable = keras_name(name)
        ours = to_keras(name, array)
        rows = self.golden.rows(variable)
        if not isinstance(rows, slice):
            good = rows.ndim == 1 and np.issubdtype(rows.dtype, np.integer) and rows.size
            if not good or rows.min() < 0 or rows.max() >= len(ours):
                self.golden.fail(f"rows/{variable}", f"row numbers from 0 to {len(ours) - 1}")
        ours = ours[rows].astype(np.float64)
        check_shape(self.golden, f"{group}/{variable}", ours.shape)
        return ours, self.golden[f"{group}/{variable}"].astype(np.float64)

    def _row_sums(
        self, group: str, name: str, array: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(ours, theirs, magnitude) of every row's sum and of its root sum of squares, where the file holds them."""
        variable = f"rowsum/{group}/{keras_name(name)}"
        if variable not in self.golden:
            return
        check_shape(self.golden, variable, (len(array), 2))
        array, want = to_keras(name, array).astype(np.float64), self.golden[variable]
        yield array.sum(1), want[:, 0], np.abs(array).sum(1)
        norm = np.sqrt((array**2).sum(1))
        yield norm, np.sqrt(np.maximum(want[:, 1], 0)), norm

    def _compare_gradients(self, batch: Batch) -> None:
        whole, sums = [], []
        for name, gradient in self.step.gradients(batch).items():
            if name in self.absent:
                continue
            array = _numpy(gradient)
            ours, want = self._stored("grad0", name, array)
            whole.append((np.abs(ours - want) / max(np.abs(want).max(), TINY)).max())
            for got, theirs, magnitude in self._row_sums("grad0", name, array):
                sums.append((np.abs(got - theirs) / max(magnitude.max(), TINY)).max())
        self._add("gradient", ", step 0", np.array(whole))
        if sums:
            self._add("gradient", ", step 0, row sums", np.array(sums))

    def _compare_weights(self, group: str) -> None:
        elements, sums = [], []
        for name, array in self._weights().items():
            ours, want = self._stored(group, name, array)
            start = to_keras(name, self.initial[name])[self.golden.rows(keras_name(name))]
            self.moved[name] = moved = max(self.moved[name], np.abs(want - start).max())
            elements.append(np.maximum(0, np.abs(ours - want) - ULPS * np.abs(want)).ravel() / moved)
            for got, theirs, magnitude in self._row_sums(group, name, array):
                sums.append((np.maximum(0, np.abs(got - theirs) - ULPS * magnitude) / moved).max())
        pooled = np.concatenate(elements)
        self._add("weights", f", {group}", pooled)
        self._add("weights, 99.9 %", f", {group}", np.quantile(pooled, 0.999))
        if sums:
            self._add("weights", f", {group}, row sums", np.array(sums))

    def _compare_slots(self) -> None:
        self.step.settle()
        state = {name: _numpy(a) for name, a in self.step.state().items() if name.split(".", 1)[-1] not in self.absent}
        for slot in ("rms", "accum", "linear"):
            elements, sums = [], []
            for name, array in ((n.removeprefix(f"{slot}."), a) for n, a in state.items() if n.startswith(f"{slot}.")):
                ours, want = self._stored(f"slot/{slot}", name, array)
                if slot == "rms" and is_table(name):
                    least = 1e-3 * np.abs(want).max(axis=1, keepdims=True)
                else:
                    least = (1e-3 if slot == "rms" else 1e-2) * np.abs(want).max()
                elements.append((np.abs(ours - want) / np.maximum(np.maximum(np.abs(want), least), TINY)).max())
                for got, theirs, _ in self._row_sums(f"slot/{slot}", name, array):
                    sums.append((np.abs(got - theirs) / np.maximum(np.abs(theirs), TINY)).max())
            if elements:
                self._add(f"slot {slot}", "", np.array(elements))
            if sums:
                self._add(f"slot {slot}", ", row sums", np.array(sums))


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy().copy()


def _sigmoid(logit: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * logit.astype(np.float64)))


def _print_table(quantities: list[Quantity], title: str) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title), title_justify="left")
    table.add_column("quantity")
    for heading in ("max error", "limit", "ok"):
        table.add_column(heading, justify="right")
    for q in quantities:
        verdict = "yes" if q.ok else "[bold red]NO[/]"
        table.add_row(q.quantity, f"{q.max_error:.2g}", f"{q.limit:.2g}", verdict)
    console = Console()
    console.print(table)
    failed = sum(not q.ok for q in quantities)
    console.print(f"{failed} of {len(quantities)} quantities exceed their limit" if failed else "every limit holds")
