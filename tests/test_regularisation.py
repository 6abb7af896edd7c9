"""`--linear_l1` and `--linear_l2`: what they do to the wide weights, by either step."""

import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import main
from planted import planted_data

from widedeep import ShardSet, load_model

FLAGS = shlex.split(
    "--cpu --global_batch_size 64 --num_epochs 2 --deep_warmup_epochs 1 --seed 5 --threads 1 --deep_hidden_units 8"
    " --linear_learning_rate 0.1"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return planted_data(tmp_path_factory.mktemp("data") / "set")


def train(data: Path, out: Path, *more: str) -> int:
    places = ["--dataset_path", data, "--model_dir", out / "model", "--results_dir", out / "results"]
    return main(["train", *map(str, places), *FLAGS, *more])


def wide_weights(data: Path, out: Path, *more: str) -> torch.Tensor:
    """[U] of all rows that the train rows name."""
    assert train(data, out, *more) == 0
    model = load_model(out / "model", "last")
    shards = ShardSet.open(data / "train")
    columns = shards.read(0, shards.rows)
    used = [
        base + np.unique(columns[f.name][columns[f.name] >= 0])
        for base, f in zip(model.spec.row_base, model.spec.categorical)
    ]
    return model.wide.detach()[torch.from_numpy(np.concatenate(used))]


@pytest.mark.parametrize("step", ["reference", "fused"])
def test_l1_sets_weights_to_0_and_l2_makes_them_smaller(data, tmp_path, step):
    plain = wide_weights(data, tmp_path / "plain", "--step", step)
    # Gradients are of the mean over a batch: their sums over 32 steps are some hundredths.
    sparse = wide_weights(data, tmp_path / "l1", "--step", step, "--linear_l1", "0.02")
    small = wide_weights(data, tmp_path / "l2", "--step", step, "--linear_l2", "1")
    assert (plain != 0).all()
    assert 0.1 < (sparse == 0).float().mean() < 0.9
    assert (small != 0).all()
    # Before, a weight's denominator was sqrt(n) / 0.1 of at least 3.2; now there is 2 more.
    assert 0.3 < small.norm() / plain.norm() < 0.75


def test_both_steps_agree(data, tmp_path):
    flags = ["--linear_l1", "0.01", "--linear_l2", "0.5", "--deep_dropout", "0"]
    weights = [wide_weights(data, tmp_path / step, "--step", step, *flags) for step in ("reference", "fused")]
    torch.testing.assert_close(*weights, atol=1e-6, rtol=1e-4)
    assert torch.equal(*(w == 0 for w in weights))


def test_a_run_that_goes_on_names_the_change(data, tmp_path, capsys):
    assert train(data, tmp_path, "--linear_l1", "0.01") == 0
    assert train(data, tmp_path, "--use_checkpoint", "--num_epochs", "3") == 0
    assert "not as before: --num_epochs 3 (was 2), --linear_l1 0.0 (was 0.01)\n" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--linear_l1", "--linear_l2"])
def test_values_below_0_are_refused(data, tmp_path, capsys, flag):
    assert train(data, tmp_path, flag, "-0.1") == 2
    assert f"{flag} must be at least 0, got -0.1" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()
