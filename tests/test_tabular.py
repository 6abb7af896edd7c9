"""Tables to shards: each transform to its formula, splits, statistics re-applied, and what bad input is told."""

import gzip
import json
import math
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from preprocess import hashing
from preprocess.tabular import TabularConfig, run
from widedeep.errors import InputError
from widedeep.feature_spec import FeatureSpec
from widedeep.shards import ShardSet

CSV = """\
user,city,age,income,tags,hour,click,session
u1,Rome,20,100,red|blue,1,yes,7
u2,Oslo,40,?,blue,2,no,7
u1,Rome,,1000,,3,no,8
u3,"Paris, TX",60,0,red|green|blue|red,4,yes,9
u4,Rome,80,-10,gold,5,no,9
u5,,99,5,red,6,yes,10
"""


def write_spec(path, features, one_hot=(), multi_hot=(), numeric=(), label="click", group=None, **sections):
    channels = {
        "onehot_categorical": list(one_hot),
        "multihot_categorical": list(multi_hot),
        "numerical": list(numeric),
        "label": [label],
        "map": [group] if group else [],
    }
    path.write_text(yaml.safe_dump({"feature_spec": features, "channel_spec": channels} | sections))
    return path


CLICK = {"transform": {"positive": "yes"}}


def one_feature(tmp_path, name, attributes, text=CSV, split="last:2", **options):
    """Preprocess one feature and the label; gives train and test arrays of the feature."""
    (tmp_path / "data.csv").write_text(text)
    kind = "multi_hot" if "max_hotness" in attributes else "one_hot" if attributes.pop("id", True) else "numeric"
    spec = write_spec(tmp_path / "spec.yaml", {name: attributes, "click": CLICK}, **{kind: [name]})
    run(TabularConfig(spec=spec, inputs=[tmp_path / "data.csv"], out=tmp_path / "out", split=split, **options))
    return [read(tmp_path / "out" / part)[name].tolist() for part in ("train", "test")]


def read(path):
    shards = ShardSet.open(path, verify=True)
    return shards.read(0, shards.rows)


def number(**transform):
    return {"id": False, "transform": transform}


def test_vocabulary_orders_by_count_and_cuts_rare_values(tmp_path):
    attributes = {"transform": {"column": "user", "vocabulary": {"min_count": 2}}}
    assert one_feature(tmp_path, "user", dict(attributes)) == [[1, 0, 1, 0], [0, 0]]
    assert FeatureSpec.load(tmp_path / "out").cardinalities == (2,)
    assert one_feature(tmp_path, "city", {"transform": "vocabulary"}) == [[1, 2, 1, 3], [1, 0]]  # equal counts by text
    assert one_feature(tmp_path, "city", {"cardinality": 3, "transform": "vocabulary"}) == [[1, 2, 1, 0], [1, 0]]
    assert FeatureSpec.load(tmp_path / "out").cardinalities == (3,)


def test_hash_is_the_published_one(tmp_path):
    train, test = one_feature(tmp_path, "city", {"cardinality": 50, "transform": "hash"})
    want = hashing.string_buckets(["Rome", "Oslo", "Rome", "Paris, TX", "Rome"], 50).tolist()
    assert train + test == [*want, hashing.null_bucket(50)]
    seeded = one_feature(tmp_path, "city", {"cardinality": 50, "transform": {"hash": {"seed": 3}}})
    assert seeded[0] == hashing.string_buckets(["Rome", "Oslo", "Rome", "Paris, TX"], 50, 3).tolist()


def test_buckets(tmp_path):
    edges = {"transform": {"bucketise": {"edges": [20, 50, 80]}}}
    assert one_feature(tmp_path, "age", edges) == [[2, 2, 0, 3], [4, 4]]
    assert FeatureSpec.load(tmp_path / "out").cardinalities == (5,)
    # Train ages are 20, 40, 60: terciles cut below 40 and below 60 (an edge at the smallest value is dropped).
    assert one_feature(tmp_path, "age", {"transform": {"bucketise": {"quantiles": 3}}}) == [[1, 2, 0, 2], [2, 2]]
    rows = "".join(f"{i},{'yes' if i % 2 else 'no'}\n" for i in np.random.default_rng(0).permutation(1000))
    text = "age,click\n" + rows
    train, test = one_feature(tmp_path, "age", {"transform": {"bucketise": {"quantiles": 10}}}, text, "random:0.3")
    assert set(np.bincount(train)[1:]) <= set(range(len(train) // 10 - 2, len(train) // 10 + 3))
    assert len(test) > 200


def test_ids_are_taken_as_they_are(tmp_path):
    assert one_feature(tmp_path, "hour", {"cardinality": 7}) == [[1, 2, 3, 4], [5, 6]]
    assert one_feature(tmp_path, "hour", {"cardinality": 7, "transform": {"nulls": [2, "5"]}}) == [
        [1, -1, 3, 4],
        [-1, 6],
    ]


def test_numbers(tmp_path):
    def close(got, want):
        np.testing.assert_allclose(got[0] + got[1], want, rtol=1e-6)

    close(one_feature(tmp_path, "hour", number()), [1, 2, 3, 4, 5, 6])
    log = number(nulls="?", fill=3, log=True)
    signed = [math.copysign(math.log1p(abs(x)), x) for x in (100, 3, 1000, 0, -10, 5)]
    close(one_feature(tmp_path, "income", log), signed)
    close(one_feature(tmp_path, "age", number(fill="mean")), [20, 40, 40, 60, 80, 99])
    close(one_feature(tmp_path, "income", number(nulls="?", fill="median")), [100, 100, 1000, 0, -10, 5])
    close(one_feature(tmp_path, "age", number(fill=0, clip=[30, 70])), [30, 40, 30, 60, 70, 70])
    # Train values after fill: 20, 40, 40, 60: mean 40, deviation sqrt(200).
    standard = [(x - 40) / math.sqrt(200) for x in (20, 40, 40, 60, 80, 99)]
    close(one_feature(tmp_path, "age", number(fill="mean", standardise=True)), standard)
    for constant in ("0.1", "1465876799998"):
        train, test = one_feature(tmp_path, "hour", number(standardise=True), "hour,click\n" + f"{constant},yes\n" * 9)
        assert train + test == [0] * 9
    times = "".join(f"{1_465_876_799_000_000_000 + x},yes\n" for x in (0, 0, 512, 512, 0))
    close(one_feature(tmp_path, "hour", number(standardise=True), f"hour,click\n{times}", "last:1"), [-1, -1, 1, 1, -1])


def test_multi_hot_from_delimited_text(tmp_path):
    attributes = {"max_hotness": 3, "transform": {"separator": "|", "vocabulary": {"min_count": 2}}}
    train, test = one_feature(tmp_path, "tags", attributes)
    # blue and red three times each, equal counts by text: blue 1, red 2; the fourth element is cut off.
    assert train == [[2, 1, -1], [1, -1, -1], [-1, -1, -1], [2, 0, 1]]
    assert test == [[0, -1, -1], [2, -1, -1]]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["elements_cut"] == {"tags": 1}
    assert report["cardinality"] == {"tags": 3}


def test_multi_hot_from_several_columns(tmp_path):
    transform = {"columns": ["user", "city"], "vocabulary": {}, "nulls": ["Oslo"]}
    train, test = one_feature(tmp_path, "both", {"max_hotness": 3, "transform": transform})
    # Train counts: Rome 2, u1 2, then Paris, u2, u3 once each.
    assert train == [[2, 1, -1], [4, -1, -1], [2, 1, -1], [5, 3, -1]]
    assert test == [[0, 1, -1], [0, -1, -1]]
    one_feature(tmp_path, "both", {"max_hotness": 3, "transform": transform | {"nulls": ["Oslo", "u1"]}})
    assert json.loads((tmp_path / "out" / "report.json").read_text())["nulls"]["both"] == 4  # two in each column


def test_multi_hot_of_one_value_is_a_flat_column(tmp_path):
    attributes = {"max_hotness": 1, "cardinality": 100, "transform": {"separator": "|", "hash": {}}}
    train, _ = one_feature(tmp_path, "tags", attributes)
    assert train == [*hashing.string_buckets(["red", "blue"], 100).tolist(), -1, *hashing.string_buckets(["red"], 100)]


def full_spec(tmp_path, group=True):
    features = {
        "user": {"cardinality": 100, "transform": "hash"},
        "city": {"embedding_dim": 4, "transform": "vocabulary"},
        "age_bucket": {"transform": {"column": "age", "bucketise": {"quantiles": 4}}},
        "tags": {"max_hotness": 2, "transform": {"separator": "|", "vocabulary": {}}},
        "age": {"transform": {"fill": "median", "standardise": True}},
        "income": {"transform": {"nulls": "?", "fill": "mean", "log": True, "standardise": True}},
        "click": CLICK,
        "session": {},
    }
    return write_spec(
        tmp_path / "spec.yaml",
        features,
        ["user", "city", "age_bucket"],
        ["tags"],
        ["age", "income"],
        group="session" if group else None,
    )


def random_csv(rows, seed=0):
    rng = np.random.default_rng((seed, rows))
    lines = ["user,city,age,income,tags,hour,click,session"]
    for i in range(rows):
        tags = "|".join(rng.choice(["red", "green", "blue", "gold"], rng.integers(0, 4)))
        age = "" if rng.random() < 0.1 else int(rng.integers(18, 90))
        city, click = rng.choice(["Rome", "Oslo", '"Paris, TX"', ""]), rng.choice(["yes", "no"])
        lines.append(f"u{rng.integers(50)},{city},{age},{rng.normal(0, 100):.3f},{tags},{i % 24},{click},{i // 5}")
    return "\n".join(lines) + "\n"


def contents(path):
    return {
        str(f.relative_to(path)): f.read_bytes()
        for f in sorted(path.rglob("*"))
        if f.suffix in (".shard", ".yaml") or f.name == "statistics.json"
    }


@pytest.mark.parametrize("split", ["random:0.3", "last:0.25", "group:0.4"])
def test_chunks_and_workers_leave_no_trace(tmp_path, split):
    spec = full_spec(tmp_path)
    (tmp_path / "a.csv").write_text(random_csv(400))
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(random_csv(300, 1).encode()))
    results = []
    for i, (chunk_bytes, workers) in enumerate([(1 << 20, 1), (500, 1), (777, 3)]):
        out = tmp_path / f"out{i}"
        files = [tmp_path / "a.csv", tmp_path / "b.csv.gz"]
        run(TabularConfig(spec, out, files, split=split, chunk_bytes=chunk_bytes, workers=workers, rows_per_shard=150))
        results.append(contents(out))
    assert results[0] == results[1] == results[2]
    rows = [ShardSet.open(tmp_path / "out0" / part).rows for part in ("train", "test")]
    assert sum(rows) == 700
    assert 0.2 < rows[1] / 700 < 0.6


def test_a_group_split_keeps_groups_whole(tmp_path):
    (tmp_path / "a.csv").write_text(random_csv(1000))
    run(TabularConfig(full_spec(tmp_path), tmp_path / "out", [tmp_path / "a.csv"], split="group:0.3"))
    train, test = (set(read(tmp_path / "out" / part)["session"].tolist()) for part in ("train", "test"))
    assert not train & test
    assert len(train | test) == 200
    assert 40 < len(test) < 80


def test_statistics_are_of_train_rows_and_apply_again(tmp_path):
    spec = full_spec(tmp_path)
    (tmp_path / "a.csv").write_text(random_csv(300))
    (tmp_path / "b.csv").write_text(random_csv(200, 1))
    a, b = [tmp_path / "a.csv"], [tmp_path / "b.csv"]
    run(TabularConfig(spec, tmp_path / "first", a, b))
    run(TabularConfig(spec, tmp_path / "alone", a, a))
    assert (
        contents(tmp_path / "first")["statistics/statistics.json"]
        == contents(tmp_path / "alone")["statistics/statistics.json"]
    )
    for stats, again in ((tmp_path / "first", spec), (tmp_path / "first" / "statistics", tmp_path / "first")):
        run(TabularConfig(again, tmp_path / "again", test=b, stats=stats))
        shard = "test/part-00000.shard"
        assert contents(tmp_path / "again")[shard] == contents(tmp_path / "first")[shard]
        assert ShardSet.open(tmp_path / "again" / "train").rows == 0


def test_the_written_spec_is_a_data_set_of_its_own(tmp_path):
    (tmp_path / "a.csv").write_text(random_csv(300))
    run(TabularConfig(full_spec(tmp_path), tmp_path / "out", [tmp_path / "a.csv"], split="random:0.2"))
    spec = FeatureSpec.load(tmp_path / "out")
    for part in ("train", "test"):
        ShardSet.open(spec.source_files(part)[0]).check(spec)
    assert spec.categorical[1].dim == 4
    assert spec.hotness == (1, 1, 1, 2)


def test_parquet_gives_what_csv_gives(tmp_path):
    text = random_csv(300)
    (tmp_path / "a.csv").write_text(text)
    table = pa.csv.read_csv(
        pa.BufferReader(text.encode()),
        convert_options=pa.csv.ConvertOptions(strings_can_be_null=True, column_types={"age": pa.float64()}),
    )
    pieces = [[p for p in (t or "").split("|") if p] or None for t in table["tags"].to_pylist()]
    table = table.set_column(table.schema.get_field_index("tags"), "tags", pa.array(pieces, pa.list_(pa.string())))
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=70)
    spec = full_spec(tmp_path)
    for name in ("a.csv", "a.parquet"):
        run(TabularConfig(spec, tmp_path / name.replace(".", "_"), [tmp_path / name], split="random:0.2"))
    assert contents(tmp_path / "a_csv") == contents(tmp_path / "a_parquet")


def test_ready_parquet_files_named_by_a_spec_are_imported(tmp_path):
    """The layout of the original's Oct-2022 data sets: ids and numbers as they are, lists for multi-hot."""
    rng = np.random.default_rng(0)
    for part, rows in (("train", 50), ("test", 20)):
        columns = {
            "clicked": rng.integers(0, 2, rows),
            "ad_id": rng.integers(0, 1000, rows),
            "topics": [rng.integers(0, 300, 3).tolist() for _ in range(rows)],
            "ctr": rng.random(rows).astype(np.float32),
            "display_id": np.arange(rows) // 4,
        }
        pq.write_table(pa.table(columns), tmp_path / f"{part}.parquet")
    names = list(columns)
    features = {"ad_id": {"cardinality": 1000}, "topics": {"cardinality": 300, "max_hotness": 3}}
    features |= {n: {} for n in ("ctr", "clicked", "display_id")}
    sources = {p: [{"type": "parquet", "features": names, "files": [f"{p}.parquet"]}] for p in ("train", "test")}
    spec = write_spec(
        tmp_path / "spec.yaml", features, ["ad_id"], ["topics"], ["ctr"], "clicked", "display_id", source_spec=sources
    )
    run(TabularConfig(spec, tmp_path / "out"))
    got = read(tmp_path / "out" / "test")
    for name, values in columns.items():
        np.testing.assert_array_equal(got[name], np.asarray(values))


CELLS = [
    ("age", "old", number(fill=0), "line 4: column age: expected a number, found 'old'"),
    ("age", "nan", number(fill=0), "line 4: column age: expected a finite number"),
    ("hour", "", number(), "line 4: column hour: expected a number, or a `fill`"),
    ("hour", "99", {"cardinality": 24}, "line 4: column hour: expected an id of 0 to 23, found '99'"),
    ("hour", "1.5", {"cardinality": 24}, "line 4: column hour: expected an id of 0 to 23, found '1.5'"),
    ("click", "", {"cardinality": 24}, "line 4: column click: expected a label, found no value"),
]


@pytest.mark.parametrize(("column", "cell", "attributes", "words"), CELLS)
@pytest.mark.parametrize("chunk_bytes", [40, 1 << 20])
def test_a_bad_cell_is_named_with_its_line(tmp_path, column, cell, attributes, words, chunk_bytes):
    lines = [line.split(",") for line in CSV.replace('"Paris, TX"', "Paris").splitlines()]
    lines[3][lines[0].index(column)] = cell
    text = "\n".join(",".join(line) for line in lines)
    name = "hour" if column == "click" else column
    with pytest.raises(InputError, match=r"data\.csv, ") as caught:
        one_feature(tmp_path, name, dict(attributes), text, "last:1", chunk_bytes=chunk_bytes)
    assert words in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["data.csv", "spec.yaml"]


FIELDS = [
    ({"transform": "hash"}, "feature_spec.city.cardinality"),
    ({"cardinality": 9, "transform": {"hsah": {}}}, r"city.transform.hsah: expected one of the keys column"),
    ({"cardinality": 9, "transform": ["hash", "vocabulary"]}, "only one of hash, vocabulary and bucketise"),
    ({"transform": {"vocabulary": {"min_count": 0}}}, "vocabulary.min_count: expected an integer of at least 1"),
    ({"transform": {"vocabulary": {"least": 2}}}, "transform.vocabulary: expected a mapping with the keys min_count"),
    ({"transform": {"bucketise": {"edges": [2, 1]}}}, "bucketise.edges: expected rising numbers"),
    ({"transform": {"bucketise": {}}}, "bucketise: expected edges or quantiles"),
    ({"cardinality": 3, "transform": {"bucketise": {"edges": [1, 2]}}}, "at most 1 edges for cardinality 3"),
    ({"cardinality": 9, "transform": {"column": 3}}, "column: expected the name of a source column"),
    (number(fill="most"), "fill: expected a number, mean or median"),
    (number(clip=[2, 1]), r"clip: expected \[low, high\]"),
    (number(log="yes"), "log: expected true or false"),
    (number(hash={}), "hash: expected one of the keys"),
    (
        {"max_hotness": 1, "transform": {"columns": ["a", "b"], "vocabulary": {}}},
        "columns: expected at most max_hotness",
    ),
    ({"max_hotness": 2, "transform": {"separator": "", "vocabulary": {}}}, "separator: expected a text"),
]


@pytest.mark.parametrize(("attributes", "words"), FIELDS)
def test_a_bad_transform_is_named(tmp_path, attributes, words):
    with pytest.raises(InputError, match=words) as caught:
        one_feature(tmp_path, "city", dict(attributes))
    assert "spec.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "test files or a split"),
        ({"split": "half"}, "random:SHARE"),
        ({"split": "random:1"}, "between 0 and 1"),
        ({"split": "last:6"}, "fewer than the 6 rows"),
        ({"split": "last:1.5"}, "expected a share between 0 and 1 or a whole number of rows, got 'last:1.5'"),
        ({"split": "last:0"}, "a whole number of rows, got 'last:0'"),
        ({"split": "random:0.5", "test": ["x.csv"]}, "got both"),
        ({"split": "group:0.5"}, "channel_spec.map"),
        ({"test": ["nothere.csv"]}, "nothere.csv"),
        ({"inputs": [], "test": ["data.csv"]}, "expected input files"),
        (
            {"split": "last:1", "stats": "nothere"},
            "nothere.*expected the statistics of an earlier run, got no such file",
        ),
        ({"split": "last:1", "spec": "nothere.yaml"}, "nothere.yaml: expected a readable YAML file, got no such file"),
        ({"split": "last:1", "workers": 0}, "workers is 0"),
        ({"split": "last:1", "seed": -1}, "seed is -1"),
    ],
)
def test_arguments_that_do_not_fit(tmp_path, options, words):
    (tmp_path / "data.csv").write_text(CSV)
    spec = write_spec(tmp_path / "spec.yaml", {"age": {"transform": {"fill": 0}}, "click": CLICK}, numeric=["age"])
    with pytest.raises(InputError, match=words):
        run(TabularConfig(**({"spec": spec, "out": tmp_path / "out", "inputs": [tmp_path / "data.csv"]} | options)))
    assert not (tmp_path / "out").exists()


def test_statistics_of_another_transform_are_refused(tmp_path):
    one_feature(tmp_path, "city", {"transform": "vocabulary"})
    (tmp_path / "out").rename(tmp_path / "first")
    with pytest.raises(InputError, match="city: was learned with another transform"):
        one_feature(tmp_path, "city", {"transform": {"vocabulary": {"min_count": 2}}}, stats=tmp_path / "first")
    (tmp_path / "first" / "statistics" / "statistics.json").write_text("{}")
    with pytest.raises(InputError, match=r"statistics\.json: expected the statistics .* every feature of .*\.yaml$"):
        one_feature(tmp_path, "city", {"transform": "vocabulary"}, stats=tmp_path / "first")


def test_malformed_files(tmp_path):
    for text, words in (
        ("", "empty"),
        ("city,click\na,yes\nb\n", "line 3"),
        ("town,click\na,yes\n", "city is missing"),
    ):
        with pytest.raises(InputError, match=words):
            one_feature(tmp_path, "city", {"transform": "vocabulary"}, text, "random:0.5")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    spec = tmp_path / "spec.yaml"
    with pytest.raises(InputError, match=r"a\.parquet: cannot be read as Parquet"):
        run(TabularConfig(spec, tmp_path / "out", [tmp_path / "a.parquet"], split="random:0.5"))
    pq.write_table(pa.table({"city": [{"a": 1}], "click": ["yes"]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="column city: expected numbers, text or lists"):
        run(TabularConfig(spec, tmp_path / "out", [tmp_path / "a.parquet"], split="random:0.5"))
