"""Pass 2: rows (display, ad, clicked) to the features, the label and the group."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from preprocess import kernels
from preprocess.outbrain import ads, layout, store
from preprocess.outbrain.clicks import Scan, age_in_days
from preprocess.outbrain.columns import Documents, Events, Geo
from preprocess.outbrain.flavour import Flavour
from preprocess.outbrain.lists import Lists
from preprocess.outbrain.similarity import Attributes
from preprocess.outbrain.statistics import Statistics
from preprocess.xp import arrays, take, to_host_all


@dataclass(frozen=True)
class Ages:
    """scaled: [2, 3652] float32, by age feature and days; the last column is that of unknown ages."""

    scaled: Any

    @classmethod
    def build(cls, statistics: Statistics) -> "Ages":
        return cls(np.stack([statistics.age(name) for name in layout.AGES]))


@dataclass(frozen=True)
class Task:
    """Rows [start, stop) of a file of rows; `buckets`: (feature, cardinality) pairs; `grouped`: give display_id too."""

    path: Path
    start: int
    stop: int
    work: Path
    flavour: Flavour
    buckets: tuple[tuple[str, int], ...]
    grouped: bool
    device: str


@dataclass(frozen=True)
class Tables:
    """Everything a chunk is joined with."""

    events: Events
    geo: Geo
    documents: Documents
    ads: ads.Ads
    ages: Ages
    attributes: dict[str, Attributes]
    lists: dict[str, Lists]

    @classmethod
    def load(cls, work: Path, device: str, multihot: bool) -> "Tables":
        """multihot: the lists too; without, `lists` is empty."""
        kinds = {"events": Events, "geo": Geo, "documents": Documents, "ads": ads.Ads, "ages": Ages}
        return cls(
            **{name: store.load(work, name, kind, device) for name, kind in kinds.items()},
            attributes={kind: store.load(work, kind, Attributes, device) for kind in layout.ATTRIBUTES},
            lists={kind: store.load(work, layout.LISTS[kind], Lists, device) for kind in layout.LISTS if multihot},
        )


def tasks(scan: Scan, split: str, chunk_rows: int, **common: Any) -> Iterator[Task]:
    """The rows of a split, in order, in chunks of at most `chunk_rows`."""
    for part in scan.parts[split]:
        for start in range(0, part.rows, chunk_rows):
            yield Task(path=part.path, start=start, stop=min(start + chunk_rows, part.rows), **common)


def run(task: Task) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """The columns of a chunk on the host, and its number of nulls by categorical feature or age; data set's names."""
    rows = np.load(task.path, mmap_mode="r")[task.start : task.stop]
    buckets = dict(task.buckets)
    multihot = not buckets.keys().isdisjoint(layout.LISTS.values())
    with arrays(task.device) as xp:
        tables = Tables.load(task.work, task.device, multihot)
        display, ad = (xp.asarray(np.ascontiguousarray(rows[name])) for name in ("display_id", "ad_id"))
        columns, nulls = features(display, ad, tables, task.flavour, buckets, xp)
        host = to_host_all({**columns, **{(name, "nulls"): count for name, count in nulls.items()}}, xp)
    columns, nulls = ({key: host[key] for key in columns}, {name: int(host[name, "nulls"]) for name in nulls})
    columns["clicked"] = np.ascontiguousarray(rows["clicked"])
    if task.grouped:
        columns["display_id"] = rows["display_id"].astype(np.int64)
    names = task.flavour.names
    columns, nulls = ({names.get(name, name): of for name, of in part.items()} for part in (columns, nulls))
    return columns, nulls


def features(
    display: Any, ad: Any, tables: Tables, flavour: Flavour, buckets: dict[str, int], xp: ModuleType = np
) -> tuple[dict[str, Any], dict[str, Any]]:
    """display, ad: [n] int32 -> {feature: [n]}, categoricals unsigned and numerics float32, and {feature: nulls}.

    Multi-hot features are [n, 3] signed, -1 = padding; empty lists count as nulls.
    """
    event = tables.events.lookup.find(display, xp)
    document, timestamp, place = (take(getattr(tables.events, c), event, xp) for c in ("document", "timestamp", "geo"))
    page = tables.documents.lookup.find(document, xp)
    row = tables.ads.lookup.find(ad, xp)
    landing = take(tables.ads.document, row, xp)

    ids = {name: take(getattr(tables.geo, name), place, xp) for name in layout.GEO}
    ids["document_id"] = flavour.ids(document, buckets["document_id"], xp)
    ids["source_id"] = take(tables.documents.source_bucket, page, xp)
    ids["publisher_id"] = take(tables.documents.publisher_bucket, page, xp)
    ids |= {name: take(tables.ads.buckets[i], row, xp) for i, name in enumerate(ads.CATEGORICAL)}
    out, nulls = {}, {}
    for name, values in ids.items():
        out[name], nulls[name] = _filled(values, flavour.null_id(name, buckets[name]), _narrow(buckets[name]), xp)
    # Its four values need no hash: four buckets hold them without a collision.
    out["platform"] = take(tables.events.platform, event, xp)

    published = take(tables.documents.published, page, xp), take(tables.ads.published, row, xp)
    for i, name in enumerate(layout.AGES):
        age, nulls[name] = age_in_days(timestamp, published[i], xp)
        out[name] = take(tables.ages.scaled[i], age, xp)
    out |= {name: take(tables.ads.numeric[i], row, xp) for i, name in enumerate(ads.NUMERIC)}
    for kind, attributes in tables.attributes.items():
        out[layout.SIMILARITY + kind] = attributes.similarity(document, landing, xp).astype(xp.float32, copy=False)
    for kind, lists in tables.lists.items():
        name = layout.LISTS[kind]
        known = tables.attributes[kind].lookup.find(document, xp)
        out[name] = take(lists.ids, known, xp)
        # Only documents without an entry are unknown.
        nulls[name] = _filled(known, 0, np.uint32, xp)[1]
    return out, nulls


def _filled(values: Any, null_id: int, kind: type, xp: ModuleType) -> tuple[Any, Any]:
    """[n] int32, -1 = null -> [n] of the unsigned type, and the number of nulls."""
    if xp is not np:
        return kernels.fill(values, null_id, kind, xp)
    missing = values < 0
    nulls = np.count_nonzero(missing)
    return (np.where(missing, null_id, values) if nulls else values).astype(kind), nulls


def _narrow(buckets: int) -> type:
    """The unsigned type that a shard stores."""
    return next(t for t in (np.uint8, np.uint16, np.uint32) if buckets <= np.iinfo(t).max)
