"""Flavour `spark` against a second, slow implementation, against itself cut into other chunks, and as training data."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from commands import main
from outbrain_checks import check_given_statistics, check_rows, files, shuffled_raw
from outbrain_spark_oracle import features

from preprocess.outbrain import OutbrainConfig, run
from widedeep.feature_spec import FeatureSpec
from widedeep.shards import ShardSet


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """About 31,000 click rows in no order, with more nulls than the generator makes, and in every column that may."""
    directory = shuffled_raw(tmp_path_factory.mktemp("synthetic") / "raw", displays=6000, seed=23)
    rng = np.random.default_rng(7)
    blank = {"events": {2: 0.01, 3: 0.03, 4: 0.02, 5: 0.05}, "documents_meta": {1: 0.04, 2: 0.1, 3: 0.1}}
    blank["promoted_content"] = {1: 0.02, 2: 0.05, 3: 0.05}
    for name, shares in blank.items():
        header, *lines = (directory / f"{name}.csv").read_text().splitlines()
        rows = [line.split(",") for line in lines]
        for column, share in shares.items():
            for i in np.flatnonzero(rng.random(len(rows)) < share):
                rows[i][column] = "\\N"
        (directory / f"{name}.csv").write_text("\n".join([header, *(",".join(row) for row in rows)]) + "\n")
    return directory


@pytest.fixture(scope="module")
def config(raw, tmp_path_factory):
    config = OutbrainConfig(raw, tmp_path_factory.mktemp("output") / "one", flavour="spark", rows_per_shard=9000)
    return config, run(config)


def test_every_feature_matches_pandas(raw, config):
    spec = FeatureSpec.load(config[0].out)
    want = features(raw, dict(zip(spec.names, spec.cardinalities)))
    assert len(want) > 25_000
    check_rows(Path(config[0].out), want, distinct=4)


@pytest.mark.parametrize(
    "change",
    [
        {"chunk_rows": 997},
        {"workers": 2, "chunk_rows": 5000},
        {"workers": 2, "engine": "processes"},
        {"memory_limit": 2**30},
    ],
)
def test_chunks_and_workers_do_not_change_a_byte(config, change, tmp_path, monkeypatch):
    monkeypatch.setattr("preprocess.csv_io.BLOCK_BYTES", 100_003)
    run(dataclasses.replace(config[0], out=tmp_path / "other", **change))
    assert files(tmp_path / "other") == files(Path(config[0].out))


def test_an_interrupted_run_continues_with_the_places_it_counted(config, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    settings = dataclasses.replace(config[0], out=tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr("preprocess.outbrain.ads.Ads.build", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(settings)
    assert "clicks" in run(settings)["resumed_stages"]
    assert files(tmp_path / "out") == files(Path(config[0].out))


def test_given_statistics_of_the_same_data_give_the_same_rows(config, tmp_path):
    check_given_statistics(config[0], tmp_path / "again")


def test_the_command_makes_data_that_train(raw, tmp_path):
    """From the command line, with narrow tables: the loss on the test set falls from epoch to epoch."""
    out = tmp_path / "out"
    assert main(["preprocess", "outbrain", "--data_path", str(raw), "--out", str(out), "--flavour", "spark"]) == 0
    (tmp_path / "dims.json").write_text(json.dumps(dict.fromkeys(FeatureSpec.load(out).names, 2)))
    words = f"train --dataset_path {out} --model_dir {tmp_path}/model --results_dir {tmp_path}/results --cpu --seed 1"
    words += f" --embedding_sizes_file {tmp_path}/dims.json --deep_hidden_units 32 --deep_learning_rate 0.003"
    words += " --num_epochs 3 --deep_warmup_epochs 1 --global_batch_size 1024"
    assert main(words.split()) == 0
    lines = [json.loads(line) for line in (tmp_path / "results" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss_val"] for line in lines if "loss_val" in line]
    assert losses[0] > losses[1] > losses[2]
    assert lines[-1]["streaming_map_val"] > 0.5  # a random order has 0.48


def test_real_rows_go_through(shared, tmp_path):
    report = run(OutbrainConfig(shared / "data" / "outbrain-sample", tmp_path / "out", flavour="spark"))
    assert report["rows"] == 4961 == report["train"]["rows"] + report["test"]["rows"]
    assert report["train"]["displays"] + report["test"]["displays"] == 979
    nulls = [report[split]["nulls"]["campaign_id"] for split in ("train", "test")]
    assert sum(nulls) == report["ads_not_promoted"]["rows"]
    got = ShardSet.open(tmp_path / "out" / "train").read(0, 1000)
    assert 0 < np.count_nonzero(got["pop_ad_id"]) < 1000
    assert len(np.unique(got["event_country"])) > 3
