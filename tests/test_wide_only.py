"""Features of dim 0, in the wide part only: the spec, the ops with their tables beside others, the model, its steps."""

import copy
from dataclasses import replace

import pytest
import test_ops_embedding as embedding
import torch
from test_cuda_step import EVEN, HIDDEN, gpu_step
from test_model import SPECS, inputs
from test_step import LR, assert_same, batch_of, new_step
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy

from widedeep import ops
from widedeep.errors import InputError
from widedeep.feature_spec import CategoricalFeature, FeatureSpec, NumericFeature
from widedeep.model import WideDeep
from widedeep.optim import FTRL, RMSprop
from widedeep.step import StepConfig
from widedeep.steps.rows import update_rows

NAME = "some wide only"
SPEC = SPECS[NAME]
ALL = replace(SPEC, categorical=[replace(f, dim=0) for f in SPEC.categorical])  # the deep part has one number
Z, LIST = CategoricalFeature("z", 40, 0), CategoricalFeature("zs", 7, 0, hotness=2)
BESIDE = replace(EVEN, categorical=[*EVEN.categorical[:2], Z, EVEN.categorical[2], LIST])
ONLY = FeatureSpec([CategoricalFeature("a", 5, 0), CategoricalFeature("b", 4, 0, hotness=2)], [], label="y")


# --- the spec ---------------------------------------------------------------------------------------------------------


def test_a_feature_without_columns_has_no_place_in_the_deep_input(tmp_path):
    spec = FeatureSpec(
        [CategoricalFeature("b", 40, 0), CategoricalFeature("a", 7, 4), CategoricalFeature("z", 9, 0)],
        [NumericFeature("b_"), NumericFeature("c")],
        label="y",
    )
    assert [tuple(c) for c in spec.deep_columns] == [
        ("a_embedding", "table", 0, 4),
        ("b_", "numeric", 4, 1),
        ("c", "numeric", 5, 1),
    ]
    assert (spec.deep_width, spec.table_columns, spec.numeric_columns) == (6, (6, 0, 6), (4, 5))
    assert (spec.total_rows, spec.row_base) == (56, (0, 40, 47))
    assert spec.parameter_count([3]) == 7 * 4 + (6 * 3 + 3) + (3 + 1) + 56 + 2 + 1
    model = WideDeep(spec, hidden=[3], seed=0)
    assert sum(a.numel() for a in model.named_arrays().values()) == spec.parameter_count([3])
    spec.save(tmp_path / "spec.yaml")
    assert FeatureSpec.load(tmp_path / "spec.yaml").dims == (0, 4, 0)


def test_the_spec_and_the_file_of_sizes_take_0(tmp_path):
    path, sizes = tmp_path / "feature_spec.yaml", tmp_path / "sizes.json"
    ONLY.save(path)
    assert FeatureSpec.load(path).dims == (0, 0)
    sizes.write_text('{"a": 0, "b": 3}')
    assert FeatureSpec.load(path, embedding_sizes=sizes).dims == (0, 3)
    for dim in (-1, False, 0.0, None):
        d = ONLY.to_dict()
        d["feature_spec"]["a"]["embedding_dim"] = dim
        with pytest.raises(InputError) as error:
            FeatureSpec.from_dict(d, "spec.yaml")
        assert str(error.value) == f"spec.yaml: feature_spec.a.embedding_dim: expected an integer >= 0, got {dim}"
    sizes.write_text('{"a": -1, "b": 3}')
    with pytest.raises(InputError, match=r"sizes\.json: a: expected an integer >= 0, got -1$"):
        FeatureSpec.load(path, embedding_sizes=sizes)


def test_a_deep_part_without_input_is_refused():
    words = "feature spec: expected a numeric feature or one with an embedding_dim >= 1 for the deep part, got none"
    for parts in ("both", "deep"):
        with pytest.raises(InputError) as error:
            WideDeep(ONLY, hidden=[4], parts=parts)
        assert str(error.value) == words
    model = WideDeep(ONLY, hidden=[4], parts="wide", seed=0)
    ids, numeric, _ = inputs(ONLY, 5)
    assert model(ids, numeric).isfinite().all()
    WideDeep(replace(ONLY, numeric=[NumericFeature("x")]), hidden=[4])  # one column will do


# --- ops: tables of dims 0 beside others ------------------------------------------------------------------------------

FIRST = ((30, 0, 1, 0), (50, 16, 1, 0), (7, 3, 1, 0))
MIDDLE = ((50, 16, 1, 0), (40, 0, 2, 0), (9, 0, 3, 1), (20, 8, 4, 1))
LAST = ((7, 33, 1, 0), (300, 8, 3, 0), (25, 0, 3, 1))
BETWEEN = ((1, 0, 1, 0), (60, 8, 1, 0), (5, 0, 2, 1), (40, 130, 1, 0), (2000, 0, 1, 0))
CASES = [
    (0, MIDDLE, "zipf"),
    (1, FIRST, "zipf"),
    (300, FIRST, "zipf"),
    (67, MIDDLE, "zipf"),
    (300, MIDDLE, "padding"),
    (300, LAST, "zipf"),
    (1025, BETWEEN, "zipf"),
    (4099, BETWEEN, "hot"),
]
NAMES = {FIRST: "first", MIDDLE: "middle", LAST: "last", BETWEEN: "between"}
cases = pytest.mark.parametrize(
    ("B", "tables", "kind"), CASES, ids=[f"B={B}-{NAMES[tables]}-{kind}" for B, tables, kind in CASES]
)


def at_the_end(case):
    """As `FeatureSpec.table_columns`: a table without columns stands where the deep input ends."""
    case.columns = [at if dim else case.width for at, dim in zip(case.columns, case.dims)]
    return case


@pytest.fixture(autouse=True)
def places(monkeypatch):
    make = embedding.make
    monkeypatch.setattr(embedding, "make", lambda *case: at_the_end(make(*case)))


@cases
@pytest.mark.parametrize("dtype", embedding.DTYPES)
def test_ops_match_reference(B, tables, kind, dtype, device):
    embedding.test_embedding_forward_matches_reference(B, tables, kind, dtype, device)
    embedding.test_embedding_row_gradients_match_reference(B, tables, kind, dtype, device)
    embedding.test_embedding_update_matches_reference(B, tables, kind, dtype, device)


@cases
@pytest.mark.parametrize("sparse", [True, False])
def test_gradients_match_reference(B, tables, kind, sparse, device):
    embedding.test_embedding_segments_match_reference(B, tables, kind, device)
    embedding.test_embedding_forward_backward_matches_reference(B, tables, kind, sparse, device)


@pytest.mark.parametrize("tables", NAMES, ids=NAMES.values())
def test_other_ways_to_the_same_update(tables, device, monkeypatch):
    monkeypatch.setattr(embedding, "MULTI", tables)
    embedding.test_embedding_update_equals_row_gradients_then_row_updates(device)
    embedding.test_embedding_opcheck(tables, device)
    embedding.test_embedding_forward_under_torch_compile(device)


def test_an_update_moves_the_wide_weights_and_steps_of_named_rows_alone(device):
    case = embedding.make(200, BETWEEN, "zipf", device)
    dx, dlogit = embedding.gradients(case, device)
    state = embedding.State(case, device)
    state.last_step.fill_(3)
    before = state.copy(torch.float32)
    embedding.update(ops, case, state, dx, dlogit, device)
    unique, start = embedding.segments_of(case).unique, embedding.segments_of(case).table_start.tolist()
    named = torch.zeros(sum(case.rows), dtype=torch.bool, device=device)
    named[unique[: start[-1]].long()] = True
    assert named.any()
    assert not named.all()
    for name in ("wide", "accum", "linear", "last_step"):
        assert torch.equal(getattr(state, name) != getattr(before, name), named), name


# --- the model and its steps ------------------------------------------------------------------------------------------


def test_the_deep_part_does_not_see_it_and_the_wide_part_does():
    """Against a model that lacks these features, with the same weights."""
    kept = [f for f, dim in enumerate(SPEC.dims) if dim]
    less = replace(SPEC, categorical=[SPEC.categorical[f] for f in kept])
    model, smaller = (WideDeep(spec, hidden=[9, 6], seed=3).eval() for spec in (SPEC, less))
    arrays = model.named_arrays()
    for name, a in smaller.named_arrays().items():
        a.copy_(arrays[name])
    ids, numeric, _ = inputs(SPEC, 40)
    columns = [c for f in kept for c in range(SPEC.hot_start[f], SPEC.hot_start[f] + SPEC.hotness[f])]
    (wide, deep), (part, want) = model.parts(ids, numeric), smaller.parts(ids[:, columns], numeric)
    assert torch.equal(deep, want)
    rows, valid = model.wide_rows(ids)
    other = torch.tensor([c not in columns for c in range(SPEC.id_columns)])
    torch.testing.assert_close(wide, part + (model.wide[rows] * valid)[:, other].sum(1), rtol=1e-5, atol=1e-6)


def trained(model, optimizers, steps=3, B=33):
    for i in range(steps):
        ids, numeric, label = inputs(model.spec, B, model.wide.device, seed=i)
        model.zero_grad()
        loss = cross_entropy(model(ids, numeric), label)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    return model


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (torch.optim.Adam, {}),
        (torch.optim.AdamW, {"foreach": True}),
        (torch.optim.AdamW, {"fused": True}),
        (torch.optim.RMSprop, {}),
        (torch.optim.Adagrad, {}),
    ],
)
def test_torch_optimizers_and_every_norm_of_clipping_take_the_model(kind, settings, device):
    model = WideDeep(SPEC, hidden=[9], seed=3, sparse=False).to(device)
    before = model.wide.detach().clone()
    optimizer = kind(model.parameters(), lr=0.01, **settings)
    trained(model, [optimizer])
    for norm in (1.0, 2.0, float("inf")):
        assert torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, norm) > 0
    assert [tuple(t.shape) for t in model.tables] == [(40, 0), (11, 4), (8, 0), (9, 5), (7, 0)]
    assert (model.wide[:40] != before[:40]).any()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    trained(model, [optimizer])


def test_torch_takes_its_sparse_gradients(device):
    model = WideDeep(SPEC, hidden=[9], seed=3).to(device)
    before = model.wide.detach().clone()
    flat = {id(p) for p in (*model.tables, model.wide)}
    rest = [p for p in model.parameters() if id(p) not in flat]
    optimizers = [torch.optim.SparseAdam([*model.tables, model.wide], 0.01), torch.optim.Adam(rest)]
    trained(model, optimizers)
    assert (model.wide[:40] != before[:40]).any()


@pytest.mark.parametrize("sparse", [True, False])
def test_our_optimizers_go_on_from_their_state(sparse):
    """`deep_parameters` holds the tables without columns too; `state_dict` of model and optimizers, midway."""

    def new(seed):
        model = WideDeep(SPEC, hidden=[9], seed=seed, dropout=0.0, sparse=sparse)
        return model, [RMSprop(model.deep_parameters(), 0.01), FTRL(model.wide_parameters())]

    model, optimizers = new(3)
    assert {id(p) for p in model.tables} <= {id(p) for p in model.deep_parameters()}
    trained(model, optimizers)
    other, others = new(4)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    for optimizer, source in zip(others, optimizers):
        optimizer.load_state_dict(copy.deepcopy(source.state_dict()))
    trained(model, optimizers)
    trained(other, others)
    for name, a in model.named_arrays().items():
        assert torch.equal(a, other.named_arrays()[name]), name


@pytest.mark.parametrize("sparse", [True, False])
def test_training_under_torch_compile(sparse, device):
    model, eager = (WideDeep(SPEC, [9, 6], 0.5, seed=3, sparse=sparse).to(device) for _ in range(2))
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    ids, numeric, _ = inputs(SPEC, 16, device)
    torch.testing.assert_close(compiled(ids, numeric), eager(ids, numeric))
    for m in (compiled, eager):
        m(ids, numeric).square().sum().backward()
    for (key, p), want in zip(model.named_parameters(), eager.parameters()):
        assert (p.grad is None) == (want.grad is None) == (not p.requires_grad), key
        if p.requires_grad:
            torch.testing.assert_close(p.grad.to_dense(), want.grad.to_dense(), msg=key)


def test_rows_of_several_ranks_are_not_sorted_for_a_table_without_columns(monkeypatch):
    widths = []
    monkeypatch.setattr(ops, "rmsprop_rows_", lambda weight, *_: widths.append(weight.shape[1]))
    step = new_step(name=NAME)
    rows = [torch.tensor([1, 0, 1]) for _ in SPEC.dims]
    tables = [(r, torch.rand(3, dim)) for r, dim in zip(rows, SPEC.dims)]
    flat, before = torch.cat([r + base for r, base in zip(rows, SPEC.row_base)]), step.model.wide.detach().clone()
    update_rows(step.model, step.slots, step.config, torch.tensor([LR]), tables, flat, torch.rand(len(flat)))
    assert widths == [dim for dim in SPEC.dims if dim]
    assert (step.model.wide != before).nonzero()[:, 0].tolist() == flat.unique().tolist()


@pytest.mark.parametrize("hidden", [HIDDEN, []], ids=str)
@pytest.mark.parametrize("spec", [BESIDE, ALL], ids=["some", "all"])
def test_steps_agree(spec, hidden, device):
    settings = {"hidden": hidden, "device": device}
    want, got = (new_step(kind, spec, **settings) for kind in ("reference", "fused"))
    same_training(spec, want, got, device)
    if spec is BESIDE:  # on a CPU the GPU's step takes widths alone that need no padding
        same_training(spec, new_step("reference", spec, **settings), gpu_step(spec, **settings), device)


def same_training(spec, want, got, device):
    for i, B in enumerate([33, 0, 1, 64]):
        batch = batch_of(spec, B, seed=i, device=device)
        losses = [step.train(batch, i, LR) for step in (want, got)]
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
    assert_same(want, got, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize(("kind", "precision"), [("fused", "bf16"), ("reference", "bf16"), ("reference", "fp16")])
def test_half_types_stay_near_fp32(kind, precision):
    want, got = new_step("reference", NAME, dropout=0.0), new_step(kind, NAME, StepConfig(precision), dropout=0.0)
    for i, B in enumerate([40, 7, 40]):
        batch = batch_of(SPEC, B, seed=i)
        losses = [step.train(batch, i, LR) for step in (want, got)]
        torch.testing.assert_close(losses[1], losses[0], rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(got.predict(batch), want.predict(batch), rtol=0, atol=0.1)
    for name in ("z", "s", "m"):
        name = f"wide.table.{name}"
        torch.testing.assert_close(got.model.named_arrays()[name], want.model.named_arrays()[name], rtol=0, atol=5e-3)
