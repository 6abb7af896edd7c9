"""The Outbrain features a second time: plain pandas and dictionaries, slow and obvious, in float64. For tests only.

Shares nothing with preprocess/ but the definition of the hash, written out again.
"""

import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import pandas as pd
import xxhash

NULLS = ["\\N", ""]
THRESHOLDS = {
    "ad_id": 5,
    "source_id_promo": 10,
    "document_id_promo": 5,
    "publisher_id_promo": 10,
    "advertiser_id": 10,
    "campaign_id": 10,
}
ATTRIBUTES = {"categories": "category_id", "topics": "topic_id", "entities": "entity_id"}

LISTS = {"topic_id_list": "topics", "entity_id_list": "entities", "category_id_list": "categories"}


def mix(value: int, key: int) -> int:
    z = (value ^ key) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


KEY_0 = mix(0x9E3779B97F4A7C15, 0)


def bucket(value, buckets: int) -> int:
    if pd.isna(value):
        return mix(-1, KEY_0) % buckets
    if isinstance(value, str):
        return xxhash.xxh3_64_intdigest(value.encode("utf-8")) % buckets
    return mix(int(value), KEY_0) % buckets


def read(directory: Path, name: str) -> pd.DataFrame:
    return pd.read_csv(directory / f"{name}.csv", na_values=NULLS, keep_default_na=False)


def joined(directory: Path) -> pd.DataFrame:
    """Every click row with its raw columns, in file order."""
    clicks = read(directory, "clicks_train")
    events = read(directory, "events").drop(columns="uuid")
    promoted = read(directory, "promoted_content").rename(columns={"document_id": "document_id_promo"})
    meta = read(directory, "documents_meta")
    missing = meta.publisher_id.isna()
    meta.loc[missing, "publisher_id"] = meta.publisher_id.max() + 1 + missing.cumsum()[missing]
    meta["publish_time"] = pd.to_datetime(meta.publish_time, format="%Y-%m-%d %H:%M:%S")
    rows = clicks.merge(events, "left", "display_id").merge(promoted, "left", "ad_id")
    rows = rows.merge(meta, "left", "document_id")
    rows = rows.merge(meta.add_suffix("_promo"), "left", "document_id_promo")
    rows["platform"] = rows.platform.fillna(1).astype(int) - 1
    rows["geo_location_country"] = rows.geo_location.str[:2]
    rows["geo_location_state"] = rows.geo_location.str[:5]
    day = rows.timestamp // 86_400_000
    late_hash = rows.display_id.map(lambda display: mix(display, KEY_0) / 2**64 >= 0.2)
    rows["train"] = (day <= 10) & late_hash
    return rows


def days(rows: pd.DataFrame, column: str) -> pd.Series:
    """Whole days since publication, nulls filled with the median of train rows."""
    event = pd.to_datetime(rows.timestamp + 1465876799998, unit="ms")
    age = (event - rows[column]).dt.days
    age = age.where(age.isna() | ((age >= 0) & (age <= 3650)), 0)
    median = age[rows.train].median()
    return age.fillna(0 if np.isnan(median) else median)


def similarity(directory: Path, kind: str, pairs: list[tuple]) -> list[float]:
    table = read(directory, f"documents_{kind}").itertuples(index=False)
    documents = defaultdict(dict)
    for document, attribute, confidence in table:
        documents[document][attribute] = documents[document].get(attribute, 0) + confidence
    frequency = defaultdict(int)
    for row in documents.values():
        for attribute in row:
            frequency[attribute] += 1
    total = max(documents) + 1
    vectors = {}
    for document, row in documents.items():
        weights = {a: c * math.log(total / frequency[a]) for a, c in row.items()}
        norm = math.sqrt(sum(w * w for w in weights.values()))
        vectors[document] = {a: w / norm for a, w in weights.items()} if norm else {}
    result = []
    for left, right in pairs:
        a, b = vectors.get(left, {}), vectors.get(right, {})
        result.append(sum(value * b[name] for name, value in a.items() if name in b))
    return result


def lists(directory: Path, kind: str, documents: pd.Series, buckets: int) -> list[list[int]]:
    """The first three attributes of each document in file order, hashed; -1 fills up."""
    of = defaultdict(list)
    for document, attribute, _ in read(directory, f"documents_{kind}").itertuples(index=False):
        of[document].append(bucket(attribute, buckets))
    return [[*of.get(document, []), -1, -1, -1][:3] for document in documents]


def features(directory: Path, cardinalities: dict[str, int]) -> pd.DataFrame:
    """One row a click row, in file order: the 26 features, clicked, display_id and train, and the multi-hot features
    that `cardinalities` names."""
    rows = joined(directory)
    train = rows[rows.train]
    out = rows[["display_id", "clicked", "train", "platform"]].copy()
    for name, buckets in cardinalities.items():
        if name in LISTS:
            out[name] = lists(directory, LISTS[name], rows.document_id, buckets)
        elif name != "platform":
            out[name] = rows[name].map(lambda value, n=buckets: bucket(value, n))
    out["publish_time_days_since_published"] = np.log1p(days(rows, "publish_time"))
    out["publish_time_promo_days_since_published"] = np.log1p(days(rows, "publish_time_promo"))
    for key, threshold in THRESHOLDS.items():
        groups = train.groupby(key).clicked
        count, clicked = rows[key].map(groups.count()).fillna(0), rows[key].map(groups.sum()).fillna(0)
        out[f"{key}_ctr"] = np.where(count >= threshold, clicked / count.clip(lower=1), 0.0)
        if key in ("ad_id", "document_id_promo"):
            logs = np.log1p(count)
            out[f"{key}_count"] = (logs - logs[rows.train].mean()) / logs[rows.train].std()
    pairs = list(zip(rows.document_id, rows.document_id_promo))
    for kind in ATTRIBUTES:
        out[f"document_id_document_id_promo_sim_{kind}"] = similarity(directory, kind, pairs)
    return out
