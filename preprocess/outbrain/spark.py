"""Flavour `spark`: the CPU pipeline of the Feb-2021 release. Ids modulo buckets, places as the number of their events,
log counts and ages scaled to [0, 1], a double logarithm in the similarities; what is missing becomes 0.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import Any, ClassVar

import numpy as np

from preprocess import hashing
from preprocess.csv_io import NULL_INT, NULL_TIME, Strings
from preprocess.outbrain import layout
from preprocess.outbrain.clicks import MISSING_AGE
from preprocess.outbrain.columns import AdCounts, Documents, Geo, Promoted
from preprocess.outbrain.flavour import Flavour
from preprocess.outbrain.lookup import fresh_publishers, with_null
from preprocess.outbrain.statistics import KeyCounts, Statistics

REGULARISATION = 0  # rows added to those of a key, in the denominator of its click rate
MIN_EVENTS = 10  # a place of fewer events has no number
RARE_PLACE = -1
LAST_TEST_DAY = 12


@dataclass(frozen=True)
class SparkStatistics(Statistics):
    """Args:
    low, high: of log2(1 + x) over all rows, those of the test set too, by key of `layout.COUNT_KEYS` and by feature
        of `layout.AGES`.
    places: events by text of each geo feature, of the texts with at least `MIN_EVENTS`.
    """

    flavour: ClassVar[str] = "spark"
    # More rows than in the other flavour, where as many are enough.
    min_rows: ClassVar[Mapping[str, int]] = {key: rows + 1 for key, rows in layout.CTR_MIN_ROWS.items()}

    low: dict[str, float]
    high: dict[str, float]
    places: dict[str, dict[str, int]]

    @classmethod
    def learn(
        cls, ads: AdCounts, ages: np.ndarray, promoted: Promoted, places: Mapping[str, dict[str, int]]
    ) -> "SparkStatistics":
        counted = cls(int(ads.train_rows.sum()), cls.count_keys(ads, promoted), {}, {}, dict(places))
        row = promoted.lookup.find(ads.ad)
        key = {"ad_id": ads.ad, "document_id_promo": promoted.document_id_promo[row]}
        values = {name: counted.frequent(name, key[name])[0] for name in layout.COUNT_KEYS}
        for name, histogram in zip(layout.AGES, ages):
            days = np.flatnonzero(histogram)
            values[name] = np.where(days == MISSING_AGE, 0, days)
        low, high = ({name: float(np.log2(1.0 + end(of))) for name, of in values.items()} for end in (np.min, np.max))
        return replace(counted, low=low, high=high)

    def ctr(self, name: str, values: np.ndarray) -> np.ndarray:
        """clicks / (rows + `REGULARISATION`)."""
        rows, clicks = self.frequent(name, values)
        return (clicks / np.maximum(rows + REGULARISATION, 1)).astype(np.float32)

    def count(self, name: str, values: np.ndarray) -> np.ndarray:
        """log2(1 + rows), min-max; a key without a click rate has no rows."""
        return self._scaled(name, self.frequent(name, values)[0])

    def age(self, name: str) -> np.ndarray:
        """log2(1 + days), min-max; unknown ages are 0 days."""
        return self._scaled(name, np.append(np.arange(MISSING_AGE), 0))

    def plain(self) -> dict[str, Any]:
        return {"log2_min": self.low, "log2_max": self.high, "places": self.places}

    @classmethod
    def from_plain(cls, train_rows: int, keys: dict[str, KeyCounts], plain: dict[str, Any]) -> "SparkStatistics":
        low, high = (
            {name: float(plain[part][name]) for name in (*layout.COUNT_KEYS, *layout.AGES)}
            for part in ("log2_min", "log2_max")
        )
        places = {name: {text: int(n) for text, n in dict(plain["places"][name]).items()} for name in layout.GEO}
        return cls(train_rows, keys, low, high, places)

    def _scaled(self, name: str, x: np.ndarray) -> np.ndarray:
        """(log2(1 + x) - low) / (high - low) in float32; 0 where all values are one."""
        span = self.high[name] - self.low[name]
        return ((np.log2(1.0 + x) - self.low[name]) / span if span else np.zeros(len(x))).astype(np.float32)


class Spark(Flavour):
    name = "spark"
    statistics = SparkStatistics
    spec = "outbrain-spark"
    names = layout.FEB_2021_NAMES
    ages_of_all_rows = True

    def clear_events(self, table: dict[str, Any]) -> None:
        """The original drops events without a place or a platform before it joins."""
        codes = table["geo_location"].codes
        dropped = (codes < 0) | (table["platform"] < 0)
        for column in (codes, table["platform"], table["document_id"], table["timestamp"]):
            column[dropped] = NULL_INT

    def geo(
        self, places: Strings, given: Statistics | None, buckets: Mapping[str, int]
    ) -> tuple[Geo, dict[str, dict[str, int]]]:
        """The value of a place, country or state is the number of its events, -1 if they are few, then the modulo."""
        values = places.values.to_pylist()
        trimmed = [value.strip(" ") for value in values]
        texts = dict(zip(layout.GEO, (values, [t[:2] for t in trimmed], [t[:5] for t in trimmed])))
        if given is None:
            events = np.bincount(places.codes[places.codes >= 0], minlength=len(values)).tolist()
            counts = {name: _frequent(of, events) for name, of in texts.items()}
        else:
            assert isinstance(given, SparkStatistics)  # as every flavour loads its own
            counts = given.places
        ids = {}
        for name, of in texts.items():
            numbers = np.array([counts[name].get(text, RARE_PLACE) for text in of], np.int64)
            ids[name] = with_null((numbers % buckets[name]).astype(np.int32), NULL_INT)
        return Geo(**ids), counts

    def clean_documents(self, table: dict[str, np.ndarray]) -> None:
        """Documents without a source are dropped. The documents of a source that lack a publisher get one together:
        the largest publisher + 1 + their source's place among the sources with such documents, from 0."""
        source, publisher = table["source_id"], table["publisher_id"]
        dropped = source < 0
        publisher[dropped] = NULL_INT
        table["publish_time"][dropped] = NULL_TIME
        missing = (publisher < 0) & ~dropped
        if missing.any():
            place = np.unique(source[missing], return_inverse=True)[1]
            publisher[missing] = fresh_publishers(publisher, place)

    def idf(self, documents: Documents) -> Callable[[np.ndarray, int], np.ndarray]:
        return partial(double_log_idf, int((documents.source >= 0).sum()))

    def is_train(self, display: np.ndarray, timestamp: np.ndarray, seed: int) -> np.ndarray:
        """Tested on are days 11 and 12, and of the days before the fifth of all displays that a hash selects. A row
        without an event or time has no day, so it is trained on, as are later days."""
        day = timestamp // layout.MILLISECONDS_A_DAY
        held_out = (day > layout.LAST_SHARED_DAY) | hashing.is_selected(display, layout.TEST_FRACTION, seed)
        return ~held_out | (timestamp < 0) | (day > LAST_TEST_DAY)

    def ids(self, values: Any, buckets: int, xp: ModuleType = np) -> Any:
        return xp.where(values < 0, xp.int32(NULL_INT), values % xp.int32(buckets))

    def null_id(self, name: str, buckets: int) -> int:
        """0; but the original makes a landing page's missing source -1 before the modulo."""
        return buckets - 1 if name == "source_id_promo" else 0


def double_log_idf(documents: int, df: np.ndarray, height: int) -> np.ndarray:
    """ln(ln(documents / df)), [A] float64; 0 where that is not defined, of an attribute that all documents have.

    Args:
        documents: those with a source.
        df: [A] int64 >= 1, documents that have each attribute.
        height: not used.
    """
    ratio = documents / df
    defined = ratio > 1
    return np.where(defined, np.log(np.log(np.where(defined, ratio, 2.0))), 0.0)


def _frequent(texts: list[str], events: list[int]) -> dict[str, int]:
    """Events by text, without the texts of few."""
    counts: Counter[str] = Counter()
    for text, n in zip(texts, events):
        counts[text] += n
    return {text: n for text, n in counts.items() if n >= MIN_EVENTS}
