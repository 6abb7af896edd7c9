"""Flavour `nvtabular`: the original's GPU pipeline. Hashed ids, standardised counts, medians for unknown ages."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

import numpy as np

from preprocess import hashing
from preprocess.csv_io import NULL_INT, Strings
from preprocess.outbrain import layout
from preprocess.outbrain.clicks import MISSING_AGE
from preprocess.outbrain.columns import AdCounts, Documents, Geo, Promoted
from preprocess.outbrain.flavour import Flavour
from preprocess.outbrain.lookup import fresh_publishers, with_null
from preprocess.outbrain.similarity import natural_idf
from preprocess.outbrain.statistics import KeyCounts, Statistics


@dataclass(frozen=True)
class NvtabularStatistics(Statistics):
    """Args:
    median_age: days, by feature of `layout.AGES`.
    mean, std: of ln(1 + count) over train rows, by key of `layout.COUNT_KEYS`; std with n - 1, 0 for a constant.
    """

    flavour: ClassVar[str] = "nvtabular"
    min_rows: ClassVar[Mapping[str, int]] = layout.CTR_MIN_ROWS

    median_age: dict[str, float]
    mean: dict[str, float]
    std: dict[str, float]

    @classmethod
    def learn(
        cls, ads: AdCounts, ages: np.ndarray, promoted: Promoted, places: Mapping[str, dict[str, int]]
    ) -> "NvtabularStatistics":
        keys = cls.count_keys(ads, promoted)
        train_rows = int(ads.train_rows.sum())
        scales = {name: _scale(keys[name].rows, train_rows) for name in layout.COUNT_KEYS}
        return cls(
            train_rows,
            keys,
            {name: _median(age[:MISSING_AGE]) for name, age in zip(layout.AGES, ages)},
            {name: mean for name, (mean, _) in scales.items()},
            {name: std for name, (_, std) in scales.items()},
        )

    def ctr(self, name: str, values: np.ndarray) -> np.ndarray:
        """clicks / rows, in float32."""
        rows, clicks = self.frequent(name, values)
        return clicks.astype(np.float32) / np.maximum(rows, 1).astype(np.float32)

    def count(self, name: str, values: np.ndarray) -> np.ndarray:
        """(ln(1 + rows) - mean) / std; only centred if std is 0."""
        logs = _log_count(self.keys[name].of(values)[0]).astype(np.float64)
        return ((logs - self.mean[name]) / (self.std[name] or 1.0)).astype(np.float32)

    def age(self, name: str) -> np.ndarray:
        """ln(1 + days); unknown ages are the median."""
        days = np.append(np.arange(MISSING_AGE, dtype=np.float32), np.float32(self.median_age[name]))
        return np.log1p(days)

    def plain(self) -> dict[str, Any]:
        return {
            "median_age": self.median_age,
            "count_mean": self.mean,
            "count_std": self.std,
            "hash": {"ids": "mix64", "strings": "xxh3_64", "seed": hashing.SEED, "null": hashing.NULL},
        }

    @classmethod
    def from_plain(cls, train_rows: int, keys: dict[str, KeyCounts], plain: dict[str, Any]) -> "NvtabularStatistics":
        ages = {name: float(plain["median_age"][name]) for name in layout.AGES}
        mean, std = (
            {name: float(plain[part][name]) for name in layout.COUNT_KEYS} for part in ("count_mean", "count_std")
        )
        return cls(train_rows, keys, ages, mean, std)


class Nvtabular(Flavour):
    name = "nvtabular"
    statistics = NvtabularStatistics
    spec = "outbrain"
    multihot_spec = "outbrain-multihot"

    def clear_events(self, table: dict[str, Any]) -> None:
        """Every event counts."""

    def geo(
        self, places: Strings, given: Statistics | None, buckets: Mapping[str, int]
    ) -> tuple[Geo, dict[str, dict[str, int]]]:
        """Place, country and state are hashed; they need no statistics."""
        values = places.values.to_pylist()
        texts = dict(zip(layout.GEO, (values, [v[:2] for v in values], [v[:5] for v in values])))
        return Geo(**{k: with_null(hashing.string_buckets(v, buckets[k]), NULL_INT) for k, v in texts.items()}), {}

    def clean_documents(self, table: dict[str, np.ndarray]) -> None:
        """A null publisher becomes an id of its own: the largest publisher + 1 + the nulls so far, itself included."""
        publisher = table["publisher_id"]
        missing = publisher < 0
        if missing.any():
            publisher[missing] = fresh_publishers(publisher, np.arange(1, 1 + np.count_nonzero(missing)))

    def idf(self, documents: Documents) -> Callable[[np.ndarray, int], np.ndarray]:
        return natural_idf

    def is_train(self, display: np.ndarray, timestamp: np.ndarray, seed: int) -> np.ndarray:
        """day <= 10 and not among the fifth of all displays that a hash selects. A row without an event or time has no
        day, so it is tested on."""
        early = (timestamp >= 0) & (timestamp // layout.MILLISECONDS_A_DAY <= layout.LAST_SHARED_DAY)
        return early & ~hashing.is_selected(display, layout.TEST_FRACTION, seed)

    def ids(self, values: Any, buckets: int, xp: ModuleType = np) -> Any:
        return hashing.buckets_or_null(values, buckets, xp)

    def null_id(self, name: str, buckets: int) -> int:
        """A null hashes as -1, which no id has."""
        return hashing.null_bucket(buckets)


def _log_count(rows: np.ndarray) -> np.ndarray:
    """ln(1 + rows) in float32."""
    return np.log1p(rows.astype(np.float32))


def _scale(rows: np.ndarray, train_rows: int) -> tuple[float, float]:
    """Mean and std over train rows: a key of r rows gives r equal values; rows without a key have count 0."""
    weights = np.append(rows, train_rows - rows.sum())
    values = _log_count(np.append(rows, 0)).astype(np.float64)[weights > 0]
    weights = weights[weights > 0]
    if not len(values):
        return 0.0, 0.0
    mean = float((weights * values).sum() / train_rows)
    if values.min() == values.max():
        return mean, 0.0
    return mean, float(np.sqrt((weights * (values - mean) ** 2).sum() / (train_rows - 1)))


def _median(histogram: np.ndarray) -> float:
    """Of the values 0, 1, ... that occur histogram[value] times; the mean of the middle two; 0 if there are none."""
    n = int(histogram.sum())
    if n == 0:
        return 0.0
    ends = np.cumsum(histogram)
    middle = np.searchsorted(ends, [(n - 1) // 2, n // 2], side="right")
    return float(middle.sum() / 2)
