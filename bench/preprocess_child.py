"""One contender of bench.preprocess in a process of its own: `python -m bench.preprocess_child NAME ENGINE DATA OUT
WORKERS DEVICE`.

Prints one JSON object: seconds, CPU seconds of all threads and worker processes, seconds by stage, peak memory, rows,
and the mean of every feature that all contenders make, by which their work is compared. Imports are not counted;
reading the results back neither.
"""

import contextlib
import json
import os
import resource
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

OURS = ("widedeep", "widedeep, tables only")
PEERS = ("polars", "pandas")
SAMPLE_SECONDS = 0.05


def main(name: str, engine: str, data: Path, out: Path, workers: int, device: str) -> dict[str, Any]:
    """name: one of `OURS` and `PEERS`; out: an empty directory; engine, device: of ours."""
    os.environ["POLARS_MAX_THREADS"] = str(workers)  # polars reads it when it is imported
    return _ours(name, engine, data, out, workers, device) if name in OURS else _peer(name, data, out, workers)


def _ours(name: str, engine: str, data: Path, out: Path, workers: int, device: str) -> dict[str, Any]:
    import numpy as np

    from preprocess.outbrain import OutbrainConfig, layout, run
    from widedeep.shards import ShardSet

    if name != "widedeep":
        (out / "tables").mkdir()
        for path in data.iterdir():
            if path.stem.split(".")[0] not in {f"documents_{kind}" for kind in layout.ATTRIBUTES}:
                (out / "tables" / path.name).symlink_to(path.resolve())
        data = out / "tables"
    if engine == "dask":
        import preprocess.engine.cluster  # noqa: F401 (as the others' imports are not counted)
    start, cpu = time.perf_counter(), cpu_seconds()
    with Sampler(processes=engine != "threads", device=device) as sampler:
        report = run(OutbrainConfig(data, out / "shards", engine=engine, workers=workers, device=device))
    seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu - sampler.cpu_seconds
    peak = peak_bytes() if engine == "threads" else sampler.peak_bytes
    stages = {stage: values["seconds"] for stage, values in report["stages"].items()}
    sums, rows = dict.fromkeys(_features(layout), 0.0), {}
    for split in ("train", "test"):
        shards = ShardSet.open(out / "shards" / split)
        rows[split] = shards.rows
        for feature in sums:
            sums[feature] += sum(float(np.sum(part, dtype=np.float64)) for part in shards.column(feature))
    result = _result(seconds, cpu, stages, peak, rows, sums)
    return result | ({"device_bytes": sampler.device_bytes} if device == "cuda" else {})


def _peer(name: str, data: Path, out: Path, workers: int) -> dict[str, Any]:
    import importlib

    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    from preprocess.outbrain import layout
    from widedeep.feature_spec import FeatureSpec

    peer = importlib.import_module(f"bench.peer_{name}")
    pa.set_cpu_count(workers)
    spec = FeatureSpec.outbrain()
    stages: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(title: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        stages[title] = time.perf_counter() - start

    start, cpu = time.perf_counter(), cpu_seconds()
    path = peer.run(data, out, stage, dict(zip(spec.names, spec.cardinalities)))
    seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu
    peak = peak_bytes()
    table = pq.read_table(path, columns=["train", *_features(layout)])
    train = pc.sum(table["train"]).as_py()
    sums = {name: pc.sum(table[name].cast("float64")).as_py() for name in _features(layout)}
    return _result(seconds, cpu, stages, peak, {"train": train, "test": len(table) - train}, sums)


def _features(layout: Any) -> list[str]:
    return [*layout.AGES, *(f"{k}_ctr" for k in layout.CTR_MIN_ROWS), *(f"{k}_count" for k in layout.COUNT_KEYS)]


def _result(
    seconds: float, cpu: float, stages: dict, peak: int, rows: dict[str, int], sums: dict[str, float]
) -> dict[str, Any]:
    means = {name: value / sum(rows.values()) for name, value in sums.items()}
    return {
        "seconds": seconds, "cpu_seconds": cpu, "stages": stages, "peak_bytes": peak, "rows": rows, "means": means
    }  # fmt: skip


def cpu_seconds() -> float:
    """Of this process and of those of its children that have ended."""
    uses = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(use.ru_utime + use.ru_stime for use in uses)


class Sampler(threading.Thread):
    """Looks at memory every 50 ms while its with-block runs.

    Attributes:
        peak_bytes: most of this process and all below it together; a page that several map counts once (Pss).
        device_bytes: most used on the visible GPUs together above what was used before, contexts of workers included.
        cpu_seconds: what the looking took, 10 ms of CPU time for three processes.
    """

    def __init__(self, processes: bool, device: str):
        super().__init__(daemon=True)
        self.peak_bytes = self.device_bytes = 0
        self.cpu_seconds = 0.0
        self._processes, self._device, self._ended = processes, device, threading.Event()
        self._before = used_device_bytes() if device == "cuda" else 0

    def __enter__(self) -> "Sampler":
        if self._processes or self._device == "cuda":
            self.start()
        return self

    def __exit__(self, *_) -> None:
        self._ended.set()
        if self.is_alive():
            self.join()

    def run(self) -> None:
        while not self._ended.wait(SAMPLE_SECONDS):
            if self._processes:
                self.peak_bytes = max(self.peak_bytes, tree_bytes())
            if self._device == "cuda":
                self.device_bytes = max(self.device_bytes, used_device_bytes() - self._before)
        self.cpu_seconds = time.thread_time()


def tree_bytes() -> int:
    """Proportional set size of this process and all below it (Linux)."""
    import psutil

    total = 0
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        with contextlib.suppress(OSError, IndexError, StopIteration):  # it may have ended
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
            total += int(next(line for line in lines if line.startswith("Pss:")).split()[1]) * 1024
    return total


def used_device_bytes() -> int:
    """On all GPUs that this process sees."""
    import cupy

    used = 0
    for number in range(cupy.cuda.runtime.getDeviceCount()):
        with cupy.cuda.Device(number):
            free, total = cupy.cuda.runtime.memGetInfo()
            used += total - free
    return used


def peak_bytes() -> int:
    """Largest resident memory of this program so far, mapped files included (Linux). `getrusage` would also count the
    program that started it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM")


if __name__ == "__main__":
    contender, engine, data, out, workers, device = sys.argv[1:]
    print(json.dumps(main(contender, engine, Path(data), Path(out), int(workers), device)))
