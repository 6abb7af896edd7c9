"""Pass 2: rows (display, ad, clicked) to the features, the label and the group."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from preprocess.outbrain import ads, layout, store
from preprocess.outbrain.clicks import MISSING_AGE, Scan, age_in_days
from preprocess.outbrain.flavour import Flavour
from preprocess.outbrain.lists import Lists
from preprocess.outbrain.similarity import Attributes
from preprocess.outbrain.statistics import Statistics
from preprocess.outbrain.tables import Documents, Events, Geo
from preprocess.xp import arrays, to_host_all


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
    for path, rows, *_ in scan.parts[split]:
        for start in range(0, rows, chunk_rows):
            yield Task(path=path, start=start, stop=min(start + chunk_rows, rows), **common)


def run(task: Task) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """The columns of a chunk on the host, and its number of nulls by categorical feature or age; data set's names."""
    rows = np.load(task.path, mmap_mode="r")[task.start : task.stop]
    buckets = dict(task.buckets)
    multihot = not buckets.keys().isdisjoint(layout.LISTS.values())
    with arrays(task.device) as xp:
        tables = Tables.load(task.work, task.device, multihot)
        display, ad = (xp.asarray(np.ascontiguousarray(rows[name])) for name in ("display_id", "ad_id"))
        columns, nulls = features(display, ad, tables, task.flavour, buckets, xp)
        columns = to_host_all(columns, xp)
    columns["clicked"] = np.ascontiguousarray(rows["clicked"])
    if task.grouped:
        columns["display_id"] = rows["display_id"].astype(np.int64)
    names = task.flavour.names
    columns, nulls = ({names.get(name, name): of for name, of in part.items()} for part in (columns, nulls))
    return columns, nulls


def features(
    display: Any, ad: Any, tables: Tables, flavour: Flavour, buckets: dict[str, int], xp: ModuleType = np
) -> tuple[dict[str, Any], dict[str, int]]:
    """display, ad: [n] int32 -> {feature: [n]}, categoricals unsigned and numerics float32, and {feature: nulls}.

    Multi-hot features are [n, 3] signed, -1 = padding; empty lists count as nulls.
    """
    event = tables.events.lookup.find(display, xp)
    document = tables.events.document[event]
    timestamp = tables.events.timestamp[event]
    place = tables.events.geo[event]
    page = tables.documents.lookup.find(document, xp)
    row = tables.ads.lookup.find(ad, xp)
    landing = tables.ads.document[row]

    ids = {name: getattr(tables.geo, name)[place] for name in layout.GEO}
    ids["document_id"] = flavour.ids(document, buckets["document_id"], xp)
    ids["source_id"] = tables.documents.source_bucket[page]
    ids["publisher_id"] = tables.documents.publisher_bucket[page]
    ids |= {name: tables.ads.buckets[i][row] for i, name in enumerate(ads.CATEGORICAL)}
    out, nulls = {}, {}
    for name, values in ids.items():
        missing = values < 0
        nulls[name] = int(missing.sum())
        filled = xp.where(missing, flavour.null_id(name, buckets[name]), values) if nulls[name] else values
        out[name] = filled.astype(_narrow(buckets[name]))
    # Its three values need no hash: four buckets hold them without a collision.
    out["platform"] = tables.events.platform[event]

    for i, (name, published) in enumerate(
        zip(layout.AGES, (tables.documents.published[page], tables.ads.published[row]))
    ):
        age = age_in_days(timestamp, published, xp)
        nulls[name] = int((age == MISSING_AGE).sum())
        out[name] = tables.ages.scaled[i][age]
    out |= {name: tables.ads.numeric[i][row] for i, name in enumerate(ads.NUMERIC)}
    for kind, attributes in tables.attributes.items():
        out[layout.SIMILARITY + kind] = attributes.similarity(document, landing, xp).astype(xp.float32)
    for kind, lists in tables.lists.items():
        name = layout.LISTS[kind]
        out[name] = lists.ids[tables.attributes[kind].lookup.find(document, xp)]
        nulls[name] = int((out[name][:, 0] < 0).sum())
    return out, nulls


def _narrow(buckets: int) -> type:
    """The unsigned type that a shard stores."""
    return next(t for t in (np.uint8, np.uint16, np.uint32) if buckets <= np.iinfo(t).max)
