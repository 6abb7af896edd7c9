"""What a checkpoint is applied to, and what is said of it: other names than the model's, another device, any groups."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from commands import main
from planted import planted_data, planted_rows

from widedeep import checkpoint
from widedeep.checkpoint import MODEL, OPTIMIZER, locate, read_arrays, read_progress
from widedeep.config import TrainConfig
from widedeep.data import Batch
from widedeep.dist import LocalComm
from widedeep.feature_spec import FeatureSpec
from widedeep.journal import batch_values, log_values
from widedeep.metrics import Evaluation
from widedeep.outputs import data_summary
from widedeep.shards import ShardSet, ShardWriter

TRAIN = "--cpu --global_batch_size 64 --num_epochs 1 --deep_warmup_epochs 0 --seed 1 --threads 1 --deep_hidden_units 8"


@pytest.fixture
def data(tmp_path) -> Path:
    """With a model of it beside it."""
    data = planted_data(tmp_path / "data", train=300, test=100)
    where = ["--dataset_path", data, "--model_dir", tmp_path / "model", "--results_dir", tmp_path / "results"]
    assert main(["train", *map(str, where), *TRAIN.split()]) == 0
    return data


def evaluated(capsys, tmp_path, data, *more):
    where = ["--model", tmp_path / "model", "--dataset_path", data]
    capsys.readouterr()
    assert main(["evaluate", *map(str, where), "--cpu", "--json", *more]) == 0
    return json.loads(capsys.readouterr().out)


def test_label_and_groups_may_have_other_names_than_the_models(data, tmp_path, capsys):
    other, names = tmp_path / "other", {"clicked": "bought", "display_id": "visit"}
    spec = replace(FeatureSpec.load(data), label="bought", group="visit", directory=None)
    chunks = {
        mapping: tuple(replace(c, features=tuple(names.get(n, n) for n in c.features)) for c in of)
        for mapping, of in spec.sources.items()
    }
    other.mkdir()
    replace(spec, sources=chunks).save(other / "feature_spec.yaml")
    spec = FeatureSpec.load(other)
    for mapping, rows, seed in (("train", 300, 1), ("test", 100, 2)):
        with ShardWriter(other / mapping, spec, group=True) as writer:
            writer.append({names.get(name, name): values for name, values in planted_rows(rows, 4, seed).items()})
            writer.finish()
    assert not FeatureSpec.load(locate(tmp_path / "model") / checkpoint.SPEC).sources  # any data may be applied to
    result = evaluated(capsys, tmp_path, other)
    assert result == evaluated(capsys, tmp_path, data)
    assert result["groups"] == 25
    words = ["--model", tmp_path / "model", "--dataset_path", other, "--out", tmp_path / "p.parquet"]
    assert main(["predict", *map(str, words), "--cpu"]) == 0
    table = pq.read_table(tmp_path / "p.parquet")
    assert table.column_names == ["label", "prob", "logit", "visit"]
    assert table["visit"].to_pylist() == (np.arange(100) // 4).tolist()


@pytest.mark.parametrize("precision", ["tf32", "fp16"])
def test_a_model_of_a_gpu_is_applied_on_a_cpu_in_fp32(data, tmp_path, capsys, precision):
    before, found = evaluated(capsys, tmp_path, data), locate(tmp_path / "model")
    texts = {checkpoint.SPEC: (found / checkpoint.SPEC).read_text(encoding="utf-8")}
    texts |= {checkpoint.CONFIG: TrainConfig.load(found / checkpoint.CONFIG).updated(precision=precision).to_yaml()}
    arrays = {name: read_arrays(found, name) for name in (MODEL, OPTIMIZER)}
    checkpoint.write(found, arrays, read_progress(found), texts)
    assert evaluated(capsys, tmp_path, data) == before
    words = ["--model", tmp_path / "model", "--dataset_path", data, "--cpu", "--precision", precision]
    assert main(["evaluate", *map(str, words)]) == 2  # where it is asked for


def test_a_model_that_began_with_the_weights_of_another_is_applied_as_any(data, tmp_path, capsys):
    begun = tmp_path / "begun"
    where = ["--dataset_path", data, "--model_dir", begun / "model", "--results_dir", begun / "results"]
    words = [*map(str, where), *TRAIN.split(), "--initial_checkpoint", str(tmp_path / "model")]
    assert main(["train", *words]) == 0
    assert evaluated(capsys, begun, data) != evaluated(capsys, tmp_path, data)


@pytest.mark.parametrize("values", [[], [7], [-2, -2, 0, 5], [5, 0, 5, -2, 0], [3, 3, 3]])
def test_groups_are_counted_in_any_order(tmp_path, values):
    spec = FeatureSpec.load(planted_data(tmp_path / "data", train=0, test=0))
    rows = planted_rows(len(values), 4, 0) | {"display_id": np.array(values, np.int64)}
    with ShardWriter(tmp_path / "rows", spec, rows_per_shard=2, group=True) as writer:
        writer.append(rows)
        writer.finish()
    split = data_summary(spec, (8,), {"test": ShardSet.open(tmp_path / "rows")})["splits"]["test"]
    assert (split["rows"], split["groups"]) == (len(values), len({*values}))
    assert split["clicks"] == rows["clicked"].sum()


def test_the_log_tells_both_rankings_where_groups_have_several_clicks():
    logit, label, group = torch.randn(200), (torch.rand(200) < 0.5).float(), torch.arange(200) // 10
    evaluation = Evaluation()
    evaluation.update(logit, label, group)
    result = evaluation.compute()
    told = log_values(result, evaluation)
    assert result["map"] != result["map_all"]
    assert (told["streaming_map_val"], told["map_all_val"]) == (result["map"], result["map_all"])
    assert (told["auc_val"], told["loss_val"]) == (result["auc_200"], result["loss"])


def test_the_log_of_a_batch_is_of_its_probabilities():
    logit, label = torch.tensor([0.1, 0.4, -0.3, 2.0, -1.0]), torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0])
    run = SimpleNamespace(comm=LocalComm(), config=TrainConfig())
    told = batch_values(run, logit, Batch(torch.empty(5, 0), torch.empty(5, 0), label, None, 0, 5))
    assert told == {"binary_accuracy": pytest.approx(3 / 5), "auc": pytest.approx(3 / 6)}
