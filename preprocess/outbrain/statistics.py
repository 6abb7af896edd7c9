"""What is learned from the clicks: rows and clicks by key, and what each flavour adds; saved to be applied again."""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from preprocess.outbrain import layout
from preprocess.outbrain.columns import AdCounts, Promoted
from preprocess.outbrain.lookup import Lookup, with_null
from widedeep.errors import InputError
from widedeep.feature_spec import STATISTICS

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
class Statistics(ABC):
    """What every flavour learns; its own class adds the rest, and the formulas.

    Args:
        train_rows: number of rows learned from.
        keys: by key of `layout.CTR_MIN_ROWS`.
    """

    flavour: ClassVar[str]
    min_rows: ClassVar[Mapping[str, int]]  # train rows below which a key has no click rate

    train_rows: int
    keys: dict[str, KeyCounts]

    @classmethod
    @abstractmethod
    def learn(cls, ads: AdCounts, ages: np.ndarray, promoted: Promoted, places: Mapping[str, dict[str, int]]) -> Self:
        """ads, ages: of all clicks, see `clicks.Scan`; places: as `Flavour.geo` gave them."""

    @abstractmethod
    def ctr(self, name: str, values: np.ndarray) -> np.ndarray:
        """[m] int32 keys -> [m] float32: the click rate, 0 where the key has too few rows."""

    @abstractmethod
    def count(self, name: str, values: np.ndarray) -> np.ndarray:
        """[m] int32 keys -> [m] float32: the scaled number of rows."""

    @abstractmethod
    def age(self, name: str) -> np.ndarray:
        """[3652] float32: the scaled value of each number of days; the last one is that of unknown ages."""

    @abstractmethod
    def plain(self) -> dict[str, Any]:
        """What the class adds, as JSON has it."""

    @classmethod
    @abstractmethod
    def from_plain(cls, train_rows: int, keys: dict[str, KeyCounts], plain: dict[str, Any]) -> Self:
        """From what `plain` gave. Raises ValueError, KeyError or TypeError where it is something else."""

    @staticmethod
    def count_keys(ads: AdCounts, promoted: Promoted) -> dict[str, KeyCounts]:
        """Every key is a function of the ad, so counts by ad give counts by any key without another pass."""
        row = promoted.lookup.find(ads.ad)
        keys = {}
        for name in layout.CTR_MIN_ROWS:
            values = ads.ad if name == "ad_id" else getattr(promoted, name)[row]
            keys[name] = KeyCounts.group(values, ads.train_rows, ads.train_clicks)
        return keys

    def frequent(self, name: str, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[m] int32 keys -> rows and clicks [m] int64, 0 where the key has fewer than `min_rows` rows."""
        rows, clicks = self.keys[name].of(values)
        enough = rows >= self.min_rows[name]
        return rows * enough, clicks * enough

    def save(self, directory: Path) -> None:
        directory.mkdir()
        plain = {"version": VERSION, "flavour": self.flavour, "train_rows": self.train_rows, **self.plain()}
        plain["ctr_min_rows"] = self.min_rows
        (directory / _JSON).write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
        arrays = {f"{n}.{c}": getattr(k, c) for n, k in self.keys.items() for c in ("value", "rows", "clicks")}
        np.savez(directory / _ARRAYS, **arrays)

    @classmethod
    def load(cls, directory: str | Path) -> Self:
        """Raises:
        InputError: the directory does not hold statistics of this flavour and version.
        """
        directory = Path(directory)
        if (directory / STATISTICS / _JSON).is_file():
            directory = directory / STATISTICS
        try:
            plain = json.loads((directory / _JSON).read_text(encoding="utf-8"))
            if "version" not in plain:
                raise ValueError(f"a {_JSON} without a version, as preprocess tabular writes it")
            if (plain["version"], plain["flavour"]) != (VERSION, cls.flavour):
                raise ValueError(f"version {plain['version']}, flavour {plain['flavour']}")
            with np.load(directory / _ARRAYS) as arrays:
                keys = {
                    n: KeyCounts(*(arrays[f"{n}.{c}"] for c in ("value", "rows", "clicks")))
                    for n in layout.CTR_MIN_ROWS
                }
            return cls.from_plain(int(plain["train_rows"]), keys, plain)
        except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
            why = error.strerror.lower() if isinstance(error, OSError) and error.strerror else error
            if isinstance(error, KeyError):
                why = f"files without {str(error.args[0]).removesuffix(' is not a file in the archive')!r}"
            raise InputError(
                f"{directory}: expected {_JSON} and {_ARRAYS} of an earlier run (version {VERSION}, flavour"
                f" {cls.flavour}), got {why}"
            ) from error
