"""The best reachable scores: the planted probabilities scored on the clicks that were drawn from them."""

from typing import NamedTuple

import numpy as np

from preprocess.synthetic.clicks import MOST_ADS, Shown
from preprocess.synthetic.events import DAYS

BINS = 1 << 16  # of probability, for the AUC: on a set of any size within 1e-5 of the exact value
_HARMONIC = np.concatenate([[0.0], np.cumsum(1.0 / np.arange(1, MOST_ADS + 1))])


class ChunkScore(NamedTuple):
    day: np.ndarray  # [B] int8
    rank: np.ndarray  # [B] int8: place of the clicked ad when ordered by probability, from 1; ties in file order
    ads: np.ndarray  # [B] int8
    bin: np.ndarray  # [M] int32: bin of each row's probability
    clicked: np.ndarray  # [M] bool


def score_chunk(shown: Shown, day: np.ndarray) -> ChunkScore:
    """What the displays of a chunk add to a `Score`. day: [B] of each display."""
    display = np.arange(len(day))
    chosen = shown.probability[display, shown.clicked][:, None]
    tied_before = (shown.probability == chosen) & (np.arange(MOST_ADS) < shown.clicked[:, None])
    rank = 1 + ((shown.probability > chosen) | tied_before).sum(axis=1)
    clicked = np.arange(MOST_ADS) == shown.clicked[:, None]
    bins = np.minimum((shown.probability[shown.present] * BINS).astype(np.int32), BINS - 1)
    counts = shown.present.sum(axis=1)
    return ChunkScore(day.astype(np.int8), rank.astype(np.int8), counts.astype(np.int8), bins, clicked[shown.present])


class Score:
    """Counts by day, so chunks may come in any order. State: 15 days x 2 x BINS int64."""

    def __init__(self):
        self.displays = np.zeros(DAYS, np.int64)
        self.rows = np.zeros(DAYS, np.int64)
        self.by_rank = np.zeros((DAYS, MOST_ADS + 1), np.int64)  # displays by rank of the click
        self.by_size = np.zeros((DAYS, MOST_ADS + 1), np.int64)  # displays by number of ads
        self.bins = np.zeros((DAYS, 2, BINS), np.int64)

    def add(self, chunk: ChunkScore) -> None:
        day_of_row = np.repeat(chunk.day, chunk.ads)
        for day in np.unique(chunk.day):
            here, rows = chunk.day == day, day_of_row == day
            self.displays[day] += here.sum()
            self.rows[day] += rows.sum()
            self.by_rank[day] += np.bincount(chunk.rank[here], minlength=MOST_ADS + 1)
            self.by_size[day] += np.bincount(chunk.ads[here], minlength=MOST_ADS + 1)
            for label in (0, 1):
                self.bins[day, label] += np.bincount(chunk.bin[rows & (chunk.clicked == label)], minlength=BINS)

    def over(self, days) -> dict:
        """Scores over some of the days. MAP@12 with one click per display is the mean of 1 / rank of the click."""
        displays = int(self.displays[days].sum())
        reciprocal = 1.0 / np.maximum(np.arange(MOST_ADS + 1), 1)
        by_rank, by_size = self.by_rank[days].sum(axis=0), self.by_size[days].sum(axis=0)
        negative, positive = self.bins[days].sum(axis=0)
        below = np.cumsum(negative) - negative
        pairs = float(negative.sum()) * float(positive.sum())
        return {
            "displays": displays,
            "rows": int(self.rows[days].sum()),
            "map12": float((by_rank * reciprocal).sum() / displays),
            "auc": float((positive * (below + 0.5 * negative)).sum() / pairs),
            "random_map12": float((by_size * reciprocal * _HARMONIC).sum() / displays),
        }

    def summary(self) -> dict:
        days = np.flatnonzero(self.displays)
        return {**self.over(days), "by_day": [{"day": int(day), **self.over([day])} for day in days]}
