"""The embeddings' CUDA kernels on the CPU emulator, with tables without columns (features in the wide part only) beside
others. Needs no GPU.
"""

import emulated
import pytest
import torch
from test_cuda_step import gpu_step
from test_emulated_forward import check_forward
from test_emulated_kernels import dtypes, order, pytestmark, same_in_any_order, update  # noqa: F401
from test_emulated_rows import RUNS, assert_state
from test_emulated_step import kernels  # noqa: F401
from test_step import new_step
from test_wide_only import ALL, BESIDE, BETWEEN, FIRST, LAST, MIDDLE, NAMES, at_the_end, same_training

from widedeep import reference
from widedeep.testing import embedding_case, normal

# Packs of four columns with whole rows of 64 and more, as in the GPU step, and without any other table at all.
PACKS = ((90, 0, 1, 0), (40, 128, 1, 0), (30, 64, 2, 1), (9, 0, 2, 1), (70, 16, 1, 0), (5, 0, 1, 0))
WIDER = (*PACKS, (20, 256, 1, 0), (8, 0, 4, 0))
NAMED = {**NAMES, PACKS: "packs", WIDER: "wider"}
# A GPU's allocator gives an empty tensor no address, and `FeatureSpec` a table without columns the end of the input.
CASES = [
    *((B, tables, "zipf") for tables in NAMED for B in (1, 300)),
    (0, MIDDLE, "zipf"),
    (300, MIDDLE, "padding"),
    (600, BETWEEN, "hot"),
    (600, PACKS, "hot"),
]
cases = pytest.mark.parametrize(
    ("B", "tables", "kind"), CASES, ids=[f"B={B}-{NAMED[tables]}-{kind}" for B, tables, kind in CASES]
)


@pytest.fixture(autouse=True)
def no_address(monkeypatch):
    address = emulated._Arguments.address
    monkeypatch.setattr(emulated._Arguments, "address", lambda self, t: address(self, t) if t.numel() else None)


def gradients(case, dtype):
    B = len(case.ids)
    return normal(B, case.width, dtype=dtype, key="dx"), normal(B, key="dlogit")


def check_backward(case, dx, dlogit):
    exact = (dx.double(), dlogit.double())
    got = update(emulated, case, torch.float32, dx, dlogit, torch.tensor(8.0), torch.tensor(0.0))
    want = update(reference, case, torch.float64, *exact, torch.tensor(8.0), torch.tensor(0.0))
    segments = reference.embedding_segments(case.ids, case.hotness, case.rows)
    lists = (case.hotness, case.mean, case.columns, case.rows, case.dims)
    tables, wide = emulated.embedding_row_gradients(case.ids, dx, dlogit, *segments, *lists)
    wanted = reference.embedding_row_gradients(case.ids, *exact, *segments, *lists)
    assert_state([*got, *tables, wide], [*want, *wanted[0], wanted[1]])


@cases
@dtypes
def test_ops_match_reference(B, tables, kind, dtype):
    case = embedding_case(B, tables, numeric=3, kind=kind, aligned=tables in (PACKS, WIDER))
    if dtype != torch.bfloat16:  # else between the others, as in the GPU step
        case = at_the_end(case)
    check_forward(case, dtype)
    check_backward(case, *gradients(case, dtype))
    got = emulated.embedding_segments(case.ids, case.hotness, case.rows)
    for g, want in zip(got, reference.embedding_segments(case.ids, case.hotness, case.rows)):
        assert torch.equal(g, want)


@pytest.mark.parametrize("runs", RUNS.values(), ids=RUNS.keys())
@pytest.mark.parametrize("dim", [5, 64, 200])
def test_rows_that_cross_blocks_beside_those_of_a_table_with_columns(runs, dim):
    """In sorted order the runs of a table with columns stand between those of two without."""
    B, rows = sum(runs), len(runs)
    case = at_the_end(embedding_case(B, ((rows, 0, 1, 0), (rows, dim, 1, 0), (rows, 0, 1, 0)), numeric=0))
    ids = torch.repeat_interleave(torch.arange(rows), torch.tensor(runs)).int()
    shuffles = [torch.randperm(B, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    case.ids = torch.stack([ids[shuffle] for shuffle in shuffles], 1)
    check_backward(case, *gradients(case, torch.float16))


@pytest.mark.parametrize("hidden", [[40, 9], []], ids=str)
@pytest.mark.parametrize("spec", [ALL, BESIDE], ids=["all", "some"])
def test_whole_steps(spec, hidden, kernels):  # noqa: F811
    want, got = new_step("reference", spec, hidden=hidden), gpu_step(spec, hidden=hidden)
    same_training(spec, want, got, "cpu")


@pytest.mark.parametrize("tables", [BETWEEN, FIRST, LAST, WIDER], ids=lambda tables: NAMED[tables])
def test_bits_hang_on_no_order_of_threads(tables):
    case = at_the_end(embedding_case(700, tables, numeric=2))
    dx, dlogit = gradients(case, torch.bfloat16)
    same_in_any_order(lambda: update(emulated, case, torch.float32, dx, dlogit))
