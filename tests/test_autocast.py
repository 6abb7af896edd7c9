"""A loop of one's own under torch.autocast: what is rounded, what is not, and that it learns."""

import contextlib
import math

import pytest
import torch
from test_model import SPECS, inputs, slow_logits
from torch.nn.functional import binary_cross_entropy_with_logits, linear

from widedeep import reference
from widedeep.model import WideDeep
from widedeep.optim import FTRL, RMSprop

ROUNDING = {torch.float16: 2**-11, torch.bfloat16: 2**-8}
HALVES = [torch.float16, torch.bfloat16]
WIDTHS = [[24, 13], [8], []]  # a width that is no whole pack too


def fresh_seed():
    return int(torch.randint(2**31, ()))


def gradients(model, ids, numeric, label, dtype=None, scale=1.0):
    """Of the mean loss; float64, dense."""
    model.zero_grad()
    context = torch.autocast(ids.device.type, dtype) if dtype else contextlib.nullcontext()
    with context:
        logit = model(ids, numeric, step=torch.zeros(1, dtype=torch.int64, device=ids.device))
    (binary_cross_entropy_with_logits(logit, label) * scale).backward()
    named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert {g.dtype for g in named.values()} == {torch.float32}
    return {name: (g.to_dense() if g.is_sparse else g).double() / scale for name, g in named.items()}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("hidden", WIDTHS, ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_logits_are_float32_and_rounded_as_the_type_rounds(name, hidden, dtype, device):
    spec = SPECS[name]
    model = WideDeep(spec, hidden=hidden, seed=fresh_seed()).to(device).eval()
    ids, numeric, _ = inputs(spec, 67, device, seed=fresh_seed())
    with torch.no_grad(), torch.autocast(device, dtype):
        wide, deep = model.parts(ids, numeric)
    want_wide, want_deep = slow_logits(model, ids, numeric)
    assert wide.dtype == deep.dtype == torch.float32
    torch.testing.assert_close(wide.double().cpu(), want_wide, rtol=1e-5, atol=1e-5)
    # Each layer rounds its inputs, weights and outputs once; the sums of a few dozen terms of order 1 do not cancel
    # to more than a hundred roundings.
    error = (deep.double().cpu() - want_deep).abs().max()
    assert 0 < error < 100 * ROUNDING[dtype] * max(1, want_deep.abs().max())


def rounded_gradients(model, ids, numeric, label, dtype):
    """Of the mean loss, in float64, where what a layer takes and gives is rounded to the type, and nothing else."""
    spec, w = model.spec, {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}

    def rounded(t):
        return t + (t.detach().to(dtype).double() - t.detach())

    tables = [w[f"tables.{f}"] for f in range(len(spec.categorical))]
    wide = (w["wide"], w["wide_numeric"], w["wide_bias"])
    places = (spec.hotness, spec.mean, spec.table_columns, spec.numeric_columns, spec.deep_width)
    x, logit = reference.embedding_forward(ids, numeric.double(), tables, *wide, *places, torch.float64)
    h, p = rounded(x), model.dropout
    for i, units in enumerate(model.hidden):
        z = linear(h, rounded(w[f"layers.{i}.weight"]), w[f"layers.{i}.bias"])
        keep = reference.dropout_mask(len(z), units, p, model.seed, 0, i, device=z.device)
        h = rounded(z.relu() * keep * reference.dropout_scale(p))
    logit = logit + linear(h, w["out.weight"], w["out.bias"])[:, 0]
    binary_cross_entropy_with_logits(logit, label.double()).backward()
    return {name: value.grad for name, value in w.items() if value.grad is not None}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("hidden", WIDTHS, ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_gradients_are_float32_and_those_of_the_rounded_model(name, hidden, sparse, dtype, device, monkeypatch):
    # Other products than ours are rounded before their bias is added, which turns the sign of some sums near 0.
    monkeypatch.setenv("WIDEDEEP_BF16_PRODUCTS", "own")
    limit = (10 if device == "cpu" else 100) * ROUNDING[dtype]
    model = WideDeep(SPECS[name], hidden=hidden, dropout=0.25, seed=fresh_seed(), sparse=sparse).to(device)
    batch = inputs(SPECS[name], 300, device, seed=fresh_seed())
    got = gradients(model, *batch, dtype, 1024.0)
    want = rounded_gradients(model, *batch, dtype)
    exact = gradients(model, *batch)
    for key, gradient in want.items():
        if gradient.any():  # a table without columns has none
            assert (got[key] - gradient).norm() <= limit * gradient.norm(), key
    assert any(not torch.equal(got[key], exact[key]) for key in got)


def test_outside_and_where_it_is_disabled_nothing_is_rounded(device):
    spec = SPECS["one-hot and multi-hot"]
    model = WideDeep(spec, hidden=[9], seed=fresh_seed()).to(device).eval()
    ids, numeric, _ = inputs(spec, 33, device)
    want = model(ids, numeric)
    with torch.autocast(device, torch.bfloat16):
        rounded = model(ids, numeric)
        with torch.autocast(device, enabled=False):
            inside = model(ids, numeric)
    assert torch.equal(inside, want)
    assert not torch.equal(rounded, want)


@pytest.mark.parametrize("parts", ["wide", "both"])
def test_on_a_device_without_autocast_a_call_is_as_ever(parts):
    model = WideDeep(SPECS["no numeric"], hidden=[9], seed=1, parts=parts).to("meta")
    ids, numeric, _ = inputs(SPECS["no numeric"], 5, "meta")
    assert model(ids, numeric).dtype == torch.float32


def test_compiled_it_gives_the_same(device):
    spec = SPECS["some wide only"]
    model = WideDeep(spec, hidden=[24, 13], dropout=0.25, seed=fresh_seed()).to(device)
    batch = inputs(spec, 67, device, seed=fresh_seed())
    want = gradients(model, *batch, torch.bfloat16)
    model.compile(fullgraph=True)
    got = gradients(model, *batch, torch.bfloat16)
    for key, gradient in want.items():  # the compiler may round a gradient once less or more
        assert (got[key] - gradient).norm() <= 8 * ROUNDING[torch.bfloat16] * gradient.norm(), key


def test_float16_with_a_grad_scaler_learns_what_float32_learns(device):
    spec = SPECS["one-hot and multi-hot"]

    def curve(half):
        model = WideDeep(spec, hidden=[32, 16], dropout=0.1, seed=7).to(device)
        optimizers = [RMSprop(model.deep_parameters(), lr=0.002), FTRL(model.wide_parameters(), lr=0.05)]
        scaler = torch.amp.GradScaler(device, enabled=half)
        losses = []
        for step in range(120):
            ids, numeric, _ = inputs(spec, 256, device, seed=step % 20)
            label = (numeric[:, 0] + (ids[:, 0] % 2) > 0.5).float()
            with torch.autocast(device, torch.float16, enabled=half):
                logit = model(ids, numeric)
            loss = binary_cross_entropy_with_logits(logit, label)
            for optimizer in optimizers:
                optimizer.zero_grad()
            scaler.scale(loss).backward()
            for optimizer in optimizers:
                scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
        return sum(losses[-20:]) / 20, losses[0]

    half, first = curve(True)
    full, _ = curve(False)
    assert half < 0.5 * first
    assert half == pytest.approx(full, rel=0.03)


def test_a_step_that_overflows_is_skipped_by_the_scaler():
    spec = SPECS["no categorical"]
    model = WideDeep(spec, hidden=[8], dropout=0.0, seed=3)
    optimizers = [RMSprop(model.deep_parameters()), FTRL(model.wide_parameters())]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = {name: value.clone() for name, value in model.state_dict().items() if name != "dropout_step"}
    ids, numeric, label = inputs(spec, 64)
    with torch.autocast("cpu", torch.float16):
        logit = model(ids, numeric)
    scaler.scale(binary_cross_entropy_with_logits(logit, label)).backward()
    scaler.step(optimizers[0])
    scaler.update()
    assert scaler.get_scale() == 2.0**39
    for name in ("layers.0.weight", "layers.0.bias", "out.weight", "out.bias"):
        assert torch.equal(model.state_dict()[name], before[name])
    assert math.isfinite(model(ids, numeric).sum().item())
