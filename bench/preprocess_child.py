"""One contender of bench.preprocess in a process of its own: `python -m bench.preprocess_child NAME DATA OUT WORKERS`.

Prints one JSON object: seconds, CPU seconds of all threads, seconds by stage, peak memory of the process, rows, and the
mean of every feature that all contenders make, by which their work is compared. Imports are not counted; reading the
results back neither.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

OURS = ("widedeep", "widedeep, tables only")
PEERS = ("polars", "pandas")


def main(name: str, data: Path, out: Path, workers: int) -> dict[str, Any]:
    """name: one of `OURS` and `PEERS`; out: an empty directory."""
    os.environ["POLARS_MAX_THREADS"] = str(workers)  # polars reads it when it is imported
    contender = _ours if name in OURS else _peer
    return contender(name, data, out, workers)


def _ours(name: str, data: Path, out: Path, workers: int) -> dict[str, Any]:
    import numpy as np

    from preprocess.outbrain import OutbrainConfig, layout, run
    from widedeep.shards import ShardSet

    if name != "widedeep":
        (out / "tables").mkdir()
        for path in data.iterdir():
            if path.stem.split(".")[0] not in {f"documents_{kind}" for kind in layout.ATTRIBUTES}:
                (out / "tables" / path.name).symlink_to(path.resolve())
        data = out / "tables"
    start, cpu = time.perf_counter(), time.process_time()
    report = run(OutbrainConfig(data, out / "shards", workers=workers))
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    peak = peak_bytes()
    stages = {stage: values["seconds"] for stage, values in report["stages"].items()}
    sums, rows = dict.fromkeys(_features(layout), 0.0), {}
    for split in ("train", "test"):
        shards = ShardSet.open(out / "shards" / split)
        rows[split] = shards.rows
        for feature in sums:
            sums[feature] += sum(float(np.sum(part, dtype=np.float64)) for part in shards.column(feature))
    return _result(seconds, cpu, stages, peak, rows, sums)


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

    start, cpu = time.perf_counter(), time.process_time()
    path = peer.run(data, out, stage, dict(zip(spec.names, spec.cardinalities)))
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
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


def peak_bytes() -> int:
    """Largest resident memory of this program so far, mapped files included (Linux). `getrusage` would also count the
    program that started it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM")


if __name__ == "__main__":
    contender, data, out, workers = sys.argv[1:]
    print(json.dumps(main(contender, Path(data), Path(out), int(workers))))
