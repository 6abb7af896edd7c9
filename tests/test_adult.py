"""Adult census, end to end: the raw CSV through the spec that ships with the package to a trained model."""

import json
from pathlib import Path

import pytest
import torch
from commands import main

import widedeep

SPEC = Path(widedeep.__file__).with_name("specs") / "adult.yaml"
# On this split logistic regression reaches 0.911 and boosted trees 0.930.
LEAST_AUC = 0.92


@pytest.fixture
def same_threads():
    """`--threads` is for the whole process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_a_model_trained_on_adult_comes_near_boosted_trees(shared, tmp_path, same_threads):
    raw = shared / "data" / "adult-census" / "adult.csv.gz"
    data = tmp_path / "adult"
    assert main(["preprocess", "tabular", str(raw), f"--spec={SPEC}", "--split=last:16281", f"--out={data}"]) == 0
    report = json.loads((data / "report.json").read_text())
    assert [report[part]["rows"] for part in ("train", "test")] == [32_561, 16_281]
    places = [f"--dataset_path={data}", f"--model_dir={tmp_path / 'model'}", f"--results_dir={tmp_path / 'results'}"]
    shape = ["--deep_hidden_units", "256", "128", "--deep_dropout=0.2", "--global_batch_size=512"]
    speed = ["--deep_learning_rate=0.003", "--deep_warmup_epochs=2", "--linear_learning_rate=0.05", "--num_epochs=6"]
    run = ["--seed=1", "--threads=1", "--cpu", "--disable_map_calculation", "--eval_batch_size=16384"]
    assert main(["train", *places, *shape, *speed, *run]) == 0
    scores = json.loads((tmp_path / "results" / "evaluation.json").read_text())
    assert scores["rows"] == 16_281
    assert scores["auc"] >= LEAST_AUC
