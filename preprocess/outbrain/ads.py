"""Features that depend on the ad alone, computed once an ad instead of once a row."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from preprocess.csv_io import NULL_INT
from preprocess.outbrain import layout
from preprocess.outbrain.columns import Promoted
from preprocess.outbrain.flavour import Flavour
from preprocess.outbrain.lookup import Lookup, with_null
from preprocess.outbrain.statistics import Statistics

CATEGORICAL = ("ad_id", "document_id_promo", "campaign_id", "advertiser_id", "source_id_promo", "publisher_id_promo")
NUMERIC = tuple(f"{key}_ctr" for key in layout.CTR_MIN_ROWS) + tuple(f"{key}_count" for key in layout.COUNT_KEYS)


@dataclass(frozen=True)
class Ads:
    """Every ad that is promoted or clicked on. A columns, plus one for ads met in neither place.

    Args:
        document: [A + 1] int32 landing page, -1 = null.
        published: [A + 1] int64 ms.
        buckets: [6, A + 1] int32, the features of `CATEGORICAL`, -1 = null.
        numeric: [8, A + 1] float32, the features of `NUMERIC`.
    """

    lookup: Lookup
    document: Any
    published: Any
    buckets: Any
    numeric: Any

    @classmethod
    def build(
        cls, seen: np.ndarray, promoted: Promoted, statistics: Statistics, flavour: Flavour, buckets: dict[str, int]
    ) -> "Ads":
        """seen: [n] int32, ads of the clicks; buckets: feature name -> number of buckets."""
        ids = np.union1d(seen, promoted.ad_id[:-1]).astype(np.int32)
        row = with_null(promoted.lookup.find(ids), -1)
        ids = with_null(ids, NULL_INT)
        raw = {name: ids if name == "ad_id" else getattr(promoted, name)[row] for name in CATEGORICAL}
        numeric = [statistics.ctr(key, raw[key]) for key in layout.CTR_MIN_ROWS]
        numeric += [statistics.count(key, raw[key]) for key in layout.COUNT_KEYS]
        return cls(
            Lookup.build(ids[:-1]),
            raw["document_id_promo"],
            promoted.published[row],
            np.stack([flavour.ids(raw[name], buckets[name]) for name in CATEGORICAL]),
            np.stack(numeric),
        )
