"""The embeddings' backward kernels on the CPU emulator, where rows meet the bounds of chunks and of blocks."""

import emulated
import pytest
import torch
from test_emulated_kernels import dtypes, order, pytestmark, update, update_state  # noqa: F401

from widedeep import reference
from widedeep.testing import assert_close, embedding_case, normal

# How many sorted entries each row has: rows that end at, before and after the bounds of chunks of 16 and 32 and of
# blocks of 256; that span whole blocks and several; that are added by all of a block (more than 16, or 32, blocks).
RUNS = {
    "chunks": [16] * 18 + [32] * 9 + [15, 1, 17, 31, 33, 31],
    "blocks": [256] * 3 + [255, 1, 1, 255, 257, 255],
    "spans": [100, 412, 700, 68, 769, 255, 1, 512, 3],
    "one": [1300],
    "long": [40, 4400, 7, 9000, 200],
    "long to the end of a block": [256 * 17, 44, 212 + 256 * 32, 9],
}


def assert_state(got, want):
    for g, w in zip(got, want, strict=True):
        if g.dtype == torch.int32:
            assert torch.equal(g, w)
        else:
            assert_close(g, w, scale=5)


@pytest.mark.parametrize("runs", RUNS.values(), ids=RUNS.keys())
@pytest.mark.parametrize("dim", [0, 5, 8, 33, 64, 128, 130, 200])
def test_embedding_update_of_rows_that_cross_blocks(runs, dim):
    B = sum(runs)
    case = embedding_case(B, tables=((len(runs), dim, 1, 0),), numeric=0)
    shuffled = torch.randperm(B, generator=torch.Generator().manual_seed(0))
    case.ids = torch.repeat_interleave(torch.arange(len(runs)), torch.tensor(runs))[shuffled, None].int()
    dx, dlogit = normal(B, case.width, dtype=torch.float16, key="dx"), normal(B, key="dlogit")
    got = update(emulated, case, torch.float32, dx, dlogit)
    want = update(reference, case, torch.float64, dx.double(), dlogit.double())
    assert_state(got, want)


@pytest.mark.parametrize("runs", ["blocks", "spans", "long"])
def test_embedding_update_of_rows_that_cross_blocks_does_nothing_after_an_overflow(runs):
    B, rows = sum(RUNS[runs]), len(RUNS[runs])
    case = embedding_case(B, tables=((rows, 8, 1, 0),), numeric=0)
    case.ids = torch.repeat_interleave(torch.arange(rows), torch.tensor(RUNS[runs]))[:, None].int()
    dx, dlogit = normal(B, case.width, dtype=torch.float16), normal(B)
    got = update(emulated, case, torch.float32, dx, dlogit, torch.tensor(2.0), torch.tensor(1.0))
    before = update_state(case, torch.float32)
    for g, w in zip(got, [*before[0], *before[1], *before[2:]], strict=True):
        assert torch.equal(g, w)


@pytest.mark.parametrize("numeric", [0, 1])
def test_embedding_update_where_few_ids_are_valid(numeric):
    """Warps and blocks without an id, beside gradients that 8-byte copies take or do not."""
    case = embedding_case(700, tables=((40, 16, 2, 1), (9, 8, 1, 0)), numeric=numeric)
    case.ids[torch.arange(700) % 3 > 0] = -1
    dx, dlogit = normal(700, case.width, dtype=torch.float16, key="dx"), normal(700, key="dlogit")
    got = update(emulated, case, torch.float32, dx, dlogit)
    want = update(reference, case, torch.float64, dx.double(), dlogit.double())
    assert_state(got, want)


PACKED = ((40, 4, 1, 0), (30, 64, 2, 1), (900, 128, 1, 0), (50, 12, 3, 0), (70, 16, 1, 0))


@dtypes
@pytest.mark.parametrize("wider", [(), ((20, 256, 1, 0),), ((20, 19, 1, 0),)], ids=["narrow", "wide", "mixed"])
def test_embedding_gradients_of_whole_packs(dtype, wider):
    """Columns and widths that 8- and 16-byte loads take, alone and beside a table that they do not."""
    case = embedding_case(400, tables=PACKED + wider, numeric=0)
    dx, dlogit = normal(400, case.width, dtype=dtype, key="dx"), normal(400, key="dlogit")
    got = update(emulated, case, torch.float32, dx, dlogit)
    want = update(reference, case, torch.float64, dx.double(), dlogit.double())
    segments = reference.embedding_segments(case.ids, case.hotness, case.rows)
    lists = (case.hotness, case.mean, case.columns, case.rows, case.dims)
    tables, wide = emulated.embedding_row_gradients(case.ids, dx, dlogit, *segments, *lists)
    expected = reference.embedding_row_gradients(case.ids, dx.double(), dlogit.double(), *segments, *lists)
    assert_state([*got, *tables, wide], [*want, *expected[0], expected[1]])
