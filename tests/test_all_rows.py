"""Training on all rows: a data set without test rows, from its preprocessing to a report."""

import json
import logging
import shlex
import shutil
import signal
from itertools import count
from pathlib import Path

import pytest
from planted import planted_data

from widedeep.checkpoint import Checkpoints
from widedeep.cli import main
from widedeep.train import LossWatch

FLAGS = shlex.split(
    "--cpu --global_batch_size 32 --num_epochs 2 --deep_warmup_epochs 1 --seed 5 --threads 1 --deep_hidden_units 8"
    " --log_every 2"
)
SPEC = """
feature_spec: {city: {transform: vocabulary}, age: {transform: {standardise: true}}, click: {}}
channel_spec: {onehot_categorical: [city], multihot_categorical: [], numerical: [age], label: [click], map: []}
"""


@pytest.fixture
def data(tmp_path, caplog) -> Path:
    (tmp_path / "spec.yaml").write_text(SPEC)
    lines = "".join(f"{'ab'[i % 2]},{i % 7},{i % 3 % 2}\n" for i in range(200))
    (tmp_path / "rows.csv").write_text(f"city,age,click\n{lines}")
    flags = ["--spec", tmp_path / "spec.yaml", "--split", "none", "--out", tmp_path / "data"]
    with caplog.at_level(logging.WARNING):
        assert main(["preprocess", "tabular", *map(str, [tmp_path / "rows.csv", *flags])]) == 0
    assert not caplog.records
    return tmp_path / "data"


def train(data: Path, out: Path, *more: str) -> int:
    places = ["--dataset_path", data, "--model_dir", out / "model", "--results_dir", out / "results"]
    return main(["train", *map(str, places), *FLAGS, *more])


def test_all_rows_are_trained_with_and_the_last_epoch_is_the_best(data, tmp_path, capsys):
    assert json.loads((data / "report.json").read_text())["train"]["rows"] == 200
    assert train(data, tmp_path) == 0
    said = capsys.readouterr().out
    assert "200 train and no test rows" in said
    assert "have the label" not in said  # as no row of the test set has
    checkpoints = Checkpoints(tmp_path / "model")
    assert {checkpoints.find(which).name for which in ("last", "best")} == {"step-14"}
    results = tmp_path / "results"
    assert not (results / "evaluation.json").exists()
    assert json.loads((results / "data_summary.json").read_text())["splits"]["test"]["rows"] == 0
    records = [json.loads(line) for line in (results / "metrics.jsonl").read_text().splitlines()]
    # Every second step, and the end of the first epoch.
    assert [r["step"] for r in records if "loss" in r and r["step"]] == [[s, 14] for s in (2, 4, 6, 7, 8, 10, 12, 14)]
    assert records[-1]["step"] == []
    assert records[-1]["loss"] == records[-2]["loss"]
    assert not any("loss_val" in r for r in records)


def test_the_model_predicts_and_is_reported(data, tmp_path):
    pytest.importorskip("matplotlib")
    assert train(data, tmp_path) == 0
    new = ["preprocess", "tabular", "--spec", data, "--stats", data, "--test", tmp_path / "rows.csv", "--out"]
    assert main([*map(str, new), str(tmp_path / "new")]) == 0
    flags = ["--model", tmp_path / "model", "--dataset_path", tmp_path / "new", "--out", tmp_path / "scores.csv"]
    assert main(["predict", *map(str, flags), "--cpu"]) == 0
    assert len((tmp_path / "scores.csv").read_text().splitlines()) == 201
    assert main(["report", str(tmp_path / "results")]) == 0
    page = (tmp_path / "results" / "report.html").read_text(encoding="utf-8")
    assert "14 steps" in page
    assert "evaluation.json" in page.partition("Not in the run")[2]


def test_a_training_that_was_stopped_goes_on(data, tmp_path):
    assert train(data, tmp_path) == 0
    last = tmp_path / "model" / "checkpoint" / "step-14"
    weights = (last / "model.safetensors").read_bytes()
    shutil.rmtree(last)
    assert train(data, tmp_path, "--use_checkpoint") == 0
    assert (last / "model.safetensors").read_bytes() == weights


def test_an_evaluation_wants_test_rows(data, tmp_path, capsys):
    assert train(data, tmp_path) == 0
    assert main(["evaluate", "--model", str(tmp_path / "model"), "--dataset_path", str(data), "--cpu"]) == 2
    assert train(data, tmp_path, "--evaluate", "--use_checkpoint") == 2
    assert capsys.readouterr().err == f"widedeep: {data}/test: expected rows, and there are none\n" * 2


def test_patience_wants_test_rows(data, tmp_path, capsys):
    assert train(data, tmp_path, "--patience", "2") == 2
    assert f"--patience waits for a better score: expected test rows in {data}/test" in capsys.readouterr().err


@pytest.mark.parametrize("group", [True, False])
def test_a_test_split_without_rows_is_summarised_and_trained_beside(tmp_path, group):
    data = planted_data(tmp_path / "set", train=97, test=0, group=group)
    assert train(data, tmp_path, "--num_epochs", "1") == 0
    splits = json.loads((tmp_path / "results" / "data_summary.json").read_text())["splits"]
    assert splits["test"] == {"rows": 0, "clicks": 0, "click_rate": None} | ({"groups": 0} if group else {})
    assert splits["train"].get("groups") == (25 if group else None)


def test_a_training_that_is_ended_at_the_end_of_an_epoch_still_tells_its_loss(data, tmp_path, monkeypatch):
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    assert train(data, whole) == 0
    steps = count()
    add = LossWatch.add

    def ended(self, loss):
        add(self, loss)
        if next(steps) == 6:  # the last of an epoch
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(LossWatch, "add", ended)
    assert train(data, parted) == 128 + signal.SIGTERM
    monkeypatch.undo()
    assert train(data, parted, "--use_checkpoint") == 0
    losses = [
        [record["loss"] for record in map(json.loads, lines) if "loss" in record]
        for lines in ((out / "results" / "metrics.jsonl").read_text().splitlines() for out in (whole, parted))
    ]
    assert losses[0] == losses[1]
