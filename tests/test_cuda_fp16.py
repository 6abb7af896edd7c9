"""The loss scale of the GPU step in float16: what does not depend on it, and steps that overflow; on any machine."""

import pytest
import torch
from test_cuda_step import EVEN, gpu_step, run
from test_model import MOVED
from test_step import LR, batch_of, part_of
from thread_comm import in_ranks

from widedeep.dist import LocalComm
from widedeep.step import StepConfig
from widedeep.steps.cuda_ranks import RanksCudaStep

FP16 = StepConfig("fp16", gemm="cublaslt")
OF_THE_SCALE = ("loss_scale", "good_steps", "step")


def test_fp16_skips_an_overflow_and_lowers_the_scale(device):
    step = gpu_step(config=FP16, device=device)
    run(step, device=device)
    step.settle()
    before = {n: a.clone() for n, a in (step.model.named_arrays() | step.state()).items()}
    bad = batch_of(EVEN, 96, device=device)
    bad.numeric[3, 1] = float("inf")
    step.train(bad, 6, LR)
    step.settle()
    assert step.state()["loss_scale"] == 2**14
    for name, a in (step.model.named_arrays() | step.state()).items():
        assert name in OF_THE_SCALE or torch.equal(a, before[name]), name
    for good, scale in ((1000, 2**14), (1998, 2**14), (1999, 2**15)):
        step.good_steps.fill_(good)
        step.train(batch_of(EVEN, 96, device=device), 7, LR)
        assert step.state()["loss_scale"] == scale
    assert not torch.equal(step.model.tables[0], before["deep.table.a"])


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("parts", ["both", "wide", "deep"])
@pytest.mark.parametrize("spec", [EVEN, MOVED], ids=["even", "moved"])
def test_weights_and_slots_do_not_depend_on_the_scale(spec, parts, ranks):
    """RMSprop would hardly move its weights otherwise with gradients that are scaled; its slots tell."""

    def train(scale, comm):
        step = gpu_step(spec, FP16, comm=comm, parts=parts)
        step.scale.fill_(scale)
        rows = (0, 12, 30)[comm.rank : comm.rank + 2] if comm.world > 1 else (0, 30)
        gradients = step.gradients(part_of(batch_of(spec, 30), *rows))
        for i in range(3):
            step.train(part_of(batch_of(spec, 30, seed=i), *rows), i, LR)
        step.settle()
        return step.model.named_arrays() | step.state() | {f"gradient.{n}": g for n, g in gradients.items()}

    def of_all(scale):
        return in_ranks(ranks, lambda comm: train(scale, comm))[0] if ranks > 1 else train(scale, LocalComm("cpu"))

    got, want = of_all(2.0**10), of_all(2.0**15)
    for name, a in want.items():
        if name not in OF_THE_SCALE:
            atol = 1e-3 * float(a.abs().max()) if a.numel() else 0
            torch.testing.assert_close(got[name], a, rtol=2e-2, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def overflowing(where, batch, model):
    """Makes only dx ("rows") or only gradients of dense weights infinite, or NaN."""
    if where == "rows":  # a huge weight, on a column that is 0 in the forward pass
        model.tables[0].data[:, 0] = 0
        column = model.spec.table_columns[0]
        (model.layers[0] if model.layers else model.out).weight.data[:, column] = 6e4
    elif where == "dense":  # minus infinity in every unit, so that nothing passes below, and 0 times infinity
        batch.numeric[3, 1] = 1e6
        model.layers[0].weight.data[:, model.spec.numeric_columns[1]] = -1
    else:  # the sum of the wide numeric's gradient
        batch.numeric[:, 1] = 1e37


def check_overflow(step, batch, mine, where, good):
    """A batch that overflows changes nothing but the scale; a good one that follows is trained on."""
    overflowing(where, batch, step.model)
    step.settle()
    before = {n: a.clone() for n, a in (step.model.named_arrays() | step.state()).items()}
    step.train(mine(batch), 0, LR)
    dx = step.activations.gradient(0, len(mine(batch).ids))
    finite = bool(dx.isfinite().all()), bool(step.weights.flat.isfinite().all())
    step.settle()
    after = step.model.named_arrays() | step.state()
    assert after["loss_scale"] == 2**14
    for name, a in after.items():
        assert name in OF_THE_SCALE or torch.equal(a, before[name]), name
    if where == "rows":
        step.model.named_arrays()["deep.layer.0.weight" if step.model.layers else "deep.out.weight"].fill_(0.01)
    step.train(mine(good), 1, LR)
    assert step.state()["updates"] == 1
    return finite


@pytest.mark.parametrize(
    ("where", "settings"),
    [
        ("rows", {}),
        ("rows", {"hidden": []}),
        ("rows", {"dropout": 0.0, "parts": "deep"}),
        ("dense", {}),
        ("dense", {"dropout": 0.0, "parts": "deep"}),
        ("wide", {"parts": "wide"}),
    ],
)
def test_one_gradient_that_overflows_skips_the_whole_step(where, settings):
    step = gpu_step(EVEN, FP16, **settings)
    finite = check_overflow(step, batch_of(EVEN, 40), lambda batch: batch, where, batch_of(EVEN, 40, seed=1))
    if step.model.has_deep:
        assert finite == (where != "rows", where == "rows")


@pytest.mark.parametrize("where", ["rows", "dense"])
def test_one_rank_that_overflows_makes_all_skip_the_step(where):
    """Rows of the other ranks are finite, and all go on with one scale."""

    def train(comm):
        step = gpu_step(EVEN, FP16, comm=comm)
        assert type(step) is RanksCudaStep

        def mine(batch):  # the second rank has what overflows
            return part_of(batch, *((7, 40), (0, 7))[comm.rank])

        batch = batch_of(EVEN, 40)
        step.model.wide_numeric.data[0] = 10  # so sure and so right are the first rank's rows: no gradient comes down
        batch.numeric[7:, 0] = (batch.label[7:] * 2 - 1) * 1e3
        return *check_overflow(step, batch, mine, where, batch_of(EVEN, 40, seed=1)), step

    (first_rows, _, first), (second_rows, _, second) = in_ranks(2, train)
    assert first_rows
    assert second_rows == (where != "rows")
    for name, a in first.model.named_arrays().items():
        assert torch.equal(a, second.model.named_arrays()[name]), name


def test_a_resumed_run_raises_the_scale_when_the_other_does():
    step, resumed = gpu_step(config=FP16), gpu_step(config=FP16)
    step.scale.fill_(2.0**7)
    step.good_steps.fill_(1998)
    step.train(batch_of(EVEN, 8), 0, LR)
    resumed.load_state(step.state())
    for each in (step, resumed):
        each.train(batch_of(EVEN, 8), 1, LR)
        assert each.state()["loss_scale"] == 2**8
