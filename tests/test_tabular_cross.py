"""Feature crosses: ids of combinations, exact and hashed, against plain Python; refusals; and that they are learned."""

import json
from itertools import product
from math import prod

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from commands import main
from test_tabular import CLICK, read, write_spec

from preprocess import hashing
from preprocess.tabular import Encoder, TabularConfig, cross, run
from widedeep.describe import describe
from widedeep.errors import InputError
from widedeep.feature_spec import FeatureSpec

MASK = 2**64 - 1
EXPECTED = [[5506, 1225, 4102, 8551], [62614204, 2075968408, 1735617493, 956752458]]
CROSSED = {
    "town": {"transform": {"vocabulary": {"min_count": 2}, "nulls": "?"}},
    "page": {"cardinality": 7, "transform": {"hash": {"seed": 5}}},
    "age": {"transform": {"bucketise": {"quantiles": 4}}},
    "size": {"transform": {"bucketise": {"edges": [10, 20]}}},
    "slot": {"cardinality": 6},
}


def crossing(*names, **attributes):
    return {"embedding_dim": 4, "transform": {"cross": list(names)}} | attributes


CROSSES = {
    "all": crossing("town", "page", "age", "size", "slot"),  # declared before what it crosses
    "two": crossing("age", "town"),
    "hashed": crossing("slot", "page", "town", cardinality=11),
    "seeded": {"cardinality": 13, "transform": {"cross": {"features": ["page", "size"], "seed": 3}}},
    "roomy": crossing("size", "slot", cardinality=1000),
}
ONE_HOT = ["all", "two", *CROSSED, "hashed", "seeded", "roomy"]


def mix(z):
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
    return z ^ z >> 31


def oracle(ids, sizes, cardinality=None, seed=0):
    """The id of one tuple."""
    if min(ids) < 0:
        return -1
    if cardinality is None or prod(sizes) <= cardinality:
        return list(product(*map(range, sizes))).index(tuple(ids))
    return oracle_hash(ids, cardinality, seed)


def oracle_hash(ids, buckets, seed):
    h = mix(seed + 0x9E3779B97F4A7C15 & MASK)
    for i in ids:
        h = mix(h + i + 0x9E3779B97F4A7C15 & MASK)
    return h % buckets


def table(seed, n, unseen=False):
    g = np.random.default_rng(seed)

    def some(values):
        return [None if missing else value for value, missing in zip(values, g.random(n) < 0.1)]

    return pa.table(
        {
            "town": pa.array(
                some([f"t{i}" if i else "?" for i in g.integers(9 if unseen else 5, size=n)]), pa.string()
            ),
            "page": pa.array(some([f"p{i}" for i in g.integers(99, size=n)]), pa.string()),
            "age": pa.array(some(g.normal(40, 20, n).round(1).tolist()), pa.float64()),
            "size": pa.array(some(g.integers(30, size=n).tolist()), pa.int64()),
            "slot": pa.array(some(g.integers(6, size=n).tolist()), pa.int64()),
            "click": g.choice(["yes", "no"], n).tolist(),
        }
    )


def spec_of(folder, crosses=None, **more):
    crosses = CROSSES if crosses is None else crosses
    one_hot = [name for name in ONE_HOT if name in CROSSED or name in crosses]
    one_hot += [name for name in crosses if name not in one_hot]
    features = CROSSED | crosses | {"click": CLICK}
    return write_spec(folder / "spec.yaml", features | more.pop("features", {}), one_hot=one_hot, **more)


@pytest.fixture
def data(tmp_path):
    """A data set of 300 rows, the last 60 for tests."""
    pq.write_table(table(0, 300), tmp_path / "rows.parquet")
    spec = spec_of(tmp_path)
    run(TabularConfig(spec=spec, inputs=[tmp_path / "rows.parquet"], out=tmp_path / "data", split="last:60"))
    return tmp_path / "data"


def check_crosses(arrays, sizes, crosses=CROSSES):
    """Every row of every cross is what the oracle makes of the crossed ids that were written beside it."""
    for name, attributes in crosses.items():
        settings = attributes["transform"]["cross"]
        settings = settings if isinstance(settings, dict) else {"features": settings}
        names = settings["features"]
        args = [sizes[n] for n in names], attributes.get("cardinality"), settings.get("seed", 0)
        want = [oracle(row, *args) for row in zip(*(arrays[n].tolist() for n in names))]
        assert arrays[name].tolist() == want, name


def test_ids_are_those_of_plain_python(data):
    spec = FeatureSpec.load(data)
    sizes = dict(zip(spec.names, spec.cardinalities))
    assert sizes["all"] == prod(sizes[name] for name in CROSSED) == sizes["town"] * 7 * 5 * 4 * 6
    assert sizes["two"] == 5 * sizes["town"]
    assert (sizes["hashed"], sizes["seeded"], sizes["roomy"]) == (11, 13, 1000)
    for part in ("train", "test"):
        arrays = read(data / part)
        assert (arrays["slot"] == -1).any()
        check_crosses(arrays, sizes)
        for name in ("all", "hashed", "roomy"):  # they cross slot, an id column; the others' missing values have ids
            assert ((arrays[name] == -1) == (arrays["slot"] == -1)).all()
        assert min(arrays["two"].min(), arrays["seeded"].min()) >= 0
        assert arrays["roomy"].max() < 4 * 6


def test_a_cross_counts_the_rows_that_lack_one_of_its_values(data):
    rows = table(0, 300).to_pandas().replace("?", None).isna()
    nulls = json.loads((data / "report.json").read_text())["nulls"]
    for name in CROSSED:
        assert nulls[name] == rows[name].sum()
    assert nulls["two"] == (rows["age"] | rows["town"]).sum()
    assert nulls["all"] == rows[list(CROSSED)].any(axis=1).sum()
    described = describe(data)["categorical"]["two"]
    assert described["nulls"] == nulls["two"]
    assert described["cardinality"] == FeatureSpec.load(data).categorical[1].cardinality


@pytest.mark.parametrize("kind", ["csv", "tsv", "csv.gz", "parquet", "arrow"])
def test_the_cut_into_chunks_and_the_kind_of_file_leave_no_trace(tmp_path, data, kind, monkeypatch):
    rows = table(0, 300).to_pandas().astype({"size": "Int64", "slot": "Int64"})
    path = tmp_path / f"again.{kind}"
    if kind == "parquet":
        pq.write_table(table(0, 300), path, row_group_size=7)
    elif kind == "arrow":
        pa.feather.write_feather(table(0, 300), path, chunksize=7)
    else:
        rows.to_csv(path, index=False, sep="\t" if kind == "tsv" else ",")
    monkeypatch.setattr("preprocess.tabular.source.CHUNK_ROWS", 9)
    spec = tmp_path / "spec.yaml"
    run(TabularConfig(spec=spec, inputs=[path], out=tmp_path / "again", split="last:60", chunk_bytes=50, workers=2))
    for part in ("train", "test"):
        first, second = read(data / part), read(tmp_path / "again" / part)
        assert all((first[name] == second[name]).all() for name in first)
    assert (tmp_path / "again" / "feature_spec.yaml").read_text() == (data / "feature_spec.yaml").read_text()


def test_new_rows_with_unseen_values_in_files_and_in_memory(tmp_path, data):
    rows = table(1, 200, unseen=True)
    pq.write_table(rows.drop_columns(["click"]), tmp_path / "new.parquet")
    encoder = Encoder(data)
    for spec in (data, tmp_path / "spec.yaml"):  # with the cardinalities that were learned, and without
        run(TabularConfig(spec=spec, stats=data, test=[tmp_path / "new.parquet"], out=tmp_path / "new"))
        made = FeatureSpec.load(tmp_path / "new")
        assert made == FeatureSpec.load(data)
        arrays = read(tmp_path / "new" / "test")
        assert (arrays["town"] == 0).any()
        check_crosses(arrays, dict(zip(made.names, made.cardinalities)))
        for some in (rows, rows.to_pylist(), rows.slice(0, 0), rows.slice(3, 1)):
            ids, numeric = encoder(some)
            want = np.stack([arrays[name] for name in made.names], axis=1)
            want = want[3:4] if len(some) == 1 else want[: len(some)]
            assert ids.dtype == np.int32
            np.testing.assert_array_equal(ids, want)
            assert numeric.shape == (len(some), 0)


def test_the_encoder_asks_for_no_other_columns(tmp_path):
    crosses = {"pair": crossing("town", "size"), "hashed": crossing("size", "town", cardinality=5)}
    features = {name: CROSSED[name] for name in ("town", "size")} | crosses | {"click": CLICK}
    spec = write_spec(tmp_path / "spec.yaml", features, one_hot=["pair", "town", "size", "hashed"])
    pq.write_table(table(2, 50), tmp_path / "rows.parquet")
    run(TabularConfig(spec=spec, inputs=[tmp_path / "rows.parquet"], out=tmp_path / "data", split="none"))
    rows = table(2, 50).select(["town", "size"])
    arrays = read(tmp_path / "data" / "train")
    ids, _ = Encoder(tmp_path / "data")(rows)
    np.testing.assert_array_equal(ids, np.stack([arrays[n] for n in ("pair", "town", "size", "hashed")], axis=1))
    with pytest.raises(InputError, match=r"^column size is missing; the table has 'town'$"):
        Encoder(tmp_path / "data")(rows.select(["town"]))
    pq.write_table(table(2, 50).drop_columns(["town"]), tmp_path / "less.parquet")
    with pytest.raises(InputError, match=r"less\.parquet: column town is missing"):
        run(TabularConfig(spec=spec, inputs=[tmp_path / "less.parquet"], out=tmp_path / "no", split="none"))


def test_without_a_cardinality_all_combinations_are_apart(tmp_path):
    sizes = (3, 4, 5)
    combinations = list(product(*map(range, sizes)))
    order = np.random.default_rng(3).permutation(len(combinations))
    lines = "".join("{},{},{},1\n".format(*combinations[i]) for i in order)
    (tmp_path / "rows.csv").write_text(f"a,b,c,click\n{lines}")
    features = {name: {"cardinality": size} for name, size in zip("abc", sizes)} | {"click": {}}
    for name, cardinality in {"exact": None, "just": 60, "short": 59}.items():
        features[name] = crossing("a", "b", "c") | ({"cardinality": cardinality} if cardinality else {})
    one_hot = [name for name in features if name != "click"]
    spec = write_spec(tmp_path / "spec.yaml", features, one_hot=one_hot)
    run(TabularConfig(spec=spec, inputs=[tmp_path / "rows.csv"], out=tmp_path / "data", split="none"))
    arrays = read(tmp_path / "data" / "train")
    assert arrays["exact"].tolist() == arrays["just"].tolist() == order.tolist()
    assert len(set(arrays["short"].tolist())) < 59
    kept = json.loads((tmp_path / "data" / "statistics" / "statistics.json").read_text())["features"]
    assert kept["exact"] == {"transform": {"cross": ["a", "b", "c"]}, "sizes": {"a": 3, "b": 4, "c": 5}}
    assert kept["short"] == {"transform": {"cross": ["a", "b", "c"]}, "hashed_to": 59}


def test_the_hash_of_tuples_is_fixed():
    columns = [np.array([0, 1, 2, 9_999_999]), np.array([5, 0, 2, 2_147_483_646])]
    assert hashing.tuple_buckets(columns, 10_000).tolist() == EXPECTED[0]
    assert hashing.tuple_buckets([*columns, columns[0]], 2**31 - 1, 7).tolist() == EXPECTED[1]
    g = np.random.default_rng(4)
    many = [g.integers(0, 2**31, 1000, dtype) for dtype in (np.int64, np.uint32, np.int64)]
    many[0][0] = -1
    for seed in (0, 1, 2**63 - 1):
        want = [oracle_hash([int(x) for x in row], 997, seed) for row in zip(*many)]
        assert hashing.tuple_buckets(many, 997, seed).tolist() == want
    assert hashing.tuple_buckets([np.empty(0, np.int64)] * 2, 5).tolist() == []
    # The order counts, so (a, b) and (b, a) are two; and hashes spread.
    swapped = hashing.tuple_buckets(many[1::-1], 1 << 20), hashing.tuple_buckets(many[:2], 1 << 20)
    assert (swapped[0] != swapped[1]).mean() > 0.99
    grid = np.divmod(np.arange(100_000), 317)
    counts = np.bincount(hashing.tuple_buckets(grid, 100), minlength=100)
    assert 850 < counts.min() <= counts.max() < 1150


ERRORS = {
    "a text": ({"cross": "town, age"}, "cross: expected a list of two or more features, got 'town, age'"),
    "nothing": ("cross", "pair.transform.cross: expected a list of two or more features, got None"),
    "one": ({"cross": ["town"]}, r"pair.transform.cross: expected a list of two or more features, got \['town'\]"),
    "a bool": ({"cross": ["town", True]}, r"cross: expected a list of two or more features, got \['town', True\]"),
    "twice": ({"cross": ["town", "age", "town"]}, "cross: expected each feature once, got 'town' twice"),
    "itself": ({"cross": ["town", "pair"]}, "that are no crosses, got 'pair'"),
    "another cross": ({"cross": ["two", "town"]}, "that are no crosses, got 'two'"),
    "unknown": ({"cross": ["town", "city"]}, "expected features of onehot_categorical that are no crosses, got 'city'"),
    "in no channel": ({"cross": ["town", "rest"]}, "features of onehot_categorical that are no crosses, got 'rest'"),
    "multi-hot": ({"cross": ["town", "tags"]}, "features of onehot_categorical that are no crosses, got 'tags'"),
    "number": ({"cross": ["town", "price"]}, "features of onehot_categorical that are no crosses, got 'price'"),
    "label": ({"cross": ["town", "click"]}, "features of onehot_categorical that are no crosses, got 'click'"),
    "column": ({"cross": ["town", "age"], "column": "x"}, "pair.transform.column: expected no such key beside `cross`"),
    "nulls": ({"cross": ["town", "age"], "nulls": "?"}, "pair.transform.nulls: expected no such key beside `cross`"),
    "hash": ({"cross": ["town", "age"], "hash": {}}, "pair.transform.hash: expected no such key beside `cross`"),
    "seed": (
        {"cross": {"features": ["town", "age"], "seed": -1}},
        "cross.seed: expected an integer of at least 0, got",
    ),
    "seed alone": ({"cross": {"features": ["town", "age"], "seed": 1}}, "cross.seed: expected a cardinality beside it"),
    "other key": ({"cross": {"of": ["town", "age"]}}, "cross: expected a mapping with the keys features, seed, got"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_a_spec_may_not_say(tmp_path, case):
    transform, told = ERRORS[case]
    multi = {"cardinality": 5, "max_hotness": 2, "transform": "hash"}
    others = {"tags": multi, "price": {}, "rest": {"cardinality": 5}}
    crosses = {"two": CROSSES["two"], "pair": {"embedding_dim": 4, "transform": transform}}
    spec = spec_of(tmp_path, crosses, features=others, multi_hot=["tags"], numeric=["price"])
    with pytest.raises(InputError) as raised:
        run(TabularConfig(spec=spec, inputs=[tmp_path / "none.csv"], out=tmp_path / "data", split="none"))
    assert str(raised.value).startswith(f"{spec}: feature_spec.pair.transform")
    assert raised.match(told)
    assert "\n" not in str(raised.value)


def test_other_kinds_of_features_have_no_cross(tmp_path):
    for kind, attributes in {"multi_hot": {"cardinality": 5, "max_hotness": 2}, "numeric": {}}.items():
        features = {"tags": attributes | {"transform": {"cross": ["a", "b"]}}, "click": CLICK}
        spec = write_spec(tmp_path / "spec.yaml", features, **{kind: ["tags"]})
        with pytest.raises(InputError, match=r"feature_spec\.tags\.transform\.cross: expected one of the keys column"):
            run(TabularConfig(spec=spec, inputs=[tmp_path / "none.csv"], out=tmp_path / "data", split="none"))


def test_too_many_combinations_want_a_cardinality(tmp_path, monkeypatch):
    """Before a file is opened where all sizes are known, else once they have been learned."""
    sizes = {"a": {"cardinality": 4097}, "b": {"cardinality": 4096}, "t": {"transform": "vocabulary"}}
    features = sizes | {"pair": crossing("a", "b"), "three": crossing("a", "t"), "click": {}}
    spec = write_spec(tmp_path / "spec.yaml", features, one_hot=["a", "b", "t", "pair", "three"])
    told = "feature_spec.pair.cardinality: expected one, by which combinations are hashed: 4097 x 4096 combinations are"
    with pytest.raises(InputError, match=f"{told} more than 16777216$"):
        run(TabularConfig(spec=spec, inputs=[tmp_path / "none.csv"], out=tmp_path / "data", split="none"))
    features["a"] = {"cardinality": 4096}  # just fits; so does what might become more buckets than it does
    features["t"] = {"transform": {"column": "a", "bucketise": {"quantiles": 5000}}}
    write_spec(tmp_path / "spec.yaml", features, one_hot=["a", "b", "t", "pair", "three"])
    (tmp_path / "rows.csv").write_text("a,b,click\n4095,4095,1\n4094,0,0\n")
    run(TabularConfig(spec=spec, inputs=[tmp_path / "rows.csv"], out=tmp_path / "data", split="none"))
    assert read(tmp_path / "data" / "train")["pair"].tolist() == [2**24 - 1, 4094 * 4096]

    monkeypatch.setattr(cross, "LIMIT", 20)
    rows = table(5, 200)
    pq.write_table(rows, tmp_path / "rows.parquet")
    spec = spec_of(tmp_path, {"pair": crossing("town", "age")})
    with pytest.raises(InputError, match=r"feature_spec\.pair\.cardinality: .*: 5 x 5 combinations are more than 20$"):
        run(TabularConfig(spec=spec, inputs=[tmp_path / "rows.parquet"], out=tmp_path / "other", split="none"))
    assert not (tmp_path / "other").exists()
    spec = spec_of(
        tmp_path, {"pair": crossing("town", "age", cardinality=25)}
    )  # stated, it may be as large as it likes
    run(TabularConfig(spec=spec, inputs=[tmp_path / "rows.parquet"], out=tmp_path / "other", split="none"))
    check_crosses(read(tmp_path / "other" / "train"), {"town": 5, "age": 5}, {"pair": crossing("town", "age")})


def test_statistics_of_another_cross_are_refused(tmp_path, data):
    pq.write_table(table(6, 20), tmp_path / "new.parquet")
    config = {"stats": data, "test": [tmp_path / "new.parquet"], "out": tmp_path / "new"}
    changed = [
        ({"two": crossing("town", "age")}, "two: was learned with another transform"),
        ({"seeded": crossing("page", "size", cardinality=13)}, "seeded: was learned with another transform"),
        ({"hashed": crossing("slot", "page", "town", cardinality=12)}, "hashed: expected the cardinalities of"),
        ({"hashed": crossing("slot", "page", "town", cardinality=999)}, "hashed: expected the cardinalities of"),
        ({"slot": {"cardinality": 7}}, "all: expected the cardinalities of"),
        ({"three": crossing("town", "page")}, "for every feature of"),
    ]
    for crosses, told in changed:
        spec = spec_of(tmp_path, CROSSES | crosses)
        with pytest.raises(InputError, match=f"statistics.json: .*{told}"):
            run(TabularConfig(spec=spec, **config))
    run(TabularConfig(spec=spec_of(tmp_path), **config))


def test_other_statistics_of_a_cross_are_told_from_the_models(tmp_path, data):
    spec = spec_of(tmp_path, CROSSES | {"two": crossing("town", "age")})
    run(TabularConfig(spec=spec, inputs=[tmp_path / "rows.parquet"], out=tmp_path / "swapped", split="last:60"))
    ours, theirs = FeatureSpec.load(tmp_path / "swapped"), FeatureSpec.load(data)
    assert ours.cardinalities == theirs.cardinalities
    with pytest.raises(InputError, match="was encoded with other statistics"):
        ours.check_statistics(theirs, tmp_path / "model")


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_a_spec_with_sources_of_its_own_may_have_a_cross(tmp_path, kind):
    """It is listed as a feature, though the files have no such column; the CSV files have no header."""
    names = ["slot", "pair", "size", "click"]
    rows = table(7, 40).set_column(5, "click", pa.array([0, 1] * 20)).select(["slot", "size", "click"])
    for part in ("train", "test"):
        if kind == "parquet":
            pq.write_table(rows, tmp_path / f"{part}.parquet")
        else:
            pacsv.write_csv(rows, tmp_path / f"{part}.csv", pacsv.WriteOptions(include_header=False))
    chunks = {m: [{"type": kind, "features": names, "files": [f"{m}.{kind}"]}] for m in ("train", "test")}
    features = {"slot": {"cardinality": 6}, "size": {"cardinality": 30}, "pair": crossing("slot", "size"), "click": {}}
    spec = write_spec(tmp_path / "spec.yaml", features, one_hot=names[:3], source_spec=chunks)
    run(TabularConfig(spec=spec, out=tmp_path / "data"))
    check_crosses(read(tmp_path / "data" / "test"), {"slot": 6, "size": 30}, {"pair": features["pair"]})


def interaction(folder, with_cross):
    """Rows whose label depends on two features together and on neither alone."""
    g = np.random.default_rng(8)
    n = 6000
    a, b = g.integers(12, size=(2, n))
    click = g.random(n) < np.where((a + b) % 2, 0.9, 0.1)
    lines = "".join(f"v{x},w{y},{int(z)}\n" for x, y, z in zip(a, b, click))
    (folder / "rows.csv").write_text(f"a,b,click\n{lines}")
    features = {name: {"embedding_dim": 1, "transform": "vocabulary"} for name in "ab"} | {"click": {}}
    if with_cross:
        features["a_x_b"] = {"embedding_dim": 1, "transform": {"cross": ["a", "b"]}}
    return write_spec(folder / "spec.yaml", features, one_hot=[name for name in features if name != "click"])


@pytest.mark.parametrize("with_cross", [True, False])
def test_the_wide_part_learns_an_interaction_by_its_cross_alone(tmp_path, with_cross):
    spec, data = interaction(tmp_path, with_cross), tmp_path / "data"
    words = [
        "preprocess",
        "tabular",
        str(tmp_path / "rows.csv"),
        f"--spec={spec}",
        "--split=last:2000",
        f"--out={data}",
    ]
    assert main(words) == 0
    places = [f"--dataset_path={data}", f"--model_dir={tmp_path / 'model'}", f"--results_dir={tmp_path / 'results'}"]
    # A deep part of one unit, that stands nearly still.
    shape = ["--deep_hidden_units", "1", "--deep_dropout=0", "--deep_learning_rate=1e-7", "--global_batch_size=256"]
    speed = ["--linear_learning_rate=0.5", "--num_epochs=8", "--deep_warmup_epochs=0"]
    assert main(["train", *places, *shape, *speed, "--seed=1", "--cpu", "--disable_map_calculation"]) == 0
    auc = json.loads((tmp_path / "results" / "evaluation.json").read_text())["auc"]
    if with_cross:
        assert auc > 0.87  # the labels' own noise allows 0.9
    else:
        assert auc < 0.6
