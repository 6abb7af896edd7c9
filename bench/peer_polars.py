"""The table work of the Outbrain preprocessing as a lazy polars query, run by its streaming engine.

Does: reads the four tables, left joins, the 80/20 split by hash, counts and clicks by ad and from them six click rates
and two standardised counts, two ages with medians, polars' own hash of twelve columns, one Parquet file.
Does not: similarities, the order of the rows, separate files for train and test.
"""

from collections.abc import Callable
from pathlib import Path

import polars as pl

from preprocess import hashing
from preprocess.outbrain import layout

DAY = layout.MILLISECONDS_A_DAY
_NULLS = ["\\N", ""]
_TYPES = {
    "display_id": pl.Int32,
    "ad_id": pl.Int32,
    "clicked": pl.UInt8,
    "document_id": pl.Int32,
    "timestamp": pl.Int64,
    "platform": pl.Int8,
    "geo_location": pl.String,
    "campaign_id": pl.Int32,
    "advertiser_id": pl.Int32,
    "source_id": pl.Int32,
    "publisher_id": pl.Int32,
    "publish_time": pl.String,
}


def run(data: Path, out: Path, stage: Callable, buckets: dict[str, int]) -> Path:
    """Returns the written file; `stage(name)` is a with-block that times."""
    events, meta, promoted = (tables(data)[name] for name in ("events", "documents_meta", "promoted_content"))
    clicks = scan(data, "clicks_train")
    with stage("tables"):
        events, meta, promoted = (t.lazy() for t in pl.collect_all([events, meta, promoted], engine="streaming"))
    page = meta.select("document_id", "published")
    promoted = promoted.join(meta.select(pl.all().name.suffix("_promo")), "document_id_promo", "left")
    with stage("counts"):
        rows = clicks.join(events.select("display_id", "train", "document_id", "timestamp"), "display_id", "left")
        rows = rows.with_columns(pl.col("train").fill_null(False))
        by_ad = rows.group_by("ad_id").agg(
            pl.col("train").sum().alias("rows"), (pl.col("train") & (pl.col("clicked") == 1)).sum().alias("clicks")
        )
        aged = rows.filter("train").join(page, "document_id", "left")
        aged = aged.join(promoted.select("ad_id", "published_promo"), "ad_id", "left")
        middle = aged.select(age("published").median().alias("page"), age("published_promo").median().alias("promo"))
        counts, medians = pl.collect_all([by_ad, middle], engine="streaming")
    with stage("ads"):
        ads = counts.lazy().join(promoted, "ad_id", "left").with_columns(*_rates()).with_columns(*_counts())
        ads = ads.drop("rows", "clicks").collect().lazy()
    with stage("transform"):
        rows = clicks.join(events, "display_id", "left").join(ads, "ad_id", "left").join(meta, "document_id", "left")
        ages = [
            age(name).fill_null(medians[side].item() or 0).cast(pl.Float32).log1p().alias(feature)
            for feature, (name, side) in zip(layout.AGES, (("published", "page"), ("published_promo", "promo")))
        ]
        hashed = [(pl.col(name).hash() % n).cast(pl.UInt32) for name, n in buckets.items() if name != "platform"]
        numeric = [f"{key}_ctr" for key in layout.CTR_MIN_ROWS] + [f"{key}_count" for key in layout.COUNT_KEYS]
        rows = rows.select(
            pl.col("train").fill_null(False), "clicked", "display_id", *hashed,
            pl.col("platform").fill_null(0), *ages, *numeric,
        )  # fmt: skip
        rows.sink_parquet(out / "rows.parquet", compression="uncompressed", engine="streaming", maintain_order=False)
    return out / "rows.parquet"


def scan(data: Path, name: str) -> pl.LazyFrame:
    path = data / f"{name}.csv"
    header = path.open(encoding="utf-8").readline().strip().split(",")
    known = {column: kind for column, kind in _TYPES.items() if column in header}
    return pl.scan_csv(path, null_values=_NULLS, schema_overrides=known)


def tables(data: Path) -> dict[str, pl.LazyFrame]:
    place = pl.col("geo_location")
    events = scan(data, "events").select(
        "display_id",
        "document_id",
        "timestamp",
        (pl.col("platform") - 1).fill_null(0),
        place,
        place.str.slice(0, 2).alias("geo_location_country"),
        place.str.slice(0, 5).alias("geo_location_state"),
        ((pl.col("timestamp") // DAY <= layout.LAST_SHARED_DAY) & ~_selected()).fill_null(False).alias("train"),
    )
    publisher = pl.col("publisher_id")
    fresh = publisher.max() + publisher.is_null().cum_sum().cast(pl.Int32)
    meta = scan(data, "documents_meta").select(
        "document_id",
        "source_id",
        publisher.fill_null(fresh),
        pl.col("publish_time").str.to_datetime("%Y-%m-%d %H:%M:%S", time_unit="ms").cast(pl.Int64).alias("published"),
    )
    promoted = scan(data, "promoted_content").rename({"document_id": "document_id_promo"})
    return {"events": events, "documents_meta": meta, "promoted_content": promoted}


def age(published: str) -> pl.Expr:
    days = (pl.col("timestamp") + layout.ORIGIN_MS - pl.col(published)) // DAY
    return pl.when(days.is_between(0, layout.MAX_AGE_DAYS)).then(days).when(days.is_not_null()).then(0)


def _selected() -> pl.Expr:
    """The same split as ours, so that rates can be compared: `hashing.is_selected` of the display."""
    z = pl.col("display_id").cast(pl.UInt64) ^ pl.lit(hashing.key(0), pl.UInt64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ (z // pl.lit(2**shift, pl.UInt64))) * pl.lit(factor, pl.UInt64)
    z = z ^ (z // pl.lit(2**31, pl.UInt64))
    return z // pl.lit(2**11, pl.UInt64) < pl.lit(round(layout.TEST_FRACTION * 2**53), pl.UInt64)


def _rates() -> list[pl.Expr]:
    rates = []
    for key, least in layout.CTR_MIN_ROWS.items():
        rows, clicks = (pl.col(name).sum().over(key) for name in ("rows", "clicks"))
        enough = pl.col(key).is_not_null() & (rows >= least)
        rates.append(pl.when(enough).then(clicks / rows).otherwise(0.0).cast(pl.Float32).alias(f"{key}_ctr"))
    return rates


def _counts() -> list[pl.Expr]:
    """Standardised over train rows: an ad of n rows has weight n."""
    counts = []
    weight, total = pl.col("rows"), pl.col("rows").sum()
    for key in layout.COUNT_KEYS:
        logs = pl.when(pl.col(key).is_not_null()).then(weight.sum().over(key)).otherwise(0).log1p()
        mean = (logs * weight).sum() / total
        std = (((logs - mean) ** 2 * weight).sum() / (total - 1)).sqrt()
        counts.append(((logs - mean) / std).cast(pl.Float32).alias(f"{key}_count"))
    return counts
