"""A model with other modules than it was made with: what it computes, what a step and a checkpoint refuse."""

import pytest
import torch
from test_model import SPECS, inputs
from torch import nn
from torch.nn.utils import parametrizations, prune

from widedeep.errors import InputError
from widedeep.feature_spec import CategoricalFeature, FeatureSpec, NumericFeature
from widedeep.model import WideDeep
from widedeep.restore import load_model, save_model
from widedeep.step import make_step

SPEC = SPECS["one-hot and multi-hot"]
WIDTH = SPEC.deep_width
IDS, NUMERIC, _ = inputs(SPEC, 13, seed=5)


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Adapted(nn.Linear):
    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.low = nn.Parameter(torch.randn(2, inputs))


class Tower(WideDeep):
    """With a third part."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.third = nn.Linear(len(self.spec.numeric), 1)

    def forward(self, ids, numeric):
        return super().forward(ids, numeric) + self.third(numeric)[:, 0]


class Named(WideDeep):
    """Computes what a WideDeep does."""

    def describe(self):
        return "mine"


def made(kind=WideDeep):
    return kind(SPEC, [9, 6], dropout=0.0, seed=3)


def plain(model):
    """The logits by calls of torch's own modules, from the deep input on."""
    wide, _ = model.parts(IDS, NUMERIC)
    named, pieces, first = model.named_arrays(), {}, 0
    for f in SPEC.categorical:
        ids, first = IDS[:, first : first + f.hotness].long(), first + f.hotness
        rows = named[f"deep.table.{f.name}"][ids.clamp(min=0)] * (ids >= 0)[..., None]
        count = (ids >= 0).sum(1, keepdim=True).clamp(min=1) if f.combiner == "mean" else 1
        pieces[f"{f.name}_embedding"] = rows.sum(1) / count
    pieces |= {f.name: NUMERIC[:, i : i + 1] for i, f in enumerate(SPEC.numeric)}
    x = torch.cat([pieces[name] for name in sorted(pieces)], 1)
    for layer in model.layers:
        x = torch.relu(layer(x))
    return wide + model.out(x)[:, 0]


def test_layers_may_be_replaced_by_linear_ones_of_other_sizes():
    model = made()
    model.layers = nn.ModuleList([nn.Linear(WIDTH, 12), nn.Linear(12, 5), nn.Linear(5, 6)])
    torch.testing.assert_close(model(IDS, NUMERIC), plain(model))
    parametrizations.orthogonal(model.layers[1])  # whose weight is not contiguous
    parametrizations.weight_norm(model.out)
    torch.testing.assert_close(model(IDS, NUMERIC), plain(model))
    model(IDS, NUMERIC).sum().backward()
    assert model.layers[1].parametrizations.weight.original.grad.isfinite().all()


OTHERS = {
    "LayerNorm": lambda model: model.layers.insert(1, nn.LayerNorm(9)),
    "Sequential": lambda model: model.layers.__setitem__(0, nn.Sequential(nn.Linear(WIDTH, 9))),
    "without bias": lambda model: model.layers.__setitem__(0, nn.Linear(WIDTH, 9, bias=False)),
    "of a forward of its own": lambda model: model.layers.__setitem__(0, Scaled(WIDTH, 9)),
    "of more parameters": lambda model: model.layers.__setitem__(0, Adapted(WIDTH, 9)),
    "pruned": lambda model: prune.l1_unstructured(model.layers[0], "weight", 0.5),
    "spectral_norm by a hook": lambda model: nn.utils.spectral_norm(model.layers[0]),
    "an output of two layers": lambda model: setattr(model, "out", nn.Sequential(nn.Linear(6, 3), nn.Linear(3, 1))),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_layer_that_would_have_to_be_called_is_refused(name, tmp_path):
    model = made()
    OTHERS[name](model)
    words = (
        r"(layers\[[01]\]|out): expected nn.Linear with weight and bias alone, for layers are read, not called, got \w+"
    )
    with pytest.raises(TypeError, match=words):
        model(IDS, NUMERIC)
    with pytest.raises(InputError, match="step: "):
        make_step("auto", model)
    with pytest.raises(InputError, match=words):
        save_model(model, tmp_path / "own")


def test_a_pruned_layer_is_taken_once_the_mask_is_applied():
    model = made()
    prune.remove(prune.l1_unstructured(model.layers[0], "weight", 0.5), "weight")
    assert (model.layers[0].weight == 0).sum() == model.layers[0].weight.numel() // 2
    torch.testing.assert_close(model(IDS, NUMERIC), plain(model))
    make_step("auto", model)


@pytest.mark.parametrize(("i", "inputs"), [(0, WIDTH - 1), (0, WIDTH + 1), (1, 8), (1, 10)])
def test_a_layer_of_another_number_of_inputs_is_refused(i, inputs):
    model = made()
    model.layers[i] = nn.Linear(inputs, [9, 6][i])
    with pytest.raises(RuntimeError, match=rf"x must be a contiguous Float tensor \[\*, {inputs}\]"):
        model(IDS, NUMERIC)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError):
        model(IDS, NUMERIC)


def test_a_table_of_another_dim_is_refused():
    model = made()
    model.tables[0] = nn.Parameter(torch.zeros(11, 5))
    with pytest.raises(ValueError, match=r"tables\[0\]: expected 4 columns, got 5"):
        model(IDS, NUMERIC)


ALTERED = {
    "a layer of another size": (lambda m: m.layers.__setitem__(1, nn.Linear(9, 7)), "layers.1.weight of shape [7, 9]"),
    "a layer more": (lambda m: m.layers.append(nn.Linear(6, 6)), "layers.2.weight as well"),
    "a layer less": (lambda m: m.layers.pop(1), "no layers.1.weight"),
    "another module": (lambda m: setattr(m, "more", nn.Linear(3, 1)), "more.weight as well"),
}


@pytest.mark.parametrize("name", ALTERED)
def test_a_step_and_a_checkpoint_want_the_parameters_as_they_were_made(name, tmp_path):
    alter, words = ALTERED[name]
    model = made()
    make_step("auto", model)
    alter(model)
    with pytest.raises(InputError) as error:
        make_step("auto", model)
    assert str(error.value).endswith(f"for a step trains no others, got {words}")
    with pytest.raises(InputError, match=r"own: expected (shape|no parameters)"):
        save_model(model, tmp_path / "own")
    assert not (tmp_path / "own").exists()


@pytest.mark.parametrize("kind", ["fused", "reference"])
def test_a_step_refuses_what_it_would_train_otherwise(kind):
    parametrized, tied = (
        made(),
        WideDeep(
            FeatureSpec([CategoricalFeature(name, 11, 4) for name in "ab"], [NumericFeature("x")], label="y"), [5]
        ),
    )
    parametrizations.weight_norm(parametrized.layers[0])
    tied.tables[1] = tied.tables[0]
    for model, words in (
        (parametrized, "got no layers.0.weight"),
        (tied, "got no tables.1"),
        (made(Tower), "expected the forward pass of WideDeep, for a step runs no other, got Tower's"),
        (nn.DataParallel(made()), "expected a WideDeep, got DataParallel"),
        (torch.compile(made()), "expected a WideDeep, got OptimizedModule"),
    ):
        with pytest.raises(InputError) as error:
            make_step(kind, model)
        assert str(error.value).startswith("step: ")
        assert words in str(error.value)
    make_step(kind, made(Named))


def test_a_checkpoint_keeps_the_value_of_a_parametrized_weight_and_no_part_of_ones_own(tmp_path):
    model = made()
    parametrizations.weight_norm(model.layers[0])
    with torch.no_grad():
        model.layers[0].parametrizations.weight.original0.mul_(2)
    for i, saved in enumerate((model, torch.compile(model), made(Named))):
        save_model(saved, tmp_path / str(i))
        got = load_model(tmp_path / str(i))(IDS, NUMERIC)
        torch.testing.assert_close(got, getattr(saved, "_orig_mod", saved)(IDS, NUMERIC))
    with pytest.raises(
        InputError, match="expected no parameters but a WideDeep's, which are all that is kept, got third"
    ):
        save_model(made(Tower), tmp_path / "tower")
    with pytest.raises(InputError, match="expected a WideDeep, got DataParallel"):
        save_model(nn.DataParallel(made()), tmp_path / "parallel")


def test_a_model_without_values_is_not_saved(tmp_path):
    with pytest.raises(InputError, match=r"expected weights, got none for deep\.table\.\w+, which is on torch"):
        save_model(made().to("meta"), tmp_path / "own")
    assert not (tmp_path / "own").exists()
