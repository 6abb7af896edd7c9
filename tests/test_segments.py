"""What the CPU ops of the embeddings refuse as segments: each of these would be read or written past an array, or lose
a gradient.
"""

import pytest
import torch

from widedeep import ops

# Four ids of one table of five rows: 0, 0, 2, 3. In the same order as `ops.Segments`.
RIGHT = ([0, 2, 3, -1], [0, 2, 3, 4, 4], [0, 1, 2, 3], [0, 0, 2, 3], [0, 3])
# By name: which arrays are wrong, and how.
WRONG = {
    "more entries than ids": {1: [0, 2, 3, 5, 5]},
    "a row past its table": {0: [0, 2, 7, -1], 3: [0, 0, 2, 7]},
    "a row without entries": {1: [0, 2, 2, 4, 4], 3: [0, 0, 2, 2]},
    "rows before the first table": {4: [1, 3]},
    "entries before the first row": {1: [1, 2, 3, 4, 4]},
    "an entry past the ids": {2: [0, 1, 2, 4]},
    "keys of other rows": {3: [0, 0, 3, 3]},
}


def run(segments, ids, hotness, rows):
    """Behind each array lies one number more, which would fit: what reads past an end finds no fault with it."""
    views = [torch.tensor([*values, values[-1]], dtype=torch.int32)[:-1] for values in segments]
    B, F = len(ids), len(rows)
    lists = (hotness, [0] * F, [4 * f for f in range(F)], rows, [4] * F)
    return ops.embedding_row_gradients(ids, torch.ones(B, 4 * F), torch.ones(B), *views, *lists)


def test_right_ones_are_taken():
    (rows,), wide = run(RIGHT, torch.tensor([[0], [0], [2], [3]], dtype=torch.int32), [1], [5])
    assert rows[:, 0].tolist() == wide.tolist() == [2, 1, 1, 0]


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_wrong_ones_are_refused(wrong):
    segments = [wrong.get(i, values) for i, values in enumerate(RIGHT)]
    with pytest.raises(RuntimeError, match="not those of this batch"):
        run(segments, torch.tensor([[0], [0], [2], [3]], dtype=torch.int32), [1], [5])


def test_more_rows_of_a_table_than_the_batch_has_ids_of_it_are_refused():
    segments = ([0, 1, 2, -1], [0, 1, 2, 3, 3], [0, 1, 2, -1], [0, 1, 2, 20], [0, 3, 3])
    with pytest.raises(RuntimeError, match="not those of this batch"):
        run(segments, torch.zeros(2, 2, dtype=torch.int32), [1, 1], [10, 10])
