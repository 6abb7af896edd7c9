"""The model and its optimizers beside what else torch has: defaults of dtype and device, checkpoints of activations,
FSDP2, hooks of layers, derivatives, frozen tables.
"""

import copy
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from ranks import run_ranks
from test_model import SPECS, inputs
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from widedeep.data import Batch
from widedeep.errors import InputError
from widedeep.feature_spec import CategoricalFeature, FeatureSpec, NumericFeature
from widedeep.model import WideDeep
from widedeep.optim import FTRL, RMSprop
from widedeep.step import make_step

SPEC = SPECS["some wide only"]
BATCHES = [inputs(SPEC, 33, seed=seed) for seed in range(3)]


@pytest.fixture
def default_dtype(request):
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def default_device():
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def trained(parts="both", sparse=True):
    """A model after three steps."""
    model = WideDeep(SPEC, hidden=[7, 5], seed=4, parts=parts, sparse=sparse)
    optimizers = [RMSprop(model.deep_parameters())] if model.has_deep else []
    optimizers += [FTRL(model.wide_parameters())] if model.has_wide else []
    for ids, numeric, label in BATCHES:
        loss = binary_cross_entropy_with_logits(model(ids, numeric), label)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    return model


def assert_same_state(got, want):
    got, want = got.state_dict(), want.state_dict()
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=0)


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("parts", ["both", "wide", "deep"])
@pytest.mark.parametrize("default_dtype", [torch.float64, torch.bfloat16], indirect=True, ids=str)
def test_weights_are_float32_whatever_the_default(parts, sparse, default_dtype):
    model = trained(parts, sparse)
    torch.set_default_dtype(torch.float32)
    assert_same_state(model, trained(parts, sparse))


@pytest.mark.parametrize("parts", ["both", "wide", "deep"])
def test_a_model_is_made_on_the_default_device(parts, default_device):
    model = WideDeep(SPEC, hidden=[7, 5], seed=4, parts=parts)
    assert {t.device.type for t in model.state_dict().values()} == {"meta"}
    with torch.device("cpu"):
        here = WideDeep(SPEC, hidden=[7, 5], seed=4, parts=parts)
    assert {t.device.type for t in here.state_dict().values()} == {"cpu"}
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in here.parameters()]
    torch.set_default_device(None)
    assert_same_state(here, WideDeep(SPEC, hidden=[7, 5], seed=4, parts=parts))


def test_a_model_trains_beside_another_default_device(default_device):
    with torch.device("cpu"):
        model = WideDeep(SPEC, hidden=[7, 5], seed=4)
    loss = binary_cross_entropy_with_logits(model(*BATCHES[0][:2]), BATCHES[0][2])
    loss.backward()
    optimizers = [RMSprop(model.deep_parameters()), FTRL(model.wide_parameters())]
    for optimizer in optimizers:
        optimizer.step()
    assert {t.device.type for t in model.state_dict().values()} == {"cpu"}
    assert all(p.grad.to_dense().isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_repeated_call_without_its_step_is_refused(reentrant):
    model = WideDeep(SPEC, hidden=[7, 5], seed=4, dropout=0.5)
    ids, numeric, _ = BATCHES[0]
    numeric = numeric.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="dropout: expected a step in a call that autograd repeats"):
        checkpoint(model, ids, numeric, use_reentrant=reentrant).sum().backward()
    model.dropout = 0.0
    checkpoint(model, ids, numeric, use_reentrant=reentrant).sum().backward()
    want = model.layers[0].weight.grad.clone()
    model.zero_grad()
    model(ids, numeric).sum().backward()
    assert torch.equal(model.layers[0].weight.grad, want)
    model.eval().dropout = 0.5
    checkpoint(model, ids, numeric, use_reentrant=reentrant).sum().backward()


def test_other_derivatives_are_refused():
    model = WideDeep(SPEC, hidden=[7, 5], seed=4)
    ids, numeric, _ = BATCHES[0]
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def of_weights(weights):
        return torch.func.functional_call(model, weights, (ids, numeric)).sum()

    for function, argument in ((lambda numeric: model(ids, numeric), numeric), (of_weights, weights)):
        tangent = torch.utils._pytree.tree_map(torch.ones_like, argument)
        with pytest.raises(NotImplementedError, match="WideDeep has no forward-mode derivative"):
            torch.func.jvp(function, (argument,), (tangent,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="WideDeep has no forward-mode derivative"):
        model(ids, forward_ad.make_dual(numeric, torch.ones_like(numeric)))
    words = r"WideDeep takes no part in torch\.func\.grad, vjp or vmap"
    with pytest.raises(NotImplementedError, match=words):
        torch.func.grad(of_weights)(weights)
    with pytest.raises(NotImplementedError, match=words):
        torch.func.vmap(lambda ids, numeric: model(ids[None], numeric[None]))(ids, numeric)
    count = model.dropout_step.clone()
    functional = torch.func.functionalize(lambda numeric: model(ids, numeric, step=count))(numeric)
    assert torch.equal(functional, model(ids, numeric))


class Sizes(TorchDispatchMode):
    """Notes the shape of every tensor of zeros that is made."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.new_zeros.default:
            self.seen.append(tuple(args[1]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("frozen", [[], [1], [1, 3], [1, 3, "wide"]], ids=str)
def test_dense_gradients_of_frozen_tables_are_not_made(frozen):
    model, whole = (WideDeep(SPEC, hidden=[7, 5], seed=4, dropout=0.0, sparse=False) for _ in range(2))
    for name in frozen:
        (model.wide if name == "wide" else model.tables[name]).requires_grad_(False)
    loss = model(*BATCHES[0][:2]).square().sum()
    with Sizes() as sizes:
        loss.backward()
    trained = [tuple(t.shape) for t in (*model.tables, model.wide) if t.requires_grad]
    assert sizes.seen == trained
    whole(*BATCHES[0][:2]).square().sum().backward()
    for a, b in zip(model.parameters(), whole.parameters()):
        assert a.grad is None if not a.requires_grad else torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("kind", ["fused", "reference"])
def test_a_step_refuses_some_frozen_weights(kind):
    model = WideDeep(SPEC, hidden=[7, 5], seed=4)
    assert not model.tables[0].requires_grad  # has no columns
    make_step(kind, model)
    model.tables[1].requires_grad_(False)
    with pytest.raises(InputError, match="step: expected a model without frozen weights"):
        make_step(kind, model)
    ids, numeric, label = BATCHES[0]
    got = make_step(kind, model.requires_grad_(False)).predict(Batch(ids, numeric, label, None, 0, len(ids)))
    torch.testing.assert_close(got, model.eval()(ids, numeric))


def test_sizes_and_seed_may_be_integers_of_numpy():
    sizes = np.array([7, 5])
    assert_same_state(WideDeep(SPEC, sizes, seed=sizes[0]), WideDeep(SPEC, [7, 5], seed=7))
    assert json.dumps(WideDeep(SPEC, sizes, seed=sizes[0]).hidden) == "[7, 5]"
    with pytest.raises(InputError, match=r"seed: expected an integer .* got 1\.5"):
        WideDeep(SPEC, sizes, seed=1.5)


def test_layers_are_read_not_called():
    model, plain = (WideDeep(SPEC, hidden=[7, 5], seed=4, dropout=0.0) for _ in range(2))
    seen = []
    model.register_forward_hook(lambda *_: seen.append("model"))
    model.layers[0].register_forward_hook(lambda *_: seen.append("layer"))
    assert torch.equal(model(*BATCHES[0][:2]), plain(*BATCHES[0][:2]))
    assert seen == ["model"]
    torch.nn.utils.parametrizations.weight_norm(model.layers[0])
    torch.testing.assert_close(model(*BATCHES[0][:2]), plain(*BATCHES[0][:2]))
    with torch.no_grad():
        model.layers[0].parametrizations.weight.original0.mul_(2)
        plain.layers[0].weight.mul_(2)
    torch.testing.assert_close(model(*BATCHES[0][:2]), plain(*BATCHES[0][:2]))
    model(*BATCHES[0][:2]).sum().backward()
    assert model.layers[0].parametrizations.weight.original1.grad.any()


@pytest.mark.parametrize("sparse", [True, False])
def test_compiled_once_for_all_sizes_of_batches(sparse, device):
    model, eager = (WideDeep(SPECS["multi-hot only"], [9, 6], 0.5, seed=3, sparse=sparse).to(device) for _ in range(2))
    torch.compiler.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    for B in (16, 9, 30):
        ids, numeric, _ = inputs(model.spec, B, device)
        for tensor in (ids, numeric):
            torch._dynamo.mark_dynamic(tensor, 0)
        torch.testing.assert_close(compiled(ids, numeric), eager(ids, numeric))
        for m in (model, eager):
            m.zero_grad()
        compiled(ids, numeric).square().sum().backward()
        eager(ids, numeric).square().sum().backward()
        torch.testing.assert_close(model.tables[0].grad.to_dense(), eager.tables[0].grad.to_dense())
    assert graphs.frame_count == 1


def test_the_count_of_calls_is_one_tensor(device):
    model, eager = (WideDeep(SPEC, hidden=[7, 5], seed=4, dropout=0.5).to(device) for _ in range(2))
    ids, numeric, _ = (t.to(device) for t in BATCHES[0])
    count, before = model.dropout_step, copy.deepcopy(model.state_dict())
    with torch.inference_mode():  # a count made anew in it could not be written outside
        assert torch.equal(model(ids, numeric), eager(ids, numeric))
    assert model.dropout_step is count
    assert count == 1
    model.load_state_dict(before)
    assert count == 0
    program = torch.export.export(model, (ids, numeric), strict=True).module()
    with torch.no_grad():
        for number in range(3):
            step = torch.tensor([number], device=device)
            torch.testing.assert_close(program(ids, numeric), eager(ids, numeric, step=step))


def test_on_meta_no_memory_is_taken():
    spec = FeatureSpec([CategoricalFeature("a", 2**30, 2**16)], [NumericFeature("x")], label="y")  # 256 TiB
    with torch.device("meta"):
        model = WideDeep(spec, [3], seed=1)
    assert {t.device.type for t in model.state_dict().values()} == {"meta"}
    with torch.device("meta"):
        small = WideDeep(SPEC, hidden=[7, 5], seed=4)
    small.to_empty(device="cpu").load_state_dict(trained().state_dict())
    torch.testing.assert_close(small.eval()(*BATCHES[0][:2]), trained().eval()(*BATCHES[0][:2]))


FULLY_SHARDED = """
import os, sys, torch
sys.path.insert(0, "tests")
from test_model import SPECS, WideDeep, inputs
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy
from widedeep.errors import InputError
from widedeep.optim import RMSprop
from widedeep.step import make_step
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
model, alone = (WideDeep(SPECS["some wide only"], [9, 6], 0.5, seed=3, sparse=False) for _ in range(2))
fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (2,)))
optimizers = [torch.optim.Adam(m.parameters(), 0.01) for m in (model, alone)]
for i in range(4):
    ids, numeric, label = inputs(model.spec, 16, seed=i)
    mine = slice(rank * 8, rank * 8 + 8)
    for optimizer in optimizers:
        optimizer.zero_grad()
    cross_entropy(model(ids[mine], numeric[mine], first_row=mine.start), label[mine]).backward()
    cross_entropy(alone(ids, numeric), label).backward()
    for a, b in zip(model.parameters(), alone.parameters()):
        if b.grad is not None:
            torch.testing.assert_close(a.grad.full_tensor(), b.grad, rtol=1e-4, atol=1e-6)
    for optimizer in optimizers:
        optimizer.step()
try:
    RMSprop(model.deep_parameters()).step()
    raise SystemExit("RMSprop took a DTensor")
except NotImplementedError as error:
    assert "rmsprop" in str(error)
try:
    make_step("auto", model)
    raise SystemExit("a step took a DTensor")
except InputError as error:
    assert str(error) == "step: expected whole weights, got a DTensor for wide", error
torch.distributed.destroy_process_group()
os._exit(0)
"""


def test_fully_sharded_ranks_give_the_gradients_of_one_process():
    run_ranks(2, "-c", FULLY_SHARDED)


class Adds(TorchDispatchMode):
    """The index of every `index_add_`, and how many rows it adds to."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.index_add_.default:
            self.seen.append((args[2], len(args[0])))
        return func(*args, **(kwargs or {}))


def test_dense_gradients_add_their_padding_to_many_rows(device):
    """Where a batch names one row of a table again and again: a GPU adds to one row one after the other, zeros too."""
    spec = FeatureSpec([CategoricalFeature("a", 700, 3), CategoricalFeature("b", 900, 2, hotness=2)], [], label="y")
    model = WideDeep(spec, hidden=[4], seed=1, sparse=False).to(device)
    ids = torch.full((800, 3), 5, dtype=torch.int32, device=device)
    with Adds() as adds:
        model(ids, torch.empty(800, 0, device=device)).sum().backward()
    assert len(adds.seen) == 3
    for index, rows in adds.seen:
        assert index.bincount().max() <= -(-len(index) // rows) + 1
    assert model.wide.grad.count_nonzero() == 2


def test_sparse_gradients_bring_no_warning_of_torch():
    """torch 2.11 has one, which it says once: in a process of its own."""
    code = (
        "import warnings, torch, widedeep; from test_model import SPECS, inputs;"
        "warnings.simplefilter('error'); spec = SPECS['one-hot and multi-hot'];"
        "widedeep.WideDeep(spec, hidden=[4])(*inputs(spec, 9)[:2]).sum().backward()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
