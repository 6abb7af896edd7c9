"""Ranking inside groups (the ads of one display): average precision and AUC of each group, with no loop over them."""

from typing import NamedTuple

import torch
from torch import Tensor


class Groups(NamedTuple):
    """Which rows belong together."""

    segment: Tensor  # [B] int64: number of the row's group, 0 .. G-1
    sizes: Tensor  # [G] int64: rows of each group


def number_groups(group: Tensor) -> Groups:
    """Number the groups 0, 1, ... in the order of their ids. group: [B] integers, in any order."""
    is_sorted = bool((group[1:] >= group[:-1]).all())
    distinct = torch.unique_consecutive if is_sorted else torch.unique
    _, segment, sizes = distinct(group, return_inverse=True, return_counts=True)
    return Groups(segment, sizes)


def average_precision(score: Tensor, label: Tensor, groups: Groups, k: int) -> Tensor:
    """Average precision at k of each group that has a click, in the original's form.

    Only the first clicked row of a group counts. Its rank r is the number of rows of the group with a higher score, or
    with the same score and an earlier place; the group's value is 1 / (r + 1), and 0 from r = k on.

    Args:
        score: [B] finite floats, higher is better.
        label: [B], clicked where > 0.
        groups: of the B rows.
        k: ranks that count.
    Returns:
        [groups with a click] float64.
    """
    rows = len(score)
    clicks = (label > 0).nonzero().squeeze(1)
    first_click = torch.full_like(groups.sizes, rows).scatter_reduce(0, groups.segment[clicks], clicks, "amin")
    rival_row = first_click[groups.segment]
    rival = score[rival_row.clamp(max=max(rows - 1, 0))]
    earlier = torch.arange(rows, device=score.device) < rival_row
    ahead = (score > rival) | ((score == rival) & earlier)
    rank = torch.zeros_like(groups.sizes).index_add_(0, groups.segment, ahead.long())[first_click < rows]
    return torch.where(rank < k, 1.0 / (rank + 1).double(), 0.0)


def average_precision_of_all(score: Tensor, label: Tensor, groups: Groups, k: int) -> Tensor:
    """What each click adds to the average precision at k of its group, all clicks counted.

    In a group of n clicks, one of rank r (as in `average_precision`), the c-th of them by rank, adds
    c / (r + 1) / min(n, k), and 0 from r = k on. Source: Kaggle's `apk`, github.com/benhamner/Metrics.

    Args:
        score: [B] finite floats, or their `rank_key`.    label, groups, k: as in `average_precision`.
    Returns:
        [clicks] float64.
    """
    key, order = torch.sort((groups.segment << 32) + (2**32 - 1 - rank_key(score)), stable=True)
    place = (label > 0)[order].nonzero().squeeze(1)
    segment = key[place] >> 32
    clicks = clicks_by_group(label, groups)
    rank = place - (groups.sizes.cumsum(0) - groups.sizes)[segment]
    number = torch.arange(1, len(place) + 1, device=place.device) - (clicks.cumsum(0) - clicks)[segment]
    return torch.where(rank < k, number.double() / ((rank + 1) * clicks[segment].clamp(max=k)), 0.0)


def clicks_by_group(label: Tensor, groups: Groups) -> Tensor:
    """[G] int64.    label: [B], clicked where > 0."""
    return torch.zeros_like(groups.sizes).index_add_(0, groups.segment, (label > 0).long())


def auc_by_group(score: Tensor, label: Tensor, groups: Groups) -> Tensor:
    """Exact area under the ROC curve inside each group, ties counted half: the Mann-Whitney statistic.

    Args:
        score: [B] finite floats, or their `rank_key`.
        label: [B], positive where > 0.
        groups: of the B rows.
    Returns:
        [G] float64, NaN where a group has only one class.
    """
    key, order = torch.sort((groups.segment << 32) + rank_key(score))
    positive = (label > 0)[order]
    starts_run = torch.ones_like(positive)  # a run: rows of one group with the same score
    starts_run[1:] = key[1:] != key[:-1]
    first = starts_run.nonzero().squeeze(1)
    segment = key[first] >> 32
    positives = _sum_runs(positive, first)
    negatives = torch.diff(first, append=first.new_tensor([len(positive)])) - positives

    zero = torch.zeros_like(groups.sizes)
    group_positives = zero.index_add(0, segment, positives)
    group_negatives = groups.sizes - group_positives
    below = negatives.cumsum(0) - negatives - (group_negatives.cumsum(0) - group_negatives)[segment]
    # Twice the count of rightly ordered pairs is a whole number, so the sum is exact.
    twice_pairs = zero.index_add(0, segment, positives * (2 * below + negatives))
    return twice_pairs.double() / (2 * group_positives * group_negatives).double()


def _sum_runs(flags: Tensor, first: Tensor) -> Tensor:
    """How many of `flags` [B] are set in each run; a run ends where the next one begins."""
    total = torch.zeros(len(flags) + 1, dtype=torch.int64, device=flags.device)
    torch.cumsum(flags, 0, out=total[1:])
    return torch.diff(total[first], append=total[-1:])


def rank_key(score: Tensor) -> Tensor:
    """[B] int64 in [0, 2^32), in the order of the finite scores, and equal where they are equal.

    Whole numbers, because torch sorts them several times faster than floats on a CPU. Keys are returned as they are.
    """
    if not score.is_floating_point():
        return score
    if score.dtype == torch.float64:
        return torch.unique(_ordered_bits(score, torch.int64, 63), return_inverse=True)[1]
    return _ordered_bits(score.float(), torch.int32, 31).long() + 2**31


def _ordered_bits(score: Tensor, dtype: torch.dtype, sign: int) -> Tensor:
    bits = (score + 0.0).view(dtype)  # + 0.0: the two zeros are equal
    return bits ^ ((bits >> sign) & (2**sign - 1))
