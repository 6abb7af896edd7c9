"""Errors planted in the Hopper products, each of which the CPU emulator (tests/emulated.py) must see: what it forgives
shows on a GPU alone, and there perhaps rarely. Needs no GPU.
"""

import emulated
import pytest
import torch
from test_emulated_sm90 import BF16, F16, F32, chain_of, forward_and_gradient, pytestmark

pytestmark = [pytestmark, pytest.mark.slow]

RING, ROWS, CHAIN, KERNEL = "gemm_sm90_ring.cuh", "gemm_sm90_rows.cuh", "gemm_sm90_chain.cuh", "gemm_sm90.cu"
EMPTY = "      barrier_wait(empty + turn.stage * 8, turn.parity ^ 1);\n"
HEAD = "      if (k == 0) ring.heads[turn.stage] = head;\n"
READY = "        barrier_wait(smem_address(&s.ready[group]), parity);\n"
LAST, RELEASE = "    wgmma_wait<0>();\n    wgmma_settle(acc);\n", "    release(before);\n"
SHIFTS = "      load_shifts<kEpilogue>(s, group, 0, shift);\n"
# By name: the file, what is right, what is wrong.
ERRORS = {
    # what the instructions ask for
    "products without a fence": (RING, "    wgmma_fence();\n", ""),
    "products that are not committed": (RING, "    wgmma_commit();\n", ""),
    "barriers without a fence": (KERNEL, "    fence_barrier_init();\n", ""),
    "more bytes than a barrier counts": (RING, "barrier_expect(loaded, kStage)", "barrier_expect(loaded, 1 << 20)"),
    # the ring
    "fewer bytes than come": (RING, "barrier_expect(loaded, kStage)", "barrier_expect(loaded, kStage - 16384)"),
    "a stage filled before it is empty": (RING, EMPTY, ""),
    "a stage's head written before it is empty": (RING, EMPTY + HEAD, HEAD + EMPTY),
    "a stage released before its products": (RING, "      wgmma_wait<1>();\n", ""),
    "a last stage released before its products": (RING, LAST + RELEASE, RELEASE + LAST),
    "the peer's readers not waited for": (RING, "kReaders = 2 * 4 * kCluster", "kReaders = 2 * 4"),
    # blocks of a cluster
    "a block that begins alone": (KERNEL, "  cluster_sync();\n", ""),
    "a block that ends alone": (KERNEL, "  cluster_sync();  // a block stays", "  // a block stays"),
    # rows handed over
    "rows read before they are there": (KERNEL, READY, ""),
    "rows written before they are taken": (KERNEL, "      wait_taken();\n" + SHIFTS, SHIFTS),
    "offsets read before they are there": (KERNEL, "      wait_taken();\n" + SHIFTS, SHIFTS + "      wait_taken();\n"),
    "offsets written before they are read": (KERNEL, "if (kForward && turn + 1 == kTurns<T>)", "if (kForward)"),
    "sums read before they are there": (ROWS, "  named_barrier(1, kFinishing);\n", ""),
    "sums written before they are read": (ROWS, "  named_barrier(1, kFinishing);  // the sums", "  // the sums"),
    # a chain
    "rows not waited for": (RING, "      counter_wait(needed.counter, needed.parts);\n", "      (void)needed;\n"),
    "a part of the rows not waited for": (CHAIN, "kFinishers * p.link", "kFinishers * p.link[below].tiles_n - p.link"),
    "rows counted before all lanes store": (KERNEL, "    __syncwarp();  // the counter", "    // the counter"),
    "rows said to be there that are not": (RING, "  if (counter_reached(needed.counter, needed.parts)) note", "  note"),
}  # fmt: skip


def products():
    """Of several tiles a block, in an order of threads after the other; one by one, and in a chain."""
    for seed in range(4):
        emulated.reseed(seed, multiprocessors=2)
        forward_and_gradient(520, 72, 520, F16, 0.1)
        forward_and_gradient(300, 264, 72, F32, 0.1)
        emulated.reseed(seed, multiprocessors=4)
        together, alone = chain_of(600, [72, 40, 264, 40], BF16, 0.1, 1)
        assert all(torch.equal(a, b) for some, others in zip(together, alone) for a, b in zip(some, others))


@pytest.mark.parametrize("error", ERRORS)
def test_the_emulator_sees(error, monkeypatch):
    monkeypatch.setattr(emulated, "planted", ERRORS[error])
    with pytest.raises((RuntimeError, AssertionError)):
        products()
