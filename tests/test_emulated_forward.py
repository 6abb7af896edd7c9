"""The gather into the deep input and the wide logit on the CPU emulator (tests/emulated.py), against the float64
reference. Needs no GPU.
"""

import emulated
import pytest
import torch
from test_emulated_kernels import MULTI, cases, dtypes, make, order, pytestmark  # noqa: F401

from widedeep import reference
from widedeep.testing import assert_close, embedding_case, poisoned


def check_forward(case, dtype):
    B = len(case.ids)
    x, wide_logit = poisoned(B, case.width, dtype=dtype), poisoned(B)
    lists = (case.hotness, case.mean, case.columns, case.numeric_columns)
    emulated.embedding_forward_out(*case.weights(), *lists, x=x, wide_logit=wide_logit)
    want_x, want_logit = reference.embedding_forward(*case.double().forward_args(torch.float64))
    assert_close(x, want_x)
    assert_close(wide_logit, want_logit)


@cases
@dtypes
@pytest.mark.parametrize("extra", [0, 5], ids=["even", "odd"])
def test_embedding_forward(B, tables, kind, dtype, extra):
    case = make(B, tables, kind)
    case.width += extra  # an odd width: rows that begin between packs
    check_forward(case, dtype)


# Packs of four columns, beside tables that none fits into.
PACKS = ((40, 128, 1, 0), (30, 64, 1, 0), (25, 16, 4, 1), (11, 8, 6, 0), (9, 5, 1, 0), (7, 4, 2, 1))


@pytest.mark.parametrize(("B", "tables"), [(3, PACKS), (130, PACKS), (261, ((20, 8, 1, 0),)), (70, PACKS[2:4])])
@pytest.mark.parametrize("kind", ["zipf", "padding"])
@dtypes
def test_embedding_forward_of_aligned_tables(B, tables, kind, dtype):
    """Also blocks of 128 rows, as large batches have."""
    emulated.reseed(B, multiprocessors=1 if B > 200 else 8)
    check_forward(embedding_case(B, tables, numeric=3, kind=kind, aligned=True), dtype)


@pytest.mark.parametrize(("hotness", "numeric"), [(1400, 3), (4095, 0), (40, 256)])
def test_embedding_forward_of_long_lists(hotness, numeric):
    """More ids than a block of several rows stages, and 32 threads for a row's wide logit."""
    emulated.reseed(hotness, multiprocessors=1)
    check_forward(embedding_case(21, ((50, 8, hotness, 1), (9, 3, 1, 0)), numeric=numeric), torch.float16)


def test_embedding_forward_traps_on_an_id_past_its_table():
    case = make(40, MULTI, "zipf")
    case.ids[39, 4] = 60
    lists = (case.hotness, case.mean, case.columns, case.numeric_columns)
    with pytest.raises(RuntimeError, match="embedding_forward_kernel"):
        emulated.embedding_forward_out(*case.weights(), *lists, x=poisoned(40, case.width), wide_logit=poisoned(40))


def test_embedding_forward_of_a_wide_deep_input():
    """Nine column slices, 32 rows and one more; an odd width, one of whole packs, and a slice of one column."""
    case = make(33, ((7, 256, 1, 0),) * 8, "zipf")
    for case.width in (2203, 2204, 2305):
        check_forward(case, torch.bfloat16)
