"""The step: fused against reference, parts of a batch against the whole, state, ranks, precisions."""

import pytest
import torch
from test_model import SPECS, inputs
from thread_comm import in_ranks

from widedeep.data import Batch
from widedeep.dist import LocalComm
from widedeep.errors import InputError
from widedeep.feature_spec import CategoricalFeature, FeatureSpec, NumericFeature
from widedeep.model import WideDeep
from widedeep.optim import RMSprop
from widedeep.step import StepConfig, make_step
from widedeep.steps import fused

MIXED = "one-hot and multi-hot"
LR = 1e-3


def batch_of(spec, B, seed=0, first_row=0, device="cpu"):
    return Batch(*inputs(spec, B, device, seed), None, first_row, max(B, 1))


def part_of(batch, start, stop):
    """Rows [start, stop) of a global batch, as a rank would get them."""
    rows = slice(start, stop)
    return batch._replace(
        ids=batch.ids[rows], numeric=batch.numeric[rows], label=batch.label[rows], first_row=batch.first_row + start
    )


def new_step(kind="fused", name=MIXED, config=None, comm=None, device="cpu", **settings):
    settings = {"hidden": [40, 70, 9], "dropout": 0.3, "seed": 11} | settings
    model = WideDeep(SPECS.get(name) if isinstance(name, str) else name, **settings)
    return make_step(kind, model, config, device, comm)


def assert_same(a, b, rtol, atol):
    """Weights and slots of two steps."""
    for step in (a, b):
        step.settle()
    for want, got in ((a.model.named_arrays(), b.model.named_arrays()), (a.state(), b.state())):
        assert want.keys() == got.keys()
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("parts", ["both", "wide", "deep"])
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize(("dropout", "hidden"), [(0.0, [40, 70, 9]), (0.3, [40, 70, 9]), (0.3, [])])
def test_fused_matches_reference(name, parts, dropout, hidden):
    """Also in the masks: another keep bit would change losses by far more than the tolerance."""
    settings = {"parts": parts, "dropout": dropout, "hidden": hidden}
    want, got = (new_step(kind, name, **settings) for kind in ("reference", "fused"))
    for i, B in enumerate([33, 7, 64, 1, 33]):
        batch = batch_of(want.model.spec, B, seed=i, first_row=5 * i)
        losses = [step.train(batch, i, LR) for step in (want, got)]
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
        predictions = [step.predict(batch) for step in (want, got)]
        torch.testing.assert_close(predictions[1], predictions[0], rtol=1e-4, atol=1e-5)
    assert_same(want, got, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("name", SPECS)
def test_fused_gradients_match_reference(name):
    want, got = (new_step(kind, name) for kind in ("reference", "fused"))
    batch = batch_of(want.model.spec, 50)
    before = {n: a.clone() for n, a in got.model.named_arrays().items()}
    grads = [step.gradients(batch, step=3) for step in (want, got)]
    assert grads[0].keys() == grads[1].keys() == before.keys()
    for n, g in grads[0].items():
        torch.testing.assert_close(grads[1][n], g, rtol=1e-4, atol=1e-7)
        assert torch.equal(before[n], got.model.named_arrays()[n])


@pytest.mark.parametrize("kind", ["reference", "fused"])
def test_gradients_of_parts_add_up_with_dropout(kind):
    """A row's mask follows its place in the global batch, so splitting a batch changes nothing."""
    step = new_step(kind)
    batch = batch_of(step.model.spec, 37)
    whole = step.gradients(batch, step=2)
    parts = [step.gradients(part_of(batch, *cut), step=2) for cut in ((0, 5), (5, 5), (5, 36), (36, 37))]
    for name, g in whole.items():
        torch.testing.assert_close(sum(part[name] for part in parts), g, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", ["reference", "fused"])
def test_an_empty_batch_has_no_loss_and_no_gradient(kind):
    step = new_step(kind)
    empty = part_of(batch_of(step.model.spec, 8), 8, 8)
    assert not any(g.any() for g in step.gradients(empty).values())
    assert step.predict(empty).shape == (0,)
    assert step.train(empty, 0, LR) == 0


def test_a_hot_row_takes_the_whole_batch():
    spec = FeatureSpec([CategoricalFeature("hot", 100_000, 8), CategoricalFeature("b", 3, 2)], [], label="y")
    want, got = (new_step(kind, spec, dropout=0.0) for kind in ("reference", "fused"))
    for i in range(4):
        batch = batch_of(spec, 512, seed=i)
        batch.ids[:, 0] = 77_777
        for step in (want, got):
            step.train(batch, i, LR)
    assert_same(want, got, rtol=1e-3, atol=2e-5)
    fresh = new_step("fused", spec).model
    untouched = torch.arange(100_000) != 77_777
    assert torch.equal(got.model.tables[0][untouched], fresh.tables[0][untouched])
    assert torch.equal(got.model.wide[:100_000][untouched], fresh.wide[:100_000][untouched])


@pytest.mark.parametrize("threads", [1, 3])
def test_fused_repeats_its_bits(threads, request):
    before = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(before))
    results = []
    for n in (2, threads):
        torch.set_num_threads(n)
        step = new_step()
        losses = [step.train(batch_of(step.model.spec, 300, seed=i), i, LR) for i in range(3)]
        results.append((losses, {n: a.clone() for n, a in step.model.named_arrays().items()}))
    assert torch.equal(torch.stack(results[0][0]), torch.stack(results[1][0]))
    for name, array in results[0][1].items():
        assert torch.equal(array, results[1][1][name]), name


def test_fused_reads_no_stale_buffer():
    """Everything that a step reads it has written before: poisoned buffers change no bit."""
    clean, poisoned = new_step(), new_step()
    for i, B in enumerate([64, 20, 64]):
        poisoned.activations.grow(64)
        for buffer in (*poisoned.activations.inputs, *poisoned.activations.gradients, poisoned.grads.flat):
            buffer.fill_(float("nan"))
        for name in ("wide_logit", "logit", "dlogit", "loss"):
            getattr(poisoned.activations, name).fill_(float("nan"))
        batch = batch_of(clean.model.spec, B, seed=i)
        assert torch.equal(clean.train(batch, i, LR), poisoned.train(batch, i, LR))
    for name, array in clean.model.named_arrays().items():
        assert torch.equal(array, poisoned.model.named_arrays()[name]), name


def stays(step, batches):
    """Whether losses, logits and gradients of some batches are what they were when the step returned them."""
    step.train(batches[0], 0, LR)
    returned, copies = [], []
    for i, batch in enumerate(batches, 1):
        returned += [step.train(batch, i, LR), step.predict(batch), *step.parts(batch), *step.gradients(batch).values()]
        copies += [a.clone() for a in returned[len(copies) :]]
    return [torch.equal(a, b) for a, b in zip(returned, copies, strict=True)]


@pytest.mark.parametrize("kind", ["reference", "fused"])
def test_what_a_step_has_returned_stays(kind):
    """A loop reads losses and logits later, when further steps have been made."""
    step = new_step(kind)
    assert all(stays(step, [batch_of(step.model.spec, 20, seed=i) for i in range(2)]))


def test_predictions_do_not_depend_on_chunks(monkeypatch):
    step = new_step()
    batch = batch_of(step.model.spec, 50)
    want = step.predict(batch)
    monkeypatch.setattr(fused, "PREDICT_ROWS", 16)
    torch.testing.assert_close(step.predict(batch), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["reference", "fused"])
def test_state_round_trip_continues_with_the_same_bits(kind, precision):
    step = new_step(kind, config=StepConfig(precision))
    spec = step.model.spec
    for i in range(5):
        step.train(batch_of(spec, 9, seed=i), i, LR)
    state = {name: a.clone() for name, a in step.state().items()}
    weights = {name: a.clone() for name, a in step.model.named_arrays().items()}
    resumed = new_step(kind, config=StepConfig(precision), seed=12)
    resumed.model.seed = step.model.seed
    resumed.predict(batch_of(spec, 3))  # makes its low-precision copies of other weights
    for name, a in resumed.model.named_arrays().items():
        a.copy_(weights[name])
    resumed.load_state(state)
    assert all(torch.equal(a, state[name]) for name, a in resumed.state().items())
    for i in range(5, 10):
        batch = batch_of(spec, 9, seed=i)
        assert torch.equal(step.train(batch, i, LR), resumed.train(batch, i, LR))
    for name, a in step.model.named_arrays().items():
        assert torch.equal(a, resumed.model.named_arrays()[name]), name
    for name, a in step.state().items():
        assert torch.equal(a, resumed.state()[name]), name


def test_a_state_of_another_model_is_refused():
    step = new_step()
    other = new_step(hidden=[40, 70, 8]).state()
    with pytest.raises(InputError, match=r"rms.deep.layer.2.weight: expected shape \[9, 70\], got shape \[8, 70\]"):
        step.load_state(other)
    state = step.state()
    del state["accum.wide.table.a"]
    with pytest.raises(InputError, match=r"accum.wide.table.a: expected shape \[11\], got none"):
        step.load_state(state)


def test_a_state_without_a_count_of_updates_counts_every_step():
    """As those before there was one: their rows know no other numbers."""
    step, resumed = new_step(), new_step()
    for i in range(3):
        step.train(batch_of(step.model.spec, 9, seed=i), i, LR)
    resumed.load_state({name: a for name, a in step.state().items() if name != "updates"})
    assert resumed.state()["updates"] == 3


def test_settling_equals_decaying_every_step():
    """Rows touched once, then left alone: their mean squares halve in each of the following steps."""
    spec = FeatureSpec([CategoricalFeature("a", 50, 4)], [], label="y")
    for kind in ("reference", "fused"):
        step = new_step(kind, spec)
        first = batch_of(spec, 6)
        first.ids[:] = torch.arange(6, dtype=torch.int32)[:, None]
        step.train(first, 0, LR)
        rms = step.state()["rms.deep.table.a"].clone()
        assert (rms[:6] > 0).any()
        for i in range(1, 8):
            later = batch_of(spec, 6, seed=i)
            later.ids[:] = 40
            step.train(later, i, LR)
        step.settle()
        assert torch.equal(step.state()["rms.deep.table.a"][:6], rms[:6] / 2**7)
        step.settle()
        assert torch.equal(step.state()["rms.deep.table.a"][:6], rms[:6] / 2**7)


@pytest.mark.parametrize("products", ["own", "library"])
def test_bf16_copies_follow_the_weights(products, monkeypatch):
    """Whoever writes the weights: the step itself, a checkpoint, an optimizer, or another step."""
    monkeypatch.setenv("WIDEDEEP_BF16_PRODUCTS", products)
    step = new_step(config=StepConfig("bf16"))
    batch = batch_of(step.model.spec, 20)
    exact = new_step(config=StepConfig("fp32"))

    def assert_follows():
        exact.model.load_state_dict(step.model.state_dict())
        got, want = step.predict(batch), exact.predict(batch)
        # A logit near zero is a sum of large terms: what rounding leaves in it goes by the size of those.
        torch.testing.assert_close(got, want, rtol=0, atol=3e-2 * float(want.abs().max()))
        assert not torch.equal(got, want)

    for i in range(3):
        step.train(batch, i, 0.05)
    assert_follows()
    for a in step.model.named_arrays().values():
        a.mul_(-1.5)
    assert_follows()
    weights = [p for p in step.model.parameters() if p.numel()]
    for p in weights:
        p.grad = torch.full_like(p, -0.02)
    torch.optim.SGD(weights, lr=1.0).step()
    assert_follows()
    RMSprop(weights, lr=0.05).step()
    assert_follows()
    other = make_step("fused", step.model)
    for i in range(3):
        other.train(batch, i, 0.05)
    assert_follows()


@pytest.mark.parametrize("parts", ["both", "wide", "deep"])
@pytest.mark.parametrize("kind", ["reference", "fused"])
@pytest.mark.parametrize("name", [MIXED, "no categorical", "some wide only"])
def test_ranks_give_the_result_of_one(kind, name, parts):
    """Three ranks, unequal parts, one of them empty in some steps; dropout on."""
    cuts = [(0, 10, 31, 40), (0, 0, 25, 40), (0, 1, 2, 40), (0, 40, 40, 40)]
    spec = SPECS[name]

    def train(comm):
        step = new_step(kind, name, comm=comm, parts=parts)
        losses = []
        for i, cut in enumerate(cuts):
            batch = batch_of(spec, 40, seed=i)
            mine = part_of(batch, cut[comm.rank], cut[comm.rank + 1]) if comm.world > 1 else batch
            losses.append(step.train(mine, i, LR))
        return torch.stack(losses), step

    want_losses, want = train(LocalComm("cpu"))
    results = in_ranks(3, train)
    torch.testing.assert_close(sum(losses for losses, _ in results), want_losses, rtol=1e-5, atol=1e-6)
    for _, step in results:
        assert_same(want, step, rtol=1e-3, atol=2e-5)
        for name_, a in step.model.named_arrays().items():
            assert torch.equal(a, results[0][1].model.named_arrays()[name_]), name_


def test_fp16_scales_the_loss_and_skips_overflows():
    step = new_step("reference", config=StepConfig("fp16"))
    exact = new_step("reference")
    batch = batch_of(step.model.spec, 40)
    losses = [s.train(batch, 0, LR) for s in (step, exact)]
    torch.testing.assert_close(losses[0], losses[1], rtol=5e-3, atol=1e-3)
    assert step.state()["loss_scale"] == 2**15
    for name, a in step.model.named_arrays().items():
        torch.testing.assert_close(a, exact.model.named_arrays()[name], rtol=1e-2, atol=4e-3)
    step.settle()
    before = {name: a.clone() for name, a in step.model.named_arrays().items()}
    slots = {name: a.clone() for name, a in step.state().items()}
    batch.numeric[3, 0] = 1e6  # infinite in float16
    step.train(batch, 1, LR)
    step.settle()
    assert step.state()["loss_scale"] == 2**14
    for name, a in step.model.named_arrays().items():
        assert torch.equal(a, before[name]), name
    for name, a in step.state().items():
        assert name in ("loss_scale", "good_steps", "step") or torch.equal(a, slots[name]), name


@pytest.mark.parametrize(
    ("kind", "precision", "words"),
    [
        ("magic", "fp32", "step: expected one of auto, reference, fused, got 'magic'"),
        ("fused", "int8", "precision: expected one of fp32, tf32, bf16, fp16, got 'int8'"),
        ("fused", "fp16", "precision: expected fp32 or bf16 for the fused step on a CPU, got 'fp16'"),
        ("reference", "tf32", "precision: expected fp32 or bf16 on a CPU, which has no tf32"),
    ],
)
def test_unknown_choices_are_refused(kind, precision, words):
    with pytest.raises(InputError) as error:
        new_step(kind, config=StepConfig(precision))
    assert words in str(error.value)


def test_an_id_outside_its_table_is_an_error():
    spec = FeatureSpec([CategoricalFeature("a", 5, 3)], [NumericFeature("x")], label="y")
    step = new_step("fused", spec)
    batch = batch_of(spec, 4)
    batch.ids[2, 0] = 5
    before = {name: a.clone() for name, a in step.model.named_arrays().items()}
    with pytest.raises(RuntimeError):
        step.train(batch, 0, LR)
    for name, a in step.model.named_arrays().items():
        assert torch.equal(a, before[name])


def test_without_a_device_the_model_stays_where_it_is(device):
    model = WideDeep(SPECS["one-hot and multi-hot"], hidden=[8], seed=1).to(device)
    step = make_step("auto", model)
    assert step.device.type == device
    # A GPU is named for good: "cuda" means whichever is the current one.
    assert make_step("auto", model, device=device).device == next(model.parameters()).device
    assert {p.device.type for p in model.parameters()} == {device}
    ids, numeric, label = inputs(model.spec, 16, device)
    assert step.train(Batch(ids, numeric, label, None, 0, 16), 0, 1e-3).device.type == device
