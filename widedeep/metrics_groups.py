"""Metrics of ranking inside groups (the ads of one display): mean average precision and group AUC, without a loop over groups."""

from typing import NamedTuple

import torch
from torch import Tensor


class Groups(NamedTuple):
    """Rows in the order of their groups."""

    order: Tensor  # [B] int64: original row at each place; rows of a group keep their order
    segment: Tensor  # [B] int64: number of the group (0, 1, ...) at each place
    sizes: Tensor  # [G] int64: rows of each group


def sort_by_group(group: Tensor) -> Groups:
    """Bring the rows of each group together. group: [B] integers in any order."""
    ids, order = torch.sort(group, stable=True)
    _, segment, sizes = torch.unique_consecutive(ids, return_inverse=True, return_counts=True)
    return Groups(order, segment, sizes)


def average_precision(score: Tensor, label: Tensor, groups: Groups, k: int) -> Tensor:
    """Average precision at k of each group that has a click, in the original's form.

    Only the first clicked row of a group counts. Its rank r is the number of rows of the group with a higher score, or with the
    same score and an earlier place; the group's value is 1 / (r + 1), and 0 from r = k on.

    Args:
        score: [B] floats, higher is better.    label: [B], clicked where > 0.    groups: of the B rows.
        k: ranks that count.
    Returns:
        [groups with a click] float64.
    """
    score, clicked = score[groups.order], (label > 0)[groups.order]
    place = clicked.nonzero().squeeze(1)
    segment = groups.segment[place]
    is_first = torch.ones_like(segment, dtype=torch.bool)
    is_first[1:] = segment[1:] != segment[:-1]
    place, segment = place[is_first], segment[is_first]

    first_click = place.new_full((len(groups.sizes),), -1).index_copy_(0, segment, place)[groups.segment]
    rival = score[first_click.clamp(min=0)]
    here = torch.arange(len(score), device=score.device)
    ahead = (score > rival) | ((score == rival) & (here < first_click))
    rank = torch.zeros_like(groups.sizes).index_add_(0, groups.segment, ahead.long())[segment]
    return torch.where(rank < k, 1.0 / (rank + 1).double(), 0.0)


def auc_by_group(score: Tensor, label: Tensor, groups: Groups) -> Tensor:
    """Exact area under the ROC curve inside each group, ties counted half: the Mann-Whitney statistic from mean ranks.

    Args:
        score: [B] floats.    label: [B], positive where > 0.    groups: of the B rows.
    Returns:
        [G] float64, NaN where a group has only one class.
    """
    # Stable sorts, the minor key first: by score, then by group.
    score, by_score = torch.sort(score[groups.order], stable=True)
    segment, by_group = torch.sort(groups.segment[by_score], stable=True)
    score = score[by_group]
    positive = (label > 0)[groups.order][by_score][by_group].long()

    run_starts = torch.ones_like(segment, dtype=torch.bool)
    run_starts[1:] = (score[1:] != score[:-1]) | (segment[1:] != segment[:-1])
    run = run_starts.cumsum(0) - 1
    last = torch.bincount(run).cumsum(0)  # one past the end of each run of equal scores
    first = run_starts.nonzero().squeeze(1)
    before = groups.sizes.cumsum(0) - groups.sizes
    # Twice the mean 1-based rank is an integer, so every sum below is exact.
    twice_rank = (first + last + 1)[run] - 2 * before[segment]
    total = torch.zeros_like(groups.sizes)
    positives = total.index_add(0, segment, positive)
    rank_sum = total.index_add(0, segment, positive * twice_rank)
    pairs = positives * (groups.sizes - positives)
    return (rank_sum - positives * (positives + 1)).double() / (2 * pairs).double()
