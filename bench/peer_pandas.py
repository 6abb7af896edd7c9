"""The table work of the Outbrain preprocessing in pandas, in memory, the way one writes it.

Does: reads the four tables (pyarrow's CSV reader), left merges, the 80/20 split by hash, six click rates and two
standardised counts by groupby over train rows, two ages with medians, pandas' own hash of twelve columns, one Parquet
file, rows in their order. Does not: similarities, separate files for train and test.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from preprocess import hashing
from preprocess.outbrain import layout

DAY = layout.MILLISECONDS_A_DAY


def run(data: Path, out: Path, stage: Callable, buckets: dict[str, int]) -> Path:
    """Returns the written file; `stage(name)` is a with-block that times."""
    with stage("read"):
        clicks, events = read(data, "clicks_train"), read(data, "events").drop(columns="uuid")
        promoted = read(data, "promoted_content").rename(columns={"document_id": "document_id_promo"})
        meta = read(data, "documents_meta")
        missing = meta.publisher_id.isna()
        meta.loc[missing, "publisher_id"] = meta.publisher_id.max() + missing.cumsum()[missing]
        meta["publish_time"] = pd.to_datetime(meta.publish_time)
        events["platform"] = events.platform.fillna(1).astype("int8") - 1
        events["geo_location_country"] = events.geo_location.str[:2]
        events["geo_location_state"] = events.geo_location.str[:5]
        selected = hashing.is_selected(events.display_id.to_numpy(), layout.TEST_FRACTION, 0)
        events["train"] = (events.timestamp // DAY <= layout.LAST_SHARED_DAY) & ~selected
    with stage("join"):
        rows = clicks.merge(events, "left", "display_id").merge(promoted, "left", "ad_id")
        del clicks, events, promoted
        rows = rows.merge(meta, "left", "document_id")
        rows = rows.merge(meta.add_suffix("_promo"), "left", "document_id_promo")
        del meta
        rows["train"] = rows.train.fillna(False).astype(bool)
        rows["platform"] = rows.platform.fillna(0).astype("int8")
    result = rows[["train", "clicked", "display_id", "platform"]].copy()
    with stage("rates and counts"):
        train = rows[rows.train]
        for key, least in layout.CTR_MIN_ROWS.items():
            groups = train.groupby(key).clicked.agg(["count", "sum"])
            count, clicked = (rows[key].map(groups[c]).fillna(0) for c in ("count", "sum"))
            rate = np.where(count >= least, clicked / count.clip(lower=1), 0)
            result[f"{key}_ctr"] = rate.astype(np.float32)
            if key in layout.COUNT_KEYS:
                logs = np.log1p(count)
                learned = logs[rows.train]
                result[f"{key}_count"] = ((logs - learned.mean()) / learned.std()).astype(np.float32)
        del train
    with stage("ages"):
        time = pd.to_datetime(rows.timestamp + layout.ORIGIN_MS, unit="ms")
        for name, published in zip(layout.AGES, ("publish_time", "publish_time_promo")):
            age = (time - rows[published]).dt.days
            age = age.where(age.isna() | age.between(0, layout.MAX_AGE_DAYS), 0)
            result[name] = np.log1p(age.fillna(age[rows.train].median()).astype(np.float32))
    with stage("hash"):
        for name, n in buckets.items():
            if name != "platform":
                result[name] = (pd.util.hash_array(rows[name].to_numpy()) % np.uint64(n)).astype(np.uint32)
    with stage("write"):
        result.to_parquet(out / "rows.parquet", compression=None)
    return out / "rows.parquet"


def read(data: Path, name: str) -> pd.DataFrame:
    return pd.read_csv(data / f"{name}.csv", na_values=["\\N", ""], keep_default_na=False, engine="pyarrow")
