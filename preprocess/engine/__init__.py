"""Runs chunk functions: in threads, in processes, or on a dask cluster. The same bytes come out of each.

Threads are the default and the lightest: numpy and pyarrow release the interpreter lock, and nothing travels between
processes. Figures: docs/scaling.md.
"""

from pathlib import Path

from preprocess.engine import gpus
from preprocess.engine.base import Engine, Pool, WorkerLost, cores
from preprocess.engine.processes import ProcessEngine
from preprocess.engine.threads import ThreadEngine
from widedeep.errors import InputError

__all__ = ["ENGINES", "Engine", "Pool", "ProcessEngine", "ThreadEngine", "WorkerLost", "cores", "make"]

ENGINES = ("threads", "processes", "dask")


def make(kind: str, workers: int | None, scratch: Path, *, scheduler: str | None = None, device: str = "cpu") -> Engine:
    """An engine by name.

    Args:
        kind: one of `ENGINES`.
        workers: None for one a core that this process may use, with device "cuda" one a GPU; threads
            share a GPU, for most of their work is reading, so there is one a core of them even then.
        scratch: existing directory, seen by all workers, for results on their way.
        scheduler: address of a running dask cluster, which has its own workers.
        device: "cuda" gives each worker process a GPU of its own.
    Raises:
        InputError: dask or a GPU is asked for and absent, or the settings do not go together.
    """
    if kind not in ENGINES:
        raise InputError(f"engine is {kind!r}, expected one of {', '.join(ENGINES)}")
    if scheduler is not None and kind != "dask":
        raise InputError(f"scheduler is {scheduler}, expected none with engine {kind!r}; take engine 'dask'")
    if scheduler is not None and workers is not None:
        raise InputError(f"workers is {workers}, expected none with a scheduler, whose cluster has its own")
    if workers is not None and workers < 1:
        raise InputError(f"workers is {workers}, expected at least 1")
    if kind == "threads":
        return ThreadEngine(cores() if workers is None else workers, scratch)
    devices = () if scheduler is not None else gpus.visible(device)
    count = workers or len(devices) or cores()
    if kind == "processes":
        return ProcessEngine(count, scratch, devices)
    try:
        from preprocess.engine.cluster import DaskEngine
    except ImportError as error:
        raise InputError(
            "engine 'dask' needs dask: pip install 'widedeep[dask]', or take engine 'processes'"
        ) from error
    return DaskEngine(count if scheduler is None else None, scratch, scheduler, devices)
