"""Training through the command line on planted data: it learns, says what it does, and its parts agree."""

import errno
import json
import os
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from commands import main
from planted import planted_data, planted_rows
from sklearn.metrics import log_loss, roc_auc_score

from widedeep import logs, report, run
from widedeep.checkpoint import Checkpoints, Progress
from widedeep.config import OTHER_RESULTS, TrainConfig
from widedeep.shard_manifest import seal
from widedeep.train import is_finished, note_score

FLAGS = shlex.split(
    "--cpu --global_batch_size 64 --eval_batch_size 150 --num_epochs 3 --deep_warmup_epochs 1 --seed 5 --threads 1"
    " --deep_hidden_units 16 8 --deep_learning_rate 0.02 --log_every 10 --step reference"
)


def train(data: Path, out: Path, *more: str) -> int:
    places = ["--dataset_path", data, "--model_dir", out / "model", "--results_dir", out / "results"]
    return main(["train", *map(str, places), *FLAGS, *more])


def log_lines(path: Path) -> list[dict]:
    return [json.loads(line.removeprefix("DLLL ")) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return planted_data(tmp_path_factory.mktemp("data") / "set", train=4003)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run")
    assert train(data, out) == 0
    return out


def test_it_learns_the_planted_model(finished):
    result = json.loads((finished / "results" / "evaluation.json").read_text())
    assert result["auc"] > 0.75  # 0.5 for a model that has learnt nothing; 0.62 after one step an epoch
    assert result["rows"] == 401
    assert result["groups"] == 101
    assert sum(result["calibration"]["rows"]) == 401


def test_the_files_whose_place_the_log_may_not_take(finished):
    written = {path.name for path in (finished / "results").iterdir() if path.suffix in (".json", ".jsonl", ".yaml")}
    assert written == {*OTHER_RESULTS, "log.json"}


def test_a_model_that_memory_does_not_hold_is_refused(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run.psutil, "virtual_memory", lambda: SimpleNamespace(available=2**20))
    assert train(data, tmp_path, "--deep_hidden_units", "100000") == 2
    said = capsys.readouterr().err
    assert "parameters in each process, which need" in said
    assert "GiB of memory at least: expected what fits in the 0.0 GiB that are free" in said
    assert not (tmp_path / "model" / "checkpoint" / "last").exists()


def test_log_has_the_originals_keys(finished):
    lines = [line for line in log_lines(finished / "results" / "log.json") if line["type"] == "LOG"]
    assert lines[0]["step"] == "PARAMETER"
    assert lines[0]["data"]["global_batch_size"] == 64
    batches = [line for line in lines if "loss" in line["data"]]
    assert [line["step"] for line in batches] == [[step, 189] for step in range(10, 189, 10)]
    assert {"loss", "auc", "binary_accuracy"} <= batches[0]["data"].keys()
    epochs = [line for line in lines if "loss_val" in line["data"]]
    assert [line["step"] for line in epochs] == [[63, 189], [126, 189], [189, 189], []]
    assert {"loss_val", "auc_val", "binary_accuracy_val", "streaming_map_val"} <= epochs[0]["data"].keys()
    assert epochs[0]["data"]["map_all_val"] > 0  # ours: the planted groups have several clicks
    assert epochs[-1]["data"] == epochs[-2]["data"]


def test_files_beside_the_log(finished):
    results = finished / "results"
    assert json.loads((results / "args.json").read_text())["num_epochs"] == 3
    assert TrainConfig.load(results / "config.yaml").training.seed == 5
    summary = json.loads((results / "data_summary.json").read_text())
    assert summary["splits"]["train"]["rows"] == 4003
    assert summary["splits"]["test"]["groups"] == 101


def test_an_auc_by_thresholds_says_by_how_many(data, finished, tmp_path):
    places = ["--dataset_path", str(data), "--model_dir", str(finished / "model"), "--results_dir", str(tmp_path)]
    flags = ["--evaluate", "--use_checkpoint", "--cpu", "--deep_hidden_units", "16", "8", "--num_auc_thresholds", "3"]
    assert main(["train", *places, *flags]) == 0
    result = json.loads((tmp_path / "evaluation.json").read_text())
    assert {"auc_3", "auc_8000"} <= result.keys()
    assert result["auc_3"] < result["auc_8000"]
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    assert main(["report", str(tmp_path)]) == 0
    assert "AUC, 3 thresholds" in (tmp_path / "report.html").read_text()


def test_evaluate_and_predict_and_metrics_agree(data, finished, tmp_path, capsys):
    common = ["--model", str(finished / "model"), "--dataset_path", str(data), "--cpu", "--step", "reference"]
    assert main(["evaluate", *common, "--checkpoint", "last", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    trained = json.loads((finished / "results" / "evaluation.json").read_text())
    for key in ("loss", "auc", "auc_200", "map", "map_all", "gauc", "binary_accuracy"):
        assert result[key] == pytest.approx(trained[key], abs=1e-6), key
    out = tmp_path / "p.parquet"
    assert main(["predict", *common, "--checkpoint", "last", "--out", str(out), "--eval_batch_size", "97"]) == 0
    table = pq.read_table(out)
    assert table.column_names == ["label", "prob", "logit", "display_id"]
    label, prob = table["label"].to_numpy(), table["prob"].to_numpy()
    assert roc_auc_score(label, prob) == pytest.approx(result["auc"], abs=1e-6)
    assert log_loss(label, prob) == pytest.approx(result["loss"], abs=1e-6)
    capsys.readouterr()
    columns = ["--label", "label", "--score", "prob", "--group", "display_id"]
    assert main(["metrics", "--predictions", str(out), *columns, "--json"]) == 0
    scored = json.loads(capsys.readouterr().out)
    for key in ("map", "map_all", "multi_click_groups"):
        assert scored[key] == pytest.approx(result[key], abs=1e-9)
    assert scored["auc"] == pytest.approx(result["auc"], abs=1e-9)


@pytest.mark.parametrize("name", ["config.yaml", "feature_spec.yaml"])
def test_a_checkpoint_that_lacks_a_file_is_damaged_whoever_reads_it(data, finished, tmp_path, capsys, name):
    model = shutil.copytree(finished / "model", tmp_path / "model")
    lacks = Checkpoints(model).find("last")
    (lacks / name).unlink()
    scored = ["--model", str(lacks), "--dataset_path", str(data), "--cpu"]
    said = f"{lacks / name}: damaged checkpoint: the file is missing; remove {lacks} to use step-126 instead"
    for run_it in (
        lambda: main(["evaluate", *scored]),
        lambda: main(["predict", *scored, "--out", str(tmp_path / "p.csv")]),
        lambda: train(data, tmp_path, "--use_checkpoint"),
        lambda: train(data, tmp_path, "--use_checkpoint", "--evaluate"),
    ):
        capsys.readouterr()
        assert run_it() == 2
        assert capsys.readouterr().err == f"widedeep: {said}\n"


def test_predict_to_csv(data, finished, tmp_path):
    common = ["--model", str(finished / "model"), "--dataset_path", str(data), "--cpu", "--step", "reference"]
    out = tmp_path / "new" / "p.csv"
    assert main(["predict", *common, "--split", "train", "--out", str(out)]) == 0
    lines = out.read_text().splitlines()
    assert lines[0] == '"label","prob","logit","display_id"'
    assert len(lines) == 4004


def test_evaluate_flag_scores_the_last_checkpoint(data, finished, tmp_path):
    places = ["--model_dir", str(finished / "model"), "--results_dir", str(tmp_path)]
    flags = [*FLAGS, "--dataset_path", str(data), *places, "--evaluation", "--use_checkpoint", "--log_every", "2"]
    assert main(["train", *flags]) == 0
    lines = [line for line in log_lines(tmp_path / "log.json") if line["type"] == "LOG"]
    trained = json.loads((finished / "results" / "evaluation.json").read_text())
    assert lines[-1]["data"]["auc_val"] == pytest.approx(trained["auc_200"], abs=1e-5)
    assert [line["step"] for line in lines if "auc" in line["data"]] == [[2]]


def test_evaluate_flag_keeps_the_record_of_the_training(data, tmp_path):
    assert train(data, tmp_path) == 0
    results = tmp_path / "results"
    before = {name: (results / name).read_text() for name in ("log.json", "metrics.jsonl", "data_summary.json")}
    assert train(data, tmp_path, "--evaluate", "--use_checkpoint") == 0
    for name, text in before.items():
        assert (results / name).read_text().startswith(text), name
    assert len((results / "metrics.jsonl").read_text()) > len(before["metrics.jsonl"])
    assert not json.loads((results / "args.json").read_text())["evaluate"]


@pytest.mark.parametrize(
    "more", [shlex.split("--benchmark --benchmark_warmup_steps 0 --benchmark_steps 3"), ["--evaluate"]]
)
def test_neither_benchmark_nor_fresh_weights_take_the_place_of_a_training(data, finished, tmp_path, more):
    results = shutil.copytree(finished / "results", tmp_path / "results")
    before = {name: (results / name).read_text() for name in os.listdir(results)}
    page = report.read(results)
    assert train(data, tmp_path, *more) == 0
    for name, text in before.items():
        grows = name in ("log.json", "metrics.jsonl")
        assert (results / name).read_text().startswith(text) if grows else (results / name).read_text() == text, name
    assert report.read(results) == page


def test_a_new_run_leaves_no_evaluation_of_the_one_it_replaces(data, finished, tmp_path):
    shutil.copytree(finished / "results", tmp_path / "results")
    assert train(data, tmp_path, "--overwrite", "--deep_learning_rate", "1e30", "--log_every", "1") == 1
    assert not (tmp_path / "results" / "evaluation.json").exists()


@pytest.mark.parametrize("named", ["evaluation.json", "metrics.jsonl"])
def test_results_of_another_run_are_not_replaced_unasked(data, finished, tmp_path, capsys, named):
    results = shutil.copytree(finished / "results", tmp_path / "results")
    if named == "metrics.jsonl":  # of a run that has not come to its first evaluation
        (results / "evaluation.json").unlink()
    before = {name: (results / name).read_bytes() for name in os.listdir(results)}
    assert train(data, tmp_path) == 2
    said = f"{results / named} is there: give --overwrite to replace these results, or another --results_dir"
    assert capsys.readouterr().err == f"widedeep: {said}\n"
    assert {name: (results / name).read_bytes() for name in os.listdir(results)} == before
    assert train(data, tmp_path, "--overwrite", "--num_epochs", "1") == 0
    assert train(data, tmp_path, "--overwrite", "--num_epochs", "1") == 0


def test_results_without_a_record_may_be_replaced(data, tmp_path):
    (tmp_path / "results").mkdir()
    for name in ("metrics.jsonl", "log.json", "args.json"):  # of a run that was stopped before it had said anything
        (tmp_path / "results" / name).touch()
    assert train(data, tmp_path, "--num_epochs", "1") == 0


def test_groups_with_the_name_of_a_prediction_are_refused(data, finished, tmp_path, capsys):
    other = Path(shutil.copytree(data, tmp_path / "other"))
    for path in (other / "feature_spec.yaml", other / "train" / "manifest.json", other / "test" / "manifest.json"):
        text = path.read_text().replace("display_id", "logit")
        if path.suffix == ".json":
            text = seal({key: value for key, value in json.loads(text).items() if key != "xxh3_64"})
        path.write_text(text)
    scored = ["--model", str(finished / "model"), "--dataset_path", str(other), "--cpu", "--step", "reference"]
    assert main(["predict", *scored, "--out", str(tmp_path / "p.csv")]) == 2
    assert f"{other / 'test'}: the groups are called 'logit', as a column of predictions is" in capsys.readouterr().err


def test_a_diverged_model_predicts_nothing(data, tmp_path, capsys):
    more = ["--deep_learning_rate", "1e38", "--deep_warmup_epochs", "0", "--checkpoint_every_steps", "1"]
    assert train(data, tmp_path, *more, "--log_every", "1000") == 1
    out = tmp_path / "p.csv"
    scored = ["--model", str(tmp_path / "model"), "--dataset_path", str(data), "--cpu", "--checkpoint", "last"]
    assert main(["predict", *scored, "--out", str(out)]) == 1
    assert "logits are not finite: the model has diverged" in capsys.readouterr().err
    assert not out.exists()


def test_a_place_that_cannot_be_written_costs_no_result(data, finished, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    scored = ["--model", str(finished / "model"), "--dataset_path", str(data), "--cpu"]
    capsys.readouterr()
    assert main(["evaluate", *scored, "--json", "--out", str(tmp_path / "file" / "e.json")]) == 2
    told = capsys.readouterr()
    assert json.loads(told.out)["auc"] > 0.5
    assert main(["predict", *scored, "--out", str(tmp_path / "file" / "p.csv")]) == 2
    for words in (told.err, capsys.readouterr().err):
        assert f"cannot write {tmp_path / 'file'}/" in words


@pytest.mark.parametrize(
    ("more", "key", "smaller"),
    [
        ([], "train_throughput", ""),
        (["--global_batch_size", "9999"], "train_throughput", "measured batches of 4003 rows, where 9999"),
        (["--evaluate"], "validation_throughput", "measured batches of 101 to 150 rows, where 150"),
    ],
)
def test_benchmark_counts_its_measured_steps_and_says_their_rows(data, tmp_path, capsys, more, key, smaller):
    steps = ["--benchmark", "--benchmark_warmup_steps", "0", "--benchmark_steps", "5"]
    assert train(data, tmp_path, *steps, *more) == 0
    lines = [line for line in log_lines(tmp_path / "results" / "log.json") if line["type"] == "LOG"]
    assert [line["step"] for line in lines if "batch_samplesps" in line["data"]] == [[1, step] for step in range(2, 6)]
    assert lines[-1]["step"] == []
    assert lines[-1]["data"][key] > 0
    said = capsys.readouterr().out
    assert smaller in said
    assert ("measured" in said) is bool(smaller)
    assert not (tmp_path / "model" / "checkpoint").exists()


def test_benchmark_is_a_command_too(data, tmp_path, capsys):
    places = ["--dataset_path", str(data), "--model_dir", str(tmp_path / "m"), "--results_dir", str(tmp_path / "r")]
    steps = ["--benchmark_warmup_steps", "0", "--benchmark_steps", "3"]
    assert main(["benchmark", *places, *FLAGS, *steps]) == 0
    assert "train_throughput : " in capsys.readouterr().out
    assert not (tmp_path / "m" / "checkpoint").exists()


def test_training_set_size_shortens_the_epoch(data, tmp_path):
    assert train(data, tmp_path, "--training_set_size", "700", "--num_epochs", "2") == 0
    assert Checkpoints(tmp_path / "model").find("last").name == "step-20"  # two epochs of 700 // 64 batches


def test_training_set_size_of_less_than_a_batch_is_refused(data, tmp_path, capsys):
    """A whole batch would be more rows than were asked for, unless there are no more."""
    for size, batch, least in ((63, 64, 64), (4002, 5000, 4003)):
        assert train(data, tmp_path, "--training_set_size", str(size), "--global_batch_size", str(batch)) == 2
        assert f"--training_set_size ({size}) must be at least a batch, {least} rows" in capsys.readouterr().err
    assert train(data, tmp_path, "--training_set_size", "4003", "--global_batch_size", "5000") == 0


def test_without_groups_map_is_left_out(tmp_path):
    data = planted_data(tmp_path / "set", group=False)
    assert train(data, tmp_path, "--num_epochs", "1") == 0
    last = log_lines(tmp_path / "results" / "log.json")[-1]["data"]
    assert "auc_val" in last
    assert "streaming_map_val" not in last


def test_seed_decides_everything_and_is_recorded(data, tmp_path):
    one_epoch = ("--num_epochs", "1")
    for name, seed in (("a", "9"), ("b", "9"), ("c", "10")):
        assert train(data, tmp_path / name, *one_epoch, "--seed", seed) == 0
    a, b, c = (
        (Checkpoints(tmp_path / name / "model").find() / "model.safetensors").read_bytes() for name in ("a", "b", "c")
    )
    assert a == b != c
    flags = [flag for flag in FLAGS if flag not in ("--seed", "5")]
    places = ["--dataset_path", data, "--model_dir", tmp_path / "d", "--results_dir", tmp_path / "d"]
    assert main(["train", *map(str, places), *flags, *one_epoch]) == 0
    assert yaml.safe_load((tmp_path / "d" / "config.yaml").read_text())["seed"] is not None


def test_ids_past_their_table_where_nobody_looked_at_the_checksums(data, finished, tmp_path, capfd):
    data = shutil.copytree(data, tmp_path / "data")
    for split in ("train", "test"):
        shard = data / split / "part-00000.shard"
        content = bytearray(shard.read_bytes())
        content[10] = 200
        shard.write_bytes(content)
    fused = ["--step", "fused", "--verify", "false"]
    score = ["--model", str(finished / "model"), "--dataset_path", str(data), "--cpu", *fused]
    said = "damaged data: feature 0 has id 200, expected -1 (padding) or 0 to 49; rerun without --verify false"
    for run_it in (
        lambda: train(data, tmp_path, *fused),
        lambda: main(["evaluate", *score]),
        lambda: main(["predict", *score, "--out", str(tmp_path / "p.csv")]),
    ):
        capfd.readouterr()
        assert run_it() == 2
        assert capfd.readouterr().err.startswith(f"widedeep: {data}: {said}")


def test_a_disk_that_fills_under_the_log_has_not_cost_a_checkpoint(data, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(logs.RunLog, "log", full)
    assert train(data, tmp_path) == 1
    said = f"widedeep: cannot write {tmp_path / 'results'}: No space left on device; every checkpoint is whole\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(("precision", "advice"), [("fp32", ""), ("bf16", " or --precision fp32")])
def test_a_loss_that_is_not_finite_ends_the_run(data, tmp_path, capsys, precision, advice):
    more = ["--deep_learning_rate", "1e38", "--deep_warmup_epochs", "0", "--precision", precision]
    assert train(data, tmp_path, *more) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"widedeep: the loss is not finite at or before step 10: a lower learning rate{advice} may help;"
        " no checkpoint of this state was written"
    )
    assert not Checkpoints(tmp_path / "model").steps()


def test_best_score_and_patience():
    config = TrainConfig().updated(num_epochs=9, patience=2)
    progress = Progress(seed=0, rows=1, global_batch_size=1)
    history = []
    for epoch, score in enumerate([0.5, float("nan"), 0.6, 0.55, 0.6], start=1):
        progress.epoch, progress.metrics = epoch, {"auc_val": 0.0, "streaming_map_val": 0.9, "map_all_val": score}
        history.append((note_score(progress), is_finished(progress, config)))
    assert history == [(True, False), (False, False), (True, False), (False, False), (False, True)]
    assert progress.best == 0.6


def test_scores_of_two_kinds_do_not_compare():
    """A run that goes on with or without MAP begins to look for its best anew."""
    progress = Progress(seed=0, rows=1, global_batch_size=1)
    progress.metrics = {"auc_val": 0.8}
    assert note_score(progress)
    for metrics, best in (({"auc_val": 0.8, "streaming_map_val": 0.5}, True), ({"auc_val": 0.7}, True)):
        progress.metrics = metrics
        assert (note_score(progress), progress.waited) == (best, 0)
    assert (progress.score, progress.best) == ("auc_val", 0.7)


@pytest.mark.parametrize("label", [0, 1])
def test_labels_that_are_all_equal_are_said(data, tmp_path, capsys, monkeypatch, label):
    def of_one_class(*args):
        rows = planted_rows(*args)
        return rows | {"clicked": np.full_like(rows["clicked"], label)}

    assert train(data, tmp_path / "both", "--num_epochs", "1") == 0
    assert "rows have the label" not in capsys.readouterr().out
    monkeypatch.setattr("planted.planted_rows", of_one_class)
    assert train(planted_data(tmp_path / "set"), tmp_path, "--num_epochs", "1") == 0
    said = capsys.readouterr().out
    assert f"all 1,003 train rows have the label {label}: there is nothing to learn but that\n" in said
    assert f"all 401 test rows have the label {label}: no AUC is defined, so auc_val will be nan\n" in said


def test_tensorboard_events(data, tmp_path):
    pytest.importorskip("tensorboard")
    assert train(data, tmp_path, "--num_epochs", "1", "--tensorboard") == 0
    assert list((tmp_path / "model" / "event_files").glob("events.out.tfevents.*"))
