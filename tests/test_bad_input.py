"""Bad input through the command line: an exit code, one sentence that names the place, and nothing lost."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from commands import contents, main, train_words

from widedeep import shard_manifest

OUTBRAIN = Path(__file__).parent / "data" / "outbrain"


# Raw Outbrain files


@pytest.fixture
def raw(tmp_path) -> Path:
    return Path(shutil.copytree(OUTBRAIN, tmp_path / "raw"))


def edit(path: Path, change: Callable[[list[str]], list[str]]) -> None:
    path.write_text("\n".join(change(path.read_text().splitlines())) + "\n")


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("clicks_train.csv", lambda lines: ["display_id,ad_id", *lines[1:]], ["clicked"]),
        ("clicks_train.csv", lambda lines: [*lines[:3], "2,10", *lines[3:]], ["line 4"]),
        ("clicks_train.csv", lambda lines: [*lines[:3], "2,ten,1", *lines[3:]], ["line 4", "ten"]),
        ("clicks_train.csv", lambda lines: [*lines[:3], "2,10,7", *lines[3:]], ["line 4", "7"]),
        ("clicks_train.csv", lambda lines: lines[:1], ["row"]),
        ("clicks_train.csv", lambda lines: [], ["empty"]),
        ("events.csv", lambda lines: [lines[0].replace("timestamp", "time"), *lines[1:]], ["timestamp"]),
        ("events.csv", lambda lines: [*lines[:2], "7,u"], ["line 3"]),
        ("promoted_content.csv", lambda lines: [*lines[:2], "x,1,1,1"], ["line 3", "x"]),
        ("documents_topics.csv", lambda lines: [*lines[:2], "1,2,high"], ["line 3", "high"]),
    ],
)
def test_raw_outbrain_files(raw, tmp_path, refuse, name, change, said):
    out = tmp_path / "out"
    assert main(["preprocess", "outbrain", "--data_path", str(raw), "--out", str(out)]) == 0
    before = contents(out)
    edit(raw / name, change)
    refuse(["preprocess", "outbrain", "--data_path", raw, "--out", out], 2, name, *said)
    assert contents(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "raw"]


def test_a_missing_raw_file(raw, tmp_path, refuse):
    (raw / "events.csv").unlink()
    refuse(["preprocess", "outbrain", "--data_path", raw, "--out", tmp_path / "out"], 2, "events.csv")
    assert not (tmp_path / "out").exists()


# Tables of one's own

SPEC = {
    "feature_spec": {
        "colour": {"cardinality": 5},
        "size": {},
        "bought": {},
    },
    "channel_spec": {
        "onehot_categorical": ["colour"],
        "multihot_categorical": [],
        "numerical": ["size"],
        "label": ["bought"],
        "map": [],
    },
}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (["colour,size,bought", "1,2.5,0", "5,1,1"], ["line 3", "colour", "5"]),
        (["colour,size,bought", "1,2.5,0", "2,wide,1"], ["line 3", "size", "wide"]),
        (["colour,size,bought", "1,2.5,0", "2,1"], ["line 3"]),
        (["colour,size,bought", "1,2.5,0", "2,1,maybe"], ["line 3", "bought", "maybe"]),
        (["colour,bought", "1,0"], ["size"]),
        ([], ["empty"]),
    ],
)
def test_tables(tmp_path, refuse, rows, said):
    spec, table, out = tmp_path / "spec.yaml", tmp_path / "t.csv", tmp_path / "out"
    spec.write_text(yaml.safe_dump(SPEC))
    words = ["preprocess", "tabular", table, "--spec", spec, "--out", out, "--split", "last:1"]
    table.write_text("colour,size,bought\n1,2.5,0\n4,1,1\n")
    assert main(list(map(str, words))) == 0
    before = contents(out)
    table.write_text("".join(f"{row}\n" for row in rows))
    refuse(words, 2, "t.csv", *said)
    assert contents(out) == before


@pytest.mark.parametrize("names", [[["colour"]], True, 3, "colour", [None], [{}]])
@pytest.mark.parametrize("channel", ["onehot_categorical", "multihot_categorical"])
def test_channels_that_are_no_lists_of_names(tmp_path, refuse, channel, names):
    spec, table = tmp_path / "spec.yaml", tmp_path / "t.csv"
    spec.write_text(yaml.safe_dump(SPEC | {"channel_spec": SPEC["channel_spec"] | {channel: names}}))
    table.write_text("colour,size,bought\n1,2.5,0\n4,1,1\n")
    words = ["preprocess", "tabular", table, "--spec", spec, "--out", tmp_path / "out", "--split", "last:1"]
    refuse(words, 2, "spec.yaml", f"channel_spec.{channel}")
    assert not (tmp_path / "out").exists()


# Data sets


def damaged(data: Path, how: str) -> list[str]:
    """Damages a data set; returns what the sentence must say."""
    shard, spec = data / "train" / "part-00001.shard", data / "feature_spec.yaml"
    values = yaml.safe_load(spec.read_text())
    if how == "truncated":
        shard.write_bytes(shard.read_bytes()[:-64])
        return ["part-00001.shard"]
    if how == "flipped":
        content = bytearray(shard.read_bytes())
        content[100] ^= 4
        shard.write_bytes(content)
        return ["part-00001.shard", "'ad'"]
    if how == "missing":
        shard.unlink()
        return ["part-00001.shard"]
    if how == "empty manifest":
        (data / "test" / "manifest.json").write_text("")
        return ["manifest.json"]
    if how == "other cardinality":
        values["feature_spec"]["ad"]["cardinality"] = 51
        spec.write_text(yaml.safe_dump(values, sort_keys=False))
        return ["'ad'", "50", "51"]
    if how == "missing column":
        values["feature_spec"]["mood"] = {"cardinality": 3, "embedding_dim": 4}
        values["channel_spec"]["onehot_categorical"].append("mood")
        for chunks in values["source_spec"].values():
            chunks[0]["features"].append("mood")
        spec.write_text(yaml.safe_dump(values, sort_keys=False))
        return ["'mood'"]
    if how == "empty spec":
        spec.write_text("")
        return ["feature_spec.yaml"]
    if how == "no spec":
        spec.unlink()
        return ["feature_spec.yaml"]
    raise AssertionError(how)


DAMAGES = (
    "truncated",
    "flipped",
    "missing",
    "empty manifest",
    "other cardinality",
    "missing column",
    "empty spec",
    "no spec",
)


@pytest.mark.parametrize("how", DAMAGES)
def test_data_sets(copy, refuse, how):
    said = damaged(copy / "data", how)
    before = contents(copy / "model") | contents(copy / "results")
    refuse(train_words(copy / "data", copy, "--overwrite"), 2, *said)
    assert contents(copy / "model") | contents(copy / "results") == before


def test_a_data_set_of_other_features_is_not_scored(copy, refuse):
    manifest = copy / "data" / "test" / "manifest.json"
    values = {key: value for key, value in json.loads(manifest.read_text()).items() if key != "xxh3_64"}
    next(column for column in values["columns"] if column["name"] == "ad")["cardinality"] = 51
    manifest.write_text(shard_manifest.seal(values))
    out = copy / "p.parquet"
    out.write_text("earlier")
    words = ["predict", "--model", copy / "model", "--dataset_path", copy / "data", "--out", out, "--cpu"]
    refuse(words, 2, str(copy / "data" / "test"), "column 'ad' has cardinality 51, the feature spec says 50")
    shutil.rmtree(copy / "data" / "test")
    refuse(words, 2, str(copy / "data" / "test"))
    assert out.read_text() == "earlier"


# Checkpoints


def test_a_damaged_checkpoint(copy, refuse):
    weights = next((copy / "model" / "checkpoint").glob("step-*")) / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    words = ["--model", copy / "model", "--dataset_path", copy / "data", "--cpu"]
    refuse(["evaluate", *words], 2, "model.safetensors", "damaged")
    refuse(["predict", *words, "--out", copy / "p.csv"], 2, "model.safetensors", "damaged")
    refuse(train_words(copy / "data", copy, "--use_checkpoint"), 2, "model.safetensors", "damaged")


def test_no_checkpoint(copy, refuse):
    shutil.rmtree(copy / "model")
    words = ["--model", copy / "model", "--dataset_path", copy / "data", "--cpu"]
    refuse(["evaluate", *words], 2, "model", "checkpoint")
    refuse(["evaluate", "--model", copy / "data", "--dataset_path", copy / "data", "--cpu"], 2, "checkpoint")


@pytest.mark.parametrize("which", ["step-7", "newest"])
def test_a_checkpoint_that_is_not_there_beside_those_that_are(copy, refuse, which):
    there = next((copy / "model" / "checkpoint").glob("step-*")).name
    words = ["--model", copy / "model", "--dataset_path", copy / "data", "--cpu"]
    refuse(["evaluate", *words, "--checkpoint", which], 2, "expected", "last", there, which)


# Predictions


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", ["empty"]),
        ("label,prob\n", ["rows"]),
        ("label,score\n1,0.5\n", ["'prob'"]),
        ("label,prob\n1,0.5\n0,much\n", ["line 3", "much"]),
        ("label,prob\n1,0.5\n0,1.5\n", ["line 3", "1.5"]),
        ("label,prob\n1,0.5\n2,0.5\n", ["line 3", "2"]),
        ("label,prob\n1,0.5\n0\n", ["line 3"]),
    ],
)
def test_predictions(tmp_path, refuse, text, said):
    path = tmp_path / "p.csv"
    path.write_text(text)
    refuse(["metrics", "--predictions", path], 2, "p.csv", *said)


def test_predictions_that_are_no_parquet(tmp_path, refuse):
    path = tmp_path / "p.parquet"
    path.write_bytes(b"PAR1 no")
    refuse(["metrics", "--predictions", path], 2, "p.parquet")
    pq.write_table(pa.table({"label": [1, 0], "prob": ["a", "b"]}), path)
    refuse(["metrics", "--predictions", path], 2, "p.parquet", "prob")


def test_golden_file_and_report(tmp_path, refuse):
    (tmp_path / "g.npz").write_bytes(b"")
    refuse(["parity", tmp_path / "g.npz"], 2, "g.npz")
    np.savez(tmp_path / "h.npz", config=np.frombuffer(json.dumps({}).encode(), np.uint8))
    refuse(["parity", tmp_path / "h.npz"], 2, "h.npz")
    refuse(["report", tmp_path], 2, str(tmp_path))


# Configuration


def test_unknown_config_key(tmp_path, refuse):
    path = tmp_path / "c.yaml"
    path.write_text("num_epocs: 3\n")
    refuse(["train", "--config", path], 2, "c.yaml", "num_epocs")


def test_results_that_no_log_can_go_to(copy, refuse):
    (copy / "results" / "log.json").unlink()
    (copy / "results" / "log.json").mkdir()
    refuse(train_words(copy / "data", copy, "--overwrite"), 2, "log.json")
