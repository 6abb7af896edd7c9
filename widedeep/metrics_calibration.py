"""Whether predicted probabilities are those of the clicks: in bins, and against who knows only the click rate."""

import math

import torch
from torch import Tensor


def normalized_entropy(loss: float, click_rate: float) -> float:
    """Log loss divided by that of the click rate as everybody's probability: 1 is no better than that, 0 is perfect. It
    compares sets of different click rates, where log loss does not. NaN without clicks, or with nothing else.

    Args:
        loss: mean log loss, nats.
        click_rate: share of the same rows that are clicks.
    Source: He et al. 2014, "Practical Lessons from Predicting Clicks on Ads at Facebook", section 2.
    """
    if not 0 < click_rate < 1:
        return math.nan
    return loss / -(click_rate * math.log(click_rate) + (1 - click_rate) * math.log1p(-click_rate))


def calibration(prob: Tensor, label: Tensor, bins: int = 20) -> dict[str, list]:
    """Predicted against observed click rate in bins of equally many rows, in the order of the predictions.

    Args:
        prob: [B] floats in [0, 1].
        label: [B], 0 or 1.
        bins: at most; fewer if there are fewer rows.
    Returns:
        Lists of one item for each bin: `rows`, `predicted` (mean probability), `observed` (share of clicks), `lowest`
        and `highest` (probabilities in the bin).
    """
    check_rows(prob, label)
    rows = len(prob)
    bins = min(bins, rows)
    if bins == 0:
        return {name: [] for name in ("rows", "predicted", "observed", "lowest", "highest")}
    prob, order = torch.sort(prob.double())
    edges = torch.arange(bins + 1, device=prob.device) * rows // bins
    sizes = edges.diff()
    bin_of_row = torch.repeat_interleave(sizes)
    empty = torch.zeros(bins, dtype=torch.float64, device=prob.device)
    table = {
        "rows": sizes,
        "predicted": empty.index_add(0, bin_of_row, prob) / sizes,
        "observed": empty.index_add(0, bin_of_row, label[order].double()) / sizes,
        "lowest": prob[edges[:-1]],
        "highest": prob[edges[1:] - 1],
    }
    return {name: column.tolist() for name, column in table.items()}


def check_rows(*columns: Tensor) -> None:
    """Refuses columns of other shapes than [B]: torch would repeat one to the shape of another, without a word."""
    shapes = [list(column.shape) for column in columns]
    if len(shapes[0]) != 1 or any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"metric: expected tensors of one dimension and equal length, got shapes {shapes}")
