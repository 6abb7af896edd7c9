"""Forms of input: delimiters, files without a header, Arrow, mixtures of all, masks of histories."""

import gzip
import uuid

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
import yaml

from preprocess.tabular import Encoder, TabularConfig, infer_spec, run
from preprocess.tabular.columns import Column, Lists
from widedeep.errors import InputError
from widedeep.feature_spec import FeatureSpec
from widedeep.shards import ShardSet

NAMES = ["city", "size", "seen_0", "seen_1", "there_0", "there_1", "day", "click"]


def rows(count=200):
    rng = np.random.default_rng(count)
    days = np.datetime64("2016-06-14") + rng.integers(0, 10, count)
    return pa.table(
        {
            "city": rng.choice(["Rome", "Oslo", "Paris, TX", "a;b", "a|b"], count),
            "size": rng.normal(size=count).round(3),
            "seen_0": rng.integers(0, 9, count),
            "seen_1": rng.integers(0, 9, count),
            "there_0": rng.integers(0, 2, count),
            "there_1": rng.integers(0, 2, count),
            "day": days.astype("datetime64[D]").astype(str),
            "click": rng.integers(0, 2, count),
        }
    )


def write_spec(path, **csv):
    features = {
        "city": {"transform": "vocabulary"},
        "seen": {"max_hotness": 2, "transform": {"columns": "seen[2]", "mask": "there[2]", "vocabulary": {}}},
        "size": {"transform": "standardise"},
        "click": {},
    }
    channels = {"onehot_categorical": ["city"], "multihot_categorical": ["seen"], "numerical": ["size"]}
    channels |= {"label": ["click"], "map": []}
    sections = {"feature_spec": features, "channel_spec": channels}
    path.write_text(yaml.safe_dump(sections | ({"metadata": {"csv": csv}} if csv else {})))
    return path


def csv_bytes(table, delimiter=",", header=True, bom=b""):
    out = pa.BufferOutputStream()
    pa.csv.write_csv(table, out, pa.csv.WriteOptions(include_header=header, delimiter=delimiter))
    return bom + out.getvalue().to_pybytes()


def outputs(directory):
    return {f.name: f.read_bytes() for part in ("train", "test") for f in sorted((directory / part).glob("*.shard"))}


def read(directory):
    shards = ShardSet.open(directory, verify=True)
    return shards.read(0, shards.rows)


@pytest.fixture
def plain(tmp_path):
    """What comma-separated rows with a header become."""
    (tmp_path / "plain.csv").write_bytes(csv_bytes(rows()))
    spec = write_spec(tmp_path / "plain.yaml")
    run(TabularConfig(spec, tmp_path / "plain", [tmp_path / "plain.csv"], split="last:50"))
    return outputs(tmp_path / "plain")


@pytest.mark.parametrize("chunk_bytes", [100, 1 << 20])
@pytest.mark.parametrize("suffix", [".txt", ".csv", ".csv.gz"])
@pytest.mark.parametrize(("delimiter", "header"), [(",", False), ("\t", True), (";", False), ("|", True)])
def test_delimiters_and_files_without_a_header(tmp_path, plain, delimiter, header, suffix, chunk_bytes):
    path = tmp_path / f"data{suffix}"
    data = csv_bytes(rows(), delimiter, header, b"\xef\xbb\xbf")
    path.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    named = {} if header else {"columns": ["city", "size", "seen[2]", "there[2]", "day", "click"]}
    spec = write_spec(tmp_path / "spec.yaml", delimiter=delimiter, **named)
    run(TabularConfig(spec, tmp_path / "out", [path], split="last:50", chunk_bytes=chunk_bytes))
    assert outputs(tmp_path / "out") == plain
    assert FeatureSpec.load(tmp_path / "out").metadata["csv"]["delimiter"] == delimiter


@pytest.mark.parametrize("name", ["a.tsv", "a.TSV", "a.tsv.gz"])
def test_the_name_of_a_file_implies_tabs(tmp_path, plain, name):
    data = csv_bytes(rows(), "\t")
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    run(TabularConfig(write_spec(tmp_path / "spec.yaml"), tmp_path / "out", [tmp_path / name], split="last:50"))
    assert outputs(tmp_path / "out") == plain
    spec, _ = infer_spec([str(tmp_path / name)])
    assert "metadata" not in spec
    commas = write_spec(tmp_path / "commas.yaml", delimiter=",")
    with pytest.raises(InputError, match=r"the header has 'city\\t.*' alone; its delimiter may be '\\t'$"):
        run(TabularConfig(commas, tmp_path / "out", [tmp_path / name], split="last:50"))


@pytest.mark.parametrize(
    ("header", "delimiter", "words"),
    [
        ("x;click", ",", "; the file has one column, 'x;click', and may want --delimiter ';'$"),
        ("x\tclick", ",", r"; the file has one column, 'x\\tclick', and may want --delimiter '\\t'$"),
        ("x,click", "|", "; the file has one column, 'x,click', and may want --delimiter ','$"),
        ("x, click", ",", "; the file has 'x', ' click'$"),
        ("x", ",", "; the file has 'x'$"),
        ("x,0.5", ",", "; the file has 'x', '0.5'; one without a header wants --columns$"),
    ],
)
def test_a_header_of_one_column_names_the_flag(tmp_path, header, delimiter, words):
    (tmp_path / "a.csv").write_text(header + "\n" + header.replace("click", "1").replace("x", "2") + "\n")
    for label, said in ((None, "expected --label, or one column called "), ("click", "column click is missing")):
        with pytest.raises(InputError, match=f"{said}.*{words}"):
            infer_spec([tmp_path / "a.csv"], label, delimiter=delimiter)


@pytest.mark.parametrize("kind", ["file", "stream", "lz4", "dictionary", "unsigned"])
def test_arrow_files(tmp_path, plain, kind):
    table, path = rows(), tmp_path / "data.arrow"
    if kind == "lz4":
        path = tmp_path / "data.feather"
        feather.write_feather(table, path, compression="lz4", chunksize=70)
    else:
        if kind in ("dictionary", "unsigned"):
            indices = pa.int32() if kind == "dictionary" else pa.uint32()  # polars' Categorical has the latter
            table = table.set_column(0, "city", table["city"].cast(pa.dictionary(indices, pa.string())))
        make = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
        with make(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=70)
    run(TabularConfig(write_spec(tmp_path / "spec.yaml"), tmp_path / "out", [path], split="last:50"))
    assert outputs(tmp_path / "out") == plain


def test_files_of_all_kinds_in_one_run(tmp_path, plain):
    table = rows()
    (tmp_path / "a.csv").write_bytes(csv_bytes(table.slice(0, 60)))
    pq.write_table(table.slice(60, 70), tmp_path / "b.parquet")
    feather.write_feather(table.slice(130, 20), tmp_path / "c.feather")
    (tmp_path / "d.csv.gz").write_bytes(gzip.compress(csv_bytes(table.slice(150))))
    inputs = [tmp_path / name for name in ("a.csv", "b.parquet", "c.feather")]
    spec = write_spec(tmp_path / "spec.yaml")
    run(TabularConfig(spec, tmp_path / "out", inputs, test=[tmp_path / "d.csv.gz"]))
    assert outputs(tmp_path / "out") == plain


def test_masked_elements_are_padding_and_teach_nothing(tmp_path):
    lines = ["5,7,2,0,1", "5,5,0.0,-0.5,0", "9,8,0,,1"]
    (tmp_path / "a.csv").write_text("seen_0,seen_1,there_0,there_1,click\n" + "\n".join(lines) + "\n")
    (tmp_path / "spec.yaml").write_text(
        "feature_spec:\n"
        "  seen: {max_hotness: 3, transform: {columns: 'seen[2]', mask: 'there[2]', vocabulary: {}}}\n"
        "  click: {}\n"
        "channel_spec: {onehot_categorical: [], multihot_categorical: [seen], numerical: [], label: [click], map: []}\n"
    )
    files = [tmp_path / "a.csv"]
    run(TabularConfig(tmp_path / "spec.yaml", tmp_path / "out", files, test=files))
    assert read(tmp_path / "out" / "train")["seen"].tolist() == [[1, -1, -1], [-1, 1, -1], [-1, -1, -1]]
    assert FeatureSpec.load(tmp_path / "out").cardinalities == (2,)
    (tmp_path / "a.csv").write_text("seen_0,seen_1,there_0,there_1,click\n1,1,1,no,1\n")
    with pytest.raises(InputError, match="line 2: column there_1: expected a number, found 'no'"):
        run(TabularConfig(tmp_path / "spec.yaml", tmp_path / "out", files, test=files))


@pytest.mark.parametrize(
    ("csv", "words"),
    [
        ({"delimiter": None}, "metadata.csv.delimiter: expected one ASCII character"),
        ({"delimiter": "::"}, "metadata.csv.delimiter: expected one ASCII character"),
        ({"quote": "'"}, "metadata.csv: expected a mapping with the keys delimiter and columns"),
        ({"columns": ["a", "a"]}, "metadata.csv.columns: expected each name once"),
        ({"columns": NAMES[1:]}, "column city is missing; the format names 'size', 'seen_0'"),
        ({"columns": [*NAMES, "more"]}, "line 1: expected 9 fields, found 8"),
    ],
)
def test_formats_that_do_not_fit(tmp_path, csv, words):
    (tmp_path / "a.csv").write_bytes(csv_bytes(rows(), header=False))
    spec = write_spec(tmp_path / "spec.yaml", **csv)
    with pytest.raises(InputError, match=words):
        run(TabularConfig(spec, tmp_path / "out", [tmp_path / "a.csv"], split="last:9"))


def test_arrow_files_that_are_damaged(tmp_path):
    spec = write_spec(tmp_path / "spec.yaml")
    feather.write_feather(rows(), tmp_path / "a.arrow", compression="uncompressed")
    whole = (tmp_path / "a.arrow").read_bytes()
    for data in (b"", b"ARROW1", whole[: len(whole) // 2], b"no" * 50):
        (tmp_path / "a.arrow").write_bytes(data)
        with pytest.raises(InputError, match=r"a\.arrow: cannot be read as Arrow"):
            run(TabularConfig(spec, tmp_path / "out", [tmp_path / "a.arrow"], split="last:9"))


ODD = {
    "timestamp": (pa.array([0, 1, 2], pa.timestamp("s")), "column size: expected a number, found"),
    "binary": (pa.array([b"1", b"2", b"\xff"]), r"row 3: column size: expected a number, found .*xff"),
    "damaged text": (
        pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")]),
        None,
    ),
    "binary lists": (pa.array([[b"a"], [b"\xff"], []]), r"column size: expected UTF-8 text, found .*xff"),
    "duration": (pa.array([0, 1, 2], pa.duration("s")), "column size: expected numbers, text or .*, found duration"),
    "struct": (pa.array([{"a": 1}] * 3), "column size: expected numbers, text or lists of them, found struct"),
    "map": (
        pa.array([[("a", 1)]] * 3, pa.map_(pa.string(), pa.int64())),
        "column size: expected numbers, .* found map",
    ),
    "identifiers": (
        pa.array([bytes(range(240, 256))] * 3, pa.uuid()),
        "row 1: column size: expected a number, found 'f0f1f2f3-f4f5-f6f7-f8f9-fafbfcfdfeff'",
    ),
    "nothing": (pa.nulls(3), "row 1: column size: expected a number, or a `fill` in its transform, found no value"),
    "lists": (pa.array([[1.0]] * 3), "column size: expected one value a row for size, found lists"),
}


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize("name", ODD)
def test_types_that_are_no_numbers(tmp_path, name, suffix):
    values, words = ODD[name]
    table = rows(len(values)).set_column(1, "size", values)
    path = tmp_path / f"a{suffix}"
    pq.write_table(table, path) if suffix == ".parquet" else feather.write_feather(table, path)
    with pytest.raises(InputError, match=words):
        run(TabularConfig(write_spec(tmp_path / "spec.yaml"), tmp_path / "out", [path], test=[path]))
    assert not (tmp_path / "out").exists()


def test_numbers_in_other_types_than_floats(tmp_path):
    for i, values in enumerate(([b"1", b"2"], [True, False], [1, 2], ["1", "2"])):
        pq.write_table(rows(2).set_column(1, "size", pa.array(values)), tmp_path / "a.parquet")
        spec = write_spec(tmp_path / "spec.yaml")
        run(TabularConfig(spec, tmp_path / f"out{i}", [tmp_path / "a.parquet"], test=[tmp_path / "a.parquet"]))
        assert sorted(read(tmp_path / f"out{i}" / "train")["size"].tolist()) == [-1, 1]


def ids_of(path, out, stats):
    """What the features of an earlier run make of a file."""
    run(TabularConfig(stats, out, test=[path], stats=stats))
    return {name: values.tolist() for name, values in read(out / "test").items()}


def test_a_value_keeps_its_id_whatever_the_type_in_a_file(tmp_path):
    """A null makes floats of a file's integers, a column of nulls has no type, and lists have several layouts."""
    features = {
        "ad": {"transform": "vocabulary"},
        "site": {"cardinality": 1000, "transform": "hash"},
        "seen": {"max_hotness": 2, "transform": "vocabulary"},
        "size": {"transform": {"fill": 0}},
        "click": {},
    }
    channels = {"onehot_categorical": ["ad", "site"], "multihot_categorical": ["seen"], "numerical": ["size"]}
    spec = {"feature_spec": features, "channel_spec": channels | {"label": ["click"], "map": []}}
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    table = {
        "ad": [10, 10**10 + 1, 3],
        "site": [10**12, 2, 3],
        "seen": [["a"], ["b", "a"], []],
        "size": [1.0, 2.0, 3.0],
    }
    table = pa.table(table | {"click": [0, 1, 1]})
    pq.write_table(table, tmp_path / "train.parquet")
    run(
        TabularConfig(
            tmp_path / "spec.yaml", tmp_path / "a", [tmp_path / "train.parquet"], [tmp_path / "train.parquet"]
        )
    )
    want = {name: values.tolist() for name, values in read(tmp_path / "a" / "test").items()}
    floats = table.set_column(0, "ad", table["ad"].cast(pa.float64()))
    floats = floats.set_column(1, "site", table["site"].cast(pa.float64()))
    floats = floats.set_column(2, "seen", pa.array(table["seen"].to_pylist(), pa.list_view(pa.string())))
    feather.write_feather(floats, tmp_path / "b.arrow")
    assert ids_of(tmp_path / "b.arrow", tmp_path / "b", tmp_path / "a") == want
    nothing = pa.table({name: pa.nulls(3) for name in ("ad", "site", "size")})
    nothing = nothing.append_column("seen", pa.array([[None], [], None], pa.list_(pa.null())))
    pq.write_table(nothing.append_column("click", table["click"]), tmp_path / "c.parquet")
    got = ids_of(tmp_path / "c.parquet", tmp_path / "c", tmp_path / "a")
    assert (got["ad"], got["seen"], got["size"]) == ([0] * 3, [[-1, -1]] * 3, [0] * 3)


@pytest.mark.parametrize("missing", [(), (1, 4)])
def test_uuids_are_the_texts_that_they_are_written_as(missing):
    g = np.random.default_rng()
    want = [None if i in missing else uuid.UUID(bytes=g.bytes(16)) for i in range(9)]
    array = pa.array([value and value.bytes for value in [*want, want[0]]], pa.uuid())
    for found in (array, array.slice(3, 4), array.slice(2, 0), pa.chunked_array([array, array])):
        column = Column.of(found)
        assert [column.texts[code] if code >= 0 else None for code in column.codes] == [
            None if value is None else str(value) for value in found.to_pylist()
        ]
    lists = Lists.of(pa.ListArray.from_arrays([0, 2, 2, 3], array.slice(5, 3)))
    assert lists.elements.texts == [str(value) for value in want[5:8]]


def test_uuids_in_a_file_and_in_memory(tmp_path):
    """DuckDB writes them so; a text that is one means the same."""
    g = np.random.default_rng()
    users = [uuid.UUID(bytes=g.bytes(16)) for _ in range(3)]
    table = rows(6).set_column(0, "city", pa.array([user.bytes for user in [*users, *users]], pa.uuid()))
    pq.write_table(table, tmp_path / "a.parquet")
    spec, notes = infer_spec([str(tmp_path / "a.parquet")])
    assert "city" in spec["feature_spec"]
    assert not any("city" in note for note in notes)
    run(TabularConfig(write_spec(tmp_path / "spec.yaml"), tmp_path / "out", [tmp_path / "a.parquet"], split="none"))
    ids = read(tmp_path / "out" / "train")["city"]
    assert sorted(ids[:3]) == [1, 2, 3]
    others = table.drop_columns(["city"]).to_pandas()
    for values in (users, [str(user) for user in users]):
        encoded, _ = Encoder(tmp_path / "out")(others[:3].assign(city=values))
        assert encoded[:, 0].tolist() == ids[:3].tolist()


@pytest.mark.parametrize("values", [[b"a", b"\xff"], [[b"a"], [b"\xff"]]])
def test_bytes_that_are_no_text(tmp_path, values):
    pq.write_table(rows(2).set_column(0, "city", pa.array(values)), tmp_path / "a.parquet")
    spec = write_spec(tmp_path / "spec.yaml")
    with pytest.raises(InputError, match="column city: expected UTF-8 text, found"):
        run(TabularConfig(spec, tmp_path / "out", [tmp_path / "a.parquet"], split="last:1"))


def test_a_proposal_for_a_file_without_a_header(tmp_path):
    (tmp_path / "a.tsv").write_bytes(csv_bytes(rows(2000), "\t", header=False))
    spec, _ = infer_spec([str(tmp_path / "a.tsv")], delimiter="\t", columns=NAMES)
    assert spec["metadata"] == {"csv": {"delimiter": "\t", "columns": NAMES}}
    short = ["city", "size", "seen[2]", "there[2]", "day", "click"]
    brief, _ = infer_spec([str(tmp_path / "a.tsv")], delimiter="\t", columns=short)
    assert brief == spec | {"metadata": {"csv": {"delimiter": "\t", "columns": short}}}
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    report = run(TabularConfig(tmp_path / "spec.yaml", tmp_path / "out", [tmp_path / "a.tsv"], split="time:day:0.2"))
    assert report["train"]["rows"] + report["test"]["rows"] == 2000
    assert report["test"]["rows"] >= 400


TAOBAO = ["btag[50]", "category[50]", "brand_history[50]", "mask[50]", "match_mask[50]"]
TAOBAO += [
    "uid",
    "cms_segid",
    "cms_group_id",
    "final_gender_code",
    "age_level",
    "pvalue_level",
    "shopping_level",
    "occupation",
]
TAOBAO += ["new_user_class_level", "ad", "cate_id", "campaign_id", "customer", "brand", "price", "pid", "click"]


def test_behaviour_histories_come_straight_from_their_file(shared, tmp_path):
    """500 rows of display advertising: 267 fields without a header, three histories of 50 steps with a mask."""
    path = shared / "data" / "taobao-alimama-sample" / "alimama_sampled_train.txt"
    histories = {"btag": 10, "category": 20_000, "brand_history": 500_000}
    features = {
        name: {
            "cardinality": size,
            "max_hotness": 50,
            "embedding_dim": 16,
            "combiner": "mean",
            "transform": {"columns": f"{name}[50]", "mask": "mask[50]"},
        }
        for name, size in histories.items()
    }
    one_hot = ["uid", "ad", "cate_id", "age_level", "pid"]
    features |= {name: {"embedding_dim": 16, "transform": "vocabulary"} for name in one_hot}
    features |= {"price": {"transform": "standardise"}, "click": {}}
    channels = {"onehot_categorical": one_hot, "multihot_categorical": list(histories), "numerical": ["price"]}
    spec = {"feature_spec": features, "channel_spec": channels | {"label": ["click"], "map": []}}
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec | {"metadata": {"csv": {"columns": TAOBAO}}}))
    report = run(TabularConfig(tmp_path / "spec.yaml", tmp_path / "out", [path], split="last:100"))
    assert [report[part]["rows"] for part in ("train", "test")] == [400, 100]
    cells = np.loadtxt(path, delimiter=",")
    got = {k: np.concatenate([read(tmp_path / "out" / p)[k] for p in ("train", "test")]) for k in features}
    for i, name in enumerate(histories):
        want = np.where(cells[:, 150:200] == 1, cells[:, 50 * i : 50 * i + 50], -1)
        np.testing.assert_array_equal(got[name], want)
    np.testing.assert_array_equal(got["click"], cells[:, 266])
    ads = {ad: set(got["ad"][:400][cells[:400, 259] == ad].tolist()) for ad in set(cells[:400, 259])}
    assert all(len(ids) == 1 for ids in ads.values())
    assert len(set.union(*ads.values())) == len(ads)


def test_display_advertising_with_blanks_and_hexadecimal_values(shared, tmp_path):
    path = shared / "data" / "criteo-tiny" / "train.tiny.csv"
    spec, _ = infer_spec([str(path)])
    assert {"C1", "C2", "C26", "I1_bucket"} <= set(spec["channel_spec"]["onehot_categorical"])
    assert {f"I{i}" for i in range(1, 9)} <= set(spec["channel_spec"]["numerical"])
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    report = run(TabularConfig(tmp_path / "spec.yaml", tmp_path / "out", [path], split="last:399"))
    assert [report[part]["rows"] for part in ("train", "test")] == [1600, 399]
    rates = [report[part]["positive_rate"] * report[part]["rows"] for part in ("train", "test")]
    assert sum(rates) / 1999 == pytest.approx(0.2091, abs=5e-5)
