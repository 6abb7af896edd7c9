"""One batch out of a data set in memory, in an epoch's order, beside torch: `python -m pytest bench/bench_batch.py`."""

import pytest
import torch

from widedeep import ops
from widedeep.shuffle import BLOCK_ROWS, WINDOW_ROWS, EpochOrder
from widedeep.testing import gather_case

ROWS = {"cpu": 2_000_000, "cuda": 20_000_000}
BATCH = {"cpu": 4096, "cuda": 131072}


@pytest.mark.parametrize("who", ["ours", "torch"])
def test_gather(device, measure, who):
    """torch gets the list of rows for nothing."""
    rows, batch = gather_case(ROWS[device], BATCH[device], device)
    order = EpochOrder(ROWS[device], 1, 2)
    index = torch.from_numpy(order.rows_at(5, 5 + BATCH[device])).to(device)

    def plain():
        for source, target in zip(rows[:3], batch):
            torch.index_select(source, 0, index, out=target)

    calls = {
        "ours": lambda: ops.gather_batch_out(rows, (BLOCK_ROWS, WINDOW_ROWS, 1, 2), 5, out=batch),
        "torch": plain,
    }
    measure(calls[who], bytes=2 * sum(t.numel() * 4 for t in batch[:3]))
