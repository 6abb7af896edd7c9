"""Metrics of click predictions: log loss, accuracy, AUC, MAP@k, group AUC, calibration.

Each metric is a small object: `update` takes a batch on any device, `compute` gives the number (NaN for an empty set),
`value` the same as a tensor that nobody waits for; `numbers` reads several of them at once. A metric holds counts and
float64 sums, so its value does not hang on how the rows were batched. The exact AUC is no sum but a function of all
rows. `Evaluation` keeps all rows of a set and computes everything.

Whatever takes rows raises ValueError unless its tensors are [B] each. No metric has a gradient.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from widedeep import ops
from widedeep.errors import RunError
from widedeep.metrics_calibration import calibration, check_rows, normalized_entropy
from widedeep.metrics_groups import (
    Groups,
    auc_by_group,
    average_precision,
    average_precision_of_all,
    clicks_by_group,
    number_groups,
    rank_key,
)

THRESHOLDS = (200, 8000)  # of the two AUCs by thresholds


class Metric(ABC):
    """A metric whose state is tensors that add up. Subclasses define `update` and `value`."""

    def __init__(self) -> None:
        self.state: dict[str, Tensor] = {}

    @abstractmethod
    def value(self) -> Tensor | None:
        """0-dim float64 on the device of the rows, NaN where undefined; None before the first `update`."""

    def compute(self) -> float:
        return numbers({"": self.value()})[""]

    def _add(self, **terms: Tensor) -> None:
        for name, term in terms.items():
            term, held = term.detach(), self.state.get(name)  # a sum would keep the graphs of all batches
            self.state[name] = term if held is None else held + term.to(held.device)

    def _ratio(self, numerator: str, denominator: str) -> Tensor | None:
        return self.state[numerator].double() / self.state[denominator] if self.state else None


class LogLoss(Metric):
    """Mean binary cross-entropy, in nats: max(z, 0) - z y + log(1 + exp(-|z|)), summed in float64."""

    def update(self, logit: Tensor, label: Tensor) -> None:
        """logit: [B] floats, any finite size.    label: [B], 0 or 1."""
        check_rows(logit, label)
        z, y = logit.double(), label.double()
        loss = z.clamp(min=0) - z * y + torch.log1p(torch.exp(-z.abs()))
        self._add(loss=loss.sum(), rows=_count(z))

    def value(self) -> Tensor | None:
        return self._ratio("loss", "rows")


class BinaryAccuracy(Metric):
    """Share of rows where (probability > 0.5) equals the label; a probability of exactly 0.5 predicts 0."""

    def update(self, prob: Tensor, label: Tensor) -> None:
        """prob: [B] floats in [0, 1].    label: [B], 0 or 1."""
        check_rows(prob, label)
        self._add(right=((prob > 0.5) == (label > 0)).sum(), rows=_count(prob))

    def value(self) -> Tensor | None:
        return self._ratio("right", "rows")


class ThresholdAUC(Metric):
    """Area under the ROC curve by trapezoids over T thresholds, by the rule of Keras' `AUC`.

    Thresholds are -1e-7, 1/(T-1), ..., (T-2)/(T-1), 1 + 1e-7 in float32; a row is predicted positive where its
    probability > threshold.
    """

    def __init__(self, thresholds: int = 200):
        super().__init__()
        self.count = thresholds
        inner = [i / (thresholds - 1) for i in range(1, thresholds - 1)]
        self.thresholds = torch.tensor([-1e-7, *inner, 1 + 1e-7], dtype=torch.float32)

    def update(self, prob: Tensor, label: Tensor) -> None:
        """prob: [B] floats in [0, 1], compared as float32.    label: [B], 0 or 1."""
        check_rows(prob, label)
        self.thresholds = self.thresholds.to(prob.device)
        passed = torch.bucketize(prob.float(), self.thresholds)  # how many thresholds lie below the row
        width = self.count + 1
        histogram = torch.bincount(passed + width * (label > 0), minlength=2 * width).view(2, width)
        self._add(negatives=histogram[0], positives=histogram[1])

    def update_logits(self, logit: Tensor, label: Tensor) -> None:
        """The same of logits [B] float32, whose probabilities are rounded from float64 (`ops.auc_histogram_`)."""
        histogram = torch.zeros(2, self.count + 1, dtype=torch.int64, device=logit.device)
        negatives, positives = histogram[:, 1:-1]  # every probability lies above the first threshold, none the last
        ops.auc_histogram_(logit.contiguous(), label.float(), positives, negatives)
        self._add(negatives=histogram[0], positives=histogram[1])

    def confusion(self) -> Tensor:
        """[4, T] int64: true positives, false positives, true negatives, false negatives at each threshold."""
        if not self.state:
            return torch.zeros(4, self.count, dtype=torch.int64)
        true, false = (_suffix_sums(self.state[name])[1:] for name in ("positives", "negatives"))
        positives, negatives = self.state["positives"].sum(), self.state["negatives"].sum()
        return torch.stack([true, false, negatives - false, positives - true])

    def value(self) -> Tensor | None:
        """NaN unless both classes occur."""
        if not self.state:
            return None
        tp, fp, tn, fn = self.confusion().double()
        tpr, fpr = tp / (tp + fn), fp / (fp + tn)
        return torch.sum((fpr[:-1] - fpr[1:]) * (tpr[:-1] + tpr[1:]) / 2)


class MeanAveragePrecision(Metric):
    """MAP@k; groups without a click are left out. By the original's rule (`metrics_groups.average_precision`) the first
    click of a group counts; with `all_clicks` every one (`average_precision_of_all`).

    Groups are formed within one `update`: a group cut by the border of two batches counts as two, as in the original.
    """

    def __init__(self, k: int = 12, all_clicks: bool = False):
        super().__init__()
        self.k, self.all_clicks = k, all_clicks

    def update(self, score: Tensor, label: Tensor, group: Tensor | Groups) -> None:
        """score: [B] floats.    label: [B], 0 or 1.    group: [B] integers, or the numbered groups."""
        groups = number_groups(group) if isinstance(group, Tensor) else group
        check_rows(score, label, groups.segment)
        if self.all_clicks:
            values = average_precision_of_all(score, label, groups, self.k)
            self._add(precision=values.sum(), groups=(clicks_by_group(label, groups) > 0).sum())
        else:
            values = average_precision(score, label, groups, self.k)
            self._add(precision=values.sum(), groups=_count(values))

    def value(self) -> Tensor | None:
        return self._ratio("precision", "groups")


class GroupAUC(Metric):
    """Mean of the exact AUC inside each group that has both classes, weighted by the group's rows.

    Source: Zhu et al., "Optimized Cost per Click in Taobao Display Advertising", KDD 2017 (weights: impressions).
    Groups are formed within one `update`.
    """

    def update(self, score: Tensor, label: Tensor, group: Tensor | Groups) -> None:
        """score: [B] floats.    label: [B], 0 or 1.    group: [B] integers, or the numbered groups."""
        groups = number_groups(group) if isinstance(group, Tensor) else group
        check_rows(score, label, groups.segment)
        auc = auc_by_group(score, label, groups)
        mixed = ~auc.isnan()
        weight = groups.sizes[mixed]
        self._add(auc=(auc[mixed] * weight).sum(), rows=weight.sum())

    def value(self) -> Tensor | None:
        return self._ratio("auc", "rows")


def numbers(values: Mapping[str, Tensor | None]) -> dict[str, float]:
    """0-dim tensors of one device as numbers, all in one transfer; NaN for None."""
    held = {name: value.double() for name, value in values.items() if value is not None}
    read = dict(zip(held, torch.stack([*held.values()]).tolist())) if held else {}
    return {name: read.get(name, math.nan) for name in values}


def exact_auc(score: Tensor, label: Tensor) -> Tensor:
    """Area under the ROC curve, ties counted half: 0-dim float64; NaN unless both classes occur.

    score: [B] finite floats, or their `rank_key`.
    label: [B], 0 or 1.
    """
    check_rows(score, label)
    segment = torch.zeros(len(score), dtype=torch.int64, device=score.device)
    return auc_by_group(score, label, Groups(segment, sizes=_count(score)[None]))[0]


class Evaluation:
    """Every metric of one pass over an evaluation set. It keeps the rows (13 bytes each, on the device they come from).

    Groups are whole: no batch or rank border cuts them. Ranking uses the float32 logits; probabilities are their
    float32 sigmoid.

        evaluation = Evaluation(k=12)
        for batch in reader.epoch(0):
            evaluation.update(step.predict(batch), batch.label, batch.group, start + batch.first_row)
        evaluation.gather(comm)      # every rank then holds the rows of all
        result = evaluation.compute()
    """

    def __init__(self, k: int = 12, thresholds: tuple[int, int] = THRESHOLDS, groups: bool = True):
        """k: of MAP.    thresholds: of two more AUCs, `auc_<n>`.    groups: whether rows have one (`map`, `map_all`,
        `gauc`)."""
        self.k, self.thresholds, self.groups = k, thresholds, groups
        self._logit: list[Tensor] = []
        self._label: list[Tensor] = []
        self._group: list[Tensor] = []
        self._spans: list[tuple[int, int]] = []
        self._rows = 0
        self._running = (LogLoss(), BinaryAccuracy(), ThresholdAUC(thresholds[0]), MeanAveragePrecision(k))
        self._running_parts = 0

    def update(self, logit: Tensor, label: Tensor, group: Tensor | None = None, position: int | None = None) -> None:
        """Take a batch; the tensors are kept, so they must not be overwritten.  No host sync.

        Args:
            logit: [B] floats.
            label: [B], 0 or 1.
            group: [B] int64; needed if `groups`.
            position: place of row 0 in the evaluation set (default: after the rows so far). After `gather` rows stand
                in this order, so that ties break as in one process.
        """
        if not self.groups:
            check_rows(logit, label)
        elif group is None:
            raise ValueError("Evaluation(groups=True) needs the group of each row")
        else:
            check_rows(logit, label, group)
            self._group.append(group.long())
        self._logit.append(logit.detach().float())
        self._label.append((label > 0).view(torch.uint8))
        self._spans.append((self._rows if position is None else position, len(logit)))
        self._rows += len(logit)

    def running(self) -> dict[str, float]:
        """`loss`, `binary_accuracy`, `auc` (by the first count of thresholds) and `map` of this rank's rows so far.

        Each row is worked on once, at the first call after its `update`. A group cut by a call counts twice in `map`.
        """
        loss, accuracy, auc, mean_precision = self._running
        new = slice(self._running_parts, None)
        if self._logit[new]:
            logit, label = torch.cat(self._logit[new]), torch.cat(self._label[new])
            loss.update(logit, label)
            accuracy.update(logit.sigmoid(), label)
            auc.update_logits(logit, label)
            if self.groups:
                mean_precision.update(logit, label, torch.cat(self._group[new]))
            self._running_parts = len(self._logit)
        values = {"loss": loss.value(), "binary_accuracy": accuracy.value(), "auc": auc.value()}
        return numbers(values | ({"map": mean_precision.value()} if self.groups else {}))

    def gather(self, comm) -> None:
        """Replace this rank's rows by those of all ranks, in the order of their positions. Every rank must call it.

        comm: of `widedeep.dist`; its `device` is where the rows are exchanged.
        """
        spans = torch.tensor(self._spans, dtype=torch.int64, device=comm.device).view(-1, 2)
        spans = comm.all_gather_rows(spans)
        position, sizes = spans.unbind(1)
        starts = sizes.cumsum(0) - sizes
        by_position = torch.argsort(position, stable=True)
        shift = torch.repeat_interleave(starts[by_position], sizes[by_position])
        sizes = sizes[by_position]
        within = torch.arange(len(shift), device=comm.device) - torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
        order = shift + within
        for parts, dtype in ((self._logit, torch.float32), (self._label, torch.uint8), (self._group, torch.int64)):
            if parts is self._group and not self.groups:
                continue
            mine = torch.cat(parts) if parts else torch.empty(0, dtype=dtype)
            parts[:] = [comm.all_gather_rows(mine.to(comm.device))[order]]
        self._rows = len(order)
        self._spans = [(0, self._rows)]
        self._running_parts = 1

    def rows(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """logit [rows] float32, label [rows] uint8, group [rows] int64 or None: what is held, as one tensor each."""
        logit = torch.cat(self._logit) if self._logit else torch.empty(0)
        label = torch.cat(self._label) if self._label else torch.empty(0, dtype=torch.uint8)
        if not self.groups:
            return logit, label, None
        return logit, label, torch.cat(self._group) if self._group else torch.empty(0, dtype=torch.int64)

    def compute(self) -> dict[str, float | int]:
        """All metrics of the rows held.

        Returns:
            `loss` (mean over rows, nats), `normalized_entropy`, `click_rate`, `mean_probability`, `binary_accuracy`,
            `auc` (exact), `auc_200`, `auc_8000` (by `thresholds`), `map` (at k, by the original's rule), `map_all` (at
            k, all clicks), `gauc`, `rows`, `groups` (distinct) and `multi_click_groups` (those of several clicks;
            without any, `map_all` is `map`). Without groups `map`, `map_all` and `gauc` are NaN, and the counts of
            groups 0. NaN where undefined.
        Raises:
            RunError: a logit is not finite: a ranking by such a model would mean nothing.
        """
        logit, label, group = self.rows()
        if bad := int((~logit.isfinite()).sum()):
            raise RunError(f"evaluation: {bad} of {len(logit)} logits are not finite: the model has diverged")
        loss = LogLoss()
        loss.update(logit, label)
        curves = [ThresholdAUC(count) for count in self.thresholds]
        for curve in curves:
            curve.update_logits(logit, label)
        values, counts = _score(logit, logit.sigmoid(), label, group, self.k, curves)
        result = numbers({"loss": loss.value()} | values)
        entropy = normalized_entropy(result["loss"], result["click_rate"])
        return {"loss": result["loss"], "normalized_entropy": entropy} | result | counts

    def calibration(self, bins: int = 20) -> dict[str, list]:
        """`calibration` of the rows held."""
        logit, label, _ = self.rows()
        return calibration(logit.sigmoid(), label, bins)


def score_rows(score: Tensor, prob: Tensor, label: Tensor, group: Tensor | None, k: int = 12) -> dict[str, float | int]:
    """All metrics of a set of rows but the loss and what is made of it; keys as in `Evaluation.compute`.

    Args:
        score: [B] floats that rank the rows.
        prob: [B] probabilities, in the same order of size.
        label: [B], 0 or 1.
        group: [B] int64 or None.
    """
    curves = [ThresholdAUC(count) for count in THRESHOLDS]
    for curve in curves:
        curve.update(prob, label)
    values, counts = _score(score, prob, label, group, k, curves)
    return numbers(values) | counts


def _score(
    score: Tensor, prob: Tensor, label: Tensor, group: Tensor | None, k: int, curves: Sequence[ThresholdAUC]
) -> tuple[dict[str, Tensor | None], dict[str, int]]:
    """What `score_rows` returns: metrics as tensors, and counts. curves: of these rows."""
    accuracy = BinaryAccuracy()
    accuracy.update(prob, label)
    mean_precision, group_auc = MeanAveragePrecision(k), GroupAUC()
    of_all, counts = mean_precision, {"groups": 0, "multi_click_groups": 0}
    score = rank_key(score)  # once for all
    if group is not None:
        groups = number_groups(group)
        mean_precision.update(score, label, groups)
        group_auc.update(score, label, groups)
        several = int((clicks_by_group(label, groups) > 1).sum())
        counts = {"groups": len(groups.sizes), "multi_click_groups": several}
        if several:
            of_all = MeanAveragePrecision(k, all_clicks=True)
            of_all.update(score, label, groups)
    values = {
        "click_rate": (label > 0).double().mean(),
        "mean_probability": prob.double().mean(),
        "binary_accuracy": accuracy.value(),
        "auc": exact_auc(score, label),
        **{f"auc_{curve.count}": curve.value() for curve in curves},
        "map": mean_precision.value(),
        "map_all": of_all.value(),
        "gauc": group_auc.value(),
    }
    return values, {"rows": len(score)} | counts


def _count(values: Tensor) -> Tensor:
    return torch.full((), values.numel(), dtype=torch.int64, device=values.device)  # no copy from the host


def _suffix_sums(counts: Tensor) -> Tensor:
    """[n] to [n]: the sum from each place to the end."""
    return counts.flip(0).cumsum(0).flip(0)
