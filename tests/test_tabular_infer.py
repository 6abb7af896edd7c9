"""A proposed spec: each column of the right kind, and a spec that preprocesses and describes its data at once."""

import gzip

import numpy as np
import pyarrow as pa
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
    spec, left_out = infer_spec([path], "click", group="session")
    channels = spec["channel_spec"]
    assert channels["onehot_categorical"] == ["city", "site", "weekday", "age_bucket", "spend_bucket"]
    assert channels["multihot_categorical"] == ["tags"]
    assert channels["numerical"] == ["age", "spend"]
    assert [text.partition(":")[0] for text in left_out] == ["id", "constant"]
    features = spec["feature_spec"]
    assert features["tags"]["max_hotness"] == 3
    assert features["age"]["transform"] == {"fill": "median", "standardise": True}
    assert features["spend"]["transform"] == {"log": True, "standardise": True}
    assert features["click"]["transform"] == {"positive": ["yes"]}
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
    assert spec["feature_spec"]["y"]["transform"] == {"positive": ["1"]}


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


@pytest.mark.parametrize(("values", "kept"), [(np.arange(100), False), (np.arange(100) * 3, True), (None, True)])
def test_the_number_of_the_row_is_left_out(tmp_path, values, kept):
    rng = np.random.default_rng(5)
    row = rng.permutation(100) + 1 if values is None else values
    row = np.where(np.arange(100) == 7, row[8], row) if values is None else row  # one of them twice
    path = write(
        tmp_path / "data.parquet", pa.table({"row": row, "size": rng.random(100), "click": np.arange(100) % 2})
    )
    spec, left_out = infer_spec([path])
    assert ("row" in spec["feature_spec"]) == kept
    assert left_out == ([] if kept else ["row: numbers the rows"])
