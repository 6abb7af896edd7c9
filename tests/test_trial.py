"""Which route the hidden layers take, with our Hopper products on the CPU emulator (tests/emulated.py)."""

import platform
import shutil

import emulated
import pytest
import torch
from test_cuda_step import EVEN, gpu_step, run
from test_model import MOVED
from test_step import LR, batch_of

from widedeep.dist import LocalComm
from widedeep.errors import RunError
from widedeep.ops import linear_sm90
from widedeep.step import StepConfig
from widedeep.steps import cuda, layers, trial

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or platform.machine() != "x86_64", reason="the CUDA emulator needs g++ on x86-64"
)

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture
def on_emulator(monkeypatch):
    """The Hopper ops run on the emulator; a list of the calls in the test's hands may spoil what they give back."""
    spoil = {}

    def forward(*args, y, masks):
        emulated.linear_sm90_out(*args, y=y, masks=masks)
        spoil.get("chain" if len(y) > 1 else "forward", lambda y: None)(y[-1])

    def dgrad(dz, weights_t, masks, *rest, dx, dbias, found_inf=None):
        emulated.linear_sm90_dgrad_out(dz, weights_t, masks, *rest, dx=dx, dbias=dbias, found_inf=found_inf)
        last = ((*masks, None)[len(dx) - 1], dx[-1], (*dbias, None)[len(dx) - 1], found_inf)
        spoil.get("chain_dgrad" if len(dx) > 1 else "dgrad", lambda *out: None)(*last)

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
    seconds = {"sm90-chain": 99.0, "sm90": 1.0, "cublaslt": 2.0}
    monkeypatch.setattr(trial, "_seconds_of", lambda routes, *rest: [seconds[route.name] for route in routes])
    monkeypatch.setattr(trial, "CHAIN_REPEATS", 1)
    monkeypatch.setattr(linear_sm90, "available", lambda device: True)
    monkeypatch.setattr(trial, "_kept", {})
    return seconds


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ((9, 2, 3), "sm90"),
        ((9, 2.01, 2), "sm90"),
        ((9, 2.05, 2), "cublaslt"),
        ((2.01, 2, 3), "sm90"),
        ((1.99, 2, 3), "sm90-chain"),
        ((2.06, 2.05, 2), "cublaslt"),
        ((2.05, 2.01, 2), "sm90"),
        ((2.01, 2.05, 2), "sm90-chain"),
    ],
)
def test_the_fastest_route_is_kept(timed, seconds, chosen):
    """Of those within two hundredths ours; of ours, whose bits are the same, the faster."""
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


def test_a_run_keeps_its_route_where_batches_grow(timed):
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


class Second(LocalComm):
    """One of two processes, the first of which takes our products and has no rows."""

    rank, world = 1, 2

    def all_gather_rows(self, tensor, lengths=None):
        if lengths != [1, 1]:
            return tensor
        no_rows, route = torch.zeros_like(tensor), torch.full_like(tensor, trial.ROUTES.index("sm90"))
        return torch.cat([route if tensor.dim() == 1 else no_rows, tensor])


def test_ranks_take_the_route_of_the_first(timed):
    """Whatever their own clocks say; where the batches of one of them grow too, and after a resumption."""
    timed["sm90"] = 9.0
    step = gpu_step(config=StepConfig(precision="fp16"), comm=Second("cpu"))
    step.predict(batch_of(EVEN, 40))
    assert step.gemm == "cublaslt"
    for i, rows in enumerate((40, 60)):
        step.train(batch_of(EVEN, rows), i, LR)
        assert (step.gemm, int(step.state()["route"])) == ("sm90", trial.ROUTES.index("sm90"))


def test_routes_are_compared_again_where_batches_grow(monkeypatch):
    compared = []

    def choose(gemm, weights, precision, p, buffers, resumed, alone):
        compared.append(buffers.capacity)
        return layers.Layers(weights)

    monkeypatch.setattr(cuda, "choose_layers", choose)
    step = gpu_step()
    for B in (8, 8, 4, 20, 8, 20):
        step.predict(batch_of(EVEN, B))
    assert compared == [8, 20]


@pytest.mark.parametrize("precision", ["fp16", "tf32"])
def test_routes_are_compared_on_the_weights_of_the_model(precision, monkeypatch):
    """On zeros they would agree whatever they do."""
    compared = []

    def choose(gemm, weights, *rest, **alone):
        for name, copy in weights.copies.items():
            compared.append(torch.equal(weights.unpadded(name, copy), weights.masters[name].to(copy.dtype)))
        return layers.Layers(weights)

    monkeypatch.setattr(cuda, "choose_layers", choose)
    step = gpu_step(MOVED, config=StepConfig(precision))
    step.predict(batch_of(MOVED, 8))
    assert compared == [True] * len(step.weights.copies)


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
    words = "hidden layers: using cublaslt from here on; sm90 was used until now"
    assert [record.message for record in caplog.records].count(words) == 2
    assert resumed.state()["route"] == elsewhere.state()["route"] == trial.ROUTES.index("cublaslt")


def test_a_route_that_disagrees_is_left_out_and_named(timed, on_emulator, caplog):
    on_emulator["forward"] = lambda y: y[3].mul_(1.1)
    step = gpu_step(config=StepConfig(precision="fp16"))
    step.predict(batch_of(EVEN, 40))
    assert step.gemm == "cublaslt"
    assert "not using the Hopper products: they disagree with cuBLASLt: the output" in caplog.text


def test_a_route_is_timed_forward_and_back(on_emulator, monkeypatch):
    """On random numbers that nobody else misses."""
    monkeypatch.setattr(trial, "TURN", 0.0)
    monkeypatch.setattr(trial, "ROUNDS", 1)
    step = gpu_step(config=StepConfig(precision="fp16"))
    before = torch.get_rng_state()
    routes = [kind(step.weights) for kind in (layers.Sm90Chain, layers.Sm90Layers, layers.Layers)]
    times = trial._seconds_of(routes, 0.1, step.activations, 30)
    assert len(times) == 3
    assert min(times) > 0
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("where", "fault", "found"),
    [
        ("chain", lambda y: y[5, 3].add_(1), "the output of layer 1"),
        ("chain_dgrad", lambda mask, dx, dbias, found: dx[7, 1].add_(1), "the gradient of layer 0"),
        (None, None, None),
    ],
)
def test_a_chain_that_differs_is_seen(on_emulator, monkeypatch, where, fault, found):
    monkeypatch.setattr(trial, "CHAIN_REPEATS", 2)
    step = gpu_step(config=StepConfig(precision="fp16"))
    on_emulator[where] = fault
    routes = [kind(step.weights) for kind in (layers.Sm90Chain, layers.Sm90Layers)]
    assert trial.bits_difference(*routes, 0.1, step.activations, 300) == found


def test_a_chain_makes_the_bits_of_its_layers(on_emulator, monkeypatch):
    monkeypatch.setattr(trial, "CHAIN_REPEATS", 1)
    step = gpu_step(config=StepConfig(precision="bf16"))
    routes = [kind(step.weights) for kind in (layers.Sm90Chain, layers.Sm90Layers)]
    assert trial.bits_difference(*routes, 0.1, step.activations, 300) is None


def test_a_chain_that_differs_is_left_out_and_named(timed, on_emulator, caplog):
    timed["sm90-chain"] = 0.5
    on_emulator["chain"] = lambda y: y[5, 3].add_(1)
    step = gpu_step(config=StepConfig(precision="fp16"))
    step.predict(batch_of(EVEN, 40))
    assert step.gemm == "sm90"
    assert "not using sm90-chain: its results are not bit-identical to those of sm90: the output" in caplog.text


def test_a_run_goes_on_in_one_launch_where_that_is_faster(timed, monkeypatch, caplog):
    """A checkpoint binds to bits, and these are the same."""
    first, resumed = (gpu_step(config=StepConfig(precision="fp16")) for _ in range(2))
    first.train(batch_of(EVEN, 40), 0, LR)
    monkeypatch.setattr(trial, "_kept", {})  # another process
    timed["sm90-chain"] = 0.5
    resumed.load_state(first.state())
    resumed.train(batch_of(EVEN, 40), 1, LR)
    assert (first.gemm, resumed.gemm) == ("sm90", "sm90-chain")
    assert resumed.state()["route"] == first.state()["route"]
    assert "from here on" not in caplog.text
    assert resumed.activations.apart
    assert not first.activations.apart


def test_tf32_makes_no_chain_unless_asked(timed):
    timed["sm90-chain"] = 0.5
    for gemm, taken in (("auto", "sm90"), ("sm90-chain", "sm90-chain")):
        step = gpu_step(config=StepConfig(precision="tf32", gemm=gemm))
        step.predict(batch_of(EVEN, 40))
        assert step.gemm == taken


@pytest.mark.parametrize(("capability", "there"), [((8, 9), False), ((9, 0), True), ((10, 0), False), ((12, 0), False)])
def test_hopper_products_are_for_hopper_alone(monkeypatch, capability, there):
    monkeypatch.setattr(linear_sm90._load, "has_cuda_kernels", True)
    monkeypatch.delenv("WIDEDEEP_SM90", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert linear_sm90.available(torch.device("cuda")) == there


class TwoRanks(LocalComm):
    world = 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"hidden": [64]}, "a launch takes 2 to 8 layers, the model has 1"),
        ({"comm": TwoRanks("cpu")}, "there are several ranks, and none may wait for another inside a launch"),
    ],
)
def test_where_there_can_be_no_chain(timed, caplog, settings, words):
    timed["sm90-chain"] = 0.5
    for gemm in ("auto", "sm90-chain"):
        step = gpu_step(config=StepConfig(precision="fp16", gemm=gemm), **settings)
        step.predict(batch_of(EVEN, 40))
        assert step.gemm == "sm90"
    assert [r.message for r in caplog.records if "not sm90-chain" in r.message] == [
        f"hidden layers: using sm90, not sm90-chain: {words}"
    ]


@pytest.mark.parametrize(
    ("where", "fault", "found"),
    [
        ("forward", lambda y: y[64:128, 8:16].zero_(), "the mask"),
        ("forward", lambda y: y[3].mul_(1.1), "the output"),
        ("dgrad", lambda mask, dx, dbias, found: dx[64:].zero_(), "the gradient"),
        ("dgrad", lambda mask, dx, dbias, found: dbias is None or dbias[5:7].zero_(), "the bias gradient"),
        ("dgrad", lambda mask, dx, dbias, found: mask is None and dx[:, 8].zero_(), "the input's gradient"),
        ("dgrad", lambda mask, dx, dbias, found: found is None or found.zero_(), "the finiteness of the input"),
    ],
)
def test_what_a_wrong_product_is_called(on_emulator, where, fault, found):
    on_emulator[where] = fault
    assert trial.disagreement(*LAYER, BF16, 0.1, torch.device("cpu")).startswith(found)


def test_bits_that_change_are_seen(on_emulator):
    calls = []
    on_emulator["forward"] = lambda y: calls.append(y[0, 0].add_(2.0**-7 * len(calls)))
    assert trial.disagreement(*LAYER, BF16, 0.0, torch.device("cpu")).startswith("the output of a second run")


def test_a_product_that_never_ends_is_named(on_emulator):
    def trap(y):
        raise RuntimeError("CUDA error: unspecified launch failure\nmore words")

    on_emulator["forward"] = trap
    with pytest.raises(RunError, match=r"Hopper .* \(CUDA error: unspecified launch failure\).*WIDEDEEP_SM90"):
        trial._tested("wrong", trial.disagreement, *LAYER, BF16, 0.1, torch.device("cpu"))


def test_no_memory_for_a_chain_costs_the_chain_alone(timed, on_emulator, caplog):
    def full(y):
        raise torch.OutOfMemoryError("CUDA out of memory")

    timed["sm90-chain"] = 0.5
    on_emulator["chain"] = full
    step = gpu_step(config=StepConfig(precision="fp16"))
    step.train(batch_of(EVEN, 40), 0, LR)
    assert (step.gemm, step.activations.apart) == ("sm90", False)
    assert "not enough memory to try one launch for all layers" in caplog.text


@pytest.mark.parametrize(("what", "taken"), [("forward", "cublaslt"), ("chain", "sm90")])
def test_a_launch_that_is_refused_costs_its_route_alone(timed, on_emulator, monkeypatch, caplog, what, taken):
    def refuse(y):
        raise RuntimeError("CUDA error: invalid configuration argument\nmore words")

    on_emulator[what] = refuse
    monkeypatch.setattr(trial, "_gpu_is_lost", lambda: False)
    step = gpu_step(config=StepConfig(precision="fp16"))
    step.train(batch_of(EVEN, 40), 0, LR)
    assert step.gemm == taken
    assert ": a launch failed (CUDA error: invalid configuration argument)" in caplog.text


@pytest.mark.parametrize(("precision", "tolerance"), [("fp16", 2e-3), ("bf16", 2e-2)])
def test_whole_steps(on_emulator, monkeypatch, precision, tolerance):
    """With either route the same losses and weights to rounding, and an overflow changes nothing but the scale."""
    # On a CPU that multiplies bfloat16 the reference route would take oneDNN's products, which round before the bias.
    monkeypatch.setenv("WIDEDEEP_BF16_PRODUCTS", "own")
    want = gpu_step(config=StepConfig(precision=precision))
    losses = run(want, steps=4, B=40)
    monkeypatch.setattr(cuda, "choose_layers", lambda gemm, weights, *rest, **alone: layers.Sm90Layers(weights))
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
