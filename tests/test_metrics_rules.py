"""Metrics by their definitions, in loops: thresholds that rows lie on, bins of a calibration, float64 logits."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score
from thread_comm import in_ranks

from widedeep.metrics import Evaluation, LogLoss, ThresholdAUC, score_rows
from widedeep.metrics_calibration import calibration, normalized_entropy


def drawn(B, seed):
    """Logits of all sizes, labels that go with them, and groups."""
    g = torch.Generator().manual_seed(seed)
    logit = torch.randn(B, generator=g) * 10 ** torch.randint(-2, 2, (B,), generator=g).float()
    label = (torch.rand(B, generator=g) < logit.sigmoid()).float()
    return logit, label, torch.randint(0, B // 5 + 1, (B,), generator=g)


def slow_curve(prob, label, count):
    """Confusion [4, count] and area by Keras' rule: predicted positive above a threshold, the area in trapezoids."""
    thresholds = np.array([-1e-7, *(i / (count - 1) for i in range(1, count - 1)), 1 + 1e-7], np.float32)
    confusion = np.array([[0, 0, 0, 0]] * count)
    for row, threshold in zip(confusion, thresholds):
        for p, y in zip(prob, label):
            row[{(True, 1): 0, (True, 0): 1, (False, 0): 2, (False, 1): 3}[bool(p > threshold), int(y)]] += 1
    tp, fp, tn, fn = confusion.T
    x, y = fp / (fp + tn), tp / (tp + fn)
    return confusion.T, sum((x[i] - x[i + 1]) * (y[i] + y[i + 1]) / 2 for i in range(count - 1))


@pytest.mark.parametrize("count", [2, 3, 5, 200])
def test_threshold_auc_matches_a_loop(count, device):
    """Some rows lie on a threshold, some are 0 or 1."""
    logit, label, _ = drawn(300, count)
    prob = logit.sigmoid()
    prob[:100] = torch.randint(0, count, (100,)).float() / (count - 1)
    metric = ThresholdAUC(count)
    for part in (slice(0, 57), slice(57, 300)):
        metric.update(prob[part].to(device), label[part].to(device))
    confusion, area = slow_curve(prob.numpy(), label.numpy(), count)
    np.testing.assert_array_equal(metric.confusion().cpu().numpy(), confusion)
    assert metric.compute() == pytest.approx(area, abs=1e-12)


@pytest.mark.parametrize("count", [2, 3, 5, 200])
def test_threshold_auc_of_logits_matches_a_loop(count, device):
    """Logits so far out that their probability is 0 or 1, and 0, whose probability 1/2 may be a threshold."""
    logit, label, _ = drawn(300, count + 1)
    logit[:40], logit[40:80], logit[80:90] = -1e4, 1e4, 0
    metric = ThresholdAUC(count)
    for part in (slice(0, 57), slice(57, 300)):
        metric.update_logits(logit[part].to(device), label[part].to(device))
    confusion, area = slow_curve(logit.double().sigmoid().float().numpy(), label.numpy(), count)
    np.testing.assert_array_equal(metric.confusion().cpu().numpy(), confusion)
    assert metric.compute() == pytest.approx(area, abs=1e-12)


def test_log_loss_of_float64_logits_is_not_rounded(device):
    logit, label, _ = drawn(500, 1)
    logit = logit.double() + 1e-9 * torch.arange(500)
    metric = LogLoss()
    metric.update(logit.to(device), label.to(device))
    far = logit.abs() > 30  # of which sklearn's probabilities lose digits
    want = log_loss(label[~far], logit[~far].sigmoid(), labels=[0, 1], normalize=False)
    want += torch.nn.functional.binary_cross_entropy_with_logits(
        logit[far], label[far].double(), reduction="sum"
    ).item()
    assert metric.compute() == pytest.approx(want / 500, rel=1e-13)


@pytest.mark.parametrize(("rows", "bins"), [(103, 10), (100, 10), (7, 20), (1, 1)])
def test_each_bin_of_a_calibration_is_of_its_own_rows(rows, bins):
    """Labels that go with the predictions, so that bins differ; and none with a bin's rows in another order."""
    logit, label, _ = drawn(rows, rows)
    prob = logit.sigmoid()
    table = calibration(prob, label, bins)
    pairs = sorted(zip(prob.double().tolist(), label.tolist()), key=lambda pair: pair[0])
    bins = min(bins, rows)
    parts = [pairs[rows * i // bins : rows * (i + 1) // bins] for i in range(bins)]
    assert table["rows"] == [len(part) for part in parts]
    assert table["observed"] == pytest.approx([np.mean([y for _, y in part]) for part in parts], rel=1e-12)
    assert table["predicted"] == pytest.approx([np.mean([p for p, _ in part]) for part in parts], rel=1e-12)


def test_an_evaluation_says_what_the_click_rate_alone_would_cost():
    logit, label, _ = drawn(400, 5)
    evaluation = Evaluation(groups=False)
    evaluation.update(logit[:100], label[:100])
    evaluation.update(logit[100:], label[100:])
    result, rate = evaluation.compute(), label.double().mean().item()
    assert result["click_rate"] == pytest.approx(rate, rel=1e-14)
    assert result["mean_probability"] == pytest.approx(logit.sigmoid().double().mean().item(), rel=1e-14)
    by_rate = log_loss(label, np.full(400, rate))
    assert result["normalized_entropy"] == pytest.approx(result["loss"] / by_rate, rel=1e-12)
    assert normalized_entropy(0.0, 0.5) == 0
    assert normalized_entropy(0.0562, 1e-2) == pytest.approx(1, abs=0.01)
    assert all(math.isnan(normalized_entropy(0.1, rate)) for rate in (0.0, 1.0, math.nan))


def test_running_values_count_no_row_twice_after_the_rows_are_gathered():
    logit, label, group = drawn(200, 3)
    evaluation = Evaluation()
    evaluation.update(logit, label, group)
    before = evaluation.running()
    in_ranks(1, evaluation.gather)
    assert evaluation.running() == before
    state = evaluation._running[0].state
    assert int(state["rows"]) == 200


def test_float64_scores_that_float32_cannot_tell_apart_are_ranked():
    """Probabilities of a file: of the two rows of a group the later, clicked one is ahead by less than float32 has."""
    rng = np.random.default_rng(0)
    low = rng.uniform(0.1, 0.9, 300)
    prob = torch.from_numpy(np.stack([low, low + 1e-12], axis=1).ravel())
    label, group = torch.tensor([0, 1]).repeat(300), torch.arange(300).repeat_interleave(2)
    result = score_rows(prob, prob, label, group)
    assert (result["map"], result["map_all"], result["gauc"]) == (1, 1, 1)
    assert result["auc"] == pytest.approx(roc_auc_score(label, prob), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_that_differ_in_their_last_digit_are_no_ties(dtype):
    low = torch.rand(300, generator=torch.Generator().manual_seed(1), dtype=dtype) * 8 - 4
    high = torch.nextafter(low, torch.tensor(9.0, dtype=dtype))
    score = torch.stack([low, high, low - 1], 1).ravel()
    label, group = torch.tensor([0, 1, 1]).repeat(300), torch.arange(300).repeat_interleave(3)
    result = score_rows(score, score.sigmoid(), label, group)
    assert result["map"] == 1  # the first click of a group is ahead, its second one last
    assert result["map_all"] == pytest.approx((1 + 2 / 3) / 2)
    assert result["gauc"] == 1 / 2
