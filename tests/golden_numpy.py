"""Writes golden files (the format that `widedeep parity` replays) from a float64 NumPy model of the original's rules.

Independent of the package on purpose. `wrong` alters one rule, so that tests can see parity notice it.
"""

import json
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Case:
    categorical: list = field(default_factory=lambda: [("page", 300, 6), ("user", 7, 4), ("item", 50, 8)])
    numeric: list = field(default_factory=lambda: ["user_ctr", "hour", "zeta", "item_age"])
    hidden: list = field(default_factory=lambda: [24, 12])
    parts: str = "both"
    wide_bias: bool = True
    batch: int = 48
    steps: int = 14
    heldout: int = 96
    deep_lr: float = 1.2e-4
    wide_lr: float = 0.02
    steps_per_epoch: int = 4
    num_epochs: float = 4
    warmup: float = 1
    rho: float = 0.5
    eps: float = 1e-7
    accumulator: float = 0.1
    l1: float = 0.0
    l2: float = 0.0
    sampled: dict = field(default_factory=dict)  # variable -> rows that the file holds
    wrong: str = ""
    seed: int = 5


def write(path, case):
    """Runs the case and saves it; returns the arrays."""
    arrays = _Run(case).arrays()
    np.savez(path, **arrays)
    return arrays


def edit(path, arrays, drop=(), **changes):
    """Saves arrays without those whose name starts with one of `drop`, and with others put in; `config` is a dict."""
    kept = {name: a for name, a in arrays.items() if not name.startswith(tuple(drop))} if drop else dict(arrays)
    if "config" in changes and isinstance(changes["config"], dict):
        config = json.loads(arrays["config"].tobytes()) | changes["config"]
        changes["config"] = np.frombuffer(json.dumps(config).encode(), np.uint8)
    np.savez(path, **(kept | changes))


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


class _Run:
    def __init__(self, case):
        self.case = case
        self.rng = np.random.default_rng(case.seed)
        self.weights = self._initial()
        self.rms = {n: np.zeros_like(w) for n, w in self.weights.items() if n.startswith("deep/")}
        start = 0.0 if case.wrong == "accumulator starts at 0" else case.accumulator
        self.accum = {n: np.full_like(w, start) for n, w in self.weights.items() if n.startswith("wide/")}
        self.linear = {n: np.zeros_like(a) for n, a in self.accum.items()}
        names = [(f"{n}_embedding", "embedding", n, d) for n, _, d in case.categorical]
        names += [(n, "numeric", n, 1) for n in case.numeric]
        self.order = sorted(names, key=(lambda c: c[2]) if case.wrong == "order by bare names" else (lambda c: c[0]))

    def _initial(self):
        case, rng, weights = self.case, self.rng, {}
        if case.parts != "wide":
            for name, rows, dim in case.categorical:
                weights[f"deep/emb/{name}"] = rng.normal(0, np.sqrt(2 / (rows + dim)), (rows, dim))
            width = sum(d for *_, d in case.categorical) + len(case.numeric)
            for i, units in enumerate([*case.hidden, 1]):
                name = f"deep/dense_{i}" if i < len(case.hidden) else "deep/out"
                limit = np.sqrt(6 / (width + units))
                weights[f"{name}/kernel"] = rng.uniform(-limit, limit, (width, units))
                weights[f"{name}/bias"] = np.zeros(units)
                width = units
        if case.parts != "deep":
            for name, rows, _ in case.categorical:
                weights[f"wide/emb/{name}"] = rng.uniform(-0.05, 0.05, (rows, 1))
            if case.numeric:
                limit = np.sqrt(6 / (len(case.numeric) + 1))
                weights["wide/dense/kernel"] = rng.uniform(-limit, limit, (len(case.numeric), 1))
            if case.wide_bias:
                weights["wide/dense/bias"] = np.zeros(1)
        return {n: w.astype(np.float32).astype(np.float64) for n, w in weights.items()}

    def _data(self, rows):
        case = self.case
        ids = [np.minimum(self.rng.power(0.4, rows) * r, r - 1) for _, r, _ in case.categorical]
        ids = np.stack(ids, 1).astype(np.int32) if ids else np.zeros((rows, 0), np.int32)
        numeric = self.rng.normal(size=(rows, len(case.numeric))).astype(np.float32)
        signal = numeric.sum(1) * 0.5 + (ids % 3).sum(1) * 0.4 - 1
        return ids, numeric, (self.rng.random(rows) < sigmoid(signal)).astype(np.float32)

    def forward(self, ids, numeric):
        case, w = self.case, self.weights
        column = {n: i for i, (n, *_) in enumerate(case.categorical)}
        wide, deep, acts = np.zeros(len(ids)), np.zeros(len(ids)), []
        if case.parts != "deep":
            numerics = sorted(case.numeric) if case.wrong == "wide numerics sorted" else case.numeric
            wide += w.get("wide/dense/bias", 0)
            if case.numeric:
                places = [case.numeric.index(n) for n in numerics]
                wide += numeric[:, places].astype(float) @ w["wide/dense/kernel"][:, 0]
            for name, i in column.items():
                wide += w[f"wide/emb/{name}"][ids[:, i], 0]
        if case.parts != "wide":
            pieces = [
                w[f"deep/emb/{name}"][ids[:, column[name]]]
                if kind == "embedding"
                else numeric[:, [case.numeric.index(name)]].astype(float)
                for _, kind, name, _ in self.order
            ]
            acts = [np.concatenate(pieces, 1)]
            for i in range(len(case.hidden)):
                acts.append(np.maximum(acts[-1] @ w[f"deep/dense_{i}/kernel"] + w[f"deep/dense_{i}/bias"], 0))
            deep = (acts[-1] @ w["deep/out/kernel"] + w["deep/out/bias"])[:, 0]
        return wide, deep, acts

    def gradients(self, ids, numeric, label):
        """Dense gradients, and for tables also the sum of squared single gradients."""
        case, w, grads, squares = self.case, self.weights, {}, {}
        wide, deep, acts = self.forward(ids, numeric)
        g = (sigmoid(wide + deep) - label) / (1 if case.wrong == "summed loss" else len(label))

        def table(name, i, rows):
            grads[name], squares[name] = np.zeros_like(w[name]), np.zeros_like(w[name])
            np.add.at(grads[name], ids[:, i], rows)
            np.add.at(squares[name], ids[:, i], rows**2)

        if case.parts != "wide":
            up = g[:, None]
            for i in reversed(range(len(case.hidden) + 1)):
                name = f"deep/dense_{i}" if i < len(case.hidden) else "deep/out"
                grads[f"{name}/kernel"], grads[f"{name}/bias"] = acts[i].T @ up, up.sum(0)
                up = up @ w[f"{name}/kernel"].T
                if i:
                    up = up * (acts[i] > 0)
            start = 0
            for _, kind, name, width in self.order:
                if kind == "embedding":
                    i = [n for n, *_ in case.categorical].index(name)
                    table(f"deep/emb/{name}", i, up[:, start : start + width])
                start += width
        if case.parts != "deep":
            for i, (name, *_) in enumerate(case.categorical):
                table(f"wide/emb/{name}", i, g[:, None])
            if case.numeric:
                places = list(range(len(case.numeric)))
                if case.wrong == "wide numerics sorted":
                    places = [case.numeric.index(n) for n in sorted(case.numeric)]
                grads["wide/dense/kernel"] = numeric[:, places].astype(float).T @ g[:, None]
            if case.wide_bias:
                grads["wide/dense/bias"] = g.sum(keepdims=True)
        return grads, squares

    def update(self, ids, grads, squares, lr):
        case, w = self.case, self.weights
        rho = 0.9 if case.wrong == "rho 0.9" else case.rho
        eps = 1e-8 if case.wrong == "eps 1e-8" else case.eps
        touched = {n: np.isin(np.arange(r), ids[:, i])[:, None] for i, (n, r, _) in enumerate(case.categorical)}
        for name, g in grads.items():
            rows = touched[name.split("/")[-1]] if "/emb/" in name else np.True_
            if name.startswith("deep/"):
                g2 = squares[name] if case.wrong == "squares before summing" and name in squares else g * g
                decayed = np.where(rows, rho, 1) if case.wrong == "lazy decay" else rho
                self.rms[name] = decayed * self.rms[name] + (1 - rho) * g2 * rows
                inside = np.sqrt(self.rms[name] + eps)
                root = inside if case.wrong == "eps inside the root" else np.sqrt(self.rms[name]) + eps
                w[name] = w[name] - np.where(rows, lr * g / np.where(root > 0, root, 1), 0)
                continue
            if case.wrong == "FTRL over whole tables":
                rows = np.True_
            n = self.accum[name] + g * g
            z = self.linear[name] + g - (np.sqrt(n) - np.sqrt(self.accum[name])) / case.wide_lr * w[name]
            if case.wrong == "Adagrad for FTRL":
                new = w[name] - case.wide_lr * g / np.sqrt(n)
            else:
                beta = 1.0 if case.wrong == "beta 1" else 0.0
                scale = (beta + np.sqrt(n)) / case.wide_lr + 2 * case.l2
                inner = np.sign(z) * np.maximum(np.abs(z) - case.l1, 0)
                new = np.where(inner == 0, 0, -inner / np.where(scale > 0, scale, 1))
            self.accum[name] = np.where(rows, n, self.accum[name])
            self.linear[name] = np.where(rows, z, self.linear[name])
            w[name] = np.where(rows, new, w[name])

    def rate(self, step):
        case = self.case
        t, warm = max(1, step + (case.wrong == "schedule one step off")), case.warmup * case.steps_per_epoch
        if t < warm:
            return case.deep_lr * t / warm
        quarter = 1 if case.wrong == "no quarter" else 4
        boundary = (case.warmup + (case.num_epochs - case.warmup) / 2) * case.steps_per_epoch
        early = t < boundary if case.wrong == "< at the boundary" else t <= boundary
        return case.deep_lr / (quarter if early else 8)

    def _store(self, out, group, name, array):
        variable = name.removeprefix("rms/").removeprefix("accum/").removeprefix("linear/")
        if variable in self.case.sampled:
            out[f"rowsum/{group}/{name}"] = np.stack([array.sum(1), (array**2).sum(1)], 1)
            array = array[self.case.sampled[variable]]
        out[f"{group}/{name}"] = array.astype(np.float32)

    def _heldout(self, out, when, data):
        wide, deep, _ = self.forward(*data[:2])
        z = wide + deep
        out |= {f"heldout/{when}_linear": wide, f"heldout/{when}_deep": deep, f"heldout/{when}_prob": sigmoid(z)}
        out[f"heldout/{when}_loss"] = np.mean(np.logaddexp(0, z) - z * data[2])

    def arrays(self):
        case, out = self.case, {}
        data = [self._data(case.batch) for _ in range(case.steps)]
        heldout = self._data(case.heldout)
        out |= {key: np.stack([d[i] for d in data]) for i, key in enumerate(("ids", "numeric", "labels"))}
        out |= {f"heldout/{key}": heldout[i] for i, key in enumerate(("ids", "numeric", "labels"))}
        out |= {f"init/{n}": w.astype(np.float32) for n, w in self.weights.items()}
        out |= {f"rows/{n}": np.array(rows, np.int32) for n, rows in case.sampled.items()}
        wide, deep, _ = self.forward(*data[0][:2])
        out |= {"step0/linear_logit": wide, "step0/deep_logit": deep, "step0/prob": sigmoid(wide + deep)}
        self._heldout(out, "init", heldout)
        losses, rates = [], []
        for step, (ids, numeric, label) in enumerate(data):
            z = sum(self.forward(ids, numeric)[:2])
            losses.append(np.mean(np.logaddexp(0, z) - z * label))
            rates.append(self.rate(step))
            grads, squares = self.gradients(ids, numeric, label)
            if step == 0:
                for name, g in grads.items():
                    self._store(out, "grad0", name, g)
            self.update(ids, grads, squares, rates[-1])
            for group in {1: ["step1"], 10: ["step10"]}.get(step + 1, []) + ["end"] * (step + 1 == case.steps):
                for name, w in self.weights.items():
                    self._store(out, group, name, w)
        for slot, arrays in (("rms", self.rms), ("accum", self.accum), ("linear", self.linear)):
            for name, a in arrays.items():
                self._store(out, "slot", f"{slot}/{name}", a)
        self._heldout(out, "end", heldout)
        out |= {"loss": np.array(losses), "lr_deep": np.array(rates)}
        out = {n: a.astype(np.float32) if a.dtype == np.float64 and "rowsum" not in n else a for n, a in out.items()}
        return out | {"config": np.frombuffer(json.dumps(self._config()).encode(), np.uint8)}

    def _config(self):
        case = self.case
        return {
            "format": "wide-deep-golden/1",
            "categorical": [{"name": n, "rows": r, "dim": d} for n, r, d in case.categorical],
            "numeric": case.numeric,
            "hidden": case.hidden,
            "batch": case.batch,
            "steps": case.steps,
            "heldout": case.heldout,
            "deep_learning_rate": case.deep_lr,
            "linear_learning_rate": case.wide_lr,
            "steps_per_epoch": case.steps_per_epoch,
            "num_epochs": case.num_epochs,
            "deep_warmup_epochs": case.warmup,
            "deep_optimizer": {"rho": case.rho, "epsilon": case.eps, "momentum": 0.0, "centered": False},
            "linear_optimizer": {"initial_accumulator_value": case.accumulator, "l1": case.l1, "l2": case.l2},
            "wide_numeric_order": case.numeric,
            "variables": [{"name": name} for name in self.weights],
        }
