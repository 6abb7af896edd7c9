"""New rows without a label or a group: preprocessed with what the train rows taught, scored, and refused elsewhere."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from commands import main
from test_tabular import read, write_spec

from preprocess.tabular import TabularConfig, run
from widedeep.describe import describe
from widedeep.errors import InputError
from widedeep.outputs import UNDEFINED
from widedeep.shards import ShardSet

TRAIN = "--cpu --deep_hidden_units 4 --global_batch_size 32 --num_epochs 1 --deep_warmup_epochs 0 --seed 1 --threads 1"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A data set with groups, a model of it, and the predictions of its test rows; `new` has those rows."""
    place = tmp_path_factory.mktemp("place")
    rng = np.random.default_rng(0)
    data = {"city": rng.choice(["Oslo", "Rome"], 120), "session": np.arange(120) // 4, "click": rng.integers(0, 2, 120)}
    pyarrow.csv.write_csv(pa.table(data), place / "all.csv")
    features = {"city": {"transform": "vocabulary"}, "click": {"transform": {"nulls": "?"}}, "session": {}}
    spec = write_spec(place / "spec.yaml", features, one_hot=["city"], group="session")
    run(TabularConfig(spec, place / "data", [place / "all.csv"], split="last:40"))
    where = ["--dataset_path", str(place / "data"), "--model_dir", str(place / "model")]
    assert main(["train", *where, "--results_dir", str(place / "results"), *TRAIN.split()]) == 0
    assert main(predict(place, place / "data", place / "scores.csv")) == 0
    return place


def predict(place, data, out):
    return ["predict", "--model", str(place / "model"), "--dataset_path", str(data), "--cpu", "--out", str(out)]


def new_rows(place, path, **columns):
    """The test rows, with other columns in place of theirs, or without them where None is given."""
    table = pyarrow.csv.read_csv(place / "all.csv").slice(80)
    for name, values in columns.items():
        table = table.drop_columns([name])
        table = table if values is None else table.append_column(name, pa.array(values))
    pq.write_table(table, path) if path.suffix == ".parquet" else pyarrow.csv.write_csv(table, path)
    return path


def preprocessed(place, out, *files):
    words = ["preprocess", "tabular", "--spec", str(place / "data"), "--stats", str(place / "data"), "--out", str(out)]
    return main([*words, "--test", *map(str, files)])


@pytest.mark.parametrize(
    ("suffix", "columns"),
    [
        (".csv", {"click": None}),
        (".csv", {"click": [""] * 40}),
        (".csv", {"click": ["?"] * 39 + [""]}),
        (".parquet", {"click": pa.nulls(40)}),
        (".csv", {"session": None}),
        (".csv", {"session": [""] * 40}),
        (".parquet", {"click": None, "session": None}),
    ],
)
def test_rows_without_label_or_group_are_scored(place, tmp_path, capsys, suffix, columns):
    path = new_rows(place, tmp_path / f"new{suffix}", **columns)
    assert preprocessed(place, tmp_path / "new", path) == 0
    assert ("test: 40 rows, no labels" in capsys.readouterr().out) == ("click" in columns)
    assert (json.loads((tmp_path / "new" / "report.json").read_text())["test"]["positive_rate"] is None) == (
        "click" in columns
    )
    assert main(predict(place, tmp_path / "new", tmp_path / "scores.csv")) == 0
    want, got = (pyarrow.csv.read_csv(directory / "scores.csv") for directory in (place, tmp_path))
    gone = {"click": "label", "session": "session"}
    assert got == want.drop_columns([gone[name] for name in columns])


def test_what_is_undefined_of_rows_of_one_label_is_a_dash_in_both_commands(place, tmp_path, capsys):
    path = new_rows(place, tmp_path / "new.csv", click=[0] * 40)
    assert preprocessed(place, tmp_path / "new", path) == 0
    assert main(predict(place, tmp_path / "new", tmp_path / "scores.csv")) == 0
    capsys.readouterr()
    where = ["--model", str(place / "model"), "--dataset_path", str(tmp_path / "new"), "--cpu"]
    assert main(["evaluate", *where]) == 0
    *lines, why = capsys.readouterr().out.splitlines()
    values = dict(line.split() for line in lines)
    undefined = ("normalized_entropy", "auc", "auc_200", "auc_8000", "map", "map_all", "gauc")
    assert all((value == "-") == (name in undefined) for name, value in values.items())
    assert values["groups"] == "10"
    assert why == UNDEFINED
    assert main(["metrics", "--predictions", str(tmp_path / "scores.csv"), "--group", "session"]) == 0
    *lines, why = capsys.readouterr().out.splitlines()
    assert sum(line.endswith(" - │") for line in lines) == len(undefined)
    assert why == UNDEFINED
    assert main(["evaluate", *where[:3], str(place / "data"), "--cpu"]) == 0
    assert UNDEFINED not in capsys.readouterr().out


def test_what_needs_labels_refuses_rows_without(place, tmp_path, capsys):
    new = tmp_path / "new"
    assert preprocessed(place, new, new_rows(place, tmp_path / "new.csv", click=None)) == 0
    assert not ShardSet.open(new / "test").read(0, 40)["click"].any()
    again = ["train", "--dataset_path", str(new), "--results_dir", str(tmp_path / "results"), *TRAIN.split()]
    model, fresh = ["--model_dir", str(place / "model")], ["--model_dir", str(tmp_path / "model")]
    labels = f"{new / 'test'}: expected rows with labels, and these have none: `widedeep predict` takes them"
    for words, said in (
        (["evaluate", "--model", str(place / "model"), "--dataset_path", str(new), "--cpu"], labels),
        ([*again, *model, "--evaluate", "--use_checkpoint"], labels),
        ([*again, *fresh], f"{new / 'train'}: expected rows, and there are none"),
    ):
        capsys.readouterr()
        assert main(words) == 2
        assert capsys.readouterr().err == f"widedeep: {said}\n"
    assert not (tmp_path / "results").exists()
    for split in ("train", "test"):  # as a person might put them together
        mixed = shutil.copytree(place / "data", tmp_path / f"without-{split}")
        shutil.rmtree(mixed / split)
        shutil.copytree(new / "test", mixed / split)
        assert main(["train", "--dataset_path", str(mixed), *again[3:], *fresh]) == 2
        assert f"{mixed / split}: expected rows with labels" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()
    assert main(["metrics", "--predictions", str(place / "scores.csv")]) == 0
    assert main(predict(place, new, tmp_path / "scores.csv")) == 0
    assert main(["metrics", "--predictions", str(tmp_path / "scores.csv")]) == 2
    assert "expected one column 'label'; there are only prob, logit, session" in capsys.readouterr().err


def test_rows_of_which_some_have_a_label_are_refused(place, tmp_path):
    some = new_rows(place, tmp_path / "some.csv", click=[None] * 3 + [1] * 37)
    none, empty = new_rows(place, tmp_path / "none.csv", click=None), new_rows(place, tmp_path / "b.csv", session=None)
    whole, given = new_rows(place, tmp_path / "a.csv"), {"stats": place / "data"}
    for files, words in (
        ([some], r"some.csv, line 2: column click: expected a label, found no value"),
        ([whole, none], r"none.csv, line 1: column click is missing; the header has 'city', 'session'"),
        ([none, whole], r"none.csv, line 1: column click is missing"),
        ([whole, empty], r"b.csv, line 1: column session is missing"),
    ):
        with pytest.raises(InputError, match=words):
            run(TabularConfig(place / "data", tmp_path / "out", test=files, **given))
    # Beside train rows, or without statistics, labels are asked for as ever.
    for options in ({}, given):
        with pytest.raises(InputError, match=r"none.csv, line 1: column click is missing"):
            run(TabularConfig(place / "data", tmp_path / "out", [whole], [none], **options))
    run(TabularConfig(place / "data", tmp_path / "out", test=[whole], **given))
    assert read(tmp_path / "out" / "test")["click"].tolist() == read(place / "data" / "test")["click"].tolist()


def test_describe_shows_no_clicks_of_rows_without_labels(place, tmp_path):
    path = new_rows(place, tmp_path / "new.csv", click=None)
    assert preprocessed(place, tmp_path / "new", path) == 0
    report = describe(tmp_path / "new")
    assert report["splits"]["test"] == {"rows": 40, "clicks": None, "click_rate": None}
    top, labelled = (
        describe(place_ / name)["categorical"]["city"]["test"]["top"]
        for place_, name in ((tmp_path, "new"), (place, "data"))
    )
    assert [entry | {"click_rate": None} for entry in labelled] == top
    assert all(entry["click_rate"] is not None for entry in labelled)
    for suffix in (".html", ".json"):
        assert main(["describe", str(tmp_path / "new"), "--out", str(tmp_path / f"report{suffix}")]) == 0
    assert json.loads((tmp_path / "report.json").read_text()) == report
