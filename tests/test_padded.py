"""The order that the GPU step gives the columns of the deep input, and that nobody else sees it; on any machine."""

import pytest
import torch
from test_cuda_step import EVEN, HIDDEN, gpu_step
from test_model import MOVED, MOVED_64, SPECS
from test_step import LR, assert_same, batch_of, new_step

from widedeep.feature_spec import CategoricalFeature, FeatureSpec, NumericFeature
from widedeep.step import StepConfig
from widedeep.steps.padded import aligned_columns


@pytest.mark.parametrize("parts", ["both", "wide", "deep"])
@pytest.mark.parametrize(("spec", "hidden"), [(MOVED, HIDDEN), (MOVED_64, HIDDEN), (MOVED_64, [])])
def test_the_order_of_columns_changes_nothing(spec, hidden, parts, device):
    settings = {"parts": parts, "hidden": hidden}
    want, got = new_step("reference", spec, device=device, **settings), gpu_step(spec, device=device, **settings)
    for i, B in enumerate([33, 33, 64, 0, 33]):
        batch = batch_of(spec, B, seed=i, first_row=5, device=device)
        grads = [step.gradients(batch, step=i) for step in (want, got)]
        for name, g in grads[0].items():
            torch.testing.assert_close(grads[1][name], g, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
        losses = [step.train(batch, i, LR) for step in (want, got)]
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
        predictions = [step.predict(batch) for step in (want, got)]
        torch.testing.assert_close(predictions[1], predictions[0], rtol=1e-4, atol=1e-5)
    assert_same(want, got, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_copies_follow_the_weights_in_the_order_of_the_columns(precision, device):
    step = gpu_step(MOVED, StepConfig(precision), device=device)
    names = list(step.weights.copies)
    for i in range(3):
        step.train(batch_of(MOVED, 40, seed=i, device=device), i, LR)
        trained = {name: step.weights.copies[name].clone() for name in names}
        step.weights.refresh()
        for name in names:
            assert torch.equal(step.weights.copies[name], trained[name]), name
    first, master = trained["deep.layer.0.weight"], step.weights.masters["deep.layer.0.weight"]
    assert torch.equal(first.index_select(1, step.weights.columns), master.to(first.dtype))
    rest = sorted({*range(first.shape[1])} - {*step.weights.columns.tolist()})
    assert len(rest) == 64 - 52
    assert not first[:, rest].any()


def test_tables_begin_at_whole_packs():
    weights = gpu_step(MOVED).weights
    assert MOVED.table_columns == (1, 10, 48, 27, 32)
    assert (weights.table_columns, weights.numeric_columns) == ((32, 0, 40, 43, 16), (48, 49, 50, 51))
    assert all(at % 8 == 0 for at, dim in zip(weights.table_columns, MOVED.dims) if dim % 8 == 0)
    outbrain = FeatureSpec.outbrain()
    tables, numerics = aligned_columns(outbrain)
    assert all(at % 8 == 0 for at in tables)
    assert numerics == (*range(sum(outbrain.dims), outbrain.deep_width),)
    assert gpu_step(EVEN).weights.columns is None  # as they are
    assert gpu_step(MOVED, hidden=[]).weights.table_columns == MOVED.table_columns  # the output layer reads them


@pytest.mark.parametrize("spec", [EVEN, MOVED, SPECS["some wide only"]], ids=["even", "moved", "wide only"])
def test_gradients_begin_where_the_fastest_products_want_them(spec):
    weights = gpu_step(spec, hidden=[16, 8]).weights
    assert all(g.storage_offset() * g.element_size() % 256 == 0 for g in weights.padded.values())


def test_a_table_without_columns_has_the_place_of_a_whole_pack():
    """Where other columns move, and where none does."""
    as_it_is = [CategoricalFeature("a", 5, 8), CategoricalFeature("b", 5, 0)]
    unmoved = FeatureSpec(as_it_is, [NumericFeature("n")], label="y")
    assert (unmoved.table_columns, unmoved.deep_width) == ((0, 9), 9)
    for spec in (SPECS["some wide only"], unmoved):
        weights = gpu_step(spec).weights
        assert all(at % 8 == 0 for at, dim in zip(weights.table_columns, spec.dims) if dim == 0)
    assert weights.columns is None
