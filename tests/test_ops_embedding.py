"""The embedding family: gather, segments, gradients of the touched rows, and their fused update."""

import inspect

import pytest
import torch
from torch.library import opcheck

from widedeep import ops, reference
from widedeep.testing import OUTBRAIN_TABLES, assert_close, embedding_case, normal, poisoned

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OPS = torch.ops.widedeep
MULTI = ((100, 24, 3, 0), (60, 8, 5, 1), (9, 5, 2, 1))
WIDE_ONLY = ((30, 0, 1, 0), (4, 0, 3, 0))
# (B, tables or None for the mixed small set, kind of ids)
CASES = [
    (0, None, "zipf"),
    (1, None, "zipf"),
    (67, None, "zipf"),
    (1025, None, "zipf"),
    (300, MULTI, "zipf"),
    (300, MULTI, "padding"),
    (300, None, "hot"),
    (4099, ((7, 33, 1, 0), (5, 16, 2, 1)), "hot"),
    (50, WIDE_ONLY, "zipf"),
    (33, (), "zipf"),
]
NAMES = [f"B={B}-{'small' if t is None else f'F={len(t)}'}-{kind}" for B, t, kind in CASES]
cases = pytest.mark.parametrize(("B", "tables", "kind"), CASES, ids=NAMES)


def make(B, tables, kind, device):
    return embedding_case(B, kind=kind, device=device, **({} if tables is None else {"tables": tables}))


def gradients(case, device, dtype=torch.float32):
    """dx [B, W] and dlogit [B] of a size as in training."""
    B = len(case.ids)
    return normal(B, case.width, device=device, dtype=dtype, key="dx"), normal(B, device=device, key="dlogit")


def segments_of(case):
    return ops.embedding_segments(case.ids, case.hotness, case.rows)


@cases
@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding_forward_matches_reference(B, tables, kind, dtype, device):
    case = make(B, tables, kind, device)
    x, wide_logit = ops.embedding_forward(*case.forward_args(dtype))
    want_x, want_logit = reference.embedding_forward(*case.double().forward_args(torch.float64))
    assert x.dtype == dtype
    assert x.shape == (B, case.width)
    assert_close(x, want_x)
    assert_close(wide_logit, want_logit)
    out = poisoned(B, case.width, dtype=dtype, device=device), poisoned(B, device=device)
    lists = (case.hotness, case.mean, case.columns, case.numeric_columns)
    ops.embedding_forward_out(*case.weights(), *lists, x=out[0], wide_logit=out[1])
    assert torch.equal(out[0], x)
    assert torch.equal(out[1], wide_logit)


@cases
@pytest.mark.parametrize("sparse", [True, False])
def test_embedding_forward_backward_matches_reference(B, tables, kind, sparse, device):
    case = make(B, tables, kind, device)
    dx, dlogit = gradients(case, device)
    wanted = case.double()
    grads = []
    for c, module, (dtype, *rest) in ((case, ops, (torch.float32, sparse)), (wanted, reference, (torch.float64,))):
        leaves = [t.requires_grad_() for t in (*c.tables, c.wide, c.wide_numeric, c.wide_bias, c.numeric)]
        x, wide_logit = module.embedding_forward(*c.forward_args(dtype), *rest)
        loss = (x.double() * dx.double()).sum() + (wide_logit.double() * dlogit.double()).sum()
        grads.append(torch.autograd.grad(loss, leaves, allow_unused=True))
    for got, want in zip(*grads):
        if want is not None:
            assert got.shape == want.shape
            if got.numel():  # torch's to_dense of a sparse tensor without columns faults on CUDA
                assert_close(got.to_dense(), want, torch.float32)
    for got in grads[0][: len(case.tables)]:
        assert got.layout == (torch.sparse_coo if sparse else torch.strided)


def test_embedding_forward_gives_gradients_only_to_named_rows(device):
    case = make(200, MULTI, "zipf", device)
    for t in case.tables:
        t.requires_grad_()
    case.wide.requires_grad_()
    x, wide_logit = ops.embedding_forward(*case.forward_args(torch.bfloat16))
    (x.float().sum() + wide_logit.sum()).backward()
    first = base = 0
    named = []
    for table, k in zip(case.tables, case.hotness):
        ids = case.ids[:, first : first + k]
        rows = ids[ids >= 0].unique()
        assert torch.equal(table.grad._indices()[0], rows.long())  # each row once
        named.append(rows + base)
        first, base = first + k, base + len(table)
    assert torch.equal(case.wide.grad._indices()[0], torch.cat(named).long())


@cases
def test_embedding_segments_match_reference(B, tables, kind, device):
    case = make(B, tables, kind, device)
    for got, want in zip(segments_of(case), reference.embedding_segments(case.ids, case.hotness, case.rows)):
        assert got.dtype == torch.int32
        assert torch.equal(got, want)


def test_embedding_segments_of_many_rows_use_every_digit(device):
    """Row counts around the powers of two where a radix sort gains a digit."""
    tables = tuple((rows, 1, 2, 0) for rows in (1, 2, 1023, 1024, 1025, 2**20 - 1, 2**20, 2**20 + 1, 2**21))
    ids = torch.stack([torch.randint(-1, t[0], (500,)) for t in tables for _ in range(2)], 1).int().to(device)
    ids[0, ::2] = torch.tensor([t[0] - 1 for t in tables]).int().to(device)
    args = (ids, [2] * len(tables), [t[0] for t in tables])
    for got, want in zip(ops.embedding_segments(*args), reference.embedding_segments(*args)):
        assert torch.equal(got, want)


@cases
@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding_row_gradients_match_reference(B, tables, kind, dtype, device):
    case = make(B, tables, kind, device)
    dx, dlogit = gradients(case, device, dtype)
    segments = segments_of(case)
    lists = (case.hotness, case.mean, case.columns, case.rows, case.dims)
    got, got_wide = ops.embedding_row_gradients(case.ids, dx, dlogit, *segments, *lists)
    want, want_wide = reference.embedding_row_gradients(case.ids, dx.double(), dlogit.double(), *segments, *lists)
    for g, w in zip(got, want):
        assert g.dtype == torch.float32
        assert_close(g, w, scale=5)
    assert_close(got_wide, want_wide, scale=5)


class State:
    """Optimizer slots of a case, as after a few steps: rows were last touched at different times."""

    def __init__(self, case, device):
        R = sum(case.rows)
        self.tables = case.tables
        self.rms = [normal(*t.shape, device=device, key="rms").square() * 1e-2 for t in case.tables]
        self.last_step = torch.arange(R, dtype=torch.int32, device=device) % 7
        self.wide = case.wide
        self.accum = normal(R, device=device, key="accum").square() + 0.1
        self.linear = normal(R, device=device, key="linear")

    def args(self):
        return self.tables, self.rms, self.last_step, self.wide, self.accum, self.linear

    def copy(self, dtype):
        other = object.__new__(State)
        other.tables, other.rms = ([t.to(dtype, copy=True) for t in ts] for ts in (self.tables, self.rms))
        other.last_step = self.last_step.clone()
        other.wide, other.accum, other.linear = (t.to(dtype, copy=True) for t in (self.wide, self.accum, self.linear))
        return other


def update(module, case, state, dx, dlogit, device, step=9, grad_scale=None, found_inf=None):
    lr, step = torch.tensor(0.05, device=device), torch.tensor(step, device=device)
    rules = (lr, step, 0.5, 1e-7, 0.02, 1e-3, 0.01, grad_scale, found_inf)
    lists = (case.hotness, case.mean, case.columns)
    module.embedding_update_(case.ids, dx, dlogit, *segments_of(case), *state.args(), *lists, *rules)


@cases
@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding_update_matches_reference(B, tables, kind, dtype, device):
    case = make(B, tables, kind, device)
    dx, dlogit = gradients(case, device, dtype)
    scale = torch.tensor(64.0, device=device)
    found = torch.tensor(0.0, device=device)
    state = State(case, device)
    start, want = state.copy(torch.float64), state.copy(torch.float64)
    update(ops, case, state, dx, dlogit, device, grad_scale=scale, found_inf=found)
    update(reference, case, want, dx.double(), dlogit.double(), device, grad_scale=scale, found_inf=found)
    for got, wanted, old in zip(state.tables, want.tables, start.tables):
        # Where duplicates cancel, RMSprop hands the rounding error of the gradient on undiminished.
        assert_close(got.double() - old, wanted - old, torch.float32, scale=300)
        assert torch.equal(got.double() == old, wanted == old)
    for got, wanted in zip(state.rms, want.rms):
        assert_close(got, wanted, scale=20)
    assert torch.equal(state.last_step, want.last_step)
    for name in ("wide", "accum", "linear"):
        assert_close(getattr(state, name), getattr(want, name), scale=20)


def test_embedding_update_equals_row_gradients_then_row_updates(device):
    """The fused pass and the way that ranks take (exchange, then update rows) leave the same bits on one device."""
    case = make(500, MULTI, "zipf", device)
    dx, dlogit = gradients(case, device)
    fused, apart = State(case, device), State(case, device).copy(torch.float32)
    segments = segments_of(case)
    lists = (case.hotness, case.mean, case.columns, case.rows, case.dims)
    grads, wide_grad = ops.embedding_row_gradients(case.ids, dx, dlogit, *segments, *lists)
    starts, base = segments[-1].tolist(), 0
    lr, step = torch.tensor(0.05, device=device), torch.tensor(9, device=device)
    for f, rows in enumerate(case.rows):
        touched = (segments[0][starts[f] : starts[f + 1]] - base).long()
        last = apart.last_step[base : base + rows]
        args = (touched, grads[f][: len(touched)], lr, step, 0.5, 1e-7)
        ops.rmsprop_rows_(apart.tables[f], apart.rms[f], last, *args)
        base += rows
    used = segments[0][: starts[-1]].long()
    ops.ftrl_rows_(apart.wide, apart.accum, apart.linear, used, wide_grad[: starts[-1]], 0.02, 1e-3, 0.01)
    update(ops, case, fused, dx, dlogit, device)
    for a, b in zip(fused.args(), apart.args()):
        for one, other in zip(a if isinstance(a, list) else [a], b if isinstance(b, list) else [b]):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_embedding_updates_with_pauses_equal_dense_steps(device):
    """Eight batches against RMSprop that decays every row in every step, from the formulas."""
    case = make(12, ((40, 6, 1, 0), (25, 3, 2, 1)), "zipf", device)
    state = State(case, device)
    for t in state.rms:
        t.zero_()
    state.last_step.fill_(-1)
    state.linear.zero_()
    dense, rms = [t.double() for t in state.tables], [t.double() for t in state.rms]
    for t in range(8):
        batch = embedding_case(12, ((40, 6, 1, 0), (25, 3, 2, 1)), device=device, key=t)
        dx, dlogit = gradients(batch, device)
        dx = dx * (t + 1)
        update(ops, batch, state, dx, dlogit, device, step=t)
        g, _ = reference._table_gradients(
            batch.ids, dx.double(), dlogit.double(), case.hotness, case.mean, case.columns, case.rows, case.dims
        )
        first = 0
        for f, k in enumerate(case.hotness):
            rms[f] = 0.5 * rms[f] + 0.5 * g[f] ** 2
            rows = batch.ids[:, first : first + k].unique()
            rows = rows[rows >= 0].long()
            dense[f][rows] -= 0.05 * g[f][rows] / (rms[f][rows].sqrt() + 1e-7)
            first += k
    base = 0
    for f, rows in enumerate(case.rows):
        ops.rmsprop_settle_(state.rms[f], state.last_step[base : base + rows], torch.tensor(7, device=device), 0.5)
        assert_close(state.rms[f], rms[f], scale=20)
        assert_close(state.tables[f], dense[f], scale=30)
        base += rows


def test_embedding_update_does_nothing_when_gradients_overflowed(device):
    case = make(64, None, "zipf", device)
    dx, dlogit = gradients(case, device)
    state = State(case, device)
    before = state.copy(torch.float32)
    update(ops, case, state, dx * torch.inf, dlogit, device, found_inf=torch.tensor(1.0, device=device))
    for a, b in zip(state.args(), before.args()):
        assert all(map(torch.equal, a, b)) if isinstance(a, list) else torch.equal(a, b)


def test_embedding_ops_give_the_same_bits_for_any_thread_count():
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        case = make(4099, ((2000, 33, 1, 0), (5, 16, 2, 1), (300, 64, 1, 0)), "zipf", "cpu")
        dx, dlogit = gradients(case, "cpu")
        x, logit = ops.embedding_forward(*case.forward_args(torch.float32))
        lists = (case.hotness, case.mean, case.columns, case.rows, case.dims)
        segments = segments_of(case)
        grads, wide = ops.embedding_row_gradients(case.ids, dx, dlogit, *segments, *lists)
        state = State(case, "cpu")
        update(ops, case, state, dx, dlogit, "cpu")
        results.append([x, logit, *segments, *grads, wide, *state.tables, *state.rms, *state.args()[2:]])
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_gradient_of_a_table_without_columns_has_no_entries(device):
    case = make(20, (*WIDE_ONLY, (5, 3, 1, 0)), "zipf", device)
    for t in case.tables:
        t.requires_grad_()
    x, logit = ops.embedding_forward(*case.forward_args(torch.float32))
    (x.sum() + logit.sum()).backward()
    for t, entries in zip(case.tables, (0, 0, len(case.ids[:, -1].unique()))):
        assert t.grad.layout == torch.sparse_coo
        assert (t.grad.shape, t.grad._nnz()) == (t.shape, entries)
        if t.numel():  # torch's to_dense of a sparse tensor without columns faults on CUDA
            assert t.grad.to_dense().shape == t.shape


@pytest.mark.parametrize("sparse", [True, False])
def test_second_derivatives_are_refused(sparse, device):
    case = make(9, MULTI, "zipf", device)
    weight = normal(case.width, device=device, key="w").requires_grad_()
    tables = [t.requires_grad_() for t in case.tables]
    x, _ = ops.embedding_forward(*case.forward_args(torch.float32), sparse)
    first = torch.autograd.grad((x @ weight).square().sum(), tables, create_graph=True)
    with pytest.raises(RuntimeError, match="gradients of tables have no derivative"):
        torch.autograd.grad(sum(g.to_dense().square().sum() for g in first), weight)


@pytest.mark.parametrize("tables", [None, MULTI])
def test_embedding_opcheck(tables, device):
    case = make(9, tables, "zipf", device)
    args = case.forward_args(torch.float32)
    opcheck(OPS.embedding_forward.default, (*args, True))
    opcheck(OPS.embedding_forward.default, (*case.forward_args(torch.bfloat16), True))
    leaves = make(9, tables, "zipf", device)
    for t in (*leaves.tables, leaves.wide, leaves.wide_numeric, leaves.wide_bias, leaves.numeric):
        t.requires_grad_()
    for sparse in (True, False):
        opcheck(OPS.embedding_forward.default, (*leaves.forward_args(torch.float32), sparse))
    x, logit = ops.embedding_forward(*args)
    opcheck(OPS.embedding_forward_out.default, args[:10], {"x": x, "wide_logit": logit})
    opcheck(OPS.embedding_segments.default, (case.ids, case.hotness, case.rows))
    dx, dlogit = gradients(case, device)
    common = (case.ids, dx, dlogit, *segments_of(case))
    lists = (case.hotness, case.mean, case.columns)
    opcheck(OPS.embedding_row_gradients.default, (*common, *lists, case.rows, case.dims))
    lr, step = torch.tensor(0.05, device=device), torch.tensor(9, device=device)
    state = State(case, device).args()
    opcheck(OPS.embedding_update_.default, (*common, *state, *lists, lr, step, 0.5, 1e-7, 0.02, 0.0, 0.0, None, None))


def test_embedding_forward_under_torch_compile(device):
    case = make(64, MULTI, "zipf", device)

    def logit(numeric):
        x, wide = ops.embedding_forward(case.ids, numeric, *case.forward_args(torch.float32)[2:])
        return x.sum(1) * 2 + wide

    compiled = torch.compile(logit, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(case.numeric), logit(case.numeric))


def test_embedding_ops_reject_bad_arguments(device):
    case = make(8, None, "zipf", device)
    args = list(case.forward_args(torch.float32))

    def rejects(match, **changes):
        names = inspect.signature(ops.embedding_forward).parameters
        with pytest.raises(RuntimeError, match=match):
            ops.embedding_forward(*(changes.get(n, a) for n, a in zip(names, args)))

    rejects("ids must be a contiguous Int tensor", ids=case.ids.long())
    rejects("(?<!/)csrc/bindings/checks.h", ids=case.ids[:, :-1])  # no path of the machine that compiled it
    rejects("ids must be", ids=case.ids[:, :-1])
    rejects("not contiguous", ids=case.ids.T.contiguous().T)
    rejects("numeric must be", numeric=case.numeric[:3])
    rejects(r"tables\[1\] must be", tables=[case.tables[0], case.tables[1].double(), *case.tables[2:]])
    rejects("wide must be", wide=case.wide[:-1])
    rejects("wide_bias must be", wide_bias=case.wide)
    rejects("hotness has 4 entries", hotness=case.hotness[:4])
    rejects("does not fit into 8 columns", width=8)
    rejects("table 0 .* does not fit into", columns=[2**63 - 1, *case.columns[1:]])
    rejects("x must be float32, float16 or bfloat16", dtype=torch.float64)
    for hotness, rows in (([2**63 - 1, 2**63 - 1, 4], [5, 5, 5]), ([1, 1, 0], [5] * 3), ([1, 1], [2**63 - 1] * 2)):
        with pytest.raises(RuntimeError, match=r"both must be in \[1, 2\^31 - 2\]"):
            ops.embedding_segments(case.ids[:, :2].contiguous(), hotness, rows)
    dx, dlogit = gradients(case, device)
    segments = segments_of(case)
    lists = (case.hotness, case.mean, case.columns, case.rows, case.dims)
    with pytest.raises(RuntimeError, match="dlogit must be"):
        ops.embedding_row_gradients(case.ids, dx, dlogit[:3], *segments, *lists)
    with pytest.raises(RuntimeError, match="entries must be"):
        ops.embedding_row_gradients(case.ids, dx, dlogit, *segments[:2], segments[2][:5], *segments[3:], *lists)
    if device == "cuda":
        rejects("another device", wide=case.wide.cpu())


@pytest.mark.parametrize("bad", [-2, -(2**31), 300, 2**31 - 1])
def test_embedding_ops_reject_ids_outside_their_table(bad):
    case = make(8, None, "zipf", "cpu")
    case.ids[5, 4] = bad  # second id column of feature 3, which has 300 rows
    message = f"feature 3 has id {bad} in batch row 5, expected -1 .padding. or 0 to 299"
    with pytest.raises(RuntimeError, match=message):
        ops.embedding_forward(*case.forward_args(torch.float32))
    with pytest.raises(RuntimeError, match=message):
        segments_of(case)


def test_embedding_update_rejects_segments_of_another_batch():
    case, other = make(8, None, "zipf", "cpu"), make(8, None, "zipf", "cpu")
    dx, dlogit = gradients(case, "cpu")
    lists = (case.hotness, case.mean, case.columns, case.rows, case.dims)
    for place, value in ((0, 10**6), (0, -5), (1, 10**6), (2, 10**6), (2, -7), (3, 10**6), (4, 10**6), (4, -1)):
        segments = [t.clone() for t in segments_of(other)]
        segments[place][1] = value
        with pytest.raises(RuntimeError, match="not those of this batch"):
            ops.embedding_row_gradients(case.ids, dx, dlogit, *segments, *lists)
    s = segments_of(other)  # the first row twice, and the keys say so too: it would be updated twice
    s.unique[1] = s.keys[s.offsets[1] : s.offsets[2]] = s.unique[0]
    with pytest.raises(RuntimeError, match="not those of this batch"):
        ops.embedding_row_gradients(case.ids, dx, dlogit, *s, *lists)


def test_outbrain_tables_have_the_seed_sizes():
    assert sum(t[0] for t in OUTBRAIN_TABLES) == 672304
    assert sum(t[1] for t in OUTBRAIN_TABLES) == 976
