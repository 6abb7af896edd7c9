"""Data sets of the original's Oct-2022 release (Parquet files and their feature spec) become shards as they are."""

from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import yaml

from preprocess.tabular import TabularConfig, run
from widedeep.errors import InputError
from widedeep.feature_spec import FeatureSpec
from widedeep.shards import ShardSet

ONE_HOT = {f.name: f.cardinality for f in FeatureSpec.outbrain().categorical}
MULTI_HOT = {"topic_id_list": (350, 3), "entity_id_list": (10_000, 3), "category_id_list": (100, 3)}
NUMERIC = list(FeatureSpec.outbrain().numeric_names)
ADS = ("ad_id", "advertiser_id", "campaign_id")

# The matrix of specs that the release is tested with: one-hot, multi-hot and numeric features.
SPECS = {
    "fspec_csv": (ONE_HOT, MULTI_HOT, NUMERIC),
    "less_multihot": (ONE_HOT, {"topic_id_list": (350, 3)}, NUMERIC),
    "less_numerical": (ONE_HOT, MULTI_HOT, [name for name in NUMERIC if "_sim_" not in name]),
    "less_onehot": ({k: v for k, v in ONE_HOT.items() if k not in ADS}, MULTI_HOT, NUMERIC),
    "more_multihot_moreless_hotness": (ONE_HOT, MULTI_HOT | {"more": (1000, 10), "less": (123, 2)}, NUMERIC),
    "more_numerical": (ONE_HOT, MULTI_HOT, [*NUMERIC, "n1", "n2", "n3", "n4"]),
    "more_onehot": (ONE_HOT | {"c1": 4000, "c2": 1337, "c3": 9999}, MULTI_HOT, NUMERIC),
    "no_categorical": ({}, {}, NUMERIC),
    "no_multihot": (ONE_HOT, {}, NUMERIC),
    "no_numerical": (ONE_HOT, MULTI_HOT, []),
    "no_onehot": ({}, MULTI_HOT, NUMERIC),
}


def columns(one_hot, multi_hot, numeric, rows, rng):
    """What the release's converter writes: lists as doubles, of any length up to the hotness."""
    table = {"clicked": rng.integers(0, 2, rows)}
    table |= {name: rng.integers(0, size, rows) for name, size in one_hot.items()}
    for name, (size, hotness) in multi_hot.items():
        lists = [rng.integers(0, size, rng.integers(0, hotness + 1)).astype(np.float64) for _ in range(rows)]
        table[name] = pa.array(lists, pa.list_(pa.float64()))
    return table | {name: rng.random(rows).astype(np.float32) for name in numeric}


def write(directory, one_hot, multi_hot, numeric, group=None):
    """A directory of three files of train rows and one of test rows; gives the columns of each mapping."""
    rng = np.random.default_rng(len(one_hot) * 100 + len(multi_hot) * 10 + len(numeric))
    features = {name: {"cardinality": size, "dtype": "int64"} for name, size in one_hot.items()}
    features |= {n: {"cardinality": size, "max_hotness": hot} for n, (size, hot) in multi_hot.items()}
    features |= {name: {"dtype": "float32"} for name in numeric} | {"clicked": {}} | ({group: {}} if group else {})
    sources, tables = {}, {}
    for mapping, sizes in (("train", (40, 40, 13)), ("test", (30,))):
        table = columns(one_hot, multi_hot, numeric, sum(sizes), rng)
        if group and mapping == "test":
            table[group] = np.arange(sum(sizes)) // 5
        files = [f"{mapping}_{i}.parquet" for i in range(len(sizes))]
        for i, start in enumerate(np.cumsum((0, *sizes))[:-1]):
            pq.write_table(pa.table(table).slice(start, sizes[i]), directory / files[i])
        sources[mapping] = [{"type": "parquet", "features": list(table), "files": files}]
        tables[mapping] = table
    channels = {"onehot_categorical": list(one_hot), "multihot_categorical": list(multi_hot)}
    channels |= {"numerical": numeric, "label": ["clicked"], "map": [group] if group else []}
    spec = {"feature_spec": features, "source_spec": sources, "channel_spec": channels, "metadata": {}}
    (directory / "feature_spec.yaml").write_text(yaml.safe_dump(spec))
    return tables


def rewrite_as_csv(directory, tables, header=False):
    """The same data set before the release's `transcode.py`: CSV files, lists in brackets, columns in any order."""
    path = directory / "feature_spec.yaml"
    spec = yaml.safe_load(path.read_text())
    for mapping, chunks in spec["source_spec"].items():
        names = chunks[0]["features"] if mapping == "train" else chunks[0]["features"][::-1]
        table = {}
        for name in names:
            values = tables[mapping][name]
            table[name] = [str([int(v) for v in x]) for x in values.to_pylist()] if name in MULTI_HOT else values
        ends = [0, *np.cumsum([pq.read_metadata(directory / file).num_rows for file in chunks[0]["files"]])]
        files = [file.replace("parquet", "csv") for file in chunks[0]["files"]]
        for file, (start, stop) in zip(files, pairwise(ends)):
            options = pa.csv.WriteOptions(include_header=header)
            pa.csv.write_csv(pa.table(table).slice(start, stop - start), directory / file, options)
        spec["source_spec"][mapping] = [{"type": "csv", "features": names, "files": files}]
    path.write_text(yaml.safe_dump(spec))


def compare(directory, tables):
    spec = FeatureSpec.load(directory)
    for mapping, table in tables.items():
        shards = ShardSet.open(spec.source_files(mapping)[0], verify=True)
        shards.check(spec)
        assert set(shards.columns) == set(table)
        got = shards.read(0, shards.rows)
        for name, values in table.items():
            if isinstance(values, pa.Array):
                width = got[name].shape[1]
                values = [[int(v) for v in row] + [-1] * (width - len(row)) for row in values.to_pylist()]
            np.testing.assert_array_equal(got[name], values, err_msg=name)


@pytest.mark.parametrize("name", SPECS)
def test_each_spec_of_the_matrix(tmp_path, name):
    tables = write(tmp_path, *SPECS[name])
    run(TabularConfig(tmp_path / "feature_spec.yaml", tmp_path / "out"))
    compare(tmp_path / "out", tables)
    spec = FeatureSpec.load(tmp_path / "out")
    one_hot, multi_hot, numeric = SPECS[name]
    assert spec.names == (*one_hot, *multi_hot)
    assert spec.hotness == (*(1 for _ in one_hot), *(hotness for _, hotness in multi_hot.values()))
    assert spec.numeric_names == tuple(numeric)


def test_only_the_test_files_have_the_display(tmp_path):
    """As the release's own preprocessing of Outbrain writes them."""
    tables = write(tmp_path, *SPECS["fspec_csv"], group="display_id")
    report = run(TabularConfig(tmp_path, tmp_path / "out"))
    assert report["train"]["rows"] == 93
    compare(tmp_path / "out", tables)


def test_files_that_are_given_by_name_have_the_display_for_training_too(tmp_path):
    """Whatever the spec's own train files lack."""
    tables = write(tmp_path, *SPECS["fspec_csv"], group="display_id")
    for split in ("none", "group:0.5"):
        run(TabularConfig(tmp_path, tmp_path / "out", inputs=[tmp_path / "test_0.parquet"], split=split))
        spec = FeatureSpec.load(tmp_path / "out")
        parts = [ShardSet.open(spec.source_files(mapping)[0]) for mapping in ("train", "test")]
        shown = [part.read(0, part.rows)["display_id"] for part in parts]
        assert sorted(np.concatenate(shown)) == tables["test"]["display_id"].tolist()
        assert (split == "none") == (len(shown[1]) == 0)
        assert not {*shown[0]} & {*shown[1]}


@pytest.mark.parametrize("header", [False, True])
def test_csv_files_of_a_spec(tmp_path, header):
    tables = write(tmp_path, *SPECS["fspec_csv"], group="display_id")
    rewrite_as_csv(tmp_path, tables, header)
    run(TabularConfig(tmp_path, tmp_path / "out"))
    compare(tmp_path / "out", tables)


def test_csv_files_of_a_spec_that_are_given_by_name(tmp_path, monkeypatch):
    tables = write(tmp_path, *SPECS["fspec_csv"])
    rewrite_as_csv(tmp_path, tables)
    monkeypatch.chdir(tmp_path)
    train = ["train_0.csv", str(tmp_path / "train_1.csv"), tmp_path / "train_2.csv"]
    run(TabularConfig(".", "out", inputs=train, test=["test_0.csv"]))
    compare(tmp_path / "out", tables)


def test_csv_files_of_a_spec_in_directories(tmp_path):
    """Which the spec names in the place of files; they too lack a header."""
    tables = write(tmp_path, *SPECS["fspec_csv"])
    rewrite_as_csv(tmp_path, tables)
    raw = yaml.safe_load((tmp_path / "feature_spec.yaml").read_text())
    for mapping, (chunk,) in raw["source_spec"].items():
        (tmp_path / mapping).mkdir()
        for name in chunk["files"]:
            (tmp_path / name).rename(tmp_path / mapping / name)
        chunk["files"] = [mapping]
    (tmp_path / "feature_spec.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
    run(TabularConfig(tmp_path, tmp_path / "out"))
    compare(tmp_path / "out", tables)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("1,2", "train_2.csv, line 14: expected 30 fields, found 2"),
        ("1," + "3," * 13 + '"[1, 2]","[1, x]",[],' + ",".join(["0.5"] * 13), "line 14: column entity_id_list: .*'x'"),
        ("1," + "7," * 13 + "[],[],[]," + ",".join(["0.5"] * 13), "line 14: column platform: expected an id of 0 to 3"),
    ],
)
def test_csv_lines_that_do_not_fit_a_spec(tmp_path, line, said):
    tables = write(tmp_path, *SPECS["fspec_csv"])
    rewrite_as_csv(tmp_path, tables)
    with (tmp_path / "train_2.csv").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(InputError, match=said):
        run(TabularConfig(tmp_path, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
