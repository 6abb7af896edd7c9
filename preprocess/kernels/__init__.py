"""Our own kernels for cupy arrays: what array functions cannot say, or say in many passes.

This is the one place that launches them. Every function here has a numpy twin beside its caller and gives the same
bits: `hashing`, `outbrain.similarity`. Launches go to the current stream; nothing here waits for the device.
"""

import threading
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

SOURCE = Path(__file__).with_name("outbrain.cu")
OPTIONS = ("--std=c++17", "--fmad=false")  # a contracted product would round otherwise than numpy's
_THREADS, _BLOCKS = 256, 4096  # a thread takes several elements where there are more than a million
_lock = threading.Lock()


def hash_ids(ids: Any, key: int, xp: ModuleType) -> Any:
    """[n] of any integer type -> [n] uint64: `mix64(id ^ key)` of `hashing`."""
    ids = xp.ascontiguousarray(ids, xp.int64)
    out = xp.empty(len(ids), xp.uint64)
    _launch(xp, "hash_ids", len(ids), ids, np.int64(len(ids)), np.uint64(key), out)
    return out


def id_buckets(ids: Any, key: int, buckets: int, xp: ModuleType) -> Any:
    """[n] of any integer type -> [n] int32: `mix64(id ^ key) mod buckets`."""
    ids = xp.ascontiguousarray(ids, xp.int64)
    out = xp.empty(len(ids), xp.int32)
    _launch(xp, "id_buckets", len(ids), ids, np.int64(len(ids)), np.uint64(key), np.uint64(buckets), out)
    return out


def similarity(
    left: Any, right: Any, start: Any, length: Any, signature: Any, attribute: Any, value: Any, xp: ModuleType
) -> Any:
    """Rows left, right [n] int32, -1 for the last one -> [n] float64 dot products of `Attributes`' sparse rows."""
    out = xp.empty(len(left), xp.float64)
    rows = (start, length, signature, attribute, value)
    _launch(xp, "similarity", len(left), left, right, np.int64(len(left)), *rows, out)
    return out


def segment_sums(values: Any, start: Any, xp: ModuleType) -> Any:
    """[entries] float64, [n] int64 ascending first entries -> [n] float64, each summed from left to right."""
    out = xp.empty(len(start), xp.float64)
    _launch(xp, "segment_sums", len(start), values, np.int64(len(values)), start, np.int64(len(start)), out)
    return out


def segment_signatures(attribute: Any, start: Any, xp: ModuleType) -> Any:
    """[entries] int32, [n] int64 ascending first entries -> [n] uint64 with bit (a mod 64) for every attribute a."""
    out = xp.empty(len(start), xp.uint64)
    _launch(xp, "segment_signatures", len(start), attribute, np.int64(len(attribute)), start, np.int64(len(start)), out)
    return out


def _launch(xp: ModuleType, name: str, n: int, *arguments: Any) -> None:
    """Arguments in the types of the kernel, arrays contiguous; nothing is launched for no elements."""
    if n:
        with _lock:  # the first of all threads compiles
            kernel = _kernel(xp, name)
        kernel((min(-(-n // _THREADS), _BLOCKS),), (_THREADS,), arguments)


@cache
def _kernel(xp: ModuleType, name: str) -> Any:
    return _module(xp).get_function(name)


@cache
def _module(xp: ModuleType) -> Any:
    return xp.RawModule(code=SOURCE.read_text(encoding="utf-8"), options=OPTIONS)
