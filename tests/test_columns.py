"""What readers take from files: rows put together from stored columns, and the rows of an epoch's order."""

import numpy as np
import pytest

from widedeep._load import assemble_rows, epoch_rows
from widedeep.shuffle import EpochOrder

PARTS = [5, 700, 1, 294]  # rows; a tile of rows ends inside a part, and parts end inside a tile


def stored(numeric=np.float32, group=True):
    """(columns in pieces, their values as the matrices shall hold them) of 1000 rows; padding in every id column."""
    rng, rows = np.random.default_rng(3), sum(PARTS)
    ids = [
        rng.integers(0, 256, rows).astype(np.uint8),
        rng.integers(0, 1 << 16, (rows, 3)).astype(np.uint16),
        rng.integers(0, 1 << 31, rows).astype(np.uint32),
    ]
    for column in ids:
        column[::7] = np.iinfo(column.dtype).max
    numerics = [rng.standard_normal(rows).astype(numeric) for _ in range(2)]
    label, groups = rng.integers(0, 2, rows).astype(np.uint8), rng.integers(-(2**62), 2**62, rows)
    wanted = [np.where(a == np.iinfo(a.dtype).max, -1, a.astype(np.int64)) for a in ids]
    wanted = (np.column_stack(wanted).astype(np.int32), np.column_stack(numerics).astype(np.float32))
    wanted = (*wanted, label.astype(np.float32), groups if group else None)

    def pieces(a):
        return np.split(a, np.cumsum(PARTS)[:-1])

    columns = (
        [pieces(a) for a in ids],
        [pieces(a) for a in numerics],
        pieces(label),
        pieces(groups) if group else None,
    )
    return columns, wanted


def poisoned(n, group=True):
    ids, numeric = np.full((n, 5), -77, np.int32), np.full((n, 2), np.nan, np.float32)
    return ids, numeric, np.full(n, np.nan, np.float32), np.full(n, -77) if group else None


@pytest.mark.parametrize("group", [True, False])
@pytest.mark.parametrize("numeric", [np.float32, np.float16])
@pytest.mark.parametrize("n", [0, 1, 900, 3000])
@pytest.mark.parametrize("order", ["any", "ascending", "slots"])
def test_rows_are_put_together(order, n, numeric, group):
    columns, want = stored(numeric, group)
    rows = np.random.default_rng(n).integers(0, sum(PARTS), n)
    if order == "ascending":
        rows.sort()
    slots = np.argsort(rows) if order == "slots" else None
    out = poisoned(n, group)
    assemble_rows(*columns, np.cumsum(PARTS).tolist(), rows if slots is None else rows[slots], slots, out)
    for got, wanted in zip(out, want):
        if wanted is not None:
            np.testing.assert_array_equal(got, wanted[rows])


def test_no_rows_of_no_parts():
    nothing = np.zeros(0, np.int64)
    out = np.zeros((0, 1), np.int32), np.zeros((0, 1), np.float32), np.zeros(0, np.float32), None
    assemble_rows([[]], [[]], [], None, [], nothing, None, out)
    with pytest.raises(ValueError, match="one piece for each part"):
        assemble_rows([[]], [[]], [], None, [], np.zeros(1, np.int64), None, out)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda a: a.update(rows=np.array([0, 1000])), IndexError, "row 1000 is not within 0..999"),
        (lambda a: a.update(rows=np.array([-1, 0])), IndexError, "row -1 is not within 0..999"),
        (lambda a: a.update(slots=np.array([0, 2])), IndexError, "or its slot not within the batch"),
        (lambda a: a.update(rows=np.array([0, 1], np.int32)), ValueError, "rows must be a contiguous array"),
        (lambda a: a.update(rows=np.zeros((2, 1), np.int64)), ValueError, "expected rows"),
        (lambda a: a.update(ends=[5, 705, 706]), ValueError, "one piece for each part"),
        (lambda a: a.update(ends=[5, 704, 706, 1000]), ValueError, "rows of the part"),
        (lambda a: a["numerics"].__setitem__(0, a["label"]), ValueError, "stored as uint8, as another kind"),
        (lambda a: a["tables"].__setitem__(0, a["numerics"][0]), ValueError, "stored as float32, as another kind"),
        (lambda a: a.update(label=[p.astype(np.int16) for p in a["label"]]), ValueError, "int16, which no column is"),
        (lambda a: a["label"].__setitem__(1, np.zeros(1400, np.uint8)[::2]), ValueError, "must be contiguous"),
        (lambda a: a.update(out=(*a["out"][:3], None)), ValueError, "out_group where there is a group"),
        (lambda a: a.update(out=(a["out"][0][:, :4], *a["out"][1:])), ValueError, "ids must be a contiguous array"),
        (lambda a: a.update(out=(a["out"][0], a["out"][1][:1], *a["out"][2:])), ValueError, "numeric must be"),
    ],
)
def test_what_does_not_fit_is_refused(change, error, words):
    (tables, numerics, label, group), _ = stored()
    arguments = {"tables": tables, "numerics": numerics, "label": label, "group": group, "slots": None}
    arguments |= {"ends": np.cumsum(PARTS).tolist(), "rows": np.array([3, 4]), "out": poisoned(2)}
    change(arguments)
    with pytest.raises(error, match=words):
        assemble_rows(**arguments)


@pytest.mark.parametrize(
    ("rows", "block_rows", "window_rows"),
    [(1, 1, 1), (999, 10, 100), (1000, 10, 100), (1001, 10, 95), (4097, 64, 1 << 20), (5000, 4096, 4096), (70, 100, 7)],
)
@pytest.mark.parametrize("seed", [0, -5])
def test_rows_of_an_order_are_those_of_its_twin(rows, block_rows, window_rows, seed):
    want = EpochOrder(rows, seed, 3, block_rows, window_rows).rows_at(0, rows)
    for start in sorted({0, rows // 3, rows - 1}):
        out = np.full(rows - start, -1)
        epoch_rows(rows, block_rows, window_rows, seed, 3, start, out)
        np.testing.assert_array_equal(out, want[start:])


@pytest.mark.parametrize(("start", "n"), [(-1, 2), (9, 2), (11, 0)])
def test_positions_outside_an_order_are_refused(start, n):
    with pytest.raises(IndexError, match="not all within 10 rows"):
        epoch_rows(10, 4, 8, 0, 0, start, np.zeros(n, np.int64))
