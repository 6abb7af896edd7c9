"""Raw rows in memory get the ids and numbers that a run over a file gives them."""

import decimal
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from types import SimpleNamespace
from uuid import UUID

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_tabular import CLICK, read, write_spec

from preprocess.tabular import Encoder, TabularConfig, run
from widedeep.errors import InputError
from widedeep.feature_spec import FeatureSpec

FEATURES = {
    "user": {"transform": {"vocabulary": {"min_count": 2}, "nulls": "?"}},
    "page": {"cardinality": 40, "transform": {"hash": {"seed": 5}}},
    "age": {"transform": {"bucketise": {"quantiles": 4}}},
    "slot": {"cardinality": 6},
    "tags": {"max_hotness": 2, "transform": {"vocabulary": {}, "separator": "|"}},
    "words": {"max_hotness": 3, "combiner": "mean", "cardinality": 30, "transform": "hash"},
    "last": {"max_hotness": 3, "cardinality": 9, "transform": {"columns": "last[2]", "mask": "seen[2]"}},
    "price": {"transform": {"fill": "median", "clip": [0, 90], "log": True, "standardise": True}},
    "rank": {"transform": {"fill": 7}},
    "click": CLICK,
}
CHANNELS = {
    "one_hot": ["user", "page", "age", "slot"],
    "multi_hot": ["tags", "words", "last"],
    "numeric": ["price", "rank"],
}


def rows_of(seed: int, n: int) -> pa.Table:
    g = np.random.default_rng(seed)

    def some(values):
        return [None if missing else value for value, missing in zip(values, g.random(n) < 0.15)]

    def text(letter, count):
        return [f"{letter}{i}" for i in g.integers(count, size=n)]

    columns = {
        "user": some([*text("u", 12)[1:], "?"]),
        "page": some(text("ü ", 500)),
        "age": pa.array(some(g.normal(40, 20, n).tolist()), pa.float64()),
        "slot": pa.array(some(g.integers(6, size=n).tolist()), pa.int16()),
        "tags": some(["|".join(text("t", 5)[: g.integers(4)]) for _ in range(n)]),
        "words": pa.array(some([text("w", 50)[: g.integers(5)] for _ in range(n)]), pa.list_(pa.string())),
        "price": pa.array(some((g.random(n) * 100).tolist()), pa.float64()),
        "rank": pa.array(some(g.integers(99, size=n).tolist()), pa.int32()),
        "click": g.choice(["yes", "no"], n).tolist(),
    }
    for i in range(2):
        columns[f"last_{i}"] = pa.array(some(g.integers(9, size=n).tolist()), pa.int64())
        columns[f"seen_{i}"] = pa.array(g.integers(2, size=n))
    return pa.table(columns)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data set whose statistics were learned on 300 rows."""
    folder = tmp_path_factory.mktemp("encoder")
    spec = write_spec(folder / "spec.yaml", FEATURES, **CHANNELS)
    pq.write_table(rows_of(0, 300), folder / "train.parquet")
    run(TabularConfig(spec=spec, inputs=[folder / "train.parquet"], out=folder / "data", split="last:50"))
    return folder / "data"


def by_file(data, rows, folder):
    """What a run with the same statistics writes: ids [B, K] and numbers [B, N], in the order of the feature spec."""
    pq.write_table(rows, folder / "rows.parquet")
    run(TabularConfig(spec=data, stats=data, test=[folder / "rows.parquet"], out=folder / "again"))
    spec, arrays, n = FeatureSpec.load(folder / "again"), read(folder / "again" / "test"), rows.num_rows
    ids = [arrays[f.name].reshape(n, f.hotness) for f in spec.categorical]
    return np.hstack(ids).astype(np.int32), np.stack([arrays[f.name] for f in spec.numeric], 1)


def as_frame(rows):
    """Pandas, as a program that reads a file with it has the rows: missing integers make floats of a column."""
    return rows.to_pandas()


def with_nan(rows):
    """Of objects, with NaN where there is no value, whatever the column holds."""
    return as_frame(rows).astype(object).where(lambda frame: frame.notna(), float("nan"))


FORMS = {
    "table": lambda rows: rows,
    "batch": lambda rows: rows.combine_chunks().to_batches()[0],
    "columns": lambda rows: rows.to_pydict(),
    "mappings": lambda rows: rows.to_pylist(),
    "pandas": lambda rows: as_frame(rows).assign(payload=[object()] * rows.num_rows),
    "pandas, its own types": lambda rows: as_frame(rows).convert_dtypes(),
    "mappings of pandas": lambda rows: with_nan(rows).to_dict("records"),
    "arrays of numpy": lambda rows: {name: column.to_numpy() for name, column in with_nan(rows).items()},
    "polars": lambda rows: pytest.importorskip("polars").from_arrow(rows),
}


@pytest.mark.parametrize("form", FORMS)
def test_rows_in_memory_are_encoded_as_those_of_a_file(form, data, tmp_path):
    rows = rows_of(1, 200)
    want = by_file(data, rows, tmp_path)
    encode = Encoder(data)
    got = encode(FORMS[form](rows))
    assert [a.dtype for a in got] == [np.int32, np.float32]
    for have, wanted in zip(got, want):
        np.testing.assert_array_equal(have, wanted)
    assert got[0].shape == (200, encode.spec.id_columns)
    assert (got[0] == -1).any()
    assert encode.spec.metadata["statistics"] == FeatureSpec.load(data).metadata["statistics"]


def test_single_rows_no_rows_and_several_threads(data):
    encode, rows = Encoder(data), rows_of(2, 64)
    whole = encode(rows)
    with ThreadPoolExecutor(4) as pool:
        single = list(pool.map(lambda i: encode(rows.slice(i, 1)), range(64)))
    for part in range(2):
        np.testing.assert_array_equal(np.concatenate([one[part] for one in single]), whole[part])
    assert [a.shape for a in encode(rows.slice(0, 0))] == [(0, encode.spec.id_columns), (0, 2)]
    request = {"user": "u1", "page": "nobody's", "words": ["w1"], "price": "3.5"}
    for column in ("age", "slot", "tags", "rank", "last_0", "last_1", "seen_0", "seen_1"):
        request[column] = None
    ids, numbers = encode([request])
    assert ids[0, 0] > 0
    assert (numbers[0, 1], ids[0, -3:].tolist()) == (7, [-1] * 3)


def test_numbers_as_a_data_set_of_halves_holds_them(data, tmp_path):
    rows = rows_of(3, 100)
    pq.write_table(rows, tmp_path / "rows.parquet")
    options = {"spec": data, "stats": data, "test": [tmp_path / "rows.parquet"], "numeric": "float16"}
    run(TabularConfig(out=tmp_path / "half", **options))
    for encode in (Encoder(data, numeric="float16"), Encoder(tmp_path / "half")):
        np.testing.assert_array_equal(encode(rows)[1][:, 0], read(tmp_path / "half" / "test")["price"])
    spec = tmp_path / "half" / "feature_spec.yaml"
    spec.write_text(spec.read_text().replace("numeric: float16", "numeric: half"))
    told = r"feature_spec.yaml: metadata.numeric: expected one of float16, float32, got 'half'$"
    with pytest.raises(InputError, match=told):
        Encoder(tmp_path / "half")
    with pytest.raises(InputError, match=r"^numeric is 'fp16', expected one of float16, float32$"):
        Encoder(data, numeric="fp16")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda row: row.pop("price"), "^row 2: column price is missing; without a value it is None$"),
        (lambda row: row.update(price="cheap"), "^row 2: column price: expected a number, found 'cheap'$"),
        (lambda row: row.update(slot="6"), "^row 2: column slot: expected an id of 0 to 5, found '6'$"),
        (lambda row: row.update(slot=6), "^column slot: expected values of one type: "),
        (lambda row: row.update(user=["u1"]), "^column user: expected values of one type: "),
        (lambda row: row.update(page=object()), "^column page: expected values of one type: "),
        (lambda row: row.update(rank=2**70), "^column rank: expected values of one type: "),
        (lambda row: row.update(else_=object()), None),
    ],
)
def test_rows_that_do_not_fit(change, said, data):
    rows = [row | {"price": "1", "slot": "2", "user": "u3"} for row in rows_of(4, 2).to_pylist()]
    change(rows[1])
    encode = Encoder(data)
    if said is None:
        assert len(encode(rows)[0]) == 2
        return
    with pytest.raises(InputError, match=said):
        encode(rows)


def test_what_is_no_table(data):
    encode, rows = Encoder(data), rows_of(4, 2)
    with pytest.raises(InputError, match=r"^column price is missing; the table has 'user', 'page', "):
        encode(rows.drop_columns("price"))
    with pytest.raises(InputError, match=r"^column price is missing; the table has 'user', 'page', "):
        encode(rows.drop_columns("price").to_pydict())
    with pytest.raises(InputError, match=r"^row 1: expected a mapping of columns, got list$"):
        encode([[1, 2]])
    for value, kind in (("u1", "str"), (None, "NoneType")):
        with pytest.raises(InputError, match=rf"^column user: expected the values of all rows, got {kind}; "):
            encode(rows.to_pylist()[0] | {"user": value})
    unindexed = SimpleNamespace(columns=["user"])  # as a polars LazyFrame is
    for nothing in ({}, unindexed):
        with pytest.raises(InputError, match=r"^(rows: expected a table: |column user is missing)"):
            encode(nothing)
    frame = rows.to_pandas()
    for nothing, kind in (
        (7, "int"),
        ("rows.csv", "str"),
        (frame.iloc[0], "Series"),
        (tuple(rows.to_pylist()), "tuple"),
    ):
        with pytest.raises(
            InputError, match=rf"^rows: expected a mapping .*, got {kind}; a single row is a list of one "
        ):
            encode(nothing)


def test_a_column_of_one_bare_value_is_refused(data):
    encode = Encoder(data)
    name = encode.columns[0]
    for value in (5, "x", np.array(5), np.float32(1)):
        with pytest.raises(InputError, match=rf"^column {name}: expected the values of all rows, got \w+; a"):
            encode({name: value})


def test_lists_where_a_feature_has_one_value(data):
    rows = rows_of(5, 3).to_pydict() | {"user": [["u1"], ["u2"], []]}
    with pytest.raises(InputError, match=r"^column user: expected one value a row for user, found lists$"):
        Encoder(data)(rows)


def test_statistics_that_do_not_belong_to_the_spec_are_refused(data, tmp_path):
    (tmp_path / "feature_spec.yaml").write_bytes((data / "feature_spec.yaml").read_bytes())
    with pytest.raises(InputError, match="expected the statistics of an earlier run"):
        Encoder(tmp_path)
    (tmp_path / "statistics.json").write_bytes((data / "statistics" / "statistics.json").read_bytes())
    with pytest.raises(InputError, match=r"/statistics/statistics.json: expected the statistics of an earlier run, "):
        Encoder(tmp_path)  # what lies elsewhere is not read
    other = json.loads((data / "statistics" / "statistics.json").read_text())
    other["features"]["user"]["values"].reverse()
    (tmp_path / "statistics").mkdir()
    (tmp_path / "statistics" / "statistics.json").write_text(json.dumps(other))
    with pytest.raises(
        InputError, match=r"/statistics: expected the statistics that .*feature_spec.yaml was made with$"
    ):
        Encoder(tmp_path)


def test_a_server_needs_no_torch(data):
    code = (
        "import sys; from preprocess.tabular import Encoder; encode = Encoder(sys.argv[1]); "
        "sys.exit('torch' in sys.modules or 'pandas' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(data)]).returncode == 0


def test_rows_read_from_csv_as_texts_are_those_of_the_file(tmp_path):
    """By the calls that docs/your-own-data.md names; what is guessed of such columns has other texts."""
    rng = np.random.default_rng()
    code, flag = rng.choice(["007", "7", "NA", "", "x"], 90), rng.choice(["True", "False"], 90)
    half, click = rng.choice(["1.0", "2.50", "", '""', "\\N"], 90), np.arange(90) % 2
    lines = ["code,flag,half,click", *(",".join(map(str, row)) for row in zip(code, flag, half, click))]
    (tmp_path / "a.csv").write_text("\n".join([*lines, ""]))
    vocabulary = {"transform": {"vocabulary": {}}}
    features = {name: vocabulary for name in ("code", "flag")} | {"text": {"transform": {"column": "half", "hash": {}}}}
    features |= {"half": {"transform": {"fill": -1}}, "click": {}}
    features["text"]["cardinality"] = 10**6
    spec = write_spec(tmp_path / "spec.yaml", features, ["code", "flag", "text"], numeric=["half"])
    run(TabularConfig(spec, tmp_path / "data", [tmp_path / "a.csv"], split="none"))
    written = read(tmp_path / "data" / "train")
    pandas, polars = pytest.importorskip("pandas"), pytest.importorskip("polars")
    frames = [
        pandas.read_csv(tmp_path / "a.csv", dtype=str, keep_default_na=False, na_values=["", "\\N"]),
        polars.read_csv(tmp_path / "a.csv", infer_schema=False, null_values=["", "\\N"]),
    ]
    for frame in frames:
        ids, numeric = Encoder(tmp_path / "data")(frame)
        np.testing.assert_array_equal(ids, np.stack([written[name] for name in ("code", "flag", "text")], 1))
        np.testing.assert_array_equal(numeric[:, 0], written["half"])


def test_one_row_has_the_ids_that_it_has_among_others(tmp_path):
    """Whatever type arrow takes its values for: decimals of another scale, and lists without entries."""
    price = [decimal.Decimal(int(value)) / 4 for value in np.random.default_rng().integers(0, 9, 60)]
    rows = [{"price": value, "tags": ["b", "a"][: i % 3], "click": i % 2} for i, value in enumerate(price)]
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, tmp_path / "a.parquet")
    features = {
        "price": {"transform": "vocabulary"},
        "tags": {"max_hotness": 2, "transform": "vocabulary"},
        "click": {},
    }
    spec = write_spec(tmp_path / "spec.yaml", features, ["price"], ["tags"])
    run(TabularConfig(spec, tmp_path / "data", [tmp_path / "a.parquet"], split="none"))
    encode = Encoder(tmp_path / "data")
    ids, _ = encode(table)
    np.testing.assert_array_equal(ids, np.concatenate([encode([row])[0] for row in rows]))
    assert (ids[:, 0] > 0).all()


@pytest.mark.parametrize("known", [True, False], ids=["pyarrow knows uuids", "pyarrow knows none"])
def test_uuids_of_python_are_the_texts_that_files_have(tmp_path, monkeypatch, known):
    """Also in lists, and among texts, of which pyarrow makes no array."""
    g = np.random.default_rng()
    users = [UUID(bytes=g.bytes(16)) for _ in range(4)]
    lists = [users[:2], [users[2]], [], [users[3], users[0]]]
    whole, single = (pa.array([user.bytes for user in some], pa.uuid()) for some in (chain(*lists), users))
    given = {"user": single, "tags": pa.ListArray.from_arrays([0, 2, 3, 3, 5], whole)}
    pq.write_table(pa.table(given | {"click": ["yes", "no", "yes", "no"]}), tmp_path / "a.parquet")
    features = {"user": {"transform": "vocabulary"}, "tags": {"max_hotness": 2, "transform": "vocabulary"}}
    spec = write_spec(tmp_path / "spec.yaml", features | {"click": CLICK}, ["user"], ["tags"])
    run(TabularConfig(spec, tmp_path / "out", [tmp_path / "a.parquet"], split="none"))
    encode = Encoder(tmp_path / "out")
    want, _ = encode(given)
    assert sorted(want[:, 0]) == [1, 2, 3, 4]
    stored = read(tmp_path / "out" / "train")
    assert np.array_equal(np.column_stack([stored["user"], stored["tags"]]), want)
    real = pa.array

    def array(values, *told, **more):
        if "UUID(" in repr(values):
            raise pa.ArrowInvalid("did not recognize Python value type")
        return real(values, *told, **more)

    if not known:
        monkeypatch.setattr(pa, "array", array)
    for some in (users, [*users[:2], *map(str, users[2:])], [str(users[0]), *users[1:]], np.array(users)):
        assert np.array_equal(encode({"user": some, "tags": lists})[0], want)
        pairs = zip(some, map(tuple, lists))
        assert np.array_equal(encode([{"user": user, "tags": tags} for user, tags in pairs])[0], want)
        assert np.array_equal(encode(pd.DataFrame({"user": list(some), "tags": lists}))[0], want)
    missing, _ = encode({"user": [None, *users[1:]], "tags": [None, *lists[1:]]})
    assert np.array_equal(missing[1:], want[1:])
    assert missing[0].tolist() == [0, -1, -1]
    odd = {"user": [users[0], 7], "tags": lists[:2]}
    with pytest.raises(InputError, match="column user: expected values of one type"):
        encode(odd)
    with pytest.raises(InputError, match=r"rows: expected a table: .*column user"):
        encode(pd.DataFrame(odd))
