"""The fused GPU step: its sums and its order on any machine, its kernels and graphs on a GPU."""

import itertools
import threading

import pytest
import torch
from test_model import MOVED, SPECS
from test_step import LR, MIXED, assert_same, batch_of, new_step, part_of, stays
from thread_comm import in_ranks
from torch.utils._python_dispatch import TorchDispatchMode

from widedeep import ops, parity
from widedeep.dist import LocalComm
from widedeep.feature_spec import CategoricalFeature, FeatureSpec, NumericFeature
from widedeep.model import WideDeep
from widedeep.ops import linear_sm90
from widedeep.step import StepConfig
from widedeep.steps.cuda import CudaStep
from widedeep.steps.cuda_ranks import RanksCudaStep
from widedeep.testing import normal

# Its deep input is 64 columns wide: nothing to pad, which only the GPU's update can skip.
EVEN = FeatureSpec(
    [
        CategoricalFeature("a", 50, 32),
        CategoricalFeature("b", 7, 16),
        CategoricalFeature("l", 30, 8, hotness=3, combiner="mean"),
    ],
    [NumericFeature(f"n{i}") for i in range(8)],
    label="y",
)
HIDDEN = [64, 32]


def gpu_step(spec=EVEN, config=None, device="cpu", comm=None, **settings):
    """The GPU's step; on a CPU its ops run there, one after the other."""
    settings = {"hidden": HIDDEN, "dropout": 0.3, "seed": 11} | settings
    model = WideDeep(spec, **settings).to(device)
    kind = CudaStep if comm is None or comm.world == 1 else RanksCudaStep
    return kind(model, config or StepConfig(), torch.device(device), comm or LocalComm(device))


def run(step, steps=6, B=96, device="cpu"):
    """Losses of some steps; a shape comes eagerly, captured and replayed, with a ragged batch between."""
    sizes = [B, B, B // 2 + 1] + [B] * (steps - 3)
    losses = [step.train(batch_of(step.model.spec, n, seed=i, device=device), i, LR) for i, n in enumerate(sizes)]
    return torch.stack(losses)


@pytest.mark.parametrize("parts", ["both", "wide", "deep"])
@pytest.mark.parametrize(("dropout", "hidden"), [(0.0, HIDDEN), (0.3, HIDDEN), (0.3, [])])
def test_matches_reference(parts, dropout, hidden, device):
    settings = {"parts": parts, "dropout": dropout, "hidden": hidden}
    want, got = new_step("reference", EVEN, device=device, **settings), gpu_step(device=device, **settings)
    batch = batch_of(EVEN, 50, device=device)
    grads = [step.gradients(batch, step=3) for step in (want, got)]
    assert grads[0].keys() == grads[1].keys()
    for name, g in grads[0].items():
        torch.testing.assert_close(grads[1][name], g, rtol=1e-4, atol=1e-6)
    for i, B in enumerate([33, 33, 64, 1, 0, 33, 33]):
        batch = batch_of(EVEN, B, seed=i, first_row=5, device=device)
        losses = [step.train(batch, i, LR) for step in (want, got)]
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
        predictions = [step.predict(batch) for step in (want, got)]
        torch.testing.assert_close(predictions[1], predictions[0], rtol=1e-4, atol=1e-5)
    assert_same(want, got, rtol=1e-3, atol=2e-5)


@pytest.mark.cuda
@pytest.mark.parametrize("name", SPECS)
def test_padding_changes_nothing(name):
    """Widths 40, 70 and 9, and deep inputs of any width."""
    settings = {"device": "cuda", "hidden": [40, 70, 9]}
    want, got = new_step("reference", name, **settings), gpu_step(SPECS[name], **settings)
    for i in range(4):
        batch = batch_of(SPECS[name], 70, seed=i, device="cuda")
        losses = [step.train(batch, i, LR) for step in (want, got)]
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
    assert_same(want, got, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_repeats_its_bits_and_resumes_with_them(precision, device):
    config = StepConfig(precision)
    first, second = (gpu_step(config=config, device=device) for _ in range(2))
    assert torch.equal(run(first, device=device), run(second, device=device))
    resumed = gpu_step(config=config, device=device)
    resumed.load_state({name: a.clone() for name, a in first.state().items()})
    for name, a in resumed.model.named_arrays().items():
        a.copy_(first.model.named_arrays()[name])
    for i in range(6, 10):
        batch = batch_of(EVEN, 96, seed=i, device=device)
        losses = [step.train(batch, i, LR) for step in (first, second, resumed)]
        assert torch.equal(losses[0], losses[1])
        assert torch.equal(losses[0], losses[2])
    for name, a in first.model.named_arrays().items():
        assert torch.equal(a, second.model.named_arrays()[name]), name
        assert torch.equal(a, resumed.model.named_arrays()[name]), name


def test_going_back_to_an_earlier_state_repeats_what_followed(device):
    """Weights and slots are written into the places that the graphs read."""
    step = gpu_step(config=StepConfig("fp16"), device=device)
    run(step, device=device)
    arrays = step.model.named_arrays()
    weights, state = ({name: a.clone() for name, a in d.items()} for d in (arrays, step.state()))
    curves = []
    for _ in range(2):
        losses = [step.train(batch_of(EVEN, 96, seed=i, device=device), i, LR) for i in range(6, 10)]
        curves.append(torch.stack([*losses, step.predict(batch_of(EVEN, 96, device=device)).sum()]))
        step.load_state(state)
        for name, a in arrays.items():
            a.copy_(weights[name])
    assert torch.equal(*curves)


def test_what_a_step_has_returned_stays(device):
    step = gpu_step(device=device)
    assert all(stays(step, [batch_of(EVEN, 20, seed=i, device=device) for i in range(2)]))


def test_reads_no_stale_buffer(device):
    clean, poisoned = gpu_step(device=device), gpu_step(device=device)
    for i, B in enumerate([64, 20, 64, 64]):
        poisoned._prepare(64)
        buffers = poisoned.activations
        for t in (
            *buffers.inputs,
            *buffers.gradients,
            buffers.wide_logit,
            buffers.logit,
            buffers.dlogit,
            poisoned.loss,
        ):
            t.fill_(float("nan"))
        poisoned.weights.flat.fill_(float("nan"))
        batch = batch_of(EVEN, B, seed=i, device=device)
        assert torch.equal(clean.train(batch, i, LR), poisoned.train(batch, i, LR))
    assert_same(clean, poisoned, rtol=0, atol=0)


def in_places(step, batch):
    """The batch as a reader leaves it that writes where the step reads."""
    places = step.places(len(batch.ids))
    for target, source in zip(places, batch[:3]):
        target.copy_(source)
    return batch._replace(ids=places[0], numeric=places[1], label=places[2])


def test_a_batch_in_its_places_gives_the_same_bits(device, monkeypatch):
    """Also where only a part of it lies there, or at another row, and when a larger batch moves the places."""
    gather = ops.gather_batch_out

    def gather_apart(rows, order, start, *, out):  # on a GPU nobody knows which row is copied first
        for a, b in itertools.product((t for t in rows if t is not None), (t for t in out if t is not None)):
            ends = [t.data_ptr() + t.numel() * t.element_size() for t in (a, b)]
            assert a.data_ptr() >= ends[1] or b.data_ptr() >= ends[0]
        gather(rows, order, start, out=out)

    monkeypatch.setattr(ops, "gather_batch_out", gather_apart)
    want, got = gpu_step(device=device), gpu_step(device=device)
    for i, B in enumerate([40, 40, 90, 40, 0, 40]):
        batch = batch_of(EVEN, B, seed=i, device=device)
        placed = in_places(got, batch)
        assert torch.equal(want.train(batch, i, LR), got.train(placed, i, LR))
    batch = batch_of(EVEN, 40, seed=7, device=device)
    assert torch.equal(want.predict(batch), got.predict(in_places(got, batch)))
    other = batch.numeric.flip(0)
    changed = in_places(got, batch)._replace(numeric=other)
    assert torch.equal(want.predict(batch._replace(numeric=other)), got.predict(changed))
    part = part_of(in_places(got, batch), 7, 33)
    assert torch.equal(want.predict(part_of(batch, 7, 33)), got.predict(part))
    moved = in_places(got, batch)
    got.places(200)
    assert torch.equal(want.predict(batch), got.predict(moved))
    assert_same(want, got, rtol=0, atol=0)


@pytest.mark.parametrize("spec", [EVEN, MOVED], ids=["even", "moved"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_ranks_give_the_result_of_one(precision, spec):
    cuts = [(0, 10, 31, 40), (0, 0, 25, 40), (0, 40, 40, 40)]

    def train(comm):
        step = gpu_step(spec, StepConfig(precision), comm=comm)
        losses = []
        for i, cut in enumerate(cuts):
            batch = batch_of(spec, 40, seed=i)
            mine = part_of(batch, cut[comm.rank], cut[comm.rank + 1]) if comm.world > 1 else batch
            losses.append(step.train(mine, i, LR))
        return torch.stack(losses), step, step.gradients(mine)

    want_losses, want, want_gradients = train(LocalComm("cpu"))
    losses, steps, gradients = zip(*in_ranks(3, train))
    rtol, atol = (1e-3, 2e-5) if precision == "fp32" else (2e-2, 2e-3)
    torch.testing.assert_close(sum(losses), want_losses, rtol=rtol / 10, atol=atol)
    for step in steps:
        assert_same(want, step, rtol=rtol, atol=atol)
    for name, g in want_gradients.items():  # of each rank's own rows
        torch.testing.assert_close(sum(each[name] for each in gradients), g, rtol=rtol, atol=atol, msg=name)


class Called(TorchDispatchMode):
    """Names of the ops that run inside."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.names.add(op.name())
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("spec", [EVEN, MOVED], ids=["even", "moved"])
@pytest.mark.parametrize("parts", ["both", "wide", "deep"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_what_is_captured_asks_nothing_and_keeps_no_workspace_of_a_library(parts, precision, spec):
    """The host must not wait inside a capture; and a graph outlives the workspace that torch lends to cuBLAS."""
    step = gpu_step(spec, StepConfig(precision), parts=parts)
    batch = batch_of(spec, 40)
    step.train(batch, 0, LR)
    fixed = step._take(batch)
    with Called() as called:
        step._train(fixed)
        step._forward_only(fixed)
    asks = {"_local_scalar_dense", "nonzero", "_unique2", "is_nonzero", "equal", "lift_fresh"}
    products = {"mm", "mv", "addmm", "addmv", "bmm", "baddbmm", "dot", "vdot", "linear"}
    assert {f"aten::{name}" for name in asks | products}.isdisjoint({n.split(".")[0] for n in called.names})
    assert any(n.startswith("widedeep::") for n in called.names)


@pytest.mark.parametrize(("precision", "during"), [("tf32", True), ("fp32", False)])
def test_only_the_products_of_a_tf32_step_are_rounded(precision, during):
    step, allowed = gpu_step(config=StepConfig(precision)), []
    step._allow_tf32 = allowed.append
    batch = batch_of(EVEN, 8)
    for run_it in (lambda: step.train(batch, 0, LR), lambda: step.predict(batch), lambda: step.gradients(batch)):
        run_it()
        assert allowed == [during, False]
        allowed.clear()
    step.layers.forward = None  # fails
    with pytest.raises(TypeError):
        step.train(batch, 1, LR)
    assert allowed == [during, False]


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["fp16", "tf32"])
def test_one_launch_for_all_layers_trains_the_same_bits(precision):
    if not linear_sm90.available(torch.device("cuda")):
        pytest.skip("the Hopper products need compute capability 9.0")
    steps, losses = [], []
    for gemm in ("sm90", "sm90-chain"):
        steps.append(gpu_step(config=StepConfig(precision, gemm=gemm), device="cuda", hidden=[512, 256, 264]))
        losses.append(run(steps[-1], B=5000, device="cuda"))
        assert steps[-1].gemm == gemm
    assert torch.equal(*losses)
    assert_same(*steps, rtol=0, atol=0)


@pytest.mark.cuda
def test_a_tf32_step_leaves_the_products_of_others_exact():
    run(gpu_step(config=StepConfig("tf32"), device="cuda"), device="cuda")
    x, y = normal(64, 512, device="cuda"), torch.empty(64, 512, device="cuda")
    weight, step = normal(512, 512, device="cuda", key="w"), torch.zeros(1, dtype=torch.int64, device="cuda")
    ops.linear_relu_dropout_out(x, weight, torch.zeros(512, device="cuda"), 0.0, 1, step, 0, 0, y=y)
    want = (x.double() @ weight.double().T).relu()
    torch.testing.assert_close(y.double(), want, rtol=0, atol=1e-5 * float(want.max()))


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_graphs_compute_what_the_plain_run_does(precision):
    from widedeep.steps.graphs import NoGraphs

    captured, plain = (gpu_step(config=StepConfig(precision), device="cuda") for _ in range(2))
    plain.graphs = NoGraphs()
    assert torch.equal(run(captured, 8, device="cuda"), run(plain, 8, device="cuda"))
    assert len(captured.graphs) == 1
    batch = batch_of(EVEN, 96, device="cuda")
    for _ in range(3):
        assert torch.equal(captured.predict(batch), plain.predict(batch))
    assert len(captured.graphs) == 2
    assert_same(plain, captured, rtol=0, atol=0)
    captured.predict(batch_of(EVEN, 200, device="cuda"))  # larger buffers: graphs of the old ones are gone
    assert len(captured.graphs) == 0
    assert torch.equal(captured.predict(batch), plain.predict(batch))


@pytest.mark.cuda
def test_runs_on_a_side_stream():
    want, got = gpu_step(device="cuda"), gpu_step(device="cuda")
    losses = run(want, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        other = run(got, device="cuda")
    stream.synchronize()
    assert torch.equal(losses, other)


@pytest.mark.cuda
def test_runs_on_another_device_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    assert torch.equal(
        run(gpu_step(device="cuda:0"), device="cuda:0").cpu(), run(gpu_step(device="cuda:1"), device="cuda:1").cpu()
    )


@pytest.mark.cuda
def test_a_reader_pins_and_copies_while_a_step_is_captured():
    want, got, stop, failures = gpu_step(device="cuda"), gpu_step(device="cuda"), threading.Event(), []
    losses = run(want, device="cuda")

    def read():
        stream = torch.cuda.Stream()
        try:
            for i in itertools.takewhile(lambda _: not stop.is_set(), itertools.count()):
                host = torch.full((1 << 16, 13 + i % 64), i % 7, dtype=torch.int32).pin_memory()
                with torch.cuda.stream(stream):
                    rows = host.to("cuda", non_blocking=True)
                    stream.record_event().synchronize()
                assert (rows == i % 7).all()
        except Exception as error:
            failures.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for _ in range(5):
            got.graphs.clear()  # and so captured again
            for i in range(3):
                got.predict(batch_of(EVEN, 96 + i, device="cuda"))
                got.predict(batch_of(EVEN, 96 + i, device="cuda"))
        assert torch.equal(run(got, device="cuda"), losses)
    finally:
        stop.set()
        reader.join()
    assert failures == []


@pytest.mark.cuda
def test_steady_state_allocates_nothing():
    step = gpu_step(config=StepConfig("fp16"), device="cuda")
    batch = batch_of(EVEN, 96, device="cuda")
    for i in range(4):
        step.train(batch, i, LR)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["num_device_alloc"], torch.cuda.memory_allocated()
    for i in range(4, 12):
        step.train(batch, i, LR)
    torch.cuda.synchronize()
    assert (torch.cuda.memory_stats()["num_device_alloc"], torch.cuda.memory_allocated()) == before


@pytest.mark.cuda
def test_fp16_learns_as_fp32_does():
    """300 steps on rows whose label follows from an id and a number: both curves end at the same loss."""
    curves = []
    for kind, precision in (("reference", "fp32"), ("fused", "fp16")):
        step = new_step(kind, EVEN, StepConfig(precision), device="cuda", hidden=[256, 256], dropout=0.1)
        losses = []
        for i in range(300):
            batch = batch_of(EVEN, 1024, seed=i, device="cuda")
            label = (batch.ids[:, 0] % 3 + batch.numeric[:, 0] > 1).float()
            losses.append(step.train(batch._replace(label=label), i, 1e-3))
        curves.append(torch.stack(losses).view(30, 10).mean(1))
    want, got = curves
    assert want[-1] < 0.8 * want[0]
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.01)


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16", "bf16"])
@pytest.mark.parametrize("name", ["tiny", "outbrain_small"])
def test_golden_files(name, precision, shared):
    quantities = parity.replay(shared / "golden" / f"{name}.npz", "cuda", "fused", precision)
    assert [f"{q.quantity}: {q.max_error:.3g} > {q.limit:.3g}" for q in quantities if not q.ok] == []


@pytest.mark.cuda
def test_is_the_default_on_a_gpu():
    assert isinstance(new_step("auto", MIXED, device="cuda"), CudaStep)


def test_the_route_is_said_once(caplog):
    caplog.set_level("INFO", "widedeep")
    step = gpu_step()
    for B in (4, 9, 30):
        step.train(batch_of(EVEN, B), B, LR)
    assert [r.getMessage() for r in caplog.records] == ["fused GPU step, fp32, hidden layers through cublaslt"]
