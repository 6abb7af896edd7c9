"""The embeddings' kernels on the CPU emulator (tests/emulated.py), with arrays and ids at the bounds of what the ops
take. Needs no GPU.
"""

import emulated
import pytest
import torch
from test_emulated_forward import PACKS, check_forward
from test_emulated_kernels import dtypes, order, pytestmark, update, update_state  # noqa: F401
from test_emulated_rows import PACKED, assert_state

from widedeep import reference
from widedeep.testing import embedding_case, normal, poisoned


@pytest.fixture
def shift(monkeypatch):
    """shift(tensors): they lie one element behind a multiple of 16 bytes."""
    moved, wholes = [], []
    address, release = emulated._Arguments.address, emulated._Arguments.release

    def shifted_address(self, tensor):
        if not any(t is tensor for t in moved):
            return address(self, tensor)
        wholes.append((torch.cat([tensor.new_zeros(1), tensor.flatten()]), tensor))
        return address(self, wholes[-1][0]) + tensor.element_size()

    def shifted_release(self):
        clean = release(self)
        for whole, tensor in wholes:
            tensor.view(-1).copy_(whole[1:])
        wholes.clear()
        return clean

    monkeypatch.setattr(emulated._Arguments, "address", shifted_address)
    monkeypatch.setattr(emulated._Arguments, "release", shifted_release)
    return moved.extend


@pytest.mark.parametrize("every", [1, 2])
@dtypes
def test_embedding_forward_of_tables_that_begin_anywhere(dtype, every, shift):
    case = embedding_case(70, PACKS, numeric=3, aligned=True)
    shift(case.tables[::every])
    check_forward(case, dtype)


@pytest.mark.parametrize("moved", ["tables", "rms", "dx", "width"])
@dtypes
def test_embedding_gradients_of_arrays_that_begin_anywhere(dtype, moved, shift):
    case = embedding_case(400, tables=PACKED, numeric=0)
    case.width += moved == "width"  # then rows of dx begin anywhere
    dx, dlogit = normal(400, case.width, dtype=dtype, key="dx"), normal(400, key="dlogit")
    want = update(reference, case, torch.float64, dx.double(), dlogit.double())
    state = update_state(case, torch.float32)
    shift({"tables": state[0], "rms": state[1], "dx": [dx], "width": []}[moved])
    got = update(emulated, case, torch.float32, dx, dlogit, state=state)
    assert_state(got, want)


@pytest.mark.parametrize("dim", [1, 5, 19, 130])
@dtypes
def test_embedding_gradients_of_rows_that_end_with_the_deep_input(dim, dtype):
    """Behind the last row of dx there is nothing."""
    case = embedding_case(70, ((9, dim, 1, 0),), numeric=0)
    case.width = dim
    check_forward(case, dtype)
    dx, dlogit = normal(70, dim, dtype=dtype, key="dx"), normal(70, key="dlogit")
    got = update(emulated, case, torch.float32, dx, dlogit)
    assert_state(got, update(reference, case, torch.float64, dx.double(), dlogit.double()))


def test_embedding_update_where_a_block_holds_only_the_first_position():
    """Of 257 entries the last in sorted order, alone in its block, is position 0."""
    case = embedding_case(257, ((9, 8, 1, 0),), numeric=0)
    case.ids[:] = 3
    case.ids[0] = 8
    dx, dlogit = normal(257, case.width, dtype=torch.float16, key="dx"), normal(257, key="dlogit")
    got = update(emulated, case, torch.float32, dx, dlogit)
    assert_state(got, update(reference, case, torch.float64, dx.double(), dlogit.double()))


@pytest.mark.parametrize("B", [8, 261])
def test_embedding_forward_of_blocks_whose_rows_are_whole(B):
    """What lies behind the last row's ids in shared memory says which feature each id is of."""
    emulated.reseed(B, multiprocessors=1)
    one_hot = tuple((9 + f, 8, 1, 0) for f in range(50))
    for tables in (one_hot, one_hot[:7]):
        check_forward(embedding_case(B, tables, numeric=3, aligned=True), torch.float16)


@pytest.mark.parametrize("past", [0, 1])
def test_an_id_past_a_table_without_columns_traps(past):
    """No other load of the kernel would be beside an array."""
    case = embedding_case(40, ((60, 0, 1, 0), (50, 0, 2, 0)), numeric=1)
    case.ids[39, 2] = 49 + past
    lists = (case.hotness, case.mean, case.columns, case.numeric_columns)
    out = {"x": poisoned(40, case.width), "wide_logit": poisoned(40)}
    if not past:
        return check_forward(case, torch.float32)
    with pytest.raises(RuntimeError, match="embedding_forward_kernel: __trap"):
        emulated.embedding_forward_out(*case.weights(), *lists, **out)


@pytest.mark.parametrize("rows", [64, 63, 65, 1])
def test_embedding_segments_of_as_many_rows_as_a_power_of_two(rows):
    """Padding is sorted as the number of rows, which needs one bit more than any row."""
    case = embedding_case(300, ((rows, 4, 3, 0),))
    assert {-1, 0} <= {*case.ids.flatten().tolist()}
    got = emulated.embedding_segments(case.ids, case.hotness, case.rows)
    for g, want in zip(got, reference.embedding_segments(case.ids, case.hotness, case.rows), strict=True):
        assert torch.equal(g, want)
