"""`widedeep metrics`: a file of predictions in, one object or a table out."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from sklearn.metrics import accuracy_score, log_loss, roc_auc_score

from widedeep import scoring
from widedeep.errors import InputError
from widedeep.outputs import UNDEFINED

ROOT = Path(__file__).resolve().parents[1]
KEYS = ["rows", "groups", "multi_click_groups", "click_rate", "mean_probability", "logloss", "normalized_entropy"]
KEYS += ["accuracy", "auc", "auc_200", "auc_8000", "map", "map_all", "gauc"]


def score(capsys, path, label="y", prob="p", group="g", **options):
    assert scoring.run(path, label, prob, group, json=True, **options) == 0
    return json.loads(capsys.readouterr().out)


def table(rows=600):
    rng = np.random.default_rng(rows)
    prob = rng.integers(1, 60, rows) / 61
    return pa.table({"g": np.sort(rng.integers(0, rows // 5, rows)), "y": rng.random(rows) < prob, "p": prob})


def write(directory, data, name="p.csv"):
    path = directory / name
    if name.endswith(".csv"):
        data = data.set_column(1, "y", data["y"].cast(pa.int8()))
        pa.csv.write_csv(data, path)
    else:
        pa.parquet.write_table(data, path)
    return path


def test_real_predictions(shared, capsys):
    path = shared / "data" / "outbrain-sample" / "glm_predictions.csv"
    result = score(capsys, path, "clicked", "prob", "display_id", k=12)
    assert list(result) == KEYS
    assert (result["rows"], result["groups"]) == (50312, 9997)
    assert result["map"] == pytest.approx(0.620411083642553, abs=1e-14)
    assert result["auc"] == pytest.approx(0.687419036, abs=1e-9)
    assert result["logloss"] == pytest.approx(0.460982013, abs=1e-9)


@pytest.mark.parametrize("name", ["p.csv", "p.parquet"])
def test_golden_predictions(shared, tmp_path, capsys, name):
    with np.load(shared / "golden" / "metrics.npz") as golden:
        data = pa.table({"g": golden["display_ids"], "y": golden["labels"] > 0, "p": golden["probs"]})
        result = score(capsys, write(tmp_path, data, name))
        for key, name, limit in [
            ("auc_200", "auc200", 1e-6),
            ("auc_8000", "auc8000", 1e-6),
            ("accuracy", "binary_accuracy", 1e-7),
            ("logloss", "bce_from_probs", 1e-6),
            ("map", "map12_grouped", 1e-9),
        ]:
            assert result[key] == pytest.approx(float(golden[name]), abs=limit), key


def test_agrees_with_sklearn(tmp_path, capsys):
    data = table()
    result = score(capsys, write(tmp_path, data))
    label, prob = data["y"].to_numpy(), data["p"].to_numpy()
    assert result["auc"] == pytest.approx(roc_auc_score(label, prob), abs=1e-12)
    assert result["logloss"] == pytest.approx(log_loss(label, prob), abs=1e-12)
    assert result["accuracy"] == accuracy_score(label, prob > 0.5)
    assert result["groups"] == len(set(data["g"].to_pylist()))


def test_csv_and_parquet_agree(tmp_path, capsys):
    data = table()
    text = data.set_column(0, "g", pa.array([f"display {g}" for g in data["g"].to_pylist()]))
    results = [score(capsys, write(tmp_path, rows, name)) for rows in (data, text) for name in ("p.csv", "p.parquet")]
    for other in results[1:]:
        assert other == pytest.approx(results[0], abs=1e-12)
    coded = text.set_column(0, "g", text["g"].dictionary_encode())
    assert score(capsys, write(tmp_path, coded, "p.parquet")) == results[1]


def test_compressed_csv(tmp_path, capsys):
    path = write(tmp_path, table())
    packed = tmp_path / "p.csv.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert score(capsys, packed) == score(capsys, path)
    packed.write_bytes(packed.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"p\.csv\.gz: cannot be read"):
        scoring.run(packed, "y", "p", "g")


def test_types_that_change_late_in_a_file(tmp_path, capsys):
    path = tmp_path / "p.csv"
    start = "y,p,g\n" + "0,0,1\n1,1,1\n" * 200_000  # more than the block from which types are inferred
    path.write_text(start + "1,0.25,x\n0, 0.5,x\n")
    result = score(capsys, path)
    assert (result["rows"], result["groups"]) == (400_002, 2)
    assert result["auc"] < 1
    path.write_text(start + "1,0.25,x\n0,oops,x\n")
    with pytest.raises(InputError, match="line 400003, column 'p': expected a number, got 'oops'"):
        scoring.run(path, "y", "p", "g")


def test_without_groups(tmp_path, capsys):
    result = score(capsys, write(tmp_path, table()), group=None)
    assert list(result) == KEYS
    assert result["map"] is result["map_all"] is result["gauc"] is result["groups"] is None
    assert result["multi_click_groups"] is None


def test_normalized_entropy_is_the_loss_against_that_of_the_click_rate(tmp_path, capsys):
    rows = table()
    y, p = (np.asarray(rows[name], np.float64) for name in "yp")
    result = score(capsys, write(tmp_path, rows))
    assert result["click_rate"] == pytest.approx(y.mean(), rel=1e-12)
    assert result["mean_probability"] == pytest.approx(p.mean(), rel=1e-12)
    by_rate = log_loss(y, np.full(len(y), y.mean()))
    assert result["normalized_entropy"] == pytest.approx(log_loss(y, p) / by_rate, rel=1e-9)
    assert result["normalized_entropy"] < 1  # these probabilities know more than the rate
    constant = rows.set_column(2, "p", pa.array(np.full(len(y), y.mean())))
    assert score(capsys, write(tmp_path, constant))["normalized_entropy"] == pytest.approx(1, rel=1e-9)
    one_class = rows.set_column(1, "y", pa.array(np.ones(len(y), bool)))
    assert score(capsys, write(tmp_path, one_class))["normalized_entropy"] is None


def test_the_table_says_why_there_is_no_map(tmp_path, capsys):
    """Not asked for, which the flag changes; not undefined, as AUC is where all rows have one label."""
    path = write(tmp_path, table())
    assert scoring.run(path, "y", "p") == 0
    assert capsys.readouterr().out.splitlines()[-1] == scoring.NO_GROUPS
    assert scoring.run(path, "y", "p", "g") == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("└")
    one_label = table(20).set_column(1, "y", pa.array(np.zeros(20, bool)))
    assert scoring.run(write(tmp_path, one_label), "y", "p") == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [scoring.NO_GROUPS, UNDEFINED]


def test_a_group_of_several_clicks(tmp_path, capsys):
    """MAP as the original counts it, by the first click, and by all; counts of groups."""
    ranked = {"a": [0, 1, 1], "b": [0, 1], "c": [0, 0]}  # labels by falling probability
    rows = [(y, 0.9 - 0.1 * i, g) for g, labels in ranked.items() for i, y in enumerate(labels)]
    y, p, g = zip(*rows)
    result = score(capsys, write(tmp_path, pa.table({"g": g, "y": y, "p": p})))
    assert (result["rows"], result["groups"], result["multi_click_groups"]) == (7, 3, 1)
    assert result["map"] == pytest.approx((1 / 2 + 1 / 2) / 2)
    assert result["map_all"] == pytest.approx(((1 / 2 + 2 / 3) / 2 + 1 / 2) / 2)


def test_groups_and_probabilities_keep_all_their_digits(tmp_path, capsys):
    """Groups that differ above bit 32, and a clicked row that is ahead by less than a float32 can tell."""
    group = (np.arange(200) // 2 + 5) << 32
    low = np.random.default_rng(1).uniform(0.1, 0.9, 100)
    data = pa.table({"g": group, "y": np.tile([0, 1], 100), "p": np.stack([low, low + 1e-12], axis=1).ravel()})
    for name in ("p.csv", "p.parquet"):
        result = score(capsys, write(tmp_path, data, name))
        assert (result["groups"], result["map"], result["map_all"], result["gauc"]) == (100, 1, 1, 1)


def test_saturated_probabilities_have_a_finite_loss(tmp_path, capsys):
    path = tmp_path / "p.csv"
    path.write_text("y,p\n1,0\n0,1\n1,1\n0,0\n")
    assert score(capsys, path, group=None)["logloss"] == pytest.approx(15.4 / 2, abs=0.05)
    for row, least in (("1,0", 2e-7), ("0,1", 2**-23 + 1e-7)):  # float32 has no 1 - 1e-7
        path.write_text(f"y,p\n{row}\n")
        assert score(capsys, path, group=None)["logloss"] == pytest.approx(-np.log(least), abs=1e-6)


def test_one_class_prints_null(tmp_path, capsys):
    path = tmp_path / "p.csv"
    path.write_text("y,p,g\n0,0.5,1\n0,0.25,1\n")
    result = score(capsys, path)
    assert result["auc"] is result["auc_200"] is result["map"] is result["gauc"] is None


def test_table_for_people(tmp_path, capsys):
    assert scoring.run(write(tmp_path, table()), "y", "p", "g", k=5) == 0
    text = capsys.readouterr().out
    assert "MAP@5" in text
    assert "600" in text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "header line"),
        ("y,p,g\n", "expected rows"),
        ("y,p\n1,0.5\n", "one column 'g'; there are only y, p"),
        ("y,p,g,p\n1,0.5,1,0.5\n", "one column 'p'; it stands there twice"),
        ("y,p,g\n1,0.5,1\n0,abc,2\n", "line 3, column 'p': expected a number, got 'abc'"),
        ("y,p,g\n1,0.5,1\n0,,2\n", "line 3, column 'p': expected a number, got no value"),
        ("y,p,g\n1,0.5,1\n0,NaN,2\n", "line 3, column 'p': expected a probability in [0, 1], got nan"),
        ("y,p,g\n1,0.5,1\n\n0,1.5,2\n", "line 4, column 'p': expected a probability in [0, 1], got 1.5"),
        ("y,p,g\n1,0.5,1\n0,-0.1,2\n", "line 3, column 'p': expected a probability in [0, 1], got -0.1"),
        ("y,p,g\n1,0.5,1\n2,0.5,2\n", "line 3, column 'y': expected a label of 0 or 1, got 2"),
        ("y,p,g\n1,0.5,1\nyes,0.5,2\n", "line 3, column 'y': expected a number, got 'yes'"),
        ("y,p,g\n1,0.5,1\n0,0.5,\n", "line 3, column 'g': expected a group id, got no value"),
        ("y,p,g\n1,0.5,1\n0,0.5\n", "line 3: Expected 3 columns, got 2"),
        ("y,p,g\n1,2016-06-14,1\n", "column 'p': expected numbers, got the type date32[day]"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_bad_csv(tmp_path, text, words, packed):
    path = tmp_path / ("bad.csv.gz" if packed else "bad.csv")
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    with pytest.raises(InputError) as error:
        scoring.run(path, "y", "p", "g")
    assert str(error.value).startswith(str(path))
    assert words in str(error.value)


def test_bad_parquet(tmp_path):
    path = tmp_path / "bad.parquet"
    path.write_bytes(b"no parquet")
    with pytest.raises(InputError, match="expected a Parquet file"):
        scoring.run(path, "y", "p", "g")
    with pytest.raises(InputError, match="there is none"):
        scoring.run(tmp_path / "absent.csv", "y", "p", "g")
    pa.parquet.write_table(pa.table({"y": [0, 1], "p": [0.5, float("nan")]}), path)
    with pytest.raises(InputError, match=r"row 2, column 'p': expected a probability in \[0, 1\], got nan"):
        scoring.run(path, "y", "p")
    with pytest.raises(InputError, match="--k: expected a whole number above 0"):
        scoring.run(path, "y", "p", k=0)


def _rows(tmp_path, text):
    path = tmp_path / "p.csv"
    path.write_bytes(text.encode())
    return scoring.read_predictions(path, "label", "prob", "g")


@pytest.mark.parametrize(
    "groups",
    [
        ["18446744073709551615", "18446744073709551614", "18446744073709551613"],
        ["100000000000000000001", "100000000000000000002", "7"],
        ["001", "01", "1"],
        ["NA", "null", "nan"],
    ],
)
def test_groups_of_a_csv_are_texts(tmp_path, groups):
    text = "label,prob,g\n" + "".join(f"1,0.5,{group}\n" for group in groups)
    assert len(set(_rows(tmp_path, text).group.tolist())) == 3


def test_quoted_line_breaks(tmp_path):
    row = '1,0.5,7,"some text\nmore ""text"""\n'
    long = row.replace("\n", "\n" * 200, 1)  # where a block of the reader ends, it is mostly within a field
    for text, count in ((row, 60_000), (long, 20_000)):
        assert len(_rows(tmp_path, "label,prob,g,text\n" + text * count).prob) == count
    with pytest.raises(InputError, match="line 5, column 'prob'"):
        _rows(tmp_path, "label,prob,g,text\n" + row + "\n" + '0,x,1,"c\nd"\n')


def test_line_ends_of_old(tmp_path):
    with pytest.raises(InputError, match="line 3, column 'prob': expected a probability"):
        _rows(tmp_path, "label,prob,g\r1,0.5,1\r0,1.6,a\r")


@pytest.mark.parametrize("text", [pa.string(), pa.large_string(), pa.string_view()], ids=str)
def test_types_of_parquet(tmp_path, text):
    path = tmp_path / "p.parquet"
    table = {"label": [1, 0], "prob": pa.array([" 0.5", "0.25\t"], text), "g": [[1], [2]]}
    try:
        pa.parquet.write_table(pa.table(table), path)
    except pa.ArrowNotImplementedError:
        pytest.skip(f"pyarrow {pa.__version__} writes no {text}")
    assert scoring.read_predictions(path, "label", "prob").prob.tolist() == [0.5, 0.25]
    with pytest.raises(InputError, match="column 'g': expected group ids, got the type list"):
        scoring.read_predictions(path, "label", "prob", "g")


@pytest.mark.parametrize("name", ["p.csv", "p.parquet"])
def test_one_column_may_be_label_and_probability(tmp_path, capsys, name):
    path = write(tmp_path, table(), name)
    result = score(capsys, path, "y", "y")
    assert (result["auc"], result["accuracy"]) == (1, 1)
    assert result["mean_probability"] == result["click_rate"] == score(capsys, path)["click_rate"]


def test_a_column_that_is_not_there_is_an_exit_code_and_no_abort(tmp_path):
    """Whatever threads the CSV reader has started."""
    (tmp_path / "p.csv").write_text("label,prob\n0,0.5\n")
    program = "import sys, torch; from widedeep import cli; sys.exit(cli.main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "metrics", "--predictions", str(tmp_path / "p.csv"), "--group", "nope"]
    for done in [subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(6)]:
        _, said = done.communicate(timeout=120)
        assert done.returncode == 2, said
