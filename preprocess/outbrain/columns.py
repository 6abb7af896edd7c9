"""The tables of the data set, and counts by ad, as columns: what the other modules hand each other."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from preprocess.outbrain.lookup import Lookup

_SLOTS_A_ROW = 4  # ads are counted in an array by id while that is no larger than this times what is counted


@dataclass(frozen=True)
class Events:
    """Displays: page, time, device, place. All columns [rows + 1], the last element null.

    Args:
        document: int32, -1 = null.
        timestamp: int64 ms since the origin, -1 = null.
        platform: uint8, 0 to 3, null counted as 0.
        geo: int32 row of `Geo`, -1 = null.
        train: bool, whether the rows of the display are for training.
    """

    lookup: Lookup
    document: Any
    timestamp: Any
    platform: Any
    geo: Any
    train: Any


@dataclass(frozen=True)
class Geo:
    """Buckets of each distinct geo_location, its country and its state: [values + 1] int32, -1 = null."""

    geo_location: Any
    geo_location_country: Any
    geo_location_state: Any


@dataclass(frozen=True)
class Documents:
    """Pages: [rows + 1]. source, publisher: int32 raw, -1 = null; *_bucket: int32, -1 = null; published: int64 ms."""

    lookup: Lookup
    source: Any
    publisher: Any
    source_bucket: Any
    publisher_bucket: Any
    published: Any


@dataclass(frozen=True)
class Promoted:
    """Ads of promoted_content.csv with their page's columns: [rows + 1] int32, -1 = null; published int64 ms."""

    lookup: Lookup
    ad_id: Any
    document_id_promo: Any
    campaign_id: Any
    advertiser_id: Any
    source_id_promo: Any
    publisher_id_promo: Any
    published: Any


@dataclass(frozen=True)
class AdCounts:
    """ad [n] int32 ascending and distinct; rows, train_rows, train_clicks [n] int64."""

    ad: np.ndarray
    rows: np.ndarray
    train_rows: np.ndarray
    train_clicks: np.ndarray

    @classmethod
    def merge(cls, parts: Iterable["AdCounts"]) -> "AdCounts":
        """Sums, independent of how rows were cut into parts."""
        parts = list(parts)
        names = ("rows", "train_rows", "train_clicks")
        largest = max((int(p.ad[-1]) for p in parts if len(p.ad)), default=-1)
        if largest <= _SLOTS_A_ROW * sum(len(p.ad) for p in parts):
            sums = np.zeros((len(names), largest + 1), np.int64)
            for part in parts:
                for total, name in zip(sums, names):
                    total[part.ad] += getattr(part, name)
            ad = np.flatnonzero(sums[0]).astype(np.int32)
            return cls(ad, *sums[:, ad])
        ad, at = np.unique(np.concatenate([p.ad for p in parts]), return_inverse=True)
        sums = np.zeros((len(names), len(ad)), np.int64)
        for total, name in zip(sums, names):
            np.add.at(total, at, np.concatenate([getattr(p, name) for p in parts]))
        return cls(ad, *sums)


def count_ads(ad: np.ndarray, train: np.ndarray, clicked: np.ndarray) -> AdCounts:
    """[n] int32 ids, [n] bool, [n] 0/1 -> counts by ad."""
    largest = int(ad.max()) if len(ad) else 0
    if largest <= _SLOTS_A_ROW * len(ad):
        ids, at = None, ad
    else:
        ids, at = np.unique(ad, return_inverse=True)
    # One pass counts all three: rows of the test side, rows of train without a click, and with one.
    kind = at.astype(np.int64) * 3 + train * (np.int64(1) + clicked)
    counts = np.bincount(kind, minlength=3 * (int(at.max()) + 1 if len(ad) else 0)).reshape(-1, 3)
    rows = counts.sum(axis=1)
    if ids is None:
        ids = np.nonzero(rows)[0].astype(ad.dtype)
        counts, rows = counts[ids], rows[ids]
    return AdCounts(ids, rows, counts[:, 1] + counts[:, 2], counts[:, 2])
