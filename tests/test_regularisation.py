"""`--linear_l1` and `--linear_l2`: what they do to the wide weights; settings of the update rules, by every step."""

import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import main
from planted import planted_data
from test_cuda_step import EVEN, HIDDEN
from test_step import batch_of, new_step, part_of
from thread_comm import in_ranks

from widedeep import ShardSet, load_model, ops
from widedeep.dist import LocalComm
from widedeep.model import WideDeep
from widedeep.share import ALL_ROWS, Share, is_table
from widedeep.step import StepConfig
from widedeep.steps.cuda import CudaStep
from widedeep.steps.cuda_ranks import RanksCudaStep
from widedeep.steps.fused import FusedStep
from widedeep.steps.sharded import ShardedCudaStep, ShardedFusedStep

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


@pytest.mark.parametrize(
    ("kind", "ranks"),
    [
        *((FusedStep, 1), (FusedStep, 2), (CudaStep, 1), (RanksCudaStep, 2)),
        *((ShardedFusedStep, 2), (ShardedCudaStep, 2)),
    ],
)
def test_every_step_takes_the_settings_of_the_rules(kind, ranks):
    """None of them the default's, nor another's; the steps of a GPU run on a CPU too."""
    config = StepConfig(rho=0.8, eps=3e-3, wide_lr=0.07, initial_accumulator=0.25, l1=0.004, l2=0.3)
    batches = [batch_of(EVEN, 40, seed=i) for i in range(3)]
    want = new_step("reference", EVEN, config, hidden=HIDDEN)

    def train(comm):
        share = Share(comm.rank, comm.world) if kind in (ShardedFusedStep, ShardedCudaStep) else ALL_ROWS
        model = WideDeep(EVEN, hidden=HIDDEN, dropout=0.3, seed=11, share=share)
        step = kind(model, config, torch.device("cpu"), comm)
        for i, batch in enumerate(batches):
            step.train(part_of(batch, *(0, 15, 40)[comm.rank : comm.rank + 2]) if ranks > 1 else batch, i, 0.002)
        return step

    steps = in_ranks(ranks, train) if ranks > 1 else [train(LocalComm("cpu"))]
    for i, batch in enumerate(batches):
        want.train(batch, i, 0.002)
    for step in (want, *steps):
        step.settle()
    whole = want.model.named_arrays() | want.state()
    for step in steps:
        for name, a in (step.model.named_arrays() | step.state()).items():
            wanted = step.model.share.take(whole[name]) if is_table(name) else whole[name]
            torch.testing.assert_close(a, wanted, rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("l1", "l2"), [(0.0, 0.0), (0.01, 0.0), (0.0, 0.3), (0.01, 0.3)])
def test_a_fresh_state_that_fits_the_weights_keeps_them(l1, l2):
    """Where nothing speaks against them: an update of gradients 0 changes none, those that are 0 among them."""
    step = new_step("fused", EVEN, StepConfig(wide_lr=0.07, l1=l1, l2=l2))
    model, slots = step.model, step.slots
    model.wide.data[::3] = 0
    model.wide_bias.data.fill_(-0.2)
    step.start_from_weights()
    dense = {"wide.numeric.weight": model.wide_numeric, "wide.bias": model.wide_bias}
    state = [(a.data, slots.dense_accum[name], slots.dense_linear[name]) for name, a in dense.items()]
    for weight, accum, linear in [*state, (model.wide.data, slots.accum, slots.linear)]:
        before = weight.clone()
        ops.ftrl_dense_(weight, accum, linear, torch.zeros_like(weight), 0.07, l1, l2)
        torch.testing.assert_close(weight, before, rtol=1e-5, atol=1e-8)


def test_a_run_that_goes_on_names_the_change(data, tmp_path, capsys):
    assert train(data, tmp_path, "--linear_l1", "0.01") == 0
    assert train(data, tmp_path, "--use_checkpoint", "--num_epochs", "3") == 0
    assert "not as before: --num_epochs 3 (was 2), --linear_l1 0.0 (was 0.01)\n" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--linear_l1", "--linear_l2"])
def test_values_below_0_are_refused(data, tmp_path, capsys, flag):
    assert train(data, tmp_path, flag, "-0.1") == 2
    assert f"{flag} must be at least 0, got -0.1" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()
