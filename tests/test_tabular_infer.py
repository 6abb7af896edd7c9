"""A proposed spec: each column of the right kind, and a spec that preprocesses and describes its data at once."""

import gzip

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
import yaml
from commands import main

from preprocess.tabular import TabularConfig, infer_spec, run
from widedeep.errors import InputError
from widedeep.feature_spec import FeatureSpec


def table(rows=2000):
    rng = np.random.default_rng(rows)
    age = rng.integers(18, 90, rows).astype(object)
    age[rng.random(rows) < 0.1] = None
    return pa.table(
        {
            "id": [f"row-{i}" for i in range(rows)],
            "city": rng.choice(["Rome", "Oslo", "Paris"], rows),
            "site": [f"s{i}" for i in rng.integers(0, 400, rows)],
            "weekday": rng.integers(0, 7, rows),
            "age": pa.array(age.tolist(), pa.int64()),
            "spend": rng.lognormal(0, 2, rows),
            "tags": ["|".join(rng.choice(["a", "b", "c", "d"], n, replace=False)) for n in rng.integers(0, 4, rows)],
            "constant": np.zeros(rows, np.int64),
            "session": np.arange(rows) // 4,
            "click": rng.choice(["yes", "no"], rows, p=[0.2, 0.8]),
        }
    )


def write(path, data):
    if path.suffix == ".parquet":
        pq.write_table(data, path)
    else:
        out = pa.BufferOutputStream()
        pa.csv.write_csv(data, out)
        path.write_bytes(gzip.compress(out.getvalue()))
    return path


@pytest.mark.parametrize("name", ["data.csv.gz", "data.parquet"])
def test_columns_get_the_right_kind_and_the_spec_works(tmp_path, name):
    path = write(tmp_path / name, table())
    spec, notes = infer_spec([path], "click", group="session")
    channels = spec["channel_spec"]
    assert channels["onehot_categorical"] == ["city", "site", "weekday", "age_bucket", "spend_bucket"]
    assert channels["multihot_categorical"] == ["tags"]
    assert channels["numerical"] == ["age", "spend"]
    assert [text.split(": ")[:2] for text in notes[:2]] == [["left out", "id"], ["left out", "constant"]]
    assert notes[2].startswith("label click: 1 means 'yes' (")
    assert notes[3:] == ["integers taken as numbers: age; one that is an id wants a vocabulary"]
    features = spec["feature_spec"]
    assert features["tags"]["max_hotness"] == 3
    assert features["age"]["transform"] == {"fill": "median", "standardise": True}
    assert features["spend"]["transform"] == {"fill": "median", "log": True, "standardise": True}
    assert features["click"]["transform"] == {"positive": ["yes"], "negative": ["no"]}
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    report = run(TabularConfig(tmp_path / "spec.yaml", tmp_path / "out", [path], split="group:0.25"))
    assert 0.15 < report["train"]["positive_rate"] < 0.25
    assert (
        dict(zip(FeatureSpec.load(tmp_path / "out").names, FeatureSpec.load(tmp_path / "out").cardinalities))["city"]
        == 4
    )


def test_list_columns_and_very_many_texts(tmp_path, monkeypatch):
    monkeypatch.setattr("preprocess.tabular.infer.MANY_VALUES", 100)
    rng = np.random.default_rng(0)
    data = pa.table(
        {
            "seen": [rng.integers(0, 50, n).tolist() for n in rng.integers(1, 6, 1000)],
            "site": [f"s{i}" for i in rng.integers(0, 300, 1000)],
            "y": rng.integers(0, 2, 1000),
        }
    )
    spec, _ = infer_spec([write(tmp_path / "a.parquet", data)], "y")
    assert spec["feature_spec"]["seen"]["max_hotness"] == 5
    assert spec["feature_spec"]["site"]["transform"] == "hash"
    assert spec["feature_spec"]["site"]["cardinality"] == 1024
    assert spec["feature_spec"]["y"]["transform"] == {"positive": [1], "negative": [0]}


def test_what_cannot_be_proposed_is_told(tmp_path):
    path = write(tmp_path / "a.parquet", table())
    for arguments, words in (
        (([path], "clicked"), "column clicked is missing"),
        (([path], "site"), "column site: expected two values"),
        (([write(tmp_path / "b.parquet", table(2000).slice(0, 0))], "click"), "expected rows, found none"),
        (([tmp_path / "c.csv"], "click"), r"c\.csv"),
        (([write(tmp_path / "d.parquet", table().drop_columns(["click"]))],), "expected --label, or one column called"),
    ):
        with pytest.raises(InputError, match=words):
            infer_spec(*arguments)


def test_the_command_writes_a_spec_that_preprocesses_and_keeps_an_edited_one(tmp_path, capsys):
    path, spec = write(tmp_path / "a.csv.gz", table()), tmp_path / "specs" / "spec.yaml"
    words = ["spec", "infer", str(path), "--group", "session"]
    assert main([*words, "--out", str(spec)]) == 0
    said = capsys.readouterr()
    assert said.out == f"{spec}: 5 one-hot, 1 multi-hot and 2 numeric features, label click\n"
    assert said.err.startswith("left out: id: its values hardly repeat")
    done = ["preprocess", "tabular", str(path), "--spec", str(spec), "--split", "last:100"]
    assert main([*done, "--out", str(tmp_path / "out")]) == 0
    assert FeatureSpec.load(tmp_path / "out").group == "session"
    capsys.readouterr()
    assert main(words) == 0
    assert capsys.readouterr().out == spec.read_text()
    spec.write_text("edited")
    assert main([*words, "--out", str(spec)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert spec.read_text() == "edited"


@pytest.mark.parametrize(
    ("values", "why"),
    [(np.arange(100), "numbers the rows"), (np.arange(100) * 3, None), (None, None)],
)
def test_the_number_of_the_row_is_left_out(tmp_path, values, why):
    rng = np.random.default_rng(5)
    row = rng.permutation(100) + 1 if values is None else values
    row = np.where(np.arange(100) == 7, row[8], row) if values is None else row  # one of them twice
    path = write(
        tmp_path / "data.parquet", pa.table({"row": row, "size": rng.random(100), "click": np.arange(100) % 2})
    )
    spec, notes = infer_spec([path])
    assert ("row" in spec["feature_spec"]) == (why is None)
    assert [note for note in notes if note.startswith("left out")] == ([f"left out: row: {why}"] if why else [])


def test_ids_that_do_not_repeat_are_left_out(tmp_path):
    table = {"imp_id": np.arange(100) * 3 + 10**17, "size": np.arange(100) * 3, "click": np.arange(100) % 2}
    table["vector"] = (np.arange(200).reshape(100, 2) / 7).tolist()
    spec, notes = infer_spec([write(tmp_path / "data.parquet", pa.table(table))])
    assert set(spec["feature_spec"]) == {"size", "size_bucket", "click"}
    assert "left out: imp_id: its values hardly repeat (100 in 100 rows)" in notes
    assert "left out: vector: its entries hardly repeat (200 in 200)" in notes


def test_the_index_of_a_pandas_table_is_left_out(tmp_path):
    """pandas writes what is left of the row numbers after a filter as a column."""
    rng = np.random.default_rng(7)
    index = np.flatnonzero(rng.random(400) < 0.5)
    table = {"size": rng.random(len(index)), "click": index % 2, "__index_level_0__": index}
    spec, notes = infer_spec([write(tmp_path / "data.parquet", pa.table(table))])
    assert set(spec["feature_spec"]) == {"size", "size_bucket", "click"}
    assert "left out: __index_level_0__: is the index of a pandas table" in notes


def columns(rows=200):
    """Two columns that make features, for tests of what stands beside them."""
    rng = np.random.default_rng(rows)
    return {"size": rng.random(rows), "city": rng.choice(["Rome", "Oslo"], rows)}


def csv(path, values):
    """Texts as they are, None for an empty field."""
    lines = [",".join(values)] + [",".join("" if v is None else str(v) for v in row) for row in zip(*values.values())]
    path.write_text("\n".join(lines) + "\n")
    return path


def preprocessed(tmp_path, path, spec, **options):
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    files = {"inputs": [path], "test": [path]} | options
    return run(TabularConfig(tmp_path / "spec.yaml", tmp_path / "out", **files))


@pytest.mark.parametrize(
    ("one", "zero", "ones", "told"),
    [
        ("1.0", "0.0", 150, "1 means '1.0' (75 % of rows), 0 means '0.0'"),
        ("1.0", "-1.0", 150, "1 means '1.0' (75 % of rows), 0 means '-1.0'"),
        ("2", "1", 10, "1 means '2' (5 % of rows), 0 means '1'"),
        ("Yes.", "No.", 150, "1 means 'Yes.' (75 % of rows), 0 means 'No.'"),
        ("TRUE ", "FALSE", 150, "1 means 'TRUE ' (75 % of rows), 0 means 'FALSE'"),
        (">50K", "<=50K", 50, "1 means '>50K' (25 % of rows), 0 means '<=50K'; a guess: the rarer of the two"),
    ],
)
def test_the_label_is_not_turned_round(tmp_path, one, zero, ones, told):
    path = csv(tmp_path / "a.csv", columns() | {"click": [one] * ones + [zero] * (200 - ones)})
    spec, notes = infer_spec([path])
    assert notes == [f"label click: {told}"]
    assert preprocessed(tmp_path, path, spec)["train"]["positive_rate"] == ones / 200


def test_a_label_of_numbers_means_every_spelling_of_them(tmp_path):
    """A null makes floats of a file's integers."""
    train = csv(tmp_path / "a.csv", columns() | {"click": ["1.0", "0.0"] * 100})
    test = csv(tmp_path / "b.csv", columns() | {"click": ["1", "0"] * 100})
    report = preprocessed(tmp_path, train, infer_spec([train])[0], test=[test])
    assert report["test"]["positive_rate"] == 0.5


@pytest.mark.parametrize(
    ("values", "transform", "told"),
    [
        (
            ["0.0", "1.0", "0", "0"],
            {"positive": [1.0], "negative": [0]},
            "1 means '1.0' (25 % of rows), 0 means '0' or '0.0'",
        ),
        (
            ["1", " 1.00", "1", "2"],
            {"positive": [2], "negative": [1]},
            "1 means '2' (25 % of rows), 0 means ' 1.00' or '1'",
        ),
        (
            ["true", "false", "TRUE", "TRUE"],
            {"positive": ["TRUE"], "negative": ["false"]},
            "1 means 'TRUE' or 'true' (75 % of",
        ),
        (["Yes", "no", "NO", "no"], {"positive": ["Yes"], "negative": ["no"]}, "1 means 'Yes' (25 % of"),
    ],
)
def test_a_label_may_be_spelled_in_several_ways(tmp_path, values, transform, told):
    path = csv(tmp_path / "a.csv", columns() | {"click": values * 50})
    spec, notes = infer_spec([path])
    assert spec["feature_spec"]["click"]["transform"] == transform
    assert notes[0].startswith(f"label click: {told}")
    share = float(told.partition(" (")[2].partition(" ")[0])
    assert preprocessed(tmp_path, path, spec)["train"]["positive_rate"] == share / 100


@pytest.mark.parametrize(
    "click", [["1", "2", "3", "4", "5"] * 40, ["1"] * 200, ["yes", "no", "no", "maybe"] * 50, ["1", "1.0"] * 100]
)
def test_a_label_has_two_values(tmp_path, click):
    with pytest.raises(InputError, match=r"a\.csv: column click: expected two values, found \d: '.*`positive`"):
        infer_spec([csv(tmp_path / "a.csv", columns() | {"click": click})])


def test_rows_without_label_or_group_are_told(tmp_path):
    more = {"click": [None, *([0, 1] * 100)[:-1]], "session": [*([1, 2] * 100)[:-3], None, None, None]}
    _, notes = infer_spec([csv(tmp_path / "a.csv", columns() | more)], group="session")
    assert notes[1:] == [
        "click: 1 of 200 rows have no value; preprocess refuses such rows",
        "session: 3 of 200 rows have no value; preprocess refuses such rows",
    ]


IDS = ["id", "ID", "user_id", "USER_ID", "userId", "userID", "id_user", "user id"]


@pytest.mark.parametrize(
    ("name", "is_id"), [(n, True) for n in IDS] + [("PAID", False), ("bid", False), ("idle", False)]
)
def test_integers_whose_name_says_id_are_no_numbers(tmp_path, name, is_id):
    rng = np.random.default_rng(1)
    values = rng.integers(0, 40, 200).astype(object)
    values[3] = None
    path = csv(tmp_path / "a.csv", columns() | {name: values, "click": [0, 1] * 100})
    spec, notes = infer_spec([path])
    assert (name in spec["channel_spec"]["onehot_categorical"]) == is_id
    assert (name in spec["channel_spec"]["numerical"]) != is_id
    assert [note for note in notes if note.startswith("integers taken as numbers")] == (
        [] if is_id else [f"integers taken as numbers: {name}; one that is an id wants a vocabulary"]
    )
    preprocessed(tmp_path, path, spec)


def test_fractions_are_numbers_whatever_their_name(tmp_path):
    path = csv(tmp_path / "a.csv", columns() | {"paid_id": np.arange(200) / 8, "click": [0, 1] * 100})
    assert "paid_id" in infer_spec([path])[0]["channel_spec"]["numerical"]


@pytest.mark.parametrize("word", ["NA", "nan", "?", " ?", "-", "inf", "-Infinity", "null", "None", "n/a", " "])
def test_words_for_no_value_leave_a_column_its_numbers(tmp_path, word):
    ages = np.random.default_rng(2).integers(18, 90, 200).astype(object)
    ages[[3, 4]], ages[5] = word, " 20"
    path = csv(tmp_path / "a.csv", columns() | {"age": ages, "click": [0, 1] * 100})
    spec, _ = infer_spec([path])
    features = spec["feature_spec"]
    assert features["age"]["transform"] == {"nulls": [word], "fill": "median", "standardise": True}
    assert features["age_bucket"]["transform"] == {"column": "age", "nulls": [word], "bucketise": {"quantiles": 16}}
    preprocessed(tmp_path, path, spec)
    report = yaml.safe_load((tmp_path / "out" / "report.json").read_text())
    assert report["nulls"]["age"] == 4  # of both files


def test_such_words_among_texts_are_texts(tmp_path):
    path = csv(tmp_path / "a.csv", columns() | {"country": ["NA", "NO", "?", "-"] * 50, "click": [0, 1] * 100})
    transform = infer_spec([path])[0]["feature_spec"]["country"]["transform"]
    assert transform == {"vocabulary": {"min_count": 1}}


def test_numbers_that_are_missing_after_the_sample(tmp_path):
    path = csv(tmp_path / "a.csv", columns() | {"click": [0, 1] * 100})
    spec, _ = infer_spec([path])
    path.write_text(path.read_text() + ",Rome,1\n")
    preprocessed(tmp_path, path, spec)


@pytest.mark.parametrize(
    ("values", "hashed"),
    [
        ([0, 1], False),
        ([" 7", -(2**63)], False),
        (["0.0", "1.0"], True),
        (["0.5", "1"], True),
        ([2**63, 1], True),
        (["a", 1], True),
    ],
)
def test_groups_that_are_no_integers_are_hashed(tmp_path, values, hashed):
    path = csv(tmp_path / "a.csv", columns() | {"g": values * 100, "click": [0, 1] * 100})
    spec, _ = infer_spec([path], group="g")
    assert spec["feature_spec"]["g"] == ({"transform": "hash"} if hashed else {})
    preprocessed(tmp_path, path, spec)


def test_columns_that_cannot_be_read_are_left_out(tmp_path):
    good = pa.table(columns() | {"click": [0, 1] * 100})
    odd = {
        "nothing": pa.nulls(200),
        "meta": pa.array([{"a": 1}] * 200),
        "map": pa.array([[("a", 1)]] * 200, pa.map_(pa.string(), pa.int64())),
        "nested": pa.array([[[1]]] * 200),
        "uuid": pa.array([bytes(range(240, 256))] * 200, pa.uuid()),
        "digest": pa.array([bytes([255, i]) for i in range(200)], pa.binary(2)),
        "": pa.array(range(200)),
        "twice": pa.array([1, 2] * 100),
    }
    table = good
    for name, values in [*odd.items(), ("twice", odd["twice"])]:
        table = table.append_column(name, values)
    plain = infer_spec([write(tmp_path / "good.parquet", good)])
    for path in (tmp_path / "a.parquet", tmp_path / "a.arrow"):
        pq.write_table(table, path) if path.suffix == ".parquet" else feather.write_feather(table, path)
        spec, notes = infer_spec([path])
        assert spec == plain[0]
        told = dict(note.removeprefix("left out: ").split(": ", 1) for note in notes[:-1])
        assert told["twice"] == "there twice"
        assert told["column 10"] == "has no name"
        assert told["nothing"] == "holds no value"
        assert told["meta"] == "expected numbers, text or lists of them, found struct<a: int64>"
        assert told["digest"].startswith("expected UTF-8 text, found")
        assert set(told) == {*odd, "column 10"} - {""}
        preprocessed(tmp_path, path, spec)
        for name in ("twice", "meta", "digest"):
            with pytest.raises(InputError, match=f"column {name}: {told[name][:20]}"):
                infer_spec([path], name)


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz"])
def test_headers_that_are_there_twice_or_empty(tmp_path, suffix):
    path, text = tmp_path / f"a{suffix}", "b#0,b,b,size,click,,\n" + "0,1,1,0.5,1,,\n1,2,2,0.25,0,,\n" * 50
    path.write_bytes(gzip.compress(text.encode()) if suffix.endswith("gz") else b"\xef\xbb\xbf" + text.encode())
    spec, notes = infer_spec([path])
    assert list(spec["feature_spec"]) == ["b#0", "size", "click"]
    assert notes[:3] == [
        "left out: b: there twice",
        "left out: column 6: has no name",
        "left out: column 7: has no name",
    ]
    preprocessed(tmp_path, path, spec)
    with pytest.raises(InputError, match=r"column b: there twice"):
        infer_spec([path], group="b")


def test_what_one_of_several_files_cannot_give_is_left_out(tmp_path):
    one = csv(tmp_path / "a.csv", columns() | {"more": ["x", "y"] * 100, "click": [0, 1] * 100})
    two = write(tmp_path / "b.parquet", pa.table(columns() | {"more": [{"x": 1}] * 200, "click": [0, 1] * 100}))
    spec, notes = infer_spec([one, two])
    assert "more" not in spec["feature_spec"]
    assert notes[0].startswith("left out: more: expected numbers")


def test_a_number_that_has_the_name_of_a_table_is_left_out(tmp_path):
    path = csv(tmp_path / "a.csv", columns() | {"city_embedding": np.arange(200) / 7, "click": [0, 1] * 100})
    spec, notes = infer_spec([path])
    assert "city_embedding" not in spec["feature_spec"]
    assert notes[0] == "left out: city_embedding: as a number, for the table of city has this name"
    preprocessed(tmp_path, path, spec)


def test_a_table_without_anything_to_learn_from_is_refused(tmp_path):
    path = csv(tmp_path / "a.csv", {"row": range(200), "one": [1] * 200, "click": [0, 1] * 100})
    with pytest.raises(
        InputError, match=r"expected a column to learn from, found none; left out: row: numbers the rows"
    ):
        infer_spec([path])
    lists = write(tmp_path / "a.parquet", pa.table(columns() | {"click": [[0], [1]] * 100}))
    with pytest.raises(InputError, match="column click: expected one value a row, found lists"):
        infer_spec([lists])


def test_a_tab_as_a_shell_passes_it(tmp_path, capsys):
    path = tmp_path / "a.csv"
    path.write_text("x\tclick\n" + "".join(f"{i % 7}\t{i % 2}\n" for i in range(200)))
    assert main(["spec", "infer", str(path), "--delimiter", "\\t"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["metadata"]["csv"] == {"delimiter": "\t"}
