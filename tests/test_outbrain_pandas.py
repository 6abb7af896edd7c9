"""The Outbrain preprocessing against a second, slow implementation, and against itself cut into other chunks."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from outbrain_checks import check_given_statistics, check_rows, files, shuffled_raw
from outbrain_oracle import features

from preprocess.outbrain import OutbrainConfig, run
from widedeep.errors import InputError
from widedeep.feature_spec import FeatureSpec
from widedeep.shards import ShardSet

SMALL = Path(__file__).parent / "data" / "outbrain"


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """About 50,000 click rows with nulls, dirty values and a heavy tail; clicks in no order, so they need sorting."""
    return shuffled_raw(tmp_path_factory.mktemp("synthetic") / "raw", displays=9600, seed=11)


@pytest.fixture(scope="module")
def config(raw, tmp_path_factory):
    config = OutbrainConfig(raw, tmp_path_factory.mktemp("output") / "one", rows_per_shard=20_000, multihot=True)
    return dataclasses.replace(config, stats=None), run(config)


def test_every_feature_matches_pandas(raw, config):
    spec = FeatureSpec.load(config[0].out)
    want = features(raw, dict(zip(spec.names, spec.cardinalities)))
    assert len(want) > 45_000
    check_rows(Path(config[0].out), want, distinct=4)


@pytest.mark.parametrize("change", [{"chunk_rows": 997}, {"workers": 2, "chunk_rows": 5000}, {"memory_limit": 2**30}])
def test_chunks_and_workers_do_not_change_a_byte(config, change, tmp_path, monkeypatch):
    monkeypatch.setattr("preprocess.csv_io.BLOCK_BYTES", 100_003)
    other = dataclasses.replace(config[0], out=tmp_path / "other", **change)
    run(other)
    assert files(tmp_path / "other") == files(Path(config[0].out))


def test_given_statistics_of_the_same_data_give_the_same_rows(config, tmp_path):
    check_given_statistics(config[0], tmp_path / "again")


def test_given_statistics_replace_those_of_the_data(config, tmp_path):
    """The small tables with statistics of other data: rates are those learned there."""
    run(OutbrainConfig(SMALL, tmp_path / "out", stats=Path(config[0].out) / "statistics"))
    learned = np.load(Path(config[0].out) / "statistics" / "keys.npz")
    at = int(np.flatnonzero(learned["ad_id.value"] == 10)[0])
    rows, clicks = int(learned["ad_id.rows"][at]), int(learned["ad_id.clicks"][at])
    got = ShardSet.open(tmp_path / "out" / "train").read(0, 12)
    assert got["ad_id_ctr"][0] == pytest.approx(clicks / rows if rows >= 5 else 0)
    plain = json.loads((tmp_path / "out" / "statistics" / "statistics.json").read_text())
    mean, std = plain["count_mean"]["ad_id"], plain["count_std"]["ad_id"]
    assert got["ad_id_count"][0] == pytest.approx((np.log1p(rows) - mean) / std, rel=1e-5, abs=1e-6)


def test_half_precision_is_the_rounded_float(tmp_path):
    for numeric in ("float16", "float32"):
        run(OutbrainConfig(SMALL, tmp_path / numeric, numeric=numeric))
    half, single = (ShardSet.open(tmp_path / n / "train").read(0, 12, ["ad_id_count"]) for n in ("float16", "float32"))
    np.testing.assert_array_equal(half["ad_id_count"], single["ad_id_count"].astype(np.float16))


def test_compressed_files_give_the_same_bytes(tmp_path):
    import gzip

    import pyarrow as pa

    for index, path in enumerate(sorted(SMALL.glob("*.csv"))):
        data = path.read_bytes()
        if index % 2:
            (tmp_path / f"{path.name}.gz").write_bytes(gzip.compress(data))
        else:
            (tmp_path / f"{path.name}.zst").write_bytes(pa.compress(data, "zstd", asbytes=True))
    run(OutbrainConfig(tmp_path, tmp_path / "out"))
    run(OutbrainConfig(SMALL, tmp_path / "plain"))
    got, want = (
        {name: data for name, data in files(tmp_path / place).items() if name.endswith(("shard", "npz"))}
        for place in ("out", "plain")
    )
    assert got == want


def test_real_rows_go_through(shared, tmp_path, caplog):
    report = run(OutbrainConfig(shared / "data" / "outbrain-sample", tmp_path / "out"))
    assert report["rows"] == 4961 == report["train"]["rows"] + report["test"]["rows"]
    assert report["train"]["displays"] + report["test"]["displays"] == 979
    assert report["train"]["clicks"] + report["test"]["clicks"] == 979
    absent = report["ads_not_promoted"]["rows"]
    assert absent == pytest.approx((1 - 0.313) * 4961, abs=10)
    assert report["train"]["nulls"]["campaign_id"] + report["test"]["nulls"]["campaign_id"] == absent
    assert len(report["missing_files"]) == 4
    assert "documents_meta.csv is missing" in caplog.text


BAD = {
    "clicks_train.csv, line 3: expected 3 fields, found 2": ("clicks_train", 2, "1,11"),
    "clicks_train.csv, line 4: column clicked: expected an integer from 0 to 1": ("clicks_train", 3, "1,1,2"),
    "clicks_train.csv, line 5: column ad_id: expected an integer, found 'x'": ("clicks_train", 4, "2,x,1"),
    "clicks_train.csv, line 5: column ad_id: expected an integer, found no value": ("clicks_train", 4, "2,\\N,1"),
    "events.csv, line 2: column display_id: expected an integer from 0": ("events", 1, "-1,a,200,0,1,US"),
    "events.csv, line 3: column document_id: expected an integer from 0": ("events", 2, "2,b,99999999999,0,1,GB"),
    "events.csv, line 4: display_id 1 a second time": ("events", 3, "1,c,201,86400000,3,SG>00"),
    "promoted_content.csv, line 5: ad_id 10 a second time": ("promoted_content", 4, "10,1,1,1"),
    "documents_meta.csv, line 2: column publish_time: expected YYYY-MM-DD": ("documents_meta", 1, "100,50,60,soon"),
    "documents_topics.csv, line 4: column confidence_level: expected a number": ("documents_topics", 3, "100,2,high"),
    "documents_entities.csv, line 1: column entity_id is missing": ("documents_entities", 0, "document_id,e,c"),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_a_bad_line_is_named_and_the_earlier_output_stays(message, tmp_path):
    name, line, text = BAD[message]
    data = shutil.copytree(SMALL, tmp_path / "data")
    lines = (data / f"{name}.csv").read_text().splitlines()
    lines[line] = text
    (data / f"{name}.csv").write_text("\n".join(lines) + "\n")
    run(OutbrainConfig(SMALL, tmp_path / "out"))
    before = files(tmp_path / "out")
    with pytest.raises(InputError) as error:
        run(OutbrainConfig(data, tmp_path / "out"))
    assert message in str(error.value)
    assert files(tmp_path / "out") == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "out"]


@pytest.mark.parametrize("name", ["clicks_train", "events", "promoted_content"])
def test_a_missing_or_empty_file_is_an_error(name, tmp_path):
    data = shutil.copytree(SMALL, tmp_path / "data")
    (data / f"{name}.csv").write_text("")
    with pytest.raises(InputError, match=f"{name}.csv: the file is empty"):
        run(OutbrainConfig(data, tmp_path / "out"))
    (data / f"{name}.csv").unlink()
    with pytest.raises(InputError, match=f"{name}.csv: the file is missing; expected it plain, or as .gz or .zst"):
        run(OutbrainConfig(data, tmp_path / "out"))


def test_no_click_rows_is_an_error(tmp_path):
    data = shutil.copytree(SMALL, tmp_path / "data")
    (data / "clicks_train.csv").write_text("display_id,ad_id,clicked\n")
    with pytest.raises(InputError, match="at least one row"):
        run(OutbrainConfig(data, tmp_path / "out"))


@pytest.mark.parametrize("label", [0, 1])
def test_clicks_of_one_label_are_warned_about(tmp_path, caplog, label):
    data = shutil.copytree(SMALL, tmp_path / "data")
    run(OutbrainConfig(data, tmp_path / "out"))
    assert "labels" not in caplog.text
    header, *lines = (data / "clicks_train.csv").read_text().splitlines()
    rows = (f"{line.rpartition(',')[0]},{label}" for line in lines)
    (data / "clicks_train.csv").write_text("\n".join([header, *rows]) + "\n")
    run(OutbrainConfig(data, tmp_path / "out"))
    assert f"clicked: all labels of the 12 train rows are {label}: nothing can be learned" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"flavour": "pandas"}, "flavour is 'pandas'"),
        ({"numeric": "float64"}, "numeric is 'float64'"),
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"workers": 0}, "workers is 0"),
        ({"chunk_rows": 0}, "chunk_rows is 0"),
        ({"data_path": "nowhere"}, "nowhere: expected a directory"),
        ({"memory_limit": 10**7}, "memory_limit is 10 MiB, expected at least"),
        ({"stats": "nowhere"}, "expected statistics.json"),
    ],
)
def test_a_bad_setting_is_named(change, message, tmp_path):
    with pytest.raises(InputError) as error:
        run(OutbrainConfig(**{"data_path": SMALL, "out": tmp_path / "out", **change}))
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_foreign_directory_is_not_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="not an earlier output"):
        run(OutbrainConfig(SMALL, tmp_path / "out"))
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"
