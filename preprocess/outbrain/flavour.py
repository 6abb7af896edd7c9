"""What a flavour decides: rows, ids and formulas in which the original's pipelines differ. All else is common.

Features bear the names of the Oct-2022 release throughout; `Flavour.names` has those of the data set that is written.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import numpy as np

from preprocess.csv_io import Strings
from preprocess.outbrain.columns import Documents, Geo
from preprocess.outbrain.statistics import Statistics


class Flavour(ABC):
    """One object each, without state, so that tasks can carry it to other processes.

    Attributes:
        name: as in `--flavour`.
        statistics: what is learned from the clicks, and the formulas that use it.
        names: our name of a column -> its name in the data set, where they differ.
        spec, multihot_spec: the shipped feature specs; None where the flavour has no multi-hot features.
        ages_of_all_rows: whether ages are counted over test rows too.
    """

    name: str
    statistics: type[Statistics]
    names: Mapping[str, str] = {}
    spec: str
    multihot_spec: str | None = None
    ages_of_all_rows = False

    @abstractmethod
    def clear_events(self, table: dict[str, Any]) -> None:
        """Makes the columns of events that count for nothing null, in place. table: `layout.EVENTS`."""

    @abstractmethod
    def geo(
        self, places: Strings, given: Statistics | None, buckets: Mapping[str, int]
    ) -> tuple[Geo, dict[str, dict[str, int]]]:
        """The ids of each distinct geo_location, and what the statistics must know of the places.

        places: geo_location by event; given: statistics to apply instead.
        """

    @abstractmethod
    def clean_documents(self, table: dict[str, np.ndarray]) -> None:
        """Settles what documents lack, in place. table: `layout.META`, with the nulls of `csv_io`."""

    @abstractmethod
    def idf(self, documents: Documents) -> Callable[[np.ndarray, int], np.ndarray]:
        """The weight of attributes: (documents that have each [A] int64, largest document id + 1) -> [A] float64."""

    @abstractmethod
    def is_train(self, display: np.ndarray, timestamp: np.ndarray, seed: int) -> np.ndarray:
        """[n] displays, [n] int64 ms since the origin (-1 = no event or no time) -> [n] bool. Without a time the
        display does not matter."""

    @abstractmethod
    def ids(self, values: Any, buckets: int, xp: ModuleType = np) -> Any:
        """[n] raw ids, -1 for null -> [n] int32 in [0, buckets), -1 for null."""

    @abstractmethod
    def null_id(self, name: str, buckets: int) -> int:
        """The id of a null of feature `name`."""
