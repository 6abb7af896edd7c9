"""`widedeep.load_model`: the model of a checkpoint, with the logits that its run predicts."""

import numpy as np
import pyarrow.parquet
import pytest
import torch
from commands import main
from planted import planted_data
from torch.nn.functional import binary_cross_entropy_with_logits

import widedeep
from widedeep import FTRL, FeatureSpec, RMSprop, WideDeep
from widedeep.data import Reader
from widedeep.errors import InputError
from widedeep.feature_spec import CategoricalFeature
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


def own_loop(data, steps=20):
    """A model that was trained without `widedeep train`."""
    spec = FeatureSpec.load(data)
    model = WideDeep(spec, hidden=(16, 8), dropout=0.25, seed=3)
    optimizers = [RMSprop(model.deep_parameters(), lr=0.01), FTRL(model.wide_parameters(), lr=0.05)]
    batches = Reader(ShardSet.open(data / "train"), 64, spec=spec, seed=1).epoch(0)
    for batch, _ in zip(batches, range(steps)):
        loss = binary_cross_entropy_with_logits(model(batch.ids, batch.numeric), batch.label)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    return model


def test_a_model_of_ones_own_loop_is_saved_as_the_commands_take_it(tmp_path):
    data, saved, out = planted_data(tmp_path / "set"), tmp_path / "own", tmp_path / "p.parquet"
    model = own_loop(data)
    assert model.training
    widedeep.save_model(own_loop(data, steps=1), saved)
    widedeep.save_model(model, saved)  # in place of the earlier one
    assert model.training

    loaded = widedeep.load_model(saved)
    assert (loaded.dropout, loaded.hidden, loaded.seed) == (0.25, (16, 8), 3)
    arrays = model.named_arrays()
    assert all(torch.equal(array, arrays[name]) for name, array in loaded.named_arrays().items())
    assert loaded.spec == model.spec.without_sources()

    places = ["--model", str(saved), "--dataset_path", str(data), "--cpu"]
    assert main(["predict", *places, "--out", str(out)]) == 0
    reader = Reader(ShardSet.open(data / "test"), 100, spec=model.spec, shuffle=False)
    with torch.no_grad():
        want = torch.cat([model.eval()(batch.ids, batch.numeric) for batch in reader.epoch(0)])
    got = torch.tensor(pyarrow.parquet.read_table(out)["logit"].to_pylist())
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert main(["evaluate", *places, "--json"]) == 0


@pytest.mark.parametrize("more", ["--step reference", "--linear_l1 0.001 --linear_l2 0.1"])
def test_a_training_begins_with_the_weights_of_ones_own_loop(tmp_path, capsys, more):
    """Those of the wide part too, which FTRL makes of its state."""
    data, saved = planted_data(tmp_path / "set"), tmp_path / "own"
    model = own_loop(data)
    widedeep.save_model(model, saved)
    words = ["--dataset_path", data, "--model_dir", tmp_path / "model", "--results_dir", tmp_path / "results"]
    words += ["--initial_checkpoint", saved, "--cpu", "--deep_hidden_units", 16, 8, "--num_epochs", 1, "--seed", 5]
    words += ["--deep_learning_rate", 1e-12, "--linear_learning_rate", 1e-9, "--deep_warmup_epochs", 0]
    assert main(["train", *map(str, words), *more.split()]) == 0
    assert f"beginning with the weights of {saved}" in capsys.readouterr().out
    assert model.wide.abs().mean() > 1e-3
    arrays = model.named_arrays()
    for name, array in widedeep.load_model(tmp_path / "model").named_arrays().items():
        torch.testing.assert_close(array, arrays[name], rtol=1e-6, atol=1e-6, msg=name)  # all but for the one step


def test_what_no_checkpoint_can_hold_is_not_saved(tmp_path):
    data = planted_data(tmp_path / "set")
    with pytest.raises(InputError, match="expected a model with both parts and whole tables"):
        widedeep.save_model(WideDeep(FeatureSpec.load(data), (4,), parts="deep"), tmp_path / "own")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="full"):
        widedeep.save_model(WideDeep(FeatureSpec.load(data), (4,)), tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]
    assert not (tmp_path / "own").exists()


class Sharded(torch.Tensor):
    """A part of an array, as FSDP2 puts in its place."""


def sharded(model):
    model.wide_bias = torch.nn.Parameter(torch.zeros(1).as_subclass(Sharded))
    return model


def test_a_model_that_could_not_be_loaded_again_is_not_saved(tmp_path):
    def told(match, post=None, **features):
        spec = FeatureSpec([CategoricalFeature("ad", 10, 4, **features)], [], "y", metadata=metadata)
        model = WideDeep(spec, (4,))
        with pytest.raises(InputError, match=match):
            widedeep.save_model(post(model) if post else model, tmp_path / "own")
        assert not list(tmp_path.iterdir())

    metadata = {}
    told("own: expected whole weights of float32, got a Tensor of torch.float16 for ", post=torch.nn.Module.half)
    told("got a Sharded of torch.float32 for wide.bias", post=sharded)
    told("feature_spec.ad.max_hotness: expected an integer <= 65536, got 70000", hotness=70000)
    metadata = {"share": np.float32(0.5)}
    told("feature spec: expected metadata and transforms of plain values")


def test_a_directory_that_holds_more_than_a_checkpoint_is_left_alone(tmp_path):
    """Other programs have a state.json too."""
    model = WideDeep(FeatureSpec([CategoricalFeature("ad", 10, 4)], [], "y"), (4,))
    (tmp_path / "state.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"it holds notes\.txt; move it away"):
        widedeep.save_model(model, tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
