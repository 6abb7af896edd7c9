"""RMSprop and FTRL as torch optimizers: the original's reference vectors, and float64 rules written out here."""

import copy

import pytest
import torch

from widedeep.optim import FTRL, RMSprop


def sparse(ids, grads, shape, device="cpu"):
    """Uncoalesced COO gradient: ids may repeat."""
    values = torch.tensor(grads, dtype=torch.float32, device=device).view(len(ids), *shape[1:])
    return coo_tensor(torch.tensor([ids], device=device), values, shape)


def coo_tensor(indices, values, shape):
    return torch.sparse_coo_tensor(indices, values, shape, check_invariants=True)


def rmsprop_float64(w, rms, g, lr, rho, eps):
    """The dense rule; returns new weight and mean square."""
    rms = rho * rms + (1 - rho) * g * g
    return w - lr * g / (rms.sqrt() + eps), rms


def ftrl_float64(w, n, z, g, lr, l1, l2):
    m = n + g * g
    z = z + g - (m.sqrt() - n.sqrt()) / lr * w
    w = torch.where(z.abs() > l1, (z.sign() * l1 - z) / (m.sqrt() / lr + 2 * l2), 0)
    return w, m, z


RMSPROP_STEPS = [
    ([0, 2, 0], [[1, 2], [3, -4], [0.5, -0.5]]),
    ([2], [[0.1, 0.2]]),
    ([1, 1], [[1e-4, -1e-4], [1e-4, 0]]),
]
RMSPROP_WEIGHTS = [
    [[0.09983029, -0.20016971], [0.3, 0.4], [0.4998303, 0.6001697]],
    [[0.09983029, -0.20016971], [0.3, 0.4], [0.49982232, 0.60015774]],
    [[0.09983029, -0.20016971], [0.29983044, 0.40016946], [0.49982232, 0.60015774]],
]
RMSPROP_RMS = [
    [[1.125, 1.125], [0, 0], [4.5, 8.0]],
    [[0.5625, 0.5625], [0, 0], [2.255, 4.02]],
    [[0.28125, 0.28125], [2e-8, 5e-9], [1.1275, 2.01]],
]


@pytest.mark.parametrize("layout", ["sparse", "dense"])
def test_rmsprop_reference_vectors(layout, device):
    w = torch.nn.Parameter(torch.tensor([[0.1, -0.2], [0.3, 0.4], [0.5, 0.6]], device=device))
    optimizer = RMSprop([w])
    for number, (ids, grads) in enumerate(RMSPROP_STEPS):
        g = sparse(ids, grads, w.shape, device)
        w.grad = g if layout == "sparse" else g.to_dense()
        optimizer.step()
        torch.testing.assert_close(w.data.cpu(), torch.tensor(RMSPROP_WEIGHTS[number]), rtol=2e-7, atol=1e-8)
        state = optimizer.state[w]
        rms = state["rms"].cpu().clone()
        if layout == "sparse":  # what a dense optimizer would hold now
            rms *= (0.5 ** (number - state["last_step"].cpu().float()))[:, None]
        want = torch.tensor(RMSPROP_RMS[number])
        touched = want > 0
        torch.testing.assert_close(rms[touched], want[touched], rtol=2e-6, atol=0)
        assert (rms[~touched] == 0).all()


FTRL_STEPS = [([0, 2, 0], [0.5, -0.25, 0.1]), ([2], [0.05]), ([0], [-1e-3])]
FTRL_RESULTS = [  # weight, accum, linear
    ([-0.012355559, -0.02, 0.018869538], [0.46, 0.1, 0.1625], [0.4189974, 0, -0.3803277]),
    ([-0.012355559, -0.02, 0.016407708], [0.46, 0.1, 0.165], [0.4189974, 0, -0.3332421]),
    ([-0.01232607, -0.02, 0.016407708], [0.460001, 0.1, 0.165], [0.41799787, 0, -0.3332421]),
]


@pytest.mark.parametrize("layout", ["sparse", "dense"])
@pytest.mark.parametrize("shape", [(3, 1), (3,)], ids=str)
def test_ftrl_reference_vectors(layout, shape, device):
    w = torch.nn.Parameter(torch.tensor([0.01, -0.02, 0.03], device=device).view(shape))
    optimizer = FTRL([w])
    for (ids, grads), (weight, accum, linear) in zip(FTRL_STEPS, FTRL_RESULTS):
        g = sparse(ids, grads, shape, device)
        w.grad = g if layout == "sparse" else g.to_dense()
        optimizer.step()
        weight = torch.tensor(weight)
        if layout == "dense":
            weight[1] = 0  # never had a gradient
        state = optimizer.state[w]
        for got, want in ((w.data, weight), (state["accum"], accum), (state["linear"], linear)):
            torch.testing.assert_close(got.cpu().flatten(), torch.as_tensor(want), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("rho", [0.5, 0.9])
def test_rmsprop_after_pauses_equals_the_dense_rule(rho, device):
    """Rows are left alone for up to 500 steps; the other path touches every row in every step."""
    R, D = 12, 3
    g = torch.Generator().manual_seed(R)
    w = torch.nn.Parameter(torch.randn(R, D, generator=g).to(device))
    want, rms = w.detach().cpu().double(), torch.zeros(R, D, dtype=torch.float64)
    optimizer = RMSprop([w], lr=1e-2, rho=rho)
    visits = {0: range(12), 1: [3, 3, 5], 2: [5], 9: [3], 60: [0, 3, 11, 3], 160: [5, 0], 501: [5, 7], 502: [0, 5]}
    for step in range(503):
        ids = list(visits.get(step, []))
        grads = torch.randn(len(ids), D, generator=g) * 10.0 ** -(step % 4)
        w.grad = coo_tensor(torch.tensor([ids], dtype=torch.int64), grads, (R, D)).to(device)
        optimizer.step()
        dense = torch.zeros(R, D, dtype=torch.float64).index_add_(
            0, torch.tensor(ids, dtype=torch.int64), grads.double()
        )
        want, rms = rmsprop_float64(want, rms, dense, 1e-2, rho, 1e-7)
    torch.testing.assert_close(w.data.cpu().double(), want, rtol=2e-6, atol=2e-8)


def test_rmsprop_takes_sparse_and_dense_gradients_in_turn(device):
    R, D = 9, 4
    g = torch.Generator().manual_seed(7)
    w = torch.nn.Parameter(torch.randn(R, D, generator=g).to(device))
    want, rms = w.detach().cpu().double(), torch.zeros(R, D, dtype=torch.float64)
    optimizer = RMSprop([w], lr=1e-2, rho=0.9)
    for step, kind in enumerate("dsssddsdsssssds"):
        grad = torch.randn(R, D, generator=g)
        if kind == "s":
            ids = torch.randint(R, (3,), generator=g)
            coo = coo_tensor(ids[None], grad[:3], (R, D))
            w.grad, grad = coo.to(device), coo.to_dense()
        else:
            w.grad = grad.to(device)
        optimizer.param_groups[0]["lr"] = 1e-2 / (1 + step)
        optimizer.step()
        want, rms = rmsprop_float64(want, rms, grad.double(), 1e-2 / (1 + step), 0.9, 1e-7)
    torch.testing.assert_close(w.data.cpu().double(), want, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize(("l1", "l2"), [(0.0, 0.0), (0.3, 0.0), (0.0, 0.2), (0.3, 0.2)])
@pytest.mark.parametrize("layout", ["sparse", "dense"])
def test_ftrl_equals_the_rule(l1, l2, layout, device):
    R = 40
    g = torch.Generator().manual_seed(R)
    w = torch.nn.Parameter(torch.randn(R, generator=g).to(device))
    want, n, z = w.detach().cpu().double(), torch.full((R,), 0.1, dtype=torch.float64), torch.zeros(R).double()
    optimizer = FTRL([w], lr=0.05, l1=l1, l2=l2)
    for _ in range(20):
        ids = torch.randint(R // 2, (25,), generator=g)  # with duplicates; the upper half is never touched
        coo = coo_tensor(ids[None], torch.randn(25, generator=g), (R,))
        w.grad = (coo if layout == "sparse" else coo.to_dense()).to(device)
        optimizer.step()
        new = ftrl_float64(want, n, z, coo.to_dense().double(), 0.05, l1, l2)
        touched = torch.ones(R, dtype=torch.bool)
        if layout == "sparse":
            touched = torch.zeros(R, dtype=torch.bool).index_fill_(0, ids, True)
        want, n, z = (torch.where(touched, a, b) for a, b in zip(new, (want, n, z)))
    torch.testing.assert_close(w.data.cpu().double(), want, rtol=1e-4, atol=1e-6)
    assert (w.data.cpu()[R // 2 :] == 0).all() == (layout == "dense")


@pytest.mark.parametrize("kind", [RMSprop, FTRL])
@pytest.mark.parametrize("layout", ["sparse", "dense"])
def test_state_dict_round_trip_continues_with_the_same_bits(kind, layout, device):
    g = torch.Generator().manual_seed(3)
    w = torch.nn.Parameter(torch.randn(8, 2, generator=g).to(device))
    grads = []
    for _ in range(8):
        coo = coo_tensor(torch.randint(8, (1, 4), generator=g), torch.randn(4, 2, generator=g), (8, 2))
        grads.append((coo if layout == "sparse" else coo.to_dense()).to(device))
    optimizer = kind([w])
    for grad in grads[:4]:
        w.grad = grad
        optimizer.step()
    v = torch.nn.Parameter(w.detach().clone())
    resumed = kind([v], lr=123.0)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for grad in grads[4:]:
        w.grad, v.grad = grad, grad.clone()
        optimizer.step()
        resumed.step()
    assert torch.equal(w, v)
    for name, value in optimizer.state[w].items():
        assert torch.equal(value, resumed.state[v][name]), name


def test_a_state_dict_keeps_steps_that_float32_does_not_hold():
    w = torch.nn.Parameter(torch.ones(2, 1))
    optimizer, resumed = RMSprop([w]), RMSprop([torch.nn.Parameter(torch.zeros(1)), w])
    w.grad = sparse([1], [[1]], (2, 1))
    optimizer.step()
    optimizer.state[w]["last_step"].fill_(2**24 + 1)
    optimizer.state[w]["step"].fill_(2**24 + 1)
    state = optimizer.state_dict()
    state["param_groups"][0]["params"] = [7, 0]  # the saved state is the second parameter's
    resumed.load_state_dict(state)
    for name in ("last_step", "step"):
        assert torch.equal(resumed.state[w][name], optimizer.state[w][name])
        assert resumed.state[w][name].dtype == optimizer.state[w][name].dtype


OTHERS = [(RMSprop, torch.optim.Adam), (RMSprop, torch.optim.RMSprop), (RMSprop, FTRL)]
OTHERS += [(FTRL, torch.optim.Adam), (FTRL, torch.optim.Adagrad), (FTRL, RMSprop)]


@pytest.mark.parametrize(("kind", "other"), OTHERS)
@pytest.mark.parametrize("steps", [0, 1])
def test_the_state_of_another_optimizer_is_refused_when_it_is_loaded(kind, other, steps):
    saved, own = other([torch.nn.Parameter(torch.ones(3))]), kind([w := torch.nn.Parameter(torch.ones(3))])
    for optimizer, count in ((saved, steps), (own, 1)):
        for _ in range(count):
            optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
            optimizer.step()
    names = {RMSprop: "rho", FTRL: "l1, l2"}[kind]
    with pytest.raises(ValueError, match=rf"that of widedeep's {kind.__name__}, with .*{names}.* of each group, found"):
        own.load_state_dict(saved.state_dict())
    before = w.detach().clone()
    own.step()  # with what it had
    assert not torch.equal(w, before)


def test_a_state_without_a_slot_is_refused():
    w = torch.nn.Parameter(torch.ones(3))
    optimizer = FTRL([w])
    w.grad = torch.ones(3)
    optimizer.step()
    state = optimizer.state_dict()
    state["state"][0] = {"accum": state["state"][0]["accum"]}
    with pytest.raises(ValueError, match=r"FTRL, with linear of each parameter, found accum$"):
        optimizer.load_state_dict(state)


def test_groups_closures_and_absent_gradients():
    a, b, c = (torch.nn.Parameter(torch.ones(3)) for _ in range(3))
    optimizer = RMSprop([{"params": [a], "lr": 0.1}, {"params": [b, c]}], lr=0.01)

    def closure():
        optimizer.zero_grad()
        loss = (a * a + b * b).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 6
    # the first step from rms = 0 moves by lr sqrt(2) wherever |g| >> eps
    assert (1 - a).tolist() == pytest.approx([0.1 * 2**0.5] * 3, rel=1e-5)
    assert (1 - b).tolist() == pytest.approx([0.01 * 2**0.5] * 3, rel=1e-5)
    assert torch.equal(c, torch.ones(3))
    assert c not in optimizer.state


@pytest.mark.parametrize(
    "gradient", [torch.ones(3, 2), sparse([0, 2], [[1, 1], [1, 1]], (3, 2))], ids=["dense", "sparse"]
)
@pytest.mark.parametrize("kind", [RMSprop, FTRL])
def test_an_empty_table_and_a_zero_gradient_are_fine(kind, gradient):
    w = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = kind([w])
    w.grad = gradient * 0
    optimizer.step()
    assert w.isfinite().all()
    w.grad = coo_tensor(torch.zeros(1, 0, dtype=torch.int64), torch.zeros(0, 2), (3, 2))
    before = w.detach().clone()
    optimizer.step()
    assert torch.equal(w, before)
    for shape in ((0, 2), (0,)):  # rows that no table has yet
        w = torch.nn.Parameter(torch.ones(shape))
        optimizer = kind([w])
        w.grad = coo_tensor(torch.zeros(1, 0, dtype=torch.int64), torch.zeros(shape), shape)
        optimizer.step()
        w.grad = torch.zeros(shape)
        optimizer.step()


@pytest.mark.parametrize("layout", ["dense", "sparse"])
def test_ftrl_waits_while_its_rate_is_zero(layout):
    """As at the beginning of a warm-up and the end of a cosine; the rule divides by the rate."""
    w = torch.nn.Parameter(torch.tensor([[0.5], [-0.5]]))
    optimizer = FTRL([w], lr=0.02)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: t / 10)
    ones = sparse([0, 1], [1.0, 1.0], (2, 1)) if layout == "sparse" else torch.ones(2, 1)
    for step in range(3):
        w.grad = ones.clone()
        optimizer.step()
        schedule.step()
        assert w.isfinite().all()
        assert torch.equal(w, torch.tensor([[0.5], [-0.5]])) == (step == 0)
    optimizer.param_groups[0]["lr"] = -0.1
    with pytest.raises(ValueError, match=r"lr: expected a number >= 0, got -0\.1"):
        optimizer.step()


def test_bad_settings_are_refused():
    w = torch.nn.Parameter(torch.ones(3))
    for kind, settings, words in (
        (RMSprop, {"lr": -1}, "lr: expected a number >= 0"),
        (RMSprop, {"rho": 1}, "rho: expected a number in"),
        (RMSprop, {"eps": float("nan")}, "eps: expected a number > 0"),
        (RMSprop, {"eps": 0}, "eps: expected a number > 0"),
        (FTRL, {"lr": 0}, "lr: expected a number > 0"),
        (FTRL, {"l1": -1}, "l1: expected a number >= 0"),
    ):
        with pytest.raises(ValueError, match=words):
            kind([w], **settings)
        with pytest.raises(ValueError, match=words):
            kind([{"params": [w], **settings}])
        optimizer = kind([torch.nn.Parameter(torch.ones(2))])
        with pytest.raises(ValueError, match=words):
            optimizer.add_param_group({"params": [w], **settings})
        optimizer.add_param_group({"params": [w]})
    w = torch.nn.Parameter(torch.ones(3, 2))
    w.grad = torch.ones(3, 2).to_sparse()
    with pytest.raises(RuntimeError, match="one sparse dimension, got 2"):
        RMSprop([w]).step()
