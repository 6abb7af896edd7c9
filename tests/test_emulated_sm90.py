"""The Hopper products on the CPU emulator (tests/emulated.py), against float64. Needs no GPU."""

import platform
import shutil

import pytest
import torch
from test_cuda_step import EVEN, gpu_step, run
from test_step import LR, batch_of

from tests import emulated
from widedeep import ops, reference
from widedeep.errors import RunError
from widedeep.ops import linear_sm90
from widedeep.step import StepConfig
from widedeep.steps import cuda, layers, trial
from widedeep.testing import assert_close, normal, poisoned

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or platform.machine() != "x86_64", reason="the CUDA emulator needs g++ on x86-64"
)

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
# (M, N, K, dtype): one and many tiles, ragged in every direction, fewer and more stages than the ring has
SHAPES = [
    (1, 8, 8, BF16),
    (100, 128, 64, F16),
    (128, 200, 72, BF16),
    (300, 256, 200, F16),
    (257, 136, 648, BF16),
    (100, 128, 40, F32),
    (300, 264, 200, F32),
]


def close(got, want, scale=1.0):
    """As `assert_close`; what came out of TF32 operands differs by their rounding."""
    if got.dtype != F32:
        return assert_close(got, want, scale=scale)
    atol = 1.5e-3 * scale * max(1.0, float(want.abs().max()))
    torch.testing.assert_close(got.double(), want.double(), rtol=0, atol=atol)


def layer(M, N, K, dtype):
    return normal(M, K, dtype=dtype, key="a"), normal(N, K, dtype=dtype, scale=K**-0.5, key="b")


@pytest.mark.parametrize(("M", "N", "K", "dtype"), SHAPES)
@pytest.mark.parametrize(("p", "seed"), [(0.0, 1), (0.1, 2)])
def test_forward_and_gradient(M, N, K, dtype, p, seed):
    emulated.reseed(seed)
    forward_and_gradient(M, N, K, dtype, p)


@pytest.mark.parametrize("multiprocessors", [2, 5])
@pytest.mark.parametrize("seed", [3, 4, 5])
@pytest.mark.parametrize(
    ("M", "N", "K", "dtype"),
    [(700, 520, 200, BF16), (1300, 264, 8, BF16), (520, 136, 400, BF16), (700, 264, 648, F16), (520, 264, 300, F32)],
)
def test_persistent_blocks(multiprocessors, seed, M, N, K, dtype):
    """One or two clusters take all tiles: the ring goes on from tile to tile, and the warpgroups drift apart."""
    emulated.reseed(seed, multiprocessors)
    forward_and_gradient(M, N, K, dtype, 0.1)


def forward_and_gradient(M, N, K, dtype, p):
    x, weight = layer(M, N, K, dtype)
    bias = normal(N, dtype=dtype, key="bias")
    y = poisoned(M, N, dtype=dtype)
    mask = torch.full((emulated.mask_bytes(M, N),), 0xFF, dtype=torch.uint8)
    dropout = (p, -3, torch.tensor(2**32 + 7), 2, 2**32 - 50)
    emulated.linear_sm90_out(x, weight, bias, *dropout, y=y, mask=mask)
    close(y, reference.linear_relu_dropout(x.double(), weight.double(), bias.double(), *dropout))

    # The gradient into this layer's output reads the mask that the forward pass wrote.
    dz, weight_t = layer(M, N, K, dtype)
    dx, dbias = poisoned(M, N, dtype=dtype), poisoned(N)
    scale = reference.dropout_scale(p)
    emulated.linear_sm90_dgrad_out(dz, weight_t, mask, scale, dx=dx, dbias=dbias)
    want = torch.where(y > 0, dz.double() @ weight_t.double().T * scale, 0)
    close(dx, want)
    close(dbias, want.sum(0), scale=5)


@pytest.mark.parametrize(("M", "N", "K", "dtype"), [(300, 136, 72, BF16), (1, 256, 8, F16), (300, 136, 40, F32)])
def test_gradient_without_mask(M, N, K, dtype):
    dz, weight_t = layer(M, N, K, dtype)
    dx = poisoned(M, N, dtype=dtype)
    emulated.linear_sm90_dgrad_out(dz, weight_t, None, 1.0, dx=dx, dbias=None)
    close(dx, dz.double() @ weight_t.double().T)


@pytest.mark.parametrize(("dtype", "large"), [(F16, 60000.0), (BF16, 3e38)])
@pytest.mark.parametrize("at", [None, (0, 0), (299, 135), (130, 77)])
def test_gradient_that_is_not_finite(dtype, large, at):
    """found_inf says so, also where only the rounding to a half type overflows, and is never taken back."""
    dz, weight_t = torch.zeros(300, 8, dtype=dtype), torch.zeros(136, 8, dtype=dtype)
    if at:
        dz[at[0]], weight_t[at[1]] = large, 0.5
    dx, found = poisoned(300, 136, dtype=dtype), torch.zeros(1)
    emulated.linear_sm90_dgrad_out(dz, weight_t, None, 1.0, dx=dx, dbias=None, found_inf=found)
    assert found.item() == (1.0 if at else 0.0) == (not dx.isfinite().all())
    emulated.linear_sm90_dgrad_out(dz * 0, weight_t, None, 1.0, dx=dx, dbias=None, found_inf=found)
    assert found.item() == (1.0 if at else 0.0)


@pytest.mark.parametrize("first_row", [1000, 1001])
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_dropout_drops_what_the_cpu_drops(dtype, first_row):
    """All products positive: zeros are the dropped elements, bit for bit those of the definition."""
    M, N, K = 300, 200, 8
    ones = torch.ones(M, K, dtype=dtype), torch.ones(N, K, dtype=dtype), torch.ones(N, dtype=dtype)
    dropout = (0.4, 12345, torch.tensor(77), 4, first_row)
    y, want = poisoned(M, N, dtype=dtype), poisoned(M, N, dtype=dtype)
    emulated.linear_sm90_out(*ones, *dropout, y=y, mask=None)
    ops.linear_relu_dropout_out(*ones, *dropout, y=want)
    assert torch.equal(y > 0, want > 0)
    assert torch.equal(y > 0, reference.dropout_mask(M, N, *dropout[:2], int(dropout[2]), *dropout[3:]))


def test_empty_products():
    y = poisoned(0, 8, dtype=BF16)
    step = torch.tensor(1)
    x, weight = layer(0, 8, 8, BF16)
    emulated.linear_sm90_out(x, weight, normal(8, dtype=BF16), 0.1, 1, step, 0, 0, y=y, mask=None)
    dbias = poisoned(8)
    emulated.linear_sm90_dgrad_out(x, weight, None, 1.0, dx=y, dbias=dbias)
    assert torch.equal(dbias, torch.zeros(8))


@pytest.fixture
def on_emulator(monkeypatch):
    """The Hopper ops run on the emulator; a list of the calls in the test's hands may spoil what they give back."""
    spoil = {}

    def forward(*args, y, mask):
        emulated.linear_sm90_out(*args, y=y, mask=mask)
        spoil.get("forward", lambda y: None)(y)

    def dgrad(dz, weight_t, mask, p, *, dx, dbias, found_inf=None):
        scale = 1.0 if mask is None else reference.dropout_scale(p)
        outputs = {"dx": dx, "dbias": dbias, "found_inf": found_inf}
        emulated.linear_sm90_dgrad_out(dz, weight_t, mask, scale, **outputs)
        spoil.get("dgrad", lambda *out: None)(mask, dx, dbias, found_inf)

    monkeypatch.setattr(linear_sm90, "linear_sm90_out", forward)
    monkeypatch.setattr(linear_sm90, "linear_sm90_dgrad_out", dgrad)
    monkeypatch.setattr(trial, "REPEATS", 1)
    emulated.reseed(6)
    return spoil


LAYER = (200, 72, 136)  # B, I, O


@pytest.mark.parametrize("dtype", [F16, BF16, F32])
def test_the_routes_agree_before_the_first_step(on_emulator, dtype):
    assert trial.disagreement(*LAYER, dtype, 0.1, torch.device("cpu")) is None


@pytest.fixture
def timed(on_emulator, monkeypatch):
    """The Hopper products are there; what each route takes is in the test's hands."""
    seconds = {"sm90": 1.0, "cublaslt": 2.0}
    monkeypatch.setattr(trial, "_seconds_of", lambda routes, p, rows: [seconds[route.name] for route in routes])
    monkeypatch.setattr(linear_sm90, "available", lambda device: True)
    monkeypatch.setattr(trial, "_kept", {})
    return seconds


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [((2, 3), "sm90"), ((2.01, 2), "sm90"), ((2.05, 2), "cublaslt")],
)
def test_the_fastest_route_is_kept(timed, seconds, chosen):
    """Of those within two hundredths the first."""
    timed.update(zip(timed, seconds))
    step = gpu_step(config=StepConfig(precision="fp16"))
    step.predict(batch_of(EVEN, 40))
    assert step.gemm == chosen


def test_equal_steps_and_resumed_runs_take_the_route_of_the_first(timed, monkeypatch):
    first = gpu_step(config=StepConfig(precision="fp16"))
    first.train(batch_of(EVEN, 40), 0, LR)
    timed["sm90"] = 9.0
    same = gpu_step(config=StepConfig(precision="fp16"))
    same.predict(batch_of(EVEN, 40))
    assert same.gemm == "sm90"
    monkeypatch.setattr(trial, "_kept", {})  # another process
    resumed, other = (gpu_step(config=StepConfig(precision="fp16")) for _ in range(2))
    resumed.load_state(first.state())
    for step in (other, resumed):
        step.predict(batch_of(EVEN, 40))
    assert (resumed.gemm, other.gemm) == ("sm90", "cublaslt")


def test_a_run_keeps_its_route_where_batches_grow(timed, monkeypatch):
    """With what would be faster for an evaluation's batch, training would go on; resumed before, it would not."""
    whole, resumed = (gpu_step(config=StepConfig(precision="fp16")) for _ in range(2))
    whole.train(batch_of(EVEN, 40), 0, LR)
    resumed.load_state(whole.state())
    assert resumed.state()["route"] == trial.ROUTES.index("sm90")
    timed["sm90"] = 9.0
    for step in (whole, resumed):
        step.predict(batch_of(EVEN, 60))
        assert step.gemm == "sm90"
    other = gpu_step(config=StepConfig(precision="fp16"))
    other.predict(batch_of(EVEN, 60))
    assert other.gemm == "cublaslt"


def test_a_prediction_binds_no_training(timed):
    """What suits a small batch, of a first look at the model say, would slow the training down."""
    timed["sm90"] = 9.0
    step = gpu_step(config=StepConfig(precision="fp16"))
    step.predict(batch_of(EVEN, 40))
    assert (step.gemm, "route" in step.state()) == ("cublaslt", False)
    timed["sm90"] = 1.0
    step.train(batch_of(EVEN, 60), 0, LR)
    assert step.gemm == "sm90"
    step.predict(batch_of(EVEN, 80))
    assert step.state()["route"] == trial.ROUTES.index("sm90")


def test_a_loaded_state_changes_the_route_of_a_step_that_has_run(timed, monkeypatch):
    first, step = (gpu_step(config=StepConfig(precision="fp16")) for _ in range(2))
    first.train(batch_of(EVEN, 40), 0, LR)
    timed["sm90"] = 9.0
    step.predict(batch_of(EVEN, 60))
    cleared = []
    monkeypatch.setattr(step.graphs, "clear", lambda: cleared.append(step.gemm))
    step.load_state(first.state())
    step.predict(batch_of(EVEN, 60))
    assert (step.gemm, cleared) == ("sm90", ["cublaslt"])  # graphs of the other route are gone
    step.load_state(first.state())
    assert (step.gemm, len(cleared)) == ("sm90", 1)


def test_a_route_that_is_no_more_is_chosen_anew(timed):
    """An earlier version knew a third; its checkpoints name it by number."""
    step = gpu_step(config=StepConfig(precision="fp16"))
    step.load_state(step.state() | {"route": torch.tensor(len(trial.ROUTES))})
    step.train(batch_of(EVEN, 40), 0, LR)
    assert step.state()["route"] == trial.ROUTES.index("sm90")


def test_a_route_that_cannot_be_kept_is_named(timed, on_emulator, monkeypatch, caplog):
    first, resumed, elsewhere = (gpu_step(config=StepConfig(precision="fp16")) for _ in range(3))
    first.train(batch_of(EVEN, 40), 0, LR)
    for step in (resumed, elsewhere):
        step.load_state(first.state())
    on_emulator["forward"] = lambda y: y[3].mul_(1.1)
    resumed.train(batch_of(EVEN, 40), 1, LR)
    monkeypatch.setattr(linear_sm90, "available", lambda device: False)
    elsewhere.train(batch_of(EVEN, 40), 1, LR)
    words = "hidden layers: through cublaslt from here on, the run so far through sm90"
    assert [record.message for record in caplog.records].count(words) == 2
    assert resumed.state()["route"] == elsewhere.state()["route"] == trial.ROUTES.index("cublaslt")


def test_a_route_that_disagrees_is_left_out_and_named(timed, on_emulator, caplog):
    on_emulator["forward"] = lambda y: y[3].mul_(1.1)
    step = gpu_step(config=StepConfig(precision="fp16"))
    step.predict(batch_of(EVEN, 40))
    assert step.gemm == "cublaslt"
    assert "Hopper, which disagree with cuBLASLt: the output" in caplog.text


def test_a_route_is_timed_forward_and_back(on_emulator, monkeypatch):
    """On random numbers that nobody else misses."""
    monkeypatch.setattr(trial, "TURN", 0.0)
    monkeypatch.setattr(trial, "ROUNDS", 1)
    weights = gpu_step(config=StepConfig(precision="fp16")).weights
    before = torch.get_rng_state()
    routes = [layers.Sm90Layers(weights), layers.Layers(weights)]
    times = trial._seconds_of(routes, 0.1, 30)
    assert len(times) == 2
    assert min(times) > 0
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("where", "fault", "found"),
    [
        ("forward", lambda y: y[64:128, 8:16].zero_(), "the mask"),
        ("forward", lambda y: y[3].mul_(1.1), "the output"),
        ("dgrad", lambda mask, dx, dbias, found: dx[64:].zero_(), "the gradient"),
        ("dgrad", lambda mask, dx, dbias, found: dbias is None or dbias[5:7].zero_(), "the bias gradient"),
        ("dgrad", lambda mask, dx, dbias, found: mask is None and dx[:, 8].zero_(), "the input's gradient"),
        ("dgrad", lambda mask, dx, dbias, found: found is None or found.zero_(), "whether the input's gradient"),
    ],
)
def test_what_a_wrong_product_is_called(on_emulator, where, fault, found):
    on_emulator[where] = fault
    assert trial.disagreement(*LAYER, BF16, 0.1, torch.device("cpu")).startswith(found)


def test_bits_that_change_are_seen(on_emulator):
    calls = []
    on_emulator["forward"] = lambda y: calls.append(y[0, 0].add_(2.0**-7 * len(calls)))
    assert trial.disagreement(*LAYER, BF16, 0.0, torch.device("cpu")).startswith("the output of two runs")


def test_a_product_that_never_ends_is_named(on_emulator):
    def trap(y):
        raise RuntimeError("CUDA error: unspecified launch failure\nmore words")

    on_emulator["forward"] = trap
    with pytest.raises(RunError, match=r"Hopper .* \(CUDA error: unspecified launch failure\).*WIDEDEEP_SM90"):
        trial._tested(*LAYER, BF16, 0.1, torch.device("cpu"))


@pytest.mark.parametrize(("precision", "tolerance"), [("fp16", 2e-3), ("bf16", 2e-2)])
def test_whole_steps(on_emulator, monkeypatch, precision, tolerance):
    """With either route the same losses and weights to rounding, and an overflow changes nothing but the scale."""
    # On a CPU that multiplies bfloat16 the reference route would take oneDNN's products, which round before the bias.
    monkeypatch.setenv("WIDEDEEP_BF16_PRODUCTS", "own")
    want = gpu_step(config=StepConfig(precision=precision))
    losses = run(want, steps=4, B=40)
    monkeypatch.setattr(cuda, "choose_layers", lambda gemm, weights, *rest: layers.Sm90Layers(weights))
    got = gpu_step(config=StepConfig(precision=precision))
    torch.testing.assert_close(run(got, steps=4, B=40), losses, rtol=tolerance, atol=tolerance)
    assert got.gemm == "sm90"
    for name, a in want.model.named_arrays().items():
        torch.testing.assert_close(got.model.named_arrays()[name], a, rtol=0, atol=0.05 * LR, msg=name)
    if precision == "fp16":
        before = {name: a.clone() for name, a in got.model.named_arrays().items()}
        bad = batch_of(EVEN, 40, seed=9)
        bad.numeric[3, 1] = float("inf")
        got.train(bad, 4, LR)
        assert all(torch.equal(a, before[name]) for name, a in got.model.named_arrays().items())
        assert got.state()["loss_scale"] == 2**14
