"""Malformed input of every kind to every reader: a defined result or one InputError, and never half an output."""

import json
import os
import shutil
import struct
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from preprocess import outbrain
from preprocess.tabular import TabularConfig, infer_spec, run
from preprocess.tabular.spec import TabularSpec
from preprocess.tfrecord import records
from preprocess.tfrecord.crc32c import masked
from widedeep import describe, shard_manifest
from widedeep.errors import InputError
from widedeep.feature_spec import FeatureSpec
from widedeep.scoring import read_predictions
from widedeep.shards import ShardSet

OUTBRAIN = Path(__file__).parent / "data" / "outbrain"
SPEC = {
    "feature_spec": {
        "town": {"transform": {"vocabulary": {"min_count": 1}}},
        "id": {"cardinality": 10},
        "tags": {"max_hotness": 2, "cardinality": 7, "transform": {"separator": "|", "hash": {}}},
        "size": {"transform": {"fill": "median", "log": True, "standardise": True}},
        "bucket": {"transform": {"column": "size", "bucketise": {"quantiles": 3}}},
        "all": {"transform": {"cross": ["town", "id", "bucket"]}},
        "hashed": {"cardinality": 5, "transform": {"cross": ["id", "town"]}},
        "click": {"transform": {"positive": ["1", "yes"]}},
    },
    "channel_spec": {
        "onehot_categorical": ["all", "town", "id", "bucket", "hashed"],
        "multihot_categorical": ["tags"],
        "numerical": ["size"],
        "label": ["click"],
        "map": [],
    },
}
HEADER = ("town", "id", "tags", "size", "click")


def fuzz(examples):
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=checks)


@pytest.fixture
def place(tmp_path):
    """A function that gives a new empty directory for each example."""
    return lambda: Path(tempfile.mkdtemp(dir=tmp_path))


def outcome(action):
    """What the action gives, or the InputError it raises: one sentence. Any other exception is a failure."""
    result = None
    try:
        result = action()
    except InputError as error:
        result = error
    assert str(result)
    return result


def check_output(directory, result):
    """There is a whole data set, or nothing at all, not even under a hidden name."""
    names = [name for name in os.listdir(directory) if "out" in name]
    if isinstance(result, InputError):
        assert names == []
        return None
    assert names == ["out"]
    described = describe.describe(directory / "out")
    return described["categorical"], described["numeric"], described["splits"]


CELLS = [
    "",
    "\\N",
    "1",
    "3",
    "-1",
    "-9",
    "12",
    "99999999999999999999",
    "1e400",
    "nan",
    "inf",
    "1.5",
    "0x1",
    "a|b|c",
    "|",
]
CELLS += [
    '"a,b"',
    '"a""b"',
    '"open',
    'mid"dle',
    '"',
    "ü",
    "\0",
    "a\0b",
    " 2 ",
    "\\",
    "yes",
    "\ufeff",
    "\x85",
    "\u2028",
    "#",
]
GOOD = st.tuples(*map(st.sampled_from, (["Rome", "Oslo"], ["1", "9"], ["a|b", ""], ["0.5", "-7", ""], ["1", "no"])))
BAD = st.lists(st.sampled_from(CELLS) | st.text(max_size=4), min_size=1, max_size=7)
ROWS = st.lists(GOOD | GOOD | BAD, max_size=12)
ENDS = st.sampled_from(["\n", "\r\n", "\n\n", "\r", "\n \n"])
CODES = st.sampled_from(["utf-8"] * 6 + ["latin-1", "utf-16", "utf-8-sig"])


@st.composite
def csv_files(draw, header=HEADER):
    """Bytes of a CSV file: quotes open and closed, nulls, line ends, encodings and cut-off ends of all kinds."""
    rows, end = draw(ROWS), draw(ENDS)
    first = draw(st.sampled_from([header] * 8 + [header[1:], (*header, header[0]), ()]))
    data = end.join(",".join(row) for row in [first, *rows]).encode(draw(CODES), "replace")
    cut = draw(st.integers(0, 9))
    return data if cut else data[: draw(st.integers(0, len(data)))]


def mutated(draw, data):
    """A few bytes replaced, removed or doubled."""
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        piece = draw(st.sampled_from([b"", b"\0", b"\xff", b'"', b"\n", data[at : at + 8] * 2]))
        data = data[:at] + piece + data[at + draw(st.integers(0, 4)) :]
    return data


@fuzz(60)
@example(data=b"town,id,tags,size,click\n \nRome,1,a|b,0.5,1\n", chunk_bytes=1)
@given(data=csv_files(), chunk_bytes=st.sampled_from([1, 17, 60]))
def test_tables(place, data, chunk_bytes):
    """The cut into chunks is not to be seen: not in what is written, nor in whether it is refused."""
    results = []
    for size in (1 << 20, chunk_bytes):
        directory = place()
        (directory / "a.csv").write_bytes(data)
        (directory / "spec.yaml").write_text(yaml.safe_dump(SPEC))
        options = {"inputs": [directory / "a.csv"], "split": "random:0.3", "chunk_bytes": size}
        config = TabularConfig(directory / "spec.yaml", directory / "out", **options)
        result = outcome(lambda config=config: run(config))
        results.append(check_output(directory, result))
        shutil.rmtree(directory)
    assert results[0] == results[1]


@fuzz(80)
@given(data=csv_files())
def test_proposals(place, data):
    path = place() / "a.csv"
    path.write_bytes(data)
    spec = outcome(lambda: infer_spec([str(path)], "click"))
    if not isinstance(spec, InputError):
        path.with_name("spec.yaml").write_text(yaml.safe_dump(spec[0]))
        result = outcome(lambda: run(TabularConfig(path.with_name("spec.yaml"), path.with_name("out"), [path], [path])))
        check_output(path.parent, result)


TABLE_FILES = ["a.parquet", "a.arrow", "a.csv.gz", "a.csv.zst"]


def whole_table(name):
    table = pa.table(
        {
            "town": ["Rome", "Oslo", None] * 20,
            "id": list(range(10)) * 6,
            "tags": [["a"], [], None] * 20,
            "size": [0.5, None, -7.0] * 20,
            "click": [1, 0, 1] * 20,
        }
    )
    out = pa.BufferOutputStream()
    if name == "a.parquet":
        pq.write_table(table, out, compression="none")
    elif name == "a.arrow":
        with pa.ipc.new_file(out, table.schema) as writer:
            writer.write_table(table)
    else:
        with pa.CompressedOutputStream(out, "gzip" if name.endswith("gz") else "zstd") as packed:
            packed.write(",".join(HEADER).encode() + b"\n" + b"Rome,1,a|b,0.5,1\n" * 40)
    return out.getvalue().to_pybytes()


@fuzz(60)
@given(draw=st.data(), name=st.sampled_from(TABLE_FILES))
def test_binary_tables(place, draw, name):
    directory = place()
    (directory / name).write_bytes(mutated(draw.draw, whole_table(name)))
    (directory / "spec.yaml").write_text(yaml.safe_dump(SPEC))
    config = TabularConfig(directory / "spec.yaml", directory / "out", [directory / name], split="last:9")
    check_output(directory, outcome(lambda: run(config)))


RAW = sorted(path.name for path in OUTBRAIN.glob("*.csv"))


@fuzz(12)
@given(draw=st.data(), name=st.sampled_from(RAW))
def test_outbrain_files(place, draw, name):
    directory = place()
    shutil.copytree(OUTBRAIN, directory / "raw")
    lines = (directory / "raw" / name).read_bytes().splitlines(keepends=True)
    at = draw.draw(st.integers(0, len(lines) - 1))
    fields = lines[at].rstrip(b"\r\n").split(b",")
    fields[draw.draw(st.integers(0, len(fields) - 1))] = draw.draw(st.sampled_from(CELLS)).encode()
    lines[at] = b",".join(fields) + draw.draw(ENDS).encode()
    data = b"".join(lines[: draw.draw(st.sampled_from([len(lines)] * 4 + [at, at + 1]))])
    (directory / "raw" / name).write_bytes(data + lines[-1] * draw.draw(st.sampled_from([0, 0, 1])))
    config = outbrain.OutbrainConfig(data_path=directory / "raw", out=directory / "out", workers=1)
    check_output(directory, outcome(lambda: outbrain.run(config)))
    shutil.rmtree(directory)


@fuzz(100)
@example(data="label,prob,group\n1,0.5,1\n".encode("utf-16"), kind=".csv")
@given(data=csv_files(("label", "prob", "group")), kind=st.sampled_from([".csv", ".parquet"]))
def test_predictions(place, data, kind):
    path = place() / f"a{kind}"
    path.write_bytes(data)
    outcome(lambda: read_predictions(path, "label", "prob", "group"))


ODD = [None, True, -1, 0, 2**40, 1.5, float("nan"), "", "x", "hash", [], [1], ["x", "x"], {}, {"x": 1}, {1: 2}]


def replaced(draw, value):
    """A copy of nested dicts and lists in which one place holds something odd."""
    if not isinstance(value, dict | list) or not value or draw(st.integers(0, 5)) == 0:
        return draw(st.sampled_from(ODD))
    if isinstance(value, list):
        at = draw(st.integers(0, len(value) - 1))
        return [replaced(draw, item) if i == at else item for i, item in enumerate(value)]
    key = draw(st.sampled_from(sorted(value, key=str)))
    how = draw(st.integers(0, 9))
    if how == 0:
        return {k: v for k, v in value.items() if k != key}
    if how == 1:
        return value | {draw(st.sampled_from(["x", 3, None, "transform", "files"])): value[key]}
    return value | {key: replaced(draw, value[key])}


@fuzz(80)
@given(draw=st.data())
def test_specs(place, draw):
    directory = place()
    chunk = [{"type": "shards", "features": list(SPEC["feature_spec"]), "files": ["train"]}]
    spec = SPEC | {"source_spec": {"train": chunk, "test": chunk}, "metadata": {"csv": {"columns": ["a[3]"]}}}
    for _ in range(draw.draw(st.integers(1, 2))):
        spec = replaced(draw.draw, spec) if isinstance(spec, dict) else spec
    text = yaml.safe_dump(spec).encode()
    text = mutated(draw.draw, text) if draw.draw(st.booleans()) else text
    (directory / "feature_spec.yaml").write_bytes(text)
    (directory / "a.csv").write_bytes(b"town,id,tags,size,click\nRome,1,a|b,0.5,1\nOslo,2,,,no\n")
    outcome(lambda: FeatureSpec.load(directory))
    if not isinstance(outcome(lambda: TabularSpec.load(directory)), InputError):
        config = TabularConfig(directory, directory / "out", [directory / "a.csv"], test=[directory / "a.csv"])
        check_output(directory, outcome(lambda: run(config)))


@pytest.fixture(scope="module")
def data_set(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    (directory / "spec.yaml").write_text(yaml.safe_dump(SPEC))
    (directory / "a.csv").write_bytes(b"town,id,tags,size,click\n" + b"Rome,1,a|b,0.5,1\nOslo,2,,,no\n" * 20)
    run(TabularConfig(directory / "spec.yaml", directory / "out", [directory / "a.csv"], split="last:9"))
    return directory / "out"


def read_all(directory):
    shards = ShardSet.open(directory, verify=True)
    return shards.read(0, shards.rows), shards.gather(np.arange(shards.rows)[::-1])


@fuzz(80)
@given(draw=st.data(), how=st.sampled_from(["bytes", "sealed", "statistics", "part"]))
def test_damaged_data_sets(place, data_set, draw, how):
    """Sealed: a manifest whose checksum fits but whose words do not."""
    directory = place() / "data"
    shutil.copytree(data_set, directory)
    manifest = directory / "train" / "manifest.json"
    if how == "sealed":
        content = replaced(draw.draw, {k: v for k, v in json.loads(manifest.read_text()).items() if k != "xxh3_64"})
        manifest.write_text(shard_manifest.seal(content) if isinstance(content, dict) else json.dumps(content))
    else:
        files = {"bytes": manifest, "part": directory / "train" / "part-00000.shard"}
        path = files.get(how, directory / "statistics" / "statistics.json")
        path.write_bytes(mutated(draw.draw, path.read_bytes()))
    outcome(lambda: read_all(directory / "train"))
    outcome(lambda: describe.describe(directory))
    if how == "statistics":
        (directory / "a.csv").write_bytes(b"town,id,tags,size,click\nRome,1,a|b,0.5,1\n")
        config = TabularConfig(directory, directory / "out", test=[directory / "a.csv"], stats=directory)
        check_output(directory, outcome(lambda: run(config)))
    shutil.rmtree(directory)


@pytest.mark.parametrize(
    ("key", "value"),
    [("file", None), ("file", "../a"), ("rows", 31.0), ("bytes", -1), ("blocks", {}), ("blocks", None), ("file", ...)],
)
def test_sealed_manifests_whose_parts_are_wrong(place, data_set, key, value):
    directory = place() / "data"
    shutil.copytree(data_set, directory)
    manifest = json.loads((directory / "train" / "manifest.json").read_text())
    part = manifest["parts"][0]
    manifest["parts"][0] = {k: v for k, v in part.items() if k != key} if value is ... else part | {key: value}
    (directory / "train" / "manifest.json").write_text(shard_manifest.seal(manifest))
    with pytest.raises(InputError, match="manifest"):
        read_all(directory / "train")


@fuzz(150)
@given(draw=st.data(), framed=st.booleans())
def test_records(place, draw, framed):
    """Framed: the checksums fit, and the protocol buffer does not."""
    entry = b"\x0a\x01x\x12\x0c\x12\x0a\x0a\x08" + struct.pack("<2f", 1, 2)
    whole = b"\x0a" + bytes([len(entry) + 2]) + b"\x0a" + bytes([len(entry)]) + entry
    data = mutated(draw.draw, whole) if framed else whole
    head = struct.pack("<Q", len(data))
    record = head + struct.pack("<I", masked(head)) + data + struct.pack("<I", masked(data))
    path = place() / "part-0"
    path.write_bytes(record if framed else mutated(draw.draw, record * 2))
    outcome(lambda: [list(records.read(span)) for span in records.spans(path)])
