"""`widedeep predict --rows`: raw files scored as the data set that `preprocess tabular --stats` makes of them is."""

import gzip
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from commands import main
from test_tabular import CLICK, write_spec

from preprocess.tabular import TabularConfig, run
from preprocess.tabular.encoder import Encoder
from widedeep.errors import InputError, RunError
from widedeep.feature_spec import CategoricalFeature, FeatureSpec, NumericFeature
from widedeep.predict import predicted
from widedeep.predict_rows import check_features, predict_rows

TRAIN = "--cpu --deep_hidden_units 8 --global_batch_size 64 --num_epochs 1 --deep_warmup_epochs 0 --seed 1 --threads 1"
FEATURES = {
    "user": {"transform": {"vocabulary": {"min_count": 2}}},
    "page": {"cardinality": 40, "transform": {"hash": {"seed": 5}}},
    "tags": {"max_hotness": 2, "transform": {"vocabulary": {}, "separator": "|"}},
    "price": {"transform": {"fill": "median", "standardise": True}},
    "click": CLICK,
}


def rows_of(seed, n):
    g = np.random.default_rng(seed)
    some = [None if missing else f"u{i}" for i, missing in zip(g.integers(12, size=n), g.random(n) < 0.1)]
    return pa.table(
        {
            "request": [f"{i:05d}" for i in g.integers(99999, size=n)],
            "user": some,
            "page": [f"p{i}" for i in g.integers(500, size=n)],
            "tags": ["|".join(f"t{i}" for i in g.integers(6, size=k)) for k in g.integers(4, size=n)],
            "price": g.random(n) * 100,
            "click": g.choice(["yes", "no"], n).tolist(),
            "query, raw": [f'said "{i}", twice' if i % 3 else "" for i in range(n)],
        }
    )


@pytest.fixture(scope="module", params=["float32", "float16"])
def place(tmp_path_factory, request):
    """A data set, a model of it, and its export with statistics."""
    place = tmp_path_factory.mktemp("place")
    spec = write_spec(place / "spec.yaml", FEATURES, one_hot=["user", "page"], multi_hot=["tags"], numeric=["price"])
    pq.write_table(rows_of(0, 300), place / "train.parquet")
    options = {"split": "last:50", "numeric": request.param}
    run(TabularConfig(spec=spec, inputs=[place / "train.parquet"], out=place / "data", **options))
    where = ["--dataset_path", str(place / "data"), "--model_dir", str(place / "model")]
    assert main(["train", *where, "--results_dir", str(place / "results"), *TRAIN.split()]) == 0
    return place


def predict(place, out, *words, data="data"):
    where = ["--model", place / "model", "--dataset_path", place / data, "--out", out]
    return main(["predict", "--cpu", "--threads", "1", *map(str, [*where, *words])])


def in_two_steps(place, tmp_path, files, batch):
    """prob and logit by way of a data set."""
    words = ["--spec", place / "data", "--stats", place / "data", "--out", tmp_path / "new", "--test", *files]
    numeric = yaml.safe_load((place / "data" / "feature_spec.yaml").read_text())["metadata"]["numeric"]
    assert main(["preprocess", "tabular", *map(str, words), "--numeric", numeric]) == 0
    words = ["--model", place / "model", "--dataset_path", tmp_path / "new", "--cpu", "--threads", "1"]
    words += ["--eval_batch_size", batch, "--out", tmp_path / "two.parquet"]
    assert main(["predict", *map(str, words)]) == 0
    return pq.read_table(tmp_path / "two.parquet")


@pytest.mark.parametrize("batch", [1, 37, 150, 1000])
def test_raw_files_are_scored_as_a_data_set_of_them_is(place, tmp_path, capsys, batch):
    n = 5 if batch == 1 else 101
    tables = [rows_of(1, n), rows_of(2, 20)]
    pq.write_table(tables[0], tmp_path / "a.parquet", row_group_size=40)
    with gzip.open(tmp_path / "b.csv.gz", "wb") as file:
        pyarrow.csv.write_csv(tables[1].drop_columns(["click"]), file)
    files = [tmp_path / "a.parquet", tmp_path / "b.csv.gz"]
    out = tmp_path / "one.parquet"
    options = ["--eval_batch_size", batch, "--keep", "query, raw", "request"]
    assert predict(place, out, *options, "--rows", *files) == 0
    assert f"{out}: {n + 20} rows by " in capsys.readouterr().out
    got, together = pq.read_table(out), pa.concat_tables(tables)
    assert got.column_names == ["query, raw", "request", "prob", "logit"]
    pq.write_table(tables[0].drop_columns(["click"]), tmp_path / "a.parquet")  # a data set has labels of all, or none
    want = in_two_steps(place, tmp_path, files, batch)
    for name in ("prob", "logit"):
        assert got[name].to_pylist() == want[name].to_pylist()
    assert len(set(got["logit"].to_pylist())) > 4
    assert got["request"].to_pylist() == together["request"].to_pylist()  # 00042 is no number
    texts = together["query, raw"].to_pylist()
    assert [text or "" for text in got["query, raw"].to_pylist()] == texts


def test_kept_columns_have_their_types_and_nulls(place, tmp_path):
    kept = {
        "n": pa.array([1, None, 3], pa.int16()),
        "when": pa.array([0, 10**15, None], pa.timestamp("us", "UTC")),
        "f": pa.array([0.5, None, 2.0], pa.float64()),
        "d": pa.array(["x", None, "x"]).dictionary_encode(),
        "none": pa.nulls(3),
    }
    pq.write_table(pa.table(dict(zip(*[(t := rows_of(3, 3)).column_names, t.columns])) | kept), tmp_path / "r.parquet")
    words = ["--keep", *kept, "n", "--rows", tmp_path / "r.parquet"]  # once, however often it is named
    assert predict(place, tmp_path / "s.parquet", *words) == 0
    got = pq.read_table(tmp_path / "s.parquet")
    assert got.column_names == [*kept, "prob", "logit"]
    for name, values in kept.items():
        assert got[name].to_pylist() == values.to_pylist()
    assert [got.schema.field(name).type for name in ("n", "when", "d")] == [pa.int16(), kept["when"].type, pa.string()]
    assert predict(place, tmp_path / "s.csv", *words) == 0
    lines = (tmp_path / "s.csv").read_text().splitlines()
    assert lines[0] == '"n","when","f","d","none","prob","logit"'
    assert lines[2].startswith(",2001-09-09 01:46:40.000000Z,,,,")


def test_an_export_with_statistics_will_do(place, tmp_path):
    pytest.importorskip("onnxscript", reason="exports need onnxscript, which is not installed")
    words = ["--model", place / "model", "--stats", place / "data", "--out", place / "served", "--format", "pt2"]
    assert main(["export", *map(str, words)]) == 0
    pq.write_table(rows_of(4, 30), tmp_path / "r.parquet")
    for data in ("data", "served"):
        assert predict(place, tmp_path / f"{data}.csv", "--rows", tmp_path / "r.parquet", data=data) == 0
    assert (tmp_path / "data.csv").read_text() == (tmp_path / "served.csv").read_text()


def test_kept_texts_may_have_another_type_in_each_file(place, tmp_path):
    """pandas writes large strings, other programs plain ones; a CSV file has texts anyhow."""
    table, files = rows_of(int(np.random.default_rng().integers(999)), 60), []
    for i, kind in enumerate((pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.large_string()))):
        part = table.slice(20 * i, 20)
        files.append(tmp_path / f"{i}.parquet")
        pq.write_table(part.set_column(0, "request", part["request"].cast(kind)), files[-1])
    for order in (files, files[::-1]):
        out = tmp_path / "out.parquet"
        assert predict(place, out, "--rows", *order, "--keep", "request") == 0
        want = pa.concat_tables(
            [pq.read_table(path).select(["request"]).cast(pa.schema({"request": pa.string()})) for path in order]
        )
        assert pq.read_table(out)["request"].to_pylist() == want["request"].to_pylist()


def refused(place, capsys, tmp_path, *words, data="data"):
    """The sentence; what was at the place of the output is still there."""
    out = tmp_path / "scores.csv"
    out.write_text("as it was")
    assert predict(place, out, *words, data=data) == 2
    assert out.read_text() == "as it was"
    assert {path.name for path in tmp_path.iterdir()} <= {"scores.csv", "r.csv", "r.parquet", "other.parquet"}
    return capsys.readouterr().err.strip()


def test_what_is_refused(place, tmp_path, capsys):
    r, other = tmp_path / "r.parquet", tmp_path / "other.parquet"
    pq.write_table(rows_of(5, 9).append_column("prob", pa.array(range(9))), r)
    rows = ("--rows", r)

    def said(*words):
        return refused(place, capsys, tmp_path, *words)

    assert said("--keep", "user") == "widedeep: --keep: expected --rows beside it, whose columns it names"
    assert f"{r}: column nope is missing; the file has 'request', " in said(*rows, "--keep", "nope")
    assert "--keep prob: expected another column: predictions have one of that name" in said(*rows, "--keep", "prob")
    for flag in ("--split train", "--reader_mode stream", "--verify false", "--fspec_file x.yaml"):
        told = f"{flag.split()[0]}: expected none beside --rows, which are in no data set"
        assert told in said(*rows, *flag.split())
    assert f"{tmp_path / 'gone.csv'}: " in said("--rows", tmp_path / "gone.csv")
    table = rows_of(6, 4)
    pq.write_table(table.set_column(0, "request", pa.array([b"a", b"\xff", None, b""])), other)
    assert "scores.csv: expected no bytes but texts, for a CSV file" in said("--rows", other, "--keep", "request")
    pq.write_table(table.set_column(0, "request", pa.array(range(4))), other)
    told = f"{other}: column request: expected string, as in the first file, found int64"
    assert told in said("--rows", r, other, "--keep", "request")
    pq.write_table(table.set_column(0, "request", pa.array([[1], [2], [], None])), other)
    assert f"{other}, row 1: column request: expected one value a row" in said("--rows", other, "--keep", "request")
    pq.write_table(table.slice(0, 0), other)
    assert f"{other}: expected rows, and there are none" in said("--rows", other)
    pq.write_table(table.drop_columns(["price"]), other)
    assert f"{other}: column price is missing" in said("--rows", other)
    (tmp_path / "r.csv").write_text("user,page,tags,price\nu1,p1,t1,3\nu1,p1,t1,dear\n")
    told = f"{tmp_path / 'r.csv'}, line 3: column price: expected a number, found 'dear'"
    assert told in said("--rows", r, tmp_path / "r.csv", "--eval_batch_size", "4")  # after some rows are written


def test_the_rows_are_not_replaced_by_their_predictions(place, tmp_path, capsys):
    pq.write_table(rows_of(8, 3), tmp_path / "r.parquet")
    before = (tmp_path / "r.parquet").read_bytes()
    out = tmp_path / "x" / ".." / "r.parquet"
    (tmp_path / "x").mkdir()
    assert predict(place, out, "--rows", tmp_path / "r.parquet") == 2
    assert f"--out {out}: expected another file than those of --rows" in capsys.readouterr().err
    assert (tmp_path / "r.parquet").read_bytes() == before


def test_rows_that_change_while_they_are_scored_are_named(place, tmp_path, capsys, monkeypatch):
    path, real = tmp_path / "r.parquet", Encoder.join
    pq.write_table(rows_of(5, 30), path)

    def join(*told):
        os.utime(path, ns=(0, 0))
        return real(*told)

    monkeypatch.setattr(Encoder, "join", join)
    assert predict(place, tmp_path / "s.csv", "--rows", path) == 2
    assert f"{path}: changed while it was read" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["r.parquet"]


def test_data_of_another_model_is_refused(place, tmp_path, capsys, tmp_path_factory):
    pq.write_table(rows_of(7, 9), tmp_path / "r.parquet")
    rows = ("--rows", tmp_path / "r.parquet")
    folder = tmp_path_factory.mktemp("another")
    run(TabularConfig(spec=place / "data", inputs=[tmp_path / "r.parquet"], out=folder / "data", split="last:2"))
    told = f"{folder / 'data'}: was encoded with other statistics"
    assert told in refused(place, capsys, tmp_path, *rows, data=folder / "data")
    spec = yaml.safe_load((place / "data" / "feature_spec.yaml").read_text())
    channels = spec["channel_spec"] | {"onehot_categorical": ["page"], "multihot_categorical": []}
    (folder / "data" / "feature_spec.yaml").write_text(yaml.safe_dump(spec | {"channel_spec": channels}))
    for file in (place / "data" / "statistics").iterdir():
        (folder / "data" / "statistics" / file.name).write_bytes(file.read_bytes())
    assert "with user (" in (said := refused(place, capsys, tmp_path, *rows, data=folder / "data"))
    assert said.endswith("found page (40 ids, 1 in a row) there")


def test_values_that_training_has_not_seen_are_told(place, tmp_path, caplog):
    rows = rows_of(8, 150)
    pq.write_table(rows, tmp_path / "r.parquet")
    assert predict(place, tmp_path / "s.csv", "--rows", tmp_path / "r.parquet") == 0
    assert not caplog.messages
    other = [f"U{user}" for user in rows["user"].to_pylist()]
    pq.write_table(rows.set_column(1, "user", pa.array(other)), tmp_path / "r.parquet")
    assert predict(place, tmp_path / "s.csv", "--eval_batch_size", "40", "--rows", tmp_path / "r.parquet") == 0
    told = "user: 0 of 150 values occur among those learned from train rows; is the spelling the same?"
    assert caplog.messages == [told]


def test_missing_values_are_not_taken_for_unknown_ones(place, tmp_path, caplog):
    rows = rows_of(9, 400)
    sparse = ["u1" if i == 0 else None for i in range(400)]
    pq.write_table(rows.set_column(1, "user", pa.array(sparse)), tmp_path / "r.parquet")
    assert predict(place, tmp_path / "s.csv", "--rows", tmp_path / "r.parquet") == 0
    in_two_steps(place, tmp_path, [tmp_path / "r.parquet"], 100)
    assert not [told for told in caplog.messages if "is the spelling the same" in told]


def test_one_process_alone(tmp_path):
    with pytest.raises(InputError, match=r"^--rows: expected one process, got 2; "):
        predict_rows(None, SimpleNamespace(world=2), tmp_path, None, [], tmp_path / "scores.csv")


TRAINED = FeatureSpec(
    (CategoricalFeature("a", 9, 4), CategoricalFeature("b", 5, 4, hotness=2)),
    (NumericFeature("x"), NumericFeature("y")),
    "clicked",
    directory=Path("data"),
)
A, B = TRAINED.categorical
X, Y = TRAINED.numeric


@pytest.mark.parametrize(
    ("categorical", "numeric", "expected", "found"),
    [
        ((replace(A, cardinality=8), B), (X, Y), "a (9 ids, 1 in a row)", "a (8 ids, 1 in a row)"),
        ((A, replace(B, hotness=3)), (X, Y), "b (5 ids, 2 in a row)", "b (5 ids, 3 in a row)"),
        ((replace(A, name="b"), replace(B, name="a")), (X, Y), "a (9 ids, 1 in a row)", "b (9 ids, 1 in a row)"),
        ((A,), (X, Y), "b (5 ids, 2 in a row)", "x"),
        ((A, B), (Y, X), "x", "y"),
        ((A, B), (X,), "y", "no further feature"),
        ((A, B), (X, Y, NumericFeature("z")), "no further feature", "z"),
    ],
)
def test_rows_of_other_features_are_refused(categorical, numeric, expected, found):
    check_features(TRAINED, replace(TRAINED, categorical=(replace(A, dim=7), B)), Path("model"))
    data = replace(TRAINED, categorical=categorical, numeric=numeric)
    with pytest.raises(InputError) as error:
        check_features(data, TRAINED, Path("model"))
    assert str(error.value) == f"data: expected the features of model, with {expected}, found {found} there"


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_not_finite_are_no_predictions(odd):
    with pytest.raises(RunError, match="prediction: 1 of 3 logits are not finite: the model has diverged"):
        predicted(torch.tensor([0.0, odd, 1.0]))
