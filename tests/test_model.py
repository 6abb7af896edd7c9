"""The model: its size, initial values, forward pass and gradients."""

import math
from itertools import pairwise

import pytest
import torch
from ranks import run_ranks
from torch.utils.checkpoint import checkpoint

from widedeep.data import Batch
from widedeep.errors import InputError
from widedeep.feature_spec import CategoricalFeature, FeatureSpec, NumericFeature
from widedeep.model import WideDeep
from widedeep.optim import FTRL, RMSprop
from widedeep.step import make_step

SPECS = {
    "one-hot and multi-hot": FeatureSpec(
        [
            CategoricalFeature("a", 11, 4),
            CategoricalFeature("c", 6, 3),
            CategoricalFeature("l", 9, 5, hotness=3),
            CategoricalFeature("m", 8, 2, hotness=2, combiner="mean"),
        ],
        [NumericFeature("b"), NumericFeature("m_"), NumericFeature("B")],
        label="y",
    ),
    "no categorical": FeatureSpec([], [NumericFeature("x"), NumericFeature("w")], label="y"),
    "no numeric": FeatureSpec([CategoricalFeature("a", 5, 3), CategoricalFeature("b", 4, 2)], [], label="y"),
    "multi-hot only": FeatureSpec([CategoricalFeature("l", 9, 5, hotness=4)], [], label="y"),
    "some wide only": FeatureSpec(
        [
            CategoricalFeature("z", 40, 0),
            CategoricalFeature("a", 11, 4),
            CategoricalFeature("s", 8, 0, hotness=2),
            CategoricalFeature("l", 9, 5, hotness=3),
            CategoricalFeature("m", 7, 0, hotness=3, combiner="mean"),
        ],
        [NumericFeature("b")],
        label="y",
    ),
}
# Numerics between the tables, whose columns the GPU's step moves: once with columns to pad, once (64) without.
MOVED, MOVED_64 = (
    FeatureSpec(
        [
            CategoricalFeature("c", 50, 8),
            CategoricalFeature("e", 7, 16),
            CategoricalFeature("m", 6, last),
            CategoricalFeature("g", 9, 5, hotness=2),
            CategoricalFeature("k", 30, 16, hotness=3, combiner="mean"),
        ],
        [NumericFeature(name) for name in "adfz"],
        label="y",
    )
    for last in (3, 15)
)


def inputs(spec, B, device="cpu", seed=0):
    """Random ids (multi-hot lists end in padding, some are empty), numerics and labels."""
    g = torch.Generator().manual_seed(1000 * B + seed)
    columns = []
    for f in spec.categorical:
        ids = torch.randint(f.cardinality, (B, f.hotness), generator=g, dtype=torch.int32)
        if f.hotness > 1:
            length = torch.randint(f.hotness + 1, (B, 1), generator=g)
            ids[torch.arange(f.hotness) >= length] = -1
        columns.append(ids)
    ids = torch.cat(columns, 1) if columns else torch.empty(B, 0, dtype=torch.int32)
    numeric = torch.randn(B, len(spec.numeric), generator=g)
    label = (torch.rand(B, generator=g) < 0.4).float()
    return ids.to(device), numeric.to(device), label.to(device)


def slow_logits(model, ids, numeric):
    """Row by row in float64, from the checkpoint's names: (wide, deep)."""
    spec, w = model.spec, {name: a.double().cpu() for name, a in model.named_arrays().items()}
    wide, deep = [], []
    for row, numbers in zip(ids.tolist(), numeric.double().cpu()):
        pieces = {f.name: numbers[i : i + 1] for i, f in enumerate(spec.numeric)}
        total = w["wide.bias"][0] if model.has_wide else torch.tensor(0.0)
        if model.has_wide:
            total = total + (numbers * w["wide.numeric.weight"]).sum()
        first = 0
        for f in spec.categorical:
            named = [i for i in row[first : first + f.hotness] if i >= 0]
            first += f.hotness
            if model.has_wide:
                total = total + sum(w[f"wide.table.{f.name}"][i] for i in named)
            if model.has_deep:
                vector = sum((w[f"deep.table.{f.name}"][i] for i in named), torch.zeros(f.dim).double())
                if f.combiner == "mean" and named:
                    vector = vector / len(named)
                pieces[f"{f.name}_embedding"] = vector
        wide.append(total)
        if model.has_deep:
            h = torch.cat([pieces[name] for name in sorted(pieces)])
            for i in range(len(model.hidden)):
                h = torch.relu(w[f"deep.layer.{i}.weight"] @ h + w[f"deep.layer.{i}.bias"])
            deep.append((w["deep.out.weight"] @ h + w["deep.out.bias"])[0])
    zeros = torch.zeros(len(ids)).double()
    return torch.stack(wide) if model.has_wide else zeros, torch.stack(deep) if model.has_deep else zeros


@pytest.fixture(scope="module")
def outbrain():
    return WideDeep(FeatureSpec.outbrain(), seed=1)


def test_outbrain_has_the_published_number_of_parameters(outbrain):
    assert sum(p.numel() for p in outbrain.parameters()) == 90_512_767
    assert sum(a.numel() for a in outbrain.named_arrays().values()) == 90_512_767


def test_initial_tables_are_truncated_normal(outbrain):
    for f, table in zip(outbrain.spec.categorical, outbrain.tables):
        std = math.sqrt(2 / (f.cardinality + f.dim))
        n = table.numel()
        assert table.abs().max() <= 2.2737 * std
        if n > 10_000:
            assert table.std().item() == pytest.approx(std, rel=4 / math.sqrt(n))
            assert abs(table.mean().item()) < 5 * std / math.sqrt(n)
            assert table.abs().max() > 2.2 * std


def test_initial_layers_are_glorot_uniform_and_biases_zero(outbrain):
    widths = [989, 1024, 1024, 1024, 1024, 1024, 1]
    for layer, (i, o) in zip([*outbrain.layers, outbrain.out], pairwise(widths)):
        assert layer.weight.shape == (o, i)
        limit = math.sqrt(6 / (i + o))
        assert 0.98 * limit < layer.weight.abs().max() <= limit
        assert layer.weight.std().item() == pytest.approx(limit / math.sqrt(3), rel=0.05)
        assert (layer.bias == 0).all()


def test_initial_wide_weights(outbrain):
    assert -0.05 <= outbrain.wide.min() < -0.0499
    assert 0.0499 < outbrain.wide.max() < 0.05
    assert outbrain.wide_numeric.abs().max() <= math.sqrt(6 / 14)
    assert outbrain.wide_numeric.abs().max() > 0.1
    assert (outbrain.wide_bias == 0).all()
    zeros = WideDeep(SPECS["one-hot and multi-hot"], hidden=[4], wide_init="zeros", seed=1)
    assert not zeros.wide.any()
    assert not zeros.wide_numeric.any()


def test_a_seed_fixes_the_weights():
    spec = SPECS["one-hot and multi-hot"]
    a, b, c = (WideDeep(spec, hidden=[4, 3], seed=seed) for seed in (7, 7, 8))
    for name, array in a.named_arrays().items():
        assert torch.equal(array, b.named_arrays()[name])
    assert not torch.equal(a.wide, c.wide)
    fresh = [WideDeep(spec, hidden=[4]) for _ in range(2)]
    assert fresh[0].seed != fresh[1].seed
    again = WideDeep(spec, hidden=[4], seed=fresh[0].seed)
    assert torch.equal(again.out.weight, fresh[0].out.weight)
    torch.manual_seed(3)
    one = WideDeep(spec, hidden=[4])
    torch.manual_seed(3)
    assert WideDeep(spec, hidden=[4]).seed == one.seed


@pytest.mark.parametrize("parts", ["both", "wide", "deep"])
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("hidden", [[], [7, 5]], ids=str)
def test_forward_matches_a_slow_one(name, parts, hidden, device):
    model = WideDeep(SPECS[name], hidden=hidden, seed=2, parts=parts).to(device).eval()
    for B in (1, 6):
        ids, numeric, _ = inputs(model.spec, B, device)
        wide, deep = slow_logits(model, ids, numeric)
        for got, want in zip(model.parts(ids, numeric), (wide, deep)):
            assert got.dtype == torch.float32
            torch.testing.assert_close(got.cpu().double(), want, rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(model(ids, numeric).cpu().double(), wide + deep, rtol=1e-5, atol=2e-6)
    assert model(*inputs(model.spec, 0, device)[:2]).shape == (0,)


@pytest.mark.parametrize("parts", ["both", "wide", "deep"])
@pytest.mark.parametrize("name", SPECS)
def test_a_loop_of_ones_own_gives_what_the_step_gives(name, parts, device):
    """Autograd through the model and our optimizers, against the step, which has its own backward pass."""
    models = [WideDeep(SPECS[name], hidden=[9, 6], dropout=0.0, seed=3, parts=parts).to(device) for _ in range(2)]
    model = models[0].train()
    parts = ((RMSprop, model.deep_parameters()), (FTRL, model.wide_parameters()))
    assert sum(len(weights) for _, weights in parts) == len([*model.parameters()])
    optimizers = [kind(weights) for kind, weights in parts if weights]
    step = make_step("auto", models[1], device=device)
    for i in range(5):
        ids, numeric, label = inputs(model.spec, 16, device, seed=i)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(model(ids, numeric), label)
        model.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        got = step.train(Batch(ids, numeric, label, None, 0, 16), i, 1.2e-4)
        torch.testing.assert_close(got, loss.detach(), rtol=1e-5, atol=1e-6)
    for array_name, want in models[1].named_arrays().items():
        torch.testing.assert_close(model.named_arrays()[array_name], want, rtol=2e-4, atol=2e-6, msg=array_name)


@pytest.mark.parametrize("parts", ["both", "wide", "deep"])
def test_an_encoder_before_the_model_learns(parts, device):
    """The gradient of numerics, against differences of float64 logits."""
    model = WideDeep(SPECS["one-hot and multi-hot"], hidden=[9, 6], dropout=0.0, seed=3, parts=parts).to(device)
    ids, numeric, _ = inputs(model.spec, 6, device)
    numeric.requires_grad_()
    model(ids, numeric).sum().backward()
    for n in range(numeric.shape[1]):
        change = torch.zeros(numeric.shape[1], device=device)
        change[n] = 1e-6
        above, below = (sum(slow_logits(model, ids, numeric.detach().double() + s * change)) for s in (1, -1))
        want = (above - below) / 2e-6
        torch.testing.assert_close(numeric.grad[:, n].cpu().double(), want, rtol=1e-4, atol=1e-5)


def test_forward_takes_integers_and_floats_of_any_type_and_stride(device):
    model = WideDeep(SPECS["one-hot and multi-hot"], hidden=[9], seed=3).to(device).eval()
    ids, numeric, _ = inputs(model.spec, 16, device)
    want = model(ids, numeric)
    wider = torch.cat([ids, ids], 1).long()
    assert torch.equal(model(wider[:, : ids.shape[1]], numeric.double()), want)
    assert torch.equal(model(ids.T.contiguous().T, numeric.T.contiguous().T), want)
    assert torch.equal(model(ids, numeric.half()), model(ids, numeric.half().float()))
    for dtype in (torch.int8, torch.int16):
        assert torch.equal(model(ids.to(dtype), numeric), want)
    for wrong in (ids.float(), ids > 0):
        with pytest.raises(TypeError, match="ids: expected integers, got torch"):
            model(wrong, numeric)


def test_weights_may_change_between_a_call_and_its_gradients(device):
    """Those that no gradient needs: of the wide part all."""
    model = WideDeep(SPECS["one-hot and multi-hot"], seed=3, parts="wide").to(device)
    ids, numeric, _ = inputs(model.spec, 16, device)
    first, second = model(ids, numeric).sum(), model(ids, numeric).sum()
    second.backward()
    FTRL(model.parameters()).step()
    first.backward()


def test_ids_beyond_32_bits_are_refused():
    model = WideDeep(SPECS["no numeric"], hidden=[9], seed=3)
    beyond = [(2**32, torch.int64), (-(2**32) - 1, torch.int64), (2**64 - 1, torch.uint64), (2**63, torch.uint64)]
    for bad, kind in beyond:
        with pytest.raises(RuntimeError, match="feature 0 has id"):
            model(torch.tensor([[bad, 0]], dtype=kind), torch.zeros(1, 0))


def test_dropout_is_on_in_training_only(device):
    model = WideDeep(SPECS["one-hot and multi-hot"], hidden=[64, 64], dropout=0.5, seed=4).to(device)
    ids, numeric, _ = inputs(model.spec, 32, device)
    first, second = model(ids, numeric), model(ids, numeric)
    assert not torch.equal(first, second)
    again = WideDeep(model.spec, hidden=[64, 64], dropout=0.5, seed=4).to(device)
    assert torch.equal(again(ids, numeric), first)
    model.eval()
    assert torch.equal(model(ids, numeric), model(ids, numeric))
    first.sum().backward()  # through the masks of its own call


def test_a_call_with_its_step_can_be_repeated(device):
    model, repeated = (WideDeep(SPECS["no numeric"], hidden=[32, 32], seed=4, dropout=0.5).to(device) for _ in range(2))
    ids, numeric, _ = inputs(model.spec, 16, device)
    step = torch.tensor([0], device=device)
    model(ids, numeric).sum().backward()
    checkpoint(repeated, ids, numeric, 0, step, use_reentrant=False).sum().backward()
    for a, b in zip(model.parameters(), repeated.parameters()):
        assert torch.equal(a.grad.to_dense(), b.grad.to_dense())
    assert (model.dropout_step.item(), repeated.dropout_step.item()) == (1, 0)


def test_rows_of_a_rank_have_the_masks_of_the_global_batch(device):
    model = WideDeep(SPECS["no numeric"], hidden=[32, 32], seed=4, dropout=0.5).to(device)
    ids, numeric, _ = inputs(model.spec, 16, device)
    step = torch.tensor([3], device=device)
    whole = model(ids, numeric, step=step)
    parts = [model(ids[s], numeric[s], s.start, step) for s in (slice(0, 5), slice(5, 16))]
    torch.testing.assert_close(torch.cat(parts), whole)


def test_a_state_dict_goes_on_with_the_masks(device):
    model, resumed = (WideDeep(SPECS["no numeric"], hidden=[32], seed=4, dropout=0.5).to(device) for _ in range(2))
    ids, numeric, _ = inputs(model.spec, 16, device)
    model(ids, numeric)
    state = model.state_dict()
    resumed.load_state_dict(state)
    assert torch.equal(resumed(ids, numeric), model(ids, numeric))
    del state["dropout_step"]
    resumed.load_state_dict(state)
    assert resumed.dropout_step.item() == 2


@pytest.mark.parametrize("parts", ["both", "wide", "deep"])
@pytest.mark.parametrize("name", SPECS)
def test_dense_gradients_are_the_sparse_ones(name, parts, device):
    models = [WideDeep(SPECS[name], hidden=[9], seed=3, parts=parts, sparse=sparse).to(device) for sparse in (1, 0)]
    for B in (16, 0):
        for model in models:
            model.zero_grad()
            model(*inputs(model.spec, B, device)[:2]).square().sum().backward()
        for (key, dense), want in zip(models[1].named_parameters(), models[0].parameters()):
            if not dense.requires_grad:
                continue  # a table without columns
            assert dense.grad.layout == torch.strided
            want = torch.zeros_like(want) if want.grad is None else want.grad.to_dense()  # None: of no features
            torch.testing.assert_close(dense.grad, want, rtol=1e-5, atol=1e-6, msg=key)


def test_torch_optimizers_and_clipping_take_dense_gradients(device):
    model = WideDeep(SPECS["one-hot and multi-hot"], hidden=[9, 6], seed=3, sparse=False).to(device)
    ids, numeric, label = inputs(model.spec, 64, device)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(20):
        losses.append(torch.nn.functional.binary_cross_entropy_with_logits(model(ids, numeric), label))
        optimizer.zero_grad()
        losses[-1].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("parts", ["both", "wide", "deep"])
def test_training_under_torch_compile(parts, sparse, device):
    spec = FeatureSpec.from_dict(SPECS["one-hot and multi-hot"].to_dict(), "a spec whose properties nobody has read")
    model, eager = (WideDeep(spec, [9, 6], 0.5, seed=3, parts=parts, sparse=sparse).to(device) for _ in range(2))
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for i in range(2):
        ids, numeric, _ = inputs(spec, 16, device, seed=i)
        torch.testing.assert_close(compiled(ids, numeric), eager(ids, numeric))  # counts both steps up
        for m in (compiled, eager):
            m(ids, numeric).square().sum().backward()
    assert torch.equal(model.dropout_step, eager.dropout_step)
    for (key, p), want in zip(model.named_parameters(), eager.parameters()):
        assert p.grad.layout == want.grad.layout
        torch.testing.assert_close(p.grad.to_dense(), want.grad.to_dense(), msg=key)


# The last line: a thread of torch's that asks for the interpreter while that ends brings the process down now and then.
DATA_PARALLEL = """
import os, sys, torch
sys.path.insert(0, "tests")
from test_model import SPECS, WideDeep, inputs
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
model, alone = (WideDeep(SPECS[sys.argv[1]], [9, 6], 0.5, seed=3, sparse=False) for _ in range(2))
parallel = torch.nn.parallel.DistributedDataParallel(model)
optimizers = [torch.optim.SGD(m.parameters(), 0.5) for m in (model, alone)]
for i in range(4):
    ids, numeric, label = inputs(model.spec, 16, seed=i)
    mine = slice(rank * 8, rank * 8 + 8)
    for optimizer in optimizers:
        optimizer.zero_grad()
    cross_entropy(parallel(ids[mine], numeric[mine], first_row=mine.start), label[mine]).backward()
    cross_entropy(alone(ids, numeric), label).backward()
    for optimizer in optimizers:
        optimizer.step()
for a, b in zip(model.parameters(), alone.parameters()):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
torch.distributed.destroy_process_group()
os._exit(0)
"""


@pytest.mark.parametrize("name", ["one-hot and multi-hot", "some wide only"])
def test_data_parallel_ranks_give_the_result_of_one_process(name):
    run_ranks(2, "-c", DATA_PARALLEL, name)


def test_named_arrays_share_memory_and_cover_every_weight():
    model = WideDeep(SPECS["one-hot and multi-hot"], hidden=[4], seed=0)
    arrays = model.named_arrays()
    assert {"deep.table.a", "deep.layer.0.weight", "deep.out.bias", "wide.table.m", "wide.numeric.weight"} < set(arrays)
    for array in arrays.values():
        array.fill_(3)
    assert all((p == 3).all() for p in model.parameters())
    assert [list(arrays[f"wide.table.{n}"].shape) for n in "aclm"] == [[11], [6], [9], [8]]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"hidden": [0]}, "hidden: expected layer widths >= 1"),
        ({"dropout": 1.0}, "dropout: expected a probability from 0 to 0.99998, got"),
        ({"dropout": 0.999999}, "dropout: expected a probability from 0 to 0.99998, got"),
        ({"dropout": float("nan")}, "dropout: expected a probability from 0 to 0.99998, got"),
        ({"wide_init": "ones"}, "wide_init: expected one of uniform, zeros, got 'ones'"),
        ({"parts": "none"}, "parts: expected one of both, wide, deep, got 'none'"),
        ({"seed": -1}, "seed: expected an integer from 0"),
    ],
)
def test_bad_settings_are_refused(settings, words):
    with pytest.raises(InputError) as error:
        WideDeep(SPECS["no categorical"], **settings)
    assert words in str(error.value)
