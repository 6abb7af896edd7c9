"""The CUDA kernels on the CPU emulator (tests/emulated.py), against the float64 reference. Needs no GPU."""

import platform
import re
import shutil
import zlib

import emulated
import pytest
import torch

from widedeep import reference
from widedeep.testing import assert_close, embedding_case, normal, poisoned

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or platform.machine() != "x86_64", reason="the CUDA emulator needs g++ on x86-64"
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
MULTI = ((100, 24, 3, 0), (60, 8, 5, 1), (9, 5, 2, 1))
WIDTHS = ((40, 4, 1, 0), (11, 16, 1, 0), (9, 19, 2, 1), (30, 64, 1, 0), (25, 128, 1, 0), (6, 200, 3, 1), (3, 256, 1, 0))
ONE = ((3, 19, 1, 0),)  # as a hot row: B consecutive sorted entries
# (B, tables or None for the mixed small set, kind of ids)
CASES = [
    (0, None, "zipf"),
    (1, None, "zipf"),
    (7, WIDTHS, "zipf"),
    (33, WIDTHS, "hot"),
    (300, MULTI, "zipf"),
    (300, MULTI, "padding"),
    (300, None, "hot"),
    (256, ONE, "hot"),  # whole chunks, whole blocks
    (512, ((5, 130, 1, 0),), "hot"),
    (544, ONE, "hot"),  # whole chunks, a block of one
    (513, ((2, 128, 2, 1),), "hot"),
    (33, ((30, 0, 1, 0), (4, 0, 3, 0)), "zipf"),
    (33, (), "zipf"),
]
cases = pytest.mark.parametrize(
    ("B", "tables", "kind"), CASES, ids=[f"B={B}-F={5 if t is None else len(t)}-{kind}" for B, t, kind in CASES]
)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])


@pytest.fixture(autouse=True)
def order(request):
    """Every test has its own order of threads and blocks."""
    emulated.reseed(zlib.crc32(request.node.name.encode()))


def make(B, tables, kind):
    return embedding_case(B, kind=kind, **({} if tables is None else {"tables": tables}))


def same_in_any_order(run):
    """The bits of run() under three orders."""
    results = []
    for seed in (1, 2, 3):
        emulated.reseed(seed)
        results.append(run())
    for other in results[1:]:
        for a, b in zip(results[0], other):
            assert torch.equal(a, b)


# --- the emulator itself ----------------------------------------------------------------------------------------------


def test_every_launcher_is_emulated():
    """But the products of gemm.h, whose kernels are the library's."""
    headers = [path.read_text() for path in emulated.KERNELS.glob("*.h") if path.name != "gemm.h"]
    launchers = {name for text in headers for name in re.findall(r"^cudaError_t (\w+)\(", text, re.MULTILINE)}
    calls = {*re.findall(r"\w+(?=\()", (emulated.EMULATOR / "exports.cpp").read_text())}
    assert len(launchers) > 15
    assert launchers - calls == set()


def test_a_missing_barrier_shows():
    reverse = torch.arange(63, -1, -1, dtype=torch.int32)
    assert torch.equal(emulated.fault(0), reverse)
    assert not torch.equal(emulated.fault(1), reverse)


def test_shared_memory_that_nobody_wrote_shows():
    """It holds no number that a kernel could take for the one that it forgot to write there."""
    found = set()
    for seed in range(20):
        emulated.reseed(seed)
        found |= set(emulated.fault(17).tolist())
    assert found == {-1, 0x7F7F7F7F}


def test_a_copy_that_is_not_waited_for_shows():
    numbers = torch.arange(64, dtype=torch.int32)
    assert torch.equal(emulated.fault(9), numbers)
    assert not torch.equal(emulated.fault(10), numbers)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (2, "half_barrier_kernel: deadlock"),
        (3, "half_warp_kernel: deadlock"),
        (4, "past_the_end_kernel: store beside an array"),
        (5, "misaligned_kernel: undefined behaviour"),
        (6, "index_kernel: undefined behaviour"),
        (7, "large_kernel: 50176 bytes of shared memory"),
        (8, "reverse_kernel: launch with a grid"),
        (11, "ends without a wait for the kernel before"),
        (12, "before_the_start_kernel: load beside an array"),
        (13, "few_numbers: load beside an array"),
        (14, "few_numbers: access beside an array"),
        (15, "dynamic_kernel: store beside an array"),
        (16, "stray_pointer_kernel: access outside of memory"),
    ],
)
def test_faults_are_reported(number, words):
    with pytest.raises(RuntimeError, match=words):
        emulated.fault(number)
    test_a_missing_barrier_shows()  # and the next launch is as if nothing had been


# --- embedding --------------------------------------------------------------------------------------------------------


@cases
def test_embedding_segments(B, tables, kind):
    case = make(B, tables, kind)
    got = emulated.embedding_segments(case.ids, case.hotness, case.rows)
    for g, want in zip(got, reference.embedding_segments(case.ids, case.hotness, case.rows)):
        assert torch.equal(g, want)


@cases
@dtypes
def test_embedding_row_gradients(B, tables, kind, dtype):
    case = make(B, tables, kind)
    dx, dlogit = normal(B, case.width, dtype=dtype, key="dx"), normal(B, key="dlogit")
    segments = reference.embedding_segments(case.ids, case.hotness, case.rows)
    lists = (case.hotness, case.mean, case.columns, case.rows, case.dims)
    got, got_wide = emulated.embedding_row_gradients(case.ids, dx, dlogit, *segments, *lists)
    want, want_wide = reference.embedding_row_gradients(case.ids, dx.double(), dlogit.double(), *segments, *lists)
    for g, w in zip(got, want):
        assert_close(g, w, scale=5)
    assert_close(got_wide, want_wide, scale=5)


def update_state(case, dtype):
    R = sum(case.rows)
    rms = [(normal(*t.shape, key="rms").square() * 1e-2).to(dtype) for t in case.tables]
    accum, linear = normal(R, key="accum").square() + 0.1, normal(R, key="linear")
    tables = [t.clone().to(dtype) for t in case.tables]
    return (
        tables, rms, torch.arange(R, dtype=torch.int32) % 7, case.wide.clone().to(dtype), accum.to(dtype),
        linear.to(dtype),
    )  # fmt: skip


def update(module, case, dtype, dx, dlogit, grad_scale=None, found_inf=None, state=None):
    state = state or update_state(case, dtype)
    segments = reference.embedding_segments(case.ids, case.hotness, case.rows)
    lists = (case.hotness, case.mean, case.columns)
    numbers = (torch.tensor(0.01).to(dtype), torch.tensor(9), 0.9, 1e-7, 0.05, 0.01, 0.02)
    module.embedding_update_(case.ids, dx, dlogit, *segments, *state, *lists, *numbers, grad_scale, found_inf)
    return [*state[0], *state[1], *state[2:]]


@cases
@dtypes
def test_embedding_update(B, tables, kind, dtype):
    case = make(B, tables, kind)
    dx, dlogit = normal(B, case.width, dtype=dtype, key="dx"), normal(B, key="dlogit")
    got = update(emulated, case, torch.float32, dx, dlogit, torch.tensor(8.0), torch.tensor(0.0))
    want = update(reference, case, torch.float64, dx.double(), dlogit.double(), torch.tensor(8.0), torch.tensor(0.0))
    for g, w in zip(got, want):
        if g.dtype == torch.int32:
            assert torch.equal(g, w)
        else:
            assert_close(g, w, scale=5)


def test_embedding_update_does_nothing_after_an_overflow():
    case = make(40, MULTI, "zipf")
    dx, dlogit = normal(40, case.width), normal(40)
    before = update_state(case, torch.float32)
    got = update(emulated, case, torch.float32, dx, dlogit, None, torch.tensor(1.0))
    for g, w in zip(got, [*before[0], *before[1], *before[2:]]):
        assert torch.equal(g, w)


@pytest.mark.parametrize(
    ("B", "tables"), [(300, None), (513, ((2, 128, 2, 1),)), (300, MULTI), (4700, ((2, 12, 1, 0),))]
)
def test_embedding_update_is_the_same_in_any_order(B, tables):
    case = make(B, tables, "zipf")
    dx, dlogit = normal(B, case.width, dtype=torch.float16), normal(B)
    same_in_any_order(lambda: update(emulated, case, torch.float32, dx, dlogit))


# --- optimizers, metrics, order ---------------------------------------------------------------------------------------


@dtypes
def test_rmsprop_dense(dtype):
    shapes = [(3, 5), (1,), (130, 33), (0, 4), (200,)] * 11  # 55 tensors: two launches
    weights = [normal(*s, key=i) for i, s in enumerate(shapes)]
    rms = [normal(*s, key=("r", i)).square() for i, s in enumerate(shapes)]
    wide = [(*s[:1], s[1] + i % 3) if len(s) == 2 else s for i, s in enumerate(shapes)]
    grads = [normal(*s, dtype=dtype, key=("g", i)) for i, s in enumerate(wide)]
    copies = [poisoned(*s, dtype=dtype) for s in wide]
    numbers = (torch.tensor(0.01), 0.9, 1e-7, torch.tensor(16.0), torch.tensor(0.0))
    want_w, want_r = [t.double() for t in weights], [t.double() for t in rms]
    inner = [g[:, : w.shape[1]] if w.dim() == 2 else g for g, w in zip(grads, weights)]
    reference.rmsprop_dense_(want_w, want_r, [g.double() for g in inner], [], *numbers)
    emulated.rmsprop_dense_(weights, rms, grads, copies, *numbers)
    for w, r, c, ww, wr in zip(weights, rms, copies, want_w, want_r):
        assert_close(w, ww)
        assert_close(r, wr)
        narrow = c[:, : w.shape[1]] if w.dim() == 2 else c
        assert torch.equal(narrow, w.to(dtype))
        if w.dim() == 2:
            assert c[:, w.shape[1] :].isnan().all()  # padding stays as it is
    before = [w.clone() for w in weights]
    emulated.rmsprop_dense_(weights, rms, grads, copies, *numbers[:4], torch.tensor(1.0))
    assert all(torch.equal(a, b) for a, b in zip(before, weights))


@pytest.mark.parametrize("n", [0, 1, 300])
def test_ftrl_dense(n):
    state = [normal(n, key=0), normal(n, key=1).square(), normal(n, key=2)]
    state[1][::5] = 0
    grad = normal(n, key=3)
    grad[::5] = 0  # a weight that never saw anything
    want = [t.double() for t in state]
    numbers = (0.05, 0.3, 0.1, torch.tensor(2.0), None)
    reference.ftrl_dense_(*want, grad.double(), *numbers)
    emulated.ftrl_dense_(*state, grad, *numbers)
    for g, w in zip(state, want):
        assert_close(g, w, scale=5)


def test_ftrl_dense_does_nothing_after_an_overflow():
    state, grad = [normal(300, key=0), normal(300, key=1).square(), normal(300, key=2)], normal(300, key=3)
    before = [t.clone() for t in state]
    emulated.ftrl_dense_(*state, grad, 0.05, 0.3, 0.1, torch.tensor(2.0), torch.tensor(1.0))
    assert all(torch.equal(a, b) for a, b in zip(state, before))


def test_elements_past_one_turn_of_the_grid():
    n = 132 * 8 * 256 + 300
    weight, rms, grad = [normal(2, n)], [normal(2, n, key="r").square()], [normal(2, n, key="g")]
    want, want_rms = [weight[0].double()], [rms[0].double()]
    numbers = (torch.tensor(0.01), 0.9, 1e-7, None, None)
    reference.rmsprop_dense_(want, want_rms, [grad[0].double()], [], *numbers)
    emulated.rmsprop_dense_(weight, rms, grad, [], *numbers)
    assert_close(weight[0], want[0])
    assert_close(rms[0], want_rms[0])

    n = 132 * 32 * 256 + 300
    state = [normal(n, key=0), normal(n, key=1).square(), normal(n, key=2)]
    want = [t.double() for t in state]
    reference.ftrl_dense_(*want, normal(n).double(), 0.05, 0.3, 0.1, None, None)
    emulated.ftrl_dense_(*state, normal(n), 0.05, 0.3, 0.1, None, None)
    for g, w in zip(state, want):
        assert_close(g, w, scale=5)

    rows = 132 * 32 * 256 // 32 + 50
    rms, last = normal(rows, 3).square(), torch.arange(rows, dtype=torch.int32) % 9 + 1
    want, want_last = rms.double(), last.clone()
    reference.rmsprop_settle_(want, want_last, torch.tensor(9), 0.9)
    emulated.rmsprop_settle_(rms, last, torch.tensor(9), 0.9)
    assert_close(rms, want)
    assert torch.equal(last, want_last)


def test_listed_rows_whose_last_is_no_padding():
    """The run of the last row ends where the list does; a row past the table traps."""
    rows, grads, step = torch.tensor([2, 0, 2, 2]), normal(4, 5), torch.tensor(3)
    got = [normal(3, 5, key=1), normal(3, 5, key=2).square(), torch.tensor([0, 1, 2], dtype=torch.int32)]
    want = [got[0].double(), got[1].double(), got[2].clone()]
    emulated.rmsprop_rows_(*got, rows, grads, torch.tensor(0.01), step, 0.9, 1e-7)
    reference.rmsprop_rows_(*want, rows, grads.double(), torch.tensor(0.01).double(), step, 0.9, 1e-7)
    for g, w in zip(got[:2], want):
        assert_close(g, w, scale=5)
    assert torch.equal(got[2], want[2])
    with pytest.raises(RuntimeError, match="list_rows_kernel: __trap"):
        emulated.rmsprop_rows_(*got, rows + 1, grads, torch.tensor(0.01), step, 0.9, 1e-7)


@pytest.mark.parametrize(("n", "D"), [(0, 4), (1, 1), (300, 19), (64, 33), (40, 200), (40, 0)])
def test_listed_rows(n, D):
    R = 37
    rows = (torch.arange(n) * 7919 % (R + 1) - 1) if n else torch.zeros(0, dtype=torch.int64)
    if n > 50:
        rows[10:45] = 5  # a name listed often
    grads = normal(n, D)
    weight, rms, last = normal(R, D, key=1), normal(R, D, key=2).square(), torch.arange(R, dtype=torch.int32) % 5
    accum, linear = normal(R, D, key=3).square(), normal(R, D, key=4)
    valid = rows >= 0
    want = [weight.double(), rms.double(), last.clone()]
    step = torch.tensor(8)
    reference.rmsprop_rows_(*want, rows[valid], grads[valid].double(), torch.tensor(0.01).double(), step, 0.9, 1e-7)
    got = [weight.clone(), rms.clone(), last.clone()]
    emulated.rmsprop_rows_(*got, rows, grads, torch.tensor(0.01), step, 0.9, 1e-7)
    for g, w in zip(got[:2], want):
        assert_close(g, w, scale=5)
    assert torch.equal(got[2], want[2])
    want = [weight.double(), accum.double(), linear.double()]
    reference.ftrl_rows_(*want, rows[valid], grads[valid].double(), 0.05, 0.3, 0.1)
    got = [weight.clone(), accum.clone(), linear.clone()]
    emulated.ftrl_rows_(*got, rows, grads, 0.05, 0.3, 0.1)
    for g, w in zip(got, want):
        assert_close(g, w, scale=5)


def test_rmsprop_settle():
    rms, last = normal(77, 19).square(), torch.arange(77, dtype=torch.int32) % 9 + 1
    want, want_last = rms.double(), last.clone()
    reference.rmsprop_settle_(want, want_last, torch.tensor(9), 0.9)
    emulated.rmsprop_settle_(rms, last, torch.tensor(9), 0.9)
    assert_close(rms, want)
    assert torch.equal(last, want_last)


@dtypes
@pytest.mark.parametrize("n", [1, 7, 64, 1003])
@pytest.mark.parametrize("skip", [0, 1])
def test_check_finite(n, dtype, skip):
    for value, place in [(None, 0), *((v, i) for v in ("nan", "inf", "-inf") for i in (0, n // 2, n - 1))]:
        values = torch.full((n + skip,), float("nan"), dtype=dtype)
        values[skip:] = torch.finfo(dtype).max
        if value:
            values[skip + place] = float(value)
        found = torch.zeros(())
        emulated.check_finite_([values], found, skip)
        assert found.item() == (value is not None)


def test_loss_scale_update():
    for state in [(8.0, 1, 0.0), (8.0, 1, 1.0), (1.0, 0, 1.0), (8.0, 0, 0.0), (3e38, 1, 0.0)]:
        pair = []
        for module in (emulated, reference):
            scale, good, updates = torch.tensor(state[0]), torch.tensor(state[1], dtype=torch.int32), torch.tensor(7)
            module.loss_scale_update_(scale, good, updates, torch.tensor(state[2]), 2.0, 0.5, 2)
            pair.append((scale.item(), good.item(), updates.item()))
        assert pair[0] == pair[1]


@pytest.mark.parametrize("B", [0, 1, 300])
def test_auc_histogram(B):
    logit, label = normal(B, scale=3), (normal(B, key="y") > 0).float()
    counts = [[torch.ones(199, dtype=torch.int64) for _ in range(2)] for _ in range(2)]
    emulated.auc_histogram_(logit, label, *counts[0])
    reference.auc_histogram_(logit, label, *counts[1])
    assert torch.equal(torch.stack(counts[0]), torch.stack(counts[1]))


@pytest.mark.parametrize(("R", "K", "N"), [(1, 13, 13), (70, 1, 0), (333, 0, 1), (600, 13, 13), (99, 40, 300)])
@pytest.mark.parametrize("order", [(), (7, 100, 5, 3), (16, 2000, -1, 2**40)], ids=["stored", "windows", "one window"])
@pytest.mark.parametrize("group", [False, True], ids=["", "group"])
def test_gather_batch(R, K, N, order, group):
    ids = torch.randint(-1, 2**31 - 1, (R, K), dtype=torch.int32)
    rows = (ids, normal(R, N), normal(R, key="label"), torch.arange(R) * 2**33 if group else None)
    for start, B in [(0, R), (R // 3, R // 2), (R - 1, 1), (R, 0)]:
        got, want = ([None if t is None else poisoned(B, *t.shape[1:], dtype=t.dtype) for t in rows] for _ in range(2))
        emulated.gather_batch_out(rows, order, start, out=got)
        reference.gather_batch_out(rows, order, start, out=want)
        assert all(g is None or torch.equal(g, w) for g, w in zip(got, want))
