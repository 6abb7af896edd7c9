"""RMSprop and FTRL updates, dense and on listed rows."""

import pytest
import torch
from test_ops_embedding import State, gradients, make, segments_of
from torch.library import opcheck

from widedeep import ops, reference
from widedeep.testing import assert_close, generator, normal

RHO, EPS, LR = 0.5, 1e-7, 1e-2
OPS = torch.ops.widedeep


def scalar(value, device, dtype=torch.float32):
    return torch.tensor(value, dtype=dtype, device=device)


def clones(*tensors, dtype=None):
    return [t.clone() if dtype is None else t.to(dtype, copy=True) for t in tensors]


def dense_case(device, grad_dtype=torch.float32, key=()):
    shapes = [(3, 5), (1,), (0, 4), (129, 67), (5000,), (2048 * 3 + 1,)]  # a scalar, an empty one, past several blocks
    weights = [normal(*s, device=device, key=key) for s in shapes]
    rms = [normal(*s, device=device, key=(key, 1), scale=1e-3).square() for s in shapes]
    grads = [normal(*s, device=device, dtype=grad_dtype, key=(key, 2), scale=1e-3) for s in shapes]
    return weights, rms, grads


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("copy_dtype", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scaled", [False, True])
def test_rmsprop_dense_matches_reference(device, grad_dtype, copy_dtype, scaled):
    weights, rms, grads = dense_case(device, grad_dtype)
    copies = [] if copy_dtype is None else [torch.full_like(w, torch.nan, dtype=copy_dtype) for w in weights]
    scale = scalar(1024.0, device) if scaled else None
    found = scalar(0.0, device) if scaled else None
    want = [clones(*part, dtype=torch.float64) for part in (weights, rms, grads)]
    start = clones(*weights)

    ops.rmsprop_dense_(weights, rms, grads, copies, scalar(LR, device), RHO, EPS, scale, found)
    reference.rmsprop_dense_(*want, [], LR, RHO, EPS, scale, found)
    for i, w in enumerate(weights):
        assert_close(rms[i], want[1][i])
        assert_close(w - start[i], want[0][i] - start[i].double(), scale=30)  # the movement, not only the weight
        if copies:
            torch.testing.assert_close(copies[i], w.to(copy_dtype), rtol=0, atol=0)


def test_a_mean_square_ends_at_zero_on_a_cpu():
    """Arithmetic with denormals takes forty times as long, and a weight without gradients would keep them for good."""
    n = 5000
    w, rms, lr = torch.ones(n), torch.full((n,), 5.6e-45), torch.ones(1)
    ops.rmsprop_dense_([w], [rms], [torch.zeros(n)], [], lr, 0.5, 1e-7)
    assert torch.equal(rms, torch.zeros(n))
    assert torch.equal(w, torch.ones(n))
    assert torch.full((n,), 1e-40).mul(2).ne(0).all()  # of others they are not flushed


def test_rmsprop_dense_does_nothing_when_gradients_overflowed(device):
    weights, rms, grads = dense_case(device)
    grads[0][0, 0] = torch.inf
    before = clones(*weights, *rms)
    found = scalar(0.0, device)
    ops.check_finite_(grads, found)
    assert found.item() == 1.0
    ops.rmsprop_dense_(weights, rms, grads, [], scalar(LR, device), RHO, EPS, scalar(2.0, device), found)
    for got, want in zip([*weights, *rms], before):
        assert torch.equal(got, want)


def rows_case(device, R=40, D=17, n=100, kind="duplicates", key=()):
    rows = {
        "duplicates": lambda: torch.randint(-1, R, (n,), generator=generator("rows", R, n, key)),
        "hot": lambda: torch.full((n,), R - 1),
        "none": lambda: torch.full((n,), -1),
        "empty": lambda: torch.empty(0, dtype=torch.int64),
    }[kind]().to(device)
    return rows, normal(len(rows), D, device=device, scale=1e-2, key=(key, "g"))


@pytest.mark.parametrize("kind", ["duplicates", "hot", "none", "empty"])
@pytest.mark.parametrize("D", [1, 17, 64])
def test_rmsprop_rows_matches_reference(device, kind, D):
    R = 40
    weight, rms = normal(R, D, device=device), normal(R, D, device=device, key=1).square() * 1e-4
    last = torch.randint(0, 9, (R,), generator=generator("last"), dtype=torch.int32).to(device)
    step = scalar(9, device, torch.int64)
    rows, grads = rows_case(device, R, D, kind=kind)
    want = [*clones(weight, rms, dtype=torch.float64), last.clone()]
    start = weight.clone()
    ops.rmsprop_rows_(weight, rms, last, rows, grads, scalar(LR, device), step, RHO, EPS)
    reference.rmsprop_rows_(*want, rows, grads.double(), LR, step, RHO, EPS)
    assert_close(rms, want[1], scale=5)
    assert_close(weight - start, want[0] - start.double(), scale=100)
    assert torch.equal(last, want[2])


def test_rmsprop_rows_with_pauses_equals_dense_steps(device):
    """Ten steps in which most rows pause, against the rule that decays every row in every step."""
    R, D = 30, 8
    weight, rms = normal(R, D, device=device), torch.zeros(R, D, device=device)
    last = torch.full((R,), -1, dtype=torch.int32, device=device)
    w64, r64 = clones(weight, rms, dtype=torch.float64)
    for t in range(10):
        rows, grads = rows_case(device, R, D, n=12, key=t)
        step = scalar(t, device, torch.int64)
        ops.rmsprop_rows_(weight, rms, last, rows, grads, scalar(LR, device), step, RHO, EPS)
        valid = rows >= 0
        g64 = torch.zeros_like(w64).index_add_(0, rows[valid], grads[valid].double())
        touched = torch.zeros(R, dtype=torch.bool, device=device)
        touched[rows[valid]] = True
        r64 = RHO * r64 + (1 - RHO) * g64**2
        w64 -= torch.where(touched[:, None], LR * g64 / (r64.sqrt() + EPS), 0)
    ops.rmsprop_settle_(rms, last, scalar(9, device, torch.int64), RHO)
    assert_close(rms, r64, scale=10)
    assert_close(weight, w64, scale=20)
    assert (last == 9).all()


def test_settle_then_update_is_update(device):
    """Bringing every row up to date in between changes nothing: a power of a half is exact."""
    R, D = 20, 5
    weight, rms = normal(R, D, device=device), normal(R, D, device=device, key=3).square()
    last = torch.randint(-1, 5, (R,), generator=generator("settle"), dtype=torch.int32).to(device)
    rows, grads = rows_case(device, R, D)
    args = (rows, grads, scalar(LR, device), scalar(9, device, torch.int64), RHO, EPS)
    settled = clones(weight, rms, last)
    ops.rmsprop_settle_(settled[1], settled[2], scalar(6, device, torch.int64), RHO)
    ops.rmsprop_rows_(*settled, *args)
    ops.rmsprop_rows_(weight, rms, last, *args)
    touched = rows[rows >= 0]
    assert torch.equal(settled[0], weight)
    assert torch.equal(settled[1][touched], rms[touched])


def test_row_updates_are_the_same_bits_for_any_thread_count():
    R, D = 500, 33
    rows, grads = rows_case("cpu", R, D, n=5000)
    results = []
    for threads in (1, 2, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        weight, rms = normal(R, D), normal(R, D, key=1).square()
        last = torch.zeros(R, dtype=torch.int32)
        ops.rmsprop_rows_(weight, rms, last, rows, grads, scalar(LR, "cpu"), scalar(4, "cpu", torch.int64), RHO, EPS)
        dense, dense_rms, g = dense_case("cpu")
        ops.rmsprop_dense_(dense, dense_rms, g, [], scalar(LR, "cpu"), RHO, EPS)
        torch.set_num_threads(before)
        results.append([weight, rms, *dense, *dense_rms])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize(("l1", "l2"), [(0.0, 0.0), (1e-3, 0.02)])
@pytest.mark.parametrize("shape", [(1,), (14,), (5000,), (3, 4)])
def test_ftrl_dense_matches_reference(device, shape, l1, l2):
    state = [normal(*shape, device=device, scale=0.05), torch.full(shape, 0.1, device=device)]
    state.append(torch.zeros(shape, device=device))
    want = clones(*state, dtype=torch.float64)
    for t in range(5):
        grad = normal(*shape, device=device, scale=0.05, key=t)
        ops.ftrl_dense_(*state, grad, 0.02, l1, l2)
        reference.ftrl_dense_(*want, grad.double(), 0.02, l1, l2, None, None)
    for got, wanted in zip(state, want):
        assert_close(got, wanted, scale=50)


def test_ftrl_dense_divides_by_the_loss_scale_and_skips(device):
    state = [normal(9, device=device), torch.full((9,), 0.1, device=device), torch.zeros(9, device=device)]
    plain, skipped = clones(*state), clones(*state)
    grad = normal(9, device=device, key="g")
    ops.ftrl_dense_(*plain, grad, 0.02)
    ops.ftrl_dense_(*skipped, grad, 0.02, grad_scale=scalar(8.0, device), found_inf=scalar(1.0, device))
    assert all(torch.equal(a, b) for a, b in zip(skipped, state))
    ops.ftrl_dense_(*state, grad * 8, 0.02, grad_scale=scalar(8.0, device), found_inf=scalar(0.0, device))
    assert all(torch.equal(a, b) for a, b in zip(plain, state))


@pytest.mark.parametrize("kind", ["duplicates", "hot", "none", "empty"])
@pytest.mark.parametrize("D", [None, 3])
def test_ftrl_rows_matches_reference(device, kind, D):
    R = 40
    shape = (R,) if D is None else (R, D)
    state = [normal(*shape, device=device, scale=0.05), torch.full(shape, 0.1, device=device)]
    state.append(normal(*shape, device=device, scale=0.01, key=2))
    want = clones(*state, dtype=torch.float64)
    rows, grads = rows_case(device, R, D or 1, kind=kind)
    grads = grads if D else grads[:, 0].contiguous()
    before = clones(*state)
    ops.ftrl_rows_(*state, rows, grads, 0.02, 1e-4, 0.01)
    reference.ftrl_rows_(*want, rows, grads.double(), 0.02, 1e-4, 0.01)
    untouched = torch.ones(R, dtype=torch.bool, device=device)
    untouched[rows[rows >= 0]] = False
    for got, wanted, old in zip(state, want, before):
        assert_close(got, wanted, scale=10)
        assert torch.equal(got[untouched], old[untouched])


def test_optimizer_ops_opcheck(device):
    weights, rms, grads = dense_case(device)
    lr, step = scalar(LR, device), scalar(3, device, torch.int64)
    opcheck(OPS.rmsprop_dense_.default, (weights, rms, grads, [], lr, RHO, EPS, None, None))
    copies = [w.half() for w in weights]
    flags = (scalar(2.0, device), scalar(0.0, device))
    opcheck(OPS.rmsprop_dense_.default, (weights, rms, grads, copies, lr, RHO, EPS, *flags))
    rows, row_grads = rows_case(device)
    table, table_rms = normal(40, 17, device=device), normal(40, 17, device=device, key=1).square()
    last = torch.zeros(40, dtype=torch.int32, device=device)
    opcheck(OPS.rmsprop_rows_.default, (table, table_rms, last, rows, row_grads, lr, step, RHO, EPS))
    opcheck(OPS.rmsprop_settle_.default, (table_rms, last, step, RHO))
    state = [table, table.square() + 0.1, table.clone()]
    opcheck(OPS.ftrl_dense_.default, (*state, normal(40, 17, device=device, key=5), 0.02, 0.0, 0.0, *flags))
    opcheck(OPS.ftrl_rows_.default, (*state, rows, row_grads, 0.02, 0.0, 0.0))


def test_optimizer_ops_reject_bad_arguments(device):
    lr, step = scalar(LR, device), scalar(3, device, torch.int64)
    w, r = normal(4, 3, device=device), normal(4, 3, device=device)
    last = torch.zeros(4, dtype=torch.int32, device=device)
    rows, g = torch.tensor([0, 3], device=device), normal(2, 3, device=device)
    with pytest.raises(RuntimeError, match="lists of one length"):
        ops.rmsprop_dense_([w], [r, r], [w], [], lr, RHO, EPS)
    with pytest.raises(RuntimeError, match="rms\\[0\\] must be"):
        ops.rmsprop_dense_([w], [r[:2]], [w], [], lr, RHO, EPS)
    with pytest.raises(RuntimeError, match="grads must be float32, float16 or bfloat16"):
        ops.rmsprop_dense_([w], [r], [w.double()], [], lr, RHO, EPS)
    with pytest.raises(RuntimeError, match="weights\\[0\\] must be"):
        ops.rmsprop_dense_([w.T], [r.T], [g], [], lr, RHO, EPS)
    with pytest.raises(RuntimeError, match="lr must be one"):
        ops.rmsprop_rows_(w, r, last, rows, g, torch.ones(2, device=device), step, RHO, EPS)
    with pytest.raises(RuntimeError, match="last_step must be"):
        ops.rmsprop_rows_(w, r, last.long(), rows, g, lr, step, RHO, EPS)
    with pytest.raises(RuntimeError, match="grads must be"):
        ops.rmsprop_rows_(w, r, last, rows, g[:1], lr, step, RHO, EPS)
    with pytest.raises(RuntimeError, match="accum must be"):
        ops.ftrl_dense_(w, r[:3], r, r, 0.02)


@pytest.mark.parametrize("lr", [0.0, -0.02, float("nan"), 1e-50])  # the last is 0 in float32
def test_ftrl_divides_by_no_rate_that_is_not_above_zero(lr, device):
    state = [normal(4, 3, device=device, key=k).abs() for k in range(3)]
    before = [s.clone() for s in state]
    rows, g = torch.tensor([0, 3], device=device), normal(2, 3, device=device)
    with pytest.raises(RuntimeError, match="ftrl_dense_: lr must be above 0 in float32, got"):
        ops.ftrl_dense_(*state, normal(4, 3, device=device), lr)
    with pytest.raises(RuntimeError, match="ftrl_rows_: lr must be above 0 in float32, got"):
        ops.ftrl_rows_(*state, rows, g, lr)
    assert all(torch.equal(a, b) for a, b in zip(state, before))
    case = make(8, None, "zipf", device)
    own = State(case, device)
    before = own.copy(torch.float32)
    args = (case.ids, *gradients(case, device), *segments_of(case), *own.args(), case.hotness, case.mean, case.columns)
    with pytest.raises(RuntimeError, match="embedding_update_: wide_lr must be above 0 in float32, got"):
        ops.embedding_update_(*args, scalar(LR, device), scalar(9, device, torch.int64), RHO, EPS, lr)
    for a, b in zip(own.args(), before.args()):
        assert all(map(torch.equal, a, b)) if isinstance(a, list) else torch.equal(a, b)


def test_row_updates_reject_rows_outside_the_table():
    w, r, last = normal(4, 3), normal(4, 3), torch.zeros(4, dtype=torch.int32)
    lr, step = scalar(LR, "cpu"), scalar(3, "cpu", torch.int64)
    for bad in (4, -2, 2**40):
        rows = torch.tensor([0, bad])
        with pytest.raises(RuntimeError, match=f"rows\\[1\\] is {bad}, outside"):
            ops.rmsprop_rows_(w, r, last, rows, normal(2, 3), lr, step, RHO, EPS)
        with pytest.raises(RuntimeError, match=f"rows\\[1\\] is {bad}, outside"):
            ops.ftrl_rows_(w, r, r.clone(), rows, normal(2, 3), 0.02)
