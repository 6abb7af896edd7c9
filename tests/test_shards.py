"""The shard format: what is appended comes back, what is damaged is told, what fails leaves the earlier set alone."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from widedeep import atomic, shards
from widedeep.errors import InputError, RunError
from widedeep.shard_manifest import seal


def make_spec(cardinalities=(10, 300), hotness=None, numeric=("price",), group="display_id"):
    hotness = hotness or [1] * len(cardinalities)
    features = [
        SimpleNamespace(name=f"c{i}", cardinality=c, hotness=h) for i, (c, h) in enumerate(zip(cardinalities, hotness))
    ]
    return SimpleNamespace(
        categorical=features, numeric=[SimpleNamespace(name=n) for n in numeric], label="clicked", group=group
    )


def make_rows(spec, rows, seed=0, group=True):
    rng = np.random.default_rng((seed, rows))
    data = {}
    for f in spec.categorical:
        shape = rows if f.hotness == 1 else (rows, f.hotness)
        data[f.name] = rng.integers(-1, f.cardinality, shape).astype(np.int64)
    for f in spec.numeric:
        data[f.name] = rng.standard_normal(rows).astype(np.float32)
    data[spec.label] = rng.integers(0, 2, rows)
    if group and spec.group:
        data[spec.group] = rng.integers(-(2**62), 2**62, rows)
    return data


def write(path, spec, data, rows_per_shard=100, pieces=1, **options):
    rows = len(data[spec.label])
    if options.get("threads"):
        options.setdefault("rows", rows)
    with shards.ShardWriter(path, spec, rows_per_shard=rows_per_shard, group=spec.group in data, **options) as writer:
        for piece in np.array_split(np.arange(rows), pieces):
            writer.append({name: values[piece] for name, values in data.items()})
    return path


def assert_equal(got, data, rows):
    for name, values in got.items():
        np.testing.assert_array_equal(values, data[name][rows], err_msg=name)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.sampled_from([1, 2, 254, 255, 256, 65535, 65536, 2**31 - 1]), st.integers(1, 3)), max_size=4),
    st.integers(0, 3),
    st.integers(0, 70),
    st.integers(1, 30),
    st.integers(1, 4),
    st.data(),
)
def test_what_is_appended_comes_back(tmp_path, features, numerics, rows, rows_per_shard, pieces, draw):
    spec = make_spec([c for c, _ in features], [h for _, h in features], [f"n{i}" for i in range(numerics)])
    data = make_rows(spec, rows)
    opened = shards.ShardSet.open(write(tmp_path / "set", spec, data, rows_per_shard, pieces), verify=True)
    opened.check(spec)
    assert opened.rows == rows
    assert list(opened.columns) == list(data)
    with pytest.raises(InputError, match="no column 'other'"):
        opened.column("other")
    start = draw.draw(st.integers(0, rows))
    stop = draw.draw(st.integers(start, rows))
    assert_equal(opened.read(start, stop), data, slice(start, stop))
    picked = draw.draw(st.lists(st.integers(0, rows - 1), max_size=50)) if rows else []
    assert_equal(opened.gather(picked), data, np.asarray(picked, np.int64))


def test_a_part_that_lacks_rows_has_no_entry(tmp_path):
    part = shards.Part(tmp_path / "part", 3, [shards.Column("c", "label", "uint8")], tmp_path)
    part.append([("c", np.ones(2, np.uint8))])
    with pytest.raises(ValueError, match="column 'c' lacks rows"):
        part.entry()


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize(
    ("column", "value", "message"), [("c1", 300, "cardinality is 300"), ("price", np.nan, "finite")]
)
def test_a_bad_value_is_named_with_its_row(threads, column, value, message, tmp_path):
    spec = make_spec()
    data = make_rows(spec, 1000)
    data[column][777] = value
    with pytest.raises(InputError, match=f"column '{column}', row 777: .*{message}"):
        write(tmp_path / "set", spec, data, pieces=9, threads=threads)
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_changed_byte_of_any_file_is_found(tmp_path, draw):
    spec = make_spec(hotness=[1, 2])
    path = tmp_path / "set"
    if not path.exists():
        write(path, spec, make_rows(spec, 33), rows_per_shard=16)
    name = draw.draw(st.sampled_from(sorted(os.listdir(path))))
    before = (path / name).read_bytes()
    position, change = draw.draw(st.integers(0, len(before) - 1)), draw.draw(st.integers(1, 255))
    after = bytearray(before)
    after[position] ^= change
    (path / name).write_bytes(after)
    try:
        if name == "manifest.json" and _same_json(before, bytes(after)):
            return  # white space: it says the same
        with pytest.raises(InputError, match=name):
            shards.ShardSet.open(path, verify=True)
    finally:
        (path / name).write_bytes(before)


def _same_json(before, after):
    try:
        return json.loads(before) == json.loads(after)
    except ValueError:
        return False


def test_stored_types_and_alignment(tmp_path):
    cardinalities = [255, 256, 65535, 65536]
    spec = make_spec(cardinalities, hotness=[1, 3, 1, 1])
    opened = shards.ShardSet.open(write(tmp_path / "set", spec, make_rows(spec, 130), numeric="float16"))
    dtypes = [opened.columns[f"c{i}"].dtype for i in range(4)]
    assert dtypes == ["uint8", "uint16", "uint16", "uint32"]
    assert opened.columns["price"].dtype == "float16"
    for part in opened.manifest["parts"]:
        assert all(block["offset"] % 64 == 0 for block in part["blocks"].values())
    blocks = opened.column("c1")
    assert [b.shape for b in blocks] == [(100, 3), (30, 3)]
    assert all(b.dtype.str == "<u2" for b in blocks)
    raw = (opened.directory / "part-00001.shard").read_bytes()
    block = opened.manifest["parts"][1]["blocks"]["c3"]
    assert np.frombuffer(raw, "<u4", 30, block["offset"]).tobytes() == blocks_bytes(opened, "c3", 1)


def blocks_bytes(opened, name, part):
    return opened.column(name)[part].tobytes()


def test_statistics_and_provenance_are_kept(tmp_path):
    spec = make_spec()
    writer = shards.ShardWriter(tmp_path / "set", spec)
    writer.append(make_rows(spec, 5, group=False))
    writer.finish(statistics={"mean": 0.1, "edges": (1, 2)}, provenance={"seed": 7})
    manifest = shards.ShardSet.open(tmp_path / "set").manifest
    assert manifest["statistics"] == {"mean": 0.1, "edges": [1, 2]}
    assert manifest["provenance"] == {"seed": 7}


def test_more_than_two_to_the_31_elements_in_a_column(tmp_path):
    """A sparse file stands in for 4 GB: rows near its end must come from the right place."""
    spec = make_spec([255], hotness=[2], numeric=())
    path = write(tmp_path / "set", spec, make_rows(spec, 1, group=False))
    rows = 2**30 + 100
    manifest = json.loads((path / "manifest.json").read_text())
    part = manifest["parts"][0]
    part["rows"] = manifest["rows"] = rows
    ids, label = part["blocks"]["c0"], part["blocks"]["clicked"]
    ids["bytes"], label["bytes"] = 2 * rows, rows
    label["offset"] = 2 * rows + -2 * rows % 64
    part["bytes"] = label["offset"] + rows + -rows % 64
    (path / "manifest.json").write_text(seal(manifest))
    with open(path / "part-00000.shard", "r+b") as file:
        file.truncate(part["bytes"])
        file.seek(2 * (rows - 1))
        file.write(bytes([7, 255]))
        file.seek(label["offset"] + rows - 1)
        file.write(b"\1")
    opened = shards.ShardSet.open(path)
    np.testing.assert_array_equal(opened.read(rows - 2, rows)["c0"], [[0, 0], [7, -1]])
    got = opened.gather([rows - 1, 0, rows - 1])
    np.testing.assert_array_equal(got["c0"][[0, 2]], [[7, -1], [7, -1]])
    np.testing.assert_array_equal(got["clicked"], [1, 0, 1])


@pytest.mark.parametrize(
    ("column", "row", "value", "words"),
    [
        ("c0", 17, 10, r"'c0', row 117: 10 \(the cardinality is 10"),
        ("c1", 3, -2, r"'c1', row 103: -2"),
        ("clicked", 49, 2, "'clicked', row 149: 2"),
        ("clicked", 49, 0.5, r"'clicked', row 149: 0\.5 \(a label is 0 or 1\)"),
        ("price", 0, np.inf, "'price', row 100: inf"),
        ("price", 0, np.nan, "'price', row 100: nan"),
    ],
)
def test_bad_values_are_named_and_nothing_appears(tmp_path, column, row, value, words):
    spec = make_spec()
    data = make_rows(spec, 50)
    if isinstance(value, float):
        data[column] = data[column].astype(float)
    data[column][row] = value
    joined = {name: np.concatenate([make_rows(spec, 100)[name], values]) for name, values in data.items()}
    with pytest.raises(InputError, match=f"{tmp_path / 'later'}: column {words}"):
        write(tmp_path / "set", spec, joined, pieces=3, final=tmp_path / "later")
    assert os.listdir(tmp_path) == []


def test_a_numeric_too_large_for_float16_is_rejected(tmp_path):
    spec = make_spec()
    data = make_rows(spec, 3) | {"price": np.array([0, 7e4, 0])}
    with pytest.raises(InputError, match=r"'price', row 1: 70000.0"):
        write(tmp_path / "set", spec, data, numeric="float16")


@pytest.mark.parametrize("change", ["missing", "unknown", "shape", "float ids", "short", "words", "wide group"])
def test_arrays_that_do_not_fit_are_rejected(tmp_path, change):
    spec = make_spec(hotness=[1, 2])
    data = make_rows(spec, 6)
    if change == "missing":
        del data["c1"]
    elif change == "unknown":
        data["c9"] = data["c0"]
    elif change == "shape":
        data["c1"] = data["c1"][:, :1]
    elif change == "float ids":
        data["c0"] = data["c0"].astype(np.float32)
    elif change == "words":
        data["price"] = data["price"].astype(str)
    elif change == "wide group":
        data[spec.group] = np.full(6, 2**63, np.uint64)
    else:
        data["price"] = data["price"][:-1]
    with (
        pytest.raises(InputError, match=rf"c1|c9|c0|price|{spec.group}.*below 2\^63"),
        shards.ShardWriter(tmp_path / "set", spec, group=True) as writer,
    ):
        writer.append(data)


def write_then_fail(path, spec):
    with shards.ShardWriter(path, spec, rows_per_shard=100, group=True) as writer:
        writer.append(make_rows(spec, 500, seed=1))
        writer.append({})


def test_a_failed_write_leaves_the_earlier_set(tmp_path):
    spec = make_spec()
    first = make_rows(spec, 20)
    write(tmp_path / "set", spec, first)
    with pytest.raises(InputError, match="missing or unknown"):
        write_then_fail(tmp_path / "set", spec)
    assert_equal(shards.ShardSet.open(tmp_path / "set", verify=True).read(0, 20), first, slice(None))
    assert os.listdir(tmp_path) == ["set"]
    second = make_rows(spec, 30, seed=2)
    write(tmp_path / "set", spec, second)
    assert_equal(shards.ShardSet.open(tmp_path / "set", verify=True).read(0, 30), second, slice(None))
    assert os.listdir(tmp_path) == ["set"]


FULL_DISK = """
import resource, signal, sys
sys.path.insert(0, {tests!r})
import test_shards as t
from widedeep.errors import RunError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
spec = t.make_spec()
try:
    t.write({path!r}, spec, t.make_rows(spec, 5000), rows_per_shard=2000)
except RunError as error:
    print(error)
"""


def test_a_full_disk_is_a_run_error_and_leaves_the_earlier_set(tmp_path):
    """A limit on the size of files makes the kernel refuse the write, as a full disk does."""
    spec = make_spec()
    write(tmp_path / "set", spec, make_rows(spec, 20))
    script = FULL_DISK.format(tests=os.path.dirname(__file__), path=str(tmp_path / "set"))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "cannot write" in done.stdout
    assert str(tmp_path / "set") in done.stdout
    assert shards.ShardSet.open(tmp_path / "set", verify=True).rows == 20
    assert os.listdir(tmp_path) == ["set"]


def test_unusable_places_are_input_errors(tmp_path):
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "set"):
        with pytest.raises(InputError, match="cannot write"):
            shards.ShardWriter(place, make_spec())
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter").write_text("mine")
    with pytest.raises(InputError, match="will not replace"):
        shards.ShardWriter(tmp_path / "home", make_spec())
    assert (tmp_path / "home" / "letter").read_text() == "mine"


def test_what_a_kill_left_is_cleaned_up(tmp_path):
    """The output a kill left moved aside comes back; its half-written directory goes."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    spec = make_spec()
    write(tmp_path / "set", spec, make_rows(spec, 20))
    prefix = atomic._prefix(tmp_path / "set")
    (tmp_path / "set").rename(tmp_path / f"{prefix}{dead.pid}-previous")
    (tmp_path / f"{prefix}{dead.pid}").mkdir()
    writer = shards.ShardWriter(tmp_path / "set", spec)
    assert shards.ShardSet.open(tmp_path / "set", verify=True).rows == 20
    writer.abort()
    assert os.listdir(tmp_path) == ["set"]


def test_a_rename_that_fails_puts_the_earlier_directory_back(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "marker").write_text("first")
    partial = atomic.begin(target, atomic.Output("marker"))
    partial.rmdir()
    with pytest.raises(InputError):
        atomic.commit(partial, target)
    assert (target / "marker").read_text() == "first"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda p: os.truncate(p / "part-00000.shard", 100), r"part-00000.shard: the file has 100 bytes"),
        (lambda p: os.remove(p / "part-00001.shard"), r"part-00001.shard: the file is missing"),
        (lambda p: os.remove(p / "manifest.json"), r"manifest.json: not found"),
        (lambda p: (p / "manifest.json").write_text("{"), r"manifest.json: cannot be read as JSON"),
        (lambda p: (p / "manifest.json").write_text("[1]"), r"manifest.json: not a shard manifest"),
        (lambda p: _edit(p, version=2), "version 2"),
        (lambda p: _edit(p, rows=7), "do not agree"),
        (lambda p: _edit(p, parts=[{}]), "not a complete"),
    ],
)
def test_missing_and_truncated_files_are_named(tmp_path, damage, words):
    spec = make_spec()
    path = write(tmp_path / "set", spec, make_rows(spec, 150))
    damage(path)
    with pytest.raises(InputError, match=words):
        shards.ShardSet.open(path)


def test_a_set_that_is_replaced_after_it_was_opened_changes_nothing(tmp_path):
    spec = make_spec()
    data, other = make_rows(spec, 40), {name: a[::-1].copy() for name, a in make_rows(spec, 40).items()}
    path = write(tmp_path / "set", spec, data, rows_per_shard=16)
    opened = shards.ShardSet.open(path)
    write(path, spec, other, rows_per_shard=16)
    assert_equal(opened.read(0, 40), data, slice(0, 40))
    assert_equal(shards.ShardSet.open(path, verify=True).read(0, 40), other, slice(0, 40))


def _edit(path, **changes):
    manifest = json.loads((path / "manifest.json").read_text()) | changes
    (path / "manifest.json").write_text(seal(manifest))


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (make_spec([10, 301]), "'c1' has cardinality 300, the feature spec says 301"),
        (make_spec(hotness=[1, 2]), "'c1' has hotness 1, the feature spec says 2"),
        (make_spec([10, 300, 4]), "categorical column 'c2' of the feature spec is missing"),
        (make_spec(numeric=("c0",)), "numeric column 'c0' of the feature spec is a categorical column"),
    ],
)
def test_a_spec_that_differs_is_told(tmp_path, other, words):
    spec = make_spec()
    opened = shards.ShardSet.open(write(tmp_path / "set", spec, make_rows(spec, 4)))
    with pytest.raises(InputError, match=words):
        opened.check(other)
    opened.check(make_spec([10]))


def test_rows_outside_are_index_errors(tmp_path):
    spec = make_spec()
    opened = shards.ShardSet.open(write(tmp_path / "set", spec, make_rows(spec, 4)))
    for call in (lambda: opened.read(2, 5), lambda: opened.gather([4]), lambda: opened.gather([-1])):
        with pytest.raises(IndexError):
            call()
    with pytest.raises(InputError, match="nothere"):
        opened.column("nothere")


def test_os_errors_become_the_right_error(tmp_path):
    for number, kind in ((28, RunError), (5, RunError), (13, InputError)):  # full, failing, forbidden
        with pytest.raises(kind, match="cannot write"), atomic.write_errors(tmp_path):
            raise OSError(number, os.strerror(number))
