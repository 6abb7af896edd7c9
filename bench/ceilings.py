"""What a device can do at most, measured here and now: bytes/s of a copy, flop/s of a product; and the clock of ops."""

import functools
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from widedeep.steps.timing import in_turn
from widedeep.testing import normal

WIDTH = 1024  # of the product: a hidden layer of the Outbrain model
ROWS = {"cpu": 4096, "cuda": 131072}
DTYPES = {"cpu": torch.float32, "cuda": torch.float16}
SUSTAINED = 0.2  # seconds: the clock of an H100 follows its power within some tens of milliseconds
COPIED = {"cpu": 16 << 20, "cuda": 512 << 20}  # bytes: as much as an op reads; on a CPU a large cache may hold it


class Clock:
    """Seconds of single calls, medians: on a GPU between CUDA events, with a flushed L2 cache.

    Args:
        sustained: the mean of calls that follow each other for SUSTAINED seconds instead, after as many that do not
            count, on a GPU replayed from a CUDA graph: as in a long run, in which a card may come to its power limit
            and lower its clock. What the cache holds from the call before is left there.
    """

    def __init__(self, device: str, calls: int, sustained: bool = False):
        self.device, self.calls, self.sustained = torch.device(device), calls, sustained
        flushes = device == "cuda" and not sustained
        self.flush = torch.empty(512 << 20, dtype=torch.int8, device=device) if flushes else None

    def seconds(self, function: Callable[[], object]) -> float:
        if self.sustained:
            return in_turn([function], self.device, SUSTAINED, rounds=1)[0]
        for _ in range(2):
            function()
        timed = self._on_cpu if self.flush is None else self._on_gpu
        return statistics.median(timed(function) for _ in range(self.calls))

    def _on_cpu(self, function: Callable[[], object]) -> float:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    def _on_gpu(self, function: Callable[[], object]) -> float:
        # Long enough for the host to queue an op of some launches: no gap between them is timed. Of a peer that makes
        # dozens some of the host's time is.
        self.flush.zero_()  # type: ignore[union-attr]  # as `seconds` has seen
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1000


class Ceilings(NamedTuple):
    """copy: bytes/s, read and written ones counted. product: flop/s of torch's [rows, 1024] x [1024, 1024]^T, in fp16
    on a GPU and fp32 on a CPU.
    """

    copy: float
    product: float


@functools.cache
def ceilings(device: str, calls: int = 9, sustained: bool = False) -> Ceilings:
    """Of "cpu" or "cuda", measured at the first call of the process, as `Clock` does what is held against them."""
    clock, rows, dtype = Clock(device, calls, sustained), ROWS[device], DTYPES[device]
    source, target = (torch.ones(COPIED[device] // 4, device=device) for _ in range(2))
    copy = 2 * COPIED[device] / clock.seconds(lambda: target.copy_(source))
    a, out = (normal(rows, WIDTH, device=device, dtype=dtype, key=key) for key in "ab")
    w = normal(WIDTH, WIDTH, device=device, dtype=dtype, scale=WIDTH**-0.5)
    product = 2 * rows * WIDTH * WIDTH / clock.seconds(lambda: torch.mm(a, w.t(), out=out))
    return Ceilings(copy, product)


def described(seconds: float, flops: float, bytes: float, limits: Ceilings) -> dict[str, float]:
    """A measurement in the words of a report: microseconds, and for work that is counted its rate, the ceiling of that
    rate, and the share of it that was reached.
    """
    info = {"us": round(seconds * 1e6, 2)}
    if flops:
        info |= {"flops": flops, "TFLOP/s": round(flops / seconds / 1e12, 3)}
        info |= {"ceiling TFLOP/s": round(limits.product / 1e12, 3)}
        info |= {"fraction of product": round(flops / seconds / limits.product, 3)}
    if bytes:
        info |= {"bytes": bytes, "GB/s": round(bytes / seconds / 1e9, 3)}
        info |= {"ceiling GB/s": round(limits.copy / 1e9, 1)}
        info |= {"fraction of copy": round(bytes / seconds / limits.copy, 3)}
    return info
