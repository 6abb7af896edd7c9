"""Fixtures of the op benchmarks: devices, and a timer that counts what a GPU does, not what the host waits for."""

import statistics
from collections.abc import Callable

import pytest
import torch

from bench.harness import commit, device_name


def pytest_benchmark_update_machine_info(config, machine_info):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine_info |= {"device": device_name(device), "torch": torch.__version__, "commit": commit()}


@pytest.fixture(params=["cpu", "cuda"])
def device(request) -> str:
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        from widedeep._load import has_cuda_kernels

        if not has_cuda_kernels:
            pytest.skip("the CUDA kernels are not built")
    return request.param


@pytest.fixture
def measure(benchmark, device) -> Callable[..., None]:
    """measure(function, flops=..., bytes=...): times calls, and notes microseconds, TFLOP/s and GB/s of the median."""

    def run(function: Callable[[], object], flops: float = 0, bytes: float = 0) -> None:
        if device == "cuda":
            benchmark.pedantic(lambda: (function(), torch.cuda.synchronize()), rounds=5, warmup_rounds=2)
            seconds = _event_time(function)
        else:
            benchmark.pedantic(function, rounds=7, warmup_rounds=1)
            seconds = benchmark.stats.stats.median
        benchmark.extra_info["us"] = round(seconds * 1e6, 2)
        if flops:
            benchmark.extra_info["TFLOP/s"] = round(flops / seconds / 1e12, 3)
        if bytes:
            benchmark.extra_info["GB/s"] = round(bytes / seconds / 1e9, 1)

    return run


def _event_time(function: Callable[[], object], calls: int = 50) -> float:
    """Median seconds between events around single calls, with a cold second-level cache."""
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    times = []
    for _ in range(calls):
        flush.zero_()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1000)
    return statistics.median(times)
