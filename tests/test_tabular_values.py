"""Values that do not fit the spec: labels none of which is positive, numbers too large to store, settings of another
type, test values that train rows do not have, and columns of the label or of almost numbers."""

import os
import warnings

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from test_tabular import number, one_feature, read, write_spec

from preprocess.tabular import TabularConfig, infer_spec, run
from widedeep.errors import InputError

COLUMN = {"x": {"transform": "vocabulary"}}


def labels(tmp_path, values, positive, split="last:2", negative=None, **options):
    """The labels of a table of these values; text makes CSV, else Parquet. positive, negative: as YAML has them."""
    tmp_path.mkdir(exist_ok=True)
    path = tmp_path / ("a.csv" if isinstance(values[0], str) else "a.parquet")
    if path.suffix == ".csv":
        path.write_text("x,click\n" + "".join(f"{i % 3},{value}\n" for i, value in enumerate(values)))
    else:
        pq.write_table(pa.table({"x": [i % 3 for i in range(len(values))], "click": values}), path)
    given = {"positive": positive} | ({} if negative is None else {"negative": negative})
    click = {"transform": {key: yaml.safe_load(value) for key, value in given.items()}}
    spec = write_spec(tmp_path / "spec.yaml", COLUMN | {"click": click}, ["x"])
    run(TabularConfig(spec, tmp_path / "out", [path] if split else [], [] if split else [path], split, **options))
    return [value for part in ("train", "test") for value in read(tmp_path / "out" / part)["click"].tolist()]


@pytest.mark.parametrize(
    ("values", "positive", "words"),
    [
        (["yes", "no"], '[yes, "1"]', "expected quotes around what YAML reads as true or false"),
        (["yes", "no"], "yes", "expected quotes"),
        ([True, False], "true", "expected quotes"),
        (["Click", "None"], "click", "expected a value that train rows have, such as 'Click', 'None', got 'click'$"),
        (["1.0", "0.0"], '["1", on-line]', "such as '1.0', '0.0', got '1', 'on-line'$"),
        (["a", "b"], "c", "spec.yaml: feature_spec.click.transform.positive: expected a value that train rows have"),
        (list("abcdefg"), "h", "such as 'a', 'b', 'c', 'd', 'e', got 'h'$"),
        (["a", "b"], "[]", "transform.positive: expected at least one value, got none"),
    ],
)
def test_labels_none_of_which_is_positive_are_refused(tmp_path, values, positive, words):
    with pytest.raises(InputError, match=words):
        labels(tmp_path, values * 5, positive)
    assert not [name for name in os.listdir(tmp_path) if "out" in name]


@pytest.mark.parametrize(
    ("values", "positive"),
    [
        (["1.0", "0.0"], "1"),
        (["1", "0"], "1.0"),
        ([1.0, 0.0], "1"),
        ([1.0, 0.0], "1.0"),
        ([1, 0], "[1, 7]"),
        ([1, 0], '"1"'),
        (["9007199254740993", "9007199254740994"], "9007199254740993"),
        (["yes", "1e400"], '["yes", "1"]'),
        (["True", "False"], '"true"'),
        (["true", "FALSE"], '"TRUE "'),
        ([True, False], '["True", "1"]'),
        (["YES ", "no"], '"yes"'),
    ],
)
def test_positive_numbers_and_words_mean_every_spelling(tmp_path, values, positive):
    assert labels(tmp_path, values * 5, positive) == [1, 0] * 5


def test_what_only_python_takes_for_a_number_is_a_text(tmp_path):
    texts = [*["10", "1_0", "1_0.0", "\u0661\u0660"] * 2, " 10\u00a0"]
    assert labels(tmp_path, texts, "10") == [1, 0, 0, 0] * 2 + [1]
    assert labels(tmp_path, texts, "'1_0'") == [0, 1, 0, 0] * 2 + [0]
    with pytest.raises(InputError, match=r"expected a label of the spec .* found '1_0'"):
        labels(tmp_path, texts, "10", negative="0")


@pytest.mark.parametrize(
    ("values", "positive", "negative"),
    [
        (["yes", "no"], "'yes'", "'no'"),
        (["TRUE", "false"], "'true'", "'False'"),
        (["1.0", "0"], "1", "0.0"),
        ([1, 0], "[1, 7]", "[0, -1]"),
    ],
)
def test_negative_values_leave_no_third(tmp_path, caplog, values, positive, negative):
    assert labels(tmp_path, values * 5, positive, negative=negative) == [1, 0] * 5
    third = type(values[0])(2)
    for place, split in ((3, "last:2"), (9, "last:2")):  # of train and of test rows
        wrong = values * 5
        wrong[place] = third
        with pytest.raises(InputError, match=rf"click.*expected a label of the spec \(.*\), found '{third}'"):
            labels(tmp_path / "other", wrong, positive, split, negative=negative)
    (tmp_path / "out").rename(tmp_path / "first")
    options = {"split": None, "negative": negative, "stats": tmp_path / "first"}
    scored = labels(tmp_path, [values[0], third, third, values[1]], positive, **options)
    assert scored == [1, 0, 0, 0]  # rows to be scored need no true labels
    told = f"click: 2 of 4 rows have a label that the spec does not name, such as '{third}': it counts as 0 in metrics"
    assert told in caplog.messages
    caplog.clear()
    assert labels(tmp_path, values, positive, **options) == [1, 0]
    assert not any("label" in message for message in caplog.messages)
    with pytest.raises(InputError, match=r"click.*expected a label of the spec"):  # rows to be trained with do
        labels(tmp_path, [*values, third] * 3, positive, negative=negative, stats=tmp_path / "first")


@pytest.mark.parametrize(
    ("positive", "negative", "words"),
    [
        ("'yes'", "['no', 'yes']", "transform.negative: expected values that are not positive, got 'yes'"),
        ("'yes'", "['no', 'YES']", "transform.negative: expected values that are not positive, got 'YES'"),
        ("1", "['0', '1.0']", "transform.negative: expected values that are not positive, got '1.0'"),
        ("'1'", "[0, 1.0]", "transform.negative: expected values that are not positive, got '1'"),
        ("'yes'", "no", "transform.negative: expected quotes around what YAML reads as true or false"),
        ("'yes'", "[]", "transform.negative: expected at least one value, got none"),
    ],
)
def test_negative_values_that_make_no_sense(tmp_path, positive, negative, words):
    with pytest.raises(InputError, match=words):
        labels(tmp_path, ["yes", "no"] * 5, positive, negative=negative)


def test_test_rows_none_of_which_is_positive_are_warned_about(tmp_path, caplog):
    labels(tmp_path, ["yes", "no"] * 4 + ["yes."] * 2, "'yes'")
    assert "click: none of 2 test rows is positive" in caplog.text


@pytest.mark.parametrize("label", [0, 1])
def test_train_rows_of_one_label_are_warned_about(tmp_path, caplog, label):
    (tmp_path / "a.csv").write_text("x,click\n" + f"1,{label}\n" * 8 + f"1,{1 - label}\n")
    spec = write_spec(tmp_path / "spec.yaml", COLUMN | {"click": {}}, ["x"])
    files = [tmp_path / "a.csv"]
    run(TabularConfig(spec, tmp_path / "out", files, split="none"))
    assert not caplog.records
    run(TabularConfig(spec, tmp_path / "out", files, split="last:1"))
    assert f"click: all labels of the 8 train rows are {label}: nothing can be learned" in caplog.text


def test_only_train_rows_must_have_a_positive_one(tmp_path):
    with pytest.raises(InputError, match="such as 'no', got 'yes'"):
        labels(tmp_path, ["no"] * 8 + ["yes"] * 2, '"yes"')
    assert labels(tmp_path, ["yes"] * 8 + ["no"] * 2, '"yes"') == [1] * 8 + [0] * 2
    (tmp_path / "out").rename(tmp_path / "first")
    assert labels(tmp_path, ["0"] * 3, '"yes"', split=None, stats=tmp_path / "first") == [0] * 3
    assert labels(tmp_path, ["0"] * 9, '"yes"', stats=tmp_path / "first") == [0] * 9


@pytest.mark.parametrize("key", ["nulls", "columns"])
def test_texts_that_yaml_reads_as_booleans(tmp_path, key):
    attributes = {"max_hotness": 2, "transform": {"vocabulary": {}, key: [False, "NA"]}}
    with pytest.raises(InputError, match=rf"city.transform.{key}: expected quotes .* got \[False, 'NA'\]"):
        one_feature(tmp_path, "city", attributes)


BEYOND = [
    ("1e300", {}, "float32", "a number that fits float32, found '1e+300'"),
    ("-4e38", {"fill": 0}, "float32", "a number that fits float32, found '-4e+38'"),
    ("70000", {}, "float16", "a number that fits float16, found '70000.0'"),
    ("1e300", {"standardise": True}, "float32", "a number from -1e+150 to 1e+150, found '1e+300'"),
    ("1e300", {"fill": "mean", "log": True}, "float32", "a number from -1e+150 to 1e+150, found '1e+300'"),
]


@pytest.mark.parametrize(("cell", "transform", "numeric", "words"), BEYOND)
def test_numbers_too_large_are_named_with_their_line(tmp_path, cell, transform, numeric, words):
    lines = ["age,click", *(f"{i},yes" for i in range(9))]
    lines[4] = f"{cell},yes"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputError) as caught:
            one_feature(tmp_path, "age", number(**transform), "\n".join(lines), numeric=numeric, chunk_bytes=20)
    assert str(caught.value) == f"{tmp_path}/data.csv, line 5: column age: expected {words}"
    assert sorted(os.listdir(tmp_path)) == ["data.csv", "spec.yaml"]


def test_a_number_too_large_to_learn_from_is_named_behind_missing_ones(tmp_path):
    text = "age,click\n,yes\n1,no\n,yes\n1e300,yes\n2,no\n"
    for transform in ({"fill": "mean"}, {"fill": 0, "standardise": True}):
        with pytest.raises(InputError, match=r"line 5: column age: .*found '1e\+300'"):
            one_feature(tmp_path, "age", number(**transform), text, "last:1")


def test_test_rows_may_be_too_large_when_standardised(tmp_path):
    text = "age,click\n" + "0.001,yes\n0.002,yes\n" * 4 + "3e37,no\n"
    with pytest.raises(InputError, match=r"line 10: .* fits float32 when standardised, found '3e"):
        one_feature(tmp_path, "age", number(standardise=True), text, "last:1")
    train, test = one_feature(tmp_path, "age", number(clip=[0, 9]), text.replace("3e37", "1e300"), "last:1")
    assert (max(train), test) == (pytest.approx(0.002), [9])


@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        (number(log=0), "log: expected true or false, got 0"),
        (number(standardise=0), "standardise: expected true or false, got 0"),
        (number(log=1), "log: expected true or false, got 1"),
        (number(fill=10**400), "fill: expected a number, mean or median"),
        ({"cardinality": 1, "transform": {"bucketise": {"quantiles": 4}}}, "bucketise: expected a cardinality of at"),
        ({"cardinality": 1, "transform": {"bucketise": {"edges": [4]}}}, "bucketise: expected a cardinality of at"),
        ({"transform": {"bucketise": {"edges": [1, 2, 2]}}}, "bucketise.edges: expected rising numbers"),
    ],
)
def test_settings_of_another_type(tmp_path, attributes, words):
    with pytest.raises(InputError, match=words):
        one_feature(tmp_path, "age", attributes)


def test_two_buckets_are_one_of_values(tmp_path):
    attributes = {"cardinality": 2, "transform": {"bucketise": {"quantiles": 4}}}
    assert one_feature(tmp_path, "age", attributes) == [[1, 1, 0, 1], [1, 1]]


@pytest.mark.parametrize(
    ("train", "test", "told"),
    [
        ("{}", "{}.0", "x: 0 of 200 test values occur among those learned from train rows; is the spelling the same?"),
        ("{}", "{}", None),
        ("", "new", None),
        ("{}|7", "{}.0|", "x: 0 of 200 test values occur among"),
    ],
)
def test_test_values_that_train_rows_do_not_have_are_told(tmp_path, caplog, train, test, told):
    rng = np.random.default_rng(0)
    for name, form in (("train", train), ("test", test)):
        lines = (f"{form.format(value)},{value % 2}\n" for value in rng.integers(0, 20, 200))
        (tmp_path / f"{name}.csv").write_text("x,click\n" + "".join(lines))
    multi_hot = "|" in train
    x = {"transform": {"vocabulary": {}}}
    x = {"max_hotness": 2, "transform": {"vocabulary": {}, "separator": "|"}} if multi_hot else x
    spec = write_spec(tmp_path / "spec.yaml", {"x": x, "click": {}}, **{"multi_hot" if multi_hot else "one_hot": ["x"]})
    run(TabularConfig(spec, tmp_path / "out", [tmp_path / "train.csv"], [tmp_path / "test.csv"]))
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (told is not None)
    assert not said or said[0].startswith(told)
    caplog.clear()
    run(TabularConfig(spec, tmp_path / "new", test=[tmp_path / "test.csv"], stats=tmp_path / "out"))
    assert len(caplog.records) == (test != "{}")


@pytest.mark.parametrize(("split", "by"), [("time:x:0.5", "time"), ("group:0.5", "group")])
def test_values_of_the_column_that_splits_the_rows_are_told_to_be_new(tmp_path, caplog, split, by):
    (tmp_path / "a.csv").write_text("x,click\n" + "".join(f"{i // 2},{i % 2}\n" for i in range(400)))
    features = COLUMN | {"click": {}, "who": {"transform": {"column": "x"}}}
    spec = write_spec(tmp_path / "spec.yaml", features, ["x"], group="who")
    run(TabularConfig(spec, tmp_path / "out", [tmp_path / "a.csv"], split=split))
    assert [record.getMessage() for record in caplog.records] == [
        f"x: its column splits the rows by {by}, so its test values are new: leave it out of the features"
    ]


def test_a_split_without_test_rows_is_warned_about(tmp_path, caplog):
    labels(tmp_path, ["yes", "no"] * 4, "'yes'", "time:x:9")
    assert "the split time:x:9 makes no test rows" in caplog.text


def test_test_files_without_rows_are_warned_about(tmp_path, caplog):
    labels(tmp_path, ["yes", "no"] * 4, "'yes'")
    assert "not be evaluated" not in caplog.text
    (tmp_path / "empty.csv").write_text("x,click\n")
    run(TabularConfig(tmp_path / "spec.yaml", tmp_path / "none", [tmp_path / "a.csv"], [tmp_path / "empty.csv"]))
    assert "the test files hold no rows: a training would not be evaluated" in caplog.text


@pytest.mark.parametrize("channel", ["one_hot", "multi_hot", "numeric", "masked"])
def test_a_feature_of_the_labels_column_is_refused(tmp_path, channel):
    attributes = {
        "one_hot": {"transform": {"column": "click", "vocabulary": {}}},
        "multi_hot": {"max_hotness": 2, "transform": {"columns": ["x", "click"], "vocabulary": {}}},
        "numeric": {"transform": {"column": "click"}},
        "masked": {"max_hotness": 1, "transform": {"columns": ["x"], "mask": ["click"], "vocabulary": {}}},
    }
    kind = "multi_hot" if channel == "masked" else channel
    (tmp_path / "a.csv").write_text("x,click\n1,1\n2,0\n")
    spec = write_spec(tmp_path / "spec.yaml", {"leak": attributes[channel], "click": {}}, **{kind: ["leak"]})
    with pytest.raises(
        InputError, match=r"spec\.yaml: feature_spec\.leak: expected other columns than .*, got 'click'$"
    ):
        run(TabularConfig(spec, tmp_path / "out", [tmp_path / "a.csv"], split="none"))


def test_features_in_no_list_are_told(tmp_path, caplog):
    (tmp_path / "a.csv").write_text("x,click\n1,1\n2,0\n")
    spec = write_spec(tmp_path / "spec.yaml", COLUMN | {"y": {}, "x_y": {}, "click": {}}, ["x"])
    run(TabularConfig(spec, tmp_path / "out", [tmp_path / "a.csv"], split="none"))
    assert caplog.messages == [f"{spec}: in no list of channel_spec, so no part of the data set: x_y, y"]


def test_columns_of_numbers_but_for_a_few_texts_are_told(tmp_path):
    """Not ids, few distinct numbers, or texts of which many are no numbers."""
    rng = np.random.default_rng()
    numbers, few = rng.permutation(500).astype(str).tolist() * 2, rng.integers(0, 9, 1000).astype(str).tolist()
    columns = {"price": numbers, "ad_id": numbers, "slot": few, "code": numbers, "fine": numbers}
    columns = {name: values.copy() for name, values in columns.items()}
    for name, strays in (("price", ["sold out", "n/a"]), ("ad_id", ["x7"]), ("slot", ["none", "top"])):
        columns[name][: len(strays)] = strays
    columns["code"][:400] = [f"c{i}" for i in range(400)]
    columns |= {"cost": [*numbers[:-4], "a", "b", "c", "d"], "click": [0, 1] * 500}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    spec, notes = infer_spec([tmp_path / "a.parquet"])
    assert {"price", "cost", "code"} <= {*spec["channel_spec"]["onehot_categorical"]}
    assert [note for note in notes if "numbers but" in note] == [
        "price: numbers but for 'sold out'; a numeric feature wants these in its `nulls`",
        "cost: numbers but for 'a', 'b', 'c', ...; a numeric feature wants these in its `nulls`",
    ]


def test_a_split_without_train_rows_leaves_nothing_to_learn_from(tmp_path):
    text = "x,at,click\na,5,yes\nb,6,no\n"
    with pytest.raises(InputError, match=r"data.csv: expected train rows to learn from, found none$"):
        one_feature(tmp_path, "x", {"transform": "vocabulary"}, text, "time:at:5")
    assert not (tmp_path / "out").exists()
    assert one_feature(tmp_path, "x", {"transform": "vocabulary"}, text, "time:at:6") == [[1], [0]]


def test_an_element_that_does_not_fit_is_named_with_the_row_of_its_list(tmp_path):
    attributes = {"max_hotness": 3, "cardinality": 9, "transform": {"separator": "|"}}
    for cells in (["1|2|3", "", "4|x|5", "6"], ["", "7|8", "x|1", "x"]):
        text = "tags,click\n" + "".join(f"{cell},{word}\n" for cell, word in zip(cells, ["yes", "no"] * 2))
        with pytest.raises(InputError, match=r"data.csv, line 4: column tags: expected an id of 0 to 8, found 'x'"):
            one_feature(tmp_path, "tags", dict(attributes), text)


@pytest.mark.parametrize("unit", ["D", "s", "ms", "ns"])
@pytest.mark.parametrize("zone", [None, "UTC", "Asia/Kolkata"])
def test_times_are_left_out_of_a_proposal(tmp_path, unit, zone):
    """Whatever their unit, even if they repeat; words and numbers that begin as one do not make a column of times."""
    days = np.datetime64("2024-02-27", unit) + np.random.default_rng().integers(0, 9, 300).astype("m8[D]")
    times = pa.array(days) if unit == "D" else pa.array(days.astype(f"M8[{unit}]")).cast(pa.timestamp(unit, zone))
    texts = [*map(str, days[1:]), "later"]
    columns = {"at": times, "text": days.astype(str).tolist(), "word": texts, "click": [0, 1] * 150}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    spec, notes = infer_spec([tmp_path / "a.parquet"])
    told = "holds times, which seldom come again; `--split time:{0}:0.2` divides the rows by them"
    assert notes[:2] == [f"left out: {name}: {told.format(name)}" for name in ("at", "text")]
    assert spec["channel_spec"]["onehot_categorical"] == ["word"]


@pytest.mark.parametrize("written", ["as it is", "relative", "link"])
def test_a_file_for_training_and_for_the_test_is_told(tmp_path, caplog, monkeypatch, written):
    """However its path is written."""
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text("x,click\n1,1\n2,0\n")
    (tmp_path / "c.csv").symlink_to("a.csv")
    monkeypatch.chdir(tmp_path)
    again = {"as it is": tmp_path / "a.csv", "relative": "a.csv", "link": tmp_path / "c.csv"}[written]
    spec = write_spec(tmp_path / "spec.yaml", COLUMN | {"click": {}}, ["x"])
    for train, test in (([tmp_path / "a.csv"], [tmp_path / "b.csv"]), (["b.csv", tmp_path / "a.csv"], [again])):
        run(TabularConfig(spec, tmp_path / "out", train, test))
    told = "among the train files and the test files: metrics of known rows say nothing"
    assert caplog.messages == [f"{tmp_path / 'a.csv'}: {told}"]
