"""The feature spec: its places in the model, its files, and a sentence for every broken rule."""

import copy
import json
import subprocess
import sys

import numpy as np
import pytest
import yaml

from widedeep.errors import InputError
from widedeep.feature_spec import CategoricalFeature, FeatureSpec, NumericFeature, default_dim

# As the original's Oct-2022 preprocessing writes it, cut to a few columns: no embedding dims, parquet chunks.
OCT_2022 = """
channel_spec:
  label: [clicked]
  map: [display_id]
  multihot_categorical: [topic_id_list, entity_id_list]
  numerical: [ad_id_count, publish_time_days_since_published]
  onehot_categorical: [platform, ad_id, document_id]
feature_spec:
  ad_id: {cardinality: 250000}
  ad_id_count: {}
  clicked: {}
  display_id: {}
  document_id: {cardinality: 300000, dtype: int32}
  entity_id_list: {cardinality: 10000, max_hotness: 3}
  platform: {cardinality: 4}
  publish_time_days_since_published: {dtype: float32}
  topic_id_list: {cardinality: 350, max_hotness: 3}
metadata: {}
source_spec:
  test:
  - features: [clicked, platform, ad_id, document_id, topic_id_list, entity_id_list, ad_id_count,
      publish_time_days_since_published, display_id]
    files: [valid/part_0.parquet, valid/part_1.parquet]
    type: parquet
  train:
  - features: [clicked, platform, ad_id, document_id, topic_id_list, entity_id_list, ad_id_count,
      publish_time_days_since_published]
    files: [train/part_0.parquet]
    type: parquet
"""

CSV = {
    "feature_spec": {"a": {"cardinality": 10}, "m": {"cardinality": 5, "max_hotness": 1}, "x": {}, "y": {}},
    "source_spec": {
        mapping: [
            {"type": "csv", "features": ["a", "x"], "files": [f"{mapping}_0.csv"]},
            {"type": "csv", "features": ["y", "m"], "files": [f"{mapping}_1.csv"]},
        ]
        for mapping in ("train", "test")
    },
    "channel_spec": {
        "onehot_categorical": ["a"],
        "multihot_categorical": ["m"],
        "numerical": ["x"],
        "label": ["y"],
        "map": [],
    },
    "metadata": {"made_by": "hand"},
}


def test_outbrain_has_the_published_size():
    spec = FeatureSpec.outbrain()
    assert (len(spec.categorical), len(spec.numeric), sum(spec.dims)) == (13, 13, 976)
    assert (spec.deep_width, spec.padded_width, spec.total_rows, spec.id_columns) == (989, 1024, 672_304, 13)
    assert spec.parameter_count([1024] * 5) == 90_512_767
    assert FeatureSpec.outbrain("outbrain-128").parameter_count([1024] * 5) == 90_898_303
    assert (spec.label, spec.group) == ("clicked", "display_id")


def test_outbrain_multihot_has_the_published_size():
    spec = FeatureSpec.outbrain("outbrain-multihot")
    assert (sum(spec.dims), spec.deep_width, spec.total_rows, spec.id_columns) == (1235, 1248, 682_754, 22)
    assert spec.parameter_count([1024] * 5) == 91_777_245
    assert spec.hotness == (1,) * 13 + (3,) * 3


def test_unknown_preset_lists_the_known():
    with pytest.raises(InputError, match=r"'criteo'.*outbrain, outbrain-128"):
        FeatureSpec.outbrain("criteo")


def test_oct_2022_file_loads(tmp_path):
    path = tmp_path / "feature_spec.yaml"
    path.write_text(OCT_2022)
    spec = FeatureSpec.load(tmp_path)
    assert spec.names == ("platform", "ad_id", "document_id", "topic_id_list", "entity_id_list")
    assert spec.dims == (16, 128, 128, 64, 64)
    assert spec.hotness == (1, 1, 1, 3, 3)
    assert spec.hot_start == (0, 1, 2, 3, 6)
    assert spec.id_columns == 9
    assert spec.row_base == (0, 4, 250_004, 550_004, 550_354)
    assert spec.source_files("test") == [tmp_path / "valid/part_0.parquet", tmp_path / "valid/part_1.parquet"]


def test_csv_chunks_side_by_side_and_multi_hot_of_one():
    spec = FeatureSpec.from_dict(CSV, "csv.yaml")
    assert [chunk.features for chunk in spec.sources["train"]] == [("a", "x"), ("y", "m")]
    assert spec.categorical[1] == CategoricalFeature("m", 5, 16, multi_hot=True)
    assert spec.to_dict()["channel_spec"]["multihot_categorical"] == ["m"]


def test_deep_input_is_sorted_by_column_name_not_by_feature_name():
    spec = FeatureSpec(
        [CategoricalFeature("user", 7, 4), CategoricalFeature("item", 50, 8)],
        [NumericFeature("user_ctr"), NumericFeature("item_age"), NumericFeature("Zeta")],
        label="y",
    )
    names = [name for name, *_ in spec.deep_columns]
    assert names == ["Zeta", "item_age", "item_embedding", "user_ctr", "user_embedding"]
    assert spec.table_columns == (11, 2)
    assert spec.numeric_columns == (10, 1, 0)
    assert spec.deep_columns[-1].offset + spec.deep_columns[-1].width == spec.deep_width == 15
    assert spec.parameter_count([3]) == 7 * 4 + 50 * 8 + (15 * 3 + 3) + (3 + 1) + 57 + 3 + 1


@pytest.mark.parametrize(
    ("categorical", "numeric", "words"),
    [
        ([CategoricalFeature("a", 5, 2), CategoricalFeature("a", 7, 2)], [], "each name once, got 'a' twice"),
        ([CategoricalFeature("a", 5, 2)], [NumericFeature("x"), NumericFeature("x")], "each name once, got 'x' twice"),
        ([CategoricalFeature("a", 5, 2)], [NumericFeature("a")], "each name once, got 'a' twice"),
        ([CategoricalFeature("a", 5, 2)], [NumericFeature("y")], "each name once, got 'y' twice"),
        ([CategoricalFeature("a", 5, 2)], [NumericFeature("a_embedding")], "once, got 'a_embedding' twice"),
        ([CategoricalFeature("a", 5, 2, 3, "max")], [], "a: expected combiner sum or mean, got 'max'"),
        ([CategoricalFeature("a", 5, 2, 3), CategoricalFeature("b", 5, 2)], [], "got 'b' after 'a'"),
        ([CategoricalFeature("a", 5, 2, multi_hot=True), CategoricalFeature("b", 5, 2)], [], "got 'b' after 'a'"),
    ],
)
def test_a_spec_that_is_made_in_code_is_checked(categorical, numeric, words):
    with pytest.raises(InputError) as error:
        FeatureSpec(categorical, numeric, label="y")
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("size", "value"),
    [("cardinality", 0), ("cardinality", 5.0), ("dim", -1), ("dim", None), ("hotness", 0), ("hotness", "2")],
)
def test_sizes_of_a_feature_are_checked(size, value):
    low = 0 if size == "dim" else 1
    with pytest.raises(InputError) as error:
        CategoricalFeature(**({"name": "a", "cardinality": 5, "dim": 2, "hotness": 1} | {size: value}))
    assert str(error.value) == f"feature 'a': {size}: expected an integer >= {low}, got {value!r}"


def test_sizes_of_a_feature_may_be_integers_of_numpy(tmp_path):
    list_ = CategoricalFeature("l", np.int64(9), np.int16(4), hotness=np.uint8(2))
    spec = FeatureSpec([CategoricalFeature("a", np.int64(50), np.int32(8)), list_], [NumericFeature("n")], label="y")
    spec.save(tmp_path / "feature_spec.yaml")
    loaded = FeatureSpec.load(tmp_path)
    assert (loaded.cardinalities, loaded.dims, loaded.hotness) == ((50, 9), (8, 4), (1, 2))
    assert (spec.cardinalities, spec.dims, spec.hotness) == ((50, 9), (8, 4), (1, 2))
    assert {type(n) for n in (*spec.cardinalities, *spec.dims, *spec.hotness)} == {int}


@pytest.mark.parametrize("channels", [("numerical",), ("onehot_categorical",), ("multihot_categorical",)])
def test_a_spec_may_have_one_kind_of_feature(channels):
    d = copy.deepcopy(CSV)
    for channel in ("numerical", "onehot_categorical", "multihot_categorical"):
        if channel not in channels:
            d["channel_spec"][channel] = []
    spec = FeatureSpec.from_dict(d, "one.yaml")
    assert len(spec.categorical) + len(spec.numeric) == 1
    assert sum(width for *_, width in spec.deep_columns) == spec.deep_width > 0


@pytest.mark.parametrize("text", [OCT_2022, yaml.safe_dump(CSV)], ids=["oct-2022", "csv"])
def test_save_and_load_keep_everything(text, tmp_path):
    spec = FeatureSpec.from_dict(yaml.safe_load(text), "x")
    spec.save(tmp_path / "saved.yaml")
    assert FeatureSpec.load(tmp_path / "saved.yaml") == spec
    assert [p.name for p in tmp_path.iterdir()] == ["saved.yaml"]


def test_transform_and_combiner_survive(tmp_path):
    d = edited("feature_spec.a.transform", {"hash": "murmur"}) | {}
    d["feature_spec"]["m"] |= {"combiner": "mean", "max_hotness": 4, "embedding_dim": 5}
    spec = FeatureSpec.from_dict(d, "x")
    assert spec.mean == (0, 1)
    spec.save(tmp_path / "s.yaml")
    again = FeatureSpec.load(tmp_path / "s.yaml")
    assert again.categorical[1].combiner == "mean"
    assert again.categorical[0].transform == {"hash": "murmur"}


def test_the_combiner_flag_wins_over_the_spec():
    assert FeatureSpec.from_dict(CSV, "x", combiner="mean").mean == (1, 1)
    stated = edited("feature_spec.m.combiner", "mean")
    assert FeatureSpec.from_dict(stated, "x", combiner="sum").mean == (0, 0)
    with pytest.raises(InputError, match=r"feature_spec\.m\.combiner"):
        FeatureSpec.from_dict(edited("feature_spec.m.combiner", "max"), "x", combiner="sum")
    assert FeatureSpec.from_dict(CSV, "x").mean == (0, 0)


def test_embedding_sizes_file(tmp_path):
    path, sizes = tmp_path / "feature_spec.yaml", tmp_path / "sizes.json"
    path.write_text(yaml.safe_dump(CSV))
    sizes.write_text(json.dumps({"a": 3, "m": 7}))
    assert FeatureSpec.load(path, embedding_sizes=sizes).dims == (3, 7)
    for content, words in (
        ('{"a": 3}', "sizes.json: m: expected the embedding dim of the feature, got none"),
        ('{"a": 3, "m": 7, "unused": 1}', "sizes.json: unused: expected a categorical feature of"),
        ('{"a": 3, "m": "7"}', "sizes.json: m: expected an integer >= 0, got '7'"),
        ('{"a": 3, "m": true}', "sizes.json: m: expected an integer >= 0"),
        ('{"a": 3, "m": 65537}', "sizes.json: m: expected an integer <= 65536, got 65537"),
        ("[1]", "sizes.json: expected an object"),
        ("{", "sizes.json: expected JSON"),
    ):
        sizes.write_text(content)
        with pytest.raises(InputError) as error:
            FeatureSpec.load(path, embedding_sizes=sizes)
        assert words in str(error.value)


def test_the_largest_and_the_least_numbers_are_taken(tmp_path):
    path, sizes = tmp_path / "feature_spec.yaml", tmp_path / "sizes.json"
    spec = edited("feature_spec.a.cardinality", 2**31 - 1)
    spec["feature_spec"]["a"]["embedding_dim"], spec["feature_spec"]["m"]["max_hotness"] = 2**16, 2**16
    path.write_text(yaml.safe_dump(spec))
    loaded = FeatureSpec.load(path)
    assert (loaded.cardinalities[0], loaded.dims[0], loaded.hotness[1]) == (2**31 - 1, 2**16, 2**16)
    spec["feature_spec"]["a"] |= {"cardinality": 1, "embedding_dim": 0}
    spec["feature_spec"]["m"]["max_hotness"] = 1
    path.write_text(yaml.safe_dump(spec))
    loaded = FeatureSpec.load(path)
    assert (loaded.cardinalities[0], loaded.dims[0], loaded.hotness[1]) == (1, 0, 1)
    sizes.write_text(json.dumps({"a": 0, "m": 2**16}))
    assert FeatureSpec.load(path, embedding_sizes=sizes).dims == (0, 2**16)


@pytest.mark.parametrize(("width", "padded"), [(1, 64), (63, 64), (64, 64), (65, 128), (128, 128)])
def test_the_padded_width_is_the_next_multiple_of_64(width, padded):
    spec = FeatureSpec(
        [CategoricalFeature("a", 9, width - 1), CategoricalFeature("none", 9, 0)], [NumericFeature("x")], "y"
    )
    assert (spec.deep_width, spec.padded_width) == (width, padded)
    assert spec.table_columns[1] == width  # where no column is
    assert [c.name for c in spec.deep_columns] == (["a_embedding", "x"] if width > 1 else ["x"])


@pytest.mark.parametrize(
    ("rows", "dim"), [(1, 16), (31, 16), (32, 64), (5000, 64), (49_999, 64), (50_000, 128), (10**9, 128)]
)
def test_default_dim(rows, dim):
    assert default_dim(rows) == dim


def edited(path, value):
    """CSV with one field changed; a list index is a number; DELETE removes."""
    d = copy.deepcopy(CSV)
    *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    place = d
    for key in parents:
        place = place[key]
    if value is DELETE:
        del place[last]
    else:
        place[last] = value
    return d


DELETE = object()
BROKEN = [
    ("feature_spec.a.cardinality", "x", "feature_spec.a.cardinality: expected an integer >= 1, got 'x'"),
    ("feature_spec.a.cardinality", 0, "feature_spec.a.cardinality: expected an integer >= 1, got 0"),
    ("feature_spec.a.cardinality", True, "feature_spec.a.cardinality: expected an integer >= 1, got True"),
    ("feature_spec.a.cardinality", 2.0, "feature_spec.a.cardinality: expected an integer >= 1, got 2.0"),
    ("feature_spec.a.cardinality", 2**31, "feature_spec.a.cardinality: expected an integer <= 2147483647"),
    ("feature_spec.a", {}, "feature_spec.a.cardinality: expected an integer >= 1, got None"),
    ("feature_spec.a.max_hotness", 2, "feature_spec.a.max_hotness: expected 1 for a one-hot feature, got 2"),
    ("feature_spec.m.max_hotness", DELETE, "feature_spec.m.max_hotness: expected an integer >= 1, got None"),
    ("feature_spec.m.combiner", "max", "feature_spec.m.combiner: expected one of sum, mean, got 'max'"),
    ("feature_spec.a.embedding_dim", -1, "feature_spec.a.embedding_dim: expected an integer >= 0, got -1"),
    ("feature_spec.a.dtype", "float32", "feature_spec.a.dtype: expected one of int32, int64, got 'float32'"),
    ("feature_spec.x.dtype", "int64", "feature_spec.x.dtype: expected one of float32, float64, got 'int64'"),
    ("feature_spec.x.cardinality", 3, "feature_spec.x.cardinality: expected no such attribute of a numerical"),
    ("feature_spec.a.dim", 3, "feature_spec.a.dim: expected one of the keys"),
    ("feature_spec.a.transform", 3, "feature_spec.a.transform: expected a name, a mapping or a list of names, got 3"),
    (
        "feature_spec.a.transform",
        [{"clip": [0, 5]}, "log"],
        "feature_spec.a.transform: expected a name, a mapping or a",
    ),
    ("feature_spec.y.transform", 1, "feature_spec.y.transform: expected a name, a mapping or a list of names"),
    ("feature_spec", ["a"], "feature_spec: expected a mapping, got ['a']"),
    ("features", {}, "features: expected one of the keys feature_spec, source_spec, channel_spec, metadata"),
    ("metadata", 3, "metadata: expected a mapping, got 3"),
    (
        "channel_spec",
        DELETE,
        "the channel onehot_categorical, multihot_categorical, numerical, label, map, got none",
    ),
    ("channel_spec.map", DELETE, "channel_spec: expected the channel map, got none"),
    ("channel_spec.weights", [], "channel_spec.weights: expected one of the keys"),
    ("channel_spec.label", [], "channel_spec.label: expected exactly one feature, got 0"),
    ("channel_spec.label", ["y", "x"], "channel_spec.label: expected exactly one feature, got 2"),
    ("channel_spec.map", ["y", "x"], "channel_spec.map: expected at most one feature, got 2"),
    ("channel_spec.numerical", ["z"], "channel_spec.numerical: expected features that feature_spec defines, got 'z'"),
    ("channel_spec.numerical", "x", "channel_spec.numerical: expected a list of names, got 'x'"),
    ("channel_spec.numerical", ["x", "x"], "channel_spec.numerical: expected each name once, got 'x' twice"),
    ("channel_spec.numerical", ["a"], "channel_spec.numerical: expected each feature in one channel, got 'a'"),
    ("source_spec.valid", [], "source_spec.valid: expected one of the keys train, test"),
    ("source_spec.test", DELETE, "source_spec.test: expected a list of chunks, got None"),
    ("source_spec.train", [], "source_spec.train: expected a list of chunks, got []"),
    ("source_spec.train.0.type", "orc", "source_spec.train[0].type: expected one of csv, parquet, shards, got 'orc'"),
    ("source_spec.train.0.type", "parquet", "source_spec.train: expected exactly one chunk unless all are csv, got 2"),
    ("source_spec.train.0.files", [], "source_spec.train[0].files: expected at least one file, got none"),
    ("source_spec.train.0.path", "a", "source_spec.train[0].path: expected one of the keys type, features, files"),
    ("source_spec.train.0.features", ["a"], "source_spec.train: expected every feature of channel numerical"),
    ("source_spec.train.0.features", ["q"], "source_spec.train[0].features: expected features that feature_spec"),
    ("source_spec.train.1.features", ["y", "m", "a"], "source_spec.train: expected each feature in one chunk"),
]


@pytest.mark.parametrize(("path", "value", "words"), BROKEN, ids=lambda v: v if isinstance(v, str) and "." in v else "")
def test_every_rule_has_its_sentence(path, value, words):
    with pytest.raises(InputError) as error:
        FeatureSpec.from_dict(edited(path, value), "feature_spec.yaml")
    assert str(error.value).startswith("feature_spec.yaml: ")
    assert words in str(error.value)


def test_a_map_feature_must_be_in_test_only():
    d = edited("channel_spec.map", ["g"])
    d["feature_spec"]["g"] = {}
    with pytest.raises(InputError, match=r"source_spec.test: expected every feature of channel map, got none.*'g'"):
        FeatureSpec.from_dict(d, "f.yaml")
    d["source_spec"]["test"][0]["features"].append("g")
    assert FeatureSpec.from_dict(d, "f.yaml").group == "g"


def test_a_numeric_feature_must_not_be_called_like_a_table_column():
    d = edited("channel_spec.numerical", ["a_embedding"])
    d["feature_spec"]["a_embedding"] = {}
    with pytest.raises(InputError, match="no feature called a_embedding"):
        FeatureSpec.from_dict(d, "f.yaml")


def test_a_model_needs_an_input():
    d = edited("source_spec", {})
    d["channel_spec"] |= {"onehot_categorical": [], "multihot_categorical": [], "numerical": []}
    with pytest.raises(InputError, match="at least one categorical or numerical feature"):
        FeatureSpec.from_dict(d, "f.yaml")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a: [", "expected YAML"),
        (b"\xff\xfe\xfa", "expected a readable feature spec"),
        (b"- 1", "expected a mapping"),
        (b"", "expected the channel"),
        (b"feature_spec: {a: {}, a: {}}", "a second time"),
        (b"? [a, b]\n: {}", "expected YAML, got while constructing a mapping"),
        (b"!!python/object/apply:os.system ['true']", "expected YAML"),
    ],
)
def test_a_damaged_file_is_named(content, words, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        FeatureSpec.load(path)
    assert str(path) in str(error.value)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_of_another_kind_is_quoted_in_part(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text("user,city,age\n" + "u1,Rome,20\n" * 1000)
    with pytest.raises(InputError, match=r"expected a mapping, got 'user,city,age u1,Rome,20 .{34}\.\.\.$"):
        FeatureSpec.load(path)
    for field in ("feature_spec.a.transform", "channel_spec.map", "feature_spec.a.cardinality"):
        with pytest.raises(InputError, match=r"got \[1, 1, .{53}\.\.\.$"):
            FeatureSpec.from_dict(edited(field, [1] * 1000), "f.yaml")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"feature_spec\.yaml.*no such file"):
        FeatureSpec.load(tmp_path)


def test_needs_no_torch():
    code = (
        "import sys; sys.modules['torch'] = None; from widedeep.feature_spec import FeatureSpec; FeatureSpec.outbrain()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
