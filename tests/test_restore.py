"""`widedeep.load_model`: the model of a checkpoint, with the logits that its run predicts."""

import pyarrow.parquet
import pytest
import torch
from commands import main
from planted import planted_data

import widedeep
from widedeep.data import Reader
from widedeep.errors import InputError
from widedeep.shards import ShardSet


def test_a_loaded_model_predicts_what_the_run_predicts(tmp_path):
    data, model_dir, out = planted_data(tmp_path / "set"), tmp_path / "model", tmp_path / "p.parquet"
    places = ["--dataset_path", str(data), "--model_dir", str(model_dir), "--results_dir", str(tmp_path / "results")]
    flags = "--cpu --global_batch_size 64 --num_epochs 2 --deep_warmup_epochs 1 --seed 7 --deep_hidden_units 16 8"
    assert main(["train", *places, *flags.split(), "--deep_learning_rate", "0.01", "--deep_dropout", "0.3"]) == 0
    assert main(["predict", "--model", str(model_dir), "--dataset_path", str(data), "--out", str(out), "--cpu"]) == 0

    want = torch.tensor(pyarrow.parquet.read_table(out)["logit"].to_pylist())
    model = widedeep.load_model(model_dir)
    assert not model.training
    assert (model.dropout, model.hidden, model.seed) == (0.3, (16, 8), 7)
    reader = Reader(ShardSet.open(data / "test"), 100, spec=model.spec, shuffle=False)
    with torch.no_grad():
        got = torch.cat([model(batch.ids, batch.numeric) for batch in reader.epoch(0)])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    named = widedeep.load_model(model_dir / "checkpoint" / "step-32").named_arrays()
    for name, array in widedeep.load_model(model_dir, "last").named_arrays().items():
        assert torch.equal(array, named[name])
    with torch.device("meta"):
        elsewhere = widedeep.load_model(model_dir, "last").named_arrays()
    assert all(torch.equal(elsewhere[name], array) for name, array in named.items())


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(InputError, match="expected a checkpoint, or a model directory"):
        widedeep.load_model(tmp_path)
