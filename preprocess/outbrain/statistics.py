"""What is learned from train rows: counts and clicks by key, scales of the counts, median ages."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from preprocess import hashing
from preprocess.outbrain import layout
from preprocess.outbrain.clicks import MISSING_AGE, AdCounts
from preprocess.outbrain.lookup import Lookup, with_null
from preprocess.outbrain.tables import Promoted
from widedeep.errors import InputError

VERSION = 1
_JSON, _ARRAYS = "statistics.json", "keys.npz"


@dataclass(frozen=True)
class KeyCounts:
    """value [n] int32 ascending, each seen in train; rows, clicks [n] int64 of train."""

    value: np.ndarray
    rows: np.ndarray
    clicks: np.ndarray

    @classmethod
    def group(cls, values: np.ndarray, rows: np.ndarray, clicks: np.ndarray) -> "KeyCounts":
        """Sums by value; nulls (-1) and values without a train row are left out."""
        seen = (values >= 0) & (rows > 0)
        value, at = np.unique(values[seen], return_inverse=True)
        sums = np.zeros((2, len(value)), np.int64)
        np.add.at(sums[0], at, rows[seen])
        np.add.at(sums[1], at, clicks[seen])
        return cls(value.astype(np.int32), *sums)

    def of(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[m] int32 -> rows and clicks [m] int64, 0 for unknown values and nulls."""
        row = Lookup.build(self.value).find(values)
        return with_null(self.rows, 0)[row], with_null(self.clicks, 0)[row]


@dataclass(frozen=True)
class Statistics:
    """Args:
    train_rows: number of rows learned from.
    median_age: days, by feature of `layout.AGES`.
    mean, std: of ln(1 + count) over train rows, by key of `layout.COUNT_KEYS`; std with n - 1, 0 for a constant.
    keys: by key of `layout.CTR_MIN_ROWS`.
    """

    train_rows: int
    median_age: dict[str, float]
    mean: dict[str, float]
    std: dict[str, float]
    keys: dict[str, KeyCounts]

    @classmethod
    def learn(cls, ads: AdCounts, ages: np.ndarray, promoted: Promoted) -> "Statistics":
        """Every key is a function of the ad, so counts by ad give counts by any key without another pass."""
        row = promoted.lookup.find(ads.ad)
        keys = {}
        for name in layout.CTR_MIN_ROWS:
            values = ads.ad if name == "ad_id" else getattr(promoted, name)[row]
            keys[name] = KeyCounts.group(values, ads.train_rows, ads.train_clicks)
        train_rows = int(ads.train_rows.sum())
        scales = {name: _scale(keys[name].rows, train_rows) for name in layout.COUNT_KEYS}
        return cls(
            train_rows,
            {name: _median(age[:MISSING_AGE]) for name, age in zip(layout.AGES, ages)},
            {name: mean for name, (mean, _) in scales.items()},
            {name: std for name, (_, std) in scales.items()},
            keys,
        )

    def ctr(self, name: str, values: np.ndarray) -> np.ndarray:
        """[m] int32 keys -> [m] float32: clicks / rows if there are enough rows, else 0."""
        rows, clicks = self.keys[name].of(values)
        rate = clicks.astype(np.float32) / np.maximum(rows, 1).astype(np.float32)
        return np.where(rows >= layout.CTR_MIN_ROWS[name], rate, np.float32(0))

    def scaled_count(self, name: str, values: np.ndarray) -> np.ndarray:
        """[m] int32 keys -> [m] float32: (ln(1 + rows) - mean) / std; only centred if std is 0."""
        logs = log_count(self.keys[name].of(values)[0]).astype(np.float64)
        return ((logs - self.mean[name]) / (self.std[name] or 1.0)).astype(np.float32)

    def save(self, directory: Path) -> None:
        directory.mkdir()
        plain = {
            "version": VERSION,
            "flavour": "nvtabular",
            "train_rows": self.train_rows,
            "median_age": self.median_age,
            "count_mean": self.mean,
            "count_std": self.std,
            "ctr_min_rows": layout.CTR_MIN_ROWS,
            "hash": {"ids": "mix64", "strings": "xxh3_64", "seed": hashing.SEED, "null": hashing.NULL},
        }
        (directory / _JSON).write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
        arrays = {f"{n}.{c}": getattr(k, c) for n, k in self.keys.items() for c in ("value", "rows", "clicks")}
        np.savez(directory / _ARRAYS, **arrays)

    @classmethod
    def load(cls, directory: str | Path) -> "Statistics":
        """Raises:
        InputError: the directory does not hold statistics of this flavour and version.
        """
        directory = Path(directory)
        if (directory / "statistics" / _JSON).is_file():
            directory = directory / "statistics"
        try:
            plain = json.loads((directory / _JSON).read_text(encoding="utf-8"))
            with np.load(directory / _ARRAYS) as arrays:
                keys = {
                    n: KeyCounts(*(arrays[f"{n}.{c}"] for c in ("value", "rows", "clicks")))
                    for n in layout.CTR_MIN_ROWS
                }
            if (plain["version"], plain["flavour"]) != (VERSION, "nvtabular"):
                raise ValueError(f"version {plain['version']}, flavour {plain['flavour']}")
            ages = {name: float(plain["median_age"][name]) for name in layout.AGES}
            mean, std = (
                {name: float(plain[part][name]) for name in layout.COUNT_KEYS} for part in ("count_mean", "count_std")
            )
            return cls(int(plain["train_rows"]), ages, mean, std, keys)
        except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
            raise InputError(
                f"{directory}: expected {_JSON} and {_ARRAYS} of an earlier run (version {VERSION}), got {error}"
            ) from error


def log_count(rows: np.ndarray) -> np.ndarray:
    """ln(1 + rows) in float32."""
    return np.log1p(rows.astype(np.float32))


def _scale(rows: np.ndarray, train_rows: int) -> tuple[float, float]:
    """Mean and std over train rows: a key of r rows gives r equal values; rows without a key have count 0."""
    weights = np.append(rows, train_rows - rows.sum())
    values = log_count(np.append(rows, 0)).astype(np.float64)[weights > 0]
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
