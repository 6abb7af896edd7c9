"""The rules by which a server in another language makes ids and numbers (docs/your-own-data.md, "Serve it"), as plain
Python over the files of a data set: they give what `Encoder` gives."""

import bisect
import json
import math

import numpy as np
import pyarrow.parquet as pq
import pytest
import xxhash
import yaml
from test_tabular import write_spec
from test_tabular_encoder import CHANNELS, FEATURES, rows_of

from preprocess.tabular import Encoder, TabularConfig, run

MORE = {
    "band": {"transform": {"column": "age", "bucketise": {"edges": [18, 30]}}},
    "user_x_slot": {"transform": {"cross": ["user", "slot"]}},
    "user_x_band_x_page": {
        "cardinality": 90,
        "transform": {"cross": {"features": ["user", "band", "page"], "seed": 3}},
    },
    "day": {"transform": {"column": "price", "fill": "mean", "standardise": True}},
}
WORD = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15


def mix64(z):
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & WORD
    z = (z ^ z >> 27) * 0x94D049BB133111EB & WORD
    return z ^ z >> 31


def text_of(value):
    """Of whole floats as of the integers that they are."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


class Rules:
    """Rows as mappings, by feature_spec.yaml and statistics.json."""

    def __init__(self, data):
        spec = yaml.safe_load((data / "feature_spec.yaml").read_text())
        self.features = spec["feature_spec"]
        self.channels = spec["channel_spec"]
        self.learned = json.loads((data / "statistics" / "statistics.json").read_text())["features"]

    def transform(self, name):
        found = self.features[name].get("transform", {})
        return {found: {}} if isinstance(found, str) else found

    def options(self, name, key):
        return self.transform(name)[key] or {}

    def present(self, name, value):
        nulls = self.transform(name).get("nulls", [])
        return value is not None and text_of(value) not in ([nulls] if isinstance(nulls, str) else nulls)

    def id_of(self, name, value):
        how, learned = self.transform(name), self.learned.get(name, {})
        there, size = self.present(name, value), self.features[name]["cardinality"]
        if "vocabulary" in how:
            values = learned["values"]
            return 1 + values.index(text_of(value)) if there and text_of(value) in values else 0
        if "hash" in how:
            seed = self.options(name, "hash").get("seed", 0)
            hashed = (
                xxhash.xxh3_64_intdigest(text_of(value).encode(), seed) if there else mix64(WORD ^ mix64(seed + GOLDEN))
            )
            return hashed % size
        if "bucketise" in how:
            edges = learned["edges"] if "edges" in learned else self.options(name, "bucketise")["edges"]
            return 1 + bisect.bisect_right(edges, value) if there else 0
        return int(value) if there else -1

    def cross(self, name, row):
        how = self.options(name, "cross")
        parts = how if isinstance(how, list) else how["features"]
        ids = [self.one_hot(part, row) for part in parts]
        sizes, size = [self.features[part]["cardinality"] for part in parts], self.features[name]["cardinality"]
        if min(ids) < 0:
            return -1
        if math.prod(sizes) <= size:
            total = 0
            for number, of in zip(ids, sizes):
                total = total * of + number
            return total
        hashed = mix64((0 if isinstance(how, list) else how.get("seed", 0)) + GOLDEN)
        for number in ids:
            hashed = mix64((hashed + number + GOLDEN) & WORD)
        return hashed % size

    def one_hot(self, name, row):
        if "cross" in self.transform(name):
            return self.cross(name, row)
        return self.id_of(name, row[self.transform(name).get("column", name)])

    def multi_hot(self, name, row):
        how, hotness = self.transform(name), self.features[name]["max_hotness"]
        if "columns" in how:
            columns, masks = (
                [f"{of.split('[')[0]}_{i}" for i in range(int(of.split("[")[1][:-1]))]
                for of in (how["columns"], how["mask"])
            )
            entries = [row[column] if row[mask] else None for column, mask in zip(columns, masks)]
        else:
            entries = row[how.get("column", name)] or []
            if "separator" in how and entries:
                entries = [piece.strip() for piece in entries.split(how["separator"]) if piece.strip()]
        ids = [self.id_of(name, entry) if self.present(name, entry) else -1 for entry in entries]
        return (ids + [-1] * hotness)[:hotness]

    def number(self, name, row):
        how, learned = self.transform(name), self.learned.get(name, {})
        value = row[how.get("column", name)]
        x = float(value) if self.present(name, value) else float(learned.get("fill", how.get("fill")))
        if "clip" in how:
            x = min(max(x, how["clip"][0]), how["clip"][1])
        if how.get("log"):
            x = math.copysign(math.log1p(abs(x)), x)
        return (x - learned.get("mean", 0)) / learned.get("deviation", 1)

    def __call__(self, row):
        ids = [self.one_hot(name, row) for name in self.channels["onehot_categorical"]]
        for name in self.channels["multihot_categorical"]:
            ids += self.multi_hot(name, row)
        return ids, [self.number(name, row) for name in self.channels["numerical"]]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    one_hot = [*CHANNELS["one_hot"], "band", "user_x_slot", "user_x_band_x_page"]
    channels = CHANNELS | {"one_hot": one_hot, "numeric": [*CHANNELS["numeric"], "day"]}
    spec = write_spec(folder / "spec.yaml", FEATURES | MORE, **channels)
    pq.write_table(rows_of(0, 300), folder / "train.parquet")
    run(TabularConfig(spec=spec, inputs=[folder / "train.parquet"], out=folder / "data", split="last:50"))
    return folder / "data"


def test_the_rules_give_what_the_encoder_gives(data):
    rows = rows_of(int(np.random.default_rng().integers(1, 10**6)), 200)
    ids, numbers = Encoder(data)(rows)
    by_rules = [Rules(data)(row) for row in rows.to_pylist()]
    np.testing.assert_array_equal(ids, [row[0] for row in by_rules])
    np.testing.assert_allclose(numbers, np.array([row[1] for row in by_rules]).astype(np.float32), rtol=1e-6, atol=1e-7)
    assert (ids == -1).any()
    assert (ids == 0).any()
