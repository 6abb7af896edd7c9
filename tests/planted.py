"""A small preprocessed data set with a planted model, for tests of the trainer."""

from pathlib import Path

import numpy as np

from widedeep.feature_spec import CategoricalFeature, FeatureSpec, NumericFeature, SourceChunk
from widedeep.shards import ShardWriter

CATEGORICAL = (CategoricalFeature("ad", 50, 8), CategoricalFeature("site", 7, 4))
TAGS = CategoricalFeature("tags", 20, 4, hotness=3, combiner="mean", multi_hot=True)
NUMERIC = (NumericFeature("age"), NumericFeature("price"))


def planted_rows(rows: int, ads: int, seed: int) -> dict[str, np.ndarray]:
    """Displays of `ads` rows each; the log-odds of a click are a fixed function of the features."""
    rng = np.random.default_rng(seed)
    weights = np.random.default_rng(0)
    ad, site, tag = weights.normal(size=50), weights.normal(size=7), weights.normal(size=20)
    data = {
        "ad": (50 * rng.random(rows) ** 2).astype(np.int64),
        "site": rng.integers(0, 7, rows),
        "tags": rng.integers(0, 20, (rows, 3)),
        "age": rng.normal(size=rows).astype(np.float32),
        "price": rng.normal(size=rows).astype(np.float32),
    }
    data["tags"][rng.random(rows) < 0.3, 2] = -1
    tags = np.where(data["tags"] >= 0, tag[data["tags"]], 0).sum(axis=1)
    logit = ad[data["ad"]] + site[data["site"]] + 0.5 * tags + data["age"] * data["price"] - 1
    data["clicked"] = (rng.random(rows) < 1 / (1 + np.exp(-logit))).astype(np.uint8)
    data["display_id"] = np.arange(rows) // ads
    return data


def planted_data(directory: Path, train: int = 1003, test: int = 401, ads: int = 4, group: bool = True) -> Path:
    """Writes the data set; returns its directory."""
    features = [*(f.name for f in (*CATEGORICAL, TAGS)), *(f.name for f in NUMERIC), "clicked"]
    columns = [*features, "display_id"] if group else features
    chunks = {name: (SourceChunk("shards", tuple(columns), (name,)),) for name in ("train", "test")}
    spec = FeatureSpec((*CATEGORICAL, TAGS), NUMERIC, "clicked", "display_id" if group else None, chunks)
    directory.mkdir(parents=True, exist_ok=True)
    spec.save(directory / "feature_spec.yaml")
    for name, rows, seed in (("train", train, 1), ("test", test, 2)):
        data = planted_rows(rows, ads, seed)
        with ShardWriter(directory / name, spec, rows_per_shard=300, group=group) as writer:
            writer.append({column: data[column] for column in columns})
            writer.finish()
    return directory
