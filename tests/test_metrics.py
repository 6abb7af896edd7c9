"""Metrics against the original's numbers, scikit-learn, and slow obvious loops."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, log_loss, roc_auc_score
from thread_comm import in_ranks

from widedeep.errors import RunError
from widedeep.metrics import (
    BinaryAccuracy,
    Evaluation,
    GroupAUC,
    LogLoss,
    MeanAveragePrecision,
    ThresholdAUC,
    exact_auc,
    score_rows,
)
from widedeep.metrics_calibration import calibration

SIZES = [(1, 1), (2, 1), (37, 5), (1000, 1), (1001, 1001), (4000, 700)]


@pytest.fixture
def golden(shared):
    with np.load(shared / "golden" / "metrics.npz") as file:
        return {name: file[name] for name in file.files}


def rows(B, G, device="cpu", levels=7, dtype=torch.float32):
    """Scores with many ties, labels, and groups in mixed order; seeded by shape."""
    g = torch.Generator().manual_seed(B * 10_007 + G)
    score = (torch.randint(-levels, levels + 1, (B,), generator=g) / 4).to(dtype)
    label = (torch.rand(B, generator=g) < 0.3).float()
    group = torch.randint(0, G, (B,), generator=g) * 3 - 5
    return score.to(device), label.to(device), group.to(device)


def slow_map(score, label, group, k):
    """Sum and count, one display at a time."""
    total, count = 0.0, 0
    score, label, group = (x.tolist() for x in (score, label, group))
    for display in sorted(set(group)):
        places = [i for i in range(len(group)) if group[i] == display]
        if not any(label[i] for i in places):
            continue
        first = next(i for i in places if label[i])
        ranked = sorted(places, key=lambda i: (-score[i], i))
        rank = ranked.index(first)
        total += 1 / (rank + 1) if rank < k else 0
        count += 1
    return total, count


def slow_map_all(score, label, group, k):
    """Kaggle's apk of each display: precision at each click of the first k, over as many as there could be."""
    total, count = 0.0, 0
    score, label, group = (x.tolist() for x in (score, label, group))
    for display in sorted(set(group)):
        places = [i for i in range(len(group)) if group[i] == display]
        clicks, hits = sum(label[i] > 0 for i in places), 0
        for rank, i in enumerate(sorted(places, key=lambda i: (-score[i], i))[:k], 1):
            if label[i] > 0:
                hits += 1
                total += hits / rank / min(clicks, k)
        count += clicks > 0
    return total, count


def slow_gauc(score, label, group):
    total, weight = 0.0, 0
    for display in group.unique():
        here = group == display
        s, y = score[here], label[here]
        if y.min() == y.max():
            continue
        wins = [(p > n).item() + 0.5 * (p == n).item() for p in s[y > 0] for n in s[y == 0]]
        total += sum(wins) / len(wins) * len(s)
        weight += len(s)
    return total / weight if weight else math.nan


def test_threshold_auc_equals_keras(golden, device):
    prob, label = (torch.from_numpy(golden[name]).to(device) for name in ("probs", "labels"))
    for count in (200, 8000):
        metric = ThresholdAUC(count)
        for start in range(0, len(prob), 4096):
            metric.update(prob[start : start + 4096], label[start : start + 4096])
        np.testing.assert_array_equal(metric.confusion().cpu().numpy(), golden[f"auc{count}_confusion"])
        assert metric.compute() == pytest.approx(float(golden[f"auc{count}"]), abs=1e-6)
    assert exact_auc(prob, label).item() == pytest.approx(0.774836855, abs=1e-8)


def test_threshold_auc_of_logits(golden, device):
    logit, label = (torch.from_numpy(golden[name]).to(device) for name in ("logits", "labels"))
    for count in (2, 200, 8000):
        by_logit, by_prob = ThresholdAUC(count), ThresholdAUC(count)
        for start in range(0, len(logit), 4096):
            here = slice(start, start + 4096)
            by_logit.update_logits(logit[here], label[here])
            by_prob.update(logit[here].double().sigmoid().float(), label[here])
        assert torch.equal(by_logit.confusion(), by_prob.confusion())
        assert by_logit.compute() == by_prob.compute()


def test_evaluation_equals_original(golden, device):
    evaluation = Evaluation(k=12)
    logit, label, group = (torch.from_numpy(golden[x]).to(device) for x in ("logits", "labels", "display_ids"))
    for start in range(0, len(logit), 4096):
        here = slice(start, start + 4096)
        evaluation.update(logit[here], label[here], group[here])
    result = evaluation.compute()
    assert result["loss"] == pytest.approx(float(golden["bce_from_logits"]), abs=1e-6)
    assert result["binary_accuracy"] == pytest.approx(float(golden["binary_accuracy"]), abs=1e-7)
    assert result["auc_200"] == pytest.approx(float(golden["auc200"]), abs=1e-6)
    assert result["auc_8000"] == pytest.approx(float(golden["auc8000"]), abs=1e-6)
    assert result["map"] == pytest.approx(float(golden["map12_grouped"]), abs=1e-9)
    assert (result["rows"], result["groups"]) == (20000, 2715)


def test_map_equals_original(golden, device):
    prob, label, group = (torch.from_numpy(golden[x]).to(device) for x in ("probs", "labels", "display_ids"))
    shuffle = torch.from_numpy(golden["shuffle"]).long().to(device)
    whole, shuffled, stream = (MeanAveragePrecision(12) for _ in range(3))
    whole.update(prob, label, group)
    shuffled.update(prob[shuffle], label[shuffle], group[shuffle])
    for batch, start in enumerate(range(0, len(prob), 4096)):
        here = slice(start, start + 4096)
        one = MeanAveragePrecision(12)
        one.update(prob[here], label[here], group[here])
        assert one.state["groups"].item() == golden["map12_stream_counts"][batch]
        assert one.state["precision"].item() == pytest.approx(golden["map12_stream_sums"][batch], abs=1e-9)
        stream.update(prob[here], label[here], group[here])
    for metric, name in ((whole, "map12_grouped"), (shuffled, "map12_shuffled"), (stream, "map12_stream")):
        assert metric.compute() == pytest.approx(float(golden[name]), abs=1e-9)
    assert whole.state["groups"].item() == golden["map12_grouped_count"]


def test_map_of_worked_example(device):
    displays = [
        ([0.5, 0.4, 0.1], [0, 1, 0]),  # second: 1/2
        ([0.3, 0.3], [0, 1]),  # a tie goes to the earlier row: 1/2
        ([0.9, 0.1], [0, 0]),  # no click: left out
        ([1 - i / 20 for i in range(14)], [0] * 13 + [1]),  # beyond rank 12: 0, and counted
    ]
    score = torch.tensor([s for scores, _ in displays for s in scores], device=device)
    label = torch.tensor([y for _, labels in displays for y in labels], device=device)
    group = torch.tensor([g for g, (scores, _) in enumerate(displays) for _ in scores], device=device)
    metric = MeanAveragePrecision(12)
    metric.update(score, label, group)
    assert (metric.state["precision"].item(), metric.state["groups"].item()) == (1.0, 3)
    two_clicks = MeanAveragePrecision(12)
    two_clicks.update(torch.tensor([0.1, 0.9, 0.5]), torch.tensor([1, 0, 1]), torch.zeros(3, dtype=torch.int64))
    assert two_clicks.compute() == pytest.approx(1 / 3)


@pytest.mark.parametrize(("B", "G"), SIZES)
@pytest.mark.parametrize("k", [1, 3, 12])
def test_map_matches_loop(B, G, k, device):
    score, label, group = rows(B, G, device)
    metric = MeanAveragePrecision(k)
    metric.update(score, label, group)
    total, count = slow_map(score, label, group, k)
    assert metric.state["groups"].item() == count
    assert metric.state["precision"].item() == pytest.approx(total, abs=1e-9)


@pytest.mark.parametrize(("B", "G"), SIZES)
@pytest.mark.parametrize("k", [1, 3, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_map_of_all_clicks_matches_loop(B, G, k, dtype, device):
    score, label, group = rows(B, G, device, dtype=dtype)
    metric = MeanAveragePrecision(k, all_clicks=True)
    metric.update(score, label, group)
    total, count = slow_map_all(score, label, group, k)
    assert metric.state["groups"].item() == count
    assert metric.state["precision"].item() == pytest.approx(total, abs=1e-9)


def test_map_of_all_clicks_is_that_of_sklearn_where_no_rank_is_too_low(device):
    g = torch.Generator().manual_seed(11)
    score, group = torch.randperm(600, generator=g) / 600, torch.randint(0, 80, (600,), generator=g)
    label = (torch.rand(600, generator=g) < 0.3).int()
    here = [group == display for display in group[label > 0].unique()]
    want = [average_precision_score(label[one], score[one]) for one in here]
    metric = MeanAveragePrecision(k=600, all_clicks=True)
    metric.update(score.to(device), label.to(device), group.to(device))
    assert metric.compute() == pytest.approx(sum(want) / len(want), abs=1e-12)


def test_map_of_all_clicks_differs_where_groups_have_several(device):
    score = torch.tensor([0.1, 0.9, 0.5, 0.7, 0.6], device=device)
    label, group = (torch.tensor(x, device=device) for x in ([1, 0, 1, 0, 1], [7, 7, 7, 8, 8]))
    result = score_rows(score, score, label, group)
    assert (result["groups"], result["multi_click_groups"]) == (2, 1)
    assert result["map"] == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert result["map_all"] == pytest.approx(((1 / 2 + 2 / 3) / 2 + 1 / 2) / 2)
    single = score_rows(score[1:], score[1:], label[1:], group[1:])
    assert single["map_all"] == single["map"] == 0.5
    assert single["multi_click_groups"] == 0
    none = score_rows(score, score, label, None)
    assert math.isnan(none["map_all"])
    assert none["multi_click_groups"] == 0


@pytest.mark.parametrize(("B", "G"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=["f32", "f64", "f16"])
def test_group_auc_matches_loop(B, G, dtype, device):
    score, label, group = rows(B, G, device, dtype=dtype)
    metric = GroupAUC()
    metric.update(score, label, group)
    assert metric.compute() == pytest.approx(slow_gauc(score.cpu(), label.cpu(), group.cpu()), abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_exact_auc_matches_sklearn(dtype, device):
    score, label, _ = rows(5000, 1, device, levels=300, dtype=dtype)
    score[:50] = 0.0
    score[50:100] = -0.0  # equal to 0.0
    score[100:104] = torch.tensor([1e-40, -1e-40, 3e38, -3e38], dtype=dtype)
    assert exact_auc(score, label).item() == pytest.approx(roc_auc_score(label.cpu(), score.cpu()), abs=1e-12)


def test_log_loss_matches_sklearn_and_takes_any_logit(device):
    logit, label, _ = rows(3000, 1, device, levels=40)
    metric = LogLoss()
    metric.update(logit, label)
    want = log_loss(label.cpu().numpy(), 1 / (1 + np.exp(-logit.double().cpu().numpy())))
    assert metric.compute() == pytest.approx(want, abs=1e-12)
    far = LogLoss()
    far.update(torch.tensor([1e4, -1e4], device=device), torch.tensor([0.0, 1.0], device=device))
    assert far.compute() == pytest.approx(1e4)


def test_half_is_predicted_negative(device):
    metric = BinaryAccuracy()
    prob, label = [0.5, 0.5, 0.5, 0.50001], [0.0, 1.0, 0.0, 1.0]
    metric.update(torch.tensor(prob, device=device), torch.tensor(label, device=device))
    assert metric.compute() == 3 / 4


@pytest.mark.parametrize("make", [LogLoss, BinaryAccuracy, ThresholdAUC], ids=lambda make: make.__name__)
def test_parts_equal_the_whole(make, device):
    logit, label, _ = rows(1000, 1, device)
    prob = logit.sigmoid()
    whole, parts = make(), make()
    whole.update(prob, label)
    for part in (slice(0, 123), slice(123, 123), slice(123, None)):
        parts.update(prob[part], label[part])
    assert parts.compute() == pytest.approx(whole.compute(), abs=1e-14)


def test_empty_and_one_class_are_nan(device):
    empty = torch.empty(0, device=device)
    for metric in (LogLoss(), BinaryAccuracy(), ThresholdAUC()):
        assert math.isnan(metric.compute())
        metric.update(empty, empty)
        assert math.isnan(metric.compute())
    for metric in (MeanAveragePrecision(), MeanAveragePrecision(all_clicks=True), GroupAUC()):
        metric.update(empty, empty, empty.long())
        assert math.isnan(metric.compute())
    ones = torch.ones(3, device=device)
    assert math.isnan(exact_auc(ones, ones))
    assert math.isnan(exact_auc(empty, empty))


def test_calibration_matches_numpy():
    logit, label, _ = rows(1003, 1, levels=200)
    prob = logit.sigmoid()
    table = calibration(prob, label, bins=10)
    order = np.argsort(prob.numpy(), kind="stable")
    parts = [order[1003 * i // 10 : 1003 * (i + 1) // 10] for i in range(10)]
    assert table["rows"] == [len(part) for part in parts]
    assert sum(table["rows"]) == 1003
    np.testing.assert_allclose(table["predicted"], [prob[part].double().mean() for part in parts], rtol=1e-12)
    assert sum(r * o for r, o in zip(table["rows"], table["observed"])) == pytest.approx(label.sum().item())
    assert table["lowest"] == [prob[part[0]].item() for part in parts]
    assert table["highest"] == [prob[part[-1]].item() for part in parts]
    assert calibration(prob[:3], label[:3], bins=10)["rows"] == [1, 1, 1]
    assert calibration(prob[:0], label[:0])["rows"] == []


def test_running_values_are_those_of_the_rows_so_far(device):
    logit, label, group = rows(900, 300, device)
    order = torch.argsort(group, stable=True)
    logit, label, group = logit[order], label[order], group[order]
    cut = int((group == group[500]).nonzero()[0])  # between two groups
    evaluation = Evaluation()
    evaluation.update(logit[:300], label[:300], group[:300])
    evaluation.update(logit[300:cut], label[300:cut], group[300:cut])
    early = evaluation.running()
    assert early == evaluation.running()
    assert early["loss"] == pytest.approx(log_loss(label[:cut].cpu(), logit[:cut].double().sigmoid().cpu()))
    evaluation.update(logit[cut:], label[cut:], group[cut:])
    running, final = evaluation.running(), evaluation.compute()
    for name, whole in (("loss", "loss"), ("binary_accuracy", "binary_accuracy"), ("auc", "auc_200"), ("map", "map")):
        assert running[name] == pytest.approx(final[whole], abs=1e-12)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("groups", [True, False], ids=["groups", "no-groups"])
def test_ranks_see_what_one_process_sees(world, groups):
    logit, label, group = rows(1000, 150, levels=3)  # ties everywhere: the order of rows matters
    batch, shares = 128, {1: [0, 128], 2: [0, 70, 128], 3: [0, 70, 128, 128]}[world]  # uneven, and none for the third
    single = Evaluation(groups=groups)
    single.update(logit, label, group if groups else None)
    parts = [Evaluation(groups=groups) for _ in range(world)]
    for start in range(0, 1000, batch):
        cuts = [min(start + share, 1000) for share in shares]
        for part, first, last in zip(parts, cuts[:-1], cuts[1:]):
            here = slice(first, last)
            part.update(logit[here], label[here], group[here] if groups else None, first)
    in_ranks(world, lambda comm: parts[comm.rank].gather(comm))
    want = single.compute()
    for part in parts:
        got = part.compute()
        assert got == pytest.approx(want, abs=1e-12, nan_ok=True)
        assert torch.equal(part.rows()[0], logit)
        assert part.calibration(7) == single.calibration(7)
    assert math.isnan(want["map"]) is not groups


def test_rank_without_any_batch_can_gather():
    evaluation = Evaluation()
    in_ranks(1, evaluation.gather)
    result = evaluation.compute()
    assert result["rows"] == 0
    assert math.isnan(result["loss"])


def test_evaluation_rejects_logits_that_are_not_finite():
    evaluation = Evaluation(groups=False)
    evaluation.update(torch.tensor([0.0, math.nan, math.inf]), torch.tensor([0.0, 1.0, 1.0]))
    with pytest.raises(RunError, match="2 of 3 logits are not finite"):
        evaluation.compute()


def test_evaluation_wants_groups():
    with pytest.raises(ValueError, match="needs the group"):
        Evaluation(groups=True).update(torch.zeros(3), torch.zeros(3))


@pytest.mark.parametrize("shapes", [((9, 1), (9,)), ((9,), (9, 1)), ((9,), (5,)), ((1,), (9,)), ((), ())], ids=str)
def test_rows_of_other_shapes_are_refused(shapes):
    score, label = torch.rand(shapes[0]), torch.rand(shapes[1]).round()
    group = torch.zeros(9, dtype=torch.int64)
    takers = [
        LogLoss().update,
        BinaryAccuracy().update,
        ThresholdAUC().update,
        exact_auc,
        calibration,
        Evaluation(groups=False).update,
        lambda score, label: score_rows(score, score, label, None),
        lambda score, label: MeanAveragePrecision().update(score, label, group),
        lambda score, label: GroupAUC().update(score, label, group),
        lambda score, label: Evaluation().update(score, label, group),
    ]
    for take in takers:
        with pytest.raises(ValueError, match="metric: expected tensors of one dimension and equal length, got shapes"):
            take(score, label)
    for take in (MeanAveragePrecision().update, GroupAUC().update, Evaluation().update):
        with pytest.raises(ValueError, match=r"got shapes \[\[4\], \[4\], \[9\]\]"):
            take(torch.rand(4), torch.rand(4).round(), group)


def test_no_metric_keeps_the_graph_of_a_batch():
    logit = torch.randn(50, requires_grad=True)
    label, group = torch.rand(50).round(), torch.arange(50) // 7
    loss, evaluation = LogLoss(), Evaluation()
    loss.update(logit * 2, label)
    evaluation.update(logit * 2, label, group)
    assert not loss.value().requires_grad
    assert not evaluation.rows()[0].requires_grad
    assert loss.compute() == pytest.approx(log_loss(label, (logit * 2).detach().double().sigmoid()))
    assert evaluation.compute()["loss"] == loss.compute()
