"""Our own kernels for cupy arrays: all that chunk functions do on a GPU.

One module of kernels is compiled in less than half a second, where cupy's own functions compile a kernel for each
operation and type when it is first used. This is the one place that launches them; every function has a numpy twin
beside its caller and gives the same bits. Launches go to the current stream; nothing here waits for the device.
"""

import threading
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

SOURCE = Path(__file__).with_name("outbrain.cu")
OPTIONS = ("--std=c++17", "--fmad=false")  # a contracted product would round otherwise than numpy's
MAX_BINS = 4096  # of `count`, in the shared memory of a block
_THREADS, _BLOCKS = 256, 4096  # a thread takes several elements where there are more than a million
_COUNT_BLOCKS = 264  # two a multiprocessor of an H100; each adds its bins to the others'
_lock = threading.Lock()


def find(keys: Any, table_keys: Any, slots: Any, xp: ModuleType) -> Any:
    """keys [n] int32 -> [n] int32 rows, -1 if null or unknown; table_keys, slots: those of `Lookup`."""
    keys, n = _contiguous(keys, xp.int32, xp)
    out = xp.empty(len(keys), xp.int32)
    table = (table_keys, np.int64(len(table_keys)), slots, np.int64(len(slots)))
    _launch(xp, "find", len(keys), keys, n, *table, out)
    return out


def take(column: Any, row: Any, xp: ModuleType) -> Any:
    """column [size] or [size, width] of any type, row [n] int32 -> [n] or [n, width]; row -1 is the last one."""
    row, n = _contiguous(row, xp.int32, xp)
    out = xp.empty((len(row), *column.shape[1:]), column.dtype)
    bits = {1: xp.uint8, 2: xp.uint16, 4: xp.uint32, 8: xp.uint64}[column.dtype.itemsize]
    size, width = np.int64(len(column)), np.int64(column.size // len(column))
    _launch(xp, f"take_{column.dtype.itemsize}", len(row), column.view(bits), size, width, row, n, out.view(bits))
    return out


def fill(ids: Any, null_id: int, kind: type, xp: ModuleType) -> tuple[Any, Any]:
    """ids [n] int32 -> [n] of an unsigned type, null_id for those below 0, and their number, [] uint64."""
    ids, n = _contiguous(ids, xp.int32, xp)
    out, nulls = xp.empty(len(ids), kind), xp.zeros((), xp.uint64)
    _launch(xp, f"fill_{out.dtype.itemsize}", len(ids), ids, n, np.int32(null_id), out, nulls)
    return out, nulls


def id_buckets(ids: Any, key: int, buckets: int, xp: ModuleType) -> Any:
    """ids [n] int32 -> [n] int32: `mix64(id ^ key) mod buckets` of `hashing`; -1 for those below 0."""
    ids, n = _contiguous(ids, xp.int32, xp)
    out = xp.empty(len(ids), xp.int32)
    _launch(xp, "id_buckets", len(ids), ids, n, np.uint64(key), np.uint64(buckets), out)
    return out


def age_in_days(timestamp: Any, published: Any, origin: int, day: int, most: int, xp: ModuleType) -> tuple[Any, Any]:
    """timestamp, published [n] int64 ms -> [n] int32 days, most + 1 if unknown, and the number of those, [] uint64."""
    out, nulls = xp.empty(len(timestamp), xp.int32), xp.zeros((), xp.uint64)
    constants = (np.int64(len(timestamp)), np.int64(origin), np.int64(day), np.int64(most))
    _launch(xp, "age_in_days", len(timestamp), timestamp, published, *constants, out, nulls)
    return out, nulls


def count(values: Any, chosen: Any, bins: int, xp: ModuleType) -> Any:
    """values [n] int32 in [0, bins), chosen [n] bool or None for all -> [bins] uint64; bins <= MAX_BINS."""
    if bins > MAX_BINS:
        raise ValueError(f"{bins} bins, expected at most {MAX_BINS}")
    out = xp.zeros(bins, xp.uint64)
    chosen = None if chosen is None else chosen.view(xp.uint8)
    arguments = (values, chosen, np.int64(len(values)), np.int32(bins), out)
    _launch(xp, "count", len(values), *arguments, blocks=_COUNT_BLOCKS)
    return out


def similarity(
    left: Any, right: Any, start: Any, length: Any, signature: Any, attribute: Any, value: Any, xp: ModuleType
) -> Any:
    """Rows left, right [n] int32, -1 for the last one -> [n] float32 dot products of `Attributes`' sparse rows."""
    out = xp.empty(len(left), xp.float32)
    rows = (start, length, signature, attribute, value)
    _launch(xp, "similarity", len(left), left, right, np.int64(len(left)), *rows, out)
    return out


def _contiguous(array: Any, kind: type, xp: ModuleType) -> tuple[Any, np.int64]:
    """What a kernel takes for an array: itself where it is so already, and its length."""
    return xp.ascontiguousarray(array, kind), np.int64(len(array))


def _launch(xp: ModuleType, name: str, n: int, *arguments: Any, blocks: int = _BLOCKS) -> None:
    """Arguments in the types of the kernel, arrays contiguous; nothing is launched for no elements."""
    if n:
        with _lock:  # the first of all threads compiles
            kernel = _kernel(xp, name)
        kernel((min(-(-n // _THREADS), blocks),), (_THREADS,), arguments)


@cache
def _kernel(xp: ModuleType, name: str) -> Any:
    return _module(xp).get_function(name)


@cache
def _module(xp: ModuleType) -> Any:
    return xp.RawModule(code=SOURCE.read_text(encoding="utf-8"), options=OPTIONS)
