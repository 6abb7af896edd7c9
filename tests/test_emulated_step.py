"""The whole GPU step by its own kernels, on the CPU emulator (tests/emulated.py): both routes of the hidden layers.

What cuBLASLt would multiply, torch multiplies. Needs no GPU.
"""

import platform
import shutil

import emulated
import pytest
import torch
from test_cuda_fp16 import check_overflow
from test_cuda_step import EVEN, gpu_step
from test_model import MOVED, SPECS
from test_step import LR, assert_same, batch_of, new_step, part_of

from widedeep import ops, reference
from widedeep.ops import linear_sm90
from widedeep.step import StepConfig
from widedeep.steps import trial

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or platform.machine() != "x86_64", reason="the CUDA emulator needs g++ on x86-64"
)

# Every op of the step but the products of the cuBLASLt route, which are made below.
KERNELS = (
    "check_finite_", "embedding_forward_out", "embedding_row_gradients", "embedding_segments", "embedding_update_",
    "ftrl_dense_", "gather_batch_out", "head_forward_out", "head_step_out", "loss_scale_update_", "rmsprop_dense_",
    "rmsprop_settle_", "transpose_out", "wide_numeric_backward_out",
)  # fmt: skip
HIDDEN = [40, 70, 9]  # padded to 40, 72 and 16


def linear_relu_dropout_out(x, weight, bias, p, seed, step, layer, first_row, *, y, bits=None):
    y.copy_(x.float() @ weight.float().T)
    emulated.bias_relu_dropout(y, bias, p, seed, step, layer, first_row, bits)


def linear_dgrad_out(dz, weight, mask, p, *, dx, dbias, bits=None):
    dx.copy_(dz.float() @ weight.float())
    scale = 1.0 if mask is None and bits is None else reference.dropout_scale(p)
    if mask is not None or bits is not None or dbias is not None:
        emulated.mask_and_sum(dx, mask, scale, out=dx, dbias=dbias, bits=bits)


def linear_wgrad_out(dz, x, *, dweight):
    dweight.copy_(dz.float().T @ x.float())


ROUTES = ["sm90", "sm90-chain", "cublaslt"]


@pytest.fixture
def kernels(monkeypatch):
    """The step's ops are emulated kernels, and the Hopper products are there."""
    emulated.reseed(3)
    for name in KERNELS:
        monkeypatch.setattr(ops, name, getattr(emulated, name))
    for function in (linear_relu_dropout_out, linear_dgrad_out, linear_wgrad_out):
        monkeypatch.setattr(ops, function.__name__, function)
    monkeypatch.setattr(linear_sm90, "available", lambda device: True)
    for name in ("linear_sm90_out", "linear_sm90_dgrad_out"):
        monkeypatch.setattr(linear_sm90, name, getattr(emulated, name))


@pytest.mark.parametrize("parts", ["both", "wide", "deep"])
@pytest.mark.parametrize("name", SPECS)
def test_fp32_matches_reference(name, parts, kernels):
    settings = {"hidden": HIDDEN, "parts": parts}
    want, got = new_step("reference", name, **settings), gpu_step(SPECS[name], **settings)
    for i, B in enumerate([33, 7, 0, 33]):
        batch = batch_of(want.model.spec, B, seed=i, first_row=5 * i)
        losses = [step.train(batch, i, LR) for step in (want, got)]
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
        predictions = [step.predict(batch) for step in (want, got)]
        torch.testing.assert_close(predictions[1], predictions[0], rtol=1e-4, atol=1e-5)
    assert_same(want, got, rtol=1e-3, atol=2e-5)


SOME_SPECS = {"small": SPECS["one-hot and multi-hot"], "moved": MOVED, "some wide only": SPECS["some wide only"]}


@pytest.mark.parametrize("spec", SOME_SPECS.values(), ids=SOME_SPECS.keys())
@pytest.mark.parametrize("gemm", ROUTES)
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_types_stay_near_the_reference(precision, gemm, spec, kernels):
    """Gradients before and after updates, losses and logits: other masks would be far off."""
    want = new_step("reference", spec, hidden=HIDDEN)
    got = gpu_step(spec, StepConfig(precision, gemm=gemm), hidden=HIDDEN)
    batch = batch_of(spec, 150)
    grads = [step.gradients(batch, step=3) for step in (want, got)]
    assert got.gemm == gemm
    tolerance, whole = {"fp16": (1e-2, 0.05), "bf16": (8e-2, 0.15)}[precision]
    for name, g in grads[0].items():  # as a whole: where a rounding switches a unit off, single elements differ more
        assert (grads[1][name] - g).norm() <= whole * g.norm(), name
    for i, B in enumerate([150, 40, 150]):
        batch = batch_of(spec, B, seed=i)
        losses = [step.train(batch, i, LR) for step in (want, got)]
        torch.testing.assert_close(losses[1], losses[0], rtol=tolerance, atol=0)
        predictions = [step.predict(batch) for step in (want, got)]
        torch.testing.assert_close(predictions[1], predictions[0], rtol=0, atol=2 * tolerance)


@pytest.mark.parametrize("gemm", ROUTES)
def test_gradients_of_parts_add_up_with_dropout(gemm, kernels):
    """A row's masks follow its place in the global batch, by every route."""
    step = gpu_step(MOVED, StepConfig("fp16", gemm=gemm), hidden=HIDDEN)
    batch = batch_of(MOVED, 60)
    whole = step.gradients(batch, step=2)
    parts = [step.gradients(part_of(batch, *cut), step=2) for cut in ((0, 7), (7, 60))]
    for name, g in whole.items():
        assert (sum(part[name] for part in parts) - g).norm() <= 5e-3 * g.norm(), name


@pytest.mark.parametrize("gemm", ROUTES)
def test_bits_hang_on_no_order_of_threads_and_an_overflow_changes_nothing(gemm, kernels):
    spec, states = SPECS["one-hot and multi-hot"], []
    for seed in (1, 2, 3):
        emulated.reseed(seed)
        step = gpu_step(spec, StepConfig("fp16", gemm=gemm), hidden=HIDDEN)
        for i, B in enumerate([150, 40]):
            step.train(batch_of(spec, B, seed=i), i, LR)
        step.settle()
        states.append({n: a.clone() for n, a in (step.model.named_arrays() | step.state()).items()})
    for other in states[1:]:
        for name, a in states[0].items():
            assert torch.equal(other[name], a), name
    bad = batch_of(spec, 40)
    bad.numeric[7, 1] = float("inf")
    step.train(bad, 2, LR)
    step.settle()
    after = step.model.named_arrays() | step.state()
    assert after["loss_scale"] == states[-1]["loss_scale"] / 2
    for name, a in after.items():
        assert name in ("loss_scale", "good_steps", "step") or torch.equal(a, states[-1][name]), name


@pytest.mark.parametrize("gemm", ["sm90", "sm90-chain"])
def test_an_overflow_of_the_rows_alone_changes_nothing(gemm, kernels):
    """The product that makes their gradient says so."""
    step = gpu_step(EVEN, StepConfig("fp16", gemm=gemm), hidden=HIDDEN)
    batch, good = batch_of(EVEN, 40), batch_of(EVEN, 40, seed=1)
    assert check_overflow(step, batch, lambda batch: batch, "rows", good) == (False, True)


def test_one_launch_for_all_layers_trains_the_same_bits(kernels):
    spec, states = SPECS["one-hot and multi-hot"], []
    for gemm in ("sm90", "sm90-chain"):
        step = gpu_step(spec, StepConfig("bf16", gemm=gemm), hidden=HIDDEN)
        losses = [step.train(batch_of(spec, B, seed=i), i, LR) for i, B in enumerate([300, 40, 0])]
        assert (step.gemm, step.activations.apart) == (gemm, gemm == "sm90-chain")
        states.append({"losses": torch.stack(losses)} | step.model.named_arrays() | step.state())
    for name, a in states[0].items():
        assert torch.equal(states[1][name], a), name


@pytest.mark.parametrize("gemm", ROUTES)
def test_products_are_of_the_weights_as_they_are(gemm, kernels):
    """Their copies, transposed ones too, follow an update, whoever else writes, and a larger batch."""
    step = gpu_step(MOVED, StepConfig("bf16", gemm=gemm), hidden=HIDDEN)

    def assert_as_fresh(B):
        fresh = gpu_step(MOVED, StepConfig("bf16", gemm=gemm), hidden=HIDDEN)
        fresh.model.load_state_dict(step.model.state_dict())
        batch = batch_of(MOVED, B, seed=5)
        got, want = (s.gradients(batch, step=2) for s in (step, fresh))
        for name, g in want.items():
            assert torch.equal(got[name], g), name

    for i in range(2):
        step.train(batch_of(MOVED, 20, seed=i), i, 0.05)
    assert_as_fresh(20)
    for a in step.model.named_arrays().values():
        a.mul_(-1.5)
    assert_as_fresh(20)
    step.train(batch_of(MOVED, 20), 2, 0.05)
    assert_as_fresh(30)


@pytest.mark.parametrize("gemm", ["auto", "sm90-chain"])
def test_more_layers_than_a_chain_can_have(gemm, kernels, monkeypatch):
    monkeypatch.setattr(trial, "_seconds_of", lambda routes, *rest: [1.0] * len(routes))
    spec, hidden = SPECS["one-hot and multi-hot"], [16] * (linear_sm90.LINKS + 2)
    want = new_step("reference", spec, hidden=hidden)
    got = gpu_step(spec, StepConfig("fp16", gemm=gemm), hidden=hidden)
    grads = [step.gradients(batch_of(spec, 150), step=3) for step in (want, got)]
    assert got.gemm == "sm90"
    for name, g in grads[0].items():
        assert (grads[1][name] - g).norm() <= 0.05 * g.norm(), name
