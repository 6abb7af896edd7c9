"""Fixtures of the op benchmarks: devices, and a timer that counts what a GPU does, not what the host waits for."""

from collections.abc import Callable

import pytest
import torch

from bench.ceilings import Clock, ceilings, described
from bench.harness import commit, device_name

BEGUN = pytest.StashKey[bool]()  # whether a line has been printed


def tell(config: pytest.Config, name: str, info: dict[str, float]) -> None:
    """What `extra_info` holds, as soon as it is known, for a run that is cut short: the table of pytest-benchmark comes
    at the end, and shows neither rates nor, on a GPU, the op's own time."""
    rates = [
        f"{info[unit]:,.4g} {unit} ({100 * info[share]:.0f} % of {of})"
        for unit, share, of in (("TFLOP/s", "fraction of product", "a product"), ("GB/s", "fraction of copy", "a copy"))
        if unit in info
    ]
    out = config.get_terminal_writer()
    capture = config.pluginmanager.get_plugin("capturemanager")
    assert capture is not None  # pytest's own
    with capture.global_and_fixture_disabled():
        if out.width_of_current_line:
            out.line()
        if not config.stash.get(BEGUN, False):
            config.stash[BEGUN] = True
            device = device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
            out.sep("=", f"ops beside their ceilings: {device}, torch {torch.__version__}, commit {commit()}")
        out.line(f"{name:62}{info['us']:12,.1f} us  {', '.join(rates)}")
        out.flush()


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
def measure(benchmark, device, request) -> Callable[..., None]:
    """measure(function, flops=..., bytes=...): times calls, and notes what `ceilings.described` says of the median."""
    limits = ceilings(device)

    def run(function: Callable[[], object], flops: float = 0, bytes: float = 0) -> None:
        if device == "cuda":
            benchmark.pedantic(
                lambda: (function(), torch.cuda.synchronize()),  # type: ignore[func-returns-value]  # for its effect
                rounds=5,
                warmup_rounds=2,
            )
            seconds = Clock(device, calls=50).seconds(function)
        else:
            benchmark.pedantic(function, rounds=7, warmup_rounds=1)
            seconds = benchmark.stats.stats.median
        benchmark.extra_info |= (info := described(seconds, flops, bytes, limits))
        tell(request.config, request.node.nodeid.removeprefix("bench/bench_"), info)

    return run
