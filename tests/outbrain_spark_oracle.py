"""The features of flavour `spark` a second time: plain pandas and dictionaries, slow and obvious, in float64."""

import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import pandas as pd
from outbrain_oracle import ATTRIBUTES, KEY_0, mix, read

ORIGIN = 1465876799998
# Group, its column after the joins, rows that are not yet enough.
RATES = {
    "pop_ad_id": ("ad_id", 5),
    "pop_document_id": ("document_id_promo", 5),
    "pop_source_id": ("source_id_promo", 10),
    "pop_publisher_id": ("publisher_id_promo", 10),
    "pop_advertiser_id": ("advertiser_id", 10),
    "pop_campain_id": ("campaign_id", 10),
}
RAW_IDS = {
    "doc_event_id": "document_id",
    "doc_id": "document_id_promo",
    "doc_event_source_id": "source_id",
    "doc_event_publisher_id": "publisher_id",
    "ad_id": "ad_id",
    "ad_advertiser": "advertiser_id",
    "doc_ad_source_id": "source_id_promo",
    "doc_ad_publisher_id": "publisher_id_promo",
    "campaign_id": "campaign_id",
}


def documents(directory: Path) -> pd.DataFrame:
    meta = read(directory, "documents_meta").dropna(subset="source_id")
    unknown = sorted(set(meta.source_id[meta.publisher_id.isna()]))
    fresh = {source: meta.publisher_id.max() + 1 + i for i, source in enumerate(unknown)}
    meta["publisher_id"] = meta.publisher_id.fillna(meta.source_id.map(fresh))
    meta["publish_time"] = pd.to_datetime(meta.publish_time, format="%Y-%m-%d %H:%M:%S")
    return meta


def kept_events(directory: Path) -> pd.DataFrame:
    return read(directory, "events").drop(columns="uuid").dropna(subset=["geo_location", "platform"])


def is_train(display: int, timestamp: float) -> bool:
    day = None if math.isnan(timestamp) else int(timestamp / 1000 / 60 / 60 / 24)
    if day in (11, 12):
        return False
    return day is None or day > 12 or mix(display, KEY_0) / 2**64 >= 0.2


def joined(directory: Path) -> pd.DataFrame:
    """Every click row with its raw columns, in file order."""
    promoted = read(directory, "promoted_content").rename(columns={"document_id": "document_id_promo"})
    meta = documents(directory)
    rows = read(directory, "clicks_train").merge(promoted, "left", "ad_id")
    rows = rows.merge(kept_events(directory), "left", "display_id").merge(meta, "left", "document_id")
    rows = rows.merge(meta.add_suffix("_promo"), "left", "document_id_promo")
    rows["train"] = [is_train(d, t) for d, t in zip(rows.display_id, rows.timestamp)]
    return rows


def places(directory: Path, values: pd.Series, cut: int | None) -> pd.Series:
    """The number of events with the same text, -1 below ten, 0 without an event."""

    def part(texts: pd.Series) -> pd.Series:
        return texts if cut is None else texts.str.strip(" ").str[:cut]

    counts = part(kept_events(directory).geo_location).value_counts()
    numbers = part(values).map(counts[counts >= 10])
    return numbers.where(numbers.notna() | values.isna(), -1).fillna(0)


def ages(rows: pd.DataFrame, column: str) -> pd.Series:
    event = pd.to_datetime((rows.timestamp + ORIGIN) // 1000, unit="s")
    days = (event - rows[column]).dt.days
    return days.where((days >= 0) & (days <= 3650)).fillna(0)


def log_01scaled(x: pd.Series) -> pd.Series:
    y = np.log2(1 + x)
    return (y - y.min()) / (y.max() - y.min())


def similarity(directory: Path, kind: str, pairs: list[tuple]) -> list[float]:
    vectors = defaultdict(dict)
    for document, attribute, confidence in read(directory, f"documents_{kind}").itertuples(index=False):
        vectors[document][attribute] = vectors[document].get(attribute, 0) + confidence
    having = defaultdict(int)
    for vector in vectors.values():
        for attribute in vector:
            having[attribute] += 1
    total = len(documents(directory))
    idf = {a: math.log(math.log(total / n)) if total > n else 0.0 for a, n in having.items()}
    weights = {d: {a: idf[a] * c for a, c in vector.items()} for d, vector in vectors.items()}
    result = []
    for left, right in pairs:
        one, two = weights.get(left, {}), weights.get(right, {})
        length = math.hypot(*one.values()) * math.hypot(*two.values())
        result.append(sum(w * two.get(a, 0) for a, w in one.items()) / length if length else 0.0)
    return result


def features(directory: Path, cardinalities: dict[str, int]) -> pd.DataFrame:
    """One row a click row, in file order: the 26 features, label, display_id and train."""
    rows = joined(directory)
    train = rows[rows.train]
    out = rows[["display_id", "train"]].assign(label=rows.clicked)
    for name, column in RAW_IDS.items():
        out[name] = rows[column].fillna(-1 if name == "doc_ad_source_id" else 0).astype(int)
    out["event_platform"] = (rows.platform - 1).fillna(0).astype(int)
    for name, cut in (("event_geo_location", None), ("event_country", 2), ("event_country_state", 5)):
        out[name] = places(directory, rows.geo_location, cut).astype(int)
    for name, buckets in cardinalities.items():
        out[name] = out[name] % buckets
    for name, (key, few) in RATES.items():
        groups = train.groupby(key).clicked.agg(["sum", "count"])
        groups = groups[groups["count"] > few]
        out[name] = rows[key].map(groups["sum"] / groups["count"]).fillna(0)
        if name in ("pop_ad_id", "pop_document_id"):
            out[name.removeprefix("pop_").removesuffix("_id")] = rows[key].map(groups["count"]).fillna(0)
    out["ad_views_log_01scaled"] = log_01scaled(out.pop("ad"))
    out["doc_views_log_01scaled"] = log_01scaled(out.pop("document"))
    out["doc_event_days_since_published_log_01scaled"] = log_01scaled(ages(rows, "publish_time"))
    out["doc_ad_days_since_published_log_01scaled"] = log_01scaled(ages(rows, "publish_time_promo"))
    pairs = list(zip(rows.document_id, rows.document_id_promo))
    for kind in ATTRIBUTES:
        out[f"doc_event_doc_ad_sim_{kind}"] = similarity(directory, kind, pairs)
    return out
